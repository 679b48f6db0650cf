# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidences, brought together for utterances."""

import math
from typing import Any


def utterance_confidence(confidence: Any) -> list[float | None]:
    """
    Confidence of each utterance: the geometric mean of its tokens' confidences (B, W), its end of text included. None
    for one that nothing was decoded of.
    """
    # Every committed token has a probability above 0. Padding, and the end of text a row without speech is given, have
    # 0.
    rows = [[one for one in row if one > 0] for row in confidence.tolist()]
    return [math.exp(sum(map(math.log, row)) / len(row)) if row else None for row in rows]


__all__ = ["utterance_confidence"]
