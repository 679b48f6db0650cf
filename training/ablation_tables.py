# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
From the rows that run_ablations.py measured to tables, and to sentences on whether the paper's order shows.

Intervals are the middle 95 % of 1,000 resamples of the utterances, drawn alike for every setting, so that the
intervals of differences are paired.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mdm_asr_hf.evaluate.scoring import bootstrap_draws, count_errors, normaliser
from mdm_asr_hf.generation_configuration_mdm_asr import SAMPLERS as SAMPLER_CONFIGS

NUM_BOOTSTRAP, BOOTSTRAP_SEED = 1000, 0
# The paper's own last.
SAMPLERS = tuple(SAMPLER_CONFIGS)
PAPERS_GAMMA, PAPERS_LAMBDA = 0.05, 0.2
POOLED = "all"
AR = "ar"
Row = dict[str, Any]
Key = Hashable


# Numbers


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where it cannot be computed."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> "Estimate":
        """`samples` (R + 1,): first the value of the data itself, then those of R resamples."""
        finite = samples[1:][np.isfinite(samples[1:])]
        low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (math.nan, math.nan)
        return cls(*(float(value) for value in (samples[0], low, high)))

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0; 0: within chance."""
        # Not 0 itself, which rounding may miss on either side.
        return 1 if self.low > 1e-9 else -1 if self.high < -1e-9 else 0

    def columns(self, name: str, digits: int = 2) -> Row:
        values = {"": self.value, "_low": self.low, "_high": self.high}
        # Plus 0: no "-0.0" of a rounding error.
        return {f"{name}{end}": None if math.isnan(v) else round(v, digits) + 0 for end, v in values.items()}

    def __str__(self) -> str:
        value, low, high = (f"{round(one, 2) + 0:.2f}" for one in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


class Sample:
    """
    Numbers of several settings on the same utterances, and resamples of those.

    Args:
        groups: setting -> rows of raw.jsonl. Several rows of an utterance (seeds) are averaged, and utterances that
            one of the settings lacks are left out for all.
    """

    def __init__(self, groups: dict[Key, list[Row]]):
        by_setting = {key: _by_utterance(rows) for key, rows in groups.items()}
        self.utterances = sorted(set.intersection(*(set(one) for one in by_setting.values())))
        self.num_dropped = len(set().union(*by_setting.values())) - len(self.utterances)
        self._rows = {key: [one[u] for u in self.utterances] for key, one in by_setting.items()}
        drawn = bootstrap_draws(len(self.utterances), NUM_BOOTSTRAP, BOOTSTRAP_SEED) if self.utterances else ()
        # The first line is the data as it is.
        self.weights = np.concatenate([np.ones((1, len(self.utterances))), *drawn])

    def column(self, key: Key, name: str, over: Callable = np.mean) -> np.ndarray:
        """(B,): of every utterance of a setting."""
        return np.array([over([row[name] for row in rows]) for rows in self._rows[key]], dtype=np.float64)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray | float = 1.0) -> np.ndarray:
        """(R + 1,): of sums over utterances."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weights @ numerator) / (self.weights @ (denominator * np.ones(len(self.utterances))))

    def wer(self, key: Key, mask: np.ndarray | float = 1.0) -> np.ndarray:
        """(R + 1,): in per cent, of all utterances or of those with 1 in `mask` (B,)."""
        return 100 * self.ratio(mask * self.column(key, "num_errors"), mask * self.column(key, "num_words"))

    def nfe(self, key: Key) -> np.ndarray:
        return self.ratio(self.column(key, "nfe"))

    def at_limit(self, key: Key) -> float:
        """Per cent of the utterances that needed the last allowed step, which commits whatever is left."""
        flags = self.column(key, "nfe") >= self.column(key, "steps")
        return round(float(100 * flags.mean()), 1)


def _by_utterance(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["dataset"], row["id"]), []).append(row)
    return found


