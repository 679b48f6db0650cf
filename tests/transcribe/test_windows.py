# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading in blocks, finding speech and cutting: nothing said is lost, and pauses are cut before words are."""

import importlib.util

import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode
from demo_recording import RECORDING
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each

from mdm_asr_hf.audio_mdm_asr import AudioStream, load_audio
from mdm_asr_hf.transcribe import voice_activity, windows
from mdm_asr_hf.transcribe.voice_activity import EnergyVAD, make_vad, speech_runs, weakest_frame
from mdm_asr_hf.transcribe.windows import cut_windows

RATE = 16_000
HAS_SILERO = importlib.util.find_spec("onnxruntime") is not None
needs_silero = pytest.mark.skipif(not HAS_SILERO, reason="ONNX Runtime is an extra")
DETECTORS = ["energy", "silero"] if HAS_SILERO else ["energy"]


def noise(duration_s, level, seed=0):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(round(duration_s * RATE))).astype(np.float32)


def bursts(durations_s, pauses_s, level=0.1, floor=1e-4, seed=0):
    """
    Bursts of sound that swells four times a second, as speech does, each followed by a pause, after a pause of 0.3 s;
    and where the bursts are, in samples.
    """
    parts, places, position = [noise(0.3, floor, seed)], [], round(0.3 * RATE)
    for i, (duration_s, pause_s) in enumerate(zip(durations_s, pauses_s, strict=True)):
        sound = noise(duration_s, level, seed + 2 * i + 1)
        sound *= 0.3 + 0.7 * np.abs(np.sin(2 * np.pi * 2 * np.arange(len(sound)) / RATE)).astype(np.float32)
        parts += [sound, noise(pause_s, floor, seed + 2 * i + 2)]
        places.append((position, position + len(parts[-2])))
        position += len(parts[-2]) + len(parts[-1])
    return np.concatenate(parts), places


def spans(windows):
    return [(round(w.start_s * RATE), round(w.end_s * RATE)) for w in windows]


def check_windows(windows, samples, max_window_s):
    """What holds of any cutting."""
    for window, (start, end) in zip(windows, spans(windows), strict=True):
        assert 0 < window.duration_s <= max_window_s + 1e-9
        np.testing.assert_array_equal(window.samples, samples[start:end])
    for left, right in zip(windows, windows[1:], strict=False):
        shared_s = left.end_s - right.start_s
        assert right.start_s > left.start_s and right.end_s > left.end_s
        assert right.overlap_before_s == pytest.approx(max(shared_s, 0), abs=1e-6)
        if shared_s > 0:
            assert left.overlap_after_s >= right.overlap_before_s


def covered(windows, length):
    mask = np.zeros(length, bool)
    for start, end in spans(windows):
        mask[start:end] = True
    return mask


# --- reading in blocks ---


