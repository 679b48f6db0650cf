#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Fits how a checkpoint's confidences are calibrated, and measures the calibration on other data.

    python training/fit_confidence.py --train DIR --eval DIR1 DIR2 ... --output OUT [--write]

Everything is decoded with the checkpoint's own settings. The recordings of --train get noise, rooms and other speeds,
each in three ways: a checkpoint knows those it was trained on too well, and its errors on them would be too few. What
is kept of the forms in `FORMS` (see `confidence_mdm_asr.calibrate`) is the one of the lowest negative log-likelihood
of words on groups left out (the column "corpus" of --train, if it has one, else one in five utterances), in which all
groups count alike, however large. A form with more numbers has to be better by 0.5 %. The data of --eval decide
nothing.

Writes OUT/report.json and OUT/report.md, and OUT/train.jsonl and OUT/NAME.jsonl with every token's confidence before
calibration, from which `--reuse` computes everything again. `--write` stores the result in the checkpoint's
generation_config.json.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.augmentation_mdm_asr import Augmenter
from mdm_asr_hf.confidence_mdm_asr import MAX_LOG_ODDS, calibrate, utterance_confidence
from mdm_asr_hf.evaluation_mdm_asr import load_data
from mdm_asr_hf.scoring_mdm_asr import bootstrap_draws, count_errors, normaliser, word_confidences
from mdm_asr_hf.transcript_mdm_asr import token_texts

