# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward process and the objective of masked diffusion: pure tensor functions that never see a model."""

import torch
from torch import nn

# t is drawn from (T_MIN, 1]: the weight 1 / t of the linear schedule has no bound at 0.
T_MIN = 1e-3


def linear_alpha(timesteps: torch.Tensor) -> torch.Tensor:
    """alpha_t = 1 - t, the probability that a token is still visible at time t (arXiv 2602.18952)."""
    return 1.0 - timesteps


def linear_weight(timesteps: torch.Tensor) -> torch.Tensor:
    """-alpha'_t / (1 - alpha_t) = 1 / t, the loss weight of the linear schedule (arXiv 2602.18952, 2406.07524)."""
    return 1.0 / timesteps


def sample_timesteps(
    batch_size: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws one time per row, uniform on (T_MIN, 1]. Returns float32 of shape (B,)."""
    # Drawn where the generator lives, so that one seed gives the same times on every device.
    where = generator.device if generator is not None else device
    uniform = torch.rand(batch_size, generator=generator, device=where).to(device)
    return 1.0 - (1.0 - T_MIN) * uniform


def mask_tokens(
    tokens: torch.LongTensor,
    timesteps: torch.Tensor,
    *,
    mask_token_id: int,
    maskable: torch.BoolTensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    The absorbing forward process: each token becomes [MASK] with probability 1 - alpha_t = t, independently.

    Args:
        tokens (`torch.LongTensor` of shape (B, L)): the clean canvas, or a prediction of it (ISCT's second step).
        timesteps (`torch.Tensor` of shape (B,)): t in (0, 1] for each row.
        maskable (`torch.BoolTensor` of shape (B, L), *optional*): positions that may be masked. Default: all.
        generator (`torch.Generator`, *optional*): makes the draw reproducible.

    Returns:
        the noised canvas (B, L) and the mask of masked positions (B, L).
    """
    where = generator.device if generator is not None else tokens.device
    uniform = torch.rand(tokens.shape, generator=generator, device=where).to(tokens.device)
    masked = uniform < (1.0 - linear_alpha(timesteps))[:, None]
    if maskable is not None:
        masked = masked & maskable
    return tokens.masked_fill(masked, mask_token_id), masked


def masked_diffusion_loss(
    logits: torch.Tensor,
    targets: torch.LongTensor,
    masked: torch.BoolTensor,
    weights: torch.Tensor,
    canvas_mask: torch.BoolTensor | None = None,
) -> torch.Tensor:
    """
    The objective of arXiv 2602.18952: cross-entropy on masked positions, weighted by -alpha'_t / (1 - alpha_t),
    averaged over all positions of the canvas. At t = 1 it is the plain mean cross-entropy over the canvas.

    Args:
        logits (`torch.Tensor` of shape (B, L, V)).
        targets (`torch.LongTensor` of shape (B, L)).
        masked (`torch.BoolTensor` of shape (B, L)): only these positions bear loss.
        weights (`torch.Tensor` of shape (B,)): the schedule's weight at each row's t.
        canvas_mask (`torch.BoolTensor` of shape (B, L), *optional*): positions that belong to the row's canvas.

    Returns:
        a scalar, float32.
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.masked_fill(~masked, -100).flatten(), ignore_index=-100, reduction="none"
    ).view(targets.shape)
    num_positions = canvas_mask.sum() if canvas_mask is not None else targets.numel()
    return (losses * weights.to(losses.dtype)[:, None]).sum() / num_positions


__all__ = ["T_MIN", "linear_alpha", "linear_weight", "mask_tokens", "masked_diffusion_loss", "sample_timesteps"]