@each("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_blocks_make_what_is_read_at_once(rate, tmp_path):
    stereo = np.random.default_rng(0).standard_normal((round(2.3 * rate), 2)).astype(np.float32) * 0.1
    path = tmp_path / "clip.wav"
    path.write_bytes(encode(stereo, rate, format="WAV", subtype="PCM_16"))
    forms = [path, path.read_bytes(), encode(stereo, rate, format="FLAC"), encode(stereo, rate, format="OGG")]
    forms += [encode(stereo, rate, format="MP3")] if rate in (16_000, 44_100) else []
    forms += [(stereo, rate), (stereo.T.copy(), rate), (np.int16(stereo * 32767), rate), (stereo[:, 0].tolist(), rate)]
    forms += [{"array": torch.tensor(stereo), "sampling_rate": rate}]
    for form in forms:
        for block_s in (0.1, 0.7, 30.0):
            stream = AudioStream(form, block_s=block_s)
            blocks = list(stream)
            # Of MP3, libsndfile rounds the last bit otherwise when it starts within a file.
            is_mp3 = isinstance(form, bytes) and form[:4] not in (b"RIFF", b"fLaC", b"OggS")
            np.testing.assert_allclose(np.concatenate(blocks), load_audio(form), rtol=0, atol=1e-6 if is_mp3 else 0)
            assert stream.duration_s == pytest.approx(2.3, abs=0.11)
            assert max(map(len, blocks)) <= (block_s + 0.1) * RATE


def test_blocks_refuse_what_reading_at_once_does(tmp_path):
    flac = encode(noise(5, 0.1), RATE, format="FLAC")
    bad = noise(3, 0.1)
    bad[40_000] = np.nan
    cases = [
        (flac[: len(flac) // 2], "truncated"),
        (encode(noise(5, 0.1), RATE, format="WAV")[:-999], "truncated"),
        (encode(bad, RATE, format="WAV", subtype="FLOAT"), "NaN"),
        ((bad, RATE), "NaN"),
        ((noise(1, 1e4), RATE), "Divide by"),
        (b"no audio" * 99, "not audio"),
        (b"", "0 bytes"),
        (tmp_path, "is a directory"),
        (tmp_path / "gone.wav", "does not exist"),
        ("https://example.com/a.wav", "Download it first"),
        ({"array": bad}, "without a `sampling_rate`"),
        (None, "NoneType"),
    ]
    for audio, message in cases:
        for read in (load_audio, lambda audio: list(AudioStream(audio, block_s=0.5))):
            with pytest.raises(ValueError, match=message) as error:
                read(audio)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="lasts 5.00 s"):
        AudioStream(flac, max_duration_s=3)

    path = tmp_path / "long.flac"
    soundfile.write(path, noise(20, 0.1), RATE)
    content = path.read_bytes()
    stream = AudioStream(path, block_s=1)
    assert sum(map(len, stream)) == 20 * RATE
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="long.flac.*truncated"):
        AudioStream(path, block_s=1)

    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(2, 0.1), RATE)
    stream = AudioStream(path, block_s=0.5)
    next(iter(stream))
    stream.close()
    assert list(stream) == []

    for audio in (np.zeros(0), encode(np.zeros(0), 44_100, format="WAV"), (np.zeros((2, 0)), 8_000)):
        stream = AudioStream(audio)
        assert list(stream) == [] and stream.duration_s == 0


# --- where speech is ---


def test_speech_runs_and_the_weakest_frame_by_hand():
    scores = np.array([0.0, 0.6, 0.4, 0.4, 0.1, 0.4, 0.4, 0.6, 0.1, 0.1, 0.1, 0.7, 0.0, 0.0, 0.0, 0.0, 0.9])
    # Begins at 0.5, and goes on until below 0.3: 0.4 after a begin is speech, 0.4 after a pause is not.
    assert speech_runs(scores, 0.5, 0.3, 1) == [(1, 4), (7, 8), (11, 12), (16, 17)]
    assert speech_runs(scores, 0.5, 0.3, 4) == [(1, 12), (16, 17)]
    # Bursts of one frame are noise, but the last one may be going on.
    assert speech_runs(scores, 0.5, 0.3, 1, 2) == [(1, 4), (16, 17)]
    assert speech_runs(np.zeros(5), 0.5, 0.3, 1) == [] == speech_runs(np.zeros(0), 0.5, 0.3, 1)

    samples = np.ones(100, np.float32)
    samples[60:80] = 0.1
    assert weakest_frame(samples, 10) in (6, 7)
    assert weakest_frame(np.array([1.0, 0.5]), 1) == 1


def test_energy_finds_speech_of_any_level():
    for level in [0.3, 0.01, 0.001]:
        for snr_db in [60, 30, 10]:
            samples, places = bursts([1.0, 0.5, 2.0], [1.0, 2.0, 1.0], level, level * 10 ** (-snr_db / 20))
            vad = EnergyVAD(RATE)
            runs = speech_runs(vad(samples), vad.enter, vad.leave, 6, 3)
            assert len(runs) == 3
            for (start, end), (first, last) in zip(places, runs, strict=True):
                assert abs(first * vad.frame_size - start) <= 2 * vad.frame_size
                assert abs(last * vad.frame_size - end) <= 2 * vad.frame_size

    quiet, quiet_places = bursts([1.0] * 5, [1.0] * 5, 0.01, 1e-5)
    loud, loud_places = bursts([1.0] * 40, [1.0] * 40, 0.3, 0.01, seed=100)
    vad = EnergyVAD(RATE)
    scores = np.concatenate([vad(quiet[: -(len(quiet) % 512)]), vad(loud)])
    # The noise of the second part is as loud as the speech of the first: after a minute that is what is heard.
    runs = speech_runs(vad(loud), vad.enter, vad.leave, 6, 3)
    assert len(runs) == len(loud_places) and len(speech_runs(scores[:300], 0, -1.5, 6, 3)) == len(quiet_places)


