#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures the word error rate of a checkpoint on a folder of recordings.

    python training/run_eval.py --data DIR --output OUT [--model FOLDER_OR_ID] [--gamma 0.2 ...]

DIR is an audiofolder: audio files and a metadata.jsonl with `file_name` and `text` per line. Writes
    OUT/hypotheses.jsonl  per utterance: id, reference, hypothesis, nfe, confidence, duration_s; nothing normalised
    OUT/metrics.json      WER, CER (%), mean NFE, RTFx, settings, versions, the command

Both sides go through the Whisper English normaliser, without its table of British and American spellings, which comes
with Whisper's tokenizers and not with transformers. `--rescore OUT` computes WER, CER and NFE again, from
OUT/hypotheses.jsonl alone. RTFx is seconds of audio per second of reading, features and generation, all in fp32;
loading the model is not counted.
"""

import argparse
import hashlib
import json
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jiwer
import soundfile
import torch
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from mdm_asr_hf import DEFAULT_CHECKPOINT_NAME, default_checkpoint
from mdm_asr_hf.cli import generation_settings, load_model
from mdm_asr_hf.generation_mdm_asr import utterance_confidence

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "tokenizers", "jiwer", "soundfile", "soxr")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def score(rows: list[dict[str, Any]]) -> dict[str, float | int]:
    """WER and CER in per cent and the mean NFE of the rows of a hypotheses.jsonl."""
    normalise = EnglishTextNormalizer({})
    references = [normalise(row["reference"]) for row in rows]
    hypotheses = [normalise(row["hypothesis"]) for row in rows]
    return {
        "wer": round(100 * jiwer.wer(references, hypotheses), 2),
        "cer": round(100 * jiwer.cer(references, hypotheses), 2),
        "mean_nfe": round(sum(row["nfe"] for row in rows) / len(rows), 2),
        "num_utterances": len(rows),
        "num_reference_words": sum(len(reference.split()) for reference in references),
        "audio_s": round(sum(row["duration_s"] for row in rows), 1),
    }


def transcribe_folder(model, processor, data: Path, settings, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """The rows of hypotheses.jsonl, in the order of metadata.jsonl."""
    entries = read_jsonl(data / "metadata.jsonl")
    frames_per_s = model.config.input_frames_per_s
    # Clips of similar length share a batch, so that little of it is padding.
    ordered = sorted(entries, key=lambda entry: soundfile.info(data / entry["file_name"]).duration)
    rows = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        inputs = processor([data / entry["file_name"] for entry in batch], return_tensors="pt").to(model.device)
        # One generator per row: a row of the random and DFM samplers does not depend on its batch.
        generators = [torch.Generator().manual_seed(seed) for _ in batch]
        output = model.generate(**inputs, generation_config=settings, generator=generators)
        texts, confidences = processor.batch_decode(output.sequences), utterance_confidence(output.confidence)
        for i, entry in enumerate(batch):
            rows[entry["file_name"]] = {
                "id": entry["file_name"],
                "reference": entry["text"],
                "hypothesis": texts[i],
                "nfe": int(output.nfe[i]),
                "confidence": confidences[i] and round(confidences[i], 4),
                "duration_s": round(int(inputs["attention_mask"][i].sum()) / frames_per_s, 3),
            }
        if sys.stderr.isatty():
            end = "\n" if len(rows) == len(entries) else "\r"
            print(f"{len(rows)}/{len(entries)}", end=end, file=sys.stderr, flush=True)
    return [rows[entry["file_name"]] for entry in entries]


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=f"folder or id; default: {DEFAULT_CHECKPOINT_NAME}, which comes with the package"
    )
    parser.add_argument("--data", type=Path, help="folder with metadata.jsonl")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only score OUT/hypotheses.jsonl again")
    parser.add_argument("--sampler")
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--lambda", type=float, dest="lambda_")
    parser.add_argument("--steps", type=int, dest="max_denoising_steps")
    parser.add_argument("--canvas-length", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0, help="of the random and DFM samplers")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args(arguments)
    if args.rescore:
        metrics = score(read_jsonl(args.rescore / "hypotheses.jsonl"))
        print(json.dumps(metrics))
        return metrics
    if not (args.data and args.output):
        parser.error("--data and --output are needed")

    folder = args.model or str(default_checkpoint())
    model, processor = load_model(folder, args.device, args.trust_remote_code)
    names = ("sampler", "gamma", "lambda_", "max_denoising_steps", "canvas_length")
    settings = generation_settings(model, **{name: getattr(args, name) for name in names})
    start = time.perf_counter()
    rows = transcribe_folder(model, processor, args.data, settings, args.batch_size, args.seed)
    wall_s = time.perf_counter() - start

    args.output.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.output / "hypotheses.jsonl").write_text(lines, encoding="utf-8")
    metrics = score(read_jsonl(args.output / "hypotheses.jsonl"))
    metrics |= {
        "rtfx": round(metrics["audio_s"] / wall_s, 2),
        "wall_s": round(wall_s, 3),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "num_threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "seed": args.seed,
        "sampler": settings.sampler,
        "max_denoising_steps": settings.max_denoising_steps,
        "canvas": {k: getattr(settings, k) for k in ("canvas_length", "canvas_tokens_per_s", "canvas_extra_tokens")},
        "normaliser": "transformers EnglishTextNormalizer({}), no spelling table",
        "model": args.model or DEFAULT_CHECKPOINT_NAME,
        "model_sha256": sha256(Path(folder) / "model.safetensors"),
        "data_sha256": sha256(args.data / "metadata.jsonl"),
        "command": shlex.join(["python", "training/run_eval.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    (args.output / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({k: metrics[k] for k in ("wer", "cer", "mean_nfe", "rtfx", "num_utterances")}))
    return metrics


if __name__ == "__main__":
    main()
