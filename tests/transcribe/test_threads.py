"""One model, processor, transcriber or pipeline in several threads gives what it gives in one."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_models import tiny_drafts_model, tiny_processor
from tone_models import RATE, ToneModel, ToneProcessor, recording, text_of

from mdm_asr_hf import MDMASRPipeline
from mdm_asr_hf.transcribe.transcriber import Transcriber

NUM_THREADS, NUM_FILES = 8, 12


@pytest.fixture
def in_threads(monkeypatch):
    """The results of a call for each of several inputs, which all threads begin at once and switch between often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield lambda call, inputs: run(call, inputs)
    sys.setswitchinterval(interval)


def run(call, inputs):
    barrier = threading.Barrier(NUM_THREADS)

    def begin(some):
        barrier.wait()
        return [call(one) for one in some]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        parts = list(pool.map(begin, [inputs[i::NUM_THREADS] for i in range(NUM_THREADS)]))
    return [parts[i % NUM_THREADS][i // NUM_THREADS] for i in range(len(inputs))]


def recordings():
    """Recordings that are read in several blocks, each with a noise of its own; and their texts."""
    random = np.random.default_rng(0)
    for _ in range(NUM_FILES):
        clips = [random.integers(0, 24, random.integers(2, 6)).tolist() for _ in range(10)]
        samples = recording(clips, random.uniform(0.5, 8.0, len(clips)))
        noise = 10 ** random.uniform(-4, -2) * random.standard_normal(len(samples))
        yield (samples + noise).astype(np.float32), text_of(clips)


def test_a_transcriber_and_a_pipeline(in_threads, tiny):
    transcriber = Transcriber(ToneModel(), ToneProcessor(), vad="energy", max_window_s=5.0, timestamps=True)
    samples, texts = zip(*recordings(), strict=True)
    found = in_threads(lambda one: transcriber.transcribe(one, sampling_rate=RATE), samples)
    assert [one.text for one in found] == list(texts)
    # Windows, too, are cut where they are one by one.
    assert found == [transcriber.transcribe(one, sampling_rate=RATE) for one in samples]

    model, processor = tiny
    pipeline = MDMASRPipeline(
        model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor, device="cpu"
    )

    def call(clip):
        kind = "word" if len(clip) % 2 else None
        return pipeline({"raw": clip, "sampling_rate": RATE}, return_timestamps=kind, max_new_tokens=20)

    assert in_threads(call, clips()) == [call(clip) for clip in clips()]


@pytest.fixture(scope="module")
def tiny():
    return tiny_drafts_model(dtype=torch.float32), tiny_processor()


def clips():
    random = np.random.default_rng(0)
    return [random.standard_normal(n).astype(np.float32) / 10 for n in random.integers(4000, 24000, NUM_FILES)]


def test_processor_and_generate(in_threads, tiny):
    model, processor = tiny

    def call(clip):
        inputs = processor([clip, clip[: len(clip) // 2]], sampling_rate=RATE)
        settings = dict(max_new_tokens=20, return_token_timestamps=True, return_dict_in_generate=True)
        output = model.generate(**inputs, hotword_ids=processor.hotword_ids(["abc"]), **settings)
        return processor.batch_decode(output.sequences), output.token_timestamps.tolist(), output.nfe.tolist()

    # In threads first: what is made at the first call is made there.
    found = in_threads(call, clips())
    assert found == [call(clip) for clip in clips()]
