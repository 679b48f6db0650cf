# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The application: its commands, in the order in which `mdm-asr --help` shows them."""

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from . import convert, dataset, demo, evaluation, export, serve, streaming, training, transcribe
from .terminal import Failure, option_names, print_anything, report

app = typer.Typer(
    help="Speech recognition by masked diffusion (arXiv 2602.18952).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (transcribe, dataset, convert, export, evaluation, streaming, serve, demo, training):
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


def _option_names() -> dict[str, str]:
    """Of the command that runs: its options by the names of their parameters, where the two differ."""
    commands = typer.main.get_command(app).commands
    command = next((commands[argument] for argument in sys.argv[1:] if argument in commands), None)
    options = {param.name: max(param.opts, key=len) for param in (command.params if command else ())}
    return {
        name: option
        for name, option in options.items()
        if option.startswith("--") and option[2:].replace("-", "_") != name
    }


def main() -> None:
    """Runs a command; what ends it is one line on stderr."""
    print_anything()
    option_names.clear()
    option_names.update(_option_names())
    try:
        app()
    except Failure as error:
        report("error", error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if find_spec("torch") is not None:
            raise
        report("error", f'this command needs {error.name}: `pip install ".[torch]"` in a clone of this project')
        sys.exit(1)


__all__ = ["app", "main"]
