#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Teaches a Whisper encoder to do without the silence behind the audio that it needs otherwise, which costs as much time
as the audio itself where clips last 5 s. The teacher is the donor's encoder with `--teacher-silence-s` of silence; the
student begins with the same weights, hears the audio alone, and learns to return the same frames. No transcripts are
needed.

    python training/distill_encoder.py --donor openai/whisper-tiny.en --sources synthetic recordings \
        --held-out DIR --minutes 15 --output OUT

Writes OUT, an MDM-ASR model that `run_train.py --model OUT --freeze_encoder true` goes on with: the donor's decoder,
untrained, and the student. OUT/distillation.json has the share of the teacher's variance that the student leaves
unexplained, on rows of `--held-out`, which it does not learn from: 0 is the teacher itself.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from run_train import parse_sources
from torch.utils.data import DataLoader

from mdm_asr_hf import MDMASRForConditionalGeneration, MDMASRProcessor
from mdm_asr_hf.alignment_mdm_asr import frame_duration_s
from mdm_asr_hf.augmentation_mdm_asr import Augmenter
from mdm_asr_hf.data_mdm_asr import DataCollatorForMDMASR, SecondsBatchSampler, load_sources
from mdm_asr_hf.training_arguments_mdm_asr import CLOCKED_SCHEDULES
from mdm_asr_hf.training_mdm_asr import TrainingClock

HELD_OUT_SECONDS_PER_BATCH = 60.0


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", required=True, help="a Whisper checkpoint, folder or id")
    parser.add_argument("--sources", required=True, nargs="+", help="of speech, as of run_train.py")
    parser.add_argument("--held-out", required=True, help="a source that is measured on, and not learned from")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=15.0, help="the learning rate falls with the clock")
    parser.add_argument("--vocab-size", type=int, help="shrink the donor's vocabulary to N ids")
    parser.add_argument("--vocab-text", type=Path, help="sentences: keep the ids that they use most, not the first")
    parser.add_argument("--teacher-silence-s", type=float, default=5.0)
    parser.add_argument("--silence-s", type=float, default=0.0, help="what the student gets")
    parser.add_argument("--join-max-s", type=float, default=20.0, help="longest window of joined utterances")
    parser.add_argument("--seconds-per-batch", type=float, default=120.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument(
        "--fp32", action="store_true", help="compute in fp32, for CPUs without bf16, which are far slower in it"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shrink = {"vocab_size": options.vocab_size, "vocab_text": options.vocab_text}
    load = MDMASRForConditionalGeneration.from_whisper
    teacher = load(options.donor, **shrink).float().to(device).get_encoder().eval()
    model = load(options.donor, **shrink).float().to(device)
    processor = MDMASRProcessor.from_whisper(options.donor, **shrink)
    student = model.get_encoder().train()
    model.config.encoder_trailing_silence_s = options.silence_s

    def frames_of(encoder: torch.nn.Module, batch: dict, silence_s: float) -> torch.Tensor:
        """The frames (N, D) of all rows that belong to their audio."""
        with torch.autocast(device, dtype=torch.bfloat16, enabled=not options.fp32):
            frames = encoder(batch["input_features"], batch["attention_mask"], trailing_silence_s=silence_s)
        num_frames = (batch["attention_mask"].sum(dim=-1) + 1) // 2
        inside = torch.arange(frames.last_hidden_state.shape[1], device=device) < num_frames[:, None]
        return frames.last_hidden_state.float()[inside]

    def make_loader(sources: list[str], seconds: float, is_training: bool) -> DataLoader:
        data = load_sources(
            parse_sources(sources),
            join={"max_s": options.join_max_s} if is_training else None,
            seed=options.seed,
            on_bad_row="skip",
        )
        sampler = SecondsBatchSampler(data, seconds, seed=options.seed, shuffle=is_training)
        augment = Augmenter(seed=options.seed) if is_training else None
        collator = DataCollatorForMDMASR(processor, on_bad_row="skip", augment=augment, seed=options.seed)
        return DataLoader(data, batch_sampler=sampler, collate_fn=collator, num_workers=1)

    def on_device(batch: dict) -> dict:
        return {name: value.to(device) for name, value in batch.items()}

    held_out = make_loader([options.held_out], HELD_OUT_SECONDS_PER_BATCH, False)
    training = make_loader(options.sources, options.seconds_per_batch, True)

    @torch.no_grad()
    def unexplained() -> float:
        student.eval()
        errors, sums, squares, count = 0.0, 0.0, 0.0, 0
        for batch in map(on_device, held_out):
            wanted = frames_of(teacher, batch, options.teacher_silence_s)
            errors += (frames_of(student, batch, options.silence_s) - wanted).square().sum(dim=0)
            sums, squares, count = sums + wanted.sum(dim=0), squares + wanted.square().sum(dim=0), count + len(wanted)
        student.train()
        # Channels weigh alike, as in the loss.
        return float((errors / (squares - sums.square() / count)).mean())

    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.01)
    results = {"command": ["training/distill_encoder.py", *argv], "unexplained_before": unexplained(), "log": []}
    frame_s = frame_duration_s(model.config.encoder_config, model.config.input_frames_per_s)
    step, epoch, deviation, audio_s, recent = 0, 0, None, 0.0, []
    clock = TrainingClock(options.minutes)
    while clock.share < 1:
        training.batch_sampler.set_epoch(epoch)
        for batch in map(on_device, training):
            clock.look(step)
            if clock.share >= 1:
                break
            with torch.no_grad():
                wanted = frames_of(teacher, batch, options.teacher_silence_s)
            if deviation is None:
                # A few of Whisper's channels are a hundred times as large as the others.
                deviation = wanted.std(dim=0).clamp(min=1e-6)
            loss = ((frames_of(student, batch, options.silence_s) - wanted) / deviation).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            warm, cosine = min((step + 1) / (options.warmup_steps + 1), 1.0), CLOCKED_SCHEDULES["cosine"](clock.share)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm * cosine
            optimizer.step()
            step, audio_s = step + 1, audio_s + len(wanted) * frame_s
            recent.append(loss.item())
            if step % 25 == 0:
                results["log"].append({"step": step, "loss": sum(recent) / len(recent), "audio_h": audio_s / 3600})
                print(json.dumps(results["log"][-1]), flush=True)
                recent = []
        epoch += 1
    results |= {"unexplained_after": unexplained(), "num_steps": step, "audio_h": audio_s / 3600}
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    (options.output / "distillation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: results[name] for name in results if name not in ("log", "command")}))
    return results


if __name__ == "__main__":
    main()
