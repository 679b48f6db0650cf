# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Token times from cross-attention: the warping, what surrounds it, and `return_token_timestamps`."""

import itertools

import numpy as np
import pytest
import torch
from demo_recording import RECORDING, STARTS_S
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model

import mdm_asr_hf
from mdm_asr_hf.alignment_mdm_asr import (
    align_row,
    check_alignment_heads,
    extend_ends,
    frame_duration_s,
    smooth,
    speech_presence,
    token_attention,
    token_timestamps,
    warp,
)
from mdm_asr_hf.transcribe.transcript import group_words, token_texts

# --- warping ---


def test_warping_ends_and_smoothing_by_hand():
    costs = np.array([[1.0, 9, 9, 9, 9], [9, 9, 1, 1, 9]])
    # A gap at frames 1 and 4 costs 2 each, in place of 9: 1 + 2 + 1 + 1 + 2 = 7.
    first, last = warp(costs, np.full(5, 2.0))
    assert first.tolist() == [0, 2] and last.tolist() == [0, 3]
    # A gap as dear as owning is cheap elsewhere: gaps only where they cost nothing.
    first, last = warp(costs, np.array([20.0, 0, 20, 20, 20]))
    assert first.tolist() == [0, 2] and last.tolist() == [0, 4]
    # Every token owns a frame, however dear.
    first, last = warp(np.full((3, 3), 50.0), np.zeros(3))
    assert first.tolist() == last.tolist() == [0, 1, 2]

    #                    0  1  2  3  4  5  6  7  8  9
    presence = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1, 0.0])
    first, last = np.array([1, 4, 8]), np.array([1, 4, 8])
    # One silent frame is no pause: the first token keeps it; two end the second one.
    assert extend_ends(first, last, presence, 2).tolist() == [3, 5, 8]
    assert extend_ends(first, last, presence, 1).tolist() == [2, 5, 8]

    values = np.array([[3.0, 0, 0, 6, 0]])
    assert smooth(values, 3).tolist() == [[1.5, 1, 2, 2, 3]]
    assert smooth(values, 1) is values
    # No wider than what there is.
    assert smooth(np.array([[2.0, 4.0]]), 5).tolist() == [[2.0, 4.0]]


def path_cost(costs, gaps, first, last):
    total = gaps.sum()
    for i, (a, b) in enumerate(zip(first, last, strict=True)):
        total += costs[i, a : b + 1].sum() - gaps[a : b + 1].sum()
    return total


@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_warp_is_the_cheapest_of_all_paths(num_tokens, more, seed):
    num_frames, generator = num_tokens + more, np.random.default_rng(seed)
    costs, gaps = generator.normal(size=(num_tokens, num_frames)), generator.normal(size=num_frames)
    first, last = warp(costs, gaps)
    bounds = range(num_frames)
    paths = [
        (flat[::2], flat[1::2])
        for flat in itertools.combinations_with_replacement(bounds, 2 * num_tokens)
        if all(b < a for b, a in zip(flat[1::2], flat[2::2], strict=False))
    ]
    assert (tuple(first), tuple(last)) in {(tuple(a), tuple(b)) for a, b in paths}
    least = min(path_cost(costs, gaps, *path) for path in paths)
    assert path_cost(costs, gaps, first, last) == pytest.approx(least, abs=1e-9)


def test_presence_tells_speech_from_silence_in_any_features():
    mel = np.repeat([-0.5, 1.5], (60, 40))[:, None].repeat(80, axis=1)
    expected = [0.0] * 30 + [1.0] * 20
    assert speech_presence(mel, 50).tolist() == expected
    assert speech_presence(3 * mel + 7, 50).tolist() == expected
    wave = np.random.default_rng(0).standard_normal(16000)
    wave[:9600] *= 1e-3
    assert speech_presence(wave, 50).tolist() == expected


