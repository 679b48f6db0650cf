#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What each part of the drafts adds, by real decoding; and how much silence the encoder needs.

    python benchmarks/run_drafts.py decoding --model FOLDER --data DIR [DIR ...] --output OUT
    python benchmarks/run_drafts.py silence --model FOLDER --data DIR [DIR ...] --output OUT

decoding: every way of drafting on the same frames: the number of masks, the sequential head, and the
    rule of how many drafts are proposed: PBEB-Conf's budget of entropy, a fixed number, a fixed confidence, at random.
    The text is the same in all, which is checked.
silence: WER and the encoder's time by the seconds of silence behind the audio.
Writes OUT/results.json and OUT/results.md, for each set and condition.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_lossless import LOOP, write_results
from run_peers import table

import mdm_asr_hf
from mdm_asr_hf import torch_generation_mdm_asr, verified_decoding_mdm_asr
from mdm_asr_hf.drafting_mdm_asr import cut_drafts
from mdm_asr_hf.evaluate.evaluation import decode_encoded, encode_dataset
from mdm_asr_hf.evaluate.scoring import count_errors, most_in_a_row, normaliser
from mdm_asr_hf.safeguards_mdm_asr import NO_SAFEGUARDS

MASKS = ["masks"]
# Silence behind the audio, at least, and audio and silence together, at least.
SILENCES_S = ((0.5, 0.0), (1.0, 0.0), (1.0, 3.0), (2.0, 0.0), (3.0, 0.0), (5.0, 0.0), (5.0, 15.0))


def decoding_conditions(length: int) -> dict[str, dict[str, Any]]:
    """
    Conditions by name: settings of generation; "head": False leaves the sequential head out; "rule" replaces
    PBEB-Conf's, as (name, number).

    Args:
        length (`int`): K, the masks of a block.
    """
    budgets = [0.25, 0.5, 1.0, 2.0, 4.0]
    return {
        "none: the donor's loop": {"draft_branches": []},
        "masks": {"draft_branches": MASKS},
        "masks without the sequential head": {"draft_branches": MASKS, "head": False},
        **{f"masks, K = {k}": {"draft_branches": MASKS, "draft_length": k} for k in (1, 2, 4, 6) if k < length},
        **{f"masks, entropy of {b:g} nats": {"draft_branches": MASKS, "gamma": b} for b in budgets},
        **{f"masks, {n} drafts": {"draft_branches": MASKS, "rule": ("number", n)} for n in (1, 2, 3, 4, 6)},
        **{
            f"masks, confidence {c}": {"draft_branches": MASKS, "rule": ("confidence", c)}
            for c in (0.2, 0.4, 0.6, 0.8)
        },
        "masks, a number at random": {"draft_branches": MASKS, "rule": ("random", length)},
    }


@contextmanager
def proposing_by(rule: tuple[str, float] | None) -> Iterator[None]:
    """Inside, drafts are proposed by another rule than PBEB-Conf's: "number" n, "confidence" c (the longest prefix
    whose probabilities have a product of at least c), or "random", uniform from 1 to n."""
    if rule is None:
        yield
        return
    name, value = rule
    generator = np.random.default_rng(0)

    def cut(ids, entropies, limits, gamma, eos_token_id):
        number = np.full_like(limits, int(value))
        if name == "confidence":
            number = (entropies.cumsum(axis=1) <= -math.log(value)).cumprod(axis=1).sum(axis=1).clip(min=1)
        elif name == "random":
            number = generator.integers(1, int(value) + 1, limits.shape)
        return cut_drafts(ids, entropies, np.minimum(limits, number), math.inf, eos_token_id)

    kept = verified_decoding_mdm_asr.cut_drafts, torch_generation_mdm_asr.entropy
    verified_decoding_mdm_asr.cut_drafts = cut
    if name == "confidence":
        # In the entropies' place, how improbable each draft is.
        torch_generation_mdm_asr.entropy = lambda log_probs: -log_probs.amax(dim=-1)
    try:
        yield
    finally:
        verified_decoding_mdm_asr.cut_drafts, torch_generation_mdm_asr.entropy = kept


