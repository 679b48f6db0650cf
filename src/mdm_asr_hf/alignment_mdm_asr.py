# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""When each token was spoken: dynamic time warping of the decoder's cross-attention (after arXiv 2212.04356)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .drafting_mdm_asr import one_thread_product, to_numpy

# How attention becomes times: the values with the least errors of word starts and ends on training speech. Costs are
# natural logarithms.

# Longer frames are interpolated to this many seconds.
GRID_S = 0.02
# Attention jumps from frame to frame; its mean over this many seconds is taken.
SMOOTHING_S = 0.1
# A frame costs a token -log of the token's share in the frame's attention and, with this weight, -log of the token's
# attention over the highest it has. What is added to both shares, so that no frame is impossible.
PEAK_WEIGHT, FLOOR = 0.5, 1e-3
# A frame of speech costs this if no token owns it, a silent one nothing; a silent one costs the token that owns it so
# much more.
GAP_COST, SILENCE_COST = 2.0, 1.0
# Levels up to the first are silence, from the second on speech; 0 is the 5th percentile of the clip's frames, 1 the
# 95th.
SILENT_LEVEL, SPEECH_LEVEL = 0.1, 0.2
# Shorter silences between tokens, in seconds, belong to the one before.
PAUSE_S = 0.04


def check_alignment_heads(
    alignment_heads: Sequence[Sequence[int]] | None, decoder_config: Any
) -> list[tuple[int, int]]:
    """
    The heads to read timestamps from: those given, or all heads of half of the layers. On a canvas that is the lower
    half, where a visible token finds its own place in the audio; a causal decoder's upper half looks for what it says.

    Raises:
        ValueError: not a list of `[layer, head]`, or one that the decoder does not have.
    """
    num_layers, num_heads = decoder_config.num_hidden_layers, decoder_config.num_attention_heads
    if alignment_heads is None:
        half = (num_layers + 1) // 2
        layers = range(num_layers - half, num_layers) if decoder_config.is_causal else range(half)
        return [(layer, head) for layer in layers for head in range(num_heads)]
    heads = []
    for pair in alignment_heads:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or any(type(number) is not int for number in pair):
            raise ValueError(f"`alignment_heads` must be a list of [layer, head], got {pair!r} in it.")
        layer, head = pair
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise ValueError(
                f"`alignment_heads` name layer {layer}, head {head}, but the decoder has {num_layers} layers of "
                f"{num_heads} heads, counted from 0. Take those that its donor names, or None."
            )
        heads.append((layer, head))
    if not heads:
        raise ValueError("`alignment_heads=[]` names no head. Use None for the default ones.")
    return heads


