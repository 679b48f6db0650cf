#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains the decoder on frames that a frozen encoder has made once, for machines where the encoder's time counts: two
CPU cores with bf16 work through about 100 s of audio per second this way.

    python training/train_on_frames.py --model ENCODER --sources synthetic '{"path": "recordings", "passes": 4}' \
        --frames frames --output_dir OUT --max_minutes 60

`--frames` is a folder that the first run fills, with windows of joined and augmented utterances, other ones in each of
a source's `passes` (1 by default), and that later runs read: 140 MB per hour of audio and pass for a width of 384.
Other options are those of `run_train.py`. OUT holds the model, its processor, checkpoints and results.json.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_train import ModelArguments, load_model, parse_sources, read_arguments
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from mdm_asr_hf.alignment_mdm_asr import frame_duration_s
from mdm_asr_hf.augmentation_mdm_asr import Augmenter
from mdm_asr_hf.data_mdm_asr import DataCollatorForMDMASR, SecondsBatchSampler, load_sources, max_label_tokens
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
from mdm_asr_hf.training_mdm_asr import ISCTTrainer

ENCODED_SECONDS_PER_BATCH = 120.0
ROWS_PER_SHARD = 500


@dataclass
class FrameArguments:
    sources: list[str] = field(
        default_factory=list, metadata={"help": "As `train_sources` of run_train.py; a JSON object may have `passes`."}
    )
    frames: str = field(default="frames", metadata={"help": "Folder of the encoder's frames, made if missing."})
    join_min_s: float = field(default=1.0, metadata={"help": "Shortest window in seconds."})
    join_max_s: float = field(default=20.0, metadata={"help": "Longest window in seconds."})
    augment: bool = field(default=True, metadata={"help": "Noise, speed, room and gain, before encoding."})
    short_canvas_share: float = field(
        default=0.6,
        metadata={
            "help": "Share of batches whose canvas ends 1 to 10 tokens behind the longest text: less to compute."
        },
    )


@torch.no_grad()
def encode(model: Any, processor: Any, sources: list, arguments: FrameArguments, seed: int, is_bf16: bool) -> None:
    """
    Fills `arguments.frames`, shard by shard; the last file that is written is index.json, with what it holds. In bf16
    only if training is: a CPU without it is a hundred times as slow in bf16 as in fp32.
    """
    folder = Path(arguments.frames)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    shards = []
    longest = max_label_tokens(model.config, processor.get_prompt_ids().shape[-1])
    for number, source in enumerate(sources):
        settings = dict(source) if isinstance(source, dict) else {"path": source}
        for turn in range(settings.pop("passes", 1)):
            data = load_sources(
                [settings],
                join={"min_s": arguments.join_min_s, "max_s": arguments.join_max_s},
                seed=seed + number,
                on_bad_row="skip",
            )
            sampler = SecondsBatchSampler(data, ENCODED_SECONDS_PER_BATCH, seed=seed)
            sampler.set_epoch(turn)
            collator = DataCollatorForMDMASR(
                processor,
                on_bad_row="skip",
                augment=Augmenter(seed=seed) if arguments.augment else None,
                max_label_tokens=longest,
                seed=seed + number,
            )
            rows: list[tuple[torch.Tensor, list[int]]] = []
            loader = DataLoader(data, batch_sampler=sampler, collate_fn=collator, num_workers=1)
            for i, batch in enumerate(loader):
                with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_bf16):
                    out = model.encode(
                        batch["input_features"].to(model.device), batch["attention_mask"].to(model.device)
                    )
                for frames, mask, labels in zip(
                    out.last_hidden_state, out.attention_mask, batch["labels"], strict=True
                ):
                    rows.append((frames[mask.bool()].half().cpu(), labels[labels != -100].tolist()))
                if len(rows) >= ROWS_PER_SHARD or i + 1 == len(sampler):
                    shards.append(_write_shard(folder, f"{number}-{turn}-{len(shards):05d}", rows))
                    print(f"{shards[-1]['name']}: {sum(shards[-1]['num_frames'])} frames", flush=True)
                    rows = []
    (folder / "index.json").write_text(json.dumps(shards), encoding="utf-8")


