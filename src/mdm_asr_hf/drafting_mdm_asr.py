# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
One step of verified drafts: lay the drafts behind the committed text as a small tree, accept what the donor would have
said itself, and decide how much to propose next. That is a matter of a few integers a row, which is done in NumPy;
logits stay where they were computed.

What is committed depends on the donor alone: a draft is accepted if it is the token that the donor says there, and the
donor's own next token follows. This is speculative decoding (arXiv 2211.17192) with greedy acceptance; the drafts are
those of masked diffusion (arXiv 2602.18952, 2510.03929), and of a text that the caller has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A branch's running mean of accepted drafts: its value at the start, and how much of it each evaluation replaces.
START_MEAN, MEAN_RATE = 0.6, 0.3
# Under this mean none are asked for, since they cost more than they spare, but for so many after so many evaluations,
# and after twice as many where these were of no use either.
LEAST_MEAN, RETRY_AFTER, NUM_RETRIED = 0.25, 8, 2
# OpenBLAS, NumPy's, computes so many products of numbers on the calling thread.
MOST_PRODUCTS = 2**18

# Ids of shape (R, M), and how many of them each row has, (R,).
Drafts = tuple[np.ndarray, np.ndarray]


@dataclass
class DraftTree:
    """
    The causal rows of one evaluation: for R rows of text, C committed tokens whose keys are still to be computed, the
    last of them in the last of these columns, then the branches' drafts side by side. Each branch goes on from the
    last committed token.

    Attributes:
        ids, positions, slots (`np.ndarray` of shape (R, Q)): tokens, where they stand in the text, and where their
            keys are kept; padding has the cache's padding slot.
        visible (`np.ndarray` of shape (R, Q, S)): the slots each sees: committed ones and those of its branch.
        branches (`list` of `(first, counts)`): each branch's first column, counted from the last committed token's,
            and its number of drafts in every row (R,).
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    visible: np.ndarray
    branches: list[tuple[int, np.ndarray]]
    num_committed: int

    @classmethod
    def lay(
        cls,
        tokens: np.ndarray,
        lengths: np.ndarray,
        num_cached: np.ndarray,
        drafts: Sequence[Drafts],
        padding_slot: int,
    ) -> "DraftTree":
        """
        Args:
            tokens (`np.ndarray` of shape (R, L)): committed tokens, prompt included.
            lengths, num_cached (`np.ndarray` of shape (R,)): how many there are, and how many of them have keys.
            drafts: of every branch, ids (R, M) and their number in each row (R,).
            padding_slot (`int`): of the cache.
        """
        num_committed = int((lengths - num_cached).max())
        places = lengths[:, None] - num_committed + np.arange(num_committed)
        positions = np.maximum(places, 0)
        ids, positions = [np.take_along_axis(tokens, positions, 1)], [positions]
        is_real, starts, slots = [places >= num_cached[:, None]], [np.zeros_like(places)], [places]
        branches, first = [], 0
        for its_ids, counts in drafts:
            within = np.arange(its_ids.shape[1])
            ids.append(its_ids)
            positions.append(lengths[:, None] + within)
            is_real.append(within < counts[:, None])
            starts.append(np.broadcast_to(lengths[:, None] + first, its_ids.shape))
            slots.append(starts[-1] + within)
            branches.append((first + 1, counts))
            first += its_ids.shape[1]
        is_real, starts, slots = (np.concatenate(parts, axis=1) for parts in (is_real, starts, slots))
        every = np.arange(int(lengths.max()) + first)
        seen = every <= slots[..., None]
        seen &= (every >= starts[..., None]) | (every < lengths[:, None, None])
        # Padding sees one slot, since a row without any would be NaN.
        visible = np.where(is_real[..., None], seen, every == 0)
        positions = np.where(is_real, np.concatenate(positions, axis=1), 0)
        slots = np.where(is_real, slots, padding_slot)
        return cls(np.concatenate(ids, axis=1), positions, slots, visible, branches, num_committed)

    @property
    def read_from(self) -> int:
        """The column of the last committed token: from there on the donor's next tokens are read."""
        return self.num_committed - 1

    def accept(self, chosen: np.ndarray) -> "Acceptance":
        """
        Compares the drafts with what the donor says, from the left.

        Args:
            chosen (`np.ndarray` of shape (R, 1 + M)): the donor's next token behind the last committed one and behind
                every draft.
        """
        ids = self.ids[:, self.num_committed :]
        accepted = []
        for first, counts in self.branches:
            width = self._width(first)
            # A draft continues the draft before it, the first one the last committed token.
            before = np.concatenate([chosen[:, :1], chosen[:, first : first + width - 1]], axis=1)
            is_same = ids[:, first - 1 : first - 1 + width] == before
            is_same &= np.arange(width) < counts[:, None]
            accepted.append(is_same.cumprod(axis=1).sum(axis=1))
        if not accepted:
            none = np.zeros(len(ids), dtype=np.int64)
            return Acceptance(none, none, none[:, None], [])
        lengths = np.stack(accepted, axis=1)
        # Of equally good branches the first.
        branch = lengths.argmax(axis=1)
        num_accepted = lengths.max(axis=1)
        firsts = np.array([first for first, _ in self.branches])[branch]
        steps = np.arange(int(num_accepted.max()) + 1)
        path = np.where((steps > 0) & (steps <= num_accepted[:, None]), firsts[:, None] - 1 + steps, 0)
        return Acceptance(num_accepted, branch, path, accepted)

    def _width(self, first: int) -> int:
        following = [other for other, _ in self.branches if other > first]
        return (following[0] if following else self.ids.shape[1] - self.num_committed + 1) - first


