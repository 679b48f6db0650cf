# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of the causal rows: each row of a batch has a length of its own, and rejected drafts leave."""

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]


class DraftingCache:
    """
    Keys and values of the decoder's self-attention for R rows of text, by slot. Committed token p stands at slot p;
    drafts to be verified stand behind the committed ones, branch by branch. It is used as transformers' caches are
    (`update`, `batch_select_indices`), which share one length among the rows and so cannot hold it.

    Attributes:
        keys, values (`torch.Tensor` of shape (layers, R, S + 1, key-value heads, head_dim)): the last slot takes what
            is padding.
    """

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        num_rows, num_heads, num_slots, head_dim = shape
        shape = (num_layers, num_rows, num_slots + 1, num_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.slots: torch.LongTensor | None = None
        self.num_keys = 0
        self._rows = torch.arange(num_rows, device=device)[:, None]

    @property
    def padding_slot(self) -> int:
        return self.keys.shape[2] - 1

    def place(self, slots: torch.LongTensor, num_keys: int) -> None:
        """The next evaluation's causal rows stand at `slots` (R, Q), and the first `num_keys` slots are looked at."""
        self.slots, self.num_keys = slots, num_keys

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> KeyValue:
        """Writes a layer's keys and values (R, heads, Q, head_dim), and returns those of all slots looked at (R,
        heads, K, head_dim)."""
        # By position, all heads at once: on a CPU a quarter of the time of scatter_. What comes may be of another type
        # than what is kept, where one of the two was computed under autocast.
        self.keys[layer_idx][self._rows, self.slots] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer_idx][self._rows, self.slots] = values.transpose(1, 2).to(self.values.dtype)
        return self.layer(layer_idx)

    def layer(self, layer_idx: int) -> KeyValue:
        """A layer's keys and values (R, heads, K, head_dim) of all slots looked at."""
        keys, values = (states[layer_idx, :, : self.num_keys].transpose(1, 2) for states in (self.keys, self.values))
        return keys, values

    def move(self, source: torch.LongTensor, target: torch.LongTensor) -> None:
        """Copies slots (R, N) to others (R, N) in all layers."""
        for states in (self.keys, self.values):
            states[:, self._rows, target] = states[:, self._rows, source]

    def batch_select_indices(self, rows: torch.LongTensor) -> None:
        """Keeps some rows, by their indices."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
        self._rows = torch.arange(len(rows), device=rows.device)[:, None]


__all__ = ["DraftingCache", "KeyValue"]
