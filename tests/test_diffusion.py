# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights, masks and losses by hand, ISCT, and the objectives in the model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from tiny_models import ENCODERS, VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model

from mdm_asr_hf import diffusion_mdm_asr
from mdm_asr_hf.diffusion_mdm_asr import (
    T_MIN,
    DiffusionObjective,
    DraftObjective,
    block_targets,
    diffusion_objective,
    draft_loss,
    draw_frontiers,
    frame_loss,
    logit_loss,
    loss_weight,
    mask_tokens,
    masked_diffusion_loss,
    position_biased_masking,
    put_start,
    sample_timesteps,
    uniform_masking,
)

EOS, START, MASK = 1, VOCAB_SIZE, VOCAB_SIZE + 1
TARGETS = torch.tensor([[5, 6, 7, EOS, EOS, EOS], [8, 9, 10, 11, 4, EOS]])
CANVAS_MASK = torch.tensor([[True] * 6, [True] * 6])
LABELS = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, -100, -100, -100]])


def everywhere(tokens, timesteps):
    """The uniform masking probability of the linear schedule, at every position."""
    return timesteps[:, None].expand(tokens.shape)


def test_timesteps_are_uniform_above_zero_and_seeded():
    def draw():
        return sample_timesteps(20000, generator=torch.Generator().manual_seed(0))

    t = draw()
    assert T_MIN <= t.min() and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.var().item() == pytest.approx(1 / 12, abs=0.005)
    assert torch.equal(t, draw())
    # Those of a batch cover the range evenly.
    for seed in range(20):
        t = sample_timesteps(8, generator=torch.Generator().manual_seed(seed))
        # One in every eighth of (0, 1], in random order.
        assert sorted(((1 - t) / (1 - T_MIN) * 8).floor().int().tolist()) == list(range(8))
    orders = {tuple(sample_timesteps(4).argsort().tolist()) for _ in range(200)}
    assert len(orders) == 24


def test_masking_hits_each_token_with_its_probability():
    tokens = torch.arange(40000).reshape(4, 10000) % 7
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    generator = torch.Generator().manual_seed(1)
    noised, masked = mask_tokens(tokens, everywhere(tokens, t), mask_token_id=9, generator=generator)
    torch.testing.assert_close(masked.float().mean(-1), t, atol=0.015, rtol=0)
    assert masked[3].all()
    assert torch.equal(noised == 9, masked) and torch.equal(noised[~masked], tokens[~masked])
    again, _ = mask_tokens(tokens, everywhere(tokens, t), mask_token_id=9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noised, again)


# --- where to mask ---


def test_uniform_masking():
    canvas = torch.tensor([[True, True, True, False]])
    probability, weight = uniform_masking(torch.tensor([0.4]), canvas)
    torch.testing.assert_close(probability, torch.tensor([[0.4, 0.4, 0.4, 0.0]]))
    torch.testing.assert_close(weight, torch.tensor([[2.5, 2.5, 2.5, 0.0]]))


