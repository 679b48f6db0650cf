# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Which language is spoken: what a Whisper donor predicts behind the start of its prompt (arXiv 2212.04356)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .prompt_mdm_asr import PromptTemplate, can_detect_language, detection_prefix, prompt_values, slot_value


@dataclass
class DetectedLanguages:
    """
    The languages of B utterances among N.

    Args:
        languages (`list[str]`): the most probable one of each utterance, by its code.
        codes (`list[str]`): those that were to choose from.
        probabilities (`np.ndarray` of shape (B, N)): of the codes, given that it is one of them. Their products
            over the windows of a recording tell its language.
    """

    languages: list[str]
    codes: list[str]
    probabilities: np.ndarray


def detect_languages(model: Any, encoder_outputs: Any, template: PromptTemplate | None = None) -> DetectedLanguages:
    """
    One evaluation of the decoder on the prompt up to its language, whose token it predicts. With drafts that is what
    the donor computes; on a canvas with `shift_logits` too, as long as its weights are the donor's, but diffusion
    training does not train it.

    Args:
        model ([`MDMASRForConditionalGeneration`]).
        encoder_outputs ([`MDMASREncoderOutput`]): of B utterances, see `model.encode`.
        template (`dict`, *optional*): the prompt's. Default: the one of the model's generation config.

    Raises:
        ValueError: the model cannot tell languages, or its vocabulary was shrunk to text.
    """
    template = model.generation_config.prompt_template if template is None else template
    if not template or not can_detect_language(template):
        raise ValueError(
            "This model cannot detect the language; only those made of a multilingual Whisper can. Pass `language`, "
            "or leave it out if the model has one language only."
        )
    choices = template["slots"]["language"]
    ids = {slot_value(template, "language", name): token_id for name, token_id in choices.items()}
    vocab_size = model.config.vocab_size
    if max(ids.values()) >= vocab_size:
        raise ValueError(
            "The language cannot be detected: the vocabulary was shrunk to text, so that the language tokens (ids up "
            f"to {max(ids.values())}) are never predicted ({vocab_size} ids are). Pass `language`, or convert the "
            "donor without `vocab_size`."
        )
    prefix = detection_prefix(template)
    if not (model.config.has_drafts or model.config.shift_logits):
        prefix = [*prefix, model.config.mask_token_id]
    prompt_ids = np.broadcast_to(np.array(prefix), (len(encoder_outputs.last_hidden_state), len(prefix)))
    logits = model.prompt_logits(prompt_ids, encoder_outputs)
    # Of these ids alone: `suppress_tokens` keeps languages out of texts, and has no say here.
    logits = logits[:, list(ids.values())]
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    codes = list(ids)
    return DetectedLanguages(
        languages=[codes[i] for i in probabilities.argmax(axis=-1)], codes=codes, probabilities=probabilities
    )


def settle_languages(
    model: Any,
    encoder_outputs: Any,
    template: PromptTemplate | None,
    slots: dict[str, Any],
) -> tuple[dict[str, Any], list[str] | None]:
    """
    Detects the languages that the slots of a prompt leave open.

    Args:
        model, encoder_outputs: as in `detect_languages`, with `cross_attention_states`.
        template (`dict`, *optional*): of the prompt.
        slots (`dict`): what `build_prompt_ids` takes; `language` may be "auto".

    Returns:
        The slots with every language settled, and the language of each row, by its code; None if the prompt has none.
    """
    batch_size = len(encoder_outputs.last_hidden_state)
    if not template or "language" not in template["tokens"]:
        return slots, None
    languages = [values["language"] for values in prompt_values(template, batch_size, **slots)]
    rows = [row for row, language in enumerate(languages) if language is None]
    if rows:
        detected = detect_languages(model, model.take_rows(encoder_outputs, np.array(rows)), template)
        for row, language in zip(rows, detected.languages, strict=True):
            languages[row] = language
    return {**slots, "language": languages}, languages


__all__ = ["DetectedLanguages", "detect_languages", "settle_languages"]
