# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Canary as a donor, weight by weight: transformers' format (canary-1b-v2) or NeMo's (canary-1b-flash, 180m-flash)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoConfig, AutoTokenizer
from transformers.models.canary.processing_canary import LANGUAGE_CODE_TO_NAME

from ..configuration_mdm_asr import MDMASRConfig
from ..feature_extraction_mdm_asr import MDMASRFeatureExtractor
from ..generation_configuration_mdm_asr import MDMASRGenerationConfig
from ..processing_mdm_asr import MDMASRProcessor
from ..tokenization_mdm_asr import MDMASRAggregateTokenizer
from .common import (
    DRAFT_SAMPLER,
    MASK_TOKEN,
    draft_settings,
    encoder_settings,
    find_file,
    load_frontend,
    load_part,
    make_model,
    read_json,
    read_safetensors,
)
from .nemo import NEMO_BUFFERS, NEMO_NAMES, NEMO_POSITIONS, permute_decoder_width, read_nemo

# The decoder prompts of NeMo's two formats: tokens and slots in order, the tokens a slot chooses from as far as the
# vocabulary has them, and defaults. Languages are added from the vocabulary. With timestamps and diarization a donor
# writes further tokens amid the text; NeMo's decoder context, text before the transcript, stays empty.
PUNCTUATION = {"true": "<|pnc|>", "false": "<|nopnc|>"}
PROMPT_FORMATS = {
    "canary": (
        ["<|startoftranscript|>", "language", "task", "target_language", "punctuation"],
        {"task": {"transcribe": "<|transcribe|>", "translate": "<|translate|>"}, "punctuation": PUNCTUATION},
        {"task": "transcribe", "punctuation": "true"},
    ),
    "canary2": (
        [
            *("<|startofcontext|>", "<|startoftranscript|>", "emotion"),
            *("language", "target_language", "punctuation", "itn", "timestamp", "diarize"),
        ],
        {
            "emotion": {name: f"<|emo:{name}|>" for name in ("undefined", "neutral", "angry", "happy", "sad")},
            "punctuation": PUNCTUATION,
            "itn": {"true": "<|itn|>", "false": "<|noitn|>"},
            "timestamp": {"true": "<|timestamp|>", "false": "<|notimestamp|>"},
            "diarize": {"true": "<|diarize|>", "false": "<|nodiarize|>"},
        },
        {"emotion": "undefined", "punctuation": "true", "itn": "false", "timestamp": "false", "diarize": "false"},
    ),
}

