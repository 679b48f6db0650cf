# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Text while the speech goes on: words that are sure are committed for good, and the tail behind them is decoded anew
whenever more audio has arrived, with what it was before as the draft.
"""

import copy
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soxr

from ..audio_mdm_asr import Downmix, check_rate, to_mono_float32
from ..generation_configuration_mdm_asr import MDMASRGenerationConfig
from ..safeguards_mdm_asr import repeats_itself
from .transcript import Word, group_words, round_seconds, token_texts
from .voice_activity import SILENCE_DB, band_levels_db

FRAME_S = 0.02
# Longer windows win nothing with the default checkpoint.
MAX_WINDOW_S = 8.0
# A window whose text has not come by then is taken for noise, which is not worth the shorter steps.
FIRST_TEXT_S = 1.0
# Bounds a hypothesis that repeats itself for ever: Whisper's 448 tokens in 30 seconds, and a few.
TOKENS_PER_S, EXTRA_TOKENS = 15, 20
# How far the times of tokens may be off.
BOUNDARY_S = 0.1
# Scripts written without blanks: each of their tokens may end a unit that is committed.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class StreamingPolicy:
    """
    When audio is decoded and when words are committed. `benchmarks/run_streaming.py` measures what the values cost.

    Attributes:
        first_step_s (`float`): instead of the transcriber's `step_s` where that is more, until a window has its first
            text: so little audio is decoded fast, and most of the wait would be for the step to end.
        agreement (`int`): a word is committed that so many successive hypotheses have, all words before it included
            (local agreement, arXiv 2005.11185).
        margin_s (`float`): and that ends at least this long before the end of the audio: what comes next may change
            it.
        min_confidence (`float`): and whose confidence is at least this.
        max_wait_s (`float`): a word that ended so long ago is committed as it stands, and those before it.
        pause_s (`float`): after so long without speech everything is committed, and the window's audio dropped.
        pre_roll_s (`float`): audio kept before the first speech of a window.
        context_s (`float`): committed speech that stays in the window, with its words as the text's prefix, when a
            window that has grown too long is cut.
        speech_db (`float`): speech is so much louder than the noise floor.
        floor_rise_db_per_s (`float`): how fast the noise floor follows a level that rises.
        start_floor_db (`float`): the noise floor at the start, in dB of full scale.
    """

    first_step_s: float = 0.16
    agreement: int = 2
    margin_s: float = 0.6
    min_confidence: float = 0.5
    max_wait_s: float = 3.0
    pause_s: float = 0.8
    pre_roll_s: float = 0.4
    context_s: float = 2.0
    speech_db: float = 8.0
    floor_rise_db_per_s: float = 3.0
    start_floor_db: float = -65.0

    def __post_init__(self):
        if type(self.agreement) is not int or self.agreement < 1:
            raise ValueError(f"`agreement` must be an integer of at least 1, got {self.agreement!r}.")
        _check_seconds("first_step_s", self.first_step_s, FRAME_S)
        for name in (
            "margin_s",
            "min_confidence",
            "max_wait_s",
            "pause_s",
            "pre_roll_s",
            "context_s",
            "floor_rise_db_per_s",
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")


@dataclass
class StreamUpdate:
    """
    What is known after some more audio.

    Attributes:
        committed (`str`): the text committed so far, which later updates only append to.
        new (`list[Word]`): the words committed since the update before, with times from the start of the stream.
        partial (`str`): the tentative text behind it.
        time_s (`float`): seconds of audio that this rests on.
        latency_s (`float`): seconds of computing for this update.
        nfe (`int`): decoder evaluations of this update.
        is_final (`bool`): whether the stream has ended.
    """

    committed: str
    new: list[Word] = field(default_factory=list)
    partial: str = ""
    time_s: float = 0.0
    latency_s: float = 0.0
    nfe: int = 0
    is_final: bool = False


class EnergyGate:
    """
    Tells, frame by frame and from the past alone, where somebody may be speaking: where the level is well above a
    noise floor that falls at once and rises slowly. It starts low, so that noise counts as speech for some seconds
    rather than a first word as noise. Levels are those of the band of speech, so that neither an offset nor hum hides
    a faint speaker.

    Args:
        policy ([`StreamingPolicy`]).
        rate_hz (`float`): of the samples.
    """

    def __init__(self, policy: StreamingPolicy, rate_hz: float):
        self.policy, self.rate_hz = policy, rate_hz
        self.floor_db = policy.start_floor_db
        self._before: np.ndarray | None = None

    def __call__(self, samples: np.ndarray, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Levels in dB and whether they are speech (num_frames,), of samples that make so many whole frames."""
        if not num_frames:
            return np.zeros(0), np.zeros(0, dtype=bool)
        frames = samples.reshape(num_frames, -1)
        # One frame is too short to tell hum from speech: with the one before it. The first has none, and is not heard.
        is_first, before = self._before is None, frames[:1] if self._before is None else self._before
        self._before = frames[-1:].copy()
        pairs = np.concatenate([np.concatenate([before, frames[:-1]]), frames], axis=1)
        levels = band_levels_db(pairs, self.rate_hz)
        levels[:is_first] = SILENCE_DB
        is_speech = np.zeros(num_frames, dtype=bool)
        for i, level in enumerate(levels):
            # Digital silence, and what rounding makes of it, says nothing about the noise.
            if level <= SILENCE_DB:
                continue
            self.floor_db = min(float(level), self.floor_db + self.policy.floor_rise_db_per_s * FRAME_S)
            is_speech[i] = level > self.floor_db + self.policy.speech_db
        return levels, is_speech


