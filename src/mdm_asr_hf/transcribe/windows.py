# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Cuts a recording of any length, while it is read, into windows that the model can decode: at pauses if it can."""

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..cores import num_cores
from .voice_activity import FRAME_S, speech_runs, weakest_frame

# Pauses at which may be cut. Within words, the closures of stops are silent for up to 0.15 s.
MIN_PAUSE_S = 0.2
# A pause as long as this costs nothing to cut at; a shorter one in proportion to what it lacks.
FREE_PAUSE_S = 0.6
# Longer pauses are skipped, never part of a window.
MAX_PAUSE_S = 1.5
# What a window costs, in terms of the shortest pause's cost, and what it costs to be shorter than `SHORT_WINDOW_S`.
WINDOW_COST, SHORT_COST, SHORT_WINDOW_S = 0.5, 0.5, 3.0
# Kept before and after speech, since detectors are late and soft sounds are missed; half of the pause at most.
PAD_S = 0.4
# What must be left of it where a stretch of speech just fits into a window.
MIN_PAD_S = 0.1
# Shorter bursts between pauses are no words.
MIN_SPEECH_S = 0.1
# What windows share where there is no pause, as a share of the longest window and at most.
OVERLAP_SHARE, MAX_OVERLAP_S = 0.25, 2.0
# Cuts amid speech are made at the weakest sound in this last share of the window.
WEAK_SHARE = 0.15
# The detector gets blocks of about this length, on whose frames it judges what is noise.
VAD_BLOCK_S = 30.0
# So many of them at the same time, at most: each takes some 25 MB meanwhile.
MAX_VAD_THREADS = 4
# Pauses are chosen with this many windows in view.
NUM_WINDOWS_IN_VIEW = 3


@dataclass
class Window:
    """
    A stretch of a recording to decode at once.

    Attributes:
        start_s, end_s (`float`): seconds from the start of the recording.
        samples (`np.ndarray` of shape (N,)): mono float32.
        overlap_before_s, overlap_after_s (`float`): seconds shared with the window before and after; 0 at pauses.
    """

    start_s: float
    end_s: float
    samples: np.ndarray
    overlap_before_s: float = 0.0
    overlap_after_s: float = 0.0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def needs_times(self) -> bool:
        """Whether it can only be joined with a neighbour by the times of words."""
        return self.overlap_before_s > 0 or self.overlap_after_s > 0


def cut_windows(
    blocks: Iterable[np.ndarray], rate_hz: float, vad: Any, max_window_s: float, whole_s: float | None = None
) -> Iterator[Window]:
    """
    Windows of a recording, in order, of at most `max_window_s` seconds each.

    A recording of at most `whole_s` is one, as it is. Of a longer one, stretches without speech are skipped, and
    it is cut at pauses: those are taken for which all windows in view cost the least, long pauses being cheap. Where
    speech goes on for longer than a window without a pause, windows overlap. A recording without any speech gives no
    window, unless it is so short.

    Args:
        blocks (iterable of `np.ndarray`): mono samples, in order; held no longer than some windows.
        rate_hz (`float`): their rate.
        vad: a detector of `voice_activity`, which stays as it is, or None: everything is speech.
        max_window_s (`float`): the longest window.
        whole_s (`float`, *optional*): the longest recording that is not cut. By default `max_window_s`.
    """
    yield from _Cutter(rate_hz, vad, max_window_s, whole_s or max_window_s).cut(blocks)


def spoken_s(window: Window, rate_hz: float, vad: Any) -> float:
    """A window's seconds of speech, by a detector, which stays as it is."""
    detector = copy.copy(vad)
    detector.reset()
    runs = speech_runs(detector(window.samples), vad.enter, vad.leave, round(MIN_PAUSE_S / FRAME_S))
    return sum(end - start for start, end in runs) * vad.frame_size / rate_hz


def cut_in_half(window: Window, rate_hz: float, vad: Any) -> list[Window]:
    """A window's parts, of at most half of its length, as [`cut_windows`] makes them."""
    parts = list(cut_windows([window.samples], rate_hz, vad, window.duration_s / 2))
    for part in parts:
        part.start_s, part.end_s = window.start_s + part.start_s, window.start_s + part.end_s
    return parts


