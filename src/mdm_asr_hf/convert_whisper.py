# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Whisper as a donor: its weights, weight by weight, its tokenizer (shrunk on request) and its prompt."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedTokenizerFast, WhisperConfig
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .convert_common import (
    EMBEDDING,
    INPUT_ONLY_EMBEDDINGS,
    MASK_TOKEN,
    OUTPUT,
    build_model,
    encoder_settings,
    expected_shapes,
    load_part,
    load_weights,
    match_weights,
    mean_embedding,
    read_json,
    read_safetensors,
    resolve_dtype,
)
from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .processing_mdm_asr import MDMASRProcessor
from .sources_mdm_asr import read_sentences

EOS, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
TASKS = ("transcribe", "translate")
NUM_BYTES = 256
SENTENCES_PER_BATCH = 10_000
# The released models tell the two kinds apart by this number: English-only ones have 51,864 tokens.
MULTILINGUAL_VOCAB_SIZE = 51865
TIMESTAMP_STEP_S = 0.02

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
    vocab_text: str | Path | Iterable[str] | None = None,
    encoder_trailing_silence_s: float = 5.0,
    shift_logits: bool = True,
    dtype: str | torch.dtype | None = torch.float32,
    **hub_kwargs: Any,
) -> nn.Module:
    """
    Builds an MDM-ASR model that holds every weight of a Whisper donor. The mask embedding is the only new parameter.
    Its processor is `MDMASRProcessor.from_whisper(path_or_id, vocab_size=vocab_size, vocab_text=vocab_text)`.

    Args:
        model_class (`type`): `MDMASRForConditionalGeneration` or a subclass.
        path_or_id (`str` or `Path`): a folder or Hub id of `WhisperForConditionalGeneration`, in safetensors.
        vocab_size (`int`, *optional*), vocab_text (*optional*): shrink the vocabulary, see `whisper_tokenizer`.
        encoder_trailing_silence_s (`float`): seconds of silence behind the audio, see `MDMASRConfig`.
        shift_logits (`bool`): read logits one position earlier, as the donor predicts, see `MDMASRConfig`.
        dtype (`str` or `torch.dtype`, *optional*): of the model; None keeps the donor's own.
        hub_kwargs: passed to the download (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

    Returns:
        The model in evaluation mode, with the donor's prompt in its generation config.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape, named; or a donor that is not Whisper's.
    """
    donor_config, multilingual = _read_config(path_or_id, hub_kwargs)
    tokenizer, donor_ids = whisper_tokenizer(path_or_id, vocab_size, vocab_text, **hub_kwargs)
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
        ),
        mask_token_id=ids[MASK_TOKEN],
        eos_token_id=ids[EOS],
        pad_token_id=ids[EOS],
        decoder_start_token_id=ids[START],
        encoder_trailing_silence_s=encoder_trailing_silence_s,
        shift_logits=shift_logits,
    )
    model = build_model(model_class, config)
    donor = read_safetensors(path_or_id, hub_kwargs)
    weights = match_weights(expected_shapes(model, donor_config.vocab_size), donor, WHISPER_NAMES)
    rows = weights[EMBEDDING][donor_ids]
    dtype = resolve_dtype(dtype, own=rows.dtype)
    _set_embeddings(weights, torch.cat([rows.float(), mean_embedding(rows)]), num_predicted)
    load_weights(model, weights, dtype)

    template = whisper_prompt_template(ids, multilingual)
    specials = {ids[token] for token in tokenizer.all_special_tokens}
    model.generation_config = MDMASRGenerationConfig(
        prompt_template=template,
        # Byte-level tokens of other scripts are shorter than those of English.
        canvas_tokens_per_s=12.0 if multilingual else 7.0,
        max_length=donor_config.max_target_positions,
        max_new_tokens=donor_config.max_target_positions - len(template["tokens"]),
        # Timestamps, languages and tasks stand in no transcript.
        suppress_tokens=sorted(i for i in specials if i < num_predicted and i != ids[EOS]) or None,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )
    return model.eval()


