#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures `mdm-asr transcribe-dataset`: against a plain loop, on two actors, and whether kills lose or double a row.

    python benchmarks/run_scale.py --data DIR --output OUT [--model OUT8]              speed, and what follows from it
    python benchmarks/run_scale.py --data DIR --output OUT [--model OUT8] --kills 10    kills alone
    python benchmarks/run_scale.py --rescore OUT

DIR is an audiofolder: audio files and a metadata.jsonl with `file_name` per line; its clips are taken again and again
until there are `--clips`. Writes
    OUT/raw.jsonl     the runs: system, clips, seconds from the start of the process to its end
    OUT/results.json  from raw.jsonl alone, as `--rescore OUT` makes it again
    OUT/results.md    the same as tables
The loop is one process that loads the model and calls `Transcriber.transcribe_all` with the paths; all have one thread
an actor. A run on two clips tells what starting takes. Kills hit an actor and the whole run in turn, each at a random
moment after a shard was written; a run that was killed is started again. Needs the extra `ray`, and psutil.
"""

import argparse
import collections
import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Row, make_parser, run, table

LOOP, ONE, TWO, EMPTY = "plain loop", "1 actor", "2 actors", "2 actors, nothing to decode"
NUM_ACTORS = {ONE: 1, TWO: 2, EMPTY: 2}
WHAT = {"actor": "an actor", "run": "the whole run"}
START_CLIPS = 2
ARCHIVE_H, MACHINES = 10_000, (1, 10, 100)
# The default of the command, which the loads of an archive are counted by.
SHARD_MB = 16
COSTS = ["machines", "hours", "machine hours", "listing, min", "shards", "reading, MB/s", "share of the driver"]
COSTS += ["references at the driver, MB"]
PLAIN_LOOP = """
import json, sys
from mdm_asr_hf.loading import default_checkpoint, load_model
from mdm_asr_hf.transcribe.transcriber import Transcriber
manifest, model, output = sys.argv[1:]
rows = [json.loads(line) for line in open(manifest)]
transcriber = Transcriber(*load_model(model or str(default_checkpoint()), "cpu", num_threads=1), vad="energy")
with open(output, "w") as file:
    for i, result in transcriber.transcribe_all(row["audio"] for row in rows):
        file.write(json.dumps({"id": rows[i]["id"], "text": getattr(result, "text", None)}) + "\\n")
