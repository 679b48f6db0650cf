# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Whisper as a donor: its weights, weight by weight, its tokenizer (shrunk on request) and its prompt."""

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
from .generation_mdm_asr import MDMASRGenerationConfig
from .processing_mdm_asr import MDMASRProcessor

MASK_TOKEN = "<|mask|>"
_EOS, _START, _NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
_TASKS = ("transcribe", "translate")

# Whisper's names of the decoder's parts and ours, applied in this order.
_RENAMES = (
    (r"^model\.decoder\.(layers\.\d+\.)encoder_attn\.", r"model.decoder.\1cross_attn."),
    (r"^model\.decoder\.(layers\.\d+\.)encoder_attn_layer_norm\.", r"model.decoder.\1cross_attn_layer_norm."),
    (r"^model\.decoder\.(layers\.\d+\.)final_layer_norm\.", r"model.decoder.\1mlp_layer_norm."),
    (r"^model\.decoder\.(layers\.\d+\.\w+_attn)\.out_proj\.", r"model.decoder.\1.o_proj."),
)


def rename_whisper_weight(name: str) -> str:
    """Our name of a tensor of Whisper's state dict."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """
    Copies `state` into `model`; tied weights may be given once.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    own = model.state_dict()
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    problems = [f"missing {name}" for name in own if name not in state and name not in tied]
    problems += [f"unknown {name}" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"The weights of {source} do not fit: {shown}.")
    model.load_state_dict({**own, **state})
    model.tie_weights()


def whisper_tokenizer(pretrained_model_name_or_path: str | Path, vocab_size: int | None = None, **hub_kwargs):
    """
    The donor's tokenizer with a mask token, and the donor's embedding row of each of its ids.

    Args:
        vocab_size (`int`, *optional*):
            N: keep the first N ids of the byte-level BPE, the 256 bytes and the first N - 256 merges. Ids stay contiguous, and any
            text can still be written. Behind them come end of text, the prompt's tokens and the mask. None keeps all.

    Returns:
        `PreTrainedTokenizerFast`, and the list of the donor ids of ids 0, 1, ..., without the mask.

    Raises:
        ValueError: not a byte-level BPE in merge order, or `vocab_size` out of range.
    """
    donor = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
    spec = json.loads(donor.backend_tokenizer.to_str())
    special_ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    missing = [t for t in (_EOS, _START, _NO_TIMESTAMPS, *(f"<|{task}|>" for task in _TASKS)) if t not in special_ids]
    if missing:
        raise ValueError(f"The tokenizer of {pretrained_model_name_or_path} lacks {missing}: it is not Whisper's.")
    if vocab_size is None:
        num_ids = WhisperConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs).vocab_size
        _name_timestamps(special_ids, num_ids)
        kept_specials = sorted(special_ids, key=special_ids.get)
        donor_ids = list(range(num_ids))
    else:
        num_bpe = _truncate_bpe(spec["model"], set(special_ids), vocab_size)
        kept_specials = [_EOS, *prompt_tokens(special_ids, is_multilingual(special_ids))]
        donor_ids = [*range(num_bpe), *(special_ids[token] for token in kept_specials)]
        num_ids = len(donor_ids)
        special_ids = {token: num_bpe + i for i, token in enumerate(kept_specials)}
    kept_specials.append(MASK_TOKEN)
    special_ids[MASK_TOKEN] = num_ids
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": special_ids[token], "content": token, **flags} for token in kept_specials]
    # The prompt is laid by the model; a text is encoded without it.
    spec["post_processor"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token=_EOS,
        pad_token=_EOS,
        unk_token=None,
        bos_token=None,
        mask_token=MASK_TOKEN,
        additional_special_tokens=[t for t in kept_specials if t not in (_EOS, MASK_TOKEN)],
        clean_up_tokenization_spaces=False,
        model_max_length=int(1e9),
    )
    if tokenizer.convert_tokens_to_ids(MASK_TOKEN) != num_ids:
        raise ValueError(f"The tokenizer of {pretrained_model_name_or_path} has holes in its ids and cannot take a mask token.")
    return tokenizer, donor_ids


