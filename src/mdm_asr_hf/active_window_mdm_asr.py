# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The active window: the few positions around the first open one that a denoising step computes.

PBEB-Conf (arXiv 2602.18952) commits near the first open position, so that the rest of the canvas need not be computed
in every step. What lies behind the window keeps the keys and values of its last evaluation (as prefix caches of block
diffusion do, arXiv 2503.09573); what lies ahead of it does not exist yet.
"""

from dataclasses import dataclass

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]


class CanvasCache:
    """
    Keys and values of the decoder's self-attention for R rows of prompt and canvas, S positions, written window by
    window.

    Attributes:
        states (`torch.Tensor` of shape (R, layers, 2, key-value heads, S + 1, head_dim)): keys and values of every
            layer. The last position takes what is padding of a window.
        places (`torch.LongTensor` of shape (R, W)): where the window of the current step stands, S for its padding.
        num_keys (`int`): positions that the current step may look at.
    """

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        num_rows, num_heads, num_positions, head_dim = shape
        shape = (num_rows, num_layers, 2, num_heads, num_positions + 1, head_dim)
        self.states = torch.zeros(shape, dtype=dtype, device=device)
        self.places: torch.LongTensor | None = None
        self.num_keys = num_positions
        self._rows: torch.LongTensor | None = None

    def move(self, places: torch.LongTensor, num_keys: int) -> None:
        """The next window stands at `places` (R, W), and may look at `num_keys` positions."""
        self.places, self.num_keys = places, num_keys
        self._rows = torch.arange(len(places), device=places.device)[:, None]

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
        """Writes a layer's keys and values (R, heads, W, head_dim) of the window, and returns all up to
        `num_keys`."""
        written = self._by_position()
        written[self._rows, self.places, layer, 0] = keys.transpose(1, 2)
        written[self._rows, self.places, layer, 1] = values.transpose(1, 2)
        kept = self.states[:, layer, :, :, : self.num_keys]
        return kept[:, 0], kept[:, 1]

    def update_all(self, keys_and_values: torch.Tensor) -> None:
        """Writes the window's (layers, 2, R, heads, W, head_dim) of all layers."""
        self._by_position()[self._rows, self.places] = keys_and_values.permute(2, 4, 0, 1, 3, 5)

    def _by_position(self) -> torch.Tensor:
        """The states as (R, S + 1, layers, 2, heads, head_dim), to write to: all heads of a position at once, which on
        a CPU takes a quarter of the time of scatter_, which goes number by number."""
        return self.states.permute(0, 4, 1, 2, 3, 5)

    def take_rows(self, rows: torch.LongTensor) -> None:
        """Keeps some rows, by their indices, in ascending order."""
        self.states = select_rows(self.states, rows, in_place=True)


def select_rows(values: torch.Tensor, rows: torch.LongTensor, in_place: bool = False) -> torch.Tensor:
    """
    Some rows of `values` (R, ...), by their indices, as a copy.

    With `in_place`, the indices ascend and `values` may not be used afterwards: on a CPU the rows then move up within
    them, since new memory costs more there than the copy does.
    """
    if not in_place or values.device.type != "cpu":
        # Which copies whole rows at once, unlike an index in brackets.
        return values.index_select(0, rows)
    for place, row in enumerate(rows.tolist()):
        if place != row:
            values[place] = values[row]
    return values[: len(rows)]


@dataclass
class ActiveWindow:
    """
    What one step computes of the sequences (R, S) of prompt and canvas.

    Attributes:
        places (`torch.LongTensor` of shape (R, W)): positions in the sequence; S where a row has fewer than W.
        starts, ends (`torch.LongTensor` of shape (R,)): the first position of each row's window, and the one behind
            its last. Nothing from `ends` on is visible.
    """

    places: torch.LongTensor
    starts: torch.LongTensor
    ends: torch.LongTensor

    @classmethod
    def around(
        cls,
        sequences: torch.LongTensor,
        computed: torch.LongTensor,
        wanted: torch.BoolTensor,
        is_text: torch.BoolTensor,
        lengths: torch.LongTensor,
        is_last: torch.BoolTensor,
        mask_token_id: int,
        ahead: int,
        behind: int,
        shift: int = 0,
    ) -> "ActiveWindow":
        """
        The window around each row's first candidate. It reaches `ahead` positions ahead of it, that one included, and
        to the last committed position of the text if that is further, as after a repair or with a draft; in a row's
        last step, in which everything is committed, to the end. It starts `behind` positions behind the first
        candidate, or earlier, at the first position whose token is not the one its cached keys were computed of, or
        where the logits of the first wanted position are read.

        Args:
            sequences (`torch.LongTensor` of shape (R, S)): the ids of prompt and canvas.
            computed (`torch.LongTensor` of shape (R, S)): the ids that the cache was computed of, -1 for none.
            wanted (`torch.BoolTensor` of shape (R, S)): positions whose logits are needed. The masked ones among them
                are the candidates, which may be committed.
            is_text (`torch.BoolTensor` of shape (R, S)): positions up to the row's first EOS.
            lengths (`torch.LongTensor` of shape (R,)): prompt and own canvas of each row.
            is_last (`torch.BoolTensor` of shape (R,)): rows that take their last step.
            mask_token_id (`int`).
            ahead, behind (`int`): at least 1 and 0.
            shift (`int`): how many positions earlier the logits of a position are read.
        """
        candidates = wanted & (sequences == mask_token_id)
        num_positions = sequences.shape[1]
        positions = torch.arange(num_positions, device=sequences.device)
        # 0 where a row has none, see below.
        first = candidates.int().argmax(dim=-1)
        last_known = (((sequences != mask_token_id) & is_text) * positions).amax(dim=-1)
        ends = torch.maximum(first + ahead, last_known + 1)
        ends = torch.where(is_last, lengths, torch.minimum(ends, lengths)).clamp(min=2)
        is_stale = sequences != computed
        first_stale = torch.where(is_stale.any(dim=-1), is_stale.int().argmax(dim=-1), num_positions)
        first_read = wanted.int().argmax(dim=-1) - shift
        starts = torch.minimum(torch.minimum(first - behind, first_read).clamp(min=0), first_stale)
        starts = torch.minimum(starts, ends - 1)
        # Rows without a candidate are finished: they wait to be dropped, in the narrowest of windows.
        starts = torch.where(candidates.any(dim=-1), starts, ends - 1)
        width = int((ends - starts).max())
        places = starts[:, None] + torch.arange(width, device=sequences.device)
        return cls(places.masked_fill(places >= ends[:, None], num_positions), starts, ends)


__all__ = ["ActiveWindow", "CanvasCache", "select_rows"]
