# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
One step of verified drafts: lay the drafts behind the committed text as a small tree, accept what the donor would have
said itself, and propose what comes next.

What is committed depends on the donor alone: a draft is accepted if it is the token that the donor says there, and the
donor's own next token follows. This is speculative decoding (arXiv 2211.17192) with greedy acceptance; the drafts are
those of masked diffusion (arXiv 2602.18952, 2510.03929), and of a text that the caller has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .sampling_mdm_asr import arg_max, propose_tokens

# A branch's running mean of accepted drafts: its value at the start, and how much of it each evaluation replaces.
START_MEAN, MEAN_RATE = 0.6, 0.3
# Under this mean none are asked for, since they cost more than they spare, but for so many after so many evaluations,
# and after twice as many where these were of no use either.
LEAST_MEAN, RETRY_AFTER, NUM_RETRIED = 0.25, 8, 2
# Ids of the short list that stay in question at a place of a block, by what the masks say without knowing each other:
# of 1,000 drafts that the sequential head would make, 997 are among them.
NUM_CANDIDATES = 64


@dataclass
class DraftTree:
    """
    The causal rows of one evaluation: for R rows of text, C committed tokens whose keys are still to be computed, the
    last of them in the last of these columns, then the branches' drafts side by side. Each branch goes on from the
    last committed token.

    Attributes:
        ids, positions, slots (`torch.LongTensor` of shape (R, Q)): tokens, where they stand in the text, and where
            their keys are kept; padding has the cache's padding slot.
        visible (`torch.BoolTensor` of shape (R, Q, S)): the slots each sees: committed ones and those of its branch.
        branches (`list` of `(first, counts)`): each branch's first column, counted from the last committed token's,
            and its number of drafts in every row (R,).
    """

    ids: torch.LongTensor
    positions: torch.LongTensor
    slots: torch.LongTensor
    visible: torch.BoolTensor
    branches: list[tuple[int, torch.LongTensor]]
    num_committed: int

    @classmethod
    def lay(
        cls,
        tokens: torch.LongTensor,
        lengths: torch.LongTensor,
        num_cached: torch.LongTensor,
        drafts: Sequence[tuple[torch.LongTensor, torch.LongTensor]],
        padding_slot: int,
    ) -> "DraftTree":
        """
        Args:
            tokens (`torch.LongTensor` of shape (R, L)): committed tokens, prompt included.
            lengths, num_cached (`torch.LongTensor` of shape (R,)): how many there are, and how many of them have keys.
            drafts: of every branch, ids (R, M) and their number in each row (R,).
            padding_slot (`int`): of the cache.
        """
        device = tokens.device
        num_committed = int((lengths - num_cached).max())
        places = lengths[:, None] - num_committed + torch.arange(num_committed, device=device)
        ids = [tokens.gather(1, places.clamp(min=0))]
        positions, is_real, starts = [places.clamp(min=0)], [places >= num_cached[:, None]], [torch.zeros_like(places)]
        slots, branches, first = [places], [], 0
        for its_ids, counts in drafts:
            within = torch.arange(its_ids.shape[1], device=device)
            ids.append(its_ids)
            positions.append(lengths[:, None] + within)
            is_real.append(within < counts[:, None])
            starts.append((lengths[:, None] + first).expand_as(its_ids))
            slots.append(starts[-1] + within)
            branches.append((first + 1, counts))
            first += its_ids.shape[1]
        is_real, starts, slots = torch.cat(is_real, dim=1), torch.cat(starts, dim=1), torch.cat(slots, dim=1)
        every = torch.arange(int(lengths.max()) + first, device=device)
        in_branch = (every >= starts[..., None]) & (every <= slots[..., None])
        # Padding sees one slot, since a row without any would be NaN.
        visible = torch.where(
            is_real[..., None],
            in_branch | ((every < lengths[:, None, None]) & (every <= slots[..., None])),
            every == 0,
        )
        positions = torch.where(is_real, torch.cat(positions, dim=1), 0)
        slots = slots.masked_fill(~is_real, padding_slot)
        return cls(torch.cat(ids, dim=1), positions, slots, visible, branches, num_committed)

    @property
    def read_from(self) -> int:
        """The column of the last committed token: from there on the donor's next tokens are read."""
        return self.num_committed - 1

    def accept(self, chosen: torch.LongTensor) -> "Acceptance":
        """
        Compares the drafts with what the donor says, from the left.

        Args:
            chosen (`torch.LongTensor` of shape (R, 1 + M)): the donor's next token behind the last committed one and
                behind every draft.
        """
        ids = self.ids[:, self.num_committed :]
        accepted = []
        for first, counts in self.branches:
            width = self._width(first)
            # A draft continues the draft before it, the first one the last committed token.
            before = torch.cat([chosen[:, :1], chosen[:, first : first + width - 1]], dim=1)
            is_same = ids[:, first - 1 : first - 1 + width] == before
            is_same = is_same & (torch.arange(width, device=ids.device) < counts[:, None])
            accepted.append(is_same.long().cumprod(dim=-1).sum(dim=-1))
        if not accepted:
            none = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            return Acceptance(none, none, torch.zeros((len(ids), 1), dtype=torch.long, device=ids.device), [])
        lengths = torch.stack(accepted, dim=1)
        # Of equally good branches the first.
        branch = lengths.argmax(dim=1)
        num_accepted = lengths.amax(dim=1)
        firsts = torch.tensor([first for first, _ in self.branches], device=ids.device)[branch]
        steps = torch.arange(int(num_accepted.max()) + 1, device=ids.device)
        path = torch.where(steps > 0, firsts[:, None] - 1 + steps, 0)
        return Acceptance(num_accepted, branch, torch.where(steps <= num_accepted[:, None], path, 0), accepted)

    def _width(self, first: int) -> int:
        following = [other for other, _ in self.branches if other > first]
        return (following[0] if following else self.ids.shape[1] - self.num_committed + 1) - first


@dataclass
class Acceptance:
    """
    What of a tree was accepted.

    Attributes:
        num_accepted, branch (`torch.LongTensor` of shape (R,)): the length of the longest accepted branch, and which.
        path (`torch.LongTensor` of shape (R, A + 1)): the columns, counted from the last committed token's, from which
            the new tokens are read: of the accepted drafts, and behind them of the donor's own token; 0 beyond.
        of_branch (`list` of `torch.LongTensor` of shape (R,)): drafts accepted of each branch, had it been alone.
    """

    num_accepted: torch.LongTensor
    branch: torch.LongTensor
    path: torch.LongTensor
    of_branch: list[torch.LongTensor]


def lay_blocks(next_tokens: torch.LongTensor, length: int, mask_token_id: int) -> torch.LongTensor:
    """Blocks (B, F, K) of a known token (B, F) and masks behind it, for `length` drafts."""
    blocks = next_tokens.new_full((*next_tokens.shape, length), mask_token_id)
    blocks[..., 0] = next_tokens
    return blocks


def lay_hints(blocks: torch.LongTensor, drafts: torch.LongTensor, moved: torch.LongTensor) -> torch.LongTensor:
    """Blocks (B, F, K) whose masks are replaced by what blocks that stand `moved` (B, F) positions before them drafted
    (B, F, M) there."""
    places = moved[..., None] + torch.arange(blocks.shape[-1] - 1, device=blocks.device)
    drafted = drafts.gather(-1, places.clamp(max=drafts.shape[-1] - 1))
    return torch.cat([blocks[..., :1], drafted.where(places < drafts.shape[-1], blocks[..., 1:])], dim=-1)


def entropy_bounded_length(entropies: torch.Tensor, gamma: float) -> torch.LongTensor:
    """
    The number (R,) of drafts to propose of K with these entropies (R, K), in nats: the longest prefix whose entropies
    sum, less the largest of them, to at most gamma (EB-Sampler, arXiv 2505.24857, in the order that PBEB-Conf's
    position bias gives where it is infinite); at least one.
    """
    if gamma == 0:
        # Entropies that underflow to 0 would pass together.
        return torch.ones(len(entropies), dtype=torch.long, device=entropies.device)
    spent = entropies.cumsum(dim=-1) - entropies.cummax(dim=-1).values
    return (spent <= gamma).long().cumprod(dim=-1).sum(dim=-1).clamp(min=1)


