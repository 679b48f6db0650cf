# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The evaluations that verified drafts consist of, by PyTorch. What goes in and comes out are arrays of NumPy."""

from typing import Any

import numpy as np
import torch

from .cache_mdm_asr import DraftingCache
from .decoder_mdm_asr import entropy
from .drafting_mdm_asr import DraftTree
from .encoder_mdm_asr import MDMASREncoderOutput, take_rows


class TorchSteps:
    """
    What [`VerifiedDecoder`] asks of a model, with the keys and values of R texts.

    Args:
        model ([`MDMASRForConditionalGeneration`]).
        encoder_outputs ([`MDMASREncoderOutput`]): of B rows, with `cross_attention_states`.
        rows (`np.ndarray` of shape (R,)): those to write.
        num_slots (`int`): S, the most tokens and drafts of a row.
    """

    def __init__(self, model: Any, encoder_outputs: MDMASREncoderOutput, rows: np.ndarray, num_slots: int):
        config, frames = model.config.decoder_config, encoder_outputs.last_hidden_state
        self.model, self.device = model, frames.device
        self.encoder_outputs = encoder_outputs
        if not np.array_equal(rows, np.arange(len(frames))):
            self.encoder_outputs = take_rows(encoder_outputs, self._tensor(rows))
        self.cache = DraftingCache(
            config.num_hidden_layers,
            (len(rows), config.num_key_value_heads, num_slots, config.head_dim),
            # Of what is computed, which under autocast is not the weights' type.
            dtype=encoder_outputs.cross_attention_states[0][0].dtype,
            device=self.device,
        )

    @property
    def num_rows(self) -> int:
        return self.cache.keys.shape[1]

    @property
    def padding_slot(self) -> int:
        """The slot that takes what is padding."""
        return self.cache.padding_slot

    def verify(self, tree: DraftTree, columns: np.ndarray) -> Any:
        """
        Evaluates causal rows, whose keys and values are kept.

        Args:
            tree ([`DraftTree`]): Q tokens of each row.
            columns (`np.ndarray` of shape (R, N)): those among Q whose logits are wanted.

        Returns:
            Logits (R, N, V): an array, or where they lie on a GPU a tensor.
        """
        self.cache.place(self._tensor(tree.slots), tree.visible.shape[-1])
        logits = self.model(
            decoder_input_ids=self._tensor(tree.ids),
            decoder_attention_mask=None if tree.visible.all() else self._tensor(tree.visible),
            encoder_outputs=self.encoder_outputs,
            position_ids=self._tensor(tree.positions),
            past_key_values=self.cache,
            logits_to_keep=self._tensor(columns),
        ).logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits.numpy(force=True) if logits.device.type == "cpu" else logits

    def propose(
        self, blocks: np.ndarray, before: np.ndarray, frontiers: np.ndarray, num_drafts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Drafts by the masks of a block of each row.

        Args:
            blocks (`np.ndarray` of shape (R, K)): a known token, then masks, or hints in their places.
            before (`np.ndarray` of shape (R,)): the token before the known one.
            frontiers (`np.ndarray` of shape (R,)): its position, the last one that has keys.
            num_drafts (`int`): M, at most K.

        Returns:
            Ids and entropies in nats (R, M).
        """
        block_ids, frontiers = self._tensor(blocks)[:, None], self._tensor(frontiers)[:, None]
        none, num_keys = block_ids.new_zeros((len(block_ids), 0)), int(frontiers.max()) + 1
        self.cache.place(none, num_keys)
        states = self.model(
            decoder_input_ids=none,
            encoder_outputs=self.encoder_outputs,
            past_key_values=self.cache,
            frontiers=frontiers,
            frontier_mask=torch.arange(num_keys, device=self.device) <= frontiers[..., None],
            block_ids=block_ids,
            logits_to_keep=none,
        ).draft_hidden_states[:, 0]
        decoder, known = self.model.get_decoder(), torch.stack([block_ids[:, 0, 0], self._tensor(before)], dim=1)
        output = self.model.short_list_output()
        ids, log_probs = decoder.drafts.draft(states[:, :num_drafts], decoder.embed_ids(known), *output)
        return ids.numpy(force=True), entropy(log_probs).numpy(force=True)

    def keep_rows(self, rows: np.ndarray) -> None:
        """Keeps some rows, by their indices."""
        rows = self._tensor(rows)
        self.encoder_outputs = take_rows(self.encoder_outputs, rows)
        self.cache.batch_select_indices(rows)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies keys and values from slots (R, N) to others (R, N)."""
        self.cache.move(self._tensor(source), self._tensor(target))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


__all__ = ["TorchSteps"]
