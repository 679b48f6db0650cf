# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Waveform augmentation: what was asked for is what comes out; SpecAugment on hand-made features."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm_asr_hf.data.augmentation import (
    Augmenter,
    add_noise,
    add_room,
    change_speed,
    make_noise,
    spec_augment,
)

RATE = 16_000


def tone(seconds=0.5, hz=440.0, level=0.3):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def power(samples):
    return float(np.mean(np.square(samples, dtype=np.float64)))


@given(st.floats(-10, 40), st.sampled_from(["white", "pink", "babble"]), st.integers(0, 5))
def test_snr_is_what_was_asked_for(snr_db, kind, seed):
    clip = tone()
    noise = make_noise(kind, len(clip), np.random.default_rng(seed), [tone(0.2, 300.0), tone(0.9, 100.0)])
    noisy = add_noise(clip, noise, snr_db)
    assert 10 * math.log10(power(clip) / power(noisy - clip)) == pytest.approx(snr_db, abs=0.01)


def test_noises_by_hand():
    # Powers 1 and 4: at 0 dB the noise is halved, at 20 dB a twentieth of it is added.
    clip, noise = np.array([1, -1, 1, -1], np.float32), np.array([2, 2, -2, -2], np.float32)
    np.testing.assert_allclose(add_noise(clip, noise, 0.0), [2, 0, 0, -2], atol=1e-6)
    np.testing.assert_allclose(add_noise(clip, noise, 20.0), [1.1, -0.9, 0.9, -1.1], atol=1e-6)

    def band(noise, low, high):
        return np.mean(np.abs(np.fft.rfft(noise)[low:high]) ** 2)

    size = 1 << 16
    for kind, ratio in (("pink", 2.0), ("white", 1.0)):
        noise = make_noise(kind, size, np.random.default_rng(0))
        assert band(noise, 2000, 4000) / band(noise, 4000, 8000) == pytest.approx(ratio, rel=0.1)

    noise = make_noise("babble", 8000, np.random.default_rng(0), [tone(0.25, 400.0)])
    assert np.argmax(np.abs(np.fft.rfft(noise))) == 400 * 8000 // RATE
    alone = make_noise("babble", 8000, np.random.default_rng(0), [np.zeros(10, np.float32)])
    np.testing.assert_array_equal(alone, make_noise("pink", 8000, np.random.default_rng(0)))

    with pytest.raises(ValueError, match="`noises` must name some of"):
        Augmenter(noises=("brown",))


@given(st.floats(0.8, 1.25), st.integers(1, 20_000))
def test_speed_sets_the_length(speed, num_samples):
    assert len(change_speed(np.ones(num_samples, np.float32), speed)) == round(num_samples / speed)


def test_rooms_and_speeds():
    clip = np.zeros(RATE, np.float32)
    clip[4000] = 0.5
    wet = add_room(clip, RATE, np.random.default_rng(0), rt60_s=0.2, drr_db=6.0)
    assert len(wet) == len(clip) and power(wet) == pytest.approx(power(clip), rel=1e-4)
    assert np.abs(wet).argmax() == 4000 and np.abs(wet[:4000]).max() < 1e-6
    # The echoes hold 6 dB less than the direct sound and are over after 0.2 s, 60 dB down at the end.
    tail = wet[4001:].astype(np.float64)
    assert 10 * math.log10(wet[4000] ** 2 / np.sum(tail**2)) == pytest.approx(6.0, abs=0.05)
    assert np.abs(tail[3200:]).max() < 1e-6
    assert power(tail[:320]) / power(tail[2880:3200]) == pytest.approx(10 ** (6 * 0.9), rel=0.6)

    faster = change_speed(tone(1.0, 400.0), 1.1)
    assert np.argmax(np.abs(np.fft.rfft(faster))) / (len(faster) / RATE) == pytest.approx(440.0, abs=1.5)


@given(st.integers(0, 400) | st.just(RATE // 2), st.integers(0, 2**32 - 1), st.booleans())
def test_same_generator_same_samples_and_all_finite(num_samples, seed, is_silent):
    clip = np.zeros(num_samples, np.float32)
    if not is_silent:
        clip = np.random.default_rng(seed).uniform(-1, 1, num_samples).astype(np.float32)
    before = clip.copy()
    first, again = (
        Augmenter()(clip, RATE, np.random.default_rng(seed), other_clips=[clip, tone(0.3, 200.0)]) for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(clip, before)
    assert first.dtype == np.float32 and np.isfinite(first).all() and np.abs(first).max(initial=0) <= 1.0
    assert abs(len(first) - num_samples) <= 0.12 * num_samples + 1


def features_and_mask():
    features = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)) + 5.0
    mask = (torch.arange(50) < torch.tensor([50, 40, 0])[:, None]).long()
    return features, mask


@given(st.integers(0, 1000))
def test_spec_augment_blanks_bands_with_the_rows_mean(seed):
    features, mask = features_and_mask()
    before = features.clone()
    out = spec_augment(features, mask, torch.Generator().manual_seed(seed))
    assert torch.equal(features, before) and torch.isfinite(out).all()
    assert torch.equal(out, spec_augment(features, mask, torch.Generator().manual_seed(seed)))
    changed = out != features
    # Padding, and rows without speech, are left alone.
    assert not changed[mask == 0].any()
    for row, length in ((0, 50), (1, 40)):
        mean = features[row, :length].mean()
        torch.testing.assert_close(out[row][changed[row]], mean.expand(int(changed[row].sum())))
        valid = changed[row, :length]
        # A band is whole: what is blank is two bands of frames and two of bins, and no more of them than allowed.
        times, bins = valid.all(dim=1), valid.all(dim=0)
        assert torch.equal(valid, times[:, None] | bins[None])
        assert times.sum() <= 2 * math.floor(0.05 * length) and bins.sum() <= 2 * 15


def test_spec_augment_reaches_its_widest_bands_and_both_ends_and_differs_by_row():
    features = torch.arange(60.0 * 40).reshape(1, 60, 40).expand(400, -1, -1)
    blank = spec_augment(features, None, torch.Generator().manual_seed(0)) != features
    widths = blank.all(dim=2).sum(dim=1)
    assert widths.min() == 0 and widths.max() == 6 and blank[:, 0].any() and blank[:, -1].any()
    # Two widths of 0, 1, 2, 3 alike often: 3 on average, a little less where they lie on each other.
    assert widths.float().mean() == pytest.approx(2.95, abs=0.2)
    with pytest.raises(ValueError, match="Waveforms have no bands"):
        spec_augment(torch.zeros(2, 100))
