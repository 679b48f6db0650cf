# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""generate(): from audio features to token ids in a few denoising steps, for MDM-ASR (arXiv 2602.18952)."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .diffusion_mdm_asr import draw_uniform
from .encoder_mdm_asr import MDMASREncoderOutput
from .prompt_mdm_asr import build_prompt_ids, validate_prompt_template
from .sampling_mdm_asr import SamplerConfig, make_sampler, sampler_step

logger = logging.get_logger(__name__)

# What callers of autoregressive models pass by habit and what has no meaning for a canvas.
_IGNORED_ARGUMENTS = ("labels", "use_cache", "input_ids", "decoder_attention_mask")
_SAMPLER_SETTINGS = ("gamma", "lambda_", "k")
# Names of prompt slots, so that one the checkpoint lacks is reported as such and not as an unknown argument.
_PROMPT_SLOTS = ("language", "target_language", "punctuation", "task")


class MDMASRGenerationConfig(GenerationConfig):
    r"""
    Settings of [`MDMASRGenerationMixin.generate`], stored in and loaded from generation_config.json.

    Args:
        sampler (`str`, `dict` or [`SamplerConfig`]):
            One of "random", "dfm", "conf_top_k", "eb_conf", "pbeb_conf"; a dict adds settings, as in
            `{"name": "pbeb_conf", "gamma": 0.05, "lambda_": 0.2}`, the paper's main setting and the default.
        max_denoising_steps (`int`): the most decoder evaluations per utterance (NFE). The last step commits what is
            left.
        temperature (`float`): 0 takes the most probable token, above 0 draws from softmax(logits / temperature).
        canvas_length (`int`, *optional*):
            A fixed number of canvas tokens (the paper's is 256). None adapts it to each utterance's duration:
            `canvas_tokens_per_s` * seconds + `canvas_extra_tokens`.
        canvas_tokens_per_s (`float`): tokens of the densest plausible speech, per second.
        canvas_extra_tokens (`int`): tokens added for the end of text and for very short utterances.
        min_duration_s (`float`): audio no longer than this, in seconds, gives an empty text, as does audio without any
            signal.
        max_new_tokens (`int`, *optional*), max_length (`int`, *optional*):
            Upper bounds of the canvas, without and with the prompt, as in other models.
        suppress_tokens (`list[int]`, *optional*): ids that are never predicted.
        prompt_template (`dict`, *optional*): the decoder prompt, see `prompt_mdm_asr`. None: `decoder_start_token_id`
            alone.
        return_dict_in_generate (`bool`): return a [`MDMASRGenerateOutput`] instead of a tensor.
        num_beams (`int`): only 1; there is no beam in a canvas.
        pad_token_id, eos_token_id, bos_token_id (`int`, *optional*): kept for other code; the model's config decides.
    """

    def __init__(self, **kwargs):
        # The parent's many autoregressive attributes are left out on purpose, as models/diffusion_gemma does.
        self.sampler = kwargs.pop("sampler", "pbeb_conf")
        self.max_denoising_steps: int = kwargs.pop("max_denoising_steps", 32)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.canvas_length: int | None = kwargs.pop("canvas_length", None)
        self.canvas_tokens_per_s: float = kwargs.pop("canvas_tokens_per_s", 7.0)
        self.canvas_extra_tokens: int = kwargs.pop("canvas_extra_tokens", 10)
        self.min_duration_s: float = kwargs.pop("min_duration_s", 0.05)
        self.max_new_tokens: int | None = kwargs.pop("max_new_tokens", None)
        self.max_length: int = kwargs.pop("max_length", None) or 1024
        self.suppress_tokens: list[int] | None = kwargs.pop("suppress_tokens", None)
        self.prompt_template: dict | None = kwargs.pop("prompt_template", None)
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self.num_beams: int = kwargs.pop("num_beams", 1)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool = kwargs.pop("_from_model_config", False)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} are not settings of MDM-ASR's generation. See MDMASRGenerationConfig.")
        self.validate()

    @property
    def sampler_config(self) -> SamplerConfig:
        return make_sampler(self.sampler)

    def validate(self, *args, **kwargs) -> None:
        """Raises ValueError on a setting that makes no sense; brings `sampler` into its JSON form."""
        self.sampler = make_sampler(self.sampler).to_dict()
        for name in ("max_denoising_steps", "max_length", "canvas_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is None and name in ("canvas_length", "max_new_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        for name in ("temperature", "canvas_tokens_per_s", "canvas_extra_tokens", "min_duration_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
        if self.prompt_template is not None:
            validate_prompt_template(self.prompt_template)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {}

    def from_model_config(self, *args, **kwargs):
        # Tells transformers to start from this class's own defaults instead of reading settings off the model's
        # config.
        raise NotImplementedError("MDMASRGenerationConfig is not derived from a model config.")

    def get_generation_mode(self, *args, **kwargs):
        raise NotImplementedError("Masked diffusion has no autoregressive generation mode.")


@dataclass
class MDMASRGenerateOutput(ModelOutput):
    """
    Output of `generate(return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor` of shape (B, W)): text tokens and the first EOS, then padding.
        confidence (`torch.FloatTensor` of shape (B, W)): each token's probability in the step that committed it, 0 for
            padding.
        commit_steps (`torch.LongTensor` of shape (B, W)): the step, counted from 1, that committed each token, 0 for
            padding. The canvas after step s holds the tokens with `commit_steps <= s`, and [MASK] elsewhere.
        nfe (`torch.LongTensor` of shape (B,)): decoder evaluations until everything before the row's first EOS was
            committed.
        num_steps (`int`): decoder evaluations of the whole batch, the largest of `nfe`.
    """

    sequences: torch.LongTensor | None = None
    confidence: torch.FloatTensor | None = None
    commit_steps: torch.LongTensor | None = None
    nfe: torch.LongTensor | None = None
    num_steps: int | None = None


def utterance_confidence(confidence: torch.Tensor) -> list[float | None]:
    """
    Confidence of each utterance: the geometric mean of its tokens' confidences (B, W), its end of text included. None
    for one that nothing was decoded of.
    """
    # Every committed token has a probability above 0. Padding, and the end of text a row without speech is given, have
    # 0.
    rows = [row[row > 0] for row in confidence.float()]
    return [float(row.log().mean().exp()) if len(row) else None for row in rows]


def draw_noise(
    generator: torch.Generator | list[torch.Generator] | None, canvas_lengths: list[int], device: torch.device
) -> torch.Tensor:
    """
    Uniform noise (B, L, 2) for one sampler step. With one generator per row, a row's numbers depend on its own
    generator and canvas length alone, so that it is sampled alike in every batch.
    """
    longest = max(canvas_lengths)
    if not isinstance(generator, (list, tuple)):
        return draw_uniform((len(canvas_lengths), longest, 2), device, generator)
    rows = [torch.rand((n, 2), generator=g, device=g.device) for g, n in zip(generator, canvas_lengths, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


class OpenRows:
    """
    What the decoder reads of the rows that are not finished: prompts and encoder outputs, made narrower as rows
    finish, so that a batch costs no more than its rows do.

    Attributes:
        rows (`torch.LongTensor` of shape (R,)): places of the open rows in the batch.
        prompt_ids (`torch.LongTensor` of shape (R, P)).
        encoder_outputs ([`MDMASREncoderOutput`]): of R rows.
    """

    def __init__(self, prompt_ids: torch.LongTensor, encoder_outputs: MDMASREncoderOutput):
        self.rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        self.prompt_ids, self.encoder_outputs = prompt_ids, encoder_outputs

    def narrow(self, is_open: torch.BoolTensor) -> None:
        """Drops the rows that are not open (B,) any more."""
        kept = is_open[self.rows]
        if bool(kept.all()):
            return
        self.rows, self.prompt_ids = self.rows[kept], self.prompt_ids[kept]
        outputs = self.encoder_outputs
        self.encoder_outputs = MDMASREncoderOutput(
            last_hidden_state=outputs.last_hidden_state[kept],
            attention_mask=None if outputs.attention_mask is None else outputs.attention_mask[kept],
            cross_attention_states=tuple((key[kept], value[kept]) for key, value in outputs.cross_attention_states),
        )


class MDMASRGenerationMixin:
    """The part of the model that turns audio into text."""

    @torch.no_grad()
    def generate(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        decoder_input_ids: torch.LongTensor | None = None,
        encoder_outputs: MDMASREncoderOutput | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer: Any = None,
        synced_gpus: bool = False,
        **kwargs,
    ) -> torch.LongTensor | MDMASRGenerateOutput:
        """
        Transcribes a batch by masked diffusion:
        ```
        1. Settle the settings: generation_config.json < `generation_config` < keyword arguments.
        2. Encode the audio once, and its cross-attention keys and values once.
        3. Lay the visible prompt and a canvas of [MASK] for every row, as long as its duration asks for.
        4. Per denoising step, until every row is finished:
            a. run the decoder on prompt and canvas,
            b. let the sampler commit positions,
            c. finish the rows whose text, up to the first EOS, is committed.
        5. Cut each row at its first EOS.
        ```

        Args:
            input_features (`torch.Tensor`): what the processor returns: (B, T, mel bins) or waveforms (B, N).
            attention_mask (`torch.Tensor` of shape (B, T) or (B, N), *optional*): 1 for the utterance, 0 for padding.
            generation_config ([`MDMASRGenerationConfig`], *optional*): instead of the model's own.
            decoder_input_ids (`torch.LongTensor` of shape (B, P), *optional*): a prompt of your own.
            encoder_outputs ([`MDMASREncoderOutput`], *optional*): of an earlier `encode`; needs `attention_mask` or
                `input_features` beside it for the adaptive canvas.
            generator (`torch.Generator` or a list of B, *optional*): for temperature > 0 and the random and DFM
                samplers.
            streamer (*optional*): `put_draft(value=canvas)` is called after every step, if it has that, `put` and
                `end` at the end.
            synced_gpus (`bool`): keep stepping until all processes are done (FSDP, DeepSpeed ZeRO-3).
            kwargs: any field of [`MDMASRGenerationConfig`], the sampler's settings (`gamma`, `lambda_`, `k`), and the
                prompt's slots (`language`, `target_language`, `punctuation`, `task`), one value or one per row.

        Returns:
            `torch.LongTensor` of shape (B, W): text tokens and the first EOS, then padding; or
            [`MDMASRGenerateOutput`].

        Raises:
            ValueError: an unknown argument, features with NaN, audio longer than encoder or canvas can hold.
        """
        # 1. Settings.
        if "input_values" in kwargs:
            input_features = kwargs.pop("input_values")
        settings, prompt_slots = self._settle_generation_config(generation_config, kwargs)
        sampler = settings.sampler_config

        # 2. Audio.
        if input_features is None and encoder_outputs is None:
            raise ValueError(
                "`generate` needs `input_features` or `encoder_outputs`. Get the former from the processor."
            )
        has_speech = None
        if input_features is not None:
            has_speech, attention_mask = self.find_speech(input_features, attention_mask, settings.min_duration_s)
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_features, attention_mask)
        encoder_outputs = self.prepare_cross_attention(encoder_outputs)
        device = encoder_outputs.last_hidden_state.device

        # 3. Prompt and canvas.
        batch_size = encoder_outputs.last_hidden_state.shape[0]
        prompt_ids = self._prepare_prompt(decoder_input_ids, batch_size, settings, prompt_slots).to(device)
        duration_s = self.audio_duration_s(input_features, attention_mask)
        canvas_lengths = self.canvas_lengths(duration_s, batch_size, prompt_ids.shape[1], settings)
        positions = torch.arange(max(canvas_lengths), device=device)
        canvas_mask = positions < torch.tensor(canvas_lengths, device=device)[:, None]
        mask_id, eos_id = self.config.mask_token_id, self.config.eos_token_id
        canvas = torch.full(canvas_mask.shape, mask_id, device=device).masked_fill(~canvas_mask, eos_id)
        if has_speech is not None:
            canvas = canvas.masked_fill(~has_speech[:, None], eos_id)
        confidence = torch.zeros(canvas.shape, device=device)
        commit_steps = torch.zeros_like(canvas)
        nfe = torch.zeros(batch_size, dtype=torch.long, device=device)
        candidates = self._open_positions(canvas, canvas_mask)
        noisy = settings.temperature > 0 or sampler.needs_noise
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries for a batch of {batch_size}. Pass one per row."
            )
        if streamer is not None:
            streamer.put(prompt_ids.cpu())

        # 4. Denoise.
        num_steps, open_rows = 0, OpenRows(prompt_ids, encoder_outputs)
        while num_steps < settings.max_denoising_steps and self._any_unfinished(candidates, synced_gpus):
            if not synced_gpus:
                open_rows.narrow(candidates.any(dim=-1))
            logits = self._canvas_logits(open_rows, canvas, canvas_mask, candidates, settings.suppress_tokens)
            step = sampler_step(
                sampler,
                logits,
                canvas,
                mask_token_id=mask_id,
                steps_left=settings.max_denoising_steps - num_steps,
                candidates=candidates,
                temperature=settings.temperature,
                noise=draw_noise(generator, canvas_lengths, device) if noisy else None,
            )
            nfe += candidates.any(dim=-1)
            num_steps += 1
            canvas, confidence = step.canvas, torch.where(step.committed, step.confidence, confidence)
            commit_steps = commit_steps.masked_fill(step.committed, num_steps)
            candidates = self._open_positions(canvas, canvas_mask)
            if streamer is not None and hasattr(streamer, "put_draft"):
                streamer.put_draft(value=canvas.cpu())

        # 5. Finalise.
        sequences, confidence, commit_steps = self._finalize(
            canvas, canvas_mask, confidence, commit_steps, settings.pad_token_id
        )
        if streamer is not None:
            streamer.put(sequences.cpu())
            streamer.end()
        if not settings.return_dict_in_generate:
            return sequences
        return MDMASRGenerateOutput(
            sequences=sequences, confidence=confidence, commit_steps=commit_steps, nfe=nfe, num_steps=num_steps
        )

    def _settle_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[MDMASRGenerationConfig, dict[str, Any]]:
        """
        Merges the sources of settings; returns them and the prompt's slots. Leaves the originals untouched. It is not
        named `_prepare_generation_config`: pipelines of transformers before 5.23 look for that and call it otherwise.
        """
        settings = copy.deepcopy(self.generation_config)
        if isinstance(generation_config, MDMASRGenerationConfig):
            settings = copy.deepcopy(generation_config)
        elif generation_config is not None:
            # A plain GenerationConfig, as stock code makes them: take over what has a meaning here.
            for key, value in generation_config.to_diff_dict().items():
                if hasattr(settings, key) and value is not None and key != "transformers_version":
                    setattr(settings, key, value)
        template_slots = (settings.prompt_template or {}).get("slots", {})
        prompt_slots, sampler_settings, unknown = {}, {}, []
        for key, value in kwargs.items():
            if key in _IGNORED_ARGUMENTS or (value is None and key != "canvas_length"):
                continue
            if key in _SAMPLER_SETTINGS:
                sampler_settings[key] = value
            elif key in template_slots or key in _PROMPT_SLOTS:
                prompt_slots[key] = value
            elif key in vars(settings) and not key.startswith("_"):
                setattr(settings, key, value)
            else:
                unknown.append(key)
        if unknown:
            raise ValueError(
                f"{sorted(unknown)} are not arguments of MDM-ASR's `generate`. See MDMASRGenerationConfig."
            )
        settings.sampler = make_sampler(settings.sampler, **sampler_settings)
        settings.validate()
        if settings.num_beams not in (None, 1):
            logger.warning_once(f"`num_beams={settings.num_beams}` is ignored: masked diffusion has no beams.")
        eos = settings.eos_token_id
        if eos is not None and self.config.eos_token_id not in (eos if isinstance(eos, list) else [eos]):
            raise ValueError(
                f"`eos_token_id={eos}` contradicts the model's {self.config.eos_token_id}, with which its canvas was "
                "trained. "
                "Leave it out."
            )
        return settings, prompt_slots

    def find_speech(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None, min_duration_s: float
    ) -> tuple[torch.BoolTensor, torch.Tensor | None]:
        """
        Which rows (B,) hold a signal at all. Digital silence gives features that do not change over time. Rows without
        one have their mask opened, since an encoder returns NaN for a row of padding only.
        """
        if not torch.isfinite(input_features).all():
            raise ValueError(
                "`input_features` hold NaN or infinity. Check the audio, and that it went through this model's "
                "processor."
            )
        features = input_features if input_features.dim() == 3 else input_features[..., None]
        if features.dim() != 3 or features.shape[1] == 0:
            raise ValueError(
                f"`input_features` of shape {tuple(input_features.shape)} must be (B, T, mel bins) or waveforms (B, "
                "N), T or N at "
                "least 1. Hand the audio to this model's processor, which pads short clips."
            )
        inside = torch.ones(features.shape[:2]) if attention_mask is None else attention_mask
        if inside.shape != features.shape[:2]:
            raise ValueError(
                f"`attention_mask` of shape {tuple(inside.shape)} must be {tuple(features.shape[:2])}, as "
                "`input_features` have it."
            )
        inside = inside.to(features.device).bool()
        outside = ~inside[..., None]
        highest = features.masked_fill(outside, -torch.inf).amax(dim=1)
        lowest = features.masked_fill(outside, torch.inf).amin(dim=1)
        long_enough = inside.sum(dim=-1) > min_duration_s * self.config.input_frames_per_s
        has_speech = ((highest - lowest) > 0).any(dim=-1) & long_enough
        if attention_mask is not None:
            attention_mask = attention_mask.bool() | ~has_speech[:, None].to(attention_mask.device)
        return has_speech, attention_mask

    def _prepare_prompt(
        self,
        decoder_input_ids: torch.LongTensor | None,
        batch_size: int,
        settings: MDMASRGenerationConfig,
        slots: dict[str, Any],
    ) -> torch.LongTensor:
        """The visible prompt (B, P): the one given, or the one the settings' template makes of the slots."""
        if decoder_input_ids is not None:
            if slots:
                raise ValueError(f"`decoder_input_ids` and {sorted(slots)} both set the prompt. Pass one of them.")
            if decoder_input_ids.dim() != 2 or decoder_input_ids.shape[0] not in (1, batch_size):
                raise ValueError(
                    f"`decoder_input_ids` of shape {tuple(decoder_input_ids.shape)} must be a prompt of shape "
                    f"({batch_size}, P)."
                )
            return decoder_input_ids.expand(batch_size, -1)
        template = settings.prompt_template or {"tokens": [self.config.decoder_start_token_id]}
        return build_prompt_ids(template, batch_size, **slots)

    def canvas_lengths(
        self, duration_s: torch.Tensor | None, batch_size: int, prompt_length: int, settings: MDMASRGenerationConfig
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

    def _open_positions(self, canvas: torch.LongTensor, canvas_mask: torch.BoolTensor) -> torch.BoolTensor:
        """Positions (B, L) still to be committed: masked, and before the row's first EOS."""
        ended = (canvas == self.config.eos_token_id).cummax(dim=-1).values
        return (canvas == self.config.mask_token_id) & canvas_mask & ~ended

    def _any_unfinished(self, candidates: torch.BoolTensor, synced_gpus: bool) -> bool:
        unfinished = candidates.any()
        if synced_gpus and torch.distributed.is_available() and torch.distributed.is_initialized():
            # A process that stopped early would leave the others waiting in the sharded layers.
            flag = unfinished.float()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            unfinished = flag > 0
        return bool(unfinished)

    def _canvas_logits(
        self,
        open_rows: "OpenRows",
        canvas: torch.LongTensor,
        canvas_mask: torch.BoolTensor,
        candidates: torch.BoolTensor,
        suppress_tokens: list[int] | None,
    ) -> torch.Tensor:
        """
        One decoder evaluation of the open rows of a canvas (B, L): logits (N, V), in fp32, of its N candidates in
        row-major order. The output layer is as wide as the vocabulary, so that other positions would cost most.
        """
        rows, prompt_ids = open_rows.rows, open_rows.prompt_ids
        outputs = self(
            decoder_input_ids=torch.cat([prompt_ids, canvas[rows]], dim=-1),
            decoder_attention_mask=torch.cat(
                [torch.ones_like(prompt_ids, dtype=torch.bool), canvas_mask[rows]], dim=-1
            ),
            encoder_outputs=open_rows.encoder_outputs,
            logits_to_keep=candidates[rows],
        )
        logits = outputs.logits.float()
        if suppress_tokens:
            logits[..., suppress_tokens] = -torch.inf
        return logits

    def _finalize(
        self,
        canvas: torch.LongTensor,
        canvas_mask: torch.BoolTensor,
        confidence: torch.Tensor,
        commit_steps: torch.LongTensor,
        pad_token_id: int | None,
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """Cuts rows behind their first EOS. Returns sequences, confidences and commit steps (B, W)."""
        is_eos = (canvas == self.config.eos_token_id) & canvas_mask
        behind_eos = (is_eos.cumsum(dim=-1) - is_eos.long()) > 0
        kept = canvas_mask & ~behind_eos
        if num_full := int((~is_eos.any(dim=-1)).sum()):
            logger.warning(
                f"{num_full} of {canvas.shape[0]} canvases of up to {canvas.shape[1]} tokens filled up without an "
                "end of text, so "
                "the end of their speech may be missing. Set a larger `canvas_length` (or `canvas_tokens_per_s`, "
                "`max_new_tokens`), or split the audio."
            )
        width = int(kept.sum(dim=-1).max())
        pad_token_id = self.config.pad_token_id if pad_token_id is None else pad_token_id
        cut = ((canvas, pad_token_id), (confidence, 0.0), (commit_steps, 0))
        return tuple(values.masked_fill(~kept, padding)[:, :width] for values, padding in cut)

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


__all__ = [
    "MDMASRGenerateOutput",
    "MDMASRGenerationConfig",
    "MDMASRGenerationMixin",
    "OpenRows",
    "draw_noise",
    "utterance_confidence",
]
