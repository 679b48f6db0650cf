# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Joins what was decoded of a recording's windows: where windows overlap, each word comes once, from the window that
heard it farther from its edges."""

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..generation_mdm_asr import utterance_confidence
from .transcript import UNSPACED, Segment, Transcript, group_words, round_seconds, round_share, word_runs
from .windows import Window

# How far apart two windows may place the same word.
SAME_WORD_S = 0.6
# Around the overlap, since the times of words are not exact.
SLACK_S = 0.3


@dataclass
class DecodedWindow:
    """
    The text of one window, token by token.

    Attributes:
        start_s, end_s (`float`): of the window, in seconds from the start of the recording.
        overlap_before_s, overlap_after_s (`float`): seconds shared with its neighbours.
        pieces (`list[str]`): what each token adds to the text, blanks included.
        confidences (`list[float]`): of each token.
        times_s (`list[tuple[float, float]]`, *optional*): of each token, in seconds from the start of the recording.
        confidence (`float`, *optional*): of the whole; None if nothing was decoded.
        nfe (`int`): decoder evaluations.
        no_speech (`float`, *optional*): the probability that nothing was said.
        language (`str`, *optional*): of the prompt, given or detected.
        is_full (`bool`): its text reached the most tokens it may have, and has no end.
    """

    start_s: float
    end_s: float
    overlap_before_s: float = 0.0
    overlap_after_s: float = 0.0
    pieces: list[str] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    times_s: list[tuple[float, float]] | None = None
    confidence: float | None = None
    nfe: int = 0
    no_speech: float | None = None
    language: str | None = None
    is_full: bool = False

    @classmethod
    def of(cls, window: Window, **values) -> "DecodedWindow":
        return cls(window.start_s, window.end_s, window.overlap_before_s, window.overlap_after_s, **values)


@dataclass
class _Unit:
    """The tokens [first, stop) of a word, or of a character where words are not parted by blanks."""

    text: str
    first: int
    stop: int
    start_s: float
    end_s: float

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2


def join_windows(windows: Sequence[DecodedWindow], duration_s: float, with_times: bool = False) -> Transcript:
    """
    The transcript of a recording, one segment per window.

    Args:
        windows: all of a recording, in order. Those that overlap need `times_s`.
        duration_s (`float`): of the recording.
        with_times (`bool`): give words the times of their tokens.
    """
    kept = keep_once(windows)
    segments = []
    for i, (window, tokens) in enumerate(zip(windows, kept, strict=True)):
        # Overlaps are shared out between the segments, so that these follow each other.
        start_s = max(window.start_s, (windows[i - 1].end_s + window.start_s) / 2) if i > 0 else window.start_s
        end_s = min(window.end_s, (window.end_s + windows[i + 1].start_s) / 2) if windows[i + 1 :] else window.end_s
        segments.append(_segment(window, tokens, start_s, end_s, with_times))
    spoken_s: dict[str, float] = {}
    for window in windows:
        if window.language is not None and window.pieces:
            spoken_s[window.language] = spoken_s.get(window.language, 0.0) + window.end_s - window.start_s
    language = max(spoken_s, key=spoken_s.get) if spoken_s else next((w.language for w in windows if w.language), None)
    warnings = [
        f"From {window.start_s:.1f} to {window.end_s:.1f} s the text has as many tokens as it may have and no end, so "
        "the end of the speech there may be missing. Set a smaller `max_window_s`, or a larger `max_new_tokens` (on a "
        "canvas, `canvas_length`)."
        for window in windows
        if window.is_full
    ]
    return Transcript(join_texts([s.text for s in segments]), round_seconds(duration_s), segments, language, warnings)


def keep_once(windows: Sequence[DecodedWindow]) -> list[range]:
    """The tokens of each window that are kept: all of them, but where windows overlap."""
    firsts, stops = [0] * len(windows), [len(window.pieces) for window in windows]
    for i, (left, right) in enumerate(itertools.pairwise(windows)):
        if min(left.overlap_after_s, right.overlap_before_s) > 0 and right.start_s < left.end_s:
            stop, firsts[i + 1] = _seam(left, right, firsts[i])
            stops[i] = max(stop, firsts[i])
    return [range(first, max(first, stop)) for first, stop in zip(firsts, stops, strict=True)]


def join_parts(whole: DecodedWindow, parts: Sequence[DecodedWindow]) -> DecodedWindow:
    """A window of what was decoded of its parts, in order, for which it was decoded itself before."""
    pieces, confidences, times_s = [], [], []
    for part, kept in zip(parts, keep_once(parts), strict=True):
        own = [part.pieces[k] for k in kept]
        if pieces and own and join_texts([pieces[-1].strip(), own[0].strip()]) != pieces[-1].strip() + own[0].strip():
            own[0] = " " + own[0].lstrip()
        pieces += own
        confidences += [part.confidences[k] for k in kept]
        times_s += [part.times_s[k] for k in kept] if part.times_s is not None else []
    return replace(
        whole,
        pieces=pieces,
        confidences=confidences,
        times_s=times_s if len(times_s) == len(pieces) else None,
        confidence=utterance_confidence(np.array([confidences]))[0],
        nfe=whole.nfe + sum(part.nfe for part in parts),
        is_full=any(part.is_full for part in parts),
    )


def join_texts(texts: Sequence[str]) -> str:
    """Texts one after the other, with blanks between them, but for scripts that have none."""
    joined = ""
    for text in filter(None, texts):
        blank = " " if joined and not (UNSPACED.match(joined[-1]) and UNSPACED.match(text[0])) else ""
        joined += blank + text
    return joined


def _segment(window: DecodedWindow, tokens: range, start_s: float, end_s: float, with_times: bool) -> Segment:
    pieces = [window.pieces[k] for k in tokens]
    times_s = [window.times_s[k] for k in tokens] if with_times and window.times_s is not None else None
    words = group_words(pieces, [window.confidences[k] for k in tokens], times_s)
    if times_s is not None and words:
        start_s, end_s = words[0].start_s, max(word.end_s for word in words)
    return Segment(
        start_s=round_seconds(start_s),
        end_s=round_seconds(end_s),
        text="".join(pieces).strip(),
        words=words,
        confidence=None if window.confidence is None else round_share(window.confidence),
        nfe=window.nfe,
        no_speech=None if window.no_speech is None else round_share(window.no_speech),
    )


def _seam(left: DecodedWindow, right: DecodedWindow, first: int) -> tuple[int, int]:
    """
    Where to go over from one window to the next: the first window's tokens before the one returned are kept, and the
    second's from the other one on. Tokens before `first` of the first window are another seam's.
    """
    overlap_s = (right.start_s, left.end_s)
    ours = [unit for unit in _units(left) if unit.first >= first]
    theirs = _units(right)
    pair = _same_word(ours, theirs, overlap_s)
    if pair is not None:
        return ours[pair[0]].stop, theirs[pair[1]].stop
    boundary_s = _boundary_s(ours, theirs, overlap_s)
    kept_left = sum(unit.middle_s < boundary_s for unit in ours)
    skipped_right = sum(unit.middle_s < boundary_s for unit in theirs)
    # The two may place a word on either side of the boundary: it would be lost, or come twice.
    gap_start_s = ours[kept_left - 1].end_s if kept_left else -1.0
    gap_end_s = theirs[skipped_right].start_s if skipped_right < len(theirs) else left.end_s
    if kept_left and skipped_right < len(theirs) and _overlap_share(ours[kept_left - 1], theirs[skipped_right]) > 0.5:
        kept_left -= 1
    elif kept_left < len(ours) and ours[kept_left].end_s <= gap_end_s and ours[kept_left].start_s >= gap_start_s:
        kept_left += 1
    elif skipped_right and theirs[skipped_right - 1].start_s >= gap_start_s:
        skipped_right -= 1
    stop = ours[kept_left - 1].stop if kept_left else first
    return stop, theirs[skipped_right - 1].stop if skipped_right else 0


def _same_word(ours: list[_Unit], theirs: list[_Unit], overlap_s: tuple[float, float]) -> tuple[int, int] | None:
    """
    Places of a word that both windows have in their overlap: in the run of such words that agrees best in number and
    times, the one nearest to the middle.
    """
    start_s, end_s = overlap_s[0] - SLACK_S, overlap_s[1] + SLACK_S
    off_s = {
        (i, k): abs(one.middle_s - other.middle_s)
        for i, one in enumerate(ours)
        for k, other in enumerate(theirs)
        if one.text and one.text == other.text and one.end_s > start_s and other.start_s < end_s
    }
    off_s = {pair: off for pair, off in off_s.items() if off <= SAME_WORD_S}
    best, best_score = [], 0.0
    for i, k in off_s:
        if (i - 1, k - 1) in off_s:
            continue
        run = list(itertools.takewhile(off_s.__contains__, zip(itertools.count(i), itertools.count(k), strict=False)))
        # A word that is said again and again has runs of other pairs, too, which are farther apart.
        score = sum(SAME_WORD_S - off_s[pair] for pair in run)
        if score > best_score:
            best, best_score = run, score
    middle_s = sum(overlap_s) / 2
    return min(best, key=lambda pair: abs(ours[pair[0]].middle_s - middle_s), default=None)


def _boundary_s(ours: list[_Unit], theirs: list[_Unit], overlap_s: tuple[float, float]) -> float:
    """The time nearest to the middle of the overlap that is within no word of either window; else the middle."""
    middle_s = sum(overlap_s) / 2
    units = [*ours, *theirs]
    candidates = [middle_s, *(unit.start_s for unit in units), *(unit.end_s for unit in units)]
    free = [
        time_s
        for time_s in candidates
        if overlap_s[0] <= time_s <= overlap_s[1] and not any(u.start_s < time_s < u.end_s for u in units)
    ]
    return min(free, key=lambda time_s: abs(time_s - middle_s), default=middle_s)


def _overlap_share(one: _Unit, other: _Unit) -> float:
    shared_s = min(one.end_s, other.end_s) - max(one.start_s, other.start_s)
    shorter_s = min(one.end_s - one.start_s, other.end_s - other.start_s)
    return shared_s / shorter_s if shorter_s > 0 else 0.0


def _units(window: DecodedWindow) -> list[_Unit]:
    """The words of a window, or its characters, as tokens and times have them."""
    if window.times_s is None:
        raise ValueError("Windows that overlap can only be joined with `times_s`. Decode them with timestamps.")
    units = []
    for run in word_runs(window.pieces):
        texts = [_plain(window.pieces[k]) for k in run]
        # Punctuation is not spoken: its time says nothing.
        times_s = [window.times_s[k] for k, text in zip(run, texts, strict=True) if text or not any(texts)]
        if "".join(window.pieces[k] for k in run).strip():
            starts_s, ends_s = zip(*times_s, strict=True)
            units.append(_Unit("".join(texts), run.start, run.stop, min(starts_s), max(ends_s)))
    return units


def _plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
