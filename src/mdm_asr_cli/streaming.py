# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr stream`: text of a microphone, a file or raw samples, while the speech goes on."""

import dataclasses
import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from .options import Device, Hotwords, Model, Precision, TrustRemoteCode, split_words
from .terminal import command, load_named_model

# torch and transformers take seconds to import, and help and usage errors need neither.
if TYPE_CHECKING:
    import numpy as np

    from mdm_asr_hf.transcribe.streaming import StreamUpdate

# What is read, slept or recorded at once.
BLOCK_S = 0.1
PIPE = "-"


@command("stream", runs_exports=True)
def stream(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="An audio file, or - for WAV or raw s16le at 16 kHz on stdin."),
    ] = None,
    model: Model = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for every update: new, partial, time_s, ...")
    ] = False,
    realtime: Annotated[
        bool,
        typer.Option("--realtime/--no-realtime", help="Play FILE as fast as it was spoken, or as fast as it goes."),
    ] = True,
    step_s: Annotated[
        float, typer.Option(help="Seconds of audio from one hypothesis to the next; the first text comes sooner.")
    ] = 0.5,
    max_window_s: Annotated[
        float | None, typer.Option("--window-s", help="The longest audio decoded at once. Default: 8.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of the speech, for checkpoints with a choice, such as de.")
    ] = None,
    hotwords: Hotwords = None,
    input_device: Annotated[
        str | None, typer.Option(metavar="NAME", help="The microphone, by number or a part of its name.")
    ] = None,
    device: Device = None,
    dtype: Precision = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Transcribe speech while it goes on: the microphone, or a file as if it were live.

    On a terminal, committed text is plain and the tentative rest is dim. Elsewhere, each line holds the words that
    have just been committed. Ctrl-C ends the recording and prints what is left. Decoding that is slower than the
    speech leaves steps out and goes on with the newest audio.
    """
    from mdm_asr_hf.transcribe.pipe import read_pipe
    from mdm_asr_hf.transcribe.streaming import StreamingTranscriber

    # What can go wrong without the model comes first.
    words = split_words(hotwords)
    if source is None:
        rate_hz, chunks = _record(input_device)
    elif source != PIPE:
        rate_hz, chunks = _read_file(source, realtime)
    loaded, processor = load_named_model(model, device, trust_remote_code, dtype)
    transcriber = StreamingTranscriber(
        loaded,
        processor,
        step_s=step_s,
        max_window_s=max_window_s,
        hotwords=words or None,
        keep_up=source in (None, PIPE) or realtime,
        language=language,
    )
    if source == PIPE:
        rate_hz, chunks = read_pipe(sys.stdin.buffer)
    with closing(chunks), _display(as_json) as show:
        for update in _updates(transcriber, chunks, rate_hz):
            show(update)


class _Interruption:
    """
    Ctrl-C, as the end of the stream: it breaks the wait for audio, and lets decoding and printing come to their end.
    """

    def __init__(self):
        self.has_come, self.is_waiting = False, False

    def __call__(self, *signal_and_frame: Any) -> None:
        self.has_come = True
        if self.is_waiting:
            raise KeyboardInterrupt

    def next_chunk(self, chunks: Iterator["np.ndarray"]) -> "np.ndarray | None":
        """The next chunk; None at the end and after Ctrl-C."""
        try:
            self.is_waiting = True
            return None if self.has_come else next(chunks, None)
        except KeyboardInterrupt:
            return None
        finally:
            self.is_waiting = False


def _updates(transcriber: Any, chunks: Iterator["np.ndarray"], rate_hz: float) -> Iterator["StreamUpdate"]:
    """Updates of a stream until it ends or Ctrl-C is pressed, and the final one; a second Ctrl-C ends at once."""
    interruption = _Interruption()
    before = signal.signal(signal.SIGINT, interruption)
    try:
        while (chunk := interruption.next_chunk(chunks)) is not None:
            if (update := transcriber.feed(chunk, rate_hz)) is not None:
                yield update
    finally:
        signal.signal(signal.SIGINT, before)
    yield transcriber.finish()


# Sources


def _read_file(path: str, realtime: bool) -> tuple[float, Iterator["np.ndarray"]]:
    """The rate in Hz and the blocks of a file."""
    from mdm_asr_hf.audio_mdm_asr import AudioStream

    stream = AudioStream(path, block_s=BLOCK_S)
    return stream.target_rate_hz, _play(iter(stream), stream.target_rate_hz) if realtime else iter(stream)


def _record(name: str | None) -> tuple[float, Iterator["np.ndarray"]]:
    """The rate in Hz of a microphone, and what it has recorded since the last time, all of it at once, for ever."""
    import numpy as np

    remedy = "Or name a FILE, or - for a pipe."
    try:
        import sounddevice
    except ImportError as error:
        raise ValueError(
            f'The microphone needs sounddevice: `pip install ".[stream]"` in a clone of this project. {remedy}'
        ) from error
    except OSError as error:
        raise ValueError(
            f"sounddevice cannot be used ({error}): install PortAudio (`apt-get install libportaudio2`). {remedy}"
        ) from error
    device = int(name) if name is not None and name.isdigit() else name
    blocks: queue.SimpleQueue = queue.SimpleQueue()
    try:
        rate_hz = sounddevice.query_devices(device, "input")["default_samplerate"]
        # The callback runs in a thread of PortAudio's that must not wait.
        microphone = sounddevice.InputStream(
            samplerate=rate_hz,
            device=device,
            channels=1,
            dtype="float32",
            blocksize=round(BLOCK_S * rate_hz),
            callback=lambda samples, count, when, status: blocks.put(samples[:, 0].copy()),
        )
    except (sounddevice.PortAudioError, ValueError) as error:
        raise ValueError(f"No microphone can be opened ({error}). Check `--input-device`. {remedy}") from error

    def chunks() -> Iterator["np.ndarray"]:
        with microphone:
            while True:
                recorded = [blocks.get()]
                while not blocks.empty():
                    recorded.append(blocks.get())
                yield np.concatenate(recorded)

    return rate_hz, chunks()


def _play(blocks: Iterator["np.ndarray"], rate_hz: float) -> Iterator["np.ndarray"]:
    """A file's blocks once the time has come at which they would have been recorded; those due are handed together."""
    import numpy as np

    started, num_samples, due = time.monotonic(), 0, []
    for block in blocks:
        num_samples += len(block)
        due_at = started + num_samples / rate_hz
        if due and due_at > time.monotonic():
            yield np.concatenate(due)
            due = []
        due.append(block)
        if (wait_s := due_at - time.monotonic()) > 0:
            time.sleep(wait_s)
            yield np.concatenate(due)
            due = []
    if due:
        yield np.concatenate(due)


