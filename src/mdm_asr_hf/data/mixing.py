# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""From sources to epochs: mixed by weight, or as a stream, its utterances joined into longer windows."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .sources import (
    MAX_BAD_SHARE,
    GrowingFolder,
    HubStream,
    Source,
    check_on_bad_row,
    find_manifests,
    load_utterances,
)

# The fractional part of the golden ratio: its multiples modulo 1 fill 0..1 more evenly than random numbers.
GOLDEN = (math.sqrt(5) - 1) / 2
# Silence between two utterances of a window, in s.
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 0.5


def load_sources(
    specs: Any,
    *,
    join: "JoinSettings | dict[str, Any] | None" = None,
    seed: int = 0,
    on_bad_row: str = "raise",
    max_duration_s: float | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    repeat: bool = False,
) -> "Mixture | SpeechStream":
    """
    Sources of speech with transcripts as one data set.

    Args:
        specs: one source or a list of them; each a [`Source`], a dict of its settings, or a path or name.
        join ([`JoinSettings`] or `dict`, *optional*): join utterances into windows, which makes a stream.
        seed (`int`): of joins, turns and shuffling.
        on_bad_row (`str`): "raise", or "skip" rows that cannot be trained on and count them (`.skipped`). In streams
            the collator finds them.
        max_duration_s (`float`, *optional*): rows that last longer are bad.
        max_bad_share (`float`): more bad rows than this share of a source's are an error, also with "skip".
        repeat (`bool`): streams begin anew where they end, each time another, so that a run that goes on from a
            checkpoint finds its place in them. For training, which then ends by `max_steps`.

    Returns:
        [`Mixture`], of random access; where utterances are joined, or a source is streamed or growing,
        [`SpeechStream`]. Both yield rows {"audio", "text", "duration_s", "language", "row"}, or windows of them, for
        [`DataCollatorForMDMASR`].

    Raises:
        ValueError: a missing file or column, bad rows (see above), weights for some sources only.
    """
    check_on_bad_row(on_bad_row, max_bad_share)
    sources = [Source.of(spec) for spec in (specs if isinstance(specs, (list, tuple)) else [specs])]
    if not sources:
        raise ValueError("`specs` is empty. Pass at least one source.")
    weights = [source.weight for source in sources]
    if None in weights and any(weights):
        raise ValueError(f"`weight` is set for some sources only, {weights}. Set it for all or for none.")
    join = JoinSettings(**join) if isinstance(join, dict) else join
    limits = {"on_bad_row": on_bad_row, "max_duration_s": max_duration_s, "max_bad_share": max_bad_share}
    weights = None if None in weights else weights
    is_stream = any(source.streaming or source.growing for source in sources)
    if is_stream and len(sources) > 1 and weights is None:
        raise ValueError("Streams do not know their length: give each of several sources a `weight`.")
    parts: list[Any] = []
    for source in sources:
        if source.growing:
            parts.append(GrowingFolder(source))
        elif is_stream and not (source.is_local and find_manifests(source)):
            parts.append(HubStream(source, seed))
        else:
            parts.append(load_utterances(source, **limits))
    if join is not None or is_stream:
        return SpeechStream(parts, weights, join, seed, repeat)
    return Mixture(parts, weights, seed)


