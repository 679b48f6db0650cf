# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A transcript as SRT or WebVTT subtitles, JSON or plain text."""

import html
import itertools
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from ..encoding_mdm_asr import json_text
from .transcript import Segment, Transcript

# What broadcasters ask of subtitles: two lines of 42 columns, a cue of at most 7 s, none that only flashes up.
MAX_LINE_COLUMNS = 42
MAX_LINES = 2
MAX_CUE_S = 7.0
MIN_CUE_S = 1.0
# A pause this long ends a sentence where a text has no punctuation, and across a longer one a cue would only stand.
SENTENCE_PAUSE_S = 0.5
LONGEST_PAUSE_S = 1.5
SENTENCE_ENDS = ".?!…。？！"
CLAUSE_ENDS = ",;:،、，；：—–"
CLOSING = "\"'”’»)]}」』"


@dataclass
class Cue:
    """
    Text that stands on the screen at once.

    Attributes:
        start_s, end_s (`float`): seconds from the start of the recording, in whole milliseconds. A cue starts when the
            one before it has ended, or later.
        lines (`list[str]`): none empty.
    """

    start_s: float
    end_s: float
    lines: list[str]


@dataclass
class _Unit:
    """What no line break divides: a word, or a part of one that is longer than a line."""

    text: str
    start_s: float
    end_s: float
    columns: int
    num_blanks: int  # between it and what stands before it in a line: 1, or 0 within a word


def make_cues(transcript: Transcript) -> list[Cue]:
    """
    The transcript's words in cues, broken where sentences, clauses or pauses end as far as lengths allow.

    Words without times share their segment's in proportion to their letters. Of East Asian wide characters, each
    takes two columns. A word that is said to last longer than a cue may is cut short.

    Args:
        transcript ([`Transcript`]): its segments are read, `text` is not.
    """
    cues: list[Cue] = []
    previous_end_ms = 0
    for segment in transcript.segments:
        for part in _partition(_units(segment)):
            # In whole milliseconds, as both formats have them, since rounding must not make two cues overlap.
            start_ms = max(round(part[0].start_s * 1000), previous_end_ms)
            end_ms = max(round(max(unit.end_s for unit in part) * 1000), start_ms + 1)
            previous_end_ms = end_ms = min(end_ms, start_ms + round(MAX_CUE_S * 1000))
            cues.append(Cue(start_ms / 1000, end_ms / 1000, _wrap(part)))
    # A cue that only flashes up stays on as long as nothing follows.
    for i, cue in enumerate(cues):
        latest_s = cues[i + 1].start_s if i + 1 < len(cues) else transcript.duration_s
        wanted_s = min(cue.start_s + MIN_CUE_S, latest_s)
        cue.end_s = max(cue.end_s, math.floor(wanted_s * 1000 + 1e-3) / 1000)
    return cues


def to_srt(transcript: Transcript) -> str:
    """SubRip: UTF-8, times as 00:00:00,000. Nothing is escaped, since the format has no way to."""
    return "\n".join(
        f"{i}\n{_times(cue).replace('.', ',')}\n" + "\n".join(cue.lines) + "\n"
        for i, cue in enumerate(make_cues(transcript), start=1)
    )


def to_vtt(transcript: Transcript) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1), `&`, `<` and `>` escaped."""
    blocks = ["WEBVTT\n"]
    for cue in make_cues(transcript):
        text = html.escape("\n".join(cue.lines), quote=False)
        blocks.append(f"{_times(cue)}\n{text}\n")
    return "\n".join(blocks)


def _times(cue: Cue) -> str:
    """From when to when, as in WebVTT."""
    texts = []
    for seconds in (cue.start_s, cue.end_s):
        minutes, ms = divmod(round(seconds * 1000), 60_000)
        texts.append(f"{minutes // 60:02d}:{minutes % 60:02d}:{ms // 1000:02d}.{ms % 1000:03d}")
    return " --> ".join(texts)


def to_json(transcript: Transcript, file: str | None = None) -> str:
    """`Transcript.to_dict()`, with the recording's name under "file" if there is one."""
    values = transcript.to_dict() if file is None else {"file": file, **transcript.to_dict()}
    return json_text(values, indent=2) + "\n"


def to_txt(transcript: Transcript) -> str:
    """The text, a segment a line; segments without words have none."""
    texts = (_clean(segment.text) for segment in transcript.segments)
    return "".join(f"{text}\n" for text in texts if text)


WRITERS: dict[str, Callable[[Transcript], str]] = {"txt": to_txt, "json": to_json, "srt": to_srt, "vtt": to_vtt}


def _clean(text: str) -> str:
    """One line without control characters: an empty line would end a cue, and WebVTT forbids NUL."""
    text = " ".join(text.split())
    return "".join(c for c in text if unicodedata.category(c) != "Cc")


def _columns(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def _units(segment: Segment) -> list[_Unit]:
    """The words of a segment, each with times."""
    words = [(_clean(word.text), word.start_s, word.end_s) for word in segment.words]
    if not words or any(start is None or end is None for _, start, end in words):
        words = _share_time(_clean(segment.text).split(), segment.start_s, segment.end_s)
    return [
        _Unit(part, part_start_s, part_end_s, _columns(part), int(i == 0))
        for text, start_s, end_s in words
        for i, (part, part_start_s, part_end_s) in enumerate(_share_time(_split_word(text), start_s, end_s))
        if part
    ]


def _share_time(texts: list[str], start_s: float, end_s: float) -> list[tuple[str, float, float]]:
    """Divides a stretch of time among texts in proportion to their letters."""
    ends = list(itertools.accumulate(map(len, texts), initial=0))
    times_s = [start_s + (end_s - start_s) * end / max(ends[-1], 1) for end in ends]
    return list(zip(texts, times_s[:-1], times_s[1:], strict=True))


def _split_word(text: str) -> list[str]:
    """Parts that fit a line: a language written without blanks has words as long as a sentence."""
    parts = [""]
    for character in text:
        if parts[-1] and _columns(parts[-1] + character) > MAX_LINE_COLUMNS:
            parts.append("")
        parts[-1] += character
    return parts


def _wrap(units: list[_Unit]) -> list[str]:
    """As few lines as it takes, of about equal lengths."""
    lines = _fill(units, MAX_LINE_COLUMNS)
    # The narrowest lines that are no more: at most 40 or so tries.
    tries = (_fill(units, columns) for columns in range(max(unit.columns for unit in units), MAX_LINE_COLUMNS))
    return next((narrower for narrower in tries if len(narrower) == len(lines)), lines)


def _fill(units: list[_Unit], max_columns: int) -> list[str]:
    lines: list[str] = []
    columns = 0
    for unit in units:
        columns += unit.num_blanks + unit.columns
        if lines and columns <= max_columns:
            lines[-1] += " " * unit.num_blanks + unit.text
        else:
            lines.append(unit.text)
            columns = unit.columns
    return lines


def _partition(units: list[_Unit]) -> list[list[_Unit]]:
    """
    Divides units into cues at the lowest cost by dynamic programming: 1 for each cue, plus what `_break_cost` says of
    its end. Each cue fits the lines and, unless it is a single unit, the time.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n units: cost, and where their last cue starts
    for end in range(1, len(units) + 1):
        last = units[end - 1]
        end_cost = 1 + _break_cost(units, end)
        lowest = (best[end - 1][0] + end_cost, end - 1)
        # Lines filled from the last unit upwards are as few as lines filled downwards.
        num_lines, columns, latest_end_s = 1, last.columns, last.end_s
        for start in range(end - 2, -1, -1):
            unit, following = units[start], units[start + 1]
            latest_end_s = max(latest_end_s, unit.end_s)
            columns += following.num_blanks + unit.columns
            if columns > MAX_LINE_COLUMNS:
                num_lines, columns = num_lines + 1, unit.columns
            is_long = num_lines > MAX_LINES or latest_end_s - unit.start_s > MAX_CUE_S
            if is_long or following.start_s - unit.end_s > LONGEST_PAUSE_S:
                break
            # Of equal ones the last, whose first cues are the fullest.
            lowest = min(lowest, (best[start][0] + end_cost, start))
        best.append(lowest)
    parts, end = [], len(units)
    while end > 0:
        start = best[end][1]
        parts.append(units[start:end])
        end = start
    return parts[::-1]


def _break_cost(units: list[_Unit], end: int) -> float:
    """What it costs the reader that a cue ends before unit `end`: 0 at the end of a sentence, 2 within a word."""
    if end == len(units):
        return 0.0
    if units[end].num_blanks == 0:
        return 2.0
    last = units[end - 1].text.rstrip(CLOSING)[-1:]
    pause_s = units[end].start_s - units[end - 1].end_s
    if (last and last in SENTENCE_ENDS) or pause_s >= SENTENCE_PAUSE_S:
        return 0.0
    if last and last in CLAUSE_ENDS:
        return 0.3
    # The longer a pause, the better a break.
    return 1.0 - 0.7 * max(pause_s, 0.0) / SENTENCE_PAUSE_S