def test_position_biased_masking_by_hand():
    def masking(t):
        canvas = torch.ones(1, 6, dtype=torch.bool)
        return position_biased_masking(torch.tensor([t]), canvas, torch.tensor([4]))

    # n = 4 tokens of text, band w = 8: p_i(t) = clip((12 t - (3 - i)) / 8, 0, 1). In the band, p' = 12 / 8, and the
    # weight is p' / p; what lies behind the text is always masked, without weight.
    probability, weight = masking(0.5)
    torch.testing.assert_close(probability, torch.tensor([[0.375, 0.5, 0.625, 0.75, 1.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[4.0, 3.0, 2.4, 2.0, 0.0, 0.0]]))
    # At t = 0.9, 12 t = 10.8: the last two are masked for certain.
    probability, weight = masking(0.9)
    torch.testing.assert_close(probability, torch.tensor([[0.975, 1.0, 1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[1.5 / 0.975, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    # At t = 1 everything is masked, at t -> 0 nothing of the text.
    assert masking(1.0)[0].tolist() == [[1.0] * 6]
    assert masking(1e-4)[0].tolist()[0][:3] == [0.0] * 3


@pytest.mark.parametrize("is_biased", [False, True])
def test_every_position_of_the_text_counts_once_over_all_times(is_biased):
    # The integral over t of p(t) * weight(t) = p'(t) is p(1) - p(0) = 1: the loss is the same bound, however one
    # masks.
    times = (torch.arange(20000) + 0.5) / 20000
    canvas = torch.ones(len(times), 7, dtype=torch.bool)
    if is_biased:
        probability, weight = position_biased_masking(times, canvas, torch.full(times.shape, 5))
    else:
        probability, weight = uniform_masking(times, canvas)
    totals = (probability * weight).mean(0)
    torch.testing.assert_close(totals[:5], torch.ones(5), atol=2e-3, rtol=0)
    # Behind the text: once for uniform masks, never for position-biased ones.
    torch.testing.assert_close(totals[5:], torch.full((2,), float(not is_biased)), atol=2e-3, rtol=0)


def test_loss_by_hand():
    # Two rows of two positions, two tokens. p(target) is 0.5, 0.25 | 0.8, 0.1.
    probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.2, 0.8], [0.9, 0.1]]])
    targets = torch.tensor([[0, 0], [1, 1]])
    masked = torch.tensor([[True, True], [False, True]])
    # Row 0 at t = 0.5 (weight 2): 2 (ln 2 + ln 4); row 1 at t = 0.25 (weight 4): 4 ln 10; over 4 positions.
    loss = masked_diffusion_loss(probs.log(), targets, masked, loss_weight(torch.tensor([0.5, 0.25])))
    assert loss.item() == pytest.approx((2 * (math.log(2) + math.log(4)) + 4 * math.log(10)) / 4, rel=1e-6)
    # With the last position of row 0 outside its canvas there are three positions, and that one is not masked.
    canvas_mask = torch.tensor([[True, False], [True, True]])
    loss = masked_diffusion_loss(
        probs.log(), targets, masked & canvas_mask, loss_weight(torch.tensor([0.5, 0.25])), canvas_mask
    )
    assert loss.item() == pytest.approx((2 * math.log(2) + 4 * math.log(10)) / 3, rel=1e-6)


@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_visible_positions_have_no_gradient(seed, t):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 5, generator=generator, requires_grad=True)
    targets = torch.randint(0, 5, (2, 6), generator=generator)
    _, masked = mask_tokens(targets, torch.full((2, 6), t), mask_token_id=9, generator=generator)
    masked_diffusion_loss(logits, targets, masked, torch.full((2,), 1 / t)).backward()
    assert not logits.grad[~masked].any()
    assert logits.grad[masked].abs().sum(-1).gt(0).all()


def test_nothing_masked_gives_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    masked = torch.zeros(1, 3, dtype=torch.bool)
    loss = masked_diffusion_loss(logits, torch.zeros(1, 3, dtype=torch.long), masked, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# --- ISCT ---


class Decoder:
    """Predicts the same logits whatever it sees, and remembers what it saw."""

    def __init__(self, predictions, vocab_size=12, confidence=3.0):
        self.logits = torch.nn.functional.one_hot(torch.tensor(predictions), vocab_size).float() * confidence
        self.logits.requires_grad_()
        self.canvases = []

    def __call__(self, canvas):
        self.canvases.append(canvas)
        return self.logits


def run(decoder, objective, targets=TARGETS, canvas_mask=CANVAS_MASK, **kwargs):
    return diffusion_objective(decoder, targets, canvas_mask, objective, mask_token_id=99, eos_token_id=EOS, **kwargs)


# Wrong at position 1 of both rows.
WRONG = [[5, 2, 7, EOS, EOS, EOS], [8, 2, 10, 11, 4, EOS]]


def test_the_second_step_sees_the_models_own_wrong_tokens_and_is_scored_against_the_truth():
    decoder = Decoder(WRONG)
    times = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    out = run(decoder, DiffusionObjective(num_steps=2), timesteps=times, generator=torch.Generator().manual_seed(3))
    first, second = out.canvases
    assert (first == 99).all()
    masked = second == 99
    assert masked.any() and not masked.all()
    assert torch.equal(second[~masked], torch.tensor(WRONG)[~masked])
    assert (second[:, 1][~masked[:, 1]] == 2).any()  # a wrong token stays visible
    # Cross-entropies by hand: log(1 + 11 e^-3) for a right prediction, and 3 more for a wrong one.
    right = math.log(1 + 11 * math.exp(-3))
    losses = torch.full((2, 6), right)
    losses[:, 1] += 3
    torch.testing.assert_close(out.step_losses[0], losses.sum() / 12)
    torch.testing.assert_close(out.step_losses[1], (losses * masked).sum() / 12 / 0.5)
    torch.testing.assert_close(out.loss, out.step_losses.sum())
    assert out.step_accuracies[0].item() == pytest.approx(10 / 12)
    # What was visible is carried over.
    decoder = Decoder(WRONG)
    times = torch.tensor([[1e-3, 1e-3], [0.5, 0.5]])
    out = run(decoder, DiffusionObjective(num_steps=2), timesteps=times, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.canvases[0], TARGETS)
    visible = out.canvases[1] != 99
    assert torch.equal(out.canvases[1][visible], TARGETS[visible])


@each("num_steps", [1, 2, 3, 5])
def test_any_number_of_steps(num_steps):
    decoder = Decoder(WRONG)
    out = run(decoder, DiffusionObjective(num_steps=num_steps))
    assert len(decoder.canvases) == num_steps == len(out.step_losses) == len(out.canvases)
    torch.testing.assert_close(out.loss.detach(), out.step_losses.sum())


def test_position_biased_rows_are_visible_on_the_left(monkeypatch):
    monkeypatch.setattr(diffusion_mdm_asr, "BAND_WIDTH", 1.0)
    objective = DiffusionObjective(position_biased_share=1.0)
    for seed in range(10):
        canvas = run(Decoder(WRONG), objective, generator=torch.Generator().manual_seed(seed)).canvases[0]
        masked = canvas == 99
        assert (masked[0, 4:]).all()  # behind the first EOS
        # A mask has only masks on its right, but for the one position of the band.
        assert ((masked[:, :-1] & ~masked[:, 1:]).sum(-1) <= 1).all()
    half = DiffusionObjective(position_biased_share=0.5)
    rows = torch.tensor([[5, 6, 7, 8, EOS] + [EOS] * 40]).expand(400, -1)
    masked = (
        run(
            Decoder([[5] * 45] * 400),
            half,
            rows,
            torch.ones(400, 45, dtype=torch.bool),
            timesteps=torch.full((400,), 0.3),
        ).canvases[0]
        == 99
    )
    assert masked[:, 5:].all(-1).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_nonsense_raises():
    for settings, message in [
        (dict(num_steps=0), "`num_steps`"),
        (dict(position_biased_share=1.5), "`position_biased_share`"),
    ]:
        with pytest.raises(ValueError, match=message):
            DiffusionObjective(**settings)


# --- drafts ---


def test_the_loss_of_drafts_by_hand():
    # One text, two blocks of two places, a short list of the ids 2, 5 and 7 of nine.
    probs = torch.tensor([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], [[0.6, 0.2, 0.2], [0.25, 0.25, 0.5]]])
    # 5 at place 0; 7 at place 1; beyond the short list; beyond the text.
    targets = torch.tensor([[[5, 7], [8, -100]]])
    token_ids = torch.tensor([2, 5, 7])
    loss, share = draft_loss(probs.log()[None], targets, token_ids, 9)
    assert loss.item() == pytest.approx(-(math.log(0.5) + 0.75 * math.log(0.8)) / 1.75, rel=1e-5)
    assert share.item() == 1.0
    loss, share = draft_loss(probs.log()[None], torch.tensor([[[5, 7], [7, 2]]]), token_ids, 9)
    second = 0.75 * (math.log(0.8) + math.log(0.25))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.2) + second) / 3.5)
    assert share.item() == 0.5
    # Nothing that can be drafted is no loss, not NaN.
    loss, share = draft_loss(probs.log()[None], torch.full((1, 2, 2), -100), token_ids, 9)
    assert loss == 0 and share == 0