def test_noise_and_steady_sounds_are_no_speech():
    hum = 0.1 * np.sin(2 * np.pi * 50 * np.arange(20 * RATE) / RATE).astype(np.float32)
    for samples in (np.zeros(20 * RATE, np.float32), noise(20, 0.1), hum, hum + noise(20, 1e-3)):
        vad = EnergyVAD(RATE)
        assert speech_runs(vad(samples), vad.enter, vad.leave, 6, 3) == []
    # But a steady sound between digital silence is all there is to hear.
    vad = EnergyVAD(RATE)
    samples = np.concatenate([np.zeros(2 * RATE, np.float32), noise(3, 0.1), np.zeros(2 * RATE, np.float32)])
    ((start, end),) = speech_runs(vad(samples), vad.enter, vad.leave, 6, 3)
    assert abs(start * 0.032 - 2) < 0.04 and abs(end * 0.032 - 5) < 0.04

    for name in DETECTORS:
        for level_db in [-20, -50, -65]:
            for offset in (0.0, 0.1):
                assert not list(
                    cut_windows(
                        [noise(40, 10 ** (level_db / 20)) + np.float32(offset)], RATE, make_vad(name, RATE), 8.0
                    )
                )


def test_names_of_detectors(monkeypatch):
    assert make_vad("none", RATE) is None and make_vad("energy", 8_000).frame_size == 256
    assert make_vad("auto", 8_000).name == "energy"
    with pytest.raises(ValueError, match="must be one of"):
        make_vad("webrtc", RATE)
    with pytest.raises(ValueError, match="16000 Hz"):
        make_vad("silero", 8_000)
    monkeypatch.setattr(voice_activity, "find_spec", lambda name: None)
    assert make_vad("auto", RATE).name == "energy"
    with pytest.raises(ValueError, match=r'pip install "\.\[vad\]"'):
        make_vad("silero", RATE)