# This model's parameter name -> the donor's, by substitution in this order.
NATIVE_NAMES = [
    (r"^(model\.decoder)\.layer_norm\.", r"\1.norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.self_attn_layer_norm\.", ".input_layernorm."),
    (r"\.cross_attn_layer_norm\.", ".post_attention_layernorm."),
    (r"\.mlp_layer_norm\.", ".final_layernorm."),
    (r"^(model\.decoder\.layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
]
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
    """What both formats come down to."""

    tokenizer: Any
    prompt_format: str
    frontend: dict[str, Any]
    encoder_config: dict[str, Any]
    decoder_config: dict[str, Any]
    weights: dict[str, torch.Tensor] | None
    names: Sequence[tuple[str, str]]
    computed: Collection[str] = ()


def from_canary(
    model_class: type,
    path_or_id: str | Path,
    *,
    draft_layers: int | None = None,
    shift_logits: bool = True,
    dtype: str | torch.dtype | None = None,
    **hub_kwargs: Any,
) -> torch.nn.Module:
    """
    Builds an MDM-ASR model that holds every weight of a Canary donor. It writes the donor's text at once, by drafts
    that are yet to be trained; with `draft_layers=0` it is a canvas to train, as the paper has it.

    Args:
        model_class: `MDMASRForConditionalGeneration` or a subclass.
        path_or_id (`str`): a folder or Hub id of `CanaryForConditionalGeneration`, a `.nemo` file, or a folder or Hub
            id that holds one.
        draft_layers (`int`, *optional*): of the masks, see `MDMASRDecoderConfig`; None is as many as the donor has.
        shift_logits (`bool`): read a canvas's logits one position earlier, as the donor predicts, see `MDMASRConfig`.
        dtype (`str` or `torch.dtype`, *optional*): of the model; the donor's own by default.
        hub_kwargs: passed to the download (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

    Returns:
        The model in evaluation mode, with the donor's prompt in its generation config.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape, named; or a setting this model cannot hold.
    """
    donor = _read_donor(path_or_id, hub_kwargs, with_weights=True)
    tokenizer, template = donor.tokenizer, _prompt_template(donor.tokenizer, donor.prompt_format)
    settings = {**DECODER_TRAITS, **donor.decoder_config}
    drafts = draft_settings(draft_layers, settings["num_hidden_layers"], settings["vocab_size"])
    config = MDMASRConfig(
        encoder_config=donor.encoder_config,
        decoder_config={**settings, **drafts},
        shift_logits=shift_logits,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=template["tokens"][0],
        input_frames_per_s=donor.frontend["sampling_rate"] / donor.frontend["hop_length"],
    )
    # NeMo's width is in another order.
    arrange = partial(permute_decoder_width, positions=donor.weights.get(NEMO_POSITIONS))
    model = make_model(
        model_class,
        config,
        donor.weights,
        donor.names,
        config.vocab_size,
        dtype=dtype,
        computed=donor.computed,
        arrange=arrange if donor.names is NEMO_NAMES else None,
    )
    model.generation_config = MDMASRGenerationConfig(
        prompt_template=template,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        **({"sampler": DRAFT_SAMPLER} if drafts else {}),
    )
    return model


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


def _read_donor(path_or_id: str | Path, hub_kwargs: dict[str, Any], with_weights: bool) -> _Donor:
    nemo_file = _find_nemo_file(path_or_id, hub_kwargs)
    if nemo_file is None:
        donor = _read_native(str(path_or_id), hub_kwargs, with_weights)
    else:
        donor = _Donor(**read_nemo(nemo_file, PROMPT_FORMATS, with_weights), names=NEMO_NAMES, computed=NEMO_BUFFERS)
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
    model_type = read_json(path_or_id, "config.json", hub_kwargs).get("model_type")
    if model_type == "canary":
        return None
    # Some Hub repositories hold an export of the encoder alone beside the archive, hence a config of another type.
    if path.is_dir():
        archives = sorted(path.glob("*.nemo"))
    else:
        archive = find_file(path_or_id, f"{str(path_or_id).split('/')[-1]}.nemo", hub_kwargs)
        archives = [archive] if archive else []
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
    for slot, default in defaults.items():
        token_id(choices[slot][default])
        slots[slot] = {value: vocab[token] for value, token in choices[slot].items() if token in vocab}
    language = "en" if "en" in languages else next(iter(languages))
    template = {
        "tokens": [item if item in slots else token_id(item) for item in tokens],
        "slots": slots,
        "defaults": {"language": language, "target_language": "@language", **defaults},
    }
    if "translate" in slots.get("task", {}):
        template["translation"] = {"task": "translate"}
    return template


def _read_native(path_or_id: str, hub_kwargs: dict[str, Any], with_weights: bool) -> _Donor:
    config = AutoConfig.from_pretrained(path_or_id, **hub_kwargs)
    tokenizer = load_part(AutoTokenizer, path_or_id, hub_kwargs)
    extractor = load_frontend(path_or_id, config.encoder_config.num_mel_bins, hub_kwargs)
    for name in ("pad_token", "bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"The tokenizer of {path_or_id!r} names no `{name}`.")
    names = ("feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis", "padding_value")
    decoder = config.decoder_config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "attention_bias")
    same += ("attention_dropout", "initializer_range")
    return _Donor(
        tokenizer=tokenizer,
        prompt_format="canary2",
        frontend={"feature_extractor_type": type(extractor).__name__} | {n: getattr(extractor, n) for n in names},
        encoder_config=encoder_settings(config.encoder_config),
        decoder_config={
            **{name: getattr(decoder, name) for name in same},
            "attention_key_bias": decoder.attention_bias,
        },
        weights=read_safetensors(path_or_id, hub_kwargs) if with_weights else None,
        names=NATIVE_NAMES,
    )
