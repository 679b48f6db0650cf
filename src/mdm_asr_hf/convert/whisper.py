# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Whisper as a donor: its weights, weight by weight, its tokenizer (shrunk on request) and its prompt."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.initialization import no_init_weights
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from ..feature_extraction_mdm_asr import MDMASRFeatureExtractor
from ..generation_configuration_mdm_asr import FALLBACK_TEMPERATURES, MDMASRGenerationConfig
from ..processing_mdm_asr import MDMASRProcessor
from ..prompt_mdm_asr import AUTO, with_prompt_defaults
from .common import (
    DRAFT_SAMPLER,
    DRAFTS,
    INPUT_ONLY_EMBEDDINGS,
    MASK_TOKEN,
    draft_settings,
    encoder_settings,
    load_frontend,
    load_part,
    make_model,
    read_json,
    read_safetensors,
    rename,
)

EOS, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
PREVIOUS = "<|startofprev|>"
TASKS = ("transcribe", "translate")
NUM_BYTES = 256
# The released models tell the two kinds apart by this number: English-only ones have 51,864 tokens.
MULTILINGUAL_VOCAB_SIZE = 51865
TIMESTAMP_STEP_S = 0.02
# Of Whisper's release; that of compression is transformers', which counts tokens.
THRESHOLDS = {"no_speech_threshold": 0.6, "logprob_threshold": -1.0, "compression_ratio_threshold": 1.35}

# This model's parameter name -> Whisper's, by substitution in this order.
WHISPER_NAMES = [
    (r"^(model\.decoder\..*\.(?:self|cross)_attn)\.o_proj\.", r"\1.out_proj."),
    (r"^(model\.decoder\..*)\.cross_attn\.", r"\1.encoder_attn."),
    (r"^(model\.decoder\..*)\.cross_attn_layer_norm\.", r"\1.encoder_attn_layer_norm."),
    (r"^(model\.decoder\..*)\.mlp_layer_norm\.", r"\1.final_layer_norm."),
]


