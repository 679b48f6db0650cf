# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
benchmarks/work.py, and a guard against decoding that becomes more work: what the checkpoint of the package computes
for the recording in demo/ may not exceed what work.json holds. After a change that is meant, write it anew:

    python tests/test_work.py --write
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from mdm_asr_hf.int8_mdm_asr import Int8Linear

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from work import STAGES, count_work  # noqa: E402

RECORDED = Path(__file__).with_name("work.json")
WRITE = "python tests/test_work.py --write"
RECORDING = ROOT / "demo" / "common_voice_en_48.flac"
# Seconds of the recording: batches of unequal clips have padding, and rows that finish early.
CLIPS_S = ((0.0, 5.0), (0.0, 3.2), (1.3, 5.0), (2.2, 4.0))
TOLERANCE = 0.02
# Settings that decide what is computed.
SETTINGS = (
    "sampler",
    "max_denoising_steps",
    "active_ahead",
    "active_behind",
    "commit_ahead",
    "repair_rounds",
    "canvas_length",
)
SETTINGS += ("canvas_tokens_per_s", "canvas_extra_tokens")


# The guard


def measure() -> dict:
    """What work.json holds: work per utterance of the same clips, one by one and as a batch."""
    import soundfile

    from mdm_asr_hf import default_checkpoint
    from mdm_asr_hf.cli import load_model

    model, processor = load_model(str(default_checkpoint()), "cpu")
    samples, rate = soundfile.read(RECORDING, dtype="float32")
    clips = [samples[int(start * rate) : int(end * rate)] for start, end in CLIPS_S]
    measured = {"command": WRITE, "settings": {name: getattr(model.generation_config, name) for name in SETTINGS}}
    for batch_size in (1, len(clips)):
        nfe = []
        with count_work(model) as work:
            for i in range(0, len(clips), batch_size):
                inputs = processor(clips[i : i + batch_size], sampling_rate=rate, return_tensors="pt")
                nfe += model.generate(**inputs, return_dict_in_generate=True).nfe.tolist()
        measured[f"batch size {batch_size}"] = {"nfe": sum(nfe) / len(nfe), **work.per_utterance(len(clips))}
    return measured


def exceeding(measured: dict, recorded: dict, path: str = "") -> list[str]:
    """Numbers that exceed the recorded ones by more than the tolerance."""
    found = []
    for name, value in measured.items():
        where = f"{path}{name}"
        if isinstance(value, dict):
            found += exceeding(value, recorded[name], f"{where}, ")
        elif value > recorded[name] * (1 + TOLERANCE):
            found.append(f"{where}: {value}, recorded: {recorded[name]}")
    return found


@pytest.fixture(scope="module")
def measured():
    return measure()


@pytest.mark.parametrize("batch", ["batch size 1", "batch size 4"])
def test_an_utterance_is_no_more_work_than_recorded(measured, batch):
    recorded = json.loads(RECORDED.read_text())
    # Else the guard would be of other settings, and loose. Through JSON, as the recorded ones went.
    settings = json.loads(json.dumps(measured["settings"]))
    assert settings == recorded["settings"], f"The checkpoint has other settings than work.json: {WRITE}"
    found = exceeding(measured[batch], recorded[batch])
    assert not found, f"More work than recorded, {'; '.join(found)}. If that is meant: {WRITE}"


def test_a_batch_takes_the_same_evaluations(measured):
    assert measured["batch size 1"]["nfe"] == measured["batch size 4"]["nfe"] > 1
    assert all(measured["batch size 1"]["macs"][stage] > 0 for stage in STAGES if stage != "sampler")


def test_what_exceeds_is_named():
    recorded = {"nfe": 10.0, "macs": {"encoder": 100, "decoder": 1000}}
    assert exceeding({"nfe": 10.2, "macs": {"encoder": 50, "decoder": 1020}}, recorded) == []
    found = exceeding({"nfe": 10.3, "macs": {"encoder": 103, "decoder": 1000}}, recorded)
    assert found == ["nfe: 10.3, recorded: 10.0", "macs, encoder: 103, recorded: 100"]


# Counting


def generate(model, num_frames, **settings):
    """One token a step, and no end of text: as many evaluations as the canvas has positions."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((1, num_frames, 80), generator=generator)
    settings = {"gamma": 0.0, "suppress_tokens": [1], "max_denoising_steps": 500, "canvas_extra_tokens": 0} | settings
    with count_work(model) as work:
        output = model.generate(features, return_dict_in_generate=True, **settings)
    return work, output


def test_macs_and_positions_by_hand():
    from tiny_models import tiny_model

    model = tiny_model(encoder_trailing_silence_s=0.0)
    work, output = generate(model, 100, canvas_length=5)
    # Five evaluations of start and canvas. 2 layers of width 16: self-attention 4 * 16 * 16, cross-attention without
    # keys and values 2 * 16 * 16, feed-forward 2 * 16 * 32; attention to 6 positions and to 50 frames.
    assert output.nfe.tolist() == [5] and (work.evaluations, work.positions) == (5, 30)
    assert work.decoder_attention_macs == 30 * 2 * 2 * 16 * (6 + 50)
    assert work.macs["decoder"] == 30 * 2 * (6 * 16 * 16 + 2 * 16 * 32) + work.decoder_attention_macs
    assert work.macs["cross keys"] == 2 * 2 * 50 * 16 * 16
    # Logits of what is open: 5, 4, 3, 2, 1.
    assert work.macs["output layer"] == 15 * 16 * 60
    assert work.macs["encoder"] == 100 * 80 * 16 * 3 + 50 * 16 * 16 * 3 + 2 * (
        50 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 50 * 50 * 16
    )
    assert work.macs["sampler"] == 0
    # The model is as before.
    assert "encode" not in vars(model) and "forward" not in vars(model.model.decoder)


def test_int8_layers_count_as_the_others_do():
    from tiny_models import tiny_model

    model = tiny_model()
    expected = generate(model, 50, canvas_length=4)[0].macs
    model.proj_out = Int8Linear(model.proj_out)
    assert generate(model, 50, canvas_length=4)[0].macs == expected


def test_the_work_of_the_window_is_linear_in_the_audio():
    from tiny_models import tiny_model

    model = tiny_model()
    num_frames = (500, 1000, 2000)

    def per_length(**settings):
        works = [generate(model, n, canvas_tokens_per_s=2.0, **settings)[0] for n in num_frames]
        # A step for each of 10, 20 and 40 canvas positions.
        assert [work.evaluations for work in works] == [10, 20, 40]
        of_positions = [
            work.macs["decoder"] - work.decoder_attention_macs + work.macs["output layer"] for work in works
        ]
        return [work.positions for work in works], of_positions, [work.decoder_attention_macs for work in works]

    def growth(values):
        return [after / before for before, after in zip(values, values[1:], strict=False)]

    positions, of_positions, attention = per_length(active_ahead=4, active_behind=2)
    assert max(growth(positions)) < 2.3 and max(growth(of_positions)) < 2.3
    # Each of a fixed number of positions a step still looks at all frames.
    assert max(growth(attention)) < 4.5
    positions, of_positions, attention = per_length(active_ahead=None)
    assert min(growth(positions)) > 3.4 and min(growth(of_positions)) > 3.4 and min(growth(attention)) > 6


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {WRITE}")
    torch.set_num_threads(1)
    RECORDED.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {RECORDED}")
