# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""model_cards/make_card.py: cards and tables that follow from metrics.json files, and those of this repository."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file
from tables import each

from mdm_asr_hf import default_checkpoint

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "model_cards" / "mdm-asr-tiny-en.yaml"

spec = importlib.util.spec_from_file_location("make_card", ROOT / "model_cards" / "make_card.py")
make_card = importlib.util.module_from_spec(spec)
# Where `dataclass` looks for the module of its class.
sys.modules["make_card"] = make_card
spec.loader.exec_module(make_card)


def write_facts(folder, **changes):
    facts = {
        "name": "tiny",
        "metadata": {"license": "mit", "language": "de", "base_model": "owner/donor", "tags": ["mdm-asr"]},
        "load_from": '"owner/tiny"',
        "summary": "A model.\n",
        "intended_use": "Tests.",
        "weights": "Numbers.",
        "training": {"method": "Gradually.", "data": "Speech, CC0.", "hours": 1.5, "hardware": "a CPU", "kwh": 0.25},
        "datasets": {
            "radio": {"title": "Radio", "type": "owner/radio", "config": "de", "split": "test"},
            "phone": {"title": "Telephone", "type": "owner/phone"},
        },
        "results_notes": "Noted.",
        "limits": "Many.",
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (facts | changes).items() if v is not None}, sort_keys=False))
    return path


def write_result(folder, data="radio", wer=12.5, gamma=0.05, steps=32, sha256="a" * 64, num_skipped=0, **metrics):
    folder.mkdir(parents=True)
    values = {"wer": wer, "cer": 4.0, "mean_nfe": 7.25, "num_utterances": 20, **metrics}
    content = {
        "metrics": values,
        "intervals": {"wer": [wer - 1.25, wer + 2], "cer": [3.0, 5.5]},
        "settings": {
            "sampler": {"name": "pbeb_conf", "gamma": gamma, "lambda_": 0.2},
            "max_denoising_steps": steps,
            "canvas": {"canvas_length": None, "canvas_tokens_per_s": 7.0, "canvas_extra_tokens": 10},
            "temperature": 0.0,
            "batch_size": 4,
            "dtype": "float32",
        },
        "normaliser": "lower case",
        "model_sha256": sha256,
        "data": [{"name": data, "path": "there", "num_skipped": num_skipped, "sha256": "0"}],
        "command": f"mdm-asr evaluate --data {data} --gamma {gamma}",
    }
    (folder / "metrics.json").write_text(json.dumps(content))


@pytest.fixture
def facts(tmp_path):
    """Facts with three evaluations beside them."""
    results = tmp_path / "results" / "tiny"
    buckets = [{"from_s": 0, "to_s": 4, "wer": 10.04, "num_utterances": 12}, {"from_s": 4, "to_s": None, "wer": 17.5}]
    write_result(results / "phone", data="phone", wer=30.0, num_skipped=2)
    write_result(results / "radio-fast", gamma=0.2)
    write_result(results / "radio", wer=11.0, by_duration=buckets)
    return write_facts(tmp_path)