def whisper_processor(
    path_or_id: str | Path,
    *,
    vocab_size: int | None = None,
    vocab_text: str | Path | Iterable[str] | None = None,
    **hub_kwargs: Any,
) -> MDMASRProcessor:
    """
    Builds the processor that belongs to `from_whisper(path_or_id)`: the donor's features on the audio's own length,
    its tokenizer and its prompt.

    Args:
        path_or_id (`str` or `Path`): see `from_whisper`.
        vocab_size (`int`, *optional*), vocab_text (*optional*): the same as for the model, see `whisper_tokenizer`.
        hub_kwargs: passed to the download.
    """
    donor_config, multilingual = _read_config(path_or_id, hub_kwargs)
    tokenizer, _ = whisper_tokenizer(path_or_id, vocab_size, vocab_text, **hub_kwargs)
    frontend = load_part(AutoFeatureExtractor, path_or_id, hub_kwargs)
    if frontend.feature_size != donor_config.num_mel_bins:
        raise ValueError(
            f"The donor's feature extractor gives {frontend.feature_size} mel bins, its encoder takes "
            f"{donor_config.num_mel_bins}."
        )
    return MDMASRProcessor(
        MDMASRFeatureExtractor(frontend, max_duration_s=float(frontend.chunk_length)),
        tokenizer,
        prompt_template=whisper_prompt_template(tokenizer.get_vocab(), multilingual),
        # Whisper writes a space before the first word.
        text_prefix=" ",
    )


