#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Streams recordings through StreamingTranscriber as if they were live, and measures what that costs against offline.

    python benchmarks/run_streaming.py --data DIR --output OUT [--clips 60] [--policy margin_s=0.6 ...]

Clips of 5 to 20 seconds are drawn by seed. A stream's time is the audio's: an update is there once its audio has been
received and its computing is done. Text counts from the onset of speech in the audio, a commit from the end of its
word. Revised are tentative words that the next update changes or takes away.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from typing import Any

from common import RATE_HZ, Row, load_ours, make_parser, read_clips, run, samples, table

MIN_S, MAX_S, CHUNK_S = 5.0, 20.0, 0.1


def choose_clips(clips: list[Row], number: int, seed: int) -> list[Row]:
    """Raises ValueError where no clip is of that length."""
    fitting = [clip for clip in clips if MIN_S <= clip["duration_s"] <= MAX_S]
    if not fitting:
        raise ValueError(f"`--data` holds no clip of {MIN_S:g} to {MAX_S:g} s. Name another folder.")
    random.Random(seed).shuffle(fitting)
    return fitting[:number]


def stream(transcriber: Any, audio: Any, clock: Any) -> list[Row]:
    """The updates of a recording that comes in chunks, with the seconds of computing that `clock` tells."""
    transcriber.reset()
    size, updates = round(CHUNK_S * RATE_HZ), []
    for start in range(0, len(audio) + size, size):
        began, chunk = clock(), audio[start : start + size]
        update = transcriber.feed(chunk, RATE_HZ) if len(chunk) else transcriber.finish()
        if update is not None:
            updates.append(dataclasses.asdict(update) | {"latency_s": clock() - began})
    return updates


def measure(args: argparse.Namespace) -> Iterator[Row]:
    from timing import speech_span

    from mdm_asr_hf.transcribe.streaming import StreamingPolicy, StreamingTranscriber

    clips = choose_clips([clip for folder in args.data for clip in read_clips(folder)], args.clips, args.seed)
    model, processor = load_ours(args)
    policy = StreamingPolicy(**{name: json.loads(value) for name, _, value in (p.partition("=") for p in args.policy)})
    transcriber = StreamingTranscriber(model, processor, policy=policy)
    clock = {"wall": time.perf_counter, "process": time.process_time}[args.clock]
    stream(transcriber, samples(clips[0])[: 3 * RATE_HZ], clock)
    for clip in clips:
        audio = samples(clip)
        (offline,) = processor.batch_decode(model.generate(**processor(audio, sampling_rate=RATE_HZ)))
        updates = stream(transcriber, audio, clock)
        row = {"id": clip["id"], "duration_s": clip["duration_s"], "onset_s": speech_span(audio, RATE_HZ)[0]}
        row |= {"reference": clip["text"], "streaming": updates[-1]["committed"], "offline": offline}
        yield row | {"updates": updates}


def words_of(text: str) -> list[str]:
    """Words as far as a reader would call a change of them a revision: without case and punctuation."""
    cleaned = ("".join(c for c in word.casefold() if c.isalnum()) for word in text.split())
    return [word for word in cleaned if word]


def count_revised(updates: list[Row]) -> tuple[int, int]:
    """Of the tentative words shown in all updates but the last, how many are revised, and how many there are."""
    revised = shown = 0
    for update, following in zip(updates, updates[1:], strict=False):
        tentative, offset = words_of(update["partial"]), len(words_of(update["committed"]))
        after = words_of(following["committed"] + " " + following["partial"])
        shown += len(tentative)
        revised += sum(1 for i, word in enumerate(tentative, offset) if after[i : i + 1] != [word])
    return revised, shown


def describe(values: list[float]) -> Row:
    import numpy as np

    numbers = (
        {"median": np.median(values), "mean": np.mean(values), "p90": np.percentile(values, 90)} if values else {}
    )
    return {**{name: round(float(value), 3) for name, value in numbers.items()}, "n": len(values)}


def summarise(rows: list[Row]) -> dict[str, Any]:
    from mdm_asr_hf.evaluate.scoring import word_error_rate

    first, commits, compute, evaluations = [], [], [], []
    for row in rows:
        updates = row["updates"]
        texts = [one for one in updates if (one["committed"] or one["partial"]) and not one["is_final"]]
        words = [(word, one) for one in updates for word in one["new"]]
        if texts and words:
            first.append(texts[0]["time_s"] + texts[0]["latency_s"] - row["onset_s"])
        commits += [one["time_s"] + one["latency_s"] - word["end_s"] for word, one in words]
        compute += [one["latency_s"] for one in updates if one["nfe"] > 0]
        evaluations += [one["nfe"] for one in updates if one["nfe"] > 0]
    revised, shown = map(sum, zip(*(count_revised(row["updates"]) for row in rows), strict=True))
    references, audio_s = [row["reference"] for row in rows], sum(row["duration_s"] for row in rows)
    return {
        "recordings": len(rows),
        "audio_s": round(audio_s, 1),
        "wer_streaming": word_error_rate(references, [row["streaming"] for row in rows]),
        "wer_offline": word_error_rate(references, [row["offline"] for row in rows]),
        "first_text_s": describe(first),
        "commit_latency_s": describe(commits),
        "compute_per_update_s": describe(compute),
        "evaluations_per_update": describe(evaluations),
        "revised_share": round(revised / max(shown, 1), 4),
        "rtf": round(sum(compute) / audio_s, 3),
    }


def to_markdown(summary: dict[str, Any]) -> str:
    latencies = [(name, value) for name, value in summary.items() if isinstance(value, dict) and "n" in value]
    names = ("median", "mean", "p90", "n")
    numbers = [(name, value) for name, value in summary.items() if isinstance(value, (int, float))]
    parts = [table(["", *names], [[name, *map(value.get, names)] for name, value in latencies])]
    return "\n\n".join([table(["", ""], numbers), *parts]) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--policy", nargs="*", default=[], metavar="NAME=VALUE", help="fields of StreamingPolicy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="seconds of computing by the wall, or this process's own on a machine that others use too (one thread)",
    )
    return run(parser, parser.parse_args(argv), measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
