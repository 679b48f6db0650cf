#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What each part of the drafts adds, by real decoding; and how much silence the encoder needs.

    python benchmarks/run_drafts.py decoding --data DIR [DIR ...] --output OUT
    python benchmarks/run_drafts.py silence --data DIR [DIR ...] --output OUT

decoding: every way of drafting: the number of masks, the sequential head, and the rule of how many drafts are
    proposed: PBEB-Conf's budget of entropy, a fixed number, a fixed confidence, at random. The text is the same in
    all, which is checked.
silence: WER and the encoder's time by the seconds of silence behind the audio.
"""

import argparse
import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Row, load_ours, make_parser, run, table_of

MASKS = {"draft_branches": ["masks"]}
# Silence behind the audio, at least, and audio and silence together, at least.
SILENCES_S = ((0.5, 0.0), (1.0, 0.0), (1.0, 3.0), (2.0, 0.0), (3.0, 0.0), (5.0, 0.0), (5.0, 15.0))
COLUMNS = {
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


def decoding_conditions(length: int) -> dict[str, dict[str, Any]]:
    """
    Conditions by name: settings of generation; "head": False leaves the sequential head out, "start": False what
    begins a text; "rule" replaces PBEB-Conf's, as (name, number).

    Args:
        length (`int`): K, the masks of a block.
    """
    conditions: dict[str, dict[str, Any]] = {
        "none: the donor's loop": {"draft_branches": []},
        "masks": MASKS,
        "masks without the sequential head": MASKS | {"head": False},
        "masks, none before the first evaluation": MASKS | {"start": False},
    }
    conditions |= {f"masks, K = {k} drafts": MASKS | {"draft_length": k} for k in (1, 2, 3, 4, 6) if k < length}
    conditions |= {f"masks, entropy of {b:g} nats": MASKS | {"gamma": b} for b in (0.25, 0.5, 1.0, 2.0)}
    conditions |= {f"masks, confidence {c}": MASKS | {"rule": ("confidence", c)} for c in (0.2, 0.4, 0.6, 0.8)}
    return conditions | {"masks, a number at random": MASKS | {"rule": ("random", length)}}


@contextmanager
def proposing_by(rule: tuple[str, float] | None) -> Iterator[None]:
    """Inside, drafts are proposed by another rule than PBEB-Conf's: "confidence" c (the longest prefix whose
    probabilities have a product of at least c), or "random", uniform from 1 to n."""
    import numpy as np

    from mdm_asr_hf import torch_generation_mdm_asr, verified_decoding_mdm_asr
    from mdm_asr_hf.drafting_mdm_asr import cut_drafts

    if rule is None:
        yield
        return
    name, value = rule
    generator = np.random.default_rng(0)

    def cut(ids, entropies, limits, gamma, eos_token_id):
        if name == "confidence":
            number = (entropies.cumsum(axis=1) <= -math.log(value)).cumprod(axis=1).sum(axis=1).clip(min=1)
        else:
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


def measure(args: argparse.Namespace) -> Iterator[Row]:
    model, processor = load_ours(args)
    for folder in args.data:
        yield from {"decoding": decoding, "silence": silence}[args.what](model, processor, folder, args.batch_size)


def decoding(model: Any, processor: Any, folder: Path, batch_size: int) -> Iterator[Row]:
    from mdm_asr_hf.evaluate.evaluation import evaluate_model
    from mdm_asr_hf.safeguards_mdm_asr import NO_SAFEGUARDS
    from mdm_asr_hf.sampling_mdm_asr import make_sampler

    out = model.get_decoder().drafts.head.out
    kept, texts = {name: tensor.clone() for name, tensor in out.state_dict().items()}, None
    config = model.config.decoder_config
    begins = config.draft_start
    for name, condition in decoding_conditions(config.draft_length).items():
        settings = copy.deepcopy(model.generation_config)
        vars(settings).update(NO_SAFEGUARDS | {k: v for k, v in condition.items() if k.startswith("draft_")})
        if "gamma" in condition:
            settings.sampler = make_sampler(settings.sampler, gamma=condition["gamma"])
        if not condition.get("head", True):
            out.load_state_dict({its_name: tensor * 0 for its_name, tensor in kept.items()})
        config.draft_start = begins and condition.get("start", True)
        with proposing_by(condition.get("rule")):
            rows = evaluate_model(model, processor, str(folder), settings=settings, batch_size=batch_size)
        out.load_state_dict(kept)
        config.draft_start = begins
        texts = texts or [row["hypothesis"] for row in rows]
        same = sum(row["hypothesis"] == text for row, text in zip(rows, texts, strict=True))
        yield {"set": folder.name, "condition": name, "same_texts": same, **count(rows)}


def silence(model: Any, processor: Any, folder: Path, batch_size: int) -> Iterator[Row]:
    from mdm_asr_hf.evaluate.evaluation import evaluate_model

    for trailing_s, least_s in SILENCES_S:
        model.config.encoder_trailing_silence_s, model.config.encoder_min_duration_s = trailing_s, least_s
        rows = evaluate_model(model, processor, str(folder), batch_size=batch_size)
        name = f"{trailing_s:g} s" + (f", {least_s:g} s in all" if least_s else "")
        encoder_ms = 1000 * sum(row["encoder_s"] for row in rows) / len(rows)
        yield {"set": folder.name, "condition": name, "encoder_ms": round(encoder_ms, 1), **count(rows)}


def count(rows: list[Row]) -> Row:
    from mdm_asr_hf.evaluate.scoring import LOOP_TIMES, most_in_a_row, word_error_rate

    evaluations = sum(row["nfe"] for row in rows)
    accepted, rejected = (
        sum(sum(row[kind].values()) for row in rows) for kind in ("accepted_drafts", "rejected_drafts")
    )
    return {
        "utterances": len(rows),
        "wer": word_error_rate([row["reference"] for row in rows], [row["hypothesis"] for row in rows]),
        "loops": sum(most_in_a_row(row["hypothesis"]) >= LOOP_TIMES for row in rows),
        "nfe": round(evaluations / len(rows), 2),
        # With the end of each text.
        "tokens_per_evaluation": round(sum(len(row["tokens"]) + bool(row["end"]) for row in rows) / evaluations, 3),
        "drafts_per_evaluation": round((accepted + rejected) / evaluations, 2),
        "accepted": round(accepted / max(accepted + rejected, 1), 3),
        "decoder_ms": round(1000 * sum(row["decoder_s"] for row in rows) / len(rows), 1),
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    return {"lines": rows}


def to_markdown(summary: dict[str, Any]) -> str:
    return table_of(COLUMNS, summary["lines"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__)
    parser.add_argument("what", nargs="?", choices=("decoding", "silence"), default="decoding")
    parser.add_argument("--batch-size", type=int, default=1)
    return run(parser, parser.parse_args(argv), measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