def load_whisper_named(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """
    Loads an MDM-ASR model's own weights, mask embedding and all, that are stored under Whisper's names: the embedding
    (V + E, D) in one piece. The dtype stays the model's.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape, named.
    """
    weights = match_weights(expected_shapes(model, model.config.num_token_ids), tensors, WHISPER_NAMES)
    _set_embeddings(weights, weights[EMBEDDING], model.config.vocab_size)
    load_weights(model, weights, model.dtype)


def _set_embeddings(weights: dict[str, torch.Tensor], rows: torch.Tensor, num_predicted: int) -> None:
    """Divides the embeddings (V + E, D) into those of the ids that are predicted and those that are not, in place."""
    weights[EMBEDDING] = weights[OUTPUT] = rows[:num_predicted].clone()
    weights[INPUT_ONLY_EMBEDDINGS] = rows[num_predicted:].clone()


def _read_config(path_or_id: str | Path, hub_kwargs: dict[str, Any]) -> tuple[WhisperConfig, bool]:
    """The donor's configuration, and whether it is multilingual."""
    model_type = read_json(path_or_id, "config.json", hub_kwargs).get("model_type")
    if model_type != "whisper":
        raise ValueError(
            f"`path_or_id` {str(path_or_id)!r} is no Whisper donor: its config.json has the model type "
            f"{model_type!r}. Pass a folder or Hub id of WhisperForConditionalGeneration."
        )
    config = WhisperConfig.from_pretrained(str(path_or_id), **hub_kwargs)
    # English-only models list the languages too, so their tokens tell nothing.
    stated = read_json(path_or_id, "generation_config.json", hub_kwargs).get("is_multilingual")
    return config, config.vocab_size >= MULTILINGUAL_VOCAB_SIZE if stated is None else bool(stated)


# Tokenizer and prompt


def whisper_tokenizer(
    path_or_id: str | Path,
    vocab_size: int | None = None,
    vocab_text: str | Path | Iterable[str] | None = None,
    **hub_kwargs: Any,
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """
    The donor's tokenizer with a mask token, and the donor's embedding row of each of its ids.

    Args:
        path_or_id (`str` or `Path`): see `from_whisper`.
        vocab_size (`int`, *optional*):
            N: keep N ids of the byte-level BPE, the 256 bytes and N - 256 merges, the first or, with `vocab_text`, the
            most used ones. Ids become contiguous, and any text can still be written. Behind them come end of text, the
            prompt's tokens and the mask; everything else goes. None keeps all.
        vocab_text (`str`, `Path` or `Iterable[str]`, *optional*):
            Sentences of the kind to be recognised, or a file of them, one a line (.txt, .txt.gz). The tokens that they
            use most are kept, and those that these are merged of, so that a word whose token is kept is still written
            with it. Whisper's order of merges is that of web pages: of speech, the most used 16,384 ids write more
            than the first 32,768.
        hub_kwargs: passed to the download.

    Returns:
        `PreTrainedTokenizerFast`, and the list of the donor ids of ids 0, 1, ..., without the mask.

    Raises:
        ValueError: not a byte-level BPE in merge order, `vocab_size` out of range, or `vocab_text` empty or alone.
    """
    if vocab_text is not None and vocab_size is None:
        raise ValueError("`vocab_text` chooses which `vocab_size` ids are kept. Pass `vocab_size`, too.")
    donor_config, multilingual = _read_config(path_or_id, hub_kwargs)
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
        counts = None if vocab_text is None else _count_tokens(spec, vocab_text)
        text_ids = _shrink_bpe(spec["model"], set(donor_ids), vocab_size, counts)
        kept = [EOS, *_prompt_tokens(donor_ids, multilingual)]
        ids = {token: vocab_size + i for i, token in enumerate(kept)}
        kept_ids = [*text_ids, *(donor_ids[token] for token in kept)]
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


def _count_tokens(spec: dict[str, Any], text: str | Path | Iterable[str]) -> Counter:
    """How often the sentences use each id. They begin with a space, as transcripts do."""
    tokenizer = Tokenizer.from_str(json.dumps({**spec, "post_processor": None}))
    counts = Counter()
    sentences = read_sentences(text, "vocab_text") if isinstance(text, (str, Path)) else text
    stripped = (f" {sentence.strip()}" for sentence in sentences if sentence.strip())
    while batch := list(islice(stripped, SENTENCES_PER_BATCH)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    if not counts:
        raise ValueError(f"`vocab_text` {text!r} holds no text. Pass sentences of the kind to be recognised.")
    return counts


def _shrink_bpe(bpe: dict[str, Any], specials: set[str], vocab_size: int, counts: Counter | None) -> list[int]:
    """
    Shrinks a byte-level BPE, in place, to `vocab_size` ids: the most used ones by `counts`, if given, then the first.
    Returns what the ids 0, 1, ... were before.
    """
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
    parts = {NUM_BYTES + i: (vocab[left], vocab[right]) for i, (left, right) in enumerate(merges)}
    kept = set(range(NUM_BYTES))
    # By use, and those used alike in the order of the merges.
    used = sorted((i for i in counts or () if i in parts), key=lambda i: (-counts[i], i))
    for wanted in (*used, *range(NUM_BYTES, num_ids)):
        new, left = set(), [wanted]
        while left:
            token = left.pop()
            if token not in kept and token not in new:
                new.add(token)
                left += parts[token]
        # A token with many parts may not fit any more where a simpler one does.
        if len(kept) + len(new) <= vocab_size:
            kept |= new
    # In the order of the merges, which is that of their use in a text.
    ordered = sorted(kept)
    names = {i: token for token, i in vocab.items()}
    bpe["vocab"] = {names[i]: new for new, i in enumerate(ordered)}
    bpe["merges"] = [list(merges[i - NUM_BYTES]) for i in ordered[NUM_BYTES:]]
    return ordered


def _prompt_tokens(ids: dict[str, int], multilingual: bool) -> list[str]:
    """The special tokens the decoder prompt is made of."""
    if not multilingual:
        return [START, NO_TIMESTAMPS]
    languages = [f"<|{code}|>" for code in LANGUAGES if f"<|{code}|>" in ids]
    return [START, *languages, *(f"<|{task}|>" for task in TASKS), NO_TIMESTAMPS]


def whisper_prompt_template(ids: dict[str, int], multilingual: bool) -> dict[str, Any]:
    """
    The prompt of a Whisper donor: start, then language and task where there is a choice, then no timestamps. Times of
    words do not come from tokens here, so that there is no choice of `timestamp`.

    Args:
        ids (`dict[str, int]`): the ids of the special tokens.
        multilingual (`bool`): English-only models have no choice.
    """
    if not multilingual:
        return {"tokens": [ids[START], ids[NO_TIMESTAMPS]]}
    languages = {code: ids[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in ids}
    if not languages:
        raise ValueError("The donor is multilingual, but its tokenizer has no language tokens such as '<|en|>'.")
    transcribe, translate = TASKS
    return {
        "tokens": [ids[START], "language", "task", ids[NO_TIMESTAMPS]],
        "slots": {"language": languages, "task": {task: ids[f"<|{task}|>"] for task in TASKS}},
        "defaults": {"language": "en" if "en" in languages else next(iter(languages)), "task": transcribe},
        # What the donor says behind its start is the language. Translated it has into English alone.
        "detectable": ["language"],
        **({"translation": {"task": translate, "targets": ["en"]}} if "en" in languages else {}),
    }


__all__ = [
    "MASK_TOKEN",
    "from_whisper",
    "load_whisper_named",
    "whisper_processor",
    "whisper_prompt_template",
    "whisper_tokenizer",
]
