# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The canvas that is being filled: its tokens, what each step committed, and what the decoder reads beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .active_window_mdm_asr import CanvasCache, select_rows
from .diffusion_mdm_asr import draw_uniform
from .encoder_mdm_asr import MDMASREncoderOutput
from .sampling_mdm_asr import SamplerOutput

# In `draft_ids`, as in labels: a position that nothing is known of.
OPEN_ID = -100
# Finished rows are dropped once they are this share of the rows that the decoder reads. To drop some means to copy
# the others' keys, which in a large batch of long clips takes longer than a step.
DROPPED_SHARE = 1 / 8


@dataclass
class Canvas:
    """
    B canvases of up to L tokens and the record of their denoising.

    Attributes:
        tokens (`torch.LongTensor` of shape (B, L)): `mask_token_id` where nothing is committed; EOS outside.
        mask (`torch.BoolTensor` of shape (B, L)): the positions of each row's own canvas.
        confidence (`torch.FloatTensor` of shape (B, L)): each token's probability in the step that committed it.
        commit_steps (`torch.LongTensor` of shape (B, L)): that step, counted from 1; 0 for what was drafted.
        nfe (`torch.LongTensor` of shape (B,)): decoder evaluations so far.
    """

    tokens: torch.LongTensor
    mask: torch.BoolTensor
    confidence: torch.Tensor
    commit_steps: torch.LongTensor
    nfe: torch.LongTensor
    mask_token_id: int
    eos_token_id: int

    @classmethod
    def lay(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        *,
        mask_token_id: int,
        eos_token_id: int,
        draft_ids: torch.LongTensor | None = None,
        has_speech: torch.BoolTensor | None = None,
    ) -> "Canvas":
        """
        Canvases of the lengths (B,), all masked but for the draft (B, K), see `read_draft`; rows without speech (B,)
        end at once.
        """
        positions = torch.arange(max(lengths), device=device)
        mask = positions < torch.tensor(lengths, device=device)[:, None]
        tokens = torch.full(mask.shape, mask_token_id, device=device).masked_fill(~mask, eos_token_id)
        confidence = torch.zeros(mask.shape, device=device)
        if draft_ids is not None:
            drafted = torch.nn.functional.pad(
                draft_ids.to(device), (0, mask.shape[1] - draft_ids.shape[1]), value=OPEN_ID
            )
            is_known = (drafted != OPEN_ID) & mask
            tokens = torch.where(is_known, drafted, tokens)
            confidence = confidence.masked_fill(is_known, 1.0)
        if has_speech is not None:
            tokens = tokens.masked_fill(~has_speech[:, None], eos_token_id)
            confidence = confidence.masked_fill(~has_speech[:, None], 0.0)
        return cls(
            tokens=tokens,
            mask=mask,
            confidence=confidence,
            commit_steps=torch.zeros_like(tokens),
            nfe=torch.zeros(len(mask), dtype=torch.long, device=device),
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
        )

    def open_positions(self) -> torch.BoolTensor:
        """Positions (B, L) still to be committed: masked, and before the row's first EOS."""
        ended = (self.tokens == self.eos_token_id).cummax(dim=-1).values
        return (self.tokens == self.mask_token_id) & self.mask & ~ended

    def text_positions(self) -> torch.BoolTensor:
        """Positions (B, L) of the text and its end: up to the row's first EOS."""
        is_eos = (self.tokens == self.eos_token_id) & self.mask
        return self.mask & ((is_eos.cumsum(dim=-1) - is_eos.long()) == 0)

    def in_last_step(self, max_denoising_steps: int) -> torch.BoolTensor:
        """Rows (B,) whose next decoder evaluation is their last, which commits all that is open."""
        return self.nfe >= max_denoising_steps - 1

    def commit(self, step: SamplerOutput, candidates: torch.BoolTensor) -> None:
        """Writes down what a sampler's step committed among its candidates (B, L): one more decoder evaluation of
        their rows."""
        self.nfe = self.nfe + candidates.any(dim=-1)
        self.tokens = step.canvas
        self.confidence = torch.where(step.committed, step.confidence, self.confidence)
        self.commit_steps = torch.where(step.committed, self.nfe[:, None], self.commit_steps)

    def fresh(self, num_evaluations: int) -> torch.BoolTensor:
        """Positions (B, L) of the text that the last so many evaluations of their rows committed."""
        is_fresh = (self.commit_steps > self.nfe[:, None] - num_evaluations) & (self.commit_steps > 0)
        return is_fresh & self.text_positions()

    def revise(
        self, positions: torch.BoolTensor, tokens: torch.LongTensor, log_probs: torch.Tensor, above: float
    ) -> None:
        """
        Puts proposed tokens (N,) at N committed positions (B, L), in row-major order, where their probability is above
        a bound and other tokens stand there.
        """
        probs = log_probs.exp()
        is_other = (probs > above) & (tokens != self.tokens[positions])
        changed = positions.masked_scatter(positions, is_other)
        self.tokens = self.tokens.masked_scatter(changed, tokens[is_other])
        self.confidence = self.confidence.masked_scatter(changed, probs[is_other])

    def reopen(self, positions: torch.BoolTensor) -> None:
        """Masks positions (B, L) again."""
        self.tokens = self.tokens.masked_fill(positions, self.mask_token_id)
        self.confidence = self.confidence.masked_fill(positions, 0.0)
        self.commit_steps = self.commit_steps.masked_fill(positions, 0)

    def drafted(self) -> torch.BoolTensor:
        """Positions (B, L) that a draft gave."""
        return (self.commit_steps == 0) & (self.confidence > 0)

    def take_out(self, positions: torch.BoolTensor, filling: torch.LongTensor) -> None:
        """Takes positions (B, L) out; what follows moves to the left, and each row's end fills up with (B, 1) ids."""
        order = positions.int().sort(dim=-1, stable=True).indices
        ends = self.mask.sum(dim=-1, keepdim=True)
        places = torch.arange(self.mask.shape[1], device=positions.device)
        is_new = self.mask & (places >= ends - positions.sum(dim=-1, keepdim=True))
        self.tokens = torch.where(is_new, filling, self.tokens.gather(-1, order))
        self.tokens = self.tokens.masked_fill(~self.mask, self.eos_token_id)
        self.confidence = self.confidence.gather(-1, order).masked_fill(is_new | ~self.mask, 0.0)
        self.commit_steps = self.commit_steps.gather(-1, order).masked_fill(is_new | ~self.mask, 0)

    def empty(self, rows: torch.BoolTensor) -> None:
        """Takes everything off the canvases of rows (B,): an end of text, committed by their last step with a
        confidence of 0, is all they have."""
        self.tokens = self.tokens.masked_fill(rows[:, None], self.eos_token_id)
        self.confidence = self.confidence.masked_fill(rows[:, None], 0.0)
        self.commit_steps = torch.where(rows[:, None], self.nfe[:, None], self.commit_steps)

    def cut(self, pad_token_id: int) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """Rows cut behind their first EOS: sequences, confidences and commit steps (B, W)."""
        kept = self.text_positions()
        width = int(kept.sum(dim=-1).max())
        cut = ((self.tokens, pad_token_id), (self.confidence, 0.0), (self.commit_steps, 0))
        return tuple(values.masked_fill(~kept, padding)[:, :width] for values, padding in cut)

    def num_full(self) -> int:
        """How many rows have no end of text."""
        return int((~((self.tokens == self.eos_token_id) & self.mask).any(dim=-1)).sum())


