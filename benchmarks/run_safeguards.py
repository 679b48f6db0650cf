#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What Whisper's safeguards let through: texts on sounds without speech, and phrases that repeat themselves.

    python benchmarks/run_safeguards.py --data DIR [DIR ...] --crops 2000 --output OUT
    python benchmarks/run_safeguards.py --sounds 200 --recordings DIR [DIR ...] --output OUT

--sounds are made (`sounds.py`), --recordings are folders of recorded ones, in subfolders by kind. Of --data (speech,
with metadata.jsonl) so many random crops of 0.3 to 12 seconds are decoded, cut anywhere, as windows may be.
Each clip is decoded with the checkpoint's settings and, without --fast, with no thresholds and no fallbacks.
Writes OUT/rows.jsonl, OUT/results.json and OUT/results.md: clips with a text, and with a loop, a phrase three times in
a row or more.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_peers import table
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.evaluate.evaluation import load_data
from mdm_asr_hf.evaluate.scoring import most_in_a_row
from mdm_asr_hf.safeguards_mdm_asr import NO_SAFEGUARDS

RATE_HZ = 16_000
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
LONGEST_S, SHORTEST_S = 12.0, 0.3
LOOP = 3
Clip = tuple[str, str, np.ndarray]


def made_sounds(number: int) -> Iterator[Clip]:
    # Only these need scipy.
    import sounds

    for index in range(number):
        kind, samples = sounds.make(index)
        yield "made sounds", kind, samples


def recorded_sounds(folder: Path) -> Iterator[Clip]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in AUDIO_SUFFIXES:
            samples = load_audio(str(file), target_sampling_rate=RATE_HZ)
            for start in range(0, max(len(samples) - RATE_HZ // 2, 1), int(15 * RATE_HZ)):
                yield f"recorded: {folder.name}", file.stem, samples[start : start + int(15 * RATE_HZ)]


def crops(folders: list[Path], number: int, seed: int) -> Iterator[Clip]:
    """Random cuts of random recordings, with some silence before and after some of them."""
    rng = np.random.default_rng(seed)
    places = [(data, i) for data in map(load_data, map(str, folders)) for i in range(len(data))]
    for _ in range(number):
        data, i = places[int(rng.integers(len(places)))]
        clip = load_audio(data.clip(i), target_sampling_rate=RATE_HZ)
        length = min(int(rng.uniform(SHORTEST_S, LONGEST_S) * RATE_HZ), len(clip))
        start = int(rng.integers(len(clip) - length + 1))
        cut = clip[start : start + length]
        if rng.random() < 0.3:
            cut = np.pad(cut, tuple(int(s * RATE_HZ) for s in rng.uniform(0, 2, size=2)))
        yield f"crops: {data.name}", f"{data.rows[i]['id']} at {start / RATE_HZ:.2f} s", cut.astype(np.float32)


def decode(model: Any, processor: Any, clips: list[Clip], fast: bool) -> list[dict[str, Any]]:
    inputs = processor([samples for _, _, samples in clips], sampling_rate=RATE_HZ)
    output = model.generate(**inputs, return_dict_in_generate=True)
    rows = [
        {
            "group": group,
            "clip": name,
            "duration_s": round(len(samples) / RATE_HZ, 2),
            "text": processor.decode(output.sequences[i]),
            "no_speech": None if output.no_speech is None else round(float(output.no_speech[i]), 4),
            "nfe": int(output.nfe[i]),
        }
        for i, (group, name, samples) in enumerate(clips)
    ]
    if not fast:
        for row, ids in zip(rows, model.generate(**inputs, **NO_SAFEGUARDS), strict=True):
            row["bare"] = processor.decode(ids)
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each group of clips."""
    lines = []
    for name in dict.fromkeys(row["group"] for row in rows):
        its = [row for row in rows if row["group"] == name]
        line = {"group": name, "clips": len(its)}
        for kind in ("text", "bare"):
            texts = [row[kind] for row in its if kind in row]
            line[f"{kind}s"] = sum(bool(text) for text in texts) if texts else None
            line[f"{kind}_loops"] = sum(most_in_a_row(text) >= LOOP for text in texts) if texts else None
        lines.append(line)
    return lines


def to_markdown(lines: list[dict[str, Any]]) -> str:
    head = {
        "group": "clips of",
        "clips": "clips",
        "texts": "with a text",
        "text_loops": "with a loop",
        "bares": "with a text, without safeguards",
        "bare_loops": "with a loop, without",
    }
    cells = [["" if line[name] is None else str(line[name]) for name in head] for line in lines]
    return table(list(head.values()), cells) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()))
    parser.add_argument("--data", nargs="*", default=[], type=Path)
    parser.add_argument("--crops", type=int, default=0)
    parser.add_argument("--sounds", type=int, default=0)
    parser.add_argument("--recordings", nargs="*", default=[], type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fast", action="store_true", help="only with the checkpoint's settings")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(argv)
    if args.crops and not args.data:
        parser.error("--crops needs --data")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    clips = list(made_sounds(args.sounds))
    for folder in args.recordings:
        clips += recorded_sounds(folder)
    clips += crops(args.data, args.crops, args.seed) if args.crops else []
    order, rows = sorted(range(len(clips)), key=lambda i: len(clips[i][2])), [{}] * len(clips)
    for first in range(0, len(order), args.batch_size):
        places = order[first : first + args.batch_size]
        for place, row in zip(places, decode(model, processor, [clips[i] for i in places], args.fast), strict=True):
            rows[place] = row
        print(f"{first + len(places)} of {len(order)}", file=sys.stderr, flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    (args.output / "rows.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    results = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "groups": summarise(rows)}
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    markdown = to_markdown(results["groups"])
    (args.output / "results.md").write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    main()
