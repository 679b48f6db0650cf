# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What training minimises, by tensor functions that never see a model. x is a text on a canvas filled with EOS, t a time
in (0, 1], x_t the canvas at that time, L its length. Of a canvas, as arXiv 2602.18952 has it:

    (1)  alpha_t = 1 - t                                     share of tokens that are visible
    (2)  w_t = -alpha'_t / (1 - alpha_t) = 1 / t             weight of time t (arXiv 2406.07524, eq. 10): `loss_weight`
    (3)  x_t^i = [MASK] with probability 1 - alpha_t, else x^i               `uniform_masking`, `mask_tokens`
    (4)  loss(x, x_t) = w_t / L * sum over masked i of -log p(x^i | x_t)     `masked_diffusion_loss`
    (5)  ISCT: loss(x, x_t) + loss(x, y_s), y the text as x_t is predicted, masked anew at time s
                                                                             `diffusion_objective`

and of drafts, whose decoder is causal beside them:

    (6)  the mean over drafts k of -decay^k log p(x^(f + k) | x^(<= f))      `draft_loss`
    (7)  the mean of |h - h'|^2 over frames h of the encoder, h' a teacher's                `frame_loss`
    (8)  the mean over tokens of KL(p' || p), p' a teacher's                 `logit_loss`
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

# t is drawn from (T_MIN, 1]: the weights have no bound at 0.
T_MIN = 1e-3

# Places of each text, drawn at random, that blocks of drafts stand behind; the weight of a draft by its place in the
# block, decay^k: it only counts if those before it are right.
NUM_FRONTIERS, PLACE_DECAY = 6, 0.75
# Tokens between what is visible and what is masked, where masks are position-biased.
BAND_WIDTH = 8.0

# Of each position of a canvas (B, L): the probability to be masked, and the weight of its loss.
Masking = tuple[torch.Tensor, torch.Tensor]


def loss_weight(timesteps: torch.Tensor) -> torch.Tensor:
    """(2) 1 / t, the weight of the loss at time t in (0, 1]."""
    return 1.0 / timesteps


@dataclass(frozen=True)
class DiffusionObjective:
    """
    What a training step minimises on a canvas.

    Args:
        num_steps (`int`): 1 is the plain masked diffusion loss (4); 2 is the paper's ISCT (5); more go on in the same
            way.
        position_biased_share (`float`):
            The share of rows, drawn at random, whose masks are position-biased instead of uniform. 0 is the paper's.
    """

    num_steps: int = 1
    position_biased_share: float = 0.0

    def __post_init__(self):
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"`num_steps` must be an integer of at least 1, got {self.num_steps!r}.")
        if not 0 <= self.position_biased_share <= 1:
            raise ValueError(f"`position_biased_share` must be in [0, 1], got {self.position_biased_share!r}.")


