# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Augmentation for training: noise, speed, room and gain of waveforms, and SpecAugment of features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
import torch

# What `Augmenter` draws, each with its probability. Speed is a factor, 1.1 makes a clip shorter; a room has a
# reverberation time in s and a direct-to-reverberant ratio in dB; noise has a signal-to-noise ratio in dB, of the
# whole clip; gain is a change of level in dB.
SPEED_PROB, SPEED = 0.5, (0.9, 1.1)
ROOM_PROB, ROOM_RT60_S, ROOM_DRR_DB = 0.3, (0.1, 0.6), (0.0, 15.0)
NOISE_PROB, SNR_DB = 0.5, (5.0, 30.0)
GAIN_PROB, GAIN_DB = 0.5, (-15.0, 6.0)
NOISES = ("white", "pink", "babble")
# Decay of a room's energy by 60 dB, the definition of RT60, is a factor of 10^-3 in amplitude.
RT60_DECAY = math.log(1e3)
PEAK = 0.99
# SpecAugment: bands of either kind, the longest as a share of the row's own frames, and the widest in mel bins.
NUM_BANDS, MAX_TIME_SHARE, MAX_BINS = 2, 0.05, 15


@dataclass(frozen=True)
class Augmenter:
    """
    Random speed, room, noise and gain, in this order. The same generator state gives the same samples.

    Args:
        noises: which to draw from. "babble" is the sum of other clips of the batch; without any it is pink noise.
    """

    noises: tuple[str, ...] = NOISES

    def __post_init__(self):
        if not self.noises or set(self.noises) - set(NOISES):
            raise ValueError(f"`noises` must name some of {list(NOISES)}, got {list(self.noises)}.")

    def __call__(
        self,
        samples: np.ndarray,
        sampling_rate: float,
        rng: np.random.Generator,
        other_clips: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """
        Args:
            samples (`np.ndarray` of shape (N,)): float32 in -1..1. Left as it is.
            sampling_rate (`float`): in Hz.
            rng (`np.random.Generator`): decides everything.
            other_clips: clips at the same rate, for babble.

        Returns:
            `np.ndarray` of shape (N',), float32; N' differs from N by the speed alone.
        """
        # Drawn in one go, so that a probability that is changed does not change what the others draw.
        speed_u, room_u, noise_u, gain_u = rng.random(4)
        samples = np.asarray(samples, dtype=np.float32)
        if not samples.size:
            return samples
        if speed_u < SPEED_PROB:
            samples = change_speed(samples, rng.uniform(*SPEED))
        if room_u < ROOM_PROB:
            rt60_s, drr_db = rng.uniform(*ROOM_RT60_S), rng.uniform(*ROOM_DRR_DB)
            samples = add_room(samples, sampling_rate, rng, rt60_s=rt60_s, drr_db=drr_db)
        if noise_u < NOISE_PROB:
            noise = make_noise(str(rng.choice(self.noises)), len(samples), rng, other_clips)
            samples = add_noise(samples, noise, rng.uniform(*SNR_DB))
        if gain_u < GAIN_PROB:
            samples = samples * np.float32(10 ** (rng.uniform(*GAIN_DB) / 20))
        # What would be clipped is made quieter instead.
        peak = np.abs(samples).max(initial=0.0)
        return (samples * np.float32(PEAK / peak) if peak > 1 else samples).astype(np.float32, copy=False)


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Plays samples (N,) `speed` times as fast: round(N / speed) samples, pitch moved along."""
    num_samples = round(len(samples) / speed)
    # soxr takes rates; only their ratio counts, and 1e-4 of it is below what anyone hears.
    resampled = soxr.resample(np.ascontiguousarray(samples, dtype=np.float32), round(speed * 10_000), 10_000, "HQ")
    return np.pad(resampled, (0, max(0, num_samples - len(resampled))))[:num_samples].astype(np.float32, copy=False)


def add_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Adds noise (N,) to samples (N,) so that their powers are `snr_db` apart. Silence gets none."""
    signal_power, noise_power = np.mean(np.square(samples, dtype=np.float64)), np.mean(np.square(noise, dtype=float))
    if signal_power == 0 or noise_power == 0:
        return samples.astype(np.float32)
    scale = math.sqrt(signal_power / noise_power / 10 ** (snr_db / 10))
    return (samples + scale * noise).astype(np.float32)


def make_noise(
    kind: str, num_samples: int, rng: np.random.Generator, other_clips: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Noise (N,) of any level: "white", "pink" (power falls as 1/f), or "babble" of up to four other clips."""
    if kind == "babble" and (clips := [clip for clip in other_clips if len(clip) and np.any(clip)]):
        return _babble(clips, num_samples, rng)
    if kind == "white":
        return rng.standard_normal(num_samples)
    # A power of two: transforms of other lengths can be ten times slower.
    size = max(2, 1 << (num_samples - 1).bit_length())
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return np.fft.irfft(spectrum, n=size)[:num_samples]


def _babble(clips: Sequence[np.ndarray], num_samples: int, rng: np.random.Generator) -> np.ndarray:
    babble = np.zeros(num_samples)
    for i in rng.choice(len(clips), size=min(len(clips), int(rng.integers(1, 5))), replace=False):
        clip = np.roll(clips[i], int(rng.integers(len(clips[i])))).astype(np.float64)
        clip /= math.sqrt(np.mean(clip**2))
        babble += np.resize(clip, num_samples)
    return babble


def add_room(
    samples: np.ndarray, sampling_rate: float, rng: np.random.Generator, *, rt60_s: float, drr_db: float
) -> np.ndarray:
    """
    Convolves samples (N,) with the direct sound and an exponentially decaying noise, which stands for a room's
    reflections. Length, alignment and root mean square stay.
    """
    num_taps = max(2, round(rt60_s * sampling_rate))
    tail = rng.standard_normal(num_taps) * np.exp(-RT60_DECAY * np.arange(num_taps) / num_taps)
    tail[0] = 0
    response = tail * math.sqrt(10 ** (-drr_db / 10) / np.sum(tail**2))
    response[0] = 1
    size = 1 << (len(samples) + num_taps - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)[: len(samples)]
    before, after = np.sum(np.square(samples, dtype=np.float64)), np.sum(wet**2)
    if before == 0 or after == 0:
        return samples.astype(np.float32)
    return (wet * math.sqrt(before / after)).astype(np.float32)


def spec_augment(
    features: torch.Tensor, attention_mask: torch.Tensor | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    SpecAugment without time warping (arXiv 1904.08779): blanks bands of time and of frequency, in every row its own.

    Args:
        features (`torch.Tensor` of shape (B, T, M)): log-mel features. Left as they are.
        attention_mask (`torch.Tensor` of shape (B, T), *optional*): 1 for the utterance. Padding is not touched.
        generator (`torch.Generator`, *optional*): draws where the bands are.

    Returns:
        `torch.Tensor` of shape (B, T, M): the bands hold the mean of the row's utterance.
    """
    if features.dim() != 3:
        raise ValueError(f"`features` must be (B, T, M), got {tuple(features.shape)}. Waveforms have no bands.")
    batch_size, num_frames, num_bins = features.shape
    valid = torch.ones((batch_size, num_frames), dtype=torch.bool, device=features.device)
    if attention_mask is not None:
        valid = attention_mask.to(features.device).bool()
    lengths = valid.sum(dim=-1).float()
    times = _bands(valid.cumsum(dim=-1) - 1, lengths, MAX_TIME_SHARE * lengths, generator)
    bins = torch.arange(num_bins, device=features.device).expand(batch_size, -1)
    widest = torch.full_like(lengths, min(MAX_BINS, num_bins))
    bands = _bands(bins, torch.full_like(lengths, num_bins), widest, generator)
    total = features.float().masked_fill(~valid[..., None], 0.0).sum(dim=(1, 2))
    mean = (total / (lengths * num_bins).clamp(min=1)).to(features.dtype)
    blank = (times[:, :, None] | bands[:, None, :]) & valid[:, :, None]
    return torch.where(blank, mean[:, None, None], features)


def _bands(
    positions: torch.Tensor, lengths: torch.Tensor, widest: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Which of positions (B, N) lie in one of the row's random bands; `lengths` and `widest` are (B,)."""
    device = generator.device if generator is not None else positions.device
    draws = torch.rand((2, len(positions), NUM_BANDS), generator=generator, device=device).to(positions.device)
    # Widths 0..widest alike often, then every place where the band fits alike often.
    widths = (draws[0] * (widest.floor() + 1)[:, None]).floor()
    starts = (draws[1] * (lengths[:, None] - widths + 1)).floor()
    inside = (positions[..., None] >= starts[:, None]) & (positions[..., None] < (starts + widths)[:, None])
    return inside.any(dim=-1)
