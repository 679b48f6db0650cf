"""Calibration of confidences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_model

from mdm_asr_hf import MDMASRGenerationConfig
from mdm_asr_hf.confidence_mdm_asr import calibrate, utterance_confidence


def test_without_settings_nothing_changes():
    confidence = torch.tensor([[0.3, 1.0, 0.0]])
    assert calibrate(confidence) is confidence


def test_temperature_and_bias_by_hand():
    # logit(0.8) = log 4; halved it is log 2, which is 2/3. With log 2 more it is log 4 again.
    confidence = torch.tensor([[0.8, 0.5]])
    torch.testing.assert_close(calibrate(confidence, 2.0), torch.tensor([[2 / 3, 0.5]]))
    torch.testing.assert_close(calibrate(confidence, 2.0, math.log(2)), torch.tensor([[0.8, 2 / 3]]))


def test_context_by_hand():
    # Log-odds log 4 and log 16: their mean is log 8. Three tokens, one of them drafted, in 1.5 seconds: a pace of 2.
    confidence = torch.tensor([[0.8, 1.0, 16 / 17, 0.0]])
    mean = calibrate(confidence, context={"mean": 1 / 3, "pace": 0.0})
    torch.testing.assert_close(mean, torch.tensor([[8 / 9, 1.0, 32 / 33, 0.0]]))
    pace = calibrate(confidence, context={"mean": 0.0, "pace": 2.0}, duration_s=torch.tensor([1.5]))
    torch.testing.assert_close(pace, torch.tensor([[16 / 17, 1.0, 64 / 65, 0.0]]))
    # Without durations the pace counts as 1.
    torch.testing.assert_close(calibrate(confidence, context={"mean": 0.0, "pace": 2.0}), confidence)


@given(
    st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=8),
    st.floats(0.2, 5),
    st.floats(-3, 3),
    st.floats(-1, 1),
)
def test_order_range_and_padding_stay(values, temperature, bias, weight):
    confidence = torch.tensor([[*values, 0.0, 0.0], [1.0] * (len(values) + 2)])
    context = {"mean": weight, "pace": weight}
    calibrated = calibrate(confidence, temperature, bias, context, torch.tensor([2.0, 0.0]))
    assert (calibrated[0, -2:] == 0).all() and (calibrated[1] == 1).all()
    assert ((calibrated[0, :-2] > 0) & (calibrated[0, :-2] <= 1)).all()
    order = torch.tensor(values).sort().indices
    assert (calibrated[0, :-2][order].diff() >= 0).all()
    # Rows do not depend on their batch.
    alone = calibrate(confidence[:1], temperature, bias, context, torch.tensor([2.0]))
    torch.testing.assert_close(alone[0], calibrated[0], rtol=0, atol=0)


def test_utterance_confidence_is_the_geometric_mean():
    confidence = torch.tensor([[0.5, 0.25, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert utterance_confidence(confidence) == [pytest.approx(0.0625 ** (1 / 3)), None]


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"confidence_temperature": 0.0}, "confidence_temperature"),
        ({"confidence_temperature": float("inf")}, "confidence_temperature"),
        ({"confidence_temperature": True}, "confidence_temperature"),
        ({"confidence_bias": float("nan")}, "confidence_bias"),
        ({"confidence_bias": "0"}, "confidence_bias"),
        ({"confidence_context": {"mean": 0.1}}, "confidence_context"),
        ({"confidence_context": {"mean": 0.1, "pace": None}}, "confidence_context"),
        ({"confidence_context": [0.1, 0.2]}, "confidence_context"),
    ],
)
def test_settings_without_meaning_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        MDMASRGenerationConfig(**settings)


def test_settings_survive_saving(tmp_path):
    settings = MDMASRGenerationConfig(confidence_temperature=1.25, confidence_context={"mean": 0.5, "pace": 0.25})
    settings.save_pretrained(tmp_path)
    loaded = MDMASRGenerationConfig.from_pretrained(tmp_path)
    assert loaded.confidence_temperature == 1.25 and loaded.confidence_context == {"mean": 0.5, "pace": 0.25}


@pytest.mark.parametrize("num_samples", [1, 2])
def test_generate_calibrates_with_each_rows_duration(num_samples):
    model = tiny_model()
    features, mask = tiny_inputs()
    arguments = dict(attention_mask=mask, return_dict_in_generate=True)
    if num_samples > 1:
        arguments |= dict(num_return_sequences=num_samples, temperature=1.0)
    runs = []
    for settings in ({}, {"confidence_temperature": 1.5, "confidence_context": {"mean": 0.2, "pace": 0.7}}):
        generator = torch.Generator().manual_seed(0)
        runs.append(model.generate(features, generator=generator, **arguments, **settings))
    plain, calibrated = runs
    durations = (mask.sum(dim=-1) / 100).repeat_interleave(num_samples)
    expected = calibrate(plain.confidence, 1.5, 0.0, {"mean": 0.2, "pace": 0.7}, durations)
    # Samples are sorted anew by what was calibrated, so rows are compared as sets.
    for row in range(len(mask)):
        ours = slice(row * num_samples, (row + 1) * num_samples)
        torch.testing.assert_close(
            calibrated.confidence[ours].sum(dim=-1).sort().values, expected[ours].sum(dim=-1).sort().values
        )
