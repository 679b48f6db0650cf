# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Where training speech comes from: folders, manifests, data sets of the Hub, growing shards; all to like rows."""

import csv
import gzip
import importlib.util
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging

from ..audio_mdm_asr import audio_duration_s

logger = logging.get_logger(__name__)

AUDIO_COLUMNS = ("audio", "file_name", "audio_filepath", "path")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "raw_text")
LANGUAGE_COLUMNS = ("language", "lang")
SPEAKER_COLUMNS = ("speaker_id", "speaker", "client_id")
DURATION_COLUMNS = ("duration_s", "duration")
MANIFESTS = (".jsonl", ".json", ".csv", ".tsv")
# How often a growing folder is looked at.
POLL_S = 2.0
# Files, as it were, of a data set on disk that is streamed.
NUM_PARTS = 64

UNREADABLE, NO_TEXT, EMPTY_TEXT = "unreadable audio", "no transcript", "empty transcript"
LONG_TEXT, LONG_AUDIO = "transcript longer than the canvas", "audio too long"
# More bad rows than this are no accident: paths or columns are wrong.
MAX_BAD_SHARE = 0.01
BAD_ROW_REASONS = (UNREADABLE, NO_TEXT, EMPTY_TEXT, LONG_TEXT, LONG_AUDIO)


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


class BadRows:
    """
    What was wrong with rows that were left out: how many there are of each cause, and the first of each.

    Args:
        messages: of the errors. Those that differ in names, paths and numbers alone are of one cause.
    """

    def __init__(self, messages: Iterable[str] = ()):
        self._counts, self._first = Counter(), {}
        for message in messages:
            self.add(message)

    def add(self, message: str) -> None:
        cause = re.sub(r"'[^']*'|\S*[/\\\d]\S*", "", message)
        self._counts[cause] += 1
        self._first.setdefault(cause, message)

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
    Raises ValueError, with the first causes, where more than the share `most` of the rows are bad.

    Args:
        num_rows (`int`): good and bad ones.
        name (`str`): of the rows, for the message.
        num_bad (`int`, *optional*): where others than `bad` count, too.
        is_sample (`bool`): more are to come. So few as these may be worse than all by chance, which is allowed for.
        remedy (`str`): the last words of the message.
    """
    num_bad = len(bad) if num_bad is None else num_bad
    allowed = most * num_rows
    if num_bad > allowed + (3 * math.sqrt(allowed) + 3 if is_sample else 0):
        raise ValueError(
            f"{num_bad} of {num_rows} rows of {name} cannot be used, more than {100 * most:g} %: {bad} {remedy}"
        )


class BadRowError(ValueError):
    """A row that cannot be trained on; `reason` is one of `BAD_ROW_REASONS`."""

    reason = UNREADABLE

    @classmethod
    def of(cls, row_name: str, reason: str, detail: str) -> "BadRowError":
        # DataLoader workers make exceptions anew from the message alone, so that is all that __init__ takes.
        error = cls(f"{row_name}: {reason}. {detail}")
        error.reason = reason
        return error


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
        audio_column, text_column, language_column, speaker_column, duration_column (`str`, *optional*): by default
            they are looked for under their usual names; without a "text", just one other name of `TEXT_COLUMNS` may be
            there. Without a `text_column` (None) rows have an empty text, and a folder need hold nothing but audio.
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
    speaker_column: str | None = None
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
        unknown = sorted(set(spec) - set(known)) if isinstance(spec, dict) else [repr(spec)]
        if unknown or "path" not in spec:
            raise ValueError(f"A source must be a path or a dict with `path` and some of {known[1:]}, got {spec!r}.")
        return cls(**spec)

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists() or Path(self.path).suffix in MANIFESTS

    def columns(self, available: Sequence[str], known: "Columns | None" = None) -> "Columns":
        """
        Which column holds what, of a row with these columns; `known` is the answer for the rows before it.

        Raises:
            ValueError: one that is wanted is missing, and nothing is `known`. It names the columns there are.
        """
        if known is not None:
            if {known.audio, known.text} - {None} <= set(available):
                return known
            try:
                return self.columns(available)
            except ValueError:
                # Only this row lacks it, which makes it a bad one.
                return known

        def find(setting: str, usual: tuple[str, ...], needed: bool = False) -> str | None:
            wanted = getattr(self, setting)
            found = next((column for column in ([wanted] if wanted else usual) if column in available), None)
            if found is None and (wanted or needed):
                raise ValueError(
                    f"`{setting}` {wanted or ' or '.join(usual)!r} is not in {self.path!r}, which has the columns "
                    f"{sorted(available)}. Name the right one."
                )
            return found

        return Columns(
            audio=find("audio_column", AUDIO_COLUMNS, needed=True),
            text=self._find_text(available) or find("text_column", ()),
            language=find("language_column", LANGUAGE_COLUMNS if self.language is None else ()),
            speaker=find("speaker_column", SPEAKER_COLUMNS),
            duration=find("duration_column", DURATION_COLUMNS),
        )

    def _find_text(self, available: Sequence[str]) -> str | None:
        if self.text_column != TEXT_COLUMNS[0] or self.text_column in available:
            return None
        found = [column for column in TEXT_COLUMNS if column in available]
        if len(found) > 1:
            raise ValueError(
                f"`text_column` is not told, and {self.path!r} has the columns {found}. Name the right one."
            )
        return found[0] if found else None


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns."""

    audio: str
    text: str | None = None
    language: str | None = None
    speaker: str | None = None
    duration: str | None = None


