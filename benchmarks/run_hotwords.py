#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures hotwords as the literature on contextual biasing does (arXiv 2104.02194): each utterance gets a list of the
rare words of its own reference and of distractors, rare words of other utterances.

    python benchmarks/run_hotwords.py --data DIR [DIR ...] --texts sentences.txt.gz --output OUT
    python benchmarks/run_hotwords.py --rescore OUT

Rare are words outside the `--common` most frequent ones of `--texts`, of four letters or more. The lists are
    own+N   the utterance's rare words and N distractors,
    none+N  N distractors alone: nothing of the list was said, so that everything it changes is harm or chance.
Writes
    OUT/raw.jsonl     the run; each utterance's rare words and distractors; per setting and list every hypothesis
    OUT/results.json  from raw.jsonl alone, as `--rescore OUT` makes it again
    OUT/results.md    the same as a table
B-WER is of the reference words on the list and of its words put in, U-WER of all others. Recall is the share of the
list's words said that were recognised, precision the share of those recognised that were said. Differences are to the
same utterances without hotwords, with the paired bootstrap's 95 % interval.
"""

import argparse
import copy
import json
import platform
import random
import re
import shlex
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "tokenizers", "numpy", "jiwer")
MIN_LETTERS = 4


def common_words(path: Path, number: int) -> set[str]:
    """The most frequent words of a text file, which may be gzipped."""
    from mdm_asr_hf.data.sources import read_sentences

    counts: Counter[str] = Counter()
    for sentence in read_sentences(path, "--texts"):
        counts.update(re.findall(r"[a-z]+", sentence.lower()))
    # Equally frequent ones in the order of the alphabet, so that the set does not depend on the file's order.
    return set(sorted(counts, key=lambda word: (-counts[word], word))[:number])


def make_lists(texts: dict[str, str], common: set[str], num_distractors: int, seed: int) -> dict[str, dict[str, list]]:
    """
    Id -> {"own": rare words of the (normalised) text, "distractors": rare words of others, in random order}.

    Raises:
        ValueError: all texts together have too few rare words.
    """
    words = {one_id: set(text.split()) for one_id, text in texts.items()}
    own = {
        one_id: sorted(w for w in said if w.isalpha() and len(w) >= MIN_LETTERS and w not in common)
        for one_id, said in words.items()
    }
    pool = sorted({word for its_words in own.values() for word in its_words})
    lists = {}
    for one_id in texts:
        others = [word for word in pool if word not in words[one_id]]
        if len(others) < num_distractors:
            raise ValueError(
                f"`--distractors` asks for {num_distractors} rare words of other utterances, but there are "
                f"{len(others)}. Add data or set a smaller number."
            )
        drawn = random.Random(f"{seed} {one_id}").sample(others, num_distractors)
        lists[one_id] = {"own": own[one_id], "distractors": drawn}
    return lists


def take(lists: dict[str, list[str]], name: str) -> list[str]:
    """The words of a list such as "own+50"."""
    kind, _, number = name.partition("+")
    return (lists["own"] if kind == "own" else []) + lists["distractors"][: int(number)]


def biased_counts(rows: list[dict[str, Any]], lists: list[set[str]]) -> dict[str, float | int | None]:
    """U-WER, B-WER, recall and precision in per cent of rows and the words their lists hold."""
    from mdm_asr_hf.evaluate.scoring import align

    said, errors = {True: 0, False: 0}, {True: 0, False: 0}
    correct = recognised = 0
    for row, words in zip(rows, lists, strict=True):
        for what, reference, hypothesis in align(row["reference"], row["hypothesis"]):
            recognised += sum(word in words for word in hypothesis)
            for word in reference:
                said[word in words] += 1
                errors[word in words] += what != "equal"
                correct += what == "equal" and word in words
            if what == "insert":
                for word in hypothesis:
                    errors[word in words] += 1

    def share(part: int, whole: int) -> float | None:
        return round(100 * part / whole, 2) if whole else None

    return {
        "u_wer": share(errors[False], said[False]),
        "b_wer": share(errors[True], said[True]),
        "recall": share(correct, said[True]),
        "precision": share(correct, recognised),
        "num_said": said[True],
        "num_recognised": recognised,
        "num_false": recognised - correct,
    }


def decode(model: Any, processor: Any, encoded: Any, words: list[list[str]] | None, settings: Any) -> list[dict]:
    """A row per utterance, in the order of the data; `words` are each one's hotwords."""
    rows: dict[int, dict[str, Any]] = {}
    for batch in encoded.batches:
        arguments: dict[str, Any] = {}
        if words is not None:
            arguments["hotword_ids"] = [processor.hotword_ids(words[i]) for i in batch.indices]
        start = time.perf_counter()
        output = model.generate(
            input_features=batch.features,
            attention_mask=batch.mask,
            encoder_outputs=model.prepare_cross_attention(batch.encoder_outputs),
            generation_config=settings,
            return_dict_in_generate=True,
            **arguments,
        )
        decoder_s = (time.perf_counter() - start) / len(batch.indices)
        texts = processor.batch_decode(output.sequences)
        for i, text, nfe in zip(batch.indices, texts, output.nfe.tolist(), strict=True):
            entry = encoded.data.rows[i]
            rows[i] = {
                "id": entry["id"],
                "reference": entry["text"],
                "hypothesis": text,
                "duration_s": round(entry["duration_s"], 3),
                "nfe": nfe,
                "decoder_s": round(decoder_s, 4),
            }
    return [rows[i] for i in sorted(rows)]


