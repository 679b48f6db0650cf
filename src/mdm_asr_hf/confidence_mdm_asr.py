# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidences: calibrated, and brought together for words and utterances."""

import torch


def calibrate(confidence: torch.Tensor, temperature: float = 1.0, bias: float = 0.0) -> torch.Tensor:
    """
    Temperature scaling (arXiv 1706.04599) of the log-odds of committed tokens: sigmoid(logit(p) / temperature + bias).

    Args:
        confidence (`torch.Tensor`): probabilities; 0 is padding and stays 0.
        temperature (`float`): above 1 makes them less sure.
        bias (`float`): added to the log-odds.
    """
    if temperature == 1.0 and bias == 0.0:
        return confidence
    # Committed tokens keep a confidence above 0, which tells them from padding.
    smallest = torch.finfo(torch.float32).tiny
    calibrated = torch.sigmoid(torch.logit(confidence.double(), eps=1e-12) / temperature + bias).float()
    return torch.where(confidence > 0, calibrated.clamp(min=smallest), 0.0).to(confidence.dtype)


def utterance_confidence(confidence: torch.Tensor) -> list[float | None]:
    """
    Confidence of each utterance: the geometric mean of its tokens' confidences (B, W), its end of text included. None
    for one that nothing was decoded of.
    """
    # Every committed token has a probability above 0. Padding, and the end of text a row without speech is given, have
    # 0.
    rows = [row[row > 0] for row in confidence.float()]
    return [float(row.log().mean().exp()) if len(row) else None for row in rows]


__all__ = ["calibrate", "utterance_confidence"]
