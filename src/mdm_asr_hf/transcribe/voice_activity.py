# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Voice activity: where somebody speaks, by silero-vad where there is ONNX Runtime, else by energy above the noise."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..onnx.model import session_options

VAD_NAMES = ("auto", "silero", "energy", "none")
FRAME_S = 0.032
# silero-vad as a graph, made by training/voice_activity.py, and what it takes: 512 samples at 16 kHz.
SILERO_FILE = Path(__file__).with_name("silero_vad.onnx")
SILERO_RATE_HZ, SILERO_FRAME = 16_000, 512
# Its state is not handed from block to block, so each starts this much earlier.
SILERO_WARM_UP_FRAMES = 128
# The noise floor and the level of speech are percentiles of the frames of the last minute.
MEMORY_S = 60.0
FLOOR_PERCENTILE, PEAK_PERCENTILE = 5.0, 99.0
# Speech is what lies above the floor by a share of the way to the loudest frames, within these bounds in dB. Frames of
# steady noise stray from their mean by less than the lower one.
RISE_SHARE, MIN_RISE_DB, MAX_RISE_DB = 0.25, 3.0, 10.0
# Quieter frames are digital silence, which says nothing about the noise of the room; unless all else varies less than
# speech does, and so has no noise in it.
SILENCE_DB, STEADY_DB = -95.0, 10.0
# A faint speaker behind a loud one, or behind one in a louder room, has a floor of his own: within so many frames.
NEAR_FRAMES = 64
# What energy is measured of: speech, but neither an offset nor hum nor rumble nor hiss.
BAND_HZ = (150.0, 6000.0)
# silero-vad hears speech of less than -55 dB or so badly, and worse behind louder speech, or on an offset or hum: it
# is given what is above these, brought up to this level by what is the loudest within `LEVELLED_FRAMES` either way.
HIGH_PASS_HZ, HIGH_PASS_SIZE, FILTERED_AT_ONCE = 100.0, 801, 8192
LEVELLED_DB, LEVELLED_FRAMES, MAX_GAIN_DB = -25.0, 31, 60.0


def band_levels_db(frames: np.ndarray, rate_hz: float) -> np.ndarray:
    """Levels (n,) in dB of frames (n, size) within `BAND_HZ`; a sine of full scale has 0 dB."""
    size = frames.shape[1]
    frequencies_hz = np.fft.rfftfreq(size, 1 / rate_hz)
    in_band = (frequencies_hz >= BAND_HZ[0]) & (frequencies_hz <= BAND_HZ[1])
    # An offset is thousands of times what a faint speaker has, and would leak by the window's rounding.
    spectra = np.fft.rfft((frames - frames.mean(axis=1, keepdims=True)) * np.hanning(size).astype(np.float32))
    power = (np.abs(spectra[:, in_band]) ** 2).sum(axis=1)
    return 10 * np.log10(np.maximum(power / (3 / 32 * size**2), 1e-12))


