# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The five samplers of MDM-ASR (arXiv 2602.18952): given logits and a canvas, which masked positions to commit."""

from dataclasses import dataclass

import torch

from .generation_configuration_mdm_asr import (
    SAMPLERS,
    ConfTopKConfig,
    DFMConfig,
    EBConfConfig,
    PBEBConfConfig,
    RandomConfig,
    SamplerConfig,
)

# Log-probabilities are ranked on this grid and ties go to the left. Near-certain tokens differ by less than the
# rounding of a matrix product, which changes with the batch: without the grid a batch would commit in another order
# than its rows.
RANK_RESOLUTION = 1e-3
# Rows of logits that are worked through together on a CPU.
ROWS_AT_ONCE = 16
# Of a token that is all but impossible, where its logarithm must be finite: exp of it is 0.
LEAST_LOG_PROB = -1e4

# Of some positions: tokens, their log-probabilities, entropies.
Proposal = tuple[torch.LongTensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SamplerOutput:
    """
    What one step decides.

    Attributes:
        canvas (`torch.LongTensor` of shape (B, L)): the canvas with the committed tokens written in.
        committed (`torch.BoolTensor` of shape (B, L)): the positions committed by this step.
        tokens (`torch.LongTensor` of shape (B, L)): the tokens proposed for every position.
        confidence (`torch.FloatTensor` of shape (B, L)): the probability of each proposal.
    """

    canvas: torch.LongTensor
    committed: torch.BoolTensor
    tokens: torch.LongTensor
    confidence: torch.Tensor


def draw_tokens(probs: torch.Tensor, noise: torch.Tensor) -> torch.LongTensor:
    """
    Tokens (B, L) drawn from probabilities (B, L, V) with noise (B, L), uniform on [0, 1), by inverse transform: one
    number per position, whatever the vocabulary.
    """
    cumulative = probs.cumsum(dim=-1)
    # The last possible token bounds it, since a cumulative sum may end just below 1.
    tokens = torch.searchsorted(cumulative, noise[..., None] * cumulative[..., -1:], right=True)
    return tokens.squeeze(-1).clamp(max=probs.shape[-1] - 1)


def propose_tokens(
    logits: torch.Tensor, temperature: float = 0.0, token_noise: torch.Tensor | None = None
) -> Proposal:
    """
    Proposes a token for every position: the arg-max at temperature 0, a draw from softmax(logits / temperature) above.

    Args:
        logits (`torch.Tensor` of shape (B, L, V)).
        temperature (`float`): 0 is greedy.
        token_noise (`torch.Tensor` of shape (B, L), *optional*): uniform on [0, 1), needed when temperature > 0.

    Returns:
        tokens (B, L), their log-probabilities (B, L), and the entropies in nats (B, L).
    """
    if temperature == 0:
        return _propose_best(logits)
    if token_noise is None:
        raise ValueError("`token_noise` is needed when `temperature` > 0. Draw it uniformly from [0, 1).")
    log_probs = _log_probs(logits, temperature)
    probs = log_probs.exp()
    tokens = draw_tokens(probs, token_noise.float())
    return tokens, log_probs.gather(-1, tokens[..., None]).squeeze(-1), _entropy(log_probs, probs)


def _propose_best(logits: torch.Tensor) -> Proposal:
    """
    `propose_tokens` at temperature 0: with x = logits - max and Z = sum(exp(x)), the log-probability of the arg-max is
    -log(Z), and the entropy log(Z) - sum(exp(x) x) / Z.
    """
    rows = logits.float().flatten(0, -2)
    # A few at a time, so that what is made of them stays in the caches.
    parts = rows.split(ROWS_AT_ONCE) if rows.device.type == "cpu" else (rows,)
    proposed = []
    for part in parts:
        tokens = arg_max(part)
        # A suppressed token has -inf, and 0 * -inf would be NaN.
        x = (part - part.gather(-1, tokens[:, None])).clamp_(min=LEAST_LOG_PROB)
        weights = x.exp()
        total = weights.sum(dim=-1)
        log_total = total.log()
        entropy = log_total - torch.linalg.vecdot(weights, x) / total
        proposed.append((tokens, -log_total, entropy.clamp_(min=0.0)))
    return tuple(torch.cat(values).view(logits.shape[:-1]) for values in zip(*proposed, strict=True))


def arg_max(values: torch.Tensor) -> torch.LongTensor:
    """The arg-max (N,) of each row of values (N, V). PyTorch's does not use the vector units of a CPU, NumPy's does:
    a twentieth of the time."""
    if values.device.type != "cpu":
        return values.argmax(dim=-1)
    return torch.from_numpy(values.detach().numpy().argmax(axis=-1))


def _log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(logits.float() / temperature if temperature > 0 else logits.float(), dim=-1)


def _entropy(log_probs: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    # A suppressed token has log-probability -inf; 0 * -inf would be NaN.
    return -(probs * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1).clamp(max=0.0)


def _ranked(scores: torch.Tensor, candidates: torch.BoolTensor) -> tuple[torch.Tensor, torch.LongTensor]:
    """Order (B, L) of the positions by falling score, candidates first, ties to the left; and its inverse, the
    ranks."""
    order = scores.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return order, ranks


def _select_count(scores: torch.Tensor, candidates: torch.BoolTensor, count: torch.Tensor | int) -> torch.BoolTensor:
    """The `count` (B, 1) candidates of highest score."""
    _, ranks = _ranked(scores, candidates)
    return (ranks < count) & candidates


def _select_entropy_bounded(
    scores: torch.Tensor, entropy: torch.Tensor, candidates: torch.BoolTensor, gamma: float
) -> torch.BoolTensor:
    """The longest prefix by score with sum(H) - max(H) <= gamma (arXiv 2505.24857); at least one candidate."""
    order, ranks = _ranked(scores, candidates)
    if gamma == 0:
        # Two entropies that underflow to exactly 0 would pass the bound together.
        return (ranks < 1) & candidates
    ranked_entropy = entropy.masked_fill(~candidates, 0.0).gather(-1, order)
    spent = ranked_entropy.cumsum(dim=-1) - ranked_entropy.cummax(dim=-1).values
    # cummin keeps the prefix contiguous when rounding makes the sum fall by an ulp.
    within = (spent <= gamma).int().cummin(dim=-1).values.bool()
    return within.gather(-1, ranks) & candidates


def sampler_step(
    sampler: SamplerConfig,
    logits: torch.Tensor,
    canvas: torch.LongTensor,
    *,
    mask_token_id: int,
    steps_left: int | torch.LongTensor,
    candidates: torch.BoolTensor | None = None,
    temperature: float = 0.0,
    noise: torch.Tensor | None = None,
) -> SamplerOutput:
    """
    One denoising step of any of the five samplers: stateless, vectorised over the batch.

    Args:
        sampler ([`SamplerConfig`]): which sampler, with its settings.
        logits (`torch.Tensor` of shape (B, L, V), or (N, V) of the N candidates alone, in row-major order).
        canvas (`torch.LongTensor` of shape (B, L)): `mask_token_id` where nothing is committed yet.
        steps_left (`int` or `torch.LongTensor` of shape (B,)): denoising steps left, this one included, of the batch
            or of each row. The last one commits everything.
        candidates (`torch.BoolTensor` of shape (B, L), *optional*): the masked positions that may be committed;
            default all
            masked ones. Rows without candidates are left alone.
        temperature (`float`): 0 takes the arg-max tokens.
        noise (`torch.Tensor` of shape (B, L, 2), *optional*): uniform on [0, 1). [..., 0] draws tokens when
            temperature > 0,
            [..., 1] positions for the random and the DFM sampler.

    Returns:
        [`SamplerOutput`]

    Raises:
        ValueError: `steps_left` < 1, or missing noise.
    """
    if isinstance(steps_left, int):
        if steps_left < 1:
            raise ValueError(f"`steps_left` must be at least 1, got {steps_left}.")
        steps_left = torch.full((len(canvas),), steps_left, device=canvas.device)
    steps_left = steps_left[:, None]
    if noise is None and (temperature > 0 or sampler.needs_noise):
        raise ValueError(
            f"`noise` of shape (B, L, 2) is needed by the sampler {sampler.name!r} at temperature {temperature}."
        )
    masked = canvas == mask_token_id
    candidates = masked if candidates is None else candidates & masked
    token_noise = noise[..., 0] if noise is not None else None
    if logits.dim() == 2:
        if len(logits) != int(candidates.sum()):
            raise ValueError(f"`logits` are of {len(logits)} positions, but {int(candidates.sum())} are candidates.")
        proposed = propose_tokens(logits, temperature, token_noise[candidates] if token_noise is not None else None)
        # Positions that are no candidates propose nothing, with confidence 0.
        zeros = torch.zeros(canvas.shape, device=canvas.device)
        tokens, log_confidence, entropy = (
            blank.masked_scatter(candidates, values)
            for blank, values in zip((canvas, zeros - torch.inf, zeros), proposed, strict=True)
        )
    else:
        tokens, log_confidence, entropy = propose_tokens(logits, temperature, token_noise)

    num_candidates = candidates.sum(dim=-1, keepdim=True)
    even_share = (num_candidates + steps_left - 1) // steps_left
    ranking = torch.round(log_confidence / RANK_RESOLUTION) * RANK_RESOLUTION
    if isinstance(sampler, RandomConfig):
        committed = _select_count(-noise[..., 1], candidates, even_share)
    elif isinstance(sampler, DFMConfig):
        jumps = (noise[..., 1] < 1.0 / steps_left) & candidates
        committed = jumps | _select_count(-noise[..., 1], candidates, 1)
    elif isinstance(sampler, ConfTopKConfig):
        committed = _select_count(ranking, candidates, even_share if sampler.k is None else sampler.k)
    elif isinstance(sampler, EBConfConfig):
        if isinstance(sampler, PBEBConfConfig):
            # log(c_i * exp(-lambda * i)): in the log, far positions do not underflow into ties.
            places = torch.arange(canvas.shape[-1], device=canvas.device)
            ranking = (
                ranking - sampler.lambda_ * places
                if sampler.lambda_ is not None
                else -places.expand_as(ranking).float()
            )
        committed = _select_entropy_bounded(ranking, entropy, candidates, sampler.gamma)
    else:
        raise ValueError(f"`sampler` must be one of {sorted(SAMPLERS)}, got {sampler!r}.")
    committed = torch.where(steps_left == 1, candidates, committed)
    return SamplerOutput(torch.where(committed, tokens, canvas), committed, tokens, log_confidence.exp())


__all__ = ["SamplerOutput", "arg_max", "draw_tokens", "propose_tokens", "sampler_step"]