def test_frontiers_stand_at_every_position_of_a_text_and_have_its_targets():
    frontiers = draw_frontiers(torch.tensor([1, 3, 5]), 2, 500, torch.Generator().manual_seed(0))
    assert [sorted(set(row)) for row in frontiers.tolist()] == [[2], [2, 3, 4], [2, 3, 4, 5, 6]]
    again = draw_frontiers(torch.tensor([1, 3, 5]), 2, 500, torch.Generator().manual_seed(0))
    assert torch.equal(again, frontiers)
    # One more begins the text, and sees nothing.
    frontiers, visible = put_start(torch.tensor([[2, 1]]), 0, 4)
    assert frontiers.tolist() == [[0, 2, 1]]
    assert visible.int().tolist() == [[[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]]
    # What is behind them, by hand.
    sequences = torch.tensor([[60, 5, 6, 1, -100], [60, 7, 1, -100, -100]])
    targets = block_targets(sequences, torch.tensor([[0, 3], [1, 1]]), 2, -100)
    # A frontier's own token, the donor's next one, and the two that are drafted.
    assert targets.tolist() == [[[60, 5, 6, 1], [1, -100, -100, -100]], [[7, 1, -100, -100]] * 2]


def test_distances_of_frames_and_divergence_of_tokens_by_hand():
    frames = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [3.0, 1.0]], [[2.0, 0.0], [7.0, 7.0]]])
    # Of the first row both frames, of the second one: (0 + 4 + 0 + 9 + 4 + 0) / 6.
    assert frame_loss(frames, teacher, torch.tensor([2, 1])).item() == pytest.approx(17 / 6)

    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]]).log()
    token_ids = torch.tensor([[[1, 0], [3, 2]]])
    log_probs = torch.tensor([[[0.6, 0.3], [0.4, 0.3]]]).log()
    first = 0.6 * math.log(0.6 / 0.25) + 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / 0.25)
    is_text = torch.tensor([[True, False]])
    assert logit_loss(logits, token_ids, log_probs, is_text).item() == pytest.approx(first, rel=1e-5)
    # The second token is as the teacher has it.
    both = logit_loss(logits, token_ids, log_probs, torch.ones_like(is_text))
    assert both.item() == pytest.approx(first / 2, rel=1e-5)


