# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""training/run_ablations.py: tables from rows made by hand, and whole runs of tiny models."""

import json

import ablation_tables
import numpy as np
import pytest
import run_ablations
from tiny_data import save_model, write_data
from tiny_models import tiny_drafts_model, tiny_model, tiny_processor

from mdm_asr_hf.evaluate.evaluation import evaluate_model
from mdm_asr_hf.evaluate.scoring import compare, score


def rows_of(errors, num_words=10, **columns):
    """One row per entry of `errors`, with so many of its words wrong."""
    common = {"dataset": "a", "language": "en", "duration_s": 2.0, "gamma": None, "lambda": None, "seed": 0}
    common |= {"steps": 32, "model": "ours", "sampler": "pbeb_conf", "nfe": 4} | columns
    words = [f"w{chr(97 + i)}" for i in range(num_words)]
    texts = [{"id": f"{i:03}", "hypothesis": " ".join(["x"] * n + words[n:])} for i, n in enumerate(errors)]
    return [common | {"reference": " ".join(words)} | text for text in texts]


def tabulate(part, *groups):
    rows = [row for one in groups for row in one]
    return ablation_tables.PARTS[part].tabulate(ablation_tables.add_errors(rows))


def test_tables_by_hand():
    rng = np.random.default_rng(0)
    ours = rows_of(rng.integers(0, 3, 40), nfe=5)
    others = rows_of(rng.integers(0, 6, 40), sampler="eb_conf")
    eb, pbeb = tabulate("samplers", others, ours)
    for row, its_rows in ((eb, others), (pbeb, ours)):
        scored = score(its_rows)
        assert row["wer"] == scored["metrics"]["wer"] and row["nfe"] == scored["metrics"]["mean_nfe"]
        assert [row["wer_low"], row["wer_high"]] == scored["intervals"]["wer"]
    compared = compare(others, ours)
    assert eb["difference"] == compared["difference"] and "difference" not in pbeb
    assert [eb["difference_low"], eb["difference_high"]] == compared["interval"]

    drawn = [rows_of([n] * 4, sampler="random", seed=seed) for seed, n in enumerate((2, 4, 9))]
    table = tabulate("samplers", rows_of([1] * 4), *drawn, rows_of([3] * 2, dataset="b", nfe=32))
    assert [(row["dataset"], row["sampler"]) for row in table][:3] == [
        ("a", "pbeb_conf"),
        ("a", "random"),
        ("b", "pbeb_conf"),
    ]
    random, of_b = table[1:3]
    # Every utterance has the same average: an interval of twelve independent rows would have a width.
    assert [random[f"difference{end}"] for end in ("", "_low", "_high")] == [40, 40, 40]
    assert (random["wer"], random["num_utterances"], random["num_words"]) == (50, 4, 40)
    assert (of_b["at_limit"], random["at_limit"]) == (100, 0)
    # Utterances that one setting lacks are left out for all.
    assert [row["num_utterances"] for row in table if row["dataset"] == "all"] == [4, 4]

    groups = [rows_of([n] * 6, model=m, steps=s) for m, s, n in (("isct", 2, 1), ("isct", 32, 1), ("plain", 2, 5))]
    found = {(row["model"], row["steps"]): (row["wer"], row.get("difference")) for row in tabulate("nfe", *groups)}
    assert found == {("isct", 2): (10, None), ("isct", 32): (10, None), ("plain", 2): (50, 40)}

    #         front      dominated  front      front, twice            worse in one, equal in the other
    points = [(1.0, 50), (2.0, 60), (3.0, 20), (5.0, 10), (5.0, 10), (6.0, 10), (3.0, 21)]
    assert ablation_tables.pareto_front(points) == {0, 2, 3, 4}
    grid = {(0.05, 0.0): (3, 8), (0.05, 0.2): (2, 8), ("inf", 0.0): (9, 1), (0.5, 0.2): (2, 3)}
    groups = [rows_of([n] * 5, nfe=nfe, gamma=gamma, **{"lambda": lam}) for (gamma, lam), (n, nfe) in grid.items()]
    front = [(row["gamma"], row["lambda"]) for row in tabulate("front", *groups) if row["is_on_front"]]
    assert front == [(0.5, 0.2), ("inf", 0.0)]


