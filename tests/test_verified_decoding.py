"""Verified drafts are lossless: the text is the causal decoder's own, whatever is drafted and however it is cut."""

import functools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs

from mdm_asr_hf import verified_decoding_mdm_asr
from mdm_asr_hf.drafting_mdm_asr import gumbel_noise
from mdm_asr_hf.encoder_mdm_asr import take_rows
from mdm_asr_hf.torch_generation_mdm_asr import TorchSteps

EOS = 1
SECONDS = (1.0, 0.6, 0.35)
# Longer texts than these models end with would only take time.
MAX_NEW = 32


@functools.cache
def model_of(encoder):
    return tiny_drafts_model(encoder)


@functools.cache
def encoded(encoder):
    """The model, and what its encoder gives for each clip alone."""
    model, (features, mask) = model_of(encoder), tiny_inputs(encoder, SECONDS)
    alone = []
    with torch.no_grad():
        for row in range(len(SECONDS)):
            length = int(mask[row].sum())
            outputs = model.encode(features[row : row + 1, :length].double(), mask[row : row + 1, :length])
            alone.append(model.prepare_cross_attention(outputs))
    return model, features.double(), mask, alone


@functools.cache
def loop_text(encoder, row, seed=None, temperature=0.0):
    """The text of a clip by a plain loop over the whole decoder: no cache, no drafts, one token a call."""
    model, _, _, alone = encoded(encoder)
    ids = [model.config.decoder_start_token_id]
    while len(ids) <= MAX_NEW and ids[-1] != EOS:
        with torch.no_grad():
            logits = model(decoder_input_ids=torch.tensor([ids]), encoder_outputs=alone[row]).logits[0, -1]
        if seed is not None:
            logits = logits / temperature + gumbel_noise(np.array([seed]), np.array([[len(ids)]]), VOCAB_SIZE)[0, 0]
        ids.append(int(logits.argmax()))
    return ids[1:]


def texts(output):
    rows = (row.tolist() for row in output.sequences)
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def decode(encoder, rows=(0, 1, 2), **arguments):
    """Clips of a batch, padded with garbage."""
    model, features, mask, _ = encoded(encoder)
    rows = list(rows)
    arguments = {"max_new_tokens": MAX_NEW, "return_dict_in_generate": True, **arguments}
    return model.generate(features[rows], attention_mask=mask[rows], **arguments)


ENCODER = st.sampled_from(["whisper", "parakeet"])
SETTINGS = st.fixed_dictionaries(
    {
        "gamma": st.one_of(st.floats(0, 20), st.just(math.inf)),
        "draft_length": st.integers(1, 3),
        "draft_branches": st.sampled_from([["masks"], ["hypothesis"], ["masks", "hypothesis"]]),
    }
)
ROWS = st.lists(st.integers(0, len(SECONDS) - 1), min_size=1, max_size=4)
# Texts that have nothing to do with the speech, of any length, and one that is the wrong one everywhere.
DRAFTS = st.lists(st.integers(2, VOCAB_SIZE - 1), max_size=40)


@each("encoder", ["whisper", "parakeet"])
def test_the_plain_loop_is_a_text_worth_drafting(encoder):
    lengths = [len(loop_text(encoder, row)) for row in range(len(SECONDS))]
    assert min(lengths) >= 5 and len(set(lengths)) == 3
    output = decode(encoder)
    assert texts(output) == [loop_text(encoder, row) for row in range(len(SECONDS))]
    # Some drafts are right and some are wrong, so that what follows tests both.
    assert int(output.accepted_drafts[:, 0].sum()) > 5 and int(output.rejected_drafts[:, 0].sum()) > 1
    assert int(output.nfe.sum()) < sum(lengths)


