# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio in any usual form to mono float32 at the model's sampling rate."""

import io
import logging
import math
import mmap
import numbers
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

logger = logging.getLogger(__name__)

MAX_NUM_CHANNELS = 8
# Zero point and full scale of integer PCM, by (kind, bytes); 8-bit WAV is unsigned, everything else signed.
PCM_SCALES = {("u", 1): (128, 128), ("i", 1): (0, 128), ("i", 2): (0, 2**15), ("i", 4): (0, 2**31)}
# Float audio lies in -1..1, and clipped or hot recordings a little outside. Far outside are integers cast to float
# without scaling, whose level the features would take for real.
MAX_PEAK = 128.0
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 1_000_000
# What resampling's rounding may add to a clip of exactly the longest duration.
DURATION_TOLERANCE_S = 1e-3
# No codec packs more frames than this into a byte; a header that says so is damaged, and believing it costs memory.
MAX_FRAMES_PER_BYTE = 2**14
# WAV writers that cannot seek (pipes) put a size like 0x7FFFF000 or 0xFFFFFFFF where the true one is unknown.
UNKNOWN_SIZE = 0x7FFF0000
# Of a WAV file, to be looked at for its samples: a damaged one may have any number.
MAX_NUM_CHUNKS = 1000
# Where chunks behind samples of an unknown number are looked for.
MAX_TAIL = 2**20
# Without a Xing header the length of an MP3 is an estimate from its size, good to a frame or two.
MP3_TOLERANCE_S = 0.1
# How much of a recording is read at once where it is not read whole.
BLOCK_S = 30.0
# Channels cancel where their sum has less than this share of their energies: 1 if they are unrelated, 2 of two alike.
CANCELLED = 0.2
# They are compared by the differences of means of so many samples: the band below a 16th of the sampling rate, where
# lossy codecs keep the phase, without an offset and with little hum.
COMPARED_SIZE = 8
# Samples between two decisions on which channels to mix, and those over which one fades into the next.
DECISION_SIZE, FADE_SIZE = 2**14, 2**8

# First bytes of formats.
MAGIC = {
    b"fLaC": "FLAC",
    b"OggS": "OGG",
    b"FORM": "AIFF",
    b"caff": "CAF",
    b".snd": "AU",
    b"RIFX": "WAV of big endian",
    b"#!AM": "AMR",
    b"\x1aE\xdf\xa3": "WebM",
    b"ADIF": "AAC",
    b"0&\xb2u": "WMA",
    b"wvpk": "WavPack",
    b"MAC ": "Monkey's Audio",
    b"riff": "Wave64",
    b"FLV\x01": "FLV",
    b"#!SI": "SILK",
}
# What libsndfile reads, and those of them that the first bytes tell.
READABLE = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")
RECOGNISED = set(READABLE) - {"MP3"}
# Of MPEG audio's layer III: rates of its first version, and kbit/s of the others and of the first.
MP3_RATES_HZ = (44_100, 48_000, 32_000)
MP3_KBITS = (
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)

