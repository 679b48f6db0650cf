# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Writes a Whisper checkpoint as the file that whisper.cpp reads: the wheels of pywhispercpp bring no converter."""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = 0x67676D6C
# By name, what the hyperparameters call the file's kind, and what a tensor calls its own. Quantised kinds count from
# the version of the quantisation, 2, in thousands.
KINDS = {"f16": (1, 1), "q8_0": (2007, 8)}
# A block of q8_0: so many weights as int8 and their scale in f16.
BLOCK = 32
# Names of OpenAI's release for those of transformers; longer ones before those that they end with.
RENAMED = {
    "layers": "blocks",
    "self_attn_layer_norm": "attn_ln",
    "self_attn": "attn",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "encoder_attn": "cross_attn",
    "final_layer_norm": "mlp_ln",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.layer_norm": "decoder.ln",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_tokens": "token_embedding",
    "embed_positions.weight": "positional_embedding",
}


def write_ggml(donor: str, path: Path, kind: str) -> None:
    """
    Matrices become `kind`, f16 or q8_0, as whisper.cpp's own tools make them: convolutions f16, the rest float32.

    Raises:
        ValueError: whisper.cpp would not know the special tokens of the checkpoint.
    """
    import torch
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = WhisperForConditionalGeneration.from_pretrained(donor, dtype=torch.float32)
    config, eos = model.config, model.config.eos_token_id
    # The library has these ids in its code, and tells by the size of the vocabulary which ones.
    if eos != 50256 + (config.vocab_size > 51864):
        raise ValueError(f"whisper.cpp reads Whisper's own vocabularies only, not {donor!r}: pass --skip whisper.cpp.")
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = sorted(AutoTokenizer.from_pretrained(donor).get_vocab().items(), key=lambda item: item[1])
    # The special tokens get their names from the library.
    texts = [bytes(byte_of[character] for character in token) for token, index in tokens if index < eos]
    filters = AutoFeatureExtractor.from_pretrained(donor).mel_filters.T
    with path.open("wb") as file:
        _write_ints(file, MAGIC, config.vocab_size)
        for side, length in (("encoder", config.max_source_positions), ("decoder", config.max_target_positions)):
            heads, layers = (getattr(config, f"{side}_{name}") for name in ("attention_heads", "layers"))
            _write_ints(file, length, config.d_model, heads, layers)
        _write_ints(file, config.num_mel_bins, KINDS[kind][0], *filters.shape)
        file.write(filters.astype("<f4").tobytes())
        _write_ints(file, len(texts))
        for text in texts:
            _write_ints(file, len(text))
            file.write(text)
        for name, tensor in model.model.state_dict().items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            _write_tensor(file, name, tensor.numpy(), kind)


def _write_tensor(file: BinaryIO, name: str, tensor: np.ndarray, kind: str) -> None:
    if "conv" in name and tensor.ndim == 1:
        # To be added to (channels, frames).
        tensor = tensor[:, None]
    if not name.endswith("weight") or tensor.ndim == 1:
        number, data = 0, tensor.astype("<f4")
    elif tensor.ndim == 3 or kind == "f16":
        number, data = 1, tensor.astype("<f2")
    else:
        number, data = KINDS[kind][1], _quantize(tensor)
    _write_ints(file, tensor.ndim, len(name), number, *reversed(tensor.shape))
    file.write(name.encode() + data.tobytes())


def _quantize(matrix: np.ndarray) -> np.ndarray:
    """Blocks of q8_0, one row of the matrix after the other."""
    blocks = matrix.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    result = np.empty(len(blocks), dtype=[("scale", "<f2"), ("values", "i1", BLOCK)])
    result["scale"] = scales[:, 0]
    result["values"] = np.rint(blocks / np.where(scales, scales, 1))
    return result


def _write_ints(file: BinaryIO, *numbers: int) -> None:
    file.write(struct.pack(f"<{len(numbers)}i", *numbers))
