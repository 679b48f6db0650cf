#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Writes a model card from a file of facts and the metrics.json files of evaluations. No number in a card is typed.

    python model_cards/make_card.py model_cards/NAME.yaml [--results DIR ...] [--output CARD.md ...] [--check]

NAME.yaml holds what no evaluation knows: description, training data and licences, limits. Each DIR is a folder as
`mdm-asr evaluate` writes it; by default all of results/NAME beside the facts. The card goes to NAME.md beside the
facts and, where the facts name a checkpoint's folder, to its README.md. `--check` writes nothing, shows what would
change, and exits with 1 if anything would.
"""

import argparse
import difflib
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

HERE = Path(__file__).parent
TASK = "automatic-speech-recognition"

NEEDED_FACTS = ("name", "metadata", "load_from", "summary", "intended_use", "weights", "training", "limits")
OTHER_FACTS = ("checkpoint", "datasets", "results_notes")
NEEDED_TRAINING = ("method", "data")
OTHER_TRAINING = ("command", "hours", "hardware", "kwh")


@dataclass
class Result:
    """One evaluation: a folder with hypotheses.jsonl and metrics.json."""

    folder: str
    title: str
    dataset: dict[str, Any]
    metrics: dict[str, Any]
    intervals: dict[str, list[float]]
    settings: dict[str, Any]
    normaliser: str
    command: str
    model_sha256: str | None
    num_skipped: int = 0

    def number(self, name: str, digits: int = 2) -> str:
        """A metric as the tables show it, with its 95 % interval if there is one; empty if it was not measured."""
        if self.metrics.get(name) is None:
            return ""
        text = f"{self.metrics[name]:.{digits}f}"
        if interval := self.intervals.get(name):
            text += f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
        return text


def check_keys(given: dict[str, Any], needed: tuple[str, ...], other: tuple[str, ...], where: str) -> None:
    missing = [key for key in needed if given.get(key) is None]
    unknown = sorted(set(given) - set(needed) - set(other))
    if missing or unknown:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}. The facts are {[*needed, *other]}.")


def read_facts(path: Path) -> dict[str, Any]:
    """
    Reads a file of facts.

    Raises:
        ValueError: facts that are missing or unknown, by name.
    """
    facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is not a YAML mapping. Take one of the other .yaml files beside it as a model.")
    check_keys(facts, NEEDED_FACTS, OTHER_FACTS, str(path))
    check_keys(facts["training"], NEEDED_TRAINING, OTHER_TRAINING, f"{path}, training")
    return facts


def decoding_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What changes a text or its evaluations, under the names of the tables; not the batch size."""
    if settings.get("decoding") == "drafts":
        # An evaluation is given no hypotheses.
        shown = {"drafts": "by masks" if "masks" in settings["draft_branches"] else "none"}
        return shown | {"gamma": settings["gamma"]} | ({"dtype": settings["dtype"]} if settings.get("dtype") else {})
    sampler = dict(settings["sampler"])
    shown = {"sampler": sampler.pop("name")}
    shown |= {name.rstrip("_"): value for name, value in sampler.items() if value is not None}
    shown["steps"] = settings["max_denoising_steps"]
    length = settings.get("canvas", {}).get("canvas_length")
    shown["canvas"] = "adaptive" if length is None else f"{length} tokens"
    if settings.get("temperature"):
        shown["temperature"] = settings["temperature"]
    if settings.get("dtype"):
        shown["dtype"] = settings["dtype"]
    return shown


def read_result(folder: Path, facts: dict[str, Any]) -> Result:
    """
    Reads an evaluation's metrics.json.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"`--results` {str(folder)!r} has no metrics.json. Write one with `mdm-asr evaluate`.")
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        names = [entry["name"] for entry in data["data"]]
        known = facts.get("datasets") or {}
        dataset = known.get(names[0], {}) if len(names) == 1 else {}
        return Result(
            folder=folder.name,
            title=dataset.get("title") or " and ".join(known.get(name, {}).get("title", name) for name in names),
            dataset={"name": names[0] if len(names) == 1 else "+".join(names), **dataset},
            metrics=data["metrics"],
            intervals=data.get("intervals", {}),
            settings=decoding_settings(data["settings"]),
            normaliser=data["normaliser"],
            command=data["command"],
            model_sha256=data.get("model_sha256"),
            num_skipped=sum(entry.get("num_skipped", 0) for entry in data["data"]),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error}. Evaluate again with `mdm-asr evaluate`.") from error


def sort_results(results: list[Result], facts: dict[str, Any]) -> list[Result]:
    """In the facts' order of data sets; of one data set, the default settings first."""
    order = list(facts.get("datasets") or {})

    def key(result: Result) -> tuple:
        name = result.dataset["name"]
        numbers = [result.settings.get(setting, math.inf) for setting in ("steps", "gamma", "lambda")]
        return (order.index(name) if name in order else len(order), name, *numbers, result.folder)

    return sorted(results, key=key)


def duration_table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Heads of the buckets of duration, and each result's WER in them; both empty if no evaluation has them."""
    buckets = sorted(
        {
            (bucket["from_s"], math.inf if bucket["to_s"] is None else bucket["to_s"])
            for result in results
            for bucket in result.metrics.get("by_duration", ())
        }
    )
    heads = [f"above {low:g} s" if high == math.inf else f"{low:g} to {high:g} s" for low, high in buckets]
    rows = []
    for result in results if buckets else ():
        wer = {bucket["from_s"]: bucket["wer"] for bucket in result.metrics.get("by_duration", ())}
        rows.append(["" if wer.get(low) is None else f"{wer[low]:.1f}" for low, _ in buckets])
    return heads, rows


