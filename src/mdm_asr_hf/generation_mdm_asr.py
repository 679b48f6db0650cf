# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""generate(): from audio features to token ids in a few denoising steps, for MDM-ASR (arXiv 2602.18952)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .alignment_mdm_asr import check_alignment_heads, token_timestamps
from .canvas_decoding_mdm_asr import CanvasDecodingMixin, is_bounded
from .canvas_mdm_asr import OPEN_ID, Canvas, OpenRows, draw_noise, read_draft, take_rows
from .confidence_mdm_asr import calibrate, utterance_confidence
from .encoder_mdm_asr import MDMASREncoderOutput
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .hotwords_mdm_asr import HotwordTrie
from .language_mdm_asr import settle_languages
from .no_speech_mdm_asr import no_speech_probability, with_confidence
from .prompt_mdm_asr import build_prompt_ids
from .repair_mdm_asr import repair
from .sampling_mdm_asr import SamplerConfig, make_sampler, propose_tokens, sampler_step

logger = logging.get_logger(__name__)

# What callers of autoregressive models pass by habit and what has no meaning for a canvas.
_IGNORED_ARGUMENTS = ("labels", "use_cache", "input_ids", "decoder_attention_mask")
_SAMPLER_SETTINGS = ("gamma", "lambda_", "k")
# Settings that None switches off; of others it means that the caller has no wish.
_MEANINGFUL_NONES = (
    "active_ahead",
    "canvas_length",
    "commit_ahead",
    "confidence_context",
    "no_speech",
    "revise_above",
)
# Names of prompt slots, so that one the checkpoint lacks is reported as such and not as an unknown argument.
_PROMPT_SLOTS = ("language", "target_language", "task", "punctuation", "itn", "timestamp", "diarize", "emotion")


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
        languages (`list[str]` of length B, *optional*): the language of each row's prompt, given or detected, by its
            code; None if the prompt has none or was given as ids. Detecting costs one evaluation of the decoder, on
            the start of the prompt alone, which `nfe` does not count. Where nothing is said it means little.
        token_timestamps (`torch.FloatTensor` of shape (B, W, 2), *optional*): start and end of each token in seconds,
            with `return_token_timestamps`; 0 for padding and for rows without speech. They cost one evaluation of the
            decoder, which `nfe` does not count.
        no_speech (`torch.FloatTensor` of shape (B,), *optional*): the probability that nothing was said, if the
            settings' `no_speech` tells how to find it. Rows above its threshold have an empty text; most are found
            before decoding, and have `nfe` 0.
    """

    sequences: torch.LongTensor | None = None
    confidence: torch.FloatTensor | None = None
    commit_steps: torch.LongTensor | None = None
    nfe: torch.LongTensor | None = None
    num_steps: int | None = None
    languages: list[str] | None = None
    token_timestamps: torch.FloatTensor | None = None
    no_speech: torch.FloatTensor | None = None


def _best_first(output: MDMASRGenerateOutput, num_samples: int) -> MDMASRGenerateOutput:
    """Sorts each utterance's samples among B * n rows by falling confidence; equal ones keep their order."""
    scores = torch.tensor([0.0 if one is None else one for one in utterance_confidence(output.confidence)])
    order = scores.view(-1, num_samples).argsort(dim=-1, descending=True, stable=True)
    rows = (order + torch.arange(0, len(scores), num_samples)[:, None]).flatten().to(output.sequences.device)
    return MDMASRGenerateOutput(
        **{name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in output.items()}
    )


