# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Where speech comes from: folders, manifests, data sets of `datasets`, growing shards; all to like rows."""

import gzip
import importlib.util
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..audio_mdm_asr import audio_duration_s
from .manifests import AUDIO_COLUMNS, MANIFESTS, find_audio_files, parse_line, read_manifest

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "raw_text")
LANGUAGE_COLUMNS = ("language", "lang")
DURATION_COLUMNS = ("duration_s", "duration")
# How often a growing folder is looked at.
POLL_S = 2.0
# Files, as it were, of a data set on disk that is streamed; and rows of a stream that are shuffled among.
NUM_PARTS, SHUFFLED_ROWS = 64, 256

UNREADABLE, NO_TEXT, EMPTY_TEXT = "unreadable audio", "no transcript", "empty transcript"
LONG_TEXT, LONG_AUDIO = "transcript longer than the canvas", "audio too long"
BAD_ROW_REASONS = (UNREADABLE, NO_TEXT, EMPTY_TEXT, LONG_TEXT, LONG_AUDIO)
# More bad rows than this are no accident: paths or columns are wrong.
MAX_BAD_SHARE = 0.01


def read_sentences(path: str | Path, name: str = "text") -> list[str]:
    """
    The lines of a text file, .txt or .txt.gz in UTF-8, that hold something, with single blanks.

    Raises:
        ValueError: the file cannot be read, or holds nothing. It names the argument `name`.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            sentences = [" ".join(line.split()) for line in file if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"`{name}` {str(path)!r} cannot be read: {error}") from error
    if not sentences:
        raise ValueError(f"`{name}` {str(path)!r} has no sentences. Give one a line.")
    return sentences


# Bad rows


class BadRowError(ValueError):
    """A row that cannot be used; `reason` is one of `BAD_ROW_REASONS`."""

    reason = UNREADABLE

    @classmethod
    def of(cls, row_name: str, reason: str, detail: str) -> "BadRowError":
        # DataLoader workers make exceptions anew from the message alone, so that is all that __init__ takes.
        error = cls(f"{row_name}: {reason}. {detail}")
        error.reason = reason
        return error


class BadRows:
    """
    What was wrong with rows that were left out: how many there are of each cause, and the first of each.

    Args:
        errors: or their messages. Those that differ in names, paths and numbers alone are of one cause.

    Attributes:
        reasons (`Counter`): how many there are of each of `BAD_ROW_REASONS`.
    """

    def __init__(self, errors: Iterable[Exception | str] = ()):
        self._counts, self._first, self.reasons = Counter(), {}, Counter()
        for error in errors:
            self.add(error)

    def add(self, error: Exception | str) -> None:
        cause = re.sub(r"'[^']*'|\S*[/\\\d]\S*", "", str(error))
        self._counts[cause] += 1
        self._first.setdefault(cause, str(error))
        if isinstance(error, BadRowError):
            self.reasons[error.reason] += 1

    def __len__(self) -> int:
        return self._counts.total()

    def __str__(self) -> str:
        shown = [f"{self._counts[cause]} like: {first.removesuffix('.')}" for cause, first in self._first.items()][:3]
        more = [f"and {len(self._first) - 3} causes more"] if len(self._first) > 3 else []
        return "; ".join([*shown, *more]) + "."


def check_bad_share(
    bad: BadRows,
    num_rows: int,
    name: str,
    most: float,
    *,
    num_bad: int | None = None,
    is_sample: bool = False,
    remedy: str = "Mend these rows or leave them out; `max_bad_share` allows more of them.",
) -> None:
    """
    Raises ValueError, with the first causes, where more than the share `most` of the rows called `name` are bad.

    Args:
        num_rows (`int`): good and bad ones.
        num_bad (`int`, *optional*): where others than `bad` count, too.
        is_sample (`bool`): more are to come. So few as these may be worse than all by chance, which is allowed for.
    """
    num_bad = len(bad) if num_bad is None else num_bad
    allowed = most * num_rows
    if num_bad > allowed + (3 * math.sqrt(allowed) + 3 if is_sample else 0):
        raise ValueError(
            f"{num_bad} of {num_rows} rows of {name} cannot be used, more than {100 * most:g} %: {bad} {remedy}"
        )


def check_on_bad_row(on_bad_row: str, max_bad_share: float = MAX_BAD_SHARE) -> None:
    """Raises ValueError if what is to be done with bad rows, and how many there may be, cannot be."""
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"`on_bad_row` must be 'raise' or 'skip', got {on_bad_row!r}.")
    if not isinstance(max_bad_share, (int, float)) or not 0 <= max_bad_share <= 1:
        raise ValueError(f"`max_bad_share` must be a share of the rows, from 0 to 1, got {max_bad_share!r}.")


def describe_skipped(skipped: dict[str, int]) -> str:
    """How many rows were skipped, and why, on one line."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "none"