def test_tokens_lie_where_they_are_attended_to():
    # 3 tokens and the end of text over 2 s; speech from 0.4 to 1.4 s, with a pause from 0.8 to 1.0 s.
    weights = np.full((1, 4, 100), 1e-4)
    for i, (a, b) in enumerate([(20, 30), (30, 40), (50, 70), (90, 100)]):
        weights[0, i, a:b] = 0.1
    presence = np.zeros(200)
    presence[40:80], presence[100:140] = 1, 1
    features = presence[:, None].repeat(80, axis=1)
    times = align_row(weights, 0.02, 2.0, features)
    expected = np.array([[0.4, 0.6], [0.6, 0.8], [1.0, 1.4], [1.8, 2.0]])
    assert np.abs(times - expected)[:3].max() <= 0.041
    assert times[3, 1] == 2.0 and times[3, 0] >= 1.4
    # The same attention twice as coarse gives the same times within a frame.
    coarse = weights.reshape(1, 4, 50, 2).sum(-1)
    assert np.abs(align_row(coarse, 0.04, 2.0, features) - times)[:3].max() <= 0.041
    # Frames behind the audio, of the silence the encoder adds, have no say.
    padded = np.concatenate([weights, np.full((1, 4, 50), 0.5)], axis=-1)
    assert np.allclose(align_row(padded, 0.02, 2.0, features), times)


# --- heads and frames ---


def test_heads_and_features_are_checked():
    config = tiny_model("whisper").config.decoder_config
    assert check_alignment_heads(None, config) == [(0, 0), (0, 1)]
    # A causal decoder, which says the next token, has found its place further up.
    assert check_alignment_heads(None, tiny_drafts_model("whisper").config.decoder_config) == [(1, 0), (1, 1)]
    assert check_alignment_heads([[0, 1], [1, 0]], config) == [(0, 1), (1, 0)]
    for wrong, message in (
        ([[2, 0]], "layer 2, head 0"),
        ([[0, 2]], "layer 0, head 2"),
        ([[0, -1]], "layer 0, head -1"),
        ([[0]], "list of"),
        ([[0, 1.5]], "list of"),
        ([3], "list of"),
        ([], "names no head"),
    ):
        with pytest.raises(ValueError, match=message):
            check_alignment_heads(wrong, config)

    model = tiny_model("whisper")
    features, mask = tiny_inputs("whisper", seconds=(1.0,))
    outputs = model.encode(features, mask)
    with pytest.raises(ValueError, match="layer 7, head 0"):
        generate(model, features, mask, alignment_heads=[[7, 0]])
    output = model.generate(
        encoder_outputs=outputs,
        canvas_length=8,
        return_token_timestamps=True,
        return_dict_in_generate=True,
        alignment_heads=[[0, 0]],
    )
    own = output.token_timestamps[0].flatten()
    # The model has 0.3 s of silence behind the audio, which nothing tells here.
    assert (own.diff() >= 0).all() and 0 < own[-1] <= 1.3001


