# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A recogniser of tones: words are tones of a frequency each, so that what was said is known to the sample."""

from types import SimpleNamespace

import numpy as np
import torch
from transformers import BatchFeature

from mdm_asr_hf.generation_configuration_mdm_asr import MDMASRGenerationConfig
from mdm_asr_hf.torch_generation_mdm_asr import MDMASRGenerateOutput

RATE = 16_000
WORD_S, GAP_S = 0.3, 0.06
NUM_WORDS = 24
EOS, PAD, TORN = 0, 1, 2
FIRST_WORD = 3


def tone(word):
    """A word: a tone that begins and ends softly, so that no click spreads its energy."""
    time_s = np.arange(round(WORD_S * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (400 + 200 * word) * time_s) * np.sin(np.pi * time_s / WORD_S) ** 0.25).astype(
        np.float32
    )


def clip(words):
    """Words with gaps between them that are too short to be pauses."""
    gap = np.zeros(round(GAP_S * RATE), np.float32)
    parts = [part for word in words for part in (tone(word), gap)]
    return np.concatenate(parts[:-1])


def recording(clips, pauses_s, seed=0):
    """Clips, each after a pause, in a little noise."""
    parts = []
    for words, pause_s in zip(clips, pauses_s, strict=True):
        parts += [np.zeros(round(pause_s * RATE), np.float32), clip(words)]
    samples = np.concatenate(parts)
    return samples + (1e-4 * np.random.default_rng(seed).standard_normal(len(samples))).astype(np.float32)


def text_of(clips):
    return " ".join(f"w{word}" for words in clips for word in words)


class ToneTokenizer:
    all_special_ids = [EOS, PAD]

    def decode(self, ids, **kwargs):
        return "".join(" torn" if i == TORN else f" w{i - FIRST_WORD}" for i in ids if i not in (EOS, PAD))


class ToneProcessor:
    def __init__(self, max_duration_s=30.0):
        self.feature_extractor = SimpleNamespace(sampling_rate=RATE, max_duration_s=max_duration_s)
        self.tokenizer = ToneTokenizer()

    def __call__(self, clips, sampling_rate):
        assert sampling_rate == RATE and all(len(one) <= self.feature_extractor.max_duration_s * RATE for one in clips)
        rows = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in clips], batch_first=True)
        mask = torch.arange(rows.shape[1]) < torch.tensor([len(one) for one in clips])[:, None]
        return BatchFeature({"input_features": rows, "attention_mask": mask})

    def hotword_ids(self, hotwords):
        return [[FIRST_WORD + int(word[1:])] for word in hotwords]


class ToneModel:
    """
    Hears the tones of a window. One that the window's edge cuts is heard as another word, and its times, as those of
    attention, are off by up to `jitter_s`. `calls` notes what `generate` was given.
    """

    device = torch.device("cpu")
    memory_errors = (torch.OutOfMemoryError,)

    def __init__(self, jitter_s=0.0, fails=lambda rows: False):
        self.generation_config = MDMASRGenerationConfig()
        self.config = SimpleNamespace(eos_token_id=EOS, decoder_start_token_id=2)
        self.jitter_s, self.fails, self.calls = jitter_s, fails, []

    def generate(
        self, input_features, attention_mask, generation_config, generator, return_token_timestamps, **kwargs
    ):
        self.calls.append({"batch_size": len(input_features), "times": return_token_timestamps, **kwargs})
        if self.fails(input_features):
            raise ValueError("this batch cannot be decoded. Split it.")
        rows = [
            self._hear(row[: int(mask.sum())].numpy())
            for row, mask in zip(input_features, attention_mask, strict=True)
        ]
        ids = [[word for word, _, _ in row] + [EOS] for row in rows]
        width = max(map(len, ids))

        def padded(values, padding):
            return torch.tensor([[*row, *[padding] * (width - len(row))] for row in values])

        times_s = None
        if return_token_timestamps:
            times_s = torch.zeros(len(rows), width, 2)
            for i, row in enumerate(rows):
                for k, (_, start_s, end_s) in enumerate(row):
                    times_s[i, k] = torch.tensor([start_s, end_s])
        return MDMASRGenerateOutput(
            sequences=padded(ids, PAD),
            confidence=padded([[0.9] * len(row) for row in ids], 0.0),
            commit_steps=padded([[1] * len(row) for row in ids], 0),
            nfe=torch.tensor([len(row) for row in ids]),
            token_timestamps=times_s,
        )

    def _hear(self, samples):
        """Words (token, start_s, end_s) of a window (N,)."""
        frame = RATE // 100
        padded = np.pad(samples, (0, -len(samples) % frame))
        is_loud = np.abs(padded).reshape(-1, frame).max(axis=1) > 0.05
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_loud, [False]])))
        words = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            piece = padded[start * frame : end * frame]
            if len(piece) < 0.85 * WORD_S * RATE:
                if len(piece) > 0.3 * WORD_S * RATE:
                    words.append((TORN, start / 100, end / 100))
                continue
            spectrum = np.abs(np.fft.rfft(piece, RATE))
            word = round((int(spectrum.argmax()) - 400) / 200)
            off_s = self.jitter_s * np.sin(7.0 * start + word)
            words.append((FIRST_WORD + word, max(start / 100 + off_s, 0.0), max(end / 100 + off_s, 0.0)))
        return words
