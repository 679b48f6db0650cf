#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Where the time of ours goes, and what settings of the sampler and of the active window cost and gain.

    python benchmarks/run_speed.py stages --data DIR --output OUT --ours near:active-ahead=8 [--ours ...]
    python benchmarks/run_speed.py front --data DIR [DIR ...] --output OUT --gammas 0.05 0.2 --aheads none 8
    python benchmarks/run_speed.py stages --rescore OUT     # and the same of front: from OUT/raw.jsonl alone

DIR is an audiofolder: audio files and a metadata.jsonl with `file_name` and `text` per line. Writes
    OUT/raw.jsonl      the run; of `stages` a row per system, length, batch size and round with the seconds of each
                       stage; of `front` a row per utterance and setting
    OUT/results.json   medians and sums, from raw.jsonl alone
    OUT/results.md     the same as tables
    OUT/results.png    seconds by stage, or WER against evaluations, where matplotlib is installed
    OUT/profiles/*.txt of `stages`: PyTorch's table of operations of one transcription each

`front` that is started again with the same --output goes on behind the last complete setting.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from run_peers import SETTLE_S, THREAD_VARIABLES, batches_of, describe_run, run_or_rescore
from speed_tables import to_markdown, write_results

RATE_HZ = 16_000
OWN_SETTINGS = "its own settings"


# Stages


def cut_clips(folder: Path, lengths_s: list[float], num_clips: int) -> dict[float, list[Any]]:
    """
    Clips (N,) of each length exactly: the k-th starts with the k-th utterance of the folder and goes on with those
    behind it, from the first again where they end.
    """
    import numpy as np

    from mdm_asr_hf.audio_mdm_asr import load_audio

    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"`--data` {str(folder)!r} has no metadata.jsonl. Pass an audiofolder, see --help.")
    names = [json.loads(line)["file_name"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    loaded: dict[str, Any] = {}
    clips: dict[float, list[Any]] = {length_s: [] for length_s in lengths_s}
    for k in range(num_clips):
        parts, total = [], 0
        for name in itertools.islice(itertools.cycle(names), k % len(names), None):
            if total >= max(lengths_s) * RATE_HZ:
                break
            if name not in loaded:
                loaded[name] = load_audio(folder / name)
                if not len(loaded[name]):
                    raise ValueError(f"`--data`: {name!r} is empty.")
            parts.append(loaded[name])
            total += len(parts[-1])
        samples = np.concatenate(parts)
        for length_s in lengths_s:
            clips[length_s].append(samples[: round(length_s * RATE_HZ)])
    return clips


def read_system(text: str) -> tuple[str, str]:
    """Name and settings of "name:key=value,..."; the settings are the name where none is given."""
    name, colon, settings = text.partition(":")
    return (name, settings) if colon else (text or OWN_SETTINGS, text)


class StageClock:
    """Seconds that each stage took, since the last `start`; on a GPU, until it has done what it was told."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self.positions = self.evaluations = 0

    @contextmanager
    def around(self, stage: str) -> Iterator[None]:
        self.synchronize()
        start = time.perf_counter()
        yield
        self.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def on_evaluation(self, num_positions: int) -> None:
        self.positions += num_positions
        self.evaluations += 1


@contextmanager
def watch_system(system: Any, around: Any, on_evaluation: Any = lambda num_positions: None) -> Iterator[None]:
    """As `watch_stages`, with the features of an `OurModel` and, around what is in it, "generate"."""
    from work import replaced, watch_stages

    def wrap(stage: str) -> Any:
        def make(call: Any) -> Any:
            def watched(*args, **kwargs):
                with around(stage):
                    return call(*args, **kwargs)

            return watched

        return make

    with ExitStack() as stack:
        stack.enter_context(replaced(system, "encoder_inputs", wrap("features")))
        stack.enter_context(replaced(system.model, "generate", wrap("generate")))
        stack.enter_context(watch_stages(system.model, around, on_evaluation))
        yield


def count_cell(system: Any, batches: list[list[Any]]) -> dict[str, Any]:
    """What is computed for the batches, per utterance."""
    from work import count_work

    with count_work(system.model) as work:
        for clips in batches:
            system.transcribe(clips)
    return work.per_utterance(sum(map(len, batches)))


def profile_cell(system: Any, clips: list[Any], path: Path, device: str) -> None:
    """Writes the operations of one batch, the longest first, and above them the stages."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler, watch_system(system, lambda name: record_function(f"# {name}")):
        system.transcribe(clips)
    averages = profiler.key_averages()
    by_self = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    tables = [averages.table(sort_by=key, row_limit=40) for key in ("cpu_time_total", by_self)]
    path.write_text("\n\n".join(tables), encoding="utf-8")


def time_cell(
    system: Any, batches: list[list[Any]], clock: StageClock, synchronize: Callable[[], None]
) -> dict[str, Any]:
    """A row of raw.jsonl: seconds of all batches, by stage, and what was computed."""
    from run_peers import time_calls

    row: dict[str, Any] = {"num_batches": len(batches), "num_clips": sum(map(len, batches))}
    row["audio_s"] = sum(len(clip) for batch in batches for clip in batch) / RATE_HZ
    clock.start()
    with watch_system(system, clock.around, clock.on_evaluation):
        wall_s, outputs = time_calls(system.transcribe, batches, synchronize)
    row |= {"wall_s": round(wall_s, 6), "stages": {name: round(s, 6) for name, s in clock.seconds.items()}}
    row |= {"positions": clock.positions, "evaluations": clock.evaluations}
    row["nfe"] = [one["nfe"] for batch in outputs for one in batch]
    row["hypotheses"] = [one["hypothesis"] for batch in outputs for one in batch]
    return row


def run_stages(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Writes the rows; the systems take turns at every shape in every round."""
    import torch
    from peers import Peer, load_peer, parse_settings, require_onnx
    from rich.console import Console
    from rich.progress import track

    from mdm_asr_hf import DEFAULT_CHECKPOINT_NAME, default_checkpoint
    from mdm_asr_hf.cli import quiet_libraries

    named = [read_system(text) for text in args.ours]
    if len({name for name, _ in named}) < len(named):
        raise ValueError(f"`--ours` {args.ours}: give every one a name of its own.")
    for _, settings in named:
        parse_settings(settings)
    if "onnx" in args.backend:
        require_onnx(str(args.onnx))
    source = args.model or str(default_checkpoint())
    label = Path(args.model).name if args.model else DEFAULT_CHECKPOINT_NAME
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    # At least as many clips as the largest batch; smaller batches take the first of them.
    clips = cut_clips(args.data[0], args.lengths, max(args.clips, *args.batch_sizes))
    systems = []
    with quiet_libraries():
        for backend in args.backend:
            for name, settings in named:
                if backend == "onnx":
                    peer = Peer("onnx", source, label, args.onnx.name, settings, str(args.onnx))
                else:
                    peer = Peer("ours", source, label, args.dtype, settings)
                common = {"system": name, "backend": backend, "dtype": peer.dtype, "settings": settings}
                systems.append((common, load_peer(peer, args.device, args.threads)))
        shapes = [(batch_size, length_s) for batch_size in args.batch_sizes for length_s in args.lengths]
        steps = [(r, *shape, *system) for r in range(args.rounds + 1) for shape in shapes for system in systems]
        clock = StageClock(synchronize)
        for round_number, batch_size, length_s, common, system in track(steps, "rounds", console=Console(stderr=True)):
            batches = batches_of(clips[length_s][: max(args.clips, batch_size)], batch_size)
            common = common | {"batch_size": batch_size, "length_s": length_s}
            if len(args.backend) > 1:
                time.sleep(SETTLE_S)
            if round_number:
                row = {"kind": "time", **common, "round": round_number}
                row |= time_cell(system, batches, clock, synchronize)
                if round_number > 1:
                    del row["hypotheses"]
                write(row)
                continue
            # The warm-up, whose time does not count.
            if common["backend"] == "torch":
                write({"kind": "work", **common, **count_cell(system, batches)})
            else:
                system.transcribe(batches[0])
            if not args.no_profile:
                folder = args.output / "profiles"
                folder.mkdir(exist_ok=True)
                name = f"{common['system']}-{common['backend']}-{length_s:g}s-batch{batch_size}.txt"
                profile_cell(system, batches[0], folder / name.replace("/", "_").replace(" ", "_"), args.device)


# Front


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings to decode with, without those that only repeat others."""
    found = []
    for steps, revise, ahead, behind, commit, lambda_, gamma in itertools.product(
        args.steps, args.revises, args.aheads, args.behinds, args.commits, args.lambdas, args.gammas
    ):
        # Nothing is behind a window that is the whole canvas.
        one = {"gamma": gamma, "lambda": lambda_, "ahead": ahead, "behind": None if ahead is None else behind}
        one |= {"commit": commit, "revise": revise, "steps": steps}
        if one not in found:
            found.append(one)
    return found


def jsonable(setting: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {name: "inf" if value == float("inf") else value for name, value in setting.items()}


def decode_batches(model: Any, processor: Any, data: Any, batches: list[Any], settings: Any) -> list[dict[str, Any]]:
    """A row per utterance of encoded batches; a batch's positions and seconds are shared out evenly."""
    import torch
    from work import watch_stages

    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    clock = StageClock(synchronize)
    rows = []
    for encoded in batches:
        batch = encoded.to(model.device)
        clock.start()
        synchronize()
        start = time.perf_counter()
        with watch_stages(model, lambda stage: ExitStack(), clock.on_evaluation):
            output = model.generate(
                input_features=batch.features,
                attention_mask=batch.mask,
                encoder_outputs=batch.encoder_outputs,
                generation_config=settings,
            )
        synchronize()
        share = 1 / len(batch.indices)
        common = {"decoder_s": round(share * (time.perf_counter() - start), 6)}
        common |= {"positions": round(share * clock.positions, 3)}
        texts = processor.batch_decode(output.sequences)
        for i, text, nfe, duration_s in zip(batch.indices, texts, output.nfe.tolist(), batch.durations_s, strict=True):
            entry = data.rows[i]
            row = {"dataset": data.name, "id": entry["id"], "reference": entry["text"], "hypothesis": text}
            rows.append(row | {"duration_s": round(duration_s, 3), "nfe": nfe} | common)
    return rows


def kept_rows(path: Path, same: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The rows of an earlier run that need not be made again: those of complete settings.

    Raises:
        ValueError: it was of another checkpoint, other data or other settings than `same`.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            # Cut off where the run was.
            break
    before = next((row["same"] for row in rows if row["kind"] == "run"), None)
    if before != json.loads(json.dumps(same)):
        raise ValueError(f"`--output`: {str(path)!r} is of another run: {before}, now {same}. Choose another folder.")
    done = [(row["dataset"], row["setting"]) for row in rows if row["kind"] == "done"]
    return [row for row in rows if row["kind"] == "run" or (row["dataset"], row["setting"]) in done]


def run_front(args: argparse.Namespace, description: dict[str, Any]) -> None:
    """Encodes each data set once, decodes it with every setting, and writes the rows."""
    import torch
    from rich.console import Console

    from mdm_asr_hf import DEFAULT_CHECKPOINT_NAME, default_checkpoint
    from mdm_asr_hf.cli import generation_settings, load_model, quiet_libraries
    from mdm_asr_hf.evaluation_data_mdm_asr import load_data
    from mdm_asr_hf.evaluation_mdm_asr import encode_dataset, model_sha256

    torch.set_num_threads(args.threads)
    source = args.model or str(default_checkpoint())
    jobs = grid(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with quiet_libraries():
        model, processor = load_model(source, args.device)
        settings = [
            generation_settings(
                model,
                sampler="pbeb_conf",
                gamma=job["gamma"],
                lambda_=job["lambda"],
                max_denoising_steps=job["steps"],
                others=[
                    f"active_ahead={json.dumps(job['ahead'])}",
                    f"commit_ahead={json.dumps(job['commit'])}",
                    f"revise_above={json.dumps(job['revise'])}",
                    *([] if job["behind"] is None else [f"active_behind={job['behind']}"]),
                    *args.set,
                ],
            )
            for job in jobs
        ]
        sets = [load_data(str(folder)) for folder in args.data]
        if len({data.name for data in sets}) < len(sets):
            raise ValueError(f"`--data`: {[str(folder) for folder in args.data]} have the same name.")
        if args.limit:
            # Spread evenly over the rows, the same ones in every run.
            kept = [range(0, len(one), -(-len(one) // args.limit)) if len(one) else () for one in sets]
            sets = [one.select(rows) for one, rows in zip(sets, kept, strict=True)]
        name = Path(args.model).name if args.model else DEFAULT_CHECKPOINT_NAME
        same = {"model": name, "sha256": model_sha256(source), "set": args.set, "batch_size": args.batch_size}
        same |= {"data": [[data.name, data.sha256, len(data)] for data in sets], "threads": args.threads}
        path = args.output / "raw.jsonl"
        rows = kept_rows(path, same)
        done = [(row["dataset"], row["setting"]) for row in rows if row["kind"] == "done"]
        # The first says what the settings are, the others with what and when the rest was made.
        rows.append(description | {"same": same})
        # Whole, then moved: what was measured must outlive an end in between.
        scratch = path.with_suffix(".part")
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        scratch.replace(path)
        with path.open("a", encoding="utf-8") as file:
            for data in sets:
                left = [(job, one) for job, one in zip(jobs, settings, strict=True)]
                left = [(job, one) for job, one in left if (data.name, jsonable(job)) not in done]
                if not left:
                    continue
                encoded = encode_dataset(model, processor, data, batch_size=args.batch_size, progress=True)
                # First calls set up kernels and memory.
                decode_batches(model, processor, data, encoded.batches[-1:], left[0][1])
                for number, (job, one) in enumerate(left, 1):
                    start = time.perf_counter()
                    found = decode_batches(model, processor, data, encoded.batches, one)
                    common = {"setting": jsonable(job)}
                    lines = [{"kind": "utterance", **common, **row} for row in found]
                    lines.append({"kind": "done", **common, "dataset": data.name})
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
                    file.flush()
                    took_s = time.perf_counter() - start
                    console.print(f"{data.name} {number}/{len(left)}: {json.dumps(jsonable(job))}, {took_s:.0f} s")


# Command line


def int_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def float_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    stages = parts.add_parser("stages", help="seconds of features, encoder, decoder, ... by length and batch size")
    front = parts.add_parser("front", help="WER, evaluations and positions for a grid of settings")
    for part in (stages, front):
        part.add_argument("--data", type=Path, nargs="+", help="folders with metadata.jsonl; `stages` takes one")
        part.add_argument("--output", type=Path, help="folder to write")
        part.add_argument("--rescore", type=Path, metavar="OUT", help="only make the tables of OUT/raw.jsonl again")
        part.add_argument("--model", help="folder or id; default: the checkpoint of the package")
        part.add_argument("--threads", type=int, default=2)
        part.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    stages.add_argument(
        "--ours", action="append", metavar="NAME:SETTINGS", help="such as near:active-ahead=8,steps=128; repeatable"
    )
    stages.add_argument("--backend", nargs="+", choices=("torch", "onnx"), default=["torch"])
    stages.add_argument("--onnx", type=Path, metavar="FOLDER", help="the exported checkpoint, for --backend onnx")
    stages.add_argument("--lengths", type=float, nargs="+", default=[1, 2, 5, 10, 20, 30], help="of the clips, in s")
    stages.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    stages.add_argument("--clips", type=int, default=4, help="per length; more where a batch is larger")
    stages.add_argument("--rounds", type=int, default=3)
    stages.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of PyTorch")
    stages.add_argument("--no-profile", action="store_true", help="write no tables of operations")
    front.add_argument("--gammas", type=float, nargs="+", default=[0.05, 0.2, 0.5, 1.0])
    front.add_argument("--lambdas", type=float, nargs="+", default=[0.2])
    front.add_argument("--aheads", type=int_or_none, nargs="+", default=[None, 8], help='"none": the whole canvas')
    front.add_argument("--behinds", type=int, nargs="+", default=[2])
    front.add_argument("--commits", type=int_or_none, nargs="+", default=[None], help='"none": the whole window')
    front.add_argument("--revises", type=float_or_none, nargs="+", default=[None], help='"none": revise nothing')
    front.add_argument("--steps", type=int, nargs="+", default=[128], help="bounds of denoising steps")
    front.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of generation_config.json")
    front.add_argument("--limit", type=int, help="at most so many utterances of each data set, spread evenly")
    front.add_argument("--batch-size", type=int, default=8)
    return parser


def run(args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """A whole part. Returns the content of results.json."""
    # Before NumPy and torch are imported, which read it once.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(args.threads)))
    # Not a line for every profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    args.output.mkdir(parents=True, exist_ok=True)
    names = ("threads", "rounds", "clips", "lengths", "batch_sizes", "dtype")
    if args.part == "front":
        names = ("threads", "batch_size", "limit", "set")
    description = {**describe_run(args, arguments, "run_speed.py", names), "part": args.part}
    if (load := description["machine"]["load_before"]) > 0.5:
        print(f"warning: the machine is busy (load {load}), so the times will be wrong.", file=sys.stderr)
    if args.part == "front":
        run_front(args, description)
        return write_results(args.output)
    with (args.output / "raw.jsonl").open("w", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

        write(description)
        run_stages(args, write)
    return write_results(args.output)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.part == "stages":
        args.ours = list(dict.fromkeys(args.ours or [""]))
        args.backend, args.lengths, args.batch_sizes = (
            list(dict.fromkeys(one)) for one in (args.backend, args.lengths, args.batch_sizes)
        )
        if min(args.clips, args.rounds, args.threads, *args.batch_sizes) < 1 or min(args.lengths) <= 0:
            parser.error("--clips, --rounds, --threads, --batch-sizes and --lengths must be above 0")
        if "onnx" in args.backend and not args.onnx:
            parser.error("--backend onnx needs --onnx FOLDER")
        if "onnx" in args.backend and args.device != "cpu":
            parser.error("--backend onnx is for --device cpu")
        if args.data and len(args.data) > 1:
            parser.error("stages takes one folder as --data")
    return run_or_rescore(parser, args, lambda: run(args, arguments), write_results, to_markdown)


if __name__ == "__main__":
    main()
