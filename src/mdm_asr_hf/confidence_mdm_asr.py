# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidences: calibrated, and brought together for words and utterances."""

import math
from typing import Any

import torch

# Log-odds are counted to this much either way: beyond 9.9 (0.99995) no calibration set has enough errors to tell.
MAX_LOG_ODDS = 9.9
CONTEXT_KEYS = {"mean", "pace"}


def calibrate(
    confidence: torch.Tensor,
    temperature: float = 1.0,
    bias: float = 0.0,
    context: dict[str, float] | None = None,
    duration_s: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Scales the log-odds of committed tokens: sigmoid(logit(p) / temperature + bias), which is temperature scaling
    (arXiv 1706.04599), and with a `context` also takes in how the rest of the utterance went.

    Args:
        confidence (`torch.Tensor` of shape (B, W)): probabilities; 0 is padding and stays 0, 1 is a drafted token and
            stays 1.
        temperature (`float`): above 1 makes them less sure.
        bias (`float`): added to the log-odds.
        context (`dict`, *optional*): what is added to the log-odds besides: "mean" times the mean of the log-odds of
            the row's tokens, and "pace" times the logarithm of its tokens per second.
        duration_s (`torch.Tensor` of shape (B,), *optional*): seconds of audio; a pace without them counts as 1.
    """
    if temperature == 1.0 and bias == 0.0 and not context:
        return confidence
    is_scored = (confidence > 0) & (confidence < 1)
    log_odds = torch.logit(confidence.double(), eps=1e-12).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)
    scaled = log_odds / temperature + bias
    if context:
        num_scored = is_scored.sum(dim=-1, keepdim=True).clamp(min=1)
        scaled = (
            scaled + context["mean"] * log_odds.masked_fill(~is_scored, 0.0).sum(dim=-1, keepdim=True) / num_scored
        )
        if duration_s is not None:
            num_tokens = (confidence > 0).sum(dim=-1).clamp(min=1).double()
            pace = (num_tokens / duration_s.to(num_tokens.device).double().clamp(min=1e-2)).log()
            scaled = scaled + context["pace"] * pace[:, None]
    return torch.where(is_scored, torch.sigmoid(scaled).to(confidence.dtype), confidence)


def validate_calibration(temperature: Any, bias: Any, context: Any) -> None:
    """Raises ValueError on settings `confidence_temperature`, `confidence_bias`, `confidence_context` without
    meaning."""
    if not is_finite(temperature) or temperature <= 0:
        raise ValueError(f"`confidence_temperature` must be a finite number above 0, got {temperature!r}.")
    if not is_finite(bias):
        raise ValueError(f"`confidence_bias` must be a finite number, got {bias!r}.")
    if context is None:
        return
    if not isinstance(context, dict) or set(context) != CONTEXT_KEYS or not all(map(is_finite, context.values())):
        raise ValueError(
            f"`confidence_context` must be None or a dict of numbers with {sorted(CONTEXT_KEYS)}, got {context!r}."
        )


def is_finite(value: Any) -> bool:
    """Whether a setting is a number, neither infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def utterance_confidence(confidence: torch.Tensor) -> list[float | None]:
    """
    Confidence of each utterance: the geometric mean of its tokens' confidences (B, W), its end of text included. None
    for one that nothing was decoded of.
    """
    # Every committed token has a probability above 0. Padding, and the end of text a row without speech is given, have
    # 0.
    rows = [row[row > 0] for row in confidence.float()]
    return [float(row.log().mean().exp()) if len(row) else None for row in rows]


__all__ = ["calibrate", "is_finite", "utterance_confidence", "validate_calibration"]
