#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a shrunk vocabulary of a Whisper donor costs: of every tenth sentence, which the choice of ids has not seen, the
share of the donor's tokens that are kept, and how many tokens a sentence is written with beside the donor's.

    python training/compare_vocabularies.py --donor WHISPER_TINY_EN --text sentences.txt.gz --output vocabularies.json
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from mdm_asr_hf.convert_whisper import whisper_tokenizer
from mdm_asr_hf.sources_mdm_asr import read_sentences

MEASURED_EVERY = 10


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", required=True, help="a Whisper checkpoint, folder or id")
    parser.add_argument("--text", required=True, type=Path, help="sentences, .txt or .txt.gz")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8192, 16384, 32768])
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args(argv)
    sentences = read_sentences(options.text, "--text")
    measured = [f" {sentence}" for sentence in sentences[::MEASURED_EVERY]]
    rest = [sentence for i, sentence in enumerate(sentences) if i % MEASURED_EVERY]
    whole, _ = whisper_tokenizer(options.donor)
    tokens = [token for ids in whole(measured).input_ids for token in ids]
    rows = []
    for size in options.sizes:
        for kept, text in (("first", None), ("most used", rest)):
            tokenizer, donor_ids = whisper_tokenizer(options.donor, size, text)
            ids = set(donor_ids[:size])
            written = sum(map(len, tokenizer(measured).input_ids))
            rows.append(
                {
                    "vocab_size": size,
                    "kept": kept,
                    "tokens_kept_percent": round(100 * sum(token in ids for token in tokens) / len(tokens), 2),
                    "more_tokens_percent": round(100 * (written / len(tokens) - 1), 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    command = shlex.join(["python", "training/compare_vocabularies.py", *argv])
    result = {"command": command, "num_sentences": len(measured), "num_tokens": len(tokens), "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
