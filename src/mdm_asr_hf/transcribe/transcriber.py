# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Transcriber: recordings of any form, number and length to transcripts, in bounded memory."""

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..audio_mdm_asr import AudioStream
from ..encoding_mdm_asr import check_unicode
from ..generation_configuration_mdm_asr import MDMASRGenerationConfig, check_number
from ..generation_mdm_asr import utterance_confidence
from ..prompt_mdm_asr import prompt_values
from .joining import DecodedWindow, join_parts, join_windows
from .transcript import Transcript, text_length, token_texts
from .voice_activity import make_vad
from .windows import Window, cut_in_half, cut_windows, spoken_s

# Seconds of audio that wait to be batched with others of their length: 38 MB of samples.
POOL_S = 600.0
# The most seconds of a batch, padding included, whatever the batch size.
MAX_BATCH_S = 480.0
# Windows of what is too long to be one. The encoder's attention costs more for each second the longer they are; texts
# of windows of 20 s have no more errors than those of 30 s, of 10 s they have.
WINDOW_S = 20.0
# Of models that do not say how much they take at once.
FALLBACK_WHOLE_S = 30.0
MIN_WINDOW_S = 1.0
# Speakers take two to five tokens for a second of speech. A text of fewer than this, of at least so many seconds, may
# have ended too early; it did if others say more by this factor.
TOKENS_PER_S, LEAST_HEARD_OUT_S, MORE_HEARD = 2.0, 6.0, 1.3


