#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Decodes data sets with and without repair, from one pass of the encoder, and compares them utterance by utterance.

    python benchmarks/run_repair.py --data DIR [DIR ...] --output OUT [--steps 32 128] [--limit N] [--settings ...]
    python benchmarks/run_repair.py --rescore OUT

A setting is a comma-separated list such as `rounds=1,doubled=0.7,doubtful=0.5`; "off" is always run. Writes
    OUT/NAME-stepsN-SETTING.jsonl  the rows of each run, as `mdm-asr evaluate` writes them
    OUT/results.json               the table, from these files alone, as `--rescore OUT` makes it again
"""

import argparse
import copy
import json
import random
import re
import shlex
import sys
from pathlib import Path
from typing import Any

OFF = "off"
NAMES = {"rounds": "repair_rounds", "doubled": "repair_doubled_below", "doubtful": "repair_doubtful_below"}


def read_setting(text: str) -> dict[str, Any]:
    """The generation settings that a name like "rounds=1,doubled=0.7" stands for."""
    if text == OFF:
        return {"repair_rounds": 0}
    settings = {"repair_rounds": 1, "repair_doubtful_below": 0.0}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in NAMES:
            raise ValueError(f"`--settings` {text!r}: {key!r} is not one of {sorted(NAMES)}.")
        settings[NAMES[key]] = int(value) if key == "rounds" else float(value)
    return settings


def run(args: argparse.Namespace, command: str) -> None:
    """Decodes all, and writes the rows."""
    import torch
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    import mdm_asr_hf
    from mdm_asr_hf.evaluation_data_mdm_asr import load_data
    from mdm_asr_hf.evaluation_mdm_asr import decode_encoded, encode_dataset

    if args.threads:
        torch.set_num_threads(args.threads)
    source = args.model or str(mdm_asr_hf.default_checkpoint())
    processor = AutoProcessor.from_pretrained(source)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(source, dtype=torch.float32).eval()
    args.output.mkdir(parents=True, exist_ok=True)
    for folder in args.data:
        data = load_data(folder)
        if args.limit and len(data) > args.limit:
            kept = sorted(random.Random(0).sample(range(len(data)), args.limit))
            data = data.select(kept)
        encoded = encode_dataset(model, processor, data, progress=True)
        for steps in args.steps:
            for name in [OFF, *args.settings]:
                settings = copy.deepcopy(model.generation_config)
                settings.max_denoising_steps = steps
                for key, value in read_setting(name).items():
                    setattr(settings, key, value)
                settings.validate()
                rows = decode_encoded(model, processor, encoded, settings, progress=True)
                file = args.output / f"{data.name}-steps{steps}-{re.sub(r'[^a-z0-9.=]+', '_', name)}.jsonl"
                head = {"dataset": data.name, "steps": steps, "setting": name, "command": command}
                lines = [json.dumps({**row, **head}, ensure_ascii=False) for row in rows]
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tabulate(folder: Path) -> dict[str, Any]:
    """The table of the rows in a folder: WER and NFE of each run, and its difference to the one without repair."""
    from mdm_asr_hf.scoring_mdm_asr import compare, normaliser, read_rows, score

    runs: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        rows = read_rows(file)
        runs[rows[0]["dataset"], rows[0]["steps"], rows[0]["setting"]] = rows
    if not runs:
        raise SystemExit(f"{str(folder)!r} holds no rows (*.jsonl).")
    normalise, table = normaliser("en"), []
    for (dataset, steps, setting), rows in sorted(runs.items()):
        off = {row["id"]: row for row in runs[dataset, steps, OFF]}
        metrics = score(rows, num_bootstrap=0)["metrics"]
        better = worse = 0
        for row in rows:
            other = off[row["id"]]
            if normalise(row["hypothesis"]) != normalise(other["hypothesis"]):
                wers = [score([one], num_bootstrap=0)["metrics"]["wer"] for one in (row, other)]
                better, worse = better + (wers[0] < wers[1]), worse + (wers[0] > wers[1])
        table.append(
            {
                "dataset": dataset,
                "steps": steps,
                "setting": setting,
                "num_utterances": len(rows),
                "wer": metrics["wer"],
                "mean_nfe": metrics["mean_nfe"],
                "repetition_rate": metrics["repetition_rate"],
                "better": better,
                "worse": worse,
                "difference": None if setting == OFF else compare(rows, list(off.values())),
            }
        )
    results = {"command": next(iter(runs.values()))[0]["command"], "table": table}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def to_markdown(results: dict[str, Any]) -> str:
    lines = [
        "| data | steps | repair | WER % | against off, 95 % interval | better | worse | mean NFE | repeating % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["table"]:
        difference = ""
        if row["difference"]:
            low, high = row["difference"]["interval"]
            difference = f"{row['difference']['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"| {row['dataset']}, {row['num_utterances']} | {row['steps']} | {row['setting']} | {row['wer']:.2f} | "
            f"{difference} | {row['better']} | {row['worse']} | {row['mean_nfe']:.2f} | {row['repetition_rate']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="folders of recordings with a metadata.jsonl")
    parser.add_argument("--output", type=Path, help="the folder to write")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only make the table of an earlier run again")
    parser.add_argument("--model", help="a checkpoint; default: the one in the package")
    parser.add_argument("--steps", nargs="+", type=int, default=[32, 128], help="bounds of denoising steps")
    parser.add_argument("--limit", type=int, help="utterances of each data set, drawn by seed")
    parser.add_argument("--settings", nargs="*", default=["rounds=1,doubled=0.7"], help="see above")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    args = parser.parse_args(arguments)
    if not args.rescore:
        if not args.data or not args.output:
            parser.error("give `--data` and `--output`, or `--rescore`.")
        for name in args.settings:
            read_setting(name)
        run(args, shlex.join(["python", "benchmarks/run_repair.py", *(arguments or sys.argv[1:])]))
    results = tabulate(args.rescore or args.output)
    print(to_markdown(results))
    return results


if __name__ == "__main__":
    main()