"""


def write_manifest(data: Path, number: int, path: Path) -> float:
    """Makes a manifest of so many clips; seconds of audio."""
    import soundfile

    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()][:number]
    audio = [str((data / row["file_name"]).resolve()) for row in rows]
    durations_s = [soundfile.info(one).duration for one in audio]
    places = [i % len(audio) for i in range(number)]
    lines = [json.dumps({"id": f"clip-{i}", "audio": audio[k]}) + "\n" for i, k in enumerate(places)]
    path.write_text("".join(lines), "utf-8")
    return sum(durations_s[k] for k in places)


def command(system: str, source: Path, output: Path, args: argparse.Namespace) -> list[str]:
    if system == LOOP:
        return [sys.executable, "-c", PLAIN_LOOP, str(source), args.model or "", str(output)]
    line = [sys.executable, "-c", "from mdm_asr_cli import main; main()", "transcribe-dataset", str(source)]
    line += ["--output", str(output), "--actors", str(NUM_ACTORS[system]), "--vad", "energy"]
    line += ["--shard-mb", str(args.shard_mb if system != EMPTY else 0.001)]
    return line + (["--model", args.model] if args.model else [])


def read_rows(output: Path) -> list[Row]:
    import pyarrow.parquet as pq

    if output.is_file():
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    return [row for path in sorted(output.glob("shard-*")) for row in pq.read_table(path).to_pylist()]


def time_run(system: str, source: Path, args: argparse.Namespace, **known: Any) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        started, load = time.perf_counter(), os.getloadavg()[0]
        done = subprocess.run(command(system, source, output, args), capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the {system} ended: {done.stderr[-2000:]}")
        seconds = time.perf_counter() - started
        rows = read_rows(output)
        num_shards = len(list(output.glob("shard-*")))
    texts = {row["id"]: row["text"] for row in rows}
    return {"system": system, "seconds": seconds, "load": load, "shards": num_shards, "texts": texts, **known}


def time_listing(manifest: Path, number: int) -> Row:
    """What the head node does before anything starts."""
    from mdm_asr_hf.data.archives import Archive

    started = time.perf_counter()
    _, rows = Archive(str(manifest)).list_rows()
    seconds = time.perf_counter() - started
    size = len(pickle.dumps(rows)) / number
    return {
        "listing": {
            "rows": number,
            "seconds": seconds,
            "bytes_a_row": size,
            "audio_bytes": sum(r.num_bytes for r in rows),
        }
    }


def kill_runs(manifest: Path, args: argparse.Namespace, most: int, seed: int) -> Row:
    """Kills, in turn, an actor and the whole run, until it is over; says what was left at the end."""
    import psutil

    generator = random.Random(seed)
    output, made, runs = args.output / "killed", collections.Counter(), 0
    shutil.rmtree(output, ignore_errors=True)
    is_over = False
    while not is_over:
        # What it says would fill a pipe that nobody reads.
        process = subprocess.Popen(command(TWO, manifest, output, args), stderr=subprocess.DEVNULL)
        runs += 1
        while process.poll() is None and made.total() < most:
            num_shards = len(list(output.glob("shard-*")))
            while process.poll() is None and len(list(output.glob("shard-*"))) == num_shards:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, args.kill_within_s))
            try:
                children = psutil.Process(process.pid).children(recursive=True)
                actors = [one for one in children if one.name().startswith("ray::ShardWorker")]
            except psutil.NoSuchProcess:
                continue
            if made.total() % 2 == 0 and actors:
                generator.choice(actors).kill()
                made["actor"] += 1
            elif made.total() % 2:
                process.send_signal(signal.SIGKILL)
                made["run"] += 1
                # Ray's processes end by themselves, one after the other.
                for one in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
        is_over = process.wait() == 0
        if not is_over and process.returncode != -signal.SIGKILL:
            raise ValueError(f"a run ended by itself with exit code {process.returncode}")
    counts = collections.Counter(row["id"] for row in read_rows(output))
    return {
        "kills": dict(made),
        "runs": runs,
        "clips": args.clips,
        "ids": len(counts),
        "missing": sum(not counts[f"clip-{i}"] for i in range(args.clips)),
        "twice": sum(count > 1 for count in counts.values()),
    }


def measure(args: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio_s = write_manifest(args.data[0], args.clips, folder / "clips.jsonl")
        left, seed = args.kills, args.seed
        # A run may be over before so many.
        while left > 0:
            seed += 1
            row = kill_runs(folder / "clips.jsonl", args, left, seed)
            yield row
            if not row["kills"]:
                raise ValueError("a run was over before anything was killed. Take more `--clips`.")
            left -= sum(row["kills"].values())
        if args.kills:
            return
        write_manifest(args.data[0], START_CLIPS, folder / "start.jsonl")
        yield time_listing(folder / "clips.jsonl", args.clips)
        (folder / "empty").mkdir()
        for i in range(args.empty_shards):
            (folder / "empty" / f"{i}.wav").write_bytes(b"no audio" * 125)
        yield time_run(EMPTY, folder / "empty", args, clips=args.empty_shards, audio_s=0.0)
        for _ in range(args.rounds):
            for system in (LOOP, ONE, TWO):
                yield time_run(system, folder / "start.jsonl", args, clips=START_CLIPS, audio_s=0.0)
                yield time_run(system, folder / "clips.jsonl", args, clips=args.clips, audio_s=audio_s)


def summarise(rows: list[Row]) -> Row:
    """Ratios of the fastest runs of each, and what an archive takes."""
    summary: Row = {"kills": [row for row in rows if "kills" in row]}
    timed = [row for row in rows if "system" in row]
    if not timed:
        return summary
    full_s, start_s = {}, {}
    for row in timed:
        into = full_s if row["audio_s"] or row["system"] == EMPTY else start_s
        into[row["system"]] = min(row["seconds"], into.get(row["system"], row["seconds"]))
    texts = {row["system"]: row["texts"] for row in timed if row["audio_s"]}
    clips, audio_s = next((row["clips"], row["audio_s"]) for row in timed if row["audio_s"])
    work_s = {system: full_s[system] - start_s[system] for system in (LOOP, ONE, TWO)}
    if min(work_s.values()) <= 0:
        raise ValueError("the clips take no longer than the start. Take more `--clips`, on a quiet machine.")
    empty_shards = next(row["shards"] for row in timed if row["system"] == EMPTY)
    summary |= {
        "clips": clips,
        "audio_s": audio_s,
        "systems": {
            system: {
                "seconds": full_s[system],
                "start_s": start_s[system],
                "rtfx": audio_s / work_s[system],
                "other_texts": sum(texts[system].get(one) != text for one, text in texts[LOOP].items()),
            }
            for system in (LOOP, ONE, TWO)
        },
        "overhead": work_s[ONE] / work_s[LOOP] - 1,
        "overhead_with_start": full_s[ONE] / full_s[LOOP] - 1,
        "speedup": work_s[ONE] / work_s[TWO],
        "shards_per_s": empty_shards / max(full_s[EMPTY] - start_s[TWO], 1e-9),
    }
    summary["archive"] = archive_costs(summary, next(row["listing"] for row in rows if "listing" in row))
    return summary


def archive_costs(summary: Row, listing: Row) -> list[Row]:
    """What an archive takes on machines like this one, each with two actors, if nothing limits them."""
    rtfx, bytes_per_s = summary["systems"][TWO]["rtfx"], listing["audio_bytes"] / summary["audio_s"]
    num_rows = ARCHIVE_H * 3600 / summary["audio_s"] * summary["clips"]
    num_shards = ARCHIVE_H * 3600 * bytes_per_s / (SHARD_MB * 1e6)
    list_s = num_rows * listing["seconds"] / listing["rows"]
    return [
        {
            "machines": machines,
            "hours": (ARCHIVE_H * 3600 / (rtfx * machines) + list_s + summary["systems"][TWO]["start_s"]) / 3600,
            "list_min": list_s / 60,
            "shards": num_shards,
            "read_mb_per_s": machines * rtfx * bytes_per_s / 1e6,
            # Of what the driver was seen to hand out and take back.
            "head_share": machines * rtfx * bytes_per_s / (SHARD_MB * 1e6) / summary["shards_per_s"],
            "references_mb": num_rows * listing["bytes_a_row"] / 1e6,
        }
        for machines in MACHINES
    ]


def to_markdown(summary: Row) -> str:
    lines = [f"```bash\n{summary['run']['command']}\n```", ""]
    for one in summary["kills"]:
        kills = " and ".join(f"{number} of {WHAT[kind]}" for kind, number in one["kills"].items())
        found = f"Ids at the end: {one['ids']}, missing {one['missing']}, twice {one['twice']}."
        lines += [f"{one['clips']} clips, kills: {kills}; {one['runs']} runs. {found}", ""]
    if "systems" not in summary:
        return "\n".join(lines)
    systems = [
        [system, *(f"{one[name]:.1f}" for name in ("seconds", "start_s", "rtfx")), one["other_texts"]]
        for system, one in summary["systems"].items()
    ]
    costs = [
        [one["machines"], f"{one['hours']:.1f}", f"{one['hours'] * one['machines']:.0f}", f"{one['list_min']:.1f}"]
        + [f"{one['shards']:.0f}", f"{one['read_mb_per_s']:.1f}", f"{100 * one['head_share']:.1f} %"]
        + [f"{one['references_mb']:.0f}"]
        for one in summary["archive"]
    ]
    lines += [
        table(["", "seconds", "of these, to start", "times real time, started", "other texts"], systems),
        "",
        f"{summary['clips']} clips, {summary['audio_s'] / 3600:.2f} hours. Overhead of one actor over the loop: "
        f"{100 * summary['overhead']:.1f} % once started, {100 * summary['overhead_with_start']:.1f} % in all. Two "
        f"actors: {summary['speedup']:.2f} times one. Shards that one driver can hand out: "
        f"{summary['shards_per_s']:.1f} a second.",
        "",
        f"{ARCHIVE_H:,} hours on machines like this one, two actors each:",
        "",
        table(COSTS, costs),
    ]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> Row:
    parser = make_parser(__doc__, data=1, threads=None)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--shard-mb", type=float, default=4.0, help="MB of stored audio in a shard")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--empty-shards", type=int, default=300, help="shards of a row that is no audio")
    parser.add_argument("--kills", type=int, default=0, help="how many")
    parser.add_argument("--kill-within-s", type=float, default=10.0, help="seconds after a shard, at most")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser, parser.parse_args(argv), measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