@dataclass
class Acceptance:
    """
    What of a tree was accepted.

    Attributes:
        num_accepted, branch (`np.ndarray` of shape (R,)): the length of the longest accepted branch, and which.
        path (`np.ndarray` of shape (R, A + 1)): the columns, counted from the last committed token's, from which the
            new tokens are read: of the accepted drafts, and behind them of the donor's own token; 0 beyond.
        of_branch (`list` of `np.ndarray` of shape (R,)): drafts accepted of each branch, had it been alone.
    """

    num_accepted: np.ndarray
    branch: np.ndarray
    path: np.ndarray
    of_branch: list[np.ndarray]


def entropy_bounded_length(entropies: np.ndarray, gamma: float) -> np.ndarray:
    """
    The number (R,) of drafts to propose of K with these entropies (R, K), in nats: the longest prefix whose entropies
    sum, less the largest of them, to at most gamma (EB-Sampler, arXiv 2505.24857, in the order that PBEB-Conf's
    position bias gives where it is infinite); at least one.
    """
    if gamma == 0:
        # Entropies that underflow to 0 would pass together.
        return np.ones(len(entropies), dtype=np.int64)
    spent = entropies.cumsum(axis=1) - np.maximum.accumulate(entropies, axis=1)
    return np.maximum((spent <= gamma).cumprod(axis=1).sum(axis=1), 1)


def cut_drafts(ids: np.ndarray, entropies: np.ndarray, limits: np.ndarray, gamma: float, eos_token_id: int) -> Drafts:
    """
    What of the masks' drafts is proposed: within the budget of entropy, and nothing behind an end of text.

    Args:
        ids, entropies (`np.ndarray` of shape (R, M)): drafts, and how sure the masks are of each, in nats.
        limits (`np.ndarray` of shape (R,)): the most drafts of each row.
        gamma (`float`): the budget, see `entropy_bounded_length`.
    """
    is_eos = ids == eos_token_id
    until_eos = np.where(is_eos.any(axis=1), is_eos.argmax(axis=1) + 1, ids.shape[1])
    counts = np.minimum(np.minimum(entropy_bounded_length(entropies, gamma), limits), until_eos)
    return ids[:, : int(counts.max())], counts


class DraftAllowance:
    """
    How many drafts are asked for: a running mean of the accepted ones of every row and branch decides, down to none
    where a branch is of no use, so that drafts which are never right hardly slow anything down.

    Attributes:
        mean (`np.ndarray` of shape (R, branches)): of the drafts accepted in an evaluation.

    Args:
        num_rows (`int`): R.
        num_branches (`int`)
    """

    def __init__(self, num_rows: int, num_branches: int):
        self.mean = np.full((num_rows, num_branches), START_MEAN)
        self._unasked = np.zeros((num_rows, num_branches), dtype=np.int64)
        self._patience = np.full_like(self._unasked, RETRY_AFTER)

    def limits(self, branch: int, most: int) -> np.ndarray:
        """The most drafts (R,) to ask a branch for."""
        is_time = self._unasked[:, branch] >= self._patience[:, branch]
        retried = np.where(is_time, min(NUM_RETRIED, most), 0)
        return np.where(self.mean[:, branch] >= LEAST_MEAN, most, retried)

    def note(self, rows: np.ndarray, branch: int, num_asked: np.ndarray, accepted: np.ndarray):
        """Takes note of how many drafts some rows had and how many were accepted (N,)."""
        was_asked = num_asked > 0
        mean = self.mean[rows, branch]
        self.mean[rows, branch] = np.where(was_asked, mean + MEAN_RATE * (accepted - mean), mean)
        self._unasked[rows, branch] = np.where(was_asked, 0, self._unasked[rows, branch] + 1)
        was_retried = was_asked & (mean < LEAST_MEAN)
        patience = np.where(was_retried & (accepted == 0), 2 * self._patience[rows, branch], RETRY_AFTER)
        self._patience[rows, branch] = np.where(was_asked, patience, self._patience[rows, branch])