def _name_timestamps(special_ids: dict[str, int], num_ids: int) -> None:
    """Adds the timestamp tokens, in place, that some tokenizer files leave unnamed: 0.02 s apart, behind <|notimestamps|>."""
    first = special_ids[_NO_TIMESTAMPS] + 1
    named = set(special_ids.values())
    for i in range(first, num_ids):
        if i not in named:
            special_ids[f"<|{(i - first) * 0.02:.2f}|>"] = i


def _truncate_bpe(bpe: dict, specials: set[str], vocab_size: int) -> int:
    """Cuts a byte-level BPE, in place, to its first `vocab_size` ids. Returns that number."""
    vocab = {token: i for token, i in bpe.get("vocab", {}).items() if token not in specials}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in bpe.get("merges", [])]
    if bpe.get("type") != "BPE" or [vocab.get(a + b) for a, b in merges] != list(range(256, 256 + len(merges))):
        raise ValueError("`vocab_size` needs a byte-level BPE whose ids are 256 bytes and then its merges in order.")
    if not 256 <= vocab_size <= 256 + len(merges):
        raise ValueError(f"`vocab_size` must be from 256 (bytes only) to {256 + len(merges)}, got {vocab_size}.")
    bpe["vocab"] = {token: i for token, i in vocab.items() if i < vocab_size}
    bpe["merges"] = [list(pair) for pair in merges[: vocab_size - 256]]
    return vocab_size


def is_multilingual(special_ids: dict[str, int]) -> bool:
    """English-only Whisper models list the languages too, but their end of text is the last id of GPT-2's vocabulary, 50256."""
    return special_ids[_EOS] >= 50257


def prompt_tokens(special_ids: dict[str, int], multilingual: bool) -> list[str]:
    """The special tokens the decoder prompt is made of."""
    if not multilingual:
        return [_START, _NO_TIMESTAMPS]
    languages = [f"<|{code}|>" for code in LANGUAGES if f"<|{code}|>" in special_ids]
    return [_START, *languages, *(f"<|{task}|>" for task in _TASKS), _NO_TIMESTAMPS]


def whisper_prompt_template(ids: dict[str, int], multilingual: bool) -> dict:
    """The prompt template of a Whisper donor: start, language and task where there is a choice, no timestamps."""
    if not multilingual:
        return {"tokens": [ids[_START], ids[_NO_TIMESTAMPS]]}
    languages = {}
    for code, name in LANGUAGES.items():
        if f"<|{code}|>" in ids:
            languages[code] = languages[name] = ids[f"<|{code}|>"]
    return {
        "tokens": [ids[_START], "language", "task", ids[_NO_TIMESTAMPS]],
        "slots": {"language": languages, "task": {task: ids[f"<|{task}|>"] for task in _TASKS}},
        "defaults": {"language": "en", "task": "transcribe"},
    }


