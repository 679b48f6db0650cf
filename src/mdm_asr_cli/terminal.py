# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What the commands say on a terminal: errors of one line, the library's warnings, what is being loaded."""

import codecs
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from mdm_asr_hf.modeling_mdm_asr import MDMASRForConditionalGeneration
    from mdm_asr_hf.processing_mdm_asr import MDMASRProcessor


ERRORS = "mdm_asr_escape"


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes that a file name has in the place of characters; of a character that the encoding lacks, its code."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(ERRORS, _escape)


def print_anything() -> None:
    """Makes stdout and stderr take any text, whatever their encoding: one character must not end a command amid its
    files."""
    for stream, errors in ((sys.stdout, ERRORS), (sys.stderr, "backslashreplace")):
        # What stands in for them need not be able to.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


class Failure(Exception):
    """What ends a command with one line on stderr and exit code 1."""


def one_line(error: Any) -> str:
    """An error's message on one line, without terminal codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__


# What the arguments of Python are called here, where that is another name: `max_window_s` is `--window-s`.
option_names: dict[str, str] = {}


def report(kind: str, message: Any) -> None:
    """Prints a line on stderr."""
    text = one_line(message)
    for name, option in option_names.items():
        text = re.sub(rf"(?<=[`']){name}\b", option, text)
    print(f"{kind}: {text}", file=sys.stderr, flush=True)


class _Collector(logging.Handler):
    """Keeps the library's warnings, so that the command can say which file they are about."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def flush_to_stderr(self, about: str = "") -> None:
        for message in self.messages:
            report("warning", f"{about}: {message}" if about else message)
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
    model: str,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    num_threads: int | None = None,
) -> tuple["MDMASRForConditionalGeneration", "MDMASRProcessor"]:
    """
    [`load_model`] for commands: shows what is being loaded, and names it where that fails.

    Raises:
        ValueError: whatever went wrong.
    """
    from mdm_asr_hf.loading import load_model

    try:
        with Console(stderr=True).status(f"loading {escape(model)}"):
            return load_model(model, device, trust_remote_code, dtype, num_threads)
    except Exception as error:
        # A damaged folder: transformers, tokenizers and safetensors each raise classes of their own.
        name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"cannot load the model {model}: {name}{error}") from error


__all__ = ["ERRORS", "Failure", "load_named_model", "one_line", "print_anything", "quiet_libraries", "report"]
