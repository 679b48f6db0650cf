"""Calibration of confidences."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from tiny_models import tiny_inputs, tiny_model

from mdm_asr_hf import MDMASRGenerationConfig
from mdm_asr_hf.confidence_mdm_asr import calibrate, utterance_confidence


def test_temperature_and_geometric_mean_by_hand():
    # logit(0.8) = log 4; halved it is log 2, which is 2/3.
    calibrated = calibrate(np.array([[0.8, 0.5, 1.0, 0.0]], dtype=np.float32), 2.0)
    np.testing.assert_allclose(calibrated, [[2 / 3, 0.5, 1.0, 0.0]], rtol=1e-6)
    assert calibrated.dtype == np.float32

    confidence = np.array([[0.3, 1.0, 0.0]])
    assert calibrate(confidence, 1.0) is confidence

    confidence = np.array([[0.5, 0.25, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert utterance_confidence(confidence) == [pytest.approx(0.0625 ** (1 / 3)), None]


@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=8), st.floats(0.01, 100))
def test_order_range_padding_and_drafts_stay(values, temperature):
    calibrated = calibrate(np.array([*values, 0.0, 1.0], dtype=np.float32), temperature)
    assert calibrated[-2:].tolist() == [0.0, 1.0]
    assert ((calibrated[:-2] > 0) & (calibrated[:-2] <= 1)).all()
    assert (np.diff(calibrated[:-2][np.argsort(values)]) >= 0).all()


def test_the_temperature_is_checked_and_survives_saving(tmp_path):
    for temperature in [0.0, -1.0, float("inf"), float("nan"), True, "1", None]:
        with pytest.raises(ValueError, match="confidence_temperature"):
            MDMASRGenerationConfig(confidence_temperature=temperature)

    MDMASRGenerationConfig(confidence_temperature=1.25).save_pretrained(tmp_path)
    assert MDMASRGenerationConfig.from_pretrained(tmp_path).confidence_temperature == 1.25


@each("num_samples", [1, 2])
def test_generate_calibrates(num_samples):
    model = tiny_model()
    features, mask = tiny_inputs()
    arguments = dict(attention_mask=mask, return_dict_in_generate=True)
    if num_samples > 1:
        arguments |= dict(num_return_sequences=num_samples, temperature=1.0)
    plain, calibrated = (
        model.generate(features, generator=torch.Generator().manual_seed(0), confidence_temperature=t, **arguments)
        for t in (1.0, 1.5)
    )
    # Samples are sorted anew by what was calibrated, so rows are compared as sets.
    expected, found = (
        one.sum(dim=-1).view(len(mask), num_samples).sort().values
        for one in (torch.from_numpy(calibrate(plain.confidence.numpy(), 1.5)), calibrated.confidence)
    )
    torch.testing.assert_close(found, expected)
