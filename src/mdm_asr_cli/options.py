# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands have, each written once; and how their values are read."""

from enum import StrEnum
from typing import Annotated

import typer


class DType(StrEnum):
    """Precisions that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


Model = Annotated[
    str | None, typer.Option(metavar="FOLDER_OR_ID", help="A checkpoint. Default: the one in the package.")
]
Language = Annotated[
    str | None, typer.Option(help="Of the speech, for checkpoints with a choice, such as de; auto detects it.")
]
Gamma = Annotated[
    float | None,
    typer.Option(help="The entropy that drafts, or tokens committed at once, may have; larger is faster."),
]
# Of the paper's canvas alone.
Sampler = Annotated[str | None, typer.Option(help="On a canvas: random, dfm, conf_top_k, eb_conf or pbeb_conf.")]
Lambda = Annotated[float | None, typer.Option("--lambda", help="On a canvas: the position bias of pbeb_conf.")]
Steps = Annotated[int | None, typer.Option("--steps", help="On a canvas: the most decoder evaluations of a text.")]
CanvasLength = Annotated[
    int | None, typer.Option(help="On a canvas: the tokens it has. Default: adapted to the duration.")
]
OtherSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting of generation_config.json, such as hotword_boost=4."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cuda if there is one.")]
Precision = Annotated[
    DType, typer.Option("--dtype", help="Of weights and activations. int8 is the fastest on a CPU, and for CPUs only.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the checkpoint.")
]


def split_words(entries: list[str] | None) -> list[str]:
    """The words of an option that takes them parted by commas and may be repeated."""
    return [word.strip() for entry in entries or [] for word in entry.split(",") if word.strip()]


__all__ = [
    "CanvasLength",
    "DType",
    "Device",
    "Gamma",
    "Lambda",
    "Language",
    "Model",
    "OtherSettings",
    "Precision",
    "Sampler",
    "Steps",
    "TrustRemoteCode",
    "split_words",
]
