"""The fit of calibrations: what it decodes with, what it chooses, what it writes; on made-up rows."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_models import tiny_model, tiny_processor

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import fit_confidence
from fit_confidence import POOLED, Recogniser, apply, choose, ece, measure, to_settings

WORDS = ["alpha", "bravo", "delta", "hotel", "india", "kilo", "lima", "oscar"]


def make_rows(num_rows, group, slope=1.0, bias=0.0, seed=0):
    """Rows of eight words of one token, right with the probability sigmoid(slope * log-odds + bias)."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(num_rows):
        log_odds = rng.normal(1.0, 1.5, len(WORDS))
        is_right = rng.random(len(WORDS)) < 1 / (1 + np.exp(-(slope * log_odds + bias)))
        heard = [word if right else "wrong" for word, right in zip(WORDS, is_right, strict=True)]
        tokens = [
            {"text": f" {word}", "confidence": float(1 / (1 + np.exp(-one)))}
            for word, one in zip(heard, log_odds, strict=True)
        ]
        texts = {"reference": " ".join(WORDS), "hypothesis": " ".join(heard)}
        rows.append({"id": f"{group}{k}", "group": group, **texts, "duration_s": 4.0, "tokens": tokens})
        rows[-1]["end_confidence"] = 0.5
    return rows


def test_a_temperature_that_was_put_in_is_found_and_undone():
    rows = make_rows(400, "a", slope=0.5) + make_rows(400, "b", slope=0.5, seed=1)
    form, numbers, trials = choose(rows)
    assert form == "temperature" and to_settings(numbers)["confidence_temperature"] == pytest.approx(2.0, abs=0.15)
    assert trials["temperature"]["loss"] < trials["uncalibrated"]["loss"]
    measured = measure(rows, to_settings(numbers))
    assert measured["before"]["word_ece"] > 8 and measured["after"]["word_ece"] < 2


def test_groups_count_alike_however_large():
    # One is too sure and the other not sure enough, so that their shares decide.
    sure, unsure = make_rows(100, "sure", slope=0.4), make_rows(100, "unsure", slope=1.5, seed=1)
    form, numbers, trials = choose(sure + unsure)
    again, same_numbers, same_trials = choose(5 * sure + unsure)
    assert (form, trials) == (again, same_trials)
    np.testing.assert_allclose(same_numbers, numbers, atol=1e-4)
    assert 0.45 < numbers[0] < 1.45


def test_settings_are_applied_as_generate_does():
    row = {"tokens": [{"text": " a", "confidence": 0.8}], "end_confidence": 0.5, "duration_s": 2.0}
    settings = {"confidence_temperature": 2.0, "confidence_bias": 0.0, "confidence_context": None}
    applied = apply(row, settings)
    assert applied["tokens"][0]["confidence"] == pytest.approx(2 / 3) and applied["end_confidence"] == 0.5
    assert row["tokens"][0]["confidence"] == 0.8
    assert to_settings(np.array([0.5, 0.1, 0.0, 0.2])) == {
        "confidence_temperature": 2.0,
        "confidence_bias": 0.1,
        "confidence_context": {"mean": 0.0, "pace": 0.2},
    }
    # 0.9 + 0.7 of two right ones in bins of their own, 0.95 of a wrong one beside the first.
    assert ece(np.array([0.92, 0.72, 0.95]), np.array([1.0, 1.0, 0.0])) == pytest.approx(100 * (0.87 + 0.28) / 3)


def test_the_checkpoints_own_settings_decode_and_its_calibration_is_set_aside(tmp_path, monkeypatch):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    lines = [{"file_name": f"{name}.wav", "text": "alpha", "corpus": name} for name in ("a", "b")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recogniser = Recogniser(argparse.Namespace(output=tmp_path, reuse=False, seed=0, limit=None, batch_size=2))
    recogniser.model, recogniser.processor = tiny_model(), tiny_processor()
    recogniser.model.generation_config.confidence_temperature = 3.0
    generate, calls = recogniser.model.generate, []
    monkeypatch.setattr(recogniser.model, "generate", lambda **named: calls.append(named) or generate(**named))
    rows = recogniser.rows(str(tmp_path), is_train=True)
    own = {"return_dict_in_generate", "confidence_temperature", "confidence_bias", "confidence_context", "no_speech"}
    assert all(set(call) - {"input_features", "attention_mask"} == own for call in calls)
    assert calls[0]["confidence_temperature"] == 1.0 and calls[0]["no_speech"] is None
    num_augmented = len(fit_confidence.AUGMENTERS)
    assert [row["id"] for row in rows] == [f"{name}.wav {k}" for name in ("a", "b") for k in range(num_augmented)]
    assert [row["group"] for row in rows] == ["a"] * num_augmented + ["b"] * num_augmented
    assert (tmp_path / "train.jsonl").exists()
    plain = recogniser.rows(str(tmp_path))
    assert [row["id"] for row in plain] == ["a.wav", "b.wav"] and plain[0]["duration_s"] == 1.0


def test_the_report_has_a_row_for_each_data_set_and_one_for_all(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "generation_config.json").write_text(json.dumps({"confidence_bias": 5.0, "gamma": 0.1}))
    sets = {
        "train": make_rows(60, "a") + make_rows(60, "b", seed=1),
        "one": make_rows(9, "x"),
        "two": make_rows(5, "y"),
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(model), "--train", "T", "--eval", "D/one", "D/two", "--output", str(tmp_path)]
    assert fit_confidence.main([*arguments, "--reuse", "--write"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(name, one["words"]) for name, one in report["eval"].items()] == [("one", 72), ("two", 40), (POOLED, 112)]
    assert f"| {POOLED} | 112 |" in (tmp_path / "report.md").read_text()
    written = json.loads((model / "generation_config.json").read_text())
    assert written == {"gamma": 0.1, **report["settings"]}
    assert "Written" in capsys.readouterr().out
