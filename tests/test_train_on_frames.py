"""An encoder that learns to do without silence, and a decoder that learns on its frames, from a tiny donor."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert_whisper import save_donor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

TRAINING = Path(__file__).parents[1] / "training"
sys.path.insert(0, str(TRAINING))

import distill_encoder  # noqa: E402
import tones  # noqa: E402
import train_on_frames  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    save_donor(path / "donor", False, max_target_positions=160)
    rows, tones.NUM_ROWS = tones.NUM_ROWS, {"train": 8, "eval": 3}
    tones.main(path / "tones")
    tones.NUM_ROWS = rows
    return path


@pytest.fixture(scope="module")
def distilled(folder):
    results = distill_encoder.main(
        [
            *("--donor", str(folder / "donor"), "--vocab-size", "280", "--sources", str(folder / "tones" / "train")),
            *("--held-out", str(folder / "tones" / "eval"), "--minutes", "0.1", "--seconds-per-batch", "12"),
            *(
                "--join-max-s",
                "6",
                "--teacher-silence-s",
                "1",
                "--warmup-steps",
                "2",
                "--output",
                str(folder / "model"),
            ),
        ]
    )
    return results, folder / "model"


def arguments(folder, model, output, *more):
    return [
        *("--model", str(model), "--sources", json.dumps({"path": str(folder / "tones" / "train"), "passes": 2})),
        *("--frames", str(folder / "made"), "--output_dir", str(output), "--join_max_s", "6", "--max_steps", "2"),
        *("--max_seconds_per_batch", "12", "--use_cpu", "true", "--freeze_encoder", "true", "--report_to", "none"),
        *("--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true", *more),
    ]


def test_the_encoder_comes_closer_to_the_one_that_hears_silence(distilled):
    results, path = distilled
    assert 0 < results["unexplained_after"] < results["unexplained_before"]
    assert json.loads((path / "distillation.json").read_text())["num_steps"] == results["num_steps"] > 1
    model = AutoModelForSpeechSeq2Seq.from_pretrained(path)
    assert model.config.encoder_trailing_silence_s == 0 and model.config.shift_logits


def test_frames_are_the_encoders_and_labels_the_texts(folder, distilled):
    results = train_on_frames.main(
        arguments(folder, distilled[1], folder / "out", "--augment", "false", "--freeze_embeddings", "true")
    )
    assert results["train"]["train_audio_s_per_s"] > results["train"]["train_rows_per_s"] > 0
    assert [entry["step"] for entry in results["log"] if "loss_step_2" in entry] == [1, 2]
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder / "out")
    processor = AutoProcessor.from_pretrained(folder / "out")
    before = AutoModelForSpeechSeq2Seq.from_pretrained(distilled[1])
    for name, value in before.get_encoder().state_dict().items():
        assert torch.equal(value, model.get_encoder().state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))

    # Two passes over eight recordings, each of them once a pass, in windows of other company.
    texts = [json.loads(line) for line in (folder / "tones" / "train" / "metadata.jsonl").read_text().splitlines()]
    data = train_on_frames.EncodedWindows(folder / "made", 50.0)
    words = sorted(word for row in data for word in processor.decode(row["labels"], skip_special_tokens=True).split())
    assert words == sorted(2 * [word for row in texts for word in row["text"].split()])
    lengths_s = np.array([len(row["frames"]) / 50 for row in data])
    assert np.allclose(lengths_s, data.durations_s)
    # Of a recording that stands alone, the frames are those of its own.
    alone = {row["text"]: row for row in texts}
    found = 0
    for row in data:
        text = processor.decode(row["labels"], skip_special_tokens=True).strip()
        if text in alone:
            own = model.encode(**processor(folder / "tones" / "train" / alone[text]["file_name"])).last_hidden_state[0]
            assert len(own) == len(row["frames"])
            # Encoded in fp32, as there is no `--bf16`, and kept in fp16.
            assert (own - row["frames"].float()).abs().mean() < 1e-3 * own.abs().mean()
            found += 1
    assert found


def test_frames_are_read_again_and_the_encoder_stays(folder, distilled, tmp_path):
    if not (folder / "made" / "index.json").exists():
        train_on_frames.main(arguments(folder, distilled[1], folder / "out"))
    kept = (folder / "made" / "index.json").stat().st_mtime_ns
    results = train_on_frames.main(arguments(folder, distilled[1], tmp_path / "again"))
    assert (folder / "made" / "index.json").stat().st_mtime_ns == kept and results["train"]["train_loss"] > 0
    windows = ("--window_ahead", "4", "--donor_learning_rate", "1e-4", "--learning_rate", "1e-3")
    results = train_on_frames.main(arguments(folder, distilled[1], tmp_path / "windows", *windows))
    assert [entry["loss_step_2"] > 0 for entry in results["log"] if "loss_step_2" in entry] == [True, True]
    with pytest.raises(ValueError, match="freeze_encoder"):
        train_on_frames.main(arguments(folder, distilled[1], tmp_path, "--freeze_encoder", "false"))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_canvases_short_or_as_generate_lays_them(share):
    collate = train_on_frames.FrameCollator(share, lambda duration_s: int(7 * duration_s) + 10, 50.0, 40, seed=0)
    rows = [
        {"frames": torch.ones(100, 4), "labels": torch.tensor([5, 6, 7])},
        {"frames": torch.ones(50, 4), "labels": torch.tensor([5])},
    ]
    batch = collate(rows)
    mask = batch["encoder_outputs"].attention_mask
    assert mask.sum(dim=-1).tolist() == [100, 50]
    assert batch["labels"][1, :2].tolist() == [5, -100] and batch["labels"][0, :3].tolist() == [5, 6, 7]
    # 2 s at 7 tokens per second and 10 more.
    assert batch["labels"].shape[1] == 24 if share == 0 else 4 <= batch["labels"].shape[1] <= 13
    # No canvas is longer than the decoder's positions.
    assert collate([{"frames": torch.ones(1000, 4), "labels": torch.arange(38)}])["labels"].shape[1] <= 40
