# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Transcriber: every word once and in order, whatever is cut; the same text in any batch; bad recordings apart."""

import itertools
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from demo_recording import LIBRISPEECH, RECORDING, needs_librispeech
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each
from tiny_models import tiny_drafts_model, tiny_processor
from tone_models import (
    EOS,
    FIRST_WORD,
    GAP_S,
    NUM_WORDS,
    RATE,
    WORD_S,
    ToneModel,
    ToneProcessor,
    clip,
    recording,
    text_of,
)
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from mdm_asr_hf import MDMASRGenerateOutput, MDMASRGenerationConfig, default_checkpoint
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.evaluate.scoring import count_errors, normaliser
from mdm_asr_hf.transcribe import transcriber
from mdm_asr_hf.transcribe.joining import DecodedWindow, join_texts, join_windows, keep_once
from mdm_asr_hf.transcribe.transcriber import Transcriber, batches, read_output, window_lengths

# --- joining, by hand ---


def window(start_s, end_s, words, before=0.0, after=0.0, pieces=None):
    """A decoded window of words (text, start_s, end_s)."""
    return DecodedWindow(
        start_s,
        end_s,
        before,
        after,
        pieces=pieces or [f" {text}" for text, _, _ in words],
        confidences=[0.5] * len(words),
        times_s=[(start, end) for _, start, end in words],
        confidence=0.8,
        nfe=3,
    )


def joined(left, right):
    return join_windows([window(0, 10, left, after=2), window(8, 18, right, before=2)], 18.0, True).text


def test_windows_are_joined_by_hand():
    left = [("a", 7.0, 7.4), ("b", 8.2, 8.6), ("c", 9.0, 9.3), ("xx", 9.7, 10.0)]
    right = [("yy", 8.0, 8.1), ("b", 8.3, 8.7), ("c", 8.9, 9.2), ("d", 9.6, 10.1), ("e", 11, 12)]
    # "xx" and "yy" are what is left of words that the edges cut.
    assert joined(left, right) == "a b c d e"

    left = [("the", 7.0, 7.4), ("the", 8.2, 8.5), ("the", 8.8, 9.1), ("the", 9.4, 9.7)]
    right = [("the", 8.25, 8.5), ("the", 8.85, 9.1), ("the", 9.4, 9.7), ("end", 10.0, 10.4)]
    assert joined(left, right) == "the the the the end"

    left = [("a", 7.0, 7.4), ("one", 8.2, 8.6), ("two", 9.3, 9.6)]
    right = [("won", 8.2, 8.6), ("too", 9.3, 9.6), ("e", 11, 12)]
    # The middle of the overlap is at 9 s, between them.
    assert joined(left, right) == "a one too e"
    # A word across the middle is heard once, although both windows think that the other has it, or that it is theirs.
    assert joined([("a", 7, 7.4), ("lost", 8.9, 9.2)], [("found", 8.75, 9.1), ("e", 11, 12)]) in (
        "a lost e",
        "a found e",
    )
    assert joined([("a", 7, 7.4), ("lost", 8.7, 9.1)], [("found", 8.9, 9.2), ("e", 11, 12)]) in (
        "a lost e",
        "a found e",
    )

    assert joined([], [("won", 8.2, 8.6), ("e", 11, 12)]) in ("e", "won e")
    assert joined([("a", 7.0, 7.4), ("b", 8.2, 8.6)], []) == "a b"
    assert joined([], []) == ""

    left = window(0, 10, [("", 7, 7.4), ("", 8.2, 8.6), ("", 9.0, 9.3)], after=2, pieces=["我", "们", "去"])
    right = window(8, 18, [("", 8.2, 8.6), ("", 9, 9.3), ("", 10, 11)], before=2, pieces=["们", "去", "吧"])
    assert join_windows([left, right], 18.0).text == "我们去吧"
    assert join_texts(["我们", "去", "", "Bar", "吧", "x"]) == "我们去 Bar 吧 x"

    same = [("a", 7.0, 7.4), ("b", 9.0, 9.4)]
    left, right = window(0, 10, same), window(10, 18, [("b", 10.1, 10.5), ("c", 11, 12)])
    assert keep_once([left, right]) == [range(2), range(2)]
    transcript = join_windows([left, right], 20.0, with_times=True)
    assert transcript.text == "a b b c" and transcript.duration_s == 20 and transcript.nfe == 6
    assert [(s.start_s, s.end_s, s.text) for s in transcript.segments] == [(7.0, 9.4, "a b"), (10.1, 12, "b c")]
    assert [(w.text, w.start_s) for w in transcript.words] == [("a", 7.0), ("b", 9.0), ("b", 10.1), ("c", 11)]
    without = join_windows([left, right], 20.0)
    assert [(s.start_s, s.end_s) for s in without.segments] == [(0, 10), (10, 18)]
    assert without.words[0].start_s is None and without.warnings == []

    left, right = window(0, 10, [("a", 1, 2)], after=2), window(8, 18, [("a", 9, 10)], before=2)
    left.times_s = None
    with pytest.raises(ValueError, match="times_s"):
        join_windows([left, right], 18.0)


