# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The paper's decoding: a canvas that is filled in a few steps, and its record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .diffusion_mdm_asr import draw_uniform
from .encoder_mdm_asr import MDMASREncoderOutput, take_rows
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .sampling_mdm_asr import SamplerOutput

# Finished rows are dropped once they are this share of the rows that the decoder reads.
DROPPED_SHARE = 1 / 8


@dataclass
class Canvas:
    """
    B canvases of up to L tokens and the record of their denoising.

    Attributes:
        tokens (`torch.LongTensor` of shape (B, L)): `mask_token_id` where nothing is committed; EOS outside.
        mask (`torch.BoolTensor` of shape (B, L)): the positions of each row's own canvas.
        confidence (`torch.FloatTensor` of shape (B, L)): each token's probability in the step that committed it.
        commit_steps (`torch.LongTensor` of shape (B, L)): that step, counted from 1.
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
        has_speech: torch.BoolTensor | None = None,
    ) -> "Canvas":
        """Canvases of the lengths (B,), all masked; rows without speech (B,) end at once."""
        positions = torch.arange(max(lengths), device=device)
        mask = positions < torch.tensor(lengths, device=device)[:, None]
        tokens = torch.full(mask.shape, mask_token_id, device=device).masked_fill(~mask, eos_token_id)
        confidence = torch.zeros(mask.shape, device=device)
        if has_speech is not None:
            tokens = tokens.masked_fill(~has_speech[:, None], eos_token_id)
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

    def commit(self, step: SamplerOutput, candidates: torch.BoolTensor) -> None:
        """Writes down what a sampler's step committed among its candidates (B, L): one more decoder evaluation of
        their rows."""
        self.nfe = self.nfe + candidates.any(dim=-1)
        self.tokens = step.canvas
        self.confidence = torch.where(step.committed, step.confidence, self.confidence)
        self.commit_steps = torch.where(step.committed, self.nfe[:, None], self.commit_steps)

    def cut(self, pad_token_id: int) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """Rows cut behind their first EOS: sequences, confidences and commit steps (B, W)."""
        kept = self.text_positions()
        width = int(kept.sum(dim=-1).max())
        cut = ((self.tokens, pad_token_id), (self.confidence, 0.0), (self.commit_steps, 0))
        return tuple(values.masked_fill(~kept, padding)[:, :width] for values, padding in cut)

    def num_full(self) -> int:
        """How many rows have no end of text."""
        return int((~((self.tokens == self.eos_token_id) & self.mask).any(dim=-1)).sum())


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


def denoise(
    model: Any,
    canvas: Canvas,
    prompt_ids: torch.LongTensor,
    encoder_outputs: MDMASREncoderOutput,
    settings: MDMASRGenerationConfig,
    lengths: list[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    streamer: Any = None,
    synced_gpus: bool = False,
) -> None:
    """
    Steps, in place, until every row of the canvas is finished (arXiv 2602.18952); a row's last step, by
    `max_denoising_steps`, commits all it has open. `prompt_ids` (B, P) and `encoder_outputs`, of B rows, are what the
    decoder reads beside the canvases, and `lengths` (B,) are theirs.
    """
    sampler, temperature = settings.sampler, settings.temperatures[0]
    noisy = temperature > 0 or sampler.needs_noise
    candidates = canvas.open_positions()
    # The rows that the decoder reads: open ones and few others, so that a batch costs little more than they do.
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    while model._any_unfinished(candidates.any(), synced_gpus):
        if not synced_gpus:
            kept = candidates.any(dim=-1)[rows].nonzero().squeeze(-1)
            if len(rows) - len(kept) >= DROPPED_SHARE * len(rows):
                rows, prompt_ids = rows[kept], prompt_ids[kept]
                encoder_outputs = take_rows(encoder_outputs, kept)
        # The output layer is as wide as the vocabulary: it is spared for all positions but the open ones.
        outputs = model(
            decoder_input_ids=torch.cat([prompt_ids, canvas.tokens[rows]], dim=-1),
            decoder_attention_mask=torch.cat(
                [torch.ones_like(prompt_ids, dtype=torch.bool), canvas.mask[rows]], dim=-1
            ),
            encoder_outputs=encoder_outputs,
            logits_to_keep=candidates[rows],
        )
        logits = outputs.logits.float()
        if settings.suppress_tokens:
            logits[..., settings.suppress_tokens] = -torch.inf
        step = sampler.step(
            logits,
            canvas.tokens,
            candidates,
            # A finished row has nothing to commit, whatever it has left.
            steps_left=(settings.max_denoising_steps - canvas.nfe).clamp(min=1),
            temperature=temperature,
            noise=draw_noise(generator, lengths, canvas.tokens.device) if noisy else None,
        )
        canvas.commit(step, candidates)
        candidates = canvas.open_positions()
        if streamer is not None and hasattr(streamer, "put_draft"):
            streamer.put_draft(value=canvas.tokens.cpu())
