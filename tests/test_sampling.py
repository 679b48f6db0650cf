import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from mdm_asr_hf.sampling_mdm_asr import (
    SAMPLERS,
    ConfTopKSampler,
    DFMSampler,
    EBConfSampler,
    PBEBConfSampler,
    RandomSampler,
    Sampler,
    make_sampler,
    propose_tokens,
)

MASK = 9
# Four positions, three tokens. Entropies in nats, by hand:
#   0: -(0.7 ln 0.7 + 0.2 ln 0.2 + 0.1 ln 0.1)     = 0.8018
#   1: -(0.9 ln 0.9 + 2 * 0.05 ln 0.05)            = 0.3944
#   2: -(0.98 ln 0.98 + 2 * 0.01 ln 0.01)          = 0.1119
#   3: -(0.6 ln 0.6 + 0.3 ln 0.3 + 0.1 ln 0.1)     = 0.8979
PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.01, 0.01, 0.98], [0.3, 0.6, 0.1]])
LOGITS = PROBS.log()[None]
CANVAS = torch.full((1, 4), MASK)


def committed(sampler, *, logits=LOGITS, canvas=CANVAS, candidates=None, steps_left=10, **kwargs):
    """The positions committed in the first row."""
    candidates = canvas == MASK if candidates is None else candidates
    out = sampler.step(logits[candidates], canvas, candidates, steps_left=steps_left, **kwargs)
    return out.committed[0].nonzero().flatten().tolist()


def noise_at(*positions):
    """Position noise of the given values; token noise is not used by greedy steps."""
    return torch.stack([torch.zeros(len(positions)), torch.tensor(positions)], dim=-1)[None]


def test_tokens_confidences_and_entropies():
    tokens, log_confidence, entropy = propose_tokens(LOGITS[0])
    assert tokens.tolist() == [0, 1, 2, 1]
    torch.testing.assert_close(log_confidence.exp(), torch.tensor([0.7, 0.9, 0.98, 0.6]))
    torch.testing.assert_close(entropy, torch.tensor([0.8018, 0.3944, 0.1119, 0.8979]), atol=1e-4, rtol=0)
    # A suppressed token leaves the entropy finite.
    _, log_confidence, entropy = propose_tokens(torch.tensor([[0.0, 0.0, -torch.inf]]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2)]))
    assert log_confidence.exp().item() == pytest.approx(0.5)


NOISE = noise_at(0.9, 0.1, 0.8, 0.3)
NEARLY_EQUAL = torch.tensor([8.0, 0.0, 0.0]).expand(1, 4, 3) + torch.tensor([0.0, 3e-6, 1e-6, 2e-6])[None, :, None]


@each(
    "sampler, arguments, expected",
    [
        # By confidence the order is 2, 1, 0, 3. sum(H) - max(H) of the prefixes:
        #   2: 0;   2,1: 0.5063 - 0.3944 = 0.1119;   2,1,0: 1.3081 - 0.8018 = 0.5063;   all: 2.2060 - 0.8979 = 1.3081
        (EBConfSampler(gamma=0.0), {}, [2]),
        (EBConfSampler(gamma=0.05), {}, [2]),
        (EBConfSampler(gamma=0.111), {}, [2]),
        (EBConfSampler(gamma=0.113), {}, [1, 2]),
        (EBConfSampler(gamma=0.6), {}, [0, 1, 2]),
        (EBConfSampler(gamma=1.30), {}, [0, 1, 2]),
        (EBConfSampler(gamma=1.31), {}, [0, 1, 2, 3]),
        # With lambda = 0.2 the biased confidences are 0.7, 0.9 e^-0.2 = 0.7369, 0.98 e^-0.4 = 0.6569,
        # 0.6 e^-0.6 = 0.3293: order 1, 0, 2, 3.
        #   1: 0;   1,0: 1.1962 - 0.8018 = 0.3944;   1,0,2: 1.3081 - 0.8018 = 0.5063
        (PBEBConfSampler(gamma=0.05, lambda_=0.2), {}, [1]),
        (PBEBConfSampler(gamma=0.39, lambda_=0.2), {}, [1]),
        (PBEBConfSampler(gamma=0.4, lambda_=0.2), {}, [0, 1]),
        (PBEBConfSampler(gamma=0.51, lambda_=0.2), {}, [0, 1, 2]),
        # An infinite bias goes from left to right.
        #   0: 0;   0,1: 1.1962 - 0.8018 = 0.3944;   0,1,2: 1.3081 - 0.8018 = 0.5063;   all: 1.3081
        (PBEBConfSampler(gamma=0.0, lambda_=None), {}, [0]),
        (PBEBConfSampler(gamma=0.39, lambda_=None), {}, [0]),
        (PBEBConfSampler(gamma=0.4, lambda_=None), {}, [0, 1]),
        (PBEBConfSampler(gamma=1.3, lambda_=None), {}, [0, 1, 2]),
        (PBEBConfSampler(gamma=0.0, lambda_=None), {"candidates": torch.tensor([[False, True, True, True]])}, [1]),
        (ConfTopKSampler(k=1), {}, [2]),
        (ConfTopKSampler(k=3), {}, [0, 1, 2]),
        # Without k, four positions over two steps are two a step, over three steps ceil(4 / 3) = 2.
        (ConfTopKSampler(), {"steps_left": 2}, [1, 2]),
        (ConfTopKSampler(), {"steps_left": 3}, [1, 2]),
        # An even share, by noise.
        (RandomSampler(), {"steps_left": 2, "noise": NOISE}, [1, 3]),
        (RandomSampler(), {"steps_left": 4, "noise": NOISE}, [1]),
        # Four steps left: a position jumps if its noise is below 1 / 4; where none is, the lowest.
        (DFMSampler(), {"steps_left": 4, "noise": noise_at(0.2, 0.9, 0.24, 0.3)}, [0, 2]),
        (DFMSampler(), {"steps_left": 4, "noise": noise_at(0.5, 0.9, 0.4, 0.6)}, [2]),
        # Confidences that round to the same go from left to right.
        (ConfTopKSampler(k=1), {"logits": NEARLY_EQUAL}, [0]),
        (EBConfSampler(gamma=0.0), {"logits": NEARLY_EQUAL}, [0]),
    ],
)
def test_what_is_committed_by_hand(sampler, arguments, expected):
    assert committed(sampler, **arguments) == expected


def test_pbeb_conf_does_not_underflow_on_a_long_canvas():
    # exp(-0.2 * 600) = 7e-53 is 0 in fp32: a product would make all far positions tie.
    logits = torch.zeros(1, 700, 3)
    logits[0, 690, 1] = 5.0
    canvas = torch.full((1, 700), MASK)
    candidates = torch.zeros(1, 700, dtype=torch.bool)
    candidates[0, [680, 690]] = True
    # 690 is 10 further right (a factor e^-2) but its confidence is 0.987 against 0.333 (a factor e^1.09): 680 goes
    # first.
    assert committed(PBEBConfSampler(gamma=0.0), logits=logits, canvas=canvas, candidates=candidates) == [680]
    assert committed(PBEBConfSampler(gamma=0.0, lambda_=0.1), logits=logits, canvas=canvas, candidates=candidates) == [
        690
    ]


@each("name", sorted(SAMPLERS))
def test_the_last_step_commits_all_candidates_and_leaves_finished_rows_alone(name):
    assert committed(make_sampler(name), steps_left=1, noise=torch.rand(1, 4, 2)) == [0, 1, 2, 3]
    canvas = torch.tensor([[MASK, 0, MASK, MASK], [1, 2, 0, 1]])
    candidates = torch.tensor([[True, True, False, True], [True] * 4])
    candidates &= canvas == MASK
    logits = LOGITS.expand(2, -1, -1)[candidates]
    out = make_sampler(name).step(logits, canvas, candidates, steps_left=1, noise=torch.rand(2, 4, 2))
    assert out.committed.tolist() == [[True, False, False, True], [False] * 4]
    assert out.canvas.tolist() == [[0, 0, MASK, 1], [1, 2, 0, 1]]


def test_temperature_draws_the_distribution_by_inverse_transform():
    # Cumulative probabilities of position 0 are 0.7, 0.9, 1.0; of position 1: 0.05, 0.95, 1.0; and so on.
    noise = torch.tensor([0.85, 0.02, 0.999, 0.3])
    tokens, log_confidence, _ = propose_tokens(LOGITS[0], 1.0, noise)
    assert tokens.tolist() == [1, 0, 2, 1]
    torch.testing.assert_close(log_confidence.exp(), torch.tensor([0.2, 0.05, 0.98, 0.6]))
    # A low temperature sharpens: 0.7^10 : 0.2^10 leaves nothing to the second token.
    assert propose_tokens(LOGITS[0], 0.1, noise)[0].tolist() == [0, 1, 2, 1]

    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    tokens, *_ = propose_tokens(LOGITS[0, :1].expand(20000, 3), 1.0, noise)
    shares = torch.bincount(tokens, minlength=3) / 20000
    torch.testing.assert_close(shares, PROBS[0], atol=0.012, rtol=0)


def test_names_and_settings():
    assert make_sampler("PBEB-Conf") == PBEBConfSampler(gamma=0.05, lambda_=0.2)
    assert make_sampler("Conf Top-K", k=2) == ConfTopKSampler(k=2)
    assert make_sampler(PBEBConfSampler(gamma=0.3), lambda_=0.1) == PBEBConfSampler(gamma=0.3, lambda_=0.1)
    for config in (RandomSampler(), DFMSampler(), ConfTopKSampler(k=5), EBConfSampler(0.3), PBEBConfSampler(0.1, 0.4)):
        assert make_sampler(config.to_dict()) == config