def test_what_a_reader_should_know():
    full = window(0, 10, [("a", 1, 2)])
    full.is_full, full.language = True, "de"
    other = window(11, 30, [("b", 12, 13)])
    other.language = "en"
    transcript = join_windows([full, other], 30.0)
    # The language of most of the speech.
    assert transcript.language == "en" and len(transcript.warnings) == 1
    assert "0.0 to 10.0 s" in transcript.warnings[0] and "max_new_tokens" in transcript.warnings[0]

    # Padding has the id of the end of text, as in Whisper.
    a, b = FIRST_WORD, FIRST_WORD + 1
    output = MDMASRGenerateOutput(
        sequences=torch.tensor([[a, b, a], [a, EOS, EOS], [a, b, EOS], [EOS] * 3, [EOS] * 3]),
        # A prefix that was given has no step. Silence by Whisper's thresholds has one, and no signal at all has none.
        confidence=torch.tensor([[0.5] * 3, [0.5, 0.5, 0], [1.0, 0.5, 0], [0.0] * 3, [0.0] * 3]),
        commit_steps=torch.tensor([[1, 2, 2], [1, 1, 0], [0, 1, 0], [4, 0, 0], [0, 0, 0]]),
        nfe=torch.tensor([2, 1, 1, 4, 0]),
        no_speech=torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]),
    )
    decoded = read_output(output, [window(0, 1, []) for _ in range(5)], ToneProcessor().tokenizer, EOS)
    assert ["".join(one.pieces) for one in decoded] == [" w0 w1 w0", " w0", " w0 w1", "", ""]
    assert [one.is_full for one in decoded] == [True, False, True, False, False]
    assert [one.nfe for one in decoded] == [2, 1, 1, 4, 0] and decoded[3].no_speech == 0.75
    assert decoded[3].confidence is None and decoded[1].confidence == pytest.approx(0.5)


# --- every word once, in order ---

words = st.lists(st.integers(0, NUM_WORDS - 1), min_size=1, max_size=40)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(words, st.floats(0.0, 3.0)), min_size=1, max_size=8),
    st.floats(2.5, 10.0),
    st.sampled_from(["energy", "none"]),
    st.integers(1, 5),
    st.floats(0.0, 0.05),
)
def test_every_word_of_every_clip_comes_once_and_in_order(parts, max_window_s, vad, batch_size, jitter_s):
    clips, pauses_s = zip(*parts, strict=True)
    samples = recording(clips, [max(pause_s, GAP_S) for pause_s in pauses_s])
    transcriber = Transcriber(
        ToneModel(jitter_s), ToneProcessor(), max_window_s=max_window_s, vad=vad, batch_size=batch_size
    )
    transcript = transcriber.transcribe(samples, sampling_rate=RATE)
    assert transcript.text == text_of(clips)
    assert transcript.duration_s == round(len(samples) / RATE, 3)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, NUM_WORDS - 1), min_size=1, max_size=5), min_size=1, max_size=15))
def test_words_have_their_times(clips):
    samples = recording(clips, [0.5] * len(clips))
    transcriber = Transcriber(ToneModel(), ToneProcessor(), max_window_s=4.0, vad="energy", timestamps=True)
    found = transcriber.transcribe(samples, sampling_rate=RATE).words
    expected, time_s = [], 0.0
    for one in clips:
        time_s += 0.5
        for word in one:
            expected.append((f"w{word}", time_s))
            time_s += WORD_S + GAP_S
        time_s -= GAP_S
    assert [word.text for word in found] == [text for text, _ in expected]
    for word, (_, start_s) in zip(found, expected, strict=True):
        # Windows start amid frames of 32 ms, and the recogniser has frames of 10 ms.
        assert abs(word.start_s - start_s) < 0.03 and abs(word.end_s - start_s - WORD_S) < 0.03


