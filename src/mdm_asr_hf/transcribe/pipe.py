# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio that comes through a pipe, as far as it has come: raw samples, or WAV, told apart by the first bytes."""

import io
import logging
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile

from ..audio_mdm_asr import MAX_NUM_CHANNELS, UNKNOWN_SIZE, Downmix, check_rate, name_format, to_mono_float32

logger = logging.getLogger(__name__)

RAW_RATE_HZ = 16_000
# At once, and the most that a header is looked for in: a minute of samples.
MAX_BYTES = 2 * RAW_RATE_HZ * 60
# Bytes of a sample, by what soundfile calls its kind.
SAMPLE_SIZES = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1}
# Of MP3 and AAC, in bytes.
LONGEST_FRAME = 2**13
REMEDY = "Pipe WAV, or raw samples: `ffmpeg -i INPUT -f s16le -ar 16000 -ac 1 -`."


class _Pipe:
    """A binary file that cannot be sought in, with a view of what comes next."""

    def __init__(self, file: Any):
        self.file, self.waiting = file, b""

    def peek(self, number: int) -> bytes:
        """The next bytes, fewer at the end, which are still to be taken."""
        while len(self.waiting) < number and (data := self.file.read1(MAX_BYTES)):
            self.waiting += data
        return self.waiting[:number]

    def take(self, number: int) -> bytes:
        data = self.peek(number)
        self.waiting = self.waiting[number:]
        return data

    def frames(self, size: int) -> Iterator[bytes]:
        """All that comes, at once as much as is there, in whole frames of so many bytes."""
        while self.peek(size):
            if whole := len(self.waiting) // size * size:
                yield self.take(whole)
            else:
                # The end of one that is torn.
                return


def read_pipe(file: Any) -> tuple[float, Iterator[np.ndarray]]:
    """
    The rate in Hz, and the samples (N,) as they come, of a binary file that has `read1`: of WAV what its header says,
    and of what has no header that is known, raw s16le at 16 kHz.

    Raises:
        ValueError: audio of another format, which has to be there as a whole, or WAV that cannot be read.
    """
    pipe = _Pipe(file)
    format = name_format(pipe.peek(12))
    if format in ("MP3", "AAC"):
        # Samples may look like the head of a frame; the next one tells.
        format = name_format(pipe.peek(LONGEST_FRAME + 8))
    if format is None:
        return RAW_RATE_HZ, (np.frombuffer(data, dtype="<i2") for data in pipe.frames(2))
    if format == "WAV":
        return _read_wav(pipe)
    raise ValueError(f"`-` is {format}, which cannot be read as it comes. {REMEDY} Or name a FILE.")


def _read_wav(pipe: _Pipe) -> tuple[float, Iterator[np.ndarray]]:
    header, name = pipe.take(12), b""
    while name != b"data":
        head = pipe.take(8)
        if len(head) < 8:
            raise ValueError(f"`-` is WAV that ends before its samples. {REMEDY}")
        name, size = struct.unpack("<4sI", head)
        header += head
        if name != b"data":
            if size > MAX_BYTES:
                raise ValueError(f"`-` is WAV with {size} bytes before its samples: it is damaged. {REMEDY}")
            # Of odd sizes, a byte more.
            header += pipe.take(size + size % 2)
    try:
        with soundfile.SoundFile(io.BytesIO(header)) as sound:
            rate_hz, num_channels, kind = sound.samplerate, sound.channels, sound.subtype
    except soundfile.SoundFileError as error:
        raise ValueError(f"`-` is WAV that does not say what its samples are ({error}). {REMEDY}") from error
    if kind not in SAMPLE_SIZES or num_channels > MAX_NUM_CHANNELS:
        raise ValueError(f"`-` is WAV of {num_channels} channels of {kind}. {REMEDY}")
    num_bytes = None if size == 0 or size >= UNKNOWN_SIZE else size
    return check_rate(rate_hz, "sampling_rate of `-`"), _wav_samples(pipe, kind, num_channels, num_bytes)


def _wav_samples(pipe: _Pipe, kind: str, num_channels: int, num_bytes: int | None) -> Iterator[np.ndarray]:
    size = SAMPLE_SIZES[kind] * num_channels
    left = None if num_bytes is None else num_bytes // size * size
    layout = {"format": "RAW", "subtype": kind, "endian": "LITTLE", "samplerate": 1, "channels": num_channels}
    downmix = Downmix("`-`")
    for data in pipe.frames(size):
        # Behind the samples there may be other chunks.
        data = data if left is None else data[:left]
        samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True, **layout)
        yield to_mono_float32(samples, channel_axis=1, downmix=downmix)
        if left is not None:
            left -= len(data)
            if left <= 0:
                return
    if left:
        logger.warning(f"`-` is WAV that was cut off: {left} of {num_bytes} bytes of samples are missing.")
