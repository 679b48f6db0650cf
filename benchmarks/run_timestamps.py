#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures the word times of a checkpoint, and of Whisper by transformers on the same clips, against known ones.

    python benchmarks/run_timestamps.py DATA... [--model FOLDER_OR_ID] [--whisper FOLDER_OR_ID] --output OUT

DATA are English data sets, as `mdm-asr evaluate` takes them. Needs `pip install pocketsphinx`. References:
    aligner   word starts and ends by the forced aligner of pocketsphinx, on clips whose words its dictionary has
    checked   those of them where its first word starts, and its last one ends, where the energy of the speech does,
              to 150 and 250 ms: it loses its way in some clips, and some transcripts are not what was said
    joined    pairs of clips of up to 7 s, cut to their speech by energy and joined with silences of random lengths:
              the start of the first word of each clip and the end of its last one. Timestamps look at energy, too, so
              that this reference is easier for them than for Whisper
Only words that a system recognised count, found by aligning its text with the transcript.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from typing import Any

from common import RATE_HZ, Row, batches, load_ours, make_parser, read_clips, run, samples, table_of

LONGEST_JOINED_S = 7.0
KINDS = ("aligner", "checked", "joined")
COLUMNS = {"set": "data", "kind": "reference", "system": "system", "side": "of", "num_words": "words"}
COLUMNS |= {"median_ms": "median ms", "mean_ms": "mean ms", "p90_ms": "90 % ms", "within_50_ms": "in 50 ms"}
COLUMNS |= {"within_100_ms": "in 100 ms", "within_200_ms": "in 200 ms", "median_signed_ms": "median signed ms"}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A row per clip, system and reference: words with their times, and the known times."""
    model, processor = load_ours(args)
    speeches = [speech for path in args.data for speech in references(path, args)]
    for batch in batches(speeches, lambda speech: len(speech[2].samples), args.batch_size):
        inputs = processor([speech.samples for _, _, speech in batch], sampling_rate=RATE_HZ)
        output = model.generate(**inputs, return_token_timestamps=True, return_dict_in_generate=True)
        for i, one in enumerate(batch):
            yield row(*one, "mdm-asr", words_of(processor, output, i))
    if args.whisper:
        from transformers import pipeline

        recognise = pipeline("automatic-speech-recognition", model=args.whisper, dtype="float32")
        for one in speeches:
            found = recognise({"raw": one[2].samples, "sampling_rate": RATE_HZ}, return_timestamps="word")["chunks"]
            words = [(chunk["text"].strip(), *chunk["timestamp"]) for chunk in found]
            yield row(*one, "whisper", [word for word in words if None not in word])


def references(path: Any, args: argparse.Namespace) -> list[tuple[str, str, Any]]:
    """(data set, kind of reference, speech): aligned clips, and joined ones."""
    import numpy as np
    from timing import ForcedAligner, TimedSpeech, join_clips, speech_span

    aligner, generator = ForcedAligner(), np.random.default_rng(args.seed)
    clips = [clip for clip in read_clips(path) if len(clip["text"].split()) >= 3]
    random.Random(args.seed).shuffle(clips)
    found: list[tuple[str, str, Any]] = []
    for clip in clips:
        if len(found) == args.limit:
            break
        audio = samples(clip)
        if times_s := aligner.align(audio, clip["text"].split()):
            speech = TimedSpeech(clip["id"], audio, clip["text"], *map(list, zip(*times_s, strict=True)))
            start_s, end_s = speech_span(audio, RATE_HZ)
            agrees = abs(speech.starts_s[0] - start_s) <= 0.15 and abs(speech.ends_s[-1] - end_s) <= 0.25
            found.append((clip["set"], "checked" if agrees else "aligner", speech))
    short = [clip for clip in clips if clip["duration_s"] <= LONGEST_JOINED_S][: 2 * args.joined]
    for first, second in zip(short[::2], short[1::2], strict=False):
        ids, texts = ([clip[name] for clip in (first, second)] for name in ("id", "text"))
        joined = join_clips([samples(first), samples(second)], texts, RATE_HZ, generator, name="+".join(ids))
        found.append((first["set"], "joined", joined))
    return found


def words_of(processor: Any, output: Any, i: int) -> list[tuple[str, float, float]]:
    from mdm_asr_hf.transcribe.transcript import group_words, token_texts

    pieces = token_texts(processor.tokenizer, output.sequences[i].tolist())
    words = group_words(pieces, output.confidence[i].tolist(), output.token_timestamps[i].tolist())
    return [(word.text, word.start_s, word.end_s) for word in words]


def row(data: str, kind: str, speech: Any, system: str, words: Sequence[tuple[str, float, float]]) -> Row:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(float(value), 3)

    known = zip(speech.text.split(), map(rounded, speech.starts_s), map(rounded, speech.ends_s), strict=True)
    common = {"set": data, "id": speech.name, "kind": kind, "system": system, "known": list(known)}
    return common | {"words": [(text, rounded(start_s), rounded(end_s)) for text, start_s, end_s in words]}


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Errors of starts and ends of the recognised words whose times are known."""
    from timing import match_words

    results = []
    for name, kind, system in sorted({(row["set"], kind, row["system"]) for row in rows for kind in KINDS}):
        # A clip that was checked counts among all aligned ones, too.
        kinds = ("aligner", "checked") if kind == "aligner" else (kind,)
        errors_s: dict[str, list[float]] = {"start": [], "end": []}
        for one in rows:
            if (one["set"], one["system"]) == (name, system) and one["kind"] in kinds:
                known, words = one["known"], one["words"]
                for i, k in match_words([word for word, *_ in known], [word for word, *_ in words]):
                    for place, side in ((1, "start"), (2, "end")):
                        if known[i][place] is not None:
                            errors_s[side].append(words[k][place] - known[i][place])
        common = {"set": name, "kind": kind, "system": system}
        results += [common | {"side": side} | describe(errors) for side, errors in errors_s.items() if errors]
    return {"results": results}


def describe(errors_s: Sequence[float]) -> Row:
    """Absolute errors in ms: median, mean, 90th percentile; shares within 50, 100, 200 ms; and the median error."""
    import numpy as np

    errors_ms = 1000 * np.asarray(errors_s, dtype=np.float64)
    size = np.abs(errors_ms)
    numbers = {"median_ms": np.median(size), "mean_ms": size.mean(), "p90_ms": np.percentile(size, 90)}
    numbers |= {"median_signed_ms": np.median(errors_ms)}
    shares = {f"within_{limit}_ms": round(float((size <= limit).mean()), 4) for limit in (50, 100, 200)}
    return {"num_words": len(size), **{name: round(float(one), 1) for name, one in numbers.items()}, **shares}


def to_markdown(summary: dict[str, Any]) -> str:
    return table_of(COLUMNS, summary["results"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, data=None)
    parser.add_argument("data", nargs="*", metavar="DATA")
    parser.add_argument("--whisper", help="Whisper checkpoint with alignment heads to compare with")
    parser.add_argument("--limit", type=int, default=100, help="aligned clips per data set, drawn at random")
    parser.add_argument("--joined", type=int, default=30, help="joined recordings per data set")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return run(parser, parser.parse_args(argv), measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
