# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""NeMo's archives: reads a Canary model's `.nemo` file safely and maps its names, settings and tokenizer."""

import gzip
import math
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml

from ..tokenization_mdm_asr import MDMASRAggregateTokenizer
from .common import EMBEDDING, first_line

# This model's parameter name -> NeMo's, by substitution in this order.
NEMO_NAMES = [
    (r"^model\.encoder\.subsampling\.layers\.", "encoder.pre_encode.conv."),
    (r"^model\.encoder\.subsampling\.linear\.", "encoder.pre_encode.out."),
    (r"^model\.encoder_projection\.", "encoder_decoder_proj."),
    (r"^model\.encoder\.", "encoder."),
    (r"^(encoder\..*\.conv)\.norm\.", r"\1.batch_norm."),
    (r"^(encoder\..*\.self_attn)\.relative_k_proj\.", r"\1.linear_pos."),
    (r"^(encoder\..*\.self_attn)\.bias_([uv])$", r"\1.pos_bias_\2"),
    (r"^(encoder\..*\.self_attn)\.o_proj\.", r"\1.linear_out."),
    (r"^(encoder\..*\.self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (r"^model\.decoder\.embed_tokens\.", "transf_decoder._embedding.token_embedding."),
    (r"^model\.decoder\.embedding_layernorm\.", "transf_decoder._embedding.layer_norm."),
    (r"^model\.decoder\.layer_norm\.", "transf_decoder._decoder.final_layer_norm."),
    (r"^model\.decoder\.layers\.", "transf_decoder._decoder.layers."),
    (r"\.self_attn_layer_norm\.", ".layer_norm_1."),
    (r"\.cross_attn_layer_norm\.", ".layer_norm_2."),
    (r"\.mlp_layer_norm\.", ".layer_norm_3."),
    (r"^(transf_decoder\..*)\.self_attn\.", r"\1.first_sub_layer."),
    (r"^(transf_decoder\..*)\.cross_attn\.", r"\1.second_sub_layer."),
    *((rf"\.{name[0]}_proj\.", f".{name}_net.") for name in ("query", "key", "value")),
    (r"\.o_proj\.", ".out_projection."),
    (r"\.fc1\.", ".third_sub_layer.dense_in."),
    (r"\.fc2\.", ".third_sub_layer.dense_out."),
    (r"^proj_out\.", "log_softmax.mlp.layer0."),
]
# Buffers of a NeMo checkpoint that are computed, not learned: mel filters and window, and sinusoids.
NEMO_POSITIONS = "transf_decoder._embedding.position_embedding.pos_enc"
NEMO_BUFFERS = {"preprocessor.featurizer.fb", "preprocessor.featurizer.window", "encoder.pos_enc.pe", NEMO_POSITIONS}

# What NeMo's settings must be, because the transformers counterpart can do nothing else: first the value NeMo takes
# when the setting is absent, then those that can be converted.
NEMO_ENCODER_LIMITS = {
    "subsampling": ("striding", "dw_striding"),
    "causal_downsampling": (False, False),
    "reduction": (None, None),
    "self_attention_model": ("rel_pos", "rel_pos"),
    "att_context_size": (None, None, [[-1, -1]], [-1, -1]),
    "att_context_style": ("regular", "regular"),
    "conv_norm_type": ("batch_norm", "batch_norm"),
    "untie_biases": (True, True),
    "global_tokens": (0, 0),
}
NEMO_FRONTEND_LIMITS = {
    "window": ("hann", "hann"),
    "normalize": ("per_feature", "per_feature"),
    "log": (True, True),
    "frame_splicing": (1, 1),
    "lowfreq": (0, None, 0),
    "log_zero_guard_type": ("add", "add"),
    "log_zero_guard_value": (2**-24, 2**-24),
    "mag_power": (2.0, 2.0),
    "exact_pad": (False, False),
    "pad_value": (0, 0),
    "mel_norm": ("slaney", "slaney"),
    "use_torchaudio": (False, False),
}


def read_nemo(path: Path, prompt_formats: Collection[str], with_weights: bool) -> dict[str, Any]:
    """
    What a Canary model's `.nemo` file holds: `tokenizer`, `prompt_format` (one of those given), `frontend` (of an
    `MDMASRFeatureExtractor`), `encoder_config`, `decoder_config`, and `weights` under NeMo's names, or None.

    Raises:
        ValueError: an archive that is damaged, incomplete or could harm; a setting that cannot be converted, named.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings, files = _extract(path, Path(folder), with_weights)
        prompt_format = settings.get("prompt_format")
        if prompt_format not in list(prompt_formats):
            raise ValueError(f"The archive's `prompt_format` is {prompt_format!r}, not one of {list(prompt_formats)}.")
        tokenizer, frontend = _tokenizer(settings, files), _frontend(settings)
        return {
            "tokenizer": tokenizer,
            "prompt_format": prompt_format,
            "frontend": frontend,
            "encoder_config": _encoder_config(settings, frontend["feature_size"]),
            "decoder_config": _decoder_config(settings, len(tokenizer)),
            "weights": _read_weights(files["model_weights.ckpt"]) if with_weights else None,
        }


def _extract(path: Path, folder: Path, with_weights: bool) -> tuple[dict[str, Any], dict[str, Path]]:
    """
    Copies what is needed of a NeMo archive to `folder` and reads its settings.

    A member's path is never used as a path here: it is checked, then the content is copied under a name of ours.
    """
    needed = ("model_config.yaml", "model_weights.ckpt") if with_weights else ("model_config.yaml",)
    files: dict[str, Path] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                if name.startswith(("/", "..")) or not (member.isreg() or member.isdir()):
                    raise tarfile.TarError(f"{member.name!r} is not a plain file inside the archive")
                if member.isreg() and (name in needed or name.endswith(".model")):
                    files[name] = folder / f"member_{len(files)}"
                    with archive.extractfile(member) as source, open(files[name], "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 24)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not a NeMo archive that can be read safely: {error}.") from error
    for name in needed:
        if name not in files:
            raise ValueError(f"{str(path)!r} lacks {name}, so it is not a complete NeMo archive.")
    try:
        settings = yaml.safe_load(files["model_config.yaml"].read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The model_config.yaml of {str(path)!r} is not plain YAML: {error}.") from error
    return settings if isinstance(settings, dict) else {}, files


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ValueError(
            "The archive's model_weights.ckpt holds more than tensors, or is damaged. It is not loaded, since "
            f"unpickling can run code. ({first_line(error)})"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError("The archive's model_weights.ckpt is not a state dict of tensors.")
    return weights


def _setting(settings: dict[str, Any], path: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A value of the archive's settings, of the type it must have."""
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    value = default if value is None else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"The archive's setting `{path}` is {value!r}, which cannot be converted.")
    return value