class Utterances(Dataset):
    """
    Rows {"audio", "text", "duration_s", "language", "speaker", "row"} of one source, read with random access.

    Args:
        rows: dicts with at least "audio", "text" and "duration_s".
        audio (*optional*): what to take the audio of row i from instead, by `audio[i]`, such as a `datasets` column.
        skipped (`dict`, *optional*): how many rows were left out on the way, per reason.
        bad_rows ([`BadRows`], *optional*): what was wrong with them.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        audio: Any = None,
        skipped: dict[str, int] | None = None,
        path: str = "",
        bad_rows: BadRows | None = None,
    ):
        self.bad_rows = bad_rows or BadRows()
        if not len(rows):
            why = f" They were left out: {bad_rows}" if bad_rows else ""
            raise ValueError(f"{path or 'The data set'!r} has no rows to train on.{why}")
        for i, row in enumerate(rows):
            missing = sorted({"text", "duration_s"} - set(row) | ({"audio"} - set(row) if audio is None else set()))
            if missing:
                raise ValueError(f"Row {i} has no {missing[0]!r}, but {sorted(row)}. Use `load_sources` to make rows.")
        self.rows, self.audio, self.path, self.skipped = rows, audio, path, dict(skipped or {})

    @property
    def durations_s(self) -> np.ndarray:
        return np.array([row["duration_s"] for row in self.rows], dtype=np.float64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        if self.audio is not None:
            row["audio"] = self.audio[row.pop("index")]
        return row


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
    check_on_bad_row(on_bad_row, max_bad_share)
    audio = None
    if source.is_local and (manifests := find_manifests(source)):
        raw = (entry for manifest in manifests for entry in read_manifest(manifest))
    elif source.text_column is None and (files := find_audio_files(source)):
        raw = ((str(file), {"audio": file.name}, file.parent) for file in files)
    else:
        data = load_undecoded(source, streaming=False)
        audio_name = source.columns(data.column_names).audio
        audio, texts = data[audio_name], data.remove_columns(audio_name)
        if not texts.column_names:
            # Without a column a data set has no rows either.
            texts = ({} for _ in range(len(data)))
        raw = ((f"{source.path} row {i}", dict(row, **{audio_name: i}), None) for i, row in enumerate(texts))

    rows, skipped, bad, columns = [], Counter(), BadRows(), None
    for row_name, values, folder in raw:
        columns = source.columns(list(values), columns)
        try:
            row = make_row(source, columns, row_name, values, folder)
            if audio is not None:
                row["index"] = row.pop("audio")
            if columns.text:
                check_text(row["text"], row_name, columns.text)
            if row["duration_s"] is None:
                its_audio = row["audio"] if audio is None else audio[row["index"]]
                row["duration_s"] = header_duration_s(its_audio, row_name)
            elif folder is not None and not os.path.isfile(row["audio"]):
                raise BadRowError.of(row_name, UNREADABLE, f"{row['audio']!r} does not exist. Check the path.")
            if max_duration_s is not None and row["duration_s"] > max_duration_s:
                detail = f"It lasts {row['duration_s']:.2f} s, more than {max_duration_s:g} s. Split it."
                raise BadRowError.of(row_name, LONG_AUDIO, detail)
        except BadRowError as error:
            if on_bad_row == "raise":
                raise
            skipped[error.reason] += 1
            bad.add(str(error))
            continue
        rows.append(row)
    if skipped:
        num_rows = len(rows) + skipped.total()
        check_bad_share(bad, num_rows, repr(source.path), max_bad_share)
        logger.warning(f"{source.path!r}: {len(bad)} of {num_rows} rows skipped: {bad}")
    return Utterances(rows, audio, skipped, source.path, bad)


def shared_integer() -> torch.Tensor:
    """An integer that copies of its owner in DataLoader workers see change."""
    return torch.tensor(0, dtype=torch.int64).share_memory_()


def describe_skipped(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "none"


def check_on_bad_row(on_bad_row: str, max_bad_share: float = MAX_BAD_SHARE) -> None:
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"`on_bad_row` must be 'raise' or 'skip', got {on_bad_row!r}.")
    if not isinstance(max_bad_share, (int, float)) or not 0 <= max_bad_share <= 1:
        raise ValueError(f"`max_bad_share` must be a share of the rows, from 0 to 1, got {max_bad_share!r}.")


def find_manifests(source: Source) -> list[Path]:
    """The manifests of a local source; empty if `datasets` should read the folder."""
    path = Path(source.path)
    if path.is_file():
        if path.suffix not in MANIFESTS and source.text_column is None and find_audio_files(source):
            return []
        if path.suffix not in MANIFESTS:
            raise ValueError(f"{source.path!r} is not a manifest. Use one of {', '.join(MANIFESTS)}.")
        if source.split is not None:
            raise ValueError(f"`split` {source.split!r}: the manifest {source.path!r} has no splits. Leave it out.")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{source.path!r} does not exist. Check the path.")
    folders = [path / source.split] if source.split is not None else [path, path / "train"]
    for folder in folders:
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                return [folder / name]
        if shards := sorted(folder.glob("shard-*/metadata.jsonl")):
            return shards
    return []


def find_audio_files(source: Source) -> list[Path]:
    """The audio files of a folder and of those in it, by their suffixes; of a file, itself."""
    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus", ".oga"}
    path = Path(source.path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix.lower() in suffixes - {".raw"} and file.is_file()]


def read_manifest(path: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Yields (name of the row, its values, folder its paths are relative to)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".csv", ".tsv"):
                for name, row in _read_table(file, str(path), "\t" if path.suffix == ".tsv" else ","):
                    yield name, row, path.parent
                return
            for number, line in enumerate(file, start=1):
                # Files with a byte order mark may have been put together.
                if line := line.strip("\ufeff \t\r\n"):
                    yield f"{path} line {number}", _parse_line(line, f"{path} line {number}"), path.parent
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not in UTF-8 ({error}). Save it so.") from error


def _read_table(lines: Iterable[str], path: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name of the row, its values)."""
    taken: list[str] = []
    reader = csv.DictReader((taken.append(line) or line for line in lines), delimiter=delimiter)
    try:
        if reader.fieldnames:
            taken.clear()
        for row in reader:
            if sum(map(bool, map(str.strip, taken))) > 1:
                # Quotes are read as they come, unless one that is not closed makes one row of many.
                list(csv.reader(taken, delimiter=delimiter, strict=True))
            taken.clear()
            if None in row or None in row.values():
                raise ValueError(
                    f"{path} line {reader.line_num} has more or fewer fields than the header. Quote commas."
                )
            yield f"{path} line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(
            f"{path} line {max(reader.line_num - len(taken), 0) + 1} is no row ({error}). Is a quote not closed?"
        ) from error


