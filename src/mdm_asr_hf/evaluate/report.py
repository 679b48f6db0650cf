# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The error analysis of an evaluation folder: one HTML file to look at, without network."""

import base64
import hashlib
import json
import math
import os
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from transformers.utils import logging

from .scoring import METRICS_NAME, align, read_rows, score
from .steps import SCRIPT, STYLE, lay_out

logger = logging.get_logger(__name__)

_TEMPLATE = Path(__file__).with_name("report_template.html")

# What browsers play. A row's `audio` comes from a file that others may have written, and must not bring any other file
# into a report that is handed on.
_AUDIO_TYPES = {
    ".flac": "audio/flac",
    ".m4a": "audio/mp4",
    ".mp3": "audio/mpeg",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".wav": "audio/wav",
    ".webm": "audio/webm",
}
_MAX_EMBEDDED_MIB = 100

# Key in metrics.json, label, unit, and what it says, in the order of the report's head.
_METRICS = (
    ("wer", "WER", "%", "word error rate, both sides normalised"),
    ("cer", "CER", "%", "character error rate, both sides normalised"),
    ("wer_raw", "WER, raw", "%", "word error rate of the texts as they are"),
    ("cer_raw", "CER, raw", "%", "character error rate of the texts as they are"),
    ("mean_nfe", "mean NFE", "", "decoder evaluations per utterance"),
    ("tokens_per_nfe", "tokens per NFE", "", "tokens committed per decoder evaluation"),
    ("acceptance_rate_masks", "masks right", "%", "drafts of the masks that were as the donor's text"),
    ("acceptance_rate_hypothesis", "hypothesis right", "%", "tokens of a given hypothesis that were as the donor's"),
    ("rtfx", "RTFx", "", "seconds of audio per second of features, encoder and decoder"),
    ("rtfx_encoder", "RTFx, encoder", "", "seconds of audio per second of the encoder"),
    ("rtfx_decoder", "RTFx, decoder", "", "seconds of audio per second of the decoder"),
    ("ece", "ECE", "%", "expected calibration error of the words' confidences, 0 is best"),
    ("empty_rate", "empty texts", "%", "utterances with words whose hypothesis has none"),
    ("repetition_rate", "repetitions", "%", "utterances whose hypothesis repeats itself"),
    ("num_loops", "loops", "", "utterances whose hypothesis says a phrase three times in a row or more"),
    ("num_utterances", "utterances", "", "rows of hypotheses.jsonl"),
    ("num_reference_words", "reference words", "", "after normalising"),
    ("audio_s", "audio", "s", "seconds of audio"),
    ("peak_memory_mib", "peak memory", "MiB", "of the process that ran the model"),
)


