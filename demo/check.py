#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Fails if the transcript on standard input has a word error rate of more than 20 % against transcript.txt."""

import sys
from pathlib import Path

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

MAX_WER = 0.20

normalise = EnglishTextNormalizer({})
reference = normalise((Path(__file__).parent / "transcript.txt").read_text(encoding="utf-8"))
wer = jiwer.wer(reference, normalise(sys.stdin.read()))
print(f"word error rate against demo/transcript.txt: {100 * wer:.1f} %", file=sys.stderr)
sys.exit(int(wer > MAX_WER))
