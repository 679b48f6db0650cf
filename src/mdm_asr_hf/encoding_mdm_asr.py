# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Text that meets an encoding on its way in or out."""

import json
import re
from typing import Any


def check_unicode(text: str, name: str) -> str:
    """Returns the text, or raises ValueError: halves of characters, as bytes of another encoding come in."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"`{name}` holds {text!r:.80}, which is not Unicode. Pass it in UTF-8.")
    return text


def text_prefix_of(tokenizer: Any) -> str:
    """
    What donors with this tokenizer put before every text: a blank, where the tokenizer keeps it, as Whisper's does,
    and nothing where it has one of its own before every word, as those of sentencepiece.
    """
    # One that has to be told a language is of sentencepiece.
    if getattr(tokenizer, "takes_language", False):
        return ""
    ids = tokenizer.encode(" a", add_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return " " if text[:1] == " " else ""


def json_text(values: Any, encoding: str | None = "utf-8", **options: Any) -> str:
    """JSON for a file or a stream of this encoding, escaped where that does not have its characters: read again, it is
    the same, names that are not UTF-8 among them."""
    text = json.dumps(values, ensure_ascii=False, **options)
    try:
        text.encode(encoding or "ascii")
        return text
    except UnicodeEncodeError:
        return json.dumps(values, **options)
