import io
import json
import os
import signal
import struct
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode
from demo_recording import RECORDING
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.live import Live
from tables import each
from tiny_models import tiny_drafts_model, tiny_model, tiny_processor
from transformers import BatchFeature

from mdm_asr_cli import streaming as cli_streaming
from mdm_asr_cli.terminal import quiet_libraries
from mdm_asr_hf import MDMASRGenerationConfig, default_checkpoint
from mdm_asr_hf.audio_mdm_asr import MAGIC, load_audio, to_mono_float32
from mdm_asr_hf.loading import load_model
from mdm_asr_hf.transcribe.pipe import read_pipe
from mdm_asr_hf.transcribe.streaming import EnergyGate, StreamingPolicy, StreamingTranscriber, StreamUpdate
from mdm_asr_hf.transcribe.transcript import Word

RATE = 16_000
EOS = 1
# Each spoken word is a stretch of one amplitude, which says which word it is; two tokens write it.
NUM_WORDS = 20
WORD_S, GAP_S, PAUSE_S = 0.36, 0.1, 1.6


def word_of(number):
    return f"w{number}ly"


def speak(numbers, gaps=None):
    """Samples of words, and their start and end in seconds. Silence follows, so that the last word is a stable one."""
    pieces, times, position = [np.zeros(int(0.2 * RATE), dtype=np.float32)], [], 0.2
    for number, gap_s in zip(numbers, gaps or [GAP_S] * len(numbers), strict=True):
        word = np.full(int(WORD_S * RATE), 0.1 + 0.02 * number, dtype=np.float32)
        pieces += [word, np.zeros(int(gap_s * RATE), dtype=np.float32)]
        times.append((position, position + WORD_S))
        position += WORD_S + gap_s
    return np.concatenate([*pieces, np.zeros(int(0.3 * RATE), dtype=np.float32)]), times


class Tokenizer:
    def decode(self, ids, **kwargs):
        return "".join("ly" if i >= 100 else f" w{i - 10}" for i in ids if i >= 10)


class Processor:
    def __init__(self):
        self.tokenizer = Tokenizer()
        self.feature_extractor = SimpleNamespace(sampling_rate=RATE, max_duration_s=30.0)

    def __call__(self, samples, sampling_rate, return_tensors):
        assert sampling_rate == RATE
        return BatchFeature({"input_features": torch.tensor(samples)[None]})

    def hotword_ids(self, words):
        return [[10 + int(word[1:-2]), 100] for word in words]


