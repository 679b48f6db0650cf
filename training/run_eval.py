#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures a checkpoint on a data set, as `mdm-asr evaluate` does, with one JSON line as its output.

    python training/run_eval.py --data DATA --output OUT [--model FOLDER_OR_ID] [--gamma 0.2 ...]

DATA is an audiofolder (audio files and a metadata.jsonl with `file_name` and `text` per line), a manifest, a data set
of `datasets` or one of the paper's by name, see `mdm-asr evaluate --help`. Writes
    OUT/hypotheses.jsonl  per utterance: id, reference, hypothesis, nfe, tokens, confidences, times; nothing normalised
    OUT/metrics.json      WER, CER (%) and the other metrics, 95 % intervals, settings, versions, the command

`accelerate launch --multi_gpu --num_processes N training/run_eval.py ...` shares the utterances among processes. Both
sides go through the Whisper normaliser, the English one without its table of British and American spellings, which
comes with Whisper's tokenizers and not with transformers. `--rescore OUT` computes the metrics again, from
OUT/hypotheses.jsonl alone. RTFx is seconds of audio per second of features, encoder and decoder; reading audio files
and loading the model are not counted.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from mdm_asr_cli.evaluation import leave_processes, run_evaluation
from mdm_asr_hf.evaluate.evaluation import load_data
from mdm_asr_hf.evaluate.scoring import read_rows, score
from mdm_asr_hf.loading import DEFAULT_CHECKPOINT_NAME

SAMPLER_SETTINGS = ("sampler", "gamma", "lambda_", "max_denoising_steps", "canvas_length")
PRINTED = ("wer", "cer", "mean_nfe", "rtfx", "num_utterances")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """What metrics.json holds; with `--rescore`, its metrics and intervals that follow from the hypotheses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=f"folder or id; default: {DEFAULT_CHECKPOINT_NAME}, which comes with the package"
    )
    parser.add_argument("--data", help="folder, manifest or name")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--rescore", type=Path, metavar="OUT", help="only score OUT/hypotheses.jsonl again")
    parser.add_argument("--split", help="of the data; default: test, where it has splits")
    parser.add_argument("--text-column", help="of the transcripts; default: text")
    parser.add_argument("--language", help="of the speech, such as de; default: en")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--sampler")
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--lambda", type=float, dest="lambda_")
    parser.add_argument("--steps", type=int, dest="max_denoising_steps")
    parser.add_argument("--canvas-length", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--batch-1-rows", type=int, default=0, help="utterances to measure the speed of batch size 1 on"
    )
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the random and DFM samplers")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args(arguments)
    if args.rescore:
        result = score(read_rows(args.rescore))
        print(json.dumps(result["metrics"]))
        return result
    if not (args.data and args.output):
        parser.error("--data and --output are needed")

    data_settings = {name: getattr(args, name) for name in ("split", "text_column", "language", "limit")}
    data = load_data(args.data, **data_settings)
    try:
        results = run_evaluation(
            {data.name: data},
            args.output,
            model=args.model,
            language=args.language,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            seed=args.seed,
            batch_1_rows=args.batch_1_rows,
            trust_remote_code=args.trust_remote_code,
            command=shlex.join(
                ["python", "training/run_eval.py", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            **{name: getattr(args, name) for name in SAMPLER_SETTINGS},
        )
    finally:
        leave_processes()
    if not results:  # All processes but the first.
        return {}
    result = results[data.name]
    print(json.dumps({name: result["metrics"][name] for name in PRINTED}))
    return result


if __name__ == "__main__":
    main()