def test_a_sampler_of_ones_own():
    class Last(Sampler):
        """The last candidate."""

        name = "last"

        def choose(self, choice):
            return choice.best(torch.arange(choice.candidates.shape[-1]).expand(choice.candidates.shape).float(), 1)

    assert make_sampler(Last()) == Last() and committed(Last()) == [3]


@each(
    "call, message",
    [
        (lambda: make_sampler("beam"), "`sampler` 'beam' is unknown"),
        (lambda: make_sampler("random", gamma=0.1), "gamma.*not settings of the sampler 'random'"),
        (lambda: EBConfSampler(gamma=-0.1), "`gamma` must be .*got -0.1"),
        (lambda: EBConfSampler(gamma=float("nan")), "`gamma` must be .*got nan"),
        (lambda: PBEBConfSampler(lambda_=-1), "`lambda_` must be .*got -1"),
        (lambda: PBEBConfSampler(lambda_=float("inf")), "`lambda_` must be finite"),
        (lambda: ConfTopKSampler(k=0), "`k` must be"),
        (lambda: committed(EBConfSampler(), steps_left=0), "`steps_left`"),
        (lambda: committed(RandomSampler()), "`noise` .*sampler .random. at temperature 0.0"),
        (lambda: committed(EBConfSampler(), temperature=1.0), "`noise` .*sampler .eb_conf. at temperature 1.0"),
        (
            lambda: make_sampler("eb_conf").step(LOGITS[0, :3], CANVAS, CANVAS == MASK, steps_left=2),
            "`logits` are of 3 positions, but 4 are candidates",
        ),
    ],
)
def test_what_makes_no_sense_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- properties, on random logits and canvases ---


@st.composite
def states(draw):
    """Random logits, sharp to flat, and a canvas partly committed."""
    batch, length, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(batch, length, vocab, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0, 50.0]))
    share = draw(st.sampled_from([0.0, 0.3, 0.8]))
    keep = torch.rand(batch, length, generator=generator) < share
    canvas = torch.where(keep, torch.randint(0, vocab, (batch, length), generator=generator), 99)
    return logits, canvas, torch.rand(batch, length, 2, generator=generator)


def step(sampler, state, steps_left=5, temperature=0.0):
    logits, canvas, noise = state
    candidates = canvas == 99
    return sampler.step(
        logits[candidates], canvas, candidates, steps_left=steps_left, temperature=temperature, noise=noise
    )


@given(states(), st.sampled_from(sorted(SAMPLERS)), st.integers(1, 40), st.sampled_from([0.0, 0.7]))
def test_at_least_one_commit_per_unfinished_row_and_no_committed_token_changes(state, name, steps_left, temperature):
    _, canvas, _ = state
    out = step(make_sampler(name), state, steps_left, temperature)
    unfinished = (canvas == 99).any(dim=-1)
    assert torch.equal(out.committed.any(dim=-1), unfinished)
    assert not (out.committed & (canvas != 99)).any()
    assert torch.equal(out.canvas[canvas != 99], canvas[canvas != 99])
    assert (out.canvas[out.committed] != 99).all()
    assert ((out.confidence >= 0) & (out.confidence <= 1 + 1e-6)).all()
    assert not out.confidence[canvas != 99].any()


@given(states(), st.sampled_from(["eb_conf", "pbeb_conf"]), st.floats(0, 3), st.floats(0, 3))
def test_a_larger_gamma_commits_a_superset_from_one_token_to_all(state, name, a, b):
    low, high = sorted([a, b])
    none, fewer, more, every = (
        step(make_sampler(name, gamma=gamma), state).committed for gamma in (0.0, low, high, math.inf)
    )
    assert not (fewer & ~more).any()
    masked = state[1] == 99
    assert torch.equal(none.sum(-1), masked.any(-1).long()) and torch.equal(every, masked)


@given(states(), st.floats(0, 2))
def test_pbeb_without_bias_is_eb(state, gamma):
    biased, plain = step(PBEBConfSampler(gamma, lambda_=0.0), state), step(EBConfSampler(gamma), state)
    assert torch.equal(biased.committed, plain.committed) and torch.equal(biased.canvas, plain.canvas)


@given(states(), st.sampled_from(sorted(SAMPLERS)))
def test_rows_do_not_influence_each_other(state, name):
    logits, canvas, noise = state
    whole = step(make_sampler(name), state)
    for row in range(len(canvas)):
        alone = step(make_sampler(name), (logits[row : row + 1], canvas[row : row + 1], noise[row : row + 1]))
        assert torch.equal(alone.canvas[0], whole.canvas[row])
