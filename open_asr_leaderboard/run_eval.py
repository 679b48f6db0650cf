#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures an MDM-ASR checkpoint as the Open ASR Leaderboard does.

    python run_eval.py --model_id FOLDER_OR_ID --dataset_path PATH --dataset NAME --split SPLIT [--device 0 ...]

Writes results/MODEL_..._DATASET_....jsonl, a line {audio_filepath, duration, time, text, pred_text} per utterance,
nothing normalised, and prints WER and RTFx. Where the leaderboard's `normalizer` package can be imported (this folder
inside a clone of its repository, `PYTHONPATH=..`), data, normaliser and manifest are its own; elsewhere those of
standalone_data_utils.py.

The time of an utterance is its share of its batch's, from samples in memory to text: features, encoder, all
evaluations of the decoder, detokenising. Reading and decoding audio files is not in it, as in the leaderboard's other
scripts.
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Audio, IterableDataset
from huggingface_hub import snapshot_download
from tqdm import tqdm

from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.loading import generation_settings, load_model

try:
    from normalizer import data_utils
except ModuleNotFoundError as error:
    # If something that the leaderboard's package needs is missing, that is to be installed, not passed over.
    if error.name != "normalizer":
        raise
    import standalone_data_utils as data_utils

SETTINGS = ("sampler", "gamma", "lambda_", "max_denoising_steps", "canvas_length")
# How far a cut may lie from where equal pieces would have it, as a share of the longest piece.
CUT_MARGIN = 0.05
CUT_WINDOW_S = 0.1


