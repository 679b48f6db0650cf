# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The decoder: on a canvas it sees prompt and canvas at once (arXiv 2602.18952); with drafts its layers are the donor's,
causal, and rows of masks behind them say several tokens at once, which the causal rows then verify.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .encoder_mdm_asr import key_mask

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


# Ids of the short list that stay in question at a place of a block, by what the masks say without knowing each other:
# of 1,000 drafts that the sequential head would make, 997 are among them.
NUM_CANDIDATES = 64


@dataclass
class MDMASRDecoderOutput(BaseModelOutputWithCrossAttentions):
    """
    Output of [`MDMASRDecoder`].

    Args:
        draft_hidden_states (`torch.FloatTensor` of shape (B, F, K, D), *optional*): of the block behind each frontier,
            normalised; the sequential head drafts from them.
    """

    draft_hidden_states: torch.FloatTensor | None = None


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

    def forward(self, position_ids: torch.LongTensor) -> torch.Tensor:
        return self.table[position_ids]


class MDMASRAttention(nn.Module):
    """Multi-head attention over the text itself, or over the acoustic frames. Without `has_keys`, keys and values are
    another module's."""

    def __init__(self, config: MDMASRDecoderConfig, is_causal: bool = False, has_keys: bool = True):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = is_causal
        width, query_width = config.hidden_size, config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=config.attention_bias)
        if has_keys:
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
        implementation = self.config._attn_implementation
        if attention_mask is not None and attention_mask.dim() == 4 and "flash" in implementation:
            # Its kernels take no mask of pairs, which rows with branches of drafts need.
            implementation = "sdpa"
        # Those of frames, and of a cache, may have been computed under another autocast, or none.
        key, value = (states.to(query.dtype) for states in key_value)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class MDMASRDecoderLayer(GradientCheckpointingLayer):
    """Pre-LayerNorm block: self-attention over the text, cross-attention to all frames, feed-forward."""

    def __init__(self, config: MDMASRDecoderConfig, index: int = 0, has_cross_keys: bool = True):
        super().__init__()
        self.index = index
        self.self_attn = MDMASRAttention(config, is_causal=config.is_causal)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = MDMASRAttention(config, has_keys=has_cross_keys)
        self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def cross_key_value(self, frames: torch.Tensor) -> KeyValue:
        """Keys and values of frames (B, T, D). A method of the layer, since FSDP gathers weights layer by layer."""
        return self.cross_attn.project_key_value(frames)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_key: torch.Tensor,
        cross_value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: DraftingCache | None = None,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States (B, L, D), and the keys and values that were looked at. Those before the rows' own ones are a
        cache's, or of `past_key` and `past_value` (B, key-value heads, S, head_dim); tensors, and not in tuples, since
        gradients reach no others through a reentrant checkpoint."""
        normed = self.self_attn_layer_norm(hidden_states)
        key, value = self.self_attn.project_key_value(normed)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        elif past_key is not None:
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        attended, _ = self.self_attn(normed, (key, value), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        attended, _ = self.cross_attn(
            self.cross_attn_layer_norm(hidden_states), (cross_key, cross_value), encoder_attention_mask, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.activation_dropout(self.activation(self.fc1(self.mlp_layer_norm(hidden_states))))
        return hidden_states + self.dropout(self.fc2(inner)), key, value


class MDMASRDraftLayer(MDMASRDecoderLayer):
    """A layer of the mask rows, at the donor's layer `index`, whose keys and values of the frames it shares."""

    def __init__(self, config: MDMASRDecoderConfig, index: int):
        super().__init__(config, index, has_cross_keys=False)


