# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What all commands have in common: errors of one line, the library's warnings, what is being loaded."""

import codecs
import functools
import logging
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from mdm_asr_hf.modeling_mdm_asr import MDMASRForConditionalGeneration
    from mdm_asr_hf.processing_mdm_asr import MDMASRProcessor

# What the arguments of Python are called by the command that runs, where that is another name: `max_window_s` is
# `--window-s`.
_option_names: dict[str, str] = {}


def command(
    extra: str = "torch", failure: str = "", quiet: bool = True, runs_exports: bool = False
) -> Callable[[Callable], Callable]:
    """
    Makes a command of a function: what is wrong with its input, or not installed, ends it with one line on stderr and
    exit code 1.

    Args:
        extra (`str`): of the package, which it needs.
        failure (`str`): what stands before an error, with the function's arguments in braces.
        quiet (`bool`): libraries say nothing, and warnings are told at its end.
        runs_exports (`bool`): an exported `model` is all that it loads.
    """

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            _option_names.clear()
            _option_names.update(_declared_names(function))
            if runs_exports and arguments["model"] is not None:
                _leave_out_pytorch(Path(arguments["model"]))
            with quiet_libraries() if quiet else nullcontext(_Collector()) as collector:
                try:
                    function(**arguments)
                except ModuleNotFoundError as error:
                    needed = f'this command needs {error.name}: `pip install ".[{extra}]"` in a clone of this project'
                    report("error", needed)
                    raise typer.Exit(1) from None
                except (ValueError, OSError, ImportError) as error:
                    report("error", f"{failure.format(**arguments)}{str(error) or type(error).__name__}")
                    raise typer.Exit(1) from None
                finally:
                    collector.report()

        return run

    return wrap


def _leave_out_pytorch(model: Path) -> None:
    """Lets this process do without PyTorch and transformers where the model does: their imports take six times as long
    as a clip. Of languages they know the names."""
    # Those of an export of Whisper, which cannot be asked of the package without importing them.
    filters, settings = model / "mel_filters.npy", model / "generation_config.json"
    if "torch" in sys.modules or not (filters.is_file() and settings.is_file()):
        return
    if '"language"' not in settings.read_text("utf-8", "replace"):
        sys.modules |= dict.fromkeys(("torch", "transformers"))


def _declared_names(function: Callable) -> dict[str, str]:
    return {
        name: option
        for name, hint in typing.get_type_hints(function, include_extras=True).items()
        for info in getattr(hint, "__metadata__", ())
        # Of a hint, the default is the first name.
        for option in (info.default, *(info.param_decls or ()))
        if str(option).startswith("--") and option[2:].replace("-", "_") != name
    }


def print_anything() -> None:
    """Makes stdout and stderr take any text, whatever their encoding: one character must not end a command amid its
    files. Names of files are printed as the bytes that they are."""
    codecs.register_error("mdm_asr_escape", _escape)
    for stream, errors in ((sys.stdout, "mdm_asr_escape"), (sys.stderr, "backslashreplace")):
        # What stands in for them need not be able to.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def report(kind: str, message: Any) -> None:
    """Prints a line on stderr."""
    # Without the colours that some libraries give their messages.
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(message)).split())
    for name, option in _option_names.items():
        text = re.sub(rf"(?<=[`']){name}\b", option, text)
    print(f"{kind}: {text}", file=sys.stderr, flush=True)


class _Collector(logging.Handler):
    """Keeps the library's warnings, which would stand amid a bar or a command's output."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def report(self, without: tuple[str, ...] = ()) -> None:
        """Prints them, but for those that hold any of these words, and forgets them."""
        for message in self.messages:
            if not any(words in message for words in without):
                report("warning", message)
        self.messages.clear()


@contextmanager
def quiet_libraries() -> Iterator[_Collector]:
    """Keeps transformers' bars, logs and deprecations off the terminal; collects the warnings of this package."""
    if find_spec("transformers") is not None:
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging

        hub_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    collector = _Collector()
    # Code that came with a checkpoint (trust_remote_code) logs under the second name.
    loggers = [logging.getLogger(name) for name in ("mdm_asr_hf", "transformers_modules")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield collector
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def load_named_model(
    model: str | None, *args: Any, **kwargs: Any
) -> tuple["MDMASRForConditionalGeneration", "MDMASRProcessor"]:
    """
    [`load_model`] for commands, by default of the package's checkpoint: shows what is being loaded, and names it where
    that fails.

    Raises:
        ValueError: whatever went wrong.
    """
    from mdm_asr_hf import loading

    model = model or str(loading.default_checkpoint())
    try:
        with Console(stderr=True).status(f"loading {escape(model)}"):
            return loading.load_model(model, *args, **kwargs)
    except Exception as error:
        # A damaged folder: transformers, tokenizers and safetensors each raise classes of their own.
        name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"cannot load the model {model}: {name}{error}") from error