def propose_drafts(
    draft_logits: Callable[[int, torch.LongTensor, torch.LongTensor], torch.Tensor],
    candidates: torch.LongTensor,
    last_tokens: torch.LongTensor,
    limits: torch.LongTensor,
    gamma: float,
    eos_token_id: int,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Drafts of a block, one after the other.

    Args:
        draft_logits: gives, for the place k in the block and the tokens one and two places before it (R,), the logits
            (R, C) of its candidates.
        candidates (`torch.LongTensor` of shape (R, K, C)): ids, of which each place's draft is one.
        last_tokens (`torch.LongTensor` of shape (R, 2)): the last token that has keys, and the donor's next one.
        limits (`torch.LongTensor` of shape (R,)): the most drafts of each row, not more than the block has masks.
        gamma (`float`): the budget of entropy, see `entropy_bounded_length`.

    Returns:
        Ids (R, M) and their number in each row (R,). Nothing is proposed behind an end of text.
    """
    before_that, before = last_tokens.unbind(dim=1)
    ids, entropies, is_open = [], [], limits > 0
    for k in range(int(limits.max())):
        tokens, _, entropy = propose_tokens(draft_logits(k, before, before_that))
        ids.append(candidates[:, k].gather(1, tokens[:, None])[:, 0])
        entropies.append(entropy)
        bounded = entropy_bounded_length(torch.stack(entropies, dim=1), gamma)
        is_open = is_open & (bounded == k + 1) & (ids[-1] != eos_token_id) & (limits > k + 1)
        if not bool(is_open.any()):
            break
        before_that, before = before, ids[-1]
    drafts = torch.stack(ids, dim=1)
    is_eos = drafts == eos_token_id
    until_eos = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, drafts.shape[1])
    return drafts, bounded.minimum(limits).minimum(until_eos)


class DraftAllowance:
    """
    How many drafts are asked for: a running mean of the accepted ones of every row and branch decides, down to none
    where a branch is of no use, so that drafts which are never right hardly slow anything down.

    Attributes:
        mean (`torch.Tensor` of shape (R, branches)): of the drafts accepted in an evaluation.

    Args:
        num_rows (`int`): R.
        num_branches (`int`)
    """

    def __init__(self, num_rows: int, num_branches: int):
        self.mean = torch.full((num_rows, num_branches), START_MEAN)
        self._unasked = torch.zeros((num_rows, num_branches), dtype=torch.long)
        self._patience = torch.full_like(self._unasked, RETRY_AFTER)

    def limits(self, branch: int, most: int) -> torch.LongTensor:
        """The most drafts (R,) to ask a branch for."""
        is_time = self._unasked[:, branch] >= self._patience[:, branch]
        retried = torch.where(is_time, min(NUM_RETRIED, most), 0)
        return torch.where(self.mean[:, branch] >= LEAST_MEAN, most, retried)

    def note(self, rows: torch.LongTensor, branch: int, num_asked: torch.LongTensor, accepted: torch.LongTensor):
        """Takes note of how many drafts some rows had and how many were accepted (N,)."""
        was_asked = num_asked > 0
        mean = self.mean[rows, branch]
        self.mean[rows, branch] = torch.where(was_asked, mean + MEAN_RATE * (accepted - mean), mean)
        self._unasked[rows, branch] = torch.where(was_asked, 0, self._unasked[rows, branch] + 1)
        was_retried = was_asked & (mean < LEAST_MEAN)
        patience = torch.where(was_retried & (accepted == 0), 2 * self._patience[rows, branch], RETRY_AFTER)
        self._patience[rows, branch] = torch.where(was_asked, patience, self._patience[rows, branch])


def gumbel_noise(seeds: torch.LongTensor, positions: torch.LongTensor, vocab_size: int) -> torch.Tensor:
    """
    Standard Gumbel noise (R, N, V), a function of a row's seed (R,), a token's position (R, N) and the token alone:
    arg-max(logits / T + noise) is a draw from softmax(logits / T) (arXiv 1611.01144), and the same one however the
    text was cut into evaluations or batches.
    """
    ids = torch.arange(vocab_size, device=seeds.device)
    row_keys = _mix(seeds[:, None] * 0x9E3779B1 + positions)
    bits = _mix(_mix(row_keys[..., None] + ids * 0x85EBCA77) ^ row_keys[..., None])
    # 24 bits, away from 0 and 1.
    uniform = ((bits & 0xFFFFFF).double() + 0.5) / 0x1000000
    return -(-uniform.log()).log()


def _mix(values: torch.LongTensor) -> torch.LongTensor:
    """Scrambles the low 32 bits of integers (lowbias32, public domain)."""
    values = values & 0xFFFFFFFF
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    values = ((values ^ (values >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return values ^ (values >> 16)


def choose_tokens(
    logits: torch.Tensor, temperature: float, seeds: torch.LongTensor | None, positions: torch.LongTensor
) -> torch.LongTensor:
    """
    The donor's tokens (R, N) by its logits (R, N, V): the most probable ones, or with a temperature drawn by the noise
    of the positions (R, N) where they will stand.
    """
    if temperature == 0:
        return arg_max(logits.flatten(0, 1)).view(logits.shape[:2])
    noise = gumbel_noise(seeds, positions, logits.shape[-1])
    return (logits.double() / temperature + noise).argmax(dim=-1)


__all__ = [
    "Acceptance",
    "DraftAllowance",
    "DraftTree",
    "choose_tokens",
    "entropy_bounded_length",
    "gumbel_noise",
    "lay_blocks",
    "lay_hints",
    "propose_drafts",
]
