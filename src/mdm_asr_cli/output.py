# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Where `mdm-asr transcribe` puts its results: on stdout, into a file per recording, or into one of JSON lines."""

import hashlib
import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .journal import Journal, append_line, whole_lines, write_atomically

if TYPE_CHECKING:
    from mdm_asr_hf.transcribe.transcript import Transcript

JOURNAL_FOLDER = ".mdm-asr"
# Of file systems in common use.
MAX_NAME_BYTES = 255


class Format(StrEnum):
    """Of files, by their suffixes."""

    txt = "txt"
    json = "json"
    srt = "srt"
    vtt = "vtt"


class Timestamps(StrEnum):
    """What gets times."""

    segment = "segment"
    word = "word"


class Writer:
    """Prints results; the other writers put them into files and keep journals."""

    wants_times = False

    def __init__(self, files: list[Path], as_json: bool, timestamps: Timestamps | None):
        self.is_single, self.as_json, self.timestamps = len(files) == 1, as_json, timestamps

    def prepare(self, settings: str) -> None:
        """Called once before the first file, with the fingerprint of everything that decides the results."""

    def is_done(self, path: Path) -> bool:
        return False

    def known_window(self, path: Path, window: Any) -> Any:
        return None

    def keep_window(self, path: Path, window: Any) -> None:
        pass

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.encoding_mdm_asr import json_text

        if self.as_json:
            print(json_text(json_row(path, transcript, self.timestamps), sys.stdout.encoding), flush=True)
        else:
            print(transcript.text if self.is_single else f"{path}\t{transcript.text}", flush=True)


class SubtitlePrinter(Writer):
    """Prints one file's subtitles."""

    wants_times = True

    def __init__(self, files: list[Path], format: Format):
        super().__init__(files, False, None)
        self.format = format

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.transcribe.subtitles import WRITERS

        print(WRITERS[self.format](transcript), end="", flush=True)


class JournalingWriter(Writer):
    """Keeps, for each recording, what was decoded of it until its result is written."""

    def __init__(self, files: list[Path], timestamps: Timestamps | None, journal_folder: Path, resume: bool):
        super().__init__(files, True, timestamps)
        self.files, self.journal_folder, self.resume = files, journal_folder, resume
        self.journals: dict[Path, Journal] = {}
        self.known: dict[Path, dict[tuple, dict]] = {}

    def prepare(self, settings: str) -> None:
        for path in self.files:
            journal = Journal(self.journal_folder, path, settings, keep=self.resume)
            self.journals[path] = journal
            self.known[path] = {_window_key(entry): entry for entry in journal.entries}

    def is_done(self, path: Path) -> bool:
        return self.journals[path].is_done

    def known_window(self, path: Path, window: Any) -> Any:
        from mdm_asr_hf.transcribe.joining import DecodedWindow

        entry = self.known[path].get(_window_key(vars(window)))
        if entry is None:
            return None
        times_s = entry["times_s"]
        return DecodedWindow(**entry | {"times_s": None if times_s is None else [tuple(one) for one in times_s]})

    def keep_window(self, path: Path, window: Any) -> None:
        self.journals[path].add(asdict(window))

    def finish(self, path: Path) -> None:
        self.journals[path].finish()
        self.known[path] = {}


class FolderWriter(JournalingWriter):
    """Writes a file per recording and format."""

    def __init__(
        self, files: list[Path], formats: list[Format], timestamps: Timestamps | None, folder: Path, resume: bool
    ):
        super().__init__(files, timestamps, folder / JOURNAL_FOLDER, resume)
        self.formats, self.folder = formats, folder
        self.wants_times = any(one in (Format.srt, Format.vtt) for one in formats)
        owners: dict[str, Path] = {}
        for path in files:
            other = owners.setdefault(path.stem.casefold(), path)
            if other is not path:
                raise ValueError(
                    f"`--output-dir`: {str(other)!r} and {str(path)!r} would both be written to "
                    f"{str(self._target(path, formats[0]))!r}. Rename one, or collect all of them with `--output "
                    "FILE.jsonl`."
                )

    def is_done(self, path: Path) -> bool:
        return super().is_done(path) and all(self._target(path, one).is_file() for one in self.formats)

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.transcribe.subtitles import WRITERS, to_json

        for one in self.formats:
            content = to_json(transcript, str(path)) if one is Format.json else WRITERS[one](transcript)
            write_atomically(self._target(path, one), content)
        self.finish(path)

    def _target(self, path: Path, format: Format) -> Path:
        suffix = f".{format.value}"
        return self.folder / (_shortened(path.stem, MAX_NAME_BYTES - len(suffix)) + suffix)


