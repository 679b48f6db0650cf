# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What a transcription returns: words, segments and the transcript, with times and confidences."""

import dataclasses
import itertools
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def round_seconds(value: float) -> float:
    """To milliseconds, as a Python number: those of float32 have tails, such as 0.6600000262260437."""
    return round(float(value), 3)


def round_share(value: float) -> float:
    """A probability, or a mean of some, to four digits."""
    return round(float(value), 4)


@dataclass
class Word:
    """
    A word as it is written, punctuation included.

    Attributes:
        text (`str`): without spaces around it.
        start_s, end_s (`float`, *optional*): seconds from the start of the recording; None without timestamps.
        confidence (`float`, *optional*): the probability that it is right.
    """

    text: str
    start_s: float | None = None
    end_s: float | None = None
    confidence: float | None = None


@dataclass
class Segment:
    """
    A stretch of a recording that was decoded at once.

    Attributes:
        start_s, end_s (`float`): seconds from the start of the recording.
        text (`str`): may be empty.
        words (`list[Word]`): their texts joined by spaces are `text`, in languages written with spaces.
        confidence (`float`, *optional*): geometric mean over tokens and end of text; None if nothing was decoded.
        nfe (`int`): decoder evaluations.
        no_speech (`float`, *optional*): the probability that nothing was said.
    """

    start_s: float
    end_s: float
    text: str
    words: list[Word] = field(default_factory=list)
    confidence: float | None = None
    nfe: int = 0
    no_speech: float | None = None


@dataclass
class Transcript:
    """
    The transcript of one recording.

    Attributes:
        text (`str`): of all segments.
        duration_s (`float`): of the recording.
        segments (`list[Segment]`): in the order of time.
        language (`str`, *optional*): as given or detected.
        warnings (`list[str]`): what a reader should know, such as a text without an end.
    """

    text: str
    duration_s: float
    segments: list[Segment] = field(default_factory=list)
    language: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[Word]:
        return [word for segment in self.segments for word in segment.words]

    @property
    def nfe(self) -> int:
        """Decoder evaluations of all segments together."""
        return sum(segment.nfe for segment in self.segments)

    @property
    def confidence(self) -> float | None:
        """Mean of the segments' confidences, weighted by their numbers of words; None if there are no words."""
        weighted = [(s.confidence, len(s.words)) for s in self.segments if s.confidence is not None and s.words]
        if not weighted:
            return None
        return round_share(sum(confidence * n for confidence, n in weighted) / sum(n for _, n in weighted))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "confidence": self.confidence, "nfe": self.nfe}


def text_length(
    token_ids: Sequence[int], confidences: Sequence[float], commit_steps: Sequence[int], eos_token_id: int
) -> tuple[int, bool]:
    """
    How many tokens of a row that `generate` gave stand before the end of its text, and whether there is one. Padding,
    which may have the same id, was committed in no step, as was the end given to a row without any signal.
    """
    for place, (token, step) in enumerate(zip(token_ids, commit_steps, strict=True)):
        if token == eos_token_id and step > 0:
            return place, True
    return sum(confidence > 0 for confidence in confidences), False


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """
    What each token adds to the text, blanks included, so that together they make it. A token that ends amid the bytes
    of a character adds nothing, the one that completes it all of it.
    """
    pieces, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(token_ids):
            text = text.rstrip("\ufffd")
        pieces.append(text[len(before) :])
        before = text if len(text) > len(before) else before
    return pieces


# A character of scripts written without blanks: Thai, Lao, Myanmar, Khmer, kana, ideographs and their punctuation.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff01-\uff9f\U00020000-\U0003134f]"
)
# Unicode categories of marks, lengthening signs, and punctuation that does not open.
_STAYS_BEHIND = ("Mn", "Mc", "Me", "Lm", "Pe", "Pf", "Po", "Pd")


def word_runs(pieces: Sequence[str], parts_scripts: bool = True) -> list[range]:
    """
    The tokens of each word, by what each adds to the text (see `token_texts`), as blanks part them. Text of scripts
    that are written without is parted at its tokens, about one a character, as Whisper does (arXiv 2212.04356), if
    that is asked for. A token that ends amid the bytes of a character has no text: it belongs to the one that
    completes it.
    """
    starts, first, before = [], 0, " "
    for i, piece in enumerate(pieces):
        if not piece:
            continue
        after = piece[0]
        is_parted = before.isspace() or after.isspace()
        if parts_scripts and (UNSPACED.match(before) or UNSPACED.match(after)):
            # Marks and what closes stay with the character before, what opens with the one behind.
            stays = unicodedata.category(after) in _STAYS_BEHIND or unicodedata.category(before) in ("Ps", "Pi")
            is_parted = is_parted or not stays
        if is_parted:
            starts.append(first)
        first, before = i + 1, piece[-1]
    return [range(*pair) for pair in itertools.pairwise([*starts, first])]


def group_words(
    pieces: Sequence[str],
    confidences: Sequence[float],
    times_s: Sequence[Sequence[float]] | None = None,
) -> list[Word]:
    """
    Words of tokens (see `word_runs`); scripts without blanks are parted if there are times.

    Args:
        pieces (`list[str]`): what each token adds to the text, see `token_texts`.
        confidences (`list[float]`): of each token; a word's is the product over its tokens. Punctuation does not
            count, unless there is nothing else.
        times_s (`list` of `(start, end)`, *optional*): of each token, in seconds.

    Returns:
        Words with times in whole milliseconds, and confidences of four digits.
    """
    words = []
    for run in word_runs(pieces, parts_scripts=times_s is not None):
        spoken = [k for k in run if not pieces[k] or any(map(str.isalnum, pieces[k]))]
        its_tokens = spoken if any(pieces[k] for k in spoken) else run
        confidence = round_share(math.prod(float(confidences[k]) for k in its_tokens))
        for text in "".join(pieces[k] for k in run).split():
            word = Word(text, confidence=confidence)
            if times_s is not None:
                word.start_s = round_seconds(min(times_s[k][0] for k in its_tokens))
                word.end_s = round_seconds(max(times_s[k][1] for k in its_tokens))
            words.append(word)
    return words
