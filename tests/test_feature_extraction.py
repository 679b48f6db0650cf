# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDMASRFeatureExtractor: the stock features, for every clip alone, and nothing that is not finite."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each
from transformers import (
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from mdm_asr_hf import feature_extraction_mdm_asr
from mdm_asr_hf.feature_extraction_mdm_asr import MDMASRFeatureExtractor

RATE = 16_000
FRONTENDS = {
    "whisper": WhisperFeatureExtractor(feature_size=80),
    "wav2vec2": Wav2Vec2FeatureExtractor(do_normalize=True),
    "seamless": SeamlessM4TFeatureExtractor(),
}
try:
    FRONTENDS["parakeet"] = ParakeetFeatureExtractor(feature_size=128)
except ImportError:  # the first transformers with Canary need librosa here
    pass
# Frames that a clip of n samples has: Whisper begins one every 160 samples, Parakeet's formula is the stock one,
# Seamless joins two windows of 400 samples.
NUM_FRAMES = {
    "whisper": lambda n: -(-n // 160),
    "parakeet": lambda n: n // 160,
    "wav2vec2": lambda n: n,
    "seamless": lambda n: (1 + (n - 400) // 160) // 2 if n >= 560 else n // 320,
}
SHORT = [0, 1, 10, 159, 160, 161, 319, 320, 399, 400, 401, 559, 560, 561]


def noise(num_samples, seed=0):
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


def valid_frames(extractor, output, row=0):
    """Time-first features of a row, without padding."""
    features, mask = np.asarray(output["input_features"][row]), np.asarray(output["attention_mask"][row])
    assert len(features) == len(mask)
    num_valid = int(mask.sum())
    assert mask[:num_valid].all()
    return features[:num_valid]


def extract(extractor, clips, **kwargs):
    return extractor(clips, sampling_rate=RATE, return_tensors="np", **kwargs)


# --- against the stock extractors ---


def test_whisper_features_are_those_of_the_stock_30_seconds():
    for num_samples in [1, 160, 161, 400, 5_001, 15_999, 16_000, 479_000, 479_850, 480_000]:
        clip = noise(num_samples)
        # The loudest moment lies at the very end, where the stock extractor's window reaches past the clip.
        clip[-50:] *= 8
        ours = extract(MDMASRFeatureExtractor(), clip)
        stock = WhisperFeatureExtractor()(clip, sampling_rate=RATE, return_tensors="np")["input_features"].transpose(
            0, 2, 1
        )
        num_frames = -(-num_samples // 160)
        assert ours["attention_mask"].sum() == num_frames
        np.testing.assert_allclose(ours["input_features"][:, :num_frames], stock[:, :num_frames], atol=1e-5)

    clips = [noise(RATE // 2), noise(RATE, seed=1), np.zeros(0, np.float32)]
    ours = extract(MDMASRFeatureExtractor(), clips)["input_features"]
    for row, clip in zip(ours, clips, strict=True):
        stock = WhisperFeatureExtractor()(clip, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        # The two frames behind a clip still hold its last samples in the stock extractor.
        np.testing.assert_allclose(row[53:], stock[:, 53:100].T, atol=1e-5)


@each("name", sorted(set(FRONTENDS) - {"whisper"}))
def test_other_features_are_the_stock_ones(name):
    extractor = MDMASRFeatureExtractor(FRONTENDS[name])
    clips = [noise(RATE), noise(7_000, seed=1), noise(560, seed=2)]
    ours = extract(extractor, clips)
    stock = FRONTENDS[name](clips, sampling_rate=RATE, return_tensors="np", padding=True, return_attention_mask=True)
    stock_features = stock[FRONTENDS[name].model_input_names[0]]
    num_frames = stock_features.shape[1]
    mask = np.asarray(stock["attention_mask"]).astype(bool)
    np.testing.assert_array_equal(ours["attention_mask"][:, :num_frames], mask)
    assert not ours["attention_mask"][:, num_frames:].any()
    np.testing.assert_allclose(ours["input_features"][:, :num_frames][mask], stock_features[mask], atol=1e-5)


@each("name", sorted(FRONTENDS))
def test_layout_names_and_types(name):
    extractor = MDMASRFeatureExtractor(FRONTENDS[name])
    output = extractor([noise(RATE), noise(800)], sampling_rate=RATE, return_tensors="pt")
    shapes = {"whisper": (2, 100, 80), "parakeet": (2, 101, 128), "wav2vec2": (2, 16_000), "seamless": (2, 50, 160)}
    assert set(output) == {"input_features", "attention_mask"} == set(extractor.model_input_names)
    assert output["input_features"].shape == shapes[name] and output["input_features"].dtype == torch.float32
    assert output["attention_mask"].dtype == torch.long
    frames_per_s = {"whisper": 100, "parakeet": 100, "wav2vec2": 16_000, "seamless": 50}
    assert extractor.frames_per_s == pytest.approx(frames_per_s[name])
    assert extractor.sampling_rate == RATE and extractor.padding_value == 0.0
    assert isinstance(extractor([0.0] * 800, sampling_rate=RATE)["input_features"], np.ndarray)
    assert "attention_mask" not in extractor(noise(800), sampling_rate=RATE, return_attention_mask=False)

    clip = np.random.default_rng(0).standard_normal(8000).astype(np.float32) / 10
    expected = extractor(clip, sampling_rate=16_000)["input_features"]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert np.array_equal(extractor(clip, sampling_rate=16_000)["input_features"], expected)

    clips = [noise(n, seed=n) for n in [*SHORT, 1_000, 5_000, RATE]]
    batch = extract(extractor, clips)
    assert np.isfinite(batch["input_features"]).all()
    for row, clip in enumerate(clips):
        np.testing.assert_array_equal(
            valid_frames(extractor, batch, row), valid_frames(extractor, extract(extractor, clip))
        )


# --- short, empty and silent clips ---


def test_short_clips_are_finite_and_zeros_constant():
    for name in sorted(FRONTENDS):
        extractor = MDMASRFeatureExtractor(FRONTENDS[name])
        for num_samples in SHORT:
            output = extract(extractor, noise(num_samples))
            assert np.isfinite(output["input_features"]).all()
            assert output["attention_mask"].sum() == NUM_FRAMES[name](num_samples), num_samples
            # Encoders convolve: even an empty batch is 0.1 s wide.
            assert output["attention_mask"].shape[1] >= 0.1 * extractor.frames_per_s

    for name in sorted(FRONTENDS):
        for num_samples in [1, 320, 400, 1_234, 16_000]:
            extractor = MDMASRFeatureExtractor(FRONTENDS[name])
            frames = valid_frames(extractor, extract(extractor, np.zeros(num_samples, np.float32)))
            assert np.isfinite(frames).all()
            if len(frames):
                assert np.ptp(frames) == 0
            # And a faint signal does not: the check above can fail.
            assert np.ptp(valid_frames(extractor, extract(extractor, noise(RATE) * 1e-3))) > 0


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(FRONTENDS)), st.lists(st.integers(0, 4_000), min_size=1, max_size=4), st.integers(0, 99))
def test_any_lengths_in_any_order(name, lengths, seed):
    extractor = MDMASRFeatureExtractor(FRONTENDS[name])
    batch = extract(extractor, [noise(n, seed=seed + i) for i, n in enumerate(lengths)])
    assert np.isfinite(batch["input_features"]).all()
    assert batch["attention_mask"].sum(axis=1).tolist() == [NUM_FRAMES[name](n) for n in lengths]


# --- arguments ---


def test_forms_of_a_clip_and_bad_ones(monkeypatch):
    extractor = MDMASRFeatureExtractor()
    clip = noise(800)
    expected = extract(extractor, clip)["input_features"]
    for form in (clip.astype(np.float64), torch.tensor(clip), clip.tolist(), np.stack([clip, clip]), [clip], (clip,)):
        np.testing.assert_allclose(extract(extractor, form)["input_features"], expected, atol=1e-6)
    # The scale of integers is undone; Whisper's log-mel is not blind to scale.
    integers = np.round(clip * 2**15).astype(np.int16)
    np.testing.assert_allclose(extract(extractor, integers)["input_features"], expected, atol=2e-2)

    extractor = MDMASRFeatureExtractor(max_duration_s=1.0)
    bad = np.zeros(100, np.float32)
    bad[3] = np.nan
    for clip, message in [
        (bad, "NaN"),
        ([noise(100), bad], "Clip 1 of 2: .*NaN"),
        (np.zeros((1, 2, 3)), "dimensions"),
        (np.zeros(10, complex), "dtype complex"),
        ("clip.wav", "processor"),
        ({"array": noise(10)}, "processor"),
        ([], "empty list"),
        (noise(RATE + 100), "lasts 1.01 s.*Split"),
    ]:
        with pytest.raises(ValueError, match=message):
            extract(extractor, clip)
    with pytest.raises(ValueError, match="8000.*processor"):
        extractor(noise(100), sampling_rate=8_000)
    with pytest.raises(ValueError, match="'colour'"):
        extract(extractor, noise(100), colour="red")
    assert extract(extractor, noise(100), device="cpu", do_normalize=False)["attention_mask"].sum() == 1

    warnings = []
    monkeypatch.setattr(feature_extraction_mdm_asr.logger, "warning_once", warnings.append)
    extractor = MDMASRFeatureExtractor()
    clip = noise(31 * RATE)
    for kwargs in ({}, {"truncation": True}, {"truncation": True, "max_length": 100, "padding": "max_length"}):
        assert extract(extractor, clip, **kwargs)["attention_mask"].sum() == 3100
    assert len(warnings) == 2 and "truncation" in warnings[0]
    extractor(clip)
    assert "sampling_rate" in warnings[-1]

    monkeypatch.setattr(
        WhisperFeatureExtractor, "_torch_extract_fbank_features", lambda self, x, device: np.full((1, 80, 9), np.nan)
    )
    with pytest.raises(ValueError, match="not finite"):
        extract(extractor, noise(RATE))


def test_bad_settings_and_arguments():
    extractor = MDMASRFeatureExtractor()
    clips = [noise(4_000), noise(8_000)]
    for kwargs, num_frames in [
        ({"padding": "longest"}, 50),
        ({"padding": "max_length"}, 3000),
        ({"padding": "max_length", "max_length": 10_000}, 63),
        ({"padding": "max_length", "max_length": 10}, 50),
        ({"pad_to_multiple_of": 16_000}, 100),
    ]:
        output = extract(extractor, clips, **kwargs)
        assert output["input_features"].shape == (2, num_frames, 80)
        assert output["attention_mask"].sum(axis=1).tolist() == [25, 50]
    assert extract(extractor, clips[0], padding=False)["input_features"].shape == (1, 25, 80)
    with pytest.raises(ValueError, match="differ in length"):
        extract(extractor, clips, padding=False)
    with pytest.raises(ValueError, match="`padding` must be"):
        extract(extractor, clips, padding="shortest")
    with pytest.raises(ValueError, match="needs `max_length`"):
        extract(MDMASRFeatureExtractor(FRONTENDS["wav2vec2"]), clips, padding="max_length")

    for frontend in ({}, {"feature_extractor_type": "BertModel"}, {"feature_extractor_type": "Nothing"}, 7):
        with pytest.raises(ValueError, match="`frontend"):
            MDMASRFeatureExtractor(frontend)
    with pytest.raises(ValueError, match="`frontend`"):
        MDMASRFeatureExtractor(MDMASRFeatureExtractor())
    with pytest.raises(ValueError, match="'feature_size'"):
        MDMASRFeatureExtractor(feature_size=128)
    for duration in (0, -1, "30"):
        with pytest.raises(ValueError, match="max_duration_s"):
            MDMASRFeatureExtractor(max_duration_s=duration)


# --- saving and loading ---


@each("name", sorted(FRONTENDS))
def test_saved_and_loaded(name, tmp_path):
    extractor = MDMASRFeatureExtractor(FRONTENDS[name])
    extractor.max_duration_s = 12.5
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert set(saved) == {"feature_extractor_type", "frontend", "max_duration_s"}
    loaded = MDMASRFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict() and type(loaded.frontend) is type(extractor.frontend)
    clips = [noise(1_000), noise(5_000)]
    expected, got = extract(extractor, clips), extract(loaded, clips)
    np.testing.assert_array_equal(got["input_features"], expected["input_features"])
    np.testing.assert_array_equal(got["attention_mask"], expected["attention_mask"])
    assert MDMASRFeatureExtractor.from_pretrained(tmp_path, max_duration_s=3).max_duration_s == 3
    assert "frontend" in repr(loaded)
