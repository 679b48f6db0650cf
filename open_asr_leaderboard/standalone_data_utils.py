# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What run_eval.py needs of the leaderboard's `normalizer.data_utils`, under the same names, for where that is not.

The normaliser lacks the leaderboard's tables of spellings and abbreviations. The manifests are the same, so that its
`score_results` gives the leaderboard's own WER of them.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from mdm_asr_hf.evaluate.scoring import normaliser

TEXT_COLUMNS = ("text", "sentence", "normalized_text", "transcript", "transcription")
ID_COLUMNS = ("id", "file_name")
CHUNKED_DATASETS = ("artificialanalysis/earnings22-cleaned-aa-chunked",)
IGNORED = "ignore time segment in scoring"

normalizer = normaliser("en")


def load_data(args: Any) -> Dataset | IterableDataset:
    """
    The rows of `args.dataset_path`, configuration `args.dataset`, split `args.split`: a data set of the Hub, a folder
    that `datasets.load_dataset` reads, or one that `save_to_disk` wrote, or that holds one such per configuration.

    Raises:
        ValueError: no such data, or data that only the leaderboard's own package can put together.
    """
    if is_chunked_dataset(args.dataset_path):
        raise ValueError(
            f"`--dataset_path` {args.dataset_path!r} has one reference for many chunks; the package `normalizer` "
            "of the leaderboard puts these together. Run this script in a clone of its repository, with PYTHONPATH=.."
        )
    root = Path(args.dataset_path)
    for folder in (root / args.dataset, root):
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            data = load_from_disk(folder)
            if isinstance(data, DatasetDict):
                if args.split not in data:
                    raise ValueError(f"`--split` {args.split!r} is not in {folder}, which has {sorted(data)}.")
                data = data[args.split]
            return data
    return load_dataset(args.dataset_path, args.dataset, split=args.split, streaming=args.streaming)


def get_text(sample: dict[str, Any]) -> str:
    """The reference of a row."""
    for name in TEXT_COLUMNS:
        if name in sample:
            return sample[name]
    raise ValueError(f"The data set has none of the columns {list(TEXT_COLUMNS)}, but {sorted(sample)}.")


def is_target_text_in_range(text: str) -> bool:
    """Whether a normalised reference is to be scored."""
    return text.strip() not in ("", IGNORED)


def extract_audio_filepath_from_sample(sample: dict[str, Any]) -> str | None:
    """The name under which a row goes into the manifest."""
    for name in ID_COLUMNS:
        if str(sample.get(name) or "").strip():
            return Path(str(sample[name]).strip()).name
    return None


def is_chunked_dataset(dataset_path: str) -> bool:
    return dataset_path.lower() in CHUNKED_DATASETS


def write_manifest(
    references: list[str],
    transcriptions: list[str],
    model_id: str,
    dataset_path: str,
    dataset_name: str,
    split: str,
    audio_length: list[float],
    transcription_time: list[float],
    audio_filepaths: list[str | None],
    extra_fields: dict[str, list] | None = None,
) -> str:
    """
    Writes results/MODEL_..._DATASET_....jsonl in the current folder and returns its path. Durations and times in
    seconds.
    """
    model, path, name = (part.replace("/", "-") for part in (model_id, dataset_path, dataset_name))
    manifest = Path("results") / f"MODEL_{model}_DATASET_{path}_{name}_{split}.jsonl"
    columns = zip(audio_filepaths, audio_length, transcription_time, references, transcriptions, strict=True)
    lines = []
    for i, (file, duration, time, text, prediction) in enumerate(columns):
        row = {
            "audio_filepath": file or f"sample_{i}",
            "duration": duration,
            "time": time,
            "text": text,
            "pred_text": prediction,
            **{key: values[i] for key, values in (extra_fields or {}).items()},
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(lines), encoding="utf-8")
    return str(manifest)


def read_manifest(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def merge_chunked_manifest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as they are: data in chunks is not read here."""
    return rows
