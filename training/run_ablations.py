#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The paper's ablations (arXiv 2602.18952) in kind: each encodes a data set once and decodes it many times.

    python training/run_ablations.py samplers --model M --data DIR DIR2 --output OUT    # five samplers, the same bound
    python training/run_ablations.py nfe --data DIR --output OUT --models isct=FOLDER plain=FOLDER
    python training/run_ablations.py speed --model M --data DIR --output OUT --donor WHISPER_FOLDER
    python training/run_ablations.py front --model M --data DIR --output OUT --limit 100    # gamma x lambda: WER, NFE
    python training/run_ablations.py all --model M --data DIR --output OUT
    python training/run_ablations.py --redraw OUT                                       # from OUT/*/raw.jsonl alone

M is a checkpoint with a canvas, trained from a donor that was converted with `draft_layers=0`. DIR is whatever
`mdm-asr evaluate --data` takes. Each part writes
    OUT/<part>/raw.jsonl     a line per utterance and setting: texts, NFE, times; the runs, and what is complete
    OUT/<part>/table.csv, table.md, figure.png, summary.json
A part that is started again goes on behind the last complete setting. `speed` times batches of one, features, encoder
and decoder apart, without reading files; the systems take turns at each utterance, after a warm-up round. The donor is
decoded greedily by transformers, on its stock 30-second features. Nothing else should run on the machine meanwhile.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import random
import shlex
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ablation_tables import AR, POOLED, SAMPLERS
from plot_ablations import PARTS, RAW_NAME, read_raw, write_part
from rich.console import Console
from rich.progress import track

from mdm_asr_cli.terminal import quiet_libraries
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.evaluate.data import EvaluationData, load_data
from mdm_asr_hf.evaluate.evaluation import (
    PACKAGES,
    decode_encoded,
    describe_settings,
    encode_dataset,
    machine,
    model_sha256,
)
from mdm_asr_hf.generation_configuration_mdm_asr import SAMPLERS as SAMPLER_CONFIGS
from mdm_asr_hf.generation_configuration_mdm_asr import make_sampler
from mdm_asr_hf.loading import load_model

# The speed part's are those of the tables; the front's is so large that gamma decides and not the bound.
DEFAULT_STEPS = {"samplers": [32], "nfe": [2, 4, 8, 16, 32], "speed": [32], "front": [128]}
SEVERAL_STEPS = ("samplers", "nfe")
# Whisper's, without which nothing can be compared.
DONOR_WINDOW_S = 30.0
# Not the tokens: rows would be ten times as long, and no table needs them.
KEPT = ("id", "dataset", "reference", "hypothesis", "language", "duration_s", "nfe", "confidence", "is_full")
TIMES = ("features_s", "encoder_s", "decoder_s")


@dataclass
class Model:
    """A checkpoint, loaded when it is needed."""

    name: str
    path: str
    device: str | None

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        with Console(stderr=True).status(f"loading {self.name}"):
            model, processor = load_model(self.path, self.device)
        if model.config.has_drafts:
            raise ValueError(
                f"`--model` {self.path!r} decodes by drafts, but the paper's ablations are of a canvas. Train one, "
                "from a donor that was converted with `draft_layers=0`."
            )
        return model, processor

    @cached_property
    def sha256(self) -> str | None:
        return model_sha256(self.path)

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.loaded[0].parameters())

    def settings(self, sampler: dict[str, Any], steps: int) -> Any:
        """The checkpoint's generation settings with this sampler and bound of steps."""
        settings = copy.deepcopy(self.loaded[0].generation_config)
        settings.sampler, settings.max_denoising_steps = sampler, steps
        settings.validate()
        return settings

    def describe(self) -> dict[str, Any]:
        settings = describe_settings(self.loaded[0].generation_config)
        return {"path": self.path, "sha256": self.sha256, "num_parameters": self.num_parameters, "settings": settings}

    def fingerprint(self) -> dict[str, Any]:
        settings = describe_settings(self.loaded[0].generation_config)
        kept = {name: settings[name] for name in ("canvas", "temperature")}
        return {f"model {self.name!r}": [self.sha256, kept]}


