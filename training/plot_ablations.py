# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What run_ablations.py writes from a raw.jsonl: table.csv, table.md, figure.png and summary.json. No model runs."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from ablation_tables import (
    AR,
    BOOTSTRAP_SEED,
    NUM_BOOTSTRAP,
    SAMPLERS,
    Row,
    add_errors,
    tabulate_front,
    tabulate_nfe,
    tabulate_samplers,
    tabulate_speed,
)

from mdm_asr_hf.evaluate.scoring import describe_normaliser

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RAW_NAME, SUMMARY_NAME = "raw.jsonl", "summary.json"


# Figures


def draw_samplers(table: list[Row]) -> Any:
    all_steps = list(dict.fromkeys(row["steps"] for row in table))
    figure, panels = plt.subplots(1, len(all_steps), figsize=(1 + 6 * len(all_steps), 4.2), squeeze=False, sharey=True)
    for steps, axes in zip(all_steps, panels[0], strict=True):
        rows = [row for row in table if row["steps"] == steps]
        datasets = list(dict.fromkeys(row["dataset"] for row in rows))
        for i, sampler in enumerate(SAMPLERS):
            points = [row for row in rows if row["sampler"] == sampler]
            x = [datasets.index(row["dataset"]) + (i - 2) * 0.13 for row in points]
            _points(axes, x, points, "wer", label=sampler, fmt="o", color=f"C{i}")
        axes.set_xticks(range(len(datasets)), datasets)
        axes.set(title=f"at most {steps} decoder evaluations")
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set(ylabel="WER, %", ylim=(0, None))
    panels[0][-1].legend(fontsize=8)
    return figure


