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
WER with Whisper's normaliser on both sides.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from common import RATE_HZ, Row, batches, make_parser, read_clips, run, samples, table_of

COLUMNS = {
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


class Comparison:
    """A donor in transformers, and this package's model of it."""

    def __init__(self, donor: str, model: str | None, language: str | None):
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        import mdm_asr_hf

        self.donor = WhisperForConditionalGeneration.from_pretrained(donor, dtype="float32").eval()
        self.donor_processor = WhisperProcessor.from_pretrained(donor)
        if model is None:
            self.model = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(donor)
            self.processor = mdm_asr_hf.MDMASRProcessor.from_whisper(donor)
        else:
            self.model = mdm_asr_hf.MDMASRForConditionalGeneration.from_pretrained(model, dtype="float32")
            self.processor = mdm_asr_hf.MDMASRProcessor.from_pretrained(model)
        self.prompt = {} if language is None else {"language": language}

    def rows(self, clips: list[Row]) -> Iterator[Row]:
        """Ids and texts of a batch of clips, and how they were decoded."""
        import torch

        from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
        from mdm_asr_hf.safeguards_mdm_asr import NO_SAFEGUARDS

        audio = [samples(clip) for clip in clips]
        with torch.no_grad():
            features = self.donor_processor(audio, sampling_rate=RATE_HZ, return_tensors="pt").input_features
            frames = self.donor.model.encoder(features)
            task = {"task": "transcribe"} if self.prompt else {}
            stock = self.donor.generate(features, encoder_outputs=frames, **self.prompt, **task)
            frames = MDMASREncoderOutput(last_hidden_state=frames.last_hidden_state)
            same = self.model.generate(encoder_outputs=frames, **NO_SAFEGUARDS, **self.prompt)
            inputs = self.processor(audio, sampling_rate=RATE_HZ)
            inputs["encoder_outputs"] = self.model.prepare_cross_attention(self.model.encode(**inputs))
            own, loop = (
                self.model.generate(**inputs, return_dict_in_generate=True, **self.prompt, **branches)
                for branches in ({}, {"draft_branches": []})
            )
        for i, clip in enumerate(clips):
            its_stock, its_same, its_own, its_loop = (
                self._text_ids(ids[i].tolist()) for ids in (stock, same, own.sequences, loop.sequences)
            )
            yield {
                "set": clip["set"],
                "id": clip["id"],
                "reference": clip["text"],
                "stock": self.processor.decode(its_stock),
                "own": self.processor.decode(its_own),
                "is_same": its_same == its_stock,
                "is_loop": its_own == its_loop,
                "nfe": int(own.nfe[i]),
                "tokens": int((own.commit_steps[i] > 0).sum()),
            }

    def _text_ids(self, ids: list[int]) -> list[int]:
        """The text's ids: transformers leaves prompt and end out in some releases, and not in others."""
        eos, prompt = self.model.config.eos_token_id, self.model.config.decoder_start_token_id
        if ids and ids[0] == prompt:
            ids = ids[len(self.model.generation_config.prompt_template["tokens"]) :]
        return ids[: ids.index(eos)] if eos in ids else ids


def measure(args: argparse.Namespace) -> Iterator[Row]:
    import torch

    torch.set_num_threads(args.threads)
    comparison = Comparison(args.donor, args.model, args.language)
    for folder in args.data:
        for batch in batches(read_clips(folder)[: args.limit], lambda clip: clip["duration_s"], args.batch_size):
            yield from comparison.rows(batch)


def summarise(rows: list[Row]) -> dict[str, Any]:
    """A line for each set."""
    from mdm_asr_hf.evaluate.scoring import LOOP_TIMES, most_in_a_row, word_error_rate

    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        its = [row for row in rows if row["set"] == name]
        line: Row = {"set": name, "utterances": len(its)}
        for kind in ("stock", "own"):
            line[f"wer_{kind}"] = word_error_rate([row["reference"] for row in its], [row[kind] for row in its])
        nfe = sum(row["nfe"] for row in its)
        line |= {"same_ids": sum(row["is_same"] for row in its), "ids_of_the_loop": sum(row["is_loop"] for row in its)}
        line["loops"] = sum(most_in_a_row(row["own"]) >= LOOP_TIMES for row in its)
        line |= {"nfe": round(nfe / len(its), 2)}
        line["tokens_per_evaluation"] = round(sum(row["tokens"] for row in its) / nfe, 3)
        lines.append(line)
    return {"sets": lines}


def to_markdown(summary: dict[str, Any]) -> str:
    return table_of(COLUMNS, summary["sets"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, threads=2)
    parser.add_argument("--donor", help="folder or id of WhisperForConditionalGeneration")
    parser.add_argument("--language", help="of a multilingual donor; default: detected")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="utterances of each folder, at most")
    args = parser.parse_args(argv)
    if not args.donor and not args.rescore:
        parser.error("--donor is needed")
    return run(parser, args, measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
