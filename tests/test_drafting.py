"""One step of verified drafts, on hand-made trees, logits and entropies."""

import math

import numpy as np
import pytest
import torch

from mdm_asr_hf.configuration_mdm_asr import MDMASRDecoderConfig
from mdm_asr_hf.decoder_mdm_asr import MDMASRDrafts, entropy
from mdm_asr_hf.diffusion_mdm_asr import lay_blocks, lay_hints
from mdm_asr_hf.drafting_mdm_asr import (
    DraftAllowance,
    DraftTree,
    Hypothesis,
    choose_tokens,
    cut_drafts,
    entropy_bounded_length,
    gumbel_noise,
    log_probs_of,
)

PADDING = 99


def lay(tokens, lengths, num_cached, *branches):
    drafts = [(np.array(ids), np.array(counts)) for ids, counts in branches]
    return DraftTree.lay(np.array(tokens), np.array(lengths), np.array(num_cached), drafts, PADDING)


# Two rows: three committed tokens, of which one has no keys yet, and two of two. Branches of up to 2 and 1 drafts.
TOKENS = [[5, 6, 7], [8, 9, 0]]


def two_rows():
    return lay(TOKENS, [3, 2], [2, 1], ([[10, 11], [12, 0]], [2, 1]), ([[20], [21]], [1, 1]))


def test_blocks_and_drafts_by_hand():
    blocks = lay_blocks(torch.tensor([[5, 6]]), 3, 99)
    assert blocks.tolist() == [[[5, 99, 99], [6, 99, 99]]]
    # Drafts stand from two places behind their frontier on: a block one token on sees the second in its first mask's
    # place, and three tokens on there is nothing left.
    drafts = torch.tensor([[[11, 12, 13], [21, 99, 99]]])
    assert lay_hints(blocks, drafts, torch.tensor([[1, 1]])).tolist() == [[[5, 12, 13], [6, 99, 99]]]
    assert lay_hints(blocks, drafts, torch.tensor([[2, 3]])).tolist() == [[[5, 13, 99], [6, 99, 99]]]

    # Embeddings are one-hot, and the head says behind a token t that t + 1 follows.
    drafts = MDMASRDrafts(MDMASRDecoderConfig(vocab_size=6, hidden_size=6, num_attention_heads=1, draft_length=4))
    drafts.head.forward = lambda states, before, before_that: 50.0 * before.roll(1, dims=-1) + 0.1 * before_that
    weight, states = torch.eye(6), torch.zeros(2, 4, 6)
    known = torch.eye(6)[torch.tensor([[0, 4], [1, 0]])]
    ids, log_probs = drafts.draft(states, known, weight, None, weight)
    assert ids.tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]] and entropy(log_probs).max() < 1e-6
    # Of a short list: 3 is not on it, and what follows is whatever the list has.
    drafts.head.token_ids = torch.tensor([1, 2, 5])
    few = weight[[1, 2, 5]]
    ids, _ = drafts.draft(states, known, few, torch.tensor([0.0, 0.0, 0.5]), few)
    assert ids[0, :2].tolist() == [1, 2] and set(ids.flatten().tolist()) <= {1, 2, 5}
    # Six equally likely tokens.
    drafts.head.forward = lambda states, before, before_that: torch.zeros_like(states)
    drafts.head.token_ids = torch.arange(6)
    entropies = entropy(drafts.draft(states, known, weight, None, weight)[1])
    torch.testing.assert_close(entropies, torch.full((2, 4), math.log(6)))


