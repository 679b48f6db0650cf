# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of generate(), as generation_config.json holds them."""

import logging
import math
from collections.abc import Callable
from typing import Any

from .prompt_mdm_asr import map_prompt_ids, validate_prompt_template
from .sampling_mdm_asr import Sampler, make_sampler

try:
    from transformers import GenerationConfig
except ImportError:

    class GenerationConfig:
        """Of transformers, what exported models need where they run without it."""

        def to_dict(self) -> dict[str, Any]:
            return dict(vars(self))


logger = logging.getLogger(__name__)

# What drafts are made by, see `verified_decoding_mdm_asr`.
BRANCHES = ("masks", "hypothesis")
# Settings that only one kind of checkpoint can use.
CANVAS_SETTINGS = ("max_denoising_steps", "canvas_length", "canvas_tokens_per_s", "canvas_extra_tokens")
DRAFT_SETTINGS = (
    *("draft_branches", "draft_length", "begin_suppress_tokens", "no_speech_token_id"),
    *("no_speech_threshold", "logprob_threshold", "compression_ratio_threshold", "hotword_boost"),
)
# Of version 0.1: what its decoding had beside the paper's.
_RETIRED_SETTINGS = (
    *("active_ahead", "active_behind", "commit_ahead", "revise_above", "revise_steps", "repair_rounds"),
    *("repair_doubled_below", "repair_doubtful_below", "confidence_bias", "confidence_context", "no_speech"),
    *("hotword_threshold", "confidence_temperature"),
)
# Defaults that others of Whisper's family have, for audio behind which the temperature has to rise.
FALLBACK_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class MDMASRGenerationConfig(GenerationConfig):
    r"""
    Settings of [`MDMASRGenerationMixin.generate`], stored in and loaded from generation_config.json.

    Args:
        sampler (`str`, `dict` or [`Sampler`]):
            On a canvas one of "random", "dfm", "conf_top_k", "eb_conf", "pbeb_conf"; a dict adds settings, as in
            `{"name": "pbeb_conf", "gamma": 0.05, "lambda_": 0.2}`, the paper's main setting and the default. With
            drafts, pbeb_conf from left to right (`lambda_` None): gamma is the entropy, in nats, that a block's drafts
            may have together.
        temperature (`float` or list of `float`): 0 takes the most probable token, above 0 draws from softmax(logits /
            temperature). Of a list, with drafts, the later ones are for rows that Whisper's thresholds refuse.
        draft_branches (`list[str]`): what drafts, "masks" and "hypothesis" (where `generate` is given `draft_ids`);
            empty: nothing, which is plain autoregressive decoding.
        draft_length (`int`, *optional*): the most drafts of a branch; by default the masks' K.
        no_speech_threshold, logprob_threshold, compression_ratio_threshold (`float`, *optional*): Whisper's, see
            `safeguards_mdm_asr`. None switches one off.
        no_speech_token_id (`int`, *optional*): Whisper's <|nospeech|>.
        suppress_tokens, begin_suppress_tokens (`list[int]`, *optional*): ids that are never predicted, or not as the
            first of a text.
        max_denoising_steps (`int`): on a canvas, the most decoder evaluations per utterance (NFE). The last step
            commits what is left.
        canvas_length (`int`, *optional*):
            A fixed number of canvas tokens (the paper's is 256). None adapts it to each utterance's duration:
            `canvas_tokens_per_s` * seconds + `canvas_extra_tokens`.
        canvas_tokens_per_s (`float`): tokens of the densest plausible speech, per second.
        canvas_extra_tokens (`int`): tokens added for the end of text and for very short utterances.
        min_duration_s (`float`): audio no longer than this, in seconds, gives an empty text, as does audio without any
            signal.
        max_new_tokens (`int`, *optional*), max_length (`int`, *optional*):
            Upper bounds of the text or canvas, without and with the prompt, as in other models.
        prompt_template (`dict`, *optional*): the decoder prompt, see `prompt_mdm_asr`. None: `decoder_start_token_id`
            alone.
        return_dict_in_generate (`bool`): return a [`MDMASRGenerateOutput`] instead of a tensor.
        num_beams (`int`): only 1; there are no beams.
        num_return_sequences (`int`): samples per utterance, best first by confidence; more than 1 needs
            `temperature` > 0 or a sampler that draws.
        return_token_timestamps (`bool`): also say when each token was spoken, see [`MDMASRGenerateOutput`].
        alignment_heads (`list` of `[layer, head]`, *optional*): the cross-attention heads that timestamps are read
            from, as Whisper's checkpoints name them. None: those of half of the layers.
        hotword_boost (`float`): what is added to the logits of hotwords, in nats, see `hotwords_mdm_asr`.
        max_window_s (`float`, *optional*): the longest audio, in seconds, that the checkpoint decodes well at once.
            Longer recordings are cut into windows of at most this.
        pad_token_id, eos_token_id, bos_token_id (`int`, *optional*): kept for other code; the model's config decides.
    """

    def __init__(self, **kwargs: Any) -> None:
        # The parent's many autoregressive attributes are left out on purpose, as models/diffusion_gemma does.
        self.sampler = kwargs.pop("sampler", "pbeb_conf")
        self.temperature: float | list[float] = kwargs.pop("temperature", 0.0)
        self.draft_branches: list[str] = kwargs.pop("draft_branches", list(BRANCHES))
        self.draft_length: int | None = kwargs.pop("draft_length", None)
        self.no_speech_threshold: float | None = kwargs.pop("no_speech_threshold", None)
        self.logprob_threshold: float | None = kwargs.pop("logprob_threshold", None)
        self.compression_ratio_threshold: float | None = kwargs.pop("compression_ratio_threshold", None)
        self.no_speech_token_id: int | None = kwargs.pop("no_speech_token_id", None)
        self.suppress_tokens: list[int] | None = kwargs.pop("suppress_tokens", None)
        self.begin_suppress_tokens: list[int] | None = kwargs.pop("begin_suppress_tokens", None)
        self.max_denoising_steps: int = kwargs.pop("max_denoising_steps", 32)
        self.canvas_length: int | None = kwargs.pop("canvas_length", None)
        self.canvas_tokens_per_s: float = kwargs.pop("canvas_tokens_per_s", 7.0)
        self.canvas_extra_tokens: int = kwargs.pop("canvas_extra_tokens", 10)
        self.min_duration_s: float = kwargs.pop("min_duration_s", 0.05)
        self.max_new_tokens: int | None = kwargs.pop("max_new_tokens", None)
        self.max_length: int = 1024 if (value := kwargs.pop("max_length", None)) is None else value
        self.prompt_template: dict | None = kwargs.pop("prompt_template", None)
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self.num_beams: int = kwargs.pop("num_beams", 1)
        self.num_return_sequences: int = 1 if (value := kwargs.pop("num_return_sequences", None)) is None else value
        self.return_token_timestamps: bool = kwargs.pop("return_token_timestamps", False)
        self.alignment_heads: list[list[int]] | None = kwargs.pop("alignment_heads", None)
        self.hotword_boost: float = kwargs.pop("hotword_boost", 4.0)
        self.max_window_s: float | None = kwargs.pop("max_window_s", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool = kwargs.pop("_from_model_config", False)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        if isinstance(self.draft_branches, (list, tuple)):
            # Of folders saved when there was a CTC head, whose drafts a hypothesis took the place of.
            self.draft_branches = ["hypothesis" if one == "first_draft" else one for one in self.draft_branches]
        # Of folders that were saved when there were several ways to lay blocks; what was the default is the only one.
        kwargs.pop("draft_blocks", None)
        # Of those that were saved when confidences could be calibrated, which none but those of version 0.1 were.
        if kwargs.get("confidence_temperature") == 1.0:
            del kwargs["confidence_temperature"]
        if retired := sorted(set(kwargs) & set(_RETIRED_SETTINGS)):
            for name in retired:
                kwargs.pop(name)
            logger.warning(
                f"The generation settings are of version 0.1: {', '.join(retired)} are gone and left out, so that its "
                "canvas is decoded as a whole. For its donor's accuracy, convert the donor again with `from_whisper`, "
                "or use the default checkpoint; save the settings again to see this no more."
            )
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} are not settings of MDM-ASR's generation. See MDMASRGenerationConfig.")
        self.validate()

    @property
    def sampler_config(self) -> Sampler:
        """The sampler, also where `sampler` was set to a name or a dict."""
        return make_sampler(self.sampler)

    def to_dict(self) -> dict[str, Any]:
        """The settings as generation_config.json holds them."""
        return {**super().to_dict(), "sampler": self.sampler_config.to_dict()}

    @property
    def temperatures(self) -> list[float]:
        """The first one, and those for rows that the thresholds refuse."""
        return list(self.temperature) if isinstance(self.temperature, (list, tuple)) else [self.temperature]

    def map_ids(self, change: Callable[[int], int]) -> None:
        """Puts what `change` makes of them in the place of all token ids but the suppressed ones."""
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "no_speech_token_id"):
            if isinstance(token_id := getattr(self, name), int):
                setattr(self, name, change(token_id))
        if self.prompt_template is not None:
            self.prompt_template = map_prompt_ids(self.prompt_template, change)

    def validate(self, *args, **kwargs) -> None:
        """Raises ValueError on a setting that makes no sense; makes the [`Sampler`] of a name or dict."""
        self.sampler = make_sampler(self.sampler)
        optional = ("canvas_length", "max_new_tokens", "draft_length", "max_window_s")
        unset = {name for name in optional if getattr(self, name) is None}
        counts = {"canvas_length", "max_new_tokens", "draft_length", "max_denoising_steps", "max_length"}
        for name in sorted((counts | {"num_return_sequences"}) - unset):
            check_number(name, getattr(self, name), lowest=1, is_integer=True)
        numbers = {"canvas_tokens_per_s", "canvas_extra_tokens", "min_duration_s", "hotword_boost", "max_window_s"}
        for name in sorted(numbers - unset):
            check_number(name, getattr(self, name))
        if not self.temperatures:
            raise ValueError("`temperature` is an empty list. Set it to 0 for the most probable text.")
        for value in self.temperatures:
            check_number("temperature", value)
        for name in ("no_speech_threshold", "logprob_threshold", "compression_ratio_threshold"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise ValueError(f"`{name}` must be a number, or None to switch it off, got {value!r}.")
        branches = self.draft_branches
        if isinstance(branches, str) or not set(branches) <= set(BRANCHES):
            raise ValueError(f"`draft_branches` must be a list of some of {list(BRANCHES)}, got {branches!r}.")
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
        raise NotImplementedError("MDM-ASR has a `generate` of its own, and no generation mode of transformers'.")


def check_number(name: str, value: Any, lowest: float = 0, is_integer: bool = False) -> float:
    """Returns the value of a setting, or raises ValueError: no finite number, or integer, of at least `lowest`."""
    kind, types = ("an integer", int) if is_integer else ("a finite number", (int, float))
    if not isinstance(value, types) or isinstance(value, bool) or not lowest <= value < math.inf:
        raise ValueError(f"`{name}` must be {kind} of at least {lowest:g}, got {value!r}.")
    return value
