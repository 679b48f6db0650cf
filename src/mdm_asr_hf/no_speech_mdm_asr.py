# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Whether anything was said: a linear probe on the encoder's frames, which costs no decoder evaluation, and then how sure
the decoder is of the surest tokens of what it wrote.
"""

from typing import Any

import torch

from .confidence_mdm_asr import is_finite
from .encoder_mdm_asr import MDMASREncoderOutput

_KEYS = {
    "weights",
    "bias",
    "window_frames",
    "step_frames",
    "confidence_weight",
    "confidence_offset",
    "threshold",
}
# Among sounds, a single token may be sure by chance; among words, a few always are.
_NUM_SUREST = 3


def validate_no_speech(no_speech: dict[str, Any]) -> None:
    """
    Checks the setting `no_speech` of a generation config, which holds

    - weights (`list[float]` of length D): of an encoder frame's D numbers;
    - bias (`float`): added to their weighted sum, which makes the log-odds that something is said;
    - window_frames (`int`): encoder frames that are averaged, step_frames (`int`): from one window to the next;
    - confidence_weight, confidence_offset (`float`): what is added to these log-odds once a row is decoded, see
      `with_confidence`;
    - threshold (`float`): rows whose probability of no speech is above it, before or after, have an empty text.

    Raises:
        ValueError: it is not of this form.
    """
    if not isinstance(no_speech, dict) or set(no_speech) != _KEYS:
        got = sorted(map(str, no_speech)) if isinstance(no_speech, dict) else repr(no_speech)
        raise ValueError(f"`no_speech` must be None or a dict with {sorted(_KEYS)}, got {got}.")
    weights = no_speech["weights"]
    if not isinstance(weights, (list, tuple)) or not weights or not all(is_finite(one) for one in weights):
        raise ValueError("`no_speech['weights']` must be a list of finite numbers, one for each of the encoder's.")
    for name in ("bias", "confidence_weight", "confidence_offset"):
        if not is_finite(no_speech[name]):
            raise ValueError(f"`no_speech[{name!r}]` must be a finite number, got {no_speech[name]!r}.")
    for name in ("window_frames", "step_frames"):
        if type(no_speech[name]) is not int or no_speech[name] < 1:
            raise ValueError(f"`no_speech[{name!r}]` must be an integer of at least 1, got {no_speech[name]!r}.")
    threshold = no_speech["threshold"]
    if not is_finite(threshold) or not 0 < threshold <= 1:
        raise ValueError(f"`no_speech['threshold']` must be above 0 and at most 1, got {threshold!r}.")


def window_means(values: torch.Tensor, num_frames: torch.Tensor, window_frames: int, step_frames: int) -> torch.Tensor:
    """
    Means of windows of each row's own frames: those that start every `step_frames`, and the last that fits. A row
    shorter than a window has one, of all its frames.

    Args:
        values (`torch.Tensor` of shape (B, T) or (B, T, D)): of frames.
        num_frames (`torch.LongTensor` of shape (B,)): the row's own, at least 1.

    Returns:
        `torch.Tensor` of shape (B, K) or (B, K, D), float64; a row's windows beyond its last repeat that.
    """
    # In double precision, since differences of long sums are taken.
    sums = torch.nn.functional.pad(values.double().cumsum(dim=1).transpose(1, -1), (1, 0)).transpose(1, -1)
    widths = num_frames.clamp(max=window_frames)
    num_windows = -(-int((num_frames - widths).max()) // step_frames) + 1
    starts = torch.arange(num_windows, device=values.device) * step_frames
    starts = torch.minimum(starts, (num_frames - widths)[:, None])

    def at(places: torch.Tensor) -> torch.Tensor:
        places = places.view(*places.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        return sums.gather(1, places)

    return (at(starts + widths[:, None]) - at(starts)) / widths.view(-1, *[1] * (values.dim() - 1))


def no_speech_probability(encoder_outputs: MDMASREncoderOutput, no_speech: dict[str, Any]) -> torch.Tensor:
    """
    The probability (B,) that nothing was said, in float32. That an encoder trained on transcripts tells sounds apart
    in linear directions is arXiv 2307.03183's finding. Of the log-odds of speech, averaged over windows, the row's
    largest counts: one word among noise is speech.

    Raises:
        ValueError: the probe is of another width than the encoder.
    """
    frames = encoder_outputs.last_hidden_state
    if len(no_speech["weights"]) != frames.shape[-1]:
        raise ValueError(
            f"`no_speech` has {len(no_speech['weights'])} weights, but the encoder's frames have {frames.shape[-1]} "
            "numbers. Fit it to this encoder, or set it to None."
        )
    weights = torch.tensor(no_speech["weights"], dtype=torch.float32, device=frames.device)
    # Not a matrix product, whose rounding would depend on the batch.
    evidence = (frames.float() * weights).sum(dim=-1)
    if encoder_outputs.attention_mask is None:
        num_frames = torch.full((len(frames),), frames.shape[1], device=frames.device)
    else:
        inside = encoder_outputs.attention_mask.to(frames.device).bool()
        num_frames = inside.sum(dim=-1).clamp(min=1)
        evidence = evidence.masked_fill(~inside, 0.0)
    windows = window_means(evidence, num_frames, no_speech["window_frames"], no_speech["step_frames"])
    return torch.sigmoid(-(windows.amax(dim=-1) + no_speech["bias"])).float()


def surest_tokens(confidence: torch.Tensor, is_text: torch.BoolTensor) -> torch.Tensor:
    """The mean log-probability (B,) of the three surest text tokens among confidences (B, W) as the decoder gave
    them; fewer if a row has fewer, and 0 if it has none."""
    log_probs = confidence.double().log().masked_fill(~is_text, -torch.inf)
    surest = log_probs.topk(min(_NUM_SUREST, log_probs.shape[-1]), dim=-1).values
    counts = surest > -torch.inf
    return surest.masked_fill(~counts, 0.0).sum(dim=-1) / counts.sum(dim=-1).clamp(min=1)


def with_confidence(
    no_speech_probability: torch.Tensor,
    confidence: torch.Tensor,
    is_text: torch.BoolTensor,
    no_speech: dict[str, Any],
) -> torch.Tensor:
    """
    The probability (B,) that nothing was said, after decoding: to the log-odds of speech is added confidence_weight *
    (mean log-probability of the surest tokens - confidence_offset). Rows without text tokens (B, W) keep theirs.
    """
    log_odds = torch.logit(no_speech_probability.double(), eps=1e-12)
    surest = surest_tokens(confidence, is_text) - no_speech["confidence_offset"]
    after = torch.sigmoid(log_odds - no_speech["confidence_weight"] * surest).float()
    return torch.where(is_text.any(dim=-1), after, no_speech_probability)


__all__ = ["no_speech_probability", "surest_tokens", "validate_no_speech", "window_means", "with_confidence"]