# Displays


@contextmanager
def _display(as_json: bool) -> Iterator[Any]:
    """Gives a function that shows an update."""
    if as_json:
        yield _show_json
    elif sys.stdout.isatty():
        with Live(console=Console(highlight=False, soft_wrap=False), refresh_per_second=10) as live:
            yield _LiveText(live)
    else:
        yield _Lines()


def _show_json(update: "StreamUpdate") -> None:
    from mdm_asr_hf.encoding_mdm_asr import json_text

    values = dataclasses.asdict(update)
    values["latency_s"] = round(update.latency_s, 3)
    # The text so far on every line would make the output of an hour gigabytes: the new words are enough.
    text = values.pop("committed")
    if update.is_final:
        values["text"] = text
    print(json_text(values, sys.stdout.encoding), flush=True)


class _Lines:
    """A line for every update that commits something."""

    def __init__(self):
        self._num_shown = 0

    def __call__(self, update: "StreamUpdate") -> None:
        text = update.committed[self._num_shown :].strip()
        self._num_shown = len(update.committed)
        if text:
            print(text, flush=True)


class _LiveText:
    """Committed text plain, tentative text dim. Lines that are full leave the live part, which is drawn anew."""

    def __init__(self, live: Live):
        self._live, self._num_shown = live, 0

    def __call__(self, update: "StreamUpdate") -> None:
        console = self._live.console
        lines = Text(update.committed[self._num_shown :].lstrip()).wrap(console, console.width)
        # The last line may still grow, unless the stream has ended.
        for line in lines if update.is_final else lines[:-1]:
            line.rstrip()
            console.print(line)
        last = "" if update.is_final or not lines else lines[-1].plain
        self._num_shown = len(update.committed) - len(last)
        self._live.update(Text.assemble(last, " ", (update.partial, "dim")))