class MDMASRSequentialHead(nn.Module):
    """
    Lets the draft of a place know the two tokens before it (as the sampler head of arXiv 2507.11851):
    z_k = h_k + s W2 gelu(W1 [h_k / s ; e(y_k-1) r ; e(y_k-2) r]), e being the donor's embeddings. It predicts among N
    ids, a short list.
    """

    def __init__(self, config: MDMASRDecoderConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.mix = nn.Linear(3 * width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        self.token_ids = nn.Buffer(torch.arange(config.draft_vocab_size))

    def forward(self, states: torch.Tensor, before: torch.Tensor, before_that: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape (..., D)): of the masks, normalised.
            before, before_that (`torch.Tensor` of shape (..., D)): embeddings of the tokens one and two places before
                the one to draft.
        """
        scale, embedding_scale = self.config.draft_state_scale, self.config.draft_embedding_scale
        seen = torch.cat([states / scale, before * embedding_scale, before_that * embedding_scale], dim=-1)
        return states + scale * self.out(nn.functional.gelu(self.mix(seen)))


class MDMASRDrafts(nn.Module):
    """
    What drafts: layers beside the donor's last `draft_layers` ones. A block of K rows stands behind a frontier, the
    last position that causal rows were computed of: first the token that the donor said there, then masks. The row at
    frontier + 1 + k predicts the token at frontier + 2 + k. It sees the donor's keys and values up to the frontier,
    and its own block: the token itself, masks the whole of it, in both directions.
    """

    def __init__(self, config: MDMASRDecoderConfig):
        super().__init__()
        first = config.num_hidden_layers - config.draft_layers
        self.layers = nn.ModuleList([MDMASRDraftLayer(config, first + i) for i in range(config.draft_layers)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.offset_embeddings = nn.Embedding(config.draft_length, config.hidden_size)
        self.head = MDMASRSequentialHead(config)

    def draft(
        self,
        states: torch.Tensor,
        known: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        embeddings: torch.Tensor,
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        Drafts of blocks, one after the other: the sequential head chooses among what the output layer, without knowing
        the drafts before, finds most probable at each place.

        Args:
            states (`torch.Tensor` of shape (R, K, D)): of the blocks, normalised.
            known (`torch.Tensor` of shape (R, 2, D)): embeddings of the token before the masks, and of the one before
                that.
            weight (`torch.Tensor` of shape (N, D)), bias (`torch.Tensor` of shape (N,), *optional*): of the output
                layer, for the N ids of the short list.
            embeddings (`torch.Tensor` of shape (N, D)): theirs.

        Returns:
            Ids (R, K), and the log-probabilities (R, K, C) of the candidates that they were chosen from.
        """
        logits = nn.functional.linear(states, weight.to(states.dtype), bias)
        candidates = logits.topk(min(NUM_CANDIDATES, len(weight)), dim=-1).indices
        before, before_that = known.to(states.dtype).split(1, dim=1)
        outputs = nn.functional.embedding(candidates, weight).to(states.dtype)
        biases = None if bias is None else bias[candidates]
        places, scores = [], []
        for k in range(states.shape[1]):
            logits = (self.head(states[:, k : k + 1], before, before_that) @ outputs[:, k].transpose(1, 2))[:, 0]
            if biases is not None:
                logits = logits + biases[:, k]
            places.append(candidates[:, k].gather(1, logits.argmax(dim=-1, keepdim=True)))
            scores.append(logits)
            before_that, before = before, nn.functional.embedding(places[-1], embeddings).to(states.dtype)
        return self.head.token_ids[torch.cat(places, dim=1)], torch.stack(scores, dim=1).float().log_softmax(dim=-1)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropies (...), in nats, of log-probabilities (..., C)."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


class MDMASRPreTrainedModel(PreTrainedModel):
    """What all models here share: how they load, start, and change their vocabulary."""

    config: MDMASRConfig
    config_class = MDMASRConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MDMASRDecoderLayer", "MDMASRDraftLayer", "WhisperEncoderLayer", "ParakeetEncoderBlock"]
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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As in transformers, of the V ids that can be predicted. The E input-only ids behind them, the mask's and the
        prompt's, move along, in the configurations; give a processor the `prompt_template` of `generation_config`.

        Raises:
            ValueError: there would be no room for the end of text, or another id that the settings name; or the output
                layer was quantised.
        """
        output = self.get_output_embeddings()
        if output is not None and not hasattr(output, "weight"):
            raise ValueError(
                "The vocabulary of a model in int8 cannot be resized. Resize the model in fp32, and quantise that."
            )
        before, ids = self.get_input_embeddings().num_embeddings, []
        self._map_ids(lambda token_id: ids.append(token_id) or token_id)
        lowest = max((token_id for token_id in ids if token_id < before), default=0)
        if new_num_tokens is not None and new_num_tokens <= lowest:
            raise ValueError(
                f"`new_num_tokens={new_num_tokens}` leaves no room for the id {lowest}, which the settings name. Pass "
                f"{lowest + 1} at least."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if (after := embeddings.num_embeddings) != before:
            self._map_ids(lambda token_id: token_id + (after - before if token_id >= before else 0))
            self._resize_short_list(before, after)
        return embeddings

    def _map_ids(self, change: Callable[[int], int]) -> None:
        """Puts what `change` makes of them in the place of all token ids in the configurations."""

    def _resize_short_list(self, before: int, after: int) -> None:
        """Leaves the ids that are gone out of those that can be drafted; and where all could, lets all."""
        decoder = self.get_decoder()
        if decoder.drafts is not None:
            head = decoder.drafts.head
            ids = head.token_ids[head.token_ids < after]
            if len(head.token_ids) == before:
                ids = torch.arange(after, device=ids.device)
            head.token_ids, decoder.config.draft_vocab_size = nn.Buffer(ids), len(ids)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether initialisation may write over what was loaded, as that of code outside transformers does."""
        # By `transformers.initialization` it does not. Else modules are left out that have weights in others alone, as
        # some of wav2vec 2.0 do.
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MDMASRSinusoidalPositions):
            init.copy_(module.table, module.compute_table())
        if isinstance(module, MDMASRSequentialHead):
            init.copy_(module.token_ids, torch.arange(len(module.token_ids)))


class MDMASRDecoder(MDMASRPreTrainedModel):
    """
    A Transformer decoder. On a canvas it has no causal mask and sees the prompt and the whole canvas at once. With
    `draft_layers` it is the donor's, and one call computes causal rows and blocks of masks together, layer by layer.

    Ids below `vocab_size` (V) are embedded by `embed_tokens`, to which the output is tied; the E ids from V on, the
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
        # Attention kernels return no weights: timestamps compute those of a few heads from these and the keys.
        "cross_queries": OutputRecorder(nn.Linear, layer_name="cross_attn.q_proj"),
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
        self.layers = nn.ModuleList([MDMASRDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.drafts = MDMASRDrafts(config) if config.draft_layers else None
        self.gradient_checkpointing = False
        self.post_init()

    def cross_attention_states(self, encoder_hidden_states: torch.Tensor) -> tuple[KeyValue, ...]:
        """Keys and values of every layer's cross-attention for frames (B, T, D): computed once per utterance."""
        return tuple(layer.cross_key_value(encoder_hidden_states) for layer in self.layers)

    def embed_ids(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Token embeddings (B, L, D) of ids (B, L), without positions."""
        num_predicted = self.config.vocab_size
        known = self.embed_tokens(input_ids.clamp(max=num_predicted - 1))
        input_only = self.input_only_embeddings((input_ids - num_predicted).clamp(min=0))
        return torch.where((input_ids < num_predicted)[..., None], known, input_only)

    def embed(self, token_embeds: torch.Tensor, position_ids: torch.LongTensor | None = None) -> torch.Tensor:
        """What the first layer sees: token embeddings (B, L, D) with positions added, 0 to L - 1 or those given
        (B, L)."""
        if position_ids is None:
            length = token_embeds.shape[1]
            if length > self.config.max_position_embeddings:
                raise ValueError(
                    f"`decoder_input_ids` have {length} tokens, but the decoder has "
                    f"{self.config.max_position_embeddings} positions. Use a shorter canvas."
                )
            position_ids = torch.arange(length, device=token_embeds.device)
        embeds = token_embeds + self.embed_positions(position_ids).to(token_embeds.dtype)
        if self.embedding_layernorm is not None:
            embeds = self.embedding_layernorm(embeds)
        return self.dropout(embeds)

    def embed_blocks(self, token_embeds: torch.Tensor, frontiers: torch.LongTensor) -> torch.Tensor:
        """What the first draft layer sees (B, F K, D) of blocks of token embeddings (B, F, K, D) behind frontiers (B,
        F)."""
        places = torch.arange(token_embeds.shape[2], device=frontiers.device)
        positions = (frontiers[..., None] + 1 + places).clamp(max=self.config.max_position_embeddings - 1)
        embeds = token_embeds + self.drafts.offset_embeddings.weight[: token_embeds.shape[2]]
        return self.embed(embeds.flatten(1, 2), positions.flatten(1))

    def _self_attention_mask(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.config.is_causal:
            # There is no cache, whose name differs between releases.
            return create_causal_mask(self.config, hidden_states, attention_mask, None)
        return key_mask(self, hidden_states, attention_mask)

    def _pair_mask(self, visible: torch.BoolTensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """A mask of pairs (B, Q, K) as the attention takes it."""
        if visible is None:
            return None
        if self.config._attn_implementation != "eager":
            return visible[:, None]
        blank = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return blank.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def _block_mask(self, visible: torch.BoolTensor, length: int) -> torch.BoolTensor:
        """What the rows of F blocks of K see (B, F K, S + F K): the slots (B, F, S) that their frontier does, and
        their own block; but the token before the masks does not see these, as in the donor."""
        place = torch.arange(visible.shape[1] * length, device=visible.device)
        same = (place // length)[:, None] == place // length
        own = same & ((place % length == 0) | (place % length > 0)[:, None])
        own = own.expand(visible.shape[0], -1, -1)
        # By index: in ONNX a repetition could not be of no slots.
        return torch.cat([visible[:, place // length], own], dim=-1)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_states: tuple[KeyValue, ...] | None = None,
        token_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DraftingCache | None = None,
        frontiers: torch.LongTensor | None = None,
        frontier_mask: torch.BoolTensor | None = None,
        block_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MDMASRDecoderOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape (B, L)): prompt and canvas; with drafts, causal rows. L may be 0
                where only masks are to be computed.
            encoder_hidden_states (`torch.Tensor` of shape (B, T, D)): acoustic frames, already of the decoder's width.
            attention_mask (`torch.Tensor` of shape (B, L), *optional*): 0 for positions outside a row's canvas. With
                `past_key_values`, (B, L, S): which slots each causal row sees, or None for all.
            encoder_attention_mask (`torch.Tensor` of shape (B, T), *optional*): 0 for padded frames.
            cross_attention_states (*optional*): what `cross_attention_states` returned for these frames.
            token_embeds (`torch.Tensor` of shape (B, L, D), *optional*): instead of the embeddings of `input_ids`.
            position_ids (`torch.LongTensor` of shape (B, L), *optional*): where `input_ids` stand, default 0 to L - 1.
            past_key_values ([`DraftingCache`], *optional*): the causal rows' keys and values are written to its slots.
            frontiers (`torch.LongTensor` of shape (B, F), *optional*): positions behind which blocks of drafts stand.
            frontier_mask (`torch.BoolTensor` of shape (B, F, S), *optional*): the slots that each frontier sees.
                Default, without a cache: those up to it.
            block_ids (`torch.LongTensor` of shape (B, F, K), *optional*): of each block the token behind its
                frontier, then masks, or tokens drafted before at their places. K is at most `draft_length`.
        """
        hidden_states = self.embed(self.embed_ids(input_ids) if token_embeds is None else token_embeds, position_ids)
        if cross_attention_states is None:
            cross_attention_states = self.cross_attention_states(encoder_hidden_states)
        if past_key_values is None:
            self_mask = self._self_attention_mask(hidden_states, attention_mask)
        else:
            self_mask = self._pair_mask(attention_mask, hidden_states.dtype)
        # One for all rows: causal ones and masks are of different numbers.
        one = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[-1]))
        cross_mask = key_mask(self, one, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states)
        masks = None
        if frontiers is not None:
            block_embeds = self.embed_ids(block_ids.flatten(1)).unflatten(1, block_ids.shape[1:])
            masks = self.embed_blocks(block_embeds, frontiers)
            if frontier_mask is None:
                frontier_mask = torch.arange(input_ids.shape[1], device=frontiers.device) <= frontiers[..., None]
            mask_mask = self._pair_mask(self._block_mask(frontier_mask, block_ids.shape[-1]), masks.dtype)
            first = self.config.num_hidden_layers - self.config.draft_layers
        for index, (layer, cross) in enumerate(zip(self.layers, cross_attention_states, strict=True)):
            if input_ids.shape[1]:
                hidden_states, *past = layer(hidden_states, *cross, self_mask, cross_mask, past_key_values, **kwargs)
            else:
                past = past_key_values.layer(index)
            if masks is not None and index >= first:
                layer = self.drafts.layers[index - first]
                masks, *_ = layer(masks, *cross, mask_mask, cross_mask, None, *past, **kwargs)
        if masks is not None:
            masks = self.drafts.layer_norm(masks).unflatten(1, block_ids.shape[1:])
        return MDMASRDecoderOutput(last_hidden_state=self.layer_norm(hidden_states), draft_hidden_states=masks)
