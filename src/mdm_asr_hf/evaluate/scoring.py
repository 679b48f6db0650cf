# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""From the rows of a hypotheses.jsonl to error rates, intervals, calibration and speed; no model is needed."""

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..data.manifests import parse_line
from ..safeguards_mdm_asr import same_runs
from ..transcribe.transcript import group_words

HYPOTHESES_NAME, METRICS_NAME = "hypotheses.jsonl", "metrics.json"
NEEDED_KEYS = ("reference", "hypothesis", "nfe", "duration_s")
# Edges of the buckets of duration.
DURATION_EDGES_S = (0.0, 4.0, 8.0, 15.0, math.inf)
NUM_BINS = 10
# So often in a row is a phrase of a text that loops.
LOOP_TIMES = 3
# Resamples drawn at once, to bound memory for sets of many thousands of utterances.
_RESAMPLES_AT_ONCE = 100


def normaliser(language: str | None = "en") -> Callable[[str], str]:
    """
    Whisper's normaliser of `language`: the English one, without its table of spellings, for "en" (or None), its basic
    one for every other. A text of punctuation alone has no words.
    """
    # "en_us", as FLEURS has it, is a region too.
    first = (language or "en").lower().replace("_", "-").split("-")[0]
    return _normaliser(first in ("en", "eng", "english"))


@cache
def _normaliser(is_english: bool) -> Callable[[str], str]:
    # The table of spellings comes with Whisper's tokenizers and not with transformers.
    normalise = EnglishTextNormalizer({}) if is_english else BasicTextNormalizer()
    # The English one leaves a word "." of "...".
    return lambda text: normalise(text) if any(map(str.isalnum, text)) else ""


def describe_normaliser(language: str | None = "en") -> str:
    """What [`normaliser`] is, for the record."""
    if normaliser(language) is _normaliser(True):
        return "transformers EnglishTextNormalizer({}), no spelling table"
    return "transformers BasicTextNormalizer()"


def count_errors(references: Sequence[str], hypotheses: Sequence[str], *, characters: bool = False) -> np.ndarray:
    """
    Substitutions, deletions, insertions and reference words (or characters) of each pair of texts: integers (B, 4).
    Where nothing was said, everything recognised is an insertion.
    """
    counts = np.zeros((len(references), 4), dtype=np.int64)
    if not len(references):
        return counts
    process = jiwer.process_characters if characters else jiwer.process_words
    output = process(*([" ".join(text.split()) for text in side] for side in (references, hypotheses)))
    columns = {"substitute": 0, "delete": 1, "insert": 2}
    for row, units, chunks in zip(counts, output.references, output.alignments, strict=True):
        row[3] = len(units)
        for chunk in chunks:
            if chunk.type != "equal":
                length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                row[columns[chunk.type]] += length
    return counts


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str | None = "en") -> float | None:
    """In per cent, of all texts together, both sides normalised; None where nothing was said."""
    normalise = normaliser(language)
    errors = count_errors(*([normalise(text) for text in side] for side in (references, hypotheses))).sum(axis=0)
    return round(float(100 * errors[:3].sum() / errors[3]), 2) if errors[3] else None


def align(reference: str, hypothesis: str, language: str | None = "en") -> list[tuple[str, list[str], list[str]]]:
    """
    Aligns the normalised words of two texts.

    Returns:
        In order, (what, reference words, hypothesis words), what being "equal", "substitute", "delete" or "insert".
    """
    normalise = normaliser(language)
    return [
        (what, said[ref], heard[hyp])
        for what, ref, hyp, said, heard in _align_words(normalise(reference), normalise(hypothesis))
    ]


def _align_words(reference: str, hypothesis: str) -> Iterator[tuple[str, slice, slice, list[str], list[str]]]:
    """What, where in either text's words, and the words of both."""
    output = jiwer.process_words([" ".join(reference.split())], [" ".join(hypothesis.split())])
    for chunk in output.alignments[0]:
        places = slice(chunk.ref_start_idx, chunk.ref_end_idx), slice(chunk.hyp_start_idx, chunk.hyp_end_idx)
        yield chunk.type, *places, output.references[0], output.hypotheses[0]


