"""training/make_default.py, from donor and voice to the comparison, with a tiny donor and a voice of tones."""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_convert_whisper import save_donor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

TRAINING = Path(__file__).parents[1] / "training"
sys.path.insert(0, str(TRAINING))

import make_default  # noqa: E402
import tones  # noqa: E402


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    save_donor(tmp_path / "donor", False, max_target_positions=160)
    monkeypatch.setattr(tones, "NUM_ROWS", {"train": 6, "eval": 2})
    tones.main(tmp_path / "tones")
    (tmp_path / "text.txt").write_text("river stone\nyellow water garden\n")
    return tmp_path


def arguments(folder, *more):
    return [
        *("--donor", str(folder / "donor"), "--tts", f"{TRAINING / 'tones.py'}:synth"),
        *("--text", str(folder / "text.txt"), "--recordings", str(folder / "tones" / "train")),
        *("--eval", str(folder / "tones" / "eval"), "--minutes", "5", "--hours", "0.02", "--first-hours", "0.001"),
        *("--processes", "1", "--steps", "2", "--output", str(folder / "out"), *more),
        *("--", "--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--max_seconds_per_batch", "12"),
        *("--join_max_s", "6", "--vocab_size", "280", "--dataloader_num_workers", "1", "--freeze_encoder", "false"),
        *("--save_strategy", "no", "--logging_steps", "1"),
    ]


def test_one_command_makes_and_measures_a_checkpoint(inputs, monkeypatch):
    assert make_default.main(arguments(inputs)) == 0
    out = inputs / "out"
    results = json.loads((out / "run" / "results.json").read_text())
    assert [entry["step"] for entry in results["log"] if "loss_step_2" in entry] == [1, 2]
    sources = [json.loads(source) for source in results["data"]["train_sources"]]
    assert [source["path"] for source in sources] == [str(out / "synthetic"), str(out / "recordings")]
    assert json.loads((out / "synthetic" / "synthesis.json").read_text())["hours"] > 0
    # The recordings are the same samples, as FLAC.
    rows = [json.loads(line) for line in (out / "recordings" / "metadata.jsonl").read_text().splitlines()]
    first, _ = soundfile.read(inputs / "tones" / "train" / "000.flac")
    assert len(rows) == 6 and (soundfile.read(out / "recordings" / rows[0]["file_name"])[0] == first).all()
    # What ships is half as large, computes in fp32, and is what was trained.
    stored = load_file(out / "checkpoint" / "model.safetensors")
    trained = load_file(out / "run" / "model.safetensors")
    assert all(stored[name].dtype == torch.float16 for name in stored) and stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name].half()) for name in stored)
    assert AutoModelForSpeechSeq2Seq.from_pretrained(out / "checkpoint").dtype == torch.float32
    assert AutoProcessor.from_pretrained(out / "checkpoint")
    [row] = json.loads((out / "comparison.json").read_text())
    assert row["set"] == "eval" and row["steps"] == 2 and row["new"] >= 0 and row["shipped"] > 0
    for name in ("new", "shipped"):
        assert len((out / "eval" / "eval-steps2" / name / "hypotheses.jsonl").read_text().splitlines()) == 2


def test_only_what_is_better_on_every_set_ships(tmp_path, monkeypatch, capsys):
    options = make_default.argparse.Namespace(output=tmp_path / "out")
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "config.json").write_text("new")
    (tmp_path / "out" / "eval" / "a-steps32" / "new").mkdir(parents=True)
    (tmp_path / "out" / "eval" / "a-steps32" / "new" / "metrics.json").write_text("{}")
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(make_default, "default_checkpoint", lambda: package)
    monkeypatch.setattr(make_default, "RESULTS", tmp_path / "results")
    better = {"set": "a", "steps": 32, "new": 9.0, "shipped": 20.0}
    equal = {"set": "b", "steps": 32, "new": 9.0, "shipped": 9.0}
    assert make_default.ship(options, [better, equal]) == 1
    assert not list(package.iterdir()) and "no better on b" in capsys.readouterr().err
    assert make_default.ship(options, [better]) == 0
    assert (package / "config.json").read_text() == "new"
    assert (tmp_path / "results" / "a-steps32" / "metrics.json").exists()


def test_evaluation_folders_are_checked_before_hours_of_work(inputs, capsys):
    argv = arguments(inputs)
    argv[argv.index("--eval") + 1] = str(inputs / "donor")
    with pytest.raises(SystemExit):
        make_default.main(argv)
    assert "--eval needs folders with metadata.jsonl" in capsys.readouterr().err
