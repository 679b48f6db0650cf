#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Brings first weights, saved with Whisper's tensor names by an early experiment, into the package's own format.

    python training/import_bootstrap.py WEIGHTS_DIR WHISPER_TINY_EN_DIR src/mdm_asr_hf/checkpoints/mdm-asr-tiny-en

WEIGHTS_DIR holds model.safetensors and tokenizer.json; WHISPER_TINY_EN_DIR is openai/whisper-tiny.en in transformers
format, which gives configuration, features and tokenizer. Every tensor is checked: the model's must all be found, and
the file's must all be used.
"""

import argparse
from pathlib import Path

from make_default import save_half_precision
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mdm_asr_hf import MDMASRForConditionalGeneration
from mdm_asr_hf.convert_whisper import load_whisper_named, whisper_processor

# The experiment kept the first 16,384 ids, then end of text, start of transcript, no timestamps and the mask:
# `from_whisper`'s layout.
VOCAB_SIZE = 16384


def main(weights_dir: Path, whisper_dir: Path, output_dir: Path) -> None:
    model = MDMASRForConditionalGeneration.from_whisper(
        whisper_dir, vocab_size=VOCAB_SIZE, encoder_trailing_silence_s=0.0, shift_logits=False
    )
    processor = whisper_processor(whisper_dir, vocab_size=VOCAB_SIZE)
    own, theirs = processor.tokenizer.get_vocab(), Tokenizer.from_file(str(weights_dir / "tokenizer.json")).get_vocab()
    if {token: i for token, i in own.items() if i < VOCAB_SIZE} != {
        token: i for token, i in theirs.items() if i < VOCAB_SIZE
    }:
        raise SystemExit("the tokenizer of the weights is not the first 16,384 ids of Whisper's")

    tensors = load_file(weights_dir / "model.safetensors")
    load_whisper_named(model, {f"model.{name}": tensor for name, tensor in tensors.items()})
    save_half_precision(model, processor, output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights_dir", "whisper_dir", "output_dir"):
        parser.add_argument(name, type=Path)
    main(**vars(parser.parse_args()))
