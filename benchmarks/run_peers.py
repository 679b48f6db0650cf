#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Puts MDM-ASR beside what one would use instead, on the same audio and machine, in one process, round by round.

    python benchmarks/run_peers.py --donor WHISPER_FOLDER --data DIR --output OUT [--ours branches=none ...]
    python benchmarks/run_peers.py --rescore OUT

WHISPER_FOLDER is the checkpoint that ours was made of, as transformers has it. OUT/raw.jsonl has the memory of each
system, and per system, length, batch size and round the seconds, with the texts in the first round.
benchmarks/README.md says what is timed and how.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import RATE_HZ, Row, make_parser, read_clips, run, samples, table

# What --skip can leave out.
PEERS = ("transformers", "faster-whisper", "whisper.cpp")
MAX_CLIP_S = 30.0
# An utterance counts as one of length n seconds from n less 15 % to n and 15 %.
TOLERANCE = 0.15
# Between the utterances of a long recording.
PAUSE_S = 0.3
# Parts of ours; features, tokens and control are the rest.
STAGES = ("encoder", "causal rows", "drafts", "rest")
# torch's and CTranslate2's idle threads spin for up to 0.2 s, which the next system must not pay for.
SETTLE_S = 0.3
OURS_HELP = (
    "such as branches=masks,draft-length=4, dtype=int8,gamma=1, window-s=7 for windows of at most 7 s cut at pauses, "
    "or onnx=FOLDER,gamma=1 for an export in ONNX Runtime; repeatable"
)


# Clips


def choose_clips(entries: list[Row], target_s: float, num_clips: int) -> list[list[Row]]:
    """
    Utterances of about a length: those nearest to it, and where they are too few, joins of utterances that follow each
    other in one speaker's chapter, which is what stands before the last "-" of their ids.

    Args:
        entries: with `id` and `duration_s`.

    Returns:
        `num_clips` lists of entries, each to be joined. No entry is in two of them.

    Raises:
        ValueError: the entries do not hold as many.
    """
    low, high = target_s * (1 - TOLERANCE), target_s * (1 + TOLERANCE)

    def distance(clip: list[Row]) -> tuple[float, str]:
        return abs(sum(entry["duration_s"] for entry in clip) - target_s), clip[0]["id"]

    singles = sorted(([entry] for entry in entries if low <= entry["duration_s"] <= high), key=distance)
    chosen = singles[:num_clips]
    if len(chosen) < num_clips:
        chapters: dict[str, list[Row]] = {}
        for entry in sorted(entries, key=lambda entry: entry["id"]):
            if "-" in Path(entry["id"]).name and entry["duration_s"] < low:
                chapters.setdefault(entry["id"].rpartition("-")[0], []).append(entry)
        joins = []
        for chapter in chapters.values():
            start = 0
            while start < len(chapter):
                fitting = [chapter[start:end] for end in range(start + 2, len(chapter) + 1)]
                fitting = [clip for clip in fitting if low <= sum(entry["duration_s"] for entry in clip) <= high]
                if fitting:
                    joins.append(min(fitting, key=distance))
                start += len(joins[-1]) if fitting else 1
        chosen += sorted(joins, key=distance)[: num_clips - len(chosen)]
    if len(chosen) < num_clips:
        raise ValueError(
            f"`--data` has {len(chosen)} clips of {low:.4g} to {high:.4g} s, joined ones included, but `--clips` asks "
            f"for {num_clips}. Set a smaller `--clips` or other `--lengths`."
        )
    return chosen


def make_clips(data: Path, lengths_s: list[float], num_clips: int) -> dict[float, list[Row]]:
    """Clips of each length: `id`, `reference`, `duration_s` and 16 kHz `samples` (N,), float32."""
    import numpy as np

    entries, clips = read_clips(data), {}
    for length_s in lengths_s:
        if not 0 < length_s * (1 + TOLERANCE) <= MAX_CLIP_S:
            raise ValueError(f"`--lengths` {length_s:g} s: Whisper's window is 30 s, so at most 26 are possible.")
        clips[length_s] = []
        for parts in choose_clips(entries, length_s, num_clips):
            joined = np.concatenate([samples(part) for part in parts])
            clip = {
                "id": "+".join(part["id"] for part in parts),
                "reference": " ".join(part["text"] for part in parts),
            }
            clips[length_s].append(clip | {"duration_s": len(joined) / RATE_HZ, "samples": joined})
    return clips