def _parse_line(line: str | bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}). Write one object per line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object. Write one object per line.")
    return values


def make_row(source: Source, columns: Columns, row_name: str, values: dict[str, Any], folder: Path | None) -> dict:
    """A row of [`Utterances`]. Its text may still be none, see [`check_text`]."""
    text, audio = values.get(columns.text) if columns.text else "", values.get(columns.audio)
    if folder is not None:
        if not isinstance(audio, str) or not audio:
            raise BadRowError.of(
                row_name, UNREADABLE, f"The column {columns.audio!r} holds {audio!r:.60}, not a path."
            )
        audio = str(folder / audio)
    if isinstance(text, str):
        text = " ".join(text.split())
        text = text.lower() if source.lowercase else text
    duration_s = values.get(columns.duration) if columns.duration else None
    try:
        duration_s = None if duration_s in (None, "") else float(duration_s)
        is_valid = duration_s is None or 0 <= duration_s < math.inf
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{row_name}: `duration_column` {columns.duration!r} holds {duration_s!r}, not seconds.")
    return {
        "audio": audio,
        "text": text,
        "language": (values.get(columns.language) if columns.language else None) or source.language,
        "speaker": _as_text(values.get(columns.speaker)) if columns.speaker else None,
        "duration_s": duration_s,
        "row": row_name,
    }


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


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def header_duration_s(audio: Any, row_name: str) -> float:
    """Seconds that a file's header tells."""
    try:
        return audio_duration_s(audio)
    except ValueError as error:
        raise BadRowError.of(row_name, UNREADABLE, str(error)) from error


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


