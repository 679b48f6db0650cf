# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""From rows to epochs: data sets mixed by weight, and utterances joined into longer windows, anew in every epoch."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .sources import shared_integer

# The fractional part of the golden ratio: its multiples modulo 1 fill 0..1 more evenly than random numbers.
GOLDEN = (math.sqrt(5) - 1) / 2
# Utterances change places with others of about their duration: at most 5 % apart where there are many, but always
# with a few, and never more than 50 % apart.
DENSE_RATIO, SPARSE_RATIO, FEW = 1.05, 1.5, 8
# How many of the next utterances are tried for the rest of a window.
LOOK_AHEAD = 16
# Unfinished windows of a stream, one per speaker or language, that are held at a time.
MAX_OPEN_WINDOWS = 256


class Mixture(Dataset):
    """
    Several map-style data sets as one, by weight.

    An epoch always has the same number of rows and, row by row, the same (upper bounds of) durations, so that a batch
    sampler makes as many batches in every epoch, which the Trainer and its resuming rely on. Without weights every row
    comes once per epoch. With weights a data set gives round(rows of all x its share) rows: rows that are to come more
    than once do, and where only some come, rows of about the same duration take turns from epoch to epoch.

    Args:
        parts: data sets with `durations_s`.
        weights (*optional*): one per part.
        seed (`int`): of the turns, and of the `augment_seed` that every row carries.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0):
        if not parts:
            raise ValueError("`parts` is empty. Pass at least one data set.")
        if weights is not None and (len(weights) != len(parts) or not all(0 < w < math.inf for w in weights)):
            raise ValueError(f"`weights` must be positive, one for each of {len(parts)} data sets, got {weights!r}.")
        self.parts, self.seed = list(parts), seed
        self._epoch = shared_integer()
        num_rows = [len(part) for part in self.parts]
        counts = num_rows
        if weights is not None:
            counts = [max(1, round(sum(num_rows) * weight / sum(weights))) for weight in weights]
        self._orders = [np.argsort(part.durations_s, kind="stable") for part in self.parts]
        slots = [_turns(order, count) for order, count in zip(self._orders, counts, strict=True)]
        # Slot i is filled from ranks low..high - 1 of the part's rows, sorted by duration.
        self._part = np.repeat(np.arange(len(slots)), [len(low) for low, _ in slots])
        self._low = np.concatenate([low for low, _ in slots])
        self._high = np.concatenate([high for _, high in slots])
        sorted_s = [np.asarray(p.durations_s)[o] for p, o in zip(self.parts, self._orders, strict=True)]
        self.durations_s = np.concatenate([d[high - 1] for d, (_, high) in zip(sorted_s, slots, strict=True)])

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Reaches the copies in persistent DataLoader workers too."""
        self._epoch.fill_(int(epoch))
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were left out when the sources were read, per reason."""
        return dict(sum((Counter(getattr(part, "skipped", {})) for part in self.parts), Counter()))

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        part, low, num = int(self._part[index]), int(self._low[index]), int(self._high[index] - self._low[index])
        rank = low
        if num > 1:
            turn = np.random.default_rng([self.seed, 1, self.epoch // num, index]).permutation(num)
            rank += int(turn[self.epoch % num])
        row = self.parts[part][int(self._orders[part][rank])]
        return {**row, "augment_seed": augment_seed(self.seed, self.epoch, index)}


def _turns(order: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks low..high - 1 that take turns in each of `count` slots, so that all rows come equally often."""
    whole, rest = divmod(count, len(order))
    # All rows in their own order, then some in that of their durations.
    ranks = np.tile(np.argsort(order), whole)
    edges = np.arange(rest + 1) * len(order) // max(rest, 1)
    return np.concatenate([ranks, edges[:-1]]), np.concatenate([ranks + 1, edges[1:]])