def run_decoding(model: Any, processor: Any, data: list[Path], batch_size: int) -> Iterator[dict[str, Any]]:
    out = model.get_decoder().drafts.head.out
    kept = {name: tensor.clone() for name, tensor in out.state_dict().items()}
    for folder in data:
        encoded = encode_dataset(model, processor, str(folder), batch_size=batch_size)
        texts = None
        for name, condition in decoding_conditions(model.config.decoder_config.draft_length).items():
            settings = copy.deepcopy(model.generation_config)
            others = {k: v for k, v in condition.items() if k not in ("head", "rule", "gamma")}
            vars(settings).update({**NO_SAFEGUARDS, **others})
            if "gamma" in condition:
                settings.sampler = {**settings.sampler, "gamma": condition["gamma"]}
            with torch.no_grad():
                for its_name, tensor in out.named_parameters():
                    tensor.copy_(kept[its_name] if condition.get("head", True) else torch.zeros_like(tensor))
            with proposing_by(condition.get("rule")):
                rows = decode_encoded(model, processor, encoded, settings)
            texts = texts or [row["hypothesis"] for row in rows]
            yield {
                "set": folder.name,
                "condition": name,
                "same_texts": sum(row["hypothesis"] == text for row, text in zip(rows, texts, strict=True)),
                **count(rows),
            }
            out.load_state_dict(kept)


def run_silence(model: Any, processor: Any, data: list[Path], batch_size: int) -> Iterator[dict[str, Any]]:
    for folder in data:
        for trailing_s, least_s in SILENCES_S:
            model.config.encoder_trailing_silence_s, model.config.encoder_min_duration_s = trailing_s, least_s
            encoded = encode_dataset(model, processor, str(folder), batch_size=batch_size)
            rows = decode_encoded(model, processor, encoded)
            name = f"{trailing_s:g} s" + (f", {least_s:g} s in all" if least_s else "")
            encoder_ms = 1000 * sum(row["encoder_s"] for row in rows) / len(rows)
            yield {"set": folder.name, "condition": name, "encoder_ms": round(encoder_ms, 1), **count(rows)}


def count(rows: list[dict[str, Any]]) -> dict[str, Any]:
    normalise = normaliser("en")
    pairs = [(normalise(row["reference"]), normalise(row["hypothesis"])) for row in rows]
    errors = count_errors(*map(list, zip(*pairs, strict=True)))
    evaluations = sum(row["nfe"] for row in rows)
    drafts = [sum(sum(row[kind].values()) for row in rows) for kind in ("accepted_drafts", "rejected_drafts")]
    return {
        "utterances": len(rows),
        "wer": round(float(100 * errors[:, :3].sum() / errors[:, 3].sum()), 2),
        "loops": sum(most_in_a_row(row["hypothesis"]) >= LOOP for row in rows),
        "nfe": round(evaluations / len(rows), 2),
        # With the end of each text.
        "tokens_per_evaluation": round(sum(len(row["tokens"]) + bool(row["end"]) for row in rows) / evaluations, 3),
        "drafts_per_evaluation": round(sum(drafts) / evaluations, 2),
        "accepted": round(drafts[0] / max(sum(drafts), 1), 3),
        "decoder_ms": round(1000 * sum(row["decoder_s"] for row in rows) / len(rows), 1),
    }


HEADS = {
    "set": "recordings",
    "condition": "",
    "utterances": "utterances",
    "same_texts": "same texts",
    "wer": "WER %",
    "loops": "loops",
    "encoder_ms": "encoder, ms",
    "nfe": "evaluations",
    "tokens_per_evaluation": "tokens an evaluation",
    "drafts_per_evaluation": "drafts an evaluation",
    "accepted": "of them accepted",
    "decoder_ms": "decoder, ms",
}


def to_markdown(lines: list[dict[str, Any]]) -> str:
    names = [name for name in HEADS if name in lines[0]]
    return table([HEADS[name] for name in names], [[str(line[name]) for name in names] for line in lines]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decoding", "silence"))
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()), help="folder with drafts")
    parser.add_argument("--data", nargs="+", required=True, type=Path)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = mdm_asr_hf.MDMASRForConditionalGeneration.from_pretrained(args.model, dtype="float32").eval()
    processor = mdm_asr_hf.MDMASRProcessor.from_pretrained(args.model)
    run, lines = {"decoding": run_decoding, "silence": run_silence}[args.what], []
    for line in run(model, processor, args.data, args.batch_size):
        print(json.dumps(line), file=sys.stderr, flush=True)
        lines.append(line)
    write_results(args.output, {"lines": lines}, to_markdown(lines))


if __name__ == "__main__":
    main()
