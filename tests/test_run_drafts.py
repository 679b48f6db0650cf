import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import tiny_drafts_model, tiny_processor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import run_drafts  # noqa: E402


@pytest.fixture
def folders(tmp_path):
    model = tiny_drafts_model(dtype=torch.float32)
    model.generation_config.max_new_tokens = 20
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    rows = [{"file_name": f"{i}.wav", "text": "one two"} for i in range(3)]
    for i, row in enumerate(rows):
        soundfile.write(data / row["file_name"], 0.1 * rng.standard_normal(12_000 + 4_000 * i), 16_000)
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model", data


@pytest.mark.parametrize("what", ["decoding", "silence"])
def test_every_condition_has_a_line(folders, tmp_path, what, capsys):
    model, data = folders
    run_drafts.main([what, "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = {line["condition"]: line for line in results["lines"]}
    assert len(capsys.readouterr().out.splitlines()) == len(lines) + 3
    if what == "silence":
        assert list(lines)[0] == "0.5 s" and lines["5 s, 15 s in all"]["encoder_ms"] > lines["0.5 s"]["encoder_ms"]
        return
    assert list(lines) == list(run_drafts.decoding_conditions(3))
    assert all(line["same_texts"] == 3 for line in lines.values())
    alone = lines["none: the donor's loop"]
    assert alone["tokens_per_evaluation"] == 1.0 and alone["drafts_per_evaluation"] == 0.0
    assert lines["masks, 3 drafts"]["drafts_per_evaluation"] > lines["masks, 1 drafts"]["drafts_per_evaluation"]
    # What was fitted was the sequential head.
    assert lines["masks"]["nfe"] < lines["masks without the sequential head"]["nfe"] <= alone["nfe"]
    # The rule in the product is as it was.
    assert run_drafts.verified_decoding_mdm_asr.cut_drafts is run_drafts.cut_drafts


def test_rules_by_hand():
    # 0.9, 0.6 and 0.5, whose products are 0.9, 0.54 and 0.27; the last of them is an end of text.
    log_probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]]).log()

    def number(rule):
        with run_drafts.proposing_by(rule):
            measures = run_drafts.torch_generation_mdm_asr.entropy(log_probs).numpy()
            _, counts = run_drafts.verified_decoding_mdm_asr.cut_drafts(
                np.array([[4, 4, 7]]), measures, np.array([3]), 0.0, 7
            )
        return int(counts[0])

    assert [number(("number", n)) for n in (1, 2, 5)] == [1, 2, 3]
    assert [number(("confidence", c)) for c in (0.95, 0.6, 0.5, 0.3, 0.2)] == [1, 1, 2, 2, 3]
    assert {number(("random", 3)) for _ in range(1)} <= {1, 2, 3}
