#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The paper's ablations (arXiv 2602.18952) in kind.

    python training/run_ablations.py samplers --model M --data DIR DIR2 --output OUT    # five samplers, the same bound
    python training/run_ablations.py nfe --data DIR --output OUT --models isct=FOLDER plain=FOLDER
    python training/run_ablations.py front --model M --data DIR --output OUT --limit 100    # gamma x lambda: WER, NFE
    python training/run_ablations.py nfe --redraw OUT      # from OUT/nfe/raw.jsonl alone

M is a checkpoint with a canvas, trained from a donor that was converted with `draft_layers=0`. DIR is whatever
`mdm-asr evaluate --data` takes. Each part writes
    OUT/<part>/raw.jsonl     the run, and a line per utterance and setting: texts, NFE, times
    OUT/<part>/table.md, figure.png, results.json
"""

import argparse
import copy
import json
import os
import platform
import random
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ablation_tables import PARTS, POOLED, Row, write_part

from mdm_asr_cli.terminal import quiet_libraries
from mdm_asr_hf.evaluate.data import EvaluationData, load_data
from mdm_asr_hf.evaluate.evaluation import PACKAGES, TIMES, evaluate_model, machine, model_sha256
from mdm_asr_hf.loading import load_model
from mdm_asr_hf.sampling_mdm_asr import SAMPLERS, make_sampler

# The front's bound is so large that gamma decides and not the bound.
DEFAULT_STEPS = {"samplers": [32], "nfe": [2, 4, 8, 16, 32], "front": [128]}
# Not the tokens: rows would be ten times as long, and no table needs them.
KEPT = ("id", "dataset", "reference", "hypothesis", "language", "duration_s", "nfe", *TIMES)


class Canvas:
    """A checkpoint with a canvas."""

    def __init__(self, name: str, path: str):
        self.name, self.path = name, path
        self.model, self.processor = load_model(path, "cpu")
        if self.model.config.has_drafts:
            raise ValueError(
                f"`--model` {path!r} decodes by drafts, but the paper's ablations are of a canvas. Train one, from a "
                "donor that was converted with `draft_layers=0`."
            )

    def sampler(self, args: argparse.Namespace, name: str | None = None) -> Any:
        """`name`'s settings: those given, else the checkpoint's, as far as `name` has them."""
        own = self.model.generation_config.sampler_config.to_dict()
        name = name or own["name"]
        given = {"gamma": args.gamma, "lambda_": args.lambda_}
        values = own | {key: value for key, value in given.items() if value is not None}
        # Not `k`: without it conf_top_k plans for the bound of steps, as it must to be compared at one.
        known = SAMPLERS[name]().to_dict().keys() & given.keys()
        return make_sampler(name, **{key: values[key] for key in known if key in values})

    def rows(self, data: EvaluationData, sampler: Any, steps: int, seed: int, batch_size: int) -> Iterator[Row]:
        settings = copy.deepcopy(self.model.generation_config)
        settings.sampler, settings.max_denoising_steps = sampler, steps
        values = sampler.to_dict()
        common = {"kind": "utterance", "model": self.name, "steps": steps, "seed": seed, "sampler": values["name"]}
        # JSON knows no infinity.
        numbers = {key: values.get(name) for key, name in (("gamma", "gamma"), ("lambda", "lambda_"))}
        common |= {key: "inf" if value == float("inf") else value for key, value in numbers.items()}
        options = {"settings": settings, "seed": seed, "batch_size": batch_size}
        for row in evaluate_model(self.model, self.processor, data, **options):
            yield {name: row[name] for name in KEPT} | common


# Parts: each yields rows of raw.jsonl.


def run_samplers(args: argparse.Namespace, models: list[Canvas], sets: list[EvaluationData]) -> Iterator[Row]:
    for steps in args.steps:
        for name, kind in SAMPLERS.items():
            for i in range(args.seeds if kind.needs_noise else 1):
                sampler = models[0].sampler(args, name)
                for data in sets:
                    yield from models[0].rows(data, sampler, steps, args.seed + i, args.batch_size)


def run_nfe(args: argparse.Namespace, models: list[Canvas], sets: list[EvaluationData]) -> Iterator[Row]:
    # One sampler for all, the first model's, lest its settings be compared instead of the models.
    sampler = models[0].sampler(args)
    for model in models:
        for steps in args.steps:
            for data in sets:
                yield from model.rows(data, sampler, steps, args.seed, args.batch_size)


def run_front(args: argparse.Namespace, models: list[Canvas], sets: list[EvaluationData]) -> Iterator[Row]:
    for gamma in args.gammas:
        # All in one step: the order does not matter.
        for lambda_ in args.lambdas if gamma < float("inf") else [min(args.lambdas)]:
            sampler = make_sampler("pbeb_conf", gamma=gamma, lambda_=lambda_)
            for data in sets:
                yield from models[0].rows(data, sampler, args.steps[0], args.seed, args.batch_size)


RUNNERS = {"samplers": run_samplers, "nfe": run_nfe, "front": run_front}


# Command line


def read_data(paths: list[str], limit: int | None, seed: int) -> list[EvaluationData]:
    """The data sets, each cut to `limit` utterances drawn with `seed`, in their order."""
    found: dict[str, EvaluationData] = {}
    for path in paths:
        data = load_data(path)
        if data.name in (*found, POOLED):
            raise ValueError(f"`--data` has two sets called {data.name!r}, or one as the pooled line is. Rename it.")
        if limit is not None and limit < len(data):
            data = data.select(sorted(random.Random(f"{seed} {data.name}").sample(range(len(data)), limit)))
        found[data.name] = data
    return list(found.values())


def read_models(args: argparse.Namespace) -> list[Canvas]:
    pairs = [one.partition("=") for one in args.models or [f"{Path(args.model).name}={args.model}"]]
    names = [name for name, _, _ in pairs]
    if not all(name and path for name, _, path in pairs) or len(set(names)) < len(names):
        raise ValueError(f"`--models` must be NAME=FOLDER, each name once, got {args.models}.")
    return [Canvas(name, path) for name, _, path in pairs]


def measure(args: argparse.Namespace, arguments: list[str]) -> None:
    """Writes a part's raw.jsonl."""
    load_before = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    sets, models = read_data(args.data, args.limit, args.seed), read_models(args)
    run = {
        "kind": "run",
        "command": shlex.join(["python", "training/run_ablations.py", *arguments]),
        "models": {one.name: {"path": one.path, "sha256": model_sha256(one.path)} for one in models},
        "data": [one.describe() for one in sets],
        "num_threads": torch.get_num_threads(),
        "load_before": load_before,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": machine("cpu"),
    }
    folder = args.output / args.part
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "raw.jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps(run, ensure_ascii=False), file=file, flush=True)
        for row in RUNNERS[args.part](args, models, sets):
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--data", nargs="+", help="folders, manifests or names")
    add("--output", type=Path, help="folder to write")
    add("--redraw", type=Path, metavar="OUT", help="only make table and figure of OUT/<part>/raw.jsonl again")
    add("--model", help="folder or id of a checkpoint with a canvas")
    add("--models", nargs="+", metavar="NAME=FOLDER", help="nfe: several; the other parts take the first")
    add("--limit", type=int, help="utterances of each data set, drawn with --seed; default: all")
    add("--steps", type=int, nargs="+", help="bounds of NFE; samplers: 32, nfe: 2 4 8 16 32, front: 128")
    add("--gamma", type=float, help="samplers, nfe: instead of the checkpoint's")
    add("--lambda", type=float, dest="lambda_", help="the same")
    add("--seeds", type=int, default=3, help="samplers: of random and dfm, which are averaged")
    add("--gammas", type=float, nargs="+", default=[0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, float("inf")], help="front")
    add("--lambdas", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.5, 1.0], help="front")
    add("--batch-size", type=int, default=16)
    add("--threads", type=int, default=2, help="of torch")
    add("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> Row:
    """What results.json holds."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not args.redraw and not (args.data and args.output and bool(args.model) != bool(args.models)):
        parser.error("--data, --output and --model or --models are needed, or --redraw")
    args.steps = args.steps or DEFAULT_STEPS[args.part]
    if args.part == "front" and len(args.steps) > 1:
        parser.error("--steps is one number for front")
    for name in ("limit", "seeds", "batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        if not args.redraw:
            torch.set_num_threads(args.threads)
            with quiet_libraries():
                measure(args, arguments)
        folder = (args.redraw or args.output) / args.part
        results = write_part(folder, args.part)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print((folder / "table.md").read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    main()