def gumbel_noise(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """
    Standard Gumbel noise (R, N, V), a function of a row's seed (R,), a token's position (R, N) and the token alone:
    arg-max(logits / T + noise) is a draw from softmax(logits / T) (arXiv 1611.01144), and the same one however the
    text was cut into evaluations or batches.
    """
    row_keys = _mix(seeds[:, None] * 0x9E3779B1 + positions)[..., None]
    bits = _mix(_mix(row_keys + np.arange(vocab_size) * 0x85EBCA77) ^ row_keys)
    # 24 bits, away from 0 and 1.
    uniform = ((bits & 0xFFFFFF) + 0.5) / 0x1000000
    return -np.log(-np.log(uniform))


def _mix(values: np.ndarray) -> np.ndarray:
    """Scrambles the low 32 bits of integers (lowbias32, public domain)."""
    values = values & 0xFFFFFFFF
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    values = ((values ^ (values >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return values ^ (values >> 16)


# Logits are arrays of NumPy, or tensors of PyTorch where they lie on a GPU, of which a few numbers a row are read.


def choose_tokens(
    logits: Any, temperature: float = 0.0, seeds: np.ndarray | None = None, positions: np.ndarray | None = None
) -> np.ndarray:
    """
    The donor's tokens (R, N) by its logits (R, N, V): the most probable ones, or with a temperature drawn by the noise
    of the rows' seeds (R,) and of the positions (R, N) where they will stand.
    """
    if temperature > 0:
        noise = gumbel_noise(seeds, positions, logits.shape[-1])
        logits = to_numpy(logits).astype(np.float64) / temperature + noise
    return to_numpy(logits.argmax(-1))


def log_probs_of(logits: Any, rows: np.ndarray, columns: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """The log-probabilities (A,) of tokens (A,) by rows (A,) and columns (A,) of logits (R, N, V)."""
    read, places = logits[rows, columns], np.arange(len(rows))
    if isinstance(read, np.ndarray):
        read -= read.max(axis=-1, keepdims=True)
        chosen = read[places, token_ids]
        return chosen - np.log(np.exp(read, out=read).sum(axis=-1))
    return to_numpy(read.log_softmax(-1)[places, token_ids])


def to_numpy(values: Any) -> np.ndarray:
    """An array, or a tensor of any device and precision, as an array."""
    if not hasattr(values, "device") or isinstance(values, np.ndarray):
        return np.asarray(values)
    is_reduced = values.is_floating_point() and values.element_size() < 4
    return (values.float() if is_reduced else values).numpy(force=True)


def one_thread_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """
    left (..., N, K) @ right (..., K, M), in blocks that are too small for BLAS to share among its threads: these spin
    for a while after a product, and what runs next, on threads of its own, takes several times as long.
    """
    size = max(MOST_PRODUCTS // (right.shape[-2] * right.shape[-1]), 1)
    blocks = [left[..., start : start + size, :] @ right for start in range(0, left.shape[-2], size)]
    return np.concatenate(blocks, axis=-2)


class Hypothesis:
    """
    What one row's text may turn out to be. Behind the committed text, what is left of it is proposed: the prefix that
    is nearest to that text, in edit distance, is cut off.

    Args:
        ids (`list[int]`): its N tokens, without an end of text.
        eos_token_id (`int`): the end of text, which is proposed behind the last of them.
    """

    def __init__(self, ids: Sequence[int], eos_token_id: int):
        self._ids, self._eos_token_id = np.array(ids, dtype=np.int64), eos_token_id
        self._places = np.arange(len(ids) + 1)
        # Edit distances (N + 1,) of the committed text to every prefix of the hypothesis.
        self._distances = self._places.copy()
        self._last: int | None = None

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes note of the tokens that were committed since."""
        for token_id in token_ids:
            self._last = token_id
            changed = self._distances[:-1] + (self._ids != token_id)
            row = np.concatenate([self._distances[:1] + 1, np.minimum(changed, self._distances[1:] + 1)])
            # Insertions: the least of what stands to the left, a step for each place.
            self._distances = np.minimum.accumulate(row - self._places) + self._places

    def propose(self, limit: int) -> list[int]:
        """The next tokens, `limit` of them at most, behind the nearest prefix: of several, the longest one if it ends
        as the text does, else the shortest. Behind the last of all comes the end of text."""
        nearest = np.flatnonzero(self._distances == self._distances.min())
        longest = int(nearest[-1])
        ends_alike = longest > 0 and self._ids[longest - 1] == self._last
        rest = self._ids[longest if ends_alike else int(nearest[0]) :]
        return [*rest[:limit].tolist(), self._eos_token_id][:limit]
