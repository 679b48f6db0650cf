# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of generate(), as generation_config.json holds them."""

from typing import Any

from transformers import GenerationConfig

from .confidence_mdm_asr import validate_calibration
from .no_speech_mdm_asr import validate_no_speech
from .prompt_mdm_asr import validate_prompt_template
from .sampling_mdm_asr import SamplerConfig, make_sampler


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
        active_ahead (`int`, *optional*):
            Samplers bounded by entropy compute and commit only so many canvas positions from the first open one on,
            see `active_window_mdm_asr`. None, or gamma = inf, computes the whole canvas, as the paper does.
        active_behind (`int`): how many positions behind the first open one are computed again in every step.
        commit_ahead (`int`, *optional*):
            Samplers bounded by entropy commit only among so many open positions, the first ones, in every step but an
            utterance's last; the output layer is spared for the others. None leaves the choice to the sampler.
        revise_above (`float`, *optional*):
            The tokens that a step commits are read again by the next, which sees them: another token takes the place
            of one where its probability is above this. It needs a model that learned to read positions that show a
            token, see `WindowObjective.correction_weight`. None, or `temperature` > 0, revises nothing.
        revise_steps (`int`): how many steps read a token again, with more and more of what follows it to be seen.
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
        num_return_sequences (`int`): samples per utterance, best first by confidence; more than 1 needs
            `temperature` > 0 or a sampler that draws.
        repair_rounds (`int`): how often the text is repaired and refined after the last step, within
            `max_denoising_steps`, see `repair_mdm_asr`. 0 leaves it as it was committed.
        repair_doubled_below (`float`): of two equal neighbours, the less confident one is taken out if its confidence
            is below this.
        repair_doubtful_below (`float`): neighbours that are both of a confidence below this are masked again; 0 masks
            none.
        return_token_timestamps (`bool`): also say when each token was spoken, see [`MDMASRGenerateOutput`].
        alignment_heads (`list` of `[layer, head]`, *optional*): the cross-attention heads that timestamps are read
            from, see training/find_alignment_heads.py. None: all heads of the lower half of the layers.
        confidence_temperature (`float`), confidence_bias (`float`): calibration of the confidences, see
            `confidence_mdm_asr`. 1 and 0 leave them as they are.
        confidence_context (`dict`, *optional*): what else of the utterance they are calibrated by, see
            `confidence_mdm_asr`. None: nothing.
        no_speech (`dict`, *optional*): the decision that audio holds no speech, see `no_speech_mdm_asr`. None: only
            audio without any signal gives an empty text.
        hotword_boost (`float`): what is added to the logits of hotwords where they fit, see `hotwords_mdm_asr`.
        hotword_threshold (`float`): they fit where the model takes their tokens for this much less probable, in nats
            and on average, than the most probable ones, or less.
        max_window_s (`float`, *optional*): the longest audio, in seconds, that the checkpoint decodes well at once.
            Longer recordings are cut into windows of at most this.
        pad_token_id, eos_token_id, bos_token_id (`int`, *optional*): kept for other code; the model's config decides.
    """

    def __init__(self, **kwargs):
        # The parent's many autoregressive attributes are left out on purpose, as models/diffusion_gemma does.
        self.sampler = kwargs.pop("sampler", "pbeb_conf")
        self.max_denoising_steps: int = kwargs.pop("max_denoising_steps", 32)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.active_ahead: int | None = kwargs.pop("active_ahead", None)
        self.active_behind: int = kwargs.pop("active_behind", 2)
        self.commit_ahead: int | None = kwargs.pop("commit_ahead", None)
        self.revise_above: float | None = kwargs.pop("revise_above", None)
        self.revise_steps: int = kwargs.pop("revise_steps", 1)
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
        self.num_return_sequences: int = kwargs.pop("num_return_sequences", None) or 1
        self.repair_rounds: int = kwargs.pop("repair_rounds", 0)
        self.repair_doubled_below: float = kwargs.pop("repair_doubled_below", 0.7)
        self.repair_doubtful_below: float = kwargs.pop("repair_doubtful_below", 0.0)
        self.return_token_timestamps: bool = kwargs.pop("return_token_timestamps", False)
        self.alignment_heads: list[list[int]] | None = kwargs.pop("alignment_heads", None)
        self.confidence_temperature: float = kwargs.pop("confidence_temperature", 1.0)
        self.confidence_bias: float = kwargs.pop("confidence_bias", 0.0)
        self.confidence_context: dict[str, float] | None = kwargs.pop("confidence_context", None)
        self.no_speech: dict[str, Any] | None = kwargs.pop("no_speech", None)
        self.hotword_boost: float = kwargs.pop("hotword_boost", 5.0)
        self.hotword_threshold: float = kwargs.pop("hotword_threshold", 4.0)
        self.max_window_s: float | None = kwargs.pop("max_window_s", None)
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
        optional = ("active_ahead", "commit_ahead", "canvas_length", "max_new_tokens")
        for name in (*optional, "max_denoising_steps", "max_length", "num_return_sequences", "revise_steps"):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        for name in ("active_behind", "repair_rounds"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, got {value!r}.")
        for name in (
            "revise_above",
            "temperature",
            "canvas_tokens_per_s",
            "canvas_extra_tokens",
            "min_duration_s",
            "repair_doubled_below",
            "repair_doubtful_below",
            "hotword_boost",
            "hotword_threshold",
            "max_window_s",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_window_s", "revise_above"):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
        if self.revise_above is not None and self.revise_above > 1:
            raise ValueError(f"`revise_above` must be a probability, got {self.revise_above!r}.")
        if self.prompt_template is not None:
            validate_prompt_template(self.prompt_template)
        validate_calibration(self.confidence_temperature, self.confidence_bias, self.confidence_context)
        if self.no_speech is not None:
            validate_no_speech(self.no_speech)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {}

    def from_model_config(self, *args, **kwargs):
        # Tells transformers to start from this class's own defaults instead of reading settings off the model's
        # config.
        raise NotImplementedError("MDMASRGenerationConfig is not derived from a model config.")

    def get_generation_mode(self, *args, **kwargs):
        raise NotImplementedError("Masked diffusion has no autoregressive generation mode.")


__all__ = ["MDMASRGenerationConfig"]
