# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
MDM-ASR (arXiv 2602.18952): a speech encoder, and a decoder that says several tokens at once by masked diffusion: on a
canvas, or as drafts which the donor's own causal decoder verifies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from .configuration_mdm_asr import MDMASRConfig, converter
from .decoder_mdm_asr import MDMASRDecoder, MDMASRPreTrainedModel
from .diffusion_mdm_asr import (
    NUM_FRONTIERS,
    DiffusionObjective,
    DraftObjective,
    TeacherOutput,
    block_targets,
    diffusion_objective,
    draft_loss,
    draw_frontiers,
    frame_loss,
    lay_blocks,
    lay_hints,
    logit_loss,
    loss_weight,
    masked_diffusion_loss,
    put_start,
)
from .encoder_mdm_asr import MDMASREncoderOutput, build_encoder, encoder_width, run_encoder
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .torch_generation_mdm_asr import MDMASRGenerationMixin

# The stock ASR pipeline tells sequence models from CTC models by the class name in this table. The line stands in this
# file, so that it also runs when the file is loaded as remote code.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.setdefault("mdm_asr", "MDMASRForConditionalGeneration")


# The output layer's weights (N, D) and bias (N,) of the short list, and its embeddings (N, D).
ShortListOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


@dataclass
class MDMASRModelOutput(Seq2SeqModelOutput):
    """Output of [`MDMASRModel`]: [`Seq2SeqModelOutput`], and the `draft_hidden_states` of [`MDMASRDecoderOutput`]."""

    draft_hidden_states: torch.FloatTensor | None = None


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

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.decoder.embed_tokens = value

    def _map_ids(self, change: Callable[[int], int]) -> None:
        self.config.map_ids(change)

    def encode(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        trailing_silence_s: float | None = None,
        **kwargs,
    ) -> MDMASREncoderOutput:
        """Runs the encoder, with so much silence behind the audio, by default the configuration's. Returns frames (B,
        T, encoder width) and their mask (B, T)."""
        self._check_autocast()
        config = self.config
        return run_encoder(
            self.encoder,
            input_features.to(self.dtype),
            attention_mask,
            config.encoder_trailing_silence_s if trailing_silence_s is None else trailing_silence_s,
            config.encoder_min_duration_s,
            **kwargs,
        )

    def project(self, frames: torch.Tensor) -> torch.Tensor:
        """Brings frames to the decoder's width."""
        # They may come from an encoder under autocast, to a decoder without.
        frames = frames.to(self.dtype)
        return frames if self.encoder_projection is None else self.encoder_projection(frames)

    def _check_autocast(self) -> None:
        """Raises ValueError where PyTorch cannot mix the weights' type and autocast's: two halves, on a CPU."""
        if self.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return
        wanted = torch.get_autocast_dtype("cpu")
        if self.dtype != wanted and {self.dtype, wanted} == {torch.float16, torch.bfloat16}:
            raise ValueError(
                f"`torch.autocast` to {wanted} cannot run weights of {self.dtype} on a CPU. Leave it out, or load the "
                "model with `dtype=torch.float32`."
            )

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MDMASREncoderOutput | None = None,
        **kwargs,
    ) -> "MDMASRModelOutput":
        """See [`MDMASRForConditionalGeneration.forward`]."""
        if decoder_input_ids is None:
            raise ValueError(
                "`decoder_input_ids` (prompt and canvas) are missing. `generate` lays a canvas by itself."
            )
        if encoder_outputs is None:
            if input_features is None:
                raise ValueError("Pass `input_features` or `encoder_outputs`.")
            encoder_outputs = self.encode(input_features, attention_mask, **kwargs)
        else:
            self._check_autocast()
            if isinstance(encoder_outputs, (tuple, list)):
                encoder_outputs = MDMASREncoderOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            self.project(encoder_outputs.last_hidden_state),
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=getattr(encoder_outputs, "attention_mask", None),
            cross_attention_states=getattr(encoder_outputs, "cross_attention_states", None),
            **kwargs,
        )
        return MDMASRModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            draft_hidden_states=decoder_outputs.draft_hidden_states,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