def frame_duration_s(encoder_config: Any, input_frames_per_s: float) -> float | None:
    """Seconds of audio per frame of an encoder, as its configuration tells; None if it does not."""
    if encoder_config.model_type == "whisper":
        stride = 2
    else:
        stride = getattr(encoder_config, "subsampling_factor", None) or getattr(
            encoder_config, "inputs_to_logits_ratio", None
        )
    return None if stride is None else stride / input_frames_per_s


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` (odd) neighbours in the last dimension; at the ends over those there are."""
    length = values.shape[-1]
    width = min(width, length - (length + 1) % 2)
    if width <= 1:
        return values
    at = np.arange(length)
    return _means(values, np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, length))


def _means(values: np.ndarray, first: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Means (..., N) of stretches of the last dimension, from `first` (N,) to before `behind` (N,)."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return ((sums[..., behind] - sums[..., first]) / (behind - first)).astype(values.dtype)


def speech_presence(features: np.ndarray, num_frames: int) -> np.ndarray:
    """
    How much each of `num_frames` equal parts of a clip sounds like speech, by its level: 0 silence, 1 speech.

    Args:
        features (`np.ndarray` of shape (T, mel bins) or (N,)): log-mel, of any scale, or a waveform.
    """
    levels = features.mean(axis=-1) if features.ndim == 2 else features**2
    at = np.arange(num_frames + 1) * len(levels)
    levels = _means(levels, at[:-1] // num_frames, -(-at[1:] // num_frames))
    if features.ndim == 1:
        levels = np.log(levels.clip(1e-10))
    quiet, loud = np.quantile(levels, (0.05, 0.95))
    relative = (levels - quiet) / max(loud - quiet, 1e-6)
    return ((relative - SILENT_LEVEL) / (SPEECH_LEVEL - SILENT_LEVEL)).clip(0.0, 1.0)


def warp(costs: np.ndarray, gap_costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The cheapest monotone assignment of frames to tokens (dynamic time warping): each token owns a run of at least one
    frame, runs follow each other, and frames between them may stay without an owner.

    Args:
        costs (`np.ndarray` of shape (W, T)): of token i owning frame j; W <= T.
        gap_costs (`np.ndarray` of shape (T,)): of frame j without an owner.

    Returns:
        First and last frames (W,) of each token.
    """
    num_tokens, num_frames = costs.shape
    sums = np.pad(np.cumsum(costs, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
    gaps = np.pad(np.cumsum(gap_costs, dtype=np.float64), (1, 0))
    # Cost of the cheapest path over all frames before frame j, with token i to start there.
    before = gaps[:-1]
    starts, ends = [], []
    for i in range(num_tokens):
        # A run from j to k costs sums[k + 1] - sums[j]: a running minimum finds the best start for every end at once.
        cheapest, start = _running_minimum(before - sums[i, :-1])
        path = cheapest + sums[i, 1:]
        # Likewise for the gap behind it.
        cheapest, end = _running_minimum(path - gaps[1:])
        before = np.append(np.inf, (cheapest + gaps[1:])[:-1])
        starts.append(start)
        ends.append(end)
    first, last = np.empty(num_tokens, dtype=np.int64), np.empty(num_tokens, dtype=np.int64)
    stop = num_frames - 1
    for i in reversed(range(num_tokens)):
        last[i] = ends[i][stop]
        first[i] = starts[i][last[i]]
        stop = first[i] - 1
    return first, last


def _running_minimum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least of values[: j + 1] for every j, and the first place it stands at."""
    least = np.minimum.accumulate(values)
    is_new = np.append(True, values[1:] < least[:-1])
    return least, np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))


def extend_ends(first: np.ndarray, last: np.ndarray, presence: np.ndarray, pause_frames: int) -> np.ndarray:
    """
    Last frames (W,) that reach to the next token, or to the next pause: as many frames of silence. Attention sees
    where a token begins better than where it ends.
    """
    num_frames = len(presence)
    silent = np.pad(np.cumsum(presence < 0.5), (1, 0))
    at = np.arange(num_frames)
    until = np.minimum(at + pause_frames, num_frames)
    begins_pause = silent[until] - silent[at] == until - at
    # The first pause that begins at a frame or behind it.
    next_pause = np.minimum.accumulate(np.where(begins_pause, at, num_frames)[::-1])[::-1]
    behind = np.append(first[1:], num_frames)
    pause = np.append(next_pause, num_frames)[last + 1]
    return np.minimum(behind, pause) - 1


def align_row(
    weights: np.ndarray,
    frame_s: float,
    duration_s: float,
    features: np.ndarray | None = None,
    has_end: bool = True,
) -> np.ndarray:
    """
    Start and end (W, 2) in seconds of W tokens.

    Args:
        weights (`np.ndarray` of shape (A, W, T)): each token's attention over the row's own frames, of A heads.
        frame_s (`float`): seconds per frame.
        duration_s (`float`): of the audio; frames behind it are of the silence that the encoder adds.
        features (`np.ndarray` of shape (T', mel bins) or (N,), *optional*): the row's own, which tell speech from
            pauses. Without them words may reach into pauses.
        has_end (`bool`): the last token is the end of text, which may own silence.
    """
    num_tokens = weights.shape[1]
    num_frames = max(min(math.ceil(duration_s / frame_s - 1e-6), weights.shape[-1]), 1)
    weights = weights[..., :num_frames]
    weights = (weights / weights.sum(axis=-1, keepdims=True).clip(1e-9)).mean(axis=0)
    grid = max(math.ceil(num_frames * frame_s / GRID_S - 1e-6), num_frames, 2 * num_tokens)
    if grid != num_frames:
        # The middles of the grid's cells, among those of the frames.
        at = (np.arange(grid) + 0.5) * num_frames / grid - 0.5
        weights = np.stack([np.interp(at, np.arange(num_frames), row) for row in weights])
    grid_s = num_frames * frame_s / grid
    weights = smooth(weights, 2 * round(SMOOTHING_S / grid_s / 2) + 1)
    share = weights / weights.sum(axis=0, keepdims=True).clip(1e-9)
    of_peak = weights / weights.max(axis=-1, keepdims=True).clip(1e-9)
    costs = -np.log(share + FLOOR) - PEAK_WEIGHT * np.log(of_peak + FLOOR)
    presence = np.ones(grid)
    if features is not None:
        # Features end with the audio, frames up to one frame later.
        inside = min(max(round(grid * duration_s / (num_frames * frame_s)), 1), grid)
        presence = np.pad(speech_presence(features, inside), (0, grid - inside))
    penalties = np.broadcast_to(SILENCE_COST * (1 - presence), costs.shape).copy()
    if has_end:
        penalties[-1] = 0
    first, last = warp(costs + penalties, GAP_COST * presence)
    last = extend_ends(first, last, presence, max(round(PAUSE_S / grid_s), 1))
    if has_end:
        last[-1] = grid - 1
    return np.stack([first * grid_s, (last + 1) * grid_s], axis=-1).clip(0.0, duration_s)


def token_attention(
    model: Any,
    is_token: np.ndarray,
    input_ids: np.ndarray,
    visible: np.ndarray | None,
    starts: np.ndarray,
    encoder_outputs: Any,
    heads: Sequence[tuple[int, int]],
) -> np.ndarray:
    """
    What each token of a finished text attends to, by one evaluation of the decoder under any attention implementation:
    probabilities (B, A, W, T) over each row's own frames, in fp32, of A heads `(layer, head)`. A causal decoder's are
    read in the row that says the token, the one before its own, as Whisper reads them (arXiv 2212.04356's release); on
    a canvas, where all tokens are visible, in the token's own row. The other arguments are those of
    `token_timestamps`.
    """
    read, mask = model.cross_attention(input_ids, visible, encoder_outputs, {layer for layer, _ in heads})
    config, scores = model.config.decoder_config, []
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for layer, head in heads:
        queries, keys = read[layer]
        query = queries[..., head * size : (head + 1) * size]
        scores.append(one_thread_product(query, keys[:, head // group].transpose(0, 2, 1)) * size**-0.5)
    scores = np.stack(scores, axis=1)
    if mask is not None:
        scores = np.where(mask.astype(bool)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    first = starts - 1 if config.is_causal else starts
    places = np.minimum(first[:, None] + np.arange(is_token.shape[1]), input_ids.shape[1] - 1)
    return np.take_along_axis(weights, places[:, None, :, None], axis=2)


def token_timestamps(
    model: Any,
    sequences: np.ndarray,
    is_token: np.ndarray,
    input_ids: np.ndarray,
    visible: np.ndarray | None,
    starts: np.ndarray,
    encoder_outputs: Any,
    duration_s: np.ndarray | None = None,
    input_features: Any = None,
    feature_mask: Any = None,
    alignment_heads: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """
    When each committed token was spoken, from one more evaluation of the decoder.

    Args:
        model: what has `cross_attention`, see [`GenerationMixin`].
        sequences (`np.ndarray` of shape (B, W)): the text and its end.
        is_token (`np.ndarray` of shape (B, W)): False for padding.
        input_ids (`np.ndarray` of shape (B, S)): prompt and text, or canvas, as the decoder reads them.
        visible (`np.ndarray` of shape (B, S), *optional*): the positions of each row's own canvas.
        starts (`np.ndarray` of shape (B,)): where in it the text begins.
        encoder_outputs ([`MDMASREncoderOutput`]): with `cross_attention_states`.
        duration_s (`np.ndarray` of shape (B / n,), *optional*): of the audio, whose n samples stand one behind the
            other among the B rows; the frames' without it.
        input_features (`torch.Tensor` of shape (B / n, T, mel bins) or (B / n, N), *optional*): what the encoder got,
            to find pauses in.
        feature_mask (`torch.Tensor` of shape (B / n, T) or (B / n, N), *optional*): 1 for the utterance.
        alignment_heads (*optional*): see `check_alignment_heads`.

    Returns:
        `np.ndarray` of shape (B, W, 2): start and end of each token in seconds, rising from token to token and
        inside the audio; 0 for padding.
    """
    config, batch_size = model.config, len(sequences)
    heads = check_alignment_heads(alignment_heads, config.decoder_config)
    weights = token_attention(model, is_token, input_ids, visible, starts, encoder_outputs, heads)
    frame_mask = encoder_outputs.attention_mask
    num_frames = [weights.shape[-1]] * batch_size if frame_mask is None else frame_mask.sum(-1).tolist()
    known_s = frame_duration_s(config.encoder_config, config.input_frames_per_s)
    times = np.zeros((*sequences.shape, 2), dtype=np.float32)
    for row in range(batch_size):
        num_tokens, frames = int(is_token[row].sum()), int(num_frames[row])
        if num_tokens == 0 or frames == 0:
            continue
        seconds, features = None, None
        if duration_s is not None:
            seconds = float(duration_s[row * len(duration_s) // batch_size])
        if input_features is not None:
            place = row * len(input_features) // batch_size
            features = to_numpy(input_features[place])
            if feature_mask is not None:
                features = features[: int(feature_mask[place].sum())]
        frame_s = known_s or (seconds or frames * GRID_S) / frames
        aligned = align_row(
            weights[row, :, :num_tokens, :frames],
            frame_s,
            frames * frame_s if seconds is None else seconds,
            features,
            has_end=bool(sequences[row, num_tokens - 1] == config.eos_token_id),
        )
        times[row, :num_tokens] = aligned
    return times
