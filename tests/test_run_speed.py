# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/run_speed.py: clips, stages and grids, tables from raw rows by hand, and whole runs of tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import tiny_model, tiny_processor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import run_speed  # noqa: E402
import speed_tables  # noqa: E402
import work  # noqa: E402


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny checkpoint, and recordings of 0.5, 0.9 and 0.7 s."""
    root = tmp_path_factory.mktemp("speed")
    model = tiny_model()
    model.generation_config.max_denoising_steps = 6
    model.save_pretrained(root / "tiny")
    tiny_processor().save_pretrained(root / "tiny")
    (root / "data").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, duration_s in enumerate((0.5, 0.9, 0.7)):
        soundfile.write(root / "data" / f"{i}.wav", 0.1 * rng.standard_normal(round(16_000 * duration_s)), 16_000)
        lines.append(json.dumps({"file_name": f"{i}.wav", "text": f"text {i}"}) + "\n")
    (root / "data" / "metadata.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(autouse=True)
def _settings_of_the_process(monkeypatch):
    """What a run sets is taken back."""
    for name in (*run_speed.THREAD_VARIABLES, "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(setting, part, output, *arguments):
    common = ["--data", str(setting / "data"), "--model", str(setting / "tiny"), "--threads", "1"]
    summary = run_speed.main([part, *common, "--output", str(output), *map(str, arguments)])
    return summary, read(output)


def read(output):
    return [json.loads(line) for line in (output / "raw.jsonl").read_text().splitlines()]


def check_that_the_tables_can_be_made_again(part, output):
    made = {name: (output / name).read_bytes() for name in ("results.json", "results.md")}
    for name in made:
        (output / name).unlink()
    run_speed.main([part, "--rescore", str(output)])
    assert {name: (output / name).read_bytes() for name in made} == made
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


# Stages


def test_clips_are_of_exact_lengths_and_start_with_one_utterance_each(setting):
    clips = run_speed.cut_clips(setting / "data", [0.25, 1.5], 4)
    assert [len(clip) for clip in clips[0.25]] == [4000] * 4 and [len(clip) for clip in clips[1.5]] == [24_000] * 4
    first, second, third = (soundfile.read(setting / "data" / f"{i}.wav", dtype="float32")[0] for i in range(3))
    np.testing.assert_array_equal(clips[1.5][1], np.concatenate([second, third])[:24_000])
    np.testing.assert_array_equal(clips[1.5][2], np.concatenate([third, first, second])[:24_000])
    np.testing.assert_array_equal(clips[1.5][3], clips[1.5][0])


def test_names_of_systems():
    assert run_speed.read_system("near:active-ahead=8") == ("near", "active-ahead=8")
    assert run_speed.read_system("gamma=1") == ("gamma=1", "gamma=1")
    assert run_speed.read_system("") == ("its own settings", "") and run_speed.read_system("own:") == ("own", "")


def test_stages_of_a_tiny_model(setting, tmp_path):
    output = tmp_path / "output"
    arguments = ["--ours", "whole:active-ahead=none", "--ours", "near:active-ahead=2,active-behind=1"]
    arguments += ["--lengths", 0.5, 2, "--batch-sizes", 1, 3, "--clips", 2, "--rounds", 2, "--no-profile"]
    summary, rows = run(setting, "stages", output, *arguments)
    shapes = [(b, s, name) for b in (1, 3) for s in (0.5, 2.0) for name in ("whole", "near")]
    works, times = ([row for row in rows if row["kind"] == kind] for kind in ("work", "time"))
    assert [(row["batch_size"], row["length_s"], row["system"]) for row in works] == shapes
    # Every shape once a round.
    expected = [(round_number, *shape) for round_number in (1, 2) for shape in shapes]
    assert [(row["round"], row["batch_size"], row["length_s"], row["system"]) for row in times] == expected
    for row in times:
        stages = row["stages"]
        assert set(stages) == {"generate", "features", *work.STAGES} and min(stages.values()) > 0
        inner = sum(stages[stage] for stage in work.STAGES)
        assert inner < stages["generate"] and stages["generate"] + stages["features"] < row["wall_s"]
        assert row["num_clips"] == len(row["nfe"]) == max(2, row["batch_size"])
        assert row["audio_s"] == row["length_s"] * row["num_clips"]
        assert ("hypotheses" in row) == (row["round"] == 1)
        if row["batch_size"] == 1:
            assert row["evaluations"] == sum(row["nfe"])
        else:
            assert row["evaluations"] == max(row["nfe"])
    results = {(one["system"], one["batch_size"], one["length_s"]): one for one in summary["results"]}
    whole, near = results["whole", 1, 2.0], results["near", 1, 2.0]
    # The start token and 7 * 2 + 10 tokens in each evaluation.
    assert whole["positions"] == pytest.approx(25 * whole["mean_nfe"], abs=0.01)
    assert near["positions"] < whole["positions"] and near["macs"]["decoder"] < whole["macs"]["decoder"]
    assert near["macs"]["encoder"] == whole["macs"]["encoder"] > 0
    assert not (output / "profiles").exists()
    check_that_the_tables_can_be_made_again("stages", output)


def test_a_profile(setting, tmp_path):
    arguments = ["--ours", "a b:steps=2", "--lengths", 0.5, "--batch-sizes", 1, "--clips", 1, "--rounds", 1]
    run(setting, "stages", tmp_path, *arguments)
    [path] = (tmp_path / "profiles").iterdir()
    assert path.name == "a_b-torch-0.5s-batch1.txt"
    text = path.read_text()
    assert "# encoder" in text and "# sampler" in text and "addmm" in text


class Decoder:
    """As an export has it: no module, and called with ids."""

    def __call__(self, input_ids, frames=None):
        return input_ids.float()


class Exported:
    def __init__(self):
        self.decoder = Decoder()

    def get_decoder(self):
        return self.decoder

    def encode(self):
        return self

    def prepare_cross_attention(self):
        return self

    def generate(self):
        self.encode().prepare_cross_attention()
        self._denoise()
        return self

    def _denoise(self):
        for _ in range(3):
            self.decoder(torch.zeros((2, 5), dtype=torch.long))
            propose_tokens()
            sampler_step()


def propose_tokens():
    """Where `_denoise` finds it."""


def sampler_step():
    """As well."""


def test_the_stages_of_an_export():
    exported, clock = Exported(), run_speed.StageClock(lambda: None)
    call = Decoder.__call__
    with work.watch_stages(exported, clock.around, clock.on_evaluation):
        exported.generate()
    assert set(clock.seconds) == {"encoder", "cross keys", "decoder", "sampler"}
    assert (clock.evaluations, clock.positions) == (3, 30)
    exported.generate()
    assert clock.evaluations == 3 and Decoder.__call__ is call


def stage_row(round_number, wall_s, **stages):
    common = {"kind": "time", "system": "ours", "backend": "torch", "dtype": "float32", "settings": ""}
    common |= {"batch_size": 2, "length_s": 1.0, "round": round_number, "num_batches": 2, "num_clips": 4}
    common |= {"audio_s": 4.0, "positions": 100, "evaluations": 10, "nfe": [3, 4, 5, 6]}
    return common | {"wall_s": wall_s, "stages": {"generate": stages["encoder"] + stages["decoder"] + 0.2} | stages}


def test_medians_of_stages_by_hand():
    rows = [stage_row(1, 4.0, features=0.4, encoder=0.4, decoder=2.0)]
    rows += [stage_row(2, 2.0, features=0.2, encoder=0.2, decoder=1.0)]
    rows += [stage_row(3, 1.8, features=0.2, encoder=0.2, decoder=0.8)]
    [result] = speed_tables.summarise_stages(rows)
    # Of one of the two batches.
    assert (result["wall_s"], result["rtfx"], result["rtfx_min"]) == (1.0, 2.0, 1.0)
    assert result["stages_s"]["encoder"] == 0.1 and result["stages_s"]["decoder"] == 0.5
    assert result["stages_s"]["sampler"] == 0.0 and result["stages_s"]["rest"] == pytest.approx(0.3)
    assert (result["encode_s"], result["decode_s"], result["decode_over_encode"]) == (0.1, 0.6, 6.0)
    assert (result["mean_nfe"], result["positions"], result["evaluations"]) == (4.5, 25.0, 5.0)
    assert result["macs"] is None
    macs = {"encoder": 4e6, "cross keys": 1e6, "decoder": 6e6, "output layer": 2e6, "sampler": 0, "rest": 0}
    counted = {key: value for key, value in rows[0].items() if key not in ("round", "wall_s", "stages")}
    [result] = speed_tables.summarise_stages(
        [counted | {"kind": "work", "macs": macs, "decoder_attention_macs": 1e6}, *rows]
    )
    line = speed_tables.stages_to_markdown([result])[0].splitlines()[2]
    assert line.startswith("| ours | 1 | 1000.0 | 100.0 | 100.0 |") and line.endswith("| 4.5 | 25 | 4 | 9 | 1 |")


# Front


def test_the_grid_repeats_nothing():
    args = run_speed.build_parser().parse_args(
        "front --gammas 0 inf --lambdas 0.2 --aheads none 4 --behinds 1 2 --steps 8".split()
    )
    jobs = run_speed.grid(args)
    assert [(job["gamma"], job["ahead"], job["behind"]) for job in jobs] == [
        *((gamma, None, None) for gamma in (0.0, float("inf"))),
        *((gamma, 4, behind) for behind in (1, 2) for gamma in (0.0, float("inf"))),
    ]
    assert run_speed.jsonable(jobs[1])["gamma"] == "inf"
    args = run_speed.build_parser().parse_args("front --gammas 0.4 --aheads 4 --revises none 0.5".split())
    assert [job["revise"] for job in run_speed.grid(args)] == [None, 0.5]
    args = run_speed.build_parser().parse_args("front --gammas 0.4 --aheads 4 --commits 2 none".split())
    assert [job["commit"] for job in run_speed.grid(args)] == [2, None]


def test_a_front_of_a_tiny_model(setting, tmp_path, monkeypatch):
    output = tmp_path / "output"
    arguments = ["--gammas", 0, "inf", "--aheads", "none", 3, "--steps", 20, "--batch-size", 2]
    summary, rows = run(setting, "front", output, *arguments)
    utterances = [row for row in rows if row["kind"] == "utterance"]
    assert len(utterances) == 4 * 3 and sum(row["kind"] == "done" for row in rows) == 4
    assert all(row["decoder_s"] > 0 for row in utterances)
    for row in utterances:
        if row["setting"]["gamma"] == "inf" and row["setting"]["ahead"] is None:
            # All at once: of two rows that share a batch, or of one, the longest's canvas and the start token.
            assert row["nfe"] == 1 and row["positions"] in (1 + 17, 1 + 15, 1 + 14)
    for one in summary["results"]:
        others = [o for o in summary["results"] if o["ahead"] != one["ahead"] and o["gamma"] == one["gamma"]]
        assert len(others) == 1 and one["num_utterances"] == 3
        if one["ahead"] == 3 and one["gamma"] != "inf":
            assert one["positions"] < others[0]["positions"]
    check_that_the_tables_can_be_made_again("front", output)

    # Cut off in the last setting, it goes on there.
    lines = (output / "raw.jsonl").read_text().splitlines(keepends=True)
    (output / "raw.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])
    decode, decoded = run_speed.decode_batches, []
    monkeypatch.setattr(run_speed, "decode_batches", lambda *rest: decoded.append(rest[-1]) or decode(*rest))
    again, rows = run(setting, "front", output, *arguments)
    # A warm-up, and that setting.
    assert len(decoded) == 2 and sum(row["kind"] == "run" for row in rows) == 2
    for one in (*again["results"], *summary["results"]):
        for name in ("decoder_s", "rtfx_decoder"):
            del one[name]
    assert again["results"] == summary["results"]
    with pytest.raises(SystemExit) as stopped:
        run(setting, "front", output, *arguments, "--limit", 2)
    assert "is of another run" in stopped.value.code


def front_rows(dataset, ahead, hypotheses, nfe, positions):
    setting = {"gamma": 0.2, "lambda": 0.2, "ahead": ahead, "behind": None, "steps": 8}
    rows = [
        {"kind": "utterance", "setting": setting, "dataset": dataset, "reference": "a b c d", "hypothesis": text}
        | {"nfe": nfe, "positions": positions, "decoder_s": 0.5, "duration_s": 2.0}
        for text in hypotheses
    ]
    return [*rows, {"kind": "done", "setting": setting, "dataset": dataset}]


def test_wer_and_fronts_by_hand():
    rows = front_rows("one", None, ["a b c d", "a b c"], 4, 100) + front_rows("two", None, ["a b c d"], 4, 100)
    rows += front_rows("one", 8, ["a b c d", "a b"], 4, 20) + front_rows("two", 8, ["a b c d"], 4, 20)
    rows += front_rows("one", 2, ["a b", "a b"], 5, 30) + front_rows("two", 2, ["a b"], 5, 30)
    # Of one of two data sets only.
    rows += front_rows("one", 99, ["a b c d", "a b c d"], 1, 1)
    whole, near, nearest = speed_tables.summarise_front(rows)
    assert (whole["wer"], near["wer"], nearest["wer"]) == (8.33, 16.67, 50.0)
    assert near["wer_by_dataset"] == {"one": 25.0, "two": 0.0} and near["num_utterances"] == 3
    assert (near["mean_nfe"], near["positions"], near["decoder_s"], near["rtfx_decoder"]) == (4, 20, 0.5, 4.0)
    assert [one["on_front"] for one in (whole, near, nearest)] == [True, False, False]
    assert [one["on_front_of_positions"] for one in (whole, near, nearest)] == [True, True, False]
    assert near["wer_interval"][0] <= near["wer"] <= near["wer_interval"][1]
    head, _, first, *_ = speed_tables.front_to_markdown([whole, near, nearest])[0].splitlines()
    assert "WER % one | WER % two" in head
    assert first.startswith("| 0.2 | 0.2 | none | none | none | none | 8 | 8.33 |")
    assert first.endswith("| 4.0 | NFE, positions |")


# Command line


def test_wrong_arguments(setting, tmp_path, capsys):
    for arguments, text in (
        (["stages", "--output", str(tmp_path)], "--data and --output are needed"),
        (["stages", "--backend", "onnx"], "needs --onnx FOLDER"),
        (["stages", "--data", "a", "b", "--output", str(tmp_path)], "takes one folder"),
        (["stages", "--rounds", "0"], "must be above 0"),
    ):
        with pytest.raises(SystemExit):
            run_speed.main(arguments)
        assert text in capsys.readouterr().err
    for arguments, text in (
        (["--ours", "a:k=1", "--ours", "a:k=2"], "a name of its own"),
        (["--ours", "a:onnx=folder"], "must be NAME=VALUE"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(setting, "stages", tmp_path, *arguments)
        assert text in stopped.value.code
    with pytest.raises(SystemExit) as stopped:
        run_speed.main(["front", "--rescore", str(tmp_path / "gone")])
    assert "does not exist" in stopped.value.code


def test_importing_the_script_imports_no_torch():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import run_speed; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Whose threads are set by the run.
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())