@settings(max_examples=48)
@given(encoder=ENCODER, options=SETTINGS, rows=ROWS, drafts=st.none() | st.lists(DRAFTS, min_size=4, max_size=4))
def test_any_drafts_of_masks_and_hypotheses_give_the_donors_text(encoder, options, rows, drafts):
    output = decode(encoder, rows, draft_ids=drafts and drafts[: len(rows)], **options)
    assert texts(output) == [loop_text(encoder, row) for row in rows]
    # A text and its end are the tokens that evaluations committed: their own, and the accepted ones.
    for i in range(len(rows)):
        kinds = output.token_branches[i][output.commit_steps[i] > 0]
        assert len(set(output.commit_steps[i].tolist()) - {0}) == int(output.nfe[i])
        # Each evaluation commits one of the donor's own, but for the last, whose end of text may be a draft.
        assert int(output.nfe[i]) - 1 <= int((kinds == 0).sum()) <= int(output.nfe[i])


@settings(max_examples=20, deadline=None)
@given(encoder=ENCODER, options=SETTINGS, seed=st.integers(0, 2**16), always_eos=st.booleans())
def test_adversarial_drafts_change_nothing(encoder, options, seed, always_eos):
    model = model_of(encoder)
    head, kept = model.model.decoder.drafts, {}
    kept = {name: value.clone() for name, value in head.state_dict().items()}
    cut, generator = verified_decoding_mdm_asr.cut_drafts, torch.Generator().manual_seed(seed)

    def end_at_once(ids, entropies, limits, gamma, eos_token_id):
        return np.full((len(limits), 1), EOS), limits.clip(max=1)

    try:
        if always_eos:
            verified_decoding_mdm_asr.cut_drafts = end_at_once
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                if "norm" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        assert texts(decode(encoder, **options)) == [loop_text(encoder, row) for row in range(3)]
    finally:
        head.load_state_dict(kept)
        verified_decoding_mdm_asr.cut_drafts = cut


@settings(max_examples=20, deadline=None)
@given(encoder=ENCODER, options=SETTINGS, rows=ROWS, temperature=st.floats(0.2, 2.0), seed=st.integers(0, 2**16))
def test_a_drawn_text_is_that_of_its_seed_however_it_is_cut(encoder, options, rows, temperature, seed):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    seeds = [
        int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed + i))) for i in range(len(rows))
    ]
    output = decode(encoder, rows, temperature=temperature, generator=generators, **options)
    drawn = [loop_text(encoder, row, its_seed, temperature) for row, its_seed in zip(rows, seeds, strict=True)]
    assert texts(output) == drawn


