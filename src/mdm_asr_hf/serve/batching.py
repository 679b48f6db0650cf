# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Windows of all requests in shared batches.

One thread decodes. Whenever it is free, it takes what waits, at once: while a batch is decoded, the next one comes
together, so that nothing waits for the sake of a batch. Requests take turns window by window, and a batch is no longer
than half a second of decoding, so that a short one stands in the next batch, and that is near, however long the files
before it are.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from ..transcribe.transcriber import MAX_BATCH_S, Transcriber
from ..transcribe.windows import Window

logger = logging.getLogger(__name__)

# Of decoding, that a batch of several windows may take, as fast as the last ones were: what comes next waits as long.
BATCH_TIME_S = 0.5
# Seconds of audio in a second, before there was a batch; and what each batch counts.
FIRST_RTFX, NEWEST_SHARE = 80.0, 0.2


class Batcher:
    """
    Decodes windows of [`BatchedTranscriber`]s, in a thread of its own.

    Args:
        batch_size (`int`): windows decoded together, at most.
        on_batch (`Callable`): is called, after each batch, with its windows, their results and the seconds it took.
    """

    def __init__(self, batch_size: int, on_batch: Callable[[list, list, float], None]):
        self.batch_size, self.on_batch = batch_size, on_batch
        # By transcriber, the one whose turn it is first.
        self._waiting: dict[BatchedTranscriber, deque[tuple[Window, Future]]] = {}
        self._batch: list[tuple[BatchedTranscriber, Window, Future]] = []
        self._change = threading.Condition()
        self._is_closed, self._since, self._rtfx = False, None, FIRST_RTFX
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    def is_healthy(self, longest_s: float) -> bool:
        """Whether the thread is there, and no batch has taken longer than so many seconds."""
        since = self._since
        return self._thread.is_alive() and (since is None or time.monotonic() - since < longest_s)

    def num_waiting(self) -> int:
        with self._change:
            return sum(map(len, self._waiting.values()))

    def submit(self, transcriber: "BatchedTranscriber", windows: list[Window]) -> list[Future]:
        """What will be decoded of windows; of those that cannot be, a ValueError as the result."""
        futures = [Future() for _ in windows]
        with self._change:
            if self._is_closed or transcriber.is_cancelled:
                raise RuntimeError("Nothing is decoded any more.")
            if windows:
                self._waiting.setdefault(transcriber, deque()).extend(zip(windows, futures, strict=True))
                self._change.notify()
        return futures

    def drop(self, transcriber: "BatchedTranscriber") -> None:
        """Forgets the windows of a transcriber that still wait."""
        with self._change:
            transcriber.is_cancelled = True
            for _, future in self._waiting.pop(transcriber, ()):
                future.cancel()

    def close(self) -> None:
        """Ends the thread after its batch; what waits is cancelled."""
        with self._change:
            self._is_closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._take():
                self._since = time.monotonic()
                self._decode(self._batch)
                # Audio of requests that are over does not stay.
                self._batch, self._since = [], None
        finally:
            with self._change:
                self._is_closed = True
                left = [future for _, _, future in self._batch]
                left += [future for windows in self._waiting.values() for _, future in windows]
                self._waiting.clear()
            for future in left:
                if not future.done():
                    future.set_exception(RuntimeError("Decoding has ended."))

    def _take(self) -> bool:
        """Moves the next batch from what waits, which it waits for; False once it is closed."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._is_closed)
            self._batch, longest_s, sum_s, is_full = [], 0.0, 0.0, self._is_closed
            while not is_full:
                num_before = len(self._batch)
                for transcriber, windows in list(self._waiting.items()):
                    window_s, size = windows[0][0].duration_s, len(self._batch) + 1
                    longer_s = max(longest_s, window_s)
                    # A batch has one temperature.
                    if self._batch and (
                        size > self.batch_size
                        or size * longer_s > MAX_BATCH_S
                        or sum_s + window_s > self._rtfx * BATCH_TIME_S
                        or transcriber.settings.temperature != self._batch[0][0].settings.temperature
                    ):
                        continue
                    longest_s, sum_s = longer_s, sum_s + window_s
                    self._batch.append((transcriber, *windows.popleft()))
                    # Behind all others.
                    del self._waiting[transcriber]
                    if windows:
                        self._waiting[transcriber] = windows
                is_full = len(self._batch) == num_before
            return not self._is_closed

    def _decode(self, batch: list[tuple["BatchedTranscriber", Window, Future]]) -> None:
        transcribers, windows, futures = zip(*batch, strict=True)
        # Times of words are made for all or none.
        host = next((one for one in transcribers if one.timestamps), transcribers[0])
        started = time.perf_counter()
        try:
            results = host._decode(windows, [one.arguments for one in transcribers])
            took_s = time.perf_counter() - started
            self._rtfx += NEWEST_SHARE * (sum(window.duration_s for window in windows) / took_s - self._rtfx)
            self.on_batch(windows, results, took_s)
        except Exception as error:
            if len(batch) > 1:
                # One request must not be the end of others.
                for one in batch:
                    self._decode([one])
                return
            logger.exception("a window could not be decoded")
            results = [error]
        for future, result in zip(futures, results, strict=True):
            is_result = isinstance(result, ValueError) or not isinstance(result, Exception)
            (future.set_result if is_result else future.set_exception)(result)


class BatchedTranscriber(Transcriber):
    """A [`Transcriber`] for one recording, whose windows share batches with those of others; see [`Batcher`]."""

    def __init__(self, batcher: Batcher, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batcher, self.is_cancelled = batcher, False

    def _decode_jobs(self, jobs: list[Any]) -> Iterator[tuple[Any, Any]]:
        futures = self.batcher.submit(self, [job.window for job in jobs])
        for job, future in zip(jobs, futures, strict=True):
            if job.recording.error is None:
                yield job, future.result()
