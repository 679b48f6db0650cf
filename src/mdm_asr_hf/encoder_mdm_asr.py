# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Speech encoders: any encoder of transformers behind one call that returns frames and their mask."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.output_capturing import capture_outputs

# Whisper's log-mel is max(log10 mel, max - 8) / 4 + 1 with a floor of log10 1e-10 (arXiv 2212.04356, its released
# code): silence lies 8 / 4 under the loudest value, but not below (-10 + 4) / 4.
WHISPER_DYNAMIC_RANGE = 2.0
WHISPER_FLOOR = -1.5
WHISPER_FRAMES_PER_S = 100.0


@dataclass
class MDMASREncoderOutput(ModelOutput):
    """
    Output of the speech encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape (B, T, encoder width)): the acoustic frames.
        attention_mask (`torch.Tensor` of shape (B, T), *optional*): 1 for frames of the utterance, 0 for padding.
        hidden_states, attentions (*optional*): per layer, on request.
        cross_attention_states (*optional*):
            The decoder's cross-attention keys and values for these frames, one pair (B, heads, T, head_dim) per layer,
            once `prepare_cross_attention` has computed them.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attention_states: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None


def take_rows(outputs: MDMASREncoderOutput, rows: torch.LongTensor) -> MDMASREncoderOutput:
    """Frames, mask and cross-attention states of some rows, by their indices, which may repeat."""
    mask, states = outputs.attention_mask, outputs.cross_attention_states
    return MDMASREncoderOutput(
        # Whole rows at once, unlike an index in brackets.
        last_hidden_state=outputs.last_hidden_state.index_select(0, rows),
        attention_mask=None if mask is None else mask.index_select(0, rows),
        cross_attention_states=states
        and tuple((key.index_select(0, rows), value.index_select(0, rows)) for key, value in states),
    )


class OwnLengthWhisperEncoder(WhisperEncoder):
    """
    Whisper's encoder, weight for weight, on the audio's own length plus a trailing silence instead of always 30
    seconds.

    Rows of a batch keep their own length: what lies behind a row is masked in the attention and zeroed before each
    convolution, so that a row's frames do not depend on the batch it is in.

    With `silence_frames` S in the configuration, the frames of a silence that is no longer than that are learnt: what
    `silence_embeddings` (S, D) hold is added to them. A few such frames stand for the long silence that Whisper wants,
    and no weight of its own changes. Behind a longer silence it is Whisper's, exactly.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        num_learnt = getattr(config, "silence_frames", 0)
        self.silence_embeddings = nn.Parameter(torch.zeros(num_learnt, config.d_model)) if num_learnt else None

    @classmethod
    def is_custom_code(cls) -> bool:
        """See [`MDMASRPreTrainedModel`]: Whisper's initialisation writes the positions from outside their module."""
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Whisper's constructor calls this, too, before there are any.
        if isinstance(module, OwnLengthWhisperEncoder) and getattr(module, "silence_embeddings", None) is not None:
            init.zeros_(module.silence_embeddings)

    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        trailing_silence_s: float = 0.0,
        min_duration_s: float = 0.0,
        **kwargs,
    ) -> MDMASREncoderOutput:
        """
        Args:
            input_features (`torch.Tensor` of shape (B, T, mel bins)): Whisper's log-mel at 100 frames per second.
            attention_mask (`torch.Tensor` of shape (B, T), *optional*): 1 for frames of the utterance.
            trailing_silence_s (`float`), min_duration_s (`float`): seconds of silence after each row, at least, and of
                the row with it; both as far as the encoder's positions reach.

        Raises:
            ValueError: features of another layout, or a row has more frames than the encoder has positions for.
        """
        if input_features.dim() != 3 or input_features.shape[-1] != self.num_mel_bins:
            raise ValueError(
                f"`input_features` of shape {tuple(input_features.shape)} must be (B, T, {self.num_mel_bins}), as "
                "this model's own "
                "feature extractor returns them. Transpose what the stock Whisper one returns."
            )
        features, num_speech, num_frames = self._with_trailing_silence(
            input_features.transpose(1, 2), attention_mask, trailing_silence_s, min_duration_s
        )
        hidden_states = nn.functional.gelu(self.conv1(features))
        inside = torch.arange(hidden_states.shape[-1], device=features.device) < num_frames[:, None]
        hidden_states = nn.functional.gelu(self.conv2(hidden_states * inside[:, None]))
        hidden_states = hidden_states.permute(0, 2, 1)
        num_positions = hidden_states.shape[1]
        hidden_states = hidden_states + self.embed_positions.weight[:num_positions]
        if self.silence_embeddings is not None:
            hidden_states = hidden_states + self._learnt_silence(num_positions, num_speech // 2, num_frames // 2)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        frame_mask = torch.arange(num_positions, device=features.device) < (num_frames // 2)[:, None]
        # Without a mask all rows are of one length, and nothing lies behind them.
        attention_bias = None if attention_mask is None else key_mask(self, hidden_states, frame_mask)
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, attention_bias, **kwargs)
        return MDMASREncoderOutput(last_hidden_state=self.layer_norm(hidden_states), attention_mask=frame_mask)

    def _learnt_silence(
        self, num_positions: int, num_speech: torch.LongTensor, num_frames: torch.LongTensor
    ) -> torch.Tensor:
        """What is added to frames (B, T, D) of which `num_speech` (B,) are audio and `num_frames` count."""
        embeddings = self.silence_embeddings
        places = torch.arange(num_positions, device=embeddings.device) - num_speech[:, None]
        is_learnt = (places >= 0) & ((num_frames - num_speech) <= len(embeddings))[:, None]
        learnt = embeddings[places.clamp(min=0, max=len(embeddings) - 1)]
        return learnt * is_learnt[..., None].to(learnt.dtype)

    def _with_trailing_silence(
        self,
        features: torch.Tensor,
        attention_mask: torch.Tensor | None,
        trailing_silence_s: float,
        min_duration_s: float,
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor]:
        """
        Lays silence behind every row of features (B, mel bins, T), and zeros behind that. Returns features (B, mel
        bins, T'), and of each row (B,) the frames of audio, and with the silence.
        """
        batch_size, _, width = features.shape
        capacity = 2 * self.max_source_positions
        if attention_mask is None:
            num_speech = torch.full((batch_size,), width, device=features.device)
        else:
            num_speech = attention_mask.to(features.device).long().sum(dim=-1)
        longest = width
        if attention_mask is not None and width > capacity:
            # Only then: reading a number off the device waits for all it has to do.
            longest = int(num_speech.max())
        if longest > capacity:
            raise ValueError(
                f"`input_features` hold {longest / WHISPER_FRAMES_PER_S:.1f} s of audio, but this encoder takes at "
                "most "
                f"{capacity / WHISPER_FRAMES_PER_S:.1f} s. Split the audio into shorter pieces."
            )
        num_silence = round(trailing_silence_s * WHISPER_FRAMES_PER_S)
        # Even numbers, since the second convolution halves them.
        least = min(max(round(min_duration_s * WHISPER_FRAMES_PER_S) // 2 * 2, 2), capacity)
        num_frames = ((num_speech + num_silence + 1) // 2 * 2).clamp(min=least, max=capacity)
        # `sym_max` and `sym_min` also stand in a graph that is exported for any width.
        target = torch.sym_min(torch.sym_max((longest + num_silence + 1) // 2 * 2, least), capacity)
        features = nn.functional.pad(features[..., :target], (0, torch.sym_max(target - width, 0)))

        positions = torch.arange(target, device=features.device)
        speech = (positions < num_speech[:, None])[:, None]
        loudest = features.masked_fill(~speech, -torch.inf).amax(dim=(1, 2), keepdim=True)
        silence = (loudest - WHISPER_DYNAMIC_RANGE).clamp(min=WHISPER_FLOOR)
        features = torch.where(speech, features, silence)
        return features * (positions < num_frames[:, None])[:, None], num_speech, num_frames


def key_mask(
    module: nn.Module, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> torch.Tensor | None:
    """
    `create_bidirectional_mask` for the keys that a mask (B, T) leaves. It looks whether the mask hides anything at
    all, for which a GPU has to finish its work; training with SDPA does without the look, and a graph that is exported
    without a mask for every pair of positions, which it would lay out anew for every batch.
    """
    is_lean = module.training or torch.compiler.is_exporting()
    is_plain = attention_mask is not None and attention_mask.dim() == 2
    if is_lean and is_plain and module.config._attn_implementation == "sdpa":
        return attention_mask.bool()[:, None, None, :]
    return create_bidirectional_mask(
        config=module.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
    )


def build_encoder(config: PreTrainedConfig) -> nn.Module:
    """Builds the encoder a configuration describes; of an encoder-decoder, its encoder."""
    if config.model_type == "whisper":
        return OwnLengthWhisperEncoder._from_config(config)
    model = AutoModel.from_config(config)
    return model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model


def encoder_width(config: PreTrainedConfig) -> int:
    """Width of the frames an encoder returns."""
    width = getattr(config, "output_hidden_size", None) or getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(f"`encoder_config` of type {config.model_type!r} names no `hidden_size`.")
    return width


def run_encoder(
    encoder: nn.Module,
    input_features: torch.Tensor,
    attention_mask: torch.Tensor | None,
    trailing_silence_s: float,
    min_duration_s: float = 0.0,
    **kwargs,
) -> MDMASREncoderOutput:
    """
    Runs any encoder and finds the mask of its frames.

    Args:
        input_features (`torch.Tensor`): log-mel (B, T, mel bins) or waveforms (B, N).
        attention_mask (`torch.Tensor` of shape (B, T) or (B, N), *optional*).
        trailing_silence_s (`float`), min_duration_s (`float`): for Whisper encoders only.

    Raises:
        ValueError: an attention mask was given and the encoder does not tell which of its frames it covers.
    """
    if isinstance(encoder, OwnLengthWhisperEncoder):
        silence = {"trailing_silence_s": trailing_silence_s, "min_duration_s": min_duration_s}
        return encoder(input_features, attention_mask, **silence, **kwargs)
    if attention_mask is not None:
        # What lies in the padding must not matter; the convolutions of these encoders look at it, and expect zeros.
        outside = ~attention_mask.bool().to(input_features.device)
        input_features = input_features.masked_fill(outside[..., None] if input_features.dim() == 3 else outside, 0.0)
    outputs = encoder(input_features, attention_mask=attention_mask, **kwargs)
    frames = outputs.last_hidden_state
    frame_mask = None if attention_mask is None else _frame_mask(encoder, outputs, frames.shape[1], attention_mask)
    return MDMASREncoderOutput(
        last_hidden_state=frames,
        attention_mask=frame_mask,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


def _frame_mask(
    encoder: nn.Module, outputs: ModelOutput, num_frames: int, attention_mask: torch.Tensor
) -> torch.Tensor:
    if outputs.get("attention_mask") is not None:
        return outputs["attention_mask"]
    if hasattr(encoder, "_get_feature_vector_attention_mask"):
        return encoder._get_feature_vector_attention_mask(num_frames, attention_mask)
    if num_frames == attention_mask.shape[-1]:
        return attention_mask
    raise ValueError(
        f"The encoder {type(encoder).__name__} shortens its input but returns no `attention_mask` for its frames. "
        "Use an encoder "
        "that does, or call without `attention_mask`, one utterance at a time."
    )
