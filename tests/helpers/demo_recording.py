# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The recording of the demo, its text as Whisper tiny.en writes it, and where others lie beside the repository."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "demo" / "common_voice_en_48.flac"
TEXT = "He had found where his treasure was, and was frightened of what might happen."
# Of its words, by the forced aligner of pocketsphinx, in seconds.
STARTS_S = [0.68, 0.82, 0.93, 1.25, 1.37, 1.64, 1.93, 2.61, 2.7, 2.91, 3.4, 3.5, 3.69, 3.87]
# With transcripts.
LIBRISPEECH = ROOT.parent / "shared" / "speech" / "eval" / "librispeech"
needs_librispeech = pytest.mark.skipif(
    not LIBRISPEECH.exists(), reason="the LibriSpeech recordings are not beside the repository"
)
