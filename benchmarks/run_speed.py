#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Where the time of ours goes.

    python benchmarks/run_speed.py --data DIR --output OUT --ours own: --ours plain:branches=none
    python benchmarks/run_speed.py --rescore OUT     # from OUT/raw.jsonl alone

DIR is an audiofolder: audio files and a metadata.jsonl with `file_name` and `text` per line. Writes
    OUT/raw.jsonl      the run; a row per system, length, batch size and round with the seconds of each stage
    OUT/results.json   medians, from raw.jsonl alone
    OUT/results.md     the same as tables
    OUT/results.png    seconds by stage, where matplotlib is installed
    OUT/profiles/*.txt PyTorch's table of operations of one transcription each
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from run_peers import SETTLE_S, THREAD_VARIABLES, batches_of, describe_run, run_or_rescore
from speed_tables import to_markdown, write_results

RATE_HZ = 16_000
OWN_SETTINGS = "its own settings"
DTYPES = ("float32", "float16", "bfloat16", "int8")


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
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Puts `make(what was there)` in the place of an object's or module's attribute for a while."""
    was_own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def watch_stages(
    model: Any,
    around: Callable[[str], AbstractContextManager],
    on_evaluation: Callable[[int], None] = lambda num_positions: None,
) -> Iterator[None]:
    """
    Enters `around(stage)` about every call of one of the `STAGES` of `generate`, and tells `on_evaluation` of every
    decoder evaluation how many positions (rows times width, masks and padding included) it computes. A stage that is
    called within another belongs to that one. Of an export in ONNX Runtime the encoder has the cross keys in it, and
    the decoder the output layer.
    """
    targets = [("encoder", model, "encode"), ("cross keys", model, "prepare_cross_attention")]
    if hasattr(model, "proj_out"):
        targets += [("decoder", model.get_decoder(), "forward"), ("output layer", model.proj_out, "forward")]
    else:
        # Python looks a call up in the class.
        targets.append(("decoder", type(model.get_decoder()), "__call__"))
    # Not imported by name: a checkpoint that brings its code has modules of its own.
    generation = sys.modules[type(model)._decode_canvas.__module__]
    decoding, canvas = (sys.modules[one.__module__] for one in (generation.VerifiedDecoder, generation.denoise))
    if model.config.has_drafts:
        targets.append(("draft head", model, "draft_logits"))
        drafting = sys.modules[decoding.propose_drafts.__module__]
        targets += [("sampler", decoding, "choose_tokens"), ("sampler", drafting, "propose_tokens")]
    else:
        targets.append(("sampler", canvas, "sampler_step"))
    active: list[str] = []

    def wrap(stage: str) -> Callable[[Any], Any]:
        def make(call: Any) -> Any:
            def watched(*args, **kwargs):
                if active:
                    return call(*args, **kwargs)
                if stage == "decoder":
                    on_evaluation(_num_positions(model, args, kwargs))
                active.append(stage)
                try:
                    with around(stage):
                        return call(*args, **kwargs)
                finally:
                    active.pop()

            return watched

        return make

    with ExitStack() as stack:
        for stage, owner, name in targets:
            stack.enter_context(replaced(owner, name, wrap(stage)))
        yield


def _num_positions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of a call of the decoder, with ids by name or as the first of the tensors."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else next(one for one in args if hasattr(one, "numel"))
    frontiers = kwargs.get("frontiers")
    num_masks = 0 if frontiers is None else frontiers.numel() * model.config.decoder_config.draft_length
    return ids.numel() + num_masks


@contextmanager
def watch_system(system: Any, around: Any, on_evaluation: Any = lambda num_positions: None) -> Iterator[None]:
    """As `watch_stages`, with the features of an `OurModel` and, around what is in it, "generate"."""

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
    clips = cut_clips(args.data, args.lengths, max(args.clips, *args.batch_sizes))
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
            system.transcribe(batches[0])
            if not args.no_profile:
                folder = args.output / "profiles"
                folder.mkdir(exist_ok=True)
                name = f"{common['system']}-{common['backend']}-{length_s:g}s-batch{batch_size}.txt"
                profile_cell(system, batches[0], folder / name.replace("/", "_").replace(" ", "_"), args.device)


# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with metadata.jsonl")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only make the tables of OUT/raw.jsonl again")
    parser.add_argument("--model", help="folder or id; default: the checkpoint of the package")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--ours", action="append", metavar="NAME:SETTINGS", help="such as plain:branches=none,gamma=3; repeatable"
    )
    parser.add_argument("--backend", nargs="+", choices=("torch", "onnx"), default=["torch"])
    parser.add_argument("--onnx", type=Path, metavar="FOLDER", help="the exported checkpoint, for --backend onnx")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1, 2, 5, 10, 20, 30], help="of the clips, in s")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--clips", type=int, default=4, help="per length; more where a batch is larger")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of PyTorch")
    parser.add_argument("--no-profile", action="store_true", help="write no tables of operations")
    return parser


def run(args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """A whole run. Returns the content of results.json."""
    # Before NumPy and torch are imported, which read it once.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(args.threads)))
    # Not a line for every profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    args.output.mkdir(parents=True, exist_ok=True)
    names = ("threads", "rounds", "clips", "lengths", "batch_sizes", "dtype")
    description = describe_run(args, arguments, "run_speed.py", names)
    if (load := description["machine"]["load_before"]) > 0.5:
        print(f"warning: the machine is busy (load {load}), so the times will be wrong.", file=sys.stderr)
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
    return run_or_rescore(parser, args, lambda: run(args, arguments), write_results, to_markdown)


if __name__ == "__main__":
    main()
