# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The data sets a model is measured on: local ones, those of `datasets`, and the paper's by name."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.manifests import unique_id
from ..data.sources import BadRowError, BadRows, Source, complete_row, find_manifests, make_row, open_rows

logger = logging.get_logger(__name__)

ID_COLUMNS = ("id", "segment_id", "utterance_id")


def _leaderboard(name: str, split: str = "test") -> Source:
    path = "hf-audio/esb-datasets-test-only-sorted"
    return Source(path, name=name, split=split, duration_column="audio_length_s", language="en")


def _mls(name: str, language: str) -> Source:
    path = "facebook/multilingual_librispeech"
    return Source(path, name=name, split="test", text_column="transcript", language=language)


# The paper's test sets. English: data set, configurations and columns of the Open ASR Leaderboard
# (github.com/huggingface/open_asr_leaderboard, `normalizer/data_utils.py` and its `run_*.sh`). Multilingual
# LibriSpeech: its own data set, since the leaderboard's multilingual one has no German part of it.
PRESETS = {
    "librispeech-test-clean": _leaderboard("librispeech", "test.clean"),
    "librispeech-test-other": _leaderboard("librispeech", "test.other"),
    "earnings22": _leaderboard("earnings22"),
    "ami": _leaderboard("ami"),
    "voxpopuli": _leaderboard("voxpopuli"),
    "mls-de": _mls("german", "de"),
    "mls-es": _mls("spanish", "es"),
    "mls-fr": _mls("french", "fr"),
}


@dataclass
class EvaluationData:
    """
    The rows of one data set, their audio not yet read.

    Args:
        name (`str`): for tables and folders.
        path (`str`): where it comes from, as it was given.
        rows: {"id", "audio", "audio_path", "text", "language", "duration_s"}, in the order of the data set.
        audio (*optional*): what to take the audio of a row from, at its "audio", such as a `datasets` column.
        skipped: {"id", "reason"} of the rows that could not be measured; evaluating adds to it.
        sha256 (`str`): of the manifest, or of ids and texts where there is none.
    """

    name: str
    path: str
    rows: list[dict[str, Any]]
    audio: Any = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, index: int) -> Any:
        """The audio of a row, as [`load_audio`] takes it."""
        audio = self.rows[index]["audio"]
        return audio if self.audio is None else self.audio[audio]

    def select(self, indices: Iterable[int]) -> "EvaluationData":
        """The same with some of the rows."""
        return replace(self, rows=[self.rows[i] for i in indices], skipped=[])

    def describe(self) -> dict[str, Any]:
        """What metrics.json says about it."""
        described = {"name": self.name, "path": self.path, "num_utterances": len(self.rows)}
        return described | {"num_skipped": len(self.skipped), "skipped": self.skipped, "sha256": self.sha256}

    def skip(self, one_id: str, error: Exception) -> None:
        """Takes note of a row that cannot be measured, once: the same data may be measured with many settings."""
        if all(known["id"] != one_id for known in self.skipped):
            self.skipped.append({"id": one_id, "reason": str(error)})
            logger.warning(f"Skipped {one_id}: {error}")


def load_data(
    data: "str | Path | dict | Source | EvaluationData", *, limit: int | None = None, **settings: Any
) -> EvaluationData:
    """
    Reads texts and durations of a data set. Rows whose audio cannot be read are reported, counted and left out.

    Empty texts, and those of punctuation alone, are kept: what is recognised there counts as insertions. A row whose
    text is missing, or null, cannot be measured.

    Args:
        data: the name of one of `PRESETS`; a folder with metadata.jsonl or metadata.csv; a manifest (.jsonl, .csv,
            .tsv); the name of a data set of `datasets`; or a [`Source`].
        limit (`int`, *optional*): only the first rows.
        settings: of [`Source`], such as `name`, `split` ("test" by default), `text_column`, `language`; None is not
            set.

    Raises:
        ValueError: no such data, no such column, or no row that can be measured.
    """
    if isinstance(data, EvaluationData):
        return data if limit is None else data.select(range(min(limit, len(data))))
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"`limit` must be an integer of at least 1, got {limit!r}.")
    is_preset = isinstance(data, str) and data in PRESETS and not Path(data).exists()
    source = PRESETS[data] if is_preset else Source.of(data)
    source = _with_test_split(replace(source, **{k: v for k, v in settings.items() if v is not None}))
    try:
        entries, audio = open_rows(source, limit)
    except ValueError as error:
        if source.is_local or is_preset or "/" in source.path:
            raise
        raise ValueError(f"{error} The data sets that have a name here are {', '.join(PRESETS)}.") from error

    result = EvaluationData(data if is_preset else _name(source), source.path, [], audio)
    columns, taken = None, Counter()
    for row_name, values, folder in entries:
        columns = columns or source.columns(list(values))
        path, audio_path = values.get(columns.audio), None
        if folder is not None and isinstance(path, str) and path:
            audio_path = _relative(folder / path, Path(source.path))
        ids = (str(values[name]) for name in ID_COLUMNS if values.get(name) not in (None, ""))
        one_id = unique_id(audio_path or next(ids, row_name.removeprefix(f"{source.path} ")), taken)
        try:
            row = make_row(source, columns, row_name, values, folder)
            complete_row(row, columns, audio, allow_empty=True)
        except BadRowError as error:
            result.skip(one_id, error)
        else:
            result.rows.append({"id": one_id, "audio_path": audio_path, **row})
    if not result.rows:
        if not result.skipped:
            raise ValueError(f"{source.path!r} has no rows. Check the file.")
        causes = BadRows(one["reason"] for one in result.skipped)
        raise ValueError(f"None of the {len(result.skipped)} rows of {source.path!r} can be measured: {causes}")
    if source.is_local and (manifests := find_manifests(source)):
        content = b"".join(manifest.read_bytes() for manifest in manifests)
    else:
        content = "".join(f"{row['id']}\t{row['text']}\n" for row in result.rows).encode()
    result.sha256 = hashlib.sha256(content).hexdigest()
    return result


def _with_test_split(source: Source) -> Source:
    """Where nothing tells the split: a folder's own rows, else its or the data set's "test"."""
    folder = Path(source.path)
    if source.split is not None or (source.is_local and not folder.is_dir()):
        return source
    manifests = find_manifests(source) if folder.is_dir() else []
    is_its_own = manifests and (manifests[0].parent == folder or not (folder / "test").is_dir())
    return source if is_its_own else replace(source, split="test")


def _name(source: Source) -> str:
    """The last part of a path, and what else tells data sets of `datasets` apart."""
    path = Path(source.path)
    stem = path.parent.name if path.name.startswith("metadata.") else path.stem if path.is_file() else path.name
    parts = [stem or path.resolve().name, source.name, source.split if not path.exists() else None]
    return "-".join(part.replace("/", "-") for part in parts if part)


def _relative(path: Path, root: Path) -> str:
    root = root if root.is_dir() else root.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