class EnergyVAD:
    """
    Energy above an adaptive noise floor. It asks for little: what varies in level is taken for speech, and only steady
    noise and silence are not.

    Args:
        rate_hz (`float`): of the samples.
    """

    name = "energy"
    # Scores in dB above the threshold: speech begins at `enter` and ends below `leave`.
    enter, leave = 0.0, -1.5

    def __init__(self, rate_hz: float):
        self.rate_hz, self.frame_size = rate_hz, round(FRAME_S * rate_hz)
        self._memory_size = round(MEMORY_S / FRAME_S)
        self.reset()

    def reset(self) -> None:
        """Forgets the recording."""
        self._levels_db = np.zeros(0)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Scores (number of frames,) of the next samples (N,) of a recording; the last frame may be incomplete."""
        # Zeros behind an offset would be a click.
        frames = np.pad(samples, (0, -len(samples) % self.frame_size), mode="edge").reshape(-1, self.frame_size)
        levels_db = band_levels_db(frames, self.rate_hz)
        self._levels_db = np.concatenate([self._levels_db, levels_db])[-max(self._memory_size, len(levels_db)) :]
        heard = self._levels_db[self._levels_db > SILENCE_DB]
        if not len(heard):
            return np.full(len(levels_db), -np.inf)
        floor_db, peak_db = np.percentile(heard, [FLOOR_PERCENTILE, PEAK_PERCENTILE])
        if peak_db - floor_db < STEADY_DB and len(heard) < len(self._levels_db):
            floor_db = SILENCE_DB
        rise_db = min(max(RISE_SHARE * (peak_db - floor_db), MIN_RISE_DB), MAX_RISE_DB)
        return levels_db - (np.minimum(floor_db, _floors_near_db(self._levels_db))[-len(levels_db) :] + rise_db)

    def prepare(self, samples: np.ndarray) -> Callable[[], np.ndarray]:
        """What gives the scores of the next samples, which are computed at once: they depend on those before."""
        scores = self(samples)
        return lambda: scores


def _floors_near_db(levels_db: np.ndarray) -> np.ndarray:
    """The floor (n,) of the frames around each of n, infinity where all is digital silence."""
    padded = np.pad(np.where(levels_db > SILENCE_DB, levels_db, np.inf), NEAR_FRAMES, constant_values=np.inf)
    near_db = np.sort(np.lib.stride_tricks.sliding_window_view(padded, 2 * NEAR_FRAMES + 1), axis=1)
    places = (np.isfinite(near_db).sum(axis=1) * FLOOR_PERCENTILE / 100).astype(int)
    return near_db[np.arange(len(near_db)), places]


class SileroVAD:
    """
    silero-vad, on the CPU. Scores are its probabilities of speech; the thresholds are lower than its own, since speech
    that is cut off is worse than noise that is decoded.
    """

    name = "silero"
    enter, leave = 0.3, 0.15
    frame_size = SILERO_FRAME

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets the recording."""
        self._before = np.zeros(0, dtype=np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Scores (number of frames,) of the next samples (N,) of a recording; the last frame may be incomplete."""
        return self.prepare(samples)()

    def prepare(self, samples: np.ndarray) -> Callable[[], np.ndarray]:
        """What gives the scores of the next samples when it is called, in any thread and in any order."""
        num_before = len(self._before) // SILERO_FRAME
        heard = np.concatenate([self._before, samples]).astype(np.float32, copy=False)
        self._before = heard[-SILERO_WARM_UP_FRAMES * SILERO_FRAME :]
        return partial(self._score, heard, num_before)

    def _score(self, heard: np.ndarray, num_before: int) -> np.ndarray:
        """Scores of the frames behind the first ones of some samples."""
        if not len(heard):
            return np.zeros(0, dtype=np.float32)
        (scores,) = _silero().run(None, {"frames": _levelled(heard)})
        return scores[num_before:]


def _levelled(samples: np.ndarray) -> np.ndarray:
    """
    Frames (number of them, SILERO_FRAME) of samples (N,) at silero-vad's rate without what is below speech, and their
    faint parts raised; behind the samples there are zeros.
    """
    high = samples - _low_pass(samples)
    frames = np.pad(high, (0, -len(high) % SILERO_FRAME)).reshape(-1, SILERO_FRAME)
    levels = np.pad(np.sqrt(np.square(frames).mean(axis=1)), LEVELLED_FRAMES)
    loudest = np.lib.stride_tricks.sliding_window_view(levels, 2 * LEVELLED_FRAMES + 1).max(axis=1)
    gains = np.clip(10 ** (LEVELLED_DB / 20) / np.maximum(loudest, 1e-9), 1, 10 ** (MAX_GAIN_DB / 20))
    # From the middle of each frame to that of the next one they change in a line.
    gains = np.pad(gains.astype(np.float32), 1, mode="edge")
    rise = ((np.arange(SILERO_FRAME, dtype=np.float32) + 0.5) / SILERO_FRAME - 0.5)[None]
    change = np.where(rise < 0, gains[1:-1, None] - gains[:-2, None], gains[2:, None] - gains[1:-1, None])
    return frames * (gains[1:-1, None] + rise * change)


def _low_pass(samples: np.ndarray) -> np.ndarray:
    """What of samples (N,) in float32 lies below `HIGH_PASS_HZ`. Of some at once, which stay in a core's cache."""
    half = HIGH_PASS_SIZE // 2
    times = np.arange(HIGH_PASS_SIZE) - half
    weights = np.sinc(2 * HIGH_PASS_HZ / SILERO_RATE_HZ * times) * np.hanning(HIGH_PASS_SIZE)
    spectrum = np.fft.rfft(weights / weights.sum(), FILTERED_AT_ONCE).astype(np.complex64)
    # The first ones of a block's product are of its end, too.
    step = FILTERED_AT_ONCE - 2 * half
    num_blocks = -(-len(samples) // step)
    # Next to an offset, what is faint would be lost in rounding.
    offset = samples.mean()
    padded = np.pad(np.pad(samples - offset, half, mode="edge"), (0, num_blocks * step - len(samples)))
    blocks = np.lib.stride_tricks.sliding_window_view(padded, FILTERED_AT_ONCE)[::step]
    low = [np.fft.irfft(np.fft.rfft(block) * spectrum)[2 * half :] for block in blocks]
    return np.concatenate(low).astype(np.float32, copy=False)[: len(samples)] + offset


def make_vad(name: str, rate_hz: float) -> EnergyVAD | SileroVAD | None:
    """
    The detector of a name: "auto" (silero if there is ONNX Runtime and it takes this rate, else energy), "silero",
    "energy", or "none", which gives None.

    Raises:
        ValueError: another name, ONNX Runtime is missing, or silero-vad does not take the rate.
    """
    if name not in VAD_NAMES:
        raise ValueError(f"`vad` must be one of {', '.join(VAD_NAMES)}, got {name!r}.")
    if name == "none":
        return None
    takes_rate, is_installed = rate_hz == SILERO_RATE_HZ, find_spec("onnxruntime") is not None
    if name == "silero" and not takes_rate:
        raise ValueError(f"`vad='silero'` needs {SILERO_RATE_HZ} Hz, but the model has {rate_hz}. Take 'energy'.")
    if name == "silero" and not is_installed:
        raise ValueError(
            "`vad='silero'` needs onnxruntime: `pip install \".[vad]\"` in a clone of this project. Or take 'energy'."
        )
    if name == "energy" or not (takes_rate and is_installed):
        return EnergyVAD(rate_hz)
    return SileroVAD()


@cache
def _silero() -> Any:
    import onnxruntime

    # Blocks are scored side by side.
    return onnxruntime.InferenceSession(SILERO_FILE, session_options(1), providers=["CPUExecutionProvider"])


def speech_runs(
    scores: np.ndarray, enter: float, leave: float, min_pause_frames: int, min_speech_frames: int = 1
) -> list[tuple[int, int]]:
    """
    Runs [start, end) of frames with speech.

    Args:
        scores (`np.ndarray` of shape (number of frames,)): a run begins at `enter` or above and ends below `leave`.
        min_pause_frames (`int`): shorter pauses are part of a run.
        min_speech_frames (`int`): shorter runs, between longer pauses, are noise; not at the end, where a run may be
            going on.
    """
    above, keeps = scores >= enter, scores >= leave
    # A frame is speech if, of the frames up to it, one that enters is later than the last that leaves.
    last_enter = np.maximum.accumulate(np.where(above, np.arange(len(scores)), -1))
    last_leave = np.maximum.accumulate(np.where(~keeps, np.arange(len(scores)), -1))
    is_speech = last_enter > last_leave
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_speech, [False]])))
    runs: list[tuple[int, int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if runs and start - runs[-1][1] < min_pause_frames:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return [run for run in runs if run[1] - run[0] >= min_speech_frames or run[1] == len(scores)]


def weakest_frame(samples: np.ndarray, frame_size: int) -> int:
    """The frame, of a stretch of samples, around which there is the least energy."""
    power = np.add.reduceat(samples.astype(np.float64) ** 2, np.arange(0, len(samples), frame_size))
    if len(power) < 3:
        return int(power.argmin())
    return int(np.convolve(power, np.ones(3), mode="valid").argmin()) + 1
