# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Speech with known word times, from joined clips or a forced aligner."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Speech begins with the first frame that is no more than this below the clip's loud frames.
ONSET_DB = 30.0
# What is softer than this above the clip's quietest frames is noise.
NOISE_DB = 10.0
# Of full scale: digital silence and the dither on it.
LEAST_DB = -90.0
HOP_S = 0.01
LONGEST_GAP_S = 0.8


@dataclass
class TimedSpeech:
    """
    A recording and what is known of its words' times.

    Attributes:
        name (`str`): of its clips.
        samples (`np.ndarray` of shape (N,)): float32, mono.
        text (`str`): its transcript.
        starts_s (`list`): of each word of `text.split()`, the second it starts at, or None where that is not known.
        ends_s (`list`): likewise.
    """

    name: str
    samples: np.ndarray
    text: str
    starts_s: list[float | None]
    ends_s: list[float | None]


def speech_span(samples: np.ndarray, rate_hz: int) -> tuple[float, float]:
    """Start and end of speech in seconds, by the energy of frames of 25 ms; the whole clip if it holds no signal."""
    hop, size = round(HOP_S * rate_hz), round(0.025 * rate_hz)
    if len(samples) < 2 * size:
        return 0.0, len(samples) / rate_hz
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop].astype(np.float64)
    level_db = 10 * np.log10(np.mean((frames - frames.mean(axis=1, keepdims=True)) ** 2, axis=1) + 1e-12)
    loud_db, quiet_db = np.percentile(level_db, 95), np.percentile(level_db, 5)
    is_speech = level_db > max(loud_db - ONSET_DB, min(quiet_db + NOISE_DB, loud_db - NOISE_DB))
    # A click is no speech: 3 of 5 frames.
    is_speech &= np.convolve(is_speech, np.ones(5), mode="same") >= 3
    if loud_db < LEAST_DB or not is_speech.any():
        return 0.0, len(samples) / rate_hz
    places = np.flatnonzero(is_speech)
    # The middle of the frame that crosses the threshold.
    return float(places[0] * hop + size / 2) / rate_hz, float(places[-1] * hop + size / 2) / rate_hz


def join_clips(
    clips: Sequence[np.ndarray], texts: Sequence[str], rate_hz: int, generator: np.random.Generator, name: str = ""
) -> TimedSpeech:
    """
    Clips one behind the other, each cut to its speech, with silences of random lengths before, between and behind
    them. The first word of each clip starts where its speech does, the last one ends where that ends.
    """
    pieces, starts_s, ends_s, now_s = [], [], [], 0.0

    def add(samples: np.ndarray) -> None:
        nonlocal now_s
        pieces.append(samples.astype(np.float32))
        now_s += len(samples) / rate_hz

    def silence() -> np.ndarray:
        # Not digital silence, which no recording has.
        return generator.normal(0.0, 1e-4, int(generator.uniform(0.0, LONGEST_GAP_S) * rate_hz))

    add(silence())
    for clip, text in zip(clips, texts, strict=True):
        start_s, end_s = speech_span(clip, rate_hz)
        # 20 ms around it are faded, so that the cut is not heard.
        begin, end = max(int((start_s - 0.02) * rate_hz), 0), int((end_s + 0.02) * rate_hz)
        cut = np.array(clip[begin:end], dtype=np.float32)
        fade = min(int(0.02 * rate_hz), len(cut) // 2)
        ramp = np.linspace(0.0, 1.0, fade, dtype=np.float32)
        cut[:fade] *= ramp
        cut[len(cut) - fade :] *= ramp[::-1]
        middle = [None] * (len(text.split()) - 1)
        starts_s += [now_s + start_s - begin / rate_hz, *middle]
        ends_s += [*middle, now_s + end_s - begin / rate_hz]
        add(cut)
        add(silence())
    return TimedSpeech(name, np.concatenate(pieces), " ".join(texts), starts_s, ends_s)


class ForcedAligner:
    """
    Word times of a known English text, by the acoustic model that comes with `pip install pocketsphinx`.
    """

    rate_hz = 16000

    def __init__(self):
        try:
            import pocketsphinx
        except ImportError as error:
            raise ImportError("The forced aligner needs `pip install 'pocketsphinx>=5'`.") from error
        self.decoder = pocketsphinx.Decoder(samprate=self.rate_hz, lm=None, loglevel="FATAL", bestpath=False)

    def align(self, samples: np.ndarray, words: Sequence[str]) -> list[tuple[float, float]] | None:
        """Start and end of each word in seconds; None where a word is not in its dictionary or none of it fits."""
        spoken = [plain_word(word) for word in words]
        if not spoken or any(not word or self.decoder.lookup_word(word) is None for word in spoken):
            return None
        pcm = (np.clip(samples, -1.0, 1.0) * 32767).astype(np.int16).tobytes()
        try:
            self.decoder.set_align_text(" ".join(spoken))
            self.decoder.start_utt()
            self.decoder.process_raw(pcm, full_utt=True)
            self.decoder.end_utt()
            found = [segment for segment in self.decoder.seg() or [] if not segment.word.startswith(("<", "["))]
        except RuntimeError:
            return None
        if len(found) != len(words):
            return None
        # Frames of 10 ms, the last one included.
        return [(segment.start_frame / 100, (segment.end_frame + 1) / 100) for segment in found]


def plain_word(word: str) -> str:
    """A word as dictionaries have it: small letters, apostrophes inside."""
    kept = "".join(c for c in word.lower().replace("’", "'") if c.isalnum() or c == "'")
    return kept.strip("'") if kept.strip("'") else ""


def match_words(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the words that both have, in an order that both share; case and punctuation do not count."""
    first, second = [plain_word(word) for word in reference], [plain_word(word) for word in hypothesis]
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return [(b.a + k, b.b + k) for b in blocks for k in range(b.size) if first[b.a + k]]
