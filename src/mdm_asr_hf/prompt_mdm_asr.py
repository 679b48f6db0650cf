# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoder prompts: the one place that turns language, task and punctuation into the visible prefix of a canvas."""

from typing import Any

import torch

# A template is plain JSON, so that generation_config.json and processor_config.json can hold the same one:
#   {"tokens": [7, "language", 9],               an int is a fixed token id, a str names a slot
#    "slots": {"language": {"en": 62}},          the token id of each value a slot can take
#    "defaults": {"language": "en"}}             "@slot" takes the value of another slot
PromptTemplate = dict[str, Any]


def validate_prompt_template(template: PromptTemplate) -> None:
    """Raises ValueError if the template's tokens, slots and defaults do not fit together."""
    if not isinstance(template, dict) or not template.get("tokens"):
        raise ValueError(f"`prompt_template` must be a dict with a non-empty list `tokens`, got {template!r}.")
    slots, defaults = template.get("slots", {}), template.get("defaults", {})
    for item in template["tokens"]:
        if isinstance(item, str) and not slots.get(item):
            raise ValueError(f"`prompt_template` uses the slot {item!r}, but `slots` gives no values for it.")
        if not isinstance(item, (int, str)) or isinstance(item, bool):
            raise ValueError(f"`prompt_template` tokens must be token ids or slot names, got {item!r}.")
    for name, value in defaults.items():
        if name not in slots or not (value in slots[name] or (str(value).startswith("@") and value[1:] in slots)):
            raise ValueError(f"`prompt_template` default {name}={value!r} is not a value of a slot.")


def _token_id(template: PromptTemplate, slot: str, values: dict[str, Any]) -> int:
    value = values.get(slot)
    if value is None:
        value = template.get("defaults", {}).get(slot)
    if isinstance(value, str) and value.startswith("@"):
        return _token_id_of_value(template, slot, _resolve(template, value[1:], values))
    if value is None:
        raise ValueError(
            f"`{slot}` has no default in this model's prompt. Pass one of {sorted(template['slots'][slot])}."
        )
    return _token_id_of_value(template, slot, value)


def _resolve(template: PromptTemplate, slot: str, values: dict[str, Any]) -> Any:
    value = values.get(slot)
    return template.get("defaults", {}).get(slot) if value is None else value


def _token_id_of_value(template: PromptTemplate, slot: str, value: Any) -> int:
    choices = template["slots"][slot]
    key = str(value).lower() if isinstance(value, bool) else str(value)
    for candidate in (key, key.lower(), key.lower().removeprefix("<|").removesuffix("|>")):
        if candidate in choices:
            return choices[candidate]
    raise ValueError(f"`{slot}={value!r}` is not known to this model. Use one of {sorted(choices)}.")


def build_prompt_ids(template: PromptTemplate, batch_size: int = 1, **slots: Any) -> torch.LongTensor:
    """
    Builds the decoder prompts of a batch.

    Args:
        template (`dict`): the prompt template of the checkpoint, see above.
        batch_size (`int`): B.
        slots: a value per slot (`language="de"`, `punctuation=False`), or a list of B values. None means the default.

    Returns:
        `torch.LongTensor` of shape (B, P).

    Raises:
        ValueError: an unknown slot or value, or a list of another length than B.
    """
    validate_prompt_template(template)
    known = template.get("slots", {})
    for name, value in slots.items():
        if value is not None and name not in known:
            raise ValueError(
                f"`{name}={value!r}` has no place in this model's prompt"
                + (f", which takes {sorted(known)}." if known else ", which is fixed. Leave the argument out.")
            )
        if isinstance(value, (list, tuple)) and len(value) != batch_size:
            raise ValueError(
                f"`{name}` has {len(value)} values for a batch of {batch_size}. Pass one, or one per row."
            )
    rows = []
    for row in range(batch_size):
        values = {k: v[row] if isinstance(v, (list, tuple)) else v for k, v in slots.items()}
        rows.append([t if isinstance(t, int) else _token_id(template, t, values) for t in template["tokens"]])
    return torch.tensor(rows, dtype=torch.long).reshape(batch_size, len(template["tokens"]))


__all__ = ["PromptTemplate", "build_prompt_ids", "validate_prompt_template"]