def group(rows: Iterable[Row], *names: str) -> dict[Key, list[Row]]:
    """Rows by the values of these columns, in the order they come in; one name alone gives plain values."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return groups


def add_errors(rows: Sequence[Row]) -> list[Row]:
    """Copies with `num_errors` and `num_words` of normalised words, and numbers for what JSON cannot hold."""

    @cache
    def normalised(text: str, language: str | None) -> str:
        return normaliser(language)(text)

    sides = [[normalised(row[key], row["language"]) for row in rows] for key in ("reference", "hypothesis")]
    counts = count_errors(*sides)
    return [
        row
        | {"num_errors": int(errors[:3].sum()), "num_words": int(errors[3])}
        | {key: None if row[key] is None else float(row[key]) for key in ("gamma", "lambda")}
        for row, errors in zip(rows, counts, strict=True)
    ]


def log_slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R + 1,): exponents b of y ~ x^b by least squares in the logarithms, one for each line of `weights` (R+1, B)."""
    x, y = np.log(x), np.log(y)
    total = weights.sum(axis=1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ (x * y) / total - mean_x * mean_y) / (weights @ (x * x) / total - mean_x**2)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other is at most equal to in both coordinates and below in one, by the first."""
    front, best = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        # Equal points are all on the front or all off it.
        if points[i][1] < best or (front and points[i] == points[front[-1]]):
            front.append(i)
            best = points[i][1]
    return front


# The parts: rows of raw.jsonl -> table, and what it says of the paper's order


def tabulate_samplers(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """WER of every sampler and data set at each bound of steps, and its difference to pbeb_conf's."""
    table, sentences = [], []
    for steps, of_steps in sorted(group(rows, "steps").items()):
        by_dataset = group(of_steps, "dataset")
        if len(by_dataset) > 1:
            by_dataset[POOLED] = of_steps
        differences: dict[str, dict[str, Estimate]] = {}
        without_limit: dict[str, tuple[float, dict[str, Estimate]]] = {}
        for dataset, of_dataset in by_dataset.items():
            groups = group(of_dataset, "sampler")
            sample = Sample(groups)
            differences[dataset] = {}
            for sampler in filter(groups.__contains__, SAMPLERS):
                wer, by_seed = sample.wer(sampler), group(groups[sampler], "seed")
                row = {"steps": steps, "dataset": dataset, "sampler": sampler}
                row |= Estimate.of(wer).columns("wer")
                if "pbeb_conf" in groups and sampler != "pbeb_conf":
                    differences[dataset][sampler] = Estimate.of(wer - sample.wer("pbeb_conf"))
                    row |= differences[dataset][sampler].columns("minus_pbeb_conf")
                row |= Estimate.of(sample.nfe(sampler)).columns("nfe") | {"at_limit": sample.at_limit(sampler)}
                seeds = [float(Sample({0: of_seed}).wer(0)[0]) for of_seed in by_seed.values()]
                row |= {"num_seeds": len(by_seed), "wer_min_seed": round(min(seeds), 2)}
                row |= {"wer_max_seed": round(max(seeds), 2), "num_utterances": len(sample.utterances)}
                row |= {"num_words": int(sample.column(sampler, "num_words").sum())}
                row |= {"num_dropped": sample.num_dropped}
                table.append(row)
            if differences[dataset]:
                below = (sample.column("pbeb_conf", "nfe") < steps).astype(float)
                rest = {
                    sampler: Estimate.of(sample.wer(sampler, below) - sample.wer("pbeb_conf", below))
                    for sampler in differences[dataset]
                }
                without_limit[dataset] = (sample.at_limit("pbeb_conf"), rest)
        sentences += _samplers_order(steps, differences, without_limit)
    return table, sentences


