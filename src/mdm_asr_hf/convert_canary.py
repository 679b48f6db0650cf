# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Canary donors, weight by weight: transformers' format (canary-1b-v2) and NeMo's (canary-1b-flash, 180m-flash)."""

import gzip
import json
import math
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AddedToken, AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.initialization import no_init_weights
from transformers.models.canary.processing_canary import LANGUAGE_CODE_TO_NAME
from transformers.utils import cached_file

from .configuration_mdm_asr import MDMASRConfig
from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
from .generation_mdm_asr import MDMASRGenerationConfig
from .processing_mdm_asr import MDMASRProcessor
from .tokenization_mdm_asr import MDMASRAggregateTokenizer

MASK_TOKEN = "<|mask|>"
EMBEDDING = "model.decoder.embed_tokens.weight"
MASK_EMBEDDING = "model.decoder.input_only_embeddings.weight"
OUTPUT = "proj_out.weight"

# The decoder prompts of NeMo's two formats: tokens and slots in order, and the tokens a slot chooses from. Languages
# are added from the vocabulary. Timestamps and diarization change what the text is made of, so they are fixed.
PUNCTUATION = {"true": "<|pnc|>", "false": "<|nopnc|>"}
PROMPT_FORMATS = {
    "canary": (
        ["<|startoftranscript|>", "language", "task", "target_language", "punctuation"],
        {"task": {"transcribe": "<|transcribe|>", "translate": "<|translate|>"}, "punctuation": PUNCTUATION},
        {"task": "transcribe", "punctuation": "true"},
    ),
    "canary2": (
        [
            *("<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>"),
            *("language", "target_language", "punctuation", "itn"),
            *("<|notimestamp|>", "<|nodiarize|>"),
        ],
        {"punctuation": PUNCTUATION, "itn": {"true": "<|itn|>", "false": "<|noitn|>"}},
        {"punctuation": "true", "itn": "false"},
    ),
}

