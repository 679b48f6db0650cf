# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""load_audio: every usual form of audio gives the samples written, and everything else a one-line ValueError."""

import io
import os
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tables import each

from mdm_asr_hf import audio_mdm_asr
from mdm_asr_hf.audio_mdm_asr import (
    DECISION_SIZE,
    FADE_SIZE,
    AudioStream,
    audio_duration_s,
    is_audio_batch,
    is_audio_stream,
    load_audio,
    load_audio_batch,
    name_format,
)

RATE = 16_000


def sine(frequency_hz, duration_s, rate, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(round(duration_s * rate)) / rate)).astype(
        np.float32
    )


@pytest.fixture
def noise():
    return (np.random.default_rng(0).standard_normal(RATE) * 0.1).astype(np.float32)


def one_line_error(audio, match, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        load_audio(audio, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- forms of audio: all give the same samples ---


def test_every_form_of_a_clip_gives_its_samples(noise, tmp_path):
    wav = encode(noise, subtype="FLOAT")
    path = tmp_path / "clip.wav"
    path.write_bytes(wav)

    class Decoder:
        metadata = SimpleNamespace(duration_seconds=1.0)

        def get_all_samples(self):
            return SimpleNamespace(data=torch.tensor(noise)[None], sample_rate=RATE)

    class OldDecoder:
        def __getitem__(self, key):
            return {"array": noise, "sampling_rate": RATE}[key]

    with open(path, "rb") as file:
        forms = [
            str(path),
            path,
            wav,
            io.BytesIO(wav),
            file,
            noise,
            noise.astype(np.float64),
            torch.tensor(noise),
            noise.tolist(),
            (noise, RATE),
            (noise.tolist(), float(RATE)),
            {"array": noise, "sampling_rate": RATE, "path": "gone.wav"},
            {"raw": noise, "sampling_rate": RATE},
            {"array": None, "bytes": wav, "path": None},
            {"bytes": None, "path": str(path)},
            Decoder(),
            OldDecoder(),
        ]
        for form in forms:
            waveform = load_audio(form, sampling_rate=RATE)
            assert waveform.dtype == np.float32 and waveform.shape == (RATE,)
            np.testing.assert_array_equal(waveform, noise)

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(encode(noise, subtype="FLOAT")))
    writer.start()
    np.testing.assert_array_equal(load_audio(path), noise)
    writer.join()

    for name in ("flac.wav", "flac.raw", "flac"):
        path = tmp_path / name
        path.write_bytes(encode(noise, format="FLAC", subtype="PCM_24"))
        np.testing.assert_allclose(load_audio(path), noise, atol=2**-23)


def test_integers_channels_and_empty_clips(tmp_path):
    # Full scale is 2 ** (bits - 1), and unsigned 8 bit is centred at 128.
    cases = {
        np.int8: ([-128, 0, 64], [-1.0, 0.0, 0.5]),
        np.uint8: ([0, 128, 192], [-1.0, 0.0, 0.5]),
        np.int16: ([-32768, 0, 16384], [-1.0, 0.0, 0.5]),
        np.int32: ([-(2**31), 0, 2**30], [-1.0, 0.0, 0.5]),
        np.dtype(">i2"): ([-32768, 0, 16384], [-1.0, 0.0, 0.5]),
    }
    for dtype, (samples, expected) in cases.items():
        np.testing.assert_array_equal(load_audio(np.array(samples, dtype), sampling_rate=RATE), expected)
    np.testing.assert_array_equal(load_audio(torch.tensor([16384], dtype=torch.int16), sampling_rate=RATE), [0.5])
    np.testing.assert_array_equal(load_audio(torch.tensor([0.5], dtype=torch.bfloat16), sampling_rate=RATE), [0.5])
    # Integers of Python have no width: they are floats written short.
    np.testing.assert_array_equal(load_audio([0, 1, -1], sampling_rate=RATE), [0.0, 1.0, -1.0])

    left, right = np.full(100, 0.5, np.float32), np.full(100, -0.25, np.float32)
    for samples in (np.stack([left, right]), np.stack([left, right], axis=1)):
        np.testing.assert_array_equal(load_audio(samples, sampling_rate=RATE), np.full(100, 0.125))
    stereo = np.stack([np.full(50, 16384, np.int16), np.zeros(50, np.int16)], axis=1)
    np.testing.assert_array_equal(load_audio(encode(stereo)), np.full(50, 0.25))
    # A file says which axis is which, so even two stereo samples are clear.
    np.testing.assert_array_equal(load_audio(encode(stereo[:2])), [0.25, 0.25])
    # One entry is one channel, however short the clip.
    np.testing.assert_array_equal(load_audio(np.array([[0.5, 0.25]]), sampling_rate=RATE), [0.5, 0.25])
    np.testing.assert_array_equal(load_audio(np.array([[0.5], [0.25]]), sampling_rate=RATE), [0.5, 0.25])

    for audio in (np.zeros(0), [], np.zeros((0, 2)), np.zeros((2, 0)), torch.zeros(0), encode(np.zeros(0))):
        waveform = load_audio(audio, sampling_rate=44_100)
        assert waveform.shape == (0,) and waveform.dtype == np.float32


# --- channels that cancel each other ---


def voice(seconds=3.0, seed=0):
    """Noise of the band of speech, in syllables."""
    size = round(seconds * RATE)
    band = np.fft.rfft(np.random.default_rng(seed).standard_normal(size))
    band[np.abs(np.fft.rfftfreq(size, 1 / RATE) - 550) > 450] = 0
    syllables = 0.2 + np.sin(2 * np.pi * 2 * np.arange(size) / RATE) ** 2
    return (0.2 * np.fft.irfft(band, size) * syllables).astype(np.float32)


def mixed(*channels):
    return load_audio(np.stack(channels), sampling_rate=RATE)


@pytest.fixture
def warnings(monkeypatch):
    told = []
    monkeypatch.setattr(audio_mdm_asr.logger, "warning", told.append)
    forget(told)
    return told


def forget(warnings):
    warnings.clear()
    audio_mdm_asr._warn_once.cache_clear()


def test_channels_that_cancel_leave_the_louder_one_and_say_so_once(warnings):
    x = voice()
    for channels, kept in (
        ((x, -x), x),
        ((-0.8 * x, x), x),
        ((x + 0.3, 0.1 - x), x + 0.3),
        ((x, -x, 0 * x), x / 2),
        ((x, -x, x, -x), x),
        ((x, -0.45 * x, -0.45 * x), (x - 0.45 * x) / 2),
    ):
        np.testing.assert_allclose(mixed(*channels), kept, atol=1e-7)
        assert len(warnings) == 1 and "cancel each other" in warnings[0]
    # Two microphones of three, beside one that is louder than they and has nothing to do with them.
    noise = voice(seed=1)
    np.testing.assert_allclose(mixed(x, 4 * noise, -x), (x + 4 * noise) / 2, atol=1e-7)

    # Others are averaged.
    forget(warnings)
    y = voice(seed=1)
    offset, noise = np.full_like(x, 0.4), 0.3 * np.random.default_rng(2).standard_normal(len(x)).astype(np.float32)
    hum = (0.3 * np.sin(2 * np.pi * 50 * np.arange(len(x)) / RATE)).astype(np.float32)
    for channels in (
        (x, x),
        (x, y),
        (x, 0 * x),
        (x, offset),
        (x, -offset),
        (x, noise),
        (x, -0.3 * x),
        # The hum is what cancels.
        (x + hum, x - hum),
        (x, y, 0 * x, noise, offset, -0.3 * y),
        (0 * x, 0 * x),
        (offset, -offset),
        (x[:9], -y[:9]),
    ):
        np.testing.assert_allclose(mixed(*channels), np.mean(channels, axis=0), atol=1e-7)
    assert warnings == []


@each("format", ["WAV", "OGG", "MP3"])
def test_files_whose_channels_cancel(format, warnings, tmp_path):
    forget(warnings)
    x = voice()
    path = tmp_path / "phase"
    path.write_bytes(encode(np.stack([x, -x], axis=1), format=format))
    for read in (load_audio, lambda path: np.concatenate(list(AudioStream(path, block_s=0.5)))):
        assert read(path).std() == pytest.approx(x.std(), rel=0.1)
    assert len(warnings) == 1 and "phase" in warnings[0]


@each("block_s", [0.1, 1.0, 30.0])
def test_a_recording_that_changes_its_phase_fades_over_without_a_click(block_s, warnings):
    forget(warnings)
    seconds = 20
    x = 0.2 * np.sin(2 * np.pi * 200 * np.arange(seconds * RATE) / RATE).astype(np.float32) + 0.1 * voice(seconds)
    right = np.where(np.arange(len(x)) < len(x) // 2, x, -x)
    stream = AudioStream((np.stack([x, right]), RATE), block_s=block_s)
    result = np.concatenate(list(stream))
    # After two decisions, beside the one that the change is in, the second half is there.
    heard = np.ones(len(x), bool)
    heard[len(x) // 2 : len(x) // 2 + 3 * DECISION_SIZE + FADE_SIZE] = False
    np.testing.assert_allclose(result[heard], x[heard], atol=1e-6)
    # No step between samples is larger than the signal's own.
    assert np.abs(np.diff(result[len(x) // 2 + 1 :])).max() < 1.1 * np.abs(np.diff(x)).max()
    assert len(warnings) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.9, -0.5, -0.1, 0.0, 0.2, 1.0]), min_size=2, max_size=8))
def test_one_voice_on_any_channels_is_never_lost(gains):
    """Of the loudest channel's level it keeps its share of the number of channels, or it was cancelled before."""
    x = voice(0.5)
    result = mixed(*(gain * x for gain in gains))
    loudest = max(map(abs, gains))
    assert result.std() >= 0.4 * loudest * x.std() / len(gains) - 1e-9


@each("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_frequency_and_duration(rate):
    waveform = load_audio(sine(1000, 1.0, rate), sampling_rate=rate)
    assert abs(len(waveform) - RATE) <= 1
    # The samples are the same sine at the new rate, but for the filter's edges.
    np.testing.assert_allclose(waveform[1000:-1000], sine(1000, 1.0, RATE)[1000 : len(waveform) - 1000], atol=1e-3)
    # A file's own rate counts.
    waveform = sine(440, 0.5, rate)
    for audio in ((waveform, rate), {"array": waveform, "sampling_rate": rate}, encode(waveform, rate)):
        assert abs(len(load_audio(audio, sampling_rate=RATE)) - RATE // 2) <= 1


def test_resampling_does_not_alias():
    # 15 kHz is above the Nyquist frequency of 16 kHz audio: it must vanish, not come back at 1 kHz.
    assert np.abs(load_audio(sine(15_000, 1.0, 48_000), sampling_rate=48_000)[1000:-1000]).max() < 1e-3


# --- batches ---


def test_what_is_a_batch():
    clip = np.zeros(10, np.float32)
    for one in (clip, [0.0, 0.1], (0.0, 0.1), (clip, RATE), np.zeros((2, 99)), "a.wav", {"array": clip}):
        assert not is_audio_batch(one)
    for batch in ([clip], [clip, clip], (clip, clip), ["a.wav"], [(clip, RATE)], [[0.0], [0.1]], [{"array": clip}]):
        assert is_audio_batch(batch)
        one_line_error(batch, "several clips.* one by one")
    for one in ((RATE, clip), "", b"", memoryview(b""), bytearray(), io.BytesIO(), torch.zeros(3), {}):
        assert not is_audio_batch(one) and not is_audio_stream(one)
    with pytest.raises(ValueError, match="empty list"):
        is_audio_batch([])


@each("entries", ["paths", "undecoded", "arrays"])
def test_data_sets_and_their_columns_are_batches(noise, tmp_path, entries):
    datasets = pytest.importorskip("datasets")
    paths = [str(tmp_path / f"{size}.wav") for size in (4000, 1000)]
    for path, size in zip(paths, (4000, 1000), strict=True):
        soundfile.write(path, noise[:size], RATE, subtype="FLOAT")
    rows = [{"audio": path, "path": "elsewhere.mp3", "sentence": "no"} for path in paths]
    if entries == "arrays":
        rows = [{"audio": {"array": noise[:size].tolist(), "sampling_rate": RATE}} for size in (4000, 1000)]
    data = datasets.Dataset.from_list(rows)
    if entries == "undecoded":
        data = data.cast_column("audio", datasets.Audio(decode=False))
    expected = [noise[:4000], noise[:1000]]
    for batch in (data, data["audio"]):
        found = load_audio_batch(batch)
        assert all(np.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
        one_line_error(batch, f"type {type(batch).__name__} holds several clips")
    np.testing.assert_allclose(load_audio(data[1]), expected[1], atol=1e-6)
    stream = data.to_iterable_dataset()
    for one in (stream, stream["audio"], (row for row in data)):
        assert is_audio_stream(one) and not is_audio_batch(one)
        one_line_error(one, "several clips")
    one_line_error(datasets.DatasetDict(test=data), "a DatasetDict, but has neither")
    with pytest.raises(ValueError, match="empty list"):
        load_audio_batch(data.select([])["audio"])


@given(hnp.arrays(np.int16, st.tuples(st.integers(9, 40), st.integers(1, 2))), st.sampled_from([8_000, 16_000]))
def test_samples_and_rate_in_either_order(samples, rate):
    expected = load_audio((samples, rate))
    assert np.array_equal(load_audio((rate, samples)), expected) and len(expected) == len(samples) * (RATE // rate)
    assert np.array_equal(load_audio((np.int64(rate), torch.from_numpy(samples))), expected)
    assert np.array_equal(load_audio({"audio": (rate, samples)}), expected)
    assert np.array_equal(load_audio({"audio": samples, "sampling_rate": rate}), expected)


# --- what is refused ---


def test_samples_and_rates_that_are_no_audio():
    for bad in [np.nan, np.inf, -np.inf, 1e300]:
        samples = np.zeros(100)
        samples[50] = bad
        one_line_error(samples, "NaN or infinity", sampling_rate=RATE)
        one_line_error(np.stack([samples, samples]), "NaN or infinity", sampling_rate=RATE)

    one_line_error(np.zeros(10, bool), "dtype bool", sampling_rate=RATE)
    one_line_error(np.zeros(10, complex), "dtype complex", sampling_rate=RATE)
    one_line_error(np.array([None, 1]), "dtype object", sampling_rate=RATE)
    one_line_error(np.zeros(10, np.int64), "dtype int64", sampling_rate=RATE)
    one_line_error([[0.0, 1.0], [0.0]], "several clips", sampling_rate=RATE)
    one_line_error(np.float32(0.5), "one or two dimensions", sampling_rate=RATE)
    one_line_error(np.zeros((1, 2, 10)), "one or two dimensions", sampling_rate=RATE)
    one_line_error(np.zeros((2, 8)), "both axes could", sampling_rate=RATE)
    one_line_error(np.zeros((9, 20)), "no axis has at most", sampling_rate=RATE)
    one_line_error(None, "NoneType")
    one_line_error(7, "type int")
    # int16 cast to float without scaling would be taken for very loud audio.
    one_line_error(sine(440, 0.1, RATE, amplitude=20_000), "Divide by", sampling_rate=RATE)

    one_line_error({"array": np.zeros(10)}, "without a `sampling_rate`")
    assert len(load_audio({"array": np.zeros(10)}, sampling_rate=8_000)) == 20
    one_line_error({"audio": np.zeros(10)}, "without a `sampling_rate`")
    one_line_error({"samples": np.zeros(10)}, "neither 'array'")

    clips = load_audio_batch([np.zeros(3), np.ones(2)], sampling_rate=RATE)
    assert [len(c) for c in clips] == [3, 2]
    with pytest.raises(ValueError, match="Clip 1 of 2: .*NaN"):
        load_audio_batch([np.zeros(3), np.array([np.nan])], sampling_rate=RATE)

    for rate in [0, -1, np.nan, np.inf, 16, 1e9, True, "16000", [16000]]:
        one_line_error(np.zeros(10), "`sampling_rate` must be", sampling_rate=rate)
        one_line_error({"array": np.zeros(10), "sampling_rate": rate}, "`sampling_rate` must be")
        one_line_error(np.zeros(10), "`target_sampling_rate` must be", target_sampling_rate=rate)


def test_files_that_cannot_be_read(tmp_path, noise):
    text = tmp_path / "text.wav"
    text.write_text("This is not audio. " * 100)
    empty = tmp_path / "empty.wav"
    empty.touch()
    assert "text.wav" in one_line_error(text, "not audio of a format that can be read.*FLAC.*convert")
    assert "empty.wav" in one_line_error(empty, r"0 bytes")
    assert "gone.wav" in one_line_error(tmp_path / "gone.wav", "does not exist")
    one_line_error(tmp_path, "is a directory")
    one_line_error("", "does not exist")
    one_line_error("/dev/null", "not a regular file")
    one_line_error("a\0b", "null")
    one_line_error("https://example.com/a.wav", "Download it first")
    one_line_error(io.StringIO("text"), "binary mode")
    one_line_error(b"", "0 bytes")
    one_line_error(b"\0\0\0\x20ftypM4A " + bytes(100), "WAV, FLAC")
    with open(text) as file:
        one_line_error(file, "binary mode")

    soundfile.write(tmp_path / "a.wav", noise, RATE)
    with soundfile.SoundFile(tmp_path / "a.wav") as sound:
        one_line_error(sound, "SoundFile that reads no bytes.* path")
    closed = open(tmp_path / "a.wav", "rb")
    closed.close()
    one_line_error(closed, "cannot be read .*closed")
    one_line_error({"path": None, "bytes": None, "array": None}, "neither 'array'")
    assert len(load_audio({"path": str(tmp_path / "a.wav"), "array": None, "sampling_rate": None})) == len(noise)

    flac = bytearray(encode(noise, format="FLAC"))
    flac[21] &= 0xF0  # the 36 bits of the total number of samples in STREAMINFO
    flac[22:26] = bytes(4)
    one_line_error(bytes(flac), "does not say how long")


@each("format", ["FLAC", "WAV", "AIFF", "AU", "MP3"])
@each("part", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_never_read_as_if_it_were_whole(format, part, noise, tmp_path):
    whole = encode(np.tile(noise, 5), format=format)
    path = tmp_path / f"clip.{format.lower()}"
    path.write_bytes(whole)
    assert len(load_audio(path)) == 5 * RATE
    path.write_bytes(whole[: int(len(whole) * part)])
    one_line_error(path, "truncated|not audio")
    one_line_error(path.read_bytes(), "truncated|not audio")


def test_a_truncated_ogg_is_reported(noise, warnings):
    whole = encode(np.tile(noise, 5), format="OGG")
    assert len(load_audio(whole)) == 5 * RATE and warnings == []
    assert 0 < len(load_audio(whole[: len(whole) // 2])) < 5 * RATE
    assert "may be cut off" in warnings[0]


def riff(*chunks, size=None):
    """A WAV file of (name, content, or its size by the header and content); content is padded."""
    body = b"WAVE"
    for name, content, *its_size in chunks:
        body += name + struct.pack("<I", *(its_size or [len(content)])) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def wav_format(tag, bits, valid_bits=None):
    """The content of a `fmt ` chunk; with `valid_bits` of WAVE_FORMAT_EXTENSIBLE, as its GUID."""
    content = struct.pack("<HHIIHH", tag, 1, RATE, RATE * bits // 8, bits // 8, bits)
    if valid_bits is None:
        return content
    guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
    return struct.pack("<H", 0xFFFE) + content[2:] + struct.pack("<HHI", 22, valid_bits, 4) + guid


def wav_codecs(samples):
    """(`fmt ` chunk, bytes of the samples, precision)"""
    whole = np.round(samples * 2**23).astype("<i4")
    pcm_24 = whole.view("u1").reshape(-1, 4)[:, :3].tobytes()
    files = {name: encode(samples, subtype=name) for name in ("ALAW", "ULAW")}
    law = {name: file.partition(b"data")[2][4 : 4 + len(samples)] for name, file in files.items()}
    return {
        "8 bit": (wav_format(1, 8), np.uint8(np.round(samples * 128) + 128).tobytes(), 2**-7),
        "16 bit": (wav_format(1, 16), np.round(samples * 2**15).astype("<i2").tobytes(), 2**-15),
        "24 bit": (wav_format(1, 24), pcm_24, 2**-23),
        "float64": (wav_format(3, 64), samples.astype("<f8").tobytes(), 0),
        "A-law": (wav_format(6, 8), law["ALAW"], 2**-5),
        "mu-law": (wav_format(7, 8), law["ULAW"], 2**-5),
        "extensible 24 bit": (wav_format(1, 24, 24), pcm_24, 2**-23),
        "extensible 24 bit of 32": (wav_format(1, 32, 24), (whole << 8).tobytes(), 2**-23),
        "extensible float64": (wav_format(3, 64, 64), samples.astype("<f8").tobytes(), 0),
    }


WAV_CODECS = ("8 bit", "16 bit", "24 bit", "float64", "A-law", "mu-law")
WAV_CODECS += ("extensible 24 bit", "extensible 24 bit of 32", "extensible float64")


@each("codec", WAV_CODECS)
def test_any_usual_wav_gives_its_samples(codec, noise, warnings, tmp_path):
    # An odd number of samples of 8 or 24 bits is padded.
    noise = noise[:9999]
    form, samples, precision = wav_codecs(noise)[codec]
    fmt, data, notes = (b"fmt ", form), (b"data", samples), (b"LIST", b"INFOISFT\x05\0\0\0Lavf\0")
    whole = {
        "plain": riff(fmt, data),
        "odd chunks around": riff(fmt, notes, data, (b"note", b"odd")),
        "loose bytes behind": riff(fmt, data) + b"\xff\x13loose" * 50,
        "a chunk that never ends behind": riff(fmt, data, (b"\x01\xff?!", b"abcd", 0xFFFFFFF0)),
    }
    # As recorders that were killed, ffmpeg, sox and others leave it where they cannot seek.
    unfinished = {
        f"{size:#x}": riff(fmt, notes, (b"data", samples, size), size=min(size, 0xFFFFFFFF))
        for size in (0, 6, 0x7FFFF000, 0xFFFFFFFF)
    }
    path = tmp_path / "clip.wav"
    for name, content in (whole | unfinished).items():
        path.write_bytes(content)
        for form in (content, path):
            warnings.clear()
            read = load_audio(form), np.concatenate(list(AudioStream(form, block_s=0.25)))
            for result in read:
                # What is behind the samples of a stream can only be its padding.
                assert len(result) - len(noise) in ((0, 1) if name in unfinished else (0,)), name
                np.testing.assert_allclose(result[: len(noise)], noise, rtol=0, atol=precision, err_msg=name)
            assert audio_duration_s(form) == len(read[0]) / RATE
            is_short = name in ("0x0", "0x6")
            assert len(warnings) == 3 * is_short and all("was not ended properly" in one for one in warnings)


def test_wavs_without_samples_are_empty_and_damaged_ones_refused(noise):
    fmt, data = (b"fmt ", wav_format(1, 16)), (b"data", np.int16(noise * 2**15).tobytes())
    for content in (riff(fmt, (b"data", b"")), riff(fmt, (b"data", b""), (b"LIST", b"INFOISFT\4\0\0\0abc\0"))):
        assert load_audio(content).shape == (0,)
    # A chunk of odd size that is not padded, one that never ends, no format, nothing but zeros, or chunks.
    one_line_error(riff(fmt, (b"junk", b"abc"), data).replace(b"abc\0", b"abc"), "damaged")
    one_line_error(riff(fmt, (b"junk", b"abcd", 0xFFFFFFF0), data), "damaged")
    one_line_error(riff(data), "damaged")
    one_line_error(riff() + bytes(10**5), "damaged")
    one_line_error(riff() + b"abcd\0\0\0\0" * 10**5, "damaged")
    one_line_error(riff((b"fmt ", wav_format(3, 16)), data), "damaged")
    one_line_error(riff((b"fmt ", wav_format(1, 24, 24)[:-2] + b"??"), data), "damaged")

    for format in ["WAV", "AIFF", "AU", "CAF"]:
        content = encode(np.zeros(0, np.float32), format=format)
        assert len(load_audio(content)) == 0 or format == "CAF"


@each("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@each("size", [0, 0xFFFFFFFF])
@each("format", ["WAV", "AIFF", "AU", "CAF"])
def test_streams_whose_headers_know_no_size_are_read_to_their_end(format, size, subtype, noise, warnings, tmp_path):
    forget(warnings)
    content = encode(noise, format=format, subtype=subtype)
    expected = load_audio(content)
    order = "<" if format == "WAV" else ">"
    if format == "AU":
        contents = [content[:8] + struct.pack(">I", size) + content[12:]]
    elif format == "CAF":
        place = content.index(b"data") + 4
        # Unknown is -1, in eight bytes.
        contents = [content[:place] + (b"\xff" * 8 if size else bytes(8)) + content[place + 8 :]]
    else:
        place = content.index(b"data" if format == "WAV" else b"SSND") + 4
        unknown = struct.pack(f"{order}I", size)
        content = content[:4] + unknown + content[8:place] + unknown + content[place + 4 :]
        contents = [content + tail for tail in (b"", chunk(order, b"LIST", b"12345678"))]
        contents.append(content + chunk(order, b"ANNO", b"123456") + chunk(order, b"LIST", b"1234"))
    for one in contents:
        (tmp_path / "a").write_bytes(one)
        for source in (one, tmp_path / "a"):
            np.testing.assert_array_equal(load_audio(source), expected)
    assert bool(warnings) == (size == 0)


def chunk(order, name, content):
    return name + struct.pack(f"{order}I", len(content)) + content


def adts_frame(length=200):
    head = bytes([0xFF, 0xF1, 0x50, 0x80 | length >> 11, length >> 3 & 255, (length & 7) << 5 | 0x1F, 0xFC])
    return head + bytes(length - len(head))


def test_names_of_formats_that_have_no_magic_number():
    assert name_format(3 * adts_frame()) == name_format(adts_frame()[:12]) == "AAC"
    assert name_format(3 * (b"\x56\xe0\x20" + bytes(32))) == "AAC"
    # Samples that begin like a frame; the next one is not where it says.
    assert name_format(adts_frame()[:7] + np.random.default_rng(0).bytes(20_000)) is None
    for value in (-1, -15, 0, 255):
        assert name_format(np.full(9000, value, "<i2").tobytes()) is None


def test_too_long_a_file_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "3h.wav"
    soundfile.write(path, np.zeros(3 * 3600 * 8_000, np.int16), 8_000, subtype="PCM_U8")
    start = time.perf_counter()
    message = one_line_error(path, "lasts 10800.00 s", max_duration_s=30)
    assert time.perf_counter() - start < 0.1
    assert "3h.wav" in message and "30 s" in message and "Split" in message

    for rate in (16_000, 44_100, 48_000):
        clip = np.zeros(rate, np.float32)
        assert abs(len(load_audio(clip, sampling_rate=rate, max_duration_s=1)) - RATE) <= 1
        one_line_error(np.zeros(rate + rate // 100), "lasts 1.01 s", sampling_rate=rate, max_duration_s=1)

    class Decoder:
        metadata = SimpleNamespace(duration_seconds=99.0)

        def get_all_samples(self):
            raise AssertionError("decoded although the header says it is too long")

    one_line_error(Decoder(), "lasts 99.00 s", max_duration_s=30)


# --- properties: a result or a ValueError, never another exception ---


def result_or_value_error(audio, **kwargs):
    try:
        waveform = load_audio(audio, **kwargs)
    except ValueError as error:
        assert "\n" not in str(error)
        return None
    assert waveform.dtype == np.float32 and waveform.ndim == 1 and np.isfinite(waveform).all()
    return waveform


ARRAYS = hnp.arrays(
    dtype=hnp.scalar_dtypes(),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20),
    fill=st.nothing(),
)
OBJECTS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["array", "raw", "sampling_rate", "bytes", "path"]), inner, max_size=3)
    ),
)


@settings(max_examples=160, deadline=None)
@given(ARRAYS | OBJECTS, st.sampled_from([None, 8_000, 16_000, 44_100, 11_025.5, 0, 1e12]))
def test_any_array_or_object(audio, rate):
    result_or_value_error(audio, sampling_rate=rate)


HEADERS = {name: encode(sine(440, 0.05, RATE), format=name) for name in ("WAV", "FLAC", "OGG", "AIFF", "AU")}


@st.composite
def damaged_files(draw):
    content = bytearray(HEADERS[draw(st.sampled_from(sorted(HEADERS)))])
    for position, value in draw(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6)):
        content[position % len(content)] = value
    return bytes(content[: int(len(content) * draw(st.floats(0, 1)))])


@settings(max_examples=180, deadline=None)
@given(st.binary(max_size=200) | damaged_files())
def test_any_bytes_and_any_damage_to_a_file(content):
    result_or_value_error(content, max_duration_s=60)
