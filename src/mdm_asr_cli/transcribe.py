# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr transcribe`: recordings of any length to text, subtitles or JSON, going on where a killed run stopped."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from .journal import fingerprint
from .options import (
    CanvasLength,
    Device,
    DType,
    Gamma,
    Lambda,
    Language,
    Model,
    OtherSettings,
    Precision,
    Sampler,
    Steps,
    TrustRemoteCode,
    split_words,
)
from .output import Format, Timestamps, Writer, make_writer
from .terminal import Failure, load_named_model, quiet_libraries, report

# torch and transformers take seconds to import, and help and usage errors need neither.
if TYPE_CHECKING:
    from mdm_asr_hf.transcribe.transcriber import Transcriber
    from mdm_asr_hf.transcribe.transcript import Transcript


# Of one file, on stderr; its JSON has all.
MAX_WARNINGS = 3
PIPE = Path("-")


class Vad(StrEnum):
    auto = "auto"
    silero = "silero"
    energy = "energy"
    none = "none"


def register(app: typer.Typer) -> None:
    """Adds the command of this module to the application."""
    app.command()(transcribe)


def transcribe(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Audio of any length: WAV, FLAC, OGG, MP3, ...; - for a file on stdin."),
    ],
    model: Model = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option("--format", help="Of the result; several with --output-dir: --format srt --format txt."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: file, text, confidence, nfe, duration_s.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write a file per recording and format.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="A file for what --json prints, a line per recording.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run into the same place was stopped.")
    ] = False,
    timestamps: Annotated[
        Timestamps | None, typer.Option(help="JSON with the times of segments, or of words, too.")
    ] = None,
    hotwords: Annotated[
        list[str] | None,
        typer.Option(metavar="WORDS", help="Words to expect, parted by commas, or @FILE of them. May be repeated."),
    ] = None,
    language: Language = None,
    target_language: Annotated[
        str | None, typer.Option(help="Of the text, for checkpoints that translate, such as en.")
    ] = None,
    vad: Annotated[
        Vad, typer.Option(help="How speech is found. Default: silero, if silero-vad is installed, else energy.")
    ] = Vad.auto,
    max_window_s: Annotated[
        float | None, typer.Option("--window-s", help="Longest audio decoded at once. Default: the checkpoint's.")
    ] = None,
    gamma: Gamma = None,
    others: OtherSettings = None,
    sampler: Sampler = None,
    lambda_: Lambda = None,
    max_denoising_steps: Steps = None,
    canvas_length: CanvasLength = None,
    device: Device = None,
    dtype: Precision = DType.float32,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows decoded together. Does not change the text.")] = 8,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Transcribe audio files.

    Prints the text of one file, or a line "file<TAB>text" for each of several; or writes it with --output-dir or
    --output. A file that cannot be transcribed is reported on stderr, the others are still done, and the exit code
    is 1.
    """
    from mdm_asr_hf.loading import default_checkpoint, generation_settings, model_identity
    from mdm_asr_hf.transcribe.transcriber import Transcriber

    formats = list(dict.fromkeys(formats or []))
    try:
        words = split_words(hotwords)
        if PIPE in files:
            _check_stdin(files, resume)
        writer = make_writer(
            files, formats, as_json=as_json, output_dir=output_dir, output=output, resume=resume, timestamps=timestamps
        )
    except ValueError as error:
        raise Failure(error) from error
    with quiet_libraries() as collector:
        source = model or str(default_checkpoint())
        with_times = timestamps is Timestamps.word or (timestamps is None and writer.wants_times)
        try:
            loaded, processor = load_named_model(source, device, trust_remote_code, dtype.value)
            settings = generation_settings(
                loaded,
                others,
                gamma=gamma,
                sampler=sampler,
                lambda_=lambda_,
                max_denoising_steps=max_denoising_steps,
                canvas_length=canvas_length,
            )
            transcriber = Transcriber(
                loaded,
                processor,
                settings=settings,
                max_window_s=max_window_s,
                batch_size=batch_size,
                vad=vad.value,
                timestamps=with_times,
                hotwords=words or None,
                language=language,
                target_language=target_language,
            )
            # Whatever decides a result; the batch size does not.
            decisive = {
                "model": model_identity(source),
                "dtype": dtype.value,
                "settings": settings.to_dict(),
                "window_s": transcriber.max_window_s,
                "vad": getattr(transcriber.vad, "name", None),
                "prompt": [language, target_language],
                "hotwords": words,
                "times": with_times,
                "layout": timestamps,
            }
            writer.prepare(fingerprint(decisive))
        except (ValueError, OSError) as error:
            raise Failure(error) from error
        num_failed = 0
        try:
            for path, result in _results(files, transcriber, writer, collector):
                if isinstance(result, ValueError):
                    num_failed += 1
                    report("error", result)
                    continue
                for message in result.warnings[:MAX_WARNINGS]:
                    report("warning", f"{path}: {message}")
                if (num_more := len(result.warnings) - MAX_WARNINGS) > 0:
                    report("warning", f"{path}: {num_more} more like this.")
                writer.write(path, result)
        except OSError as error:
            raise Failure(f"cannot write the result: {error}") from error
    if num_failed:
        raise typer.Exit(1)


def _results(
    files: list[Path], transcriber: "Transcriber", writer: "Writer", collector: Any
) -> Iterator[tuple[Path, "Transcript | ValueError"]]:
    """Yields, in order, each file that is not done with its transcript or its error."""
    todo = [path for path in files if not writer.is_done(path)]
    bar = ProgressBar(todo)
    with bar.shown():
        results = transcriber.transcribe_all(
            # Read when its turn comes.
            (sys.stdin.buffer if path == PIPE else path for path in todo),
            on_progress=bar.advance,
            on_window=lambda i, window: writer.keep_window(todo[i], window),
            known_window=lambda i, window: writer.known_window(todo[i], window),
        )
        for i, result in results:
            # `generate` warns of texts without an end per batch; the transcripts do so, too, and say where.
            collector.messages = [one for one in collector.messages if "without an end of text" not in one]
            if not isinstance(result, ValueError) and result.duration_s == 0:
                result = ValueError(f"{str(todo[i])!r} is empty (no samples). Record or export it again.")
            # Until the next one is asked for, lines are printed.
            with bar.paused():
                collector.flush_to_stderr()
                yield todo[i], result


def _check_stdin(files: list[Path], resume: bool) -> None:
    if files.count(PIPE) > 1:
        raise ValueError("`FILE` - is given twice, but stdin holds one recording. Name it once.")
    if resume:
        raise ValueError("`--resume` cannot tell whether what comes on stdin is the same. Name a file instead of -.")
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("`FILE` - is an audio file on stdin, but that is a terminal. Pipe one in, or name it.")


# --- progress ---


class _ClockColumn(ProgressColumn):
    """How much of the audio is done, as 0:12:30/1:00:00."""

    def render(self, task: Any) -> Text:
        def clock(seconds: float) -> str:
            minutes, s = divmod(int(seconds), 60)
            return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"

        return Text(f"{clock(task.completed)}/{clock(task.total or 0)}")


class ProgressBar:
    """A bar on stderr, where that is a terminal: seconds of audio done, of all, and the time it still takes."""

    def __init__(self, files: list[Path]):
        console = Console(stderr=True)
        self.is_shown = console.is_terminal and bool(files)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _ClockColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        total_s = sum(map(_header_duration_s, files)) if self.is_shown else 0.0
        self.task = self.bar.add_task("transcribing", total=total_s or None)

    def advance(self, seconds: float) -> None:
        self.bar.advance(self.task, seconds)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self.is_shown:
            yield
            return
        with self.bar:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For printing: the bar would stand amid the lines."""
        if self.is_shown:
            self.bar.stop()
        yield
        if self.is_shown:
            self.bar.start()


def _header_duration_s(path: Path) -> float:
    """What a file's header says, 0 if it says nothing; a pipe is not touched, since it can be read once only."""
    import soundfile

    try:
        if not path.is_file():
            return 0.0
        # soundfile takes no name that is not UTF-8.
        with open(path, "rb") as file:
            return soundfile.info(file).duration
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError):
        return 0.0


__all__ = ["register", "transcribe"]
