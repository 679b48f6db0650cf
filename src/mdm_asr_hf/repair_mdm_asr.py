# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Repair after the last step: what positions committed together disagree about, found by its confidence, is taken out or
masked again, and refined with the steps that are left.

Positions committed in one step do not know of each other, so that two of them can take the same token ("of of"), or
neighbours that do not go together. Masking committed tokens again is ReMDM's (arXiv 2503.00307); taking out one of
two equal neighbours is ours, since a canvas has no other way of getting shorter.
"""

import torch

from .canvas_mdm_asr import Canvas


def doubled_tokens(canvas: Canvas, below: float) -> torch.BoolTensor:
    """
    The less confident one of two equal neighbours, where its confidence is under `below`: (B, L). Of equally
    confident ones it is the right one; what was drafted stays.
    """
    in_text = canvas.text_positions() & (canvas.tokens != canvas.eos_token_id)
    is_pair = (canvas.tokens[:, 1:] == canvas.tokens[:, :-1]) & in_text[:, 1:]
    left, right = canvas.confidence[:, :-1], canvas.confidence[:, 1:]
    doubled = torch.zeros_like(canvas.mask)
    doubled[:, 1:] |= is_pair & (right <= left) & (right < below)
    doubled[:, :-1] |= is_pair & (left < right) & (left < below)
    return doubled & ~canvas.drafted()


def doubtful_neighbours(canvas: Canvas, below: float) -> torch.BoolTensor:
    """Tokens (B, L) of the text whose confidence is under `below`, as is that of a token beside them."""
    doubtful = canvas.text_positions() & (canvas.tokens != canvas.eos_token_id) & (canvas.confidence < below)
    beside = torch.zeros_like(doubtful)
    beside[:, 1:] |= doubtful[:, :-1]
    beside[:, :-1] |= doubtful[:, 1:]
    return doubtful & beside & ~canvas.drafted()


def repair(canvas: Canvas, doubled_below: float, doubtful_below: float, max_denoising_steps: int) -> bool:
    """
    Takes doubled tokens out, and masks again, in place, the tokens to both sides of the gap and doubtful neighbours.
    Rows without steps left only lose their doubled tokens.

    Args:
        canvas ([`Canvas`]): without open positions.
        doubled_below (`float`): see `doubled_tokens`; 0 takes nothing out.
        doubtful_below (`float`): see `doubtful_neighbours`; 0 masks none.
        max_denoising_steps (`int`): the most decoder evaluations of a row, all in all.

    Returns:
        `bool`: whether there is something to refine.
    """
    has_steps = (canvas.nfe < max_denoising_steps)[:, None]
    doubled = doubled_tokens(canvas, doubled_below)
    # Before the tokens move: a gap's neighbours are the kept tokens to both sides of it.
    left = torch.zeros_like(doubled)
    left[:, :-1] = doubled[:, 1:]
    right = torch.zeros_like(doubled)
    right[:, 1:] = doubled[:, :-1]
    again = (left | right | doubtful_neighbours(canvas, doubtful_below)) & ~doubled & ~canvas.drafted()
    again = again & canvas.text_positions() & has_steps
    canvas.reopen(again)
    canvas.take_out(doubled, filling=torch.where(has_steps, canvas.mask_token_id, canvas.eos_token_id))
    return bool(canvas.open_positions().any())


__all__ = ["doubled_tokens", "doubtful_neighbours", "repair"]