class Listener:
    """
    Stands in for the model: hears the words of the audio that it is given, and takes a word that the audio ends amid,
    or right after, for another one each time. A prefix stays.
    """

    device, config = "cpu", SimpleNamespace(eos_token_id=EOS, vocab_size=200, has_drafts=True)

    def __init__(self, unstable_s=0.25):
        self.generation_config = MDMASRGenerationConfig()
        self.unstable_s, self.calls, self.longest_s = unstable_s, [], 0.0

    def hear(self, samples):
        """(number, start, end) of the words in samples."""
        loud = np.flatnonzero(np.diff(np.pad((np.abs(samples) > 0.05).astype(int), 1)))
        words = []
        for start, end in loud.reshape(-1, 2):
            # A sliver of a word is no word.
            if end - start > 0.12 * RATE:
                number = round((float(np.median(np.abs(samples[start:end]))) - 0.1) / 0.02)
                is_stable = end + self.unstable_s * RATE < len(samples)
                words.append((number if is_stable else 90 - len(self.calls) % 7, start / RATE, end / RATE))
        return words

    def generate(self, input_features, prefix_ids=None, **arguments):
        samples = input_features[0].numpy()
        self.calls.append({"prefix_ids": prefix_ids, **arguments})
        self.longest_s = max(self.longest_s, len(samples) / RATE)
        words = self.hear(samples)
        prefix = prefix_ids[0] if prefix_ids else []
        ids, times = list(prefix), []
        for place in range(len(prefix) // 2):
            _, start, end = words[place] if place < len(words) else (0, 0.0, 0.0)
            times += [(start, (start + end) / 2), ((start + end) / 2, end)]
        for number, start, end in words[len(prefix) // 2 :]:
            ids += [10 + number, 100]
            times += [(start, (start + end) / 2), ((start + end) / 2, end)]
        end = len(samples) / RATE
        return SimpleNamespace(
            sequences=torch.tensor([[*ids, EOS]]),
            confidence=torch.full((1, len(ids) + 1), 0.9),
            token_timestamps=torch.tensor([[*times, (end, end)]]),
            nfe=torch.tensor([1]),
        )


class Babbler(Listener):
    """Hears something else every time: no two hypotheses agree."""

    def hear(self, samples):
        number, count = len(self.calls) % 7, int(len(samples) / RATE / 0.5)
        return [((i + number) % NUM_WORDS, 0.5 * i + 0.1, 0.5 * i + 0.4) for i in range(count)]


class Deaf(Listener):
    def hear(self, samples):
        return []


def transcriber_of(model, **arguments):
    return StreamingTranscriber(model, Processor(), **arguments)


def cut(samples, sizes):
    """Chunks of these sizes, round and round, to the end."""
    chunks, position, i = [], 0, 0
    while position < len(samples):
        chunks.append(samples[position : position + sizes[i % len(sizes)]])
        position, i = position + sizes[i % len(sizes)], i + 1
    return chunks


def check_updates(updates):
    """Committed text only grows, by the new words, and the last update ends it."""
    before, words = "", []
    for update in updates:
        assert update.committed.startswith(before)
        words += update.new
        assert update.committed == " ".join(word.text for word in words)
        before = update.committed
    assert [word.start_s for word in words] == sorted(word.start_s for word in words)
    assert all(word.start_s <= word.end_s for word in words)
    assert [update.is_final for update in updates] == [False] * (len(updates) - 1) + [True]
    assert updates[-1].partial == ""
    return words


speech = st.lists(st.tuples(st.integers(0, NUM_WORDS - 1), st.sampled_from([GAP_S, 0.16, 0.3, PAUSE_S])), max_size=40)


@settings(max_examples=25)
@given(speech, st.lists(st.sampled_from([1, 7, 160, 4001, 8000, 30_011]), min_size=1, max_size=5))
def test_every_word_is_committed_once_in_order_however_the_audio_is_cut(spoken, sizes):
    samples, times = speak([number for number, _ in spoken], [gap for _, gap in spoken])
    transcriber = transcriber_of(Listener())
    words = check_updates(list(transcriber.stream(cut(samples, sizes))))
    assert [word.text for word in words] == [word_of(number) for number, _ in spoken]
    for word, (start_s, end_s) in zip(words, times, strict=True):
        assert word.start_s == pytest.approx(start_s, abs=0.03) and word.end_s == pytest.approx(end_s, abs=0.03)

    other = transcriber_of(Listener())
    other.feed(samples)
    assert other.finish().committed == transcriber.text


def test_long_speech_without_a_pause_is_cut_at_word_boundaries_with_the_last_words_as_prefix():
    numbers = [i % NUM_WORDS for i in range(130)]
    samples, _ = speak(numbers)
    model = Listener()
    transcriber = transcriber_of(model, max_window_s=6.0)
    updates = list(transcriber.stream(cut(samples, [1600])))
    assert updates[-1].committed.split() == [word_of(number) for number in numbers]
    assert model.longest_s <= 6.5
    # Every word waits for the next hypothesis, and not for the window's end.
    assert sum(bool(update.new) for update in updates) > 80
    # The window is never without committed words once there are some.
    kept = [len(call["prefix_ids"][0]) if call["prefix_ids"] else 0 for call in model.calls]
    first = next(i for i, count in enumerate(kept) if count)
    assert min(kept[first:]) >= 2 and max(kept) <= 2 * 15


def test_what_was_committed_in_the_window_is_the_prefix_and_the_hypothesis_before_the_draft():
    samples, _ = speak([3, 4, 5, 6, 7, 8])
    model = Listener()
    transcriber = transcriber_of(model)
    before = StreamUpdate("")
    num_tails = 0
    for chunk in cut(samples, [8000]):
        num_calls = len(model.calls)
        update = transcriber.feed(chunk)
        # The first text comes in shorter steps, several of which may be in a chunk.
        if len(model.calls) == num_calls + 1:
            prefix, draft = ((model.calls[-1][name] or [[]])[0] for name in ("prefix_ids", "draft_ids"))
            assert Tokenizer().decode(prefix).strip() == before.committed
            whole = f"{before.committed} {before.partial}".strip()
            assert Tokenizer().decode(draft).strip() == (whole if before.partial else "")
            num_tails += bool(before.committed and before.partial)
        before = update or before
    assert num_tails >= 3


def test_a_word_waits_for_agreement_and_for_its_margin():
    samples, _ = speak([2, 3, 4, 5])
    # In this audio, the first word ends at 0.56 s, and hypotheses are made at 0.5, 1.0, 1.5 s.
    policy = StreamingPolicy(first_step_s=0.5, agreement=2, margin_s=0.4, min_confidence=0.5)
    updates = list(transcriber_of(Listener(), policy=policy).stream(cut(samples, [8000])))
    assert [w.text for w in updates[0].new + updates[1].new] == []
    assert updates[2].new[0].text == word_of(2)
    eager = StreamingPolicy(first_step_s=0.5, agreement=1, margin_s=0.4, min_confidence=0.5)
    updates = list(transcriber_of(Listener(), policy=eager).stream(cut(samples, [8000])))
    assert [w.text for w in updates[1].new] == [word_of(2)]
    strict = StreamingPolicy(first_step_s=0.5, agreement=1, margin_s=0.4, min_confidence=0.95)
    updates = list(transcriber_of(Listener(), policy=strict).stream(cut(samples, [8000])))
    assert [bool(update.new) for update in updates] == [False] * (len(updates) - 1) + [True]


def test_steps_are_short_until_a_window_has_its_first_text_and_only_at_first():
    samples, times = speak([2, 3, 4], [GAP_S, PAUSE_S, 1.0])
    updates = list(transcriber_of(Listener(), step_s=0.6).stream(cut(samples, [160])))
    texts = [update.time_s for update in updates if update.committed or update.partial]
    # The first word begins at 0.2 s and is one from 0.12 s on; then the steps are long, to the pause.
    assert texts[:3] == pytest.approx([0.48, 1.08, 1.68])
    later = next(one.time_s for one in updates if one.partial and one.time_s > times[2][0])
    assert times[2][0] + 0.12 < later <= times[2][0] + 0.12 + 0.16
    even = StreamingPolicy(first_step_s=5.0)
    updates = list(transcriber_of(Listener(), step_s=0.6, policy=even).stream(cut(samples, [160])))
    assert all(round(update.time_s % 0.6, 3) in (0.0, 0.6) for update in updates[:-1])

    # Noise without words has them only at first.
    model = Deaf()
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE).astype(np.float32)
    policy = StreamingPolicy(first_step_s=0.2, pre_roll_s=0.2)
    transcriber_of(model, policy=policy, step_s=0.5).feed(noise)
    # At 0.2, 0.4 ... 1.2 s, and then every half second.
    assert len(model.calls) == 6 + 5


def test_a_pause_commits_everything_and_starts_a_new_window():
    samples, times = speak([2, 3, 4], [GAP_S, PAUSE_S, PAUSE_S])
    model = Listener()
    transcriber = transcriber_of(model)
    transcriber.feed(samples[: int((times[1][1] + 1.4) * RATE)])
    assert transcriber.text == "w2ly w3ly"
    transcriber.feed(samples[int((times[1][1] + 1.4) * RATE) :])
    assert transcriber.finish().committed == "w2ly w3ly w4ly"
    # The last window knows nothing of the first.
    assert model.calls[-1]["prefix_ids"] in (None, [[14, 100]])


def test_fallbacks_are_for_the_last_decoding_of_a_window():
    model = Listener()
    settings_ = MDMASRGenerationConfig(temperature=[0.0, 0.4], max_new_tokens=50)
    transcriber = transcriber_of(model, settings=settings_, max_window_s=4.0)
    samples, _ = speak([*range(12), 1, 2, 3], [*[GAP_S] * 12, GAP_S, GAP_S, PAUSE_S])
    transcriber.feed(samples)
    temperatures = [call["generation_config"].temperatures for call in model.calls]
    assert temperatures[-1] == [0.0, 0.4] and temperatures[0] == [0.0]
    # And where a full window is cut.
    assert 2 <= temperatures.count([0.0, 0.4]) <= 4
    assert settings_.return_token_timestamps is False, "the caller's settings stay as they were"
    behind = [call["max_new_tokens"] - len((call["prefix_ids"] or [[]])[0]) for call in model.calls]
    # Of the first 0.32 s of audio, 15 a second and 20.
    assert behind[0] == 25 and max(behind) == 50


def test_a_text_that_repeats_itself_is_neither_shown_nor_committed():
    class Looping(Listener):
        def hear(self, samples):
            return [(5, 0.1, 0.2)] * 60 if 3 <= len(self.calls) < 6 else super().hear(samples)

    samples, _ = speak([1, 2, 3, 4, 5, 6])
    settings_ = MDMASRGenerationConfig(compression_ratio_threshold=2.4)
    updates = list(transcriber_of(Looping(), settings=settings_).stream(cut(samples, [1600])))
    assert [word.text for word in check_updates(updates)] == [word_of(i) for i in (1, 2, 3, 4, 5, 6)]
    assert all(update.partial.count(word_of(5)) <= 1 for update in updates)
    settings_.compression_ratio_threshold = None
    updates = list(transcriber_of(Looping(), settings=settings_).stream(cut(samples, [1600])))
    assert any(update.partial.count(word_of(5)) > 1 for update in updates)


def test_silence_and_steady_noise_cost_no_decoding_and_no_memory():
    model = Listener()
    transcriber = transcriber_of(model)
    assert transcriber.feed(np.zeros(60 * RATE)) is None
    assert model.calls == []
    noise = np.random.default_rng(0).normal(0, 0.003, 15 * RATE).astype(np.float32)
    transcriber.feed(noise)
    # The floor climbs from where it starts to the noise in seconds; then nothing is decoded any more.
    num_calls = len(model.calls)
    tracemalloc.start()
    for _ in range(40):
        transcriber.feed(noise)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(model.calls) == num_calls
    assert peak < 10e6
    update = transcriber.finish()
    assert update.committed == "" and update.time_s == pytest.approx(60 + 41 * 15) and update.is_final


def test_a_word_after_silence_is_heard_whole():
    samples, times = speak([7])
    quiet = np.random.default_rng(0).normal(0, 1e-4, 30 * RATE).astype(np.float32)
    transcriber = transcriber_of(Listener())
    updates = list(transcriber.stream([np.concatenate([quiet, samples, quiet])]))
    words = check_updates(updates)
    assert [word.text for word in words] == [word_of(7)]
    assert words[0].start_s == pytest.approx(30 + times[0][0], abs=0.03)


@each("model_class", [Babbler, Deaf])
def test_memory_and_work_are_bounded_when_speech_never_pauses(model_class):
    rng = np.random.default_rng(0)
    model = model_class()
    transcriber = transcriber_of(model, max_window_s=6.0)
    level = 0.1 + 0.08 * np.sin(np.arange(10 * RATE) / RATE * 9)
    block = (rng.normal(size=10 * RATE) * level).astype(np.float32)
    transcriber.feed(block)
    tracemalloc.start()
    updates = []
    for _ in range(11):
        updates += transcriber._advance(transcriber._receive(block, None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.longest_s <= 6.5 and len(transcriber._window.samples) <= 6.5 * RATE
    assert peak < 20e6
    kept = [len(call["prefix_ids"][0]) for call in model.calls if call["prefix_ids"]]
    assert max(kept, default=0) < 2 * 20
    # What never comes to rest is committed when it has to leave the window, and not lost.
    committed = [word for update in updates for word in update.new]
    assert (len(committed) > 120) == (model_class is Babbler)


def test_an_emptied_text_and_tokens_that_would_change_a_committed_word_leave_what_was_committed():
    samples, _ = speak([1, 2, 3, 4])

    class Gated(Listener):
        def generate(self, input_features, prefix_ids=None, **arguments):
            output = super().generate(input_features, prefix_ids, **arguments)
            if prefix_ids:
                output.sequences = torch.full_like(output.sequences, EOS)
                output.confidence = torch.zeros_like(output.confidence)
            return output

    updates = list(transcriber_of(Gated()).stream(cut(samples, [1600])))
    assert [word.text for word in check_updates(updates)] == [word_of(1)]

    class Appender(Listener):
        def generate(self, input_features, prefix_ids=None, **arguments):
            output = super().generate(input_features, prefix_ids, **arguments)
            if prefix_ids:
                place = len(prefix_ids[0])
                for name, value in (("sequences", 100), ("confidence", 0.9)):
                    row = getattr(output, name)[0]
                    extra = torch.tensor([value], dtype=row.dtype)
                    setattr(output, name, torch.cat([row[:place], extra, row[place:]])[None])
                times = output.token_timestamps[0]
                output.token_timestamps = torch.cat([times[:place], times[place - 1 : place], times[place:]])[None]
            return output

    samples, _ = speak([1, 2, 3], [GAP_S, GAP_S, PAUSE_S])
    transcriber = transcriber_of(Appender())
    update = None
    for chunk in cut(samples, [8000]):
        update = transcriber.feed(chunk) or update
        if update and update.new:
            break
    assert update.committed == word_of(1)
    assert not update.partial.startswith("ly")


def test_scripts_without_blanks_are_committed_character_by_character_with_all_their_tokens():
    class HalfCharacters(Tokenizer):
        # The second token completes the character that the first one begins.
        def decode(self, ids, **kwargs):
            text = "".join(chr(0x4E00 + before) for before, i in zip(ids, ids[1:], strict=False) if i == 100)
            return text + ("\ufffd" if ids[-1] != 100 else "")

    samples, _ = speak([1, 2, 3, 4, 5, 6])
    processor, model = Processor(), Listener()
    processor.tokenizer = HalfCharacters()
    updates = list(StreamingTranscriber(model, processor).stream(cut(samples, [1600])))
    assert updates[-1].committed == "".join(chr(0x4E00 + 10 + i) for i in (1, 2, 3, 4, 5, 6))
    prefixes = [call["prefix_ids"][0] for call in model.calls if call["prefix_ids"]]
    assert prefixes and all(ids[-1] == 100 for ids in prefixes)
    assert any(update.new for update in updates[:-1])


def test_keep_up_decodes_the_newest_audio_and_no_step_before():
    samples, _ = speak([1, 2, 3, 4, 5])
    patient, hurried = Listener(), Listener()
    policy = StreamingPolicy(first_step_s=0.5)
    transcriber_of(patient, policy=policy).feed(samples[: 2 * RATE])
    transcriber = transcriber_of(hurried, keep_up=True, policy=policy)
    transcriber.feed(samples[: 2 * RATE])
    assert (len(patient.calls), len(hurried.calls)) == (4, 1)
    transcriber.feed(samples[2 * RATE :])
    assert transcriber.finish().committed.split() == [word_of(i) for i in (1, 2, 3, 4, 5)]
    # A minute at once is still cut into windows.
    numbers = [i % NUM_WORDS for i in range(100)]
    samples, _ = speak(numbers)
    hurried = Listener()
    transcriber = transcriber_of(hurried, keep_up=True)
    transcriber.feed(samples)
    assert transcriber.finish().committed.split() == [word_of(number) for number in numbers]
    assert hurried.longest_s <= 8.5 and len(hurried.calls) <= 16


def test_rates_and_layouts_are_taken_the_same_for_all_chunks():
    samples, times = speak([1, 2, 3, 4, 5, 6, 7])
    doubled = np.repeat(samples, 3)
    texts = set()
    for sizes in ([480], [4801, 7], [len(doubled)]):
        transcriber = transcriber_of(Listener())
        updates = list(transcriber.stream(cut(doubled, sizes), sampling_rate=3 * RATE))
        texts.add(tuple((word.text, round(word.start_s, 1)) for word in check_updates(updates)))
        assert updates[-1].time_s == pytest.approx(len(samples) / RATE, abs=0.03)
    assert len(texts) == 1 and len(texts.pop()) == 7

    # Integers and stereo are taken as `load_audio` takes them.
    samples, _ = speak([1, 2, 3])
    transcriber = transcriber_of(Listener())
    transcriber.feed(np.stack([samples, samples]))
    transcriber.feed((samples * 32767).astype(np.int16))
    assert transcriber.finish().committed.split() == [word_of(i) for i in (1, 2, 3, 1, 2, 3)]
    # Channels that cancel each other, in chunks of any size.
    transcriber.reset()
    for chunk in cut(samples, [333, 1600]):
        transcriber.feed(np.stack([chunk, -chunk]))
    assert transcriber.finish().committed.split() == [word_of(i) for i in (1, 2, 3)]


def test_arguments_reach_generate():
    samples, _ = speak([1, 2])
    model = Listener()
    slots = {"language": {"en": 5, "de": 6}}
    model.generation_config.prompt_template = {"tokens": ["language"], "slots": slots, "defaults": {"language": "en"}}
    transcriber_of(model, hotwords=["w3ly"], language="de", task=None).feed(samples)
    assert model.calls[0]["hotword_ids"] == [[13, 100]]
    assert model.calls[0]["language"] == "de" and "task" not in model.calls[0]
    config = model.calls[0]["generation_config"]
    assert config.return_token_timestamps and config.return_dict_in_generate


def test_errors_name_the_argument_and_a_finished_stream_can_be_reset():
    for arguments, name in (
        ({"step_s": 0}, "step_s"),
        ({"step_s": "1"}, "step_s"),
        ({"max_window_s": 1.0}, "max_window_s"),
        ({"max_window_s": 29.9}, "max_window_s"),
    ):
        with pytest.raises(ValueError, match=name):
            transcriber_of(Listener(), **arguments)
    with pytest.raises(ValueError, match="needs drafts"):
        StreamingTranscriber(tiny_model(), tiny_processor())
    for arguments in (
        {"first_step_s": 0.0},
        {"agreement": 0},
        {"margin_s": -1},
        {"pause_s": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            StreamingPolicy(**arguments)
    transcriber = transcriber_of(Listener())
    samples, _ = speak([1, 2])
    transcriber.feed(samples, 16_000)
    with pytest.raises(ValueError, match="sampling_rate=8000"):
        transcriber.feed(samples, 8_000)
    with pytest.raises(ValueError, match="NaN"):
        transcriber.feed([0.0, float("nan")])
    first = transcriber.finish()
    for call in (transcriber.finish, lambda: transcriber.feed(samples)):
        with pytest.raises(ValueError, match="reset"):
            call()
    transcriber.reset()
    transcriber.feed(samples)
    second = transcriber.finish()
    assert (first.committed, first.time_s) == (second.committed, second.time_s) == ("w1ly w2ly", first.time_s)
    transcriber.reset()
    assert transcriber.finish().committed == ""


def test_the_gate_follows_the_noise_and_lets_speech_above_it_through():
    rng = np.random.default_rng(0)

    def frames(level_db, seconds):
        return rng.normal(0, 10 ** (level_db / 20), round(seconds * RATE)).astype(np.float32)

    gate = EnergyGate(RATE)
    _, is_speech = gate(np.zeros(RATE, dtype=np.float32))
    assert not is_speech.any()
    levels, is_speech = gate(frames(-50, 10))
    # A sine of full scale has 0 dB, which is 3 more than its power, and the band is three quarters of white noise's.
    assert levels[1:].mean() == pytest.approx(-50 + 3 + 10 * np.log10(5850 / 8000), abs=0.5)
    # From -65 dB at 3 dB a second, the floor is within 8 dB of that after (-56 + 65) / 3 = 2.9 s.
    assert is_speech[1:130].all() and not is_speech[200:].any()
    _, is_speech = gate(frames(-30, 2))
    assert is_speech[1:].all()
    _, is_speech = gate(frames(-50, 2))
    # A frame is judged with the one before it.
    assert not is_speech[1:].any()


@each("rate", [8_000, 16_000])
def test_offset_hum_and_digital_silence_are_no_speech_for_the_gate(rate):
    times = np.arange(30 * rate) / rate
    for sound in (
        0 * times,
        0 * times + 0.3,
        0.2 * np.sin(2 * np.pi * 50 * times),
        np.linspace(-0.3, 0.3, len(times)),
    ):
        in_16_bits = np.round(sound * 2**15) / 2**15
        _, is_speech = EnergyGate(rate)(in_16_bits.astype(np.float32))
        assert not is_speech.any()


@each("gain_db", [-20, -35, -50])
@each("beside", ["nothing", "offset", "negative offset", "drift", "hum", "loud speech", "room"])
def test_the_gate_hears_a_faint_speaker(gain_db, beside):
    speech = load_audio(RECORDING)[: 3 * RATE + RATE // 2]
    speech = speech / np.sqrt(np.mean(speech**2))
    faint = np.concatenate([np.zeros(20 * RATE), speech * 10 ** (gain_db / 20), np.zeros(2 * RATE)])
    times = np.arange(len(faint)) / RATE
    faint += {
        "offset": 0.1,
        "negative offset": -0.4,
        "drift": 0.01 * times,
        "hum": 0.1 * np.sin(2 * np.pi * 60 * times),
        "room": np.random.default_rng(0).normal(0, 10 ** ((gain_db - 20) / 20), len(faint)),
    }.get(beside, 0.0)
    if beside == "loud speech":
        faint[: 5 * len(speech)] = np.tile(0.2 * speech, 5)
    faint = (np.round(faint * 2**15) / 2**15).astype(np.float32)
    _, is_speech = EnergyGate(RATE)(faint[: len(faint) // 320 * 320])
    power = np.square(speech.reshape(-1, 320)).mean(axis=1)
    is_loud = power > power.max() / 10**1.2
    heard = is_speech[1000 : 1000 + len(is_loud)]
    # What is within 12 dB of the loudest sound, and so above the recording's own noise, but for some frames.
    assert heard[is_loud].mean() > 0.9
    assert not is_speech[1020 + len(is_loud) :].any()
    if beside != "loud speech":
        assert not is_speech[500:980].any()


def test_a_tiny_random_model_streams_the_same_text_for_all_chunks():
    model, processor = tiny_drafts_model(), tiny_processor()
    rng = np.random.default_rng(0)
    burst = (rng.normal(size=2 * RATE) * 0.1).astype(np.float32)
    samples = np.concatenate([burst, np.zeros(int(1.2 * RATE), dtype=np.float32), burst[:RATE]])
    texts = []
    for sizes in ([len(samples)], [1600], [333, 12_345]):
        transcriber = StreamingTranscriber(model, processor, policy=StreamingPolicy(min_confidence=0.0))
        updates = list(transcriber.stream(cut(samples, sizes)))
        words = [word for update in updates for word in update.new]
        texts.append([(word.text, word.start_s, word.end_s) for word in words])
        for before, after in zip(updates, updates[1:], strict=False):
            assert after.committed.startswith(before.committed)
    assert texts[0] and texts[0] == texts[1] == texts[2]


@pytest.fixture(scope="module")
def checkpoint():
    with quiet_libraries():
        return load_model(str(default_checkpoint()))


def test_a_real_recording_streams_early_and_ends_near_the_offline_text(checkpoint):
    model, processor = checkpoint
    samples = load_audio(RECORDING)
    updates = list(StreamingTranscriber(model, processor).stream(cut(samples, [1600])))
    check_updates(updates)
    first = next(update for update in updates if update.committed or update.partial)
    onset_s = np.flatnonzero(np.abs(samples) > 0.1 * np.abs(samples).max())[0] / RATE
    assert first.time_s - onset_s <= 1.0
    assert sum(bool(update.new) for update in updates[:-1]) >= 2
    offline = processor.batch_decode(model.generate(**processor(samples, sampling_rate=RATE)))[0]
    import jiwer

    assert jiwer.wer(offline.lower(), updates[-1].committed.lower()) <= 0.2
    # At -50 dB of full scale, behind ten seconds of an offset; and noise of that level alone.
    faint = samples * (10 ** (-50 / 20) / np.sqrt(np.mean(samples**2)))
    *_, update = StreamingTranscriber(model, processor).stream([np.pad(faint, (10 * RATE, 0)) + np.float32(0.01)])
    assert jiwer.wer(offline.lower(), update.committed.lower()) <= 0.3
    hiss = np.random.default_rng(0).normal(0.01, 10 ** (-50 / 20), 10 * RATE).astype(np.float32)
    for update in StreamingTranscriber(model, processor).stream([hiss]):
        assert (update.committed, update.partial) == ("", "")


# The command


@pytest.fixture
def fake_models(monkeypatch):
    model = Listener()
    monkeypatch.setattr("mdm_asr_hf.loading.load_model", lambda *arguments: (model, Processor()))
    return model


@pytest.fixture
def wav(tmp_path):
    samples, _ = speak([1, 2, 3, 4], [GAP_S, GAP_S, PAUSE_S, GAP_S])
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    return tmp_path / "a.wav"


def test_stream_prints_committed_words_line_by_line_or_json_updates(run_command, fake_models, wav):
    code, out, err = run_command("stream", wav, "--no-realtime")
    assert (code, err) == (0, "")
    assert out.split() == [word_of(i) for i in (1, 2, 3, 4)] and len(out.splitlines()) >= 2

    fake_models.calls.clear()
    code, out, _ = run_command(
        "stream", wav, "--no-realtime", "--json", "--hotwords", "w3ly, w4ly", "--hotwords", "w5ly"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and all("text" not in line for line in lines[:-1])
    assert lines[-1]["text"] == "w1ly w2ly w3ly w4ly" and lines[-1]["is_final"]
    assert [Word(**word).text for line in lines for word in line["new"]] == lines[-1]["text"].split()
    assert any(line["partial"] for line in lines)
    assert fake_models.calls[0]["hotword_ids"] == [[13, 100], [14, 100], [15, 100]]


class Pipe(io.BytesIO):
    """Gives a few bytes at once, and cannot be sought in."""

    def __init__(self, data, at_once=4097):
        super().__init__(data)
        self.at_once, self.seek = at_once, None

    def read1(self, size):
        return super().read(min(size, self.at_once))


@settings(max_examples=80)
@given(
    subtype=st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"]),
    at_once=st.integers(1, 900),
    num_channels=st.integers(1, 3),
    size=st.integers(1, 300),
    extensible=st.booleans(),
)
def test_wav_is_read_as_it_comes(subtype, at_once, num_channels, size, extensible):
    generator = np.random.default_rng(size)
    # Channels of one voice, which no mixture leaves out.
    samples = generator.uniform(-0.5, 0.5, (size, 1)) * generator.uniform(0.5, 1.0, num_channels)
    content = encode(samples, format="WAVEX" if extensible else "WAV", subtype=subtype)
    expected = to_mono_float32(soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0], channel_axis=1)
    at = content.index(b"data")
    # Chunks behind the samples, and of an odd size before them; a size that is not known, as ffmpeg has it in a pipe.
    behind = content + b"LIST" + struct.pack("<I", 4) + b"abcd"
    before = content[:at] + b"junk" + struct.pack("<I", 3) + b"abc\0" + content[at:]
    unknown = content[: at + 4] + b"\xff\xff\xff\xff" + content[at + 8 : at + 8 + content_size(content, at)]
    for one in (content, behind, before, unknown):
        rate_hz, chunks = read_pipe(Pipe(one, at_once))
        found = list(chunks)
        assert rate_hz == RATE and all(chunk.dtype == np.float32 for chunk in found)
        np.testing.assert_allclose(np.concatenate([*found, np.zeros(0)]), expected, atol=1e-7)


def content_size(content, at):
    return struct.unpack("<I", content[at + 4 : at + 8])[0]


def test_formats_that_are_not_read_as_they_come(caplog):
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    contents = {name: encode(noise, format=name) for name in ("FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")}
    contents |= {"MP4": b"\0\0\0\x20ftypM4A " + bytes(99), "WebM": b"\x1aE\xdf\xa3" + bytes(99)}
    contents["MP3 "] = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + contents["MP3"]
    for name, content in contents.items():
        with pytest.raises(ValueError, match=f"^`-` is {name.strip()}, .*`ffmpeg [^\\n]*FILE.$"):
            read_pipe(Pipe(content, 7))
    whole = encode(noise)
    for content, message in (
        (whole[:30], "ends before its samples"),
        (encode(noise, subtype="IMA_ADPCM"), "1 channels of IMA_ADPCM"),
        (whole[:12] + whole[whole.index(b"data") :], "does not say what"),
        (whole[:12] + b"LIST\xff\xff\xff\x7f", "damaged"),
    ):
        with pytest.raises(ValueError, match=f"`-` is WAV .*{message}"):
            read_pipe(Pipe(content))
    assert sum(map(len, read_pipe(Pipe(whole[:-100]))[1])) == RATE - 50
    assert "cut off: 100 of 32000 bytes" in caplog.text


@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xfb", b"ID3", b"RIFF", b"ID3\xff", b"\xff\xfb\x90\x64"]))
def test_all_else_is_raw_samples(data, start):
    data = start + data + bytes(2000)
    assume(data[:4] not in MAGIC and data[4:8] != b"ftyp")
    # The tag of an MP3 has a version and a size.
    assume(not (data[:3] == b"ID3" and data[3] in (2, 3, 4) and max(data[6:10]) < 128))
    rate_hz, chunks = read_pipe(Pipe(data, 5))
    assert rate_hz == RATE and np.concatenate(list(chunks)).tobytes() == data[: len(data) // 2 * 2]
    assert not list(read_pipe(Pipe(start[:1]))[1])


@each("kind", ["raw", "WAV", "OGG"])
def test_stream_reads_raw_samples_and_wav_of_a_pipe(run_command, fake_models, monkeypatch, kind):
    samples, _ = speak([5, 6, 7])
    content = {
        # In pieces of any size, the last of which is half a sample.
        "raw": (samples * 32767).astype("<i2").tobytes() + b"\0",
        # Played as raw samples of 16 kHz, it would be four times as long.
        "WAV": encode(np.repeat(samples, 2)[:, None].repeat(2, axis=1), 2 * RATE),
        "OGG": encode(samples, format="OGG"),
    }[kind]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(content)))
    code, out, err = run_command("stream", "-")
    if kind == "OGG":
        assert (code, out) == (1, "") and err.startswith("error: `-` is OGG") and err.count("\n") == 1
    else:
        assert (code, out.split()) == (0, ["w5ly", "w6ly", "w7ly"])


def test_stream_says_in_one_line_what_is_wrong(run_command, fake_models, wav, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    for arguments, needed in (
        ([], 'pip install ".[stream]"'),
        ([tmp_path / "none.wav"], "does not exist"),
        ([wav, "--step-s", "0"], "`step_s`"),
        ([wav, "--language", "xx"], "language"),
    ):
        code, out, err = run_command("stream", *arguments)
        assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and needed in err


def test_ctrl_c_ends_the_microphone_and_prints_what_is_left(run_command, fake_models, monkeypatch):
    samples, _ = speak([1, 2, 3, 4, 5])
    closed = []

    class InputStream:
        def __init__(self, *, callback, samplerate, blocksize, **kwargs):
            self.callback, self.size = callback, blocksize
            assert samplerate == RATE

        def __enter__(self):
            for block in cut(samples, [self.size]):
                self.callback(block[:, None], len(block), None, None)
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

        def __exit__(self, *error):
            closed.append(True)

    module = SimpleNamespace(
        InputStream=InputStream,
        PortAudioError=OSError,
        query_devices=lambda device, kind: {"default_samplerate": float(RATE)},
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = run_command("stream")
    assert (code, err) == (0, "") and out.split() == [word_of(i) for i in (1, 2, 3, 4, 5)]
    assert closed and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_amid_decoding_loses_no_word():
    samples, _ = speak([1, 2, 3, 4])

    class Interrupted(Listener):
        def generate(self, *arguments, **named):
            if len(self.calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            return super().generate(*arguments, **named)

    chunks, policy = iter(cut(samples, [1600])), StreamingPolicy(first_step_s=0.2)
    updates = list(cli_streaming._updates(transcriber_of(Interrupted(), policy=policy), chunks, RATE))
    # The third hypothesis, of 1.4 s, came to its end; what came later was not heard.
    assert [word.text for word in check_updates(updates)][:2] == [word_of(1), word_of(2)]
    assert updates[-2].time_s == updates[-1].time_s == 1.4


def test_a_file_is_played_as_fast_as_it_was_spoken(monkeypatch):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(cli_streaming, "time", clock)
    blocks = [np.full(1600, i, dtype=np.float32) for i in range(10)]
    taken = []
    for chunk in cli_streaming._play(iter(blocks), RATE):
        taken.append((round(now[0] - 100.0, 3), [int(i) for i in chunk[::1600]]))
        if len(taken) == 2:
            # Decoding takes 0.35 s: three blocks are due then, and handed over together.
            now[0] += 0.35
    assert taken[:2] == [(0.1, [0]), (0.2, [1])]
    assert taken[2] == (0.55, [2, 3, 4])
    assert taken[3:] == [(0.6, [5]), (0.7, [6]), (0.8, [7]), (0.9, [8]), (1.0, [9])]


def test_the_terminal_prints_full_lines_once_and_draws_the_last_anew(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=20)
    words = [f"word{i}" for i in range(12)]
    printed, drawn = [], []
    live = Live(console=console)
    show = cli_streaming._LiveText(live)
    monkeypatch.setattr(console, "print", lambda line: printed.append(line.plain))
    monkeypatch.setattr(live, "update", lambda text: drawn.append(text))
    for i in range(1, 13):
        show(StreamUpdate(" ".join(words[:i]), [], "tentative", float(i)))
        assert " ".join([*printed, drawn[-1].plain]).split() == [*words[:i], "tentative"]
    assert all(len(text.plain.removesuffix(" tentative")) <= 20 for text in drawn)
    assert [(span.style, text.plain[span.start :]) for text in drawn for span in text.spans] == [
        ("dim", "tentative")
    ] * 12
    show(StreamUpdate(" ".join(words), [], "", 13.0, is_final=True))
    assert printed == ["word0 word1 word2", "word3 word4 word5", "word6 word7 word8", "word9 word10 word11"]
    assert drawn[-1].plain.strip() == ""
