# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A user's program, which is not run: `make check` reads the types that the public interface gives it."""

from pathlib import Path
from typing import assert_type

import numpy as np

import mdm_asr_hf
from mdm_asr_hf.loading import load_model
from mdm_asr_hf.transcribe.streaming import StreamUpdate
from mdm_asr_hf.transcribe.subtitles import to_json
from mdm_asr_hf.transcribe.transcript import Segment, Transcript, Word

folder = mdm_asr_hf.default_checkpoint()
assert_type(folder, Path)
model = mdm_asr_hf.OnnxMDMASR.from_pretrained(folder, num_threads=2)
assert_type(model, mdm_asr_hf.OnnxMDMASR)
processor = mdm_asr_hf.OnnxProcessor.from_pretrained(folder)
text = processor.decode([1, 2, 3])
assert_type(text, str)
assert_type(processor.batch_decode([[1], [2]]), list[str])
assert_type(processor.previous_ids("before"), list[int])

settings = mdm_asr_hf.MDMASRGenerationConfig(sampler=mdm_asr_hf.PBEBConfSampler(gamma=4.0, lambda_=None))
settings.no_speech_threshold = None

transcriber = mdm_asr_hf.Transcriber(*load_model(str(folder), dtype="float32"), batch_size=4)
transcript = transcriber.transcribe("recording.wav")
assert_type(transcript, Transcript)
for segment in transcript.segments:
    assert_type(segment, Segment)
    for word in segment.words:
        assert_type(word, Word)
        assert_type(word.start_s, float | None)
for index, result in transcriber.transcribe_all([Path("a.wav"), np.zeros(16_000, np.float32)]):
    assert_type(index, int)
    line = str(result) if isinstance(result, ValueError) else to_json(result)
    print(line)

live = mdm_asr_hf.StreamingTranscriber(model, processor)
for update in live.stream([np.zeros(1600, np.float32)], sampling_rate=16_000):
    assert_type(update, StreamUpdate)
assert_type(live.finish(), StreamUpdate)
