# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio files in memory."""

import io

import soundfile


def encode(samples, rate_hz=16_000, format="WAV", **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=format, **options)
    return file.getvalue()