def test_drawn_tokens_have_the_donors_distribution():
    model, _, _, alone = encoded("whisper")
    number, temperature = 2000, 0.1
    outputs = take_rows(alone[0], torch.zeros(number, dtype=torch.long))
    output = model.generate(
        encoder_outputs=outputs,
        max_new_tokens=2,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        start = torch.tensor([[model.config.decoder_start_token_id]])
        first = model(decoder_input_ids=start, encoder_outputs=alone[0]).logits[0, -1] / temperature
        best = int(first.argmax())
        both = torch.tensor([[model.config.decoder_start_token_id, best]])
        second = model(decoder_input_ids=both, encoder_outputs=alone[0]).logits[0, -1] / temperature
    is_best = output[:, 0] == best
    for tokens, logits in ((output[:, 0], first), (output[is_best, 1], second)):
        expected = logits.softmax(dim=-1) * len(tokens)
        counts = torch.bincount(tokens, minlength=VOCAB_SIZE)
        # Rare tokens are counted together; then each class is expected five times at least.
        rare = expected < 5
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        degrees = len(expected) - 1
        chi_square = float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
        # Passed by chance once in a thousand seeds (Wilson and Hilferty), and this one is fixed.
        assert (
            degrees >= 3 and chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
        )


def test_a_prefix_a_hypothesis_and_limits():
    whole = [loop_text("whisper", row) for row in range(3)]
    output = decode("whisper", prefix_ids=[whole[0][:4], [], whole[2][:1]])
    assert texts(output) == whole
    assert output.commit_steps[0, :4].tolist() == [0] * 4 and output.confidence[0, :4].tolist() == [1.0] * 4
    assert bool((output.commit_steps[0, 4 : len(whole[0])] > 0).all())

    output = decode("whisper", draft_ids=whole, draft_branches=["hypothesis"], draft_length=3)
    assert texts(output) == whole and int(output.rejected_drafts.sum()) == 0
    # Three drafts and the donor's own token in each.
    assert output.nfe.tolist() == [math.ceil(len(text) / 4) for text in whole]
    assert output.tokens_per_evaluation.tolist() == pytest.approx(
        [len(text) / math.ceil(len(text) / 4) for text in whole]
    )

    whole = loop_text("whisper", 0)
    for limit in (1, 2, 5):
        assert texts(decode("whisper", [0], max_new_tokens=limit, gamma=math.inf)) == [whole[:limit]]

    wrong = [token + 1 if token + 1 < VOCAB_SIZE else 2 for token in whole[:6]]
    output = decode(
        "whisper", [0], draft_ids=[[*whole[:2], *wrong[2:6]]], draft_branches=["hypothesis"], draft_length=3
    )
    assert texts(output) == [whole]
    place, branch, ids = output.struck_drafts[0][0]
    assert (place, branch, ids) == (2, 1, wrong[2:3])
    assert output.token_branches[0, :3].tolist() == [2, 2, 0]


def test_evaluations_do_not_depend_on_the_batch():
    # The hypothesis is of no use to two of the rows, and is tried again after the same number of evaluations.
    drafts = [[2] * 40, loop_text("whisper", 1), [3] * 40]
    together = decode("whisper", draft_ids=drafts, draft_branches=["hypothesis"])
    alone = [
        decode("whisper", [row], draft_ids=[drafts[row]], draft_branches=["hypothesis"]) for row in range(len(drafts))
    ]
    assert together.nfe.tolist() == [int(one.nfe) for one in alone]
    assert together.rejected_drafts.tolist() == [one.rejected_drafts[0].tolist() for one in alone]

    model = tiny_drafts_model("whisper")
    with torch.no_grad():
        for parameter in model.model.decoder.drafts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    calls = []
    model.model.decoder.drafts.layers[0].register_forward_hook(lambda *_: calls.append(1))
    features, mask = tiny_inputs("whisper", (1.0,))
    output = model.generate(features.double(), attention_mask=mask, max_new_tokens=32, return_dict_in_generate=True)
    assert int(output.accepted_drafts.sum()) == 0 and int(output.nfe) == len(texts(output)[0]) >= 20
    # Three times at first, and after every eight evaluations once more.
    assert 4 <= len(calls) <= 3 + int(output.nfe) // 9
    calls.clear()
    with torch.no_grad():
        model.model.decoder.drafts.offset_embeddings.weight.zero_()
    untrained = model.generate(features.double(), attention_mask=mask, max_new_tokens=32)
    assert torch.equal(untrained, output.sequences) and not calls


@contextmanager
def seen_blocks(model, setting="draft_hints"):
    """Inside, drafts see what was rejected before, or begin a text; gives what the decoder was asked to draft behind:
    frontiers, blocks, and the number of keys that are seen."""
    seen, config = [], model.config.decoder_config

    def look(module, args, kwargs):
        if kwargs.get("frontiers") is not None:
            seen.append((kwargs["frontiers"], kwargs["block_ids"], kwargs["frontier_mask"].sum(dim=-1)))

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    setattr(config, setting, True)
    try:
        yield seen
    finally:
        setattr(config, setting, False)
        handle.remove()


def test_masks_begin_a_text_before_the_donor_has_said_anything():
    model, *_ = encoded("whisper")
    prompt = torch.tensor([[model.config.decoder_start_token_id, 4]])
    # The first row's text is begun by the caller: of what follows its first tokens the frames alone do not tell.
    arguments = dict(decoder_input_ids=prompt, draft_branches=["masks"], prefix_ids=[[5, 6], [], []])
    expected = decode("whisper", **arguments)
    with seen_blocks(model, "draft_start") as seen:
        output = decode("whisper", **arguments)
    assert texts(output) == texts(expected)
    frontiers, blocks, num_seen = seen[0]
    assert frontiers.tolist() == [[2], [0], [0]] and num_seen.tolist() == [[0]] * 3
    assert blocks[:, 0, 0].tolist() == [6, 4, 4]
    assert all((count > 0).all() for *_, count in seen[1:])
    # They were verified in the first evaluation.
    begun = [
        any(place == 0 for place, _, _ in output.struck_drafts[row])
        or bool(((output.commit_steps[row] == 1) & (output.token_branches[row] == 1)).any())
        for row in range(3)
    ]
    assert begun == [False, True, True]
    # Behind a prompt of one token there is none before the known one, and none are asked for.
    with seen_blocks(model, "draft_start") as seen:
        assert texts(decode("whisper")) == [loop_text("whisper", row) for row in range(3)]
    assert all((count > 0).all() for *_, count in seen)


@settings(max_examples=15)
@given(options=SETTINGS, rows=ROWS)
def test_masks_that_see_rejected_drafts_give_the_same_text(options, rows):
    model, *_ = encoded("whisper")
    with seen_blocks(model) as seen:
        output = decode("whisper", rows, **options)
    assert texts(output) == [loop_text("whisper", row) for row in rows]
    hinted = [(ids[..., 1:] < model.config.mask_token_id).any() for _, ids, _ in seen]
    if options["draft_length"] == 3 and options["gamma"] == math.inf and options["draft_branches"] == ["masks"]:
        # Two of three drafts are left, where the first was wrong.
        assert any(hinted)
    assert "masks" in options["draft_branches"] or not hinted


def test_hints_are_the_rejected_drafts_at_their_places():
    model, features, mask, _ = encoded("whisper")
    with seen_blocks(model) as seen:
        output = decode("whisper", [0], draft_branches=["masks"], gamma=math.inf)
    whole, expected = loop_text("whisper", 0), {}
    for place, _, ids in output.struck_drafts[0]:
        # The first stands where the donor's own token does; the place in the text is that of its prompt's end on.
        for i, token_id in enumerate(ids[1:], start=1):
            expected[place + i + 1] = token_id
    found = {}
    for frontiers, ids, _ in seen:
        known, *masks = ids[0, 0].tolist()
        # A prompt of one token: behind the frontier at position p stands token p of the text.
        assert known == whole[int(frontiers[0, 0])]
        for k, token_id in enumerate(masks, start=1):
            if token_id < model.config.mask_token_id:
                found[int(frontiers[0, 0]) + 1 + k] = token_id
    assert found and found.items() <= expected.items()


@each(
    "options",
    [
        {"suppress_tokens": [7, 9], "begin_suppress_tokens": [20, 21]},
        {"hotword_ids": [[20, 21, 22], [7]], "hotword_boost": 1.0},
        {"temperature": 0.7, "generator": 5},
        {"no_speech_token_id": 5, "no_speech_threshold": 0.9},
    ],
)
def test_logits_may_stay_on_a_gpu(monkeypatch, options):
    def decoded():
        # A generator goes on with each text.
        own = {**options, "generator": torch.Generator().manual_seed(5)} if "generator" in options else options
        return decode("whisper", **own)

    expected, verify = decoded(), TorchSteps.verify
    # Tensors, as logits are where they lie on a GPU.
    monkeypatch.setattr(TorchSteps, "verify", lambda *arguments: torch.from_numpy(verify(*arguments)))
    output = decoded()
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(output.nfe, expected.nfe)
    torch.testing.assert_close(output.confidence, expected.confidence)
    torch.testing.assert_close(output.no_speech, expected.no_speech)