class HastyModel(ToneModel):
    """Takes a pause for the end, as Whisper does now and then."""

    def _hear(self, samples):
        words = super()._hear(samples)
        ends = [k for k, (one, after) in enumerate(itertools.pairwise(words), 1) if after[1] - one[2] > 0.4]
        return words[: ends[0]] if ends else words


@each("vad", ["energy", "none"])
def test_what_is_said_behind_an_early_end_is_heard(vad):
    clips = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22]]
    samples = recording(clips, [0.5] * 3)
    transcriber = Transcriber(HastyModel(), ToneProcessor(), vad=vad, timestamps=True)
    found = transcriber.transcribe(samples, sampling_rate=RATE)
    if vad == "none":
        # Nothing tells how much is spoken.
        assert found.text == text_of(clips[:1])
        return
    assert found.text == text_of(clips)
    # The whole window's evaluations are counted, too.
    assert found.nfe == len(clips[0]) + 1 + sum(len(one) + 1 for one in clips)
    assert abs(found.words[9].start_s - (0.5 + 9 * (WORD_S + GAP_S) - GAP_S + 0.5)) < 0.03


def test_slow_repeated_and_absent_speech():
    # A word every two seconds, in one window: its halves say no more.
    clips, model = [[word] for word in range(8)], ToneModel()
    found = Transcriber(model, ToneProcessor(), vad="energy").transcribe(
        recording(clips, [1.2] * 8), sampling_rate=RATE
    )
    assert found.text == text_of(clips)
    assert found.confidence == pytest.approx(0.9)

    samples = recording([[5] * 60], [0.5])
    for vad in ("energy", "none"):
        transcriber = Transcriber(ToneModel(0.05), ToneProcessor(), max_window_s=5.0, vad=vad)
        assert transcriber.transcribe((samples, RATE)).text == text_of([[5] * 60])

    model = ToneModel()
    transcriber = Transcriber(model, ToneProcessor(), max_window_s=5.0, vad="energy")
    rng = np.random.default_rng(0)
    for samples in (np.zeros(60 * RATE), 0.05 * rng.standard_normal(60 * RATE)):
        transcript = transcriber.transcribe(samples.astype(np.float32), sampling_rate=RATE)
        assert transcript.text == "" and transcript.segments == [] and transcript.duration_s == 60
    assert transcriber.transcribe(np.zeros(0), sampling_rate=RATE).to_dict()["duration_s"] == 0
    assert model.calls == []


# --- many recordings ---


def tone_file(path, clips, rate=RATE):
    import soxr

    samples = recording(clips, [0.5] * len(clips))
    soundfile.write(path, samples if rate == RATE else soxr.resample(samples, RATE, rate), rate)
    return path


