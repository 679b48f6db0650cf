# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Text that meets an encoding: names that are not UTF-8, and transcripts that a terminal's encoding does not have."""

import codecs
import json
import re
import sys
from typing import Any

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


def check_unicode(text: str, name: str) -> str:
    """Returns the text, or raises ValueError: halves of characters, as bytes of another encoding come in."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"`{name}` holds {text!r:.80}, which is not Unicode. Pass it in UTF-8.")
    return text


def json_text(values: Any, encoding: str | None = "utf-8", **options: Any) -> str:
    """JSON for a file or a stream of this encoding, escaped where that does not have its characters: read again, it is
    the same, names that are not UTF-8 among them."""
    text = json.dumps(values, ensure_ascii=False, **options)
    try:
        text.encode(encoding or "ascii")
        return text
    except UnicodeEncodeError:
        return json.dumps(values, **options)


__all__ = ["ERRORS", "check_unicode", "json_text", "print_anything"]