def test_two_steps_of_drafts_show_the_second_what_the_first_drafted():
    model = tiny_drafts_model(dtype=torch.float32)
    features, mask = tiny_inputs()
    labels = torch.tensor([[5, 6, 7, 8, 9, 10, 1], [11, 12, 1, -100, -100, -100, -100], [14, 1, *[-100] * 5]])
    seen = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["frontiers"], kwargs["block_ids"])), with_kwargs=True
    )
    inputs = dict(input_features=features, attention_mask=mask, labels=labels)
    losses = {}
    for num_steps in (1, 2):
        objective = DraftObjective(num_steps=num_steps, donor_weight=0.0)
        losses[num_steps] = model(**inputs, objective=objective).loss
    losses[2].backward()
    assert model.get_decoder().drafts.offset_embeddings.weight.grad.abs().sum() > 0
    (first, masks), (again, _), (behind, hinted) = seen
    assert torch.equal(first, again) and losses[2] > 1.5 * losses[1]
    mask_id = model.config.mask_token_id
    assert (masks[..., 0] < mask_id).all() and (masks[..., 1:] == mask_id).all()
    moved = behind - first
    assert moved.min() >= 0 and moved.max() == 2 and (behind <= torch.tensor([[6], [2], [1]])).all()
    # Some blocks see what was drafted, as much as is left of it, and some nothing.
    counts = (hinted[..., 1:] < mask_id).sum(dim=-1)
    assert ((counts == 0) | (counts == (3 - moved).clamp(max=2))).all() and 0 < (counts > 0).float().mean() < 1
    # What follows the frontier is known in any case.
    sequences = torch.cat([torch.full((3, 1), START), labels], dim=1)
    assert torch.equal(hinted[..., 0], sequences.gather(1, behind + 1))


def test_nonsense_of_drafts_raises():
    for settings, message in [
        (dict(draft_weight=-1), "`draft_weight`"),
        (dict(draft_weight=float("nan")), "`draft_weight`"),
        (dict(num_steps=3), "`num_steps`"),
        (dict(donor_weight=0, draft_weight=0), "one weight at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            DraftObjective(**settings)


# --- in the model ---


@each("encoder", sorted(ENCODERS))
def test_all_steps_run_on_one_pass_of_the_encoder(encoder, monkeypatch):
    model = tiny_model(encoder).train()
    features, mask = tiny_inputs(encoder)
    calls = {"encode": 0, "keys": 0}
    encode, keys = type(model.model).encode, type(model.model.decoder).cross_attention_states

    def count(name, function):
        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(type(model.model), "encode", count("encode", encode))
    monkeypatch.setattr(type(model.model.decoder), "cross_attention_states", count("keys", keys))
    out = model(features, mask, labels=LABELS, objective=DiffusionObjective(num_steps=3))
    assert calls == {"encode": 1, "keys": 1}
    assert out.step_losses.shape == out.step_accuracies.shape == (3,) and out.loss.requires_grad
    out.loss.backward()
    assert model.model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0


# --- what carries over from the donor ---


def test_shifted_logits_are_read_one_position_earlier():
    model = tiny_model()
    features, mask = tiny_inputs(seconds=(1.0,))
    ids = torch.tensor([[START, 5, MASK, 7]])
    whole = model(features, mask, decoder_input_ids=ids).logits
    model.config.shift_logits = True
    kept = model(features, mask, decoder_input_ids=ids, logits_to_keep=3).logits
    torch.testing.assert_close(kept, whole[:, :-1])
    loss = model(features, mask, decoder_input_ids=ids, labels=torch.tensor([[5, 6, 7]])).loss
    torch.testing.assert_close(loss, -whole[0, 1].log_softmax(-1)[6] / 3)


def test_shifted_models_train_and_generate_alike(tmp_path):
    model = tiny_model(shift_logits=True)
    features, mask = tiny_inputs()
    model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 2.0, 6
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    objective = DiffusionObjective(num_steps=2)
    for _ in range(120):
        loss = model(features, mask, labels=torch.cat([LABELS, torch.full((3, 1), -100)], 1), objective=objective).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.shift_logits
    texts = [[i for i in row if i > 2] for row in loaded.generate(features, attention_mask=mask).tolist()]
    assert texts == [[5, 6, 7, 8], [9, 10], [11]]