@dataclass
class _Unit:
    """What is committed as a whole: a word and its tokens; `is_spaced` if a blank stands before it."""

    word: Word
    token_ids: list[int]
    is_spaced: bool

    @property
    def key(self) -> str:
        """What two hypotheses have to agree on."""
        return "".join(c for c in self.word.text.casefold() if c.isalnum()) or self.word.text


class _Window:
    """The audio that is decoded together, from `start_frame` on, and the committed words that it still holds."""

    def __init__(self, start_frame: int = 0):
        self.start_frame = start_frame
        self.samples = np.zeros(0, dtype=np.float32)
        self.levels = np.zeros(0)
        self.is_speech = np.zeros(0, dtype=bool)
        self.prefix: list[_Unit] = []
        # The words of the last hypothesis that are not committed, and how often each was seen in a row.
        self.tail: list[_Unit] = []
        self.tail_counts: list[int] = []

    @property
    def start_s(self) -> float:
        return self.start_frame * FRAME_S

    @property
    def duration_s(self) -> float:
        return len(self.levels) * FRAME_S

    @property
    def silence_s(self) -> float:
        """Seconds since the last speech; all of the window if it has none."""
        spoken = np.flatnonzero(self.is_speech)
        return (len(self.is_speech) - (spoken[-1] + 1 if len(spoken) else 0)) * FRAME_S

    def append(self, samples: np.ndarray, levels: np.ndarray, is_speech: np.ndarray) -> None:
        self.samples = np.concatenate([self.samples, samples])
        self.levels = np.concatenate([self.levels, levels])
        self.is_speech = np.concatenate([self.is_speech, is_speech])

    def drop(self, num_frames: int) -> None:
        """Takes frames away at the front."""
        num_frames = min(max(num_frames, 0), len(self.levels))
        # A copy, or the view would keep all the audio alive.
        if len(self.levels):
            self.samples = self.samples[num_frames * len(self.samples) // len(self.levels) :].copy()
        self.levels, self.is_speech = self.levels[num_frames:].copy(), self.is_speech[num_frames:].copy()
        self.start_frame += num_frames

    def forget_text(self) -> None:
        self.prefix, self.tail, self.tail_counts = [], [], []


class StreamingTranscriber:
    """
    Transcribes one stream of audio of any length, in bounded memory and with bounded work per second.

    Every `step_s` of audio, and more often until there is a first text, the window of the latest seconds is encoded
    and the text behind the words committed in it decoded. The hypothesis before is its draft, so that one that hardly
    changes takes an evaluation or two. What two successive hypotheses agree on, well before the end of the audio, is
    committed. A pause commits everything and starts a new window. A window that has become too long is cut at a word
    boundary, and the last committed words stay in it as the prefix. Stretches without speech are not decoded at all.

    Where a window ends or is cut, Whisper's thresholds let a text be decoded again as `settings` say. Hypotheses
    before that are, at most once, if they repeat themselves: at the first temperature, with more silence behind the
    audio. One that still does is neither shown nor committed.

    The text depends on the samples alone, not on how they were cut into chunks, unless `keep_up` is set.

    Args:
        model ([`MDMASRForConditionalGeneration`]), processor ([`MDMASRProcessor`]).
        settings ([`MDMASRGenerationConfig`], *optional*): instead of the model's own. Its `max_new_tokens` bounds what
            a hypothesis has behind the committed words.
        step_s (`float`): seconds of audio from one hypothesis to the next, in whole frames of 20 ms.
        max_window_s (`float`, *optional*): the longest audio that is decoded at once. Default: 8 seconds, or what
            `settings.max_window_s` says if that is less.
        policy ([`StreamingPolicy`], *optional*).
        hotwords (`list[str]`, *optional*): words to expect, see `hotwords_mdm_asr`.
        keep_up (`bool`): for live audio: of a chunk that spans several steps, because decoding was too slow for them,
            only the last one is decoded (and those where a window is full). Then the text depends on the time taken.
        prompt_slots: `language`, `target_language`, `punctuation`, `task`, as for `generate`.

    Raises:
        ValueError: a checkpoint without drafts, a step or window that makes no sense.

    Example:
        ```python
        transcriber = StreamingTranscriber(model, processor)
        for update in transcriber.stream(chunks, sampling_rate=48_000):
            print(update.committed, "|", update.partial)
        ```
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        settings: Any = None,
        step_s: float = 0.5,
        max_window_s: float | None = None,
        policy: StreamingPolicy | None = None,
        hotwords: list[str] | None = None,
        keep_up: bool = False,
        **prompt_slots: Any,
    ):
        if not model.config.has_drafts:
            raise ValueError(
                "`model` decodes a canvas, and streaming needs drafts. Take the default checkpoint, or convert the "
                "donor without `draft_layers=0`."
            )
        self.model, self.processor, self.keep_up = model, processor, keep_up
        self.policy = policy or StreamingPolicy()
        self.settings = copy.deepcopy(model.generation_config if settings is None else settings)
        self.settings.return_dict_in_generate = True
        self.settings.return_token_timestamps = True
        self.settings.validate()
        # One of twelve hypotheses of a few words is improbable: to encode them again would cost more than it corrects.
        self._partial_settings = copy.deepcopy(self.settings)
        self._partial_settings.temperature = self.settings.temperatures[0]
        self._partial_settings.logprob_threshold = None
        self.rate_hz = int(processor.feature_extractor.sampling_rate)
        self.frame_size = round(self.rate_hz * FRAME_S)
        self.step_frames = round(_check_seconds("step_s", step_s, FRAME_S) / FRAME_S)
        self.first_step_frames = min(round(self.policy.first_step_s / FRAME_S), self.step_frames)
        if max_window_s is None:
            max_window_s = min(MAX_WINDOW_S, getattr(self.settings, "max_window_s", None) or MAX_WINDOW_S)
        shortest = max(2.0, self.policy.context_s + self.policy.margin_s + 2 * step_s)
        self.max_window_s = _check_seconds("max_window_s", max_window_s, shortest)
        longest = getattr(processor.feature_extractor, "max_duration_s", None)
        if longest is not None and self.max_window_s + step_s > longest:
            raise ValueError(
                f"`max_window_s={max_window_s}` and a step of {step_s} s are more than the {longest} s that the model "
                "can hold. Choose a shorter window."
            )
        self._arguments = {name: value for name, value in prompt_slots.items() if value is not None}
        if hotwords:
            self._arguments["hotword_ids"] = processor.hotword_ids(hotwords)
        self.reset()

    def reset(self) -> None:
        """Forgets the stream so far; the next audio starts at second 0."""
        self._gate = EnergyGate(self.policy, self.rate_hz)
        self._window = _Window()
        self._downmix = Downmix("The stream")
        self._resampler: soxr.ResampleStream | None = None
        self._source_rate_hz: float | None = None
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._num_frames = 0
        self._text, self._partial = "", ""
        self._last_end_s = 0.0
        self._is_finished = False

    @property
    def text(self) -> str:
        """The text committed so far."""
        return self._text

    def feed(self, samples: Any, sampling_rate: float | None = None) -> StreamUpdate | None:
        """
        Takes the next samples of the stream.

        Args:
            samples: an array, tensor or list, (N,) or one of few channels, as [`load_audio`] takes them. N may be
                anything.
            sampling_rate (`float`, *optional*): in Hz, the same for the whole stream. Default: the model's.

        Returns:
            [`StreamUpdate`], or None if nothing was decoded: less than a step of audio, or no speech.

        Raises:
            ValueError: samples that are not audio, another rate than before, or a stream that has ended.
        """
        return self._merge(list(self._advance(self._receive(samples, sampling_rate))))

    def stream(self, chunks: Iterable[Any], sampling_rate: float | None = None) -> Iterator[StreamUpdate]:
        """Feeds chunks of any size as they come; yields an update for every hypothesis, and the final one."""
        for chunk in chunks:
            yield from self._advance(self._receive(chunk, sampling_rate))
        yield self.finish()

    def finish(self) -> StreamUpdate:
        """Ends the stream: decodes what is left and commits it. `reset` allows to start again."""
        if self._is_finished:
            raise ValueError("The stream has been finished already. Call `reset` to start another.")
        flushed = np.zeros(0, dtype=np.float32)
        if self._resampler is not None:
            flushed = self._resampler.resample_chunk(flushed, last=True)
        updates = list(self._advance(flushed))
        rest = self._take_pending(self._num_pending)
        if len(rest):
            num_frames = math.ceil(len(rest) / self.frame_size)
            # Zeros behind an offset would be a click.
            rest = np.pad(rest, (0, num_frames * self.frame_size - len(rest)), mode="edge")
            updates += self._step(rest, is_decoded=False)
        if self._window.is_speech.any():
            updates.append(self._close())
        self._is_finished = True
        update = self._merge(updates) or self._update()
        update.partial, update.is_final = "", True
        return update

    # Audio

    def _receive(self, samples: Any, sampling_rate: float | None) -> np.ndarray:
        """Mono samples at the model's rate, as many as the resampler has ready."""
        if self._is_finished:
            raise ValueError("The stream has been finished. Call `reset` to start another.")
        samples = to_mono_float32(samples, downmix=self._downmix)
        rate = self.rate_hz if sampling_rate is None else check_rate(sampling_rate, "sampling_rate")
        if self._source_rate_hz not in (None, rate):
            raise ValueError(
                f"`sampling_rate={rate}`, but the stream began at {self._source_rate_hz} Hz. Call `reset` between "
                "streams."
            )
        self._source_rate_hz = rate
        if rate == self.rate_hz:
            return samples
        if self._resampler is None:
            self._resampler = soxr.ResampleStream(rate, self.rate_hz, 1, dtype="float32", quality="HQ")
        return self._resampler.resample_chunk(np.ascontiguousarray(samples))

    def _take_pending(self, count: int) -> np.ndarray:
        if len(self._pending) != 1:
            self._pending = [np.concatenate([*self._pending, np.zeros(0, dtype=np.float32)])]
        taken, rest = self._pending[0][:count], self._pending[0][count:]
        self._pending, self._num_pending = ([rest] if len(rest) else []), len(rest)
        return taken

    def _advance(self, samples: np.ndarray) -> Iterator[StreamUpdate]:
        """Goes through the whole steps that there is audio for."""
        if len(samples):
            self._pending.append(samples)
            self._num_pending += len(samples)
        while self._num_pending >= (size := self._next_step_frames() * self.frame_size):
            is_decoded = not self.keep_up or self._num_pending < 2 * size
            yield from self._step(self._take_pending(size), is_decoded)

    def _next_step_frames(self) -> int:
        window = self._window
        has_text = bool(window.prefix or window.tail)
        is_new = not has_text and window.duration_s < self.policy.pre_roll_s + FIRST_TEXT_S
        return self.first_step_frames if is_new else self.step_frames

    def _step(self, samples: np.ndarray, is_decoded: bool) -> list[StreamUpdate]:
        """Adds audio of whole frames to the window; decodes it if that is asked for or the window is full."""
        window, policy = self._window, self.policy
        num_frames = len(samples) // self.frame_size
        self._num_frames += num_frames
        window.append(samples, *self._gate(samples, num_frames))
        if not window.is_speech.any():
            window.drop(len(window.levels) - round(policy.pre_roll_s / FRAME_S))
            return []
        if window.silence_s >= policy.pause_s:
            return [self._close()] if is_decoded or window.duration_s >= self.max_window_s else []
        if window.duration_s >= self.max_window_s:
            return [self._hypothesis(is_full=True)]
        return [self._hypothesis()] if is_decoded else []

    # Text

    def _hypothesis(self, is_full: bool = False) -> StreamUpdate:
        """Decodes the window's tail and commits what is sure of it; of a full window, what must leave it."""
        started = time.perf_counter()
        window = self._window
        # What must leave a full window is committed for good.
        units, nfe = self._decode_tail(self.settings if is_full else self._partial_settings)
        # How often in a row each word was seen, with all words before it.
        counts, is_same = [], True
        for i, unit in enumerate(units):
            is_same = is_same and i < len(window.tail) and window.tail[i].key == unit.key
            counts.append(window.tail_counts[i] + 1 if is_same else 1)
        num_sure = self._num_sure(units, counts)
        new = self._commit(units[:num_sure])
        units, counts = units[num_sure:], counts[num_sure:]
        if is_full:
            num_forced = self._num_forced(units)
            new += self._commit(units[:num_forced])
            units, counts = units[num_forced:], counts[num_forced:]
            self._cut(units)
        window.tail, window.tail_counts = units, counts
        self._partial = _join(units)
        return self._update(new, started, nfe)

    def _num_sure(self, units: list[_Unit], counts: list[int]) -> int:
        """How many words of the tail, from its start, are to be committed."""
        policy, now_s = self.policy, self._num_frames * FRAME_S
        num_sure = 0
        for i, unit in enumerate(units):
            is_sure = counts[i] >= policy.agreement and unit.word.confidence >= policy.min_confidence
            if unit.word.end_s <= now_s - policy.max_wait_s:
                num_sure = i + 1
            elif i == num_sure and is_sure and unit.word.end_s <= now_s - policy.margin_s:
                num_sure = i + 1
        return num_sure

    def _num_forced(self, units: list[_Unit]) -> int:
        """How many more words have to be committed so that a full window can be cut; none if enough are already."""
        window = self._window
        if window.prefix and self._without_context_s() >= self.max_window_s / 4:
            return 0
        half_s = window.start_s + self.max_window_s / 2
        return sum(1 for unit in units if unit.word.end_s <= half_s)

    def _without_context_s(self) -> float:
        """Seconds at the window's front that its committed words leave behind, less the context that stays."""
        return self._window.prefix[-1].word.end_s - self.policy.context_s - self._window.start_s

    def _cut(self, units: list[_Unit]) -> None:
        """
        Drops audio and committed words at the front of a full window, at the quietest place near a word boundary.
        `units` are the words that stay tentative.
        """
        window = self._window
        if window.prefix and self._without_context_s() >= self.max_window_s / 4:
            kept = [unit for unit in window.prefix if unit.word.start_s >= window.start_s + self._without_context_s()]
            kept = kept or window.prefix[-1:]
            left = window.prefix[: len(window.prefix) - len(kept)]
            self._cut_between(left[-1].word.end_s if left else window.start_s, kept[0].word.start_s)
            window.prefix = kept
            if window.duration_s <= self.max_window_s * 3 / 4:
                return
        # Noise without words, a few words long ago, or one that never ends: no more than half of it stays.
        half_s = window.start_s + window.duration_s - self.max_window_s / 2
        first_s = min(units[0].word.start_s, half_s) if units else half_s
        last_s = window.prefix[-1].word.end_s if window.prefix else first_s
        self._cut_between(min(last_s, first_s), first_s)
        window.drop(round((window.duration_s - self.max_window_s * 3 / 4) / FRAME_S))
        window.prefix = []

    def _cut_between(self, end_s: float, start_s: float) -> None:
        """Drops what lies before the quietest frame from the end of one word to the start of the next."""
        window = self._window
        low = max(round((end_s - window.start_s - BOUNDARY_S) / FRAME_S), 0)
        high = max(round((start_s - window.start_s) / FRAME_S), low + 1)
        window.drop(low + int(np.argmin(window.levels[low:high])) if low < len(window.levels) else low)

    def _close(self) -> StreamUpdate:
        """Decodes the window for the last time, commits all of it and starts another."""
        started = time.perf_counter()
        units, nfe = self._decode_tail(self.settings)
        new = self._commit(units)
        window = self._window
        window.forget_text()
        window.drop(len(window.levels) - round(min(window.silence_s, self.policy.pre_roll_s) / FRAME_S))
        self._partial = ""
        return self._update(new, started, nfe)

    def _decode_tail(self, settings: MDMASRGenerationConfig) -> tuple[list[_Unit], int]:
        """The words behind the committed ones, in a new hypothesis, and the decoder evaluations it took."""
        window = self._window
        prefix_ids = [token_id for unit in window.prefix for token_id in unit.token_ids]
        tail_ids = [token_id for unit in window.tail for token_id in unit.token_ids]
        tail_s = window.duration_s
        if window.prefix:
            tail_s = min(max(window.start_s + tail_s - window.prefix[-1].word.end_s, 0.0), tail_s)
        most = min(math.ceil(tail_s * TOKENS_PER_S) + EXTRA_TOKENS, settings.max_new_tokens or math.inf)
        inputs = self.processor(window.samples, sampling_rate=self.rate_hz, return_tensors="pt")
        output = self.model.generate(
            **inputs.to(self.model.device),
            generation_config=settings,
            prefix_ids=[prefix_ids] if prefix_ids else None,
            draft_ids=[prefix_ids + tail_ids] if tail_ids else None,
            max_new_tokens=len(prefix_ids) + most,
            **self._arguments,
        )
        ids = output.sequences[0].tolist()
        if self.model.config.eos_token_id in ids:
            ids = ids[: ids.index(self.model.config.eos_token_id)]
        # Where nobody speaks, generate gives an empty text whatever was committed.
        is_usable = ids[: len(prefix_ids)] == prefix_ids and not repeats_itself(
            ids, self.model.config.vocab_size, settings.compression_ratio_threshold
        )
        times_s, confidences = output.token_timestamps[0].tolist(), output.confidence[0].tolist()
        units = self._split(ids, len(prefix_ids), confidences, times_s) if is_usable else []
        return units, int(output.nfe[0])

    def _split(self, ids: list[int], start: int, confidences: list[float], times_s: list[list[float]]) -> list[_Unit]:
        """Units of the tokens from `start` on, with times from the start of the stream."""
        pieces = token_texts(self.processor.tokenizer, ids)
        offset_s, end_s = self._window.start_s, self._num_frames * FRAME_S
        bounds, begin = [], start
        for i in range(start, len(ids)):
            if pieces[i][:1].isspace() or _UNSPACED.match(pieces[i]) or i == 0:
                bounds.append(begin)
            # Tokens without a text hold the first bytes of the character of the next that has one.
            begin = i + 1 if pieces[i] else begin
        units, first = [], start
        if not bounds:
            return []
        # Tokens before the first boundary would change a committed word: they stay in the prefix without a text.
        for bound, next_bound in zip(bounds, [*bounds[1:], len(ids)], strict=True):
            places = slice(bound, next_bound)
            words = group_words(pieces[places], confidences[places], times_s[places])
            if not words:
                continue
            word, text = words[0], "".join(pieces[places])
            word.text = text.strip()
            word.start_s = round_seconds(min(max(offset_s + word.start_s, 0.0), end_s))
            word.end_s = round_seconds(min(max(offset_s + word.end_s, word.start_s), end_s))
            units.append(_Unit(word, ids[first:next_bound], not _UNSPACED.match(text)))
            first = next_bound
        return units

    def _commit(self, units: list[_Unit]) -> list[Word]:
        """Appends words to the text and to the window's prefix."""
        for unit in units:
            word = unit.word
            # Times of a hypothesis are monotone, but the words before may be of an earlier one.
            word.start_s = max(word.start_s, self._last_end_s)
            word.end_s = max(word.end_s, word.start_s)
            self._last_end_s = word.end_s
            self._text += (" " if unit.is_spaced and self._text else "") + word.text
        self._window.prefix += units
        return [copy.copy(unit.word) for unit in units]

    def _update(self, new: Iterable[Word] = (), started: float | None = None, nfe: int = 0) -> StreamUpdate:
        latency_s = 0.0 if started is None else round(time.perf_counter() - started, 6)
        time_s = round_seconds(self._num_frames * FRAME_S)
        return StreamUpdate(self._text, list(new), self._partial, time_s, latency_s=latency_s, nfe=nfe)

    def _merge(self, updates: list[StreamUpdate]) -> StreamUpdate | None:
        """One update for several: all their new words, the rest of the last."""
        if not updates:
            return None
        merged = updates[-1]
        merged.new = [word for update in updates for word in update.new]
        merged.latency_s = round(sum(update.latency_s for update in updates), 6)
        merged.nfe = sum(update.nfe for update in updates)
        return merged


def _join(units: list[_Unit]) -> str:
    return "".join((" " if unit.is_spaced else "") + unit.word.text for unit in units).strip()


def _check_seconds(name: str, value: Any, lowest: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not lowest <= value < math.inf:
        raise ValueError(f"`{name}` must be a number of seconds of at least {lowest:g}, got {value!r}.")
    return float(value)


__all__ = ["EnergyGate", "StreamUpdate", "StreamingPolicy", "StreamingTranscriber"]
