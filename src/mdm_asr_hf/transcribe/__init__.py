# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Recordings of any length and live audio: windows, speech, transcripts, subtitles."""
