# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDMASRPipeline: any length, batched over all recordings as stock pipelines batch, with times in their form."""

import numpy as np
import pytest
from datasets import Audio, Dataset
from demo_recording import RECORDING
from tiny_models import tiny_drafts_model, tiny_processor
from transformers import GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from mdm_asr_hf import MDMASRPipeline, default_checkpoint
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.transcribe.transcriber import Transcriber

RATE = 16_000


@pytest.fixture(scope="module")
def tiny():
    processor = tiny_processor()
    return MDMASRPipeline(
        model=tiny_drafts_model(), feature_extractor=processor.feature_extractor, tokenizer=processor.tokenizer
    )


@pytest.fixture(scope="module")
def real():
    return pipeline(
        "automatic-speech-recognition", model=str(default_checkpoint()), pipeline_class=MDMASRPipeline, dtype="float32"
    )


def noise(duration_s, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(duration_s * RATE))).astype(np.float32)


def entry(samples):
    return {"array": samples, "sampling_rate": RATE}


def test_any_length_in_any_batch_gives_what_the_transcriber_gives(tiny):
    samples = noise(7.0)
    transcriber = Transcriber(tiny.model, tiny_processor(), max_window_s=2.0, vad="none", timestamps=True)
    expected = transcriber.transcribe((samples, RATE))
    out = tiny(entry(samples), chunk_length_s=2, vad="none", return_timestamps="word")
    assert expected.text and out["text"] == expected.text and out["nfe"] == expected.nfe
    assert out["confidence"] == pytest.approx(expected.confidence, rel=1e-4)
    assert [chunk["timestamp"] for chunk in out["chunks"]] == [
        pytest.approx((word.start_s, word.end_s), abs=1e-4) for word in expected.words
    ]
    assert "".join(token["text"] for token in out["tokens"]).replace(" ", "") == out["text"].replace(" ", "")
    # Without times, the text is the same.
    assert tiny(entry(samples), chunk_length_s=2, vad="none")["text"] == expected.text

    clips = [entry(noise(seconds, i)) for i, seconds in enumerate((5.0, 0.4, 2.7, 0.0, 3.9))]
    options = {"chunk_length_s": 2, "vad": "none", "return_timestamps": True}
    expected = [tiny(clip, **options) for clip in clips]
    assert len({out["text"] for out in expected}) == 5 and expected[3]["text"] == ""
    for batch_size in (1, 2, 16):
        outputs = tiny(clips, batch_size=batch_size, **options)
        assert [out["text"] for out in outputs] == [out["text"] for out in expected]
        assert [len(out["chunks"]) for out in outputs] == [len(out["chunks"]) for out in expected]
    # A generator gives them one by one, as they are asked for.
    taken = []

    def clips_one_by_one():
        for clip in clips:
            taken.append(clip)
            yield clip

    outputs = iter(tiny(clips_one_by_one(), batch_size=2, **options))
    assert next(outputs)["text"] == expected[0]["text"] and len(taken) < 5
    assert [out["text"] for out in outputs] == [out["text"] for out in expected[1:]]

    for samples in (np.zeros(0), np.zeros(2 * RATE), np.zeros(90 * RATE)):
        out = tiny(entry(samples.astype(np.float32)), return_timestamps="word", vad="energy")
        assert out == {"text": "", "confidence": None, "nfe": 0, "tokens": [], "chunks": []}


def test_windows_of_several_recordings_share_batches(tiny, monkeypatch):
    sizes = []
    generate = tiny.model.generate
    monkeypatch.setattr(
        tiny.model,
        "generate",
        lambda input_features, **kwargs: sizes.append(len(input_features)) or generate(input_features, **kwargs),
    )
    # Windows of up to 2 seconds that overlap by half of one: 4, 1 and 2 of them.
    tiny([entry(noise(s)) for s in (4.6, 1.0, 3.0)], chunk_length_s=2, vad="none", batch_size=4)
    assert sizes == [4, 3]