CONVERT = "convert it first, for example with `ffmpeg -i INPUT output.wav`"


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class _AnySeek:
    """For libsndfile, which may seek before the start of a damaged file and expects no exception."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            super().seek(offset, whence)
        except (ValueError, OverflowError):
            pass
        return self.tell()


class _Content(_AnySeek, io.BytesIO):
    """Bytes of a file."""


class _Mapped(_AnySeek, mmap.mmap):
    """A file whose bytes can be changed in memory."""


class Downmix:
    """
    Mixes the channels of one recording, part by part: their mean, without those that would cancel it.

    With one wire turned round, right is -left, and their mean is nothing at all. So channels are added one by one,
    the louder ones first, and one that takes away nearly all of the energy, of another one or of all so far, is left
    out; a warning says so. It is decided anew every `DECISION_SIZE` samples, on these and those before, which
    count a quarter for each `DECISION_SIZE` that they are older: what is kept stays the same unless the recording
    changes, and then fades over.

    Args:
        name (`str`): of the recording, for the warning.
    """

    def __init__(self, name: str = "`audio`"):
        self.name = name
        self._kept: list[int] = []
        self._products = np.zeros((0, 0))

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The next samples (N, channels), float32, as (N,)."""
        num_channels = samples.shape[1]
        if len(self._products) != num_channels:
            self._kept, self._products = [], np.zeros((num_channels, num_channels))
        if num_channels == 1 or not len(samples):
            return samples.mean(axis=1, dtype=np.float32)
        parts = [samples[start : start + DECISION_SIZE] for start in range(0, len(samples), DECISION_SIZE)]
        return np.concatenate([self._mix(part) for part in parts])

    def _mix(self, samples: np.ndarray) -> np.ndarray:
        num_means = len(samples) // COMPARED_SIZE
        means = samples[: num_means * COMPARED_SIZE].reshape(num_means, COMPARED_SIZE, samples.shape[1]).mean(axis=1)
        differences = np.diff(means, axis=0)
        self._products = 0.25 ** (len(samples) / DECISION_SIZE) * self._products + differences.T @ differences
        before, self._kept = self._kept, self._choose()
        mixed = samples[:, self._kept].mean(axis=1, dtype=np.float32)
        if before and before != self._kept:
            head = samples[:FADE_SIZE]
            share = np.linspace(1.0, 0.0, len(head), endpoint=False, dtype=np.float32)
            mixed[: len(head)] += share * (head[:, before].mean(axis=1, dtype=np.float32) - mixed[: len(head)])
        return mixed

    def _choose(self) -> list[int]:
        """The channels to mix."""
        products, kept = self._products, []
        # Of two that are as loud, not now the one and now the other.
        dropped = set(range(len(products))) - set(self._kept) if self._kept else set()
        for i in sorted(range(len(products)), key=lambda i: (i in dropped, -products[i, i])):
            for others in [*([j] for j in kept), kept]:
                together = products[np.ix_([*others, i], [*others, i])]
                if together.sum() < CANCELLED * together.trace():
                    _warn_once(f"{self.name} has channels that cancel each other (out of phase): the louder is taken.")
                    break
            else:
                kept.append(i)
        return sorted(kept)


def load_audio(
    audio: Any,
    *,
    sampling_rate: float | None = None,
    target_sampling_rate: float = 16_000,
    max_duration_s: float | None = None,
) -> np.ndarray:
    """
    Reads one clip, mixes it to mono (see [`Downmix`]), then resamples it.

    Args:
        audio: one of
            - a path of an audio file, its content as `bytes`, or a file opened in binary mode;
            - samples as a NumPy array, a torch tensor or a list of floats, mono or (channels, samples) or
              (samples, channels); float samples lie in -1..1, int8, uint8, int16 and int32 are scaled to that;
            - `(samples, sampling rate)`, or `(sampling rate, samples)`, as Gradio gives it;
            - a dict with `"array"` or `"raw"`, and `"sampling_rate"`; or with `"bytes"` or `"path"`, as `datasets`
              gives undecoded audio; or a row of a data set, which has one of all these as `"audio"`;
            - an `AudioDecoder` of torchcodec, as `datasets` >= 4 gives.
        sampling_rate (`float`, *optional*): rate in Hz of samples that do not carry their own. None says they are at
            `target_sampling_rate` already, except in a dict, where it is an error. Files and decoders know theirs.
        target_sampling_rate (`float`): rate in Hz of the result.
        max_duration_s (`float`, *optional*): longer audio is an error; a file's header tells before it is decoded.

    Returns:
        `np.ndarray` of shape (number of samples,), float32; empty for a clip without samples.

    Raises:
        ValueError: anything else, with what to do on one line.
    """
    reader = _Reader(sampling_rate, target_sampling_rate, max_duration_s)
    rate, _, *blocks = reader.read(audio)
    waveform = blocks[0] if blocks else np.zeros(0, dtype=np.float32)
    if rate != reader.target_rate_hz and waveform.size:
        # Mixing before resampling costs one channel's work and gives the same samples: both are linear.
        waveform = soxr.resample(np.ascontiguousarray(waveform), rate, reader.target_rate_hz, quality="HQ")
    return waveform


class AudioStream:
    """
    One recording of any form and length, read in blocks, so that it need not fit into memory.

    Iterating gives mono float32 blocks at the target rate, which together are what [`load_audio`] gives. Files are
    decoded as the iteration goes on; the samples of a decoder of torchcodec are fetched at once.

    Args:
        audio, sampling_rate, target_sampling_rate, max_duration_s: as for [`load_audio`].
        block_s (`float`): seconds of a block.

    Attributes:
        duration_s (`float`): as the header says it, which for MP3 may be an estimate.

    Raises:
        ValueError: as [`load_audio`] does; what a header does not tell, in the iteration.
    """

    def __init__(
        self,
        audio: Any,
        *,
        sampling_rate: float | None = None,
        target_sampling_rate: float = 16_000,
        max_duration_s: float | None = None,
        block_s: float = BLOCK_S,
    ):
        reader = _Reader(sampling_rate, target_sampling_rate, max_duration_s, block_s)
        self.target_rate_hz, self._reading = reader.target_rate_hz, reader.read(audio)
        self.rate_hz, num_samples = next(self._reading), next(self._reading)
        self.duration_s = num_samples / self.rate_hz

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.rate_hz == self.target_rate_hz:
            yield from (block for block in self._reading if block.size)
            return
        resampler = soxr.ResampleStream(self.rate_hz, self.target_rate_hz, 1, dtype="float32", quality="HQ")
        for block in self._reading:
            resampled = resampler.resample_chunk(np.ascontiguousarray(block))
            if resampled.size:
                yield resampled
        rest = resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        if rest.size:
            yield rest

    def close(self) -> None:
        """Closes the file. The end of the iteration does so, too."""
        self._reading.close()


def audio_duration_s(audio: Any) -> float:
    """
    Seconds of a clip that comes with its rate, as its header says: files are not decoded.

    Raises:
        ValueError: as [`load_audio`] does, as far as a header tells.
    """
    reading = _Reader().read(audio)
    rate_hz, num_samples = next(reading), next(reading)
    reading.close()
    return num_samples / rate_hz


def load_audio_batch(audio: Any, **kwargs: Any) -> list[np.ndarray]:
    """[`load_audio`] for one clip or a batch of them; an error in a batch says which clip it is about."""
    if not is_audio_batch(audio):
        return [load_audio(audio, **kwargs)]
    waveforms = []
    for i, clip in enumerate(audio):
        try:
            waveforms.append(load_audio(clip, **kwargs))
        except ValueError as error:
            raise ValueError(f"Clip {i} of {len(audio)}: {error}") from error
    return waveforms


def is_audio_batch(audio: Any) -> bool:
    """Whether `audio` is a list, tuple, data set or column of clips, and not one clip (a list of floats, or `(samples,
    rate)`)."""
    is_list = isinstance(audio, (list, tuple))
    if not (is_list or _is_collection(audio)) or _samples_and_rate(audio) is not None:
        return False
    if len(audio) == 0:
        raise ValueError("`audio` is an empty list. Pass at least one clip; a clip without samples is `np.zeros(0)`.")
    return not (is_list and _is_number(audio[0]))


def is_audio_stream(audio: Any) -> bool:
    """Whether `audio` gives clips one by one, and nobody knows how many: a generator or a streamed data set."""
    return hasattr(audio, "__iter__") and not hasattr(audio, "__len__") and not _is_clip(audio)


def check_rate(rate: Any, name: str) -> float:
    """Returns a sampling rate in Hz, or raises ValueError."""
    if not _is_number(rate) or not math.isfinite(rate) or rate <= 0:
        raise ValueError(f"`{name}` must be a positive number of Hz, got {rate!r}.")
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise ValueError(f"`{name}` must be in Hz, from {MIN_RATE_HZ} to {MAX_RATE_HZ}, got {rate!r}. Is it in kHz?")
    return int(rate) if rate == int(rate) else float(rate)


def check_duration(num_samples: int, rate: float, max_duration_s: float | None, name: str = "the audio") -> None:
    """Raises ValueError if a clip lasts longer than `max_duration_s`."""
    duration_s = num_samples / rate
    if max_duration_s is not None and duration_s > max_duration_s + DURATION_TOLERANCE_S:
        raise ValueError(
            f"{name} lasts {duration_s:.2f} s, more than the {max_duration_s:g} s this model takes at once. Split it "
            f"into pieces of at most {max_duration_s:g} s; nothing is cut off silently."
        )


