# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A page to look at the drafts with, on gradio."""
