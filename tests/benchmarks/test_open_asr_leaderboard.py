# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""open_asr_leaderboard/run_eval.py on data sets of the leaderboard's shape: with its package at hand, and without."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import soundfile
from audio_files import encode
from datasets import Audio, Dataset, DatasetDict
from demo_recording import RECORDING, ROOT, TEXT
from tables import each
from tiny_data import save_model
from tiny_models import tiny_model, tiny_processor

from mdm_asr_hf import default_checkpoint

FOLDER = ROOT / "open_asr_leaderboard"
RATE = 16_000


def load_script(monkeypatch, normalizer=None):
    """
    run_eval.py as it is where the leaderboard's package is `normalizer`; None: not installed; ...: as it is found.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    if normalizer is not ...:
        monkeypatch.setitem(sys.modules, "normalizer", normalizer)
    spec = importlib.util.spec_from_file_location("leaderboard_run_eval", FOLDER / "run_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    return load_script(monkeypatch)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Results and caches go where the test is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def noise(seconds, seed=0):
    return np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32) * 0.1


def rows(*entries):
    """A data set of (id, audio file as bytes, text) with the leaderboard's columns."""
    ids, audio, texts = zip(*entries, strict=True)
    audio = [{"bytes": content, "path": f"{one_id}.wav"} for one_id, content in zip(ids, audio, strict=True)]
    data = Dataset.from_dict({"audio": audio, "text": texts, "id": [f"folder/{one_id}" for one_id in ids]})
    return data.cast_column("audio", Audio(decode=False))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def tiny(tmp_path):
    """A canvas, which has options of its own; the default checkpoint has drafts."""
    return save_model(tmp_path / "owner" / "tiny", tiny_model(), tiny_processor())


def test_the_default_checkpoint_on_two_clips(script, tmp_path, capsys):
    silence = encode(np.zeros(44_100 * 2), 44_100)
    data = rows(
        ("spoken", RECORDING.read_bytes(), TEXT + " Indeed."),
        ("unscored", silence, "uh"),  # nothing is left of it after the normaliser
        ("silent", silence, "two words"),
    )
    DatasetDict(test=data).save_to_disk(tmp_path / "data" / "radio")
    arguments = ["--model_id", str(default_checkpoint()), "--dataset_path", "data", "--dataset", "radio"]
    path = script.main([*arguments, "--gamma", "1.5"])
    model_id = str(default_checkpoint()).replace("/", "-")
    assert path == Path("results") / f"MODEL_{model_id}_DATASET_data_radio_test.jsonl"
    spoken, silent = read(path)
    assert list(spoken) == ["audio_filepath", "duration", "time", "text", "pred_text"]
    assert (spoken["audio_filepath"], spoken["text"]) == ("spoken", TEXT + " Indeed.")
    assert spoken["pred_text"] == TEXT and spoken["time"] == silent["time"] > 0
    assert spoken["duration"] == pytest.approx(soundfile.info(RECORDING).duration, abs=1e-3)
    assert (silent["audio_filepath"], silent["pred_text"], silent["duration"]) == ("silent", "", 2.0)
    # Three words of the 17, the one and the two that were not found.
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert printed[:2] == ["WER:", str(round(100 * 3 / 17, 2))]
    rtfx = sum(row["duration"] for row in (spoken, silent)) / (spoken["time"] + silent["time"])
    assert float(printed[-1]) == pytest.approx(rtfx, abs=0.01)
    with pytest.raises(ValueError, match="canvas"):
        script.main([*arguments, "--steps", "3"])


@each("streaming", [False, True])
def test_a_folder_of_parquet_files(script, tmp_path, tiny, streaming):
    clips = [(f"{i}", encode(noise(0.4 + 0.2 * i, seed=i)), f"number {i}") for i in range(5)]
    for name in ("phone", "radio"):
        (tmp_path / "data" / name).mkdir(parents=True)
        some = clips if name == "radio" else clips[:1]
        rows(*some).to_parquet(tmp_path / "data" / name / "test.clean-00000.parquet")
    lines = [
        f"- {{config_name: {name}, data_files: [{{split: test.clean, path: {name}/*}}]}}"
        for name in ("phone", "radio")
    ]
    (tmp_path / "data" / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    arguments = ["--model_id", str(tiny), "--dataset_path", str(tmp_path / "data"), "--split", "test.clean"]
    arguments += ["--batch_size", "2", "--warmup_steps", "1", "--streaming" if streaming else "--no-streaming"]
    found = read(script.main([*arguments, "--dataset", "radio"]))
    assert [row["audio_filepath"] for row in found] == ["0", "1", "2", "3", "4"]
    assert [row["duration"] for row in found] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2])
    assert len({row["pred_text"] for row in found}) == 5
    few = read(script.main([*arguments, "--dataset", "radio", "--max_eval_samples", "3", "--steps", "1"]))
    assert len(few) == 3 and few[1]["pred_text"] != found[1]["pred_text"]
    assert len(read(script.main([*arguments, "--dataset", "phone", "--max_eval_samples", "-1"]))) == 1


