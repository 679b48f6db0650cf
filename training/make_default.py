#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Makes the default checkpoint anew, in one command: synthesises speech on the spare cores while it trains with
configs/default.yaml, measures the result beside the checkpoint that comes with the package, and says whether it is
better on every set.

    python training/make_default.py --donor WHISPER_TINY_EN --tts my_tts.py:synth --text sentences.txt.gz \
        --recordings DIR --eval DIR1 DIR2 --minutes 25 --output OUT [-- SETTINGS OF run_train.py]

Writes, and with the same command goes on where it stopped:

    OUT/synthetic, OUT/recordings   the training speech, as FLAC, which is read several times as fast as Opus
    OUT/run                         checkpoints, the trained model in fp32, results.json
    OUT/checkpoint                  the model to ship, in half precision
    OUT/eval/SET/{new,shipped}      hypotheses and metrics of both
    OUT/comparison.json             WER of both on every set

`--ship` puts OUT/checkpoint in the package's place if its WER is lower on every set, with its results in
model_cards/results; then describe it in model_cards/mdm-asr-tiny-en.yaml and make its card.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
import torch

from mdm_asr_hf import (
    DEFAULT_CHECKPOINT_NAME,
    MDMASRForConditionalGeneration,
    MDMASRProcessor,
    default_checkpoint,
)
from mdm_asr_hf.sources_mdm_asr import Source, load_utterances

# From here, where that is inside the repository: commands are recorded in the results.
HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
CONFIG = HERE / "configs" / "default.yaml"
RESULTS = HERE.parent / "model_cards" / "results" / DEFAULT_CHECKPOINT_NAME
# Share of real recordings in training.
RECORDINGS_WEIGHT = 0.25


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", required=True, help="openai/whisper-tiny.en, or a folder of it")
    parser.add_argument("--tts", required=True, help="of synthesize.py: module:function or path/to/file.py:function")
    parser.add_argument("--text", required=True, type=Path, help="of synthesize.py: sentences")
    parser.add_argument("--recordings", required=True, type=Path, help="folder or manifest of real speech")
    parser.add_argument("--eval", required=True, type=Path, nargs="+", help="folders of real speech to measure on")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=25.0, help="of training, without synthesis before and tests")
    parser.add_argument("--hours", type=float, default=130.0, help="of synthetic speech at most")
    parser.add_argument("--first-hours", type=float, default=0.1, help="of synthetic speech before training starts")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="of synthesis")
    parser.add_argument("--steps", type=int, nargs="+", default=[32], help="bounds of denoising steps to measure at")
    parser.add_argument("--ship", action="store_true")
    argv = sys.argv[1:] if argv is None else argv
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    options = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    missing = [folder for folder in options.eval if not (folder / "metadata.jsonl").is_file()]
    if missing or len({folder.name for folder in options.eval}) < len(options.eval):
        parser.error(f"--eval needs folders with metadata.jsonl and names of their own; not so: {missing or 'names'}")

    options.output.mkdir(parents=True, exist_ok=True)
    recordings = to_flac(options.recordings, options.output / "recordings")
    synthesis = start_synthesis(options)
    try:
        wait_for_speech(options.output / "synthetic", options.first_hours * 3600, synthesis)
        sources = [
            {"path": str(options.output / "synthetic"), "weight": 1 - RECORDINGS_WEIGHT, "growing": True},
            {"path": str(recordings), "weight": RECORDINGS_WEIGHT},
        ]
        run = [sys.executable, str(HERE / "run_train.py"), str(CONFIG), "--donor", options.donor]
        run += ["--output_dir", str(options.output / "run"), "--max_minutes", str(options.minutes)]
        subprocess.run([*run, "--train_sources", *map(json.dumps, sources), *more], check=True)
    finally:
        # It writes its totals before it goes.
        synthesis.send_signal(signal.SIGTERM)
        synthesis.wait()
    model = MDMASRForConditionalGeneration.from_pretrained(options.output / "run")
    processor = MDMASRProcessor.from_pretrained(options.output / "run")
    save_half_precision(model, processor, options.output / "checkpoint")
    comparison = compare(options)
    return ship(options, comparison) if options.ship else 0


