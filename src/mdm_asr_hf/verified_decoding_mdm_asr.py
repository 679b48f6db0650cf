# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoding by verified drafts: the donor's own text, in a fraction of its evaluations."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .cache_mdm_asr import DraftingCache
from .drafting_mdm_asr import (
    Acceptance,
    DraftAllowance,
    DraftTree,
    choose_tokens,
    lay_blocks,
    lay_hints,
    propose_drafts,
)
from .encoder_mdm_asr import MDMASREncoderOutput, take_rows
from .generation_configuration_mdm_asr import BRANCHES, MDMASRGenerationConfig
from .hotwords_mdm_asr import HotwordAutomaton
from .hypothesis_mdm_asr import Hypothesis
from .safeguards_mdm_asr import no_speech_probability

# Of a hypothesis, tokens at most in an evaluation where the caller sets no limit: more are seldom right.
HYPOTHESIS_LENGTH = 10


@dataclass
class VerifiedText:
    """
    B texts being written, and the record of it.

    Attributes:
        tokens (`torch.LongTensor` of shape (B, L)): prompt and text, `lengths` (B,) of them.
        starts (`torch.LongTensor` of shape (B,)): where each text begins, behind its prompt.
        log_probs (`torch.FloatTensor` of shape (B, L)): the donor's, of each token; 0 of what was given.
        commit_steps (`torch.LongTensor` of shape (B, L)): the evaluation, counted from 1, that committed each token.
        branches (`torch.LongTensor` of shape (B, L)): 0 for the donor's own tokens, 1 and 2 for accepted drafts of
            the masks and of the hypothesis.
        nfe (`torch.LongTensor` of shape (B,)): evaluations of the decoder.
        accepted, rejected (`torch.LongTensor` of shape (B, 2)): drafts of the masks and of the hypothesis that were
            as the donor's text, or not.
        no_speech (`torch.FloatTensor` of shape (B,)): the donor's probability of <|nospeech|>, 0 where it has none.
        struck (`list` of B lists of `(place, branch, ids)`): the rejected drafts, and where in the text they stood.
    """

    tokens: torch.LongTensor
    lengths: torch.LongTensor
    starts: torch.LongTensor
    log_probs: torch.Tensor
    commit_steps: torch.LongTensor
    branches: torch.LongTensor
    nfe: torch.LongTensor
    accepted: torch.LongTensor
    rejected: torch.LongTensor
    no_speech: torch.Tensor
    struck: list[list[tuple[int, int, list[int]]]] = field(default_factory=list)

    @classmethod
    def begin(
        cls, prompts: list[list[int]], prefixes: list[list[int]], longest: int, device: torch.device
    ) -> "VerifiedText":
        """Texts of which prompts and prefixes (B lists of ids) are written, with room for `longest` tokens."""
        rows = [torch.tensor([*prompt, *prefix]) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        # And a place that no text reaches.
        tokens = torch.zeros((len(rows), longest + 1), dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        counts = torch.zeros((len(rows), len(BRANCHES)), dtype=torch.long, device=device)
        return cls(
            tokens=tokens.to(device),
            lengths=torch.tensor([len(row) for row in rows], device=device),
            starts=torch.tensor([len(prompt) for prompt in prompts], device=device),
            log_probs=torch.zeros(tokens.shape, device=device),
            commit_steps=torch.zeros_like(tokens, device=device),
            branches=torch.zeros_like(tokens, device=device),
            nfe=torch.zeros(len(rows), dtype=torch.long, device=device),
            accepted=counts,
            rejected=counts.clone(),
            struck=[[] for _ in rows],
            no_speech=torch.zeros(len(rows), device=device),
        )

    def text_ids(self, row: int) -> list[int]:
        """The text of a row, its prefix and end of text included."""
        return self.tokens[row, int(self.starts[row]) : int(self.lengths[row])].tolist()

    def decoded_ids(self, row: int) -> list[int]:
        """The tokens of a row that were decoded: its text behind its prefix."""
        return self.tokens[row][self._is_decoded(row)].tolist()

    def row_log_probs(self, row: int) -> list[float]:
        """The log-probabilities of a row's decoded tokens."""
        return self.log_probs[row][self._is_decoded(row)].tolist()

    def _is_decoded(self, row: int) -> torch.BoolTensor:
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (places < self.lengths[row]) & (self.commit_steps[row] > 0)

    def replace(self, rows: torch.LongTensor, other: "VerifiedText", which: torch.BoolTensor) -> None:
        """Puts texts of another decoding of some rows (N,) in their place, where `which` (N,) says so. The evaluations
        of both count."""
        taken, places = rows[which], which.nonzero().flatten()
        for name in ("tokens", "lengths", "log_probs", "commit_steps", "branches"):
            getattr(self, name)[taken] = getattr(other, name)[places]
        for row, place in zip(taken.tolist(), places.tolist(), strict=True):
            self.struck[row] = other.struck[place]
        for name in ("nfe", "accepted", "rejected"):
            getattr(self, name)[rows] += getattr(other, name)


class VerifiedDecoder:
    """
    Writes texts to their ends, in place:
    ```
    Until every row has its end of text or is full:
    1. Causal rows: the last committed token of each row, and behind it its drafts, branch by branch.
    2. The donor's next token behind each of them; drafts are accepted from the left where they are that token.
    3. Commit those of the longer branch and the donor's own token behind them, and keep their keys.
    4. The masks behind the last position that has keys draft what comes next.
    ```

    Args:
        model ([`MDMASRForConditionalGeneration`]).
        text ([`VerifiedText`]): of B rows.
        encoder_outputs ([`MDMASREncoderOutput`]): with `cross_attention_states`.
        settings ([`MDMASRGenerationConfig`]).
        limits (`list[int]` of length B): the most tokens of each row, prompt included.
        is_open (`torch.BoolTensor` of shape (B,)): the rows to write.
        prompt_length (`int`): of the prompt from the start of a transcript on, behind which the text begins.
        hypotheses (`list` of length B): what each text may turn out to be, or None.
        temperature (`float`): draws the donor's tokens, by noise that each row's seed (B,) and the position give.
        hotwords ([`HotwordAutomaton`], *optional*): of B rows.
        synced_gpus (`bool`): step as long as any process has open rows, once for each step of the others.
    """

    def __init__(
        self,
        model: Any,
        text: VerifiedText,
        encoder_outputs: MDMASREncoderOutput,
        settings: MDMASRGenerationConfig,
        *,
        limits: list[int],
        is_open: torch.BoolTensor,
        prompt_length: int,
        hypotheses: list[Hypothesis | None],
        temperature: float = 0.0,
        seeds: torch.LongTensor | None = None,
        hotwords: HotwordAutomaton | None = None,
        synced_gpus: bool = False,
    ):
        config, device = model.config.decoder_config, text.tokens.device
        self.model, self.text, self.settings, self.synced_gpus = model, text, settings, synced_gpus
        self.limits = torch.tensor(limits, device=device)
        self.prompt_length, self.hypotheses = prompt_length, hypotheses
        self.temperature, self.seeds, self.hotwords = temperature, seeds, hotwords
        self.block_length = config.draft_length
        self.most_drafts = min(settings.draft_length or self.block_length, self.block_length)
        self.most_of_hypothesis = settings.draft_length or HYPOTHESIS_LENGTH
        self.allowance = DraftAllowance(len(limits), len(BRANCHES))
        # Before training only the first draft of a block is right, which costs more than it spares.
        self.uses_masks = "masks" in settings.draft_branches and model.has_trained_drafts
        self.uses_hints = self.uses_masks and config.draft_hints
        self.draft_output = model.short_list_output() if self.uses_masks else None
        self.rows = is_open.nonzero().flatten()
        self.encoder_outputs = encoder_outputs
        if len(self.rows) < len(limits):
            # One at least, to step with where processes wait for each other.
            kept = self.rows if len(self.rows) else self.rows.new_zeros(1)
            self.encoder_outputs = take_rows(encoder_outputs, kept)
        self.cache = DraftingCache(
            config.num_hidden_layers,
            (
                max(len(self.rows), 1),
                config.num_key_value_heads,
                int(self.limits.max()) + self.most_drafts + self.most_of_hypothesis,
                config.head_dim,
            ),
            dtype=model.dtype,
            device=device,
        )
        self.num_cached = torch.zeros_like(self.limits)
        self.mask_drafts = self._nothing()
        for row, hypothesis in enumerate(hypotheses):
            if hypothesis is not None:
                hypothesis.advance(text.text_ids(row))
        self.states = [0] * len(limits)
        if hotwords is not None:
            for row in range(len(limits)):
                self.states[row] = hotwords.start(row)
                self._advance_hotwords(row, text.text_ids(row))

    def run(self, streamer: Any = None) -> None:
        while self.model._any_unfinished(
            torch.tensor(len(self.rows) > 0, device=self.limits.device), self.synced_gpus
        ):
            if len(self.rows):
                self.step()
            else:
                self._idle()
            if streamer is not None and hasattr(streamer, "put_draft"):
                self._show(streamer)

    @torch.no_grad()
    def step(self) -> None:
        """One evaluation of the decoder."""
        text, rows, cache = self.text, self.rows, self.cache
        lengths = text.lengths[rows]
        # 1. Lay the drafts behind the committed text.
        drafts = {0: self.mask_drafts, 1: self._hypothesis_drafts()}
        drafts = {branch: its for branch, its in drafts.items() if its[0].shape[1]}
        tree = DraftTree.lay(text.tokens[rows], lengths, self.num_cached[rows], [*drafts.values()], cache.padding_slot)
        # 2. Evaluate, and accept what the donor says itself.
        logits = self._evaluate(tree)
        unbiased = self._shape_logits(logits, tree, lengths)
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
        has_ended = new.gather(1, num_new[:, None] - 1)[:, 0] == self.model.config.eos_token_id
        if self.settings.no_speech_threshold is not None:
            # Where nobody speaks, nothing more is written.
            has_ended = has_ended | (text.no_speech[rows] > self.settings.no_speech_threshold)
        left = (~has_ended & (text.lengths[rows] < self.limits[rows])).nonzero().flatten()
        if len(left) < len(rows):
            self.rows = rows[left]
            kept = left if len(left) else left.new_zeros(1)
            self.encoder_outputs = take_rows(self.encoder_outputs, kept)
            cache.batch_select_indices(kept)
        self.mask_drafts = self._draft(accepted, left)

    def _nothing(self) -> tuple[torch.LongTensor, torch.LongTensor]:
        ids = self.text.tokens.new_zeros((len(self.rows), 0))
        return ids, ids.new_zeros(len(self.rows))

    def _room(self) -> torch.LongTensor:
        """How many drafts each open row (R,) has positions for, the donor's own token behind them left out."""
        return (self.limits[self.rows] - self.text.lengths[self.rows] - 1).clamp(min=0)

    def _hypothesis_drafts(self) -> tuple[torch.LongTensor, torch.LongTensor]:
        """What is left of the hypotheses: ids (R, M), and how many each row has."""
        room = self._room().cpu()
        limits = torch.minimum(self.allowance.limits(1, self.most_of_hypothesis)[self.rows.cpu()], room).tolist()
        proposed = [
            self.hypotheses[row].propose(limit) if self.hypotheses[row] is not None and limit else []
            for row, limit in zip(self.rows.tolist(), limits, strict=True)
        ]
        ids = self.text.tokens.new_zeros((len(proposed), max(map(len, proposed))))
        for row, its_ids in enumerate(proposed):
            ids[row, : len(its_ids)] = ids.new_tensor(its_ids)
        return ids, ids.new_tensor([len(its_ids) for its_ids in proposed])

    def _evaluate(self, tree: DraftTree) -> torch.Tensor:
        """Logits (R, 1 + M, V) behind the last committed token and behind each draft."""
        text, rows, cache = self.text, self.rows, self.cache
        visible, first = tree.visible, tree.read_from
        cache.place(tree.slots, visible.shape[-1])
        columns = torch.arange(first, tree.ids.shape[1], device=tree.ids.device).expand(len(rows), -1)
        asks_no_speech = self.settings.no_speech_token_id is not None and bool((text.nfe[rows] == 0).all())
        if asks_no_speech:
            # What follows the start of the transcript, where Whisper says whether anybody speaks.
            places = (text.starts[rows] - self.prompt_length) - (text.lengths[rows] - tree.num_committed)
            columns = torch.cat([places[:, None], columns], dim=1)
        outputs = self.model(
            decoder_input_ids=tree.ids,
            decoder_attention_mask=None if bool(visible.all()) else visible,
            encoder_outputs=self.encoder_outputs,
            position_ids=tree.positions,
            past_key_values=cache,
            logits_to_keep=columns,
        )
        logits = outputs.logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if asks_no_speech:
            text.no_speech[rows] = no_speech_probability(logits[:, 0], self.settings.no_speech_token_id)
            logits = logits[:, 1:]
        return logits

    def _shape_logits(self, logits: torch.Tensor, tree: DraftTree, lengths: torch.LongTensor) -> torch.Tensor:
        """Suppresses tokens and raises hotwords in logits (R, 1 + M, V), in place. Returns the logits that confidences
        are of, which hotwords do not raise."""
        settings, text = self.settings, self.text
        if settings.suppress_tokens:
            logits[..., settings.suppress_tokens] = -torch.inf
        if settings.begin_suppress_tokens:
            begins = (lengths == text.starts[self.rows]).nonzero().flatten()
            if len(begins):
                ids = torch.tensor(settings.begin_suppress_tokens, device=logits.device)
                logits[begins[:, None], 0, ids] = -torch.inf
        if self.hotwords is None:
            return logits
        unbiased = logits.clone()
        ids = tree.ids[:, tree.num_committed :].tolist()
        firsts = {first for first, _ in tree.branches}
        states = []
        for row, its_ids in zip(self.rows.tolist(), ids, strict=True):
            states.append(self.states[row])
            for column, token_id in enumerate(its_ids, start=1):
                before = self.states[row] if column in firsts else states[-1]
                states.append(self.hotwords.advance(before, token_id))
        flat, eos_token_id = logits.view(-1, logits.shape[-1]), self.model.config.eos_token_id
        self.hotwords.raise_logits(flat, states, settings.hotword_boost, eos_token_id)
        return unbiased

    def _advance_hotwords(self, row: int, token_ids: list[int]) -> None:
        for token_id in token_ids:
            self.states[row] = self.hotwords.advance(self.states[row], token_id)

    def _commit(
        self,
        lengths: torch.LongTensor,
        chosen: torch.LongTensor,
        logits: torch.Tensor,
        accepted: Acceptance,
        branches: list[int],
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Writes the accepted drafts and the donor's own token behind them into the text; nothing behind an end of
        text or a row's limit. Returns them (R, W), and how many there are (R,)."""
        text, rows = self.text, self.rows
        text.nfe[rows] += 1
        new = chosen.gather(1, accepted.path)
        places = torch.arange(new.shape[1], device=new.device)
        is_eos = new == self.model.config.eos_token_id
        is_new = (places <= accepted.num_accepted[:, None]) & (is_eos.cumsum(dim=1) - is_eos.long() == 0)
        is_new = is_new & (lengths[:, None] + places < self.limits[rows, None])
        # What is not written goes to the last place, which no text reaches.
        target = (lengths[:, None] + places).where(is_new, text.tokens.shape[1] - 1)
        path = accepted.path[..., None].expand(-1, -1, logits.shape[-1])
        log_probs = logits.gather(1, path).log_softmax(dim=-1).gather(-1, new[..., None])[..., 0]
        numbers = torch.tensor([*branches, -1], device=new.device)[accepted.branch] + 1
        at = rows[:, None]
        text.tokens[at, target] = new
        text.log_probs[at, target] = log_probs.to(text.log_probs.dtype)
        text.commit_steps[at, target] = text.nfe[at].expand_as(target)
        text.branches[at, target] = torch.where(places < accepted.num_accepted[:, None], numbers[:, None], 0)
        num_new = is_new.sum(dim=1)
        text.lengths[rows] = lengths + num_new
        return new, num_new

    def _count(
        self,
        branch: int,
        drafts: tuple[torch.LongTensor, torch.LongTensor],
        num_accepted: torch.LongTensor,
        lengths: torch.LongTensor,
    ) -> None:
        """Takes note of how a branch's drafts (R, M) fared."""
        text, rows, (ids, counts) = self.text, self.rows, drafts
        text.accepted[rows, branch] += num_accepted
        text.rejected[rows, branch] += counts - num_accepted
        self.allowance.note(rows.cpu(), branch, counts.cpu(), num_accepted.cpu())
        starts = (lengths + num_accepted - text.starts[rows]).tolist()
        struck = zip(rows.tolist(), ids.tolist(), num_accepted.tolist(), counts.tolist(), starts, strict=True)
        for row, its_ids, first, count, start in struck:
            if first < count:
                text.struck[row].append((start, branch, its_ids[first:count]))

    def _keep(self, lengths: torch.LongTensor, accepted: Acceptance) -> None:
        """Moves the keys of accepted drafts to where committed tokens stand, if their branch was not the first."""
        steps = torch.arange(accepted.path.shape[1] - 1, device=lengths.device)
        source, target = lengths[:, None] - 1 + accepted.path[:, 1:], lengths[:, None] + steps
        is_moved = (steps < accepted.num_accepted[:, None]) & (source != target)
        if bool(is_moved.any()):
            padding = self.cache.padding_slot
            self.cache.move(source.where(is_moved, padding), target.where(is_moved, padding))

    def _draft(self, accepted: Acceptance, left: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks' drafts (R, M) for the next evaluation of the rows that are left (R,), and how many each has."""
        text, rows, model = self.text, self.rows, self.model
        if not self.uses_masks:
            return self._nothing()
        if not len(rows):
            return self._idle_block()
        asked = self.allowance.limits(0, self.most_drafts)[rows.cpu()].to(rows.device)
        limits = torch.minimum(asked, self._room())
        if not bool((limits > 0).any()):
            return self._idle_block()
        lengths = text.lengths[rows]
        last_tokens = text.tokens[rows[:, None], lengths[:, None] - torch.tensor([2, 1], device=rows.device)]
        block_ids = lay_blocks(last_tokens[:, 1:], self.block_length, model.config.mask_token_id)
        ids, counts = (drafts[left] for drafts in self.mask_drafts)
        if self.uses_hints and ids.shape[1]:
            drafted = ids.where(torch.arange(ids.shape[1], device=ids.device) < counts[:, None], block_ids[:, 0, -1:])
            # The first that was not accepted stands where the donor's own token is now.
            block_ids = lay_hints(block_ids, drafted[:, None], accepted.num_accepted[left, None] + 1)
        states = self._block_states(block_ids, lengths[:, None] - 2)
        places = model.draft_candidates(states, self.draft_output)
        return propose_drafts(
            lambda k, *before: model.draft_logits(states[:, k], *before, places[:, k], self.draft_output),
            model.draft_token_ids[places],
            last_tokens,
            limits,
            self.settings.sampler_config.gamma,
            model.config.eos_token_id,
        )

    def _block_states(self, block_ids: torch.LongTensor, frontiers: torch.LongTensor) -> torch.Tensor:
        """The states (R, K, D) of a block (R, 1, K) behind each row's frontier (R, 1)."""
        none = block_ids.new_zeros((len(block_ids), 0))
        num_keys = int(frontiers.max()) + 1
        self.cache.place(none, num_keys)
        outputs = self.model(
            decoder_input_ids=none,
            encoder_outputs=self.encoder_outputs,
            past_key_values=self.cache,
            frontiers=frontiers,
            frontier_mask=torch.arange(num_keys, device=frontiers.device) <= frontiers[..., None],
            block_ids=block_ids,
            logits_to_keep=none,
        )
        return outputs.draft_hidden_states[:, 0]

    def _idle(self) -> None:
        """An evaluation whose result nobody needs, while other processes have rows that are open."""
        zeros = self.text.tokens.new_zeros((1, 1))
        self.cache.place(zeros, 1)
        self.model(
            decoder_input_ids=zeros,
            encoder_outputs=self.encoder_outputs,
            position_ids=zeros,
            past_key_values=self.cache,
        )
        self._idle_block()

    def _idle_block(self) -> tuple[torch.LongTensor, torch.LongTensor]:
        """No drafts; where processes wait for each other, by the same calls as any."""
        if self.synced_gpus and self.uses_masks:
            zeros = self.text.tokens.new_zeros((len(self.encoder_outputs.last_hidden_state), 1))
            self._block_states(lay_blocks(zeros, self.block_length, self.model.config.mask_token_id), zeros)
        return self._nothing()

    def _show(self, streamer: Any) -> None:
        """Hands a streamer the committed text of all rows (B, L) with the drafts behind it, and how much is
        committed."""
        text = self.text
        texts = [text.text_ids(row) for row in range(len(text.lengths))]
        committed = [len(ids) for ids in texts]
        for row, ids, count in zip(self.rows.tolist(), *(x.tolist() for x in self.mask_drafts), strict=True):
            texts[row] += ids[:count]
        pad = self.model.config.pad_token_id
        rows = [torch.tensor(ids, dtype=torch.long) for ids in texts]
        value = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        streamer.put_draft(value=value, num_committed=torch.tensor(committed))


__all__ = ["VerifiedDecoder", "VerifiedText"]