def read_draft(draft_ids: torch.LongTensor | Sequence[Sequence[int]], batch_size: int, num_ids: int) -> torch.Tensor:
    """
    A draft as a tensor (B, K), `OPEN_ID` where nothing is known; lists may differ in length.

    Raises:
        ValueError: another number of rows than `batch_size`, or ids that cannot stand on a canvas.
    """
    if not isinstance(draft_ids, torch.Tensor):
        rows = [torch.as_tensor(row, dtype=torch.long).reshape(-1) for row in draft_ids]
        draft_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=OPEN_ID)
    if draft_ids.dim() != 2 or len(draft_ids) != batch_size:
        raise ValueError(
            f"`draft_ids` of shape {tuple(draft_ids.shape)} must be ({batch_size}, K), one row per utterance."
        )
    if bool(((draft_ids != OPEN_ID) & ((draft_ids < 0) | (draft_ids >= num_ids))).any()):
        raise ValueError(f"`draft_ids` must be token ids below {num_ids}, or {OPEN_ID} where the canvas is open.")
    return draft_ids


def draw_noise(
    generator: torch.Generator | list[torch.Generator] | None, canvas_lengths: list[int], device: torch.device
) -> torch.Tensor:
    """
    Uniform noise (B, L, 2) for one sampler step. With one generator per row, a row's numbers depend on its own
    generator and canvas length alone, so that it is sampled alike in every batch.
    """
    longest = max(canvas_lengths)
    if not isinstance(generator, (list, tuple)):
        return draw_uniform((len(canvas_lengths), longest, 2), device, generator)
    rows = [torch.rand((n, 2), generator=g, device=g.device) for g, n in zip(generator, canvas_lengths, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


class OpenRows:
    """
    What the decoder reads of the rows that are not finished: prompts, encoder outputs and cached keys, made narrower
    as rows finish, so that a batch costs little more than its rows do. Up to 8 rows drop out one by one, larger
    batches several at a time.

    Attributes:
        rows (`torch.LongTensor` of shape (R,)): places in the batch of the open rows, and of a few finished ones.
        prompt_ids (`torch.LongTensor` of shape (R, P)).
        encoder_outputs ([`MDMASREncoderOutput`]): of R rows.
        cache ([`CanvasCache`], *optional*): of R rows.
        computed (`torch.LongTensor` of shape (R, P + L), *optional*): the ids that the cache was computed of, -1 for
            none.
    """

    def __init__(self, prompt_ids: torch.LongTensor, encoder_outputs: MDMASREncoderOutput):
        self.rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        self.prompt_ids, self.encoder_outputs = prompt_ids, encoder_outputs
        self.cache: CanvasCache | None = None
        self.computed: torch.LongTensor | None = None
        self._owns_outputs = False

    def narrow(self, is_open: torch.BoolTensor) -> None:
        """Drops the rows that are not open (B,) any more, if they are enough."""
        kept = is_open[self.rows].nonzero().squeeze(-1)
        if len(self.rows) - len(kept) < DROPPED_SHARE * len(self.rows):
            return
        self.rows, self.prompt_ids = self.rows[kept], self.prompt_ids[kept]
        # The first time, they are the caller's, or needed once more for a repair.
        self.encoder_outputs = take_rows(self.encoder_outputs, kept, in_place=self._owns_outputs)
        self._owns_outputs = True
        if self.computed is not None:
            self.computed = self.computed[kept]
        if self.cache is not None:
            self.cache.take_rows(kept)


def take_rows(outputs: MDMASREncoderOutput, rows: torch.LongTensor, in_place: bool = False) -> MDMASREncoderOutput:
    """Frames, mask and cross-attention states of some rows, by their indices, see `select_rows`."""

    def take(values: torch.Tensor) -> torch.Tensor:
        return select_rows(values, rows, in_place)

    mask = outputs.attention_mask
    return MDMASREncoderOutput(
        last_hidden_state=take(outputs.last_hidden_state),
        # Which may be a view that repeats its elements, and cannot be written to.
        attention_mask=None if mask is None else select_rows(mask, rows),
        cross_attention_states=tuple((take(key), take(value)) for key, value in outputs.cross_attention_states),
    )


__all__ = ["OPEN_ID", "Canvas", "OpenRows", "draw_noise", "read_draft", "take_rows"]
