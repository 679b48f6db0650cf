# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoder prompts: the one place that turns language, task and punctuation into the visible prefix of a canvas."""

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
except ImportError:
    # Where exported models run without it, languages go by their codes alone.
    TO_LANGUAGE_CODE = {}

# A template is plain JSON, so that generation_config.json and processor_config.json can hold the same one:
#   {"tokens": [7, "language", 9],               an int is a fixed token id, a str names a slot
#    "slots": {"language": {"en": 62}},          the token id of each value a slot can take
#    "defaults": {"language": "en"},             "@slot" takes the value of another slot
#    "detectable": ["language"],                 slots the model can predict from the tokens before them
#    "translation": {"task": "translate",        what `task` is when `target_language` is not `language`,
#                    "targets": ["en"]},         and, where not all are, the languages that can be translated into
#    "previous": 50361}                          the token id behind which earlier text stands, before all of it
PromptTemplate = dict[str, Any]
PARTS = ("tokens", "slots", "defaults", "detectable", "translation", "previous")

# The value of `language` that has it detected.
AUTO = "auto"
LANGUAGE_SLOTS = ("language", "target_language")
BOOLEANS = {"yes": "true", "1": "true", "no": "false", "0": "false"}
# Codes that data sets use for a language that the models know by another code.
OTHER_CODES = {"cmn": "zh", "fil": "tl", "iw": "he", "jv": "jw", "nb": "no"}
# Up to so many choices are listed in an error.
MAX_LISTED = 30


def validate_prompt_template(template: PromptTemplate) -> None:
    """Raises ValueError if the template's parts do not fit together."""
    if not isinstance(template, dict) or not template.get("tokens"):
        raise ValueError(f"`prompt_template` must be a dict with a non-empty list `tokens`, got {template!r}.")
    if unknown := sorted(set(template) - set(PARTS)):
        raise ValueError(f"`prompt_template` has the unknown parts {unknown}. It can have {list(PARTS)}.")
    tokens, slots, defaults = template["tokens"], template.get("slots", {}), template.get("defaults", {})
    for item in tokens:
        if isinstance(item, str) and not slots.get(item):
            raise ValueError(f"`prompt_template` uses the slot {item!r}, but `slots` gives no values for it.")
        if not isinstance(item, (int, str)) or isinstance(item, bool):
            raise ValueError(f"`prompt_template` tokens must be token ids or slot names, got {item!r}.")
    detectable = template.get("detectable", [])
    for name in detectable:
        if name != "language" or name not in tokens or not detection_prefix(template):
            raise ValueError(
                f"`prompt_template` has {name!r} detectable. Only 'language' can be, behind fixed token ids alone."
            )
    for name, value in defaults.items():
        is_value = name in slots and (value in slots[name] or (str(value).startswith("@") and value[1:] in slots))
        if not is_value and not (value == AUTO and name in detectable):
            raise ValueError(f"`prompt_template` default {name}={value!r} is not a value of a slot.")
    if (translation := template.get("translation")) is not None:
        languages, tasks = slots.get("language", {}), slots.get("task", {})
        targets = set(translation.get("targets") or languages)
        if translation.get("task") not in tasks or len(tasks) < 2 or not languages or not targets <= set(languages):
            raise ValueError(
                f"`prompt_template` translation {translation!r} must name one of several values of the slot 'task', "
                "and as `targets` values of the slot 'language'."
            )


def map_prompt_ids(template: PromptTemplate, change: Callable[[int], int]) -> PromptTemplate:
    """A copy of the template with what `change` makes of its token ids in their places."""
    changed = {**template, "tokens": [t if isinstance(t, str) else change(t) for t in template["tokens"]]}
    if "slots" in template:
        changed["slots"] = {
            name: {value: change(token_id) for value, token_id in values.items()}
            for name, values in template["slots"].items()
        }
    if template.get("previous") is not None:
        changed["previous"] = change(template["previous"])
    return changed


