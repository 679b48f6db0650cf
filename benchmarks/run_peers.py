#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Puts MDM-ASR beside what one would use instead, on the same audio and machine, in one process, round by round.

    python benchmarks/run_peers.py --donor WHISPER_FOLDER --data DIR --output OUT [--ours branches=none ...]
    python benchmarks/run_peers.py --rescore OUT

WHISPER_FOLDER is the checkpoint that ours was made of, as transformers has it. DIR is an audiofolder: audio files and
a metadata.jsonl with `file_name` and `text` per line. Writes
    OUT/raw.jsonl     the run, the memory of each system, and per system, length, batch size and round the seconds;
                      with the texts in the first round
    OUT/results.json  medians, WER, memory; from raw.jsonl alone, as `--rescore OUT` makes it again
    OUT/results.md    the same as tables
    OUT/results.png   RTFx against the length of the clips, where matplotlib is installed

benchmarks/README.md says what is timed and how.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "tokenizers", "faster-whisper", "ctranslate2", "onnxruntime")
PACKAGES += ("pywhispercpp", "numpy", "jiwer")
# What --skip can leave out.
PEERS = ("transformers", "faster-whisper", "whisper.cpp")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
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


def choose_clips(entries: list[dict[str, Any]], target_s: float, num_clips: int) -> list[list[dict[str, Any]]]:
    """
    Utterances of about a length: those nearest to it, and where they are too few, joins of utterances that follow each
    other in one speaker's chapter, which is what stands before the last "-" of their file names.

    Args:
        entries: with `file_name` and `duration_s`.

    Returns:
        `num_clips` lists of entries, each to be joined. No entry is in two of them.

    Raises:
        ValueError: the entries do not hold as many.
    """
    low, high = target_s * (1 - TOLERANCE), target_s * (1 + TOLERANCE)

    def distance(clip: list[dict[str, Any]]) -> tuple[float, str]:
        return abs(sum(entry["duration_s"] for entry in clip) - target_s), clip[0]["file_name"]

    singles = sorted(([entry] for entry in entries if low <= entry["duration_s"] <= high), key=distance)
    chosen = singles[:num_clips]
    if len(chosen) < num_clips:
        chapters: dict[str, list[dict[str, Any]]] = {}
        for entry in sorted(entries, key=lambda entry: entry["file_name"]):
            if "-" in Path(entry["file_name"]).name and entry["duration_s"] < low:
                chapters.setdefault(entry["file_name"].rpartition("-")[0], []).append(entry)
        joins = []
        for chapter in chapters.values():
            start = 0
            while start < len(chapter):
                ends = range(start + 2, len(chapter) + 1)
                fitting = [chapter[start:end] for end in ends]
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


def read_entries(data: Path) -> list[dict[str, Any]]:
    """The lines of an audiofolder's metadata.jsonl."""
    path = data / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"`--data` {str(data)!r} has no metadata.jsonl. Pass an audiofolder, see --help.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def make_clips(data: Path, lengths_s: list[float], num_clips: int) -> dict[float, list[dict[str, Any]]]:
    """Clips of each length: `id`, `reference`, `duration_s` and 16 kHz `samples` (N,), float32."""
    import numpy as np
    import soundfile

    from mdm_asr_hf.audio_mdm_asr import load_audio

    entries = read_entries(data)
    for entry in entries:
        entry["duration_s"] = entry.get("duration_s") or soundfile.info(data / entry["file_name"]).duration
    clips = {}
    for length_s in lengths_s:
        if not 0 < length_s * (1 + TOLERANCE) <= MAX_CLIP_S:
            raise ValueError(f"`--lengths` {length_s:g} s: Whisper's window is 30 s, so at most 26 are possible.")
        clips[length_s] = []
        for parts in choose_clips(entries, length_s, num_clips):
            samples = np.concatenate([load_audio(data / part["file_name"]) for part in parts])
            clips[length_s].append(
                {
                    "id": "+".join(part["file_name"] for part in parts),
                    "reference": " ".join(part["text"] for part in parts),
                    "duration_s": len(samples) / 16_000,
                    "samples": samples,
                }
            )
    return clips


