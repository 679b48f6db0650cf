#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Compares what to carry over from an autoregressive donor, at equal training: plain (the logits of a position are read
there), shifted (read one position earlier, as the donor predicts), and shifted with the attention annealed from causal
to full.

    python training/compare_donor_starts.py --donor WHISPER_TINY_EN_DIR --data DIR --output OUT.jsonl

The encoder is frozen and its frames are computed once, so that a few hundred steps take minutes on a CPU. Writes one
line of held-out losses and accuracies per mode and 25 steps, at t = 1 (everything masked) and t = 0.5.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from mdm_asr_hf import DiffusionObjective, MDMASRForConditionalGeneration, MDMASRProcessor
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput

MODES = ("plain", "shift", "shift+anneal")
NUM_HELD_OUT = 50
BATCH_ROWS = 16
EXTRA_TOKENS = 4


def read_rows(folder: Path, num_rows: int) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [row for row in rows if 1.5 < row["duration_s"] < 6][: num_rows + NUM_HELD_OUT]


def make_batch(indices: list[int], frames: list[torch.Tensor], labels: list[torch.Tensor]) -> dict:
    """Inputs of the model for some rows: frames (B, T, D) with their mask, and labels (B, L)."""
    width = max(len(labels[i]) for i in indices) + EXTRA_TOKENS
    targets = torch.full((len(indices), width), -100)
    for row, i in zip(targets, indices, strict=True):
        row[: len(labels[i])] = labels[i]
    hidden = torch.nn.utils.rnn.pad_sequence([frames[i].float() for i in indices], batch_first=True)
    lengths = torch.tensor([len(frames[i]) for i in indices])
    mask = torch.arange(hidden.shape[1]) < lengths[:, None]
    return {"encoder_outputs": MDMASREncoderOutput(hidden, attention_mask=mask), "labels": targets}


def main(donor: str, data: Path, output: Path, num_steps: int, num_rows: int, vocab_size: int) -> None:
    processor = MDMASRProcessor.from_whisper(donor, vocab_size=vocab_size)
    rows, frames = read_rows(data, num_rows), None
    labels = [processor(text=row["text"])["labels"][0] for row in rows]

    for mode in MODES:
        model = MDMASRForConditionalGeneration.from_whisper(donor, vocab_size=vocab_size)
        model.config.shift_logits = mode != "plain"
        # Short canvases: the texts and a few tokens, so that the end-of-text tail does not hide the words.
        model.generation_config.canvas_tokens_per_s = model.generation_config.canvas_extra_tokens = 0
        model.freeze_encoder()
        model.get_input_embeddings().requires_grad_(False)
        if frames is None:
            frames = []
            for row in rows:
                with torch.no_grad():
                    frames.append(model.encode(**processor(data / row["file_name"])).last_hidden_state[0].half())

        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        torch.manual_seed(0)
        draw = random.Random(1)
        held_out = list(range(len(rows) - NUM_HELD_OUT, len(rows)))
        for step in range(num_steps):
            model.train()
            visibility = step / (num_steps / 2) if mode == "shift+anneal" and step < num_steps / 2 else None
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * min(1.0, (step + 1) / 20) * max(0.1, 1 - step / num_steps)
            indices = draw.sample(range(len(rows) - NUM_HELD_OUT), BATCH_ROWS)
            model(
                **make_batch(indices, frames, labels), objective=DiffusionObjective(), future_visibility=visibility
            ).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 25 == 0:
                model.eval()
                record = {"mode": mode, "step": step + 1}
                for t in (1.0, 0.5):
                    with torch.no_grad():
                        out = model(**make_batch(held_out, frames, labels), timesteps=torch.full((NUM_HELD_OUT,), t))
                    record |= {f"loss_t{t}": out.loss.item(), f"accuracy_t{t}": out.step_accuracies[0].item()}
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=150)
    parser.add_argument("--num_rows", type=int, default=850)
    parser.add_argument("--vocab_size", type=int, default=16384)
    main(**vars(parser.parse_args()))