class Epoch:
    """Something that is another in each epoch, also its copies in the persistent workers of a DataLoader."""

    parts: Sequence[Any] = ()
    # Nothing brings a source that grows to the place where a run stopped.
    is_growing = False

    def __init__(self):
        self._epoch = torch.tensor(0, dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were left out when its sources were read, per reason."""
        return dict(sum((Counter(part.skipped) for part in self.parts), Counter()))

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))


class Mixture(Epoch, Dataset):
    """
    Several map-style data sets as one, by weight.

    Without weights every row comes once per epoch. With weights a data set gives round(rows of all x its share) rows:
    where only some come, rows of about the same duration take turns from epoch to epoch, which those of
    `datasets.interleave_datasets` do not. So every epoch has, row by row, the same (upper bounds of) durations, and a
    batch sampler makes as many batches.

    Args:
        parts: data sets with `durations_s`.
        weights (*optional*): one per part.
        seed (`int`): of the turns, and of the `augment_seed` that every row carries.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0):
        super().__init__()
        self.parts, self.seed = list(parts), seed
        counts = num_rows = [len(part) for part in self.parts]
        if weights is not None:
            counts = [max(1, round(sum(num_rows) * weight / sum(weights))) for weight in weights]
        durations_s = [np.asarray(part.durations_s) for part in self.parts]
        slots = [_slots(one, count) for one, count in zip(durations_s, counts, strict=True)]
        self._part = np.repeat(np.arange(len(slots)), [len(sizes) for _, sizes in slots])
        self._rows, self._sizes = (np.concatenate(all_) for all_ in zip(*slots, strict=True))
        self._ends = np.cumsum(self._sizes)
        longest = [one[rows[np.cumsum(sizes) - 1]] for one, (rows, sizes) in zip(durations_s, slots, strict=True)]
        self.durations_s = np.concatenate(longest)

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        num, turn = int(self._sizes[index]), 0
        if num > 1:
            turns = np.random.default_rng([self.seed, 1, self.epoch // num, index]).permutation(num)
            turn = int(turns[self.epoch % num])
        row = self.parts[self._part[index]][int(self._rows[self._ends[index] - num + turn])]
        return {**row, "augment_seed": augment_seed(self.seed, self.epoch, index)}


def _slots(durations_s: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The rows that take turns in each of `count` places, the longest last, one place after the other, and how many each
    place has: once or several times all rows, each alone; then rows of about the same duration, so that all come
    equally often.
    """
    whole, rest = divmod(count, len(durations_s))
    rows, sizes = np.tile(np.arange(len(durations_s)), whole), np.ones(whole * len(durations_s), dtype=np.int64)
    if rest:
        rows = np.concatenate([rows, np.argsort(durations_s, kind="stable")])
        sizes = np.concatenate([sizes, np.diff(np.arange(rest + 1) * len(durations_s) // rest)])
    return rows, sizes


def augment_seed(*key: int) -> int:
    """A seed for what is drawn for one row in one epoch, whichever worker draws it."""
    return int(np.random.SeedSequence([int(one) for one in key]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class JoinSettings:
    """Durations in s, `min_s` to `max_s`, that windows aim at, all alike often. A longer utterance stays alone."""

    min_s: float = 1.0
    max_s: float = 25.0

    def __post_init__(self):
        if not 0 < self.min_s <= self.max_s < math.inf:
            raise ValueError(f"`min_s` and `max_s` must be 0 < min_s <= max_s, got {self.min_s!r}, {self.max_s!r}.")

    def targets_s(self, rng: np.random.Generator) -> Iterator[float]:
        """Durations in s, uniform in min_s..max_s, also over any few that follow each other."""
        position = rng.random()
        while True:
            yield self.min_s + (self.max_s - self.min_s) * position
            position = (position + GOLDEN) % 1


class SpeechStream(Epoch, IterableDataset):
    """
    Sources as one stream, drawn by weight, which the workers of a DataLoader share. With weights it ends when every
    source was read through once, those that are shorter beginning anew; without, every row comes once. It never ends
    if a source is growing.

    Rows have a `duration_s`; or are windows, other ones in every epoch: {"parts": rows of utterances of one language,
    "pauses_s" between them, "language", "duration_s", "augment_seed"}. An utterance that does not fit any more closes
    the window of its language.

    Args:
        parts: things to `read` from, such as [`Utterances`], [`HubStream`] and [`GrowingFolder`].
        weights (*optional*): one per part.
        join ([`JoinSettings`], *optional*): makes windows.
        repeat (`bool`): begins anew where it ends, for ever.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        weights: Sequence[float] | None = None,
        join: JoinSettings | None = None,
        seed: int = 0,
        repeat: bool = False,
    ):
        super().__init__()
        self.parts, self.weights, self.join, self.seed, self.repeat = list(parts), weights, join, seed, repeat
        self.is_growing = any(isinstance(part, GrowingFolder) for part in parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count(self.epoch):
            rng, is_empty = stream_generator(self.seed, epoch), True
            rows = self._mix(epoch, rng)
            for row in rows if self.join is None else self._join(rows, rng):
                is_empty = False
                yield row if "augment_seed" in row else {**row, "augment_seed": int(rng.integers(2**63))}
            # A worker may have no share of any source.
            if not self.repeat or is_empty:
                return

    def _mix(self, epoch: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        # Not by `datasets.interleave_datasets`, which has no sources that grow, and deals out whole files alone.
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        weights = np.array(self.weights or [len(part) if len(self.parts) > 1 else 1 for part in self.parts], float)
        readers = [part.read(self.seed, epoch, *share) for part in self.parts]
        num_passes, num_rows = [0] * len(readers), [0] * len(readers)
        while weights.any():
            i = int(rng.choice(len(weights), p=weights / weights.sum()))
            if (row := next(readers[i], None)) is not None:
                num_rows[i] += 1
                yield row
                continue
            num_passes[i] += 1
            if all(num_passes):
                return
            if self.weights is None or not num_rows[i]:
                # It was all read; or this worker has no share of it.
                weights[i] = 0
            else:
                readers[i] = self.parts[i].read(self.seed, epoch + num_passes[i], *share)

    def _join(self, rows: Iterable[dict[str, Any]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        targets_s = self.join.targets_s(rng)
        open_windows: dict[str, tuple[list, list, float]] = {}

        def close(language: str) -> dict[str, Any]:
            parts, pauses_s, _ = open_windows.pop(language)
            return {
                "parts": parts,
                "pauses_s": pauses_s,
                "language": parts[0].get("language"),
                "duration_s": sum(part["duration_s"] for part in parts) + sum(pauses_s),
                "augment_seed": int(rng.integers(2**63)),
            }

        for row in rows:
            language, pause_s = row.get("language") or "", float(rng.uniform(MIN_PAUSE_S, MAX_PAUSE_S))
            if language in open_windows:
                parts, pauses_s, left_s = open_windows[language]
                left_s -= pause_s + row["duration_s"]
                if left_s >= 0:
                    open_windows[language] = ([*parts, row], [*pauses_s, pause_s], left_s)
                    continue
                yield close(language)
            open_windows[language] = ([row], [], next(targets_s) - row["duration_s"])
        for language in list(open_windows):
            yield close(language)


def stream_generator(seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of one DataLoader worker in one epoch of a stream."""
    worker = get_worker_info()
    return np.random.default_rng([seed, epoch, worker.id if worker else 0])
