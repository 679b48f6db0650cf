#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What Whisper's safeguards let through: texts on sounds without speech, and phrases that repeat themselves.

    python benchmarks/run_safeguards.py --data DIR [DIR ...] --crops 2000 --sounds 200 --output OUT

--sounds are made (`sounds.py`). Of --data (speech, with metadata.jsonl) so many random crops of 0.3 to 12 seconds are
decoded, cut anywhere, as windows may be. Each clip is decoded with the checkpoint's settings and, without --fast, with
no thresholds and no fallbacks. Counted are clips with a text, and with a loop, a phrase three times in a row or more.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RATE_HZ, Row, batches, load_ours, make_parser, read_clips, run, samples, table_of

LONGEST_S, SHORTEST_S = 12.0, 0.3
COLUMNS = {
    "group": "clips of",
    "clips": "clips",
    "texts": "with a text",
    "text_loops": "with a loop",
    "bares": "with a text, without safeguards",
    "bare_loops": "with a loop, without",
}


def crops(folders: list[Path], number: int, seed: int) -> Iterator[Row]:
    """Random cuts of random recordings, with some silence before and after some of them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    clips = [clip for folder in folders for clip in read_clips(folder)]
    for _ in range(number):
        clip = clips[int(rng.integers(len(clips)))]
        whole = samples(clip)
        length = min(int(rng.uniform(SHORTEST_S, LONGEST_S) * RATE_HZ), len(whole))
        start = int(rng.integers(len(whole) - length + 1))
        cut = whole[start : start + length]
        if rng.random() < 0.3:
            cut = np.pad(cut, tuple(int(s * RATE_HZ) for s in rng.uniform(0, 2, size=2)))
        name = f"{clip['id']} at {start / RATE_HZ:.2f} s"
        yield {"group": f"crops: {clip['set']}", "clip": name, "samples": cut.astype(np.float32)}


def made_sounds(number: int) -> Iterator[Row]:
    # Only these need scipy.
    import sounds

    for kind, made in map(sounds.make, range(number)):
        yield {"group": "made sounds", "clip": kind, "samples": made}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    from mdm_asr_hf.safeguards_mdm_asr import NO_SAFEGUARDS

    model, processor = load_ours(args)
    clips = [*made_sounds(args.sounds), *(crops(args.data, args.crops, args.seed) if args.crops else ())]
    for batch in batches(clips, lambda clip: len(clip["samples"]), args.batch_size):
        inputs = processor([clip["samples"] for clip in batch], sampling_rate=RATE_HZ)
        texts = processor.batch_decode(model.generate(**inputs))
        bare = [] if args.fast else processor.batch_decode(model.generate(**inputs, **NO_SAFEGUARDS))
        for i, clip in enumerate(batch):
            row = {"group": clip["group"], "clip": clip["clip"], "text": texts[i]}
            yield row | {"duration_s": round(len(clip["samples"]) / RATE_HZ, 2)} | ({"bare": bare[i]} if bare else {})


def summarise(rows: list[Row]) -> dict[str, Any]:
    """A line for each group of clips."""
    from mdm_asr_hf.evaluate.scoring import LOOP_TIMES, most_in_a_row

    lines = []
    for name in dict.fromkeys(row["group"] for row in rows):
        its = [row for row in rows if row["group"] == name]
        line: Row = {"group": name, "clips": len(its)}
        for kind in ("text", "bare"):
            texts = [row[kind] for row in its if kind in row]
            line[f"{kind}s"] = sum(map(bool, texts)) if texts else None
            line[f"{kind}_loops"] = sum(most_in_a_row(text) >= LOOP_TIMES for text in texts) if texts else None
        lines.append(line)
    return {"groups": lines}


def to_markdown(summary: dict[str, Any]) -> str:
    return table_of(COLUMNS, summary["groups"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, data="*")
    parser.add_argument("--crops", type=int, default=0)
    parser.add_argument("--sounds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fast", action="store_true", help="only with the checkpoint's settings")
    args = parser.parse_args(argv)
    if not args.rescore and (bool(args.crops) != bool(args.data) or not args.crops + args.sounds):
        parser.error("--crops needs --data, or pass --sounds")
    return run(parser, args, measure, summarise, to_markdown, needs_data=False)


if __name__ == "__main__":
    main()
