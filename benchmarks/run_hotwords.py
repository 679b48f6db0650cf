#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures hotwords as the literature on contextual biasing does (arXiv 2104.02194): each utterance gets a list of the
rare words of its own reference and of distractors, rare words of other utterances.

    python benchmarks/run_hotwords.py --data DIR [DIR ...] --texts sentences.txt.gz --output OUT

Rare are words outside the 5,000 most frequent ones of `--texts`, of four letters or more. The lists are
    own+N   the utterance's rare words and N distractors,
    none+N  N distractors alone: nothing of the list was said, so that everything it changes is harm or chance.
B-WER is of the reference words on the list and of its words put in, U-WER of all others. Recall is the share of the
list's words said that were recognised, precision the share of those recognised that were said. Differences are to the
same utterances without hotwords, with the paired bootstrap's 95 % interval.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RATE_HZ, Row, batches, load_ours, make_parser, read_clips, run, samples, table_of

NUM_COMMON, MIN_LETTERS, MAX_DURATION_S = 5000, 4, 30.0
COLUMNS = {
    "set": "recordings",
    "num_utterances": "utterances",
    "list": "list",
    "wer": "WER %",
    "difference": "difference (95 %)",
    "u_wer": "U-WER %",
    "b_wer": "B-WER %",
    "recall": "recall %",
    "precision": "precision %",
    "num_false": "false",
    "mean_nfe": "NFE",
}


def common_words(path: Path, number: int) -> set[str]:
    """The most frequent words of a text file, which may be gzipped."""
    from mdm_asr_hf.data.sources import read_sentences

    counts: Counter[str] = Counter()
    for sentence in read_sentences(path, "--texts"):
        counts.update(re.findall(r"[a-z]+", sentence.lower()))
    # Equally frequent ones in the order of the alphabet, so that the set does not depend on the file's order.
    return set(sorted(counts, key=lambda word: (-counts[word], word))[:number])


def make_lists(texts: dict[Any, str], common: set[str], num_distractors: int, seed: int) -> dict[Any, Row]:
    """
    Key -> {"own": rare words of the (normalised) text, "distractors": rare words of others, in random order}.

    Raises:
        ValueError: all texts together have too few rare words.
    """
    words = {key: set(text.split()) for key, text in texts.items()}
    own = {
        key: sorted(word for word in said if word.isalpha() and len(word) >= MIN_LETTERS and word not in common)
        for key, said in words.items()
    }
    pool = sorted({word for its_words in own.values() for word in its_words})
    lists = {}
    for key in texts:
        others = [word for word in pool if word not in words[key]]
        if len(others) < num_distractors:
            raise ValueError(
                f"`--distractors` asks for {num_distractors} rare words of other utterances, but there are "
                f"{len(others)}. Add data or set a smaller number."
            )
        lists[key] = {"own": own[key], "distractors": random.Random(f"{seed} {key}").sample(others, num_distractors)}
    return lists


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A row per utterance and list, with the words of the list."""
    from mdm_asr_hf.evaluate.scoring import normaliser

    model, processor = load_ours(args)
    normalise, clips = normaliser("en"), [clip for folder in args.data for clip in read_clips(folder)]
    texts = {(clip["set"], clip["id"]): normalise(clip["text"]) for clip in clips}
    lists = make_lists(texts, common_words(args.texts, NUM_COMMON), max(args.distractors), args.seed)
    clips = [clip for clip in clips if clip["duration_s"] <= MAX_DURATION_S]
    for batch in batches(clips, lambda clip: clip["duration_s"], args.batch_size):
        inputs = processor([samples(clip) for clip in batch], sampling_rate=RATE_HZ)
        inputs["encoder_outputs"] = model.prepare_cross_attention(model.encode(**inputs))
        its_lists = [lists[clip["set"], clip["id"]] for clip in batch]
        names = ["", *(f"{kind}+{number}" for number in args.distractors for kind in ("own", "none"))]
        for name in names:
            words = [take(one, name) for one in its_lists]
            hotwords = {"hotword_ids": [processor.hotword_ids(one) for one in words]} if name else {}
            output = model.generate(**inputs, **hotwords, return_dict_in_generate=True)
            decoded = zip(processor.batch_decode(output.sequences), output.nfe.tolist(), strict=True)
            for clip, its_words, (text, nfe) in zip(batch, words, decoded, strict=True):
                row = {"set": clip["set"], "list": name, "id": clip["id"], "words": its_words}
                yield row | {
                    "reference": clip["text"],
                    "hypothesis": text,
                    "nfe": nfe,
                    "duration_s": clip["duration_s"],
                }


def take(lists: Row, name: str) -> list[str]:
    """The words of a list such as "own+50"; of none, the utterance's own, which the other runs are asked for."""
    kind, _, number = name.partition("+")
    return (lists["own"] if kind != "none" else []) + lists["distractors"][: int(number or 0)]


def biased_counts(rows: list[Row]) -> Row:
    """U-WER, B-WER, recall and precision in per cent of rows and the words their lists hold."""
    from mdm_asr_hf.evaluate.scoring import align

    said, errors = {True: 0, False: 0}, {True: 0, False: 0}
    correct = recognised = 0
    for row in rows:
        words = set(row["words"])
        for what, reference, hypothesis in align(row["reference"], row["hypothesis"]):
            recognised += sum(word in words for word in hypothesis)
            for word in reference:
                said[word in words] += 1
                errors[word in words] += what != "equal"
                correct += what == "equal" and word in words
            for word in hypothesis if what == "insert" else ():
                errors[word in words] += 1

    def share(part: int, whole: int) -> float | None:
        return round(100 * part / whole, 2) if whole else None

    return {
        "u_wer": share(errors[False], said[False]),
        "b_wer": share(errors[True], said[True]),
        "recall": share(correct, said[True]),
        "precision": share(correct, recognised),
        "num_false": recognised - correct,
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    """An entry per data set and list."""
    from mdm_asr_hf.evaluate.scoring import compare, score

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["list"]), []).append(row)
    results = []
    for (name, words), its in groups.items():
        metrics = score(its, num_bootstrap=0)["metrics"]
        entry = {"set": name, "list": words or "no hotwords", "num_utterances": len(its)}
        entry |= {key: metrics[key] for key in ("wer", "mean_nfe")} | biased_counts(its)
        if words:
            compared = compare(its, groups[name, ""])
            low, high = compared["interval"]
            entry["difference"] = f"{compared['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        results.append(entry)
    return {"results": results}


def to_markdown(summary: dict[str, Any]) -> str:
    return table_of(COLUMNS, summary["results"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__)
    parser.add_argument("--texts", type=Path, help="a text file whose frequent words are not rare")
    parser.add_argument("--distractors", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.texts and not args.rescore:
        parser.error("--texts is needed")
    return run(parser, args, measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
