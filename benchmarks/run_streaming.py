#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Streams recordings through StreamingTranscriber as if they were live, and measures what that costs against offline.

    python benchmarks/run_streaming.py --data DIR --output OUT [--clips 40] [--joined 4] [--dtype int8]
        [--step-s 0.3] [--policy margin_s=0.6 ...]
    python benchmarks/run_streaming.py --rescore OUT

DIR is what `mdm-asr evaluate` takes as `--data`. Recordings are clips of `--min-s` to `--max-s` seconds, drawn by
seed, and `--joined` recordings of about `--joined-s` seconds, made of such utterances one after the other. Writes
    OUT/raw.jsonl     the run; per recording the reference, every update of the stream with its words, their times and
                      the seconds of computing, and the offline text
    OUT/results.json  the numbers, from raw.jsonl alone, as `--rescore OUT` makes them again

A stream's time is the audio's: an update is there once its audio has been received and its computing is done.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

from mdm_asr_cli.options import DType

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "numpy", "jiwer")


# Recordings


def choose_recordings(durations_s: list[float], arguments: argparse.Namespace) -> list[list[int]]:
    """Lists of clips to be joined: `clips` of one, and `joined` of about `joined_s` seconds."""
    rng = random.Random(arguments.seed)
    fitting = [i for i, duration_s in enumerate(durations_s) if arguments.min_s <= duration_s <= arguments.max_s]
    rng.shuffle(fitting)
    chosen = [[one] for one in fitting[: arguments.clips]]
    pool = fitting[arguments.clips :]
    for _ in range(arguments.joined):
        recording = []
        while pool and sum(durations_s[i] for i in recording) < arguments.joined_s:
            recording.append(pool.pop())
        if recording:
            chosen.append(recording)
    if not chosen:
        raise SystemExit(
            f"`--data {arguments.data}` holds no clip of {arguments.min_s} to {arguments.max_s} s, or `--clips` and "
            "`--joined` ask for none. Change `--min-s` and `--max-s`."
        )
    return chosen


# Numbers


def keys_of(text: str) -> list[str]:
    """Words as far as a reader would call a change of them a revision: without case and punctuation."""
    cleaned = ("".join(c for c in word.casefold() if c.isalnum()) for word in text.split())
    return [word for word in cleaned if word]


def count_revised(updates: list[dict[str, Any]]) -> tuple[int, int]:
    """
    Of the tentative words shown in all updates but the last, how many the next update changes or takes away, and how
    many there are.
    """
    revised = shown = 0
    for update, following in zip(updates, updates[1:], strict=False):
        tentative, offset = keys_of(update["partial"]), len(keys_of(update["committed"]))
        after = keys_of(following["committed"] + " " + following["partial"])
        shown += len(tentative)
        revised += sum(1 for i, word in enumerate(tentative, offset) if i >= len(after) or after[i] != word)
    return revised, shown