def _shortened(stem: str, num_bytes: int) -> str:
    """A name of at most so many bytes, which tells it from others that begin alike."""
    raw = os.fsencode(stem)
    if len(raw) <= num_bytes:
        return stem
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return f"{raw[: num_bytes - len(digest) - 1].decode('utf-8', errors='ignore')}-{digest}"


class LinesWriter(JournalingWriter):
    """Appends a line of JSON per recording to one file."""

    def __init__(self, files: list[Path], timestamps: Timestamps | None, target: Path, resume: bool):
        super().__init__(files, timestamps, target.parent / JOURNAL_FOLDER / target.name, resume)
        self.target = target
        self.present: set[str] = set()
        if len(set(files)) < len(files):
            twice = next(path for i, path in enumerate(files) if path in files[:i])
            raise ValueError(f"`FILE` {str(twice)!r} is given twice. Name it once.")
        if target.exists() and not resume:
            raise ValueError(
                f"`--output {target}` exists. Pass `--resume` to add what it lacks, or remove it to start anew."
            )

    def prepare(self, settings: str) -> None:
        super().prepare(settings)
        if not self.target.exists():
            write_atomically(self.target, "")
            return
        kept = []
        for line in whole_lines(self.target):
            try:
                name = json.loads(line)["file"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"`--output {self.target}` holds lines that `mdm-asr transcribe` did not write. Choose another."
                ) from error
            # Lines of other recordings stay. Those of recordings that are to be done anew go.
            journal = self.journals.get(Path(name))
            if journal is None or journal.is_done:
                kept.append(line)
                self.present.add(name)
        write_atomically(self.target, "".join(f"{line}\n" for line in kept))

    def is_done(self, path: Path) -> bool:
        return super().is_done(path) and str(path) in self.present

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.encoding_mdm_asr import json_text

        append_line(self.target, json_text(json_row(path, transcript, self.timestamps)))
        self.finish(path)


def make_writer(
    files: list[Path],
    formats: list[Format],
    *,
    as_json: bool,
    output_dir: Path | None,
    output: Path | None,
    resume: bool,
    timestamps: Timestamps | None,
) -> Writer:
    """
    What the options about output ask for.

    Raises:
        ValueError: options that contradict each other.
    """
    if output_dir is not None and output is not None:
        raise ValueError("`--output-dir` and `--output` both say where to write. Pass one of them.")
    if output_dir is not None:
        if as_json:
            raise ValueError("`--json` prints lines. For files in `--output-dir`, pass `--format json`.")
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f"`--output-dir {output_dir}` is a file. Choose a folder, or pass `--output`.")
        return FolderWriter(files, formats or [Format.txt], timestamps, output_dir, resume)
    if output is not None:
        if formats not in ([], [Format.json]):
            raise ValueError("`--output` is a file of JSON lines. For other formats, pass `--output-dir`.")
        if output.is_dir():
            raise ValueError(f"`--output {output}` is a folder. Name a file in it, or pass `--output-dir`.")
        return LinesWriter(files, timestamps, output, resume)
    if resume:
        raise ValueError("`--resume` needs results in files. Pass `--output-dir` or `--output`, as in the first run.")
    if len(formats) > 1 or (as_json and formats not in ([], [Format.json])):
        raise ValueError("Several formats cannot be printed at once. Pass `--output-dir`, or one of them.")
    if formats in ([Format.srt], [Format.vtt]):
        if len(files) > 1:
            raise ValueError(f"`--format {formats[0]}` of several files cannot be printed. Pass `--output-dir`.")
        return SubtitlePrinter(files, formats[0])
    return Writer(files, as_json or formats == [Format.json], timestamps)


def json_row(path: Path, transcript: "Transcript", timestamps: Timestamps | None = None) -> dict[str, Any]:
    """What `--json` prints of a file."""
    values = transcript.to_dict()
    row = {"file": str(path), **{name: values[name] for name in ("text", "confidence", "nfe")}}
    row["duration_s"] = values["duration_s"]
    if transcript.language is not None:
        row["language"] = transcript.language
    if timestamps is not None:
        row["segments"] = values["segments"]
        for segment in row["segments"] if timestamps is Timestamps.segment else ():
            del segment["words"]
    return row


def _window_key(window: dict[str, Any]) -> tuple[float, ...]:
    return tuple(window[name] for name in ("start_s", "end_s", "overlap_before_s", "overlap_after_s"))


__all__ = ["Format", "Timestamps", "Writer", "json_row", "make_writer"]
