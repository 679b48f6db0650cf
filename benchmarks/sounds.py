# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Sounds without speech for `run_safeguards.py`, made by difference equations, physical models and event processes in the
time domain.
"""

import numpy as np
from scipy.signal import butter, chirp, lfilter, sosfilt

RATE_HZ = 16000


def _filter(x, low=None, high=None, order=2):
    if low and high:
        return sosfilt(butter(order, [low, high], "bandpass", fs=RATE_HZ, output="sos"), x)
    return sosfilt(butter(order, low or high, "highpass" if low else "lowpass", fs=RATE_HZ, output="sos"), x)


def _resonate(x, hz, q):
    """A two-pole resonator."""
    r = np.exp(-np.pi * hz / q / RATE_HZ)
    return lfilter([1 - r], [1, -2 * r * np.cos(2 * np.pi * hz / RATE_HZ), r * r], x)


def _put(out, start, sound):
    start = int(start)
    if start < len(out):
        piece = sound[: len(out) - start]
        out[start : start + len(piece)] += piece


def _t(num):
    return np.arange(num) / RATE_HZ


def white(num, rng):
    return rng.uniform(-1, 1, num)


def pink(num, rng):
    """Sums of held random numbers (Voss and McCartney)."""
    rows = [np.repeat(rng.standard_normal(num // 2**k + 1), 2**k)[:num] for k in range(13)]
    return np.sum(rows, axis=0)


def band_noise(num, rng):
    low = rng.choice([150, 400, 1000, 2500])
    return _filter(rng.standard_normal(num), low, low * rng.uniform(1.5, 2.8), int(rng.integers(1, 5)))


def mains_hum(num, rng):
    """A rectified and clipped mains voltage."""
    wave = np.abs(np.sin(np.pi * rng.choice([50, 60]) * 2 * _t(num) / rng.choice([1, 2])))
    return np.clip(wave - wave.mean(), -rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.7)) + 2e-3 * rng.standard_normal(num)


def plucked_strings(num, rng):
    """Chords of plucked strings (Karplus and Strong)."""
    out, beat = np.zeros(num), int(RATE_HZ * rng.uniform(0.3, 1.0))
    for start in range(0, num, beat):
        root = 82.4 * 2 ** (rng.integers(0, 20) / 12)
        for step in [0, 4, 7, 12] if rng.random() < 0.5 else [0, 3, 7, 10]:
            delay = int(RATE_HZ / (root * 2 ** (step / 12)))
            excitation = np.concatenate([rng.uniform(-1, 1, delay), np.zeros(2 * beat)])
            denominator = np.zeros(delay + 2)
            denominator[0], denominator[delay], denominator[delay + 1] = 1, -0.498, -0.498
            _put(out, start + rng.integers(0, 400), lfilter([1], denominator, excitation))
    return out


def piano_like(num, rng):
    """Melody and chords of slightly inharmonic, decaying partials."""
    out, at = np.zeros(num), 0
    while at < num:
        length = int(RATE_HZ * rng.choice([0.2, 0.4, 0.8]))
        for _ in range(int(rng.integers(1, 4))):
            f = 130.8 * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11, 12, 14, 16]) / 12)
            t = _t(3 * length)
            for k in range(1, 9):
                partial = f * k * np.sqrt(1 + 4e-4 * k * k)
                _put(out, at, np.sin(2 * np.pi * partial * t) * np.exp(-t * (2 + k)) / k)
        at += length
    return out


def drum_loop(num, rng):
    """A membrane's modes, brushed noise and a bass line."""
    out, beat = np.zeros(num), RATE_HZ * 60 / rng.uniform(70, 150) / 2
    bass = 41.2 * 2 ** (rng.integers(0, 12) / 12)
    for step in range(int(num / beat) + 1):
        t = _t(int(0.3 * RATE_HZ))
        if step % 4 == 0 or rng.random() < 0.2:
            _put(out, step * beat, sum(np.sin(2 * np.pi * 60 * m * t) * np.exp(-t * 20 * m) for m in (1, 1.59, 2.14)))
        if step % 4 == 2:
            _put(out, step * beat, _filter(rng.standard_normal(len(t)), low=1000) * np.exp(-t * 30))
        _put(out, step * beat, 0.3 * _filter(rng.standard_normal(len(t)), low=6000) * np.exp(-t * 60))
        _put(out, step * beat, 0.6 * np.sign(np.sin(2 * np.pi * bass * rng.choice([1, 1, 1.5]) * t)) * np.exp(-t * 6))
    return out


def bells(num, rng):
    out, at = np.zeros(num), rng.uniform(0, 0.2) * RATE_HZ
    while at < num:
        t, f = _t(2 * RATE_HZ), rng.uniform(250, 2500)
        for ratio in (0.56, 0.92, 1.19, 1.71, 2.0, 2.74, 3.0, 3.76):
            _put(out, at, rng.random() * np.sin(2 * np.pi * f * ratio * t) * np.exp(-t * rng.uniform(1, 8)))
        at += rng.uniform(0.2, 2) * RATE_HZ
    return out


def breathing(num, rng):
    """Air through a mouth: noise in three resonators, faster in than out."""
    air = rng.standard_normal(num)
    air = sum(_resonate(air, f * rng.uniform(0.85, 1.15), 3) * g for f, g in ((700, 1), (1500, 0.7), (3200, 0.5)))
    period, phase = rng.uniform(1.2, 3.5), rng.random()
    cycle = (_t(num) / period + phase) % 1
    shape = np.where(cycle < 0.4, np.sin(np.pi * cycle / 0.4) ** 2, 0.6 * np.sin(np.pi * (cycle - 0.45) / 0.5).clip(0))
    return air * shape + 3e-3 * np.std(air) * rng.standard_normal(num)


def typing(num, rng):
    """A press and a release for every key, in runs, with a space bar now and then."""
    out, at = 1e-3 * rng.standard_normal(num), rng.uniform(0, 0.1)
    while at < num / RATE_HZ:
        for delay, gain in ((0, 1), (rng.uniform(0.05, 0.11), 0.5)):
            burst = rng.standard_normal(600) * np.exp(-np.arange(600) / 60)
            key = _resonate(burst, rng.uniform(1500, 5000), 4) + 0.5 * _resonate(burst, rng.uniform(150, 400), 3)
            _put(out, (at + delay) * RATE_HZ, gain * key)
        at += rng.gamma(4, 0.04) + (rng.random() < 0.1) * rng.uniform(0.3, 1)
    return out


def clicks(num, rng):
    out = 1e-4 * rng.standard_normal(num)
    for at in rng.uniform(0, num, max(1, int(num / RATE_HZ * rng.uniform(0.5, 8)))):
        _put(out, at, rng.uniform(0.3, 1) * np.array([1, -1, 0.6, -0.3]) * rng.choice([-1, 1]))
    return out


def wind(num, rng):
    """Noise through a low-pass whose corner wanders, block by block."""
    noise, out, state, corner = rng.standard_normal(num), np.zeros(num), np.zeros(1), rng.uniform(0.01, 0.1)
    for start in range(0, num, 400):
        corner = float(np.clip(corner * np.exp(0.25 * rng.standard_normal()), 0.004, 0.3))
        out[start : start + 400], state = lfilter([corner], [1, corner - 1], noise[start : start + 400], zi=state)
    return out


def sweep(num, rng):
    low, high = sorted(rng.uniform(80, 7000, 2))
    return chirp(_t(num), low, num / RATE_HZ, high, rng.choice(["linear", "logarithmic", "quadratic"]))


def telephone_tones(num, rng):
    """Ringing, engaged, dialling and modem tones."""
    t, kind = _t(num), rng.integers(4)
    if kind == 0:
        return (np.sin(2 * np.pi * 440 * t) + np.sin(2 * np.pi * 480 * t)) * ((t % 3) < 1.5)
    if kind == 1:
        return np.sin(2 * np.pi * 425 * t) * ((t % 0.5) < 0.25)
    if kind == 2:
        pick = rng.integers(0, 4, (2, 200))[:, (t / 0.15).astype(int)]
        tones = np.array([697, 770, 852, 941])[pick[0]], np.array([1209, 1336, 1477, 1633])[pick[1]]
        return sum(np.sin(2 * np.pi * f * t) for f in tones) * ((t % 0.15) < 0.09)
    bits = rng.integers(0, 2, num // 50 + 1).repeat(50)[:num]
    return np.sin(2 * np.pi * np.cumsum(1200 + 1000 * bits) / RATE_HZ)


def engine(num, rng):
    """Firing pulses, uneven and of a drifting rate, through a body's resonances."""
    pulses, at, rate = np.zeros(num), 0.0, rng.uniform(12, 80)
    while at < num / RATE_HZ:
        _put(pulses, at * RATE_HZ, np.array([rng.uniform(0.6, 1.4)]))
        rate = float(np.clip(rate * np.exp(0.02 * rng.standard_normal()), 8, 150))
        at += 1 / rate * rng.uniform(0.93, 1.07)
    body = sum(_resonate(pulses, f, 3) for f in rng.uniform(80, 1800, 4))
    return body / np.std(body) + 0.2 * _filter(rng.standard_normal(num), high=rng.uniform(500, 4000))


def murmur(num, rng):
    """A crowd far away: noise with the long-term spectrum of speech and slow, shallow fluctuations."""
    bands = [(150, 400, 1.0), (400, 900, 0.8), (900, 2000, 0.4), (2000, 4500, 0.2)]
    out = np.zeros(num)
    for low, high, gain in bands:
        envelope = np.abs(_filter(rng.standard_normal(num), high=4, order=1))
        out += gain * _filter(rng.standard_normal(num), low, high) * (0.5 + envelope / envelope.mean())
    return out


def birds(num, rng):
    out, at = 1e-3 * rng.standard_normal(num), rng.uniform(0, 0.3)
    while at < num / RATE_HZ:
        length, f = rng.uniform(0.04, 0.25), rng.uniform(2000, 6000)
        t = _t(int(length * RATE_HZ))
        tone = f * (1 + rng.uniform(-0.3, 0.3) * t / length + 0.1 * np.sin(2 * np.pi * rng.uniform(10, 50) * t))
        _put(out, at * RATE_HZ, np.sin(2 * np.pi * np.cumsum(tone) / RATE_HZ) * np.hanning(len(t)))
        at += length + rng.exponential(0.2)
    return out


def digital(num, rng):
    """What is silence to the ear: zeros, a constant, one bit of dither."""
    return [np.zeros(num), np.full(num, 1e-2), rng.integers(-1, 2, num) / 32768][int(rng.integers(3))]


KINDS = (white, pink, band_noise, mains_hum, plucked_strings, piano_like, drum_loop, bells, breathing, typing, clicks)
KINDS += (wind, sweep, telephone_tones, engine, murmur, birds, digital)


def make(index: int, seed: int = 2026) -> tuple[str, np.ndarray]:
    """Sound number `index`: its kind and (N,) float32 at 16 kHz, 0.5 to 15 s long, of -60 to -1 dB at its peak."""
    rng = np.random.default_rng([seed, index])
    kind = KINDS[index % len(KINDS)]
    num = int(RATE_HZ * np.exp(rng.uniform(np.log(0.5), np.log(15))))
    sound = np.asarray(kind(num, rng), dtype=np.float64)
    if kind is not digital:
        sound *= 10 ** (rng.uniform(-60, -1) / 20) / np.abs(sound).max()
    return kind.__name__, sound.astype(np.float32)


__all__ = ["KINDS", "RATE_HZ", "make"]