# Sources


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns."""

    audio: str
    text: str | None = None
    language: str | None = None
    duration: str | None = None


@dataclass(frozen=True)
class Source:
    """
    One source of speech with transcripts.

    Args:
        path (`str`): a folder with metadata.jsonl or metadata.csv (audiofolder), or with shards of synthesize.py; a
            manifest (.jsonl, .csv, .tsv) with a column of audio paths, relative to the manifest; or the name of a
            data set that `datasets.load_dataset` knows.
        weight (`float`, *optional*): this source's share of the rows, relative to the other sources'. Either all
            sources have one or none, which means every row once per epoch.
        name, split: configuration and split of a data set of `datasets`; the split is "train" by default.
        audio_column, text_column, language_column, duration_column (`str`, *optional*): by default they are looked
            for under their usual names; without a "text", just one other name of `TEXT_COLUMNS` may be there. Without
            a `text_column` (None) rows have an empty text, and a folder need hold nothing but audio.
        language (`str`, *optional*): of all rows, if no column tells.
        lowercase (`bool`): for transcripts in capitals.
        streaming (`bool`): read a data set of `datasets` as it is downloaded.
        growing (`bool`): a folder that synthesize.py is still writing; its rows are replayed for ever, new ones first.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    split: str | None = None
    audio_column: str | None = None
    text_column: str | None = TEXT_COLUMNS[0]
    language_column: str | None = None
    duration_column: str | None = None
    language: str | None = None
    lowercase: bool = False
    streaming: bool = False
    growing: bool = False

    def __post_init__(self):
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise ValueError(f"`path` of a source must be a folder, a file or a name, got {self.path!r}.")
        object.__setattr__(self, "path", str(self.path))
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"`weight` of {self.path!r} must be positive, got {self.weight!r}. Leave the source out.")
        if self.growing and not Path(self.path).is_dir():
            raise ValueError(f"`growing` needs a folder, but {self.path!r} is none. Start synthesize.py first.")

    @classmethod
    def of(cls, spec: "Source | str | Path | dict[str, Any]") -> "Source":
        """A source of what a recipe holds: a path, or a dict of the settings."""
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, (str, Path)):
            return cls(str(spec))
        known = [field.name for field in fields(cls)]
        if not isinstance(spec, dict) or "path" not in spec or set(spec) - set(known):
            raise ValueError(f"A source must be a path or a dict with `path` and some of {known[1:]}, got {spec!r}.")
        return cls(**spec)

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists() or Path(self.path).suffix in MANIFESTS

    def columns(self, available: Sequence[str]) -> Columns:
        """
        Which column holds what, of a row with these columns.

        Raises:
            ValueError: one that is wanted is missing. It names the columns there are.
        """

        def find(setting: str, usual: tuple[str, ...], needed: bool = False) -> str | None:
            wanted = getattr(self, setting)
            found = next((column for column in ([wanted] if wanted else usual) if column in available), None)
            if found is None and (wanted or needed):
                raise ValueError(
                    f"`{setting}` {wanted or ' or '.join(usual)!r} is not in {self.path!r}, which has the columns "
                    f"{sorted(available)}. Name the right one."
                )
            return found

        text = None
        if self.text_column == TEXT_COLUMNS[0] and self.text_column not in available:
            others = [column for column in TEXT_COLUMNS if column in available]
            if len(others) > 1:
                raise ValueError(f"`text_column` is not told, and {self.path!r} has the columns {others}. Name one.")
            text = others[0] if others else None
        return Columns(
            audio=find("audio_column", AUDIO_COLUMNS, needed=True),
            text=text or find("text_column", ()),
            language=find("language_column", LANGUAGE_COLUMNS if self.language is None else ()),
            duration=find("duration_column", DURATION_COLUMNS),
        )


