# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The forward process and the objective of masked diffusion: pure tensor functions that never see a model."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

# t is drawn from (T_MIN, 1]: the weights have no bound at 0.
T_MIN = 1e-3


@dataclass(frozen=True)
class NoiseSchedule:
    """Base of the noise schedules: alpha_t is the probability that a token is still visible at time t in (0, 1]."""

    name: ClassVar[str] = ""

    def alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """-alpha'_t / (1 - alpha_t), the weight of the loss at time t (arXiv 2406.07524, eq. 10)."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearSchedule(NoiseSchedule):
    """alpha_t = 1 - t, weight 1 / t: the paper's (arXiv 2602.18952)."""

    name: ClassVar[str] = "linear"

    def alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        return 1.0 - timesteps

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        return 1.0 / timesteps


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """alpha_t = 1 - cos(pi / 2 (1 - t)), weight pi / 2 tan(pi / 2 (1 - t)) (arXiv 2406.04329): more time at high
    noise."""

    name: ClassVar[str] = "cosine"

    def alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        return 1.0 - torch.cos(math.pi / 2 * (1.0 - timesteps))

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        return math.pi / 2 * torch.tan(math.pi / 2 * (1.0 - timesteps))


@dataclass(frozen=True)
class LogLinearSchedule(NoiseSchedule):
    """
    sigma_t = -log(1 - (1 - eps) t), so alpha_t = exp(-sigma_t) = 1 - (1 - eps) t and the weight 1 / t (arXiv
    2406.07524): a few tokens stay visible even at t = 1.
    """

    name: ClassVar[str] = "log_linear"
    eps: float = 1e-3

    def alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        return 1.0 - (1.0 - self.eps) * timesteps

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        return 1.0 / timesteps


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    schedule.name: schedule for schedule in (LinearSchedule, CosineSchedule, LogLinearSchedule)
}


def make_schedule(schedule: str | NoiseSchedule) -> NoiseSchedule:
    """The schedule of a name. Raises ValueError for an unknown one."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    key = str(schedule).lower().replace("-", "_")
    if key not in SCHEDULES:
        raise ValueError(f"`schedule` {schedule!r} is unknown. Use one of {sorted(SCHEDULES)}.")
    return SCHEDULES[key]()


@dataclass(frozen=True)
class UniformMasking:
    """Every position is masked with the same probability 1 - alpha_t: the paper's forward process."""

    name: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class PositionBiasedMasking:
    """
    Masks that resemble the states PBEB-Conf passes through: visible on the left, masked on the right, mixed in a band
    of `width` tokens between them.

    It is masked diffusion with a schedule per position: position i of a text of n positions (its first EOS included)
    is masked with probability p_i(s) = clip((s (n + w) - (n - 1 - i)) / w, 0, 1) where s = 1 - alpha_t and w =
    `width`: from the right to the left as s grows. Its weight p_i'(s) / p_i(s) makes the loss the same bound as the
    uniform one; it is 0 where a position is masked for certain, since the reverse process does not commit it at that
    time. Positions behind the first EOS, which PBEB-Conf never refines, are always masked and bear no loss.
    """

    name: ClassVar[str] = "position_biased"
    width: float = 8.0

    def __post_init__(self):
        if not self.width > 0:
            raise ValueError(f"`width` must be positive, got {self.width!r}.")


Masking = UniformMasking | PositionBiasedMasking


