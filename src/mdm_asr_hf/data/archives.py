# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of archives of audio: listed without reading any, and read where they are wanted; without PyTorch."""

import glob
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .manifests import AUDIO_COLUMNS, MANIFESTS, audio_suffixes, read_manifest, unique_id

TAR, PARQUET, DATASETS, FILES = "tar", "parquet", "datasets", "files"
ID_COLUMN = "id"
# What `datasets.save_to_disk` writes.
SAVED_DATASETS = ("state.json", "dataset_dict.json")
# Of Parquet, at once: audio is large.
READ_ROWS = 16


class AudioRow(NamedTuple):
    """
    Where a row's audio is.

    Attributes:
        id (`str`): no other row of the archive has it.
        path (`str`): of a file.
        place (`int`): of the audio's first byte in a tar, of the row in a Parquet file or data set.
        num_bytes (`int`): of the stored audio, about; 0 where nothing tells.
        error (`str`, *optional*): why there is none.
    """

    id: str
    path: str
    place: int = 0
    num_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Archive:
    """
    Audio on a disk, or a data set.

    Args:
        source (`str`): a folder of audio files, WebDataset tars or Parquet files, or with a metadata.jsonl or .csv;
            one such file, a manifest (.jsonl, .csv, .tsv) with a column of paths relative to it, or a pattern (`*`)
            of them; or a folder or name that `datasets` knows.
        split, name (`str`, *optional*): split and configuration of the latter.
    """

    source: str
    split: str | None = None
    name: str | None = None

    def list_rows(self) -> tuple[str, list[AudioRow]]:
        """
        What kind the archive is, and its rows in a lasting order. No audio is read.

        Raises:
            ValueError: it does not exist, is nothing of these or several, holds no audio, or cannot be listed.
        """
        kind, files = self._find()
        if kind != DATASETS and (self.split or self.name):
            raise ValueError(f"`split` and `config` are for data sets of `datasets`, not for {kind}. Leave them out.")
        if kind == DATASETS:
            rows = self._list_dataset()
        else:
            listed = {TAR: _list_tar, PARQUET: _list_parquet, "manifest": _list_manifest, FILES: self._list_file}
            rows = itertools.chain.from_iterable(map(listed[kind], files))
        rows = list(_told_apart(rows))
        if not rows:
            raise ValueError(f"`SOURCE` {self.source!r} has no rows. Name a folder, manifest or data set of audio.")
        return (FILES if kind == "manifest" else kind), rows

    def read(self, kind: str, rows: list[AudioRow]) -> Iterator[Any]:
        """The audio of each row, as [`load_audio`] takes it, or the ValueError of one that cannot be had."""
        if kind == PARQUET:
            for path, group in itertools.groupby(rows, key=lambda row: row.path):
                yield from _read_parquet(path, list(group))
            return
        data, column = self._open_dataset() if kind == DATASETS else (None, None)
        for row in rows:
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                if kind == TAR:
                    with open(row.path, "rb") as file:
                        file.seek(row.place)
                        yield file.read(row.num_bytes)
                else:
                    yield row.path if data is None else data[row.place][column]
            except (OSError, ValueError, LookupError) as error:
                yield ValueError(f"{row.id!r} cannot be read: {error}")

    def _find(self) -> tuple[str, list[Path]]:
        path = Path(self.source)
        if path.is_dir():
            if any((path / name).is_file() for name in SAVED_DATASETS):
                return DATASETS, []
            for name in ("metadata.jsonl", "metadata.csv"):
                if (path / name).is_file():
                    return "manifest", [path / name]
            found = sorted(path.rglob("*"))
        elif path.exists():
            found = [path]
        else:
            found = sorted(map(Path, glob.glob(self.source, recursive=True)))
            if not found:
                if path.suffix in (".tar", ".parquet", *MANIFESTS) or path.is_absolute() or "*" in self.source:
                    raise ValueError(f"`SOURCE` {self.source!r} does not exist. Check the path.")
                return DATASETS, []
        suffixes = {".tar": TAR, ".parquet": PARQUET} | dict.fromkeys(audio_suffixes(), FILES)
        if not path.is_dir():
            suffixes |= dict.fromkeys(MANIFESTS, "manifest")
        kinds: dict[str, list[Path]] = {}
        for one in found:
            if (kind := suffixes.get(one.suffix.lower())) and one.is_file():
                kinds.setdefault(kind, []).append(one)
        if len(kinds) != 1:
            held = f"holds {' and '.join(sorted(kinds))}" if kinds else "holds neither audio, tars nor Parquet files"
            raise ValueError(
                f"`SOURCE` {self.source!r} {held}. Name what holds one kind, or a pattern such as '*.tar'."
            )
        return next(iter(kinds.items()))

    def _list_file(self, path: Path) -> Iterator[AudioRow]:
        folder = Path(self.source)
        yield AudioRow(str(path.relative_to(folder) if folder.is_dir() else path), str(path), 0, _size(path))

    def _open_dataset(self) -> tuple[Any, str]:
        """A data set, its audio not decoded, and the column with it."""
        from .sources import Source, load_undecoded

        source = Source(self.source, name=self.name, split=self.split, text_column=None)
        data = load_undecoded(source, streaming=False)
        return data, source.columns(data.column_names).audio

    def _list_dataset(self) -> Iterator[AudioRow]:
        data, _ = self._open_dataset()
        ids = data[ID_COLUMN] if ID_COLUMN in data.column_names else range(len(data))
        size = data.data.nbytes // max(len(data), 1)
        return (AudioRow(str(one), self.source, place, size) for place, one in enumerate(ids))


