# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Clips of speech that has no transcripts: recordings joined, cut in the middle of words, with silence and noise."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soundfile

from ..audio_mdm_asr import load_audio
from ..data.augmentation import Augmenter
from ..data.sources import BadRows, Source, check_bad_share, load_utterances

# Whisper hears 30 s: a clip may grow by a tenth when it is played more slowly.
MIN_S, MAX_S = 1.0, 27.0
# Audio that is worked through, and kept, at once.
BLOCK_S = 3600.0
# Shares of clips that stay one recording, that lose their beginning or end, that silence surrounds, that noise, a
# room, another speed or level change.
ALONE_SHARE, CUT_SHARE, SILENCE_SHARE, AUGMENTED_SHARE = 0.5, 0.3, 0.3, 0.5
MAX_PAUSE_S, MAX_SILENCE_S, MAX_CUT = 0.8, 1.5, 0.4
# Longer recordings are read in part.
WHOLE_S = 60.0
# A source of which more than this share cannot be read is a mistake, not a source.
MOST_UNREADABLE = 0.05
# Of so many recordings one is held out, of fewer the last.
HELD_OUT_EVERY = 40


@dataclass(frozen=True)
class Span:
    """A stretch of one recording, from and to seconds."""

    row: int
    start_s: float
    stop_s: float

    @property
    def duration_s(self) -> float:
        return self.stop_s - self.start_s


@dataclass(frozen=True)
class Clip:
    """
    What a clip is made of: spans with pauses (s) between them, of which `cut_s` are cut off at both ends, with
    `silence_s` around it; `augment_seed` is None where nothing is changed.
    """

    spans: tuple[Span, ...]
    pauses_s: tuple[float, ...] = ()
    cut_s: tuple[float, float] = (0.0, 0.0)
    silence_s: tuple[float, float] = (0.0, 0.0)
    augment_seed: int | None = None

    @property
    def duration_s(self) -> float:
        inner = sum(span.duration_s for span in self.spans) + sum(self.pauses_s)
        return inner - sum(self.cut_s) + sum(self.silence_s)


