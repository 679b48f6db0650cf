# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoding by verified drafts: the donor's own text, in a fraction of its evaluations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .drafting_mdm_asr import (
    Acceptance,
    DraftAllowance,
    Drafts,
    DraftTree,
    Hypothesis,
    choose_tokens,
    cut_drafts,
    log_probs_of,
)
from .generation_configuration_mdm_asr import BRANCHES, MDMASRGenerationConfig
from .hotwords_mdm_asr import HotwordAutomaton
from .safeguards_mdm_asr import is_loop, no_speech_probability

# Of a hypothesis, tokens at most in an evaluation where the caller sets no limit: more are seldom right.
HYPOTHESIS_LENGTH = 10
# After so many evaluations of a row it is looked whether its text goes in a circle.
LOOP_CHECK_EVERY = 8


@dataclass
class VerifiedText:
    """
    B texts being written, and the record of it.

    Attributes:
        tokens (`np.ndarray` of shape (B, L)): prompt and text, `lengths` (B,) of them.
        starts (`np.ndarray` of shape (B,)): where each text begins, behind its prompt.
        log_probs (`np.ndarray` of shape (B, L)): the donor's, of each token; 0 of what was given.
        commit_steps (`np.ndarray` of shape (B, L)): the evaluation, counted from 1, that committed each token.
        branches (`np.ndarray` of shape (B, L)): 0 for the donor's own tokens, 1 and 2 for accepted drafts of the masks
            and of the hypothesis.
        nfe (`np.ndarray` of shape (B,)): evaluations of the decoder.
        accepted, rejected (`np.ndarray` of shape (B, 2)): drafts of the masks and of the hypothesis that were as the
            donor's text, or not.
        no_speech (`np.ndarray` of shape (B,)): the donor's probability of <|nospeech|>, 0 where it has none.
        is_stopped (`np.ndarray` of shape (B,)): texts that were left when they had begun to go in a circle.
        struck (`list` of B lists of `(place, branch, ids)`): the rejected drafts, and where in the text they stood.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    log_probs: np.ndarray
    commit_steps: np.ndarray
    branches: np.ndarray
    nfe: np.ndarray
    accepted: np.ndarray
    rejected: np.ndarray
    no_speech: np.ndarray
    is_stopped: np.ndarray
    struck: list[list[tuple[int, int, list[int]]]] = field(default_factory=list)

    @classmethod
    def begin(cls, prompts: list[list[int]], prefixes: list[list[int]], longest: int) -> "VerifiedText":
        """Texts of which prompts and prefixes (B lists of ids) are written, with room for `longest` tokens."""
        rows = [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)]
        # And a place that no text reaches.
        tokens = np.zeros((len(rows), longest + 1), dtype=np.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        counts = np.zeros((len(rows), len(BRANCHES)), dtype=np.int64)
        return cls(
            tokens=tokens,
            lengths=np.array([len(row) for row in rows]),
            starts=np.array([len(prompt) for prompt in prompts]),
            log_probs=np.zeros(tokens.shape, dtype=np.float32),
            commit_steps=np.zeros_like(tokens),
            branches=np.zeros_like(tokens),
            nfe=np.zeros(len(rows), dtype=np.int64),
            accepted=counts,
            rejected=counts.copy(),
            no_speech=np.zeros(len(rows), dtype=np.float32),
            is_stopped=np.zeros(len(rows), dtype=bool),
            struck=[[] for _ in rows],
        )

    def text_ids(self, row: int) -> list[int]:
        """The text of a row, its prefix and end of text included."""
        return self.tokens[row, self.starts[row] : self.lengths[row]].tolist()

    def decoded_ids(self, row: int) -> list[int]:
        """The tokens of a row that were decoded: its text behind its prefix."""
        return self.tokens[row][self._is_decoded(row)].tolist()

    def row_log_probs(self, row: int) -> list[float]:
        """The log-probabilities of a row's decoded tokens."""
        return self.log_probs[row][self._is_decoded(row)].tolist()

    def _is_decoded(self, row: int) -> np.ndarray:
        return (np.arange(self.tokens.shape[1]) < self.lengths[row]) & (self.commit_steps[row] > 0)

    def replace(self, rows: np.ndarray, other: "VerifiedText", which: np.ndarray) -> None:
        """Puts texts of another decoding of some rows (N,) in their place, where `which` (N,) says so. The evaluations
        of both count."""
        taken, places = rows[which], which.nonzero()[0]
        for name in ("tokens", "lengths", "log_probs", "commit_steps", "branches", "is_stopped"):
            getattr(self, name)[taken] = getattr(other, name)[places]
        for row, place in zip(taken.tolist(), places.tolist(), strict=True):
            self.struck[row] = other.struck[place]
        for name in ("nfe", "accepted", "rejected"):
            getattr(self, name)[rows] += getattr(other, name)


