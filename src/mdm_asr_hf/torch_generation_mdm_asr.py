# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What `generate` asks of a model of PyTorch, and its decoding on the canvas of MDM-ASR (arXiv 2602.18952)."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .canvas_mdm_asr import Canvas, denoise
from .decoder_mdm_asr import DraftingCache, entropy
from .drafting_mdm_asr import DraftTree, to_numpy
from .encoder_mdm_asr import MDMASREncoderOutput, take_rows
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .generation_mdm_asr import Batch, GenerateOutput, GenerationMixin, Read


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
        # The cache has one more slot, which takes what is padding.
        self.padding_slot = num_slots
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
        # Before the first evaluation there are no keys.
        num_keys = min(int(frontiers.max()) + 1, self.cache.num_keys)
        none = block_ids.new_zeros((len(block_ids), 0))
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


logger = logging.get_logger(__name__)


@dataclass
class MDMASRGenerateOutput(ModelOutput, GenerateOutput):  # noqa: D101 (it is the other's)
    __doc__ = GenerateOutput.__doc__


class MDMASRGenerationMixin(GenerationMixin):
    """[`GenerationMixin`] of models that are PyTorch's."""

    memory_errors = (torch.OutOfMemoryError,)
    generate = torch.no_grad()(GenerationMixin.generate)

    def begin_steps(
        self, encoder_outputs: MDMASREncoderOutput, rows: np.ndarray, num_slots: int, may_spend: bool = False
    ) -> TorchSteps:
        """What [`VerifiedDecoder`] makes its steps by."""
        return TorchSteps(self, encoder_outputs, rows, num_slots)

    def take_rows(self, encoder_outputs: MDMASREncoderOutput, rows: np.ndarray) -> MDMASREncoderOutput:
        """The encoder's outputs for some rows, by their indices, which may repeat."""
        return take_rows(encoder_outputs, torch.from_numpy(rows).to(encoder_outputs.last_hidden_state.device))

    @torch.no_grad()
    def prompt_logits(self, prompt_ids: np.ndarray, encoder_outputs: MDMASREncoderOutput) -> np.ndarray:
        """Logits (B, V) behind prompts (B, P)."""
        device = encoder_outputs.last_hidden_state.device
        ids = torch.tensor(prompt_ids, device=device)
        return to_numpy(self(decoder_input_ids=ids, encoder_outputs=encoder_outputs).logits[:, -1])

    @torch.no_grad()
    def cross_attention(
        self,
        input_ids: np.ndarray,
        visible: np.ndarray | None,
        encoder_outputs: MDMASREncoderOutput,
        layers: Iterable[int],
    ) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], np.ndarray | None]:
        """Of some layers, queries (B, S, heads * head_dim) of texts (B, S), of which positions (B, S) may be visible
        alone, and keys (B, heads, T, head_dim); and which frames (B, T) count."""
        device, mask = encoder_outputs.last_hidden_state.device, encoder_outputs.attention_mask
        outputs = self.get_decoder()(
            torch.tensor(input_ids, device=device),
            encoder_outputs.last_hidden_state,
            attention_mask=None if visible is None else torch.tensor(visible, device=device),
            encoder_attention_mask=mask,
            cross_attention_states=encoder_outputs.cross_attention_states,
            output_cross_queries=True,
        )
        queries, states = outputs["cross_queries"], encoder_outputs.cross_attention_states
        read = {layer: (to_numpy(queries[layer]), to_numpy(states[layer][0])) for layer in layers}
        return read, None if mask is None else to_numpy(mask)

    def to_output(self, values: Any, encoder_outputs: MDMASREncoderOutput | None = None) -> Any:
        """An array, or those of an output, as tensors where the encoder's outputs lie, or on the CPU."""
        device = "cpu" if encoder_outputs is None else encoder_outputs.last_hidden_state.device
        if isinstance(values, np.ndarray):
            return torch.tensor(values, device=device)
        named = {field.name: getattr(values, field.name) for field in fields(values)}
        arrays = {name: torch.tensor(one, device=device) for name, one in named.items() if isinstance(one, np.ndarray)}
        return MDMASRGenerateOutput(**{**named, **arrays})

    def draw_seeds(self, generator: Any, number: int) -> np.ndarray:
        """Seeds (N,) by a generator of PyTorch's, a number, or None, which takes PyTorch's own."""
        if isinstance(generator, int):
            return super().draw_seeds(generator, number)
        where = "cpu" if generator is None else generator.device
        return to_numpy(torch.randint(2**31, (number,), generator=generator, device=where))

    def find_speech(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None, min_duration_s: float
    ) -> tuple[np.ndarray, torch.Tensor | None]:
        """See [`GenerationMixin`]; the mask is a tensor."""
        has_speech, mask = super().find_speech(input_features, attention_mask, min_duration_s)
        return has_speech, None if mask is None else torch.from_numpy(mask).to(attention_mask.device)

    def _decode_canvas(self, batch: Batch, settings: MDMASRGenerationConfig) -> tuple[GenerateOutput, Read]:
        """The paper's decoding."""
        device = batch.encoder_outputs.last_hidden_state.device
        prompt_ids, num_samples = torch.tensor(batch.prompt_ids, device=device), batch.num_samples
        duration_s = None if batch.duration_s is None else torch.from_numpy(batch.duration_s)
        lengths = self.canvas_lengths(duration_s, len(prompt_ids) // num_samples, prompt_ids.shape[1], settings)
        lengths = [length for length in lengths for _ in range(num_samples)]
        if isinstance(batch.generator, list):
            generators = [_as_generator(one) for one in batch.generator]
            generator = [one for one in generators for _ in range(num_samples)]
        else:
            generator = _as_generator(batch.generator)
        canvas = Canvas.lay(
            lengths,
            device,
            mask_token_id=self.config.mask_token_id,
            eos_token_id=self.config.eos_token_id,
            has_speech=torch.from_numpy(batch.has_speech).to(device),
        )
        inputs = prompt_ids, batch.encoder_outputs
        denoise(self, canvas, *inputs, settings, lengths, generator, batch.streamer, batch.synced_gpus)
        if num_full := canvas.num_full():
            logger.warning(
                f"{num_full} of {len(canvas.tokens)} canvases of up to {canvas.tokens.shape[1]} tokens filled up "
                "without an end of text, so the end of their speech may be missing. Set a larger `canvas_length` (or "
                "`canvas_tokens_per_s`, `max_new_tokens`), or split the audio."
            )
        record = (*canvas.cut(self._pad_token_id(settings)), canvas.nfe)
        output = self._make_output(*map(to_numpy, record))
        tokens, mask = to_numpy(canvas.tokens), to_numpy(canvas.mask)
        visible = np.concatenate([np.ones(batch.prompt_ids.shape, dtype=bool), mask], axis=-1)
        starts = np.full(len(tokens), prompt_ids.shape[1])
        return output, (np.concatenate([batch.prompt_ids, tokens], axis=-1), visible, starts)

    def canvas_lengths(
        self,
        duration_s: torch.Tensor | None,
        batch_size: int,
        prompt_length: int,
        settings: MDMASRGenerationConfig,
    ) -> list[int]:
        """
        Canvas tokens of each row, from the settings and the rows' durations (B,) in seconds.

        Raises:
            ValueError: an utterance may need a longer canvas than the decoder has positions for.
        """
        capacity = self.config.decoder_config.max_position_embeddings - prompt_length
        if settings.canvas_length is None and duration_s is None:
            raise ValueError("The canvas needs `input_features`, `attention_mask` or a fixed `canvas_length`.")
        lengths = self.planned_tokens(duration_s, batch_size, settings).tolist()
        if max(lengths) > capacity:
            remedy = "Split the audio into shorter pieces, or set `canvas_length` if it holds little speech."
            if settings.canvas_length is not None:
                remedy = "Set a shorter `canvas_length`."
            raise ValueError(
                f"A canvas of {max(lengths)} tokens is needed, but the decoder has positions for {capacity}. {remedy}"
            )
        limit = self.canvas_limit(prompt_length, settings)
        return [max(min(length, limit), 1) for length in lengths]

    def canvas_limit(self, prompt_length: int, settings: MDMASRGenerationConfig) -> int:
        """The most tokens a canvas behind a prompt may have, by the decoder's positions and by the settings."""
        capacity = self.config.decoder_config.max_position_embeddings - prompt_length
        return max(min(settings.max_length - prompt_length, settings.max_new_tokens or capacity, capacity), 1)

    def planned_tokens(
        self, duration_s: torch.Tensor | None, batch_size: int, settings: MDMASRGenerationConfig
    ) -> torch.LongTensor:
        """Tokens (B,) that the settings plan for utterances of these durations, on the durations' device."""
        if settings.canvas_length is not None:
            device = None if duration_s is None else duration_s.device
            return torch.full((batch_size,), settings.canvas_length, device=device)
        # Rounded first: 0.6 s is 0.60000002 in fp32, which must not cost a token.
        tokens = torch.round(duration_s.double() * settings.canvas_tokens_per_s, decimals=3)
        return tokens.ceil().long() + settings.canvas_extra_tokens

    def _any_unfinished(self, unfinished: bool, synced_gpus: bool) -> bool:
        """Whether this process has rows that are open, or with `synced_gpus` any."""
        if synced_gpus and torch.distributed.is_available() and torch.distributed.is_initialized():
            # A process that stopped early would leave the others waiting in the sharded layers.
            flag = torch.tensor(float(unfinished), device=self.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            unfinished = bool(flag > 0)
        return unfinished

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        *args,
        **kwargs,
    ):
        """Called by `from_pretrained` to load generation_config.json."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        if generation_config is not None or pretrained_model_name_or_path is None:
            return
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        loading = {**dict(zip(names, args, strict=False)), **kwargs}
        loading.pop("trust_remote_code", None)
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **loading
            )
        except OSError:
            logger.info("generation_config.json not found: the default generation settings are used.")

    def audio_duration_s(
        self, input_features: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Seconds of audio in each row (B,), or None if nothing tells."""
        if attention_mask is not None:
            num_frames = attention_mask.sum(dim=-1)
        elif input_features is not None:
            num_frames = torch.full(input_features.shape[:1], input_features.shape[1])
        else:
            return None
        return num_frames / self.config.input_frames_per_s


def _as_generator(generator: Any) -> Any:
    """A generator, or that of a seed."""
    return torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