def count_repetitions(text: str) -> Counter:
    """How often a run of n words is followed by itself at once, for each n: "the the the" has two of n = 1."""
    return Counter({n: int((runs - n + 1).clip(min=0).sum()) for n, runs in same_runs(text.split())})


def most_in_a_row(text: str) -> int:
    """How many times in a row a run of words is said, at most: 3 in "so a b a b a b", 1 in "a b", 0 in ""."""
    return max((int(runs.max()) // n + 1 for n, runs in same_runs(text.split())), default=min(len(text), 1))


def word_confidences(row: dict[str, Any], language: str | None = "en") -> list[tuple[str, float, bool]]:
    """
    The normalised words of a row's hypothesis: (word, confidence, whether the alignment holds it correct). Empty for
    a row without tokens.

    The confidence of a written word is the product of its tokens' probabilities, the model's own estimate that all of
    them are right. Tokens without a letter or digit do not count, since the normaliser takes punctuation out. A
    normalised word has the confidence of the written word it comes from ("can't" gives "can" and "not"), and, where
    several became one ("twenty one", "21"), the product of theirs.
    """
    tokens = row.get("tokens") or ()
    written = group_words([t["text"] for t in tokens], [t["confidence"] for t in tokens])
    if not written:
        return []
    normalise = normaliser(language)
    hypothesis = normalise(row["hypothesis"])
    parts = [(part, word.confidence) for word in written for part in normalise(word.text).split()]
    words = hypothesis.split()
    confidences: list[float | None] = [None] * len(words)
    # Equal words one to one; in between, whatever the normaliser made of several words in their context.
    sources: list[float] = []
    places: list[int] = []

    def share() -> None:
        for place in places if sources else ():
            confidences[place] = math.prod(sources)
        sources.clear()
        places.clear()

    for what, ref, hyp, *_ in _align_words(" ".join(part for part, _ in parts), hypothesis):
        its = [confidence for _, confidence in parts[ref]]
        if what == "equal":
            share()
            confidences[hyp] = its
        else:
            sources += its
            places += range(hyp.start, hyp.stop)
    share()

    is_correct = [False] * len(words)
    for what, _, hyp, *_ in _align_words(normalise(row["reference"]), hypothesis):
        is_correct[hyp] = [what == "equal"] * (hyp.stop - hyp.start)
    rows = zip(words, confidences, is_correct, strict=True)
    return [(word, confidence, correct) for word, confidence, correct in rows if confidence is not None]


class _Sums:
    """Numbers per utterance whose sums the metrics are ratios of, so that a resample is a sum of columns."""

    def __init__(self, rows: Sequence[dict[str, Any]], language: str | None):
        languages = [language or row.get("language") for row in rows]
        raw = [[row[key] for row in rows] for key in ("reference", "hypothesis")]
        sides = [[normaliser(one)(text) for one, text in zip(languages, side, strict=True)] for side in raw]
        self.words = count_errors(*sides)
        ones, has_words = np.ones(len(rows)), self.words[:, 3] > 0
        nfe = np.array([row["nfe"] for row in rows], dtype=np.float64)
        repetitions = zip(*([count_repetitions(text) for text in side] for side in sides), strict=True)
        repeats = [any(heard[n] > said[n] for n in heard) for said, heard in repetitions]
        in_a_row = zip(*([most_in_a_row(text) for text in side] for side in sides), strict=True)
        self.num_loops = sum(heard >= LOOP_TIMES and heard > said for said, heard in in_a_row)
        is_empty = np.array([not row["hypothesis"].strip() for row in rows])

        def rate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
            return counts[:, :3].sum(axis=1), counts[:, 3], 100.0

        # Name -> numerator, denominator, factor. Ratios of sums over utterances, as WER is.
        self.ratios: dict[str, tuple[np.ndarray, np.ndarray, float]] = {
            "wer": rate(self.words),
            "cer": rate(count_errors(*sides, characters=True)),
            "wer_raw": rate(count_errors(*raw)),
            "cer_raw": rate(count_errors(*raw, characters=True)),
            "mean_nfe": (nfe, ones, 1.0),
            "empty_rate": (is_empty & has_words, has_words, 100.0),
            "repetition_rate": (np.array(repeats), ones, 100.0),
        }
        if all("tokens" in row for row in rows):
            self.ratios["tokens_per_nfe"] = (np.array([_num_decoded(row) for row in rows]), nfe, 1.0)
        # Per branch, of rows decoded by drafts: drafts that were accepted and rejected (B, 2).
        self.drafts: dict[str, np.ndarray] = {}
        if all("accepted_drafts" in row for row in rows):
            for name in rows[0]["accepted_drafts"]:
                pairs = [[row[kind][name] for kind in ("accepted_drafts", "rejected_drafts")] for row in rows]
                self.drafts[name] = counts = np.array(pairs)
                self.ratios[f"acceptance_rate_{name}"] = (counts[:, 0], counts.sum(axis=1), 100.0)
        # Per utterance and bin: words, the sum of their confidences, correct words.
        self.bins = np.zeros((len(rows), NUM_BINS, 3))
        for row, row_language, bins in zip(rows, languages, self.bins, strict=True):
            for _, confidence, correct in word_confidences(row, row_language):
                bins[min(int(confidence * NUM_BINS), NUM_BINS - 1)] += (1, confidence, correct)

    def ratio(self, name: str, mask: np.ndarray | slice = slice(None)) -> float | None:
        """None where the metric cannot be computed."""
        if name not in self.ratios:
            return None
        numerator, denominator, factor = self.ratios[name]
        total = denominator[mask].sum()
        return round(float(factor * numerator[mask].sum() / total), 2) if total else None

    def resampled(self, name: str, drawn: np.ndarray) -> np.ndarray:
        """The metric (R,) of R resamples, of how often each utterance was drawn (R, B); not finite without one."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if name == "ece":
                return _ece((drawn @ self.bins.reshape(len(self.bins), -1)).reshape(-1, NUM_BINS, 3))
            numerator, denominator, factor = self.ratios[name]
            return factor * (drawn @ numerator) / (drawn @ denominator)


def _num_decoded(row: dict[str, Any]) -> int:
    """Tokens of the text and its end, unless it filled up first; none where nothing was decoded."""
    return len(row["tokens"]) + (not row.get("is_full") and row["nfe"] > 0)


def _ece(bins: np.ndarray) -> np.ndarray:
    """
    Expected calibration error, in per cent, of sums (..., bins, 3): the mean distance between confidence and accuracy,
    weighted by words (arXiv 1706.04599, equation 3).
    """
    counts, confidence, correct = np.moveaxis(bins, -1, 0)
    return 100 * np.abs(confidence - correct).sum(axis=-1) / counts.sum(axis=-1)


def score(
    rows: Sequence[dict[str, Any]], *, language: str | None = None, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """
    Metrics of the rows of a hypotheses.jsonl, in any order, and their intervals.

    Args:
        rows: dicts with at least "reference", "hypothesis", "nfe" and "duration_s". What needs "tokens" or times is
            None where rows lack them.
        language (`str`, *optional*): whose normaliser to use. Default: each row's own "language", else "en".
        num_bootstrap (`int`): resamples of the utterances for the intervals; 0 leaves them out.
        seed (`int`): of the resamples. Utterances are drawn with all their numbers.

    Returns:
        `{"metrics": ..., "intervals": ...}`. Rates are in per cent: "wer", "cer" (normalised), "wer_raw", "cer_raw"
        (texts as they are), "empty_rate" (empty texts, of the utterances that hold words), "repetition_rate"
        (utterances that repeat a run of words at once more often than their reference does), "ece" (10 bins of
        words, see [`word_confidences`]), and of rows decoded by drafts "acceptance_rate_masks" and
        "acceptance_rate_hypothesis" (drafts that were as the donor's text, of those that each branch made).
        "num_loops" counts utterances that say a phrase three times in a row or more, and oftener than their reference
        does. "tokens_per_nfe" is all text tokens and ends of text by all decoder evaluations. The RTFx are seconds of
        audio per second of features, encoder and decoder, summed over rows and so over processes; reading audio files
        is not counted. The intervals are the middle 95 % of the resamples.

    Raises:
        ValueError: no rows, or one without what is needed.
    """
    if not rows:
        raise ValueError("`rows` is empty, so there is nothing to score. Check the hypotheses.")
    for i, row in enumerate(rows):
        if missing := [key for key in NEEDED_KEYS if key not in row]:
            raise ValueError(f"Row {i} ({row.get('id')}) of `rows` has no {missing[0]!r}, but {sorted(row)}. Add it.")
    # In one order, whatever the order they come in, so that sums and resamples do not depend on it.
    rows = sorted(rows, key=lambda row: json.dumps([str(row.get("id")), row], sort_keys=True, default=str))
    sums = _Sums(rows, language)
    durations_s = np.array([row["duration_s"] for row in rows], dtype=np.float64)
    bins = sums.bins.sum(axis=0)
    names = ("wer", "cer", "wer_raw", "cer_raw", "mean_nfe", "tokens_per_nfe")
    metrics: dict[str, Any] = {name: sums.ratio(name) for name in names} | _speed(rows)
    metrics["ece"] = round(float(_ece(bins)), 2) if bins.any() else None
    metrics |= {name: sums.ratio(name) for name in ("empty_rate", "repetition_rate")} | {"num_loops": sums.num_loops}
    metrics |= {f"acceptance_rate_{name}": sums.ratio(f"acceptance_rate_{name}") for name in sums.drafts}
    for i, kind in enumerate(("num_accepted_drafts", "num_rejected_drafts")):
        metrics[kind] = {name: int(counts[:, i].sum()) for name, counts in sums.drafts.items()} or None
    substitutions, deletions, insertions, reference_words = map(int, sums.words.sum(axis=0))
    metrics |= {
        "num_utterances": len(rows),
        "num_reference_words": reference_words,
        "num_substitutions": substitutions,
        "num_deletions": deletions,
        "num_insertions": insertions,
        "num_full": sum(bool(row["is_full"]) for row in rows) if all("is_full" in row for row in rows) else None,
        "audio_s": round(float(durations_s.sum()), 1),
        "by_duration": [
            {
                "from_s": low,
                "to_s": high if high < math.inf else None,
                "num_utterances": int(mask.sum()),
                "num_reference_words": int(sums.words[mask, 3].sum()),
                "wer": sums.ratio("wer", mask),
                "mean_nfe": sums.ratio("mean_nfe", mask),
            }
            for low, high in zip(DURATION_EDGES_S, DURATION_EDGES_S[1:], strict=False)
            if (mask := (durations_s >= low) & (durations_s < high)).any()
        ],
        "reliability": [
            {
                "low": i / NUM_BINS,
                "high": (i + 1) / NUM_BINS,
                "count": int(count),
                "confidence": round(confidence / count, 4),
                "accuracy": round(correct / count, 4),
            }
            for i, (count, confidence, correct) in enumerate(bins.tolist())
            if count
        ],
        "reliability_unit": "word" if bins.any() else None,
    }
    return {"metrics": metrics, "intervals": _intervals(sums, num_bootstrap, seed)}


def _speed(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    def total(key: str) -> float | None:
        return math.fsum(row[key] for row in rows) if all(key in row for row in rows) else None

    audio_s, features_s, encoder_s, decoder_s = map(total, ("duration_s", "features_s", "encoder_s", "decoder_s"))
    all_s = None if None in (features_s, encoder_s, decoder_s) else features_s + encoder_s + decoder_s
    times = {"rtfx": all_s, "rtfx_encoder": encoder_s, "rtfx_decoder": decoder_s}
    return {name: round(audio_s / seconds, 2) if seconds else None for name, seconds in times.items()}


def bootstrap_draws(num_rows: int, num_bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """Yields (R, B): how often R resamples draw each of B utterances; the same draws for the same B and seed."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_bootstrap, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(num_rows, size=(min(_RESAMPLES_AT_ONCE, num_bootstrap - start), num_rows))
        yield np.stack([np.bincount(row, minlength=num_rows) for row in drawn]).astype(np.float64)


def _percentiles(samples: list[np.ndarray]) -> list[float] | None:
    values = np.concatenate(samples)
    values = values[np.isfinite(values)]
    return [round(float(value), 2) for value in np.percentile(values, [2.5, 97.5])] if len(values) else None


def _intervals(sums: _Sums, num_bootstrap: int, seed: int) -> dict[str, list[float] | None]:
    samples: dict[str, list[np.ndarray]] = {name: [] for name in (*sums.ratios, *(["ece"] if sums.bins.any() else []))}
    for drawn in bootstrap_draws(len(sums.words), num_bootstrap, seed):
        for name, values in samples.items():
            values.append(sums.resampled(name, drawn))
    return {name: _percentiles(values) for name, values in samples.items() if values}


def compare(
    rows: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    *,
    metric: str = "wer",
    language: str | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    How much higher `metric` is on `rows` than on `others`, which hold the same utterances (matched by "id"), with the
    paired bootstrap's 95 % interval: both sides of an utterance are drawn together, so that what makes it hard for
    both cancels.

    Returns:
        `{"difference": ..., "interval": [low, high]}`.

    Raises:
        ValueError: the rows are not of the same utterances, or have no such metric.
    """
    sides = [{str(row["id"]): row for row in side} for side in (rows, others)]
    if not sides[0] or sides[0].keys() != sides[1].keys() or not len(rows) == len(others) == len(sides[0]):
        raise ValueError("`rows` and `others` must have the same ids, each once. Run both on the same data.")
    ids = sorted(sides[0])
    first, second = (_Sums([side[one] for one in ids], language) for side in sides)
    if metric not in (known := first.ratios.keys() & second.ratios.keys()):
        raise ValueError(f"`metric` {metric!r} is not one of {sorted(known)}.")

    def difference(drawn: np.ndarray) -> np.ndarray:
        return first.resampled(metric, drawn) - second.resampled(metric, drawn)

    (value,) = difference(np.ones((1, len(ids))))
    samples = [difference(drawn) for drawn in bootstrap_draws(len(ids), num_bootstrap, seed)]
    return {
        "difference": round(float(value), 2) if math.isfinite(value) else None,
        "interval": _percentiles(samples) if samples else None,
    }


def _find_file(path: Path) -> Path | None:
    """The hypotheses.jsonl of a folder, which may be gzipped, or the file itself."""
    places = [path, path / HYPOTHESES_NAME, path / f"{HYPOTHESES_NAME}.gz"]
    return next((place for place in places if place.is_file()), None)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """
    The rows of a hypotheses.jsonl, or of the one in a folder; gzipped ones end in .gz.

    Raises:
        ValueError: there is none, or a line is not one of its rows.
    """
    file = _find_file(Path(path))
    if file is None:
        raise ValueError(f"{str(path)!r} is neither a {HYPOTHESES_NAME} nor a folder with one. Check the path.")
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = []
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if line.strip():
            row = parse_line(line, f"{file} line {number}")
            if missing := [key for key in NEEDED_KEYS if key not in row]:
                raise ValueError(f"{file} line {number} has no {missing[0]!r}. Check that it is a {HYPOTHESES_NAME}.")
            rows.append(row)
    return rows


def find_results(path: str | Path) -> dict[str, Path]:
    """Name -> file of every hypotheses.jsonl: `path` itself, the one in the folder, or those in its subfolders."""
    path = Path(path)
    if path.is_file():
        return {path.parent.name or path.name: path}
    if file := _find_file(path):
        return {path.resolve().name: file}
    files = sorted(path.rglob(f"{HYPOTHESES_NAME}*"))
    found = {file.parent.relative_to(path).as_posix(): file for file in files if file == _find_file(file.parent)}
    if not found:
        raise ValueError(f"{str(path)!r} holds no {HYPOTHESES_NAME}. Check the path.")
    return found