def to_mono_float32(samples: Any, channel_axis: int | None = None, downmix: Downmix | None = None) -> np.ndarray:
    """
    Checks samples in memory and brings them to one float32 channel.

    Args:
        samples: a NumPy array, torch tensor, or list, of one or two dimensions.
        channel_axis (`int`, *optional*): which axis of two counts the channels. By default the one with at most
            8 entries: torchcodec and transformers write (channels, samples), soundfile (samples, channels).
        downmix ([`Downmix`], *optional*): of the recording that these samples go on with.
    """
    samples = _to_float32(_by_time(_to_numpy(samples), channel_axis))
    if samples.size == 0:
        return np.zeros(0, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise ValueError("`audio` holds NaN or infinity. Replace these samples, for example with `np.nan_to_num`.")
    peak = np.abs(samples).max()
    if peak > MAX_PEAK:
        raise ValueError(
            f"`audio` is float with a peak of {peak:.6g}, but float samples must lie in -1..1. Divide by the integer "
            "full scale (32768 for 16 bit), or pass the integers as they are (dtype int16 or int32)."
        )
    return samples if samples.ndim == 1 else (downmix or Downmix())(samples)


class _Reader:
    """What reads a clip of any form, as [`load_audio`] or, in blocks, [`AudioStream`] is asked to."""

    def __init__(
        self,
        sampling_rate: float | None = None,
        target_sampling_rate: float = 16_000,
        max_duration_s: float | None = None,
        block_s: float | None = None,
    ):
        self.target_rate_hz = check_rate(target_sampling_rate, "target_sampling_rate")
        self.rate_hz = None if sampling_rate is None else check_rate(sampling_rate, "sampling_rate")
        self.max_duration_s, self.block_s = max_duration_s, block_s

    def read(self, audio: Any) -> Iterator[Any]:
        """Yields a clip's sampling rate, its number of samples at that rate as far as it is known beforehand, then its
        mono samples, in blocks of `block_s` seconds or at once."""
        if isinstance(audio, (str, os.PathLike)):
            yield from self._read_path(os.fspath(audio))
        elif isinstance(audio, (bytes, bytearray, memoryview)):
            yield from self._read_bytes(bytes(audio))
        elif hasattr(audio, "get_all_samples"):
            yield from self._read_decoder(audio)
        elif hasattr(audio, "read"):
            yield from self._read_bytes(_content(audio))
        elif _holds_clips(audio):
            raise ValueError(
                f"`audio` of type {type(audio).__name__} holds several clips, where one is taken. Pass them one by "
                "one."
            )
        elif isinstance(audio, Mapping) or (not _is_array_like(audio) and hasattr(audio, "__getitem__")):
            yield from self._read_mapping(audio)
        elif (pair := _samples_and_rate(audio)) is not None:
            yield from self._read_samples(pair[0], check_rate(pair[1], "sampling_rate"))
        elif _is_array_like(audio):
            if self.rate_hz is None:
                _warn_once(
                    f"Audio samples came without `sampling_rate`: they are taken to be at {self.target_rate_hz} Hz."
                )
            yield from self._read_samples(audio, self.rate_hz or self.target_rate_hz)
        else:
            raise ValueError(
                f"`audio` of type {type(audio).__name__} is not supported. Pass a path, bytes, samples with their "
                "sampling rate, or an entry of an audio dataset."
            )

    def _block_size(self, rate: float, num_samples: int) -> int:
        """Samples to take at once."""
        return num_samples if self.block_s is None else max(round(self.block_s * rate), 1)

    def _read_samples(self, samples: Any, rate: float) -> Iterator[Any]:
        samples = _by_time(_to_numpy(samples))
        check_duration(len(samples), rate, self.max_duration_s)
        yield from (rate, len(samples))
        # A clip without samples is one block, which is checked.
        size, downmix = max(self._block_size(rate, len(samples)), 1), Downmix()
        for start in range(0, max(len(samples), 1), size):
            yield to_mono_float32(samples[start : start + size], channel_axis=1, downmix=downmix)

    def _read_mapping(self, audio: Mapping) -> Iterator[Any]:
        def get(key):
            try:
                return audio[key]
            except (KeyError, IndexError, TypeError, AttributeError):
                return None

        samples = get("array") if get("array") is not None else get("raw")
        entry = get("audio")
        if samples is None and _is_array_like(entry) and _samples_and_rate(entry) is None:
            samples = entry
        if samples is not None:
            rate = get("sampling_rate") if get("sampling_rate") is not None else self.rate_hz
            if rate is None:
                raise ValueError("`audio` is a dict without a `sampling_rate`. Add the rate of its samples in Hz.")
            if not _is_array_like(samples):
                raise ValueError(f"`audio` is a dict whose samples are a {type(samples).__name__}. Pass an array.")
            yield from self._read_samples(samples, check_rate(rate, "sampling_rate"))
            return
        # A row may have a path beside it, which is that on another machine.
        files = (get(key) for key in ("bytes", "path"))
        files = [one for one in files if isinstance(one, (str, bytes, os.PathLike))]
        if entry is None and not files:
            raise ValueError(
                f"`audio` is a {type(audio).__name__}, but has neither 'array' (or 'raw') and 'sampling_rate' nor "
                "'bytes', 'path' or 'audio'. Pass one of these."
            )
        yield from self.read(files[0] if entry is None else entry)

    def _read_decoder(self, decoder: Any) -> Iterator[Any]:
        """torchcodec's AudioDecoder, known by its methods, so that torchcodec need not be installed."""
        duration_s = getattr(getattr(decoder, "metadata", None), "duration_seconds", None)
        if _is_number(duration_s):
            check_duration(duration_s, 1.0, self.max_duration_s)
        try:
            samples = decoder.get_all_samples()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"`audio` cannot be decoded ({_one_line(error)}). Is the file damaged?") from error
        waveform = to_mono_float32(samples.data, channel_axis=0)
        rate = check_rate(samples.sample_rate, "sampling_rate")
        check_duration(len(waveform), rate, self.max_duration_s)
        yield from (rate, len(waveform), waveform)

    def _read_path(self, path: str | bytes) -> Iterator[Any]:
        name = f"{os.fsdecode(path)!r}"
        # Such as text where a path should be; no file system takes longer ones.
        name = name if len(name) <= 4200 else f"{name[:100]}...{name[-20:]}"
        # Where a path was made of it, one of the slashes is gone.
        if re.match(r"[a-z][a-z0-9+.-]+:/", os.fsdecode(path), flags=re.IGNORECASE) and not os.path.exists(path):
            raise ValueError(f"{name} is a URL. Download it first and pass the file.")
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise ValueError(f"{name} is a directory. Pass the audio files in it one by one.")
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise ValueError(f"{name} is not a regular file. Pass an audio file.")
            # By descriptor, libsndfile reads the file itself and judges it by its content, not by its name. It shares
            # the descriptor's position, which only an unbuffered file keeps in step.
            with open(path, "rb", buffering=0) as file:
                if stat.S_ISFIFO(mode):
                    yield from self._read_bytes(file.read(), name)
                else:
                    yield from self._read_file(file, file.fileno(), os.fstat(file.fileno()).st_size, name)
        except FileNotFoundError as error:
            raise ValueError(f"{name} does not exist. Check the path.") from error
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror or _one_line(error)}.") from error

    def _read_bytes(self, content: bytes, name: str = "the audio") -> Iterator[Any]:
        file = _Content(content)
        yield from self._read_file(file, file, len(content), name)

    def _read_file(self, file: BinaryIO, source: Any, num_bytes: int, name: str) -> Iterator[Any]:
        """Decodes an audio file; `source` is what libsndfile opens, `file` the same content for a look at it."""
        if num_bytes == 0:
            raise ValueError(f"{name} is empty (0 bytes). Record or download it again.")
        if _is_unfinished_ogg(file, num_bytes):
            logger.warning(f"{name} has no end-of-stream mark: it may be cut off. What it holds is read.")
        if (patch := _unfinished(file, num_bytes)) is not None:
            place, written, is_error = patch
            if is_error:
                logger.warning(
                    f"{name} has more samples than its header says: it was not ended properly. All are read."
                )
            if not isinstance(file, _Content):
                file = source = _Mapped(file.fileno(), 0, access=mmap.ACCESS_COPY)
            file.seek(place)
            file.write(written)
        file.seek(0)
        num_read = 0
        try:
            with soundfile.SoundFile(source, closefd=False) as sound:
                rate = check_rate(sound.samplerate, f"sampling_rate of {name}")
                _check_header(sound, num_bytes, name)
                check_duration(sound.frames, rate, self.max_duration_s, name)
                num_frames, is_mp3 = sound.frames, sound.format == "MP3"
                if self.block_s is not None and sound.format == "FLAC" and num_frames:
                    # Its header does not tell whether the end is there, and one should not learn that hours later.
                    sound.seek(num_frames - 1)
                    sound.read(1)
                    sound.seek(0)
                yield from (rate, num_frames)
                # Some codecs of WAV want to be told the number.
                size, downmix = self._block_size(rate, num_frames), Downmix(name)
                while len(samples := sound.read(size, dtype="float32", always_2d=True)):
                    num_read += len(samples)
                    yield _mono_of_file(samples, name, downmix)
                    if self.block_s is None:
                        break
        except (soundfile.SoundFileError, RuntimeError, TypeError, MemoryError) as error:
            reason = _one_line(getattr(error, "error_string", error))
            # The first bytes of a file that was recognised fit its format, so what failed is what follows them.
            file.seek(0)
            if name_format(file.read(12)) in RECOGNISED:
                raise ValueError(f"{name} is truncated or damaged ({reason}). Copy or convert it again.") from error
            readable = ", ".join(one for one in READABLE if one in soundfile.available_formats())
            raise ValueError(
                f"{name} is not audio of a format that can be read ({readable}). If it is audio, {CONVERT}."
            ) from error
        missing_s = (num_frames - num_read) / rate
        if missing_s > (MP3_TOLERANCE_S if is_mp3 else 0):
            raise ValueError(
                f"{name} is truncated: {num_read / rate:.2f} s of {num_frames / rate:.2f} s are there. Copy or "
                "convert it again."
            )