def _size(path: str | Path) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):
        # Why not, its row will say.
        return 0


def _told_apart(rows: Iterable[AudioRow]) -> Iterator[AudioRow]:
    """Rows whose ids are Unicode, and differ."""
    taken: Counter[str] = Counter()
    for row in rows:
        yield row._replace(id=unique_id(row.id.encode("utf-8", "backslashreplace").decode(), taken))


def _list_manifest(path: Path) -> Iterator[AudioRow]:
    column = None
    for name, values, folder in read_manifest(path):
        column = column or _audio_column(values, path)
        audio, its_id = values.get(column), values.get(ID_COLUMN)
        is_path = isinstance(audio, str) and audio
        # Ids of 0, too.
        its_id = str(its_id) if its_id not in (None, "") else audio if is_path else name
        where = str(folder / audio) if is_path else ""
        error = None if is_path else f"{column!r} holds {audio!r:.60}, not a path."
        yield AudioRow(its_id, where, 0, _size(where), error)


def _list_tar(path: Path) -> Iterator[AudioRow]:
    suffixes = audio_suffixes()
    silent: dict[str, None] = {}
    heard: set[str] = set()
    try:
        # Where a sample's audio begins is of use only where the tar is not compressed.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                key = f"{folder}/{file.split('.')[0]}".lstrip("/")
                if Path(file).suffix.lower() in suffixes:
                    heard.add(key)
                    yield AudioRow(key, str(path), member.offset_data, member.size)
                else:
                    silent[key] = None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is no whole, uncompressed tar ({error}). Copy it again or leave it out."
        ) from error
    yield from (AudioRow(key, str(path), error="The sample has no audio.") for key in silent if key not in heard)


def _list_parquet(path: Path) -> Iterator[AudioRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.metadata
            column = _audio_column(schema.names, path)
            kind = schema.field(column).type
            id_column = ID_COLUMN if ID_COLUMN in schema.names else None
            if id_column is None and pa.types.is_struct(kind) and "path" in [field.name for field in kind]:
                id_column = f"{column}.path"
            ids = [None] * groups.num_rows
            if id_column is not None:
                ids = file.read(columns=[id_column]).flatten().column(0).to_pylist()
            chunks = [
                groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(groups.num_columns)
            ]
            num_bytes = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{str(path)!r} is no Parquet file that can be read ({error}). Copy it again.") from error
    for place, one in enumerate(ids):
        its_id = f"{path.name}:{place}" if one in (None, "") else str(one)
        yield AudioRow(its_id, str(path), place, num_bytes // len(ids))


def _read_parquet(path: str, rows: list[AudioRow]) -> Iterator[Any]:
    """The audio of rows of one file, which rise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    places, num_read, reason = [row.place for row in rows], 0, "it has fewer rows than before"
    try:
        with pq.ParquetFile(path) as file:
            column, start = _audio_column(file.schema_arrow.names, path), 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                wanted = {place - start for place in places if start <= place < stop}
                batches = file.iter_batches(READ_ROWS, row_groups=[group], columns=[column]) if wanted else ()
                for i, value in enumerate(itertools.chain.from_iterable(batch.column(0) for batch in batches)):
                    if i in wanted:
                        yield _stored_audio(value.as_py(), Path(path).parent)
                        num_read += 1
                    if num_read == len(rows):
                        return
                start = stop
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error)
    yield from (ValueError(f"{row.id!r} of {path!r} cannot be read: {reason}") for row in rows[num_read:])


def _stored_audio(value: Any, folder: Path) -> Any:
    """What a column of Parquet holds: bytes, a path, or both as `datasets` has them."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value:
        return str(folder / value)
    return value if isinstance(value, bytes) else ValueError(f"There is {value!r:.60}, not audio.")


def _audio_column(names: Iterable[str], path: Any) -> str:
    names = list(names)
    found = next((name for name in AUDIO_COLUMNS if name in names), None)
    if found is None:
        raise ValueError(
            f"{str(path)!r} has no column {' or '.join(AUDIO_COLUMNS)}, but {names}. Rename the right one."
        )
    return found