def test_a_bad_recording_does_not_stop_the_others(tmp_path):
    clips = [[[1, 2, 3]], [[4, 5]] * 9, [[6]]]
    good = [tone_file(tmp_path / f"{i}.wav", one) for i, one in enumerate(clips)]
    cut_off = tmp_path / "cut.flac"
    whole = tone_file(tmp_path / "whole.flac", [[7, 8]] * 30).read_bytes()
    cut_off.write_bytes(whole[: len(whole) // 2])
    nan = recording([[1, 2]] * 20, [0.5] * 20)
    nan[-5] = np.nan
    inputs = [good[0], tmp_path / "gone.wav", good[1], cut_off, (nan, RATE), None, good[2]]
    transcriber = Transcriber(ToneModel(), ToneProcessor(), max_window_s=4.0, vad="energy", batch_size=3)
    places, results = zip(*transcriber.transcribe_all(inputs), strict=True)
    assert places == tuple(range(7))
    assert [r.text for r in (results[0], results[2], results[6])] == [text_of(one) for one in clips]
    for i, message in ((1, "gone"), (3, "cut.*truncated"), (4, "NaN"), (5, "None")):
        with pytest.raises(ValueError, match=message):
            raise results[i]
    with pytest.raises(ValueError, match="truncated"):
        transcriber.transcribe(cut_off)


def test_a_batch_that_fails_is_decoded_one_by_one():
    # What has word 9, of 2200 Hz, cannot be decoded.
    def fails(rows):
        spectrum = torch.fft.rfft(rows, n=RATE).abs()
        return bool((spectrum[:, 2190:2211].amax(dim=1) > 100).any())

    model = ToneModel(fails=fails)
    clips = [[[1, 2]], [[3, 9]], [[4, 4]]]
    inputs = [(recording(one, [0.5]), RATE) for one in clips]
    results = [result for _, result in Transcriber(model, ToneProcessor(), vad="energy").transcribe_all(inputs)]
    assert results[0].text == "w1 w2" and results[2].text == "w4 w4"
    assert isinstance(results[1], ValueError) and "cannot be decoded" in str(results[1])
    assert [call["batch_size"] for call in model.calls] == [3, 1, 1, 1]

    def fails(rows):
        raise torch.OutOfMemoryError("no memory")

    transcriber = Transcriber(ToneModel(fails=fails), ToneProcessor(), vad="energy")
    with pytest.raises(ValueError, match="max_window_s.*Set it lower"):
        transcriber.transcribe((recording([[1]], [0.5]), RATE))


def test_windows_share_batches_as_the_pool_has_room(monkeypatch):
    model = ToneModel()
    listener = Transcriber(model, ToneProcessor(), max_window_s=3.0, vad="energy", batch_size=4)
    inputs = [(recording([[i, 2, 3]] * 3, [1.0] * 3), RATE) for i in range(4)]
    assert [r.text for _, r in listener.transcribe_all(inputs)] == [text_of([[i, 2, 3]] * 3) for i in range(4)]
    sizes = [call["batch_size"] for call in model.calls]
    assert sum(sizes) >= 8 and len(sizes) == math.ceil(sum(sizes) / 4) and max(sizes) - min(sizes) <= 1
    # Times are only asked for where windows overlap.
    assert not any(call["times"] for call in model.calls)

    monkeypatch.setattr(transcriber, "POOL_S", 10.0)
    taken = []

    def inputs():
        for i in range(12):
            taken.append(i)
            yield recording([[i, 1, 2, 3, 4, 5, 6]], [0.5]), RATE

    listener = Transcriber(ToneModel(), ToneProcessor(), max_window_s=5.0, vad="energy")
    results = listener.transcribe_all(inputs())
    assert next(results)[0] == 0 and len(taken) == 4  # of 3.0 s each
    assert [i for i, _ in results] == list(range(1, 12))


def test_batches_windows_and_progress_by_hand():
    assert list(batches([9, 5, 4, 1, 1], 2)) == [[0], [1, 2], [3, 4]]
    # As many for each of two threads.
    assert list(batches([9, 5, 4, 1, 1], 4, 2)) == [[0, 1], [2, 3, 4]] and list(batches([9], 4, 2)) == [[0]]
    # 480 seconds at most, padding included.
    assert list(batches([200, 100, 90], 8)) == [[0, 1], [2]] and list(batches([], 8)) == []

    done = []
    inputs = [
        (recording([[1, 2, 3]] * 10, [2.0] * 10), RATE),
        (np.zeros(20 * RATE, np.float32), RATE),
        (recording([[4] * 40], [0.5]), RATE),
    ]
    transcriber = Transcriber(ToneModel(), ToneProcessor(), max_window_s=4.0, vad="energy", batch_size=2)
    results = dict(transcriber.transcribe_all(inputs, done.append))
    assert sum(done) == pytest.approx(sum(r.duration_s for r in results.values())) and min(done) > 0 < len(done) - 5

    extractor = ToneProcessor(30.0).feature_extractor
    settings = MDMASRGenerationConfig(max_window_s=12.0)
    assert window_lengths(None, MDMASRGenerationConfig(), extractor) == (20, 30)
    assert window_lengths(None, settings, extractor) == (12, 12) and window_lengths(8, settings, extractor) == (8, 8)
    assert window_lengths(None, settings, ToneProcessor(10.0).feature_extractor) == (10, 10)
    assert window_lengths(None, MDMASRGenerationConfig(), ToneProcessor(None).feature_extractor) == (20, 30)
    for wrong in (31, 0.5, 0, -1, "8", True, float("nan")):
        with pytest.raises(ValueError, match="max_window_s"):
            Transcriber(ToneModel(), ToneProcessor(), max_window_s=wrong)


def test_what_an_earlier_run_decoded_is_not_decoded_again():
    inputs = [(recording([[i, 2, 3]] * 10, [0.5] * 10), RATE) for i in range(2)]
    transcriber = Transcriber(ToneModel(), ToneProcessor(), max_window_s=4.0, vad="energy")
    noted = {}
    expected = list(
        transcriber.transcribe_all(inputs, on_window=lambda i, decoded: noted.update({(i, decoded.start_s): decoded}))
    )
    known = dict(list(noted.items())[::2])
    model = ToneModel()
    again = Transcriber(model, ToneProcessor(), max_window_s=4.0, vad="energy")
    results = again.transcribe_all(inputs, known_window=lambda i, window: known.get((i, window.start_s)))
    assert list(results) == expected
    assert sum(call["batch_size"] for call in model.calls) == len(noted) - len(known)


# --- settings ---


def test_settings_are_checked_and_arguments_reach_generate():
    for options, message in (
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"vad": "loud"}, "vad"),
        ({"language": "de"}, "language"),
    ):
        with pytest.raises(ValueError, match=message):
            Transcriber(ToneModel(), ToneProcessor(), **options)

    model = ToneModel()
    model.generation_config.prompt_template = {
        "tokens": ["language"],
        "slots": {"language": {"en": 5, "de": 6}},
        "defaults": {"language": "en"},
    }
    Transcriber(model, ToneProcessor(), language="de", hotwords=["w3"], target_language=None).transcribe(
        (clip([1]), RATE)
    )
    assert model.calls == [{"batch_size": 1, "times": False, "language": "de", "hotword_ids": [[6]]}]
    assert model.generation_config.return_dict_in_generate is False