def test_weights_and_frames_are_those_of_the_encoder():
    for encoder in ["whisper", "parakeet"]:
        model = tiny_model(encoder)
        features, mask = tiny_inputs(encoder, seconds=(1.0, 0.6))
        outputs = model.prepare_cross_attention(model.encode(features, mask))
        ids = torch.randint(2, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
        heads = [(1, 1), (0, 0), (1, 0)]
        # On a canvas each token's own row is read.
        every = np.ones(ids.shape, dtype=bool)
        arguments = (every, ids.numpy(), every, np.zeros(2, dtype=int), outputs, heads)
        weights = token_attention(model, *arguments)
        model.set_attn_implementation("eager")
        of_eager = token_attention(model, *arguments)
        with torch.no_grad():
            seen = model(decoder_input_ids=ids, encoder_outputs=outputs, output_attentions=True).cross_attentions
        expected = torch.stack([seen[layer][:, head] for layer, head in heads], dim=1).numpy()
        assert weights.shape == (2, 3, 9, outputs.last_hidden_state.shape[1])
        assert np.allclose(weights, expected, atol=1e-5) and np.allclose(of_eager, expected, atol=1e-5)
        num_frames = int(outputs.attention_mask[1].sum())
        assert not weights[1, ..., num_frames:].any() and num_frames < weights.shape[-1]

    for encoder, expected in [("whisper", 0.02), ("parakeet", 0.08), ("wav2vec2", 0.02)]:
        config = tiny_model(encoder).config
        assert frame_duration_s(config.encoder_config, config.input_frames_per_s) == pytest.approx(expected)


@each("make", [tiny_model, tiny_drafts_model])
def test_attention_is_read_where_the_token_is_said(make):
    model = make("whisper")
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))
    outputs = model.prepare_cross_attention(model.encode(features.to(model.dtype), mask))
    # Two texts, behind prompts of two tokens and of one.
    ids = np.array([[4, VOCAB_SIZE, 5, 6, 7, 1], [VOCAB_SIZE, 8, 9, 1, 2, 2]])
    starts, heads = np.array([2, 1]), [(0, 1), (1, 0)]
    is_token = np.array([[True] * 4, [True, True, True, False]])
    visible = None if model.config.has_drafts else np.ones_like(ids, dtype=bool)
    weights = token_attention(model, is_token, ids, visible, starts, outputs, heads)
    # A causal decoder says a token in the row before it; on a canvas a token has its own row.
    before = 1 if model.config.has_drafts else 0
    every = np.ones_like(ids, dtype=bool)
    rows = token_attention(model, every, ids, visible, np.full(2, before), outputs, heads)
    assert weights.shape == (2, 2, 4, outputs.last_hidden_state.shape[1])
    assert np.array_equal(weights[0], rows[0, :, 2 - before : 6 - before])
    assert np.array_equal(weights[1, :, :3], rows[1, :, 1 - before : 4 - before])

    features[1] = 0.0
    output = generate(model, features, mask)
    assert (output.token_timestamps[1] == 0).all() and output.token_timestamps[0].max() > 0
    plain = generate(model, features, mask, return_token_timestamps=False)
    assert plain.token_timestamps is None
    assert torch.equal(plain.sequences, output.sequences) and torch.equal(plain.nfe, output.nfe)


# --- generate ---


def generate(model, features, mask, **kwargs):
    length = "max_new_tokens" if model.config.has_drafts else "canvas_length"
    kwargs = {"return_token_timestamps": True, length: 12, **kwargs}
    return model.generate(features, mask, return_dict_in_generate=True, **kwargs)


@settings(max_examples=15)
@given(
    encoder=st.sampled_from(["whisper", "parakeet", "wav2vec2"]),
    seconds=st.lists(st.floats(0.06, 2.0), min_size=1, max_size=3),
    seed=st.integers(0, 5),
    max_new_tokens=st.integers(1, 40),
    make=st.sampled_from([tiny_model, tiny_drafts_model]),
)
def test_times_rise_inside_the_audio(encoder, seconds, seed, max_new_tokens, make):
    features, mask = tiny_inputs(encoder, seconds=tuple(seconds), seed=seed)
    model = make(encoder)
    output = generate(model, features, mask, max_new_tokens=max_new_tokens)
    durations_s = model.audio_duration_s(features, mask)
    times = output.token_timestamps
    assert times.shape == (*output.sequences.shape, 2)
    for row, duration_s in enumerate(durations_s.tolist()):
        num_tokens = int((output.confidence[row] > 0).sum())
        own = times[row, :num_tokens].flatten()
        assert (own.diff() >= 0).all() and own[0] >= 0 and own[-1] <= duration_s + 1e-5
        assert (times[row, num_tokens:] == 0).all()
        if output.sequences[row, num_tokens - 1] == model.config.eos_token_id:
            assert own[-1] == pytest.approx(duration_s, abs=0.081)


