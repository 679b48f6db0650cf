# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDM-ASR (arXiv 2602.18952): a speech encoder and a masked-diffusion decoder that fills a canvas of [MASK] tokens."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .diffusion_mdm_asr import linear_weight, mask_tokens, masked_diffusion_loss, sample_timesteps
from .encoder_mdm_asr import MDMASREncoderOutput, build_encoder, encoder_width, run_encoder
from .generation_mdm_asr import MDMASRGenerationConfig, MDMASRGenerationMixin
from .prompt_mdm_asr import build_prompt_ids

# The stock ASR pipeline tells sequence models from CTC models by the class name in this table. The line stands in this
# file, so that it also runs when the file is loaded as remote code.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.setdefault("mdm_asr", "MDMASRForConditionalGeneration")

KeyValue = tuple[torch.Tensor, torch.Tensor]


class MDMASRSinusoidalPositions(nn.Module):
    """Fixed sinusoids divided by sqrt(D), as transformers' Canary has them: sines in the first half of the
    channels."""

    def __init__(self, num_positions: int, width: int):
        super().__init__()
        self.num_positions, self.width = num_positions, width
        self.table = nn.Buffer(self.compute_table(), persistent=False)

    def compute_table(self) -> torch.Tensor:
        """The table (positions, D)."""
        half = self.width // 2
        longest = 10000 ** ((self.width - 2) / self.width)
        rates = torch.exp(-math.log(longest) / max(half - 1, 1) * torch.arange(half).float())
        angles = torch.arange(self.num_positions).float()[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1) / math.sqrt(self.width)

    def forward(self, length: int) -> torch.Tensor:
        return self.table[:length]