def make_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    audio_root: str | Path | None = None,
    embed_audio: bool = False,
) -> Path:
    """
    Writes the error analysis of an evaluation as one HTML file: the metrics, WER by duration, calibration, the most
    frequent errors, and the utterances, worst first, with aligned words, audio and their decoding step by step: the
    canvas, or the donor's text with the drafts that it accepted and struck.

    Args:
        folder: what `mdm-asr evaluate` wrote: hypotheses.jsonl and, if it is there, metrics.json.
        output: the file to write; default: report.html in `folder`.
        audio_root: where the rows' `audio` (or, without it, their `id`) is looked for. Default: the folders of the
            data that metrics.json names, then `folder`. Players are made for the files that are found.
        embed_audio: put the audio into the file, at most 100 MiB in all. Default: links relative to `output`.

    Returns:
        The path of the file.

    Raises:
        ValueError: no rows, `audio_root` is no folder, too much audio to embed.
        OSError: a file cannot be read or written.
    """
    folder = Path(folder)
    root = folder if folder.is_dir() else folder.parent
    output = root / "report.html" if output is None else Path(output)
    if audio_root is not None and not Path(audio_root).is_dir():
        raise ValueError(f"`audio_root` {str(audio_root)!r} is not a folder. Name the one the audio lies in.")
    rows = read_rows(folder)
    if not rows:
        raise ValueError(f"`folder` {str(folder)!r} has no rows in its hypotheses.jsonl. Evaluate again.")

    record = _read_record(root / METRICS_NAME, rows)
    utterances = [_utterance(number, row) for number, row in enumerate(rows, start=1)]
    _add_audio(utterances, rows, record, root, output.parent, audio_root, embed_audio)
    utterances.sort(key=lambda one: (-one["wer"], -one["errors"], one["number"]))
    decodings = {one["number"]: steps for one in utterances if (steps := lay_out(rows[one["number"] - 1]))}
    for one in utterances:
        one["num_steps"] = decodings[one["number"]]["steps"] if one["number"] in decodings else None

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": _format_number, "csp_hash": _csp_hash, "script_json": _script_json}
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=" · ".join([str(record.get("model") or root.name), *_dataset_names(rows, record)]),
        cards=_cards(record),
        details=_details(record),
        command=record.get("command"),
        normaliser=record.get("normaliser"),
        by_duration=record["metrics"].get("by_duration") or [],
        reliability=[entry for entry in record["metrics"].get("reliability") or [] if entry["count"]],
        reliability_unit=record["metrics"].get("reliability_unit"),
        frequent=_frequent_errors(utterances),
        utterances=utterances,
        num_audio=sum(utterance["audio"] is not None for utterance in utterances),
        decodings=decodings,
        steps_script=Markup(SCRIPT),
        steps_style=Markup(STYLE),
        has_canvases=any("items" not in decoding for decoding in decodings.values()),
        has_drafts=any("items" in decoding for decoding in decodings.values()),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    # Names of files need not be UTF-8.
    output.write_text(html, encoding="utf-8", errors="backslashreplace")
    return output