def test_a_tree_by_hand():
    tree = two_rows()
    assert tree.num_committed == 1 and tree.read_from == 0
    assert tree.ids.tolist() == [[7, 10, 11, 20], [9, 12, 0, 21]]
    # Both branches go on from the same position; their keys stand side by side.
    assert tree.positions.tolist() == [[2, 3, 4, 3], [1, 2, 0, 2]]
    assert tree.slots.tolist() == [[2, 3, 4, 5], [1, 2, PADDING, 4]]

    visible = two_rows().visible
    seen = [[[slot for slot in range(6) if row[slot]] for row in rows] for rows in visible.tolist()]
    assert seen[0] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5]]
    # The padding of the shorter branch sees the first slot, so that it is no NaN.
    assert seen[1] == [[0, 1], [0, 1, 2], [0], [0, 1, 4]]

    tree = lay([[5, 6, 7], [8, 0, 0]], [3, 1], [0, 0], ([[10], [11]], [1, 1]))
    assert tree.num_committed == 3 and tree.read_from == 2
    assert tree.ids[0].tolist() == [5, 6, 7, 10] and tree.ids[1, 2:].tolist() == [8, 11]
    assert tree.slots.tolist() == [[0, 1, 2, 3], [PADDING, PADDING, 0, 1]]
    assert tree.visible[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert tree.visible[1, 2:].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_drafts_are_accepted_from_the_left_and_the_longer_branch_wins():
    for chosen, number, branch, path, of_branch in [
        # Behind the last token, behind 10, behind 11, behind 20.
        ([1, 2, 3, 4], 0, 0, [0], [0, 0]),
        ([10, 2, 3, 4], 1, 0, [0, 1], [1, 0]),
        ([10, 11, 3, 4], 2, 0, [0, 1, 2], [2, 0]),
        # A token that is right does not count behind one that is wrong.
        ([1, 11, 3, 4], 0, 0, [0], [0, 0]),
        ([20, 2, 3, 4], 1, 1, [0, 3], [0, 1]),
    ]:
        accepted = two_rows().accept(np.array([chosen, [0, 0, 0, 0]]))
        assert accepted.num_accepted.tolist() == [number, 0]
        assert number == 0 or accepted.branch[0] == branch
        assert accepted.path[0].tolist() == path
        assert [int(one[0]) for one in accepted.of_branch] == of_branch

    tree = lay([[5]], [1], [0], ([[10, 0]], [1]), ([[10]], [1]))
    accepted = tree.accept(np.array([[10, 0, 0, 0]]))
    # The second draft of the first branch is padding, though the donor says 0 behind the first.
    assert accepted.num_accepted.tolist() == [1] and accepted.branch.tolist() == [0]
    assert [int(one[0]) for one in accepted.of_branch] == [1, 1]

    accepted = lay([[5]], [1], [0]).accept(np.array([[7]]))
    assert accepted.num_accepted.tolist() == [0] and accepted.path.tolist() == [[0]] and accepted.of_branch == []


def test_the_entropy_bound_by_hand():
    for gamma, length in [(0.0, 1), (0.09, 1), (0.1001, 2), (0.5, 3), (0.61, 4), (1.2, 5), (math.inf, 5)]:
        entropies = np.array([[0.1, 0.3, 0.5, 0.2, 0.5]])
        assert entropy_bounded_length(entropies, gamma).tolist() == [length]

    assert entropy_bounded_length(np.zeros((2, 4)), 0.0).tolist() == [1, 1]
    assert entropy_bounded_length(np.zeros((2, 4)), 1e-9).tolist() == [4, 4]

    ids, sure = np.array([[2, 3, 5, 4], [2, 3, 4, 6]]), np.zeros((2, 4))
    cut, counts = cut_drafts(ids, sure, np.array([4, 3]), math.inf, 5)
    # Behind an end of text nothing is proposed.
    assert counts.tolist() == [3, 3] and cut.tolist() == [[2, 3, 5], [2, 3, 4]]
    assert cut_drafts(ids, sure, np.array([4, 0]), math.inf, 5)[1].tolist() == [3, 0]
    # Six tokens equally likely are log 6 nats each: within 2 log 6, three of them, the largest left out.
    unsure = np.full((1, 4), math.log(6))
    assert cut_drafts(ids[1:], unsure, np.array([4]), 2 * math.log(6) + 1e-4, 5)[1].tolist() == [3]
    assert cut_drafts(ids[1:], unsure, np.array([4]), 2 * math.log(6) - 1e-4, 5)[1].tolist() == [2]


def test_an_allowance_falls_to_none_and_comes_back():
    allowance, row = DraftAllowance(2, 1), np.array([0])
    assert allowance.limits(0, 8).tolist() == [8, 8] and allowance.limits(0, 3).tolist() == [3, 3]
    asked = []
    for _ in range(31):
        limit = allowance.limits(0, 8)[:1]
        asked.append(int(limit[0]))
        allowance.note(row, 0, limit, np.array([0]))
    # Means 0.6, 0.42, 0.29, 0.21: useless by the fourth, two are tried once more after 8 evaluations, and after 16.
    assert asked == [8] * 3 + [0] * 8 + [2] + [0] * 16 + [2] + [0] * 2
    # Five evaluations lowered the mean; two drafts that are right bring all back.
    assert float(allowance.mean[0, 0]) == pytest.approx(0.6 * 0.7**5)
    allowance.note(row, 0, np.array([2]), np.array([2]))
    assert float(allowance.mean[0, 0]) == pytest.approx(0.6 * 0.7**6 + 0.3 * 2)
    assert allowance.limits(0, 8).tolist() == [8, 8]


def test_noise_and_drawn_tokens_have_their_distribution():
    seeds, positions = np.array([3, 4]), np.array([[7, 8, 9], [7, 8, 9]])
    noise = gumbel_noise(seeds, positions, 50)
    assert np.array_equal(noise[1:, 1:2], gumbel_noise(np.array([4]), np.array([[8]]), 50))
    assert np.array_equal(noise[..., :20], gumbel_noise(seeds, positions, 20))
    assert len({tuple(row) for rows in noise.tolist() for row in rows}) == 6

    noise = gumbel_noise(np.arange(20), np.arange(50)[None].repeat(20, axis=0), 100)
    # Mean is Euler's constant, the variance pi^2 / 6; 100,000 numbers.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)

    logits, temperature, number = np.array([2.0, 1.0, 0.0, -1.0]), 0.7, 20_000
    positions = np.arange(number)[None]
    tokens = choose_tokens(logits[None, None].repeat(number, 1), temperature, np.array([12345]), positions)
    expected = np.exp(logits / temperature)
    expected *= number / expected.sum()
    chi_square = float(((np.bincount(tokens[0], minlength=4) - expected) ** 2 / expected).sum())
    # Three degrees of freedom: 16.3 is passed by chance once in a thousand seeds, and this one is fixed.
    assert chi_square < 16.3

    for make in [np.array, torch.tensor]:
        assert choose_tokens(make([[[1.0, 3.0, 3.0]]])).tolist() == [[1]]
        logits = make([[[0.0, math.log(3), -math.inf], [0.0, 0.0, 0.0]]])
        log_probs = log_probs_of(logits, np.zeros(3, int), np.array([1, 0, 0]), np.array([2, 1, 0]))
        np.testing.assert_allclose(log_probs, [math.log(1 / 3), math.log(3 / 4), math.log(1 / 4)], rtol=1e-5)


# Logits as they come from a CPU, and as from a GPU.


# The hypothesis.


def test_a_hypothesis_proposes_what_is_left_and_its_end():
    for draft, committed, rest in [
        ([4, 5, 6, 7, 8], [], [4, 5, 6, 7, 8]),
        ([4, 5, 6, 7, 8], [4], [5, 6, 7, 8]),
        ([4, 5, 6, 7, 8], [4, 5, 6], [7, 8]),
        # A wrong token, one too many, one missing: what follows goes on.
        ([4, 9, 6, 7, 8], [4, 5, 6], [7, 8]),
        ([4, 5, 5, 6, 7, 8], [4, 5, 6], [7, 8]),
        ([4, 6, 7, 8], [4, 5, 6], [7, 8]),
        ([4, 5, 6], [4, 5, 6], []),
        ([], [4, 5, 6], []),
    ]:
        one_by_one, at_once = Hypothesis(draft, eos_token_id=0), Hypothesis(draft, eos_token_id=0)
        for token_id in committed:
            one_by_one.advance([token_id])
        at_once.advance(committed)
        assert one_by_one.propose(9) == at_once.propose(9) == [*rest, 0]

    draft = Hypothesis([4, 5, 6, 7], eos_token_id=0)
    assert draft.propose(3) == [4, 5, 6]
    draft.advance([4])
    draft.advance([9])
    # It may stand for 5 or before it: the longer rest is proposed.
    assert draft.propose(8) == [5, 6, 7, 0]
    draft.advance([6])
    assert draft.propose(8) == [7, 0] and draft.propose(2) == [7, 0] and draft.propose(1) == [7]
    draft.advance([7])
    assert draft.propose(3) == [0] == Hypothesis([], eos_token_id=0).propose(3)
