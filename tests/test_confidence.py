# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidences of utterances."""

import numpy as np
import pytest

from mdm_asr_hf.confidence_mdm_asr import utterance_confidence


def test_geometric_mean_by_hand():
    confidence = np.array([[0.5, 0.25, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert utterance_confidence(confidence) == [pytest.approx(0.0625 ** (1 / 3)), None]