# Files


def find_manifests(source: Source) -> list[Path]:
    """The manifests of a local source; empty if `datasets` should read the folder."""
    path = Path(source.path)
    if path.is_file():
        if path.suffix not in MANIFESTS and source.text_column is None and find_audio_files(path):
            return []
        if path.suffix not in MANIFESTS:
            raise ValueError(f"{source.path!r} is not a manifest. Use one of {', '.join(MANIFESTS)}.")
        if source.split is not None:
            raise ValueError(f"`split` {source.split!r}: the manifest {source.path!r} has no splits. Leave it out.")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{source.path!r} does not exist. Check the path.")
    for folder in [path / source.split] if source.split is not None else [path, path / "train"]:
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                return [folder / name]
        if shards := sorted(folder.glob("shard-*/metadata.jsonl")):
            return shards
    return []


def load_undecoded(source: Source, streaming: bool) -> Any:
    """A data set of `datasets`, its audio not decoded, which would need torchcodec."""
    import datasets

    path = Path(source.path)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(source.path)
            data = data[source.split or "train"] if isinstance(data, datasets.DatasetDict) else data
            data = data.to_iterable_dataset(num_shards=min(len(data), NUM_PARTS)) if streaming else data
        else:
            data = datasets.load_dataset(source.path, source.name, split=source.split or "train", streaming=streaming)
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{source.path!r} is no folder with metadata.jsonl or metadata.csv, no manifest, and `datasets` cannot "
            f"load it ({reason:.300})."
        ) from error
    audio_name = source.columns(data.column_names or list(next(iter(data)))).audio
    # Streams cannot make an Audio feature without torchcodec, even one that is not decoded; what it holds, they can.
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    is_plain = streaming and importlib.util.find_spec("torchcodec") is None
    return data.cast_column(audio_name, plain if is_plain else datasets.Audio(decode=False))


def open_rows(source: Source, limit: int | None = None) -> tuple[Iterator[tuple[str, dict, Path | None]], Any]:
    """
    The first `limit` rows of a source, or all, as they are there: (name, values, folder that paths are relative to).
    And of a data set of `datasets` the column of its audio, in the place of which these rows hold their index.
    """
    if source.is_local and (manifests := find_manifests(source)):
        return islice((entry for manifest in manifests for entry in read_manifest(manifest)), limit), None
    if source.text_column is None and (files := find_audio_files(Path(source.path))):
        return ((str(file), {"audio": file.name}, file.parent) for file in files[:limit]), None
    data = load_undecoded(source, streaming=False)
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    audio_name = source.columns(data.column_names).audio
    others = data.remove_columns(audio_name)
    # Without a column a data set has no rows either.
    others = others if others.column_names else ({} for _ in range(len(data)))
    rows = ((f"{source.path} row {i}", {**row, audio_name: i}, None) for i, row in enumerate(others))
    return rows, data[audio_name]


# Rows


