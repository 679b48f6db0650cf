#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures the word times of a checkpoint, and of Whisper by transformers on the same clips, against known ones.

    python benchmarks/run_timestamps.py DATA... [--model FOLDER_OR_ID] [--whisper FOLDER_OR_ID] [--output OUT]

DATA are English data sets, as `mdm-asr evaluate` takes them. Needs `pip install pocketsphinx`. References:
    aligner   word starts and ends by the forced aligner of pocketsphinx, on clips whose words its dictionary has
    checked   those of them where its first word starts, and its last one ends, where the energy of the speech does,
              to 150 and 250 ms: it loses its way in some clips, and some transcripts are not what was said
    joined    pairs of clips of up to 7 s, cut to their speech by energy and joined with silences of random lengths:
              the start of the first word of each clip and the end of its last one. Timestamps look at energy, too, so
              that this reference is easier for them than for Whisper
Only words that a system recognised count, found by aligning its text with the transcript.

Writes to OUT:
    words.jsonl     per clip, reference and system: words with their times, and the known times
    results.json    errors in ms by data set, reference and system; how the aligner's outermost words agree with the
                    energy; the cost of timestamps; arguments and versions
    results.md      the same as a table
`--rescore OUT` computes the errors in the latter two again, from OUT/words.jsonl alone.
"""

import argparse
import importlib.metadata
import json
import platform
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import (
    ForcedAligner,
    TimedSpeech,
    join_clips,
    match_words,
    speech_span,
    summarise_errors,
)
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration, pipeline

import mdm_asr_hf
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.evaluate.data import load_data
from mdm_asr_hf.transcribe.transcript import group_words, token_texts

RATE_HZ = 16000
LONGEST_JOINED_S = 7.0
Timed = list[tuple[str, float, float]]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """What results.json holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only score OUT/words.jsonl again")
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()))
    parser.add_argument("--whisper", help="Whisper checkpoint with alignment heads to compare with")
    parser.add_argument("--steps", type=int, default=128, help="max_denoising_steps")
    parser.add_argument("--limit", type=int, default=100, help="aligned clips per data set, drawn at random")
    parser.add_argument("--joined", type=int, default=30, help="joined recordings per data set")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "timestamps")
    options = parser.parse_args(arguments)
    if options.rescore is not None:
        lines = [json.loads(one) for one in (options.rescore / "words.jsonl").read_text().splitlines()]
        report = json.loads((options.rescore / "results.json").read_text())
        return write(report, lines, options.rescore)
    if not options.data:
        parser.error("name data sets, or --rescore")

    model = AutoModelForSpeechSeq2Seq.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    model.generation_config.max_denoising_steps = options.steps
    aligner = ForcedAligner()
    names = ("mdm_asr_hf", "torch", "transformers", "pocketsphinx", "numpy")
    report: dict[str, Any] = {
        "command": "python " + shlex.join(["benchmarks/run_timestamps.py", *(arguments or sys.argv[1:])]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "alignment_heads": model.generation_config.alignment_heads,
        "data": {},
    }
    lines: list[dict[str, Any]] = []
    for path in options.data:
        aligned, joined, about = references(path, aligner, options)
        report["data"][about["name"]] = about
        speeches = [*aligned, *joined]
        systems = {"mdm-asr": transcribe(model, processor, speeches, options.batch_size)}
        if options.whisper:
            systems["whisper"] = transcribe_whisper(options.whisper, speeches)
        is_checked = [agrees_with_energy(speech) for speech in aligned]
        about["num_checked"] = sum(is_checked)
        for system, texts in systems.items():
            for i, (speech, words) in enumerate(zip(speeches, texts, strict=True)):
                kind = "joined" if i >= len(aligned) else "checked" if is_checked[i] else "aligner"
                lines.append(line(about["name"], kind, system, speech, words))
    report["cost"] = cost(model, processor, [speech.samples for speech in speeches[:20]])
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "words.jsonl", "w") as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)
    return write(report, lines, options.output)