def run(*arguments):
    return make_card.main([str(argument) for argument in arguments])


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_tables_and_metadata_by_hand(facts, tmp_path):
    assert run(facts) == 0
    text = (tmp_path / "tiny.md").read_text()
    rows = table_rows(text)
    assert rows[0][:6] == ["recordings", "utterances", "gamma", "WER %", "CER %", "mean NFE"]
    # In the facts' order of data sets; the interval of mean NFE was not measured.
    assert [row[:1] + row[2:] for row in rows[2:5]] == [
        ["Radio", "0.05", "11.00 (9.75 to 13.00)", "4.00 (3.00 to 5.50)", "7.25", "", "`radio`"],
        ["the same", "0.2", "12.50 (11.25 to 14.50)", "4.00 (3.00 to 5.50)", "7.25", "", "`radio-fast`"],
        ["Telephone", "0.05", "30.00 (28.75 to 32.00)", "4.00 (3.00 to 5.50)", "7.25", "", "`phone`"],
    ]
    assert [row[1] for row in rows[2:5]] == ["20", "20", "20 (2 more could not be read)"]
    assert rows[5] == ["recordings", "gamma", "0 to 4 s", "above 4 s"]
    assert rows[7:] == [["Radio", "0.05", "10.0", "17.5"], ["the same", "0.2", "", ""], ["Telephone", "0.05", "", ""]]
    assert "sampler pbeb_conf, lambda 0.2, steps 32, canvas adaptive, dtype float32." in text
    commands = [f"mdm-asr evaluate --data {data}" for data in ("radio --gamma 0.05", "radio --gamma 0.2", "phone")]
    positions = [text.index(command) for command in commands]
    assert positions == sorted(positions)
    assert "1.5 hours on a CPU; 0.25 kWh" in text and "lower case" in text and "2602.18952" in text

    run(facts, "--output", tmp_path / "card.md", tmp_path / "copy.md")
    assert (tmp_path / "card.md").read_text() == (tmp_path / "copy.md").read_text()
    data = ModelCard.load(tmp_path / "card.md").data
    assert (data.license, data.language, data.base_model) == ("mit", "de", "owner/donor")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "automatic-speech-recognition")
    found = [
        (r.dataset_type, r.dataset_config, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results
    ]
    assert found == [
        ("owner/radio", "de", "wer", "WER (gamma 0.05)", 11.0),
        ("owner/radio", "de", "cer", "CER (gamma 0.05)", 4.0),
        ("owner/radio", "de", "wer", "WER (gamma 0.2)", 12.5),
        ("owner/radio", "de", "cer", "CER (gamma 0.2)", 4.0),
        ("owner/phone", None, "wer", "WER (gamma 0.05)", 30.0),
        ("owner/phone", None, "cer", "CER (gamma 0.05)", 4.0),
    ]


def test_check_finds_what_is_typed_stale_or_missing(facts, tmp_path, capsys):
    card = tmp_path / "tiny.md"
    assert run(facts, "--check") == 1 and not card.exists()
    assert run(facts) == 0 and run(facts, "--check") == 0
    typed = card.read_text().replace("11.00 (9.75", "10.00 (9.75")
    card.write_text(typed)
    capsys.readouterr()
    assert run(facts, "--check") == 1 and card.read_text() == typed
    changes = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "+-" and "radio" in line]
    assert ["10.00 (9.75" in changes[0], "11.00 (9.75" in changes[1]] == [True, True] and len(changes) == 2

    path = tmp_path / "results" / "tiny" / "radio" / "metrics.json"
    content = json.loads(path.read_text())
    del content["command"]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        run(facts)
    assert "no 'command'" in capsys.readouterr().err


def test_results_of_other_weights_are_refused(facts, tmp_path, capsys):
    write_result(tmp_path / "results" / "tiny" / "stale", sha256="b" * 64)
    with pytest.raises(SystemExit, match="2"):
        run(facts)
    assert "bbbbbbbbbbbb: stale" in capsys.readouterr().err and not (tmp_path / "tiny.md").exists()


def test_the_weights_are_counted(facts, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file(
        {"a": np.zeros((1000, 1250), np.float16), "b": np.zeros(50_000, np.float16)}, checkpoint / "model.safetensors"
    )
    write_facts(tmp_path, checkpoint="checkpoint")
    with pytest.raises(SystemExit, match="2"):
        run(facts)
    sha256 = make_card.describe_weights(checkpoint)["sha256"]
    shutil.rmtree(tmp_path / "results")
    write_result(tmp_path / "results" / "tiny" / "radio", sha256=sha256)
    assert run(facts) == 0
    text = (checkpoint / "README.md").read_text()
    assert f"1.3 M parameters, 3 MB of fp16 safetensors (SHA-256 `{sha256[:16]}...`)" in text
    assert (tmp_path / "tiny.md").read_text() == text


@each(
    "changes, message",
    [
        ({"limits": None}, "missing ['limits']"),
        ({"colour": "red"}, "unknown ['colour']"),
        ({"training": {"method": "Gradually."}}, "missing ['data']"),
    ],
)
def test_facts_that_are_missing_or_unknown(facts, capsys, changes, message):
    write_facts(facts.parent, **changes)
    with pytest.raises(SystemExit, match="2"):
        run(facts)
    assert message in capsys.readouterr().err


def test_the_default_checkpoints_card_is_generated(capsys):
    assert run(FACTS, "--check") == 0, capsys.readouterr().out
    assert FACTS.with_suffix(".md").read_bytes() == (default_checkpoint() / "README.md").read_bytes()