def make_recording(data: Path, minutes: float) -> Row:
    """Utterances in the order of the folder, `PAUSE_S` between them, as one recording."""
    import numpy as np

    pieces, texts, num_samples = [], [], 0
    for entry in read_clips(data):
        pieces += [samples(entry), np.zeros(int(PAUSE_S * RATE_HZ), dtype=np.float32)]
        texts.append(entry["text"])
        num_samples += len(pieces[-2]) + len(pieces[-1])
        if num_samples >= 60 * RATE_HZ * minutes:
            break
    return {"reference": " ".join(texts), "duration_s": num_samples / RATE_HZ, "samples": np.concatenate(pieces)}


def batches_of(clips: list[Any], batch_size: int) -> list[list[Any]]:
    """Full batches only: the clips start again from the first where the last batch would be short."""
    num_batches = -(-len(clips) // batch_size)
    repeated = [clips[i % len(clips)] for i in range(num_batches * batch_size)]
    return [repeated[i : i + batch_size] for i in range(0, len(repeated), batch_size)]


# Running


def list_peers(args: argparse.Namespace, work: Path) -> list[Any]:
    """What is compared, ours last."""
    from peers import Peer, parse_settings

    from mdm_asr_hf.loading import DEFAULT_CHECKPOINT_NAME, default_checkpoint

    donor_name, peers = Path(args.donor or "").name, []
    for dtype in args.dtypes:
        if "transformers" not in args.skip:
            kinds = ("transformers", "compiled") if args.compile else ("transformers",)
            peers += [Peer(kind, args.donor, donor_name, dtype) for kind in kinds]
        if "faster-whisper" not in args.skip:
            peers.append(Peer("faster-whisper", str(work / "float32"), donor_name, dtype))
    if "faster-whisper" not in args.skip:
        peers.append(Peer("faster-whisper", str(work / "int8"), donor_name, "int8"))
    # The wheels are built for CPUs.
    if "whisper.cpp" not in args.skip and 1 in args.batch_sizes and args.device == "cpu":
        kinds = ("f16", "q8_0")
        peers += [Peer("whisper.cpp", str(work / f"ggml-{kind}.bin"), donor_name, kind) for kind in kinds]
    source, name = args.model or str(default_checkpoint()), Path(args.model or DEFAULT_CHECKPOINT_NAME).name
    for text in args.ours:
        settings = parse_settings(text)
        if folder := settings.get("onnx"):
            peers.append(Peer("onnx", folder, "mdm_asr_hf", Path(folder).name, text))
        else:
            dtypes = [settings["dtype"]] if "dtype" in settings else args.dtypes
            peers += [Peer("ours", source, name, dtype, text) for dtype in dtypes]
    return peers


def measure_memory(peers: list[Any], args: argparse.Namespace, work: Path) -> Iterator[Row]:
    """Each system in a fresh process that loads only that system."""
    for peer in peers:
        batch_sizes = list(filter(peer.can_batch, sorted(args.batch_sizes)))
        request = {"peer": asdict(peer), "batch_sizes": batch_sizes, "device": args.device}
        request |= {"threads": args.threads, "clips": str(work / "longest.npz")}
        command = [sys.executable, __file__, "--memory-of", json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{peer.label} failed:\n{done.stderr.strip()}")
        for batch_size, mib in zip(batch_sizes, json.loads(done.stdout.splitlines()[-1]), strict=True):
            yield {"kind": "memory", "system": peer.label, "batch_size": batch_size, "mib": mib}


def answer_memory(request: Row) -> None:
    """The other side of `measure_memory`."""
    import numpy as np
    from peers import Peer, measure_memory

    with np.load(request["clips"]) as file:
        # Read when it is their turn: those of a batch of eight are no part of what one clip takes.
        batches = (
            [file[name] for name in batches_of(file.files, batch_size)[0]] for batch_size in request["batch_sizes"]
        )
        mib = measure_memory(Peer(**request["peer"]), batches, request["device"], request["threads"])
    print(json.dumps(mib))


def time_calls(call: Any, inputs: list[Any], device: str) -> tuple[float, list[Any]]:
    """Seconds that `call` took for all the inputs, and what it returned."""

    def synchronize() -> None:
        if device == "cuda":
            import torch

            torch.cuda.synchronize()

    outputs = []
    time.sleep(SETTLE_S)
    synchronize()
    start = time.perf_counter()
    for one in inputs:
        outputs.append(call(one))
        # Every time, as one who waits for the text does: a GPU must not begin with the next clip meanwhile.
        synchronize()
    return time.perf_counter() - start, outputs


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes that compute, for the time of the context."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run_rounds(peers: list[Any], clips: dict[float, list[Row]], args: argparse.Namespace) -> Iterator[Row]:
    """A row per system, length, batch size and round; the systems take turns in every round."""
    from peers import load_peer
    from rich.progress import track

    tasks: list[tuple[str, str, Any, Any]] = []
    for peer in peers:
        # Beside other work ours has the threads that it takes by itself.
        threads = None if args.busy and peer.kind == "onnx" else args.threads
        system = load_peer(peer, args.device, threads)
        tasks.append(("transcribe", peer.label, peer, system))
        if hasattr(system, "encode") and peer.encoder_label not in (label for _, label, *_ in tasks):
            if peer.kind != "compiled":
                tasks.append(("encode", peer.encoder_label, peer, system))
    shapes = [(batch_size, length_s) for batch_size in args.batch_sizes for length_s in clips]
    # Round 0 is the warm-up: one batch of every shape, not written.
    turns = [(*shape, *task) for shape in shapes for task in tasks if task[2].can_batch(shape[0])]
    steps = [(number, *turn) for number in range(args.rounds + 1) for turn in turns]
    for number, batch_size, length_s, task, label, peer, system in track(steps, "rounds"):
        batches = batches_of(clips[length_s], batch_size)[: None if number else 1]
        audio = [[clip["samples"] for clip in batch] for batch in batches]
        is_whole, stages = task == "transcribe", getattr(system, "stages", {})
        stages.clear()
        call, inputs = system.transcribe, audio
        if not is_whole:
            call, inputs = system.encode, [system.encoder_inputs(batch) for batch in audio]
        wall_s, outputs = time_calls(call, inputs, args.device)
        if not number:
            continue
        row = {"kind": "time", "task": task, "system": label, "is_ours": peer.is_ours, "batch_size": batch_size}
        row |= {"length_s": length_s, "round": number, "wall_s": round(wall_s, 5)}
        row["audio_s"] = round(sum(clip["duration_s"] for batch in batches for clip in batch), 3)
        if stages and is_whole:
            parts = {**stages, "rest": wall_s - sum(stages.values())}
            num_clips = len(batches) * batch_size
            row["stages_ms"] = {name: round(1000 * seconds / num_clips, 3) for name, seconds in parts.items()}
        if is_whole and number == 1:
            # Without the clips that only fill the last batch.
            decoded = [one for batch in outputs for one in batch]
            pairs = zip(clips[length_s], decoded, strict=False)
            row["utterances"] = [{k: clip[k] for k in ("id", "reference", "duration_s")} | one for clip, one in pairs]
        yield row
    if args.recording:
        recording, batch_size = make_recording(args.data[0], args.recording), max(args.batch_sizes)
        calls = []
        for task, label, peer, system in tasks:
            if task == "transcribe" and hasattr(system, "transcribe_recording"):
                calls.append((label, peer, partial(system.transcribe_recording, batch_size=batch_size)))
            if task == "transcribe" and hasattr(system, "transcribe_in_turn"):
                calls.append((f"{label}, one window after the other", peer, system.transcribe_in_turn))
        for number, (label, peer, call) in track([(i, c) for i in range(args.rounds) for c in calls], "recording"):
            wall_s, (text,) = time_calls(call, [recording["samples"]], args.device)
            row = {"kind": "recording", "system": label, "is_ours": peer.is_ours, "batch_size": batch_size}
            row |= {"round": number + 1, "wall_s": round(wall_s, 5), "audio_s": recording["duration_s"]}
            yield row | ({} if number else {"reference": recording["reference"], "hypothesis": text})


def measure(args: argparse.Namespace) -> Iterator[Row]:
    if (load := round(os.getloadavg()[0], 2)) > 0.5:
        print(f"warning: the machine is busy (load {load}), so the times will be wrong.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        import numpy as np
        from ggml import write_ggml
        from peers import convert_for_faster_whisper, require_peer

        from mdm_asr_cli.terminal import quiet_libraries

        work = Path(folder)
        # First what would fail only after the slow parts.
        peers = list_peers(args, work)
        for kind in sorted({peer.kind for peer in peers}):
            require_peer(kind)
        clips = make_clips(args.data[0], args.lengths, args.clips)
        np.savez(work / "longest.npz", *(clip["samples"] for clip in clips[max(clips)]))
        for quantization in ("float32", "int8") if "faster-whisper" not in args.skip else ():
            convert_for_faster_whisper(args.donor, work / quantization, quantization)
        for peer in peers:
            if peer.kind == "whisper.cpp":
                write_ggml(args.donor, Path(peer.source), peer.dtype)
        yield from measure_memory(peers, args, work)
        with quiet_libraries(), busy_loops(args.busy):
            yield from run_rounds(peers, clips, args)


# Scoring


def summarise(rows: list[Row]) -> dict[str, Any]:
    """
    Per system, batch size and length, ours last

    - `rtfx`: seconds of audio per second, from the median of the rounds' seconds; `rtfx_min`, `rtfx_max` of single
      rounds;
    - `wer` in per cent, `num_errors` of `num_words`, both sides normalised;
    - `mean_nfe`, decoder evaluations per utterance, where the system tells;
    - `memory_mib`, see `peers.measure_memory`.

    `ratios` say how many times as fast as each peer each of ours is, by batch size and length, from the medians.
    """
    from mdm_asr_hf.evaluate.scoring import word_error_rate

    memory = {(row["system"], row["batch_size"]): row["mib"] for row in rows if row["kind"] == "memory"}
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["kind"] != "memory":
            groups.setdefault((row["kind"], row["system"], row["batch_size"], row.get("length_s")), []).append(row)
    results, recordings = [], []
    for (kind, system, batch_size, _), group in groups.items():
        first, walls_s = group[0], [row["wall_s"] for row in group]
        rtfx = [round(first["audio_s"] / seconds, 2) for seconds in (median(walls_s), max(walls_s), min(walls_s))]
        names = ("task", "system", "is_ours", "batch_size", "length_s", "audio_s")
        result = {name: first[name] for name in names if name in first}
        result |= {"num_rounds": len(group), "wall_s": round(median(walls_s), 5)}
        result |= dict(zip(("rtfx", "rtfx_min", "rtfx_max"), rtfx, strict=True))
        if stages := [row["stages_ms"] for row in group if "stages_ms" in row]:
            result["stages_ms"] = {name: round(median(one[name] for one in stages), 2) for name in stages[0]}
        if utterances := first.get("utterances"):
            result |= {"num_clips": len(utterances), **_count_errors(utterances)}
            if "nfe" in utterances[0]:
                result["mean_nfe"] = round(sum(one["nfe"] for one in utterances) / len(utterances), 2)
            result["memory_mib"] = memory.get((system, batch_size))
        if kind == "recording":
            result["wer"] = word_error_rate([first["reference"]], [first["hypothesis"]])
        (recordings if kind == "recording" else results).append(result)
    results.sort(key=lambda result: result["is_ours"])
    whole = [result for result in results if result["task"] == "transcribe"]
    ratios = [
        {
            "batch_size": ours["batch_size"],
            "length_s": ours["length_s"],
            "ours": ours["system"],
            "peer": peer["system"],
            # Not of the rounded RTFx; both had the same audio.
            "times_as_fast": round(peer["wall_s"] / ours["wall_s"], 2),
        }
        for ours in whole
        for peer in whole
        if ours["is_ours"] > peer["is_ours"] and all(ours[key] == peer[key] for key in ("batch_size", "length_s"))
    ]
    return {"results": results, "ratios": ratios, "recordings": recordings}


def _count_errors(utterances: list[Row]) -> Row:
    from mdm_asr_hf.evaluate.scoring import count_errors, normaliser

    normalise = normaliser("en")
    sides = [[normalise(one[key]) for one in utterances] for key in ("reference", "hypothesis")]
    *errors, words = count_errors(*sides).sum(axis=0).tolist()
    return {"num_words": words, "num_errors": sum(errors), "wer": round(100 * sum(errors) / max(words, 1), 2)}


def to_markdown(summary: dict[str, Any]) -> str:
    """Per batch size tables of the systems, ours last, of the encoders alone, of the parts of ours, and of its speed
    over that of each peer; then the recording, and how it was measured."""
    results = summary["results"]
    lengths_s = sorted({result["length_s"] for result in results})
    parts = []
    for batch_size in sorted({result["batch_size"] for result in results}):
        of_batch = [result for result in results if result["batch_size"] == batch_size]
        ratios = [one for one in summary["ratios"] if one["batch_size"] == batch_size]
        parts += _tables(of_batch, ratios, lengths_s, f"batch size {batch_size}")
    if recordings := summary["recordings"]:
        minutes, theirs = recordings[0]["audio_s"] / 60, [one for one in recordings if not one["is_ours"]]
        head = [f"a recording of {minutes:.0f} minutes, batches of {recordings[0]['batch_size']}", "WER %", "RTFx"]
        lines = [
            [one["system"], f"{one['wer']:.1f}", f"{one['rtfx']:.1f}"]
            + [f"{peer['wall_s'] / one['wall_s']:.2f}" for peer in theirs]
            for one in recordings
        ]
        parts.append(table([*head, *(f"times as fast as {peer['system']}" for peer in theirs)], lines))
    spread = max((result["rtfx_max"] - result["rtfx_min"]) / result["rtfx"] for result in results)
    parts.append(
        f"Medians; rounds: {min(result['num_rounds'] for result in results)}. Between its slowest and its fastest "
        f"round, the most unsteady row differs by {100 * spread:.0f} % of its median."
    )
    run, machine = summary["run"], summary["run"]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    parts.append(
        f"{gpu}{machine['cpu']}, {machine['num_cores']} cores, {run['threads']} threads. Load before the run: "
        f"{machine['load_before']}. {versions}."
    )
    return "\n\n".join([*parts, f"```bash\n{run['command']}\n```"]) + "\n"


def _tables(results: list[Row], ratios: list[Row], lengths_s: list[float], title: str) -> Iterator[str]:
    """Those of one batch size."""
    cells: dict[tuple[str, str], dict[float, Row]] = {}
    for result in results:
        cells.setdefault((result["task"], result["system"]), {})[result["length_s"]] = result
    by_length = [f"RTFx {s:g} s" for s in lengths_s]

    def mib(row: dict[float, Row]) -> Row:
        return row[lengths_s[0]]["memory_mib"] or {}

    systems = {system: row for (task, system), row in cells.items() if task == "transcribe"}
    peak = "peak_device" if any("peak_device" in mib(row) for row in systems.values()) else "peak"
    head = [f"system, {title}", *(f"WER % {s:g} s" for s in lengths_s), "WER % all", *by_length]
    lines = []
    for system, row in systems.items():
        errors, words = (sum(row[s][name] for s in lengths_s) for name in ("num_errors", "num_words"))
        line = [system, *(f"{row[s]['wer']:.1f}" for s in lengths_s), f"{100 * errors / max(words, 1):.1f}"]
        line += [f"{row[s]['rtfx']:.1f}" for s in lengths_s]
        lines.append([*line, f"{mib(row)[peak]:.0f}" if peak in mib(row) else None])
    yield table([*head, "GPU MiB" if peak == "peak_device" else "MiB"], lines)
    encoders = {system: row for (task, system), row in cells.items() if task == "encode"}
    lines = [[system, *(f"{row[s]['rtfx']:.1f}" for s in lengths_s)] for system, row in encoders.items()]
    if lines:
        yield table([f"encoder alone, {title}", *by_length], lines)
    lines = [
        [one["system"], f"{one['length_s']:g} s", *(f"{one['stages_ms'].get(name, 0.0):.1f}" for name in STAGES)]
        + [f"{one['mean_nfe']:.1f}"]
        for one in results
        if "stages_ms" in one
    ]
    if lines:
        yield table([f"ms a clip, {title}", "length", *STAGES, "evaluations"], lines)
    times: dict[tuple[str, str], list[str]] = {}
    for one in ratios:
        times.setdefault((one["ours"], one["peer"]), []).append(f"{one['times_as_fast']:.2f}")
    if times:
        head = [f"times as fast, {title}", "as", *(f"{s:g} s" for s in lengths_s)]
        yield table(head, [[*pair, *numbers] for pair, numbers in times.items()])


def plot(summary: dict[str, Any], path: Path) -> None:
    """RTFx against the length of the clips, a panel per batch size; encoders alone dashed."""
    from matplotlib.figure import Figure

    results = summary["results"]
    batch_sizes = sorted({one["batch_size"] for one in results})
    figure = Figure(figsize=(5.5 * len(batch_sizes), 5.5), layout="constrained")
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=True)[0]
    colours = {system: f"C{i % 10}" for i, system in enumerate(dict.fromkeys(one["system"] for one in results))}
    for panel, batch_size in zip(panels, batch_sizes, strict=True):
        for system, colour in colours.items():
            points = [one for one in results if (one["system"], one["batch_size"]) == (system, batch_size)]
            points.sort(key=lambda one: one["length_s"])
            if points:
                style = {"linestyle": "--"} if points[0]["task"] == "encode" else {}
                xy = zip(*((one["length_s"], one["rtfx"]) for one in points), strict=True)
                panel.plot(*xy, marker="o", color=colour, label=system, **style)
        panel.set(title=f"batch size {batch_size}", xlabel="length of the clips, s", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("RTFx, s of audio per s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = make_parser(__doc__, data=1, threads=2)
    parser.add_argument("--donor", help="folder or id of the Whisper checkpoint")
    parser.add_argument("--ours", action="append", metavar="SETTINGS", help=OURS_HELP)
    parser.add_argument("--skip", nargs="+", default=[], choices=PEERS)
    parser.add_argument("--compile", action="store_true", help="the donor with torch.compile, too")
    parser.add_argument("--lengths", type=float, nargs="+", default=[2.0, 5.0, 10.0, 20.0], help="of the clips, in s")
    parser.add_argument("--clips", type=int, default=16, help="per length")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recording", type=float, metavar="MINUTES", help="and a recording of about this length")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="beside N processes that compute all the time"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        answer_memory(args.memory_of)
        return None
    args.batch_sizes, args.lengths = (list(dict.fromkeys(one)) for one in (args.batch_sizes, args.lengths))
    args.ours = list(dict.fromkeys(args.ours or [""]))
    if min(args.clips, args.rounds, args.threads, *args.batch_sizes) < 1:
        parser.error("--clips, --rounds, --threads and --batch-sizes must be at least 1")
    if args.data and not args.donor and set(args.skip) != set(PEERS):
        parser.error(f"--donor is needed, or --skip {' '.join(PEERS)}")
    summary = run(parser, args, measure, summarise, to_markdown)
    plot(summary, (args.rescore or args.output) / "results.png")
    return summary


if __name__ == "__main__":
    main()
