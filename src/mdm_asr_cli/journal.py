# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What `mdm-asr transcribe` keeps on disk, so that a run that was killed goes on where it stopped."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdm_asr_hf.transcribe.joining import DecodedWindow

DONE = {"done": True}


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
    content = path.read_bytes() if path.exists() else b""
    return [line.decode("utf-8", errors="replace") for line in content.split(b"\n")[:-1]]


class Journal:
    """
    The progress with one recording: a JSONL file with a line that says what it is about, then one for each decoded
    window, and one when everything is written. It holds for the recording as it is now and for these settings; what
    was noted for others is forgotten.

    Args:
        folder (`Path`): of the journals.
        recording (`Path`): need not exist.
        settings (`str`): of everything that decides the result.
        keep (`bool`): go on with what an earlier run noted.
    """

    def __init__(self, folder: Path, recording: Path, settings: str, *, keep: bool):
        where = os.path.abspath(recording)
        # A name has 255 bytes at most, and a character up to four.
        name = f"{recording.stem[:40]}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:12]}.jsonl"
        self.path = folder / name
        stat = os.stat(where) if os.path.exists(where) else None
        version = [stat.st_size, stat.st_mtime_ns] if stat else None
        self.head = {"recording": where, "settings": settings, "version": version}
        # By their starts: a recording is always cut the same way.
        self.windows: dict[float, dict[str, Any]] = {}
        self.is_done, self._is_begun = False, False
        try:
            head, *lines = map(json.loads, whole_lines(self.path) if keep else ())
        except ValueError:
            # None, or another program's.
            return
        if head == self.head:
            self.is_done = lines[-1:] == [DONE]
            self.windows = {} if self.is_done else {line["start_s"]: line for line in lines}

    def known(self, start_s: float) -> "DecodedWindow | None":
        """What was noted of the window that starts there."""
        from mdm_asr_hf.transcribe.joining import DecodedWindow

        return DecodedWindow(**self.windows[start_s]) if start_s in self.windows else None

    def add(self, window: "DecodedWindow") -> None:
        """Notes one window's result."""
        from mdm_asr_hf.encoding_mdm_asr import json_text

        self.windows[window.start_s] = asdict(window)
        if self._is_begun:
            append_line(self.path, json_text(self.windows[window.start_s]))
        else:
            # Whatever else was there, such as a torn line, goes.
            self._write(*self.windows.values())
            self._is_begun = True

    def finish(self) -> None:
        """Notes that the result is written; the windows are no longer needed."""
        self.windows, self.is_done = {}, True
        self._write(DONE)

    def _write(self, *lines: dict[str, Any]) -> None:
        from mdm_asr_hf.encoding_mdm_asr import json_text

        write_atomically(self.path, "".join(json_text(one) + "\n" for one in [self.head, *lines]))