def write(report: dict[str, Any], lines: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Scores the lines of words.jsonl into the report, writes it and its table, and prints the latter."""
    for name, about in report["data"].items():
        for system in ("mdm-asr", "whisper"):
            own = [one for one in lines if one["dataset"] == name and one["system"] == system]
            if own:
                # A clip that was checked counts among all aligned ones, too.
                of_kind = {"aligner": ("aligner", "checked"), "checked": ("checked",), "joined": ("joined",)}
                about[system] = {
                    kind: errors([one for one in own if one["reference"] in kinds]) for kind, kinds in of_kind.items()
                }
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "results.md").write_text(table(report["data"]) + "\n")
    print(table(report["data"]))
    return report


def references(
    path: str, aligner: ForcedAligner, options: argparse.Namespace
) -> tuple[list[TimedSpeech], list[TimedSpeech], dict[str, Any]]:
    """Aligned clips, joined clips, and what is to be said about the former."""
    data = load_data(path)
    order = list(range(len(data)))
    random.Random(options.seed).shuffle(order)
    aligned, short, not_alignable = [], [], 0
    for i in order:
        row = data.rows[i]
        if len(row["text"].split()) < 3:
            continue
        samples = load_audio(data.clip(i), target_sampling_rate=RATE_HZ)
        if len(samples) <= LONGEST_JOINED_S * RATE_HZ:
            short.append((row["id"], samples, row["text"]))
        if len(aligned) < options.limit:
            times_s = aligner.align(samples, row["text"].split())
            if times_s is None:
                not_alignable += 1
                continue
            starts_s, ends_s = map(list, zip(*times_s, strict=True))
            aligned.append(TimedSpeech(row["id"], samples, row["text"], starts_s, ends_s))
    generator, joined = np.random.default_rng(options.seed), []
    for first, second in zip(short[::2], short[1::2], strict=False):
        ids, clips, texts = zip(first, second, strict=True)
        joined.append(join_clips(clips, texts, RATE_HZ, generator, name="+".join(ids)))
    spans = [speech_span(speech.samples, RATE_HZ) for speech in aligned]
    about = {
        "name": data.name,
        "num_aligned": len(aligned),
        "num_not_alignable": not_alignable,
        "num_joined": len(joined[: options.joined]),
        "aligner_minus_energy": {
            "first_start": summarise_errors([s.starts_s[0] - a for s, (a, _) in zip(aligned, spans, strict=True)]),
            "last_end": summarise_errors([s.ends_s[-1] - b for s, (_, b) in zip(aligned, spans, strict=True)]),
        },
    }
    return aligned, joined[: options.joined], about


def agrees_with_energy(speech: TimedSpeech) -> bool:
    """Whether an aligner's outermost words lie where the energy of the speech begins and ends."""
    start_s, end_s = speech_span(speech.samples, RATE_HZ)
    return abs(speech.starts_s[0] - start_s) <= 0.15 and abs(speech.ends_s[-1] - end_s) <= 0.25


def transcribe(model: Any, processor: Any, speeches: list[TimedSpeech], batch_size: int) -> list[Timed]:
    """Words and times of each recording."""
    order = sorted(range(len(speeches)), key=lambda i: len(speeches[i].samples))
    texts: dict[int, Timed] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        inputs = processor([speeches[i].samples for i in places], sampling_rate=RATE_HZ)
        output = model.generate(**inputs, return_token_timestamps=True, return_dict_in_generate=True)
        for i, ids, confidence, times_s in zip(
            places, output.sequences, output.confidence, output.token_timestamps, strict=True
        ):
            pieces = token_texts(processor.tokenizer, ids.tolist())
            words = group_words(pieces, confidence.tolist(), times_s.tolist())
            texts[i] = [(word.text, word.start_s, word.end_s) for word in words]
    return [texts[i] for i in range(len(speeches))]


def transcribe_whisper(name: str, speeches: list[TimedSpeech]) -> list[Timed]:
    """The same by the pipeline of transformers."""
    whisper = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32).eval()
    donor = AutoProcessor.from_pretrained(name)
    recognise = pipeline(
        "automatic-speech-recognition",
        model=whisper,
        tokenizer=donor.tokenizer,
        feature_extractor=donor.feature_extractor,
    )
    texts = []
    for speech in speeches:
        found = recognise({"raw": speech.samples, "sampling_rate": RATE_HZ}, return_timestamps="word")
        chunks = [(chunk["text"].strip(), *chunk["timestamp"]) for chunk in found["chunks"]]
        texts.append([(text, start, end) for text, start, end in chunks if start is not None and end is not None])
    return texts


def errors(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of starts and ends of the recognised words whose times are known."""
    starts, ends = [], []
    for one in lines:
        known, words = one["known"], one["words"]
        for i, k in match_words([text for text, _, _ in known], [text for text, _, _ in words]):
            if known[i][1] is not None:
                starts.append(words[k][1] - known[i][1])
            if known[i][2] is not None:
                ends.append(words[k][2] - known[i][2])
    return {"start": summarise_errors(starts), "end": summarise_errors(ends)}


def line(data: str, kind: str, system: str, speech: TimedSpeech, words: Timed) -> dict[str, Any]:
    """A line of words.jsonl."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(float(value), 3)

    known = zip(speech.text.split(), map(rounded, speech.starts_s), map(rounded, speech.ends_s), strict=True)
    return {
        "dataset": data,
        "id": speech.name,
        "reference": kind,
        "system": system,
        "duration_s": round(len(speech.samples) / RATE_HZ, 3),
        "known": list(known),
        "words": [(text, rounded(start_s), rounded(end_s)) for text, start_s, end_s in words],
    }


def cost(model: Any, processor: Any, clips: list[np.ndarray]) -> dict[str, float]:
    """Milliseconds per clip that timestamps add to `generate` at batch size 1, without the encoder: medians."""
    without, added, seconds = [], [], []
    for clip in clips:
        inputs = processor(clip, sampling_rate=RATE_HZ)
        encoded = model.prepare_cross_attention(model.encode(inputs["input_features"], inputs["attention_mask"]))
        times = []
        for wanted in (False, True, False, True):
            start = time.perf_counter()
            model.generate(**inputs, encoder_outputs=encoded, return_token_timestamps=wanted)
            times.append(time.perf_counter() - start)
        without.append(1000 * min(times[::2]))
        added.append(1000 * (min(times[1::2]) - min(times[::2])))
        seconds.append(len(clip) / RATE_HZ)
    medians = {"decoder_ms": without, "timestamps_ms": added, "duration_s": seconds}
    return {name: round(float(np.median(values)), 2) for name, values in medians.items()}


def table(data: dict[str, Any]) -> str:
    """Markdown."""
    columns = ("num_words", "median_ms", "mean_ms", "p90_ms", "within_50_ms", "within_100_ms", "within_200_ms")
    rows = [
        "| data | reference | system | of | words | median ms | mean ms | 90 % ms | in 50 ms | in 100 ms | in 200 ms "
        "| median signed ms |",
        "|---" * 12 + "|",
    ]
    for name, about in data.items():
        for kind in ("aligner", "checked", "joined"):
            for system in ("mdm-asr", "whisper"):
                for side, numbers in about.get(system, {}).get(kind, {}).items():
                    if numbers["num_words"]:
                        cells = [numbers[column] for column in (*columns, "median_signed_ms")]
                        rows.append("| " + " | ".join(map(str, (name, kind, system, side, *cells))) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
