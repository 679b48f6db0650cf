# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr train-drafts`: a donor made fast."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .terminal import command


@command("train", "cannot train drafts of {donor}: ")
def train_drafts(
    donor: Annotated[
        str,
        typer.Argument(
            metavar="DONOR", help="A Whisper or Canary checkpoint: folder, .nemo file or id; or a model to go on with."
        ),
    ],
    audio: Annotated[
        list[str],
        typer.Argument(
            metavar="AUDIO...",
            help="Speech without transcripts: folders, manifests, data sets of `datasets`, or JSON objects as "
            '\'{"path": "speech", "weight": 1, "passes": 4}\': its share of the clips, and how often it is cut anew.',
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="For the model; `training` in it keeps the rest.")],
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="For what the donor makes of the audio, about 0.4 GB an hour. Default: in OUTPUT."
        ),
    ] = None,
    silence_s: Annotated[
        float,
        typer.Option(
            "--silence", min=0.0, help="Seconds behind the audio, which a Whisper encoder learns to take for more."
        ),
    ] = 1.0,
    encoder_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Of the silence behind the audio. Default: 500 for a Whisper; 0 leaves it as it is."),
    ] = None,
    draft_steps: Annotated[int, typer.Option(min=0, help="Of the masks.")] = 6000,
    isct_steps: Annotated[
        int, typer.Option(min=1, max=2, help="2: the masks also learn to see drafts that were not accepted.")
    ] = 1,
    batch_seconds: Annotated[float, typer.Option(min=30.0, help="Of audio in a step, padding included.")] = 120.0,
    language: Annotated[str | None, typer.Option(help="Of the speech. Default: what the donor hears.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """
    Make a donor fast: train its drafts on audio without transcripts.

    The donor transcribes the audio once; then a short silence learns to stand for a long one, and the masks to
    draft, each by what the donor said. Started again it goes on where it was stopped.
    """
    from mdm_asr_hf.train.distillation import train_drafts as train

    results = train(
        donor,
        [json.loads(one) if one.startswith("{") else one for one in audio],
        output,
        cache=cache,
        silence_s=silence_s,
        encoder_steps=encoder_steps,
        draft_steps=draft_steps,
        isct_steps=isct_steps,
        language=language,
        max_seconds_per_batch=batch_seconds,
        seed=seed,
        report=lambda line: print(line, flush=True),
    )
    last = list(results["stages"].values())[-1]["held_out"][-1]
    print(f"wrote {output}: {last['tokens_per_evaluation']:.2f} tokens an evaluation on speech that was held out")