def make_row(source: Source, columns: Columns, row_name: str, values: dict[str, Any], folder: Path | None) -> dict:
    """
    The row {"audio", "text", "language", "duration_s", "row"} of a source's values. Its text may still be none, see
    [`check_text`]; its `duration_s` is None where no column tells.
    """
    text, audio = values.get(columns.text) if columns.text else "", values.get(columns.audio)
    if folder is not None:
        if not isinstance(audio, str) or not audio:
            detail = f"The column {columns.audio!r} holds {audio!r:.60}, not a path."
            raise BadRowError.of(row_name, UNREADABLE, detail)
        audio = str(folder / audio)
    if isinstance(text, str):
        text = " ".join(text.split())
        text = text.lower() if source.lowercase else text
    told = values.get(columns.duration) if columns.duration else None
    try:
        duration_s = None if told in (None, "") else float(told)
        is_valid = duration_s is None or 0 <= duration_s < math.inf
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{row_name}: `duration_column` {columns.duration!r} holds {told!r}, not seconds.")
    language = (values.get(columns.language) if columns.language else None) or source.language
    return {"audio": audio, "text": text, "language": language, "duration_s": duration_s, "row": row_name}


def check_text(text: Any, row_name: str, column: str, allow_empty: bool = False) -> None:
    """
    Raises BadRowError where a transcript is missing, or a number; and unless `allow_empty`, where it has no words:
    neither a letter nor a digit.
    """
    if not isinstance(text, str):
        detail = f"`text_column` {column!r} holds {text!r:.60}, not text. Write what is said, or name another column."
        raise BadRowError.of(row_name, NO_TEXT, detail)
    if not allow_empty and not any(map(str.isalnum, text)):
        detail = f"It is {text!r:.60}. Write what is said, or leave the row out."
        raise BadRowError.of(row_name, EMPTY_TEXT, detail)


def complete_row(row: dict[str, Any], columns: Columns, audio: Any, allow_empty: bool = False) -> None:
    """Checks a row's text, and adds the seconds that its audio's header tells, where no column does."""
    if columns.text:
        check_text(row["text"], row["row"], columns.text, allow_empty)
    if row["duration_s"] is None:
        try:
            row["duration_s"] = audio_duration_s(row["audio"] if audio is None else audio[row["audio"]])
        except ValueError as error:
            raise BadRowError.of(row["row"], UNREADABLE, str(error)) from error


