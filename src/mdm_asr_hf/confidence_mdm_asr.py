# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidences: calibrated, and brought together for words and utterances."""

import math
from typing import Any

import numpy as np


def calibrate(confidence: np.ndarray, temperature: float) -> np.ndarray:
    """
    Temperature scaling (arXiv 1706.04599) of committed tokens: sigmoid(logit(p) / temperature).

    Args:
        confidence (`np.ndarray`): probabilities; 0 is padding and stays 0, 1 is a drafted token and stays 1.
        temperature (`float`): above 1 makes them less sure.
    """
    if temperature == 1.0:
        return confidence
    exact = confidence.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        scaled = 1 / (1 + np.exp(-np.log(exact / (1 - exact)) / temperature))
    # A token stays above 0, which is padding.
    least = np.finfo(confidence.dtype).tiny
    return np.where(confidence > 0, scaled.astype(confidence.dtype).clip(least), confidence)


def validate_calibration(temperature: Any) -> None:
    """Raises ValueError if `confidence_temperature` has no meaning."""
    if not is_finite(temperature) or temperature <= 0:
        raise ValueError(f"`confidence_temperature` must be a finite number above 0, got {temperature!r}.")


def is_finite(value: Any) -> bool:
    """Whether a setting is a number, neither infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def utterance_confidence(confidence: Any) -> list[float | None]:
    """
    Confidence of each utterance: the geometric mean of its tokens' confidences (B, W), its end of text included. None
    for one that nothing was decoded of.
    """
    # Every committed token has a probability above 0. Padding, and the end of text a row without speech is given, have
    # 0.
    rows = [[one for one in row if one > 0] for row in confidence.tolist()]
    return [math.exp(sum(map(math.log, row)) / len(row)) if row else None for row in rows]


__all__ = ["calibrate", "is_finite", "utterance_confidence", "validate_calibration"]
