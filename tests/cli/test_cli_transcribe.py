# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr transcribe` with files as output: formats, batches with bad files, and going on after a kill."""

import html
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import srt
import webvtt
from demo_recording import RECORDING, TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import each
from tiny_data import save_model
from tiny_models import tiny_model, tiny_processor

import mdm_asr_cli.app as cli
from mdm_asr_cli import journal, output
from mdm_asr_cli.journal import Journal, whole_lines, write_atomically
from mdm_asr_cli.options import split_words
from mdm_asr_cli.terminal import print_anything
from mdm_asr_cli.transcribe import _header_duration_s, progress_bar
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.loading import load_model
from mdm_asr_hf.transcribe.subtitles import to_json
from mdm_asr_hf.transcribe.transcriber import Transcriber
from mdm_asr_hf.transcribe.transcript import Segment, Transcript, Word

RATE_HZ = 16_000


@pytest.fixture
def run(run_command):
    """Runs the command in this process; gives exit code, the lines on stdout and those on stderr."""

    def run(*arguments):
        code, out, err = run_command(*arguments)
        # A random model may not end its text. This warning has a test of its own, with a real one.
        expected = ("and no end, so", "more like this")
        return code, out.splitlines(), [line for line in err.splitlines() if not any(one in line for one in expected)]

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random checkpoint, whose text is letters without sense."""
    return save_model(tmp_path_factory.mktemp("tiny"), tiny_model(), tiny_processor())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A long recording, 24 s of bursts and pauses, and two short ones."""
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for name, seconds in (("talk", 24), ("hello", 1), ("bye", 2)):
        times_s = np.arange(seconds * RATE_HZ) / RATE_HZ
        loudness = np.where(times_s % 1.5 < 1.0, 0.2, 1e-4)
        tone = np.sin(2 * np.pi * (200 + 40 * np.floor(times_s / 1.5)) * times_s)
        samples = loudness * (tone + 0.3 * random.standard_normal(len(times_s)))
        soundfile.write(folder / f"{name}.wav", samples / 2, RATE_HZ)
    return [folder / f"{name}.wav" for name in ("hello", "talk", "bye")]


# Windows of 3 s: several for the long recording, whose cuts need no extra package.
WINDOWS = ("--window-s", 3, "--vad", "energy")


def contents(folder):
    """Name -> bytes of a folder's files, journals left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_lines(lines, others):
    """Equal but for the last digits of confidences, which depend on how windows were batched."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(one) for key, one in value.items()}
        if isinstance(value, list):
            return [rounded(one) for one in value]
        return round(value, 4) if isinstance(value, float) else value

    return rounded(lines) == rounded(others)


# --- stdin and URLs ---


@each("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_file_on_stdin(run, tiny, recordings, monkeypatch, format):
    content = io.BytesIO()
    soundfile.write(content, soundfile.read(recordings[0])[0], RATE_HZ, format=format)

    def on_stdin(content, *arguments, is_terminal=False):
        stdin = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: is_terminal)
        monkeypatch.setattr(sys, "stdin", stdin)
        return run("transcribe", *arguments, "--model", tiny)

    code, (line, other), err = on_stdin(content.getvalue(), "-", recordings[2])
    transcriber = Transcriber(*load_model(str(tiny)))
    assert (code, err) == (0, []) and line == f"-\t{transcriber.transcribe(content.getvalue()).text}"
    assert other == f"{recordings[2]}\t{transcriber.transcribe(recordings[2]).text}"
    if format == "WAV":
        for content, options, message in (
            (b"", ["-"], "empty"),
            (bytes(3200), ["-"], "not audio of a format that can be read"),
            (b"", ["-", "-"], "given twice"),
            (b"", ["-", "--resume", "--output", "x.jsonl"], "--resume"),
        ):
            code, out, err = on_stdin(content, *options)
            assert (code, out, len(err)) == (1, [], 1) and message in err[0]
        assert "is a terminal" in on_stdin(b"", "-", is_terminal=True)[2][0]


# --- encodings ---


@pytest.fixture
def stdout(monkeypatch):
    """Gives stdout an encoding, and what returns the bytes that it got since."""

    def make(encoding):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        monkeypatch.setattr(sys, "stdout", out)
        print_anything()
        return out.buffer.getvalue

    return make