def _mono_of_file(samples: np.ndarray, name: str, downmix: Downmix) -> np.ndarray:
    try:
        return to_mono_float32(samples, channel_axis=1, downmix=downmix)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_header(sound: soundfile.SoundFile, num_bytes: int, name: str) -> None:
    """Raises ValueError where libsndfile would quietly read less than the header promises."""
    if sound.frames > num_bytes * MAX_FRAMES_PER_BYTE:
        raise ValueError(f"{name} does not say how long it is (a streamed file?). To read it, {CONVERT}.")
    if sound.frames == 0 and num_bytes > 4096:
        raise ValueError(f"{name} says it holds no audio, yet has {num_bytes} bytes. To repair it, {CONVERT}.")
    # libsndfile reads as much as there is and notes the difference in its log only.
    pattern = r"^\s*(?:data|Data Size|SSND)\s*:\s*(\d+) \(should be (\d+)\)"
    for promised, present in re.findall(pattern, sound.extra_info, flags=re.MULTILINE):
        if int(present) + 8 < int(promised) < UNKNOWN_SIZE:
            raise ValueError(
                f"{name} is truncated: {present} of {promised} bytes of samples are there. Copy it again, or "
                f"if this is all there is, {CONVERT}."
            )


def _is_unfinished_ogg(file: BinaryIO, num_bytes: int) -> bool:
    """Whether an Ogg file's last page lacks the end-of-stream flag (bit 2 of byte 5, RFC 3533)."""
    head = file.read(4)
    # A page is at most 65,307 bytes long.
    file.seek(max(0, num_bytes - 65_307) if head == b"OggS" else 0)
    tail = file.read() if head == b"OggS" else b""
    file.seek(0)
    last = tail.rfind(b"OggS")
    return last >= 0 and len(tail) > last + 5 and not tail[last + 5] & 4


