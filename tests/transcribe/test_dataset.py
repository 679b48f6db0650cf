# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr transcribe-dataset`: every kind of archive, bad rows, kills at any moment."""
# ruff: noqa: E402 (the extra may not be installed)

import collections
import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest import mock
from unittest.mock import ANY

import pytest
from tables import each

for module in ("ray", "pyarrow", "datasets", "psutil"):
    pytest.importorskip(module)

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from onnx_exports import exported_checkpoint
from tiny_models import tiny_model, tiny_processor
from tone_models import GAP_S, RATE, WORD_S, ToneModel, ToneProcessor, clip

from mdm_asr_hf.data.archives import Archive, AudioRow, _told_apart
from mdm_asr_hf.transcribe import dataset
from mdm_asr_hf.transcribe.dataset import ShardWorker, cut_shards, transcribe_dataset

DECODING = {"dtype": "float32", "settings": [], "vad": "none"}


DURATION_S = 2 * WORD_S + GAP_S
TEXTS = [f"w{i} w{i + 5}" for i in range(4)]


def content(number):
    """A clip of two words."""
    file = io.BytesIO()
    soundfile.write(file, clip([number, number + 5]), RATE, format="WAV")
    return file.getvalue()


def files(folder):
    (folder / "sub").mkdir()
    names = ("a.wav", "b.wav", "sub/a.wav", "sub/c.wav")
    for i, name in enumerate(names):
        (folder / name).write_bytes(content(i))
    return folder, list(names)


def manifest(folder):
    source, names = files(folder)
    ids = [7, None, "x", 7]
    rows = [{"audio": name} | ({} if one is None else {"id": one}) for name, one in zip(names, ids, strict=True)]
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, ["7", "b.wav", "x", "7#2"]


def tars(folder):
    for k in range(2):
        with tarfile.open(folder / f"{k}.tar", "w") as tar:
            for i in range(2):
                for name, data in ((f"{i}.json", b"{}"), (f"{i}.wav", content(2 * k + i))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder / "*.tar", ["0", "1", "0#2", "1#2"]


def parquet(folder):
    audio = [{"bytes": content(i), "path": f"{i}.wav"} for i in range(4)]
    pq.write_table(pa.table({"audio": audio}), folder / "a.parquet", row_group_size=3)
    return folder, [f"{i}.wav" for i in range(4)]


def plain_parquet(folder):
    pq.write_table(pa.table({"id": list("abcd"), "audio": [content(i) for i in range(4)]}), folder / "a.parquet")
    return folder / "a.parquet", list("abcd")


def saved_dataset(folder):
    audio = [{"bytes": content(i), "path": None} for i in range(4)]
    data = datasets.Dataset.from_dict({"audio": audio, "id": list("abcd")})
    data.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(folder / "saved")
    return folder / "saved", list("abcd")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random checkpoint, whose text is letters without sense."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def worker(monkeypatch):
    """Makes a worker that hears tones, and the rows of its archive."""
    monkeypatch.setattr(dataset, "load_model", lambda *arguments: (ToneModel(), ToneProcessor()))
    monkeypatch.setattr(dataset, "generation_settings", lambda model, others: model.generation_config)

    def make(source, **decoding):
        archive = Archive(str(source))
        kind, rows = archive.list_rows()
        return ShardWorker(archive, kind, "tones", 1, DECODING | decoding), rows

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@each("make", [files, manifest, tars, parquet, plain_parquet, saved_dataset])
def test_kinds_of_archives(tmp_path, worker, make):
    source, ids = make(tmp_path)
    its_worker, rows = worker(source)
    assert [row.id for row in rows] == ids
    # The sizes that shards are cut by: of 16-bit samples, which Parquet compresses.
    assert all(2_000 < row.num_bytes < 23_000 for row in rows)
    # Rows amid an archive, too, over the borders of its files.
    for first, last in ((0, 4), (1, 3)):
        result = its_worker.write(tmp_path / "shard.jsonl", rows[first:last])
        assert result == {"new_rows": last - first, "errors": 0, "duration_s": ANY, "failure": ""}
        assert result["duration_s"] == pytest.approx((last - first) * DURATION_S)
        found = lines_of(tmp_path / "shard.jsonl")
        assert [(row["id"], row["text"]) for row in found] == list(zip(ids, TEXTS, strict=True))[first:last]
        assert all(row["error"] is None and row["nfe"] > 0 and 0 < row["confidence"] <= 1 for row in found)


def test_formats_hold_the_same(tmp_path, worker):
    source, _ = files(tmp_path)
    (source / "b.wav").write_bytes(b"no audio")
    its_worker, rows = worker(source, timestamps=True)
    for name in ("shard.jsonl", "shard.parquet"):
        assert its_worker.write(tmp_path / name, rows)["errors"] == 1
    found = pq.read_table(tmp_path / "shard.parquet").to_pylist()
    assert found == lines_of(tmp_path / "shard.jsonl")
    # As the tones are, in frames of 10 ms.
    assert [(word["text"], word["start_s"], word["end_s"]) for word in found[0]["words"]] == [
        ("w0", pytest.approx(0.0, abs=0.02), pytest.approx(WORD_S, abs=0.02)),
        ("w5", pytest.approx(WORD_S + GAP_S, abs=0.02), pytest.approx(DURATION_S, abs=0.02)),
    ]
    assert found[1]["text"] is None and "'" + str(source / "b.wav") in found[1]["error"]


def test_bad_rows_are_rows(tmp_path, worker):
    (tmp_path / "good.wav").write_bytes(content(0))
    (tmp_path / "torn.wav").write_bytes(content(0)[:9000])
    (tmp_path / "empty.wav").write_bytes(content(0)[:40] + bytes(4))
    names = ("torn.wav", "gone.wav", "good.wav", "empty.wav", "", "\ud800.wav", "nul\0.wav")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    its_worker, rows = worker(tmp_path / "m.jsonl")
    result = its_worker.write(tmp_path / "shard.parquet", rows)
    assert (result["new_rows"], result["errors"], result["failure"]) == (7, 6, "")
    found = pq.read_table(tmp_path / "shard.parquet").to_pylist()
    reasons = ["truncated", "does not exist", None, "no samples", "not a path", "surrogates", "null"]
    assert all(
        row["error"] is None if why is None else why in row["error"] for row, why in zip(found, reasons, strict=True)
    )

    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x/1.json"))
        tar.addfile(tarfile.TarInfo("x/2.flac"))
    _, rows = Archive(str(tmp_path / "tar")).list_rows()
    assert [(row.id, row.error) for row in rows] == [("x/2", None), ("x/1", "The sample has no audio.")]


def test_a_row_that_breaks_the_decoder_breaks_no_other(tmp_path, worker, monkeypatch):
    source, ids = files(tmp_path)
    its_worker, rows = worker(source)
    plain = its_worker.transcriber.transcribe_all

    def fragile(audio, broken):
        audio = list(audio)
        if set(audio) & broken:
            raise RuntimeError("out of order")
        yield from plain(audio)

    monkeypatch.setattr(its_worker.transcriber, "transcribe_all", lambda audio: fragile(audio, {rows[1].path}))
    assert its_worker.write(tmp_path / "shard.jsonl", rows)["errors"] == 1
    assert [row["error"] for row in lines_of(tmp_path / "shard.jsonl")] == [
        None,
        "RuntimeError: out of order",
        None,
        None,
    ]
    # Where none can be done it is not the rows, and they are left for another run.
    everything = {row.path for row in rows}
    monkeypatch.setattr(its_worker.transcriber, "transcribe_all", lambda audio: fragile(audio, everything))
    result = its_worker.write(tmp_path / "other.jsonl", rows)
    assert "out of order" in result["failure"] and not (tmp_path / "other.jsonl").exists()


def test_shards_of_a_checkpoint_or_why_there_are_none(tmp_path, tiny):
    source, _ = files(tmp_path)
    kind, rows = Archive(str(source)).list_rows()

    def worker(model):
        return ShardWorker(Archive(str(source)), kind, model, 1, DECODING)

    assert worker(tiny).write(tmp_path / "shard.jsonl", rows)["errors"] == 0
    assert all(row["nfe"] > 0 for row in lines_of(tmp_path / "shard.jsonl"))
    # Left for another run.
    assert "nowhere" in worker(str(tmp_path / "nowhere")).write(tmp_path / "other.jsonl", rows)["failure"]
    # Given up.
    (tmp_path / ".other.tries").write_bytes(b"." * dataset.MAX_TRIES)
    assert "died" in worker(tiny).write(tmp_path / "other.jsonl", rows)["failure"]
    assert not (tmp_path / "other.jsonl").exists()


@given(st.lists(st.sampled_from(["a", "a#2", "a#2#2", "b", "\ud800"]), max_size=12))
def test_ids_are_told_apart(ids):
    found = [row.id for row in _told_apart(AudioRow(one, "") for one in ids)]
    assert len(set(found)) == len(ids)
    # The first of each that is not taken yet keeps its id.
    assert all(
        one.startswith(wanted.encode("utf-8", "backslashreplace").decode())
        for wanted, one in zip(ids, found, strict=True)
    )


@given(st.lists(st.integers(0, 3_000_000), max_size=30), st.sampled_from([0.5, 1.0, 4.0]))
def test_shards_hold_all_rows_in_order(sizes, shard_mb):
    rows = [AudioRow(str(i), "", 0, size) for i, size in enumerate(sizes)]
    shards = cut_shards(rows, shard_mb)
    assert [row for shard in shards for row in shard] == rows and all(shards)
    assert all(len(shard) == 1 or sum(row.num_bytes for row in shard) <= shard_mb * 1e6 for shard in shards)


@each(
    "arguments, message",
    [
        ({"source": "nowhere/"}, "datasets"),
        ({"source": "/nowhere"}, "does not exist"),
        ({"source": "empty"}, "holds neither audio"),
        ({"source": "both"}, "files and tar"),
        ({"source": "broken.tar"}, "no whole, uncompressed tar"),
        ({"source": "broken.parquet"}, "no Parquet file"),
        ({"source": "columns.jsonl"}, "no column audio"),
        ({"split": "train"}, "`split`"),
        ({"gpus": 1.5}, "`gpus`"),
        ({"shard_mb": float("nan")}, "`shard_mb`"),
        ({"output": "taken"}, "has shards but no _run.json"),
        ({"output": "other"}, "its 'format' is 'jsonl', not 'parquet'"),
    ],
)
def test_what_cannot_be_used(tmp_path, tiny, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("source", "empty", "both", "taken"):
        Path(name).mkdir()
    for name in ("source/a.wav", "both/a.wav", "both/b.tar", "taken/shard-00000.parquet"):
        Path(name).write_bytes(b"x")
    for name in ("broken.tar", "broken.parquet"):
        Path(name).write_bytes(b"broken")
    Path("columns.jsonl").write_text('{"wav": "a.wav"}\n')
    failure = {"new_rows": 0, "errors": 0, "duration_s": 0.0, "failure": "It fell."}
    monkeypatch.setattr(dataset, "_run_actors", lambda *arguments: [failure])
    with pytest.raises(ValueError, match="1 of 1 shards, from shard-00000.jsonl on, could not be written: It fell. "):
        transcribe_dataset("source", "other", model=tiny, format="jsonl")
    with pytest.raises(ValueError, match=message):
        transcribe_dataset(**{"source": "source", "output": "out", "model": tiny} | arguments)


class Actor:
    """Of a Ray whose results come in any order. What is called gives a reference, which is a call of no result yet."""

    def __init__(self, **worker):
        self.most = 0
        self.calls = []
        self.__ray_ready__ = self.write = self

    def remote(self, **unit):
        self.calls.append(mock.Mock(actor=self, unit=unit))
        self.most = max(self.most, len(self.calls))
        return self.calls[-1]


@contextlib.contextmanager
def ray_of(make, num_cores, wait, get):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: True)
        patch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": num_cores}}])
        patch.setattr(ray, "remote", lambda kind: mock.Mock(**{"options.return_value.remote": make}))
        patch.setattr(ray, "wait", wait)
        patch.setattr(ray, "get", get)
        yield


def test_how_many_actors_start_and_what_if_none_does(monkeypatch):
    seen = {}

    def init(**settings):
        seen.update(settings)
        raise ValueError("seen")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(dataset, "num_cores", lambda: 2)
    for actors, threads, cores in ((None, 1, 2), (None, 2, 2), (None, 4, 4), (3, 2, 6)):
        with pytest.raises(ValueError, match="seen"):
            list(dataset._run_actors([], {}, actors, threads, 0.0))
        assert seen["num_cpus"] == cores, (actors, threads)

    def fail(call):
        raise ray.exceptions.RaySystemError("Traceback\nno such module\n")

    with ray_of(Actor, 2, lambda calls: (calls[:1], []), fail):
        (result,) = dataset._run_actors([{"path": 0}, {"path": 1}], {}, None, 1, 0.0)
    assert result["failure"] == "no actor starts: no such module."


@given(seed=st.integers(0, 2**32), num_actors=st.integers(1, 6), num_units=st.integers(1, 40))
def test_shards_go_to_actors_that_are_there(seed, num_actors, num_units):
    made, draw = [], random.Random(seed)
    # These never start.
    late = set(draw.sample(range(min(num_actors, num_units)), min(num_actors, num_units) // 3))

    def make(**worker):
        made.append(Actor())
        return made[-1]

    def get(call):
        call.actor.calls.remove(call)
        return call.unit

    def wait(calls):
        return [draw.choice([call for call in calls if made.index(call.actor) not in late])], []

    with ray_of(make, num_actors, wait, get):
        units = [{"path": number} for number in range(num_units)]
        done = list(dataset._run_actors(units, {}, None, 1, 0.0))
    assert sorted(unit["path"] for unit in done) == list(range(num_units))
    assert len(made) == min(num_actors, num_units)
    for number, actor in enumerate(made):
        # One more at most than it works on, and none where it is not known to run.
        assert actor.most <= (2 if num_units >= 4 * len(made) else 1)
        assert [call.unit for call in actor.calls] in ([[{}]] if number in late else [[], [{}]])


# --- kills ---

NUM_CLIPS, SHARD_MB = 30, 0.04


@pytest.fixture
def start(tmp_path_factory, monkeypatch):
    """Starts the command."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-c", "from mdm_asr_cli import main; main()", "transcribe-dataset"]
    command += ["--model", exported_checkpoint(tmp_path_factory), "--actors", "2", "--shard-mb", SHARD_MB]

    def run(source, output):
        line = list(map(str, [*command, source, "--vad", "none", "--output", output]))
        return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)

    return run


def shards_of(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*")}


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


def actors_of(process):
    workers = psutil.Process(process.pid).children(recursive=True)
    return [one for one in workers if one.name().startswith("ray::ShardWorker")]


def test_kills(tmp_path, start):
    source, output = tmp_path / "clips", tmp_path / "out"
    source.mkdir()
    for i in range(NUM_CLIPS):
        (source / f"{i:02d}.wav").write_bytes(content(i))
    (source / "bad.wav").write_bytes(b"no audio")

    process = start(source, output)
    wait_for(process, lambda: len(shards_of(output)) >= 2)
    running = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Ray's processes end by themselves, one after the other.
    for one in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    before = shards_of(output)
    assert 2 <= len(before) < NUM_CLIPS / 2

    process = start(source, output)
    wait_for(process, lambda: len(shards_of(output)) > len(before))
    # An exported model needs no PyTorch, with which each would have to start.
    actors = actors_of(process)
    assert not [one.path for actor in actors for one in actor.memory_maps() if "libtorch" in one.path]
    actors[0].kill()
    _, err = process.communicate()
    assert process.returncode == 0, err
    # What was there was not done again.
    assert before.items() <= shards_of(output).items()
    rows = [row for path in sorted(output.glob("shard-*")) for row in pq.read_table(path).to_pylist()]
    counts = collections.Counter(row["id"] for row in rows)
    assert counts == collections.Counter([f"{i:02d}.wav" for i in range(NUM_CLIPS)] + ["bad.wav"])
    assert [row["id"] for row in rows if row["error"] is not None] == ["bad.wav"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*shards_of(output), "_run.json"])
