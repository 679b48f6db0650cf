# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The recording of the demo, and its text as Whisper tiny.en writes it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "demo" / "common_voice_en_48.flac"
TEXT = "He had found where his treasure was, and was frightened of what might happen."
