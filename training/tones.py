#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
A language of tones, for trying the training path without any recordings: every word is a chord of its own.

    python training/tones.py OUTPUT        # writes OUTPUT/train and OUTPUT/eval, audiofolders with metadata.jsonl

`synth` is also a TTS callable for training/synthesize.py (`--tts training/tones.py:synth`).
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000
WORD_S, GAP_S = 0.35, 0.12
# Any word has a chord; these are the ones the sentences are made of.
WORDS = "river stone yellow water garden winter music paper north silver".split()
NUM_ROWS = {"train": 120, "eval": 24}


def synth(text: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Samples (N,) and their rate in Hz: for each word two tones, faded in and out, and a little noise."""
    time_s = np.arange(int(WORD_S * RATE_HZ)) / RATE_HZ
    fade = np.sin(np.pi * np.arange(len(time_s)) / len(time_s)) ** 0.5
    gap = np.zeros(int(GAP_S * RATE_HZ))
    pieces = [gap]
    for word in text.split():
        number = sum(ord(letter) * (i + 1) for i, letter in enumerate(word))
        low_hz, high_hz = 200 + 60 * (number % 11), 1000 + 130 * (number % 13)
        pieces += [0.3 * fade * (np.sin(2 * np.pi * low_hz * time_s) + np.sin(2 * np.pi * high_hz * time_s)), gap]
    samples = np.concatenate(pieces)
    return (samples + rng.normal(0, 0.003, len(samples))).astype(np.float32), RATE_HZ


def main(output: Path) -> None:
    draw, rng = random.Random(0), np.random.default_rng(0)
    for name, num_rows in NUM_ROWS.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for i in range(num_rows):
                text = " ".join(draw.choices(WORDS, k=draw.randint(2, 5)))
                samples, rate_hz = synth(text, rng)
                soundfile.write(folder / f"{i:03}.flac", samples, rate_hz)
                row = {"file_name": f"{i:03}.flac", "text": text, "duration_s": round(len(samples) / rate_hz, 3)}
                metadata.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__.strip())
    main(Path(sys.argv[1]))
