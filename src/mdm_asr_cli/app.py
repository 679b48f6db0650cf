# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The application: its commands, in the order in which `mdm-asr --help` shows them."""

from importlib.metadata import version
from typing import Annotated

import typer

from .convert import convert
from .dataset import transcribe_dataset
from .demo import demo
from .evaluation import evaluate, push, report, score
from .export import export
from .serve import serve
from .streaming import stream
from .terminal import print_anything
from .training import train_drafts
from .transcribe import transcribe

app = typer.Typer(
    help="Speech recognition by masked diffusion (arXiv 2602.18952).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (
    *(transcribe, transcribe_dataset, convert, export, evaluate, score, report, push),
    *(stream, serve, demo, train_drafts),
):
    app.command()(function)


def _print_version(value: bool) -> None:
    if value:
        print(f"mdm-asr {version('mdm_asr_hf')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs a command."""
    print_anything()
    app()
