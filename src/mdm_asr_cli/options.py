# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands have, each written once; and how their values are read."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

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
Hotwords = Annotated[
    list[str] | None,
    typer.Option(metavar="WORDS", help="Words to expect, parted by commas, or @FILE of them. May be repeated."),
]
VoiceActivity = Annotated[
    Literal["auto", "silero", "energy", "none"],
    typer.Option(help="How speech is found. Default: silero, if ONNX Runtime is installed, else energy."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows decoded together. Does not change the text.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cuda if there is one.")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"],
    typer.Option("--dtype", help="Of weights and activations. int8 is the fastest on a CPU, and for CPUs only."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the checkpoint.")
]


def split_words(entries: list[str] | None) -> list[str]:
    """
    The words of `--hotwords`, which takes them parted by commas, or a file of them as @FILE, and may be repeated.

    Raises:
        ValueError: a file that cannot be read or has no words, a word that is or looks like a file.
    """
    words = []
    for entry in entries or []:
        if entry.startswith("@"):
            words += _words_of_file(Path(entry[1:]).expanduser())
            continue
        for word in filter(None, map(str.strip, entry.split(","))):
            if LIKE_A_FILE.search(word) or os.path.isfile(word):
                raise ValueError(f"`--hotwords {word}` is a file, not a word. To read its words, pass `@{word}`.")
            words.append(word)
    return words


# Neither AC/DC nor Node.js, which are words.
LIKE_A_FILE = re.compile(
    r"^(~|\.{0,2})[/\\]|^[A-Za-z]:\\|\.(txt|text|csv|tsv|jsonl?|lst|list|md|ya?ml|docx?|xlsx?)$", re.I
)


def _words_of_file(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--hotwords @{path}` is not text in UTF-8. Save it so, a word or phrase a line.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`--hotwords @{path}` cannot be read: {reason}. Check the path.") from error
    words = [word.strip() for line in text.splitlines() for word in line.split(",") if word.strip()]
    if not words:
        raise ValueError(f"`--hotwords @{path}` holds no words. Write a word or phrase a line.")
    return words