# Runs


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two models of ours, and two sets of four and two noises."""
    root = tmp_path_factory.mktemp("ablations")
    for seed, name in enumerate(("isct", "plain")):
        model = tiny_model(seed=seed)
        model.generation_config.canvas_length = 12
        model.generation_config.sampler = {"name": "pbeb_conf", "gamma": 0.7, "lambda_": 0.2}
        save_model(root / name, model, tiny_processor())
    write_data(root / "many", (0.25, 0.35, 0.45, 0.55), ["a", "be", "a long word", "six or more words are here"])
    write_data(root / "few", (0.25, 0.35), ["no", "yes it is"])
    return root


def run(setting, part, output, *arguments, data=("many", "few"), model="isct"):
    """Table and rows; redrawn, the files are the same."""
    given = [part, "--output", str(output), "--threads", "1", "--data", *(str(setting / name) for name in data)]
    given += ["--model", str(setting / model)] if model else []
    results = run_ablations.main([*given, *map(str, arguments)])
    files = [output / part / name for name in ("table.md", "results.json")]
    before = [file.read_text() for file in files]
    run_ablations.main([part, "--redraw", str(output)])
    assert [file.read_text() for file in files] == before and (output / part / "figure.png").is_file()
    lines = [json.loads(line) for line in (output / part / "raw.jsonl").read_text().splitlines()]
    assert lines[0]["command"].startswith(f"python training/run_ablations.py {part} --output ")
    return results["table"], lines[1:]


def test_samplers_and_nfe(setting, tmp_path):
    table, rows = run(setting, "samplers", tmp_path, "--steps", 3, 6, "--seeds", 2, "--batch-size", 4)
    # random and dfm twice, at two bounds.
    assert len(rows) == 7 * 2 * 6 and len(table) == 2 * 3 * 5
    one = {"dataset": "many", "sampler": "pbeb_conf", "steps": 6}
    mine = [row for row in rows if one.items() <= row.items()]
    model, processor = run_ablations.load_model(str(setting / "isct"), "cpu")
    model.generation_config.max_denoising_steps = 6
    expected = evaluate_model(model, processor, setting / "many", batch_size=4)
    keys = ("id", "reference", "hypothesis", "nfe", "duration_s")
    assert [[row[key] for key in keys] for row in mine] == [[row[key] for key in keys] for row in expected]
    assert {(row["gamma"], row["lambda"]) for row in mine} == {(0.7, 0.2)}
    assert {row["gamma"] for row in rows if row["sampler"] == "eb_conf"} == {0.7}
    seeds = [[r["hypothesis"] for r in rows if r["sampler"] == "dfm" and r["seed"] == seed] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    (found,) = (row for row in table if one.items() <= row.items())
    assert found["wer"] == score(expected, num_bootstrap=0)["metrics"]["wer"]

    models = ("--models", f"isct={setting / 'isct'}", f"plain={setting / 'plain'}", "--steps", 2, 4)
    _, rows = run(setting, "nfe", tmp_path, *models, model=None)
    assert {(row["model"], row["steps"]) for row in rows} == {(m, n) for m in ("isct", "plain") for n in (2, 4)}
    grid = ("--gammas", 0, 0.5, "inf", "--lambdas", 0, 0.2)
    table, rows = run(setting, "front", tmp_path, *grid, "--limit", 2, "--steps", 20)
    # All in one step once only.
    assert len(rows) == 5 * 4 and {row["nfe"] for row in rows if row["gamma"] == "inf"} == {1}
    assert [row["num_utterances"] for row in table] == [4] * 5 and table[-1]["is_on_front"]


def test_what_cannot_be_run_is_told(setting, tmp_path, capsys):
    def refused(message, *arguments):
        with pytest.raises(SystemExit) as error:
            run_ablations.main(list(map(str, arguments)))
        assert message in (str(error.value.code) + capsys.readouterr().err)

    data = ("--data", setting / "few", "--output", tmp_path)
    refused("--data, --output and --model or --models are needed", "samplers")
    its = (*data, "--model", setting / "isct")
    refused("--steps is one number", "front", *its, "--steps", 4, 8)
    refused("--limit must be at least 1", "nfe", *its, "--limit", 0)
    save_model(tmp_path / "drafts", tiny_drafts_model(), tiny_processor())
    refused("decodes by drafts", "nfe", *data, "--model", tmp_path / "drafts")
    refused("each name once", "nfe", *data, "--models", "a=x", "a=y")
    both = ("--data", setting / "few", setting / "few", "--output", tmp_path, "--model", setting / "isct")
    refused("two sets called 'few'", "nfe", *both)
    refused("does not exist. Run training", "nfe", "--redraw", tmp_path / "other")