def describe(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(median(ordered), 3),
        "mean": round(mean(ordered), 3),
        "p90": round(ordered[min(int(0.9 * len(ordered)), len(ordered) - 1)], 3),
        "n": len(ordered),
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of some recordings, see the README beside this script."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalize = EnglishTextNormalizer({})

    def wer(name: str) -> float:
        output = jiwer.process_words(
            [normalize(row["reference"]) for row in rows], [normalize(row[name]) for row in rows]
        )
        return round(100 * output.wer, 2)

    first, commit, waited, compute, evaluations = [], [], [], [], []
    revised = shown = 0
    for row in rows:
        updates = row["updates"]
        texts = [one for one in updates if (one["committed"] or one["partial"]) and not one["is_final"]]
        words = [(word, one) for one in updates for word in one["new"]]
        if texts and words:
            first.append(texts[0]["time_s"] + texts[0]["latency_s"] - row["onset_s"])
        commit += [one["time_s"] + one["latency_s"] - word["end_s"] for word, one in words]
        waited += [one["time_s"] - word["end_s"] for word, one in words]
        compute += [one["latency_s"] for one in updates if one["latency_s"] > 0]
        evaluations += [one["nfe"] for one in updates if one["nfe"] > 0]
        its_revised, its_shown = count_revised(updates)
        revised, shown = revised + its_revised, shown + its_shown
    audio_s = sum(row["duration_s"] for row in rows)
    return {
        "recordings": len(rows),
        "audio_s": round(audio_s, 1),
        "wer_streaming": wer("streaming"),
        **({"wer_offline": wer("offline")} if "offline" in rows[0] else {}),
        "first_text_s": describe(first),
        "first_text_within_1_s": sum(one <= 1 for one in first),
        "commit_latency_s": describe(commit),
        "commit_latency_without_computing_s": describe(waited),
        "compute_per_update_s": describe(compute),
        "evaluations_per_update": describe(evaluations),
        "revised_share": round(revised / max(shown, 1), 4),
        "rtf": round(sum(compute) / audio_s, 3),
    }


def summarize_all(rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = rows[0]["run"]
    recordings = rows[1:]
    groups = {"single": [r for r in recordings if len(r["files"]) == 1]}
    groups["joined"] = [r for r in recordings if len(r["files"]) > 1]
    return {"run": run, **{name: summarize(group) for name, group in groups.items() if group}}


# The run


def stream_one(transcriber: Any, samples: Any, rate_hz: int) -> list[dict[str, Any]]:
    chunk = round(0.1 * rate_hz)
    chunks = (samples[i : i + chunk] for i in range(0, len(samples), chunk))
    transcriber.reset()
    return [dataclasses.asdict(update) for update in transcriber.stream(chunks)]


def onset(samples: Any, rate_hz: int) -> float:
    """
    Where speech begins, in seconds: the first of five 20 ms frames in a row that are within 35 dB of the loud ones
    (the 95th percentile). The reference has no times, so that this is from the audio alone.
    """
    import numpy as np

    size = rate_hz // 50
    frames = samples[: len(samples) // size * size].reshape(-1, size).astype(np.float64)
    levels = 10 * np.log10(np.maximum(np.square(frames).mean(axis=1), 1e-10))
    loud = levels > np.percentile(levels, 95) - 35
    runs = np.convolve(loud, np.ones(5), mode="valid") == 5
    return float(np.argmax(runs) * size / rate_hz) if runs.any() else 0.0


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from mdm_asr_hf import default_checkpoint
    from mdm_asr_hf.audio_mdm_asr import load_audio
    from mdm_asr_hf.evaluate.data import load_data
    from mdm_asr_hf.loading import load_model
    from mdm_asr_hf.transcribe import streaming
    from mdm_asr_hf.transcribe.streaming import StreamingPolicy, StreamingTranscriber

    if arguments.clock == "process":
        streaming.time = SimpleNamespace(perf_counter=time.process_time)
    torch.set_num_threads(arguments.threads)
    model, processor = load_model(
        arguments.model or str(default_checkpoint()), arguments.device, dtype=arguments.dtype
    )
    rate_hz = processor.feature_extractor.sampling_rate
    policy = StreamingPolicy(**dict(parse_setting(one) for one in arguments.policy))
    transcriber = StreamingTranscriber(
        model, processor, step_s=arguments.step_s, max_window_s=arguments.max_window_s, policy=policy
    )
    data = load_data(arguments.data)
    rows = [
        {
            "run": {
                "command": shlex.join(["python", *sys.argv]),
                "versions": {name: version(name) for name in PACKAGES},
                "machine": {"processor": platform.machine(), "load": os.getloadavg()},
                "threads": arguments.threads,
                "dtype": arguments.dtype,
                "clock": arguments.clock,
                "policy": dataclasses.asdict(policy),
                "step_s": arguments.step_s,
                "max_window_s": transcriber.max_window_s,
            }
        }
    ]
    for number, recording in enumerate(choose_recordings([one["duration_s"] for one in data.rows], arguments)):
        clips = [load_audio(data.clip(i), target_sampling_rate=rate_hz) for i in recording]
        samples = np.concatenate(clips)
        if number == 0:
            stream_one(transcriber, samples[: 3 * rate_hz], rate_hz)
        updates = stream_one(transcriber, samples, rate_hz)
        row = {
            "files": [data.rows[i]["id"] for i in recording],
            "duration_s": len(samples) / rate_hz,
            "onset_s": onset(samples, rate_hz),
            "reference": " ".join(data.rows[i]["text"] for i in recording),
            "streaming": updates[-1]["committed"],
        }
        # The utterances one by one: the best that cutting at pauses could do.
        texts = []
        for clip in clips if arguments.offline else ():
            inputs = processor(clip, sampling_rate=rate_hz).to(model.device)
            texts += processor.batch_decode(model.generate(**inputs))
        if arguments.offline:
            row["offline"] = " ".join(texts)
        rows.append({**row, "updates": updates})
        print(f"{number + 1}: {row['duration_s']:.1f} s | {row['streaming']}", file=sys.stderr)
    return rows


def parse_setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder or manifest of recordings, or the name of a data set")
    parser.add_argument("--output", help="the folder to write")
    parser.add_argument("--rescore", metavar="OUT", help="compute results.json again")
    parser.add_argument("--model", help="folder or id; default: the checkpoint in the package")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=[one.value for one in DType])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="seconds of computing by the wall, or this process's own on a machine that others use too (one thread)",
    )
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--joined", type=int, default=4)
    parser.add_argument("--joined-s", type=float, default=60.0)
    parser.add_argument("--min-s", type=float, default=5.0)
    parser.add_argument("--max-s", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.5)
    parser.add_argument("--max-window-s", type=float)
    parser.add_argument("--policy", nargs="*", default=[], metavar="NAME=VALUE", help="fields of StreamingPolicy")
    parser.add_argument("--no-offline", dest="offline", action="store_false", help="leave the offline text out")
    arguments = parser.parse_args()
    output = Path(arguments.rescore or arguments.output or "")
    if arguments.rescore:
        rows = [json.loads(line) for line in (output / "raw.jsonl").read_text().splitlines()]
    elif arguments.data and arguments.output:
        started = time.perf_counter()
        rows = run(arguments)
        rows[0]["run"]["wall_s"] = round(time.perf_counter() - started, 1)
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "raw.jsonl", "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        parser.error("`--data` and `--output` are needed, or `--rescore`.")
    results = summarize_all(rows)
    (output / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