@each("name", DETECTORS)
@each("beside", ["nothing", "offset", "drift", "hum", "loud before", "loud around", "loud room"])
def test_a_faint_speaker_is_heard(name, beside):
    # From the first word on.
    speech = load_audio(RECORDING)[RATE // 2 : 4 * RATE]
    speech /= np.sqrt(np.mean(speech**2))
    silence, loud = np.zeros(20 * RATE), np.tile(0.1 * speech, 8)
    before = {
        "loud before": loud,
        "loud around": loud,
        "loud room": loud + noise(len(loud) / RATE, 0.003),
    }.get(beside, silence)
    after = loud if beside == "loud around" else silence
    start = len(before) + RATE
    samples = np.concatenate([before, np.zeros(RATE), speech * 10 ** (-50 / 20), np.zeros(RATE), after])
    times = np.arange(len(samples)) / RATE
    samples += {"offset": 0.3, "drift": 0.01 * times, "hum": 0.1 * np.sin(2 * np.pi * 50 * times)}.get(beside, 0)
    samples = (np.round(samples * 2**15) / 2**15).astype(np.float32)
    vad = make_vad(name, RATE)
    is_heard = np.zeros(len(samples), bool)
    for window in cut_windows([samples], RATE, vad, 8.0):
        is_heard[round(window.start_s * RATE) : round(window.end_s * RATE)] = True
    assert is_heard[start : start + len(speech)].mean() > 0.95
    if before is silence:
        assert not is_heard[: start - RATE].any() and not is_heard[start + len(speech) + RATE :].any()


@needs_silero
def test_silero_finds_speech_in_blocks_as_in_one():
    vad = make_vad("auto", RATE)
    assert vad.name == "silero"
    speech = load_audio(RECORDING)
    samples = np.concatenate([noise(3, 1e-3), speech, noise(3, 1e-3), speech, noise(2, 0.02)])
    whole = vad(samples)
    vad.reset()
    size = 100 * vad.frame_size
    parts = np.concatenate([vad(samples[start : start + size]) for start in range(0, len(samples), size)])
    assert whole.shape == parts.shape == (-(-len(samples) // 512),)
    runs, runs_by_parts = (speech_runs(scores, vad.enter, vad.leave, 16, 3) for scores in (whole, parts))
    assert len(runs) == 2
    np.testing.assert_allclose(runs_by_parts, runs, atol=2)
    assert 2.7 < runs[0][0] * 0.032 < 4.0 and 3 + 3.5 < runs[0][1] * 0.032 < 3 + 4.7


@needs_silero
def test_scores_are_those_of_silero_vad():
    package = pytest.importorskip("silero_vad").load_silero_vad(sequence=True)
    speech = load_audio(RECORDING)[: 5 * RATE + 100]
    frames = voice_activity._levelled(speech)
    assert frames.shape == (-(-len(speech) // 512), 512)
    scores = make_vad("silero", RATE)(speech)
    np.testing.assert_allclose(scores, package.audio_forward(frames.reshape(-1)), atol=1e-4)
    assert scores.min() < 0.1 and scores.max() > 0.9


# --- cutting ---

durations = st.lists(st.floats(0.3, 12.0), min_size=1, max_size=10)


@settings(max_examples=25)
@given(st.data(), durations, st.floats(2.0, 12.0), st.sampled_from(["energy", "none"]))
def test_no_sound_is_lost_whatever_is_cut(data, durations_s, max_window_s, vad):
    pauses_s = data.draw(st.lists(st.floats(0.0, 4.0), min_size=len(durations_s), max_size=len(durations_s)))
    samples, places = bursts(durations_s, pauses_s)
    windows = list(cut_windows([samples], RATE, make_vad(vad, RATE), max_window_s))
    check_windows(windows, samples, max_window_s)
    mask = covered(windows, len(samples))
    assert all(mask[start:end].all() for start, end in places)
    if vad == "none":
        assert mask.all()


def test_what_is_not_cut_is_not_searched_for_speech():
    class Deaf(EnergyVAD):
        def prepare(self, samples):
            raise AssertionError("was asked")

    (window,) = cut_windows(iter([noise(6, 0.1), noise(4, 0.1)]), RATE, Deaf(RATE), 5.0, 10.0)
    assert window.duration_s == 10
    with pytest.raises(AssertionError, match="was asked"):
        list(cut_windows([noise(10.1, 0.1)], RATE, Deaf(RATE), 5.0, 10.0))


@needs_silero
def test_blocks_have_their_scores_in_any_order():
    samples, _ = bursts([1.0] * 12, [0.5] * 12)
    blocks = np.array_split(samples[: len(samples) // 1536 * 1536], 3)
    vad = make_vad("silero", RATE)
    prepared = [vad.prepare(block) for block in blocks]
    backwards = [score() for score in reversed(prepared)][::-1]
    vad.reset()
    for block, scores in zip(blocks, backwards, strict=True):
        assert np.array_equal(vad(block), scores)


def test_short_and_empty_recordings_are_not_cut():
    for seconds, is_whole in [(9.0, True), (10.0, True), (10.1, False)]:
        samples = np.ones(round(seconds * RATE), dtype=np.float32)
        windows = list(cut_windows([samples], RATE, None, 6.0, 10.0))
        assert (len(windows) == 1) == is_whole and (is_whole or max(window.duration_s for window in windows) <= 6.0)

    for samples in (noise(4.9, 0.1), np.zeros(5 * RATE, np.float32), bursts([0.5, 0.5], [1.0, 2.0])[0]):
        (window,) = cut_windows([samples], RATE, EnergyVAD(RATE), 5.0)
        assert window.start_s == 0 and not window.needs_times
        np.testing.assert_array_equal(window.samples, samples)

    assert list(cut_windows([], RATE, EnergyVAD(RATE), 5.0)) == []
    for samples in (np.zeros(60 * RATE, np.float32), noise(60, 0.1)):
        assert list(cut_windows([samples], RATE, EnergyVAD(RATE), 5.0)) == []


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0.3, 4.0), st.floats(0.4, 5.0)), min_size=1, max_size=15), st.floats(5.0, 12.0))
def test_where_there_are_pauses_no_sound_is_cut(parts, max_window_s):
    samples, places = bursts(*zip(*parts, strict=True))
    windows = list(cut_windows([samples], RATE, EnergyVAD(RATE), max_window_s))
    check_windows(windows, samples, max_window_s)
    assert not any(window.needs_times for window in windows)
    for start, end in places:
        assert sum(first <= start and end <= last for first, last in spans(windows)) == 1
    # Long pauses are skipped but for what is kept around the speech, and nobody decodes more windows than sounds.
    if len(samples) > max_window_s * RATE:
        assert len(windows) <= len(places)
        kept_s = sum(window.duration_s for window in windows)
        pauses_s = sum(min(pause_s, 1.5) for _, pause_s in parts)
        assert kept_s <= sum(duration_s for duration_s, _ in parts) + pauses_s + 1.0 + 0.1 * len(parts)


@settings(max_examples=10)
@given(st.data(), st.integers(0, 5))
def test_cuts_do_not_depend_on_the_blocks(data, seed):
    rng = np.random.default_rng(seed)
    samples, _ = bursts(rng.uniform(0.3, 9, 12), rng.uniform(0.0, 2.0, 12), seed=seed)
    edges = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=8)))
    blocks = np.split(samples, edges)
    expected = list(cut_windows([samples], RATE, EnergyVAD(RATE), 6.0))
    windows = list(cut_windows(blocks, RATE, EnergyVAD(RATE), 6.0))
    assert spans(windows) == spans(expected)
    check_windows(windows, samples, 6.0)


