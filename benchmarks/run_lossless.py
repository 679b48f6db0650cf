#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Whether verified drafts change anything, and what they spare: every utterance by the donor in transformers and by this
package.

    python benchmarks/run_lossless.py --donor whisper-tiny-en --data DIR [DIR ...] --output OUT

For each folder (recordings with metadata.jsonl)
    stock   the donor's `WhisperForConditionalGeneration.generate`, greedy, on audio padded to 30 seconds
    same    this package on the very frames of the donor's encoder: are the token ids the same?
    own     this package as it comes: audio on its own length with the silence of the configuration, Whisper's
            thresholds, and what the drafts spared
    loop    the same frames and thresholds without drafts: are the ids those of `own`?
Writes OUT/rows.jsonl, every text; OUT/results.json and OUT/results.md. WER with Whisper's normaliser on both sides.
"""

import argparse
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_peers import table
from transformers import WhisperForConditionalGeneration, WhisperProcessor

import mdm_asr_hf
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
from mdm_asr_hf.evaluate.evaluation import load_data
from mdm_asr_hf.evaluate.scoring import count_errors, most_in_a_row, normaliser
from mdm_asr_hf.safeguards_mdm_asr import NO_SAFEGUARDS, compression_ratio

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "tokenizers")
# A phrase so many times in a row is a loop.
LOOP = 3


class Comparison:
    """A donor in transformers, and this package's model of it."""

    def __init__(self, donor: str, model: str | None, language: str | None):
        self.donor = WhisperForConditionalGeneration.from_pretrained(donor, dtype="float32").eval()
        self.donor_processor = WhisperProcessor.from_pretrained(donor)
        if model is None:
            self.model = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(donor)
            self.processor = mdm_asr_hf.MDMASRProcessor.from_whisper(donor)
        else:
            self.model = mdm_asr_hf.MDMASRForConditionalGeneration.from_pretrained(model, dtype="float32")
            self.processor = mdm_asr_hf.MDMASRProcessor.from_pretrained(model)
        self.prompt = {} if language is None else {"language": language}
        self.donor_prompt = {} if language is None else {"language": language, "task": "transcribe"}

    @torch.no_grad()
    def rows(self, clips: list[np.ndarray]) -> list[dict[str, Any]]:
        """Ids and texts of a batch of clips, and how they were decoded."""
        rate = self.processor.feature_extractor.sampling_rate
        features = self.donor_processor(clips, sampling_rate=rate, return_tensors="pt").input_features
        frames = self.donor.model.encoder(features)
        stock = self.donor.generate(features, encoder_outputs=frames, **self.donor_prompt)
        stock = [self._text_ids(row) for row in stock.tolist()]
        frames = MDMASREncoderOutput(last_hidden_state=frames.last_hidden_state)
        same = self.model.generate(encoder_outputs=frames, **NO_SAFEGUARDS, **self.prompt)
        inputs = self.processor(clips, sampling_rate=rate)
        outputs = self.model.prepare_cross_attention(self.model.encode(**inputs))
        own, loop = (
            self.model.generate(
                **inputs, encoder_outputs=outputs, return_dict_in_generate=True, **self.prompt, **branches
            )
            for branches in ({}, {"draft_branches": []})
        )
        loop = [self._text_ids(row) for row in loop.sequences.tolist()]
        rows = []
        for i, (its_stock, its_same) in enumerate(zip(stock, same.tolist(), strict=True)):
            its_own = self._text_ids(own.sequences[i].tolist())
            rows.append(
                {
                    "stock": self.processor.decode(its_stock),
                    "own": self.processor.decode(its_own),
                    "is_same": self._text_ids(its_same) == its_stock,
                    "is_loop": its_own == loop[i],
                    "nfe": int(own.nfe[i]),
                    "tokens": int((own.commit_steps[i] > 0).sum()),
                    "accepted": own.accepted_drafts[i].tolist(),
                    "rejected": own.rejected_drafts[i].tolist(),
                    "compression_ratio": round(compression_ratio(its_own, self.model.config.vocab_size), 3),
                }
            )
        return rows

    def _text_ids(self, ids: list[int]) -> list[int]:
        """The text's ids: transformers leaves prompt and end out in some releases, and not in others."""
        eos, prompt = self.model.config.eos_token_id, self.model.config.decoder_start_token_id
        if ids and ids[0] == prompt:
            ids = ids[len(self.model.generation_config.prompt_template["tokens"]) :]
        return ids[: ids.index(eos)] if eos in ids else ids


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    comparison, rows = Comparison(args.donor, args.model, args.language), []
    rate = comparison.processor.feature_extractor.sampling_rate
    for folder in args.data:
        data = load_data(str(folder))
        entries = data.rows[: args.limit]
        clips = [load_audio(data.clip(i), target_sampling_rate=rate) for i in range(len(entries))]
        order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
        for first in range(0, len(order), args.batch_size):
            places = order[first : first + args.batch_size]
            for place, row in zip(places, comparison.rows([clips[i] for i in places]), strict=True):
                entry = entries[place]
                rows.append({"set": Path(folder).name, "id": entry["id"], "reference": entry["text"], **row})
            print(f"{Path(folder).name}: {first + len(places)} of {len(order)}", file=sys.stderr, flush=True)
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each set."""
    normalise, lines = normaliser("en"), []
    for name in dict.fromkeys(row["set"] for row in rows):
        its = [row for row in rows if row["set"] == name]
        references = [normalise(row["reference"]) for row in its]
        line: dict[str, Any] = {"set": name, "utterances": len(its)}
        for kind in ("stock", "own"):
            errors = count_errors(references, [normalise(row[kind]) for row in its])
            line[f"wer_{kind}"] = round(float(100 * errors[:, :3].sum() / errors[:, 3].sum()), 2)
        line["same_ids"] = sum(row["is_same"] for row in its)
        line["ids_of_the_loop"] = sum(row["is_loop"] for row in its)
        line["loops"] = sum(most_in_a_row(row["own"]) >= LOOP for row in its)
        line["nfe"] = round(sum(row["nfe"] for row in its) / len(its), 2)
        line["tokens_per_evaluation"] = round(sum(row["tokens"] for row in its) / sum(row["nfe"] for row in its), 3)
        lines.append(line)
    return lines


def to_markdown(lines: list[dict[str, Any]]) -> str:
    head = {
        "set": "recordings",
        "utterances": "utterances",
        "wer_stock": "WER %, donor in transformers",
        "wer_own": "WER %, this package",
        "same_ids": "same ids on the donor's frames",
        "ids_of_the_loop": "same ids as without drafts",
        "loops": "loops",
        "nfe": "evaluations",
        "tokens_per_evaluation": "tokens an evaluation",
    }
    return table(list(head.values()), [[str(line[name]) for name in head] for line in lines]) + "\n"


def write_results(output: Path, results: dict[str, Any], markdown: str) -> None:
    """Writes results.json, with the command, the machine and the versions, and results.md, and shows this."""
    run = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(run | results, indent=2) + "\n", encoding="utf-8")
    (output / "results.md").write_text(markdown, encoding="utf-8")
    print(markdown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", required=True, help="folder or id of WhisperForConditionalGeneration")
    parser.add_argument("--model", help="folder with drafts of this donor; default: the donor, converted, untrained")
    parser.add_argument("--data", nargs="+", required=True, type=Path)
    parser.add_argument("--language", help="of a multilingual donor; default: detected")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="utterances of each folder, at most")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(argv)
    rows = measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    (args.output / "rows.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    lines = summarise(rows)
    write_results(args.output, {"sets": lines}, to_markdown(lines))


if __name__ == "__main__":
    main()