class Raw:
    """
    A part's raw.jsonl. A unit, such as one setting on one data set, is written at once with its mark behind it, so
    that one that was interrupted is done again as a whole.
    """

    def __init__(self, folder: Path, describe: Callable[[], dict[str, Any]]):
        self.path, self.describe, self.has_run = folder / RAW_NAME, describe, False
        entries = read_raw(folder) if self.path.is_file() else []
        self.units = [entry for entry in entries if entry["kind"] == "unit"]
        if self.path.is_file():
            text = "".join(_line(entry) for entry in entries)
            if text != self.path.read_text(encoding="utf-8"):
                scratch = self.path.with_suffix(".part")
                scratch.write_text(text, encoding="utf-8")
                scratch.replace(self.path)
        folder.mkdir(parents=True, exist_ok=True)

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raises ValueError where something of this name was another thing in an earlier run."""
        fingerprint = json.loads(json.dumps(fingerprint))
        for unit in self.units:
            for name in fingerprint.keys() & unit["fingerprint"].keys():
                if fingerprint[name] != unit["fingerprint"][name]:
                    raise ValueError(
                        f"`--output`: {str(self.path)!r} was made with another {name}: {unit['fingerprint'][name]!r}, "
                        f"now {fingerprint[name]!r}. Choose another folder, or delete that file."
                    )

    def has(self, key: dict[str, Any]) -> bool:
        return any(unit["key"] == json.loads(json.dumps(_jsonable(key))) for unit in self.units)

    def add(
        self,
        key: dict[str, Any],
        fingerprint: dict[str, Any],
        rows: list[dict[str, Any]],
        skipped: list[dict[str, str]],
    ) -> None:
        unit = {"kind": "unit", "key": _jsonable(key), "fingerprint": fingerprint, "skipped": skipped}
        head = [] if self.has_run else [{"kind": "run", **self.describe()}]
        lines = [*head, *({"kind": "utterance", **_jsonable(row)} for row in rows), unit]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, lines)))
            file.flush()
            os.fsync(file.fileno())
        self.has_run = True
        self.units.append(json.loads(json.dumps(unit)))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {key: "inf" if value == float("inf") else value for key, value in values.items()}


@dataclass
class Run:
    """What the command line asks for, with its data sets read."""

    args: argparse.Namespace
    command: str
    models: list[Model]
    data: dict[str, EvaluationData]
    load_before: float | None

    def raw(self, part: str) -> Raw:
        return Raw(self.args.output / part, self.describe)

    def steps(self, part: str) -> list[int]:
        return self.args.steps or DEFAULT_STEPS[part]

    def sampler(self, name: str | None = None) -> dict[str, Any]:
        """`name`'s settings: those given, else the first checkpoint's, as far as `name` has them."""
        own = make_sampler(self.models[0].loaded[0].generation_config.sampler).to_dict()
        name = name or own["name"]
        given = {"gamma": self.args.gamma, "lambda_": self.args.lambda_}
        values = own | {key: value for key, value in given.items() if value is not None}
        # Not `k`: without it conf_top_k plans for the bound of steps, as it must to be compared at one.
        known = SAMPLER_CONFIGS[name]().to_dict().keys() & given.keys()
        return make_sampler(name, **{key: values[key] for key in known if key in values}).to_dict()

    def fingerprint(self, model: Model, data: EvaluationData) -> dict[str, Any]:
        return model.fingerprint() | {f"data {data.name!r}": _sha256(data.rows)}

    def describe(self) -> dict[str, Any]:
        """For the record."""
        names = (*PACKAGES, "matplotlib")
        return {
            "command": self.command,
            "models": {model.name: model.describe() for model in self.models},
            "data": [one.describe() for one in self.data.values()],
            "batch_size": self.args.batch_size,
            "dtype": "float32",
            "num_threads": torch.get_num_threads(),
            "load_before": self.load_before,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "machine": machine(self.models[0].loaded[0].device),
        }

    def decode(self, part: str, jobs: list[tuple[Model, dict[str, Any], int, int]]) -> None:
        """
        Decodes every data set with every job (model, sampler, steps, seed); each model encodes a data set once, and
        only if something of it is left to do.
        """
        raw = self.raw(part)
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        total, done = len(jobs) * len(self.data), 0
        for model in self.models:
            its_jobs = [job for job in jobs if job[0] is model]
            for data in self.data.values():
                fingerprint = self.fingerprint(model, data)
                encoded = None
                for _, sampler, steps, seed in its_jobs:
                    done += 1
                    key = {"model": model.name, "dataset": data.name, **sampler, "steps": steps, "seed": seed}
                    # Differing settings of one sampler would make two lines of it in the same table.
                    names = {f"settings of {sampler['name']}": _jsonable(sampler)}
                    if part == "front":
                        names = {"bound of steps": steps}
                    names |= {"sampler": sampler["name"]} if part == "nfe" else {"model": model.name}
                    raw.check(fingerprint | names)
                    if raw.has(key):
                        continue
                    if encoded is None:
                        encoded = encode_dataset(*model.loaded, data, batch_size=self.args.batch_size, progress=True)
                    start = time.perf_counter()
                    settings = model.settings(sampler, steps)
                    rows = decode_encoded(*model.loaded, encoded, settings, seed=seed, progress=True)
                    if not rows:
                        raise ValueError(f"{data.path!r}: none of {len(data)} rows could be decoded. Check its audio.")
                    common = {
                        "model": model.name,
                        "num_parameters": model.num_parameters,
                        "steps": steps,
                        "seed": seed,
                    }
                    rows = [_row(row) | _sampler_columns(sampler) | common for row in rows]
                    raw.add(key, fingerprint | names, rows, data.skipped)
                    mean_nfe = sum(row["nfe"] for row in rows) / len(rows)
                    console.print(
                        f"{part} {done}/{total}: {model.name}, {data.name}, {label(sampler)}, {steps} steps, seed "
                        f"{seed}: {mean_nfe:.1f} NFE, {time.perf_counter() - start:.0f} s"
                    )


def _sha256(rows: list[dict[str, Any]]) -> str:
    lines = "".join(f"{row['id']}\t{row['text']}\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (*KEPT, *TIMES)} | {"num_tokens": len(row["tokens"])}


def _sampler_columns(sampler: dict[str, Any]) -> dict[str, Any]:
    return {"sampler": sampler["name"], "gamma": sampler.get("gamma"), "lambda": sampler.get("lambda_")}


def label(sampler: dict[str, Any]) -> str:
    """The sampler's name and settings, for people."""
    settings = [f"{key.rstrip('_')} {sampler[key]:g}" for key in ("gamma", "lambda_") if key in sampler]
    return ", ".join([sampler["name"], *settings])


