# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Text while the speech goes on: words that are sure are committed for good, and the tail behind them is decoded anew
whenever more audio has arrived, with what it was before as the draft.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soxr

from ..audio_mdm_asr import Downmix, check_rate, to_mono_float32
from ..generation_configuration_mdm_asr import MDMASRGenerationConfig, check_number
from ..prompt_mdm_asr import prompt_values
from ..safeguards_mdm_asr import repeats_itself
from .transcript import UNSPACED, Word, group_words, round_seconds, token_texts, word_runs
from .voice_activity import SILENCE_DB, band_levels_db

FRAME_S = 0.02
# Longer windows win nothing with the default checkpoint.
MAX_WINDOW_S = 8.0
# A window whose text has not come by then is taken for noise, which is not worth the shorter steps.
FIRST_TEXT_S = 1.0
# Bounds a hypothesis that repeats itself for ever: Whisper's 448 tokens in 30 seconds, and a few.
TOKENS_PER_S, EXTRA_TOKENS = 15, 20
# Speech is so much louder than the noise floor, which begins here, in dB of full scale, and follows rising levels.
SPEECH_DB, START_FLOOR_DB, FLOOR_RISE_DB_PER_S = 8.0, -65.0, 3.0
# How far the times of tokens may be off.
BOUNDARY_S = 0.1


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
    """

    first_step_s: float = 0.16
    agreement: int = 2
    margin_s: float = 0.6
    min_confidence: float = 0.5
    max_wait_s: float = 3.0
    pause_s: float = 0.8
    pre_roll_s: float = 0.4
    context_s: float = 2.0

    def __post_init__(self):
        check_number("agreement", self.agreement, lowest=1, is_integer=True)
        check_number("first_step_s", self.first_step_s, lowest=FRAME_S)
        for name in ("margin_s", "min_confidence", "max_wait_s", "pause_s", "pre_roll_s", "context_s"):
            check_number(name, getattr(self, name))


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
        rate_hz (`float`): of the samples.
    """

    def __init__(self, rate_hz: float):
        self.rate_hz, self.frame_size, self.floor_db = rate_hz, round(rate_hz * FRAME_S), START_FLOOR_DB
        self._before: np.ndarray | None = None

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Levels in dB and whether they are speech (F,), of samples (N,) that make F whole frames."""
        frames = samples.reshape(-1, self.frame_size)
        if not len(frames):
            return np.zeros(0), np.zeros(0, dtype=bool)
        # One frame is too short to tell hum from speech: with the one before it. The first has none, and is not heard.
        is_first, before = self._before is None, frames[:1] if self._before is None else self._before
        self._before = frames[-1:].copy()
        pairs = np.concatenate([np.concatenate([before, frames[:-1]]), frames], axis=1)
        levels = band_levels_db(pairs, self.rate_hz)
        levels[:is_first] = SILENCE_DB
        is_speech = np.zeros(len(frames), dtype=bool)
        for i, level in enumerate(levels):
            # Digital silence, and what rounding makes of it, says nothing about the noise.
            if level > SILENCE_DB:
                self.floor_db = min(float(level), self.floor_db + FLOOR_RISE_DB_PER_S * FRAME_S)
                is_speech[i] = level > self.floor_db + SPEECH_DB
        return levels, is_speech


@dataclass
class _Unit:
    """What is committed as a whole: a word and its tokens; `is_spaced` if a blank stands before it; in how many
    hypotheses in a row it was seen, with all words before it."""

    word: Word
    token_ids: list[int]
    is_spaced: bool
    num_seen: int = 1

    @property
    def key(self) -> str:
        """What two hypotheses have to agree on."""
        return "".join(c for c in self.word.text.casefold() if c.isalnum()) or self.word.text


class _Window:
    """The audio that is decoded together, from `start_frame` on, the committed words that it still holds, and those
    of the last hypothesis behind them."""

    def __init__(self, frame_size: int):
        self.frame_size, self.start_frame = frame_size, 0
        self.samples = np.zeros(0, dtype=np.float32)
        self.levels = np.zeros(0)
        self.is_speech = np.zeros(0, dtype=bool)
        self.prefix: list[_Unit] = []
        self.tail: list[_Unit] = []

    @property
    def start_s(self) -> float:
        return self.start_frame * FRAME_S

    @property
    def end_s(self) -> float:
        return (self.start_frame + len(self.levels)) * FRAME_S

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
        # Copies, or the views would keep all the audio alive.
        self.samples = self.samples[num_frames * self.frame_size :].copy()
        self.levels, self.is_speech = self.levels[num_frames:].copy(), self.is_speech[num_frames:].copy()
        self.start_frame += num_frames

    def keep(self, seconds: float) -> None:
        """Takes frames away at the front, but for so many seconds."""
        self.drop(len(self.levels) - round(seconds / FRAME_S))


class StreamingTranscriber:
    """
    Transcribes one stream of audio of any length, in bounded memory and with bounded work per second.

    Every `step_s` of audio, and more often until there is a first text, the window of the latest seconds is encoded
    and the text behind the words committed in it decoded, with the hypothesis before as its draft. A pause commits
    everything and starts a new window. One that has become too long is cut at a word boundary, and the last committed
    words stay in it as the prefix. Stretches without speech are not decoded.

    Where a window ends or is cut, Whisper's thresholds let a text be decoded again as `settings` say; hypotheses
    before that only if they repeat themselves, once. One that still does is neither shown nor committed.

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
        self.step_frames = round(check_number("step_s", step_s, lowest=FRAME_S) / FRAME_S)
        self.first_step_frames = min(round(self.policy.first_step_s / FRAME_S), self.step_frames)
        if max_window_s is None:
            max_window_s = min(MAX_WINDOW_S, getattr(self.settings, "max_window_s", None) or MAX_WINDOW_S)
        shortest = max(2.0, self.policy.context_s + self.policy.margin_s + 2 * step_s)
        self.max_window_s = check_number("max_window_s", max_window_s, lowest=shortest)
        longest = getattr(processor.feature_extractor, "max_duration_s", None)
        if longest is not None and self.max_window_s + step_s > longest:
            raise ValueError(
                f"`max_window_s={max_window_s}` and a step of {step_s} s are more than the {longest} s that the model "
                "can hold. Choose a shorter window."
            )
        self._arguments = {name: value for name, value in prompt_slots.items() if value is not None}
        prompt_values(self.settings.prompt_template or {"tokens": [0]}, **self._arguments)
        if hotwords:
            self._arguments["hotword_ids"] = processor.hotword_ids(hotwords)
        self.reset()

    def reset(self) -> None:
        """Forgets the stream so far; the next audio starts at second 0."""
        # The text committed so far.
        self.text = ""
        self._gate = EnergyGate(self.rate_hz)
        self._window = _Window(self.frame_size)
        self._downmix = Downmix("The stream")
        self._resampler: soxr.ResampleStream | None = None
        self._source_rate_hz: float | None = None
        # What is too short for a step.
        self._pending = np.zeros(0, dtype=np.float32)
        self._last_end_s = 0.0
        self._is_finished = False

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
        # Zeros behind an offset would be a click.
        rest = self._pending
        rest = np.pad(rest, (0, -len(rest) % self.frame_size), mode="edge") if len(rest) else rest
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

    def _advance(self, samples: np.ndarray) -> Iterator[StreamUpdate]:
        """Goes through the whole steps that there is audio for."""
        self._pending = np.concatenate([self._pending, samples])
        while len(self._pending) >= (size := self._next_step_frames() * self.frame_size):
            is_decoded = not self.keep_up or len(self._pending) < 2 * size
            step, self._pending = self._pending[:size], self._pending[size:]
            yield from self._step(step, is_decoded)

    def _next_step_frames(self) -> int:
        window = self._window
        has_text = bool(window.prefix or window.tail)
        is_new = not has_text and window.duration_s < self.policy.pre_roll_s + FIRST_TEXT_S
        return self.first_step_frames if is_new else self.step_frames

    def _step(self, samples: np.ndarray, is_decoded: bool) -> list[StreamUpdate]:
        """Adds audio of whole frames to the window; decodes it if that is asked for or the window is full."""
        window, policy = self._window, self.policy
        window.append(samples, *self._gate(samples))
        if not window.is_speech.any():
            window.keep(policy.pre_roll_s)
            return []
        is_full = window.duration_s >= self.max_window_s
        if not (is_decoded or is_full):
            return []
        return [self._close() if window.silence_s >= policy.pause_s else self._hypothesis(is_full)]

    # Text

    def _hypothesis(self, is_full: bool) -> StreamUpdate:
        """Decodes the window's tail and commits what is sure of it; of a full window, what must leave it."""
        started, window = time.perf_counter(), self._window
        # What must leave a full window is committed for good.
        units, nfe = self._decode_tail(self.settings if is_full else self._partial_settings)
        for unit, before in zip(units, window.tail, strict=False):
            if unit.key != before.key:
                break
            unit.num_seen += before.num_seen
        window.tail = units
        new = self._commit(self._num_sure())
        if is_full:
            new += self._commit(self._num_forced())
            self._cut()
        return self._update(new, started, nfe)

    def _num_sure(self) -> int:
        """How many words of the tail, from its start, are to be committed."""
        policy, now_s = self.policy, self._window.end_s
        num_sure = 0
        for i, unit in enumerate(self._window.tail):
            is_sure = unit.num_seen >= policy.agreement and unit.word.confidence >= policy.min_confidence
            if unit.word.end_s <= now_s - policy.max_wait_s:
                num_sure = i + 1
            elif i == num_sure and is_sure and unit.word.end_s <= now_s - policy.margin_s:
                num_sure = i + 1
        return num_sure

    def _num_forced(self) -> int:
        """How many more words have to be committed so that a full window can be cut; none if enough are already."""
        window = self._window
        if window.prefix and self._without_context_s() >= self.max_window_s / 4:
            return 0
        half_s = window.start_s + self.max_window_s / 2
        return sum(1 for unit in window.tail if unit.word.end_s <= half_s)

    def _without_context_s(self) -> float:
        """Seconds at the window's front that its committed words leave behind, less the context that stays."""
        return self._window.prefix[-1].word.end_s - self.policy.context_s - self._window.start_s

    def _cut(self) -> None:
        """Drops audio and committed words at the front of a full window, where it is quiet near a word boundary."""
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
        first_s = min([half_s, *(unit.word.start_s for unit in window.tail[:1])])
        last_s = window.prefix[-1].word.end_s if window.prefix else first_s
        self._cut_between(min(last_s, first_s), first_s)
        window.keep(self.max_window_s * 3 / 4)
        window.prefix = []

    def _cut_between(self, end_s: float, start_s: float) -> None:
        """Drops what lies before the quietest frame from the end of one word to the start of the next."""
        window = self._window
        low = max(round((end_s - window.start_s - BOUNDARY_S) / FRAME_S), 0)
        high = max(round((start_s - window.start_s) / FRAME_S), low + 1)
        window.drop(low + int(np.argmin(window.levels[low:high])) if low < len(window.levels) else low)

    def _close(self) -> StreamUpdate:
        """Decodes the window for the last time, commits all of it and starts another."""
        started, window = time.perf_counter(), self._window
        window.tail, nfe = self._decode_tail(self.settings)
        new = self._commit(len(window.tail))
        window.prefix = []
        window.keep(min(window.silence_s, self.policy.pre_roll_s))
        return self._update(new, started, nfe)

    def _decode_tail(self, settings: MDMASRGenerationConfig) -> tuple[list[_Unit], int]:
        """The words behind the committed ones, in a new hypothesis, and the decoder evaluations it took."""
        window = self._window
        prefix_ids = [token_id for unit in window.prefix for token_id in unit.token_ids]
        tail_ids = [token_id for unit in window.tail for token_id in unit.token_ids]
        tail_start_s = max([window.start_s, *(unit.word.end_s for unit in window.prefix[-1:])])
        tail_s = max(window.end_s - tail_start_s, 0.0)
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
        pieces, window = token_texts(self.processor.tokenizer, ids), self._window
        units, first = [], start
        # Tokens before the first word would change a committed one: they stay in the prefix without a text.
        for run in word_runs(pieces):
            its = slice(run.start, run.stop)
            if run.start < start or not (words := group_words(pieces[its], confidences[its], times_s[its])):
                continue
            word, text = words[0], "".join(pieces[its])
            word.text = text.strip()
            word.start_s = round_seconds(min(max(window.start_s + word.start_s, 0.0), window.end_s))
            word.end_s = round_seconds(min(max(window.start_s + word.end_s, word.start_s), window.end_s))
            units.append(_Unit(word, ids[first : run.stop], not UNSPACED.match(text)))
            first = run.stop
        return units

    def _commit(self, count: int) -> list[Word]:
        """Moves the tail's first words to the text and the window's prefix."""
        window = self._window
        units, window.tail = window.tail[:count], window.tail[count:]
        for unit in units:
            word = unit.word
            # Times of a hypothesis are monotone, but the words before may be of an earlier one.
            word.start_s = max(word.start_s, self._last_end_s)
            word.end_s = self._last_end_s = max(word.end_s, word.start_s)
            self.text += (" " if unit.is_spaced and self.text else "") + word.text
        window.prefix += units
        return [copy.copy(unit.word) for unit in units]

    def _update(self, new: Iterable[Word] = (), started: float | None = None, nfe: int = 0) -> StreamUpdate:
        latency_s = 0.0 if started is None else round(time.perf_counter() - started, 6)
        partial = "".join((" " if unit.is_spaced else "") + unit.word.text for unit in self._window.tail).strip()
        return StreamUpdate(self.text, list(new), partial, round_seconds(self._window.end_s), latency_s, nfe)

    def _merge(self, updates: list[StreamUpdate]) -> StreamUpdate | None:
        """One update for several: all their new words, the rest of the last."""
        if not updates:
            return None
        merged = updates[-1]
        merged.new = [word for update in updates for word in update.new]
        merged.latency_s = round(sum(update.latency_s for update in updates), 6)
        merged.nfe = sum(update.nfe for update in updates)
        return merged