class StreamedSources(IterableDataset):
    """
    Sources as a stream of rows, drawn by weight. It ends when every source was read through once, those that are
    shorter beginning anew in another order; never, if one is growing. Local sources that do not grow are read whole
    before, by [`load_utterances`]; what is wrong with a row of the others, the collator finds.

    The workers of a DataLoader share the rows. A streamed data set is dealt out to them by its files: workers beyond
    their number read the other sources only.

    Args:
        sources: each with a weight, unless there is but one.
        seed (`int`)
        on_bad_row, max_duration_s, max_bad_share: for [`load_utterances`].
        shuffle_buffer_rows (`int`): rows of a streamed data set to shuffle among; all their audio is in memory.
        process_index, num_processes (`int`): reads this process's share only. For a DataLoader that is not handed to
            `accelerate`, which deals out the rows of a stream by itself.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int = 0,
        on_bad_row: str = "raise",
        max_duration_s: float | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
        shuffle_buffer_rows: int = 256,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if len(sources) > 1 and not all(source.weight for source in sources):
            raise ValueError("Streams do not know their length: give each of several sources a `weight`.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` must be in 0..{num_processes - 1}, got {process_index!r}.")
        self.sources, self.seed = list(sources), seed
        self.process_index, self.num_processes = process_index, num_processes
        self._epoch = shared_integer()
        self._opened: list[Any] = []
        for source in self.sources:
            if source.growing:
                self._opened.append(None)
            elif source.is_local and find_manifests(source):
                settings = {"max_duration_s": max_duration_s, "max_bad_share": max_bad_share}
                self._opened.append(load_utterances(source, on_bad_row=on_bad_row, **settings))
            else:
                stream = _HubStream(source, seed, shuffle_buffer_rows, process_index, num_processes)
                self._opened.append(stream)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were left out when local sources were read, per reason."""
        return dict(sum((Counter(getattr(one, "skipped", {})) for one in self._opened), Counter()))

    def set_epoch(self, epoch: int) -> None:
        """Reaches the copies in persistent DataLoader workers too."""
        self._epoch.fill_(int(epoch))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = (self.process_index * num_workers + worker_id, self.num_processes * num_workers)
        rng = np.random.default_rng([self.seed, self.epoch, share[0]])
        weights = np.array([source.weight or 1.0 for source in self.sources])
        readers = [self._read(i, 0, share, rng) for i in range(len(self.sources))]
        num_passes, num_rows = [0] * len(readers), [0] * len(readers)
        while True:
            i = int(rng.choice(len(weights), p=weights / weights.sum()))
            row = next(readers[i], None)
            if row is not None:
                num_rows[i] += 1
                yield row
                continue
            num_passes[i] += 1
            if not num_rows[i]:
                # This worker has no share of the source.
                weights[i] = 0
            if all(num_passes):
                return
            num_rows[i], readers[i] = 0, self._read(i, num_passes[i], share, rng)

    def _read(
        self, i: int, num_passes: int, share: tuple[int, int], rng: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        source, opened = self.sources[i], self._opened[i]
        if source.growing:
            return _follow(source, share, rng)
        if isinstance(opened, _HubStream):
            return opened.read(self.epoch + num_passes)
        return (opened[int(index)] for index in rng.permutation(len(opened)) if index % share[1] == share[0])


class _HubStream:
    """Rows of a streamed data set of `datasets`, which deals its files out to the workers itself."""

    def __init__(self, source: Source, seed: int, buffer_rows: int, process_index: int, num_processes: int):
        stream = load_undecoded(source, streaming=True)
        self.source = source
        self.columns = source.columns(stream.column_names or list(next(iter(stream))))
        self.stream = stream.shuffle(seed=seed, buffer_size=buffer_rows)
        if num_processes > 1:
            from datasets.distributed import split_dataset_by_node

            self.stream = split_dataset_by_node(self.stream, process_index, num_processes)

    def read(self, epoch: int) -> Iterator[dict[str, Any]]:
        self.stream.set_epoch(epoch)
        for values in self.stream:
            audio = values[self.columns.audio]
            path = audio.get("path") if isinstance(audio, dict) else None
            name = " ".join(filter(None, [self.source.path, path]))
            yield _with_duration(make_row(self.source, self.columns, name, values, None))


def _with_duration(row: dict[str, Any]) -> dict[str, Any]:
    if row["duration_s"] is None:
        try:
            row["duration_s"] = header_duration_s(row["audio"], row["row"])
        except BadRowError:
            # The collator, which counts, will find it unreadable, too.
            row["duration_s"] = 0.0
    return row


def _follow(source: Source, share: tuple[int, int], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows of a folder that grows, for ever: each new one as soon as it is there; in between the old ones again."""
    follower, rows, fresh, replay = _Follower(source, share), [], [], []
    looked_at = -math.inf
    while True:
        if time.monotonic() - looked_at >= POLL_S:
            new = follower.read()
            rows += new
            fresh += [new[i] for i in rng.permutation(len(new))]
            looked_at = time.monotonic()
        if not rows:
            logger.warning_once(f"{source.path!r} has no speech yet. Waiting for it.")
            time.sleep(0.1)
            continue
        if not fresh and not replay:
            replay = list(rng.permutation(len(rows)))
        yield dict(fresh.pop() if fresh else rows[replay.pop()])


class _Follower:
    """Reads what was appended to the shards of a folder since the last look, whole lines only."""

    def __init__(self, source: Source, share: tuple[int, int]):
        self.source, self.share = source, share
        self.offsets, self.num_lines = Counter(), Counter()

    def read(self) -> list[dict[str, Any]]:
        rows = []
        folder = Path(self.source.path)
        for manifest in sorted([*folder.glob("metadata.jsonl"), *folder.glob("shard-*/metadata.jsonl")]):
            with open(manifest, "rb") as file:
                file.seek(self.offsets[manifest])
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            self.offsets[manifest] += len(content)
            for line in content.splitlines():
                self.num_lines[manifest] += 1
                if (self.num_lines[manifest] - 1) % self.share[1] == self.share[0]:
                    name = f"{manifest} line {self.num_lines[manifest]}"
                    values = _parse_line(line, name)
                    row = make_row(self.source, self.source.columns(list(values)), name, values, manifest.parent)
                    rows.append(_with_duration(row))
        return rows


__all__ = [
    "BAD_ROW_REASONS",
    "BadRowError",
    "BadRows",
    "Columns",
    "Source",
    "StreamedSources",
    "Utterances",
    "header_duration_s",
    "load_undecoded",
    "load_utterances",
    "make_row",
]
