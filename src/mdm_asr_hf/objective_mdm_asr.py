# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The training objective: masked diffusion in one step, or in several with iterative self-correction (ISCT)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

from .diffusion_mdm_asr import (
    NoiseSchedule,
    PositionBiasedMasking,
    UniformMasking,
    draw_uniform,
    make_schedule,
    mask_tokens,
    masked_diffusion_loss,
    masking_probability,
    sample_timesteps,
)


@dataclass(frozen=True)
class DiffusionObjective:
    """
    What a training step minimises.

    Args:
        schedule (`str`): "linear" (the paper's), "cosine" or "log_linear", see `diffusion_mdm_asr`.
        num_steps (`int`): 1 is the plain masked diffusion loss; 2 is the paper's ISCT; more go on in the same way.
        position_biased_share (`float`):
            The share of rows, drawn at random, whose masks are position-biased instead of uniform. 0 is the paper's.
        band_width (`float`): width in tokens of the band of position-biased masks, see `PositionBiasedMasking`.
        stop_gradient (`bool`):
            No gradient passes from a step into the one before (the paper leaves it open). False passes it through the
            predicted tokens by a straight-through estimate.
        eos_weight (`float`):
            Weight of the positions behind a row's first EOS. They are most of a canvas and nearly free; 1 is the
            paper's.
        weighting (`str`):
            "bound", the paper's: each masked token weighs -alpha'_t / (1 - alpha_t), which makes the loss a bound of
            the likelihood. "flat": all that the bound counts weigh alike, so that no batch hangs on the one token that
            a small t masked; no bound any more, but gradients of less variance.
    """

    schedule: str = "linear"
    num_steps: int = 1
    position_biased_share: float = 0.0
    band_width: float = 8.0
    stop_gradient: bool = True
    eos_weight: float = 1.0
    weighting: str = "bound"

    def __post_init__(self):
        make_schedule(self.schedule)
        PositionBiasedMasking(self.band_width)
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"`num_steps` must be an integer of at least 1, got {self.num_steps!r}.")
        if not 0 <= self.position_biased_share <= 1:
            raise ValueError(f"`position_biased_share` must be in [0, 1], got {self.position_biased_share!r}.")
        if not 0 <= self.eos_weight < float("inf"):
            raise ValueError(f"`eos_weight` must be a finite number >= 0, got {self.eos_weight!r}.")
        if self.weighting not in ("bound", "flat"):
            raise ValueError(f"`weighting` must be 'bound' or 'flat', got {self.weighting!r}.")

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return make_schedule(self.schedule)