# --- the real thing ---


def test_any_batch_gives_the_same_text():
    model, processor = tiny_drafts_model(), tiny_processor()
    rng = np.random.default_rng(0)
    inputs = [((0.1 * rng.standard_normal(round(s * RATE))).astype(np.float32), RATE) for s in (7.0, 2.0, 3.3, 0.5)]
    results = []
    for batch_size in (1, 3, 16):
        # Everything is decoded, in windows that overlap.
        transcriber = Transcriber(model, processor, max_window_s=2.0, vad="none", batch_size=batch_size)
        results.append([result.text for _, result in transcriber.transcribe_all(inputs)])
    assert results[0] == results[1] == results[2] and all(results[0])


@pytest.fixture(scope="module")
def real():
    folder = default_checkpoint()
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype="float32"), AutoProcessor.from_pretrained(folder)


def test_one_window_is_decoded_as_generate_does_with_its_context(real):
    model, processor = real
    expected = processor.decode(model.generate(**processor(RECORDING)))[0]
    assert Transcriber(model, processor).transcribe(RECORDING).text == expected

    # Whisper spells as what stands before does.
    transcriber = Transcriber(*real, previous_text="the tressure lay below; the tressure was his")
    assert " his tressure " in transcriber.transcribe(RECORDING).text


@each("pause_s", [0.7, 0.0])
def test_the_demo_several_times_over(real, pause_s):
    clip = load_audio(RECORDING)
    noise = (1e-4 * np.random.default_rng(0).standard_normal(round(pause_s * RATE))).astype(np.float32)
    samples = np.concatenate([np.concatenate([clip, noise]) for _ in range(3)])
    vad = "energy" if pause_s else "none"
    transcript = Transcriber(*real, max_window_s=8.0, vad=vad, timestamps=True).transcribe((samples, RATE))
    normalise = normaliser("en")
    once = Transcriber(*real).transcribe(RECORDING).text
    errors = count_errors([normalise(" ".join([once] * 3))], [normalise(transcript.text)])[0, :3].sum()
    # Of 42 words: other windows are heard a little otherwise.
    assert errors <= 3, transcript.text
    starts = [word.start_s for word in transcript.words]
    assert starts == sorted(starts) and starts[-1] < len(samples) / RATE


@needs_librispeech
def test_joined_clips_read_as_the_clips_do(real):
    rows = [json.loads(line) for line in (LIBRISPEECH / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if 3 < row["duration_s"] < 5][:4]
    clips = [load_audio(LIBRISPEECH / row["file_name"]) for row in rows]
    transcriber = Transcriber(*real, max_window_s=8.0)
    own = [result.text for _, result in transcriber.transcribe_all([(one, RATE) for one in clips])]
    pause = np.zeros(RATE, np.float32)
    together = transcriber.transcribe((np.concatenate([part for one in clips for part in (one, pause)]), RATE)).text
    normalise = normaliser("en")
    # Other windows are heard a little otherwise; a clip lost or read twice would be a quarter of the words.
    reference = normalise(" ".join(row["text"] for row in rows))
    errors = count_errors([reference] * 2, [normalise(" ".join(own)), normalise(together)])
    assert errors[1, :3].sum() <= errors[0, :3].sum() + 0.1 * errors[0, 3]
    assert abs(len(normalise(together).split()) - len(normalise(" ".join(own)).split())) <= 0.1 * errors[0, 3]