AUGMENTERS = (
    Augmenter(speed_prob=0.7, speed_range=(0.85, 1.15), room_prob=0.3, noise_prob=1.0, snr_db=(0.0, 15.0)),
    Augmenter(speed_prob=0.5, speed_range=(0.8, 1.2), room_prob=1.0, room_rt60_s=(0.2, 0.9), room_drr_db=(-5.0, 8.0)),
    # Voices as high as a child's and as low as no one's in the data, slow and fast.
    Augmenter(speed_prob=1.0, speed_range=(0.7, 1.35), room_prob=0.3, noise_prob=0.7, snr_db=(5.0, 25.0)),
)
# Columns of what a token's log-odds are made of: its own, 1, the utterance's mean, the logarithm of its pace.
NUM_COLUMNS = 4
FORMS = {"temperature": [0], "bias": [0, 1], "mean": [0, 1, 2], "mean and pace": [0, 1, 2, 3]}
NEEDED_GAIN = 0.005
NUM_BINS = 10
POOLED = "all of them pooled"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()), help="default: the package's")
    parser.add_argument("--train", required=True, help="folder or manifest of speech to fit on")
    parser.add_argument("--eval", nargs="*", default=[], help="folders or manifests of speech to measure on")
    parser.add_argument("--limit", type=int, help="utterances of --train at most, drawn by seed")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--reuse", action="store_true", help="take OUT's .jsonl files, where there are some")
    parser.add_argument("--write", action="store_true", help="store the result in the checkpoint")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    recogniser = Recogniser(args)
    train = recogniser.rows(args.train, is_train=True)
    form, numbers, trials = choose(train)
    settings = to_settings(numbers)
    evaluated = {Path(data).name: recogniser.rows(data) for data in args.eval}
    if len(evaluated) > 1:
        evaluated[POOLED] = [row for rows in evaluated.values() for row in rows]
    report = {
        "form": form,
        "settings": settings,
        "trials": trials,
        "train": measure(train, settings),
        "eval": {name: measure(rows, settings) for name, rows in evaluated.items()},
        "command": shlex.join(["python", "training/fit_confidence.py", *(argv if argv is not None else sys.argv[1:])]),
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    text = to_markdown(report)
    (args.output / "report.md").write_text(text)
    print(text)
    if args.write:
        file = Path(args.model) / "generation_config.json"
        config = json.loads(file.read_text()) | settings
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        print(f"Written into {file.name}.")
    return 0


class Recogniser:
    """Rows of a hypotheses.jsonl with confidences as the decoder gave them, from the file that holds them already or
    anew."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.model = args, None

    def rows(self, data: str, is_train: bool = False) -> list[dict]:
        file = self.args.output / f"{'train' if is_train else Path(data).name}.jsonl"
        if not (self.args.reuse and file.exists()):
            rows = self.recognise(data, is_train)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [json.loads(line) for line in file.read_text().splitlines()]

    def recognise(self, data: str, is_train: bool) -> list[dict]:
        if self.model is None:
            self.model = AutoModelForSpeechSeq2Seq.from_pretrained(self.args.model, dtype="float32").eval()
            self.processor = AutoProcessor.from_pretrained(self.args.model)
        loaded = load_data(data)
        rng = np.random.default_rng(self.args.seed)
        indices = np.arange(len(loaded))
        if is_train and self.args.limit and self.args.limit < len(loaded):
            indices = np.sort(rng.choice(len(loaded), self.args.limit, replace=False))
        clips = []
        for i in indices:
            samples = load_audio(loaded.clip(int(i)), target_sampling_rate=16000)
            for k, augment in enumerate(AUGMENTERS if is_train else (None,)):
                heard = augment(samples, 16000, np.random.default_rng([self.args.seed, i, k])) if augment else samples
                clips.append((int(i), k, heard))
        clips.sort(key=lambda clip: -len(clip[2]))
        corpora = corpus_column(data) if is_train else {}
        rows = []
        for start in range(0, len(clips), self.args.batch_size):
            batch = clips[start : start + self.args.batch_size]
            inputs = self.processor([clip for _, _, clip in batch], sampling_rate=16000, return_tensors="pt")
            output = self.model.generate(
                **inputs,
                return_dict_in_generate=True,
                confidence_temperature=1.0,
                confidence_bias=0.0,
                confidence_context={"mean": 0.0, "pace": 0.0},
                no_speech=None,
            )
            for (i, k, clip), ids, confidence in zip(batch, output.sequences, output.confidence, strict=True):
                kept = confidence > 0
                ids, confidence = ids[kept].tolist(), confidence[kept].tolist()
                length = (
                    ids.index(self.model.config.eos_token_id) if self.model.config.eos_token_id in ids else len(ids)
                )
                pieces = token_texts(self.processor.tokenizer, ids[:length])
                entry = loaded.rows[i]
                rows.append(
                    {
                        "id": f"{entry['id']}{'' if not is_train else f' {k}'}",
                        "group": corpora.get(i, str(i % 5)),
                        "reference": entry["text"],
                        "hypothesis": self.processor.decode(ids[:length]) if length else "",
                        "duration_s": round(len(clip) / 16000, 3),
                        "tokens": [
                            {"text": text, "confidence": one} for text, one in zip(pieces, confidence, strict=False)
                        ],
                        "end_confidence": confidence[length] if length < len(ids) else None,
                    }
                )
        return sorted(rows, key=lambda row: row["id"])


def corpus_column(data: str) -> dict[int, str]:
    manifest = Path(data) / "metadata.jsonl"
    if not manifest.exists():
        return {}
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return {i: row["corpus"] for i, row in enumerate(rows) if "corpus" in row}


class Owners(frozenset):
    """Stands in for a confidence: multiplied, it tells which tokens a word is made of."""

    def __mul__(self, other):
        return self if isinstance(other, (int, float)) else Owners(self | other)

    __rmul__ = __mul__


def words_of(row: dict) -> list[tuple[list[int], bool]]:
    """The row's normalised words: their tokens, and whether they are right."""
    marked = dict(row, tokens=[dict(token, confidence=Owners({i})) for i, token in enumerate(row["tokens"])])
    return [(sorted(owners), is_right) for _, owners, is_right in word_confidences(marked)]


def table(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of all words (W): what their tokens' log-odds are made of (W, N, 4), which of them exist (W, N), whether they
    are right (W,), and the place of their row (W,)."""
    parts, right, owner = [], [], []
    for place, row in enumerate(rows):
        confidences = np.array(all_confidences(row), dtype=np.float64)
        log_odds = np.clip(
            np.log(confidences) - np.log1p(-np.minimum(confidences, 1 - 1e-12)), -MAX_LOG_ODDS, MAX_LOG_ODDS
        )
        columns = np.ones((len(log_odds), NUM_COLUMNS))
        columns[:, 0] = log_odds
        if len(log_odds):
            columns[:, 2] = log_odds.mean()
            columns[:, 3] = np.log(len(log_odds) / max(row["duration_s"], 1e-2))
        for tokens, is_right in words_of(row):
            parts.append(columns[tokens])
            right.append(is_right)
            owner.append(place)
    longest = max(map(len, parts))
    stacked, exists = np.zeros((len(parts), longest, NUM_COLUMNS)), np.zeros((len(parts), longest))
    for k, part in enumerate(parts):
        stacked[k, : len(part)], exists[k, : len(part)] = part, 1
    return stacked, exists, np.array(right, dtype=np.float64), np.array(owner)


def all_confidences(row: dict) -> list[float]:
    end = row["end_confidence"]
    return [token["confidence"] for token in row["tokens"]] + ([] if end is None else [end])


def word_log_probability(numbers: np.ndarray, stacked: np.ndarray, exists: np.ndarray) -> np.ndarray:
    return -(np.logaddexp(0, -(stacked @ numbers)) * exists).sum(axis=1)


def loss(numbers: np.ndarray, stacked: np.ndarray, exists: np.ndarray, right: np.ndarray) -> float:
    """Negative log-likelihood of the words being right or wrong."""
    log_p = np.minimum(word_log_probability(numbers, stacked, exists), -1e-9)
    return float(-np.mean(right * log_p + (1 - right) * np.log(-np.expm1(log_p))))


def fit(
    columns: list[int], stacked: np.ndarray, exists: np.ndarray, right: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The numbers (4,) of the lowest loss, 0 but in `columns`; words count by their weights (W,)."""
    inputs, exists, right = (torch.from_numpy(one) for one in (stacked[..., columns], exists, right))
    shares = torch.from_numpy(weights / weights.sum())
    values = torch.zeros(len(columns), dtype=torch.float64)
    values[0] = 1.0
    values.requires_grad_()
    optimiser = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        log_p = (torch.nn.functional.logsigmoid(inputs @ values) * exists).sum(dim=1).clamp(max=-1e-9)
        value = -((right * log_p + (1 - right) * torch.log(-torch.expm1(log_p))) * shares).sum()
        value.backward()
        return value

    optimiser.step(closure)
    numbers = np.zeros(NUM_COLUMNS)
    numbers[columns] = values.detach().numpy()
    return numbers


def choose(rows: list[dict]) -> tuple[str, np.ndarray, dict]:
    """The form that does best on groups left out, its numbers fitted on all, and how each form did."""
    stacked, exists, right, owner = table(rows)
    groups = np.array([rows[place]["group"] for place in owner])
    names, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / counts[places]
    trials, best = {}, "temperature"
    for form, columns in {"uncalibrated": None, **FORMS}.items():
        losses, errors = [], {}
        for name in names:
            inside = groups == name
            numbers = np.eye(NUM_COLUMNS)[0]
            if columns is not None:
                numbers = fit(columns, stacked[~inside], exists[~inside], right[~inside], weights[~inside])
            held_out = stacked[inside], exists[inside]
            losses.append(loss(numbers, *held_out, right[inside]))
            errors[str(name)] = round(ece(np.exp(word_log_probability(numbers, *held_out)), right[inside]), 2)
        trials[form] = {"loss": round(float(np.mean(losses)), 4), "ece": errors}
        if columns is not None and trials[form]["loss"] < trials[best]["loss"] * (1 - NEEDED_GAIN):
            best = form
    return best, fit(FORMS[best], stacked, exists, right, weights), trials


def to_settings(numbers: np.ndarray) -> dict:
    temperature, bias, mean, pace = (round(float(one), 3) for one in (1 / numbers[0], *numbers[1:]))
    return {
        "confidence_temperature": temperature,
        "confidence_bias": bias,
        "confidence_context": {"mean": mean, "pace": pace} if mean or pace else None,
    }


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in per cent, ten bins (arXiv 1706.04599)."""
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    return float(100 * np.abs(np.bincount(bins, confidence - right, NUM_BINS)).sum() / max(len(right), 1))


def apply(row: dict, settings: dict) -> dict:
    """The row with calibrated confidences, as `generate` would have given them."""
    values = all_confidences(row)
    if not values:
        return row
    calibrated = calibrate(
        torch.tensor([values]),
        settings["confidence_temperature"],
        settings["confidence_bias"],
        settings["confidence_context"],
        torch.tensor([row["duration_s"]]),
    )[0].tolist()
    tokens = [dict(token, confidence=one) for token, one in zip(row["tokens"], calibrated, strict=False)]
    return dict(row, tokens=tokens, end_confidence=calibrated[-1] if row["end_confidence"] is not None else None)


def measure(rows: list[dict], settings: dict) -> dict:
    """Calibration of tokens, words and utterances, before and after."""
    before = {"confidence_temperature": 1.0, "confidence_bias": 0.0, "confidence_context": None}
    result = {"utterances": len(rows)}
    for when, one in (("before", before), ("after", settings)):
        calibrated = [apply(row, one) for row in rows]
        words = [[(c, right) for _, c, right in word_confidences(row)] for row in calibrated]
        flat = np.array([pair for pairs in words for pair in pairs], dtype=np.float64)
        result["words"], result["share_right"] = len(flat), round(float(flat[:, 1].mean()), 4)
        token_pairs = np.array(
            [
                (row["tokens"][i]["confidence"], right)
                for row in calibrated
                for its, right in words_of(row)
                for i in its
            ],
            dtype=np.float64,
        )
        result[when] = {
            "token_ece": round(ece(*token_pairs.T), 2),
            "word_ece": round(ece(*flat.T), 2),
            "word_ece_interval": interval(words),
            "perfect_word_ece": perfect(flat[:, 0]),
            "mean_word_confidence": round(float(flat[:, 0].mean()), 4),
            "utterance": measure_utterances(calibrated, words),
        }
    return result


def interval(words: list[list[tuple[float, bool]]]) -> list[float]:
    """The middle 95 % of the word ECE, by bootstrap over utterances."""
    sums = np.zeros((len(words), NUM_BINS))
    counts = np.array([len(pairs) for pairs in words], dtype=np.float64)
    for row, pairs in zip(sums, words, strict=True):
        for confidence, right in pairs:
            row[min(int(confidence * NUM_BINS), NUM_BINS - 1)] += confidence - right
    samples = np.concatenate(
        [100 * np.abs(drawn @ sums).sum(axis=1) / (drawn @ counts) for drawn in bootstrap_draws(len(words), 1000, 0)]
    )
    return np.percentile(samples, [2.5, 97.5]).round(2).tolist()


def perfect(confidence: np.ndarray) -> float:
    """What the ECE would be by chance alone, were these confidences perfectly calibrated."""
    rng = np.random.default_rng(0)
    return round(float(np.mean([ece(confidence, rng.random(len(confidence)) < confidence) for _ in range(200)])), 2)


def measure_utterances(rows: list[dict], words: list[list[tuple[float, bool]]]) -> dict:
    """How far `utterance_confidence` is, on average over utterances and as their mean, from the share of its
    reference's words that are right (1 - WER, at least 0), and from the share of the hypothesis's."""
    values = [
        utterance_confidence(torch.tensor([all_confidences(row)]))[0] if all_confidences(row) else None for row in rows
    ]
    kept = [k for k, value in enumerate(values) if value is not None and words[k]]
    confidence = np.array([values[k] for k in kept])
    normalise = normaliser()
    errors = count_errors(*([normalise(rows[k][side]) for k in kept] for side in ("reference", "hypothesis")))
    accuracy = np.clip(1 - errors[:, :3].sum(axis=1) / np.maximum(errors[:, 3], 1), 0, 1)
    share = np.array([np.mean([right for _, right in words[k]]) for k in kept])
    return {
        "mean_confidence": round(float(confidence.mean()), 4),
        "mean_accuracy": round(float(accuracy.mean()), 4),
        "mean_share_right": round(float(share.mean()), 4),
        "ece_accuracy": round(ece(confidence, accuracy), 2),
        "ece_share_right": round(ece(confidence, share), 2),
        "mean_distance": round(float(np.abs(confidence - accuracy).mean()), 4),
        "correlation": round(float(np.corrcoef(confidence, accuracy)[0, 1]), 3),
    }


def to_markdown(report: dict) -> str:
    lines = [
        f"Form: {report['form']}, {json.dumps(report['settings'])}. ECE in per cent, ten bins; in brackets, 95 % by "
        "bootstrap over utterances; 'chance' is what a perfect calibration would show with as many words.",
        "",
        "| recordings | words | right % | token ECE before | after | word ECE before | after | chance "
        "| utterance ECE before | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in {"train, augmented": report["train"], **report["eval"]}.items():
        cells = [name, one["words"], round(100 * one["share_right"], 1)]
        cells += [one[when]["token_ece"] for when in ("before", "after")]
        for when in ("before", "after"):
            low, high = one[when]["word_ece_interval"]
            cells.append(f"{one[when]['word_ece']} ({low} to {high})")
        cells.append(one["after"]["perfect_word_ece"])
        cells += [one[when]["utterance"]["ece_accuracy"] for when in ("before", "after")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", "```", report["command"], "```", ""])


if __name__ == "__main__":
    raise SystemExit(main())
