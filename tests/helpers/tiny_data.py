# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders of speech and donors that the tests of evaluations and benchmarks share."""

import json
from pathlib import Path

import numpy as np
import soundfile
from canary_donors import randomize
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROOT = Path(__file__).parents[2]
RATE_HZ = 16_000


def write_metadata(folder, entries, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_data(folder, seconds, texts=None, prefix=""):
    """A folder of noises with a text each, "word 0" and so on unless told."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, texts = np.random.default_rng(0), texts or [f"word {i}" for i in range(len(seconds))]
    for i, duration_s in enumerate(seconds):
        path = folder / f"{prefix}{i}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(round(duration_s * RATE_HZ)), RATE_HZ)
    write_metadata(folder, [{"file_name": f"{prefix}{i}.wav", "text": text} for i, text in enumerate(texts)])
    return folder


def save_model(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def byte_tokenizer(size=None):
    """A Whisper's that writes bytes; with a `size`, other tokens fill it up to as many texts."""
    vocab = {character: i for i, character in enumerate(bytes_to_unicode().values())}
    vocab |= {f"{i:x}" * 9: i for i in range(len(vocab), size or 0)}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    names = ("startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    specials = [*(f"<|{name}|>" for name in names), "<|a|>", "<|b|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def save_donor(folder):
    """An English Whisper for clips of up to 30 s, which writes bytes and stops after 12 tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 24))}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 32}
    ids = {"pad_token_id": eos, "bos_token_id": eos, "eos_token_id": eos, "decoder_start_token_id": eos + 1}
    config = WhisperConfig(vocab_size=eos + 17, num_mel_bins=80, d_model=16, **sizes, **ids)
    model = randomize(WhisperForConditionalGeneration(config))
    suppressed = {"suppress_tokens": list(range(eos + 1, eos + 17)), "begin_suppress_tokens": [eos]}
    model.generation_config = GenerationConfig(
        is_multilingual=False, max_length=12, no_timestamps_token_id=eos + 10, **suppressed, **ids
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder
