# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Sounds without speech, made by formulas: what `fit_no_speech.py` fits the no-speech decision on. The benchmark in
benchmarks/run_no_speech.py has generators of its own, so that it measures on sounds that nothing was fitted to.
"""

import numpy as np

from mdm_asr_hf.augmentation_mdm_asr import add_room

RATE_HZ = 16000


def _times(num: int) -> np.ndarray:
    return np.arange(num) / RATE_HZ


def shaped_noise(num: int, rng: np.random.Generator, gain) -> np.ndarray:
    """Gaussian noise (N,) whose spectrum is multiplied by `gain(frequencies in Hz)`."""
    size = 1 << max(num - 1, 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size)) * gain(np.fft.rfftfreq(size, 1 / RATE_HZ))
    return np.fft.irfft(spectrum, size)[:num]


def band(low_hz: float, high_hz: float, slope: float = 4.0):
    """A band's gain over frequency, falling with the power `slope` outside."""
    return lambda f: (
        1 / np.sqrt(1 + (low_hz / np.maximum(f, 1)) ** (2 * slope)) / np.sqrt(1 + (f / high_hz) ** (2 * slope))
    )


def slow(num: int, rng: np.random.Generator, rate_hz: float) -> np.ndarray:
    """A smooth random curve (N,) between 0 and 1 that changes about `rate_hz` times a second."""
    knots = rng.random(max(2, int(num / RATE_HZ * rate_hz) + 2))
    return np.interp(np.linspace(0, len(knots) - 1, num), np.arange(len(knots)), knots)


def _add(out: np.ndarray, at_s: float, sound: np.ndarray) -> None:
    start = int(at_s * RATE_HZ)
    piece = sound[: max(0, len(out) - start)]
    out[start : start + len(piece)] += piece


def _decay(num: int, tau_s: float, attack_s: float = 0.003) -> np.ndarray:
    t = _times(num)
    return np.exp(-t / tau_s) * np.minimum(1, t / attack_s)


def coloured(num, rng):
    """Noise whose power falls as 1/f^0 (white) to 1/f^2.5 (beyond brown), or in a band."""
    if rng.random() < 0.35:
        low = 10 ** rng.uniform(1.5, 3.6)
        return shaped_noise(num, rng, band(low, low * rng.uniform(1.3, 8), rng.uniform(1, 6)))
    exponent = rng.choice([0.0, 0.0, 1.0, 2.0, rng.uniform(0, 2.5)])
    return shaped_noise(num, rng, lambda f: np.where(f > 15, np.maximum(f, 1) ** (-exponent / 2), 0))


def hum(num, rng):
    base = rng.choice([50, 60, 100, 120, rng.uniform(40, 250)]) * rng.uniform(0.995, 1.005)
    out = sum(
        rng.random() * k ** -rng.uniform(0.3, 2) * np.sin(2 * np.pi * base * k * _times(num) + rng.uniform(0, 6.28))
        for k in range(1, int(rng.integers(2, 40)))
        if base * k < 7500
    )
    out = np.zeros(num) + out
    out = out * (1 + rng.uniform(0, 0.3) * np.sin(2 * np.pi * rng.uniform(0.2, 8) * _times(num)))
    return out / (np.std(out) + 1e-9) + 10 ** rng.uniform(-4, -1) * coloured(num, rng)


def _note(num, rng, hz, timbre, vibrato=0.0):
    t = _times(num)
    phase = 2 * np.pi * hz * t + vibrato * np.sin(2 * np.pi * rng.uniform(4, 7) * t)
    if timbre == "fm":
        return np.sin(phase + rng.uniform(0.5, 4) * np.sin(phase * rng.choice([1, 2, 3, 1.41])) * np.exp(-t * 3))
    power = {"sine": 9, "organ": 0.7, "saw": 1.0, "string": 1.5}[timbre]
    return sum(np.sin(k * phase) / k**power for k in range(1, 13) if k * hz < 7500)


def music(num, rng):
    """Chords, arpeggios or a melody, with or without drums."""
    out = np.zeros(num)
    timbre = rng.choice(["sine", "organ", "saw", "string", "fm"])
    root, beat_s = 110 * 2 ** rng.uniform(0, 2), 60 / rng.uniform(50, 170)
    scale = rng.choice(4)
    steps = [[0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10], [0, 2, 4, 7, 9], [0, 3, 5, 6, 7, 10]][scale]
    kind = rng.choice(["chords", "arpeggio", "melody", "both"])
    at_s, total_s = rng.uniform(-beat_s, 0), num / RATE_HZ
    while at_s < total_s:
        length_s = beat_s * (rng.choice([1, 2, 4]) if kind in ("chords", "both") else rng.choice([0.25, 0.5, 0.5, 1]))
        degree = int(rng.integers(len(steps)))
        size = int(length_s * rng.uniform(0.8, 1.6) * RATE_HZ) + 1
        chord = [0, 2, 4] if kind in ("chords", "both") else [0]
        for k in chord:
            octave, index = divmod(degree + k, len(steps))
            hz = root * 2 ** (octave + steps[index] / 12) * rng.choice([1, 1, 2] if len(chord) == 1 else [1])
            envelope = _decay(size, rng.uniform(0.1, 2.5), rng.uniform(0.003, 0.15)) * np.minimum(
                1, (size - np.arange(size)) / 800
            )
            _add(out, max(at_s, 0), _note(size, rng, hz, timbre, rng.uniform(0, 2) * (rng.random() < 0.4)) * envelope)
        if kind == "both":
            for k in range(4):
                hz = root * 2 * 2 ** (steps[int(rng.integers(len(steps)))] / 12)
                size = int(length_s / 4 * RATE_HZ) + 1
                _add(out, max(at_s, 0) + k * length_s / 4, 0.7 * _note(size, rng, hz, "string") * _decay(size, 0.3))
        at_s += length_s
    if rng.random() < 0.35:
        out = out / (np.std(out) + 1e-9) + rng.uniform(0.3, 1.5) * drums(num, rng, beat_s)
    return out


def drums(num, rng, beat_s=None):
    out = np.zeros(num)
    beat_s = beat_s or 60 / rng.uniform(60, 180)
    pattern = rng.random((3, 8)) < np.array([[0.4], [0.3], [0.7]])
    kick_hz, snare_tau = rng.uniform(45, 90), rng.uniform(0.04, 0.2)
    for step in range(int(num / RATE_HZ / (beat_s / 2)) + 1):
        at_s, size = step * beat_s / 2, int(0.4 * RATE_HZ)
        t = _times(size)
        if pattern[0, step % 8]:
            _add(out, at_s, 1.5 * np.sin(2 * np.pi * (kick_hz * t + 3 * (1 - np.exp(-t * 30)))) * _decay(size, 0.12))
        if pattern[1, step % 8]:
            _add(out, at_s, shaped_noise(size, rng, band(150, 6000, 1)) * _decay(size, snare_tau))
        if pattern[2, step % 8]:
            _add(
                out, at_s, 0.4 * shaped_noise(size, rng, band(5000, 8000, 4)) * _decay(size, rng.uniform(0.015, 0.06))
            )
    return out + 1e-3 * rng.standard_normal(num)


def breath(num, rng):
    """In and out, through mouth or nose: noise with the broad resonances of a throat without a voice."""
    out, at_s = np.zeros(num), rng.uniform(0, min(0.8, 0.3 * num / RATE_HZ))
    cycle_s = rng.uniform(0.7, 4)
    peaks = [rng.uniform(300, 1200), rng.uniform(1100, 2600), rng.uniform(2500, 4500)]
    while at_s < num / RATE_HZ:
        size = int(cycle_s * rng.uniform(0.3, 0.6) * RATE_HZ)
        shift = rng.uniform(0.8, 1.25)

        def gain(f, shift=shift):
            return band(rng.uniform(80, 400), rng.uniform(2500, 7000), 1)(f) * (
                0.3 + sum(np.exp(-(((f - p * shift) / (0.25 * p)) ** 2)) for p in peaks)
            )

        envelope = np.sin(np.pi * np.linspace(0, 1, size) ** rng.uniform(0.5, 1.5)) ** rng.uniform(0.7, 2)
        _add(out, at_s, rng.uniform(0.4, 1) * shaped_noise(size, rng, gain) * envelope)
        at_s += cycle_s * rng.uniform(0.4, 0.8)
    return out + 10 ** rng.uniform(-4, -1.5) * np.std(out) * coloured(num, rng)