class Utterances:
    """
    Rows {"audio", "text", "language", "duration_s", "row"} of one source, with random access.

    Args:
        rows: dicts.
        audio (*optional*): a `datasets` column; rows hold the index of their audio in it.
        bad_rows ([`BadRows`], *optional*): those that were left out.
    """

    def __init__(self, rows: Sequence[dict], audio: Any = None, bad_rows: BadRows | None = None):
        self.rows, self.audio, self.bad_rows = rows, audio, bad_rows or BadRows()
        self.durations_s = np.array([row["duration_s"] for row in rows], dtype=np.float64)

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self.bad_rows.reasons)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "audio": row["audio"] if self.audio is None else self.audio[row["audio"]]}

    def read(self, seed: int, epoch: int, worker: int, num_workers: int) -> Iterator[dict[str, Any]]:
        """One pass over a worker's share, in random order."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        return (self[int(i)] for i in order if i % num_workers == worker)


def load_utterances(
    source: Source,
    *,
    on_bad_row: str = "raise",
    max_duration_s: float | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Utterances:
    """
    Reads one source whole: its transcripts and durations, not yet its audio.

    Raises:
        ValueError: a missing file or column; with `on_bad_row="raise"`, an empty transcript, audio that is missing or
            whose header cannot be read, or audio longer than `max_duration_s`; otherwise, more than `max_bad_share` of
            such rows.
    """
    raw, audio = open_rows(source)
    rows, bad, columns = [], BadRows(), None
    for row_name, values, folder in raw:
        columns = columns or source.columns(list(values))
        try:
            row = make_row(source, columns, row_name, values, folder)
            is_told = row["duration_s"] is not None
            complete_row(row, columns, audio)
            if is_told and folder is not None and not os.path.isfile(row["audio"]):
                raise BadRowError.of(row_name, UNREADABLE, f"{row['audio']!r} does not exist. Check the path.")
            if max_duration_s is not None and row["duration_s"] > max_duration_s:
                detail = f"It lasts {row['duration_s']:.2f} s, more than {max_duration_s:g} s. Split it."
                raise BadRowError.of(row_name, LONG_AUDIO, detail)
        except BadRowError as error:
            if on_bad_row == "raise":
                raise
            bad.add(error)
        else:
            rows.append(row)
    if bad:
        check_bad_share(bad, len(rows) + len(bad), repr(source.path), max_bad_share)
        logger.warning(f"{source.path!r}: {len(bad)} of {len(rows) + len(bad)} rows skipped: {bad}")
    if not rows:
        raise ValueError(f"{source.path!r} has no rows to use." + (f" They were left out: {bad}" if bad else ""))
    return Utterances(rows, audio, bad)


class HubStream:
    """Rows of a data set of `datasets` as it is downloaded. What is wrong with one, the collator finds."""

    skipped: dict[str, int] = {}

    def __init__(self, source: Source, seed: int = 0):
        stream = load_undecoded(source, streaming=True)
        self.source = source
        self.columns = source.columns(stream.column_names or list(next(iter(stream))))
        self.stream = stream.shuffle(seed=seed, buffer_size=SHUFFLED_ROWS)

    def read(self, seed: int, epoch: int, worker: int, num_workers: int) -> Iterator[dict[str, Any]]:
        """One pass. `datasets` itself deals its files out to the workers: those beyond their number get none."""
        self.stream.set_epoch(epoch)
        for values in self.stream:
            audio = values[self.columns.audio]
            path = audio.get("path") if isinstance(audio, dict) else None
            name = " ".join(filter(None, [self.source.path, path]))
            yield _unchecked_row(self.source, self.columns, name, values, None)


class GrowingFolder:
    """A folder that synthesize.py is still writing. `datasets` has no source that grows."""

    skipped: dict[str, int] = {}

    def __init__(self, source: Source):
        self.source = source

    def read(self, seed: int, epoch: int, worker: int, num_workers: int) -> Iterator[dict[str, Any]]:
        """Rows without an end: each new one as soon as it is there; in between the old ones again."""
        rng, offsets, num_lines = np.random.default_rng([seed, epoch, worker]), Counter(), Counter()
        rows, fresh, replay, looked_at, is_told = [], [], [], -math.inf, False
        while True:
            if time.monotonic() - looked_at >= POLL_S:
                lines = [line for line in self._new_lines(offsets, num_lines) if line[1] % num_workers == worker]
                new = [self._row(*line) for line in lines]
                rows += new
                fresh += [new[i] for i in rng.permutation(len(new))]
                looked_at = time.monotonic()
            if not rows:
                if not is_told:
                    logger.warning(f"{self.source.path!r} has no speech yet. Waiting for it.")
                    is_told = True
                time.sleep(0.1)
                continue
            if not fresh and not replay:
                replay = list(rng.permutation(len(rows)))
            yield dict(fresh.pop() if fresh else rows[replay.pop()])

    def _new_lines(self, offsets: Counter, num_lines: Counter) -> Iterator[tuple[Path, int, bytes]]:
        """What was appended to the manifests since the last look, by line number from 0: whole lines only."""
        folder = Path(self.source.path)
        for manifest in sorted([*folder.glob("metadata.jsonl"), *folder.glob("shard-*/metadata.jsonl")]):
            with open(manifest, "rb") as file:
                file.seek(offsets[manifest])
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            offsets[manifest] += len(content)
            for line in content.splitlines():
                yield manifest, num_lines[manifest], line
                num_lines[manifest] += 1

    def _row(self, manifest: Path, number: int, line: bytes) -> dict[str, Any]:
        name = f"{manifest} line {number + 1}"
        values = parse_line(line, name)
        return _unchecked_row(self.source, self.source.columns(list(values)), name, values, manifest.parent)


def _unchecked_row(source: Source, columns: Columns, *entry: Any) -> dict[str, Any]:
    """A row of a stream. What is wrong with it the collator finds, which counts: it lasts no time until then."""
    row = make_row(source, columns, *entry)
    try:
        complete_row(row, Columns(columns.audio), None)
    except BadRowError:
        row["duration_s"] = 0.0
    return row