def make_recording(data: Path, minutes: float) -> dict[str, Any]:
    """Utterances in the order of `metadata.jsonl`, `PAUSE_S` between them, as one recording."""
    import numpy as np

    from mdm_asr_hf.audio_mdm_asr import load_audio

    pieces, texts, num_samples = [], [], 0
    for entry in read_entries(data):
        pieces += [load_audio(data / entry["file_name"]), np.zeros(int(PAUSE_S * 16_000), dtype=np.float32)]
        texts.append(entry["text"])
        num_samples += len(pieces[-2]) + len(pieces[-1])
        if num_samples >= 60 * 16_000 * minutes:
            break
    samples = np.concatenate(pieces)
    return {"reference": " ".join(texts), "duration_s": len(samples) / 16_000, "samples": samples}


def batches_of(clips: list[Any], batch_size: int) -> list[list[Any]]:
    """Full batches only: the clips start again from the first where the last batch would be short."""
    num_batches = -(-len(clips) // batch_size)
    repeated = [clips[i % len(clips)] for i in range(num_batches * batch_size)]
    return [repeated[i : i + batch_size] for i in range(0, len(repeated), batch_size)]


# Running


def list_peers(args: argparse.Namespace, work: Path) -> list[Any]:
    """What is compared, ours last."""
    from peers import Peer, read_ours

    from mdm_asr_hf.loading import DEFAULT_CHECKPOINT_NAME, default_checkpoint

    donor_name = Path(args.donor).name if args.donor else ""
    peers = []
    for dtype in args.dtypes:
        if "transformers" not in args.skip:
            peers.append(Peer("transformers", args.donor, donor_name, dtype))
            if args.compile:
                peers.append(Peer("compiled", args.donor, donor_name, dtype))
        if "faster-whisper" not in args.skip:
            peers.append(Peer("faster-whisper", str(work / "float32"), donor_name, dtype))
    if "faster-whisper" not in args.skip:
        peers.append(Peer("faster-whisper", str(work / "int8"), donor_name, "int8"))
    # The wheels are built for CPUs.
    if "whisper.cpp" not in args.skip and 1 in args.batch_sizes and args.device == "cpu":
        for kind in ("f16", "q8_0"):
            peers.append(Peer("whisper.cpp", str(work / f"ggml-{kind}.bin"), donor_name, kind))
    source, name = args.model or str(default_checkpoint()), args.model and Path(args.model).name
    name = name or DEFAULT_CHECKPOINT_NAME
    ours = [read_ours(settings) for settings in args.ours]
    for dtype in args.dtypes:
        peers += [Peer("ours", source, name, dtype, settings) for folder, own, settings in ours if not folder + own]
    # Once, since these have their own precision.
    for folder, dtype, settings in ours:
        if folder:
            peers.append(Peer("onnx", source, "mdm_asr_hf", Path(folder).name, settings, folder))
        elif dtype:
            peers.append(Peer("ours", source, name, dtype, settings))
    return peers


def measure_memory(peers: list[Any], args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Each system in a fresh process that loads only that system."""
    for peer in peers:
        batch_sizes = list(filter(peer.can_batch, sorted(args.batch_sizes)))
        request = {"peer": peer.to_dict(), "batch_sizes": batch_sizes, "device": args.device}
        request |= {"threads": args.threads, "clips": str(work / "longest.npz")}
        command = [sys.executable, __file__, "--memory-of", json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{peer.label} failed:\n{done.stderr.strip()}")
        for batch_size, mib in zip(batch_sizes, json.loads(done.stdout.splitlines()[-1]), strict=True):
            yield {"kind": "memory", "system": peer.label, "batch_size": batch_size, "mib": mib}


def answer_memory(request: dict[str, Any]) -> None:
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


def time_calls(call: Any, inputs: list[Any], synchronize: Any) -> tuple[float, list[Any]]:
    """Seconds that `call` took for all the inputs, and what it returned."""
    outputs = []
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


def run_rounds(
    peers: list[Any], clips: dict[float, list[dict[str, Any]]], args: argparse.Namespace, write: Any
) -> None:
    """Hands `write` a row per system, length, batch size and round; the systems take turns in every round."""
    import torch
    from peers import load_peer
    from rich.console import Console
    from rich.progress import Progress

    from mdm_asr_cli.terminal import quiet_libraries

    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    with quiet_libraries(), Progress(console=Console(stderr=True)) as progress:
        tasks = []
        seen = set()
        for peer in progress.track(peers, description="loading"):
            system = load_peer(peer, args.device, args.threads)
            tasks.append(("transcribe", peer.label, peer, system))
            if peer.kind in ("transformers", "ours", "onnx") and peer.encoder_label not in seen:
                seen.add(peer.encoder_label)
                tasks.append(("encode", peer.encoder_label, peer, system))
        shapes = [(batch_size, length_s) for batch_size in args.batch_sizes for length_s in clips]
        # Round 0 is the warm-up: one batch of every shape, not written.
        turns = [(*shape, task) for shape in shapes for task in tasks if task[2].can_batch(shape[0])]
        steps = [(r, *turn) for r in range(args.rounds + 1) for turn in turns]
        for round_number, batch_size, length_s, (task, label, peer, system) in progress.track(
            steps, description="rounds"
        ):
            batches = batches_of(clips[length_s], batch_size)[: None if round_number else 1]
            audio = [[clip["samples"] for clip in batch] for batch in batches]
            if task == "transcribe":
                call, inputs = system.transcribe, audio
            else:
                call, inputs = system.encode, [system.encoder_inputs(batch) for batch in audio]
            time.sleep(SETTLE_S)
            stages = getattr(system, "stages", {})
            stages.clear()
            wall_s, outputs = time_calls(call, inputs, synchronize)
            if not round_number:
                continue
            row = {"kind": "time", "task": task, "system": label, "is_ours": peer.is_ours, "batch_size": batch_size}
            row |= {"length_s": length_s, "round": round_number, "wall_s": round(wall_s, 5)}
            row["audio_s"] = round(sum(clip["duration_s"] for batch in batches for clip in batch), 3)
            if stages and task == "transcribe":
                num_clips = len(batches) * batch_size
                row["stages_ms"] = {name: round(1000 * seconds / num_clips, 3) for name, seconds in stages.items()}
                row["stages_ms"]["rest"] = round(1000 * (wall_s - sum(stages.values())) / num_clips, 3)
            if task == "transcribe" and round_number == 1:
                # Without the clips that only fill the last batch.
                decoded = [one for batch in outputs for one in batch][: len(clips[length_s])]
                keys = ("id", "reference", "duration_s")
                row["utterances"] = [
                    {key: clip[key] for key in keys} | one for clip, one in zip(clips[length_s], decoded, strict=True)
                ]
            write(row)
        if args.recording:
            recording, batch_size = make_recording(args.data, args.recording), max(args.batch_sizes)
            systems = [task for task in tasks if task[0] == "transcribe" and hasattr(task[3], "transcribe_recording")]
            steps = [(r, *task[1:]) for r in range(args.rounds) for task in systems]
            for round_number, label, peer, system in progress.track(steps, description="recording"):
                time.sleep(SETTLE_S)
                call, inputs = partial(system.transcribe_recording, batch_size=batch_size), [recording["samples"]]
                wall_s, (text,) = time_calls(call, inputs, synchronize)
                row = {"kind": "recording", "system": label, "is_ours": peer.is_ours, "batch_size": batch_size}
                row |= {"round": round_number + 1, "wall_s": round(wall_s, 5), "audio_s": recording["duration_s"]}
                if not round_number:
                    row |= {"reference": recording["reference"], "hypothesis": text}
                write(row)


def describe_run(
    args: argparse.Namespace,
    arguments: list[str],
    script: str = "run_peers.py",
    settings: tuple[str, ...] = ("threads", "rounds", "clips", "lengths", "batch_sizes", "recording", "busy"),
) -> dict[str, Any]:
    """Command, the `settings` of `args`, machine and versions, for the first row of raw.jsonl."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine = {"device": args.device, "cpu": platform.processor() or platform.machine(), "num_cores": os.cpu_count()}
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        machine["cpu"] = names[0].partition(":")[2].strip() if names else machine["cpu"]
    if args.device == "cuda":
        import torch

        machine["device"] = torch.cuda.get_device_name()
    machine |= {"platform": platform.platform(), "load_before": round(os.getloadavg()[0], 2)}
    values = {name: getattr(args, name) for name in settings}
    command = shlex.join(["python", f"benchmarks/{script}", *arguments])
    return {"kind": "run", "command": command, "settings": values, "machine": machine, "versions": versions}


# Scoring


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """
    The content of results.json, from the rows of raw.jsonl: the run, and per system, batch size and length

    - `rtfx`: seconds of audio per second, from the median of the rounds' seconds; `rtfx_min`, `rtfx_max` of single
      rounds;
    - `wer` in per cent, `num_errors` of `num_words`; both sides went through transformers' EnglishTextNormalizer
      without a table of spellings;
    - `mean_nfe`, decoder evaluations per utterance, where the system tells;
    - `memory_mib`, see `peers.measure_memory`.

    Ours come last. Encoders alone have no WER and no memory. `ratios` say how many times as fast as each peer each of
    ours is, by batch size and length, from the medians.
    """
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalise = EnglishTextNormalizer({})
    memory = {(row["system"], row["batch_size"]): row["mib"] for row in rows if row["kind"] == "memory"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "time":
            groups.setdefault((row["system"], row["batch_size"], row["length_s"]), []).append(row)
    results = []
    for (system, batch_size, length_s), group in groups.items():
        first, walls_s = group[0], [row["wall_s"] for row in group]
        result = {"task": first["task"], "system": system, "is_ours": first["is_ours"], "batch_size": batch_size}
        result |= {"length_s": length_s, "num_rounds": len(group), "audio_s": first["audio_s"]}
        result |= {"wall_s": round(median(walls_s), 5), "rtfx": round(first["audio_s"] / median(walls_s), 2)}
        result |= {"rtfx_min": round(first["audio_s"] / max(walls_s), 2)}
        result |= {"rtfx_max": round(first["audio_s"] / min(walls_s), 2)}
        if stages := [row["stages_ms"] for row in group if "stages_ms" in row]:
            result["stages_ms"] = {name: round(median(one[name] for one in stages), 2) for name in stages[0]}
        if utterances := first.get("utterances"):
            references = [normalise(one["reference"]) for one in utterances]
            hypotheses = [normalise(one["hypothesis"]) for one in utterances]
            counts = jiwer.process_words(references, hypotheses)
            result["num_clips"] = len(utterances)
            result["num_words"] = counts.hits + counts.substitutions + counts.deletions
            result["num_errors"] = counts.substitutions + counts.deletions + counts.insertions
            result["wer"] = round(100 * counts.wer, 2)
            if "nfe" in utterances[0]:
                result["mean_nfe"] = round(sum(one["nfe"] for one in utterances) / len(utterances), 2)
            result["memory_mib"] = memory.get((system, batch_size))
        results.append(result)
    results.sort(key=lambda result: result["is_ours"])
    run = next((row for row in rows if row["kind"] == "run"), None)
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
        if ours["is_ours"]
        and not peer["is_ours"]
        and (ours["batch_size"], ours["length_s"]) == (peer["batch_size"], peer["length_s"])
    ]
    recordings = []
    for system in dict.fromkeys(row["system"] for row in rows if row["kind"] == "recording"):
        group = [row for row in rows if row["kind"] == "recording" and row["system"] == system]
        counts = jiwer.process_words(normalise(group[0]["reference"]), normalise(group[0]["hypothesis"]))
        wall_s = median(row["wall_s"] for row in group)
        one = {key: group[0][key] for key in ("system", "is_ours", "batch_size", "audio_s")}
        one |= {"wall_s": round(wall_s, 3), "rtfx": round(one["audio_s"] / wall_s, 2)}
        recordings.append(one | {"wer": round(100 * counts.wer, 2)})
    return {"run": run, "results": results, "ratios": ratios, "recordings": recordings}


def to_markdown(summary: dict[str, Any]) -> str:
    """The tables of results.md: per batch size one of the systems, ours last, one of the encoders alone, and one of
    the speed of ours over that of each peer."""
    results = summary["results"]
    lengths_s = sorted({result["length_s"] for result in results})
    parts = []
    for batch_size in sorted({result["batch_size"] for result in results}):
        of_batch = [result for result in results if result["batch_size"] == batch_size]
        systems = _cells([result for result in of_batch if result["task"] == "transcribe"])
        on_device = any("peak_device" in (row[lengths_s[0]]["memory_mib"] or {}) for row in systems.values())
        head = [f"system, batch size {batch_size}", *(f"WER % {s:g} s" for s in lengths_s), "WER % all"]
        head += [*(f"RTFx {s:g} s" for s in lengths_s), "GPU MiB" if on_device else "MiB"]
        lines = []
        for system, cells in systems.items():
            mib = (cells[lengths_s[0]]["memory_mib"] or {}).get("peak_device" if on_device else "peak")
            errors, words = (sum(cells[s][name] for s in lengths_s) for name in ("num_errors", "num_words"))
            line = [system, *(f"{cells[s]['wer']:.1f}" for s in lengths_s), f"{100 * errors / words:.1f}"]
            lines.append([*line, *(f"{cells[s]['rtfx']:.1f}" for s in lengths_s), "" if mib is None else f"{mib:.0f}"])
        parts.append(table(head, lines))
        encoders = _cells([result for result in of_batch if result["task"] == "encode"])
        if encoders:
            head = [f"encoder alone, batch size {batch_size}", *(f"RTFx {s:g} s" for s in lengths_s)]
            parts.append(
                table(
                    head, [[name, *(f"{cells[s]['rtfx']:.1f}" for s in lengths_s)] for name, cells in encoders.items()]
                )
            )
        lines = []
        for one in of_batch:
            if stages := one.get("stages_ms"):
                numbers = [stages.get(name, 0.0) for name in STAGES]
                lines.append([one["system"], f"{one['length_s']:g} s", *(f"{number:.1f}" for number in numbers)])
                lines[-1].append(f"{one['mean_nfe']:.1f}")
        if lines:
            head = [f"ms a clip, batch size {batch_size}", "length", *STAGES, "evaluations"]
            parts.append(table(head, lines))
        ratios: dict[tuple[str, str], dict[float, float]] = {}
        for one in summary["ratios"]:
            if one["batch_size"] == batch_size:
                ratios.setdefault((one["ours"], one["peer"]), {})[one["length_s"]] = one["times_as_fast"]
        if ratios:
            head = [f"times as fast, batch size {batch_size}", "as", *(f"{s:g} s" for s in lengths_s)]
            lines = [[*pair, *(f"{of_length[s]:.2f}" for s in lengths_s)] for pair, of_length in ratios.items()]
            parts.append(table(head, lines))
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
    if facts := summary["run"]:
        machine, settings = facts["machine"], facts["settings"]
        device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
        parts.append(
            f"{device}{machine['cpu']}, {machine['num_cores']} cores, {settings['threads']} threads, "
            f"{settings['clips']} clips a length. Load before the run: {machine['load_before']}. {versions}."
        )
        parts.append(f"```bash\n{facts['command']}\n```")
    return "\n\n".join(parts) + "\n"


def _cells(results: list[dict[str, Any]]) -> dict[str, dict[float, dict[str, Any]]]:
    """The results by system and length, in their order."""
    cells: dict[str, dict[float, dict[str, Any]]] = {}
    for result in results:
        cells.setdefault(result["system"], {})[result["length_s"]] = result
    return cells


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def plot(summary: dict[str, Any], path: Path) -> None:
    """RTFx against the length of the clips, a panel per batch size; encoders alone dashed."""
    from matplotlib.figure import Figure

    results = summary["results"]
    batch_sizes = sorted({result["batch_size"] for result in results})
    figure = Figure(figsize=(5.5 * len(batch_sizes), 5.5), layout="constrained")
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=True)[0]
    colours = {system: f"C{i % 10}" for i, system in enumerate(dict.fromkeys(one["system"] for one in results))}
    for panel, batch_size in zip(panels, batch_sizes, strict=True):
        for system, cells in _cells([one for one in results if one["batch_size"] == batch_size]).items():
            lengths_s = sorted(cells)
            first = cells[lengths_s[0]]
            style = (
                {"linestyle": "--"} if first["task"] == "encode" else {"linewidth": 2.5 if first["is_ours"] else 1.5}
            )
            values = [cells[s]["rtfx"] for s in lengths_s]
            panel.plot(lengths_s, values, marker="o", color=colours[system], label=system, **style)
        panel.set(title=f"batch size {batch_size}", xlabel="length of the clips, s", yscale="log")
        panel.set_xticks(lengths_s, [f"{s:g}" for s in lengths_s])
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("RTFx, s of audio per s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def write_results(folder: Path) -> dict[str, Any]:
    """Makes results.json, results.md and results.png of a folder's raw.jsonl."""
    path = folder / "raw.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Run without --rescore first.")
    summary = summarise([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    (folder / "results.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(to_markdown(summary), encoding="utf-8")
    try:
        plot(summary, folder / "results.png")
    except ImportError:
        print("results.png needs matplotlib, which is not installed.", file=sys.stderr)
    return summary


def run(args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """The whole benchmark. Returns the content of results.json."""
    # Before NumPy and torch are imported, which read it once.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(args.threads)))
    args.output.mkdir(parents=True, exist_ok=True)
    description = describe_run(args, arguments)
    if description["machine"]["load_before"] > 0.5:
        load = description["machine"]["load_before"]
        print(f"warning: the machine is busy (load {load}), so the times will be wrong.", file=sys.stderr)
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
        work = Path(work)
        work.mkdir(parents=True, exist_ok=True)
        import numpy as np
        from ggml import write_ggml
        from peers import (
            MODULES,
            WINDOW,
            convert_for_faster_whisper,
            parse_settings,
            read_ours,
            read_window_s,
            require_onnx,
            require_peer,
            split_off,
        )
        from rich.console import Console
        from rich.progress import track

        # What would fail only after the slow parts.
        for one in args.ours:
            folder, _, settings = read_ours(one)
            window_s, settings = split_off(WINDOW, settings)
            read_window_s(window_s)
            parse_settings(settings)
            if folder:
                require_onnx(folder)
        peers = list_peers(args, work)
        for kind in sorted({peer.kind for peer in peers} & MODULES.keys()):
            require_peer(kind)
        clips = make_clips(args.data, args.lengths, args.clips)
        np.savez(work / "longest.npz", *(clip["samples"] for clip in clips[max(clips)]))
        for quantization in ("float32", "int8") if "faster-whisper" not in args.skip else ():
            convert_for_faster_whisper(args.donor, work / quantization, quantization)
        for peer in peers:
            if peer.kind == "whisper.cpp":
                write_ggml(args.donor, Path(peer.source), peer.dtype)
        with (args.output / "raw.jsonl").open("w", encoding="utf-8") as file:

            def write(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            write(description)
            memory = measure_memory(peers, args, work)
            total = sum(peer.can_batch(batch_size) for peer in peers for batch_size in args.batch_sizes)
            for row in track(memory, "memory", total=total, console=Console(stderr=True)):
                write(row)
            with busy_loops(args.busy):
                run_rounds(peers, clips, args, write)
    return write_results(args.output)


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", help="folder or id of the Whisper checkpoint")
    parser.add_argument("--data", type=Path, help="folder with metadata.jsonl")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only make the tables of OUT/raw.jsonl again")
    parser.add_argument("--model", help="ours, folder or id; default: the checkpoint of the package")
    parser.add_argument("--ours", action="append", metavar="SETTINGS", help=OURS_HELP)
    parser.add_argument("--skip", nargs="+", default=[], choices=PEERS)
    parser.add_argument("--compile", action="store_true", help="the donor with torch.compile, too")
    parser.add_argument("--lengths", type=float, nargs="+", default=[2.0, 5.0, 10.0, 20.0], help="of the clips, in s")
    parser.add_argument("--clips", type=int, default=16, help="per length")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recording", type=float, metavar="MINUTES", help="and a recording of about this length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="beside N processes that compute all the time"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--work", type=Path, help="keep the converted weights here; default: a temporary folder")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.batch_sizes, args.lengths = (list(dict.fromkeys(one)) for one in (args.batch_sizes, args.lengths))
    args.ours = list(dict.fromkeys(args.ours or [""]))
    if args.memory_of:
        answer_memory(args.memory_of)
        return None
    for name in ("clips", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if min(args.batch_sizes) < 1:
        parser.error("--batch-sizes must be at least 1")
    is_whole = args.data and args.output and not args.rescore
    if is_whole and not args.donor and set(args.skip) != set(PEERS):
        parser.error(f"--donor is needed, or --skip {' '.join(PEERS)}")
    return run_or_rescore(parser, args, lambda: run(args, arguments), write_results, to_markdown)


def run_or_rescore(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    run: Callable[[], dict[str, Any]],
    write_results: Callable[[Path], dict[str, Any]],
    to_markdown: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Runs the benchmark, or with `--rescore` only makes its tables again; prints them and returns the summary."""
    if not args.rescore and not (args.data and args.output):
        parser.error("--data and --output are needed")
    try:
        summary = write_results(args.rescore) if args.rescore else run()
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(to_markdown(summary))
    return summary


if __name__ == "__main__":
    main()
