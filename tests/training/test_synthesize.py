# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""training/synthesize.py with a voice of sine tones."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import synthesize
from tables import each

SCRIPT = Path(__file__).parents[2] / "training" / "synthesize.py"

VOICE = """
import os
import numpy as np

def speak(text, rng):
    if "bad" in text:
        raise RuntimeError("cannot say that")
    if "crash" in text:
        os._exit(9)
    seconds = 0.1 * len(text.split())
    hz = rng.uniform(100, 400)
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(8000 * seconds)) / 8000)).astype(np.float32), 8000

def silent(text, rng):
    return np.zeros(800, np.float32), 8000
"""
SENTENCES = [f"this is sentence number {i}" for i in range(30)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "voice.py").write_text(VOICE)
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    return tmp_path


def run(folder, output="out", *, seconds=5.0, processes=1, function="speak", text="text.txt", **options):
    command = [
        *("--tts", f"{folder}/voice.py:{function}", "--text", str(folder / text), "--output", str(folder / output)),
        *("--hours", str(seconds / 3600), "--processes", str(processes)),
    ]
    command += [one for name, value in options.items() for one in (f"--{name}", str(value))]
    return synthesize.main(command)


def rows(folder, output="out"):
    """Rows by the number of their sentence, with the path of the audio."""
    found = {}
    for manifest in (folder / output).glob("shard-*/metadata.jsonl"):
        for line in manifest.read_text().splitlines():
            row = json.loads(line)
            assert row["sentence"] not in found
            found[row["sentence"]] = {**row, "path": manifest.parent / row["file_name"]}
    return found


def test_speech_and_metadata(folder):
    assert run(folder, seconds=5.0, language="en") == 0
    made = rows(folder)
    # Half a second a sentence: ten fill five seconds.
    assert sorted(made) == list(range(10))
    for index, row in made.items():
        samples, rate = soundfile.read(row["path"])
        assert rate == 8000 and len(samples) == 4000 and np.abs(samples).max() == pytest.approx(0.3, abs=1e-3)
        assert row["text"] == SENTENCES[index] and row["duration_s"] == 0.5 and row["language"] == "en"
    summary = json.loads((folder / "out" / "synthesis.json").read_text())
    assert summary["hours"] == pytest.approx(5 / 3600, abs=1e-4) and summary["errors"] == {}
    assert summary["command"][0] == "training/synthesize.py" and "--tts" in summary["command"]


def test_a_sentence_sounds_the_same_whatever_the_number_of_processes(folder, capsys):
    assert run(folder, "one", seconds=4.0) == run(folder, "two", seconds=4.0, processes=2) == 0
    one, two = rows(folder, "one"), rows(folder, "two")
    both = one.keys() & two.keys()
    assert len(both) >= 6
    assert all(one[i]["path"].read_bytes() == two[i]["path"].read_bytes() for i in both)
    assert one[0]["path"].read_bytes() != one[1]["path"].read_bytes()
    assert run(folder, "other", seconds=1.0, seed=1) == 0
    assert rows(folder, "other")[0]["path"].read_bytes() != one[0]["path"].read_bytes()
    with pytest.raises(SystemExit):
        run(folder, "other", seconds=2.0, seed=3)
    assert "was begun with seed 1, not 3" in capsys.readouterr().err


def test_goes_on_where_it_stopped(folder):
    assert run(folder, seconds=2.0) == 0
    before = {i: row["path"].stat().st_mtime_ns for i, row in rows(folder).items()}
    # What a killed process leaves: half a line, and a file without one.
    manifest = folder / "out" / "shard-00000" / "metadata.jsonl"
    with open(manifest, "a") as file:
        file.write('{"file_name": "audio/0000')
    assert run(folder, seconds=4.0) == 0
    after = rows(folder)
    assert sorted(after) == list(range(8))
    assert all(after[i]["path"].stat().st_mtime_ns == time for i, time in before.items())
    assert run(folder, seconds=4.0) == 0 and sorted(rows(folder)) == list(range(8))


def test_reads_the_text_again_with_other_random_numbers(folder):
    with gzip.open(folder / "short.txt.gz", "wt") as file:
        file.write("one two\n\nthree  four\n")
    assert run(folder, text="short.txt.gz", seconds=0.8) == 0
    made = rows(folder)
    assert [made[i]["text"] for i in range(4)] == ["one two", "three four"] * 2
    assert made[0]["path"].read_bytes() != made[2]["path"].read_bytes()


def test_errors_are_counted_and_end_a_run_that_never_works(folder, capsys):
    (folder / "text.txt").write_text("a good one\na bad one\na crash here\nanother good one\n")
    assert run(folder, seconds=0.55) == 0
    assert sorted(rows(folder)) == [0, 3]
    captured = capsys.readouterr()
    assert "sentence 1 ('a bad one'): cannot say that" in captured.err and "status 9" in captured.err
    summary = json.loads((folder / "out" / "synthesis.json").read_text())
    assert summary["errors"] == {"RuntimeError": 1, "crash of the process": 1}

    assert run(folder, "silent", function="silent") == 1
    assert "the voice does not work" in capsys.readouterr().err
    assert run(folder, "other", function="missing") == 1
    assert "missing" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@each("how", ["SIGTERM", "SIGKILL"])
def test_no_process_goes_on_when_the_run_is_ended(folder, monkeypatch, how):
    # Reading the sentences would load PyTorch, which neither they nor this voice need.
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    command = [sys.executable, str(SCRIPT), "--tts", "voice:speak", "--text", "text.txt", "--output", how]
    process = subprocess.Popen(
        [*command, "--hours", "100", "--processes", "2"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(list((folder / how).glob("shard-*/audio/*.flac"))) < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, how))
    # The pipes close when the last process that holds them ends.
    process.communicate(timeout=30)
    num_lines = sum(file.read_bytes().count(b"\n") for file in (folder / how).glob("shard-*/metadata.jsonl"))
    assert num_lines >= 20
    summary = json.loads((folder / how / "synthesis.json").read_text())
    if how == "SIGTERM":
        assert process.returncode == 1 and summary["hours"] == pytest.approx(num_lines * 0.5 / 3600, abs=3e-4)


def test_what_the_voice_returns_is_checked():
    for speech, message in [
        ((np.zeros((2, 10), np.float32), 8000), "mono float"),
        ((np.ones(10, np.int16), 8000), "mono float"),
        ((np.array([0.1, np.nan], np.float32), 8000), "empty, silent or not finite"),
        ((np.zeros(0, np.float32), 8000), "empty, silent or not finite"),
        ((np.ones(10, np.float32), 8.0), "whole, in Hz"),
    ]:
        with pytest.raises(ValueError, match=message):
            synthesize.check_speech(*speech)

    samples, rate = synthesize.check_speech(np.array([0.5, -2.0]), 8000.0)
    assert rate == 8000 and samples.tolist() == [0.25, -1.0]


def test_bad_arguments(folder, capsys):
    for name, value in (("hours", "0"), ("processes", "0")):
        with pytest.raises(SystemExit):
            synthesize.main(["--tts", "a:b", "--text", "x", "--output", "y", "--hours", "1", f"--{name}", value])
        assert "must be positive" in capsys.readouterr().err
    (folder / "empty.txt").write_text("\n")
    for text, message in (("none.txt", "cannot be read"), ("empty.txt", "has no sentences")):
        with pytest.raises(SystemExit):
            run(folder, text=text)
        assert message in capsys.readouterr().err