class Transcriber:
    """
    Transcribes recordings of any form and length.

    Recordings are read in blocks and cut at pauses into windows (see `windows`). The windows of all recordings
    share batches with others of about their length, which changes no text. Stretches without speech are skipped.
    Nothing is dropped silently: what the model is not sure to have finished is among a transcript's `warnings`.
    Several threads may share one.

    Args:
        model ([`MDMASRForConditionalGeneration`]), processor ([`MDMASRProcessor`]): of one checkpoint.
        settings ([`MDMASRGenerationConfig`], *optional*): instead of the model's own.
        max_window_s (`float`, *optional*): the longest window in seconds. By default what the settings say
            (`max_window_s`), else 20, and what fits into the model at once is not cut.
        batch_size (`int`): windows decoded together, at most.
        vad (`str`): how speech is found: "silero" (needs ONNX Runtime), "energy", "auto" for the first of these
            that there is, or "none": everything is decoded, in windows that overlap.
        timestamps (`bool`): give words their times. Costs one more decoder evaluation per batch.
        hotwords (`list[str]`, *optional*): words to expect.
        previous_text (`str`, *optional*): what a Whisper donor takes as the text before each window, to spell names
            and to write in its manner. Windows do not get their predecessors' texts: one that loops would make all
            behind it loop.
        prompt_slots: of the model's prompt, such as `language`, for all recordings.

    Raises:
        ValueError: settings that contradict each other or the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        settings: MDMASRGenerationConfig | None = None,
        max_window_s: float | None = None,
        batch_size: int = 8,
        vad: str = "auto",
        timestamps: bool = False,
        hotwords: list[str] | None = None,
        previous_text: str | None = None,
        **prompt_slots: Any,
    ):
        self.model, self.processor = model, processor
        self.settings = copy.deepcopy(settings if settings is not None else model.generation_config)
        self.settings.return_dict_in_generate = True
        self.settings.validate()
        check_number("batch_size", batch_size, lowest=1, is_integer=True)
        self.batch_size, self.timestamps = batch_size, timestamps
        extractor = processor.feature_extractor
        self.rate_hz = extractor.sampling_rate
        self.max_window_s, self.whole_s = window_lengths(max_window_s, self.settings, extractor)
        self.vad = make_vad(vad, self.rate_hz)
        self.arguments = {name: value for name, value in prompt_slots.items() if value is not None}
        # A wrong language should not show after the first recording is read.
        prompt_values(self.settings.prompt_template or {"tokens": [0]}, **self.arguments)
        if hotwords:
            self.arguments["hotword_ids"] = processor.hotword_ids(hotwords)
        if previous_text:
            self.arguments["previous_ids"] = processor.previous_ids(check_unicode(previous_text, "previous_text"))

    def transcribe(self, audio: Any, **kwargs: Any) -> Transcript:
        """
        The transcript of one recording, in any form [`load_audio`] takes; `kwargs` as for `transcribe_all`.

        Raises:
            ValueError: it cannot be read or decoded.
        """
        ((_, result),) = self.transcribe_all([audio], **kwargs)
        if isinstance(result, ValueError):
            raise result
        return result

    def warm_up(self) -> None:
        """
        Decodes noise, twice in a batch: what a first call takes longer is spared the next one.

        Raises:
            ValueError: the model cannot decode.
        """
        noise = np.random.default_rng(0).standard_normal(round(self.rate_hz)).astype(np.float32) / 10
        for _, result in self.transcribe_all([noise, noise]):
            if isinstance(result, ValueError):
                raise result

    def transcribe_all(
        self,
        inputs: Iterable[Any],
        on_progress: Callable[[float], None] | None = None,
        on_window: Callable[[int, DecodedWindow], None] | None = None,
        known_window: Callable[[int, Window], DecodedWindow | None] | None = None,
        **load_audio_kwargs: Any,
    ) -> Iterator[tuple[int, Transcript | ValueError]]:
        """
        Transcribes recordings, as many as there are.

        Args:
            inputs (iterable): each in any form [`load_audio`] takes, or the ValueError of one that is not to be had;
                taken one by one as they are needed.
            on_progress (`Callable`, *optional*): is called with the seconds of audio that were finished since.
            on_window (`Callable`, *optional*): is called with a recording's place and what was decoded of each of its
                windows, at once, in no order: to keep it, should the process be killed.
            known_window (`Callable`, *optional*): is asked, by a recording's place and the window, for what
                `on_window` was given in an earlier run; None has the window decoded. A recording is always cut the
                same way.
            load_audio_kwargs: `sampling_rate` of samples that do not carry their own; `max_duration_s`.

        Yields:
            The place of a recording among `inputs`, from 0 on, in order, with its transcript, or the ValueError of one
            that cannot be read or decoded; the others go on.
        """
        load_audio_kwargs["target_sampling_rate"] = self.rate_hz
        recordings: dict[int, _Recording] = {}
        pool: list[_Job] = []
        for i, audio in enumerate(inputs):
            recording = recordings[i] = _Recording(
                f"{os.fsdecode(audio)!r}: " if isinstance(audio, (str, os.PathLike)) else "",
                on_progress or (lambda seconds: None),
                partial(on_window, i) if on_window is not None else lambda window: None,
            )
            for job in self._read(recording, audio, load_audio_kwargs):
                if known_window is not None and (known := known_window(i, job.window)) is not None:
                    recording.take(job, known)
                    continue
                pool.append(job)
                if self._is_full(pool):
                    self._decode_pool(pool)
                    yield from _take_finished(recordings, self.rate_hz, self.timestamps)
                    if recording.error is not None:
                        break
            recording.is_read = True
            yield from _take_finished(recordings, self.rate_hz, self.timestamps)
        self._decode_pool(pool)
        yield from _take_finished(recordings, self.rate_hz, self.timestamps)

    def _is_full(self, pool: list["_Job"]) -> bool:
        return sum(job.window.duration_s for job in pool) >= POOL_S

    def _read(self, recording: "_Recording", audio: Any, load_audio_kwargs: dict[str, Any]) -> Iterator["_Job"]:
        """The windows of a recording, as it is read."""
        try:
            if isinstance(audio, ValueError):
                raise audio
            with closing(AudioStream(audio, **load_audio_kwargs)) as stream:
                blocks = recording.count(stream)
                for window in cut_windows(blocks, self.rate_hz, self.vad, self.max_window_s, self.whole_s):
                    recording.windows.append(None)
                    yield _Job(recording, len(recording.windows) - 1, window)
        except ValueError as error:
            recording.error = error

    def _decode_pool(self, pool: list["_Job"]) -> None:
        """Decodes all windows of the pool and empties it."""
        jobs = [job for job in pool if job.recording.error is None]
        pool.clear()
        for job, result in self._decode_jobs(jobs):
            if isinstance(result, ValueError):
                job.recording.error = ValueError(f"{job.recording.name}{result}")
            else:
                job.recording.take(job, result)
                job.recording.on_window(result)

    def _decode_jobs(self, jobs: list["_Job"]) -> Iterator[tuple["_Job", DecodedWindow | ValueError]]:
        """Windows, in any order, with what was decoded of each; those of a recording that failed are left out."""
        # Longest first: what does not fit into memory shows at once. Times take a tenth of a batch: windows that are
        # joined by them share theirs.
        jobs.sort(key=lambda job: (not (self.timestamps or job.window.needs_times), -job.window.duration_s))
        # Where a model has several threads, each decodes batches of its own.
        workers, worker, side_by_side = getattr(self.model, "workers", None), self, map
        durations_s, num_threads = (
            [job.window.duration_s for job in jobs],
            1 if workers is None else workers.num_threads,
        )
        chosen = [[jobs[k] for k in batch] for batch in batches(durations_s, self.batch_size, num_threads)]
        if workers is not None and len(chosen) > 1:
            worker, side_by_side = copy.copy(self), workers.map
            worker.model = workers.model
        windows = [[job.window for job in batch] for batch in chosen]
        for batch, results in zip(chosen, side_by_side(worker._decode, windows), strict=True):
            pairs = zip(batch, results, strict=True)
            yield from ((job, result) for job, result in pairs if job.recording.error is None)

    def _decode(
        self, windows: Sequence[Window], arguments: Sequence[dict[str, Any]] | None = None
    ) -> list[DecodedWindow | ValueError]:
        """
        What was decoded of a batch of windows, of `self.arguments` or of each window's own. One that cannot be decoded
        does not stop the others.
        """
        if not windows:
            return []
        arguments = [self.arguments] * len(windows) if arguments is None else arguments
        try:
            return self._hear_out(windows, arguments, self._generate(windows, arguments))
        except (ValueError, *self.model.memory_errors) as error:
            if len(windows) > 1:
                pairs = zip(windows, arguments, strict=True)
                return [result for window, its in pairs for result in self._decode([window], [its])]
            if isinstance(error, ValueError):
                return [error]
            return [
                ValueError(
                    f"`max_window_s`: a window of {windows[0].duration_s:.1f} s needs more "
                    f"memory than {self.model.device} has. Set it lower."
                )
            ]

    def _hear_out(
        self, windows: Sequence[Window], arguments: Sequence[dict[str, Any]], results: list[DecodedWindow]
    ) -> list[DecodedWindow]:
        """Whisper takes a pause between two sentences for the end now and then. Texts that are too short for what is
        spoken give way to those of the windows' halves, where these say more."""
        results, halves = list(results), {}
        for place, (window, result) in enumerate(zip(windows, results, strict=True)):
            # Where nothing was found, or words will be looked for in other windows, it stays as it is.
            if self.vad is None or not result.pieces or window.needs_times or window.duration_s < LEAST_HEARD_OUT_S:
                continue
            # Speech is looked for only where there may be enough of it.
            wanted_s = len(result.pieces) / TOKENS_PER_S
            if wanted_s < window.duration_s and wanted_s < spoken_s(window, self.rate_hz, self.vad):
                parts = cut_in_half(window, self.rate_hz, self.vad)
                if len(parts) > 1:
                    halves[place] = parts
        parts = [part for parts in halves.values() for part in parts]
        its = [arguments[place] for place, parts in halves.items() for _ in parts]
        decoded = []
        for start in range(0, len(parts), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            decoded += self._decode(parts[chosen], its[chosen])
        for place, parts in halves.items():
            own, decoded = decoded[: len(parts)], decoded[len(parts) :]
            if not any(isinstance(one, ValueError) for one in own):
                whole, joined = results[place], join_parts(results[place], own)
                says_more = len(joined.pieces) > MORE_HEARD * len(whole.pieces)
                results[place] = joined if says_more else replace(whole, nfe=joined.nfe)
        return results

    def _generate(self, windows: Sequence[Window], arguments: Sequence[dict[str, Any]]) -> list[DecodedWindow]:
        inputs = self.processor([window.samples for window in windows], sampling_rate=self.rate_hz)
        # Temperatures and some samplers draw: a seed for each row gives a window the same text in every batch.
        given = {"generator": [0] * len(windows), **_by_rows(arguments)}
        output = self.model.generate(
            **inputs.to(self.model.device),
            generation_config=self.settings,
            **given | {"return_token_timestamps": self.timestamps or any(window.needs_times for window in windows)},
        )
        return self._read_output(output, windows)

    def _read_output(self, output: Any, windows: Sequence[Window]) -> list[DecodedWindow]:
        return read_output(output, windows, self.processor.tokenizer, self.model.config.eos_token_id)


@dataclass
class _Recording:
    """
    A recording in work: its windows in order, None where they wait to be decoded; `num_samples` read so far at the
    model's rate, and the seconds of it that were reported as finished.
    """

    # What stands before an error about it: its path, if it has one.
    name: str
    on_progress: Callable[[float], None]
    on_window: Callable[[DecodedWindow], None]
    windows: list[DecodedWindow | None] = field(default_factory=list)
    error: ValueError | None = None
    is_read: bool = False
    num_samples: int = 0
    reported_s: float = 0.0

    def take(self, job: "_Job", result: DecodedWindow) -> None:
        """Puts what was decoded in its place."""
        self.windows[job.place] = result
        seconds = job.window.duration_s - job.window.overlap_before_s
        self.reported_s += seconds
        self.on_progress(seconds)

    def count(self, blocks: Iterable[Any]) -> Iterator[Any]:
        for block in blocks:
            self.num_samples += len(block)
            yield block


@dataclass
class _Job:
    """A window to decode, and its place among those of its recording."""

    recording: _Recording
    place: int
    window: Window


def _take_finished(
    recordings: dict[int, _Recording], rate_hz: float, timestamps: bool
) -> Iterator[tuple[int, Transcript | ValueError]]:
    """Removes and yields the first recordings that are finished."""
    for i, recording in list(recordings.items()):
        # One that failed may still be being read.
        if not recording.is_read or (recording.error is None and None in recording.windows):
            return
        del recordings[i]
        duration_s = recording.num_samples / rate_hz
        if (rest_s := duration_s - recording.reported_s) > 0:
            recording.on_progress(rest_s)
        yield i, recording.error or join_windows(recording.windows, duration_s, timestamps)


def _by_rows(arguments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Arguments of `generate` for a batch, of those of each row."""
    if all(one is arguments[0] for one in arguments):
        return arguments[0]
    names = {name for one in arguments for name in one}
    # Of ids, a row may have none; a slot of the prompt then has its default.
    return {
        name: [one.get(name, [] if name.endswith("_ids") else None) for one in arguments] for name in sorted(names)
    }


def window_lengths(
    max_window_s: float | None, settings: Any, extractor: Any, name: str = "max_window_s"
) -> tuple[float, float]:
    """
    Seconds of the longest window, and of the longest recording that is not cut. Both are what is given, as the
    argument `name`, else what the settings say, else `WINDOW_S` and what the feature extractor takes.

    Raises:
        ValueError: not a number, too short, or longer than the feature extractor takes.
    """
    limit_s = getattr(extractor, "max_duration_s", None) or math.inf
    if max_window_s is None:
        wanted_s = getattr(settings, "max_window_s", None)
        whole_s = min(wanted_s or (limit_s if limit_s < math.inf else FALLBACK_WHOLE_S), limit_s)
        return (whole_s if wanted_s else min(WINDOW_S, whole_s)), whole_s
    is_number = isinstance(max_window_s, (int, float)) and not isinstance(max_window_s, bool)
    if not is_number or not MIN_WINDOW_S <= max_window_s <= limit_s:
        bound = f" and at most {limit_s:g}, what the model takes at once" if limit_s < math.inf else ""
        raise ValueError(f"`{name}` must be at least {MIN_WINDOW_S:g} second{bound}, got {max_window_s!r}.")
    return float(max_window_s), float(max_window_s)


def batches(durations_s: Sequence[float], batch_size: int, num_threads: int = 1) -> Iterator[list[int]]:
    """Places of windows, in their order, in batches of at most `batch_size` and `MAX_BATCH_S`, padding included; of
    about one size, and as many for each thread."""
    num_parts = math.ceil(len(durations_s) / (batch_size * num_threads)) * num_threads
    bounds = [part * len(durations_s) // num_parts for part in range(num_parts + 1)] if num_parts else []
    for first, last in itertools.pairwise(bounds):
        batch: list[int] = []
        longest_s = 0.0
        for place in range(first, last):
            longest_s = max(longest_s, durations_s[place])
            if batch and (len(batch) + 1) * longest_s > MAX_BATCH_S:
                yield batch
                batch, longest_s = [], durations_s[place]
            batch.append(place)
        if batch:
            yield batch


def read_output(output: Any, windows: Sequence[Any], tokenizer: Any, eos_token_id: int) -> list[DecodedWindow]:
    """
    The rows of an output of `generate`, one per window; of several samples of a window, the best.

    Args:
        output ([`MDMASRGenerateOutput`]): of B rows.
        windows: [`Window`]s, or what has their fields that [`DecodedWindow`] takes over.
        eos_token_id (`int`): ends a row's text.
    """
    num_samples = len(output.sequences) // len(windows)
    confidence = utterance_confidence(output.confidence)
    special = set(tokenizer.all_special_ids)
    decoded = []
    for row, window in zip(itertools.count(0, num_samples), windows, strict=False):
        ids, token_confidences = output.sequences[row].tolist(), output.confidence[row].tolist()
        nfe = int(output.nfe[row])
        length, ended = text_length(ids, token_confidences, output.commit_steps[row].tolist(), eos_token_id)
        kept = [k for k in range(length) if ids[k] not in special]
        one = DecodedWindow.of(
            window,
            pieces=token_texts(tokenizer, [ids[k] for k in kept]),
            confidences=[token_confidences[k] for k in kept],
            confidence=confidence[row],
            nfe=nfe,
            is_full=not ended and nfe > 0,
        )
        if (times_s := getattr(output, "token_timestamps", None)) is not None:
            its_s = times_s[row].tolist()
            one.times_s = [tuple(round(min(window.start_s + s, window.end_s), 3) for s in its_s[k]) for k in kept]
        if (no_speech := getattr(output, "no_speech", None)) is not None:
            one.no_speech = float(no_speech[row])
        if (languages := getattr(output, "languages", None)) is not None:
            one.language = languages[row]
        decoded.append(one)
    return decoded