class VerifiedDecoder:
    """
    Writes texts to their ends, in place:
    ```
    0. Masks draft how a text begins, of the frames alone, if they were trained to.
    Until every row has its end of text or is full:
    1. Causal rows: the last committed token of each row, and behind it its drafts, branch by branch.
    2. The donor's next token behind each of them; drafts are accepted from the left where they are that token.
    3. Commit those of the longer branch and the donor's own token behind them, and keep their keys.
    4. The masks behind the last position that has keys draft what comes next.
    ```

    Args:
        model ([`MDMASRForConditionalGeneration`]): makes the steps, see [`TorchSteps`].
        text ([`VerifiedText`]): of B rows.
        encoder_outputs ([`MDMASREncoderOutput`]): with `cross_attention_states`.
        settings ([`MDMASRGenerationConfig`]).
        limits (`list[int]` of length B): the most tokens of each row, prompt included.
        is_open (`np.ndarray` of shape (B,)): the rows to write.
        prompt_length (`int`): of the prompt from the start of a transcript on, behind which the text begins.
        hypotheses (`list` of length B): what each text may turn out to be, or None.
        temperature (`float`): draws the donor's tokens, by noise that each row's seed (B,) and the position give.
        hotwords ([`HotwordAutomaton`], *optional*): of B rows.
        synced_gpus (`bool`): step as long as any process has open rows, once for each step of the others.
        may_spend (`bool`): the encoder's outputs are not read again, and may be overwritten.
        stops_loops (`bool`): leaves texts that go in a circle, before they are full.
    """

    def __init__(
        self,
        model: Any,
        text: VerifiedText,
        encoder_outputs: Any,
        settings: MDMASRGenerationConfig,
        *,
        limits: list[int],
        is_open: np.ndarray,
        prompt_length: int,
        hypotheses: list[Hypothesis | None],
        temperature: float = 0.0,
        seeds: np.ndarray | None = None,
        hotwords: HotwordAutomaton | None = None,
        synced_gpus: bool = False,
        may_spend: bool = False,
        stops_loops: bool = False,
    ):
        config = model.config.decoder_config
        self.model, self.text, self.settings, self.synced_gpus = model, text, settings, synced_gpus
        self.limits = np.array(limits)
        self.prompt_length, self.hypotheses = prompt_length, hypotheses
        self.temperature, self.seeds, self.hotwords = temperature, seeds, hotwords
        self.stops_loops = stops_loops
        self.block_length = config.draft_length
        self.most_drafts = min(settings.draft_length or self.block_length, self.block_length)
        self.most_of_hypothesis = settings.draft_length or HYPOTHESIS_LENGTH
        self.gamma = settings.sampler_config.gamma
        self.allowance = DraftAllowance(len(limits), len(BRANCHES))
        # Before training only the first draft of a block is right, which costs more than it spares.
        self.uses_masks = "masks" in settings.draft_branches and model.has_trained_drafts
        self.uses_hints = self.uses_masks and config.draft_hints
        self.rows = is_open.nonzero()[0]
        # One at least, to step with where processes wait for each other.
        kept = self.rows if len(self.rows) else np.zeros(1, dtype=np.int64)
        num_slots = max(limits) + self.most_drafts + self.most_of_hypothesis
        self.steps = model.begin_steps(encoder_outputs, kept, num_slots, may_spend)
        self.num_cached = np.zeros_like(self.limits)
        self.mask_drafts = self._nothing()
        for row in self.rows.tolist():
            if hypotheses[row] is not None:
                hypotheses[row].advance(text.text_ids(row))
        # Graphs that were exported before do not know of it.
        if self.uses_masks and getattr(config, "draft_start", False):
            begins = (text.lengths == text.starts)[self.rows] & (text.starts[self.rows] > 1)
            self.mask_drafts = self._propose(np.where(begins, np.minimum(self.most_drafts, self._room()), 0))
        self.states = [0] * len(limits)
        if hotwords is not None:
            for row in range(len(limits)):
                self.states[row] = hotwords.roots[row]
                self._advance_hotwords(row, text.text_ids(row))

    def run(self, show: Callable[[list[list[int]], list[int]], None] | None = None) -> None:
        """Writes all texts; `show` is told after each evaluation of the B texts with the drafts behind them, and how
        many tokens of each are committed; and before the first one, if there are drafts to begin with."""
        if show is not None and self.mask_drafts[0].shape[1]:
            show(*self._shown())
        while self.model._any_unfinished(len(self.rows) > 0, self.synced_gpus):
            if len(self.rows):
                self.step()
            else:
                self._idle()
            if show is not None:
                show(*self._shown())

    def _shown(self) -> tuple[list[list[int]], list[int]]:
        texts = [self.text.text_ids(row) for row in range(len(self.text.lengths))]
        committed = [len(ids) for ids in texts]
        for row, ids, count in zip(self.rows.tolist(), *(x.tolist() for x in self.mask_drafts), strict=True):
            texts[row] += ids[:count]
        return texts, committed

    def step(self) -> None:
        """One evaluation of the decoder."""
        text, rows = self.text, self.rows
        lengths = text.lengths[rows]
        # 1. Lay the drafts behind the committed text.
        drafts = {0: self.mask_drafts, 1: self._hypothesis_drafts()}
        drafts = {branch: its for branch, its in drafts.items() if its[0].shape[1]}
        padding_slot = self.steps.padding_slot
        tree = DraftTree.lay(text.tokens[rows], lengths, self.num_cached[rows], [*drafts.values()], padding_slot)
        # 2. Evaluate, and accept what the donor says itself.
        logits = self._evaluate(tree)
        logits, unbiased = self._shape_logits(logits, tree, lengths)
        seeds = None if self.seeds is None else self.seeds[rows]
        chosen = choose_tokens(logits, self.temperature, seeds, tree.positions[:, tree.read_from :] + 1)
        accepted = tree.accept(chosen)
        # 3. Commit, and keep the keys of what was committed.
        new, num_new = self._commit(lengths, chosen, unbiased, accepted, [*drafts])
        of_branch = dict(zip(drafts, accepted.of_branch, strict=True))
        for branch in range(len(BRANCHES)):
            # A branch that no row asked for is counted, too: after some evaluations it is tried again.
            nothing = self._nothing()
            self._count(branch, drafts.get(branch, nothing), of_branch.get(branch, nothing[1]), lengths)
        self._keep(lengths, accepted)
        self.num_cached[rows] = lengths + accepted.num_accepted
        for row, ids, number in zip(rows.tolist(), new.tolist(), num_new.tolist(), strict=True):
            if self.hypotheses[row] is not None:
                self.hypotheses[row].advance(ids[:number])
            if self.hotwords is not None:
                self._advance_hotwords(row, ids[:number])
        # 4. Draft what comes next, for the rows that are left.
        has_ended = np.take_along_axis(new, num_new[:, None] - 1, 1)[:, 0] == self.model.config.eos_token_id
        if self.settings.no_speech_threshold is not None:
            # Where nobody speaks, nothing more is written.
            has_ended |= text.no_speech[rows] > self.settings.no_speech_threshold
        if self.stops_loops:
            for row in rows[~has_ended & (text.nfe[rows] % LOOP_CHECK_EVERY == 0)]:
                text.is_stopped[row] = is_loop(text.decoded_ids(row))
            has_ended |= text.is_stopped[rows]
        left = (~has_ended & (text.lengths[rows] < self.limits[rows])).nonzero()[0]
        if len(left) < len(rows):
            left = _moved_up(left)
            self.rows = rows[left]
            if len(left) or self.synced_gpus:
                self.steps.keep_rows(left if len(left) else np.zeros(1, dtype=np.int64))
        self.mask_drafts = self._draft(accepted, left)

    def _nothing(self) -> Drafts:
        return np.zeros((len(self.rows), 0), dtype=np.int64), np.zeros(len(self.rows), dtype=np.int64)

    def _room(self) -> np.ndarray:
        """How many drafts each open row (R,) has positions for, the donor's own token behind them left out."""
        return np.maximum(self.limits[self.rows] - self.text.lengths[self.rows] - 1, 0)

    def _hypothesis_drafts(self) -> Drafts:
        """What is left of the hypotheses: ids (R, M), and how many each row has."""
        if not any(self.hypotheses[row] is not None for row in self.rows):
            return self._nothing()
        limits = np.minimum(self.allowance.limits(1, self.most_of_hypothesis)[self.rows], self._room()).tolist()
        proposed = [
            self.hypotheses[row].propose(limit) if self.hypotheses[row] is not None and limit else []
            for row, limit in zip(self.rows.tolist(), limits, strict=True)
        ]
        ids = np.zeros((len(proposed), max(map(len, proposed))), dtype=np.int64)
        for row, its_ids in enumerate(proposed):
            ids[row, : len(its_ids)] = its_ids
        return ids, np.array([len(its_ids) for its_ids in proposed])

    def _evaluate(self, tree: DraftTree) -> Any:
        """Logits (R, 1 + M, V) behind the last committed token and behind each draft."""
        text, rows = self.text, self.rows
        columns = np.arange(tree.read_from, tree.ids.shape[1])[None].repeat(len(rows), axis=0)
        asks_no_speech = self.settings.no_speech_token_id is not None and not text.nfe[rows].any()
        if asks_no_speech:
            # What follows the start of the transcript, where Whisper says whether anybody speaks.
            places = (text.starts[rows] - self.prompt_length) - (text.lengths[rows] - tree.num_committed)
            columns = np.concatenate([places[:, None], columns], axis=1)
        logits = self.steps.verify(tree, columns)
        if asks_no_speech:
            text.no_speech[rows] = no_speech_probability(logits[:, 0], self.settings.no_speech_token_id)
            logits = logits[:, 1:]
        return logits

    def _shape_logits(self, logits: Any, tree: DraftTree, lengths: np.ndarray) -> tuple[Any, Any]:
        """Suppresses tokens in logits (R, 1 + M, V), in place. Returns those that tokens are chosen by, in which
        hotwords are raised, and those that confidences are of, in which they are not."""
        settings, text = self.settings, self.text
        if settings.suppress_tokens:
            logits[..., settings.suppress_tokens] = -np.inf
        if settings.begin_suppress_tokens:
            begins = (lengths == text.starts[self.rows]).nonzero()[0]
            if len(begins):
                logits[begins[:, None], 0, np.array(settings.begin_suppress_tokens)] = -np.inf
        if self.hotwords is None:
            return logits, logits
        # A copy in one piece.
        raised = logits + 0
        ids = tree.ids[:, tree.num_committed :].tolist()
        firsts = {first for first, _ in tree.branches}
        states = []
        for row, its_ids in zip(self.rows.tolist(), ids, strict=True):
            states.append(self.states[row])
            for column, token_id in enumerate(its_ids, start=1):
                before = self.states[row] if column in firsts else states[-1]
                states.append(self.hotwords.advance(before, token_id))
        flat, eos_token_id = raised.reshape(-1, raised.shape[-1]), self.model.config.eos_token_id
        self.hotwords.raise_logits(flat, states, settings.hotword_boost, eos_token_id)
        return raised, logits

    def _advance_hotwords(self, row: int, token_ids: list[int]) -> None:
        for token_id in token_ids:
            self.states[row] = self.hotwords.advance(self.states[row], token_id)

    def _commit(
        self, lengths: np.ndarray, chosen: np.ndarray, logits: Any, accepted: Acceptance, branches: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Writes the accepted drafts and the donor's own token behind them into the text; nothing behind an end of
        text or a row's limit. Returns them (R, W), and how many there are (R,)."""
        text, rows = self.text, self.rows
        text.nfe[rows] += 1
        new = np.take_along_axis(chosen, accepted.path, 1)
        places = np.arange(new.shape[1])
        is_eos = new == self.model.config.eos_token_id
        is_new = (places <= accepted.num_accepted[:, None]) & (is_eos.cumsum(axis=1) - is_eos == 0)
        is_new &= lengths[:, None] + places < self.limits[rows, None]
        # What is not written goes to the last place, which no text reaches.
        target = np.where(is_new, lengths[:, None] + places, text.tokens.shape[1] - 1)
        numbers = np.array([*branches, -1])[accepted.branch] + 1
        at = rows[:, None]
        text.tokens[at, target] = new
        row, place = is_new.nonzero()
        text.log_probs[rows[row], target[row, place]] = log_probs_of(
            logits, row, accepted.path[row, place], new[row, place]
        )
        text.commit_steps[at, target] = text.nfe[at]
        text.branches[at, target] = np.where(places < accepted.num_accepted[:, None], numbers[:, None], 0)
        num_new = is_new.sum(axis=1)
        text.lengths[rows] = lengths + num_new
        return new, num_new

    def _count(self, branch: int, drafts: Drafts, num_accepted: np.ndarray, lengths: np.ndarray) -> None:
        """Takes note of how a branch's drafts (R, M) fared."""
        text, rows, (ids, counts) = self.text, self.rows, drafts
        text.accepted[rows, branch] += num_accepted
        text.rejected[rows, branch] += counts - num_accepted
        self.allowance.note(rows, branch, counts, num_accepted)
        starts = (lengths + num_accepted - text.starts[rows]).tolist()
        struck = zip(rows.tolist(), ids.tolist(), num_accepted.tolist(), counts.tolist(), starts, strict=True)
        for row, its_ids, first, count, start in struck:
            if first < count:
                text.struck[row].append((start, branch, its_ids[first:count]))

    def _keep(self, lengths: np.ndarray, accepted: Acceptance) -> None:
        """Moves the keys of accepted drafts to where committed tokens stand, if their branch was not the first."""
        steps = np.arange(accepted.path.shape[1] - 1)
        source, target = lengths[:, None] - 1 + accepted.path[:, 1:], lengths[:, None] + steps
        is_moved = (steps < accepted.num_accepted[:, None]) & (source != target)
        if is_moved.any():
            padding = self.steps.padding_slot
            self.steps.move(np.where(is_moved, source, padding), np.where(is_moved, target, padding))

    def _draft(self, accepted: Acceptance, left: np.ndarray) -> Drafts:
        """The masks' drafts (R, M) for the next evaluation of the rows that are left (R,), and how many each has."""
        if not self.uses_masks:
            return self._nothing()
        limits = np.minimum(self.allowance.limits(0, self.most_drafts)[self.rows], self._room())
        return self._propose(limits, [drafts[left] for drafts in self.mask_drafts], accepted.num_accepted[left])

    def _propose(
        self, limits: np.ndarray, drafts: Sequence[np.ndarray] = (), num_accepted: np.ndarray | None = None
    ) -> Drafts:
        """The masks' drafts, `limits` (R,) at most, behind the open rows' texts. `drafts` are those of before, of
        which so many (R,) were accepted."""
        if not limits.any():
            return self._idle_block()
        text, rows = self.text, self.rows
        last = text.lengths[rows] - 1
        before, known = text.tokens[rows, last - 1], text.tokens[rows, last]
        blocks = self._blocks(known)
        if self.uses_hints and drafts and drafts[0].shape[1]:
            ids, counts = drafts
            # The first that was not accepted stands where the donor's own token is now.
            places = num_accepted[:, None] + np.arange(1, self.block_length)
            drafted = np.take_along_axis(ids, np.minimum(places, ids.shape[1] - 1), 1)
            blocks[:, 1:] = np.where(places < counts[:, None], drafted, blocks[:, 1:])
        ids, entropies = self.steps.propose(blocks, before, last - 1, int(limits.max()))
        return cut_drafts(ids, entropies, limits, self.gamma, self.model.config.eos_token_id)

    def _blocks(self, known: np.ndarray) -> np.ndarray:
        """Blocks (R, K) of a known token (R,) and masks."""
        blocks = np.full((len(known), self.block_length), self.model.config.mask_token_id)
        blocks[:, 0] = known
        return blocks

    def _idle(self) -> None:
        """An evaluation whose result nobody needs, while other processes have rows that are open."""
        zeros = np.zeros((1, 1), dtype=np.int64)
        tree = DraftTree(zeros, zeros, zeros, np.ones((1, 1, 1), dtype=bool), [], 1)
        self.steps.verify(tree, zeros)
        self._idle_block()

    def _idle_block(self) -> Drafts:
        """No drafts; where processes wait for each other, by the same calls as any."""
        if self.synced_gpus and self.uses_masks:
            zeros = np.zeros(self.steps.num_rows, dtype=np.int64)
            self.steps.propose(self._blocks(zeros), zeros, zeros, self.most_drafts)
        return self._nothing()


def _moved_up(left: np.ndarray) -> np.ndarray:
    """Rows that are left (R,), in the order in which the fewest change their places: the last ones fill the gaps."""
    number = len(left)
    order = np.arange(number)
    order[np.setdiff1d(order, left)] = left[left >= number]
    return order