def _read_record(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """metrics.json; where there is none, or one without parts, what follows from the rows themselves."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Remove it, and the metrics are computed again.") from error
    if not isinstance(record, dict) or not isinstance(record.get("metrics", {}), dict):
        raise ValueError(f"{path} is not of `mdm-asr evaluate`. Remove it, and the metrics are computed again.")
    record["data"] = [entry for entry in record.get("data") or [] if isinstance(entry, dict)]
    return record if "metrics" in record else {**record, **score(rows)}


def _utterance(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """What the report shows of one row: aligned words, counts of errors, and the row's own figures."""
    pairs = [
        (op, *words)
        for op, reference, hypothesis in align(row["reference"], row["hypothesis"], row.get("language"))
        for words in zip_longest(reference, hypothesis)
    ]
    counts = Counter(op for op, *_ in pairs)
    num_words = sum(reference is not None for _, reference, _ in pairs)
    errors = len(pairs) - counts["equal"]
    # Words said where there are none to say: a WER without a bound.
    wer = 100 * errors / num_words if num_words else (math.inf if errors else 0.0)
    kinds = {
        "wrong": errors > 0,
        "empty": num_words > 0 and not any(hypothesis for *_, hypothesis in pairs),
        "full": bool(row.get("is_full")),
    }
    shown = ("reference", "hypothesis", "dataset", "language", "duration_s", "nfe", "confidence")
    accepted, rejected = row.get("accepted_drafts") or {}, row.get("rejected_drafts") or {}
    return {
        **{name: row.get(name) for name in shown},
        # Of each branch, how many of its drafts were right, and how many there were.
        "drafts": [(name, count, count + rejected[name]) for name, count in accepted.items()],
        "id": row.get("id", f"row {number}"),
        "number": number,
        "pairs": pairs,
        "counts": {op: counts[op] for op in ("substitute", "delete", "insert")},
        "errors": errors,
        "num_words": num_words,
        "wer": wer,
        "kinds": [kind for kind, holds in kinds.items() if holds],
        "audio": None,
    }


def _add_audio(
    utterances: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    record: dict[str, Any],
    root: Path,
    output_folder: Path,
    audio_root: str | Path | None,
    embed: bool,
) -> None:
    """Sets the source of each utterance's player, where its file is found."""
    data = {entry.get("name"): entry.get("path") for entry in record["data"]}
    found: list[tuple[dict[str, Any], Path]] = []
    for utterance, row in zip(utterances, rows, strict=True):
        name, dataset = str(row.get("audio") or row.get("id")), row.get("dataset")
        if Path(name).suffix.lower() not in _AUDIO_TYPES:
            continue
        # The data may be named by its manifest.
        given = Path(data.get(dataset) or root)
        places = [given.parent if given.is_file() else given, root]
        if audio_root is not None:
            places = [Path(audio_root), Path(audio_root, dataset or "")]
        # Joining an absolute path drops what is before it.
        path = next((Path(place, name) for place in places if Path(place, name).is_file()), None)
        if path is not None:
            found.append((utterance, path))
    if audio_root is not None and not found:
        logger.warning(f"None of the rows' audio files is in `audio_root` {str(audio_root)!r}: no players were made.")
    size_mib = sum(path.stat().st_size for _, path in found) / 2**20
    if embed and size_mib > _MAX_EMBEDDED_MIB:
        raise ValueError(
            f"`embed_audio` would put {size_mib:.0f} MiB of audio into one file, more than {_MAX_EMBEDDED_MIB}. Leave "
            "it out, so that the report links the files, or report on fewer rows."
        )
    for utterance, path in found:
        if embed:
            content = base64.b64encode(path.read_bytes()).decode("ascii")
            utterance["audio"] = f"data:{_AUDIO_TYPES[path.suffix.lower()]};base64,{content}"
        else:
            # Both ends resolved, or a link among the folders would make the way between them wrong.
            relative = os.path.relpath(path.parent.resolve() / path.name, output_folder.resolve())
            utterance["audio"] = quote(os.fsencode(Path(relative).as_posix()))


def _dataset_names(rows: list[dict[str, Any]], record: dict[str, Any]) -> list[str]:
    names = [entry.get("name") for entry in record["data"]]
    return list(dict.fromkeys(str(name) for name in names or [row.get("dataset") for row in rows] if name))


def _cards(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics at the head of the report: label, value, unit, interval and meaning."""
    metrics, intervals = record["metrics"], record.get("intervals") or {}
    one = (metrics.get("rtfx_batch_1") or {}).get("rtfx")
    if metrics.get("audio_s") is not None:
        metrics = metrics | {"audio_s": round(metrics["audio_s"])}
    shown = [(metrics.get(name), *rest, intervals.get(name)) for name, *rest in _METRICS]
    shown.append((one, "RTFx, batch 1", "", "RTFx of single utterances, measured on a part", None))
    keys = ("value", "label", "unit", "meaning", "interval")
    return [dict(zip(keys, values, strict=True)) for values in shown if values[0] is not None]


def _details(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything else of metrics.json as lines of name and value, nested settings with dots between their names."""

    def lines(name: str, value: Any) -> list[tuple[str, str]]:
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            return [line for key, item in value.items() for line in lines(f"{name}.{key}", item)]
        return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]

    skipped = ("metrics", "intervals", "command")
    shown = {name: value for name, value in record.items() if name not in skipped and value != []}
    return [line for name, value in shown.items() for line in lines(name, value)]


def _frequent_errors(utterances: list[dict[str, Any]], num_shown: int = 12) -> dict[str, list[tuple]]:
    """Of each kind of error the most frequent ones, as (reference word, hypothesis word, count)."""
    counts = Counter(pair for utterance in utterances for pair in utterance["pairs"])
    return {
        kind: [(ref, hyp, count) for (op, ref, hyp), count in counts.most_common() if op == kind][:num_shown]
        for kind in ("substitute", "delete", "insert")
    }


def _format_number(value: float | None, digits: int = 2) -> str:
    """An integer as it is, others with `digits` decimals, thousands apart; "∞" and "–" for what is no number."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _csp_hash(script: str) -> str:
    """The script's entry in a Content-Security-Policy: no other script in the file runs, whatever its texts hold."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode("utf-8")).digest()).decode("ascii")


def _script_json(value: Any) -> Markup:
    """JSON for a script element, which `</script>` or `<!--` in a text must not end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