class _Chunks(NamedTuple):
    """How files are laid out that consist of chunks: a name, a size, and so many bytes."""

    # The chunk of the samples.
    wanted: bytes
    # Of the bytes of a size, which is `wide` if it has eight.
    order: str
    # Sizes from this one on say that it is not known.
    unknown: int
    # Where the first chunk begins.
    first: int = 12
    wide: bool = False
    # What the chunk of the samples has without any.
    least: int = 0


CHUNKS = {
    b"RIFFWAVE": _Chunks(b"data", "<", UNKNOWN_SIZE),
    # The samples come behind two numbers.
    b"FORMAIFF": _Chunks(b"SSND", ">", 0x7F000000, least=8),
    b"FORMAIFC": _Chunks(b"SSND", ">", 0x7F000000, least=8),
    b"caff": _Chunks(b"data", ">", 2**62, first=8, wide=True, least=4),
}


def _unfinished(file: BinaryIO, num_bytes: int) -> tuple[int, bytes, bool] | None:
    """
    Of a file whose header does not tell the size of its samples, what to write over it, as a place and bytes, and
    whether that is an error and not how streams are written; None of others. Recorders that are killed, and pipes,
    leave 0 or an earlier size, or one such as 0xFFFFFFFF, and behind 4 GiB it starts anew.
    """
    file.seek(0)
    head = file.read(12)
    if head[:4] == b".snd" and len(head) == 12:
        start, size = struct.unpack(">II", head[4:])
        return (8, b"\xff" * 4, True) if size == 0 and num_bytes > start >= 24 else None
    layout = CHUNKS.get(head[:4] if head[:4] == b"caff" else head[:4] + head[8:])
    return None if layout is None else _unfinished_chunks(file, num_bytes, layout)


