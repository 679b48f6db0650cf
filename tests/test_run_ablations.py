# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""training/run_ablations.py: tables and sentences from rows, and whole runs of tiny models, cut and resumed."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from canary_donors import randomize
from tiny_models import tiny_drafts_model, tiny_model, tiny_processor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mdm_asr_hf.evaluate.evaluation import evaluate_model
from mdm_asr_hf.evaluate.scoring import compare, score

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training"))

import ablation_tables  # noqa: E402
import plot_ablations  # noqa: E402
import run_ablations  # noqa: E402

FILES = ("table.csv", "table.md", "figure.png", "summary.json")
TIMES = ("features_s", "encoder_s", "decoder_s")


def rows_of(errors, num_words=10, **columns):
    """One row per entry of `errors`, with so many of its words wrong."""
    common = {
        "dataset": "a",
        "language": "en",
        "duration_s": 2.0,
        "gamma": None,
        "lambda": None,
        "seed": 0,
        "steps": 32,
    }
    common |= {"model": "ours", "sampler": "pbeb_conf", "num_parameters": 7, "nfe": 4} | columns
    reference = " ".join(f"w{chr(97 + i)}" for i in range(num_words))
    return [
        common | {"id": f"{i:03}", "reference": reference, "hypothesis": " ".join(["x"] * n + reference.split()[n:])}
        for i, n in enumerate(errors)
    ]


def tabulate(part, *groups):
    rows = [row for one in groups for row in one]
    return plot_ablations.PARTS[part].tabulate(ablation_tables.add_errors(rows))


# Numbers


def test_pareto_front_by_hand():
    #         front      dominated  front      front, twice            worse in one, equal in the other
    points = [(1.0, 50), (2.0, 60), (3.0, 20), (5.0, 10), (5.0, 10), (6.0, 10), (3.0, 21)]
    assert ablation_tables.pareto_front(points) == [0, 2, 3, 4]
    assert ablation_tables.pareto_front([(4, 4)]) == [0] and ablation_tables.pareto_front([]) == []


def test_log_slope_is_the_exponent_for_each_line_of_weights():
    x = np.array([1.0, 4.0, 16.0, 100.0])
    y = np.array([3.0, 6.0, 12.0, 1.0])
    # Without the last, 3 x^0.5; the first and the last alone give log(1/3) / log(100).
    slopes = ablation_tables.log_slope(x, y, np.array([[1, 1, 2, 0], [1, 0, 0, 1], [0, 0, 5, 0]]))
    assert slopes[:2] == pytest.approx([0.5, math.log(1 / 3) / math.log(100)])
    # One length alone has no slope.
    assert math.isnan(slopes[2])


def test_intervals_and_paired_differences_are_those_of_scoring():
    rng = np.random.default_rng(0)
    ours = rows_of(rng.integers(0, 3, 40), nfe=5)
    others = rows_of(rng.integers(0, 6, 40), sampler="eb_conf")
    table, _ = tabulate("samplers", others, ours)
    eb, pbeb = table
    assert (eb["sampler"], pbeb["sampler"]) == ("eb_conf", "pbeb_conf")
    for row, its_rows in ((eb, others), (pbeb, ours)):
        scored = score(its_rows)
        assert row["wer"] == scored["metrics"]["wer"] and row["nfe"] == scored["metrics"]["mean_nfe"]
        assert [row["wer_low"], row["wer_high"]] == scored["intervals"]["wer"]
    compared = compare(others, ours)
    assert eb["minus_pbeb_conf"] == compared["difference"] and pbeb.get("minus_pbeb_conf") is None
    assert [eb["minus_pbeb_conf_low"], eb["minus_pbeb_conf_high"]] == compared["interval"]


def test_seeds_are_averaged_within_utterances():
    ours = rows_of([1, 1, 1, 1])
    drawn = [rows_of([n] * 4, sampler="random", seed=seed) for seed, n in enumerate((2, 4, 9))]
    random, _ = tabulate("samplers", ours, *drawn)[0]
    assert (random["wer"], random["wer_min_seed"], random["wer_max_seed"], random["num_seeds"]) == (50, 20, 90, 3)
    # Every utterance has the same average: an interval of twelve independent rows would have a width.
    assert (random["minus_pbeb_conf"], random["minus_pbeb_conf_low"], random["minus_pbeb_conf_high"]) == (40, 40, 40)
    assert random["num_utterances"] == 4 and random["num_words"] == 40


def test_utterances_that_one_setting_lacks_are_left_out_for_all():
    eb, pbeb = tabulate("samplers", rows_of([2, 2, 10], sampler="eb_conf"), rows_of([1, 1]))[0]
    assert (eb["wer"], pbeb["wer"], eb["num_utterances"], eb["num_dropped"]) == (20, 10, 2, 1)


