# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The five samplers of MDM-ASR (arXiv 2602.18952), a class each: which masked positions a step commits."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

try:
    import torch
except ImportError:
    # Exported models, which have no canvas, read the settings alone.
    torch = None

# Log-probabilities are ranked on this grid and ties go to the left. Near-certain tokens differ by less than the
# rounding of a matrix product, which changes with the batch: without the grid a batch would commit in another order
# than its rows.
RANK_RESOLUTION = 1e-3
# Rows of logits that are worked through together on a CPU.
ROWS_AT_ONCE = 16
# Of a token that is all but impossible, where its logarithm must be finite: exp of it is 0.
LEAST_LOG_PROB = -1e4


class SamplerOutput(NamedTuple):
    """
    What one step decides.

    Attributes:
        canvas (`torch.LongTensor` of shape (B, L)): the canvas with the committed tokens written in.
        committed (`torch.BoolTensor` of shape (B, L)): the positions committed by this step.
        confidence (`torch.FloatTensor` of shape (B, L)): the probability of what was proposed; 0 where nothing was.
    """

    canvas: torch.LongTensor
    committed: torch.BoolTensor
    confidence: torch.Tensor


class Choice(NamedTuple):
    """
    What a sampler chooses among and by.

    Attributes:
        candidates (`torch.BoolTensor` of shape (B, L)): positions that may be committed.
        log_probs (`torch.FloatTensor` of shape (B, L)): of the tokens proposed for them.
        entropy (`torch.FloatTensor` of shape (B, L)): of the distributions they are from, in nats.
        steps_left (`torch.LongTensor` of shape (B, 1) or (1, 1)): this one included.
        noise (`torch.FloatTensor` of shape (B, L), *optional*): uniform on [0, 1), where `needs_noise` is set.
    """

    candidates: torch.BoolTensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    steps_left: torch.LongTensor
    noise: torch.Tensor | None

    def even_share(self) -> torch.LongTensor:
        """Positions (B, 1) to commit now, for all candidates to be committed in as many a step."""
        count = self.candidates.sum(dim=-1, keepdim=True)
        return (count + self.steps_left - 1) // self.steps_left

    def best(self, scores: torch.Tensor, count: torch.LongTensor | int) -> torch.BoolTensor:
        """The `count` (B, 1) candidates of highest score (B, L), as (B, L)."""
        _, ranks = self._rank(scores)
        return (ranks < count) & self.candidates

    def entropy_bounded(self, scores: torch.Tensor, gamma: float) -> torch.BoolTensor:
        """The longest prefix by score with sum(H) - max(H) <= gamma (arXiv 2505.24857); at least one candidate."""
        if gamma == 0:
            # Two entropies that underflow to exactly 0 would pass the bound together.
            return self.best(scores, 1)
        order, ranks = self._rank(scores)
        entropy = self.entropy.masked_fill(~self.candidates, 0.0).gather(-1, order)
        spent = entropy.cumsum(dim=-1) - entropy.cummax(dim=-1).values
        # cummin keeps the prefix contiguous when rounding makes the sum fall by an ulp.
        within = (spent <= gamma).int().cummin(dim=-1).values.bool()
        return within.gather(-1, ranks) & self.candidates

    def _rank(self, scores: torch.Tensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Order (B, L) of the positions by falling score, candidates first, ties to the left; and its inverse, the
        ranks."""
        order = scores.masked_fill(~self.candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return order, torch.empty_like(order).scatter_(-1, order, places)


@dataclass(frozen=True)
class Sampler:
    """
    Base of the samplers. The fields of each are its settings; `name` is its name in generation_config.json and in
    `generate`, `needs_noise` says that it draws positions.
    """

    name: ClassVar[str] = ""
    needs_noise: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, as generation_config.json holds them."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def choose(self, choice: Choice) -> torch.BoolTensor:
        """The candidates (B, L) to commit, at least one of each row that has any."""
        raise NotImplementedError

    def step(
        self,
        logits: torch.Tensor,
        canvas: torch.LongTensor,
        candidates: torch.BoolTensor,
        *,
        steps_left: int | torch.LongTensor,
        temperature: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> SamplerOutput:
        """
        One denoising step: stateless, vectorised over the batch.

        Args:
            logits (`torch.Tensor` of shape (N, V)): of the N candidates, row by row.
            canvas (`torch.LongTensor` of shape (B, L)).
            candidates (`torch.BoolTensor` of shape (B, L)): the masked positions that may be committed. Rows without
                any are left alone.
            steps_left (`int` or `torch.LongTensor` of shape (B,)): denoising steps left, this one included, of the
                batch or of each row. The last one commits all candidates.
            temperature (`float`): 0 takes the arg-max tokens.
            noise (`torch.Tensor` of shape (B, L, 2), *optional*): uniform on [0, 1). [..., 0] draws tokens when
                temperature > 0, [..., 1] positions where `needs_noise` is set.

        Returns:
            [`SamplerOutput`]

        Raises:
            ValueError: `steps_left` < 1, missing noise, or logits of another number of positions.
        """
        if isinstance(steps_left, int) and steps_left < 1:
            raise ValueError(f"`steps_left` must be at least 1, got {steps_left}.")
        if noise is None and (temperature > 0 or self.needs_noise):
            raise ValueError(
                f"`noise` of shape (B, L, 2) is needed by the sampler {self.name!r} at temperature {temperature}."
            )
        if len(logits) != (number := int(candidates.sum())):
            raise ValueError(f"`logits` are of {len(logits)} positions, but {number} are candidates.")
        proposed = propose_tokens(logits, temperature, None if noise is None else noise[..., 0][candidates])
        # Positions that are no candidates propose nothing, with confidence 0.
        zeros = torch.zeros(canvas.shape, device=canvas.device)
        tokens, log_probs, entropy = (
            blank.masked_scatter(candidates, values)
            for blank, values in zip((canvas, zeros - torch.inf, zeros), proposed, strict=True)
        )
        steps_left = torch.as_tensor(steps_left, device=canvas.device).view(-1, 1)
        positions = None if noise is None else noise[..., 1]
        committed = self.choose(Choice(candidates, log_probs, entropy, steps_left, positions))
        committed = torch.where(steps_left == 1, candidates, committed)
        return SamplerOutput(torch.where(committed, tokens, canvas), committed, log_probs.exp())


@dataclass(frozen=True)
class RandomSampler(Sampler):
    """Random: a random subset, as large as needed to finish within the steps left."""

    name: ClassVar[str] = "random"
    needs_noise: ClassVar[bool] = True

    def choose(self, choice: Choice) -> torch.BoolTensor:
        return choice.best(-choice.noise, choice.even_share())


@dataclass(frozen=True)
class DFMSampler(Sampler):
    """
    Discrete flow matching (arXiv 2407.15595): each masked position jumps with the probability of its rate. With
    alpha_t = 1 - t and n steps left that is dt / t = 1 / n. A row in which no position jumps commits one, so that no
    decoder evaluation is lost.
    """

    name: ClassVar[str] = "dfm"
    needs_noise: ClassVar[bool] = True

    def choose(self, choice: Choice) -> torch.BoolTensor:
        jumps = (choice.noise < 1.0 / choice.steps_left) & choice.candidates
        return jumps | choice.best(-choice.noise, 1)


@dataclass(frozen=True)
class ConfTopKSampler(Sampler):
    """Conf Top-K: the `k` positions of highest confidence; None takes as many as needed to finish within the steps
    left."""

    name: ClassVar[str] = "conf_top_k"
    k: int | None = None

    def __post_init__(self):
        if self.k is not None and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"`k` must be an integer of at least 1 or None, got {self.k!r}.")

    def choose(self, choice: Choice) -> torch.BoolTensor:
        return choice.best(_on_grid(choice.log_probs), choice.even_share() if self.k is None else self.k)


@dataclass(frozen=True)
class EBConfSampler(Sampler):
    """
    EB-Conf (arXiv 2505.24857): positions sorted by confidence; the longest prefix whose entropies sum, less the
    largest of them, to at most `gamma` (nats). gamma = 0 commits one token a step, gamma = inf all in one step.
    """

    name: ClassVar[str] = "eb_conf"
    gamma: float = 0.05

    def __post_init__(self):
        _check_at_least_zero("gamma", self.gamma)

    def choose(self, choice: Choice) -> torch.BoolTensor:
        return choice.entropy_bounded(_on_grid(choice.log_probs), self.gamma)


@dataclass(frozen=True)
class PBEBConfSampler(EBConfSampler):
    """
    PBEB-Conf (arXiv 2602.18952): as EB-Conf, with the confidence multiplied by the position bias exp(-lambda_ * i), i
    counted from the start of the canvas. lambda_ = 0 is EB-Conf; None is an infinite bias: strictly left to right.
    """

    name: ClassVar[str] = "pbeb_conf"
    lambda_: float | None = 0.2

    def __post_init__(self):
        super().__post_init__()
        if self.lambda_ is None:
            return
        _check_at_least_zero("lambda_", self.lambda_)
        if math.isinf(self.lambda_):
            raise ValueError("`lambda_` must be finite, or None for strictly left to right.")

    def choose(self, choice: Choice) -> torch.BoolTensor:
        places = torch.arange(choice.candidates.shape[-1], device=choice.candidates.device)
        if self.lambda_ is None:
            scores = -places.expand_as(choice.candidates).float()
        else:
            # log(c_i * exp(-lambda * i)): in the log, far positions do not underflow into ties.
            scores = _on_grid(choice.log_probs) - self.lambda_ * places
        return choice.entropy_bounded(scores, self.gamma)


SAMPLERS: dict[str, type[Sampler]] = {
    kind.name: kind for kind in (RandomSampler, DFMSampler, ConfTopKSampler, EBConfSampler, PBEBConfSampler)
}


def _check_at_least_zero(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or value < 0:
        raise ValueError(f"`{name}` must be a number >= 0, got {value!r}.")


def make_sampler(sampler: str | dict | Sampler, **settings) -> Sampler:
    """
    A sampler by its name ("pbeb_conf", "PBEB-Conf", ...), of what `to_dict` gave, or of another; `settings` override.

    Raises:
        ValueError: an unknown sampler, or a setting the sampler does not have.
    """
    if isinstance(sampler, Sampler):
        kind, values = type(sampler), dataclasses.asdict(sampler)
    else:
        values = dict(sampler) if isinstance(sampler, dict) else {"name": sampler}
        name = values.pop("name", None)
        kind = SAMPLERS.get(str(name).lower().replace("-", "_").replace(" ", "_"))
        if kind is None:
            raise ValueError(f"`sampler` {name!r} is unknown. Use one of {sorted(SAMPLERS)}.")
    values |= settings
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{unknown} are not settings of the sampler {kind.name!r}, which takes {sorted(known)}.")
    return kind(**values)


def propose_tokens(
    logits: torch.Tensor, temperature: float = 0.0, noise: torch.Tensor | None = None
) -> tuple[torch.LongTensor, torch.Tensor, torch.Tensor]:
    """
    Proposes a token for every position: the arg-max at temperature 0, a draw from softmax(logits / temperature) above.

    Args:
        logits (`torch.Tensor` of shape (N, V)).
        temperature (`float`): 0 is greedy.
        noise (`torch.Tensor` of shape (N,), *optional*): uniform on [0, 1), needed when temperature > 0.

    Returns:
        tokens (N,), their log-probabilities (N,), and the entropies in nats (N,).
    """
    if temperature == 0:
        return _propose_best(logits)
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = log_probs.exp()
    # By inverse transform, which takes one number per position, whatever the vocabulary. The last possible token
    # bounds it, since a cumulative sum may end just below 1.
    cumulative = probs.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, noise.float()[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    # A suppressed token has log-probability -inf; 0 * -inf would be NaN.
    entropy = -(probs * log_probs.clamp(min=LEAST_LOG_PROB)).sum(dim=-1).clamp(max=0.0)
    return tokens.squeeze(-1), log_probs.gather(-1, tokens).squeeze(-1), entropy


def _propose_best(logits: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor, torch.Tensor]:
    """
    `propose_tokens` at temperature 0: with x = logits - max and Z = sum(exp(x)), the log-probability of the arg-max is
    -log(Z), and the entropy log(Z) - sum(exp(x) x) / Z.
    """
    logits = logits.float()
    # A few at a time, so that what is made of them stays in the caches.
    parts = logits.split(ROWS_AT_ONCE) if logits.device.type == "cpu" else (logits,)
    proposed = []
    for part in parts:
        tokens = _arg_max(part)
        # A suppressed token has -inf, and 0 * -inf would be NaN.
        x = (part - part.gather(-1, tokens[:, None])).clamp_(min=LEAST_LOG_PROB)
        weights = x.exp()
        total = weights.sum(dim=-1)
        log_total = total.log()
        entropy = log_total - torch.linalg.vecdot(weights, x) / total
        proposed.append((tokens, -log_total, entropy.clamp_(min=0.0)))
    return tuple(torch.cat(values) for values in zip(*proposed, strict=True))


def _arg_max(values: torch.Tensor) -> torch.LongTensor:
    """The arg-max (N,) of each row of values (N, V). PyTorch's does not use the vector units of a CPU, NumPy's does:
    a twentieth of the time."""
    if values.device.type != "cpu":
        return values.argmax(dim=-1)
    return torch.from_numpy(values.detach().numpy().argmax(axis=-1))


def _on_grid(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.round(log_probs / RANK_RESOLUTION) * RANK_RESOLUTION