class MDMASRAttention(nn.Module):
    """Multi-head attention over the canvas itself, or over the acoustic frames."""

    def __init__(self, config: MDMASRDecoderConfig, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = is_causal
        width, query_width = config.hidden_size, config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, key_width, bias=config.attention_key_bias)
        self.v_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_bias)

    def project_key_value(self, states: torch.Tensor) -> KeyValue:
        """Keys and values of shape (B, key-value heads, length, head_dim) for states (B, length, D)."""
        shape = (*states.shape[:-1], -1, self.head_dim)
        return self.k_proj(states).view(shape).transpose(1, 2), self.v_proj(states).view(shape).transpose(1, 2)

    def forward(
        self, hidden_states: torch.Tensor, key_value: KeyValue, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            *key_value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class MDMASRDecoderLayer(GradientCheckpointingLayer):
    """Pre-LayerNorm block: self-attention over the whole canvas, cross-attention to all frames, feed-forward."""

    def __init__(self, config: MDMASRDecoderConfig):
        super().__init__()
        self.self_attn = MDMASRAttention(config, is_causal=config.is_causal)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = MDMASRAttention(config)
        self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_key_value: KeyValue,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        normed = self.self_attn_layer_norm(hidden_states)
        attended, _ = self.self_attn(normed, self.self_attn.project_key_value(normed), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        attended, _ = self.cross_attn(
            self.cross_attn_layer_norm(hidden_states), cross_key_value, encoder_attention_mask, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.activation_dropout(self.activation(self.fc1(self.mlp_layer_norm(hidden_states))))
        return hidden_states + self.dropout(self.fc2(inner))


class MDMASRPreTrainedModel(PreTrainedModel):
    config: MDMASRConfig
    config_class = MDMASRConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MDMASRDecoderLayer", "WhisperEncoderLayer", "ParakeetEncoderBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but from safetensors only: other weight files can carry code."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors=False` is refused: weights load from safetensors only. Convert the checkpoint with "
                "`safetensors`, then leave the argument out."
            )
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MDMASRSinusoidalPositions):
            init.copy_(module.table, module.compute_table())


class MDMASRDecoder(MDMASRPreTrainedModel):
    """
    The masked-diffusion decoder: a Transformer decoder without the causal mask. It sees the prompt and the whole
    canvas at once.

    Ids below `vocab_size` (V) are embedded by `embed_tokens`, which is tied to the output; the E ids from V on, the
    mask among them, by `input_only_embeddings`: they have no logit, so that the mask is never predicted (SUBS, arXiv
    2406.07524).
    """

    config: MDMASRDecoderConfig
    config_class = MDMASRDecoderConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": MDMASRDecoderLayer,
        "attentions": OutputRecorder(MDMASRAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MDMASRAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: MDMASRDecoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.input_only_embeddings = nn.Embedding(config.num_input_only_tokens, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.embed_positions = MDMASRSinusoidalPositions(config.max_position_embeddings, config.hidden_size)
        self.embedding_layernorm = None
        if config.embedding_layernorm:
            self.embedding_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([MDMASRDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.embed_tokens = value

    def cross_attention_states(self, encoder_hidden_states: torch.Tensor) -> tuple[KeyValue, ...]:
        """Keys and values of every layer's cross-attention for frames (B, T, D): computed once per utterance."""
        return tuple(layer.cross_attn.project_key_value(encoder_hidden_states) for layer in self.layers)

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Embeddings (B, L, D) of tokens and positions for ids (B, L)."""
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"`decoder_input_ids` have {length} tokens, but the decoder has "
                f"{self.config.max_position_embeddings} positions. "
                "Use a shorter canvas."
            )
        num_predicted = self.config.vocab_size
        known = self.embed_tokens(input_ids.clamp(max=num_predicted - 1))
        input_only = self.input_only_embeddings((input_ids - num_predicted).clamp(min=0))
        embeds = torch.where((input_ids < num_predicted)[..., None], known, input_only)
        if isinstance(self.embed_positions, nn.Embedding):
            embeds = embeds + self.embed_positions.weight[:length]
        else:
            embeds = embeds + self.embed_positions(length).to(embeds.dtype)
        if self.embedding_layernorm is not None:
            embeds = self.embedding_layernorm(embeds)
        return self.dropout(embeds)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_states: tuple[KeyValue, ...] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithCrossAttentions:
        """
        Args:
            input_ids (`torch.LongTensor` of shape (B, L)): prompt and canvas.
            encoder_hidden_states (`torch.Tensor` of shape (B, T, D)): acoustic frames, already of the decoder's width.
            attention_mask (`torch.Tensor` of shape (B, L), *optional*): 0 for positions outside a row's canvas.
            encoder_attention_mask (`torch.Tensor` of shape (B, T), *optional*): 0 for padded frames.
            cross_attention_states (*optional*): what `cross_attention_states` returned for these frames.
        """
        hidden_states = self.embed(input_ids)
        if cross_attention_states is None:
            cross_attention_states = self.cross_attention_states(encoder_hidden_states)
        masks = {"config": self.config, "inputs_embeds": hidden_states}
        if self.config.is_causal:
            self_mask = create_causal_mask(attention_mask=attention_mask, past_key_values=None, **masks)
        else:
            self_mask = create_bidirectional_mask(attention_mask=attention_mask, **masks)
        cross_mask = create_bidirectional_mask(
            attention_mask=encoder_attention_mask, encoder_hidden_states=encoder_hidden_states, **masks
        )
        for layer, key_value in zip(self.layers, cross_attention_states, strict=True):
            hidden_states = layer(hidden_states, key_value, self_mask, cross_mask, **kwargs)
        return BaseModelOutputWithCrossAttentions(last_hidden_state=self.layer_norm(hidden_states))


class MDMASRModel(MDMASRPreTrainedModel):
    """Encoder and decoder without the output layer."""

    def __init__(self, config: MDMASRConfig):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_config)
        width_in, width_out = encoder_width(config.encoder_config), config.decoder_config.hidden_size
        self.encoder_projection = nn.Linear(width_in, width_out) if width_in != width_out else None
        self.decoder = MDMASRDecoder._from_config(config.decoder_config)
        self.post_init()

    def get_encoder(self, *args, **kwargs) -> nn.Module:
        return self.encoder

    def get_decoder(self, *args, **kwargs) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.decoder.embed_tokens = value

    def encode(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> MDMASREncoderOutput:
        """Runs the encoder. Returns frames (B, T, encoder width) and their mask (B, T)."""
        input_features = input_features.to(self.dtype)
        return run_encoder(
            self.encoder, input_features, attention_mask, self.config.encoder_trailing_silence_s, **kwargs
        )

    def project(self, frames: torch.Tensor) -> torch.Tensor:
        """Brings frames to the decoder's width."""
        return frames if self.encoder_projection is None else self.encoder_projection(frames)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MDMASREncoderOutput | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """See [`MDMASRForConditionalGeneration.forward`]."""
        if decoder_input_ids is None:
            raise ValueError(
                "`decoder_input_ids` (prompt and canvas) are missing. `generate` lays a canvas by itself."
            )
        if encoder_outputs is None:
            if input_features is None:
                raise ValueError("Pass `input_features` or `encoder_outputs`.")
            encoder_outputs = self.encode(input_features, attention_mask, **kwargs)
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = MDMASREncoderOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            self.project(encoder_outputs.last_hidden_state),
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=getattr(encoder_outputs, "attention_mask", None),
            cross_attention_states=getattr(encoder_outputs, "cross_attention_states", None),
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


class MDMASRForConditionalGeneration(MDMASRPreTrainedModel, MDMASRGenerationMixin):
    """MDM-ASR for speech recognition: `generate` transcribes, `forward` with labels trains."""

    _tied_weights_keys = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
    # The loss is a mean over canvas positions, which `num_items_in_batch` (labels that are not -100) does not count:
    # the Trainer has to divide by the gradient accumulation steps itself.
    accepts_loss_kwargs = False
    generation_config_class = MDMASRGenerationConfig
    output_modalities = ("text",)

    def __init__(self, config: MDMASRConfig):
        super().__init__(config)
        self.model = MDMASRModel(config)
        decoder = config.decoder_config
        self.proj_out = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=decoder.output_bias)
        self.post_init()

    def get_encoder(self, *args, **kwargs) -> nn.Module:
        return self.model.encoder

    def get_decoder(self, *args, **kwargs) -> nn.Module:
        return self.model.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out

    def set_output_embeddings(self, value: nn.Module):
        self.proj_out = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        if new_num_tokens in (None, self.config.vocab_size):
            return self.get_input_embeddings()
        raise ValueError(
            f"`new_num_tokens={new_num_tokens}`: the ids from {self.config.vocab_size} on are the mask's and the "
            "prompt's, so the "
            "vocabulary cannot grow or shrink in place. Use the donor's vocabulary, or `from_whisper(..., "
            "vocab_size=N)`."
        )

    def freeze_encoder(self):
        """Excludes the encoder from training."""
        self.model.encoder.requires_grad_(False)

    def encode(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> MDMASREncoderOutput:
        """Runs the encoder. Its output can be passed to `forward` and `generate` as `encoder_outputs`."""
        return self.model.encode(input_features, attention_mask, **kwargs)

    def prepare_cross_attention(self, encoder_outputs: MDMASREncoderOutput) -> MDMASREncoderOutput:
        """Adds the decoder's cross-attention keys and values, so that every later step reuses them."""
        if getattr(encoder_outputs, "cross_attention_states", None) is not None:
            return encoder_outputs
        states = self.model.decoder.cross_attention_states(self.model.project(encoder_outputs.last_hidden_state))
        return MDMASREncoderOutput(**{**encoder_outputs, "cross_attention_states": states})

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

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MDMASREncoderOutput | None = None,
        labels: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
        logits_to_keep: int = 0,
        input_values: torch.Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """
        Args:
            input_features (`torch.Tensor`): what the processor returns: (B, T, mel bins) or waveforms (B, N).
            attention_mask (`torch.Tensor` of shape (B, T) or (B, N), *optional*): 1 for the utterance, 0 for padding.
            decoder_input_ids (`torch.LongTensor` of shape (B, P + L), *optional*):
                Prompt and canvas. With `labels`, a canvas that is masked already (as in ISCT's second step): its last
                L positions belong to the labels. Without `decoder_input_ids`, the labels are laid on a canvas and
                masked here.
            decoder_attention_mask (`torch.Tensor` of shape (B, P + L), *optional*): 0 for positions outside a row's
                canvas.
            encoder_outputs ([`MDMASREncoderOutput`], *optional*): what `encode` returned, instead of `input_features`.
            labels (`torch.LongTensor` of shape (B, L), *optional*):
                Text tokens; -100 from the end of the text on. The rest of the canvas is filled with EOS, a token to
                predict like any other. The prompt is not part of the labels.
            timesteps (`torch.Tensor` of shape (B,), *optional*): t in (0, 1]; drawn uniformly if missing.
            prompt_ids (`torch.LongTensor` of shape (B, P), *optional*): the visible prompt; default: the checkpoint's.
            generator (`torch.Generator`, *optional*):
                Seeds timesteps and masking. In evaluation mode they are seeded by default, so that losses can be
                compared.
            logits_to_keep (`int`): compute logits for the last so many positions only; 0 means all.
            input_values (`torch.Tensor`, *optional*): another name for `input_features`, as waveform encoders call
                them.

        Returns:
            `Seq2SeqLMOutput`: `loss`, the masked diffusion loss, if there are labels; `logits` (B, P + L, V), or (B,
            L, V) of the canvas alone with labels.
        """
        input_features = input_values if input_features is None else input_features
        targets = masked = canvas_mask = None
        if labels is not None and decoder_input_ids is None:
            if timesteps is None or generator is None:
                generator = generator or self._masking_generator()
            targets, canvas_mask = self._lay_canvas(labels, self.audio_duration_s(input_features, attention_mask))
            if timesteps is None:
                timesteps = sample_timesteps(len(targets), device=targets.device, generator=generator)
            noised, masked = mask_tokens(
                targets,
                timesteps,
                mask_token_id=self.config.mask_token_id,
                maskable=canvas_mask,
                generator=generator,
            )
            prompt_ids = self._default_prompt(len(targets)) if prompt_ids is None else prompt_ids
            prompt_ids = prompt_ids.to(targets.device).expand(len(targets), -1)
            decoder_input_ids = torch.cat([prompt_ids, noised], dim=-1)
            decoder_attention_mask = torch.cat([torch.ones_like(prompt_ids, dtype=torch.bool), canvas_mask], dim=-1)
        elif labels is not None:
            targets = labels.masked_fill(labels == -100, self.config.eos_token_id)
            if decoder_input_ids.shape[-1] < targets.shape[-1]:
                raise ValueError(
                    f"`decoder_input_ids` ({decoder_input_ids.shape[-1]} tokens) must hold the prompt and a canvas "
                    "as long as "
                    f"`labels` ({targets.shape[-1]} tokens)."
                )
            masked = decoder_input_ids[:, -targets.shape[-1] :] == self.config.mask_token_id
            if decoder_attention_mask is not None:
                canvas_mask = decoder_attention_mask[:, -targets.shape[-1] :].bool()
                masked = masked & canvas_mask
            if timesteps is None:
                timesteps = torch.ones(len(targets), device=targets.device)
        if targets is not None:
            logits_to_keep = targets.shape[-1]

        outputs = self.model(
            input_features=input_features,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            **kwargs,
        )
        logits = self.proj_out(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if targets is not None:
            weights = linear_weight(timesteps.to(logits.device))
            loss = masked_diffusion_loss(logits, targets, masked, weights, canvas_mask)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def _masking_generator(self) -> torch.Generator | None:
        """None (the global random state) in training, a fixed seed in evaluation."""
        return None if self.training else torch.Generator().manual_seed(0)

    def _default_prompt(self, batch_size: int) -> torch.LongTensor:
        template = self.generation_config.prompt_template or {"tokens": [self.config.decoder_start_token_id]}
        return build_prompt_ids(template, batch_size)

    def _lay_canvas(
        self, labels: torch.LongTensor, duration_s: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """
        Lays labels (B, L') on canvases as long as `generate` would make them, filled up with EOS. Returns targets (B,
        L) and the mask (B, L) of the positions that belong to a row's canvas.
        """
        is_text = labels != -100
        if not torch.compiler.is_compiling() and bool((is_text[:, 1:] & ~is_text[:, :-1]).any()):
            raise ValueError(
                "`labels` have -100 before a token. Use -100 only behind the text: it is where the canvas fills with "
                "EOS."
            )
        text_lengths = is_text.sum(dim=-1)
        if duration_s is None and self.generation_config.canvas_length is None:
            lengths = torch.full_like(text_lengths, labels.shape[-1])
        else:
            prompt_length = self._default_prompt(1).shape[-1]
            planned = self.canvas_lengths(duration_s, len(labels), prompt_length, self.generation_config)
            # A text denser than planned still gets all its tokens and an EOS behind them.
            capacity = self.config.decoder_config.max_position_embeddings - prompt_length
            lengths = torch.tensor(planned, device=labels.device).maximum((text_lengths + 1).clamp(max=capacity))
            lengths = lengths.maximum(text_lengths)
        length = int(lengths.max())
        targets = nn.functional.pad(labels, (0, max(length - labels.shape[-1], 0)), value=-100)[:, :length]
        canvas_mask = torch.arange(length, device=labels.device) < lengths[:, None]
        return targets.masked_fill(targets == -100, self.config.eos_token_id), canvas_mask

    @classmethod
    def from_whisper(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MDMASRForConditionalGeneration":
        """Makes a ready-to-train diffusion model of a Whisper checkpoint, see `convert_whisper.from_whisper`."""
        # The converters do not travel with saved checkpoints: a plain relative import would make them, and what they
        # need, do so.
        try:
            from mdm_asr_hf.convert_whisper import from_whisper
        except ImportError as error:
            raise ImportError("`from_whisper` needs the package: `pip install mdm_asr_hf`.") from error
        return from_whisper(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_canary(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MDMASRForConditionalGeneration":
        """Makes a ready-to-train diffusion model of a Canary checkpoint or .nemo file, see
        `convert_canary.from_canary`."""
        try:
            from mdm_asr_hf.convert_canary import from_canary
        except ImportError as error:
            raise ImportError("`from_canary` needs the package: `pip install mdm_asr_hf`.") from error
        return from_canary(cls, pretrained_model_name_or_path, **kwargs)


__all__ = [
    "MDMASRDecoder",
    "MDMASRForConditionalGeneration",
    "MDMASRModel",
    "MDMASRPreTrainedModel",
]