def to_flac(source: Path, output: Path) -> Path:
    """Copies recordings to a folder of FLAC files with metadata.jsonl, once."""
    done = output / "metadata.jsonl"
    if done.is_file():
        return output
    rows = load_utterances(Source.of(str(source)), on_bad_row="skip").rows
    (output / "audio").mkdir(parents=True, exist_ok=True)

    def copy(numbered: tuple[int, dict]) -> str:
        number, row = numbered
        name = f"audio/{number:06d}.flac"
        samples, rate = soundfile.read(row["audio"], dtype="float32")
        soundfile.write(output / name, samples, rate, subtype="PCM_16")
        kept = {key: row[key] for key in ("text", "duration_s", "language", "speaker") if row.get(key) is not None}
        return json.dumps({"file_name": name, **kept}, ensure_ascii=False)

    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(copy, enumerate(rows)))
    done.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output


def start_synthesis(options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "synthesize.py"), "--tts", options.tts, "--text", str(options.text)]
    command += ["--output", str(options.output / "synthetic"), "--hours", str(options.hours)]
    command += ["--processes", str(options.processes), "--report-every-s", "60"]
    # Training's workers come first: what they wait for, the GPU waits for.
    niceness = {"preexec_fn": lambda: os.nice(5)} if hasattr(os, "nice") else {}
    return subprocess.Popen(command, **niceness)


def wait_for_speech(folder: Path, seconds: float, synthesis: subprocess.Popen) -> None:
    while True:
        lines = [line for file in folder.glob("shard-*/metadata.jsonl") for line in file.read_bytes().splitlines(True)]
        have_s = sum(json.loads(line)["duration_s"] for line in lines if line.endswith(b"\n"))
        if have_s >= seconds or (synthesis.poll() == 0 and have_s > 0):
            return
        if synthesis.poll() is not None:
            raise SystemExit(f"synthesis ended with status {synthesis.returncode}, see above")
        time.sleep(0.5)


def save_half_precision(model: MDMASRForConditionalGeneration, processor: MDMASRProcessor, output: Path) -> None:
    """Half the size to ship; config.json still says fp32, since on a CPU half precision is slower."""
    model.to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)
    config_file = output / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    for name in ("encoder_config", "decoder_config"):
        config[name].pop("dtype", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def compare(options: argparse.Namespace) -> list[dict]:
    """Measures the new checkpoint and the package's on every set."""
    rows = []
    for folder in options.eval:
        for steps in options.steps:
            row = {"set": folder.name, "steps": steps}
            for name, model in (("new", options.output / "checkpoint"), ("shipped", default_checkpoint())):
                output = options.output / "eval" / f"{folder.name}-steps{steps}" / name
                command = [sys.executable, str(HERE / "run_eval.py"), "--model", str(model), "--data", str(folder)]
                command += ["--steps", str(steps), "--output", str(output)]
                subprocess.run(command, check=True)
                row[name] = json.loads((output / "metrics.json").read_text())["metrics"]["wer"]
            rows.append(row)
            print(f"{row['set']}, at most {steps} steps: WER {row['new']} %, shipped {row['shipped']} %", flush=True)
    (options.output / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def ship(options: argparse.Namespace, comparison: list[dict]) -> int:
    worse = [row for row in comparison if row["new"] >= row["shipped"]]
    if worse:
        print(f"not shipped: it is no better on {', '.join(row['set'] for row in worse)}", file=sys.stderr)
        return 1
    target = default_checkpoint()
    for file in (options.output / "checkpoint").iterdir():
        shutil.copy(file, target / file.name)
    for folder in (options.output / "eval").iterdir():
        shutil.copytree(folder / "new", RESULTS / folder.name, dirs_exist_ok=True)
    print(f"shipped to {target}; now describe it in model_cards/{DEFAULT_CHECKPOINT_NAME}.yaml and make its card")
    return 0


if __name__ == "__main__":
    sys.exit(main())