def draw_uniform(
    shape: tuple[int, ...], device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Uniform on [0, 1). Drawn where the generator lives, so that one seed gives the same numbers on every device."""
    return torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)


def sample_timesteps(
    batch_size: int,
    *,
    low_discrepancy: bool = False,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Draws one time per row, uniform on (T_MIN, 1]. Returns float32 of shape (B,).

    Args:
        low_discrepancy (`bool`):
            One shared offset and B evenly spaced times in random order: each is uniform, and together they cover (0,
            1], which lowers the variance of the batch's loss (arXiv 2107.00630, appendix I.1).
    """
    if low_discrepancy:
        offset = draw_uniform((1,), device, generator)
        where = generator.device if generator is not None else device
        order = torch.randperm(batch_size, generator=generator, device=where).to(device)
        uniform = ((order + offset) / batch_size).clamp(max=1.0 - torch.finfo(torch.float32).eps)
    else:
        uniform = draw_uniform((batch_size,), device, generator)
    return 1.0 - (1.0 - T_MIN) * uniform


def masking_probability(
    timesteps: torch.Tensor,
    canvas_mask: torch.BoolTensor,
    text_lengths: torch.LongTensor,
    *,
    schedule: NoiseSchedule,
    masking: Masking,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The probability of each position to be masked at time t, and the weight of its loss.

    Args:
        timesteps (`torch.Tensor` of shape (B,)).
        canvas_mask (`torch.BoolTensor` of shape (B, L)): positions that belong to a row's canvas; others are never
            masked.
        text_lengths (`torch.LongTensor` of shape (B,)): tokens of each text, its first EOS included.

    Returns:
        two tensors of shape (B, L), float32.
    """
    masked_share, weight = (1.0 - schedule.alpha(timesteps))[:, None], schedule.weight(timesteps)[:, None]
    if isinstance(masking, UniformMasking):
        probability, weight = masked_share.expand(canvas_mask.shape), weight.expand(canvas_mask.shape)
    else:
        positions = torch.arange(canvas_mask.shape[-1], device=canvas_mask.device)
        lengths, width = text_lengths[:, None], masking.width
        reach = masked_share * (lengths + width) - (lengths - 1 - positions)
        probability = (reach / width).clamp(0.0, 1.0)
        # d p / d t = d p / d s * d s / d t, and d s / d t = -alpha' = weight * (1 - alpha).
        slope = (lengths + width) / width * weight * masked_share
        in_band = (probability > 0) & (probability < 1) & (positions < lengths)
        weight = torch.where(in_band, slope / probability.clamp(min=1e-6), 0.0)
        probability = torch.where(positions < lengths, probability, 1.0)
    return probability * canvas_mask, weight * canvas_mask


def mask_tokens(
    tokens: torch.LongTensor,
    probability: torch.Tensor,
    *,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    The absorbing forward process: each token becomes [MASK] with its probability, independently.

    Args:
        tokens (`torch.LongTensor` of shape (B, L)): the clean canvas, or a prediction of it (ISCT's later steps).
        probability (`torch.Tensor` of shape (B, L)): see `masking_probability`.
        generator (`torch.Generator`, *optional*): makes the draw reproducible.

    Returns:
        the noised canvas (B, L) and the mask of masked positions (B, L).
    """
    masked = draw_uniform(tokens.shape, tokens.device, generator) < probability
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
        weights (`torch.Tensor` of shape (B,) or (B, L)): the schedule's weight.
        canvas_mask (`torch.BoolTensor` of shape (B, L), *optional*): positions that belong to the row's canvas.

    Returns:
        a scalar, float32.
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.masked_fill(~masked, -100).flatten(), ignore_index=-100, reduction="none"
    ).view(targets.shape)
    weights = weights[:, None] if weights.dim() == 1 else weights
    num_positions = canvas_mask.sum() if canvas_mask is not None else targets.numel()
    return (losses * weights.to(losses.dtype)).sum() / num_positions


__all__ = [
    "SCHEDULES",
    "T_MIN",
    "CosineSchedule",
    "LinearSchedule",
    "LogLinearSchedule",
    "Masking",
    "NoiseSchedule",
    "PositionBiasedMasking",
    "UniformMasking",
    "draw_uniform",
    "make_schedule",
    "mask_tokens",
    "masked_diffusion_loss",
    "masking_probability",
    "sample_timesteps",
]
