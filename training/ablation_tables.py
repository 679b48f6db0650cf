# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
From the rows that run_ablations.py measured to tables and figures. No model runs.

Intervals are the middle 95 % of 1,000 resamples of the utterances, drawn alike for every setting, so that the
intervals of differences are paired.
"""

import json
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdm_asr_hf.data.manifests import parse_line
from mdm_asr_hf.evaluate.scoring import bootstrap_draws, count_errors, normaliser

NUM_BOOTSTRAP, BOOTSTRAP_SEED = 1000, 0
POOLED = "all"
Row = dict[str, Any]
Key = Hashable


class Sample:
    """
    Numbers of several settings on the same utterances, and resamples of those.

    Args:
        groups: setting -> rows of raw.jsonl. Several rows of an utterance (seeds, rounds) are averaged, and utterances
            that one of the settings lacks are left out for all.
    """

    def __init__(self, groups: dict[Key, list[Row]]):
        by_setting = {key: group(rows, "dataset", "id") for key, rows in groups.items()}
        self.utterances = sorted(set.intersection(*(set(one) for one in by_setting.values())))
        self.rows = {key: [one[u] for u in self.utterances] for key, one in by_setting.items()}
        drawn = bootstrap_draws(len(self.utterances), NUM_BOOTSTRAP, BOOTSTRAP_SEED) if self.utterances else ()
        # The first line is the data as it is.
        self.weights = np.concatenate([np.ones((1, len(self.utterances))), *drawn])

    def column(self, key: Key, name: str) -> np.ndarray:
        """(B,): of every utterance of a setting."""
        return np.array([np.mean([row[name] for row in rows]) for rows in self.rows[key]], dtype=np.float64)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        """(R + 1,): of sums over utterances."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weights @ numerator) / (self.weights @ denominator)

    def wer(self, key: Key, mask: np.ndarray | float = 1.0) -> np.ndarray:
        """(R + 1,): in per cent, of all utterances or of those with 1 in `mask` (B,)."""
        return 100 * self.ratio(mask * self.column(key, "num_errors"), mask * self.column(key, "num_words"))

    def describe(self, key: Key, less: Key | None = None) -> Row:
        """The columns that all tables have; `less` is a setting to subtract."""
        wer, nfe = self.wer(key), self.column(key, "nfe")
        row = interval("wer", wer)
        if less is not None and less != key:
            row |= interval("difference", wer - self.wer(less))
        row |= interval("nfe", self.ratio(nfe, np.ones_like(nfe)))
        # Those that needed the last allowed step, which commits whatever is left.
        row["at_limit"] = round(float(100 * (nfe >= self.column(key, "steps")).mean()), 1)
        num_words = int(self.column(key, "num_words").sum())
        return row | {"num_utterances": len(self.utterances), "num_words": num_words}


def interval(name: str, samples: np.ndarray) -> Row:
    """Columns of `samples` (R + 1,): first the value of the data itself, then those of R resamples."""
    finite = samples[1:][np.isfinite(samples[1:])]
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (math.nan, math.nan)
    values = {name: samples[0], f"{name}_low": low, f"{name}_high": high}
    # Plus 0: no "-0.0" of a rounding error.
    return {key: round(float(value), 2) + 0 if math.isfinite(value) else None for key, value in values.items()}


def group(rows: Iterable[Row], *names: str) -> dict[Key, list[Row]]:
    """Rows by the values of these columns, in the order they come in; one name alone gives plain values."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return groups


def by_dataset(rows: list[Row]) -> dict[Key, list[Row]]:
    """Each data set's rows, and all of them."""
    groups = group(rows, "dataset")
    return groups | {POOLED: rows} if len(groups) > 1 else groups


def add_errors(rows: list[Row]) -> list[Row]:
    """Copies with `num_errors` and `num_words` of normalised words, and numbers for what JSON cannot hold."""
    sides = [[normaliser(row["language"])(row[key]) for row in rows] for key in ("reference", "hypothesis")]
    return [
        row
        | {"num_errors": int(errors[:3].sum()), "num_words": int(errors[3])}
        | {key: None if row[key] is None else float(row[key]) for key in ("gamma", "lambda")}
        for row, errors in zip(rows, count_errors(*sides), strict=True)
    ]


def pareto_front(points: list[tuple[float, float]]) -> set[int]:
    """Places of the points that no other is at most equal to in both coordinates and below in one."""
    return {
        i for i, one in enumerate(points) if not any(x <= one[0] and y <= one[1] and (x, y) != one for x, y in points)
    }


def tabulate_settings(rows: list[Row], names: tuple[str, ...], name: str, baseline: str) -> list[Row]:
    """
    WER of every setting, which are the values of the columns `names`, on each data set, and its difference to that of
    the setting whose column `name` is `baseline`.
    """
    table = []
    for dataset, of_dataset in by_dataset(rows).items():
        sample = Sample(group(of_dataset, *names))
        for key in sample.rows:
            setting = dict(zip(names, key, strict=True))
            less = tuple((setting | {name: baseline}).values())
            table.append({"dataset": dataset} | setting | sample.describe(key, less if less in sample.rows else None))
    return table