def _samplers_order(
    steps: int,
    differences: dict[str, dict[str, Estimate]],
    without_limit: dict[str, tuple[float, dict[str, Estimate]]],
) -> list[str]:
    """
    Args:
        differences: data set -> other sampler -> its WER less pbeb_conf's.
        without_limit: data set -> per cent of utterances that took pbeb_conf to the last step, and the differences
            without these.
    """
    sets = {name: others for name, others in differences.items() if name != POOLED and others}
    if not sets:
        return [f"At most {steps} steps: without pbeb_conf and another sampler there is no order to compare."]
    lowest = [name for name, others in sets.items() if all(one.value >= 0 for one in others.values())]
    text = f"At most {steps} steps: pbeb_conf is lowest on {len(lowest)} of {len(sets)} sets; the paper: on all."
    counts = []
    for sampler in SAMPLERS:
        signs = [others[sampler].sign for others in sets.values() if sampler in others]
        if signs:
            parts = (
                f"ahead on {signs.count(1)}",
                f"within chance on {signs.count(0)}",
                f"behind on {signs.count(-1)}",
            )
            counts.append(f"{sampler}: " + ", ".join(p for p in parts if not p.endswith(" 0")))
    text += f" By the paired intervals it is, against {'; '.join(counts)}."
    sentences = [text]
    for name, others in sets.items():
        if name not in lowest:
            best = min(others, key=lambda sampler: others[sampler].value)
            chance = ", within chance" if others[best].sign == 0 else ""
            text = f"On {name} {best} is the lowest, {others[best]} points against pbeb_conf{chance}."
            share, rest = without_limit[name]
            if share:
                explained = rest[best].sign >= 0 if others[best].sign else rest[best].value >= 0
                text += (
                    f" {share:g} % of the utterances there took pbeb_conf to the last of the {steps} steps, which "
                    f"commits all that is left at once; without them it is {rest[best]}, so the bound is "
                    f"{'the likely reason' if explained else 'not the whole reason'}."
                )
            else:
                text += f" None of the utterances there took pbeb_conf to the bound of {steps} steps, which so is not "
                text += "the reason."
            sentences.append(text)
    return sentences


