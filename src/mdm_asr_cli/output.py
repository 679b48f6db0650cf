# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Where `mdm-asr transcribe` puts its results: on stdout, into a file per recording, or into one of JSON lines."""

import hashlib
import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .journal import Journal, append_line, whole_lines, write_atomically

if TYPE_CHECKING:
    from mdm_asr_hf.transcribe.joining import DecodedWindow
    from mdm_asr_hf.transcribe.transcript import Transcript

JOURNAL_FOLDER = ".mdm-asr"
# Of file systems in common use.
MAX_NAME_BYTES = 255
# What gets times.
Timestamps = Literal["segment", "word"]


class Format(StrEnum):
    """Of files, by their suffixes; typer takes no list of literals."""

    txt = "txt"
    json = "json"
    srt = "srt"
    vtt = "vtt"


class Writer:
    """
    Prints results, in one format. Others write files, and keep a [`Journal`] of each recording.

    Args:
        files (`list[Path]`): the recordings.
        formats (`list[Format]`): of the results.
        timestamps ([`Timestamps`], *optional*): in JSON.
        journal_folder (`Path`, *optional*): for journals.
        resume (`bool`): go on with what these note.
    """

    def __init__(
        self,
        files: list[Path],
        formats: list[Format],
        timestamps: Timestamps | None,
        journal_folder: Path | None = None,
        resume: bool = False,
    ):
        self.files, self.formats, self.timestamps = files, formats, timestamps
        self.journal_folder, self.resume = journal_folder, resume
        # Subtitles begin with words.
        self.wants_times = any(one in (Format.srt, Format.vtt) for one in formats)
        self.journals: dict[Path, Journal] = {}

    def prepare(self, settings: str) -> None:
        """Called once before the first file, with everything that decides the results."""
        if self.journal_folder is not None:
            for path in self.files:
                self.journals[path] = Journal(self.journal_folder, path, settings, keep=self.resume)

    def is_done(self, path: Path) -> bool:
        return path in self.journals and self.journals[path].is_done

    def known_window(self, path: Path, window: Any) -> "DecodedWindow | None":
        return self.journals[path].known(window.start_s) if path in self.journals else None

    def keep_window(self, path: Path, window: "DecodedWindow") -> None:
        if path in self.journals:
            self.journals[path].add(window)

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.encoding_mdm_asr import json_text
        from mdm_asr_hf.transcribe.subtitles import WRITERS

        if self.wants_times:
            print(WRITERS[self.formats[0]](transcript), end="", flush=True)
        elif self.formats == [Format.json]:
            print(json_text(json_row(path, transcript, self.timestamps), sys.stdout.encoding), flush=True)
        else:
            print(transcript.text if len(self.files) == 1 else f"{path}\t{transcript.text}", flush=True)


class FolderWriter(Writer):
    """Writes a file per recording and format."""

    def __init__(
        self, files: list[Path], formats: list[Format], timestamps: Timestamps | None, folder: Path, resume: bool
    ):
        super().__init__(files, formats, timestamps, folder / JOURNAL_FOLDER, resume)
        self.folder = folder
        owners: dict[str, Path] = {}
        for path in files:
            other = owners.setdefault(path.stem.casefold(), path)
            if other is not path:
                raise ValueError(
                    f"`--output-dir`: {str(other)!r} and {str(path)!r} would both be written to "
                    f"{str(self._target(path, formats[0]))!r}. Rename one, or collect all of them with `--output "
                    "FILE.jsonl`."
                )

    def prepare(self, settings: str) -> None:
        super().prepare(settings)
        for path, journal in self.journals.items():
            journal.is_done &= all(self._target(path, one).is_file() for one in self.formats)

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.transcribe.subtitles import WRITERS, to_json

        for one in self.formats:
            content = to_json(transcript, str(path)) if one is Format.json else WRITERS[one](transcript)
            write_atomically(self._target(path, one), content)
        self.journals[path].finish()

    def _target(self, path: Path, format: Format) -> Path:
        suffix, stem = f".{format.value}", os.fsencode(path.stem)
        if len(stem) + len(suffix) <= MAX_NAME_BYTES:
            return self.folder / (path.stem + suffix)
        # Which tells it from others that begin alike.
        suffix = f"-{hashlib.sha256(stem).hexdigest()[:8]}{suffix}"
        return self.folder / (stem[: MAX_NAME_BYTES - len(suffix)].decode(errors="ignore") + suffix)


class LinesWriter(Writer):
    """Appends a line of JSON per recording to one file."""

    def __init__(self, files: list[Path], timestamps: Timestamps | None, target: Path, resume: bool):
        super().__init__(files, [Format.json], timestamps, target.parent / JOURNAL_FOLDER / target.name, resume)
        self.target = target
        if len(set(files)) < len(files):
            twice = next(path for i, path in enumerate(files) if path in files[:i])
            raise ValueError(f"`FILE` {str(twice)!r} is given twice. Name it once.")
        if target.exists() and not resume:
            raise ValueError(
                f"`--output {target}` exists. Pass `--resume` to add what it lacks, or remove it to start anew."
            )

    def prepare(self, settings: str) -> None:
        super().prepare(settings)
        lines = {}
        for line in whole_lines(self.target):
            try:
                lines[Path(json.loads(line)["file"])] = f"{line}\n"
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"`--output {self.target}` holds lines that `mdm-asr transcribe` did not write. Choose another."
                ) from error
        for path, journal in self.journals.items():
            journal.is_done &= path in lines
            # Lines of other recordings stay. Those of recordings that are to be done anew go.
            if not journal.is_done:
                lines.pop(path, None)
        write_atomically(self.target, "".join(lines.values()))

    def write(self, path: Path, transcript: "Transcript") -> None:
        from mdm_asr_hf.encoding_mdm_asr import json_text

        append_line(self.target, json_text(json_row(path, transcript, self.timestamps)))
        self.journals[path].finish()


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
    formats = list(dict.fromkeys([*formats, *([Format.json] if as_json else [])])) or [Format.txt]
    if len(formats) > 1:
        raise ValueError("Several formats cannot be printed at once. Pass `--output-dir`, or one of them.")
    writer = Writer(files, formats, timestamps)
    if writer.wants_times and len(files) > 1:
        raise ValueError(f"`--format {formats[0]}` of several files cannot be printed. Pass `--output-dir`.")
    return writer


def json_row(path: Path, transcript: "Transcript", timestamps: Timestamps | None = None) -> dict[str, Any]:
    """What `--json` prints of a file."""
    values = transcript.to_dict()
    row = {"file": str(path), **{name: values[name] for name in ("text", "confidence", "nfe", "duration_s")}}
    if transcript.language is not None:
        row["language"] = transcript.language
    if timestamps is not None:
        row["segments"] = values["segments"]
        for segment in row["segments"] if timestamps == "segment" else ():
            del segment["words"]
    return row