def split_clip(samples: np.ndarray, max_samples: int, sampling_rate: int) -> list[np.ndarray]:
    """
    Cuts a clip (number of samples,) that is longer than the model takes into few and about equal pieces, each cut at
    the quietest place near where it belongs. The pieces together are the clip.
    """
    if len(samples) <= max_samples:
        return [samples]
    margin = int(CUT_MARGIN * max_samples)
    window = min(int(CUT_WINDOW_S * sampling_rate), margin)
    # With both its ends at the margin, a piece is still short enough.
    num_pieces = math.ceil(len(samples) / (max_samples - 2 * margin))
    cuts = []
    for i in range(1, num_pieces):
        start = i * len(samples) // num_pieces - margin
        energy = np.cumsum(samples[start : start + 2 * margin].astype(np.float64) ** 2)
        cuts.append(start + int((energy[window:] - energy[:-window]).argmin()) + window // 2)
    return np.split(samples, cuts)


def transcribe(
    clips: list[np.ndarray], model: Any, processor: Any, settings: Any, max_pieces: int, seed: int = 0
) -> list[str]:
    """The text of each clip (number of samples,), of any length; at most `max_pieces` pieces are decoded together."""
    rate_hz = processor.feature_extractor.sampling_rate
    max_duration_s = processor.feature_extractor.max_duration_s
    max_samples = int(max_duration_s * rate_hz) if max_duration_s else max(map(len, clips), default=1)
    pieces = [(i, piece) for i, clip in enumerate(clips) for piece in split_clip(clip, max_samples, rate_hz)]
    texts: list[list[str]] = [[] for _ in clips]
    for start in range(0, len(pieces), max_pieces):
        batch = pieces[start : start + max_pieces]
        inputs = processor([piece for _, piece in batch], sampling_rate=rate_hz, return_tensors="pt")
        inputs = inputs.to(model.device, dtype=model.dtype)
        # One generator per row: what is drawn does not depend on what is in the batch.
        generators = [torch.Generator().manual_seed(seed) for _ in batch]
        output = model.generate(**inputs, generation_config=settings, generator=generators)
        for (i, _), text in zip(batch, processor.batch_decode(output.sequences), strict=True):
            texts[i].append(text.strip())
    return [" ".join(filter(None, parts)) for parts in texts]


def batches(dataset: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    rows = iter(dataset)
    while batch := list(islice(rows, size)):
        yield batch


def synchronize(device: torch.device) -> None:
    """A GPU works on after a call returns; a clock read before it is done shows nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def evaluate(dataset: Any, model: Any, processor: Any, settings: Any, batch_size: int) -> dict[str, list]:
    """Columns of the manifest, in the order of the data set; utterances whose reference is empty are left out."""
    rate_hz = processor.feature_extractor.sampling_rate
    names = ("audio_filepath", "duration", "time", "text", "pred_text", "parent_id", "chunk_index")
    columns: dict[str, list] = {name: [] for name in names}
    for batch in batches(tqdm(dataset, desc="Samples", mininterval=1), batch_size):
        texts = [data_utils.get_text(row) for row in batch]
        kept = [i for i, text in enumerate(texts) if data_utils.is_target_text_in_range(data_utils.normalizer(text))]
        if not kept:
            continue
        clips = [load_audio(batch[i]["audio"], target_sampling_rate=rate_hz) for i in kept]
        synchronize(model.device)
        start = time.perf_counter()
        predictions = transcribe(clips, model, processor, settings, batch_size)
        synchronize(model.device)
        elapsed_s = time.perf_counter() - start
        for i, clip, prediction in zip(kept, clips, predictions, strict=True):
            columns["audio_filepath"].append(data_utils.extract_audio_filepath_from_sample(batch[i]))
            columns["duration"].append(len(clip) / rate_hz)
            columns["time"].append(elapsed_s / len(kept))
            columns["text"].append(texts[i])
            columns["pred_text"].append(prediction)
            columns["parent_id"].append(batch[i].get("parent_id"))
            columns["chunk_index"].append(batch[i].get("chunk_index"))
    if not columns["text"]:
        raise ValueError("The data set has no utterance with a reference. Check `--dataset` and `--split`.")
    return columns


def first(dataset: Any, num_rows: int) -> Any:
    if isinstance(dataset, IterableDataset):
        return dataset.take(num_rows)
    return dataset.select(range(min(num_rows, len(dataset))))


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True, help="a checkpoint: folder or id")
    parser.add_argument("--revision", help="of the checkpoint: commit, branch or tag")
    parser.add_argument("--dataset_path", default="hf-audio/open-asr-leaderboard", help="default: %(default)s")
    parser.add_argument("--dataset", required=True, help="configuration of the data set, such as librispeech")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--device", type=int, default=-1, help="number of the GPU; default: -1, the CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--max_eval_samples", type=int, help="only the first ones; default and -1: all")
    parser.add_argument("--warmup_steps", type=int, default=2, help="batches before the clock runs")
    parser.add_argument(
        "--streaming", action=argparse.BooleanOptionalAction, default=False, help="read while downloading; slower"
    )
    parser.add_argument("--gamma", type=float, help="default of this and the following: the checkpoint's")
    parser.add_argument("--sampler", help="of this on: for a canvas only")
    parser.add_argument("--lambda", type=float, dest="lambda_")
    parser.add_argument("--steps", type=int, dest="max_denoising_steps")
    parser.add_argument("--canvas_length", type=int)
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {args.batch_size}")

    device = "cpu" if args.device < 0 else f"cuda:{args.device}"
    dtype = getattr(torch, args.dtype or ("float32" if args.device < 0 else "bfloat16"))
    folder = snapshot_download(args.model_id, revision=args.revision) if args.revision else args.model_id
    model, processor = load_model(folder, device)
    model = model.to(dtype)
    settings = generation_settings(model, **{name: getattr(args, name) for name in SETTINGS})
    print(f"Data and normaliser: {data_utils.__name__}")
    print(f"Model size: {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters")

    dataset = data_utils.load_data(args)
    # Decoded by this package, which also resamples, so that torchcodec is not needed.
    dataset = dataset.cast_column("audio", Audio(decode=False))
    if args.max_eval_samples is not None and args.max_eval_samples > 0:
        dataset = first(dataset, args.max_eval_samples)
    if args.warmup_steps > 0:
        evaluate(first(dataset, args.warmup_steps * args.batch_size), model, processor, settings, args.batch_size)

    columns = evaluate(dataset, model, processor, settings, args.batch_size)
    is_chunked = data_utils.is_chunked_dataset(args.dataset_path)
    path = data_utils.write_manifest(
        columns["text"],
        columns["pred_text"],
        args.model_id,
        args.dataset_path,
        args.dataset,
        args.split,
        audio_length=columns["duration"],
        transcription_time=columns["time"],
        audio_filepaths=columns["audio_filepath"],
        extra_fields={name: columns[name] for name in ("parent_id", "chunk_index")} if is_chunked else None,
    )
    print("Results saved at path:", Path(path).absolute())

    rows = data_utils.merge_chunked_manifest(data_utils.read_manifest(path))
    references = [data_utils.normalizer(row["text"]) for row in rows]
    predictions = [data_utils.normalizer(row["pred_text"]) for row in rows]
    wer = round(100 * jiwer.wer(references, predictions), 2)
    rtfx = round(sum(columns["duration"]) / sum(columns["time"]), 2)
    print("WER:", wer, "%", "RTFx:", rtfx)
    return Path(path)


if __name__ == "__main__":
    main()