# Parts


def run_samplers(run: Run) -> None:
    jobs = []
    for steps in run.steps("samplers"):
        for name in SAMPLERS:
            sampler = run.sampler(name)
            num_seeds = run.args.seeds if SAMPLER_CONFIGS[name].needs_noise else 1
            jobs += [(run.models[0], sampler, steps, run.args.seed + i) for i in range(num_seeds)]
    run.decode("samplers", jobs)


def run_nfe(run: Run) -> None:
    # One sampler for all, the first model's, lest its settings be compared instead of the models.
    sampler = run.sampler(run.args.sampler)
    run.decode("nfe", [(m, sampler, steps, run.args.seed) for m in run.models for steps in run.steps("nfe")])


def run_front(run: Run) -> None:
    jobs = []
    for gamma in run.args.gammas:
        # All in one step: the order does not matter.
        lambdas = run.args.lambdas if gamma < float("inf") else [min(run.args.lambdas)]
        jobs += [(gamma, lambda_) for lambda_ in lambdas]
    [steps] = run.steps("front")
    samplers = [make_sampler("pbeb_conf", gamma=gamma, lambda_=lambda_).to_dict() for gamma, lambda_ in jobs]
    run.decode("front", [(run.models[0], sampler, steps, run.args.seed) for sampler in samplers])