def tabulate_front(rows: list[Row]) -> list[Row]:
    """WER and mean NFE of every gamma and lambda, all data sets pooled, and which of them are on the front."""
    sample = Sample(group(rows, "gamma", "lambda"))
    table = [
        {"gamma": "inf" if math.isinf(gamma) else gamma, "lambda": lambda_, **sample.describe((gamma, lambda_))}
        for gamma, lambda_ in sorted(sample.rows)
    ]
    front = pareto_front([(row["nfe"], row["wer"]) for row in table])
    return [row | {"is_on_front": "yes" if i in front else None} for i, row in enumerate(table)]


@dataclass(frozen=True)
class Part:
    """
    An ablation.

    Args:
        title, tabulate: of the ablation.
        axes: columns of its figure: x, y, what makes a line, and what makes a panel.
        columns: column -> heading; where there is an interval it is shown, too.
        note (`str`): what one must know to read the table.
    """

    title: str
    tabulate: Callable[[list[Row]], list[Row]]
    axes: tuple[str, str, str, str | None]
    columns: dict[str, str]
    note: str


_WER = {"wer": "WER %", "nfe": "NFE", "at_limit": "at the bound, %"}
_COUNTS = {"num_utterances": "utterances", "num_words": "words"}
_NFE_NOTE = (
    "NFE: decoder evaluations per utterance, mean. At the bound: utterances that took the last allowed step, which "
    "commits whatever is left."
)
PARTS = {
    "samplers": Part(
        "Samplers at the same bound of steps",
        lambda rows: tabulate_settings(rows, ("steps", "sampler"), "sampler", "pbeb_conf"),
        ("dataset", "wer", "sampler", "steps"),
        {"steps": "steps", "dataset": "data", "sampler": "sampler", "difference": "less pbeb_conf's, paired"}
        | (_WER | _COUNTS),
        f"{_NFE_NOTE} Samplers that draw are averages over their seeds, and their intervals are of the utterances.",
    ),
    "nfe": Part(
        "WER by the bound of steps",
        lambda rows: tabulate_settings(rows, ("model", "steps"), "model", rows[0]["model"]),
        ("steps", "wer", "model", "dataset"),
        {"dataset": "data", "model": "model", "steps": "steps", "difference": "less the first model's, paired"}
        | (_WER | _COUNTS),
        _NFE_NOTE,
    ),
    "front": Part(
        "Gamma and lambda of pbeb_conf",
        tabulate_front,
        ("nfe", "wer", "lambda", None),
        {"gamma": "gamma", "lambda": "lambda", "is_on_front": "on the front"} | (_WER | _COUNTS),
        f"{_NFE_NOTE} Lambda 0 is eb_conf; gamma inf commits all in one step, whatever lambda. On the front: no other "
        "setting has both fewer NFE and a lower WER.",
    ),
}


def draw(part: Part, table: list[Row], path: Path) -> None:
    """A panel for each data set or bound, a line for each setting, with the intervals."""
    from matplotlib.figure import Figure

    x, y, line, panel = part.axes
    titles = list(dict.fromkeys(row[panel] for row in table)) if panel else [None]
    lines = list(dict.fromkeys(row[line] for row in table))
    figure = Figure(figsize=(1 + 4.5 * len(titles), 4.5), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        for i, name in enumerate(lines):
            rows = [row for row in table if row[line] == name and (panel is None or row[panel] == title)]
            low, high = ([abs(row[f"{y}_{end}"] - row[y]) for row in rows] for end in ("low", "high"))
            places, values = ([row[key] for row in rows] for key in (x, y))
            style = {"color": f"C{i % 10}", "marker": "o", "linestyle": "none" if x == "dataset" else "-"}
            axes.errorbar(places, values, yerr=[low, high], label=f"{line} {name}", capsize=2, **style)
        axes.set(title="" if title is None else f"{panel} {title}", xlabel=x, ylabel=y)
        if x != "dataset":
            axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def read_raw(folder: Path) -> tuple[list[Row], list[Row]]:
    """
    The run and the utterances of a part's raw.jsonl.

    Raises:
        ValueError: there is none, it has no utterances, or a line of it is not JSON.
    """
    path, entries = folder / "raw.jsonl", []
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Run training/run_ablations.py first.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        entries.append(parse_line(line, f"{path} line {number}"))
    runs, rows = ([one for one in entries if one["kind"] == kind] for kind in ("run", "utterance"))
    if not rows:
        raise ValueError(f"{str(path)!r} holds no utterances. Run the part again.")
    return runs, rows


def write_part(folder: Path, name: str) -> Row:
    """Writes table.md, figure.png and results.json of a part from its raw.jsonl; returns what the latter holds."""
    runs, rows = read_raw(folder)
    part = PARTS[name]
    table = part.tabulate(add_errors(rows))
    columns = {key: head for key, head in part.columns.items() if any(row.get(key) is not None for row in table)}
    lines = [f"# {part.title}", "", f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row, key) for key in columns)} |" for row in table]
    lines += ["", f"In brackets: 95 % intervals, bootstrap over utterances. {part.note}", "", "![](figure.png)", ""]
    for run in runs:
        cpu, threads = run["machine"]["cpu"], run["num_threads"]
        lines += [f"`{run['command']}`", "", f"{cpu}, {threads} threads, load before: {run['load_before']}", ""]
    (folder / "table.md").write_text("\n".join(lines), encoding="utf-8")
    draw(part, table, folder / "figure.png")
    results = {"part": name, "runs": runs, "table": table}
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if row.get(f"{name}_low") is not None:
        return f"{value:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
