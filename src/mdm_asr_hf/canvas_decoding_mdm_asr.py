# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""One decoder evaluation of a canvas: of its active window, with the cached keys of the rest, or of all of it."""

import math

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .active_window_mdm_asr import ActiveWindow, CanvasCache
from .canvas_mdm_asr import Canvas, OpenRows
from .encoder_mdm_asr import MDMASREncoderOutput, key_mask
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .sampling_mdm_asr import EBConfConfig, SamplerConfig


def is_bounded(sampler: SamplerConfig) -> bool:
    """Whether a step commits only what a finite bound of entropy allows. Other samplers choose among the whole canvas,
    and without a bound all of it is committed at once."""
    return isinstance(sampler, EBConfConfig) and not math.isinf(sampler.gamma)


class CanvasDecodingMixin:
    """What [`MDMASRGenerationMixin`] asks of the decoder in each denoising step."""

    def _canvas_logits(
        self,
        open_rows: OpenRows,
        canvas: Canvas,
        wanted: torch.BoolTensor,
        settings: MDMASRGenerationConfig,
        sampler: SamplerConfig,
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        One decoder evaluation of the open rows of a canvas (B, L). The output layer is as wide as the vocabulary, so
        that it is spared for all positions but the wanted ones (B, L): those that may be committed, which are masked,
        and those that may be revised.

        Returns:
            Logits (N, V), in fp32, of N wanted positions in row-major order; and which ones (B, L) those are: the ones
            within the active window, or all.
        """
        rows, prompt_ids = open_rows.rows, open_rows.prompt_ids
        sequences = torch.cat([prompt_ids, canvas.tokens[rows]], dim=-1)
        if settings.active_ahead is not None and is_bounded(sampler):
            outputs, within = self._run_window(open_rows, canvas, sequences, wanted, settings)
        else:
            visible = torch.cat([torch.ones_like(prompt_ids, dtype=torch.bool), canvas.mask[rows]], dim=-1)
            outputs, within = self._run_sequences(open_rows, sequences, visible, wanted[rows]), wanted
        logits = outputs.logits.float()
        if settings.suppress_tokens:
            logits[..., settings.suppress_tokens] = -torch.inf
        return logits, within

    def _run_sequences(
        self,
        open_rows: OpenRows,
        sequences: torch.LongTensor,
        visible: torch.BoolTensor,
        wanted: torch.BoolTensor,
    ) -> ModelOutput:
        """Runs the decoder on whole sequences (R, S) of prompt and canvas, up to S."""
        return self(
            decoder_input_ids=sequences,
            decoder_attention_mask=visible,
            encoder_outputs=open_rows.encoder_outputs,
            logits_to_keep=wanted,
        )

    def _run_window(
        self,
        open_rows: OpenRows,
        canvas: Canvas,
        sequences: torch.LongTensor,
        wanted: torch.BoolTensor,
        settings: MDMASRGenerationConfig,
    ) -> tuple[ModelOutput, torch.BoolTensor]:
        """Runs the decoder on the active window of sequences (R, S), see [`ActiveWindow`]. Returns its output, and the
        wanted positions (B, L) within the window."""
        rows, prompt_length = open_rows.rows, open_rows.prompt_ids.shape[1]
        num_positions, device = sequences.shape[1], sequences.device
        if open_rows.computed is None:
            open_rows.computed = torch.full_like(sequences, -1)
        in_sequence = nn.functional.pad(wanted[rows], (prompt_length, 0))
        shift = int(self.config.shift_logits)
        window = ActiveWindow.around(
            sequences,
            open_rows.computed,
            in_sequence,
            nn.functional.pad(canvas.text_positions()[rows], (prompt_length, 0), value=True),
            prompt_length + canvas.mask[rows].sum(dim=-1),
            canvas.in_last_step(settings.max_denoising_steps)[rows],
            self.config.mask_token_id,
            ahead=settings.active_ahead,
            behind=settings.active_behind,
            # Shifted logits are read one position earlier.
            shift=shift,
        )
        num_keys = int(window.ends.max())
        positions = torch.arange(num_positions, device=device)
        visible = positions < window.ends[:, None]
        in_sequence = in_sequence & visible
        within = torch.zeros_like(wanted)
        within[rows] = in_sequence[:, prompt_length:]
        decoder_config = self.get_decoder().config
        if decoder_config.is_causal or decoder_config._attn_implementation not in ("sdpa", "eager"):
            # Without a cache: other kernels cannot attend to keys that other rows do not have.
            kept = in_sequence[:, prompt_length:num_keys]
            return self._run_sequences(open_rows, sequences[:, :num_keys], visible[:, :num_keys], kept), within
        if open_rows.cache is None:
            self._open_cache(open_rows, num_positions)
        cache, places = open_rows.cache, window.places.clamp(max=num_positions - 1)
        cache.move(window.places, num_keys)
        is_inside = window.places < num_positions
        kept = in_sequence.gather(1, places) & is_inside
        is_computed = visible & (positions >= window.starts[:, None])
        open_rows.computed = torch.where(is_computed, sequences, open_rows.computed)
        mask = None
        if not bool(visible[:, :num_keys].all()):
            mask = visible[:, None, None, :num_keys]
            if decoder_config._attn_implementation == "eager":
                blank = torch.zeros(mask.shape, dtype=self.dtype, device=device)
                mask = blank.masked_fill(~mask, torch.finfo(self.dtype).min)
        outputs = self(
            decoder_input_ids=sequences.gather(1, places),
            decoder_attention_mask=mask,
            encoder_outputs=open_rows.encoder_outputs,
            position_ids=places,
            canvas_cache=cache,
            logits_to_keep=kept[:, shift:],
        )
        return outputs, within

    def _open_cache(self, open_rows: OpenRows, num_positions: int) -> None:
        """Makes room for the keys of the open rows."""
        config, frames = self.get_decoder().config, open_rows.encoder_outputs.last_hidden_state
        open_rows.cache = CanvasCache(
            config.num_hidden_layers,
            (len(open_rows.rows), config.num_key_value_heads, num_positions, config.head_dim),
            dtype=self.dtype,
            device=frames.device,
        )
        open_rows.encoder_outputs = self._with_frame_mask(open_rows.encoder_outputs)

    def _with_frame_mask(self, outputs: MDMASREncoderOutput) -> MDMASREncoderOutput:
        """The mask of the frames as attention takes it, made once: it stays the same in every step."""
        frames = outputs.last_hidden_state
        blank = frames.new_zeros((len(frames), 1, 1), dtype=self.dtype)
        mask = key_mask(self.get_decoder(), blank, outputs.attention_mask, encoder_hidden_states=frames)
        return MDMASREncoderOutput(**{**outputs, "attention_mask": mask})


__all__ = ["CanvasDecodingMixin"]