def run_speed(run: Run) -> None:
    """Rounds in which every utterance goes through all systems, one after the other."""
    raw, model, args = run.raw("speed"), run.models[0], run.args
    [steps] = run.steps("speed")
    device, rate_hz = model.loaded[0].device, model.loaded[1].feature_extractor.sampling_rate
    chosen = choose_by_length(run.data, model.loaded[1], args.length_edges, args.per_bin, args.seed)
    systems = {label(one): OurSystem(model, one, steps, args.seed) for one in map(run.sampler, SAMPLERS)}
    fingerprint = model.fingerprint() | {"model": model.name, "bound of steps": steps}
    fingerprint |= {"choice of utterances": _sha256([data.rows[i] for data, i, _ in chosen])}
    fingerprint |= {"number of threads": torch.get_num_threads(), "machine": machine(device)}
    fingerprint |= {"systems": [args.donor and model_sha256(args.donor), *systems]}
    raw.check(fingerprint)
    if all(raw.has({"round": number}) for number in range(1, args.rounds + 1)):
        return
    if args.donor:
        systems = {f"{AR}, {Path(args.donor).name}": Donor(args.donor, device), **systems}
    else:
        print("no --donor: the autoregressive line is left out", file=sys.stderr)
    if run.load_before is not None and run.load_before > 0.5:
        print(f"warning: the machine is busy (load {run.load_before}), so the times will be wrong.", file=sys.stderr)
    bar = partial(track, console=Console(stderr=True), transient=True)
    clips = [load_audio(data.clip(i), target_sampling_rate=rate_hz) for data, i, _ in bar(chosen, "reading")]
    # Round 0 is the warm-up.
    for number in range(args.rounds + 1):
        if number and raw.has({"round": number}):
            continue
        rows = []
        for place, (clip, (_, _, row)) in enumerate(bar(list(zip(clips, chosen, strict=True)), f"round {number}")):
            # Who comes first changes, so that nobody always follows the same one.
            names = list(systems)
            first = (place + number) % len(names)
            for name in names[first:] + names[:first]:
                measured = systems[name](clip, row["language"])
                measured["wall_s"] = round(sum(measured[key] for key in TIMES), 6)
                common = {"system": name, "round": number, "steps": steps}
                rows.append({**row, "duration_s": round(len(clip) / rate_hz, 3), **common, **measured})
        if number:
            raw.add({"round": number}, fingerprint, rows, [])


def choose_by_length(
    data: dict[str, EvaluationData], processor: Any, edges: list[int], per_bin: int, seed: int
) -> list[tuple[EvaluationData, int, dict[str, Any]]]:
    """
    Up to `per_bin` utterances of all data sets together for each bin of reference tokens, end of text included.

    Args:
        edges: lower ends of the bins; the last one is open.

    Returns:
        Of each, its data set, its place in that, and what raw.jsonl says about it.

    Raises:
        ValueError: the data sets have none that is that long.
    """
    bins: list[list] = [[] for _ in edges]
    longest_s = min(getattr(processor.feature_extractor, "max_duration_s", None) or DONOR_WINDOW_S, DONOR_WINDOW_S)
    for one in data.values():
        for i, row in enumerate(one.rows):
            tokens = len(processor(text=row["text"], return_tensors="np")["labels"][0])
            place = bisect_right(edges, tokens) - 1
            if place < 0 or not row["text"].strip() or row["duration_s"] > longest_s:
                continue
            columns = {"id": row["id"], "dataset": one.name, "reference": row["text"], "language": row["language"]}
            high = edges[place + 1] if place + 1 < len(edges) else None
            columns |= {"reference_tokens": tokens, "bin_low": edges[place], "bin_high": high}
            bins[place].append((one, i, columns))
    draw = random.Random(seed)
    chosen = [one for found in bins for one in draw.sample(found, min(per_bin, len(found)))]
    if not chosen:
        raise ValueError(f"`--length-edges` {edges}: no utterance of `--data` has so many tokens. Set lower ones.")
    return chosen


