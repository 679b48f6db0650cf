# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What `mdm-asr transcribe` keeps on disk, so that a run that was killed goes on where it stopped."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str) -> None:
    """Writes a file that, whenever the process is killed, is there as a whole or as it was before."""
    from mdm_asr_hf.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")


def append_line(path: Path, line: str) -> None:
    """Appends a line and waits until it is on the disk."""
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that were written to their end, none if there is no file: a kill may have torn the last."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line.decode("utf-8", errors="replace") for line in content.split(b"\n")[:-1]]


def fingerprint(values: dict[str, Any]) -> str:
    """A short name of settings: another one if any of them is."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """
    The progress with one recording: a JSONL file with a line that says what it is about, then one for each decoded
    window, and one when everything is written. It holds for the recording as it is now and for these settings; what
    was noted for others is forgotten.

    Args:
        folder (`Path`): of the journals.
        recording (`Path`): need not exist.
        settings (`str`): the fingerprint of everything that decides the result.
        keep (`bool`): go on with what an earlier run noted. Otherwise the journal starts anew.
    """

    def __init__(self, folder: Path, recording: Path, settings: str, *, keep: bool):
        where = os.path.abspath(recording)
        # A name has 255 bytes at most, and a character up to four.
        name = f"{recording.stem[:40]}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:12]}.jsonl"
        self.path = folder / name
        self.head = {"recording": where, "settings": settings, **_identity(recording)}
        self.entries: list[dict[str, Any]] = []
        self.is_done = False
        self._is_begun = False
        if keep:
            self._load()
        else:
            self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        try:
            lines = [json.loads(line) for line in whole_lines(self.path)]
        except ValueError:
            return
        if lines[:1] != [self.head]:
            return
        self.is_done = lines[-1] == {"done": True}
        self.entries = [] if self.is_done else lines[1:]

    def add(self, entry: dict[str, Any]) -> None:
        """Notes one window's result."""
        from mdm_asr_hf.encoding_mdm_asr import json_text

        self.entries.append(entry)
        if self._is_begun:
            append_line(self.path, json_text(entry))
        else:
            # Whatever else was there, such as a torn line, goes.
            self._write(self.entries)
            self._is_begun = True

    def finish(self) -> None:
        """Notes that the result is written; the windows are no longer needed."""
        self.entries, self.is_done = [], True
        self._write([{"done": True}])

    def _write(self, entries: list[dict[str, Any]]) -> None:
        from mdm_asr_hf.encoding_mdm_asr import json_text

        lines = [json_text(one) + "\n" for one in [self.head, *entries]]
        write_atomically(self.path, "".join(lines))


def _identity(recording: Path) -> dict[str, Any]:
    """What changes when the recording does; nothing for a pipe, which cannot be read twice."""
    try:
        stat = recording.stat()
    except OSError:
        return {"size": None, "mtime_ns": None}
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


__all__ = ["Journal", "append_line", "fingerprint", "whole_lines", "write_atomically"]