class _Cutter:
    """
    The recording from sample `origin` on, as far as it was read; frames count from there. After a cut amid speech it
    `continues`, and its first `overlap` frames are shared with the window before.
    """

    def __init__(self, rate_hz: float, vad: Any, max_window_s: float, whole_s: float):
        # What a detector remembers is of one recording, and others may be cut by the same one at the same time.
        self.rate_hz, self.vad = rate_hz, copy.copy(vad)
        self.frame_size = round(FRAME_S * rate_hz) if vad is None else vad.frame_size
        if vad is not None:
            self.vad.reset()
        self.max_frames = int(max_window_s * rate_hz / self.frame_size)
        self.whole_samples = int(whole_s * rate_hz)
        self.overlap_frames = self._frames(min(OVERLAP_SHARE * max_window_s, MAX_OVERLAP_S))
        self.origin, self.samples, self.scores = 0, np.zeros(0, dtype=np.float32), np.zeros(0)
        self.is_complete = False
        # Where speech goes on from the window before, and how much of that window is shared.
        self.continues, self.overlap = False, 0

    def cut(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        blocks = _regroup(blocks, self._frames(VAD_BLOCK_S) * self.frame_size)
        first, num_samples = [], 0
        for block in blocks:
            first.append(block)
            num_samples += len(block)
            if num_samples > self.whole_samples:
                break
        else:
            if first:
                # It is not asked where there is speech.
                self.samples = np.concatenate(first)
                yield self._window(0, math.ceil(num_samples / self.frame_size))
            return
        with closing(self._score(itertools.chain(first, blocks))) as scored:
            for block, scores in scored:
                self.samples = np.concatenate([self.samples, block])
                self.scores = np.concatenate([self.scores, scores])
                if self.origin == 0 and not self.continues and len(self.samples) <= self.whole_samples:
                    continue
                yield from iter(self._next_window, None)
        self.is_complete = True
        yield from iter(self._next_window, None)

    def _score(self, blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks with the scores of their frames, in order."""
        num_threads = min(num_cores(), MAX_VAD_THREADS)
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: deque[tuple[np.ndarray, Future]] = deque()
            for block in blocks:
                waiting.append((block, pool.submit(self._prepare(block))))
                if len(waiting) > num_threads:
                    block, scores = waiting.popleft()
                    yield block, scores.result()
            for block, scores in waiting:
                yield block, scores.result()

    def _prepare(self, block: np.ndarray) -> Callable[[], np.ndarray]:
        if self.vad is None:
            return partial(np.ones, math.ceil(len(block) / self.frame_size))
        return self.vad.prepare(block)

    def _next_window(self) -> Window | None:
        """The next window, and moves on behind it; None if there is none or more must be read."""
        if self.vad is None:
            runs = [(0, len(self.scores))] if len(self.scores) else []
        else:
            enter, leave = self.vad.enter, self.vad.leave
            scores = self.scores
            if self.continues and len(scores):
                scores = np.concatenate([[enter], scores[1:]])
            runs = speech_runs(scores, enter, leave, self._frames(MIN_PAUSE_S), self._frames(MIN_SPEECH_S))
        if not self.is_complete and (not runs or runs[0][1] == len(self.scores)):
            # A run that reaches the end may be going on; what lies before it is of no more use.
            start = runs[0][0] if runs else len(self.scores)
            if len(self.scores) - start < NUM_WINDOWS_IN_VIEW * self.max_frames:
                if not self.continues:
                    self._drop(start - self._frames(PAD_S))
                return None
        if not runs:
            self._drop(len(self.scores))
            return None
        if not self.is_complete and len(self.scores) - runs[0][0] < NUM_WINDOWS_IN_VIEW * self.max_frames:
            return None
        starts, ends = self._padded(runs)
        if ends[0] - starts[0] > self.max_frames:
            spare = self.max_frames - (runs[0][1] - runs[0][0])
            if spare < 2 * self._frames(MIN_PAD_S):
                return self._cut_amid_speech(starts[0], ends[0])
            starts[0] = max(starts[0], runs[0][0] - spare // 2)
            ends[0] = min(ends[0], starts[0] + self.max_frames)
        last = _first_window(runs, starts, ends, self.max_frames, self.rate_hz / self.frame_size)
        window = self._window(starts[0], ends[last])
        self.overlap, self.continues = 0, False
        self._drop(ends[last])
        return window

    def _padded(self, runs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Starts and ends of runs with what is kept around them; two that are near meet in the middle."""
        pad = self._frames(PAD_S)
        starts = [max(runs[0][0] - pad, 0)]
        ends = []
        for (_, end), (start, _) in itertools.pairwise(runs):
            middle = (end + start) // 2
            ends.append(min(end + pad, middle))
            starts.append(max(start - pad, middle))
        ends.append(min(runs[-1][1] + pad, len(self.scores)))
        return starts, ends

    def _cut_amid_speech(self, start: int, end: int) -> Window:
        """A window that ends amid speech; the next one begins before its end."""
        # The rest should not be a snippet: it and the overlap are what the next window has.
        length = self.max_frames
        left_over = end - start - (length - self.overlap_frames)
        if left_over < length / 2:
            length = max((end - start + self.overlap_frames) // 2 + 1, self.overlap_frames + 1)
        first = start + length - max(int(WEAK_SHARE * length), 1)
        stretch = self.samples[first * self.frame_size : (start + length) * self.frame_size]
        stop = first + weakest_frame(stretch, self.frame_size) + 1 if len(stretch) else start + length
        overlap = min(self.overlap_frames, stop - start - 1)
        window = self._window(start, stop, overlap)
        self.overlap, self.continues = overlap, True
        self._drop(stop - overlap)
        return window

    def _window(self, start: int, end: int, overlap_after: int = 0) -> Window:
        first, last = start * self.frame_size, min(end * self.frame_size, len(self.samples))
        # A copy, so that the window does not keep all that was read.
        samples = self.samples[first:last].copy()
        return Window(
            (self.origin + first) / self.rate_hz,
            (self.origin + last) / self.rate_hz,
            samples,
            overlap_before_s=max(self.overlap - start, 0) * self.frame_size / self.rate_hz,
            overlap_after_s=overlap_after * self.frame_size / self.rate_hz,
        )

    def _drop(self, num_frames: int) -> None:
        num_frames = max(num_frames, 0)
        self.scores = self.scores[num_frames:]
        num_samples = min(num_frames * self.frame_size, len(self.samples))
        self.samples = self.samples[num_samples:]
        self.origin += num_samples

    def _frames(self, seconds: float) -> int:
        return max(round(seconds * self.rate_hz / self.frame_size), 1)


def _first_window(
    runs: list[tuple[int, int]], starts: list[int], ends: list[int], max_frames: int, frames_per_s: float
) -> int:
    """
    The last run of the first window, of the cheapest way to part runs into windows; `starts` and `ends` are theirs
    with what is kept around them.
    """
    # Far ahead, whatever is decided now makes no difference.
    in_view = [k for k, start in enumerate(starts) if start - starts[0] <= NUM_WINDOWS_IN_VIEW * max_frames]
    num_runs = len(in_view)
    best = [0.0] * (num_runs + 1)
    choice = list(range(num_runs))
    for first in reversed(range(num_runs)):
        best[first] = math.inf
        for last in range(first, num_runs):
            if last > first:
                too_long = ends[last] - starts[first] > max_frames
                if too_long or (runs[last][0] - runs[last - 1][1]) / frames_per_s > MAX_PAUSE_S:
                    break
            cost = _window_cost((ends[last] - starts[first]) / frames_per_s) + best[last + 1]
            if last + 1 < num_runs:
                pause_s = (runs[last + 1][0] - runs[last][1]) / frames_per_s
                cost += max(0.0, FREE_PAUSE_S - pause_s) / (FREE_PAUSE_S - MIN_PAUSE_S)
            # Of equal ones the longer window, which is fewer of them.
            if cost <= best[first]:
                best[first], choice[first] = cost, last
    return choice[0]


def _window_cost(duration_s: float) -> float:
    return WINDOW_COST + SHORT_COST * max(0.0, 1 - duration_s / SHORT_WINDOW_S)


def _regroup(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of one size, the last one excepted, so that no cut depends on the reader's blocks."""
    waiting, num_waiting = [], 0
    for block in blocks:
        while len(block):
            part, block = block[: size - num_waiting], block[size - num_waiting :]
            waiting.append(part)
            num_waiting += len(part)
            if num_waiting == size:
                yield np.concatenate(waiting)
                waiting, num_waiting = [], 0
    if waiting:
        yield np.concatenate(waiting)
