"""Revision: what a step commits is read again by the next, which sees it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_active_window import assert_same
from test_active_window import transcribe as transcribe_in_windows
from test_generation import EOS, MASK
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_model

from mdm_asr_hf.canvas_mdm_asr import Canvas
from mdm_asr_hf.sampling_mdm_asr import propose_tokens


def a_canvas(tokens, commit_steps, nfe):
    tokens = torch.tensor(tokens)
    return Canvas(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        confidence=torch.where(tokens == MASK, 0.0, 0.5),
        commit_steps=torch.tensor(commit_steps),
        nfe=torch.tensor(nfe),
        mask_token_id=MASK,
        eos_token_id=EOS,
    )


def proposed(*probs):
    return propose_tokens(logits_of(*probs))[:2]


def logits_of(*probs):
    """Logits (N, V) of rows {token: probability}; the rest is spread over all other tokens."""
    rows = torch.zeros(len(probs), VOCAB_SIZE)
    for row, given_probs in zip(rows, probs, strict=True):
        row += (1 - sum(given_probs.values())) / (VOCAB_SIZE - len(given_probs))
        for token, prob in given_probs.items():
            row[token] = prob
    return rows.log() + 3.0


# --- on a canvas, by hand ---


def test_fresh_is_what_the_last_evaluation_of_a_row_committed():
    canvas = a_canvas([[5, 6, MASK, 7, MASK], [5, EOS, 6, MASK, MASK]], [[1, 2, 0, 2, 0], [3, 3, 3, 0, 0]], [2, 3])
    # Behind the end of text nothing counts.
    assert canvas.fresh(1).tolist() == [[False, True, False, True, False], [True, True, False, False, False]]
    assert canvas.fresh(2).tolist() == [[True, True, False, True, False], [True, True, False, False, False]]
    assert canvas.fresh(9).tolist() == canvas.fresh(2).tolist()
    # Before the first evaluation there is only a draft.
    assert not a_canvas([[5, MASK]], [[0, 0]], [0]).fresh(2).any()


def test_another_token_takes_the_place_of_one_where_it_is_probable_enough():
    canvas = a_canvas([[5, 6, 7, 8, MASK]], [[1, 1, 1, 1, 0]], [1])
    positions = torch.tensor([[True, True, True, False, False]])
    canvas.revise(positions, *proposed({9: 0.6, 5: 0.3}, {9: 0.4, 6: 0.3}, {7: 0.9}), above=0.5)
    # The second's is not probable enough, the third's is the one that stands there.
    assert canvas.tokens.tolist() == [[9, 6, 7, 8, MASK]]
    torch.testing.assert_close(canvas.confidence, torch.tensor([[0.6, 0.5, 0.5, 0.5, 0.0]]))
    assert canvas.commit_steps.tolist() == [[1, 1, 1, 1, 0]] and canvas.nfe.tolist() == [1]
    canvas.revise(positions, *proposed({9: 0.6}, {9: 0.4, 6: 0.3}, {7: 0.9}), above=0.35)
    assert canvas.tokens.tolist() == [[9, 9, 7, 8, MASK]]


# --- in generate ---


class SecondThoughts:
    """Replaces the decoder: masked positions read 5 everywhere and EOS at the last; those that show a token read 6."""

    def __init__(self, model, monkeypatch, num_tokens=4):
        self.num_tokens, self.wanted = num_tokens, []
        monkeypatch.setattr(model, "_canvas_logits", self)

    def __call__(self, open_rows, canvas, wanted, settings, sampler):
        self.wanted.append((wanted & (canvas.tokens != MASK)).sum().item())
        logits = torch.zeros(*canvas.tokens.shape, VOCAB_SIZE)
        logits[canvas.tokens == MASK, 5] = 20.0
        logits[canvas.tokens != MASK, 6] = 20.0
        logits[:, self.num_tokens :] = 0.0
        logits[:, self.num_tokens :, EOS] = 20.0
        return logits[wanted], wanted


def generate(model, **kwargs):
    features, mask = tiny_inputs("whisper", seconds=(1.0,))
    options = {"canvas_length": 8, "gamma": 0.0, "return_dict_in_generate": True, **kwargs}
    return model.generate(features, attention_mask=mask, **options)


def test_a_step_revises_what_the_one_before_committed(monkeypatch):
    model = tiny_model("whisper")
    SecondThoughts(model, monkeypatch)
    assert generate(model).sequences.tolist() == [[5, 5, 5, 5, EOS]]
    script = SecondThoughts(model, monkeypatch)
    out = generate(model, revise_above=0.5)
    # One token a step, each read again by the next; the last, the end of text, by none. No evaluation is added.
    assert out.sequences.tolist() == [[6, 6, 6, 6, EOS]] and out.nfe.tolist() == [5]
    assert out.commit_steps.tolist() == [[1, 2, 3, 4, 5]] and script.wanted == [0, 1, 1, 1, 1]
    # Too sure a bound.
    assert generate(model, revise_above=1.0).sequences.tolist() == [[5, 5, 5, 5, EOS]]


def test_later_steps_read_a_token_again_as_often_as_the_settings_say(monkeypatch):
    model = tiny_model("whisper")
    script = SecondThoughts(model, monkeypatch)
    out = generate(model, revise_above=0.5, revise_steps=3)
    # At every step up to three of the tokens that were committed.
    assert script.wanted == [0, 1, 2, 3, 3] and out.sequences.tolist() == [[6, 6, 6, 6, EOS]]
    with pytest.raises(ValueError, match="`revise_steps` must be an integer of at least 1, got 0"):
        generate(model, revise_above=0.5, revise_steps=0)


def test_drafts_stay_and_draws_and_hotwords_are_not_revised(monkeypatch):
    model = tiny_model("whisper")
    SecondThoughts(model, monkeypatch)
    assert generate(model, revise_above=0.5, draft_ids=[[7, 7]]).sequences.tolist() == [[7, 7, 6, 6, EOS]]
    script = SecondThoughts(model, monkeypatch)
    generate(model, revise_above=0.5, temperature=0.01, generator=torch.Generator().manual_seed(0))
    generate(model, revise_above=0.5, hotword_ids=[[9, 10]])
    assert set(script.wanted) == {0}


def transcribe(model, **options):
    return transcribe_in_windows(model, **{"gamma": 3.0, "revise_above": 0.0, **options})


@pytest.mark.parametrize("shift", [False, True])
def test_revision_changes_texts_and_a_window_over_everything_is_the_whole_canvas(shift):
    model = tiny_model("whisper", seed=1, shift_logits=shift)
    whole = transcribe(model, active_ahead=None)
    assert whole.sequences.tolist() != transcribe(model, active_ahead=None, revise_above=None).sequences.tolist()
    assert_same(whole, transcribe(model, active_ahead=100, active_behind=100))
    again = transcribe(model, active_ahead=None, revise_steps=3)
    # A random model without shift happens to read alike what follows.
    assert (again.sequences.tolist() != whole.sequences.tolist()) == shift
    assert_same(again, transcribe(model, active_ahead=100, active_behind=100, revise_steps=3))


@settings(max_examples=15, deadline=None)
@given(
    ahead=st.one_of(st.none(), st.integers(1, 12)),
    behind=st.integers(0, 4),
    seed=st.integers(0, 3),
    steps=st.integers(1, 12),
    shift=st.booleans(),
    gamma=st.sampled_from([0.0, 1.0, 3.0]),
    again=st.integers(1, 4),
    committed=st.one_of(st.none(), st.integers(1, 6)),
)
def test_a_batch_is_its_rows_and_every_row_ends(ahead, behind, seed, steps, shift, gamma, again, committed):
    model = tiny_model("whisper", seed=seed, shift_logits=shift)
    options = {"active_ahead": ahead, "active_behind": behind, "max_denoising_steps": steps, "repair_rounds": 1}
    options |= {"gamma": gamma, "revise_above": 0.0, "revise_steps": again, "return_dict_in_generate": True}
    options["commit_ahead"] = committed
    features, mask = tiny_inputs("whisper")
    batch = model.generate(features, attention_mask=mask, **options)
    assert not (batch.sequences == MASK).any() and batch.nfe.max() <= steps
    for i in range(3):
        n = int(mask[i].sum())
        alone = model.generate(features[i : i + 1, :n], attention_mask=mask[i : i + 1, :n], **options)
        width = alone.sequences.shape[1]
        assert alone.sequences[0].tolist() == batch.sequences[i, :width].tolist()
        assert alone.nfe[0] == batch.nfe[i]


@pytest.mark.parametrize("value", [-0.1, 1.5, "high", True, float("nan")])
def test_bad_bounds_are_named(value):
    with pytest.raises(ValueError, match="`revise_above` must be"):
        transcribe(tiny_model("whisper"), revise_above=value)


def test_the_bound_is_kept_in_the_settings(tmp_path):
    model = tiny_model("whisper")
    model.generation_config.revise_above = 0.4
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.revise_above == 0.4
    # None is a wish of the caller.
    kept, _ = loaded._settle_generation_config(None, {"revise_above": None})
    assert kept.revise_above is None