def _check_limits(settings: dict[str, Any], section: str, limits: dict[str, tuple]) -> None:
    """Refuses settings the transformers counterpart cannot follow."""
    values = _setting(settings, section, dict)
    for name, (absent, *convertible) in limits.items():
        if (value := values.get(name, absent)) not in convertible:
            setting = f"`{section}.{name}` is {value!r}"
            raise ValueError(f"The archive's setting {setting}; only {convertible[-1]!r} can be converted.")


def _tokenizer(settings: dict[str, Any], files: dict[str, Path]) -> MDMASRAggregateTokenizer:
    kind = _setting(settings, "tokenizer.type", str)
    if kind != "agg":
        raise ValueError(
            f"The archive's setting `tokenizer.type` is {kind!r}; only 'agg' (a SentencePiece model a language) can "
            "be converted. canary-1b-v2, which has a single one, is available in transformers' format: pass that."
        )
    models = {}
    for name, entry in _setting(settings, "tokenizer.langs", dict).items():
        if not isinstance(entry, dict) or entry.get("type") != "bpe":
            raise ValueError(f"The archive's setting `tokenizer.langs.{name}` is {entry!r}; its type must be 'bpe'.")
        # Files of the archive are written as "nemo:<name>".
        member = posixpath.normpath(str(entry.get("model_path")).removeprefix("nemo:"))
        if member not in files:
            raise ValueError(f"The archive lacks the tokenizer {member!r} of `tokenizer.langs.{name}`.")
        models[str(name)] = files[member].read_bytes()
    return MDMASRAggregateTokenizer(models=models)


def _frontend(settings: dict[str, Any]) -> dict[str, Any]:
    sampling_rate = _setting(settings, "preprocessor.sample_rate", int, 16000)
    _check_limits(settings, "preprocessor", {**NEMO_FRONTEND_LIMITS, "highfreq": (None, None, sampling_rate / 2)})

    def num_samples(name: str, default_s: float) -> int:
        if settings["preprocessor"].get(f"n_{name}") is not None:
            return _setting(settings, f"preprocessor.n_{name}", int)
        return int(_setting(settings, f"preprocessor.{name}", (int, float), default_s) * sampling_rate)

    win_length = num_samples("window_size", 0.02)
    return {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": _setting(settings, "preprocessor.features", int, 64),
        "sampling_rate": sampling_rate,
        "hop_length": num_samples("window_stride", 0.01),
        "n_fft": _setting(settings, "preprocessor.n_fft", int, 2 ** math.ceil(math.log2(win_length))),
        "win_length": win_length,
        "preemphasis": settings["preprocessor"].get("preemph", 0.97),  # None means none
        "padding_value": 0.0,
    }