def test_long_clips_are_cut_where_it_is_quiet_and_nothing_is_lost(script, tmp_path, tiny):
    clip = noise(37)
    clip[18 * RATE : 18 * RATE + RATE // 2] = 0
    pieces = script.split_clip(clip, 30 * RATE, RATE)
    assert len(pieces) == 2 and 18.0 <= len(pieces[0]) / RATE <= 18.5
    assert np.array_equal(np.concatenate(pieces), clip)
    DatasetDict(test=rows(("long", encode(clip), "text"), ("short", encode(clip[:RATE]), "text"))).save_to_disk("data")
    arguments = ["--model_id", str(tiny), "--dataset_path", "data", "--dataset", "any", "--steps", "2"]
    long, short = read(script.main([*arguments, "--batch_size", "2"]))
    assert long["duration"] == 37.0 and short["duration"] == 1.0
    # As if the pieces had been clips.
    parts = [(f"{i}", encode(piece), "text") for i, piece in enumerate([*pieces, clip[:RATE]])]
    DatasetDict(test=rows(*parts)).save_to_disk("parts")
    arguments[3] = "parts"
    first, second, alone = (row["pred_text"] for row in read(script.main([*arguments, "--batch_size", "1"])))
    assert first and second and long["pred_text"] == f"{first} {second}" and short["pred_text"] == alone

    for num_samples in [30 * RATE, 30 * RATE + 1, 54 * RATE, 61 * RATE, 300 * RATE + 7]:
        clip = np.arange(num_samples, dtype=np.float32)[::-1]
        pieces = script.split_clip(clip, 30 * RATE, RATE)
        assert max(map(len, pieces)) <= 30 * RATE and min(map(len, pieces)) > 10 * RATE
        assert np.array_equal(np.concatenate(pieces), clip)


def test_the_leaderboards_package_is_used_where_it_is(monkeypatch, tiny, tmp_path, capsys):
    """A stand-in with the functions of its `normalizer.data_utils`, whose data come in chunks of one call."""
    written = {}
    theirs = ModuleType("normalizer.data_utils")
    theirs.load_data = lambda args: (
        rows(("a", encode(noise(0.5)), "x y"), ("b", encode(noise(0.7, 1)), "x y"))
        .add_column("parent_id", ["call", "call"])
        .add_column("chunk_index", [0, 1])
    )
    theirs.get_text = lambda sample: sample["text"]
    theirs.is_target_text_in_range = lambda text: True
    theirs.normalizer = lambda text: "x y z w"
    theirs.extract_audio_filepath_from_sample = lambda sample: "file of " + sample["id"]
    theirs.is_chunked_dataset = lambda path: True

    def write_manifest(references, transcriptions, *names, **columns):
        written.update(columns, names=names, references=references)
        return str(tmp_path / "theirs.jsonl")

    theirs.write_manifest = write_manifest
    theirs.read_manifest = lambda path: [path]
    theirs.merge_chunked_manifest = lambda rows: [{"text": "", "pred_text": ""}]
    package = ModuleType("normalizer")
    package.data_utils = theirs
    script = load_script(monkeypatch, package)
    path = script.main(
        ["--model_id", str(tiny), "--dataset_path", "owner/chunks", "--dataset", "calls", "--gamma", "0"]
    )
    assert path == tmp_path / "theirs.jsonl" and "WER: 0.0 %" in capsys.readouterr().out
    assert written["names"] == (str(tiny), "owner/chunks", "calls", "test") and written["references"] == ["x y"] * 2
    assert written["extra_fields"] == {"parent_id": ["call", "call"], "chunk_index": [0, 1]}
    assert written["audio_filepaths"] == ["file of folder/a", "file of folder/b"]


def test_what_cannot_be_measured_is_said(script, tiny):
    DatasetDict(test=rows(("a", encode(noise(0.5)), " "))).save_to_disk("data")
    arguments = ["--model_id", str(tiny), "--dataset", "any", "--dataset_path"]
    with pytest.raises(ValueError, match="no utterance with a reference"):
        script.main([*arguments, "data"])
    with pytest.raises(ValueError, match=r"`--split` 'dev' is not in data, which has \['test'\]"):
        script.main([*arguments, "data", "--split", "dev"])
    with pytest.raises(ValueError, match="one reference for many chunks"):
        script.main([*arguments, "ArtificialAnalysis/Earnings22-Cleaned-AA-chunked"])


def test_what_the_leaderboards_package_lacks_is_said(monkeypatch, tmp_path):
    (tmp_path / "normalizer").mkdir()
    (tmp_path / "normalizer" / "__init__.py").write_text("import a_package_that_is_not_installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        load_script(monkeypatch, ...)
