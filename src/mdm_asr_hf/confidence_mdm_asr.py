# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidences: calibrated, and brought together for words and utterances."""

import math
from typing import Any

import torch


def calibrate(confidence: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Temperature scaling (arXiv 1706.04599) of committed tokens: sigmoid(logit(p) / temperature).

    Args:
        confidence (`torch.Tensor`): probabilities; 0 is padding and stays 0, 1 is a drafted token and stays 1.
        temperature (`float`): above 1 makes them less sure.
    """
    if temperature == 1.0:
        return confidence
    scaled = torch.sigmoid(torch.logit(confidence.double()) / temperature).to(confidence.dtype)
    # A token stays above 0, which is padding.
    return torch.where(confidence > 0, scaled.clamp(min=torch.finfo(scaled.dtype).tiny), confidence)


def validate_calibration(temperature: Any) -> None:
    """Raises ValueError if `confidence_temperature` has no meaning."""
    if not is_finite(temperature) or temperature <= 0:
        raise ValueError(f"`confidence_temperature` must be a finite number above 0, got {temperature!r}.")


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