def strikes(num, rng):
    """Clicks, typing, footsteps, drops, knocks, a clock: short bursts, each with resonances of its own."""
    out, at_s = np.zeros(num), rng.uniform(0, min(0.4, 0.3 * num / RATE_HZ))
    gap_s, is_regular = 10 ** rng.uniform(-1.2, 0.3), rng.random() < 0.4
    low, tau = 10 ** rng.uniform(2, 3.6), 10 ** rng.uniform(-2.7, -1)
    while at_s < num / RATE_HZ:
        size = int(min(6 * tau, 0.6) * RATE_HZ) + 32
        burst = shaped_noise(size, rng, band(low * rng.uniform(0.7, 1.4), low * rng.uniform(2, 6), 1))
        if rng.random() < 0.5:
            burst = burst / np.std(burst) * 0.5 + np.sin(2 * np.pi * low * rng.uniform(0.8, 1.5) * _times(size))
        _add(out, at_s, rng.uniform(0.2, 1) * burst * _decay(size, tau, 0.0005))
        at_s += gap_s if is_regular else rng.exponential(gap_s) + 0.01
    return out / (np.std(out) + 1e-9) + 10 ** rng.uniform(-3.5, -0.8) * coloured(num, rng)


def gusts(num, rng):
    """Wind, surf, cars passing by: noise whose level and brightness drift."""
    dark = shaped_noise(num, rng, band(20, rng.uniform(150, 800), rng.uniform(0.7, 2)))
    bright = shaped_noise(num, rng, band(rng.uniform(200, 900), rng.uniform(900, 6000), 1))
    level = slow(num, rng, rng.uniform(0.2, 3))
    dark, bright = dark / np.std(dark), bright / np.std(bright)
    return dark * (0.1 + level) + rng.uniform(0.05, 0.8) * bright * level ** rng.uniform(1, 3)


def rain(num, rng):
    out = rng.uniform(0.02, 1) * shaped_noise(num, rng, band(rng.uniform(300, 1500), 8000, 1))
    for _ in range(int(num / RATE_HZ * 10 ** rng.uniform(1, 2.7))):
        size, hz = int(rng.uniform(0.005, 0.04) * RATE_HZ), rng.uniform(500, 7000)
        drop = np.sin(2 * np.pi * hz * _times(size) * (1 + rng.uniform(0, 2) * _times(size))) * _decay(
            size, 0.006, 0.0005
        )
        _add(out, rng.uniform(0, num / RATE_HZ), rng.exponential(0.5) * drop)
    return out


def tones(num, rng):
    """Steady tones, sweeps, sirens, beeps, dialling."""
    t, kind = _times(num), rng.choice(["steady", "sweep", "siren", "beeps", "dial"])
    hz = 10 ** rng.uniform(2, 3.7)
    if kind == "steady":
        out = np.sin(2 * np.pi * hz * t) + rng.choice([0, 0.5]) * np.sin(2 * np.pi * hz * rng.uniform(1, 3) * t)
    elif kind in ("sweep", "siren"):
        end = 10 ** rng.uniform(2, 3.7)
        rate = rng.uniform(0.2, 4) if kind == "siren" else RATE_HZ / num / 2
        place = 0.5 - 0.5 * np.cos(2 * np.pi * rate * t)
        frequency = hz * (end / hz) ** place
        phase = 2 * np.pi * np.cumsum(frequency) / RATE_HZ
        out = np.sin(phase) + rng.uniform(0, 0.5) * np.sin(2 * phase) + rng.uniform(0, 0.3) * np.sin(3 * phase)
    else:
        out, at_s, period_s = np.zeros(num), 0.0, rng.uniform(0.08, 1.0)
        while at_s < num / RATE_HZ:
            size = int(period_s * rng.uniform(0.3, 0.8) * RATE_HZ)
            pair = [hz] if kind == "beeps" else [rng.choice([697, 770, 852, 941]), rng.choice([1209, 1336, 1477])]
            edges = np.minimum(1, np.minimum(np.arange(size), size - np.arange(size)) / 80)
            _add(out, at_s, sum(np.sin(2 * np.pi * f * _times(size)) for f in pair) * edges)
            at_s += period_s
    return out + 10 ** rng.uniform(-5, -1) * coloured(num, rng)


