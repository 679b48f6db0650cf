# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The training objective of the active window: canvases as `generate` shows them to the decoder, step by step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .diffusion_mdm_asr import draw_uniform
from .objective_mdm_asr import ObjectiveOutput


@dataclass(frozen=True)
class WindowObjective:
    """
    What a training step minimises where only the active window counts. Not the paper's: PBEB-Conf (arXiv 2602.18952)
    commits near the first open position, so that most positions of a uniformly masked canvas are ones it never
    commits, whose words nobody can know yet. They would be most of the gradient. Here a draw shows a text up to a
    random position, `ahead` positions from there on, most of them masked, and nothing behind them, as `active_ahead`
    does in `generate`.

    Args:
        ahead (`int`): width of the window in tokens, that of the checkpoint's `active_ahead`.
        num_draws (`int`):
            Canvases per text. The d-th of D shows between (d - 1) / D and d / D of the text, so that they cover it,
            and none is computed wider than it shows. All share the keys of the acoustic frames.
        num_steps (`int`):
            1, or more for self-correction as in ISCT: a later step shows the predictions of the one before, 1 to
            `reach` of them behind the first open position, and masks the window from there.
        uniform_share (`float`): of draws with the whole text, masked uniformly, as the paper has them: for refining
            and filling in.
        reach (`int`): see `num_steps`.
        revealed_share (`float`): of windows with tokens visible among the masked, each with a probability of up to
            1/2. The first position of a window is always masked.
        eos_weight (`float`): weight of the positions behind a row's first EOS.
        correction_weight (`float`):
            Weight of positions that show a prediction of an earlier step: what is read there learns to be the right
            token, and so tells whether the one that is shown is. 0 is the paper's, where masked positions alone count.
    """

    ahead: int = 8
    num_draws: int = 3
    num_steps: int = 2
    uniform_share: float = 0.15
    reach: int = 4
    revealed_share: float = 0.5
    eos_weight: float = 0.25
    correction_weight: float = 1.0

    def __post_init__(self):
        for name in ("ahead", "num_draws", "num_steps", "reach"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {getattr(self, name)!r}.")
        for name in ("uniform_share", "revealed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)!r}.")
        for name in ("eos_weight", "correction_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {getattr(self, name)!r}.")


@dataclass
class _Draw:
    """A step's canvas (B, W): the tokens it may show, what the decoder sees of it, and which positions are masked."""

    known: torch.LongTensor
    visible: torch.BoolTensor
    masked: torch.BoolTensor


def _window(
    known: torch.LongTensor,
    starts: torch.LongTensor,
    num_known: torch.LongTensor,
    objective: WindowObjective,
    generator: torch.Generator | None,
) -> _Draw:
    """Windows that begin at `starts` (B,), of tokens `known` (B, L) that may be shown up to `num_known` (B,)."""
    width = min(int(starts.max()) + objective.ahead, known.shape[1])
    known, positions = known[:, :width], torch.arange(width, device=known.device)
    visible = positions < (starts + objective.ahead)[:, None]
    rows = (len(known), 1)
    is_revealing = draw_uniform(rows, known.device, generator) < objective.revealed_share
    share = 0.5 * draw_uniform(rows, known.device, generator) * is_revealing
    hidden = draw_uniform(known.shape, known.device, generator) >= share
    hidden = hidden | (positions == starts[:, None]) | (positions >= num_known[:, None])
    return _Draw(known, visible, (positions >= starts[:, None]) & visible & hidden)


def _uniform(
    known: torch.LongTensor,
    text_lengths: torch.LongTensor,
    objective: WindowObjective,
    generator: torch.Generator | None,
) -> _Draw:
    """The whole text, its EOS and up to `ahead` - 1 positions behind it, masked with a probability per row."""
    behind = (draw_uniform(text_lengths.shape, known.device, generator) * objective.ahead).long()
    num_visible = text_lengths + 1 + behind
    width = min(int(num_visible.max()), known.shape[1])
    visible = torch.arange(width, device=known.device) < num_visible[:, None]
    times = draw_uniform((len(known), 1), known.device, generator)
    masked = draw_uniform(visible.shape, known.device, generator) < times
    return _Draw(known[:, :width], visible, masked & visible)


def window_objective(
    decode: Callable[[torch.LongTensor, torch.BoolTensor, torch.BoolTensor], torch.Tensor],
    targets: torch.LongTensor,
    text_lengths: torch.LongTensor,
    objective: WindowObjective,
    *,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> ObjectiveOutput:
    """
    Runs the draws and steps of the objective. The loss of a step is the weighted mean cross-entropy of its masked
    positions and of those that show a prediction; that of the objective the mean of its draws, summed over the steps.

    Args:
        decode (`Callable`):
            (canvas (B, W), visible positions (B, W), wanted positions (B, W)) -> logits (N, V) of the N wanted ones in
            row-major order. W is at most L.
        targets (`torch.LongTensor` of shape (B, L)): texts on EOS-filled canvases. Windows end at L.
        text_lengths (`torch.LongTensor` of shape (B,)): tokens of each text, without its EOS.

    Returns:
        [`ObjectiveOutput`]: with the logits (N, V) and the canvases (B, W) of the last draw.
    """
    device, batch_size = targets.device, len(targets)
    positions = torch.arange(targets.shape[1], device=device)
    weights = torch.where(positions > text_lengths[:, None], objective.eos_weight, 1.0)
    # A text that fills its canvas has no EOS to predict.
    last = text_lengths.clamp(max=targets.shape[1] - 1)
    losses = [[] for _ in range(objective.num_steps)]
    accuracies = [[] for _ in range(objective.num_steps)]
    for number in range(objective.num_draws):
        is_uniform = bool(draw_uniform((1,), None, generator) < objective.uniform_share)
        known, is_guess, canvases = targets, torch.zeros_like(targets, dtype=torch.bool), []
        offset = draw_uniform((batch_size,), device, generator)
        starts = ((number + offset) / objective.num_draws * (last + 1)).long().minimum(last)
        num_known = torch.full_like(starts, targets.shape[1])
        for step in range(objective.num_steps):
            if is_uniform:
                draw = _uniform(known, last, objective, generator)
            else:
                draw = _window(known, starts, num_known, objective, generator)
            width = draw.known.shape[1]
            canvas = draw.known.masked_fill(draw.masked | ~draw.visible, mask_token_id)
            guessed = is_guess[:, :width] & draw.visible & ~draw.masked
            wanted = draw.masked | guessed if objective.correction_weight else draw.masked
            logits = decode(canvas, draw.visible, wanted).float()
            truth, is_masked = targets[:, :width][wanted], draw.masked[wanted]
            weight = torch.where(is_masked, 1.0, objective.correction_weight) * weights[:, :width][wanted]
            cross_entropy = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
            # No position at all is masked where a time is nearly 0.
            losses[step].append((cross_entropy * weight).sum() / weight.sum().clamp(min=1e-6))
            predicted = logits.detach().argmax(dim=-1)
            right = (predicted == truth) & is_masked
            accuracies[step].append(right.sum() / is_masked.sum().clamp(min=1))
            canvases.append(canvas)
            if step + 1 < objective.num_steps:
                known = known.clone()
                known[:, :width][draw.masked] = predicted[is_masked]
                is_guess = is_guess.clone()
                is_guess[:, :width] |= draw.masked
                num_known = starts + objective.ahead
                moved = (draw_uniform((batch_size,), device, generator) * objective.reach).long() + 1
                starts = (starts + moved).minimum(last)
    step_losses = torch.stack([torch.stack(of_step).mean() for of_step in losses])
    step_accuracies = torch.stack([torch.stack(of_step).mean() for of_step in accuracies])
    return ObjectiveOutput(step_losses.sum(), logits, step_losses.detach(), step_accuracies.detach(), tuple(canvases))


__all__ = ["WindowObjective", "window_objective"]
