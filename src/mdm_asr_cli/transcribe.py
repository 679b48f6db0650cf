# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr transcribe`: recordings of any length to text, subtitles or JSON, going on where a killed run stopped."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from .options import (
    BatchSize,
    CanvasLength,
    Device,
    Gamma,
    Hotwords,
    Lambda,
    Language,
    Model,
    OtherSettings,
    Precision,
    Sampler,
    Steps,
    TrustRemoteCode,
    VoiceActivity,
    split_words,
)
from .output import Format, Timestamps, make_writer
from .terminal import command, load_named_model, quiet_libraries, report

# Of one file, on stderr; its JSON has all.
MAX_WARNINGS = 3
PIPE = Path("-")


@command(runs_exports=True)
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
    hotwords: Hotwords = None,
    language: Language = None,
    target_language: Annotated[
        str | None, typer.Option(help="Of the text, for checkpoints that translate, such as en.")
    ] = None,
    vad: VoiceActivity = "auto",
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
    dtype: Precision = "float32",
    batch_size: BatchSize = 8,
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

    words = split_words(hotwords)
    if PIPE in files:
        _check_stdin(files, resume)
    writer = make_writer(
        files,
        list(dict.fromkeys(formats or [])),
        as_json=as_json,
        output_dir=output_dir,
        output=output,
        resume=resume,
        timestamps=timestamps,
    )
    with_times = timestamps == "word" or (timestamps is None and writer.wants_times)
    loaded, processor = load_named_model(model, device, trust_remote_code, dtype)
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
        vad=vad,
        timestamps=with_times,
        hotwords=words or None,
        language=language,
        target_language=target_language,
    )
    # Whatever decides a result; the batch size does not.
    decisive = {
        "model": model_identity(model or str(default_checkpoint())),
        "dtype": dtype,
        "settings": settings.to_dict(),
        "window_s": transcriber.max_window_s,
        "vad": getattr(transcriber.vad, "name", None),
        "prompt": [language, target_language],
        "hotwords": words,
        "times": with_times,
        "layout": timestamps,
    }
    writer.prepare(hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16])
    todo = [path for path in files if not writer.is_done(path)]
    num_failed = 0
    with quiet_libraries() as collector, progress_bar(todo) as bar:
        results = transcriber.transcribe_all(
            # Read when its turn comes.
            (sys.stdin.buffer if path == PIPE else path for path in todo),
            on_progress=lambda seconds: bar.advance(bar.task_ids[0], seconds),
            on_window=lambda i, window: writer.keep_window(todo[i], window),
            known_window=lambda i, window: writer.known_window(todo[i], window),
        )
        for i, result in results:
            path = todo[i]
            # It would stand amid the lines.
            bar.stop()
            # `generate` warns of texts without an end per batch; the transcripts do so, too, and say where.
            collector.report(without=("without an end of text",))
            if not isinstance(result, ValueError) and result.duration_s == 0:
                result = ValueError(f"{str(path)!r} is empty (no samples). Record or export it again.")
            if isinstance(result, ValueError):
                num_failed += 1
                report("error", result)
            else:
                for message in result.warnings[:MAX_WARNINGS]:
                    report("warning", f"{path}: {message}")
                if (num_more := len(result.warnings) - MAX_WARNINGS) > 0:
                    report("warning", f"{path}: {num_more} more like this.")
                writer.write(path, result)
            bar.start()
    if num_failed:
        raise typer.Exit(1)


def _check_stdin(files: list[Path], resume: bool) -> None:
    if files.count(PIPE) > 1:
        raise ValueError("`FILE` - is given twice, but stdin holds one recording. Name it once.")
    if resume:
        raise ValueError("`--resume` cannot tell whether what comes on stdin is the same. Name a file instead of -.")
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("`FILE` - is an audio file on stdin, but that is a terminal. Pipe one in, or name it.")


def progress_bar(files: list[Path]) -> Progress:
    """A bar on stderr, where that is a terminal: how much of the audio is done, and the time that the rest takes."""
    console = Console(stderr=True)
    bar = Progress(
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (console.is_terminal and files),
    )
    total_s = 0.0 if bar.disable else sum(map(_header_duration_s, files))
    bar.add_task("transcribing", total=total_s or None)
    return bar


def _header_duration_s(path: Path) -> float:
    """What a file's header says, 0 if it says nothing; a pipe is not touched, since it can be read once only."""
    import soundfile

    if not os.path.isfile(path):
        return 0.0
    try:
        # soundfile takes no name that is not UTF-8.
        with open(path, "rb") as file:
            return soundfile.info(file).duration
    except (soundfile.SoundFileError, OSError, TypeError):
        return 0.0
