# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The application: its commands, in the order in which `mdm-asr --help` shows them."""

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from . import convert, evaluation, export, serve, streaming, training, transcribe
from .terminal import Failure, print_anything, report

app = typer.Typer(
    help="Speech recognition by masked diffusion (arXiv 2602.18952).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (transcribe, convert, export, evaluation, streaming, serve, training):
    module.register(app)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"mdm-asr {version('mdm_asr_hf')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs a command; what ends it is one line on stderr."""
    print_anything()
    try:
        app()
    except Failure as error:
        report("error", error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if find_spec("torch") is not None:
            raise
        report("error", f'this command needs {error.name}: `pip install "mdm_asr_hf[torch]"`')
        sys.exit(1)


__all__ = ["app", "main"]