# Our parameter name -> the donor's, by substitution in this order.
NATIVE_NAMES = [
    (r"^(model\.decoder)\.layer_norm\.", r"\1.norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.self_attn_layer_norm\.", ".input_layernorm."),
    (r"\.cross_attn_layer_norm\.", ".post_attention_layernorm."),
    (r"\.mlp_layer_norm\.", ".final_layernorm."),
    (r"^(model\.decoder\.layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
]
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
# What every Canary decoder has.
DECODER_TRAITS = {
    "num_input_only_tokens": 1,
    "position_embedding_type": "sinusoidal",
    "embedding_layernorm": True,
    "output_bias": True,
    "layer_norm_eps": 1e-5,
}


@dataclass
class _Donor:
    """What both kinds of donors come down to."""

    tokenizer: Any
    prompt_format: str
    frontend: dict[str, Any]
    encoder_config: dict[str, Any]
    decoder_config: dict[str, Any]
    weights: dict[str, torch.Tensor] | None
    is_nemo: bool


def from_canary(
    model_class: type, path_or_id: str | Path, *, dtype: str | torch.dtype | None = None, **hub_kwargs: Any
) -> torch.nn.Module:
    """
    Builds an MDM-ASR model that holds every weight of a Canary donor. The mask embedding is the only new parameter.

    Args:
        model_class: `MDMASRForConditionalGeneration` or a subclass.
        path_or_id (`str`): a folder or Hub id of `CanaryForConditionalGeneration`, a `.nemo` file, or a folder or Hub
            id that holds one.
        dtype (`str` or `torch.dtype`, *optional*): of the model; the donor's own by default.
        hub_kwargs: passed to the download (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

    Returns:
        The model in evaluation mode, with the donor's prompt in its generation config.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape, named; or a setting this model cannot hold.
    """
    donor = _read_donor(path_or_id, hub_kwargs, with_weights=True)
    tokenizer, template = donor.tokenizer, _prompt_template(donor.tokenizer, donor.prompt_format)
    config = MDMASRConfig(
        encoder_config=donor.encoder_config,
        decoder_config=donor.decoder_config,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=template["tokens"][0],
        input_frames_per_s=donor.frontend["sampling_rate"] / donor.frontend["hop_length"],
    )
    with no_init_weights():  # every parameter is about to be loaded
        model = model_class(config)
    weights = _renamed(model.state_dict(), donor.weights, donor.is_nemo)
    if donor.is_nemo:
        _permute_decoder_width(weights, donor.weights.get(NEMO_POSITIONS))
    # The mask stands for every token it may turn out to be: their mean lies amid the inputs the decoder knows.
    weights[MASK_EMBEDDING] = weights[EMBEDDING].float().mean(dim=0, keepdim=True)
    asked, dtype = dtype, weights[EMBEDDING].dtype if dtype in (None, "auto") else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` {asked!r} is not one of torch's. Pass for example 'bfloat16' or torch.float32.")
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.generation_config = MDMASRGenerationConfig(
        prompt_template=template,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    return model.eval()


def canary_processor(path_or_id: str | Path, **hub_kwargs: Any) -> MDMASRProcessor:
    """
    Builds the processor that belongs to `from_canary(path_or_id)`: the donor's mel features, tokenizer and prompt.

    Args:
        path_or_id (`str`): see `from_canary`.
        hub_kwargs: passed to the download.
    """
    donor = _read_donor(path_or_id, hub_kwargs, with_weights=False)
    return MDMASRProcessor(
        feature_extractor=MDMASRFeatureExtractor(frontend=donor.frontend),
        tokenizer=donor.tokenizer,
        prompt_template=_prompt_template(donor.tokenizer, donor.prompt_format),
    )


# Both kinds of donors


def _read_donor(path_or_id: str | Path, hub_kwargs: dict[str, Any], with_weights: bool) -> _Donor:
    nemo_file = _find_nemo_file(path_or_id, hub_kwargs)
    if nemo_file is None:
        donor = _read_native(str(path_or_id), hub_kwargs, with_weights)
    else:
        donor = _read_nemo(nemo_file, with_weights)
    tokenizer, vocab_size = donor.tokenizer, donor.decoder_config["vocab_size"]
    # The mask gets the first id that is not predicted; ids the donor left unnamed get a name.
    if len(tokenizer) > vocab_size or MASK_TOKEN in tokenizer.get_vocab():
        raise ValueError(
            f"The donor's tokenizer has {len(tokenizer)} tokens for a vocabulary of {vocab_size}, so its mask token "
            f"{MASK_TOKEN!r} cannot follow it. Pass a donor with the tokenizer it was trained with."
        )
    names = [f"<|reserved_{index}|>" for index in range(len(tokenizer), vocab_size)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.add_special_tokens({"mask_token": AddedToken(MASK_TOKEN, special=True, normalized=False)})
    return donor


def _find_nemo_file(path_or_id: str | Path, hub_kwargs: dict[str, Any]) -> Path | None:
    """The `.nemo` file behind `path_or_id`, or None if it is a Canary model in transformers' format."""
    path = Path(path_or_id)
    if path.is_file() or path.suffix == ".nemo":
        if not path.is_file() or path.suffix != ".nemo":
            raise ValueError(f"`path_or_id` {str(path)!r} is no `.nemo` file. Pass one, or a folder, or a Hub id.")
        return path
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    config_file = cached_file(str(path_or_id), "config.json", **quiet)
    model_type = json.loads(Path(config_file).read_text(encoding="utf-8")).get("model_type") if config_file else None
    if model_type == "canary":
        return None
    # Some Hub repositories hold an export of the encoder alone beside the archive, hence a config of another type.
    if path.is_dir():
        archives = sorted(path.glob("*.nemo"))
    else:
        archive = cached_file(str(path_or_id), f"{str(path_or_id).split('/')[-1]}.nemo", **quiet)
        archives = [Path(archive)] if archive else []
    if len(archives) != 1:
        raise ValueError(
            f"`path_or_id` {str(path_or_id)!r} is no Canary donor: its config.json has the model type {model_type!r}, "
            f"not 'canary', and it holds {len(archives)} `.nemo` files. Pass a folder or Hub id of "
            "CanaryForConditionalGeneration, or a `.nemo` file."
        )
    return archives[0]


def _prompt_template(tokenizer: Any, prompt_format: str) -> dict[str, Any]:
    vocab = tokenizer.get_vocab()

    def token_id(token: str) -> int:
        if token not in vocab:
            raise ValueError(f"The donor's tokenizer lacks {token!r}, which its prompt format needs.")
        return vocab[token]

    if isinstance(tokenizer, MDMASRAggregateTokenizer):
        codes = [name if f"<|{name}|>" in vocab else name.split("-")[0] for name in tokenizer.languages]
    else:
        # The vocabulary names languages Canary was never trained on.
        codes = [code for code in LANGUAGE_CODE_TO_NAME if f"<|{code}|>" in vocab]
    languages = {code: token_id(f"<|{code}|>") for code in codes}
    if not languages:
        raise ValueError("The donor's tokenizer has no language tokens such as '<|en|>'.")

    tokens, choices, defaults = PROMPT_FORMATS[prompt_format]
    slots = {"language": languages, "target_language": dict(languages)}
    slots |= {slot: {value: token_id(token) for value, token in c.items()} for slot, c in choices.items()}
    language = "en" if "en" in languages else next(iter(languages))
    return {
        "tokens": [item if item in slots else token_id(item) for item in tokens],
        "slots": slots,
        "defaults": {"language": language, "target_language": "@language", **defaults},
    }


def _renamed(
    target: dict[str, torch.Tensor], donor: dict[str, torch.Tensor], is_nemo: bool
) -> dict[str, torch.Tensor]:
    """The donor's tensors under this model's names: all of them, and all of the right shape, or a ValueError."""
    weights, used, missing, misshapen = {}, set(), [], []
    for name, parameter in target.items():
        if name == MASK_EMBEDDING:
            continue
        donor_name = name
        for pattern, replacement in NEMO_NAMES if is_nemo else NATIVE_NAMES:
            donor_name = re.sub(pattern, replacement, donor_name)
        used.add(donor_name)
        tensor = donor.get(donor_name)
        if tensor is None and name.endswith(".num_batches_tracked"):
            tensor = torch.zeros_like(parameter)  # a counter that only a cumulative average would use
        if tensor is None and name == OUTPUT and not is_nemo:
            tensor = donor.get(EMBEDDING)  # safetensors stores tied weights once
        if tensor is None:
            missing.append(donor_name)
        elif tensor.shape != parameter.shape:
            misshapen.append(f"{donor_name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        else:
            weights[name] = tensor
    unknown = sorted(set(donor) - used - (NEMO_BUFFERS if is_nemo else set()))
    faults = {"missing": missing, "unknown": unknown, "of another shape than the settings say": misshapen}
    faults = [f"{len(names)} {fault}: {', '.join(names[:20])}" for fault, names in faults.items() if names]
    if faults:
        raise ValueError(f"The donor's tensors do not fit a Canary model of its settings; {'; '.join(faults)}.")
    if not torch.equal(weights[OUTPUT], weights[EMBEDDING]):
        raise ValueError(
            "The donor's output weights differ from its token embedding, but this model ties them. It cannot be "
            "converted without loss."
        )
    return weights


# transformers' format


def _read_native(path_or_id: str, hub_kwargs: dict[str, Any], with_weights: bool) -> _Donor:
    config = AutoConfig.from_pretrained(path_or_id, **hub_kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, **hub_kwargs)
        extractor = AutoFeatureExtractor.from_pretrained(path_or_id, **hub_kwargs)
    except Exception as error:  # what a folder without them raises depends on the version
        raise ValueError(
            f"`path_or_id` {path_or_id!r} lacks the tokenizer or the feature extractor. Save the donor's processor "
            "beside its weights: the decoder prompt is made of the tokenizer's tokens."
        ) from error
    for name in ("pad_token", "bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"The tokenizer of {path_or_id!r} names no `{name}`.")
    if extractor.feature_size != config.encoder_config.num_mel_bins:
        raise ValueError(
            f"The donor's feature extractor gives {extractor.feature_size} mel bins, its encoder takes "
            f"{config.encoder_config.num_mel_bins}."
        )
    names = ("feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis", "padding_value")
    decoder = config.decoder_config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "attention_bias")
    same += ("attention_dropout", "initializer_range")
    return _Donor(
        tokenizer=tokenizer,
        prompt_format="canary2",
        frontend={"feature_extractor_type": type(extractor).__name__} | {n: getattr(extractor, n) for n in names},
        encoder_config=config.encoder_config.to_dict(),
        decoder_config={
            **DECODER_TRAITS,
            **{name: getattr(decoder, name) for name in same},
            "attention_key_bias": decoder.attention_bias,
        },
        weights=_read_safetensors(path_or_id, hub_kwargs) if with_weights else None,
        is_nemo=False,
    )


def _read_safetensors(path_or_id: str, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    names = ["model.safetensors"]
    index_file = cached_file(path_or_id, "model.safetensors.index.json", **quiet)
    if index_file is not None:
        names = sorted(set(json.loads(Path(index_file).read_text(encoding="utf-8"))["weight_map"].values()))
    tensors = {}
    for name in names:
        file = cached_file(path_or_id, name, **quiet)
        if file is None:
            raise ValueError(f"`path_or_id` {path_or_id!r} lacks {name}. Weights are loaded from safetensors only.")
        tensors |= load_file(file)
    return tensors


# NeMo's format


def _read_nemo(path: Path, with_weights: bool) -> _Donor:
    with tempfile.TemporaryDirectory() as folder:
        settings, files = _extract_nemo(path, Path(folder), with_weights)
        prompt_format = settings.get("prompt_format")
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"The archive's `prompt_format` is {prompt_format!r}, not one of {list(PROMPT_FORMATS)}.")
        tokenizer, frontend = _nemo_tokenizer(settings, files), _nemo_frontend(settings)
        return _Donor(
            tokenizer=tokenizer,
            prompt_format=prompt_format,
            frontend=frontend,
            encoder_config=_nemo_encoder_config(settings, frontend["feature_size"]),
            decoder_config=_nemo_decoder_config(settings, len(tokenizer)),
            weights=_read_nemo_weights(files["model_weights.ckpt"]) if with_weights else None,
            is_nemo=True,
        )


def _extract_nemo(path: Path, folder: Path, with_weights: bool) -> tuple[dict[str, Any], dict[str, Path]]:
    """
    Copies what is needed of a NeMo archive to `folder` and reads its settings.

    A member's path is never used as a path here: it is checked, then the content is copied under a name of ours.
    """
    needed = ("model_config.yaml", "model_weights.ckpt") if with_weights else ("model_config.yaml",)
    files: dict[str, Path] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
                    tarfile.data_filter(member, str(folder))
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


def _read_nemo_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ValueError(
            "The archive's model_weights.ckpt holds more than tensors, or is damaged. It is not loaded, since "
            f"unpickling can run code. ({str(error).splitlines()[0]})"
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


def _nemo_tokenizer(settings: dict[str, Any], files: dict[str, Path]) -> MDMASRAggregateTokenizer:
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


def _nemo_frontend(settings: dict[str, Any]) -> dict[str, Any]:
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


def _nemo_encoder_config(settings: dict[str, Any], num_mel_bins: int) -> dict[str, Any]:
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


def _nemo_decoder_config(settings: dict[str, Any], num_tokens: int) -> dict[str, Any]:
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
        **DECODER_TRAITS,
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


def _permute_decoder_width(weights: dict[str, torch.Tensor], positions: torch.Tensor | None) -> None:
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


__all__ = ["canary_processor", "from_canary"]