def _unfinished_chunks(file: BinaryIO, num_bytes: int, layout: _Chunks) -> tuple[int, bytes, bool] | None:
    size_code = layout.order + ("Q" if layout.wide else "I")
    head_size = 4 + struct.calcsize(size_code)

    def chunks(place: int) -> Iterator[tuple[bytes, int, int, int]]:
        """Of the chunks from a place on their names, sizes, where they begin, and where the next ones do."""
        for _ in range(MAX_NUM_CHUNKS):
            if place + head_size > num_bytes:
                return
            file.seek(place)
            head = file.read(head_size)
            (size,) = struct.unpack(size_code, head[4:])
            behind = place + head_size + size + (0 if layout.wide else size % 2)
            yield head[:4], size, place, behind
            place = behind

    found = next((one for one in chunks(layout.first) if one[0] == layout.wanted), None)
    if found is None:
        return None
    _, size, place, loose = found
    is_unknown = size >= layout.unknown
    if not is_unknown and size > layout.least:
        for name, _, _, behind in chunks(loose):
            if behind > num_bytes + 1 or not all(32 <= byte < 127 for byte in name):
                break
            loose = behind
        # An earlier size is told from chunks that lack their end by more behind it than before it.
        if num_bytes - loose <= size:
            return None
    start, end = place + head_size, num_bytes
    if not layout.wide:
        end = min(_without_chunks(file, num_bytes, start, layout.order), start + 0xFFFFFFFF)
    if end - start <= layout.least or end - start == size:
        return None
    return place + 4, struct.pack(size_code, end - start), not is_unknown


def _without_chunks(file: BinaryIO, num_bytes: int, start: int, order: str) -> int:
    """Where samples end that begin at `start` and have chunks behind them, which together reach to the file's end."""
    first = max(start, num_bytes - MAX_TAIL)
    first += (first - start) % 2
    file.seek(first)
    content = np.frombuffer(file.read(), np.uint8)
    if len(content) < 8:
        return num_bytes
    # What would be heads of chunks: a name and a size each, at every second byte.
    heads = np.lib.stride_tricks.sliding_window_view(content, 8)[::2]
    sizes = np.ascontiguousarray(heads[:, 4:]).view(f"{order}u4")[:, 0].astype(np.int64)
    places = first + 2 * np.arange(len(heads))
    behind = places + 8 + sizes
    is_named = ((heads[:, :4] >= 32) & (heads[:, :4] < 127)).all(axis=1)
    ends = {num_bytes}
    for k in np.flatnonzero(is_named & (behind <= num_bytes))[::-1]:
        # The last chunk of a file often lacks the byte that makes its size even.
        if not ends.isdisjoint((behind[k], behind[k] + sizes[k] % 2)):
            ends.add(int(places[k]))
    return min(ends)


def name_format(head: bytes) -> str | None:
    """The format of audio by its first bytes, 12 at least; None of raw samples, which MP3 and AAC are told from by
    their second frame, if that is there."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "WAV"
    if head[4:8] == b"ftyp":
        return "MP4"
    if head[:3] == b"ID3" and len(head) >= 10 and head[3] in (2, 3, 4) and max(head[6:10]) < 128:
        return "MP3"
    if head[:4] in MAGIC:
        return MAGIC[head[:4]]
    for name, frame_length in (("MP3", _mp3_frame_length), ("AAC", _aac_frame_length)):
        length = frame_length(head)
        if length is not None and (len(head) <= length + 6 or frame_length(head[length:]) is not None):
            return name
    return None


def _aac_frame_length(head: bytes) -> int | None:
    """Bytes of a frame of AAC in ADTS or LOAS (ISO/IEC 14496-3) that has this head, if it is one."""
    if len(head) < 6:
        return None
    if head[0] == 0x56 and head[1] & 0xE0 == 0xE0:
        return 3 + ((head[1] & 0x1F) << 8 | head[2])
    if head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return None
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return length if length > 7 else None


def _mp3_frame_length(head: bytes) -> int | None:
    """Bytes of a frame of MPEG audio's layer III (ISO/IEC 11172-3, 13818-3) that has this head, if it is one."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or head[1] & 0x18 == 0x08:
        return None
    is_first = head[1] & 0x18 == 0x18
    rate_code, bit_code = head[2] >> 2 & 3, head[2] >> 4
    if rate_code == 3 or bit_code in (0, 15):
        return None
    rate_hz = MP3_RATES_HZ[rate_code] // {0x18: 1, 0x10: 2, 0x00: 4}[head[1] & 0x18]
    return (144 if is_first else 72) * MP3_KBITS[is_first][bit_code - 1] * 1000 // rate_hz + (head[2] >> 1 & 1)