@dataclass(frozen=True)
class ObjectiveOutput:
    """
    Attributes:
        loss (`torch.Tensor`): the sum of the steps' losses.
        logits (`torch.Tensor` of shape (B, L, V)): of the last step.
        step_losses, step_accuracies (`torch.Tensor` of shape (S,)): without gradient.
        canvases (`tuple` of S `torch.LongTensor` of shape (B, L)): what the decoder saw.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    step_losses: torch.Tensor
    step_accuracies: torch.Tensor
    canvases: tuple[torch.LongTensor, ...]


def diffusion_objective(
    decode: Callable[..., torch.Tensor],
    targets: torch.LongTensor,
    canvas_mask: torch.BoolTensor,
    objective: DiffusionObjective,
    *,
    mask_token_id: int,
    eos_token_id: int,
    embed: Callable[[torch.LongTensor], torch.Tensor] | None = None,
    embedding: torch.Tensor | None = None,
    timesteps: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ObjectiveOutput:
    """
    Runs the steps of the objective (arXiv 2602.18952, ISCT):
    ```
    1. Draw t, mask the ground truth, predict: loss 1.
    2. Draw t again, mask the prediction (what was visible is carried over, so wrong tokens stay), predict again
    against
       the ground truth at the masked positions: loss 2. And so on for more steps.
    3. The loss is the sum.
    ```

    Args:
        decode (`Callable`): (canvas (B, L), token_embeds (B, L, D) or None) -> logits (B, L, V) of the canvas.
        targets (`torch.LongTensor` of shape (B, L)): texts on EOS-filled canvases.
        canvas_mask (`torch.BoolTensor` of shape (B, L)): positions that belong to a row's canvas.
        embed, embedding: ids to token embeddings, and their matrix (V, D); needed without `stop_gradient` only.
        timesteps (`torch.Tensor` of shape (B,) or (S, B), *optional*): drawn if missing.
        generator (`torch.Generator`, *optional*): seeds all draws.
    """
    batch_size, device = len(targets), targets.device
    schedule = objective.noise_schedule
    if timesteps is not None:
        timesteps = timesteps.to(device).expand(objective.num_steps, batch_size)
    # Up to and including the first EOS; a text that fills its canvas has none.
    is_eos = (targets == eos_token_id) & canvas_mask
    behind_eos = (is_eos.cumsum(dim=-1) - is_eos.long()) > 0
    text_lengths = (canvas_mask & ~behind_eos).sum(dim=-1)
    position_weight = torch.where(behind_eos, objective.eos_weight, 1.0)
    is_biased = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
    if objective.position_biased_share > 0:
        is_biased = draw_uniform((batch_size, 1), device, generator) < objective.position_biased_share

    visible, prediction_grad, logits = targets, None, None
    losses, accuracies, canvases = [], [], []
    for step in range(objective.num_steps):
        if timesteps is not None:
            t = timesteps[step]
        else:
            t = sample_timesteps(batch_size, low_discrepancy=True, device=device, generator=generator)
        shared = {"canvas_mask": canvas_mask, "text_lengths": text_lengths, "schedule": schedule}
        probability, weight = masking_probability(t, masking=UniformMasking(), **shared)
        if objective.position_biased_share > 0:
            biased = masking_probability(t, masking=PositionBiasedMasking(objective.band_width), **shared)
            probability = torch.where(is_biased, biased[0], probability)
            weight = torch.where(is_biased, biased[1], weight)
        if objective.weighting == "flat":
            weight = (weight > 0).to(weight.dtype)
        canvas, masked = mask_tokens(visible, probability, mask_token_id=mask_token_id, generator=generator)
        token_embeds = None
        if prediction_grad is not None:
            # The value of the embedding, the gradient of the probabilities.
            token_embeds = embed(canvas) + torch.where(masked[..., None], 0.0, prediction_grad)
        logits = decode(canvas, token_embeds)
        losses.append(masked_diffusion_loss(logits, targets, masked, weight * position_weight, canvas_mask))
        canvases.append(canvas)
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == targets) & masked
            accuracies.append(right.sum() / masked.sum().clamp(min=1))
        if step + 1 < objective.num_steps:
            # SUBS: what was visible is carried over unchanged.
            visible = torch.where(masked, logits.detach().argmax(dim=-1), canvas)
            if not objective.stop_gradient:
                mixture = logits.softmax(dim=-1).to(embedding.dtype) @ embedding
                prediction_grad = torch.where(masked[..., None], mixture - mixture.detach(), 0.0)
    loss = torch.stack(losses).sum()
    return ObjectiveOutput(
        loss, logits, torch.stack(losses).detach(), torch.stack(accuracies).detach(), tuple(canvases)
    )


@dataclass(frozen=True)
class DraftObjective:
    """
    What training minimises where there are drafts: the weighted sum of the losses below; those of weight 0 are not
    computed. By default the donor's cross-entropy and that of what the masks draft behind some positions of each text.

    Args:
        num_frontiers (`int`): F, positions of each text, drawn at random, that blocks of masks stand behind.
        num_steps (`int`): 2 is ISCT in kind: the blocks' loss, and that of blocks some tokens behind them which see
            what the first drafted at their places. Decoding then shows the masks drafts that were not accepted.
        place_decay (`float`): the weight of a draft by its place in the block, decay^k: it only counts if those before
            it are right.
        donor_weight (`float`): of the donor's cross-entropy on the labels.
        draft_weight (`float`): of the drafts'.
        frame_weight (`float`): of the mean squared distance of the encoder's frames to the teacher's, see
            [`TeacherOutput`].
        logit_weight (`float`): of the Kullback-Leibler divergence of the donor's next token from the teacher's.
    """

    num_frontiers: int = 12
    num_steps: int = 1
    place_decay: float = 0.75
    donor_weight: float = 1.0
    draft_weight: float = 1.0
    frame_weight: float = 0.0
    logit_weight: float = 0.0

    def __post_init__(self):
        if type(self.num_frontiers) is not int or self.num_frontiers < 1:
            raise ValueError(f"`num_frontiers` must be an integer of at least 1, got {self.num_frontiers!r}.")
        if self.num_steps not in (1, 2):
            raise ValueError(f"`num_steps` of drafts must be 1 or 2, got {self.num_steps!r}.")
        if not 0 < self.place_decay <= 1:
            raise ValueError(f"`place_decay` must be above 0 and at most 1, got {self.place_decay!r}.")
        for name in _WEIGHTS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)!r}.")
        if not self.parts:
            raise ValueError("Of a `DraftObjective` one weight at least must be above 0.")

    @property
    def parts(self) -> dict[str, float]:
        """The weights of what is learnt, by name: "donor", "drafts", "frames", "logits"."""
        weights = {part: getattr(self, name) for name, part in _WEIGHTS.items()}
        return {part: weight for part, weight in weights.items() if weight}


_WEIGHTS = {
    "donor_weight": "donor",
    "draft_weight": "drafts",
    "frame_weight": "frames",
    "logit_weight": "logits",
}


@dataclass
class TeacherOutput(ModelOutput):
    """
    What a donor that heard the audio with all the silence it wants made of a batch, for an encoder that is to hear
    less.

    Args:
        frames (`torch.FloatTensor` of shape (B, T, D)): of its encoder.
        num_frames (`torch.LongTensor` of shape (B,)): those of the audio itself, without the silence behind it.
        token_ids (`torch.LongTensor` of shape (B, L, N)): the most probable ones at each of the labels.
        log_probs (`torch.FloatTensor` of shape (B, L, N)): their log-probabilities; any other token has what is left.
    """

    frames: torch.FloatTensor | None = None
    num_frames: torch.LongTensor | None = None
    token_ids: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None


def frame_loss(frames: torch.Tensor, teacher: torch.Tensor, num_frames: torch.LongTensor) -> torch.Tensor:
    """The mean squared distance, over the values of each row's first `num_frames` (B,), of frames (B, T, D) to (B, T',
    D)."""
    length = min(frames.shape[1], teacher.shape[1])
    is_own = torch.arange(length, device=frames.device) < num_frames[:, None]
    distances = (frames[:, :length].float() - teacher[:, :length].float()).square().mean(dim=-1)
    return (distances * is_own).sum() / is_own.sum().clamp(min=1)


def logit_loss(
    logits: torch.Tensor, token_ids: torch.LongTensor, log_probs: torch.Tensor, is_text: torch.BoolTensor
) -> torch.Tensor:
    """
    The mean over tokens (B, L) of sum p (log p - log q), over N ids and all others as one: p the teacher's, q the
    softmax of logits (B, L, V).
    """
    own = logits.float().log_softmax(dim=-1).gather(-1, token_ids)
    rest, own_rest = ((1 - one.exp().sum(dim=-1)).clamp(min=1e-6) for one in (log_probs, own))
    divergence = (log_probs.exp() * (log_probs - own)).sum(dim=-1) + rest * (rest.log() - own_rest.log())
    return (divergence * is_text).sum() / is_text.sum().clamp(min=1)


def draw_frontiers(
    text_lengths: torch.LongTensor, first: int, number: int, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """Positions (B, F) to draft behind, uniform among those from `first` on, of which each row has as many as its text
    has tokens (B,)."""
    uniform = draw_uniform((len(text_lengths), number), text_lengths.device, generator)
    return first + (uniform * text_lengths[:, None]).long()


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


def block_targets(
    sequences: torch.LongTensor, frontiers: torch.LongTensor, length: int, fill: int
) -> torch.LongTensor:
    """The tokens (B, F, length + 2) of sequences (B, S) from each frontier (B, F) on; `fill` beyond their end."""
    places = frontiers[..., None] + torch.arange(length + 2, device=frontiers.device)
    padded = torch.nn.functional.pad(sequences, (0, length + 2), value=fill)
    return padded.gather(1, places.flatten(1)).view(places.shape)


def draft_loss(
    logits: torch.Tensor, targets: torch.LongTensor, token_ids: torch.LongTensor, vocab_size: int, place_decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted mean over drafts of -decay^k log p(token at place k), places without a token or with one beyond the
    short list left out; and the share of drafts that are right.

    Args:
        logits (`torch.Tensor` of shape (B, F, K, N)): of the N ids that can be drafted.
        targets (`torch.LongTensor` of shape (B, F, K)): the tokens, -100 where there is none.
        token_ids (`torch.LongTensor` of shape (N,)): the short list.
    """
    places = torch.full((vocab_size,), -100, device=targets.device)
    places[token_ids] = torch.arange(len(token_ids), device=targets.device)
    short = torch.where(targets >= 0, places[targets.clamp(min=0)], -100)
    is_known = short >= 0
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2).float(), short.flatten(), reduction="none")
    weights = place_decay ** torch.arange(targets.shape[-1], device=targets.device).float() * is_known
    loss = (losses * weights.flatten()).sum() / weights.sum().clamp(min=1e-9)
    return loss, _share(logits.detach().argmax(dim=-1) == short, is_known)


def _share(is_right: torch.BoolTensor, is_counted: torch.BoolTensor) -> torch.Tensor:
    return (is_right & is_counted).sum() / is_counted.sum().clamp(min=1)


__all__ = [
    "DiffusionObjective",
    "DraftObjective",
    "ObjectiveOutput",
    "TeacherOutput",
    "block_targets",
    "diffusion_objective",
    "draft_loss",
    "draw_frontiers",
    "frame_loss",
    "lay_blocks",
    "lay_hints",
    "logit_loss",
]
