import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm_asr_hf.diffusion_mdm_asr import (
    SCHEDULES,
    T_MIN,
    CosineSchedule,
    LinearSchedule,
    LogLinearSchedule,
    PositionBiasedMasking,
    UniformMasking,
    make_schedule,
    mask_tokens,
    masked_diffusion_loss,
    masking_probability,
    sample_timesteps,
)


def linear_weight(timesteps):
    return LinearSchedule().weight(timesteps)


def everywhere(tokens, timesteps):
    """The uniform masking probability of the linear schedule, at every position."""
    return timesteps[:, None].expand(tokens.shape)


@pytest.mark.parametrize(
    "schedule, alphas, weights",
    [
        (LinearSchedule(), [0.75, 0.5, 0.0], [4.0, 2.0, 1.0]),
        # 1 - cos(pi/2 * 0.75) = 0.6173, 1 - cos(pi/4) = 0.2929, 0; pi/2 tan(pi/2 * 0.75) = 3.7922, pi/2, 0.
        (CosineSchedule(), [0.61732, 0.29289, 0.0], [3.79224, 1.57080, 0.0]),
        (LogLinearSchedule(eps=0.1), [0.775, 0.55, 0.1], [4.0, 2.0, 1.0]),
    ],
)
def test_schedules(schedule, alphas, weights):
    t = torch.tensor([0.25, 0.5, 1.0], requires_grad=True)
    torch.testing.assert_close(schedule.alpha(t), torch.tensor(alphas), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(schedule.weight(t), torch.tensor(weights), atol=1e-5, rtol=1e-5)
    # -alpha' / (1 - alpha), by automatic differentiation.
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - schedule.alpha(t)), atol=1e-5, rtol=1e-5)


def test_names():
    assert {name: type(make_schedule(name)) for name in SCHEDULES} == SCHEDULES
    assert make_schedule("log-linear") == LogLinearSchedule()
    with pytest.raises(ValueError, match="`schedule` 'quadratic' is unknown.*cosine"):
        make_schedule("quadratic")
    with pytest.raises(ValueError, match="`width` must be positive"):
        PositionBiasedMasking(0)


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_timesteps_are_uniform_above_zero_and_seeded(low_discrepancy):
    def draw():
        return sample_timesteps(20000, low_discrepancy=low_discrepancy, generator=torch.Generator().manual_seed(0))

    t = draw()
    assert T_MIN <= t.min() and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.var().item() == pytest.approx(1 / 12, abs=0.005)
    assert torch.equal(t, draw())


def test_low_discrepancy_times_cover_the_range_evenly():
    for seed in range(20):
        t = sample_timesteps(8, low_discrepancy=True, generator=torch.Generator().manual_seed(seed))
        # One in every eighth of (0, 1], in random order.
        assert sorted(((1 - t) / (1 - T_MIN) * 8).floor().int().tolist()) == list(range(8))
    orders = {tuple(sample_timesteps(4, low_discrepancy=True).argsort().tolist()) for _ in range(200)}
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


def probabilities(t, masking, schedule="linear", canvas=(True,) * 6, text_length=4):
    return masking_probability(
        torch.tensor([t]),
        torch.tensor([canvas]),
        torch.tensor([text_length]),
        schedule=make_schedule(schedule),
        masking=masking,
    )


def test_uniform_masking():
    probability, weight = probabilities(0.4, UniformMasking(), canvas=(True, True, True, False))
    torch.testing.assert_close(probability, torch.tensor([[0.4, 0.4, 0.4, 0.0]]))
    torch.testing.assert_close(weight, torch.tensor([[2.5, 2.5, 2.5, 0.0]]))


def test_position_biased_masking_by_hand():
    # n = 4 tokens of text, band w = 2: p_i(s) = clip((6 s - (3 - i)) / 2, 0, 1). At s = 0.5: (-0, .5, 1, 1.5) -> 0,
    # 0.5, 1, 1. In the band, p' = 6 / 2 = 3, so the weight is 3 / 0.5 = 6; what lies behind the text is always masked,
    # without weight.
    probability, weight = probabilities(0.5, PositionBiasedMasking(2.0))
    torch.testing.assert_close(probability, torch.tensor([[0.0, 0.5, 1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[0.0, 6.0, 0.0, 0.0, 0.0, 0.0]]))
    # At t = 1 everything is masked, at t -> 0 nothing of the text.
    assert probabilities(1.0, PositionBiasedMasking(2.0))[0].tolist() == [[1.0] * 6]
    assert probabilities(1e-4, PositionBiasedMasking(2.0))[0].tolist()[0][:3] == [0.0] * 3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("masking", [UniformMasking(), PositionBiasedMasking(3.0)])
def test_every_position_of_the_text_counts_once_over_all_times(schedule, masking):
    # The integral over t of p(t) * weight(t) = p'(t) is p(1) - p(0) = 1: the loss is the same bound, however one
    # masks.
    times = (torch.arange(20000) + 0.5) / 20000
    num = len(times)
    probability, weight = masking_probability(
        times,
        torch.ones(num, 7, dtype=torch.bool),
        torch.full((num,), 5),
        schedule=make_schedule(schedule),
        masking=masking,
    )
    totals = (probability * weight).mean(0)
    torch.testing.assert_close(totals[:5], torch.ones(5), atol=2e-3, rtol=0)
    # Behind the text: once for uniform masks, never for position-biased ones.
    torch.testing.assert_close(totals[5:], torch.full((2,), float(masking == UniformMasking())), atol=2e-3, rtol=0)


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
    _, masked = mask_tokens(targets, torch.ones(3, 5), mask_token_id=9)
    loss = masked_diffusion_loss(logits, targets, masked, linear_weight(torch.ones(3)))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_visible_positions_have_no_gradient(seed, t):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 5, generator=generator, requires_grad=True)
    targets = torch.randint(0, 5, (2, 6), generator=generator)
    _, masked = mask_tokens(targets, torch.full((2, 6), t), mask_token_id=9, generator=generator)
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
        generator = torch.Generator().manual_seed(3)
        _, masked = mask_tokens(rows, everywhere(rows, times), mask_token_id=9, generator=generator)
        loss = masked_diffusion_loss(logits.expand(num_draws, -1, -1), rows, masked, linear_weight(times))
        assert loss.item() == pytest.approx(plain.item(), rel=0.02)


def test_nothing_masked_gives_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    masked = torch.zeros(1, 3, dtype=torch.bool)
    loss = masked_diffusion_loss(logits, torch.zeros(1, 3, dtype=torch.long), masked, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