class MDMASRGenerationMixin(CanvasDecodingMixin):
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
        draft_ids: torch.LongTensor | Sequence[Sequence[int]] | None = None,
        hotword_ids: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]] | None = None,
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
            a. run the decoder on prompt and canvas, or on the active window of them,
            b. revise what the steps before committed, if the settings say so,
            c. let the sampler commit positions,
            d. finish the rows whose text, up to the first EOS, is committed;
           then take doubled tokens out and refine around them, if the settings say so.
        5. Cut each row at its first EOS.
        ```

        Args:
            input_features (`torch.Tensor`): what the processor returns: (B, T, mel bins) or waveforms (B, N).
            attention_mask (`torch.Tensor` of shape (B, T) or (B, N), *optional*): 1 for the utterance, 0 for padding.
            generation_config ([`MDMASRGenerationConfig`], *optional*): instead of the model's own.
            decoder_input_ids (`torch.LongTensor` of shape (B, P), *optional*): a prompt of your own.
            encoder_outputs ([`MDMASREncoderOutput`], *optional*): of an earlier `encode`; needs `attention_mask` or
                `input_features` beside it for the adaptive canvas.
            draft_ids (`torch.LongTensor` of shape (B, K), or B lists, *optional*): what the canvas starts with instead
                of [MASK]: tokens that stay, and -100 where it is open. A canvas grows with its draft if it must.
            hotword_ids (`list[list[int]]`, or B such lists, *optional*): words to expect, from
                `processor.hotword_ids(words)`, for all rows or for each row its own. Their logits are raised where
                they fit, by `hotword_boost`, see `hotwords_mdm_asr`.
            generator (`torch.Generator` or a list of B, *optional*): for temperature > 0 and the random and DFM
                samplers. Of a list, each row's samples depend on its own generator alone.
            streamer (*optional*): `put_draft(value=canvas)` is called after every step, if it has that, `put` and
                `end` at the end.
            synced_gpus (`bool`): keep stepping until all processes are done (FSDP, DeepSpeed ZeRO-3).
            kwargs: any field of [`MDMASRGenerationConfig`], the sampler's settings (`gamma`, `lambda_`, `k`), and the
                prompt's slots (`language`, `target_language`, `punctuation`, `task`, ...), one value or one per row.
                `language="auto"` detects it, with models made of a multilingual Whisper.

        Returns:
            `torch.LongTensor` of shape (B, W): text tokens and the first EOS, then padding; or
            [`MDMASRGenerateOutput`]. With `num_return_sequences` n, B * n rows: the n samples of the first utterance,
            best first, then those of the second.

        Raises:
            ValueError: an unknown argument, features with NaN, audio longer than encoder or canvas can hold.
        """
        # 1. Settings.
        if "input_values" in kwargs:
            input_features = kwargs.pop("input_values")
        settings, prompt_slots = self._settle_generation_config(generation_config, kwargs)
        sampler = settings.sampler_config
        if settings.return_token_timestamps:
            check_alignment_heads(settings.alignment_heads, self.config.decoder_config)

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
        languages = None
        if decoder_input_ids is None:
            prompt_slots, languages = settle_languages(self, encoder_outputs, settings.prompt_template, prompt_slots)
        prompt_ids = self._prepare_prompt(decoder_input_ids, batch_size, settings, prompt_slots).to(device)
        duration_s = self.audio_duration_s(input_features, attention_mask)
        if draft_ids is not None:
            draft_ids = read_draft(draft_ids, batch_size, self.config.num_token_ids)
        no_speech, has_speech = self._judge_no_speech(encoder_outputs, has_speech, draft_ids, settings)
        lengths = self.canvas_lengths(duration_s, batch_size, prompt_ids.shape[1], settings, draft_ids)
        hotwords = None
        if hotword_ids is not None and settings.hotword_boost > 0:
            hotwords = HotwordTrie.build(hotword_ids, batch_size, self.config.decoder_config.vocab_size, device)
        generator = self._check_generator(generator, batch_size)
        num_samples = settings.num_return_sequences
        if num_samples > 1:
            if not (settings.temperature > 0 or sampler.needs_noise):
                raise ValueError(
                    f"`num_return_sequences={num_samples}` would return the same text each time. Set `temperature` "
                    "above 0, or take the sampler 'random' or 'dfm'."
                )
            rows = torch.arange(batch_size, device=device).repeat_interleave(num_samples)
            prompt_ids, encoder_outputs = prompt_ids[rows], take_rows(encoder_outputs, rows)
            hotwords = hotwords and hotwords.take_rows(rows)
            languages = languages and [one for one in languages for _ in range(num_samples)]
            draft_ids = None if draft_ids is None else draft_ids[rows.to(draft_ids.device)]
            has_speech = None if has_speech is None else has_speech[rows]
            no_speech = None if no_speech is None else no_speech[rows]
            lengths = [length for length in lengths for _ in range(num_samples)]
            if isinstance(generator, list):
                generator = [one for one in generator for _ in range(num_samples)]
        canvas = Canvas.lay(
            lengths,
            device,
            mask_token_id=self.config.mask_token_id,
            eos_token_id=self.config.eos_token_id,
            draft_ids=draft_ids,
            has_speech=has_speech,
        )
        if streamer is not None:
            streamer.put(prompt_ids.cpu())

        # 4. Denoise.
        def denoise() -> None:
            open_rows = OpenRows(prompt_ids, encoder_outputs)
            self._denoise(canvas, open_rows, settings, sampler, lengths, generator, hotwords, streamer, synced_gpus)

        denoise()
        for _ in range(settings.repair_rounds):
            is_open = repair(
                canvas,
                settings.repair_doubled_below,
                settings.repair_doubtful_below,
                settings.max_denoising_steps,
            )
            # With sharded weights every process takes part in every evaluation.
            if is_open or synced_gpus:
                denoise()

        if no_speech is not None:
            no_speech = self._reconsider_no_speech(canvas, no_speech, settings)

        # 5. Finalise.
        output = self._finalize(canvas, settings, duration_s)
        output.languages, output.no_speech = languages, no_speech
        if settings.return_token_timestamps:
            output.token_timestamps = token_timestamps(
                self,
                output.sequences,
                # A row without speech has an end of text that nothing was heard of.
                output.confidence > 0,
                lengths,
                prompt_ids,
                encoder_outputs,
                duration_s=duration_s,
                input_features=input_features,
                feature_mask=attention_mask,
                alignment_heads=settings.alignment_heads,
            )
        if num_samples > 1:
            output = _best_first(output, num_samples)
        if streamer is not None:
            streamer.put(output.sequences.cpu())
            streamer.end()
        return output if settings.return_dict_in_generate else output.sequences

    def _denoise(
        self,
        canvas: Canvas,
        open_rows: OpenRows,
        settings: MDMASRGenerationConfig,
        sampler: SamplerConfig,
        lengths: list[int],
        generator: torch.Generator | list[torch.Generator] | None,
        hotwords: HotwordTrie | None,
        streamer: Any,
        synced_gpus: bool,
    ) -> None:
        """
        Steps, in place, until every row of the canvas is finished; a row's last step, by `max_denoising_steps`,
        commits all it has open.
        """
        noisy = settings.temperature > 0 or sampler.needs_noise
        # Hotwords are put where the model alone would have put other words.
        is_revising = settings.revise_above is not None and not settings.temperature and hotwords is None
        candidates = canvas.open_positions()
        while self._any_unfinished(candidates, synced_gpus):
            is_open = candidates.any(dim=-1)
            if not synced_gpus:
                open_rows.narrow(is_open)
            near = candidates
            if settings.commit_ahead is not None and is_bounded(sampler):
                is_last = canvas.in_last_step(settings.max_denoising_steps)
                near = candidates & ((candidates.cumsum(dim=-1) <= settings.commit_ahead) | is_last[:, None])
            wanted = near
            if is_revising:
                wanted = near | (canvas.fresh(settings.revise_steps) & is_open[:, None])
            logits, within = self._canvas_logits(open_rows, canvas, wanted, settings, sampler)
            unbiased = proposed = None
            if is_revising:
                # Logits are large: each is read once, for both ends.
                tokens, log_probs, entropy = propose_tokens(logits)
                is_new = near[within]
                canvas.revise(within & ~near, tokens[~is_new], log_probs[~is_new], settings.revise_above)
                within, proposed = within & near, (tokens[is_new], log_probs[is_new], entropy[is_new])
            if hotwords is not None:
                unbiased = hotwords.raise_logits(
                    logits,
                    canvas.tokens,
                    within,
                    canvas.text_positions(),
                    boost=settings.hotword_boost,
                    threshold=settings.hotword_threshold,
                )
            step = sampler_step(
                sampler,
                logits,
                canvas.tokens,
                mask_token_id=canvas.mask_token_id,
                # A finished row has nothing to commit, whatever it has left.
                steps_left=(settings.max_denoising_steps - canvas.nfe).clamp(min=1),
                candidates=within,
                temperature=settings.temperature,
                noise=draw_noise(generator, lengths, canvas.tokens.device) if noisy else None,
                unbiased=unbiased,
                proposed=proposed,
            )
            canvas.commit(step, candidates)
            candidates = canvas.open_positions()
            if streamer is not None and hasattr(streamer, "put_draft"):
                streamer.put_draft(value=canvas.tokens.cpu())

    def _check_generator(self, generator: Any, batch_size: int) -> torch.Generator | list[torch.Generator] | None:
        if not isinstance(generator, (list, tuple)):
            return generator
        if len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries for a batch of {batch_size}. Pass one per row."
            )
        return list(generator)

    def _settle_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[MDMASRGenerationConfig, dict[str, Any]]:
        """
        Merges the sources of settings; returns them and the prompt's slots. Leaves the originals untouched. It is not
        named `_prepare_generation_config`: pipelines of transformers before 5.23 look for that and call it otherwise.
        """
        # A shallow copy does, and takes no time: values are put in the place of others, never changed themselves.
        settings = copy.copy(self.generation_config)
        if isinstance(generation_config, MDMASRGenerationConfig):
            settings = copy.copy(generation_config)
        elif generation_config is not None:
            # A plain GenerationConfig, as stock code makes them: take over what has a meaning here.
            for key, value in generation_config.to_diff_dict().items():
                if hasattr(settings, key) and value is not None and key != "transformers_version":
                    setattr(settings, key, value)
        template_slots = (settings.prompt_template or {}).get("slots", {})
        prompt_slots, sampler_settings, unknown = {}, {}, []
        for key, value in kwargs.items():
            if key in _IGNORED_ARGUMENTS or (value is None and key not in _MEANINGFUL_NONES):
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

    def _judge_no_speech(
        self,
        encoder_outputs: MDMASREncoderOutput,
        has_speech: torch.BoolTensor | None,
        draft_ids: torch.LongTensor | None,
        settings: MDMASRGenerationConfig,
    ) -> tuple[torch.Tensor | None, torch.BoolTensor | None]:
        """The probability (B,) that nothing was said, 1 where there is no signal, and which rows (B,) to decode."""
        if settings.no_speech is None:
            return None, has_speech
        no_speech = no_speech_probability(encoder_outputs, settings.no_speech)
        if has_speech is not None:
            no_speech = no_speech.masked_fill(~has_speech, 1.0)
        is_speech = no_speech <= settings.no_speech["threshold"]
        if draft_ids is not None:
            # What was committed stays: somebody heard it.
            is_speech = is_speech | (draft_ids != OPEN_ID).any(dim=-1).to(is_speech.device)
        return no_speech, is_speech if has_speech is None else is_speech & has_speech

    def _reconsider_no_speech(
        self, canvas: Canvas, no_speech: torch.Tensor, settings: MDMASRGenerationConfig
    ) -> torch.Tensor:
        """The probability (B,) that nothing was said, now that rows are decoded; empties, in place, those that then
        are above the threshold."""
        is_text = canvas.text_positions() & (canvas.tokens != canvas.eos_token_id) & (canvas.confidence > 0)
        no_speech = with_confidence(no_speech, canvas.confidence, is_text, settings.no_speech)
        is_drafted = canvas.drafted().any(dim=-1)
        canvas.empty((no_speech > settings.no_speech["threshold"]) & ~is_drafted)
        return no_speech

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
        self,
        duration_s: torch.Tensor | None,
        batch_size: int,
        prompt_length: int,
        settings: MDMASRGenerationConfig,
        draft_ids: torch.LongTensor | None = None,
    ) -> list[int]:
        """
        Canvas tokens of each row, from the settings and the rows' durations (B,) in seconds; at least the draft's (B,
        K) and an end of text.

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
        lengths = [max(min(length, limit), 1) for length in lengths]
        if draft_ids is None or draft_ids.shape[1] == 0:
            return lengths
        drafted = ((draft_ids != OPEN_ID) * torch.arange(1, draft_ids.shape[1] + 1, device=draft_ids.device)).amax(-1)
        # One more for the end of text, unless the draft has it.
        needed = (drafted + 1 - (draft_ids == self.config.eos_token_id).any(dim=-1).long()).tolist()
        if max(needed) > limit:
            raise ValueError(f"`draft_ids` need a canvas of {max(needed)} tokens, but it may have at most {limit}.")
        return [max(pair) for pair in zip(lengths, needed, strict=True)]

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

    def _any_unfinished(self, candidates: torch.BoolTensor, synced_gpus: bool) -> bool:
        unfinished = candidates.any()
        if synced_gpus and torch.distributed.is_available() and torch.distributed.is_initialized():
            # A process that stopped early would leave the others waiting in the sharded layers.
            flag = unfinished.float()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            unfinished = flag > 0
        return bool(unfinished)

    def _finalize(
        self, canvas: Canvas, settings: MDMASRGenerationConfig, duration_s: torch.Tensor | None
    ) -> MDMASRGenerateOutput:
        """Cuts rows behind their first EOS and calibrates the confidences."""
        if num_full := canvas.num_full():
            logger.warning(
                f"{num_full} of {len(canvas.tokens)} canvases of up to {canvas.tokens.shape[1]} tokens filled up "
                "without an end of text, so "
                "the end of their speech may be missing. Set a larger `canvas_length` (or `canvas_tokens_per_s`, "
                "`max_new_tokens`), or split the audio."
            )
        pad_token_id = self.config.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
        sequences, confidence, commit_steps = canvas.cut(pad_token_id)
        confidence = calibrate(
            confidence,
            settings.confidence_temperature,
            settings.confidence_bias,
            settings.confidence_context,
            None if duration_s is None else duration_s.repeat_interleave(settings.num_return_sequences),
        )
        return MDMASRGenerateOutput(
            sequences=sequences,
            confidence=confidence,
            commit_steps=commit_steps,
            nfe=canvas.nfe,
            num_steps=int(canvas.nfe.max()),
        )

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


__all__ = ["MDMASRGenerateOutput", "MDMASRGenerationMixin"]