def draw_nfe(table: list[Row]) -> Any:
    datasets = list(dict.fromkeys(row["dataset"] for row in table))
    columns = min(3, len(datasets))
    lines = -(-len(datasets) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(1 + 3.8 * columns, 0.6 + 3.4 * lines), squeeze=False, sharex=True
    )
    models = list(dict.fromkeys(row["model"] for row in table))
    for dataset, axes in zip(datasets, panels.flat, strict=False):
        for i, model in enumerate(models):
            rows = [row for row in table if (row["dataset"], row["model"]) == (dataset, model)]
            _band(axes, rows, "steps", "wer", f"C{i}", model)
        _powers_of_two(axes, {row["steps"] for row in table})
        axes.set(title=dataset, xlabel="decoder evaluations at most (NFE)", ylabel="WER, %", ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in list(panels.flat)[len(datasets) :]:
        axes.set_visible(False)
    panels[0][0].legend(fontsize=8)
    return figure


def draw_speed(table: list[Row]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharex=True)
    systems = list(dict.fromkeys(row["system"] for row in table))
    for axes, (name, title) in zip(
        panels, (("rtfx", "features, encoder and decoder"), ("rtfx_decoder", "decoder alone")), strict=True
    ):
        for system in systems:
            kind = system.partition(",")[0]
            colour = "black" if kind == AR else f"C{SAMPLERS.index(kind)}"
            rows = [row for row in table if row["system"] == system]
            _band(axes, rows, "median_tokens", name, colour, system, linestyle="--" if kind == AR else "-")
        axes.set(xlabel="tokens of the transcript, median of each bin", title=title, xscale="log", yscale="log")
        axes.set_xticks(ticks := sorted({row["median_tokens"] for row in table}), [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("RTFx, s of audio per s, batch size 1")
    panels[0].legend(fontsize=8)
    return figure


def draw_front(table: list[Row]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, lambda_ in enumerate(sorted({row["lambda"] for row in table})):
        rows = [row for row in table if row["lambda"] == lambda_]
        points = [(row["nfe"], row["wer"]) for row in rows]
        axes.plot(
            *zip(*points, strict=True), "o-", color=f"C{i}", linewidth=0.8, markersize=4, label=f"λ = {lambda_:g}"
        )
    front = sorted((row for row in table if row["is_on_front"]), key=lambda row: row["nfe"])
    _points(axes, [row["nfe"] for row in front], front, "wer", fmt="none", color="grey", label=None)
    axes.plot(
        [row["nfe"] for row in front],
        [row["wer"] for row in front],
        "s",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor="black",
        label="front, with 95 % intervals",
    )
    for row in front:
        axes.annotate(
            f"γ {row['gamma']}", (row["nfe"], row["wer"]), xytext=(6, 6), textcoords="offset points", fontsize=7
        )
    axes.set(xlabel="decoder evaluations per utterance, mean (NFE)", ylabel="WER, %", xscale="log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _points(axes: Any, x: list[float], rows: list[Row], name: str, **style: Any) -> None:
    y = [row[name] for row in rows]
    # Of a ratio, the value may lie outside of its own percentiles by rounding.
    errors = [
        [max(row[name] - row[f"{name}_low"], 0) for row in rows],
        [max(row[f"{name}_high"] - row[name], 0) for row in rows],
    ]
    axes.errorbar(x, y, yerr=errors, capsize=2, markersize=4, linewidth=1, **style)


def _band(axes: Any, rows: list[Row], x: str, y: str, colour: str, label: str, **style: Any) -> None:
    places = [row[x] for row in rows]
    axes.plot(places, [row[y] for row in rows], marker="o", markersize=4, color=colour, label=label, **style)
    low, high = ([row[f"{y}_{end}"] for row in rows] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)


def _powers_of_two(axes: Any, steps: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(steps), [str(n) for n in sorted(steps)])
    axes.minorticks_off()


# Files


@dataclass(frozen=True)
class Part:
    """
    Args:
        title, tabulate, draw: of the ablation.
        columns: heading -> column of table.csv, for Markdown; where there is an interval it is shown, too.
        note (`str`): what one must know to read the table.
    """

    title: str
    tabulate: Callable[[list[Row]], tuple[list[Row], list[str]]]
    draw: Callable[[list[Row]], Any]
    columns: dict[str, str]
    note: str


_COMMON = {"NFE": "nfe", "at the bound, %": "at_limit", "utterances": "num_utterances", "words": "num_words"}
_NFE_NOTE = (
    "NFE: decoder evaluations per utterance, mean. At the bound: utterances that took the last allowed step, which "
    "commits whatever is left."
)
PARTS = {
    "samplers": Part(
        "Samplers at the same bound of steps",
        tabulate_samplers,
        draw_samplers,
        {"steps": "steps", "data": "dataset", "sampler": "sampler", "WER %": "wer"}
        | {"less pbeb_conf's, paired": "minus_pbeb_conf", "seeds": "num_seeds"}
        | _COMMON,
        f"{_NFE_NOTE} Samplers that draw are averages over their seeds, and their intervals are of the utterances.",
    ),
    "nfe": Part(
        "WER by the bound of steps",
        tabulate_nfe,
        draw_nfe,
        {"data": "dataset", "model": "model", "parameters": "parameters", "sampler": "sampler", "steps": "steps"}
        | {"WER %": "wer"}
        | _COMMON,
        _NFE_NOTE,
    ),
    "speed": Part(
        "RTFx by the length of the transcript",
        tabulate_speed,
        draw_speed,
        {"system": "system", "tokens from": "tokens_from", "below": "tokens_below", "utterances": "num_utterances"}
        | {"audio, s, mean": "mean_audio_s", "RTFx": "rtfx", "RTFx of the decoder": "rtfx_decoder"}
        | {"NFE": "nfe", "WER %": "wer"},
        "RTFx: seconds of audio per second of features, encoder and decoder, batch size 1, the median of the rounds "
        "for each utterance. NFE of the donor: its tokens. Tokens: of the reference, end of text included. Intervals "
        "are of the utterances, few in a bin; table.csv has the slowest and fastest round, too.",
    ),
    "front": Part(
        "Gamma and lambda of pbeb_conf",
        tabulate_front,
        draw_front,
        {"gamma": "gamma", "lambda": "lambda", "on the front": "is_on_front", "WER %": "wer"} | _COMMON,
        f"{_NFE_NOTE} Lambda 0 is eb_conf; gamma inf commits all in one step, whatever lambda. On the front: no other "
        "setting has both fewer NFE and a lower WER.",
    ),
}


def read_raw(folder: str | Path) -> list[Row]:
    """
    The lines of a part's raw.jsonl; those of an interrupted setting, behind the last "run" or "unit", are left out.

    Raises:
        ValueError: there is none, or a line amid it is not JSON.
    """
    path = Path(folder) / RAW_NAME
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Run training/run_ablations.py first.")
    lines = path.read_text(encoding="utf-8").split("\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number == len(lines):  # The end of a write that was cut off.
                break
            raise ValueError(
                f"{path} line {number} is not JSON ({error}). Delete the folder and run again."
            ) from error
    while entries and entries[-1]["kind"] == "utterance":
        entries.pop()
    return entries


def write_part(folder: str | Path, part: str) -> Row:
    """Writes table.csv, table.md, figure.png and summary.json of a part from its raw.jsonl; returns the summary."""
    folder = Path(folder)
    entries = read_raw(folder)
    runs = [{k: v for k, v in entry.items() if k != "kind"} for entry in entries if entry["kind"] == "run"]
    skipped = [one for entry in entries if entry["kind"] == "unit" for one in entry["skipped"]]
    rows = [entry for entry in entries if entry["kind"] == "utterance"]
    if not rows:
        raise ValueError(f"{str(folder / RAW_NAME)!r} holds no finished setting. Run the part again.")
    its = PARTS[part]
    table, sentences = its.tabulate(add_errors(rows))
    names = list(dict.fromkeys(name for row in table for name in row))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table)
    (folder / "table.md").write_text(_markdown(its, table, sentences, runs), encoding="utf-8")
    figure = its.draw(table)
    figure.set_layout_engine("constrained")
    figure.savefig(folder / "figure.png", dpi=150)
    plt.close(figure)
    languages = sorted({row["language"] or "en" for row in rows})
    summary = {
        "part": part,
        "sentences": sentences,
        "table": table,
        "num_bootstrap": NUM_BOOTSTRAP,
        "bootstrap_seed": BOOTSTRAP_SEED,
        "normaliser": "; ".join(dict.fromkeys(map(describe_normaliser, languages))),
        "skipped": [json.loads(one) for one in dict.fromkeys(json.dumps(one) for one in skipped)],
        "runs": runs,
    }
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _markdown(part: Part, table: list[Row], sentences: list[str], runs: list[Row]) -> str:
    columns = {head: name for head, name in part.columns.items() if any(row.get(name) is not None for row in table)}
    lines = [f"# {part.title}", ""]
    # What holds for every data set is said once.
    lines += [f"- {sentence}" for sentence in dict.fromkeys(sentences)]
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row, name) for name in columns.values())} |" for row in table]
    lines += ["", f"In brackets: 95 % intervals, bootstrap over utterances. {part.note}", "", "![](figure.png)", ""]
    for run in runs:
        machine = run["machine"]
        where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        lines += [
            f"`{run['command']}`",
            "",
            f"{where}, {run['num_threads']} threads, load before: {run['load_before']}",
            "",
        ]
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if row.get(f"{name}_low") is not None:
        return f"{value:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


__all__ = ["PARTS", "RAW_NAME", "SUMMARY_NAME", "read_raw", "write_part"]
