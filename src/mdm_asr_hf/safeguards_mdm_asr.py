# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Whisper's own safeguards (arXiv 2212.04356, section 4.5), with its names: a text that repeats itself, that the donor is
unsure of, or that it wrote where nobody spoke.
"""

import math
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .drafting_mdm_asr import log_probs_of

# Settings of `generate` that leave all of them out: the donor's own greedy text, in one attempt.
NO_SAFEGUARDS = {
    "temperature": 0.0,
    "no_speech_threshold": None,
    "logprob_threshold": None,
    "compression_ratio_threshold": None,
}


def compression_ratio(token_ids: Sequence[int], vocab_size: int) -> float:
    """Bytes of the tokens over their bytes compressed by zlib, as transformers' Whisper counts them: above 1.35 or so
    where a phrase comes again and again. 0 of no tokens."""
    width = int(math.log2(vocab_size) / 8) + 1
    raw = b"".join(token_id.to_bytes(width, "little") for token_id in token_ids)
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def same_runs(items: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
    """For each n, how many tokens or words in a row are the same as the one n before them: the lengths of such
    stretches."""
    items = np.asarray(items)
    for n in range(1, len(items) // 2 + 1):
        ends = np.concatenate([[True], items[n:] != items[:-n], [True]])
        yield n, np.diff(np.flatnonzero(ends)) - 1


def repetitions(token_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The lengths of the phrases that follow themselves in a text, and how often each comes in a row, at most."""
    for length, runs in same_runs(token_ids):
        if (times := int(runs.max()) // length + 1) > 1:
            yield length, times


def is_suspicious(token_ids: Sequence[int]) -> bool:
    """Whether of the phrases that follow themselves the one that covers the most tokens comes three times in a row, or
    is of four tokens or more: people do speak so, but a decoder whose encoder lacks silence does it oftener."""
    length, times = max(repetitions(token_ids), key=math.prod, default=(0, 1))
    return times >= 3 or (times == 2 and length >= 4)


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether a phrase comes oftener than people say it; then it does in all that the text goes on to."""
    found = repetitions(token_ids)
    return any((times >= 3 and length >= 4) or (times >= 4 and length * times >= 8) for length, times in found)


def loop_length(token_ids: Sequence[int]) -> int:
    """The tokens of a text up to where a loop is told, or all of them."""
    number = len(token_ids)
    return bisect_left(range(number), True, key=lambda length: is_loop(token_ids[:length]))


def mean_log_prob(log_probs: Sequence[float]) -> float:
    """The mean log-probability of a text's tokens and of its end; 0 of none."""
    return sum(log_probs) / len(log_probs) if len(log_probs) else 0.0


def repeats_itself(token_ids: Sequence[int], vocab_size: int, compression_ratio_threshold: float | None) -> bool:
    """Whether a text is a loop, by its compression ratio or by a phrase of it; not without a threshold."""
    if compression_ratio_threshold is None:
        return False
    return compression_ratio(token_ids, vocab_size) > compression_ratio_threshold or is_loop(token_ids)


def no_speech_probability(logits: Any, no_speech_token_id: int) -> np.ndarray:
    """
    The donor's probability (R,) of <|nospeech|> by its logits (R, V) behind the start of the prompt. Above
    `no_speech_threshold` nobody speaks. Whisper also asks that what it wrote is improbable; on audio of its own length
    the probability tells speech from sounds by itself, and the text need not be written
    (`benchmarks/run_safeguards.py`).
    """
    rows, columns = np.arange(len(logits)), np.zeros(len(logits), dtype=np.int64)
    return np.exp(log_probs_of(logits[:, None], rows, columns, columns + no_speech_token_id))