def augment_seed(*key: int) -> int:
    """A seed for what is drawn for one row in one epoch, whichever worker draws it."""
    return int(np.random.SeedSequence([int(one) for one in key]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class JoinSettings:
    """
    How utterances are joined into windows.

    Args:
        min_s, max_s (`float`): durations in s that windows aim at, all alike often. A longer utterance stays alone.
        min_pause_s, max_pause_s (`float`): silence between two utterances, in s.
        same_speaker (`bool`): join only utterances with the same, known speaker. Never those of two languages.
        separator (`str`): between their texts.
    """

    min_s: float = 1.0
    max_s: float = 25.0
    min_pause_s: float = 0.1
    max_pause_s: float = 0.5
    same_speaker: bool = False
    separator: str = " "

    def __post_init__(self):
        if not 0 < self.min_s <= self.max_s < math.inf:
            raise ValueError(f"`min_s` and `max_s` must be 0 < min_s <= max_s, got {self.min_s!r}, {self.max_s!r}.")
        if not 0 <= self.min_pause_s <= self.max_pause_s < math.inf:
            raise ValueError(
                f"`min_pause_s` and `max_pause_s` must be 0 <= min_pause_s <= max_pause_s, got {self.min_pause_s!r}, "
                f"{self.max_pause_s!r}."
            )

    def key(self, row: dict[str, Any], unique: Any) -> tuple:
        """Only rows of equal keys are joined; `unique` is the row's own, for rows that join none."""
        if not self.same_speaker:
            return (row.get("language") or "",)
        speaker = row.get("speaker")
        return (row.get("language") or "", speaker or "", "" if speaker else unique)

    def window(self, rows: Sequence[dict[str, Any]], pauses_s: Sequence[float], **extra: Any) -> dict[str, Any]:
        """The row that a window is: the collator joins the audio of its `parts`."""
        return {
            "parts": list(rows),
            "pauses_s": list(pauses_s),
            # A text that is none, the collator finds.
            "text": self.separator.join(row["text"] for row in rows if isinstance(row["text"], str)),
            "separator": self.separator,
            "language": rows[0].get("language"),
            "duration_s": float(sum(row["duration_s"] for row in rows) + sum(pauses_s)),
            **extra,
        }


class JoinedUtterances(Dataset):
    """
    Utterances joined into windows. Every utterance is in exactly one window of an epoch, whole; an epoch has other
    windows than the one before, but as many, of the same (upper bounds of) durations: a plan, made once, says which
    durations stand together, and each epoch fills it with other utterances of about these durations.

    Args:
        utterances: a data set with `durations_s` and `rows`, such as [`Utterances`]; a [`Mixture`] mixes windows.
        settings ([`JoinSettings`], *optional*)
        seed (`int`)

    Rows: {"parts": rows of the utterances, "pauses_s", "text", "language", "duration_s", "augment_seed"}.
    """

    def __init__(self, utterances: Any, settings: JoinSettings | None = None, seed: int = 0):
        if not hasattr(utterances, "rows"):
            raise ValueError(
                f"`utterances` of type {type(utterances).__name__} cannot be joined. Join each source's `Utterances` "
                "and mix the results, or let `load_sources(..., join=...)` do it."
            )
        self.utterances, self.settings, self.seed = utterances, settings or JoinSettings(), seed
        self._epoch = shared_integer()
        self._filled = (None, None)
        durations_s = np.asarray(utterances.durations_s, dtype=np.float64)
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(utterances.rows):
            groups.setdefault(self.settings.key(row, i), []).append(i)
        rng = np.random.default_rng([seed, 0])
        # Slots are the utterances, sorted by group and duration; those of one bucket change places.
        self._sorted = np.concatenate([sorted(group, key=durations_s.__getitem__) for group in groups.values()])
        self._bucket, self._windows, ends = np.zeros(len(self._sorted), dtype=np.int64), [], [0]
        for group in groups.values():
            ends.append(ends[-1] + len(group))
            sorted_s = durations_s[self._sorted[ends[-2] : ends[-1]]]
            buckets, bounds_s = _buckets(sorted_s)
            self._bucket[ends[-2] : ends[-1]] = buckets + (self._bucket[ends[-2] - 1] + 1 if ends[-2] else 0)
            for slots, pauses_s, bound_s in self._plan(bounds_s, rng):
                self._windows.append((np.array(slots) + ends[-2], pauses_s, bound_s))
        self.durations_s = np.array([bound_s for *_, bound_s in self._windows])

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Reaches the copies in persistent DataLoader workers too."""
        self._epoch.fill_(int(epoch))

    @property
    def skipped(self) -> dict[str, int]:
        return getattr(self.utterances, "skipped", {})

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        slots, pauses_s, _ = self._windows[index]
        epoch = self.epoch
        if self._filled[0] != epoch:
            draws = np.random.default_rng([self.seed, 1, epoch]).random(len(self._sorted))
            self._filled = (epoch, self._sorted[np.lexsort((draws, self._bucket))])
        rows = [self.utterances[int(i)] for i in self._filled[1][slots]]
        seed = augment_seed(self.seed, epoch, range(len(self))[index])
        return self.settings.window(rows, pauses_s, augment_seed=seed)

    def _plan(self, bounds_s: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[list[int], list[float], float]]:
        """Packs slots with these durations into windows: (slots, pauses in s, duration in s)."""
        waiting, targets = deque(rng.permutation(len(bounds_s)).tolist()), _targets(self.settings, rng)
        while waiting:
            slots, pauses_s = [waiting.popleft()], []
            duration_s, target_s = float(bounds_s[slots[0]]), next(targets)
            while waiting:
                pause_s = float(rng.uniform(self.settings.min_pause_s, self.settings.max_pause_s))
                left_s = target_s - duration_s - pause_s
                fitting = next((i for i in range(min(LOOK_AHEAD, len(waiting))) if bounds_s[waiting[i]] <= left_s), -1)
                if fitting < 0:
                    break
                slots.append(waiting[fitting])
                del waiting[fitting]
                pauses_s.append(pause_s)
                duration_s += pause_s + float(bounds_s[slots[-1]])
            yield slots, pauses_s, duration_s


def _targets(settings: JoinSettings, rng: np.random.Generator) -> Iterator[float]:
    """Durations in s, uniform in min_s..max_s, also over any few that follow each other."""
    position = rng.random()
    while True:
        yield settings.min_s + (settings.max_s - settings.min_s) * position
        position = (position + GOLDEN) % 1


def _buckets(sorted_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of about equal durations: for each, its bucket's number and its bucket's longest duration."""
    buckets = np.zeros(len(sorted_s), dtype=np.int64)
    first = 0
    for i, duration_s in enumerate(sorted_s):
        shortest_s, is_full = sorted_s[first], i - first >= FEW
        is_far = duration_s > DENSE_RATIO * shortest_s and is_full
        if is_far or duration_s > SPARSE_RATIO * shortest_s:
            first = i
        buckets[i] = buckets[i - 1] + (first == i) if i else 0
    last = np.searchsorted(buckets, buckets, side="right") - 1
    return buckets, sorted_s[last]


class JoinedStream(IterableDataset):
    """
    The same for a stream of rows with `duration_s`: an utterance that does not fit any more closes its window.

    Args:
        rows: an iterable of rows; its `set_epoch`, if it has one, is called.
        settings ([`JoinSettings`], *optional*)
        seed (`int`)
    """

    def __init__(self, rows: Iterable[dict[str, Any]], settings: JoinSettings | None = None, seed: int = 0):
        self.rows, self.settings, self.seed = rows, settings or JoinSettings(), seed
        self._epoch = shared_integer()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def skipped(self) -> dict[str, int]:
        return getattr(self.rows, "skipped", {})

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = stream_generator(self.seed, self.epoch)
        targets = _targets(self.settings, rng)
        open_windows: dict[tuple, tuple[list, list, float]] = {}

        def close(key: tuple) -> dict[str, Any]:
            rows, pauses_s, _ = open_windows.pop(key)
            return self.settings.window(rows, pauses_s, augment_seed=int(rng.integers(2**63)))

        for i, row in enumerate(self.rows):
            key = self.settings.key(row, i)
            if key in open_windows:
                rows, pauses_s, left_s = open_windows[key]
                pause_s = float(rng.uniform(self.settings.min_pause_s, self.settings.max_pause_s))
                if pause_s + row["duration_s"] <= left_s:
                    rows.append(row)
                    pauses_s.append(pause_s)
                    open_windows[key] = (rows, pauses_s, left_s - pause_s - row["duration_s"])
                    continue
                yield close(key)
            open_windows[key] = ([row], [], next(targets) - row["duration_s"])
            if len(open_windows) > MAX_OPEN_WINDOWS:
                yield close(next(iter(open_windows)))
        while open_windows:
            yield close(next(iter(open_windows)))


def stream_generator(seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of one DataLoader worker in one epoch of a stream."""
    worker = get_worker_info()
    return np.random.default_rng([seed, epoch, worker.id if worker else 0])


__all__ = ["JoinSettings", "JoinedStream", "JoinedUtterances", "Mixture"]