# A byte that is no UTF-8, and characters that most encodings lack, one of them of four bytes.
NAMES = [b"caf\xe9.wav", "\u65e5\u672c\U0001f600.wav".encode(), "\U0001f600".encode() * 60 + b".wav"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_of_any_bytes(run, tiny, recordings, tmp_path):
    files = [tmp_path / os.fsdecode(name) for name in NAMES]
    for file in files:
        shutil.copy(recordings[0], file)
    folder, lines = tmp_path / "out", tmp_path / "all.jsonl"
    for place in (("--output", lines), ("--output-dir", folder, "--format", "json", "--format", "srt")):
        for resume in ((), ("--resume",)):
            assert run("transcribe", *files, "--model", tiny, *WINDOWS, *place, *resume) == (0, [], [])
    assert [row["file"] for row in lines_of(lines)] == list(map(str, files))
    assert [json.loads((folder / f"{one.stem}.json").read_text())["file"] for one in files] == list(map(str, files))
    # The journals were read again: what is done is not done anew.
    journals = [path.read_bytes() for path in tmp_path.rglob("*.jsonl") if path.is_file() and path != lines]
    assert len(journals) == 6 and all(content.endswith(b'{"done": true}\n') for content in journals)
    # As the progress bar asks.
    assert [round(_header_duration_s(file)) for file in files] == [1, 1, 1]
    code, _, err = run("transcribe", tmp_path / os.fsdecode(b"\xff.wav"), "--model", tiny)
    assert code == 1 and "\\udcff.wav' does not exist" in err[0]


@each("encoding", ["ascii", "cp1252", "shift_jis", "utf-8"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), name=st.binary(min_size=1, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_transcript_is_printed_in_every_encoding(stdout, encoding, text, name):
    text, path = " ".join(text.split()), Path(os.fsdecode(name.replace(b"\0", b"a")))
    words = [Word(text, 0.0, 1.0, 0.5)] if text else []
    transcript = Transcript(text, 1.0, [Segment(0.0, 1.0, text, words, 0.5, 1)])
    printed = stdout(encoding)
    output.Writer([path, path], [output.Format.json], None).write(path, transcript)
    row = json.loads(printed().decode(encoding))
    assert (row["file"], row["text"]) == (str(path), text)
    printed = stdout(encoding)
    output.Writer([path, path], [output.Format.txt], None).write(path, transcript)
    if encoding == "utf-8":
        # As the file system has it.
        assert printed() == os.fsencode(path) + b"\t" + text.encode() + b"\n"
    elif text.isascii():
        assert printed().endswith(b"\t" + text.encode() + b"\n")
    printed = stdout(encoding)
    output.Writer([path], [output.Format.srt], None).write(path, transcript)
    assert printed().isascii() or not text.isascii()
    assert json.loads(to_json(transcript, str(path)).encode())["file"] == str(path)


# --- formats ---


def test_a_file_per_recording_and_format(run, tiny, recordings, tmp_path):
    out_dir = tmp_path / "deep" / "out"
    formats = [option for one in ("txt", "json", "srt", "vtt") for option in ("--format", one)]
    code, out, err = run("transcribe", *recordings, "--model", tiny, *WINDOWS, "--output-dir", out_dir, *formats)
    assert (code, out, err) == (0, [], [])
    names = {f"{path.stem}.{suffix}" for path in recordings for suffix in ("txt", "json", "srt", "vtt")}
    assert set(contents(out_dir)) == names
    for path in recordings:
        values = json.loads((out_dir / f"{path.stem}.json").read_text())
        assert values["file"] == str(path) and values["duration_s"] == soundfile.info(path).duration
        words = values["text"].split()
        assert words == (out_dir / f"{path.stem}.txt").read_text().split() and words
        cues = list(srt.parse((out_dir / f"{path.stem}.srt").read_text()))
        others = webvtt.read(out_dir / f"{path.stem}.vtt")
        assert [cue.content for cue in cues] == [html.unescape(one.raw_text) for one in others]
        assert "".join("".join(cue.content.split()) for cue in cues) == "".join(words)
        # Subtitles come with times of words, so that cues begin with words and not with windows.
        assert all(word["start_s"] is not None for segment in values["segments"] for word in segment["words"])
        assert cues[-1].end.total_seconds() <= values["duration_s"] + 0.01
    assert len(json.loads((out_dir / "talk.json").read_text())["segments"]) >= 8


def test_subtitles_and_json_with_times(run, recordings, tiny):
    code, out, err = run("transcribe", RECORDING, "--format", "srt")
    cues = list(srt.parse("\n".join(out) + "\n"))
    assert (code, err) == (0, []) and " ".join(" ".join(cue.content.split()) for cue in cues) == TEXT
    assert run("transcribe", RECORDING, "--format", "vtt")[1][0] == "WEBVTT"
    assert run("transcribe", RECORDING, "--format", "txt")[1] == [TEXT]

    def row(*options):
        return json.loads(run("transcribe", recordings[1], "--model", tiny, *WINDOWS, *options)[1][0])

    plain, segments, words = (
        row("--json"),
        row("--json", "--timestamps", "segment"),
        row("--format", "json", "--timestamps", "word"),
    )
    assert list(plain) == ["file", "text", "confidence", "nfe", "duration_s"]
    assert list(segments) == list(words) == [*plain, "segments"]
    assert plain["text"] == segments["text"] == words["text"]
    assert all("words" not in one for one in segments["segments"])
    times = [(one["start_s"], one["end_s"]) for segment in words["segments"] for one in segment["words"]]
    assert len(times) == len(plain["text"].split())
    assert all(0 <= start <= end <= plain["duration_s"] for start, end in times)


@each(
    "options, message",
    [
        (["--resume"], "--output-dir"),
        (["--format", "srt", "--format", "vtt"], "--output-dir"),
        (["--json", "--format", "txt"], "--output-dir"),
        (["--format", "srt"], "several files"),
        (["--output-dir", "FOLDER", "--output", "FOLDER/a.jsonl"], "Pass one"),
        (["--output-dir", "FOLDER", "--json"], "--format json"),
        (["--output", "FOLDER"], "is a folder"),
        (["--output", "FOLDER/a.jsonl", "--format", "srt"], "--output-dir"),
        (["--output", "FOLDER/present.txt"], "--resume"),
        (["--output", "FOLDER/present.txt", "--resume"], "did not write"),
        (["--output-dir", "FOLDER/present.txt"], "is a file"),
    ],
)
def test_options_that_contradict_give_one_line(run, recordings, tiny, tmp_path, options, message):
    (tmp_path / "present.txt").write_text("precious\n")
    options = [option.replace("FOLDER", str(tmp_path)) for option in options]
    code, out, err = run("transcribe", *recordings, "--model", tiny, *options)
    assert (code, out, len(err)) == (1, [], 1) and err[0].startswith("error: ") and message in err[0]
    assert (tmp_path / "present.txt").read_text() == "precious\n"


def test_the_longest_names_are_shortened(run, tiny, recordings, tmp_path):
    names = ["a" * 251, "a" * 250 + "b", "ä" * 125, "c" * 250]
    for name in names:
        (tmp_path / f"{name}.wav").write_bytes(recordings[0].read_bytes())
    command = ("transcribe", *sorted(tmp_path.glob("*.wav")), "--model", tiny, "--output-dir", tmp_path / "out")
    for options in (("--format", "json"), ("--format", "json", "--resume"), ("--format", "srt", "--format", "vtt")):
        code, _, err = run(*command, *options)
        assert (code, err) == (0, [])
    written = [path.name for path in (tmp_path / "out").glob("*.*") if path.is_file()]
    assert len(written) == 12 and all(len(name.encode()) <= 255 for name in written)
    assert {f"{'c' * 250}.json", f"{'ä' * 125}.json", f"{'a' * 251}.srt"} <= set(written)


def test_results_that_would_overwrite_each_other_or_nowhere_are_refused(run, tiny, recordings, tmp_path):
    code, out, err = run(
        "transcribe", recordings[0], tmp_path / "Hello.mp3", "--model", tiny, "--output-dir", tmp_path
    )
    assert (code, out, len(err)) == (1, [], 1) and "hello.wav" in err[0] and "Hello.mp3" in err[0]
    code, out, err = run("transcribe", *recordings[:1] * 2, "--model", tiny, "--output", tmp_path / "out.jsonl")
    assert (code, out, len(err)) == (1, [], 1) and "twice" in err[0]

    code, out, err = run("transcribe", *recordings, "--model", tiny, "--output-dir", "/proc/nowhere")
    assert (code, out, len(err)) == (1, [], 1) and "/proc" in err[0]


# --- batches ---


def test_bad_files_and_warnings_are_named_and_the_others_done(run, tiny, recordings, tmp_path, run_command):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(recordings[1].read_bytes()[:200_000])
    files = [recordings[0], bad, *recordings[1:]]
    alone = [run("transcribe", path, "--model", tiny, *WINDOWS)[1][0] for path in recordings]
    code, out, err = run("transcribe", *files, "--model", tiny, *WINDOWS, "--batch-size", 16)
    assert code == 1 and out == [f"{path}\t{text}" for path, text in zip(recordings, alone, strict=True)]
    assert len(err) == 1 and str(bad) in err[0] and "truncated" in err[0]
    code, out, err = run("transcribe", *files, "--model", tiny, *WINDOWS, "--output-dir", tmp_path / "out")
    assert (code, out, len(err)) == (1, [], 1)
    assert set(contents(tmp_path / "out")) == {f"{path.stem}.txt" for path in recordings}

    code, _, err = run_command("transcribe", recordings[1], "--model", tiny, *WINDOWS)
    err = err.splitlines()
    assert code == 0 and len(err) == 4 and all(line.startswith(f"warning: {recordings[1]}: ") for line in err)
    assert "From 0.0 to" in err[0] and int(err[3].split()[-4]) >= 5


def test_batch_size_changes_no_text(run, tmp_path):
    """On real speech, whole and in pieces."""
    samples = load_audio(RECORDING)
    pieces = [samples, *np.array_split(samples, 2)]
    for i, piece in enumerate(pieces):
        soundfile.write(tmp_path / f"{i}.wav", piece, RATE_HZ)
    files = sorted(tmp_path.glob("*.wav"))
    one, sixteen = (run("transcribe", "--json", *files, "--batch-size", n) for n in (1, 16))
    assert (one[0], one[2]) == (0, []) and len(one[1]) == len(pieces)
    assert same_lines(list(map(json.loads, one[1])), list(map(json.loads, sixteen[1])))
    assert json.loads(one[1][0])["text"] == TEXT


# --- going on ---


class Killed(BaseException):
    """Stops the command as abruptly as a test in one process can."""


@pytest.fixture
def kill_after(monkeypatch):
    """Makes the process 'die' when it has noted so many windows; gives a list that counts them."""

    add = Journal.add

    def kill_after(num_windows, torn=False):
        noted = []

        def add_or_die(journal, entry):
            if len(noted) == num_windows:
                if torn:
                    # Killed amid the writing of a line.
                    with open(journal.path, "a") as file:
                        file.write(json.dumps(vars(entry))[:20])
                raise Killed
            add(journal, entry)
            noted.append(entry)

        monkeypatch.setattr(journal.Journal, "add", add_or_die)
        return noted

    return kill_after


def outcome(run, *arguments):
    try:
        return run("transcribe", *arguments)
    except Killed:
        return None


@pytest.fixture(scope="module")
def uninterrupted(tiny, recordings, tmp_path_factory):
    """What a run that nobody kills writes: a folder and a file of lines."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for target in (["--output-dir", folder / "out", *FORMATS], ["--output", folder / "all.jsonl", *TIMES]):
        command = ["transcribe", *recordings, "--model", tiny, *WINDOWS, "--batch-size", 1, *target]
        cli.app([*map(str, command)], standalone_mode=False)
    return folder


FORMATS = ("--format", "srt", "--format", "txt")
TIMES = ("--timestamps", "word")


@each("num_windows, torn", [(0, False), (1, True), (4, True)])
def test_a_killed_run_goes_on(run, tiny, recordings, uninterrupted, tmp_path, kill_after, num_windows, torn):
    folder = tmp_path / "out"
    options = ("--model", tiny, *WINDOWS, "--batch-size", 1, "--output-dir", folder, *FORMATS, "--resume")
    kept = kill_after(num_windows, torn)
    assert outcome(run, *recordings, *options) is None and len(kept) == num_windows
    added = kill_after(1000)
    assert outcome(run, *recordings, *options) == (0, [], [])
    assert contents(folder) == contents(uninterrupted / "out")
    # Nothing is decoded twice: all windows are 10 or more, and those kept are not among those added.
    assert len(kept) + len(added) >= 10 and not any(one in kept for one in added)
    # What is done stays done.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    del added[:]
    assert outcome(run, *recordings, *options) == (0, [], []) and added == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_killed_run_goes_on_in_a_file_of_lines(run, tiny, recordings, uninterrupted, tmp_path, kill_after):
    target = tmp_path / "all.jsonl"
    options = ("--model", tiny, *WINDOWS, "--batch-size", 1, "--output", target, *TIMES)
    kill_after(5)
    assert outcome(run, *recordings, *options) is None
    kill_after(1000)
    # Without --resume, nothing is lost by mistake.
    code, _, err = run("transcribe", *recordings, *options)
    assert code == 1 and "--resume" in err[0]
    with open(target, "a") as file:
        file.write('{"file": "torn')
    assert run("transcribe", *recordings, *options, "--resume") == (0, [], [])
    assert same_lines(lines_of(target), lines_of(uninterrupted / "all.jsonl"))
    content = target.read_bytes()
    assert run("transcribe", *recordings, *options, "--resume") == (0, [], []) and target.read_bytes() == content


@each("kind", ["folder", "lines"])
def test_killed_between_result_and_journal(run, tiny, recordings, uninterrupted, tmp_path, monkeypatch, kind):
    """The result is on the disk, but was not noted as such: it is written again, not twice."""
    target = {
        "folder": ("--output-dir", tmp_path / "out", *FORMATS),
        "lines": ("--output", tmp_path / "all.jsonl", *TIMES),
    }[kind]

    def die(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "finish", die)
        assert outcome(run, *recordings, "--model", tiny, *WINDOWS, *target) is None
    assert run("transcribe", *recordings, "--model", tiny, *WINDOWS, *target, "--resume") == (0, [], [])
    if kind == "folder":
        assert contents(tmp_path / "out") == contents(uninterrupted / "out")
    else:
        assert same_lines(lines_of(tmp_path / "all.jsonl"), lines_of(uninterrupted / "all.jsonl"))


def test_what_changed_is_done_anew(run, tiny, recordings, tmp_path, kill_after):
    files = [shutil.copy2(path, tmp_path) for path in recordings]
    folder = tmp_path / "out"

    def num_decoded(*options):
        noted = kill_after(1000)
        code, _, err = run(
            "transcribe", *files, "--model", tiny, *WINDOWS, "--output-dir", folder, "--resume", *options
        )
        assert (code, err) == (0, [])
        return len(noted)

    everything = num_decoded()
    assert num_decoded() == 0
    # The batch size decides nothing. Steps, prompts and windows do.
    assert num_decoded("--batch-size", 3) == 0
    assert num_decoded("--steps", 3) == everything
    assert num_decoded("--steps", 3) == 0
    # A recording that was edited: the short ones have one window each.
    os.utime(files[0], (1, 1))
    assert num_decoded("--steps", 3) == 1
    # A result that was deleted, and a format that is new.
    (folder / "bye.txt").unlink()
    assert num_decoded("--steps", 3) == 1 and (folder / "bye.txt").exists()
    assert num_decoded("--steps", 3, "--format", "json", "--format", "txt") == everything
    # Without --resume, everything is.
    noted = kill_after(1000)
    assert run("transcribe", *files, "--model", tiny, *WINDOWS, "--output-dir", folder)[0] == 0
    assert len(noted) == everything


def test_sigkill_amid_a_long_recording(run, tiny, recordings, uninterrupted, tmp_path):
    """A real kill of a real process, when half of the windows are decoded."""
    folder = tmp_path / "out"
    options = ("--model", tiny, *WINDOWS, "--batch-size", 1, "--output-dir", folder, *FORMATS)
    add, noted = Journal.add, []

    def add_and_die(journal, entry):
        add(journal, entry)
        noted.append(entry)
        if len(noted) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            Journal.add = add_and_die
            cli.app([*map(str, ["transcribe", *recordings, *options])], standalone_mode=False)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    journals = list((folder / output.JOURNAL_FOLDER).iterdir())
    assert sum(len(whole_lines(path)) - 1 for path in journals) == 5 and contents(folder) == {}
    assert run("transcribe", *recordings, *options, "--resume") == (0, [], [])
    assert contents(folder) == contents(uninterrupted / "out")


def test_files_are_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "before")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(journal.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "after")
    assert path.read_text() == "before" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o666


# --- progress ---


def test_progress_counts_seconds_of_audio(recordings, monkeypatch, tiny):
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = progress_bar([*recordings, Path("missing.wav")])
    assert not bar.disable and bar.tasks[0].total == 27.0
    bar.advance(bar.task_ids[0], 13.0)
    assert not bar.finished
    bar.advance(bar.task_ids[0], 14.0)
    assert bar.finished

    seconds = []
    transcriber = Transcriber(tiny_model(), tiny_processor(), max_window_s=3.0, vad="energy")
    assert len(list(transcriber.transcribe_all(recordings, on_progress=seconds.append))) == 3
    assert sum(seconds) == pytest.approx(27.0) and min(seconds) > 0


def test_hotwords_of_a_file(run, tiny, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As other systems write them: with a byte-order mark, in lines of their own end, or parted by commas.
    Path("words.txt").write_bytes("\ufeffQuilter\r\nOlbinett, Mulrady\n\n".encode())
    Path("Müller").write_text("Kubernetes", "utf-8")
    for entry, words in (
        (["@words.txt"], ["Quilter", "Olbinett", "Mulrady"]),
        (["AC/DC, Node.js,", "@Müller"], ["AC/DC", "Node.js", "Kubernetes"]),
        (["e.g.,9/11,A.B. Cd"], ["e.g.", "9/11", "A.B. Cd"]),
        (["", " , "], []),
    ):
        assert split_words(entry) == words
    Path("latin").write_bytes("Ä".encode("latin-1"))
    Path("empty").write_text(" ,\n")
    for entry, message in (
        ("words.txt", "pass `@words.txt`"),
        ("Quilter,Müller", "pass `@Müller`"),
        ("missing.txt", "pass `@missing.txt`"),
        ("names.CSV", "pass `@names.CSV`"),
        ("./words", "pass `@./words`"),
        ("~/words", "pass `@~/words`"),
        ("C:\\words", "is a file"),
        ("@missing.txt", "cannot be read"),
        ("@.", "cannot be read"),
        ("@latin", "UTF-8"),
        ("@empty", "holds no words"),
    ):
        code, out, err = run("transcribe", recordings[0], "--model", tiny, "--hotwords", entry)
        assert (code, out, len(err)) == (1, [], 1) and message in err[0], entry


def test_options_and_urls_that_are_wrong_are_named(run, tiny, recordings, monkeypatch):
    for options, message in (
        (("--window-s", 60), "`--window-s` must be"),
        (("--window-s", 0), "`--window-s` must be"),
        (("--window-s", "nan"), "`--window-s` must be"),
        (("--steps", 0), "`--steps`"),
        (("--lambda", "nan"), "`--lambda"),
        (("--canvas-length", 0), "`canvas_length"),
    ):
        code, out, err = run("transcribe", recordings[0], "--model", tiny, *options)
        assert (code, out, len(err)) == (1, [], 1) and message in err[0], err

    for url in ("https://example.com/a.wav", "http://h/x", "s3://b/k", "file:///tmp/a.wav", f"https://h/{'x' * 5000}"):
        code, out, err = run("transcribe", url, "--model", tiny)
        assert (code, out, len(err)) == (1, [], 1) and "is a URL. Download it first" in err[0]

    import mdm_asr_hf.int8 as int8

    quantized = []
    monkeypatch.setattr(int8, "quantize_int8", lambda model: quantized.append(model) or model)
    code, out, _ = run("transcribe", recordings[0], "--model", tiny, *WINDOWS, "--dtype", "int8")
    assert code == 0 and len(out) == 1 and len(quantized) == 1
    code, _, err = run("transcribe", recordings[0], "--model", tiny, "--dtype", "int4")
    assert code == 2 and any("int4" in line for line in err)


# More digits than anybody measures.
TAIL = re.compile(r"\d\.\d{5,}")


def test_no_number_has_a_tail(run, recordings, tmp_path):
    speech = load_audio(RECORDING)
    # Windows whose starts are no round numbers.
    soundfile.write(tmp_path / "long.flac", np.tile(speech, 3)[:-1234], RATE_HZ)
    command = ("transcribe", tmp_path / "long.flac", "--window-s", 5.7, "--vad", "energy")
    code, out, _ = run(*command, "--json", "--timestamps", "word")
    assert code == 0 and '"start_s": ' in out[0] and not TAIL.search("\n".join(out))
    formats = [option for one in ("json", "srt", "vtt") for option in ("--format", one)]
    assert run(*command, "--output-dir", tmp_path, *formats)[0] == 0
    written = [(tmp_path / f"long.{suffix}").read_text() for suffix in ("json", "srt", "vtt")]
    assert '"start_s": ' in written[0] and '"no_speech": ' in written[0] and not any(map(TAIL.search, written))
    code, out, _ = run("stream", RECORDING, "--no-realtime", "--json")
    assert code == 0 and not TAIL.search("\n".join(out))