def machine(num, rng):
    """Fans, engines, drills: a rotation's harmonics, its noise in the same rhythm, and a rotation that may change."""
    speed = 10 ** rng.uniform(0.9, 2.3) * (1 + rng.uniform(0, 0.4) * slow(num, rng, rng.uniform(0.1, 1.5)))
    phase = 2 * np.pi * np.cumsum(speed) / RATE_HZ
    out = sum(rng.random() / k ** rng.uniform(0, 1.2) * np.sin(k * phase + rng.uniform(0, 6)) for k in range(1, 30))
    noise = shaped_noise(num, rng, band(rng.uniform(50, 800), rng.uniform(1000, 7000), 1))
    noise *= 1 + rng.uniform(0, 1) * np.sin(phase)
    return out / np.std(out) + 10 ** rng.uniform(-1, 0.7) * noise / np.std(noise)


def crowd(num, rng):
    """Many far voices, without words: noise in the bands of speech, each band with its own syllable rhythm."""
    out = np.zeros(num)
    for centre in np.geomspace(200, 5000, int(rng.integers(4, 12))):
        carrier = shaped_noise(num, rng, band(centre * 0.8, centre * 1.25, 3))
        out += carrier / np.std(carrier) * (300 / centre) ** 0.5 * (0.4 + slow(num, rng, rng.uniform(2, 6)) ** 2)
    return out


def calls(num, rng):
    """Birds, dogs, babies without words: harmonic calls whose pitch glides, with pauses."""
    out, at_s = np.zeros(num), rng.uniform(0, min(0.7, 0.3 * num / RATE_HZ))
    base, length_s, gap_s = 10 ** rng.uniform(2.4, 3.6), 10 ** rng.uniform(-1.4, 0.1), 10 ** rng.uniform(-1.3, 0.2)
    roughness, power = rng.uniform(0, 1) ** 2, rng.uniform(0.3, 2.5)
    while at_s < num / RATE_HZ:
        size = int(length_s * rng.uniform(0.7, 1.3) * RATE_HZ) + 64
        glide = np.interp(np.linspace(0, 1, size), np.linspace(0, 1, 4), 1 + rng.uniform(-0.35, 0.35, 4))
        phase = 2 * np.pi * np.cumsum(base * glide) / RATE_HZ
        sound = sum(np.sin(k * phase) / k**power for k in range(1, 12) if k * base < 5500)
        sound = sound / (np.std(sound) + 1e-9) + roughness * shaped_noise(size, rng, band(400, 5000, 1))
        _add(out, at_s, rng.uniform(0.4, 1) * sound * np.sin(np.pi * np.linspace(0, 1, size)) ** rng.uniform(0.3, 1))
        at_s += (length_s + gap_s) * rng.uniform(0.8, 1.3)
    return out + 10 ** rng.uniform(-4, -1) * np.std(out) * coloured(num, rng)


KINDS = {
    f.__name__: f for f in (coloured, hum, music, drums, breath, strikes, gusts, rain, tones, machine, crowd, calls)
}


def make(kind: str, num: int, rng: np.random.Generator) -> np.ndarray:
    """One sound of `KINDS`: (N,) float32 at 16 kHz, of a random level, sometimes in a room, sometimes mixed."""
    sound = KINDS[kind](num, rng)
    if rng.random() < 0.2:
        other = KINDS[str(rng.choice(list(KINDS)))](num, rng)
        sound = sound / (np.std(sound) + 1e-9) + rng.uniform(0.1, 1) * other / (np.std(other) + 1e-9)
    if rng.random() < 0.3:
        sound = add_room(sound, RATE_HZ, rng, rt60_s=rng.uniform(0.1, 0.8), drr_db=rng.uniform(-3, 12))
    peak = np.abs(sound).max(initial=1e-9)
    return (sound / peak * 10 ** (rng.uniform(-55, -1) / 20)).astype(np.float32)