def _content(file: Any) -> bytes:
    try:
        content = file.read()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`audio` is a file that cannot be read ({_one_line(error)}). Open it anew.") from error
    if isinstance(content, str):
        raise ValueError("`audio` is a file opened as text. Open it in binary mode: `open(path, 'rb')`.")
    if not isinstance(content, bytes):
        raise ValueError(
            f"`audio` is a {type(file).__name__} that reads no bytes. Pass the file's path, or `(samples, rate)`."
        )
    return content


def _to_numpy(samples: Any) -> np.ndarray:
    try:
        if hasattr(samples, "detach"):
            samples = samples.detach().cpu()
            # NumPy has no bfloat16; float64 needs no more digits than float32 has either.
            samples = (samples.float() if samples.is_floating_point() else samples).numpy()
        is_list = isinstance(samples, (list, tuple))
        samples = np.asarray(samples)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"`audio` of type {type(samples).__name__} is not an array of samples ({_one_line(error)})."
        ) from error
    if is_list and samples.dtype.kind in "iu":
        # Python has one type of integer: [0, 1, 0] are floats someone wrote short, not PCM of a known width.
        samples = samples.astype(np.float64)
    return samples


def _to_float32(samples: np.ndarray) -> np.ndarray:
    kind, width = samples.dtype.kind, samples.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):
            return samples.astype(np.float32, copy=False)
    if (kind, width) not in PCM_SCALES:
        raise ValueError(
            f"`audio` of dtype {samples.dtype} is not supported. Pass floats in -1..1, or int8, uint8, int16 or int32."
        )
    zero, full_scale = PCM_SCALES[kind, width]
    return (samples.astype(np.float32) - np.float32(zero)) / np.float32(full_scale)


def _by_time(samples: np.ndarray, channel_axis: int | None = None) -> np.ndarray:
    """Samples in memory as (N,) or (N, channels)."""
    if samples.ndim not in (1, 2):
        raise ValueError(
            f"`audio` must have one or two dimensions (samples, or channels and samples), got shape {samples.shape}. "
            "Pass several clips as a list."
        )
    if samples.ndim == 1 or samples.size == 0:
        return samples.ravel()
    if channel_axis is None:
        small = [size <= MAX_NUM_CHANNELS for size in samples.shape]
        # One entry along an axis is one channel, however short the clip is.
        if samples.shape[0] == 1 or (small[0] and not small[1]):
            channel_axis = 0
        elif samples.shape[1] == 1 or (small[1] and not small[0]):
            channel_axis = 1
        else:
            found = "both axes could count the" if all(small) else f"no axis has at most {MAX_NUM_CHANNELS}"
            raise ValueError(
                f"`audio` of shape {samples.shape}: {found} channels. Mix it to one channel first, or pass several "
                "clips as a list."
            )
    return samples if channel_axis == 1 else samples.T


def _is_number(value: Any) -> bool:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _is_array_like(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or hasattr(value, "__array__")


def _samples_and_rate(value: Any) -> tuple[Any, Any] | None:
    """A pair of samples and their rate in this order, whichever it had; None of all else."""
    if isinstance(value, tuple) and len(value) == 2:
        for samples, rate in (value, value[::-1]):
            if _is_number(rate) and _is_array_like(samples) and not _is_number(samples):
                return samples, rate
    return None


def _is_clip(value: Any) -> bool:
    """Whether a value that has entries is one clip, in any form but a list."""
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or hasattr(value, "__array__"):
        return True
    return any(hasattr(value, name) for name in ("read", "get_all_samples"))


def _holds_clips(value: Any) -> bool:
    """Whether a value is clips where one is wanted; an empty list is one without samples."""
    is_list = isinstance(value, (list, tuple))
    return is_audio_stream(value) or ((not is_list or len(value) > 0) and is_audio_batch(value))


def _is_collection(value: Any) -> bool:
    """Whether a value is a data set, or a column of one: known by their methods, so that none need be installed."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not _is_clip(value)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
