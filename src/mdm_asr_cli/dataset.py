# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr transcribe-dataset`: archives of audio, on as many cores, GPUs and machines as there are."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    BatchSize,
    Hotwords,
    Language,
    Model,
    OtherSettings,
    Precision,
    TrustRemoteCode,
    VoiceActivity,
    split_words,
)
from .output import Timestamps
from .terminal import command


@command("ray", "cannot transcribe {source}: ", runs_exports=True)
def transcribe_dataset(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of audio, of WebDataset tars or of Parquet files, one of these, a pattern of them, a "
            "manifest (.jsonl, .csv, .tsv), or a folder or name that `datasets` knows."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For the shards. A second run writes what is missing.")
    ],
    model: Model = None,
    format: Annotated[Literal["parquet", "jsonl"], typer.Option(help="Of the shards.")] = "parquet",
    actors: Annotated[
        int | None, typer.Option(min=1, help="That transcribe at the same time. Default: all that there is room for.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each actor.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each actor, such as 1, or 0.5 for two on one.")] = 0,
    shard_mb: Annotated[
        float, typer.Option(min=0.001, help="MB of stored audio in a shard; what a kill may cost each actor.")
    ] = 16,
    timestamps: Annotated[Timestamps | None, typer.Option(help="word: words with their times.")] = None,
    hotwords: Hotwords = None,
    language: Language = None,
    vad: VoiceActivity = "auto",
    others: OtherSettings = None,
    batch_size: BatchSize = 8,
    dtype: Precision = "float32",
    split: Annotated[str | None, typer.Option(help="Of a data set of `datasets`. Default: train.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a data set of `datasets`.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Transcribe an archive of audio, by actors of Ray.

    Runs on the cores of this machine, or on the cluster that RAY_ADDRESS names. Writes shards with a row for each
    recording: id, text, words, confidence, nfe, duration_s, language, warnings, error. A recording that cannot be
    transcribed is a row with its error. Needs the extra `ray`.
    """
    from mdm_asr_hf.transcribe.dataset import transcribe_dataset as run

    done = run(
        source,
        output,
        model=model,
        format=format,
        actors=actors,
        threads=threads,
        gpus=gpus,
        shard_mb=shard_mb,
        split=split,
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        settings=others,
        report=lambda line: print(line, file=sys.stderr, flush=True),
        timestamps=timestamps == "word",
        hotwords=split_words(hotwords) or None,
        language=language,
        vad=vad,
        batch_size=batch_size,
    )
    news = f"{done['new_rows']} new ones, {done['errors']} of them errors"
    print(f"wrote {output}: {done['rows']} rows in {done['shards']} shards; {news}")
