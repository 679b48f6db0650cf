# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/run_speed.py: clips, stages, tables from raw rows by hand, and whole runs of tiny models."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import tiny_drafts_model, tiny_model, tiny_processor

from mdm_asr_hf import drafting_mdm_asr
from mdm_asr_hf.generation_mdm_asr import MDMASRGenerationMixin

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import run_speed  # noqa: E402
import speed_tables  # noqa: E402


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny canvas, a tiny model with drafts, and recordings of 0.5, 0.9 and 0.7 s."""
    root = tmp_path_factory.mktemp("speed")
    model = tiny_model()
    model.generation_config.max_denoising_steps = 6
    drafter = tiny_drafts_model(dtype=torch.float32)
    drafter.generation_config.max_new_tokens = 12
    for name, one in (("canvas", model), ("drafts", drafter)):
        one.save_pretrained(root / name)
        tiny_processor().save_pretrained(root / name)
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


def run(setting, model, output, *arguments):
    common = ["--data", str(setting / "data"), "--model", str(setting / model), "--threads", "1"]
    summary = run_speed.main([*common, "--output", str(output), *map(str, arguments)])
    return summary, read(output)


def read(output):
    return [json.loads(line) for line in (output / "raw.jsonl").read_text().splitlines()]


def check_that_the_tables_can_be_made_again(output):
    made = {name: (output / name).read_bytes() for name in ("results.json", "results.md")}
    for name in made:
        (output / name).unlink()
    run_speed.main(["--rescore", str(output)])
    assert {name: (output / name).read_bytes() for name in made} == made
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_clips_are_of_exact_lengths_and_start_with_one_utterance_each(setting):
    clips = run_speed.cut_clips(setting / "data", [0.25, 1.5], 4)
    assert [len(clip) for clip in clips[0.25]] == [4000] * 4 and [len(clip) for clip in clips[1.5]] == [24_000] * 4
    first, second, third = (soundfile.read(setting / "data" / f"{i}.wav", dtype="float32")[0] for i in range(3))
    np.testing.assert_array_equal(clips[1.5][1], np.concatenate([second, third])[:24_000])
    np.testing.assert_array_equal(clips[1.5][2], np.concatenate([third, first, second])[:24_000])
    np.testing.assert_array_equal(clips[1.5][3], clips[1.5][0])


def test_names_of_systems():
    assert run_speed.read_system("fast:gamma=1,k=2") == ("fast", "gamma=1,k=2")
    assert run_speed.read_system("gamma=1") == ("gamma=1", "gamma=1")
    assert run_speed.read_system("") == ("its own settings", "") and run_speed.read_system("own:") == ("own", "")


COMMON = {"encoder", "cross keys", "decoder", "output layer", "sampler"}
SYSTEMS = {
    "canvas": ({"slow": "gamma=0", "fast": "gamma=inf"}, COMMON, COMMON),
    "drafts": (
        {"slow": "branches=none", "fast": "branches=masks"},
        COMMON,
        COMMON | {"draft head"},
    ),
}


@pytest.mark.parametrize("model", list(SYSTEMS))
def test_stages_of_a_tiny_model(setting, tmp_path, model):
    output, (systems, of_slow, of_fast) = tmp_path / "output", SYSTEMS[model]
    arguments = [part for name, settings in systems.items() for part in ("--ours", f"{name}:{settings}")]
    arguments += ["--lengths", 0.5, 2, "--batch-sizes", 1, 3, "--clips", 2, "--rounds", 2, "--no-profile"]
    summary, rows = run(setting, model, output, *arguments)
    shapes = [(b, s, name) for b in (1, 3) for s in (0.5, 2.0) for name in ("slow", "fast")]
    times = [row for row in rows if row["kind"] == "time"]
    # Every shape once a round.
    expected = [(round_number, *shape) for round_number in (1, 2) for shape in shapes]
    assert [(row["round"], row["batch_size"], row["length_s"], row["system"]) for row in times] == expected
    for row in times:
        stages, wanted = row["stages"], of_slow if row["system"] == "slow" else of_fast
        assert set(stages) == {"generate", "features", *wanted} and min(stages.values()) > 0
        inner = sum(stages[stage] for stage in wanted)
        assert inner < stages["generate"] and stages["generate"] + stages["features"] < row["wall_s"]
        assert row["num_clips"] == len(row["nfe"]) == max(2, row["batch_size"])
        assert row["audio_s"] == row["length_s"] * row["num_clips"]
        assert ("hypotheses" in row) == (row["round"] == 1)
        if wanted == COMMON:
            assert row["evaluations"] == (sum if row["batch_size"] == 1 else max)(row["nfe"])
    results = {(one["system"], one["batch_size"], one["length_s"]): one for one in summary["results"]}
    slow, fast = results["slow", 1, 2.0], results["fast", 1, 2.0]
    if model == "canvas":
        # The start token and 7 * 2 + 10 tokens in each evaluation.
        assert slow["positions"] == pytest.approx(25 * slow["mean_nfe"], abs=0.01)
        assert fast["positions"] < slow["positions"]
    else:
        # A token in each, and with drafts the same text.
        assert slow["positions"] == slow["mean_nfe"] > fast["mean_nfe"] and fast["positions"] > slow["positions"]
        texts = {row["system"]: row["hypotheses"] for row in times if row["round"] == row["batch_size"] == 1}
        assert texts["slow"] == texts["fast"]
    assert not (output / "profiles").exists()
    check_that_the_tables_can_be_made_again(output)


def test_a_profile(setting, tmp_path):
    arguments = ["--ours", "a b:gamma=1", "--lengths", 0.5, "--batch-sizes", 1, "--clips", 1, "--rounds", 1]
    run(setting, "drafts", tmp_path, *arguments)
    [path] = (tmp_path / "profiles").iterdir()
    assert path.name == "a_b-torch-0.5s-batch1.txt"
    text = path.read_text()
    assert "# encoder" in text and "# draft head" in text and "addmm" in text


class Decoder:
    """As an export has it: no module, and called with ids."""

    def __call__(self, input_ids, frontiers=None):
        return input_ids.float()


class Exported(MDMASRGenerationMixin):
    config = SimpleNamespace(has_drafts=True, decoder_config=SimpleNamespace(draft_length=4))

    def __init__(self):
        self.decoder = Decoder()

    def get_decoder(self):
        return self.decoder

    def encode(self):
        return self

    def prepare_cross_attention(self):
        return self

    def draft_logits(self):
        pass

    def generate(self):
        self.encode().prepare_cross_attention()
        for _ in range(3):
            self.decoder(torch.zeros((2, 5), dtype=torch.long), frontiers=torch.zeros((2, 1)))
            self.draft_logits()
            drafting_mdm_asr.propose_tokens(torch.zeros((2, 3)))
        return self


def test_the_stages_of_an_export():
    exported, clock = Exported(), run_speed.StageClock(lambda: None)
    call = Decoder.__call__
    with run_speed.watch_stages(exported, clock.around, clock.on_evaluation):
        exported.generate()
    assert set(clock.seconds) == {"encoder", "cross keys", "decoder", "draft head", "sampler"}
    # Ten causal rows and eight masks.
    assert (clock.evaluations, clock.positions) == (3, 54)
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
    line = speed_tables.stages_to_markdown([result])[0].splitlines()[2]
    assert line.startswith("| ours | 1 | 1000.0 | 100.0 | 100.0 |") and line.endswith("| 4.5 | 25 |")


def test_wrong_arguments(setting, tmp_path, capsys):
    for arguments, text in (
        (["--output", str(tmp_path)], "--data and --output are needed"),
        (["--backend", "onnx"], "needs --onnx FOLDER"),
        (["--rounds", "0"], "must be above 0"),
    ):
        with pytest.raises(SystemExit):
            run_speed.main(arguments)
        assert text in capsys.readouterr().err
    for arguments, text in (
        (["--ours", "a:k=1", "--ours", "a:k=2"], "a name of its own"),
        (["--ours", "a:onnx=folder"], "must be NAME=VALUE"),
        (["--ours", "a:steps=4"], "'max_denoising_steps'.* for checkpoints with a canvas"),
    ):
        with pytest.raises(SystemExit, match=text):
            run(setting, "drafts", tmp_path, *arguments)
    with pytest.raises(SystemExit, match="does not exist"):
        run_speed.main(["--rescore", str(tmp_path / "gone")])


def test_importing_the_script_imports_no_torch():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import run_speed; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Whose threads are set by the run.
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())
