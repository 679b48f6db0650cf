# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the benchmarks share: clips, tables, and the files of a run.

A benchmark is a `measure`, which yields rows, and a `summarise` and a `to_markdown` of them. `run` writes
    OUT/raw.jsonl     the run (command, machine, versions), and the rows as they come
    OUT/results.json  the run and what `summarise` makes of the rows
    OUT/results.md    the same as tables
and `--rescore OUT` makes the latter two again from the first. Nothing here imports NumPy or PyTorch, which read the
number of threads once.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

RATE_HZ = 16_000
PACKAGES = ("mdm_asr_hf", "transformers", "torch", "tokenizers", "faster-whisper", "ctranslate2", "onnxruntime")
PACKAGES += ("pywhispercpp", "pocketsphinx", "numpy", "jiwer", "ray", "pyarrow", "fastapi", "uvicorn")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Row = dict[str, Any]


def make_parser(doc: str, data: int | str | None = "+", threads: int | None = 1) -> argparse.ArgumentParser:
    """With the options that all benchmarks have; `data` is how many folders --data takes, `threads` the default of
    --threads; None leaves either out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        parser.add_argument("--data", nargs=data, type=Path, default=[], help="folders with metadata.jsonl")
    parser.add_argument("--output", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only make the results of OUT/raw.jsonl again")
    parser.add_argument("--model", help="a checkpoint, folder or id; default: the one in the package")
    parser.set_defaults(threads=threads)
    if threads:
        parser.add_argument("--threads", type=int)
    return parser


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    summarise: Callable[[list[Row]], Row],
    to_markdown: Callable[[Row], str],
    needs_data: bool = True,
) -> Row:
    """Runs the benchmark, or with `--rescore` only scores it again; prints the tables, returns the summary."""
    if not args.rescore and not (args.output and (args.data or not needs_data)):
        parser.error("--data and --output are needed, or --rescore")
    try:
        if not args.rescore:
            if args.threads:
                # Before NumPy and torch are imported.
                os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(args.threads)))
            args.output.mkdir(parents=True, exist_ok=True)
            with (args.output / "raw.jsonl").open("w", encoding="utf-8") as file:
                for row in chain([describe_run(args)], measure(args)):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
        return write_results(args.rescore or args.output, summarise, to_markdown)
    except ValueError as error:
        sys.exit(f"error: {error}")


def write_results(folder: Path, summarise: Callable[[list[Row]], Row], to_markdown: Callable[[Row], str]) -> Row:
    path = folder / "raw.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Run without --rescore first.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    summary = {"run": rows[0], **summarise(rows[1:])}
    (folder / "results.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = to_markdown(summary)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(text)
    return summary


def describe_run(args: argparse.Namespace) -> Row:
    """Command, machine and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine = {"cpu": platform.processor() or platform.machine(), "num_cores": os.cpu_count()}
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        machine["cpu"] = names[0].partition(":")[2].strip() if names else machine["cpu"]
    if getattr(args, "device", "cpu") == "cuda":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
    machine |= {"platform": platform.platform(), "load_before": round(os.getloadavg()[0], 2)}
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"kind": "run", "command": command, "threads": args.threads, "machine": machine, "versions": versions}


def table(head: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    """Markdown; None is an empty cell."""
    head = list(head)
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |" for cells in [head, rule, *lines]
    )


def table_of(columns: dict[str, str], rows: list[Row]) -> str:
    """Markdown of the columns (name -> heading) that some row has."""
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    return table([columns[name] for name in names], [[row.get(name) for name in names] for row in rows]) + "\n"


def read_clips(data: Path | str) -> list[Row]:
    """Of a data set as `mdm-asr evaluate` takes it: `set`, `id`, `text`, `duration_s`, and `audio` for [`samples`]."""
    from mdm_asr_hf.evaluate.data import load_data

    loaded = load_data(str(data))
    names = ("id", "text", "duration_s")
    return [
        {"set": loaded.name, "audio": loaded.clip(i), **{name: row[name] for name in names}}
        for i, row in enumerate(loaded.rows)
    ]


def samples(clip: Row) -> Any:
    """(N,) float32 at 16 kHz."""
    from mdm_asr_hf.audio_mdm_asr import load_audio

    return load_audio(clip["audio"], target_sampling_rate=RATE_HZ)


def batches(clips: list[Any], length: Callable[[Any], float], batch_size: int) -> Iterator[list[Any]]:
    """The clips in batches, the shortest first, with a line on stderr for each."""
    ordered = sorted(clips, key=length)
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]
        print(f"{min(first + batch_size, len(ordered))} of {len(ordered)}", file=sys.stderr, flush=True)


def load_ours(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model of `--model` and its processor, with the threads of `--threads`."""
    from mdm_asr_hf.loading import default_checkpoint, load_model

    return load_model(args.model or str(default_checkpoint()), "cpu", num_threads=args.threads)