@each("encoder", ["whisper", "parakeet", "wav2vec2"])
def test_a_batch_has_the_times_of_its_rows_alone(encoder):
    model = tiny_drafts_model(encoder)
    model.generation_config.prompt_template = {"tokens": [VOCAB_SIZE], "previous": 50}
    features, mask = tiny_inputs(encoder, seconds=(1.5, 0.9, 0.4))
    # Prompts of three lengths.
    previous = [[5, 6, 7], [], [8]]
    batch = generate(model, features, mask, previous_ids=previous)
    for row in range(3):
        length = int(mask[row].sum())
        own = features[row : row + 1, :length], mask[row : row + 1, :length]
        alone = generate(model, *own, previous_ids=previous[row : row + 1])
        assert torch.equal(alone.sequences[0], batch.sequences[row, : alone.sequences.shape[1]])
        times = batch.token_timestamps[row, : alone.sequences.shape[1]]
        assert torch.allclose(alone.token_timestamps[0], times, atol=1e-4)
    assert len({tuple(row) for row in batch.sequences.tolist()}) == 3


def test_each_sample_has_the_times_of_its_own_text():
    model = tiny_drafts_model("whisper")
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    output = generate(model, features, mask, num_return_sequences=3, temperature=1.0, generator=generators)
    assert len({tuple(row) for row in output.sequences.tolist()}) > 2
    for row in range(6):
        length = int(mask[row // 3].sum())
        its_features, its_mask = features[row // 3, :length][None], mask[row // 3, :length][None]
        num_tokens = int((output.confidence[row] > 0).sum())
        ids = output.sequences[row : row + 1, :num_tokens].numpy()
        outputs = model.prepare_cross_attention(model.encode(its_features, its_mask))
        duration_s = model.audio_duration_s(its_features, its_mask)
        read = np.concatenate([[[VOCAB_SIZE]], ids], axis=1)
        alone = token_timestamps(model, ids, ids >= 0, read, None, np.array([1]), outputs, duration_s, its_features)
        assert np.allclose(output.token_timestamps[row, :num_tokens], alone[0], atol=1e-4)


# --- words ---


def test_words_of_scripts_without_blanks_are_parted_at_tokens():
    pieces = [" ", "你", "好", "世界", "。", "OK", "（", "ラ", "ー", "）"]
    times_s = [(i / 10, (i + 1) / 10) for i in range(len(pieces))]
    words = group_words(pieces, [0.5] * len(pieces), times_s)
    assert [word.text for word in words] == ["你", "好", "世界。", "OK", "（ラー）"]
    assert [(word.start_s, word.end_s) for word in words][:3] == [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4)]
    # A character of two tokens is one word, and a Thai vowel sign stays with its consonant.
    assert [w.text for w in group_words(["", "語", "ก", "\u0e34", "น"], [1.0] * 5, times_s[:5])] == ["語", "กิ", "น"]
    # Words written with blanks stay whole, and without times nothing is parted.
    assert [w.text for w in group_words([" I", "'m", " fi", "ne", "."], [1.0] * 5, times_s[:5])] == ["I'm", "fine."]
    assert [w.text for w in group_words(pieces, [0.5] * len(pieces))] == ["你好世界。OK（ラー）"]


def test_golden_times_of_a_recording():
    processor = mdm_asr_hf.MDMASRProcessor.from_pretrained(mdm_asr_hf.default_checkpoint())
    model = mdm_asr_hf.MDMASRForConditionalGeneration.from_pretrained(mdm_asr_hf.default_checkpoint(), dtype="float32")
    inputs = processor(RECORDING)
    output = generate(model, inputs["input_features"], inputs["attention_mask"], max_new_tokens=None)
    pieces = token_texts(processor.tokenizer, output.sequences[0].tolist())
    words = group_words(pieces, output.confidence[0].tolist(), output.token_timestamps[0].tolist())
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert len(words) == len(STARTS_S) and times == sorted(times)
    errors = np.abs([word.start_s - start_s for word, start_s in zip(words, STARTS_S, strict=True)])
    # Whisper's heads are known to be late.
    assert np.median(errors) < 0.12 and errors.max() < 0.25, errors
    # The pause after "was," is no word's, nor is the silence at the end.
    assert words[6].end_s < words[7].start_s - 0.1 and 3.9 < words[-1].end_s < 4.4
