# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of manifests, and audio files of folders; without PyTorch."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import soundfile

AUDIO_COLUMNS = ("audio", "file_name", "audio_filepath", "path")
MANIFESTS = (".jsonl", ".json", ".csv", ".tsv")


def audio_suffixes() -> set[str]:
    """Of the names of audio files, in lower case."""
    return {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {".opus", ".oga"}


def find_audio_files(path: Path) -> list[Path]:
    """The audio files of a folder and of those in it, by their suffixes; of a file, itself."""
    suffixes = audio_suffixes()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix.lower() in suffixes and file.is_file()]


def read_manifest(path: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """
    Yields (name of the row, its values, folder its paths are relative to).

    Not by `datasets`, which gives a column one type: a single odd value ends the file, and a text "null" or "NA" of a
    CSV becomes none.
    """
    is_table = path.suffix in (".csv", ".tsv")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, values in _read_table(file, path) if is_table else _read_lines(file, path):
                yield f"{path} line {number}", values, path.parent
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not in UTF-8 ({error}). Save it so.") from error


def _read_lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        # Files with a byte order mark may have been put together.
        if line := line.strip("\ufeff \t\r\n"):
            yield number, parse_line(line, f"{path} line {number}")


def _read_table(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    taken: list[str] = []
    settings = {"delimiter": "\t" if path.suffix == ".tsv" else ","}
    reader = csv.DictReader((taken.append(line) or line for line in file), **settings)
    try:
        if reader.fieldnames:
            taken.clear()
        for row in reader:
            if sum(map(bool, map(str.strip, taken))) > 1:
                # Quotes are read as they come, unless one that is not closed makes one row of many.
                list(csv.reader(taken, strict=True, **settings))
            taken.clear()
            if None in row or None in row.values():
                raise ValueError(
                    f"{path} line {reader.line_num} has more or fewer fields than its header. Quote commas."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{path} line {max(reader.line_num - len(taken), 0) + 1} is no row ({error}). Is a quote not closed?"
        ) from error


def parse_line(line: str | bytes, name: str) -> dict[str, Any]:
    """The object that a line of JSON holds; `name` is the line's, for the ValueError of another one."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}). Write one object per line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object. Write one object per line.")
    return values


def unique_id(wanted: str, taken: Counter[str]) -> str:
    """The id, which is then taken, too; the second of one id has #2 behind it."""
    unique = wanted
    while unique in taken:
        taken[wanted] += 1
        unique = f"{wanted}#{taken[wanted]}"
    taken[unique] += 1
    return unique