def tabulate_nfe(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """WER of every model at each bound of steps, per data set and pooled."""
    table, sentences = [], []
    by_dataset = group(rows, "dataset")
    if len(by_dataset) > 1:
        by_dataset[POOLED] = rows
    for dataset, of_dataset in by_dataset.items():
        groups = group(of_dataset, "model", "steps")
        sample = Sample(groups)
        for model, steps in sorted(groups, key=lambda key: (_first(rows, "model", key[0]), key[1])):
            row = {"dataset": dataset, "model": model, "parameters": groups[model, steps][0]["num_parameters"]}
            row |= {"sampler": groups[model, steps][0]["sampler"], "steps": steps}
            row |= Estimate.of(sample.wer((model, steps))).columns("wer")
            row |= Estimate.of(sample.nfe((model, steps))).columns("nfe")
            row |= {"at_limit": sample.at_limit((model, steps)), "num_utterances": len(sample.utterances)}
            row |= {"num_words": int(sample.column((model, steps), "num_words").sum())}
            row |= {"num_dropped": sample.num_dropped}
            table.append(row)
        sentences += _nfe_order(dataset, sample, groups)
    return table, sentences


def _first(rows: list[Row], name: str, value: Any) -> int:
    return next(i for i, row in enumerate(rows) if row[name] == value)


def _nfe_order(dataset: str, sample: Sample, groups: Iterable[tuple[str, int]]) -> list[str]:
    all_steps: dict[str, set[int]] = {}
    for model, steps in groups:
        all_steps.setdefault(model, set()).add(steps)
    sentences = []
    pairs = [
        (m, m.replace("isct", "plain")) for m in all_steps if "isct" in m and m.replace("isct", "plain") in all_steps
    ]
    for isct, plain in pairs:
        steps = sorted(all_steps[isct] & all_steps[plain])
        if len(steps) < 2:
            continue
        gains = {n: sample.wer((plain, n)) - sample.wer((isct, n)) for n in (steps[0], steps[-1])}
        few, many = (Estimate.of(gains[n]) for n in (steps[0], steps[-1]))
        change = Estimate.of(gains[steps[0]] - gains[steps[-1]])
        verdict = {1: "larger at few steps, as in the paper", 0: "within chance the same at both"}.get(
            change.sign, "smaller at few steps, against the paper"
        )
        sentences.append(
            f"{dataset}: the gain of {isct} over {plain} is {few} points at {steps[0]} steps"
            f"{_within_chance(few)} and {many} at {steps[-1]}{_within_chance(many)}; it is {verdict} (difference "
            f"{change}). The paper: largest at few steps, next to none at 32."
        )
    if not pairs:
        for model, steps in all_steps.items():
            if len(steps) < 2:
                continue
            low, high = min(steps), max(steps)
            falls = Estimate.of(sample.wer((model, low)) - sample.wer((model, high)))
            verdict = {1: "as in the paper", 0: "within chance none"}.get(falls.sign, "against the paper")
            sentences.append(
                f"{dataset}: the WER of {model} falls by {falls} points from {low} to {high} steps, {verdict}."
            )
        sentences.append("Without models called isct and plain there is no gain of ISCT to compare with the paper's.")
    return sentences


def _within_chance(estimate: Estimate) -> str:
    return "" if estimate.sign else " (within chance)"


def tabulate_speed(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """RTFx of every system at batch size 1 by the tokens of the reference; medians of the rounds."""
    sample = Sample(group(rows, "system"))
    tokens = sample.column(rows[0]["system"], "reference_tokens", np.median)
    bins = [(row["bin_low"], row["bin_high"]) for row in sorted(rows, key=lambda row: row["bin_low"])]
    systems = sorted(
        group(rows, "system"), key=lambda name: (name.partition(",")[0] != AR, _first(rows, "system", name))
    )
    table, slopes = [], {}
    for system in systems:
        audio_s = sample.column(system, "duration_s", np.median)
        decoder_s = sample.column(system, "decoder_s", np.median)
        wall_s = sample.column(system, "wall_s", np.median)
        lows = sample.column(system, "bin_low", np.median)
        growing = (audio_s / wall_s, audio_s / decoder_s, np.maximum(sample.column(system, "nfe"), 1))
        slopes[system] = [Estimate.of(log_slope(tokens, one, sample.weights)) for one in growing]
        for low, high in dict.fromkeys(bins):
            inside = (lows == low).astype(float)
            if not inside.any():
                continue
            row = {"system": system, "tokens_from": low, "tokens_below": high}
            row |= {"median_tokens": float(np.median(tokens[inside > 0])), "num_utterances": int(inside.sum())}
            row |= {"mean_audio_s": round(float(audio_s[inside > 0].mean()), 2)}
            row |= Estimate.of(sample.ratio(inside * audio_s, inside * wall_s)).columns("rtfx")
            row |= Estimate.of(sample.ratio(inside * audio_s, inside * decoder_s)).columns("rtfx_decoder")
            row |= Estimate.of(sample.ratio(inside * sample.column(system, "nfe"), inside)).columns("nfe")
            row |= Estimate.of(sample.wer(system, inside)).columns("wer")
            of_bin = [one for one in rows if one["system"] == system and one["bin_low"] == low]
            rounds = [
                sum(one["duration_s"] for one in r) / sum(one["wall_s"] for one in r)
                for r in group(of_bin, "round").values()
            ]
            row |= {"num_rounds": len(rounds), "rtfx_min_round": round(min(rounds), 2)}
            table.append(row | {"rtfx_max_round": round(max(rounds), 2)})
    return table, _speed_order(slopes)


def _speed_order(slopes: dict[str, list[Estimate]]) -> list[str]:
    """`slopes`: system -> exponents b of RTFx ~ tokens^b, end to end and of the decoder alone, and of NFE."""

    def tell(slope: Estimate) -> str:
        what = {1: "rises with the length", -1: "falls with the length", 0: "is flat within chance"}[slope.sign]
        return f"{what} (tokens^{slope})"

    sentences = []
    for system, (whole, decoder, nfe) in slopes.items():
        name = system.partition(",")[0]
        if name == "pbeb_conf":
            agrees = "as in the paper" if whole.sign == 1 else "while the paper's rises"
            text = f"pbeb_conf's RTFx {tell(whole)}, {agrees}; of its decoder alone it {tell(decoder)}."
            if whole.sign != 1:
                text += (
                    f" Likely reason: its NFE grow as tokens^{nfe}, where 1 "
                    "is a constant number of tokens a step, as an autoregressive decoder has."
                )
        elif name == AR:
            agrees = "as in the paper" if whole.sign < 1 else "while the paper's are flat or fall"
            text = f"The autoregressive donor's RTFx {tell(whole)}, {agrees}; of its decoder alone it {tell(decoder)}."
            if whole.sign == 1:
                text += (
                    " Likely reason: its encoder, and the cross-attention of its decoder, always take 30 seconds of "
                    "features, a fixed cost that weighs less the longer the clip; the paper's autoregressive Canary "
                    "does not pad."
                )
        else:
            continue
        sentences.append(text)
    if not any(system.partition(",")[0] == AR for system in slopes):
        sentences.append("No --donor was given, so the autoregressive line is left out.")
    return sentences


def tabulate_front(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """WER and mean NFE of every gamma and lambda, all data sets pooled, and which of them are on the front."""
    groups = group(rows, "gamma", "lambda")
    sample = Sample(groups)
    keys = sorted(groups)
    wer, nfe = ({key: values(key) for key in keys} for values in (sample.wer, sample.nfe))
    front = {keys[i] for i in pareto_front([(float(nfe[key][0]), float(wer[key][0])) for key in keys])}
    table = []
    for key in keys:
        row = {"gamma": "inf" if math.isinf(key[0]) else key[0], "lambda": key[1], "is_on_front": key in front}
        row |= Estimate.of(wer[key]).columns("wer") | Estimate.of(nfe[key]).columns("nfe")
        row |= {"at_limit": sample.at_limit(key), "num_utterances": len(sample.utterances)}
        row |= {"num_words": int(sample.column(key, "num_words").sum()), "num_dropped": sample.num_dropped}
        table.append(row)
    return table, _front_order(wer, nfe, front)


def _front_order(
    wer: dict[tuple[float, float], np.ndarray], nfe: dict[tuple[float, float], np.ndarray], front: set
) -> list[str]:
    sentences = []
    papers = (PAPERS_GAMMA, PAPERS_LAMBDA)
    if papers in wer:
        text = f"The paper's setting, gamma {papers[0]:g} and lambda {papers[1]:g}, has a WER of "
        text += f"{Estimate.of(wer[papers])} % at {nfe[papers][0]:.2f} NFE"
        if papers in front:
            text += " and is on the front."
        else:
            better = [k for k in front if nfe[k][0] <= nfe[papers][0] and wer[k][0] <= wer[papers][0]]
            best = min(better, key=lambda k: (wer[k][0], nfe[k][0]))
            gain = Estimate.of(wer[papers] - wer[best])
            text += (
                f" and is not on the front: gamma {best[0]:g}, lambda {best[1]:g} has {nfe[best][0]:.2f} NFE and a "
                f"WER {gain} points lower{_within_chance(gain)}."
            )
        sentences.append(text)
    gammas = [g for g in sorted({g for g, _ in wer}) if (g, 0.0) in wer and any(k[0] == g and k[1] > 0 for k in wer)]
    signs, best_of = [], []
    for gamma in gammas:
        best = min((k for k in wer if k[0] == gamma and k[1] > 0), key=lambda k: float(wer[k][0]))
        signs.append(Estimate.of(wer[gamma, 0.0] - wer[best]).sign)
        best_of.append(f"{best[1]:g}")
    if gammas:
        sentences.append(
            f"A position bias (the best lambda > 0 of each gamma: {', '.join(best_of)}) has a lower WER than lambda 0 "
            f"beyond chance at {signs.count(1)} of {len(signs)} values of gamma, a higher one at {signs.count(-1)}; "
            "the best of several is flattered. The paper: PBEB-Conf below EB-Conf."
        )
    return sentences or ["Without the paper's setting and lambda 0 there is no order to compare."]


__all__ = [
    "AR",
    "BOOTSTRAP_SEED",
    "NUM_BOOTSTRAP",
    "POOLED",
    "SAMPLERS",
    "Estimate",
    "Sample",
    "add_errors",
    "log_slope",
    "pareto_front",
    "tabulate_front",
    "tabulate_nfe",
    "tabulate_samplers",
    "tabulate_speed",
]