class Stopwatch:
    """Seconds between calls, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, self._now()
        return round(self.last - before, 6)


class OurSystem:
    """MDM-ASR with one sampler, on one clip at a time."""

    def __init__(self, model: Model, sampler: dict[str, Any], steps: int, seed: int):
        (self.model, self.processor), self.sampler, self.seed = model.loaded, sampler, seed
        self.settings = model.settings(sampler, steps)
        self.settings.return_dict_in_generate = True
        self.takes_language = "language" in ((self.settings.prompt_template or {}).get("slots") or {})

    @torch.no_grad()
    def __call__(self, clip: Any, language: str | None) -> dict[str, Any]:
        device = self.model.device
        generator = torch.Generator().manual_seed(self.seed)
        watch = Stopwatch(device)
        rate_hz = self.processor.feature_extractor.sampling_rate
        inputs = self.processor(clip, sampling_rate=rate_hz, return_tensors="pt").to(device)
        mask = inputs.pop("attention_mask", None)
        (features,) = inputs.values()
        features_s = watch.lap()
        encoder_outputs = self.model.encode(features, mask)
        encoder_s = watch.lap()
        output = self.model.generate(
            input_features=features,
            attention_mask=mask,
            encoder_outputs=encoder_outputs,
            generation_config=self.settings,
            generator=[generator],
            **({"language": language} if self.takes_language else {}),
        )
        decoder_s = watch.lap()
        [hypothesis] = self.processor.batch_decode(output.sequences)
        measured = {"hypothesis": hypothesis, "nfe": int(output.nfe[0]), **_sampler_columns(self.sampler)}
        return measured | dict(zip(TIMES, (features_s, encoder_s, decoder_s), strict=True))


class Donor:
    """The autoregressive Whisper, greedy, on its stock 30-second features; NFE are its tokens and their end."""

    def __init__(self, folder: str, device: torch.device):
        from transformers import AutoProcessor, WhisperForConditionalGeneration

        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"`--donor` {folder!r} cannot be loaded: {error}") from error
        self.model = model.to(device).eval()
        self.is_multilingual = getattr(model.generation_config, "is_multilingual", False)

    @torch.no_grad()
    def __call__(self, clip: Any, language: str | None) -> dict[str, Any]:
        options = {"language": language or "en", "task": "transcribe"} if self.is_multilingual else {}
        watch = Stopwatch(self.model.device)
        extractor = self.processor.feature_extractor
        features = extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
        features = features.to(self.model.device)
        features_s = watch.lap()
        encoder_outputs = self.model.get_encoder()(features)
        encoder_s = watch.lap()
        ids = self.model.generate(encoder_outputs=encoder_outputs, do_sample=False, num_beams=1, **options)
        decoder_s = watch.lap()
        [hypothesis] = self.processor.batch_decode(ids, skip_special_tokens=True)
        measured = {
            "hypothesis": hypothesis.strip(),
            "nfe": ids.shape[1] + 1,
            "sampler": AR,
            "gamma": None,
            "lambda": None,
        }
        return measured | dict(zip(TIMES, (features_s, encoder_s, decoder_s), strict=True))


RUNNERS = {"samplers": run_samplers, "nfe": run_nfe, "speed": run_speed, "front": run_front}


# Command line


def read_data(paths: list[str], limit: int | None, seed: int, language: str | None) -> dict[str, EvaluationData]:
    """Name -> data set, each cut to `limit` utterances drawn with `seed`, in their order."""
    found: dict[str, EvaluationData] = {}
    for path in paths:
        data = load_data(path, language=language)
        if data.name in (*found, POOLED):
            raise ValueError(f"`--data` has two sets called {data.name!r}, or one as the pooled line is. Rename it.")
        if not any(row["text"].strip() for row in data.rows):
            raise ValueError(f"`--data` {path!r} has no transcripts. Check its text column.")
        if limit is not None and limit < len(data):
            data = data.select(sorted(random.Random(f"{seed} {data.name}").sample(range(len(data)), limit)))
        found[data.name] = data
    return found


def read_models(args: argparse.Namespace) -> list[Model]:
    if not args.models:
        return [Model(Path(args.model).name, args.model, args.device)]
    pairs = [one.partition("=") for one in args.models]
    names = [name for name, _, _ in pairs]
    if not all(name and path for name, _, path in pairs) or len(set(names)) < len(names):
        raise ValueError(f"`--models` must be NAME=FOLDER, each name once, got {args.models}.")
    return [Model(name, path, args.device) for name, _, path in pairs]


def redraw(folder: Path, parts: list[str]) -> dict[str, dict[str, Any]]:
    """Part -> summary of those of the parts that the folder has a raw.jsonl of."""
    found = [part for part in parts if (folder / part / RAW_NAME).is_file()]
    if not found:
        raise ValueError(f"{str(folder)!r} holds no <part>/{RAW_NAME}. Run without --redraw first.")
    return {part: write_part(folder / part, part) for part in found}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="?", choices=(*PARTS, "all"), default="all")
    add("--data", nargs="+", help="folders, manifests or names")
    add("--output", type=Path, help="folder to write")
    add("--redraw", type=Path, metavar="OUT", help="only make tables and figures of OUT/<part>/raw.jsonl again")
    add("--model", help="folder or id of a checkpoint with a canvas")
    add("--models", nargs="+", metavar="NAME=FOLDER", help="nfe: several; the other parts take the first")
    add("--limit", type=int, help="utterances of each data set, drawn with --seed; default: all")
    add("--language", help="of the speech, where no column of the data tells; default: en")
    add("--steps", type=int, nargs="+", help="bounds of NFE; samplers: 32, nfe: 2 4 8 16 32, speed: 32, front: 128")
    add("--gamma", type=float, help="samplers, nfe, speed: instead of the checkpoint's")
    add("--lambda", type=float, dest="lambda_", help="the same")
    add("--sampler", choices=SAMPLERS, help="nfe: instead of the checkpoint's")
    add("--seeds", type=int, default=3, help="samplers: of random and dfm, which are averaged")
    add("--gammas", type=float, nargs="+", default=[0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, float("inf")], help="front")
    add("--lambdas", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.5, 1.0], help="front")
    add("--donor", help="speed: folder of the autoregressive Whisper")
    add("--per-bin", type=int, default=6, help="speed: utterances of each bin of lengths")
    add("--length-edges", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="speed: lower ends, in tokens")
    add("--rounds", type=int, default=3, help="speed")
    add("--batch-size", type=int, default=16, help="of the parts but speed, which takes one at a time")
    add("--threads", type=int, default=2, help="of torch")
    add("--device", help="default: cuda if there is one")
    add("--seed", type=int, default=0)
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, parts: list[str]) -> None:
    if not (args.data and args.output and (args.model or args.models)):
        parser.error("--data, --output and --model or --models are needed, or --redraw")
    if args.model and args.models:
        parser.error("--model and --models exclude each other")
    if args.steps and (args.part == "all" or (args.part not in SEVERAL_STEPS and len(args.steps) > 1)):
        parser.error(
            f"--steps is one number for speed and front, and not for all, whose parts differ: {DEFAULT_STEPS}"
        )
    for name in ("limit", "seeds", "per_bin", "rounds", "batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.length_edges != sorted(set(args.length_edges)):
        parser.error("--length-edges must rise")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Part -> what its summary.json holds."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    args = parser.parse_args(arguments)
    parts = list(PARTS) if args.part == "all" else [args.part]
    threads_before = torch.get_num_threads()
    try:
        if args.redraw:
            summaries = redraw(args.redraw, parts)
        else:
            check(parser, args, parts)
            torch.set_num_threads(args.threads)
            summaries = {}
            with quiet_libraries() as collector:
                load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
                data = read_data(args.data, args.limit, args.seed, args.language)
                models = read_models(args)
                command = shlex.join(["python", "training/run_ablations.py", *arguments])
                for part in parts:
                    RUNNERS[part](Run(args, command, models if part == "nfe" else models[:1], data, load))
                    summaries[part] = write_part(args.output / part, part)
            # Full canvases are of the hypotheses, and counted there.
            for message in dict.fromkeys(one for one in collector.messages if "without an end of text" not in one):
                print(f"warning: {message}", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        torch.set_num_threads(threads_before)
    for part, summary in summaries.items():
        print(f"{part}:", *summary["sentences"], sep="\n  ")
    return summaries


if __name__ == "__main__":
    main()