def build_prompt_ids(template: PromptTemplate, batch_size: int = 1, **slots: Any) -> np.ndarray:
    """
    Builds the decoder prompts of a batch.

    Args:
        template (`dict`): the prompt template of the checkpoint, see above.
        batch_size (`int`): B.
        slots: a value per slot (`language="de"`, `punctuation=False`), or a list of B values. None means the default.

    Returns:
        `np.ndarray` of shape (B, P). Every row has one token per item of the template.

    Raises:
        ValueError: an unknown slot or value, a list of another length than B, or a language that is not known yet.
    """
    ids = []
    for values in prompt_values(template, batch_size, **slots):
        if "language" in values and values["language"] is None:
            raise ValueError(
                "The prompt needs a `language`: only `generate` can detect it, from audio. Pass "
                f"{_choices(template['slots']['language'])}; to train, make `prompt_ids` with it."
            )
        ids.append([t if isinstance(t, int) else template["slots"][t][values[t]] for t in template["tokens"]])
    return np.array(ids, dtype=np.int64).reshape(batch_size, len(template["tokens"]))


def prompt_values(template: PromptTemplate, batch_size: int = 1, **slots: Any) -> list[dict[str, str | None]]:
    """
    What each row's prompt says, slot by slot, in the template's own words: "de" for "German", "<|de|>" or "de-AT".

    Args:
        template, batch_size, slots: as in `build_prompt_ids`; `language` may also be "auto", where a model can detect
            it.

    Returns:
        B dicts of a value per slot. `language`, and what follows from it, is None where it has to be detected.

    Raises:
        ValueError: as in `build_prompt_ids`, or values that contradict each other.
    """
    known = template.get("slots", {})
    takes_target = "target_language" in known or "translation" in template
    for name, value in slots.items():
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        if name == "language" and any(_is_auto(one) for one in given) and not can_detect_language(template):
            remedy = f"Pass {_choices(known['language'])}" if "language" in known else "Leave the argument out"
            raise ValueError(f"`language={value!r}`: this model cannot detect the language. {remedy}.")
        if value is not None and name not in known and not (name == "target_language" and takes_target):
            raise ValueError(
                f"`{name}={value!r}` has no place in this model's prompt"
                + (f", which takes {sorted(known)}." if known else ", which is fixed. Leave the argument out.")
                + (" Times of words need none: set `return_token_timestamps`." if name == "timestamp" else "")
            )
        if isinstance(value, (list, tuple)) and len(value) != batch_size:
            raise ValueError(
                f"`{name}` has {len(value)} values for a batch of {batch_size}. Pass one, or one per row."
            )
    per_row = [
        {k: v[row] if isinstance(v, (list, tuple)) else v for k, v in slots.items()} for row in range(batch_size)
    ]
    return [_row_values(template, values) for values in per_row]


def _row_values(template: PromptTemplate, given: dict[str, Any]) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    references = {}
    for slot in template.get("slots", {}):
        value = given.get(slot)
        value = template.get("defaults", {}).get(slot) if value is None else value
        if isinstance(value, str) and value.startswith("@"):
            references[slot] = value[1:]
        elif slot == "language" and can_detect_language(template) and (value is None or _is_auto(value)):
            values[slot] = None
        elif value is not None:
            values[slot] = slot_value(template, slot, value)
        elif slot in template["tokens"]:
            raise ValueError(
                f"`{slot}` has no default in this model's prompt. Pass {_choices(template['slots'][slot])}."
            )
    for slot, other in references.items():
        value = values.get(other)
        values[slot] = None if value is None else slot_value(template, slot, value)
    if "translation" in template:
        _settle_task(template, given, values)
    return values


def _settle_task(template: PromptTemplate, given: dict[str, Any], values: dict[str, str | None]) -> None:
    """Sets `task`, in place, to what follows from the languages, if a target language is named."""
    translation, language = template["translation"], values["language"]
    target = values.get("target_language")
    if target is None and given.get("target_language") is not None:
        target = slot_value(template, "target_language", given["target_language"])
    targets = translation.get("targets")
    if target is not None and target != language and targets is not None and target not in targets:
        source = "a language yet to be detected" if language is None else repr(language)
        raise ValueError(
            f"`target_language={target!r}`: this model translates into {targets} only, not from "
            f"{source} into {target!r}. Choose one of these, or leave `target_language` out to have the speech "
            "written as it is."
        )
    if target is None or language is None:
        return
    is_translation = target != language
    if given.get("task") is None:
        if is_translation:
            values["task"] = translation["task"]
        elif values["task"] == translation["task"]:
            values["task"] = next(task for task in template["slots"]["task"] if task != translation["task"])
    elif (values["task"] == translation["task"]) != is_translation:
        raise ValueError(
            f"`task={given['task']!r}` contradicts `language={language!r}` with `target_language={target!r}`. Leave "
            "`task` out: it follows from the languages."
        )


