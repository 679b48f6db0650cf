# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Transcribes a recording, and tells of every evaluation of the decoder while it does."""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ..evaluate.steps import read_steps
from ..transcribe.transcriber import Transcriber
from ..transcribe.transcript import Transcript

# A page of words for longer ones is slow to draw.
MAX_DURATION_S = 600.0


@dataclass
class Draft:
    """A window's text in work: stretches of text, each "own" (the donor's), "accepted", "struck" or "pending"."""

    start_s: float
    stretches: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Watched:
    """A transcript, the seconds that it took, and the steps of each window, as `read_steps` gives them."""

    transcript: Transcript
    seconds: float
    steps: list[dict[str, Any]]


class _Stopped(Exception):
    """Nobody looks any more."""


class _Streamer:
    """Puts aside what `generate` shows: laying it out would cost the decoding its time."""

    def __init__(self):
        self.events: SimpleQueue = SimpleQueue()
        self.is_stopped, self.start_s = False, 0.0

    def put(self, value: Any) -> None:
        """The prompt, and the whole text."""

    def end(self) -> None:
        """Nothing follows from it: a recording may have more windows."""

    def put_draft(self, value: Any, num_committed: Any) -> None:
        if self.is_stopped:
            raise _Stopped
        self.events.put((self.start_s, value[0].tolist(), int(num_committed[0])))


class _WatchedTranscriber(Transcriber):
    """Decodes one window after the other, in order."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, batch_size=1, timestamps=True, **kwargs)
        self.streamer = self.arguments["streamer"] = _Streamer()
        self.steps: list[dict[str, Any]] = []

    def _decode_jobs(self, jobs: list[Any]) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            self.streamer.start_s = job.window.start_s
            (result,) = self._decode([job.window])
            yield job, result
            if isinstance(result, ValueError):
                return

    def _read_output(self, output: Any, windows: Any) -> Any:
        self.steps.append(read_steps(output, 0, self.processor.tokenizer, self.model.config.eos_token_id))
        return super()._read_output(output, windows)


class _Follower:
    """Tells of each evaluation of a window what it accepted and struck of the drafts before."""

    def __init__(self, tokenizer: Any, start_s: float):
        self.tokenizer, self.start_s = tokenizer, start_s
        self._begin()

    def _begin(self) -> None:
        self.ids: list[int] = []
        self.pending: list[int] = []
        self.text, self.stretches = "", []

    def follow(self, ids: list[int], num_committed: int) -> Draft:
        """The text after an evaluation: ids of the text and of the drafts behind it."""
        if ids[:num_committed][: len(self.ids)] != self.ids:
            # The text was refused, and is written anew.
            self._begin()
        first, pending = len(self.ids), self.pending
        self.ids, self.pending = ids[:num_committed], ids[num_committed:]
        pairs = zip(self.ids[first:], pending, strict=False)
        num_accepted = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.stretches += [
            (self._advance(self.ids[: first + num_accepted]), "accepted"),
            (self._decode(pending[num_accepted:]), "struck"),
            (self._advance(self.ids), "own"),
        ]
        return Draft(self.start_s, [*self.stretches, (self._decode(self.pending), "pending")])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _advance(self, ids: list[int]) -> str:
        """What was added to the text; of a character whose bytes are not all there, nothing yet."""
        before, text = self.text, self._decode(ids).rstrip("\ufffd")
        self.text = text if len(text) > len(before) else before
        return text[len(before) :]


def watch(model: Any, processor: Any, path: str, settings: Any) -> Iterator[Draft | Watched]:
    """
    Yields the windows' texts as they grow, and at last the transcript.

    Args:
        path (`str`): of a recording of at most ten minutes.
        settings ([`MDMASRGenerationConfig`]): of `generate`.

    Raises:
        ValueError: the recording is empty, too long, or cannot be read or decoded: one line with the file's name.
    """
    transcriber = _WatchedTranscriber(model, processor, settings=settings)
    streamer = transcriber.streamer

    def work() -> None:
        start = time.perf_counter()
        try:
            transcript = transcriber.transcribe(path, max_duration_s=MAX_DURATION_S)
            streamer.events.put(Watched(transcript, time.perf_counter() - start, transcriber.steps))
        except Exception as error:
            streamer.events.put(error)

    Thread(target=work, daemon=True).start()
    followers: dict[float, _Follower] = {}
    try:
        while True:
            event = streamer.events.get()
            if isinstance(event, ValueError):
                # The folder is the server's own.
                message = " ".join(str(event).split())
                raise ValueError(message.replace(os.path.dirname(path) + os.sep, "")) from event
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Watched):
                if event.transcript.duration_s == 0:
                    raise ValueError(f"{os.path.basename(path)!r} is empty (no samples). Record or export it again.")
                yield event
                return
            start_s, ids, num_committed = event
            if start_s not in followers:
                followers[start_s] = _Follower(processor.tokenizer, start_s)
            yield followers[start_s].follow(ids, num_committed)
    finally:
        streamer.is_stopped = True