def from_whisper(
    model_class: type,
    path_or_id: str | Path,
    *,
    vocab_size: int | None = None,
    draft_layers: int | None = None,
    encoder_trailing_silence_s: float = 5.0,
    encoder_min_duration_s: float = 15.0,
    shift_logits: bool = True,
    dtype: str | torch.dtype | None = torch.float32,
    **hub_kwargs: Any,
) -> nn.Module:
    """
    Builds an MDM-ASR model that holds every weight of a Whisper donor. It writes the donor's text at once, by drafts
    that are yet to be trained; with `draft_layers=0` it is a canvas to train, as the paper has it. Its processor is
    `MDMASRProcessor.from_whisper(path_or_id, vocab_size=vocab_size)`.

    Args:
        model_class (`type`): `MDMASRForConditionalGeneration` or a subclass.
        path_or_id (`str` or `Path`): a folder or Hub id of `WhisperForConditionalGeneration`, in safetensors.
        vocab_size (`int`, *optional*): shrinks a canvas's vocabulary, see `whisper_tokenizer`.
        draft_layers (`int`, *optional*): of the masks, see `MDMASRDecoderConfig`; None is as many as the donor has.
        encoder_trailing_silence_s (`float`), encoder_min_duration_s (`float`): seconds of silence behind the audio,
            and of both together, at least, see `MDMASRConfig`.
        shift_logits (`bool`): read a canvas's logits one position earlier, as the donor predicts, see `MDMASRConfig`.
        dtype (`str` or `torch.dtype`, *optional*): of the model; None keeps the donor's own.
        hub_kwargs: passed to the download (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

    Returns:
        The model in evaluation mode, with the donor's prompt in its generation config.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape, named; or a donor that is not Whisper's.
    """
    if vocab_size is not None and draft_layers != 0:
        raise ValueError(f"`vocab_size` ({vocab_size!r}) changes the text of a donor. Pass `draft_layers=0`, too.")
    donor_config, stated, tokenizer, donor_ids, template = _read_donor(path_or_id, vocab_size, hub_kwargs)
    drafts = draft_settings(draft_layers, donor_config.decoder_layers, donor_config.vocab_size)
    ids = tokenizer.get_vocab()
    # A whole vocabulary can be predicted; of a shrunk one, the text tokens and the end of text.
    num_predicted = len(donor_ids) if vocab_size is None else ids[EOS] + 1
    config = MDMASRConfig(
        encoder_config=encoder_settings(donor_config),
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
            **drafts,
        ),
        mask_token_id=ids[MASK_TOKEN],
        eos_token_id=ids[EOS],
        pad_token_id=ids[EOS],
        decoder_start_token_id=ids[START],
        encoder_trailing_silence_s=encoder_trailing_silence_s,
        encoder_min_duration_s=encoder_min_duration_s,
        shift_logits=shift_logits,
    )
    donor = read_safetensors(path_or_id, hub_kwargs)
    num_rows = donor_config.vocab_size
    model = make_model(model_class, config, donor, WHISPER_NAMES, num_rows, dtype=dtype, donor_ids=donor_ids)
    settings = {
        "prompt_template": template,
        "max_length": donor_config.max_target_positions,
        "max_new_tokens": donor_config.max_target_positions - len(template["tokens"]),
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if drafts:
        # The donor's own settings, and Whisper's safeguards at the values of its release.
        settings |= {
            "sampler": DRAFT_SAMPLER,
            "alignment_heads": stated.get("alignment_heads"),
            "suppress_tokens": stated.get("suppress_tokens") or None,
            "begin_suppress_tokens": stated.get("begin_suppress_tokens") or None,
            # The token before <|notimestamps|>, which tokenizers name in two ways.
            "no_speech_token_id": ids[NO_TIMESTAMPS] - 1,
            "temperature": list(FALLBACK_TEMPERATURES),
            **THRESHOLDS,
        }
    else:
        specials = {ids[token] for token in tokenizer.all_special_tokens} - {ids[EOS]}
        # Byte-level tokens of other scripts are shorter than those of English.
        settings["canvas_tokens_per_s"] = 12.0 if "slots" in template else 7.0
        # Timestamps, languages and tasks stand in no transcript.
        settings["suppress_tokens"] = sorted(i for i in specials if i < num_predicted) or None
    model.generation_config = MDMASRGenerationConfig(**settings)
    return model


def to_whisper(model: nn.Module) -> WhisperForConditionalGeneration:
    """
    The Whisper model that a model with drafts was made of, or fine-tuned to: identical weights and prompt, for
    transformers and for what converts its checkpoints, as faster-whisper and whisper.cpp do. Save the donor's
    processor beside it; faster-whisper's converter also takes this model's tokenizer.

    Raises:
        ValueError: the model is no Whisper with drafts.
    """
    config, settings = model.config, model.generation_config
    if config.encoder_config.model_type != "whisper" or not config.has_drafts:
        raise ValueError(
            "`to_whisper` needs a model with drafts that was made of a Whisper donor, not one with the encoder "
            f"{config.encoder_config.model_type!r} and {config.decoder_config.draft_layers} draft layers: what else "
            "there is, a canvas too, is no Whisper any more. Convert the donor with `from_whisper(donor)`."
        )
    weights = {
        rename(name, WHISPER_NAMES): tensor.clone()
        for name, tensor in model.state_dict().items()
        # Behind 30 seconds the encoder is Whisper's, without what was learnt for a short silence.
        if not name.startswith((DRAFTS, INPUT_ONLY_EMBEDDINGS, "model.encoder.silence_embeddings"))
    }
    with no_init_weights():
        stated = encoder_settings(config.encoder_config)
        stated.pop("silence_frames", None)
        stated.update(vocab_size=config.vocab_size, tie_word_embeddings=config.tie_word_embeddings)
        donor = WhisperForConditionalGeneration(WhisperConfig(**stated))
    donor.load_state_dict(weights, strict=True, assign=True)
    donor.tie_weights()
    template = settings.prompt_template
    slots, defaults = template.get("slots", {}), template.get("defaults", {})
    of_languages = {}
    if "language" in slots:
        of_languages = {
            "lang_to_id": {f"<|{code}|>": token_id for code, token_id in slots["language"].items()},
            "task_to_id": slots["task"],
            # Without a task of its own, transformers lays a prompt without one behind a language that it detects.
            "task": defaults.get("task", TASKS[0]),
            "language": None if defaults.get("language", AUTO) == AUTO else defaults["language"],
        }
    donor.generation_config = GenerationConfig(
        alignment_heads=settings.alignment_heads,
        begin_suppress_tokens=settings.begin_suppress_tokens,
        suppress_tokens=settings.suppress_tokens,
        bos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        is_multilingual=bool(of_languages),
        max_length=config.decoder_config.max_position_embeddings,
        no_timestamps_token_id=template["tokens"][-1],
        prev_sot_token_id=template.get("previous"),
        return_timestamps=False,
        max_initial_timestamp_index=50,
        **of_languages,
    )
    return donor.eval()


def whisper_processor(
    path_or_id: str | Path,
    *,
    vocab_size: int | None = None,
    **hub_kwargs: Any,
) -> MDMASRProcessor:
    """
    Builds the processor that belongs to `from_whisper(path_or_id)`: the donor's features on the audio's own length,
    its tokenizer and its prompt.

    Args:
        path_or_id (`str` or `Path`): see `from_whisper`.
        vocab_size (`int`, *optional*): the same as for the model, see `whisper_tokenizer`.
        hub_kwargs: passed to the download.
    """
    donor_config, _, tokenizer, _, template = _read_donor(path_or_id, vocab_size, hub_kwargs)
    frontend = load_frontend(path_or_id, donor_config.num_mel_bins, hub_kwargs)
    return MDMASRProcessor(
        MDMASRFeatureExtractor(frontend, max_duration_s=float(frontend.chunk_length)),
        tokenizer,
        prompt_template=template,
        # Whisper writes a space before the first word.
        text_prefix=" ",
    )


def _read_donor(
    path_or_id: str | Path, vocab_size: int | None, hub_kwargs: dict[str, Any]
) -> tuple[WhisperConfig, dict[str, Any], PreTrainedTokenizerFast, list[int], dict[str, Any]]:
    """
    The donor's configuration and generation settings; its tokenizer and ids, see `whisper_tokenizer`; and its prompt,
    with the language and task that these settings ask for, if any: by name, or as older ones do by token ids
    (`forced_decoder_ids`).
    """
    config, stated, multilingual = _read_config(path_or_id, hub_kwargs)
    tokenizer, donor_ids = whisper_tokenizer(path_or_id, vocab_size, **hub_kwargs)
    template = whisper_prompt_template(tokenizer.get_vocab(), multilingual, can_detect=vocab_size is None)
    if multilingual:
        defaults = {name: stated.get(name) for name in ("language", "task")}
        if not any(defaults.values()):
            forced = dict(stated.get("forced_decoder_ids") or ())
            for place, name in enumerate(defaults, start=1):
                its_ids = {donor_ids[token_id]: value for value, token_id in template["slots"][name].items()}
                defaults[name] = its_ids.get(forced.get(place))
        template = with_prompt_defaults(template, **defaults)
    return config, stated, tokenizer, donor_ids, template


def _read_config(path_or_id: str | Path, hub_kwargs: dict[str, Any]) -> tuple[WhisperConfig, dict[str, Any], bool]:
    """The donor's configuration, its generation settings, and whether it is multilingual."""
    model_type = read_json(path_or_id, "config.json", hub_kwargs).get("model_type")
    if model_type != "whisper":
        raise ValueError(
            f"`path_or_id` {str(path_or_id)!r} is no Whisper donor: its config.json has the model type "
            f"{model_type!r}. Pass a folder or Hub id of WhisperForConditionalGeneration."
        )
    config = WhisperConfig.from_pretrained(str(path_or_id), **hub_kwargs)
    # English-only models list the languages too, so their tokens tell nothing.
    stated = read_json(path_or_id, "generation_config.json", hub_kwargs)
    multilingual = stated.get("is_multilingual")
    if multilingual is None:
        multilingual = config.vocab_size >= MULTILINGUAL_VOCAB_SIZE
    return config, stated, bool(multilingual)


# Tokenizer and prompt


def whisper_tokenizer(
    path_or_id: str | Path,
    vocab_size: int | None = None,
    **hub_kwargs: Any,
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """
    The donor's tokenizer with a mask token, and the donor's embedding row of each of its ids.

    Args:
        path_or_id (`str` or `Path`): see `from_whisper`.
        vocab_size (`int`, *optional*):
            N: keep the first N ids of the byte-level BPE, the 256 bytes and N - 256 merges, by which any text can
            still be written. Behind them come end of text, the prompt's tokens and the mask; everything else goes.
            None keeps all.
        hub_kwargs: passed to the download.

    Returns:
        `PreTrainedTokenizerFast`, and the list of the donor ids of ids 0, 1, ..., without the mask.

    Raises:
        ValueError: not a byte-level BPE in merge order, or `vocab_size` out of range.
    """
    donor_config, _, multilingual = _read_config(path_or_id, hub_kwargs)
    spec = json.loads(load_part(AutoTokenizer, path_or_id, hub_kwargs).backend_tokenizer.to_str())
    added = {token["content"]: token for token in spec["added_tokens"]}
    tasks = [f"<|{task}|>" for task in TASKS]
    if missing := [token for token in (EOS, START, NO_TIMESTAMPS, *tasks) if token not in added]:
        raise ValueError(f"The tokenizer of {str(path_or_id)!r} lacks {missing}: it is not Whisper's.")
    donor_ids = {content: token["id"] for content, token in added.items()}
    if vocab_size is None:
        num_ids = donor_config.vocab_size
        _name_timestamps(donor_ids, num_ids)
        ids, kept_ids = dict(donor_ids), list(range(num_ids))
    else:
        _shrink_bpe(spec["model"], set(donor_ids), vocab_size)
        kept = [EOS, *_prompt_tokens(donor_ids, multilingual)]
        ids = {token: vocab_size + i for i, token in enumerate(kept)}
        kept_ids = [*range(vocab_size), *(donor_ids[token] for token in kept)]
        num_ids = len(kept_ids)
    ids[MASK_TOKEN] = num_ids
    ordered = sorted(ids, key=ids.get)
    # Words a fine-tuned donor added stay words. All tokens of Whisper's own are special here, its timestamps too.
    words = {token for token in ordered if not token.startswith("<|") and not added[token]["special"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [
        {**(added[token] if token in words else flags), "id": ids[token], "content": token} for token in ordered
    ]
    # The prompt is laid by the model; a text is encoded without it.
    spec["post_processor"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token=EOS,
        pad_token=EOS,
        unk_token=None,
        bos_token=None,
        mask_token=MASK_TOKEN,
        additional_special_tokens=[token for token in ordered if token not in {EOS, MASK_TOKEN, *words}],
        clean_up_tokenization_spaces=False,
        model_max_length=int(1e9),
    )
    if tokenizer.get_vocab() != {**spec["model"]["vocab"], **ids}:
        raise ValueError(
            f"The ids of the tokenizer of {str(path_or_id)!r} have holes, or exceed the {num_ids} rows of the donor's "
            "embedding, so it cannot take a mask token behind them. Save the tokenizer the donor was trained with."
        )
    return tokenizer, kept_ids


def _name_timestamps(ids: dict[str, int], num_ids: int) -> None:
    """Adds the timestamps, in place, that some tokenizer files leave unnamed: 0.02 s apart, behind the others."""
    first = ids[NO_TIMESTAMPS] + 1
    named = set(ids.values())
    for i in range(first, num_ids):
        if i not in named:
            ids[f"<|{(i - first) * TIMESTAMP_STEP_S:.2f}|>"] = i


def _shrink_bpe(bpe: dict[str, Any], specials: set[str], vocab_size: int) -> None:
    """Shrinks a byte-level BPE, in place, to its first `vocab_size` ids: the parts of a merge stand before it."""
    vocab = {token: i for token, i in bpe.get("vocab", {}).items() if token not in specials}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in bpe.get("merges", [])]
    num_ids = NUM_BYTES + len(merges)
    has_bytes = {vocab.get(byte) for byte in ByteLevel.alphabet()} == set(range(NUM_BYTES))
    in_order = [vocab.get(left + right) for left, right in merges] == list(range(NUM_BYTES, num_ids))
    if bpe.get("type") != "BPE" or not has_bytes or not in_order:
        raise ValueError("`vocab_size` needs a byte-level BPE whose ids are 256 bytes and then its merges in order.")
    if type(vocab_size) is not int or not NUM_BYTES <= vocab_size <= num_ids:
        raise ValueError(
            f"`vocab_size` must be an integer from {NUM_BYTES} (bytes only) to {num_ids}, got {vocab_size!r}."
        )
    bpe["vocab"] = {token: i for token, i in vocab.items() if i < vocab_size}
    bpe["merges"] = [list(pair) for pair in merges[: vocab_size - NUM_BYTES]]


def _prompt_tokens(ids: dict[str, int], multilingual: bool) -> list[str]:
    """The special tokens the decoder prompt is made of."""
    if not multilingual:
        return [START, NO_TIMESTAMPS]
    languages = [f"<|{code}|>" for code in LANGUAGES if f"<|{code}|>" in ids]
    return [START, *languages, *(f"<|{task}|>" for task in TASKS), NO_TIMESTAMPS]


def whisper_prompt_template(ids: dict[str, int], multilingual: bool, can_detect: bool = True) -> dict[str, Any]:
    """
    The prompt of a Whisper donor: start, then language and task where there is a choice, then no timestamps. Times of
    words do not come from tokens here, so that there is no choice of `timestamp`.

    Args:
        ids (`dict[str, int]`): the ids of the special tokens.
        multilingual (`bool`): English-only models have no choice.
        can_detect (`bool`): by default the language is detected, as by the donor; else it is English, since the tokens
            of languages are not predicted.
    """
    # What stands before earlier text.
    previous = {"previous": ids[PREVIOUS]} if PREVIOUS in ids else {}
    if not multilingual:
        return {"tokens": [ids[START], ids[NO_TIMESTAMPS]], **previous}
    languages = {code: ids[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in ids}
    if not languages:
        raise ValueError("The donor is multilingual, but its tokenizer has no language tokens such as '<|en|>'.")
    transcribe, translate = TASKS
    language = AUTO if can_detect else "en" if "en" in languages else next(iter(languages))
    return {
        "tokens": [ids[START], "language", "task", ids[NO_TIMESTAMPS]],
        "slots": {"language": languages, "task": {task: ids[f"<|{task}|>"] for task in TASKS}},
        "defaults": {"language": language, "task": transcribe},
        # What the donor says behind its start is the language. Translated it has into English alone.
        "detectable": ["language"],
        **previous,
        **({"translation": {"task": translate, "targets": ["en"]}} if "en" in languages else {}),
    }
