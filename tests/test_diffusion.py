import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm_asr_hf.diffusion_mdm_asr import (
    T_MIN,
    linear_alpha,
    linear_weight,
    mask_tokens,
    masked_diffusion_loss,
    sample_timesteps,
)


def test_linear_schedule():
    t = torch.tensor([0.25, 0.5, 1.0])
    torch.testing.assert_close(linear_alpha(t), torch.tensor([0.75, 0.5, 0.0]))
    torch.testing.assert_close(linear_weight(t), torch.tensor([4.0, 2.0, 1.0]))
    # -alpha' / (1 - alpha), by automatic differentiation.
    t.requires_grad_()
    (slope,) = torch.autograd.grad(linear_alpha(t).sum(), t)
    torch.testing.assert_close(linear_weight(t), -slope / (1 - linear_alpha(t)))


def test_timesteps_are_uniform_above_zero_and_seeded():
    t = sample_timesteps(20000, generator=torch.Generator().manual_seed(0))
    assert T_MIN <= t.min() and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.var().item() == pytest.approx(1 / 12, abs=0.005)
    assert torch.equal(t, sample_timesteps(20000, generator=torch.Generator().manual_seed(0)))


def test_masking_hits_each_token_with_probability_t():
    tokens = torch.arange(40000).reshape(4, 10000) % 7
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    noised, masked = mask_tokens(tokens, t, mask_token_id=9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(masked.float().mean(-1), t, atol=0.015, rtol=0)
    assert masked[3].all()
    assert torch.equal(noised == 9, masked) and torch.equal(noised[~masked], tokens[~masked])
    again, _ = mask_tokens(tokens, t, mask_token_id=9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noised, again)


def test_only_maskable_positions_are_masked():
    maskable = torch.tensor([[True, False, True]])
    _, masked = mask_tokens(torch.zeros(1, 3, dtype=torch.long), torch.ones(1), mask_token_id=9, maskable=maskable)
    assert torch.equal(masked, maskable)


def test_loss_by_hand():
    # Two rows of two positions, two tokens. p(target) is 0.5, 0.25 | 0.8, 0.1.
    probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.2, 0.8], [0.9, 0.1]]])
    targets = torch.tensor([[0, 0], [1, 1]])
    masked = torch.tensor([[True, True], [False, True]])
    # Row 0 at t = 0.5 (weight 2): 2 (ln 2 + ln 4); row 1 at t = 0.25 (weight 4): 4 ln 10; over 4 positions.
    loss = masked_diffusion_loss(probs.log(), targets, masked, linear_weight(torch.tensor([0.5, 0.25])))
    assert loss.item() == pytest.approx((2 * (math.log(2) + math.log(4)) + 4 * math.log(10)) / 4, rel=1e-6)
    # With the last position of row 0 outside its canvas there are three positions, and that one is not masked.
    canvas_mask = torch.tensor([[True, False], [True, True]])
    loss = masked_diffusion_loss(
        probs.log(), targets, masked & canvas_mask, linear_weight(torch.tensor([0.5, 0.25])), canvas_mask
    )
    assert loss.item() == pytest.approx((2 * math.log(2) + 4 * math.log(10)) / 3, rel=1e-6)


def test_at_t_one_it_is_the_plain_cross_entropy_over_the_canvas():
    logits, targets = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    _, masked = mask_tokens(targets, torch.ones(3), mask_token_id=9)
    loss = masked_diffusion_loss(logits, targets, masked, linear_weight(torch.ones(3)))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_visible_positions_have_no_gradient(seed, t):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 5, generator=generator, requires_grad=True)
    targets = torch.randint(0, 5, (2, 6), generator=generator)
    _, masked = mask_tokens(targets, torch.full((2,), t), mask_token_id=9, generator=generator)
    masked_diffusion_loss(logits, targets, masked, torch.full((2,), 1 / t)).backward()
    assert not logits.grad[~masked].any()
    assert logits.grad[masked].abs().sum(-1).gt(0).all()


def test_the_weighted_loss_has_the_same_expectation_at_every_t():
    # A fixed prediction: E over masks of 1/t * sum over masked CE is the sum of all CE, whatever t is.
    logits, targets = torch.randn(1, 8, 4), torch.randint(0, 4, (1, 8))
    plain = torch.nn.functional.cross_entropy(logits[0], targets[0])
    num_draws = 20000
    for t in (0.2, 0.6):
        rows = targets.expand(num_draws, -1)
        times = torch.full((num_draws,), t)
        _, masked = mask_tokens(rows, times, mask_token_id=9, generator=torch.Generator().manual_seed(3))
        loss = masked_diffusion_loss(logits.expand(num_draws, -1, -1), rows, masked, linear_weight(times))
        assert loss.item() == pytest.approx(plain.item(), rel=0.02)


def test_nothing_masked_gives_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    masked = torch.zeros(1, 3, dtype=torch.bool)
    loss = masked_diffusion_loss(logits, torch.zeros(1, 3, dtype=torch.long), masked, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
