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

from .options import Device, DType, Model, Precision, TrustRemoteCode, split_words
from .terminal import Failure, load_named_model, quiet_libraries

# torch and transformers take seconds to import, and help and usage errors need neither.
if TYPE_CHECKING:
    import numpy as np

    from mdm_asr_hf.transcribe.streaming import StreamUpdate

# What is read, slept or recorded at once.
BLOCK_S = 0.1
PIPE = "-"


def register(app: typer.Typer) -> None:
    """Adds the command of this module to the application."""
    app.command()(stream)


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
    hotwords: Annotated[
        list[str] | None,
        typer.Option(metavar="WORDS", help="Words to expect, parted by commas, or @FILE of them. May be repeated."),
    ] = None,
    input_device: Annotated[
        str | None, typer.Option(metavar="NAME", help="The microphone, by number or a part of its name.")
    ] = None,
    device: Device = None,
    dtype: Precision = DType.float32,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Transcribe speech while it goes on: the microphone, or a file as if it were live.

    On a terminal, committed text is plain and the tentative rest is dim. Elsewhere, each line holds the words that
    have just been committed. Ctrl-C ends the recording and prints what is left. Decoding that is slower than the
    speech leaves steps out and goes on with the newest audio.
    """
    from mdm_asr_hf import default_checkpoint
    from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids
    from mdm_asr_hf.transcribe.pipe import read_pipe
    from mdm_asr_hf.transcribe.streaming import StreamingTranscriber

    # What can go wrong without the model comes first.
    try:
        words = split_words(hotwords)
        microphone = None if source is not None else _open_microphone(input_device)
        chunks_of_file = None if source in (None, PIPE) else _open_file(source)
    except ValueError as error:
        raise Failure(error) from error
    with quiet_libraries() as collector:
        try:
            folder = model or str(default_checkpoint())
            loaded, processor = load_named_model(folder, device, trust_remote_code, dtype.value)
            if language not in (None, "auto"):
                build_prompt_ids(loaded.generation_config.prompt_template or {"tokens": [0]}, language=language)
            is_live = source is None or source == PIPE or realtime
            transcriber = StreamingTranscriber(
                loaded,
                processor,
                step_s=step_s,
                max_window_s=max_window_s,
                hotwords=words or None,
                keep_up=is_live,
                language=language,
            )
            if microphone is not None:
                chunks, rate_hz = _record(*microphone), microphone[1]
            elif source == PIPE:
                rate_hz, chunks = read_pipe(sys.stdin.buffer)
            else:
                chunks, rate_hz = chunks_of_file, chunks_of_file.target_rate_hz
                chunks = _play(iter(chunks), rate_hz) if realtime else iter(chunks)
            with closing(chunks), _display(as_json) as show:
                for update in _updates(transcriber, chunks, rate_hz):
                    show(update)
        except ValueError as error:
            raise Failure(error) from error
        finally:
            collector.flush_to_stderr()


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


def _open_file(path: str) -> Any:
    from mdm_asr_hf.audio_mdm_asr import AudioStream

    return AudioStream(path, block_s=BLOCK_S)


def _open_microphone(name: str | None) -> tuple[Any, float]:
    """sounddevice's input stream, not yet started, with the queue it fills as `blocks`; and its rate in Hz."""
    try:
        import sounddevice
    except ImportError as error:
        raise ValueError(
            'The microphone needs sounddevice: `pip install ".[stream]"` in a clone of this project. Or name '
            "a FILE, or - for a pipe."
        ) from error
    except OSError as error:
        raise ValueError(
            f"sounddevice cannot be used ({error}): install PortAudio (`apt-get install libportaudio2`). Or name a "
            "FILE, or - for a pipe."
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
        raise ValueError(
            f"No microphone can be opened ({error}). Check `--input-device`, or name a FILE, or - for a pipe."
        ) from error
    microphone.blocks = blocks
    return microphone, rate_hz


def _record(microphone: Any, rate_hz: float) -> Iterator["np.ndarray"]:
    """What the microphone has recorded since the last time, all of it at once, for ever."""
    import numpy as np

    with microphone:
        while True:
            blocks = [microphone.blocks.get()]
            while not microphone.blocks.empty():
                blocks.append(microphone.blocks.get())
            yield np.concatenate(blocks)


def _play(blocks: Iterator["np.ndarray"], rate_hz: float) -> Iterator["np.ndarray"]:
    """A file's blocks once the time has come at which they would have been recorded; those due are handed together."""
    import numpy as np

    started, num_samples, due = time.monotonic(), 0, []
    for block in blocks:
        due.append(block)
        num_samples += len(block)
        wait_s = started + num_samples / rate_hz - time.monotonic()
        if wait_s > 0:
            if len(due) > 1:
                # These were due already: the last one is not yet.
                yield np.concatenate(due[:-1])
                due = due[-1:]
                wait_s = started + num_samples / rate_hz - time.monotonic()
            time.sleep(max(wait_s, 0.0))
            yield due[0]
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
        rest = update.committed[self._num_shown :]
        lines = Text(rest.lstrip()).wrap(console, console.width)
        if len(lines) > 1 or update.is_final:
            # The last line may still grow, unless the stream has ended.
            done = lines if update.is_final else lines[:-1]
            for line in done:
                line.rstrip()
                console.print(line)
            last = "" if update.is_final or not lines else lines[-1].plain
            self._num_shown = len(update.committed) - len(last)
            rest = last
        self._live.update(Text.assemble(rest.lstrip(), " ", (update.partial, "dim")))


__all__ = ["register", "stream"]
