# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of the five samplers of MDM-ASR (arXiv 2602.18952), see `sampling_mdm_asr`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class SamplerConfig:
    """Base of the samplers' settings; `name` is the sampler's name in generation_config.json and in `generate`."""

    name: ClassVar[str] = ""
    needs_noise: ClassVar[bool] = False

    def to_dict(self) -> dict:
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class RandomConfig(SamplerConfig):
    """Random: a random subset, as large as needed to finish within the steps left."""

    name: ClassVar[str] = "random"
    needs_noise: ClassVar[bool] = True


@dataclass(frozen=True)
class DFMConfig(SamplerConfig):
    """
    Discrete flow matching (arXiv 2407.15595): each masked position jumps with the probability of its rate. With
    alpha_t = 1 - t and n steps left that is dt / t = 1 / n. A row in which no position jumps commits one, so that no
    decoder evaluation is lost.
    """

    name: ClassVar[str] = "dfm"
    needs_noise: ClassVar[bool] = True


@dataclass(frozen=True)
class ConfTopKConfig(SamplerConfig):
    """Conf Top-K: the `k` positions of highest confidence; None takes as many as needed to finish within the steps
    left."""

    name: ClassVar[str] = "conf_top_k"
    k: int | None = None

    def __post_init__(self):
        if self.k is not None and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"`k` must be an integer of at least 1 or None, got {self.k!r}.")


@dataclass(frozen=True)
class EBConfConfig(SamplerConfig):
    """
    EB-Conf (arXiv 2505.24857): positions sorted by confidence; the longest prefix whose entropies sum, less the
    largest of them, to at most `gamma` (nats). gamma = 0 commits one token a step, gamma = inf all in one step.
    """

    name: ClassVar[str] = "eb_conf"
    gamma: float = 0.05

    def __post_init__(self):
        _check_at_least_zero("gamma", self.gamma)


@dataclass(frozen=True)
class PBEBConfConfig(EBConfConfig):
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


SAMPLERS: dict[str, type[SamplerConfig]] = {
    config.name: config for config in (RandomConfig, DFMConfig, ConfTopKConfig, EBConfConfig, PBEBConfConfig)
}


def _check_at_least_zero(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or value < 0:
        raise ValueError(f"`{name}` must be a number >= 0, got {value!r}.")


def make_sampler(sampler: str | dict | SamplerConfig, **settings) -> SamplerConfig:
    """
    Builds a sampler's settings from its name ("pbeb_conf", "PBEB-Conf", ...), from what `to_dict` gave, or from
    another configuration; `settings` override.

    Raises:
        ValueError: an unknown sampler, or a setting the sampler does not have.
    """
    if isinstance(sampler, SamplerConfig):
        name, values = sampler.name, dataclasses.asdict(sampler)
    elif isinstance(sampler, dict):
        values = dict(sampler)
        name = values.pop("name", None)
    else:
        name, values = sampler, {}
    key = str(name).lower().replace("-", "_").replace(" ", "_")
    if key not in SAMPLERS:
        raise ValueError(f"`sampler` {name!r} is unknown. Use one of {sorted(SAMPLERS)}.")
    values.update(settings)
    known = {field.name for field in dataclasses.fields(SAMPLERS[key])}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{unknown} are not settings of the sampler {key!r}, which takes {sorted(known)}.")
    return SAMPLERS[key](**values)


__all__ = [
    "SAMPLERS",
    "ConfTopKConfig",
    "DFMConfig",
    "EBConfConfig",
    "PBEBConfConfig",
    "RandomConfig",
    "SamplerConfig",
    "make_sampler",
]