def draw_uniform(
    shape: tuple[int, ...], device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Uniform on [0, 1). Drawn where the generator lives, so that one seed gives the same numbers on every device."""
    return torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)


def sample_timesteps(
    batch_size: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Draws one time per row, (B,), uniform on (T_MIN, 1]. Of one shared offset and B evenly spaced times in random order
    each is uniform, and together they cover the range, which lowers the variance of the batch's loss (arXiv
    2107.00630, appendix I.1).
    """
    offset = draw_uniform((1,), device, generator)
    where = generator.device if generator is not None else device
    order = torch.randperm(batch_size, generator=generator, device=where).to(device)
    uniform = ((order + offset) / batch_size).clamp(max=1.0 - torch.finfo(torch.float32).eps)
    return 1.0 - (1.0 - T_MIN) * uniform


def uniform_masking(timesteps: torch.Tensor, canvas_mask: torch.BoolTensor) -> Masking:
    """(3) Every position of a row's canvas (B, L) is masked with the same probability 1 - alpha_t, t of (B,)."""
    return timesteps[:, None] * canvas_mask, loss_weight(timesteps)[:, None] * canvas_mask


def position_biased_masking(
    timesteps: torch.Tensor, canvas_mask: torch.BoolTensor, text_lengths: torch.LongTensor
) -> Masking:
    """
    Masks that resemble the states PBEB-Conf passes through: visible on the left, masked on the right, mixed in a band
    of w = `BAND_WIDTH` tokens between them.

    It is masked diffusion with a schedule per position: position i of a text of n positions (B,), its first EOS
    included, is masked with probability p_i(t) = clip((t (n + w) - (n - 1 - i)) / w, 0, 1): from the right to the left
    as t grows. Its weight p_i'(t) / p_i(t) makes the loss the same bound as the uniform one; it is 0
    where a position is masked for certain, since the reverse process does not commit it at that time. Positions behind
    the first EOS, which PBEB-Conf never refines, are always masked and bear no loss.
    """
    positions, lengths = torch.arange(canvas_mask.shape[-1], device=canvas_mask.device), text_lengths[:, None]
    probability = ((timesteps[:, None] * (lengths + BAND_WIDTH) - (lengths - 1 - positions)) / BAND_WIDTH).clamp(
        0.0, 1.0
    )
    in_band = (probability > 0) & (probability < 1) & (positions < lengths)
    weight = torch.where(in_band, (lengths + BAND_WIDTH) / BAND_WIDTH / probability.clamp(min=1e-6), 0.0)
    probability = torch.where(positions < lengths, probability, 1.0)
    return probability * canvas_mask, weight * canvas_mask


def mask_tokens(
    tokens: torch.LongTensor,
    probability: torch.Tensor,
    *,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """(3) Each of the tokens (B, L) becomes [MASK] with its probability (B, L), independently. Returns the noised
    canvas (B, L) and the mask (B, L) of what was masked."""
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
    (4) Cross-entropy on masked positions, weighted, averaged over all positions of the canvas. At t = 1 it is the
    plain mean cross-entropy over the canvas.

    Args:
        logits (`torch.Tensor` of shape (B, L, V)).
        targets (`torch.LongTensor` of shape (B, L)).
        masked (`torch.BoolTensor` of shape (B, L)): only these positions bear loss.
        weights (`torch.Tensor` of shape (B,) or (B, L)): by `loss_weight`, or as the masking gives them.
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
    decode: Callable[[torch.LongTensor], torch.Tensor],
    targets: torch.LongTensor,
    canvas_mask: torch.BoolTensor,
    objective: DiffusionObjective,
    *,
    mask_token_id: int,
    eos_token_id: int,
    timesteps: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ObjectiveOutput:
    """
    (5) Runs the steps of the objective, and sums their losses (4), all against the ground truth: the first on the text
    masked at a drawn t, each later one on the prediction of the one before, masked at another t. What was visible is
    carried over, and wrong tokens stay. No gradient passes from a step into the one before, which the paper leaves
    open.

    Args:
        decode (`Callable`): canvas (B, L) -> logits (B, L, V).
        targets (`torch.LongTensor` of shape (B, L)): texts on EOS-filled canvases.
        canvas_mask (`torch.BoolTensor` of shape (B, L)): positions that belong to a row's canvas.
        timesteps (`torch.Tensor` of shape (B,) or (S, B), *optional*): drawn if missing.
        generator (`torch.Generator`, *optional*): seeds all draws.
    """
    batch_size, device = len(targets), targets.device
    if timesteps is not None:
        timesteps = timesteps.to(device).expand(objective.num_steps, batch_size)
    # Up to and including the first EOS; a text that fills its canvas has none.
    is_eos = (targets == eos_token_id) & canvas_mask
    text_lengths = (canvas_mask & (is_eos.cumsum(dim=-1) - is_eos.long() == 0)).sum(dim=-1)
    is_biased = None
    if objective.position_biased_share > 0:
        is_biased = draw_uniform((batch_size, 1), device, generator) < objective.position_biased_share

    visible, logits = targets, None
    losses, accuracies, canvases = [], [], []
    for step in range(objective.num_steps):
        t = sample_timesteps(batch_size, device=device, generator=generator) if timesteps is None else timesteps[step]
        probability, weight = uniform_masking(t, canvas_mask)
        if is_biased is not None:
            biased = position_biased_masking(t, canvas_mask, text_lengths)
            probability = torch.where(is_biased, biased[0], probability)
            weight = torch.where(is_biased, biased[1], weight)
        canvas, masked = mask_tokens(visible, probability, mask_token_id=mask_token_id, generator=generator)
        logits = decode(canvas)
        losses.append(masked_diffusion_loss(logits, targets, masked, weight, canvas_mask))
        canvases.append(canvas)
        predicted = logits.detach().argmax(dim=-1)
        accuracies.append(_share(predicted == targets, masked))
        # SUBS: what was visible is carried over unchanged.
        visible = torch.where(masked, predicted, canvas)
    step_losses = torch.stack(losses)
    return ObjectiveOutput(step_losses.sum(), logits, step_losses.detach(), torch.stack(accuracies), tuple(canvases))


def _share(is_right: torch.BoolTensor, is_counted: torch.BoolTensor) -> torch.Tensor:
    return (is_right & is_counted).sum() / is_counted.sum().clamp(min=1)


@dataclass(frozen=True)
class DraftObjective:
    """
    What training minimises where there are drafts: the weighted sum of the losses below; those of weight 0 are not
    computed. By default the donor's cross-entropy and that of what the masks draft behind some positions of each text.

    Args:
        num_steps (`int`): 2 is ISCT in kind: the blocks' loss, and that of blocks some tokens behind them which see
            what the first drafted at their places. Decoding then shows the masks drafts that were not accepted.
        donor_weight (`float`): of the donor's cross-entropy on the labels.
        draft_weight (`float`): of the drafts'.
        frame_weight (`float`): of the mean squared distance of the encoder's frames to the teacher's, see
            [`TeacherOutput`].
        logit_weight (`float`): of the Kullback-Leibler divergence of the donor's next token from the teacher's.
    """

    num_steps: int = 1
    donor_weight: float = 1.0
    draft_weight: float = 1.0
    frame_weight: float = 0.0
    logit_weight: float = 0.0

    def __post_init__(self):
        if self.num_steps not in (1, 2):
            raise ValueError(f"`num_steps` of drafts must be 1 or 2, got {self.num_steps!r}.")
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
    """(7) The mean squared distance of frames (B, T, D) to a teacher's (B, T', D), over the values of each row's first
    `num_frames` (B,)."""
    length = min(frames.shape[1], teacher.shape[1])
    is_own = torch.arange(length, device=frames.device) < num_frames[:, None]
    distances = (frames[:, :length].float() - teacher[:, :length].float()).square().mean(dim=-1)
    return (distances * is_own).sum() / is_own.sum().clamp(min=1)


def logit_loss(
    logits: torch.Tensor, token_ids: torch.LongTensor, log_probs: torch.Tensor, is_text: torch.BoolTensor
) -> torch.Tensor:
    """
    (8) The mean over tokens (B, L) of sum p (log p - log q), over N ids and all others as one: p the teacher's, q the
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


def put_start(frontiers: torch.LongTensor, start: int, length: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Frontiers (B, F + 1), of which the first, at `start`, begins the text, and which of `length` positions they see
    (B, F + 1, S): all up to their own, but the first, before the donor has said anything, none."""
    frontiers = torch.nn.functional.pad(frontiers, (1, 0), value=start)
    visible = torch.arange(length, device=frontiers.device) <= frontiers[..., None]
    visible[:, 0] = False
    return frontiers, visible


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
    logits: torch.Tensor, targets: torch.LongTensor, token_ids: torch.LongTensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (6) The weighted mean over drafts of -decay^k log p(token at place k), places without a token or with one beyond
    the short list left out; and the share of drafts that are right.

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
    weights = PLACE_DECAY ** torch.arange(targets.shape[-1], device=targets.device).float() * is_known
    loss = (losses * weights.flatten()).sum() / weights.sum().clamp(min=1e-9)
    return loss, _share(logits.detach().argmax(dim=-1) == short, is_known)