# Sentences


def test_samplers_order():
    table, sentences = tabulate(
        "samplers",
        rows_of([2] * 9, sampler="random"),
        rows_of([1] * 8 + [4], sampler="eb_conf"),
        rows_of([1] * 9),
        rows_of([3] * 9, dataset="b", sampler="random"),
        rows_of([1] * 9, dataset="b", sampler="eb_conf"),
        # Two utterances at the bound, alone to blame.
        [*rows_of([1] * 7, dataset="b"), *rows_of([1] * 7 + [8, 8], dataset="b", nfe=32)[7:]],
    )
    assert [row["dataset"] for row in table] == ["a"] * 3 + ["b"] * 3 + ["all"] * 3
    assert table[-1]["num_utterances"] == 18 and table[-1]["wer"] == pytest.approx(100 * 32 / 180, abs=0.01)
    assert (
        "lowest on 1 of 2 sets" in sentences[0]
        and "random: ahead on 1, within chance on 1; eb_conf: within" in sentences[0]
    )
    assert sentences[1].startswith(
        "On b eb_conf is the lowest, -15.56 [-38.89, 0.00] points against pbeb_conf, within"
    )
    assert sentences[1].endswith("without them it is 0.00 [0.00, 0.00], so the bound is the likely reason.")


def nfe_rows(model, at_2, at_32):
    return [*rows_of(at_2, model=model, steps=2), *rows_of(at_32, model=model, steps=32)]


def test_nfe_order():
    # Plain less ISCT: 4 of 10 words at 2 steps, 0 at 32.
    table, [sentence] = tabulate("nfe", nfe_rows("plain", [5] * 6, [1] * 6), nfe_rows("isct", [1] * 6, [1] * 6))
    assert [(row["model"], row["steps"], row["wer"]) for row in table] == [
        ("plain", 2, 50),
        ("plain", 32, 10),
        ("isct", 2, 10),
        ("isct", 32, 10),
    ]
    assert "40.00 [40.00, 40.00] points at 2 steps and 0.00 [0.00, 0.00] at 32" in sentence
    assert "larger at few steps, as in the paper" in sentence
    [sentence] = tabulate("nfe", nfe_rows("plain-s", [2] * 6, [4] * 6), nfe_rows("isct-s", [2] * 6, [1] * 6))[1]
    assert "isct-s over plain-s" in sentence and "smaller at few steps, against the paper" in sentence
    falls, lacks = tabulate("nfe", nfe_rows("small", [5] * 6, [1] * 6))[1]
    assert "falls by 40.00 [40.00, 40.00] points" in falls and "no gain of ISCT" in lacks


def speed_rows(system, seconds_of, tokens=(4, 5, 16, 20, 64, 70), slow_round=1.0):
    rows = []
    for number in (1, 2, 3):
        for i, count in enumerate(tokens):
            row = rows_of([0], system=system, sampler=system.partition(",")[0], round=number, reference_tokens=count)[
                0
            ]
            edges = next((low, high) for low, high in ((1, 8), (8, 32), (32, None)) if high is None or count < high)
            seconds = seconds_of(count) * (slow_round if number == 2 else 1.0)
            row |= {"id": str(i), "bin_low": edges[0], "bin_high": edges[1], "duration_s": count / 4}
            row |= {"decoder_s": seconds, "wall_s": seconds + 0.25}
            rows.append(row)
    return rows


def test_speed_order():
    table, sentences = tabulate(
        "speed",
        speed_rows("pbeb_conf, gamma 0.05", lambda tokens: 0.5, slow_round=50),
        speed_rows("random", lambda tokens: 1.0),
        speed_rows("ar, donor", lambda tokens: 0.1 * tokens),
    )
    # The donor first, then in the order of the rows; the slow round does not count.
    assert [row["system"] for row in table[::3]] == ["ar, donor", "pbeb_conf, gamma 0.05", "random"]
    ours = table[3]
    assert (ours["tokens_from"], ours["tokens_below"], ours["num_utterances"], ours["median_tokens"]) == (1, 8, 2, 4.5)
    assert ours["rtfx"] == pytest.approx(2.25 / 1.5) and ours["rtfx_decoder"] == pytest.approx(2.25 / 1.0)
    assert ours["rtfx_min_round"] < 0.1 and ours["rtfx_max_round"] == ours["rtfx"] and ours["num_rounds"] == 3
    assert table[0]["rtfx_decoder"] == pytest.approx(2.5)
    ar, pbeb = sentences
    # 0.25 s that do not depend on the length make the whole rise, while the decoder has a constant RTFx.
    assert "(tokens^1.00 [1.00, 1.00]), as in the paper" in pbeb and "of its decoder alone it is flat within" in ar
    table, sentences = tabulate("speed", speed_rows("pbeb_conf", lambda tokens: tokens**2))
    assert "RTFx falls" in sentences[0] and "while the paper's rises" in sentences[0]