def test_data_sets_columns_files_and_pairs(tiny, real):
    clips = [noise(0.25 + 0.05 * i, i) for i in range(3)]
    rows = [{"audio": entry(clip.tolist())} for clip in clips]
    data, expected = Dataset.from_list(rows), [tiny((clip, RATE)) for clip in clips]
    for inputs in (data["audio"], data, rows, [(RATE, clip) for clip in clips]):
        assert tiny(inputs) == expected
    for inputs in (data.to_iterable_dataset(), data.to_iterable_dataset()["audio"]):
        assert list(tiny(inputs)) == expected
    assert tiny((RATE, clips[0])) == expected[0]

    data = Dataset.from_dict({"audio": [str(RECORDING)] * 3}).cast_column("audio", Audio(decode=False))
    outputs = list(real(KeyDataset(data, "audio"), batch_size=2))
    expected = real(str(RECORDING))["text"]
    assert [out["text"] for out in outputs] == [expected] * 3


def test_arguments_are_checked_or_taken(tiny):
    for options, message in (
        ({"return_timestamps": "char"}, "return_timestamps"),
        ({"chunk_length_s": 31}, "at most 30"),
        ({"chunk_length_s": 60}, "`chunk_length_s` must be .* at most 30"),
        ({"chunk_length_s": 0.1}, "`chunk_length_s` must be at least 1"),
        ({"vad": "loud"}, "vad"),
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"max_denoising_steps": 1}, "canvas"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(entry(noise(1.0)), **options)
    for audio, message in (("gone.wav", "does not exist"), ("https://example.com/a.wav", "Download"), (None, "None")):
        with pytest.raises(ValueError, match=message):
            tiny(audio)

    expected = tiny(entry(noise(1.0)), draft_branches=[])
    assert expected["nfe"] == len(expected["tokens"]) + 1
    options = {"stride_length_s": (1, 1), "ignore_warning": True, "generate_kwargs": {"draft_branches": []}}
    assert tiny(entry(noise(1.0)), **options) == expected
    # A configuration of transformers' own, too, and what only `generate` knows.
    short = tiny(entry(noise(1.0)), generation_config=GenerationConfig(max_new_tokens=2), draft_branches=[])
    assert [token["text"] for token in short["tokens"]] == [token["text"] for token in expected["tokens"][:2]]
    assert tiny(entry(noise(1.0)), draft_branches=[], return_dict_in_generate=False, generator=[1]) == expected
    drafted = tiny(entry(noise(1.0)), chunk_length_s=0, return_timestamps=False)
    assert drafted["text"] == expected["text"] and drafted["nfe"] < expected["nfe"]


def test_hotwords_and_language_reach_generate(tiny, monkeypatch):
    seen = {}
    generate = tiny.model.generate

    def spy(*args, hotword_ids=None, language=None, **kwargs):
        seen.update(hotword_ids=hotword_ids, language=language)
        return generate(*args, **kwargs)

    processor = tiny_processor()
    monkeypatch.setattr(processor, "hotword_ids", lambda hotwords: [[7]] * len(hotwords), raising=False)
    monkeypatch.setattr(tiny.model, "generate", spy)
    monkeypatch.setattr(tiny, "processor", processor, raising=False)
    tiny(entry(noise(1.0)), hotwords=["a", "b"], generate_kwargs={"language": "de"})
    assert seen == {"hotword_ids": [[7], [7]], "language": "de"}


def test_words_and_segments_of_real_speech(real):
    clip = load_audio(RECORDING)
    samples = np.concatenate([clip, np.zeros(RATE, np.float32), clip])
    once = real(str(RECORDING))
    assert set(once) == {"text", "confidence", "nfe", "tokens"}
    words = real(entry(samples), chunk_length_s=8, return_timestamps="word", batch_size=2)
    segments = real(entry(samples), chunk_length_s=8, return_timestamps=True, return_language=True)
    assert segments["text"] == words["text"] and segments["language"] is None
    for out in (words, segments):
        assert "".join(chunk["text"] for chunk in out["chunks"]) == out["text"]
        times_s = [time_s for chunk in out["chunks"] for time_s in chunk["timestamp"]]
        assert times_s == sorted(times_s) and 0 <= times_s[0] and times_s[-1] <= len(samples) / RATE
    assert len(segments["chunks"]) == 2
    # The second time begins a second after the end of the first clip.
    assert segments["chunks"][1]["timestamp"][0] == pytest.approx(len(clip) / RATE + 1, abs=0.7)
    assert once["text"].split()[1:4] == words["text"].split()[1:4]