def split_settings(results: list[Result]) -> tuple[dict[str, Any], list[str]]:
    """The settings that all results share, and the names of those in which they differ."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    values = {name: [result.settings.get(name) for result in results] for name in names}
    shared = {name: column[0] for name, column in values.items() if all(value == column[0] for value in column)}
    return shared, [name for name in names if name not in shared]


def render_results(name: str, results: list[Result]) -> str:
    """The tables of results, in Markdown."""
    shared, varying = split_settings(results)
    heads, by_duration = duration_table(results)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((HERE / "results_template.md").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        results=results,
        shared=shared,
        varying=varying,
        normalisers=list(dict.fromkeys(result.normaliser for result in results)),
        duration_heads=heads,
        by_duration=by_duration,
    ).strip()


def eval_results(results: list[Result]) -> list[EvalResult]:
    """The results as metadata, which the Hub shows beside the card."""
    _, varying = split_settings(results)
    rows = []
    for result in results:
        settings = ", ".join(f"{name} {result.settings[name]}" for name in varying if name in result.settings)
        for metric in ("wer", "cer"):
            rows.append(
                EvalResult(
                    task_type=TASK,
                    task_name="Automatic Speech Recognition",
                    dataset_type=result.dataset.get("type", result.dataset["name"]),
                    dataset_name=result.title,
                    dataset_config=result.dataset.get("config"),
                    dataset_split=result.dataset.get("split"),
                    metric_type=metric,
                    metric_value=result.metrics[metric],
                    metric_name=f"{metric.upper()} ({settings})" if settings else metric.upper(),
                )
            )
    return rows


def describe_weights(checkpoint: Path) -> dict[str, Any]:
    """Number of parameters, size, storage types and checksum (of the files one after the other) of the weights."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise ValueError(f"`checkpoint` {str(checkpoint)!r} of the facts has no .safetensors file. Correct the path.")
    num_parameters, dtypes, digest = 0, set(), hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_slice(name)
                num_parameters += math.prod(tensor.get_shape())
                dtypes.add({"F16": "fp16", "BF16": "bf16", "F32": "fp32"}.get(tensor.get_dtype(), tensor.get_dtype()))
    return {
        "num_parameters": num_parameters,
        "num_bytes": sum(file.stat().st_size for file in files),
        "dtypes": " and ".join(sorted(dtypes)),
        "sha256": digest.hexdigest(),
    }


def check_weights(results: list[Result], weights: dict[str, Any] | None) -> None:
    """Raises ValueError if results are of other weights than the card is about, or than each other."""
    found = {result.model_sha256 for result in results} - {None}
    if weights:
        found.add(weights["sha256"])
    if len(found) > 1:
        groups = {sha256: [r.folder for r in results if r.model_sha256 == sha256] for sha256 in sorted(found)}
        named = "; ".join(f"{key[:12]}: {', '.join(value) or 'the checkpoint'}" for key, value in groups.items())
        raise ValueError(f"The results are of different weights ({named}). Evaluate the checkpoint again.")


def make_card(facts: dict[str, Any], results: list[Result], checkpoint: Path | None = None) -> str:
    """
    The text of a card.

    Args:
        facts: as `read_facts` gives them.
        results: at least one, as `read_result` gives them.
        checkpoint (*optional*): folder of the weights that the card is about.

    Raises:
        ValueError: the results are of other weights.
    """
    weights = describe_weights(checkpoint) if checkpoint else None
    check_weights(results, weights)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        metrics=["wer", "cer"],
        model_name=facts["name"],
        eval_results=eval_results(results),
        **facts["metadata"],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(HERE / "template.md"),
        facts={key: value.strip() if isinstance(value, str) else value for key, value in facts.items()},
        training={key: value.strip() if isinstance(value, str) else value for key, value in facts["training"].items()},
        weights=weights,
        results=render_results(facts["name"], results),
    )
    return str(card).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path, metavar="FACTS.yaml")
    parser.add_argument("--results", type=Path, nargs="+", metavar="DIR", help="folders with a metrics.json")
    parser.add_argument("--output", type=Path, nargs="+", metavar="CARD.md", help="the card, and copies of it")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    args = parser.parse_args(arguments)
    try:
        facts = read_facts(args.facts)
        evaluations = args.facts.parent / "results" / facts["name"]
        folders = args.results or [path.parent for path in evaluations.glob("*/metrics.json")]
        if not folders:
            raise ValueError(f"There is no evaluation in {evaluations}. Pass `--results DIR ...`.")
        checkpoint = args.facts.parent / facts["checkpoint"] if "checkpoint" in facts else None
        results = sort_results([read_result(folder, facts) for folder in folders], facts)
        card = make_card(facts, results, checkpoint)
        cards = args.output or []
        if not args.output:
            cards = [args.facts.with_suffix(".md"), *([checkpoint / "README.md"] if checkpoint else [])]
        outputs = dict.fromkeys(cards, card)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    changed = False
    for path, text in outputs.items():
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before == text:
            continue
        changed = True
        if args.check:
            diff = difflib.unified_diff(before.splitlines(), text.splitlines(), str(path), "generated", lineterm="")
            print("\n".join(diff))
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
