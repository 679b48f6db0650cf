# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Augmentation for training: noise, speed, room and gain of waveforms, and SpecAugment of features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
import torch

NOISES = ("white", "pink", "babble")
# Decay of a room's energy by 60 dB, the definition of RT60, is a factor of 10^-3 in amplitude.
RT60_DECAY = math.log(1e3)
PEAK = 0.99


@dataclass(frozen=True)
class Augmenter:
    """
    Random speed, room, noise and gain, in this order, each with its probability. Seeded by the generator of the call:
    the same generator state gives the same samples.

    Args:
        speed_prob, speed_range: resampling, which changes tempo and pitch; 1.1 makes a clip shorter.
        room_prob, room_rt60_s, room_drr_db: reverberation time in s, and direct-to-reverberant ratio in dB.
        noise_prob, snr_db: signal-to-noise ratio in dB, of the whole clip.
        noises: which to draw from. "babble" is the sum of other clips of the batch; without any it is pink noise.
        gain_prob, gain_db: change of level in dB.
        seed (`int`): where the caller has no generator of its own.
    """

    speed_prob: float = 0.5
    speed_range: tuple[float, float] = (0.9, 1.1)
    room_prob: float = 0.3
    room_rt60_s: tuple[float, float] = (0.1, 0.6)
    room_drr_db: tuple[float, float] = (0.0, 15.0)
    noise_prob: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    noises: tuple[str, ...] = NOISES
    gain_prob: float = 0.5
    gain_db: tuple[float, float] = (-15.0, 6.0)
    seed: int = 0

    # The collator then passes the other clips of the batch as `other_clips`.
    takes_other_clips = True

    def __post_init__(self):
        for name in ("speed_prob", "room_prob", "noise_prob", "gain_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a probability from 0 to 1, got {getattr(self, name)!r}.")
        for name in ("speed_range", "room_rt60_s", "room_drr_db", "snr_db", "gain_db"):
            low_high = tuple(getattr(self, name))
            if len(low_high) != 2 or not -math.inf < low_high[0] <= low_high[1] < math.inf:
                raise ValueError(f"`{name}` must be (lowest, highest), got {getattr(self, name)!r}.")
            if name in ("speed_range", "room_rt60_s") and low_high[0] <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}.")
            object.__setattr__(self, name, low_high)
        object.__setattr__(self, "noises", tuple(self.noises))
        unknown = sorted(set(self.noises) - set(NOISES))
        if unknown or not self.noises:
            raise ValueError(f"`noises` must name some of {list(NOISES)}, got {list(self.noises)}.")

    def __call__(
        self,
        samples: np.ndarray,
        sampling_rate: float,
        rng: np.random.Generator | None = None,
        other_clips: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """
        Args:
            samples (`np.ndarray` of shape (N,)): float32 in -1..1. Left as it is.
            sampling_rate (`float`): in Hz.
            rng (`np.random.Generator`, *optional*): decides everything. Default: one made of `seed`.
            other_clips: clips at the same rate, for babble.

        Returns:
            `np.ndarray` of shape (N',), float32; N' differs from N by the speed alone.
        """
        rng = np.random.default_rng(self.seed) if rng is None else rng
        # Drawn in one go, so that a probability that is changed does not change what the others draw.
        speed_u, room_u, noise_u, gain_u = rng.random(4)
        samples = np.asarray(samples, dtype=np.float32)
        if not samples.size:
            return samples
        if speed_u < self.speed_prob:
            samples = change_speed(samples, rng.uniform(*self.speed_range))
        if room_u < self.room_prob:
            samples = add_room(
                samples,
                sampling_rate,
                rng,
                rt60_s=rng.uniform(*self.room_rt60_s),
                drr_db=rng.uniform(*self.room_drr_db),
            )
        if noise_u < self.noise_prob:
            noise = make_noise(str(rng.choice(self.noises)), len(samples), rng, other_clips)
            samples = add_noise(samples, noise, rng.uniform(*self.snr_db))
        if gain_u < self.gain_prob:
            samples = samples * np.float32(10 ** (rng.uniform(*self.gain_db) / 20))
        # What would be clipped is made quieter instead.
        peak = np.abs(samples).max(initial=0.0)
        return (samples * np.float32(PEAK / peak) if peak > 1 else samples).astype(np.float32, copy=False)


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Plays samples (N,) `speed` times as fast: round(N / speed) samples, pitch moved along."""
    if not speed > 0:
        raise ValueError(f"`speed` must be positive, got {speed!r}.")
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
    if kind not in NOISES:
        raise ValueError(f"`kind` of noise must be one of {list(NOISES)}, got {kind!r}.")
    if kind == "babble":
        clips = [clip for clip in other_clips if len(clip) and np.any(clip)]
        if clips:
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
    features: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    num_time_masks: int = 2,
    max_time_share: float = 0.05,
    num_freq_masks: int = 2,
    max_freq_bins: int = 15,
) -> torch.Tensor:
    """
    SpecAugment without time warping (arXiv 1904.08779): blanks bands of time and of frequency, in every row its own.

    Args:
        features (`torch.Tensor` of shape (B, T, M)): log-mel features. Left as they are.
        attention_mask (`torch.Tensor` of shape (B, T), *optional*): 1 for the utterance. Padding is not touched.
        generator (`torch.Generator`, *optional*): draws where the bands are.
        num_time_masks, num_freq_masks (`int`): how many bands.
        max_time_share (`float`): widest band of time, as a share of the row's own frames.
        max_freq_bins (`int`): widest band of frequency; at most M.

    Returns:
        `torch.Tensor` of shape (B, T, M): the bands hold the mean of the row's utterance.
    """
    if features.dim() != 3:
        raise ValueError(
            f"`features` must have the shape (B, T, mel bins), got {tuple(features.shape)}. Waveforms have no bands."
        )
    if not 0 <= max_time_share <= 1:
        raise ValueError(f"`max_time_share` must be from 0 to 1, got {max_time_share!r}.")
    if min(num_time_masks, num_freq_masks, max_freq_bins) < 0:
        raise ValueError("`num_time_masks`, `num_freq_masks` and `max_freq_bins` must not be negative.")
    batch_size, num_frames, num_bins = features.shape
    device = features.device
    valid = torch.ones((batch_size, num_frames), dtype=torch.bool, device=device)
    if attention_mask is not None:
        valid = attention_mask.to(device).bool()
    lengths = valid.sum(dim=-1).float()

    frames = valid.cumsum(dim=-1) - 1
    times = _bands(frames, lengths, max_time_share * lengths, num_time_masks, generator)
    bins = torch.arange(num_bins, device=device).expand(batch_size, -1)
    all_bins = torch.full_like(lengths, num_bins)
    widest = torch.full_like(lengths, min(max_freq_bins, num_bins))
    bands = _bands(bins, all_bins, widest, num_freq_masks, generator)

    total = features.float().masked_fill(~valid[..., None], 0.0).sum(dim=(1, 2))
    mean = (total / (lengths * num_bins).clamp(min=1)).to(features.dtype)
    blank = (times[:, :, None] | bands[:, None, :]) & valid[:, :, None]
    return torch.where(blank, mean[:, None, None], features)


def _bands(
    positions: torch.Tensor,
    lengths: torch.Tensor,
    widest: torch.Tensor,
    num_bands: int,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Which of positions (B, N) lie in one of the row's random bands; `lengths` and `widest` are (B,)."""
    device = generator.device if generator is not None else positions.device
    draws = torch.rand((2, len(positions), num_bands), generator=generator, device=device).to(positions.device)
    # Widths 0..widest alike often, then every place where the band fits alike often.
    widths = (draws[0] * (widest.floor() + 1)[:, None]).floor()
    starts = (draws[1] * (lengths[:, None] - widths + 1)).floor()
    inside = (positions[..., None] >= starts[:, None]) & (positions[..., None] < (starts + widths)[:, None])
    return inside.any(dim=-1)


__all__ = ["Augmenter", "add_noise", "add_room", "change_speed", "make_noise", "spec_augment"]