class SpeechClips:
    """
    The audio of a source as clips of 1 to 27 s, in blocks of about an hour. A block's clips depend on the seed and on
    the source's order alone, so that what was made of a block stays good when the source grows.

    Args:
        source ([`Source`], `dict` or `str`): of audio; its texts are not read.
        held_out (`bool`): the recordings that are kept from training, one in forty, as they are; or all others.
        passes (`int`): how often each recording is taken, cut and changed in another way each time.
        seed (`int`)
        max_duration_s (`float`, *optional*): the longest clip, if the model hears less.

    Raises:
        ValueError: a source that is missing or has no audio.
    """

    def __init__(
        self,
        source: Any,
        *,
        held_out: bool = False,
        passes: int = 1,
        seed: int = 0,
        max_duration_s: float | None = None,
    ):
        if type(passes) is not int or passes < 1:
            raise ValueError(f"`passes` must be an integer of at least 1, got {passes!r}.")
        self.source = replace(Source.of(source), text_column=None)
        self.utterances = load_utterances(self.source, on_bad_row="skip", max_bad_share=1.0)
        bad = self.utterances.bad_rows
        self.check_readable(bad, len(self.utterances) + len(bad))
        self.held_out, self.passes, self.seed = held_out, passes, seed
        self.max_s = min(max_duration_s or MAX_S, MAX_S)
        self.augment = Augmenter(noises=("white", "pink"))
        self._last: tuple[int, float, np.ndarray] | None = None
        rows = np.arange(len(self.utterances))
        is_held_out = rows % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
        if not is_held_out.any():
            is_held_out[-1] = True
        kept = rows[is_held_out == held_out]
        if not len(kept):
            raise ValueError(f"{self.source.path!r} has one recording only, and one is held out. Add another.")
        hours = np.floor(np.cumsum(self.utterances.durations_s[kept]) / BLOCK_S).astype(int)
        self._blocks = [kept[hours == hour] for hour in np.unique(hours)]

    def __len__(self) -> int:
        return len(self._blocks) * self.passes

    def check_readable(self, bad: BadRows, number: int, is_sample: bool = False) -> None:
        """Raises ValueError where so many of the recordings, or clips, are bad that this is the wrong source."""
        remedy = "Mend or remove these recordings."
        check_bad_share(bad, number, repr(self.source.path), MOST_UNREADABLE, is_sample=is_sample, remedy=remedy)

    def language(self, clip: Clip) -> str | None:
        return self.utterances.rows[clip.spans[0].row].get("language")

    def plan(self, block: int) -> list[Clip]:
        """The clips of a block."""
        number, turn = block % len(self._blocks), block // len(self._blocks)
        rng = np.random.default_rng([self.seed, turn, number])
        rows = self._blocks[number]
        if self.held_out:
            return [Clip((span,)) for row in rows for span in self._spans(int(row), rng)]
        by_language: dict[str, list[Span]] = {}
        for row in rng.permutation(rows):
            language = self.utterances.rows[row].get("language") or ""
            by_language.setdefault(language, []).extend(self._spans(int(row), rng))
        joined = (clip for spans in by_language.values() for clip in self._join(spans, rng))
        return [self._change(clip, rng, is_first=turn == 0) for clip in joined]

    def _spans(self, row: int, rng: np.random.Generator) -> Iterator[Span]:
        """A recording, or if it is longer than a clip, its pieces."""
        start_s, end_s = 0.0, float(self.utterances.rows[row]["duration_s"])
        while end_s - start_s > self.max_s:
            # The last piece is not left too short.
            longest_s = min(self.max_s, end_s - start_s - MIN_S)
            stop_s = start_s + float(rng.uniform(min(5 * MIN_S, longest_s), longest_s))
            yield Span(row, start_s, stop_s)
            start_s = stop_s
        if end_s > start_s:
            yield Span(row, start_s, end_s)

    def _join(self, spans: list[Span], rng: np.random.Generator) -> Iterator[Clip]:
        spans = spans[::-1]
        while spans:
            chosen, pauses_s = [spans.pop()], []
            left_s = rng.uniform(MIN_S, self.max_s) - chosen[0].duration_s
            alone = rng.random() < ALONE_SHARE
            while not alone and spans:
                pause_s = float(rng.uniform(0.0, MAX_PAUSE_S))
                left_s -= pause_s + spans[-1].duration_s
                if left_s < 0:
                    break
                chosen.append(spans.pop())
                pauses_s.append(pause_s)
            yield Clip(tuple(chosen), tuple(pauses_s))

    def _change(self, clip: Clip, rng: np.random.Generator, is_first: bool) -> Clip:
        cut, silence, augmented = rng.random(3)
        if cut < CUT_SHARE:
            room_s = max(0.0, min(MAX_CUT * clip.duration_s, clip.duration_s - MIN_S))
            share = rng.random()
            clip = replace(clip, cut_s=(room_s * rng.random() * share, room_s * rng.random() * (1 - share)))
        if silence < SILENCE_SHARE:
            room_s = min(MAX_SILENCE_S, max(0.0, self.max_s - clip.duration_s) / 2)
            clip = replace(clip, silence_s=tuple(float(one) for one in rng.uniform(0.0, room_s, size=2)))
        # Where a recording comes again it comes changed.
        if augmented < AUGMENTED_SHARE or not is_first:
            clip = replace(clip, augment_seed=int(rng.integers(2**62)))
        return clip

    def read(self, clip: Clip, sampling_rate: float) -> np.ndarray:
        """
        Samples (N,), float32, of a clip.

        Raises:
            ValueError: a recording that cannot be read.
        """
        parts = [
            np.pad(self._read_span(span, sampling_rate), (round(pause_s * sampling_rate), 0))
            for span, pause_s in zip(clip.spans, (0.0, *clip.pauses_s), strict=True)
        ]
        samples = np.concatenate(parts)
        first, last = (round(one * sampling_rate) for one in clip.cut_s)
        samples = np.pad(samples[first : len(samples) - last], [round(one * sampling_rate) for one in clip.silence_s])
        if clip.augment_seed is None:
            return samples
        return self.augment(samples, sampling_rate, np.random.default_rng(clip.augment_seed))

    def _read_span(self, span: Span, sampling_rate: float) -> np.ndarray:
        audio = self.utterances[span.row]["audio"]
        whole_s = self.utterances.rows[span.row]["duration_s"]
        if isinstance(audio, str) and whole_s > WHOLE_S:
            try:
                with soundfile.SoundFile(audio) as file:
                    file.seek(round(span.start_s * file.samplerate))
                    samples = file.read(round(span.duration_s * file.samplerate), dtype="float32", always_2d=True)
                    audio = (samples.T, file.samplerate)
            except (soundfile.SoundFileError, OSError) as error:
                raise ValueError(f"{audio} cannot be read: {error}") from error
            return load_audio(audio, target_sampling_rate=sampling_rate)
        if self._last is None or self._last[:2] != (span.row, sampling_rate):
            # Of a long one that is no file the next piece may follow.
            self._last = (span.row, sampling_rate, load_audio(audio, target_sampling_rate=sampling_rate))
        samples = self._last[2]
        return samples[round(span.start_s * sampling_rate) : round(span.stop_s * sampling_rate)]