def _encoder_config(settings: dict[str, Any], num_mel_bins: int) -> dict[str, Any]:
    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        return _setting(settings, f"encoder.{name}", kind, default)

    width, kernel_size = get("d_model", int), get("conv_kernel_size", int, 31)
    sides = [(kernel_size - 1) // 2] * 2
    sizes = {"feat_in": (None, num_mel_bins), "feat_out": (-1, -1, width), "conv_context_size": (None, None, sides)}
    _check_limits(settings, "encoder", NEMO_ENCODER_LIMITS | sizes)
    number, channels = (int, float), get("subsampling_conv_channels", int, -1)
    return {
        "model_type": "parakeet_encoder",
        "num_mel_bins": num_mel_bins,
        "hidden_size": width,
        "intermediate_size": width * get("ff_expansion_factor", int, 4),
        "num_hidden_layers": get("n_layers", int),
        "num_attention_heads": get("n_heads", int, 4),
        "attention_bias": get("use_bias", bool, True),
        "convolution_bias": get("use_bias", bool, True),
        "conv_kernel_size": kernel_size,
        "subsampling_factor": get("subsampling_factor", int, 4),
        "subsampling_conv_channels": width if channels == -1 else channels,
        "max_position_embeddings": get("pos_emb_max_len", int, 5000),
        "scale_input": get("xscaling", bool, True),
        "dropout": get("dropout", number, 0.1),
        "activation_dropout": get("dropout", number, 0.1),
        "dropout_positions": get("dropout_emb", number, 0.1),
        "attention_dropout": get("dropout_att", number, 0.0),
        "layerdrop": 0.0,
    }


def _decoder_config(settings: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    section = "transf_decoder.config_dict"
    # NeMo rounds the vocabulary up to a multiple of 8, and may leave the number to be filled in.
    vocab_size = 8 * math.ceil(num_tokens / 8)
    vocab_sizes = ("None", "None", None, vocab_size)
    if _setting(settings, "transf_encoder.num_layers", int, 0) != 0:
        raise ValueError("The archive has a second encoder (`transf_encoder.num_layers` > 0); it cannot be converted.")
    fixed = {"pre_ln": (False, True), "learn_positional_encodings": (False, False), "vocab_size": vocab_sizes}
    _check_limits(settings, section, fixed)
    _check_limits(settings, "transf_decoder", {"pre_ln_final_layer_norm": (True, True)})
    _check_limits(settings, "head", {"num_layers": (1, 1), "num_classes": vocab_sizes})

    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        return _setting(settings, f"{section}.{name}", kind, default)

    return {
        "vocab_size": vocab_size,
        "hidden_size": get("hidden_size", int),
        "intermediate_size": get("inner_size", int),
        "num_hidden_layers": get("num_layers", int),
        "num_attention_heads": get("num_attention_heads", int, 1),
        "hidden_act": get("hidden_act", str, "relu"),
        "max_position_embeddings": get("max_sequence_length", int, 512),
        "dropout": get("embedding_dropout", (int, float), 0.0),
        "attention_dropout": get("attn_score_dropout", (int, float), 0.0),
    }


def permute_decoder_width(weights: dict[str, torch.Tensor], positions: torch.Tensor | None) -> None:
    """
    Reorders the decoder's width in place. NeMo's sinusoids interleave sines and cosines along it, transformers' put
    the sines first: the same numbers in another order. Reordering everything that reads or writes the residual stream
    accordingly leaves what the decoder computes unchanged.
    """
    width = weights[EMBEDDING].shape[1]
    if positions is not None:  # the archive's own sinusoids, shape (positions, D): not loaded, but they must agree
        angles = torch.arange(len(positions))[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
        expected = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1) / math.sqrt(width)
        if positions.shape != expected.shape or not torch.allclose(positions.float(), expected, rtol=0, atol=1e-3):
            raise ValueError(f"The donor's buffer {NEMO_POSITIONS} does not hold NeMo's sinusoids.")
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    reads_stream = re.compile(r"(proj_out|embed_tokens|self_attn\.[qkv]_proj|cross_attn\.q_proj|fc1)\.weight")
    writes_stream = re.compile(r"(layer_?norm|o_proj|fc2)\.(weight|bias)")
    for name, tensor in weights.items():
        if name.startswith("model.encoder"):
            continue
        if reads_stream.search(name):
            weights[name] = tensor[:, order].contiguous()
        elif writes_stream.search(name):
            weights[name] = tensor[order]