@dataclass
class MDMASROutput(Seq2SeqLMOutput):
    """
    Output of [`MDMASRForConditionalGeneration`]: [`Seq2SeqLMOutput`], and in training, for S self-correction steps:

    Args:
        draft_hidden_states (`torch.FloatTensor` of shape (B, F, K, D), *optional*): of blocks behind F frontiers.
        step_losses (`torch.Tensor` of shape (S,)): each step's loss, without gradient; with drafts the donor's and the
            drafts'.
        step_accuracies (`torch.Tensor` of shape (S,)): the share of masked positions predicted right; with drafts, of
            the donor's tokens and of the drafts.
        canvases (`tuple` of S `torch.LongTensor` of shape (B, L)): the canvases the decoder saw.
    """

    draft_hidden_states: torch.FloatTensor | None = None
    step_losses: torch.FloatTensor | None = None
    step_accuracies: torch.FloatTensor | None = None
    canvases: tuple[torch.LongTensor, ...] | None = None


class MDMASRForConditionalGeneration(MDMASRPreTrainedModel, MDMASRGenerationMixin):
    """MDM-ASR for speech recognition: `generate` transcribes, `forward` with labels trains."""

    _tied_weights_keys = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
    # Of folders saved when there was a CTC head.
    _keys_to_ignore_on_load_unexpected = [r"^ctc_head\."]
    # The loss is a mean over canvas positions, which `num_items_in_batch` (labels that are not -100) does not count:
    # the Trainer has to divide by the gradient accumulation steps itself.
    accepts_loss_kwargs = False
    generation_config_class = MDMASRGenerationConfig
    output_modalities = ("text",)

    def __init__(self, config: MDMASRConfig):
        super().__init__(config)
        self._short_list: tuple[tuple, torch.Tensor, torch.Tensor | None] | None = None
        self.model = MDMASRModel(config)
        decoder = config.decoder_config
        self.proj_out = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=decoder.output_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out

    def set_output_embeddings(self, value: nn.Module):
        self.proj_out = value

    def _map_ids(self, change: Callable[[int], int]) -> None:
        self.model._map_ids(change)
        self.generation_config.map_ids(change)

    def _resize_short_list(self, before: int, after: int) -> None:
        super()._resize_short_list(before, after)
        self._short_list = None
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if (ids := getattr(self.generation_config, name)) is not None:
                setattr(self.generation_config, name, [token_id for token_id in ids if token_id < after])

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.has_drafts:
            check_short_list(model.get_decoder().drafts.head.token_ids, model.config)
        return loaded

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

    def train(self, mode: bool = True) -> "MDMASRForConditionalGeneration":
        """As in PyTorch."""
        # Fused optimizers change weights without a trace.
        self._short_list = None
        return super().train(mode)

    def short_list_output(self) -> ShortListOutput:
        """The output layer's weights (N, D) and bias (N,) of the ids that can be drafted, and their embeddings (N, D),
        which are the weights where these are tied."""
        embeddings, ids = self.get_input_embeddings().weight, self.draft_token_ids
        # Tied weights are those of the embeddings, also where the output layer was quantised.
        weight = embeddings if self.config.tie_word_embeddings else self.proj_out.weight
        bias = getattr(self.proj_out, "bias", None)
        bias = bias[ids] if isinstance(bias, torch.Tensor) else None

        def select() -> tuple[torch.Tensor, torch.Tensor]:
            selected = weight.index_select(0, ids)
            return selected, selected if weight is embeddings else embeddings.index_select(0, ids)

        if self.training or torch.is_grad_enabled():
            selected, its_embeddings = select()
            return selected, bias, its_embeddings
        # Kept as long as they are the same: 25 MB, copied for each text of one clip, would be a twentieth of its time.
        versions = [(one.data_ptr(), one.dtype, one.device, one._version) for one in (weight, embeddings)]
        key = (*versions, ids._version)
        # By a name of its own: other threads may put another in its place.
        short_list = self._short_list
        if short_list is None or short_list[0] != key:
            short_list = self._short_list = key, *select()
        return short_list[1], bias, short_list[2]

    @property
    def has_trained_drafts(self) -> bool:
        """Whether the rows of a block know their places, which they do not before they are trained."""
        return bool(self.model.decoder.drafts.offset_embeddings.weight.any())

    @property
    def draft_token_ids(self) -> torch.LongTensor:
        """The N ids that can be drafted."""
        return self.model.decoder.drafts.head.token_ids

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
        objective: DiffusionObjective | DraftObjective | None = None,
        generator: torch.Generator | None = None,
        logits_to_keep: int | torch.BoolTensor | torch.LongTensor = 0,
        input_values: torch.Tensor | None = None,
        teacher: TeacherOutput | None = None,
        **kwargs,
    ) -> MDMASROutput:
        """
        Args:
            input_features (`torch.Tensor`): what the processor returns: (B, T, mel bins) or waveforms (B, N).
            attention_mask (`torch.Tensor` of shape (B, T) or (B, N), *optional*): 1 for the utterance, 0 for padding.
            decoder_input_ids (`torch.LongTensor` of shape (B, P + L), *optional*):
                Prompt and canvas. With `labels`, a canvas that is masked already: its last L positions belong to the
                labels. Without `decoder_input_ids`, the labels are laid on a canvas and masked here. With drafts they
                are the donor's rows, causal; with `labels`, the prompt and the text but for its last token, so that
                the last L logits are aligned with the labels.
            decoder_attention_mask (`torch.Tensor` of shape (B, P + L), *optional*): 0 for positions outside a row's
                canvas.
            encoder_outputs ([`MDMASREncoderOutput`], *optional*): what `encode` returned, instead of `input_features`.
            labels (`torch.LongTensor` of shape (B, L), *optional*):
                Text tokens; -100 from the end of the text on. The rest of the canvas is filled with EOS, a token to
                predict like any other. The prompt is not part of the labels.
            timesteps (`torch.Tensor` of shape (B,) or (S, B), *optional*):
                t in (0, 1], for one or each of S steps; drawn uniformly if missing.
            prompt_ids (`torch.LongTensor` of shape (B, P), *optional*): the visible prompt; default: the checkpoint's.
            objective ([`DiffusionObjective`], or with drafts [`DraftObjective`], *optional*):
                Masking and the number of self-correction steps (ISCT); default: the paper's loss, one step.
                All steps run in this one call, on one pass of the encoder.
            generator (`torch.Generator`, *optional*):
                Seeds timesteps and masking. In evaluation mode they are seeded by default, so that losses can be
                compared.
            logits_to_keep (`int`, `torch.BoolTensor` of shape (B, L) or `torch.LongTensor` of shape (B, N)):
                Compute logits for the last so many positions only; 0 means all. A mask of the last L positions gives
                logits (N, V) of the N that it marks, in row-major order; columns give those where they stand (B, N,
                V).
            input_values (`torch.Tensor`, *optional*): another name for `input_features`, as waveform encoders call
                them.
            teacher ([`TeacherOutput`], *optional*): what objectives with weights for frames or logits learn.
            kwargs: for encoder and decoder, such as `output_attentions`, or `past_key_values` and `frontiers` of
                [`MDMASRDecoder`].

        Returns:
            [`MDMASROutput`]: `loss` if there are labels; `logits` (B, P + L, V), or (B, L, V) of the canvas alone with
            labels.
        """
        input_features = input_values if input_features is None else input_features
        if labels is not None and (self.config.has_drafts or decoder_input_ids is None):
            inputs = input_features, attention_mask, decoder_input_ids, encoder_outputs
            settings = {"timesteps": timesteps, "objective": objective, "teacher": teacher, "generator": generator}
            return self._training_forward(labels, *inputs, prompt_ids, **settings, kwargs=kwargs)
        targets = None
        if labels is not None:
            targets = labels.masked_fill(labels == -100, self.config.eos_token_id)
            logits_to_keep = targets.shape[-1]
            _check_holds(decoder_input_ids, labels)
        outputs = self.model(
            input_features=input_features,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            **kwargs,
        )
        logits = self._read_logits(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if targets is not None:
            masked = decoder_input_ids[:, -logits_to_keep:] == self.config.mask_token_id
            canvas_mask = None
            if decoder_attention_mask is not None:
                canvas_mask = decoder_attention_mask[:, -logits_to_keep:].bool()
                masked = masked & canvas_mask
            times = (
                torch.ones(len(targets), device=logits.device) if timesteps is None else timesteps.to(logits.device)
            )
            loss = masked_diffusion_loss(logits, targets, masked, loss_weight(times), canvas_mask)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MDMASROutput(loss=loss, logits=logits, **others)

    def _read_logits(self, hidden_states: torch.Tensor, logits_to_keep: int | torch.BoolTensor) -> torch.Tensor:
        """
        Logits of the last positions of (B, P + L, D), of all if `logits_to_keep` is 0, of those of the last L that a
        mask (B, L) marks, or of columns (B, N). With `shift_logits` those of a canvas are read one position earlier.
        """
        is_mask = isinstance(logits_to_keep, torch.Tensor)
        if is_mask and logits_to_keep.dtype != torch.bool:
            columns = logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1])
            return self.proj_out(hidden_states.gather(1, columns))
        length = logits_to_keep.shape[-1] if is_mask else logits_to_keep
        if self.config.shift_logits and length:
            hidden_states = hidden_states[:, -length - 1 : -1]
        else:
            hidden_states = hidden_states[:, -length:]
        return self.proj_out(hidden_states[logits_to_keep] if is_mask else hidden_states)

    def _training_forward(
        self,
        labels,
        input_features,
        attention_mask,
        decoder_input_ids,
        encoder_outputs,
        prompt_ids,
        *,
        generator,
        timesteps,
        teacher,
        **settings,
    ) -> "MDMASROutput":
        """One pass of the encoder, and all that the objective asks for behind it."""
        if generator is None and not self.training:
            generator = torch.Generator().manual_seed(0)
        if decoder_input_ids is not None:
            _check_holds(decoder_input_ids, labels)
            prompt_ids = decoder_input_ids[:, : 1 - labels.shape[1] or None]
        elif prompt_ids is None:
            prompt_ids = torch.from_numpy(self._prepare_prompt(None, len(labels), self.generation_config, {}))
        prompt_ids = prompt_ids.to(labels.device).expand(len(labels), -1)
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_features, attention_mask)
        settings |= {"generator": generator}
        if self.config.has_drafts:
            return self._drafting_forward(labels, prompt_ids, encoder_outputs, decoder_input_ids, teacher, **settings)
        duration_s = self.audio_duration_s(input_features, attention_mask)
        num_frames = next((x.shape[1] for x in (attention_mask, input_features) if x is not None), 0)
        longest_s = num_frames / self.config.input_frames_per_s
        canvas = self._lay_canvas(labels, duration_s, longest_s, prompt_ids.shape[-1])
        return self._canvas_forward(prompt_ids, encoder_outputs, *canvas, timesteps, **settings)

    def _canvas_forward(
        self, prompt_ids, encoder_outputs, targets, canvas_mask, is_sound, timesteps, objective, generator, kwargs
    ) -> "MDMASROutput":
        """All steps of the objective on a canvas, see `_lay_canvas`."""
        encoder_outputs = self.prepare_cross_attention(encoder_outputs)
        visible = torch.cat([torch.ones_like(prompt_ids, dtype=torch.bool), canvas_mask], dim=-1)

        def decode(canvas: torch.LongTensor) -> torch.Tensor:
            outputs = self.model(
                decoder_input_ids=torch.cat([prompt_ids, canvas], dim=-1),
                decoder_attention_mask=visible,
                encoder_outputs=encoder_outputs,
                **kwargs,
            )
            return self._read_logits(outputs.last_hidden_state, canvas.shape[-1])

        result = diffusion_objective(
            decode,
            targets,
            canvas_mask,
            objective or DiffusionObjective(),
            mask_token_id=self.config.mask_token_id,
            eos_token_id=self.config.eos_token_id,
            timesteps=timesteps,
            generator=generator,
        )
        loss = result.loss
        if is_sound is not None:
            # Labels with holes, which a GPU reports no other way: the trainer stops at the NaN.
            loss = torch.where(is_sound, loss, torch.nan)
        frames = encoder_outputs.last_hidden_state
        return MDMASROutput(**{**vars(result), "loss": loss}, encoder_last_hidden_state=frames)

    def _drafting_forward(
        self, labels, prompt_ids, encoder_outputs, decoder_input_ids, teacher, objective, generator, kwargs
    ) -> "MDMASROutput":
        """What the objective asks for, on labels (B, L), in one pass of the decoder."""
        objective = DraftObjective() if objective is None else objective
        if not isinstance(objective, DraftObjective):
            raise ValueError(
                f"`objective` is a {type(objective).__name__}, which trains a canvas. Pass a `DraftObjective`, or "
                "convert the donor with `draft_layers=0`."
            )
        frames, parts, num_prompt = encoder_outputs.last_hidden_state, objective.parts, prompt_ids.shape[1]
        losses, shares, logits, states = {}, {}, None, None
        if parts.keys() & {"donor", "drafts", "logits"}:
            encoder_outputs = self.prepare_cross_attention(encoder_outputs)
            is_text = labels != -100
            # Causal rows never see what stands behind them, so that padding needs no mask.
            tokens = labels.masked_fill(~is_text, self.config.eos_token_id)
            if decoder_input_ids is None:
                decoder_input_ids = torch.cat([prompt_ids, tokens[:, :-1]], dim=-1)
            frontiers = frontier_mask = block_ids = None
            if "drafts" in parts:
                lengths = is_text.sum(dim=-1).clamp(min=1)
                frontiers = draw_frontiers(lengths, num_prompt - 1, NUM_FRONTIERS, generator)
                if num_prompt > 1:
                    frontiers, frontier_mask = put_start(frontiers, num_prompt - 2, decoder_input_ids.shape[1])
                sequences = torch.cat([prompt_ids, labels], dim=-1)
                block_ids = self._lay_blocks(sequences, frontiers)
            outputs = self.model(
                decoder_input_ids=decoder_input_ids,
                encoder_outputs=encoder_outputs,
                frontiers=frontiers,
                frontier_mask=frontier_mask,
                block_ids=block_ids,
                **kwargs,
            )
            if parts.keys() & {"donor", "logits"}:
                logits = self.proj_out(outputs.last_hidden_state[:, num_prompt - 1 :])
                is_right = (logits.detach().argmax(dim=-1) == labels).sum() / is_text.sum().clamp(min=1)
                shares = {"donor": is_right, "logits": is_right}
            if "donor" in parts:
                losses["donor"] = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            if "logits" in parts:
                losses["logits"] = logit_loss(logits, teacher.token_ids, teacher.log_probs, is_text)
            if "drafts" in parts:
                states = outputs.draft_hidden_states
                losses["drafts"], shares["drafts"], scores = self._draft_loss(states, sequences, frontiers)
                if objective.num_steps == 2:
                    drafted = self.draft_token_ids[scores.argmax(dim=-1)]
                    losses["drafts"] = losses["drafts"] + self._hinted_loss(
                        drafted, sequences, frontiers, lengths, encoder_outputs, generator, kwargs
                    )
        if "frames" in parts:
            losses["frames"] = frame_loss(frames, teacher.frames, teacher.num_frames)
        return MDMASROutput(
            loss=sum(weight * losses[part] for part, weight in parts.items()),
            logits=logits,
            draft_hidden_states=states,
            step_losses=torch.stack([losses[part].detach() for part in parts]),
            step_accuracies=torch.stack([shares[part] for part in parts if part in shares] or [frames.new_zeros([])]),
            encoder_last_hidden_state=frames,
        )

    def _draft_loss(
        self, states: torch.Tensor, sequences: torch.LongTensor, frontiers: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss of what blocks (B, F, K, D) draft behind frontiers (B, F) of sequences (B, S), how much of it is
        right, and the logits (B, F, K, N) of the short list."""
        decoder = self.model.decoder
        # A frontier's own token, the donor's next one, and the K that are drafted.
        targets = block_targets(sequences, frontiers, decoder.config.draft_length, -100)
        known = decoder.embed_ids(targets.clamp(min=0))
        mixed = decoder.drafts.head(states, known[:, :, 1:-1].to(states.dtype), known[:, :, :-2].to(states.dtype))
        weight, bias, _ = self.short_list_output()
        drafted = nn.functional.linear(mixed, weight.to(mixed.dtype), bias)
        loss, share = draft_loss(drafted, targets[..., 2:], self.draft_token_ids, self.config.vocab_size)
        return loss, share, drafted.detach()

    def _lay_blocks(self, sequences: torch.LongTensor, frontiers: torch.LongTensor) -> torch.LongTensor:
        """Blocks (B, F, K) behind frontiers (B, F) of sequences (B, S)."""
        known = sequences.gather(1, (frontiers + 1).clamp(max=sequences.shape[1] - 1)).clamp(min=0)
        return lay_blocks(known, self.config.decoder_config.draft_length, self.config.mask_token_id)

    def _hinted_loss(self, drafted, sequences, frontiers, lengths, encoder_outputs, generator, kwargs) -> torch.Tensor:
        """The loss behind frontiers 1 to K - 1 tokens on, of masks in whose places stands what was drafted there;
        every other one stays a mask, as where all drafts were accepted."""
        num_blocks, length = drafted.shape[1:]
        drawn = draw_frontiers(torch.full_like(lengths, max(length - 1, 1)), 1, 2 * num_blocks, generator)
        moved, is_hinted = drawn[:, :num_blocks], drawn[:, num_blocks:] * 2 > length
        last = (sequences != -100).sum(dim=-1, keepdim=True) - 2
        behind = (frontiers + moved).minimum(last).maximum(frontiers)
        block_ids = self._lay_blocks(sequences, behind)
        hinted = lay_hints(block_ids, drafted, behind - frontiers)
        tokens = sequences.masked_fill(sequences == -100, self.config.eos_token_id)
        outputs = self.model(
            decoder_input_ids=tokens[:, :-1],
            encoder_outputs=encoder_outputs,
            frontiers=behind,
            block_ids=torch.where(is_hinted[..., None], hinted, block_ids),
            **kwargs,
        )
        return self._draft_loss(outputs.draft_hidden_states, sequences, behind)[0]

    def _lay_canvas(
        self, labels: torch.LongTensor, duration_s: torch.Tensor | None, longest_s: float, prompt_length: int
    ) -> tuple[torch.LongTensor, torch.BoolTensor, torch.BoolTensor | None]:
        """
        Lays labels (B, L') on canvases as long as `generate` would make them, filled up with EOS. Returns targets (B,
        L), the mask (B, L) of the positions that belong to a row's canvas, and on a GPU a flag that the labels are
        sound. No number is read off the labels' device, which would have to finish all its work before it answers: L
        follows from the padded width of the audio, `longest_s` in seconds, and of the labels.
        """
        is_text = labels != -100
        is_sound = ~(is_text[:, 1:] & ~is_text[:, :-1]).any()
        if not labels.is_cuda and not torch.compiler.is_compiling():
            if not is_sound:
                raise ValueError(
                    "`labels` have -100 before a token. Use -100 only behind the text: it is where the canvas fills "
                    "with EOS."
                )
            is_sound = None
        text_lengths, length = is_text.sum(dim=-1), labels.shape[-1]
        settings = self.generation_config
        if duration_s is None and settings.canvas_length is None:
            lengths = torch.full_like(text_lengths, length)
        else:
            capacity = self.config.decoder_config.max_position_embeddings - prompt_length
            limit = self.canvas_limit(prompt_length, settings)
            plan = self.planned_tokens(duration_s, len(labels), settings).to(labels.device)
            # A text denser than planned still gets all its tokens and an EOS behind them.
            lengths = plan.clamp(min=1, max=limit).maximum((text_lengths + 1).clamp(max=capacity))
            lengths = lengths.maximum(text_lengths)
            longest = int(self.planned_tokens(torch.tensor([longest_s]), 1, settings))
            if longest > capacity:
                # Raises, unless the audio is padded far beyond its longest row.
                self.canvas_lengths(duration_s, len(labels), prompt_length, settings)
            length = max(min(longest, limit), min(length + 1, capacity), length)
        targets = nn.functional.pad(labels, (0, length - labels.shape[-1]), value=-100)
        canvas_mask = torch.arange(length, device=labels.device) < lengths[:, None]
        return targets.masked_fill(targets == -100, self.config.eos_token_id), canvas_mask, is_sound

    @classmethod
    def from_whisper(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MDMASRForConditionalGeneration":
        """Makes a model of a Whisper checkpoint: one that writes its donor's text by verified drafts, or a canvas to
        train. See `convert.whisper.from_whisper`."""
        return converter("whisper", "from_whisper")(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_canary(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MDMASRForConditionalGeneration":
        """Makes a model of a Canary checkpoint or .nemo file, see `convert.canary.from_canary`."""
        return converter("canary", "from_canary")(cls, pretrained_model_name_or_path, **kwargs)

    def to_whisper(self) -> nn.Module:
        """The donor, an ordinary `WhisperForConditionalGeneration` of identical weights, see
        `convert.whisper.to_whisper`."""
        return converter("whisper", "to_whisper")(self)


def _check_holds(decoder_input_ids: torch.LongTensor, labels: torch.LongTensor) -> None:
    if decoder_input_ids.shape[-1] < labels.shape[-1]:
        raise ValueError(
            f"`decoder_input_ids` ({decoder_input_ids.shape[-1]} tokens) must hold the prompt and a canvas or text as "
            f"long as `labels` ({labels.shape[-1]} tokens)."
        )


def check_short_list(token_ids: torch.LongTensor, config: MDMASRConfig) -> None:
    """Raises ValueError if drafts could never end a text, or could be no token at all."""
    if token_ids.device.type == "meta":
        return
    if not bool((token_ids == config.eos_token_id).any()):
        raise ValueError(
            f"The checkpoint's short list of {len(token_ids)} ids that can be drafted lacks the end of text "
            f"({config.eos_token_id}). Convert the donor again, which puts it in."
        )
    if bool(((token_ids < 0) | (token_ids >= config.vocab_size)).any()):
        raise ValueError(f"The checkpoint's short list holds ids beyond the vocabulary ({config.vocab_size}).")