def from_whisper(
    model_class: type,
    pretrained_model_name_or_path: str | Path,
    *,
    vocab_size: int | None = None,
    encoder_trailing_silence_s: float = 5.0,
    dtype: torch.dtype | None = torch.float32,
    **hub_kwargs,
):
    """
    Makes a ready-to-train diffusion model of a Whisper checkpoint: every weight of the donor, and one new embedding, the mask's.
    Its processor is `MDMASRProcessor.from_whisper(..., vocab_size=vocab_size)`.

    Args:
        model_class (`type`): [`MDMASRForConditionalGeneration`] or a subclass.
        pretrained_model_name_or_path (`str` or `Path`): a Whisper checkpoint in safetensors, a folder or a Hub id.
        vocab_size (`int`, *optional*): shrink the vocabulary, see `whisper_tokenizer`.
        encoder_trailing_silence_s (`float`): seconds of silence behind the audio; see [`MDMASRConfig`].
        dtype (`torch.dtype`): of the weights.
        hub_kwargs: `revision`, `token`, `local_files_only`, ...

    Raises:
        ValueError: the checkpoint is not Whisper's, or a tensor is missing, unknown or of another shape.
    """
    source = str(pretrained_model_name_or_path)
    donor_config = WhisperConfig.from_pretrained(source, **hub_kwargs)
    if donor_config.model_type != "whisper":
        raise ValueError(f"{source} is a {donor_config.model_type!r} checkpoint. `from_whisper` takes Whisper's.")
    donor, report = WhisperForConditionalGeneration.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub_kwargs
    )
    # proj_out is tied to the embedding and need not be in the file.
    problems = [f"missing {name}" for name in report["missing_keys"] if name != "proj_out.weight"]
    problems += [f"unknown {name}" for name in report["unexpected_keys"]]
    problems += [f"of another shape {entry}" for entry in report["mismatched_keys"]]
    if problems:
        raise ValueError(f"The weights of {source} do not fit Whisper: {'; '.join(map(str, problems))}.")
    tokenizer, donor_ids = whisper_tokenizer(source, vocab_size, **hub_kwargs)

    ids = tokenizer.get_vocab()
    num_predicted = donor_config.vocab_size if vocab_size is None else ids[_EOS] + 1
    multilingual = is_multilingual({_EOS: donor_ids[ids[_EOS]]})
    config = MDMASRConfig(
        encoder_config=donor_config.to_dict(),
        decoder_config=MDMASRDecoderConfig(
            vocab_size=num_predicted,
            num_input_only_tokens=len(donor_ids) + 1 - num_predicted,
            hidden_size=donor_config.d_model,
            intermediate_size=donor_config.decoder_ffn_dim,
            num_hidden_layers=donor_config.decoder_layers,
            num_attention_heads=donor_config.decoder_attention_heads,
            hidden_act=donor_config.activation_function,
            max_position_embeddings=donor_config.max_target_positions,
            position_embedding_type="learned",
            embedding_layernorm=False,
            attention_key_bias=False,
            output_bias=False,
            dropout=donor_config.dropout,
            attention_dropout=donor_config.attention_dropout,
            activation_dropout=donor_config.activation_dropout,
            initializer_range=donor_config.init_std,
        ),
        mask_token_id=ids[MASK_TOKEN],
        eos_token_id=ids[_EOS],
        pad_token_id=ids[_EOS],
        decoder_start_token_id=ids[_START],
        encoder_trailing_silence_s=encoder_trailing_silence_s,
    )
    model = model_class(config).to(dtype)

    state = {rename_whisper_weight(name): tensor for name, tensor in donor.state_dict().items() if name != "proj_out.weight"}
    rows = state["model.decoder.embed_tokens.weight"][donor_ids]
    state["model.decoder.embed_tokens.weight"] = rows[:num_predicted]
    # The mask says "some token": the mean embedding is where an untrained decoder is least surprised.
    state["model.decoder.input_only_embeddings.weight"] = torch.cat([rows[num_predicted:], rows.mean(0, keepdim=True)])
    load_strictly(model, state, source)

    specials = {ids[token] for token in tokenizer.all_special_tokens}
    model.generation_config = MDMASRGenerationConfig(
        prompt_template=whisper_prompt_template(ids, multilingual),
        max_length=donor_config.max_target_positions,
        max_new_tokens=donor_config.max_target_positions - (4 if multilingual else 2),
        # Timestamps, languages and tasks stand in no transcript.
        suppress_tokens=sorted(i for i in specials if i < num_predicted and i != ids[_EOS]) or None,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )
    return model.eval()


def whisper_processor(
    pretrained_model_name_or_path: str | Path, *, vocab_size: int | None = None, **hub_kwargs
) -> MDMASRProcessor:
    """
    The processor of a Whisper donor: its features on the audio's own length, its tokenizer, its prompt.

    Args:
        vocab_size (`int`, *optional*): the same as for the model, see `whisper_tokenizer`.
    """
    source = str(pretrained_model_name_or_path)
    tokenizer, donor_ids = whisper_tokenizer(source, vocab_size, **hub_kwargs)
    frontend = WhisperFeatureExtractor.from_pretrained(source, **hub_kwargs)
    ids = tokenizer.get_vocab()
    return MDMASRProcessor(
        MDMASRFeatureExtractor(frontend, max_duration_s=float(frontend.chunk_length)),
        tokenizer,
        prompt_template=whisper_prompt_template(ids, is_multilingual({_EOS: donor_ids[ids[_EOS]]})),
        # Whisper writes a space before the first word.
        text_prefix=" ",
    )


__all__ = [
    "MASK_TOKEN",
    "from_whisper",
    "load_strictly",
    "rename_whisper_weight",
    "whisper_processor",
    "whisper_prompt_template",
    "whisper_tokenizer",
]