def _write_shard(folder: Path, name: str, rows: list[tuple[torch.Tensor, list[int]]]) -> dict[str, Any]:
    save_file({"frames": torch.cat([frames for frames, _ in rows])}, folder / f"{name}.safetensors")
    return {"name": name, "num_frames": [len(frames) for frames, _ in rows], "labels": [labels for _, labels in rows]}


class EncodedWindows(Dataset):
    """Rows {"frames" (T, D), "labels" (L,)} of a folder that `encode` has filled."""

    def __init__(self, folder: str | Path, frames_per_s: float):
        folder = Path(folder)
        self._rows, num_frames = [], []
        for shard in json.loads((folder / "index.json").read_text(encoding="utf-8")):
            frames = safe_open(folder / f"{shard['name']}.safetensors", "pt").get_slice("frames")
            ends = np.cumsum(shard["num_frames"]).tolist()
            starts = [0, *ends[:-1]]
            self._rows += zip([frames] * len(ends), starts, ends, shard["labels"], strict=True)
            num_frames += shard["num_frames"]
        self.durations_s = np.array(num_frames) / frames_per_s

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        frames, start, end, labels = self._rows[index]
        return {"frames": frames[start:end], "labels": torch.tensor(labels)}


class FrameCollator:
    """
    Batches of [`EncodedWindows`]: encoder outputs, and labels that are as long as the canvas shall be.

    Args:
        short_canvas_share (`float`): of batches whose canvas ends 1 to 10 tokens behind the longest text; the others
            have the canvas that `generate` lays.
        plan (`Callable`): duration in s -> tokens of that canvas.
        frames_per_s (`float`): of the encoder.
        max_tokens (`int`): that a canvas can have.
    """

    def __init__(
        self,
        short_canvas_share: float,
        plan: Callable[[float], int],
        frames_per_s: float,
        max_tokens: int,
        seed: int,
    ):
        self.short_canvas_share, self.plan = short_canvas_share, plan
        self.frames_per_s, self.max_tokens = frames_per_s, max_tokens
        self.draws = np.random.default_rng(seed)

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        frames = torch.nn.utils.rnn.pad_sequence([row["frames"].float() for row in rows], batch_first=True)
        lengths = torch.tensor([len(row["frames"]) for row in rows])
        longest = max(len(row["labels"]) for row in rows)
        if self.draws.random() < self.short_canvas_share:
            width = longest + int(self.draws.integers(1, 11))
        else:
            width = max(longest + 1, self.plan(int(lengths.max()) / self.frames_per_s))
        labels = torch.full((len(rows), min(width, self.max_tokens)), -100)
        for target, row in zip(labels, rows, strict=True):
            target[: len(row["labels"])] = row["labels"]
        mask = torch.arange(frames.shape[1]) < lengths[:, None]
        return {"encoder_outputs": MDMASREncoderOutput(frames, attention_mask=mask), "labels": labels}


def main(argv: list[str]) -> dict:
    model_arguments, frame_arguments, arguments = read_arguments(argv, (ModelArguments, FrameArguments))
    if not arguments.freeze_encoder:
        raise ValueError("`freeze_encoder` must be true: the frames are made once, before training.")
    set_seed(arguments.seed)
    model, processor = load_model(model_arguments)
    if not Path(frame_arguments.frames, "index.json").is_file():
        encode(
            model, processor, parse_sources(frame_arguments.sources), frame_arguments, arguments.seed, arguments.bf16
        )
    settings = model.generation_config
    frames_per_s = 1 / frame_duration_s(model.config.encoder_config, model.config.input_frames_per_s)
    collator = FrameCollator(
        frame_arguments.short_canvas_share,
        lambda duration_s: int(model.planned_tokens(torch.tensor([duration_s]), 1, settings)),
        frames_per_s,
        max_label_tokens(model.config, processor.get_prompt_ids().shape[-1]),
        arguments.seed,
    )
    trainer = ISCTTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=EncodedWindows(frame_arguments.frames, frames_per_s),
        processing_class=processor,
    )
    resume = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trained = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(arguments.output_dir)
    results = {
        "command": "python training/train_on_frames.py " + " ".join(argv),
        "model": asdict(model_arguments),
        "data": asdict(frame_arguments),
        "train": trained.metrics,
        "log": trainer.state.log_history,
    }
    Path(arguments.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