def test_cuts_by_hand():
    # 9 s in four sounds: with windows of 8 s it must be cut once, and the middle pause is the long one.
    samples, places = bursts([2.0, 2.0, 2.0, 2.0], [0.3, 0.6, 0.3, 0.5])
    found = list(cut_windows([samples], RATE, EnergyVAD(RATE), 8.0))
    assert len(found) == 2
    middle = (places[1][1] + places[2][0]) / 2 / RATE
    assert found[0].end_s == pytest.approx(middle, abs=0.1) == found[1].start_s

    # Runs of 10 frames of 0.1 s: each 1 s, the pauses 0.2 s but one of 0.6 s, which is free to cut at.
    runs = [(0, 10), (12, 22), (24, 34), (40, 50), (52, 62)]
    starts, ends = [start for start, _ in runs], [end for _, end in runs]
    # Two windows are enough, and of 34 + 22 and 22 + 38 frames the first has the free cut.
    assert windows._first_window(runs, starts, ends, 40, 10.0) == 2
    # If all fit, there is no cut; if only one fits, each is alone.
    assert windows._first_window(runs, starts, ends, 62, 10.0) == 4
    assert windows._first_window(runs, starts, ends, 10, 10.0) == 0
    # A pause of more than 1.5 s is in no window.
    far = [(0, 10), (26, 36)]
    assert windows._first_window(far, [0, 26], [10, 36], 100, 10.0) == 0

    samples = noise(12, 0.1)
    # Too short to be a pause, but better than any other place.
    samples[round(7.4 * RATE) : round(7.5 * RATE)] *= 0.01
    found = list(cut_windows([samples], RATE, None, 8.0))
    assert found[0].end_s == pytest.approx(7.45, abs=0.05)

    samples = noise(30, 0.1)
    found = list(cut_windows([samples], RATE, None, 8.0))
    check_windows(found, samples, 8.0)
    assert covered(found, len(samples)).all()
    # A quarter of the window is shared, two seconds at most; no window is a snippet.
    for left, right in zip(found, found[1:], strict=False):
        assert left.end_s - right.start_s == pytest.approx(2.0, abs=0.05)
    assert min(window.duration_s for window in found) > 3.0


def test_memory_is_bounded():
    """An hour passes through in blocks; the cutter holds a few windows and blocks of it."""
    import tracemalloc

    block = bursts([3.0] * 6, [0.5] * 6)[0]

    def hour():
        for _ in range(3600 * RATE // len(block)):
            yield block.copy()

    tracemalloc.start()
    num_windows = sum(1 for _ in cut_windows(hour(), RATE, EnergyVAD(RATE), 8.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_windows > 400 and peak < 40e6


@needs_silero
def test_real_speech_is_cut_between_its_sentences():
    speech = load_audio(RECORDING)
    samples = np.concatenate([speech, noise(0.7, 1e-4)] * 8)
    for vad in ("silero", "energy"):
        windows = list(cut_windows([samples], RATE, make_vad(vad, RATE), 8.0))
        check_windows(windows, samples, 8.0)
        assert not any(window.needs_times for window in windows) and len(windows) == 8, vad