def measure(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    import mdm_asr_hf
    from mdm_asr_hf.evaluate.data import load_data
    from mdm_asr_hf.evaluate.evaluation import encode_dataset
    from mdm_asr_hf.evaluate.scoring import normaliser

    torch.set_num_threads(arguments.threads)
    folder = arguments.model or str(mdm_asr_hf.default_checkpoint())
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype="float32").eval()
    settings = copy.deepcopy(model.generation_config)

    common, normalise = common_words(arguments.texts, arguments.common), normaliser("en")
    chosen, texts = {}, {}
    for path in arguments.data:
        data = load_data(str(path))
        short = [i for i, row in enumerate(data.rows) if row["duration_s"] <= arguments.max_duration_s]
        random.Random(arguments.seed).shuffle(short)
        chosen[data.name] = data.select(sorted(short[: arguments.limit]))
        # Distractors come from all utterances, chosen or not.
        texts |= {f"{data.name}/{row['id']}": normalise(row["text"]) for row in data.rows}
    lists = make_lists(texts, common, max(arguments.distractors), arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}+{number}" for number in arguments.distractors for kind in arguments.lists]
    with (arguments.output / "raw.jsonl").open("w", encoding="utf-8") as file:

        def write(**record: Any) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()

        write(
            kind="run",
            command=shlex.join(["python", *sys.argv]),
            versions={name: version(name) for name in PACKAGES},
            machine=platform.machine(),
            threads=arguments.threads,
            settings=settings.to_dict(),
            common=arguments.common,
            seed=arguments.seed,
        )
        for dataset, data in chosen.items():
            encoded = encode_dataset(model, processor, data, settings=settings, batch_size=arguments.batch_size)
            its_lists = [lists[f"{dataset}/{row['id']}"] for row in data.rows]
            for row, one in zip(data.rows, its_lists, strict=True):
                write(kind="words", dataset=dataset, id=row["id"], **one)
            for name, boost in [("", 0.0), *((n, b) for n in names for b in arguments.boosts)]:
                settings.hotword_boost = boost
                words = [take(one, name) for one in its_lists] if name else None
                for row in decode(model, processor, encoded, words, settings):
                    write(kind="row", dataset=dataset, list=name, boost=boost, **row)
                print(f"{dataset}: {name or 'no hotwords'}, boost {boost:g}", flush=True)


def summarise(folder: Path) -> list[dict[str, Any]]:
    """One entry per data set, list and setting, from OUT/raw.jsonl; writes results.json and results.md."""
    from mdm_asr_hf.evaluate.scoring import compare, score

    words: dict[tuple[str, str], dict[str, list[str]]] = {}
    runs: dict[tuple[str, str, float, float], list[dict[str, Any]]] = {}
    for line in (folder / "raw.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "words":
            words[record["dataset"], record["id"]] = record
        elif record["kind"] == "row":
            key = tuple(record[name] for name in ("dataset", "list", "boost"))
            runs.setdefault(key, []).append(record)
    results = []
    for (dataset, name, boost), rows in runs.items():
        plain = runs[dataset, "", 0.0, 0.0]
        if len(rows) != len(plain):
            continue
        metrics = score(rows, num_bootstrap=0)["metrics"]
        # Without hotwords, by the words that the other runs are asked for.
        lists = [set(take(words[dataset, row["id"]], name or "own+0")) for row in rows]
        entry = {"dataset": dataset, "list": name or "no hotwords", "boost": boost}
        entry |= {"num_utterances": len(rows), "wer": metrics["wer"], "mean_nfe": metrics["mean_nfe"]}
        entry["decoder_s"] = round(sum(row["decoder_s"] for row in rows), 1)
        entry |= biased_counts(rows, lists)
        entry["num_changed"] = sum(a["hypothesis"] != b["hypothesis"] for a, b in zip(rows, plain, strict=True))
        if name:
            entry["wer_difference"] = compare(rows, plain)
        results.append(entry)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| recordings | utterances | list | boost | WER % | difference (95 %) | U-WER % | B-WER % "
        "| recall % | precision % | false | NFE |",
        "|---|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        difference = ""
        if "wer_difference" in one:
            low, high = one["wer_difference"]["interval"]
            difference = f"{one['wer_difference']['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        numbers = ("u_wer", "b_wer", "recall", "precision")
        cells = [one["dataset"], one["num_utterances"], one["list"], f"{one['boost']:g}"]
        cells += [f"{one['wer']:.2f}", difference, *("" if one[n] is None else f"{one[n]:.1f}" for n in numbers)]
        lines.append("| " + " | ".join(map(str, [*cells, one["num_false"], f"{one['mean_nfe']:.2f}"])) + " |")
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="folders with metadata.jsonl")
    parser.add_argument("--texts", type=Path, help="a text file whose frequent words are not rare")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only make the results again")
    parser.add_argument("--model", help="a checkpoint; default: the one in the package")
    parser.add_argument("--common", type=int, default=5000)
    parser.add_argument("--distractors", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--lists", nargs="+", choices=("own", "none"), default=["own", "none"])
    parser.add_argument("--boosts", type=float, nargs="+", default=[5.0])
    parser.add_argument("--limit", type=int, help="utterances per folder, drawn by seed")
    parser.add_argument("--max-duration-s", type=float, default=30.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rescore is None:
        if not (arguments.data and arguments.texts and arguments.output):
            parser.error("--data, --texts and --output are needed, or --rescore")
        try:
            measure(arguments)
        except ValueError as error:
            parser.error(str(error))
    summarise(arguments.rescore or arguments.output)


if __name__ == "__main__":
    main()
