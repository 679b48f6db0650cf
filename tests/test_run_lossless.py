"""The summaries of benchmarks/run_lossless.py and run_safeguards.py, on rows made by hand."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import run_lossless  # noqa: E402
import run_safeguards  # noqa: E402


def test_a_line_for_each_set():
    row = {"is_same": True, "is_loop": True, "accepted": [0, 0], "rejected": [0, 0], "compression_ratio": 1.0}
    rows = [
        {
            "set": "a",
            "reference": "Red green blue grey.",
            "stock": "red green glue grey",
            "own": "Red, green blue grey",
        },
        {"set": "a", "reference": "pink gold", "stock": "pink", "own": "no no no no no no"},
        {"set": "b", "reference": "cyan", "stock": "cyan", "own": "cyan"},
    ]
    counts = [{"nfe": 2, "tokens": 6}, {"nfe": 4, "tokens": 7}, {"nfe": 3, "tokens": 3}]
    rows = [{**row, **one, **count} for one, count in zip(rows, counts, strict=True)]
    rows[1]["is_same"] = False
    first, second = run_lossless.summarise(rows)
    # Of six words: a substitution and a deletion; two substitutions and four insertions.
    assert first["wer_stock"] == pytest.approx(100 * 2 / 6, abs=0.01)
    assert first["wer_own"] == pytest.approx(100 * 6 / 6, abs=0.01)
    assert (first["same_ids"], first["ids_of_the_loop"], first["loops"]) == (1, 2, 1)
    assert first["nfe"] == 3.0 and first["tokens_per_evaluation"] == pytest.approx(13 / 6, abs=1e-3)
    assert second["utterances"] == 1 and second["wer_own"] == 0.0
    assert run_lossless.to_markdown([first, second]).count("\n") == 4


def test_texts_and_loops_are_counted_with_and_without_safeguards():
    rows = [
        {"group": "sounds", "text": "", "bare": "la la la la"},
        {"group": "sounds", "text": "you", "bare": "you"},
        {"group": "crops", "text": "a b a b a b"},
    ]
    sounds, crops = run_safeguards.summarise(rows)
    assert sounds == {"group": "sounds", "clips": 2, "texts": 1, "text_loops": 0, "bares": 2, "bare_loops": 1}
    assert crops == {"group": "crops", "clips": 1, "texts": 1, "text_loops": 1, "bares": None, "bare_loops": None}
    assert run_safeguards.to_markdown([crops]).splitlines()[-1] == "| crops | 1 | 1 | 1 |  |  |"


def test_the_readmes_table_is_of_the_results():
    folder = ROOT / "benchmarks" / "results" / "lossless"
    lines = json.loads((folder / "results.json").read_text())["sets"]
    assert run_lossless.to_markdown(lines) == (folder / "results.md").read_text()
    assert (folder / "results.md").read_text() in (ROOT / "README.md").read_text()
    # Not one id differs.
    assert all(line["same_ids"] == line["ids_of_the_loop"] == line["utterances"] for line in lines)
    assert all(line["loops"] == 0 for line in lines)