def slot_value(template: PromptTemplate, slot: str, value: Any) -> str:
    """
    The template's own word for a value of a slot. Languages also go by their English names, by codes with a region
    ("pt-BR"), and as tokens ("<|pt|>"); true and false also as yes and no.

    Raises:
        ValueError: a value that the slot cannot take.
    """
    # Where a prompt has no target language of its own, it can be any language that the model knows.
    choices = template["slots"].get(slot) or template["slots"]["language"]
    by_lower = {name.lower(): name for name in choices}
    key = str(value).strip().lower().removeprefix("<|").removesuffix("|>")
    found = by_lower.get(key)
    if found is None and slot in LANGUAGE_SLOTS:
        found = _find_language(by_lower, key.replace("_", "-"))
    elif found is None:
        found = by_lower.get(BOOLEANS.get(key, ""))
    if found is None:
        raise ValueError(f"`{slot}={value!r}` is not known to this model. {_nearest(choices, slot, key)}")
    if slot in LANGUAGE_SLOTS:
        # A template may list names beside codes: the code is the shortest.
        same = (name for name in choices if choices[name] == choices[found])
        return min(same, key=lambda name: (len(name), name))
    return found


def _find_language(by_lower: dict[str, str], key: str) -> str | None:
    for one in (key, key.split("-")[0]):
        for name in (one, TO_LANGUAGE_CODE.get(one), OTHER_CODES.get(one)):
            if name in by_lower:
                return by_lower[name]
    # A model may name its languages with a region: "en" is "en-US" when that is the only English.
    code = TO_LANGUAGE_CODE.get(key, key)
    regional = [name for lower, name in by_lower.items() if lower.split("-")[0] == code]
    return regional[0] if len(regional) == 1 else None


def _nearest(choices: Collection[str], slot: str, key: str) -> str:
    """What to choose instead: everything, or of many choices the most similar ones."""
    if len(choices) <= MAX_LISTED or slot not in LANGUAGE_SLOTS:
        return f"Use one of {sorted(choices)}."
    names = {name: code for name, code in TO_LANGUAGE_CODE.items() if code in choices}
    similar = difflib.get_close_matches(key, [*choices, *names], n=4, cutoff=0.6)
    similar = list(dict.fromkeys(names.get(name, name) for name in similar))
    if similar:
        return f"Did you mean one of {similar}? It knows {len(choices)} languages, by code or English name."
    return f"Use {_choices(choices)}."


def _choices(choices: Collection[str]) -> str:
    if len(choices) <= MAX_LISTED:
        return f"one of {sorted(choices)}"
    return f"one of its {len(choices)} languages, by code or English name, such as {sorted(choices)[:3]}"


def can_detect_language(template: PromptTemplate) -> bool:
    """Whether the model of this template can tell the language of speech."""
    return "language" in template.get("detectable", [])


def detection_prefix(template: PromptTemplate) -> list[int]:
    """The token ids of the prompt before its language; none where a slot is among them."""
    prefix = template["tokens"][: template["tokens"].index("language")]
    return prefix if all(isinstance(token, int) for token in prefix) else []


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() == AUTO


def with_prompt_defaults(template: PromptTemplate, **slots: Any) -> PromptTemplate:
    """
    A copy of the template with other defaults, such as `language="de"` of a checkpoint that was fine-tuned on German.
    Give it to both: `model.generation_config.prompt_template` and `processor.prompt_template`.

    Raises:
        ValueError: an unknown slot or value.
    """
    validate_prompt_template(template)
    slots = {name: value for name, value in slots.items() if value is not None}
    (values,) = prompt_values(template, **slots)
    if missing := sorted(set(slots) - set(values)):
        raise ValueError(f"{missing} have no place of their own in this model's prompt, so no default. Set `task`.")
    kept = {name: AUTO if values[name] is None else values[name] for name in slots}
    return {**template, "defaults": {**template.get("defaults", {}), **kept}}


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