def test_front_order():
    grid = {(0.05, 0.0): ([3] * 5, 8), (0.05, 0.2): ([2] * 5, 8), ("inf", 0.0): ([9] * 5, 1), (0.5, 0.2): ([2] * 5, 3)}
    groups = [rows_of(e, nfe=nfe, gamma=gamma, **{"lambda": lam}) for (gamma, lam), (e, nfe) in grid.items()]
    table, [papers, bias] = tabulate("front", *groups)
    assert [(row["gamma"], row["lambda"]) for row in table if row["is_on_front"]] == [(0.5, 0.2), ("inf", 0.0)]
    assert "at 8.00 NFE and is not on the front: gamma 0.5, lambda 0.2 has 3.00 NFE" in papers
    assert "lower WER than lambda 0 beyond chance at 1 of 1 values of gamma" in bias
    assert tabulate("front", *groups[:3])[1][0].endswith("and is on the front.")


# Runs


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two models of ours, a donor, and two sets of four and two noises."""
    root = tmp_path_factory.mktemp("ablations")
    for seed, name in enumerate(("isct", "plain")):
        model = tiny_model(seed=seed)
        model.generation_config.canvas_length = 12
        model.generation_config.sampler = {"name": "pbeb_conf", "gamma": 0.7, "lambda_": 0.2}
        model.save_pretrained(root / name)
        tiny_processor().save_pretrained(root / name)
    rng = np.random.default_rng(0)
    for name, texts in (
        ("many", ["a", "be", "a long word", "six or more words are here"]),
        ("few", ["no", "yes it is"]),
    ):
        (root / name).mkdir()
        lines = []
        for i, text in enumerate(texts):
            soundfile.write(root / name / f"{i}.wav", 0.1 * rng.standard_normal(4000 + 1600 * i), 16_000)
            lines.append(json.dumps({"file_name": f"{i}.wav", "text": text}) + "\n")
        (root / name / "metadata.jsonl").write_text("".join(lines))
    return root


def save_donor(folder):
    """A Whisper for clips of up to 30 s, which writes bytes and stops after 12 tokens."""
    vocab = {character: i for i, character in enumerate(bytes_to_unicode().values())}
    eos = vocab.setdefault("<|endoftext|>", len(vocab))
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    names = ("startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    specials = [*(f"<|{name}|>" for name in names), "<|a|>", "<|b|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.save_pretrained(folder)
    sizes = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    ids = {"pad_token_id": eos, "bos_token_id": eos, "eos_token_id": eos, "decoder_start_token_id": eos + 1}
    config = WhisperConfig(vocab_size=eos + 17, num_mel_bins=80, d_model=16, **sizes, **ids)
    model = randomize(WhisperForConditionalGeneration(config))
    suppressed = {"suppress_tokens": list(range(eos + 1, eos + 17)), "begin_suppress_tokens": [eos]}
    model.generation_config = GenerationConfig(
        is_multilingual=False, max_length=12, no_timestamps_token_id=eos + 10, **suppressed, **ids
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def run(setting, part, output, *arguments, data=("many", "few"), model="isct"):
    given = [part, "--output", str(output), "--threads", "1", "--data", *(str(setting / name) for name in data)]
    given += ["--model", str(setting / model)] if model else []
    return run_ablations.main([*given, *map(str, arguments)])


def read(folder, kind="utterance"):
    lines = [json.loads(line) for line in (folder / "raw.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in (*TIMES, "wall_s")} for row in rows]


def count_calls(monkeypatch, name):
    calls, original = [], getattr(run_ablations, name)
    monkeypatch.setattr(run_ablations, name, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


def check_redraw(output, part):
    before = {name: (output / part / name).read_bytes() for name in FILES}
    assert all(before.values()) and before["figure.png"].startswith(b"\x89PNG")
    for name in FILES:
        (output / part / name).unlink()
    summaries = run_ablations.main(["--redraw", str(output)])
    assert {name: (output / part / name).read_bytes() for name in FILES} == before
    assert json.loads(before["summary.json"]) == json.loads(json.dumps(summaries[part]))
    return summaries[part]


def test_samplers(setting, tmp_path, monkeypatch, capsys):
    encoded = count_calls(monkeypatch, "encode_dataset")
    run(setting, "samplers", tmp_path, "--steps", 3, 6, "--seeds", 2, "--batch-size", 4)
    assert len(encoded) == 2  # Once for each data set.
    rows = read(tmp_path / "samplers")
    # random and dfm twice, at two bounds.
    assert len(rows) == 7 * 2 * 6
    one = {"dataset": "many", "sampler": "pbeb_conf", "steps": 6, "seed": 0}
    mine = [row for row in rows if one.items() <= row.items()]
    model, processor = run_ablations.load_model(str(setting / "isct"), "cpu")
    settings = model.generation_config
    settings.max_denoising_steps = 6
    expected = evaluate_model(model, processor, setting / "many", settings=settings, batch_size=4)
    keys = ("id", "reference", "hypothesis", "nfe", "duration_s", "confidence", "is_full")
    assert [[row[key] for key in keys] for row in mine] == [[row[key] for key in keys] for row in expected]
    assert {(row["gamma"], row["lambda"]) for row in mine} == {(0.7, 0.2)}
    assert {row["gamma"] for row in rows if row["sampler"] == "eb_conf"} == {0.7}
    assert all(row["nfe"] <= row["steps"] for row in rows)
    summary = check_redraw(tmp_path, "samplers")
    with (tmp_path / "samplers" / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * 3 * 5 and "pbeb_conf is lowest on " in capsys.readouterr().out
    found = next(r for r in table if {"dataset": "many", "sampler": "pbeb_conf", "steps": "6"}.items() <= r.items())
    assert float(found["wer"]) == score(expected, num_bootstrap=0)["metrics"]["wer"]
    [its_run] = summary["runs"]
    assert its_run["command"].startswith("python training/run_ablations.py samplers --output ")
    assert len(its_run["models"]["isct"]["sha256"]) == 64


def test_interrupted_runs_go_on(setting, tmp_path, monkeypatch):
    arguments = ("--models", f"isct={setting / 'isct'}", f"plain={setting / 'plain'}", "--steps", 2, 4)
    summaries = run(setting, "nfe", tmp_path, *arguments, model=None)
    assert "gain of isct over plain" in summaries["nfe"]["sentences"][0]
    path = tmp_path / "nfe" / "raw.jsonl"
    whole = path.read_text()
    rows = read(tmp_path / "nfe")
    assert {(row["model"], row["steps"]) for row in rows} == {(m, n) for m in ("isct", "plain") for n in (2, 4)}
    # The last 8 units of 4 and 2 rows, and their marks: cut amid a line of the sixth.
    lines = whole.splitlines(keepends=True)
    marks = [i for i, line in enumerate(lines) if json.loads(line)["kind"] == "unit"]
    assert len(marks) == 8
    path.write_text("".join(lines[: marks[4] + 2]) + lines[marks[4] + 2][:30])
    decoded = count_calls(monkeypatch, "decode_encoded")
    encoded = count_calls(monkeypatch, "encode_dataset")
    again = run(setting, "nfe", tmp_path, *arguments, model=None)
    assert len(decoded) == 3 and len(encoded) == 2
    assert timeless(read(tmp_path / "nfe")) == timeless(rows) and len(read(tmp_path / "nfe", "run")) == 2
    assert again["nfe"]["table"] == summaries["nfe"]["table"]
    check_redraw(tmp_path, "nfe")
    # Nothing is left to do, and nothing is written.
    text = path.read_text()
    run(setting, "nfe", tmp_path, *arguments, model=None)
    assert len(decoded) == 3 and path.read_text() == text

    with pytest.raises(SystemExit, match="with another model 'isct'"):
        run(setting, "nfe", tmp_path, "--models", f"isct={setting / 'plain'}", model=None)
    with pytest.raises(SystemExit, match="with another data 'many'"):
        run(setting, "nfe", tmp_path, *arguments, "--limit", 3, model=None)
    with pytest.raises(SystemExit, match="with another settings of pbeb_conf"):
        run(setting, "nfe", tmp_path, *arguments, "--gamma", 0.3, model=None)


def test_front(setting, tmp_path):
    grid = ("--gammas", 0, 0.5, "inf", "--lambdas", 0, 0.2)
    run(setting, "front", tmp_path, *grid, "--limit", 2, "--steps", 20)
    rows = read(tmp_path / "front")
    # All in one step once only.
    assert len(rows) == 5 * 4 and {row["nfe"] for row in rows if row["gamma"] == "inf"} == {1}
    assert max(row["nfe"] for row in rows if row["gamma"] == 0) > 3
    by_limit = run_ablations.read_data([str(setting / "many")], 2, 0, None)["many"].rows
    assert [row["id"] for row in rows if row["dataset"] == "many"][:2] == [row["id"] for row in by_limit]
    summary = check_redraw(tmp_path, "front")
    assert [row["num_utterances"] for row in summary["table"]] == [4] * 5 and summary["table"][-1]["is_on_front"]


def test_speed(setting, tmp_path, monkeypatch, capsys):
    donor = tmp_path / "donor"
    save_donor(donor)
    measured = []
    original = run_ablations.OurSystem.__call__

    def spy(self, clip, language):
        measured.append(self.sampler["name"])
        return original(self, clip, language)

    monkeypatch.setattr(run_ablations.OurSystem, "__call__", spy)
    arguments = ("--per-bin", 2, "--length-edges", 1, 8, "--steps", 6, "--rounds", 1)
    run(setting, "speed", tmp_path, *arguments, "--donor", donor)
    rows = read(tmp_path / "speed")
    # Two bins of two utterances, six systems; ours also in the warm-up.
    assert len(rows) == 2 * 2 * 6 and len(measured) == 4 * 5 * 2
    # Another one comes first at every utterance.
    assert measured[5:10] != measured[10:15] and sorted(measured[5:10]) == sorted(measured[10:15])
    # A token a letter, the blank before the text, and the end.
    assert all(row["reference_tokens"] == len(row["reference"]) + 2 for row in rows)
    assert {row["bin_low"] for row in rows if row["reference_tokens"] < 8} == {1}
    assert all(row["wall_s"] == pytest.approx(sum(row[key] for key in TIMES), abs=1e-5) for row in rows)
    ours = [row for row in rows if row["sampler"] == "pbeb_conf" and row["round"] == 1]
    model, processor = run_ablations.load_model(str(setting / "isct"), "cpu")
    model.generation_config.max_denoising_steps = 6
    for row in ours:
        [expected] = [r for r in evaluate_model(model, processor, setting / row["dataset"]) if r["id"] == row["id"]]
        assert (row["hypothesis"], row["nfe"]) == (expected["hypothesis"], expected["nfe"])
    ar = [row for row in rows if row["sampler"] == "ar"]
    assert {row["system"] for row in ar} == {"ar, donor"} and all(row["nfe"] > 1 for row in ar)
    summary = check_redraw(tmp_path, "speed")
    assert len(summary["table"]) == 12 and "donor's RTFx" in summary["sentences"][0]

    with pytest.raises(SystemExit, match="no utterance of `--data` has so many tokens"):
        run(setting, "speed", tmp_path / "other", "--length-edges", 400)
    with pytest.raises(SystemExit, match="with another systems"):
        run(setting, "speed", tmp_path, *arguments)
    with pytest.raises(SystemExit, match="donor.*cannot be loaded"):
        run(setting, "speed", tmp_path / "other", *arguments, "--donor", setting / "few")


def test_what_cannot_be_run_is_told(setting, tmp_path, capsys):
    def refused(message, *arguments):
        with pytest.raises(SystemExit) as error:
            run_ablations.main(list(map(str, arguments)))
        assert message in (str(error.value.code) + capsys.readouterr().err)

    data = ("--data", setting / "few", "--output", tmp_path)
    refused("--data, --output and --model or --models are needed", "samplers")
    its = (*data, "--model", setting / "isct")
    refused("--steps is one number", "front", *its, "--steps", 4, 8)
    refused("--steps is one number", "all", *its, "--steps", 4)
    refused("--limit must be at least 1", "nfe", *its, "--limit", 0)
    refused("must rise", "speed", *its, "--length-edges", 8, 4)
    tiny_drafts_model().save_pretrained(tmp_path / "drafts")
    tiny_processor().save_pretrained(tmp_path / "drafts")
    refused(
        "decodes by drafts, but the paper's ablations are of a canvas", "nfe", *data, "--model", tmp_path / "drafts"
    )
    refused("exclude each other", "nfe", *data, "--model", "x", "--models", "a=x")
    refused("each name once", "nfe", *data, "--models", "a=x", "a=y")
    both = ("--data", setting / "few", setting / "few", "--output", tmp_path)
    refused("two sets called 'few'", "nfe", *both, "--model", setting / "isct")
    refused("holds no <part>/raw.jsonl", "--redraw", tmp_path)
    (tmp_path / "nfe").mkdir()
    (tmp_path / "nfe" / "raw.jsonl").write_text('{"kind": "run"}\n{"kind" unit}\n{}\n')
    refused("raw.jsonl line 2 is not JSON", "--redraw", tmp_path)
    assert torch.get_num_threads() == 1
