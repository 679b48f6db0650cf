# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
generate(), whatever runs the model: from audio features to token ids. Beside the model's own evaluations all of it is
done in NumPy, by what PyTorch's models and ONNX Runtime's share.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .alignment_mdm_asr import check_alignment_heads, token_timestamps
from .drafting_mdm_asr import Hypothesis, to_numpy
from .generation_configuration_mdm_asr import CANVAS_SETTINGS, DRAFT_SETTINGS, MDMASRGenerationConfig
from .hotwords_mdm_asr import HotwordAutomaton
from .prompt_mdm_asr import build_prompt_ids, settle_languages
from .safeguards_mdm_asr import is_suspicious, loop_length, mean_log_prob, repeats_itself
from .sampling_mdm_asr import make_sampler
from .verified_decoding_mdm_asr import VerifiedDecoder, VerifiedText

logger = logging.getLogger(__name__)

# What callers of other models pass by habit and what has no meaning here.
_IGNORED_ARGUMENTS = ("labels", "use_cache", "input_ids", "decoder_attention_mask")
_SAMPLER_SETTINGS = ("gamma", "lambda_", "k")
# Settings that None switches off; of others it means that the caller has no wish.
_MEANINGFUL_NONES = (
    *("canvas_length", "no_speech_threshold", "logprob_threshold", "compression_ratio_threshold"),
    *("suppress_tokens", "begin_suppress_tokens", "no_speech_token_id"),
)
# Names of prompt slots, so that one the checkpoint lacks is reported as such and not as an unknown argument.
_PROMPT_SLOTS = ("language", "target_language", "task", "punctuation", "itn", "timestamp", "diarize", "emotion")
# What Whisper's encoder was trained with, all in all.
STOCK_DURATION_S = 30.0


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@dataclass
class GenerateOutput:
    """
    Output of `generate(return_dict_in_generate=True)`: arrays, or tensors of PyTorch's models.

    Args:
        sequences (`torch.LongTensor` of shape (B, W)): text tokens and the first EOS, then padding.
        confidence (`torch.FloatTensor` of shape (B, W)): each token's probability, as the donor or, on a canvas, the
            step that committed it gave it; 1 for a prefix that was given, 0 for padding.
        commit_steps (`torch.LongTensor` of shape (B, W)): the evaluation, counted from 1, that committed each token; 0
            for padding and for a prefix.
        nfe (`torch.LongTensor` of shape (B,)): decoder evaluations until the row was finished; those of texts that
            Whisper's thresholds refused are counted too.
        num_steps (`int`): decoder evaluations of the whole batch, the largest of `nfe`.
        tokens_per_evaluation (`torch.FloatTensor` of shape (B,)): tokens of the text and its end, by `nfe`.
        accepted_drafts, rejected_drafts (`torch.LongTensor` of shape (B, 2), *optional*): of the masks and of the
            hypothesis, how many the donor said itself and how many not. A token that both drafted counts for both.
        token_branches (`torch.LongTensor` of shape (B, W), *optional*): 0 for the donor's own tokens, 1 and 2 for
            accepted drafts of the masks and of the hypothesis.
        struck_drafts (`list` of B lists of `(place, branch, ids)`, *optional*): rejected drafts, the place in the text
            where they stood, and what drafted them (0, 1).
        languages (`list[str]` of length B, *optional*): the language of each row's prompt, given or detected, by its
            code; None if the prompt has none or was given as ids. Detecting costs one evaluation of the decoder, on
            the start of the prompt alone, which `nfe` does not count. Where nothing is said it means little.
        token_timestamps (`torch.FloatTensor` of shape (B, W, 2), *optional*): start and end of each token in seconds,
            with `return_token_timestamps`; 0 for padding and for rows without speech. They cost one evaluation of the
            decoder, which `nfe` does not count.
        no_speech (`torch.FloatTensor` of shape (B,), *optional*): the donor's probability of <|nospeech|>.
    """

    sequences: Any = None
    confidence: Any = None
    commit_steps: Any = None
    nfe: Any = None
    num_steps: int | None = None
    tokens_per_evaluation: Any = None
    accepted_drafts: Any = None
    rejected_drafts: Any = None
    token_branches: Any = None
    struck_drafts: list | None = None
    languages: list[str] | None = None
    token_timestamps: Any = None
    no_speech: Any = None


def utterance_confidence(confidence: Any) -> list[float | None]:
    """
    Confidence of each utterance: the geometric mean of its tokens' confidences (B, W), its end of text included. None
    for one that nothing was decoded of.
    """
    # Every committed token has a probability above 0. Padding, and the end of text a row without speech is given, have
    # 0.
    rows = [[one for one in row if one > 0] for row in confidence.tolist()]
    return [math.exp(sum(map(math.log, row)) / len(row)) if row else None for row in rows]


def _best_first(output: GenerateOutput, num_samples: int) -> GenerateOutput:
    """Sorts each utterance's samples among B * n rows by falling confidence; equal ones keep their order."""
    scores = np.array([0.0 if one is None else one for one in utterance_confidence(output.confidence)])
    order = (-scores).reshape(-1, num_samples).argsort(axis=-1, kind="stable")
    rows = (order + np.arange(0, len(scores), num_samples)[:, None]).ravel()

    def sort(name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value[rows]
        return [value[row] for row in rows.tolist()] if name == "struck_drafts" and value is not None else value

    return GenerateOutput(**{name: sort(name, value) for name, value in vars(output).items()})


@dataclass
class Batch:
    """What is to be decoded: features (B, ...) and durations (B,), and of the B * `num_samples` rows the encoder's
    outputs, prompts (B * n, P), languages, which of them hold a signal, and what the caller knows of their texts."""

    input_features: Any
    attention_mask: Any
    duration_s: np.ndarray | None
    num_samples: int
    encoder_outputs: Any
    is_encoded_here: bool
    prompt_ids: np.ndarray
    languages: list[str] | None
    has_speech: np.ndarray
    previous_ids: list[list[int]] | None
    prefix_ids: list[list[int]] | None
    draft_ids: list[list[int]] | None
    hotwords: HotwordAutomaton | None
    generator: Any
    streamer: Any
    synced_gpus: bool

    def features(self, rows: np.ndarray) -> tuple[Any, Any]:
        """Features and mask of some rows."""
        rows = rows // self.num_samples
        return self.input_features[rows], None if self.attention_mask is None else self.attention_mask[rows]


# What a text is decoded by: prompt and text, or canvas, (B * n, S); the positions of each row's own canvas; and where
# the text begins.
Read = tuple[np.ndarray, np.ndarray | None, np.ndarray]


class GenerationMixin:
    """
    The part of a model that turns audio into text. What a model gives:
    - `config`, `generation_config`,
    - `encode`, `prepare_cross_attention`, `audio_duration_s` and `take_rows` of its own arrays,
    - `begin_steps`, see [`TorchSteps`]; `prompt_logits` and `cross_attention`, which take and return NumPy's,
    - `to_output`, which makes arrays its own, and `draw_seeds`.
    """

    # What is raised where a batch does not fit.
    memory_errors: tuple[type[Exception], ...] = (MemoryError,)

    def generate(
        self,
        input_features: Any = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        *,
        decoder_input_ids: Any = None,
        encoder_outputs: Any = None,
        previous_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        prefix_ids: Sequence[Sequence[int]] | None = None,
        draft_ids: Sequence[Sequence[int]] | None = None,
        hotword_ids: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]] | None = None,
        generator: Any = None,
        streamer: Any = None,
        synced_gpus: bool = False,
        **kwargs,
    ) -> Any:
        """
        Transcribes a batch: settles the settings (generation_config.json < `generation_config` < keyword arguments),
        encodes the audio once, and decodes: with drafts the donor's own text, see `verified_decoding_mdm_asr`, else
        the paper's canvas, see `canvas_mdm_asr`.

        Args:
            input_features (`torch.Tensor`): what the processor returns: (B, T, mel bins) or waveforms (B, N).
            attention_mask (`torch.Tensor` of shape (B, T) or (B, N), *optional*): 1 for the utterance, 0 for padding.
            generation_config ([`MDMASRGenerationConfig`], *optional*): instead of the model's own.
            decoder_input_ids (`torch.LongTensor` of shape (B, P), *optional*): a prompt of your own.
            encoder_outputs ([`MDMASREncoderOutput`], *optional*): of an earlier `encode`; needs `attention_mask` or
                `input_features` beside it for the adaptive canvas.
            previous_ids (`list[int]` or B such lists, *optional*): the text before this audio, which a Whisper donor
                takes as context, from `processor.previous_ids(text)`.
            prefix_ids (`list[list[int]]` of length B, *optional*): tokens that each text begins with.
            draft_ids (`list[list[int]]` of length B, *optional*): what each text may be, such as an earlier
                hypothesis. The donor verifies it.
            hotword_ids (`list[list[int]]`, or B such lists, *optional*): words to expect, from
                `processor.hotword_ids(words)`, for all rows or for each row its own. Their logits are raised where
                they fit, by `hotword_boost`, see `hotwords_mdm_asr`.
            generator (`int`, `torch.Generator` or a list of B, *optional*): for temperature > 0 and the random and DFM
                samplers; a number is a seed. Of a list, each row's samples depend on its own generator alone.
            streamer (*optional*): `put_draft(value=ids)` is called after every evaluation, if it has that, and before
                the first of a text that drafts begin; `put` and `end` at the end. With drafts, `num_committed` (B,)
                tells how many of the ids are committed.
            synced_gpus (`bool`): keep stepping until all processes are done (FSDP, DeepSpeed ZeRO-3).
            kwargs: any field of [`MDMASRGenerationConfig`], the sampler's settings (`gamma`, `lambda_`, `k`), and the
                prompt's slots (`language`, `target_language`, `punctuation`, `task`, ...), one value or one per row.
                `language="auto"` detects it, with models made of a multilingual Whisper.

        Returns:
            `torch.LongTensor` of shape (B, W): text tokens and the first EOS, then padding; or
            [`MDMASRGenerateOutput`]. With `num_return_sequences` n, B * n rows: the n samples of the first utterance,
            best first, then those of the second. [`OnnxMDMASR`] takes and returns arrays of NumPy.

        Raises:
            ValueError: an unknown argument, one that the kind of checkpoint cannot use, features with NaN, audio
                longer than encoder or canvas can hold.
        """
        if "input_values" in kwargs:
            input_features = kwargs.pop("input_values")
        known = {"previous_ids": previous_ids, "prefix_ids": prefix_ids, "draft_ids": draft_ids}
        given = {name for name, value in {**known, "hotword_ids": hotword_ids}.items() if value is not None}
        settings, prompt_slots = self._settle_generation_config(generation_config, kwargs, given)
        batch = self._prepare(
            *(input_features, attention_mask, encoder_outputs),
            *(decoder_input_ids, prompt_slots, known, hotword_ids, settings),
            generator=generator,
            streamer=streamer,
            synced_gpus=synced_gpus,
        )
        if streamer is not None:
            streamer.put(self.to_output(batch.prompt_ids))
        decode = self._decode_verified if self.config.has_drafts else self._decode_canvas
        output, read = decode(batch, settings)
        output = self._finish(output, read, batch, settings)
        if streamer is not None:
            streamer.put(self.to_output(output.sequences))
            streamer.end()
        return self.to_output(output if settings.return_dict_in_generate else output.sequences, batch.encoder_outputs)

    def _prepare(
        self,
        input_features: Any,
        attention_mask: Any,
        encoder_outputs: Any,
        decoder_input_ids: Any,
        prompt_slots: dict[str, Any],
        known: dict[str, Any],
        hotword_ids: Any,
        settings: MDMASRGenerationConfig,
        generator: Any,
        **passed_on: Any,
    ) -> Batch:
        """Encodes the audio, settles the prompts, and checks what the caller knows of the texts."""
        if input_features is None and encoder_outputs is None:
            raise ValueError(
                "`generate` needs `input_features` or `encoder_outputs`. Get the former from the processor."
            )
        has_speech, is_encoded_here = None, encoder_outputs is None
        if input_features is not None:
            has_speech, attention_mask = self.find_speech(input_features, attention_mask, settings.min_duration_s)
        if is_encoded_here:
            encoder_outputs = self.encode(input_features, attention_mask)
        encoder_outputs = self.prepare_cross_attention(encoder_outputs)
        batch_size, languages = len(encoder_outputs.last_hidden_state), None
        if decoder_input_ids is None:
            prompt_slots, languages = settle_languages(self, encoder_outputs, settings.prompt_template, prompt_slots)
        duration_s = self.audio_duration_s(input_features, attention_mask)
        batch = Batch(
            input_features,
            attention_mask,
            duration_s=None if duration_s is None else to_numpy(duration_s),
            num_samples=settings.num_return_sequences,
            encoder_outputs=encoder_outputs,
            is_encoded_here=is_encoded_here,
            prompt_ids=self._prepare_prompt(decoder_input_ids, batch_size, settings, prompt_slots),
            languages=languages,
            has_speech=np.ones(batch_size, dtype=bool) if has_speech is None else has_speech,
            hotwords=None,
            generator=self._check_generator(generator, batch_size),
            **{name: self._check_rows(name, ids, batch_size) for name, ids in known.items()},
            **passed_on,
        )
        if hotword_ids is not None and settings.hotword_boost > 0:
            batch.hotwords = HotwordAutomaton.build(hotword_ids, batch_size, self.config.vocab_size)
        if batch.num_samples > 1:
            self._check_samples(settings)
            rows = np.arange(batch_size).repeat(batch.num_samples)
            batch.prompt_ids, batch.has_speech = batch.prompt_ids[rows], batch.has_speech[rows]
            batch.encoder_outputs = self.take_rows(encoder_outputs, rows)
            batch.hotwords = batch.hotwords and batch.hotwords.take_rows(rows.tolist())
            for name in ("languages", *known):
                values = getattr(batch, name)
                setattr(batch, name, values and [values[row] for row in rows.tolist()])
        return batch

    def _finish(
        self, output: GenerateOutput, read: Read, batch: Batch, settings: MDMASRGenerationConfig
    ) -> GenerateOutput:
        """The output with languages and times, of several samples the best first."""
        output.languages = batch.languages
        if settings.return_token_timestamps:
            output.token_timestamps = token_timestamps(
                self,
                output.sequences,
                # A row without speech has an end of text that nothing was heard of.
                output.confidence > 0,
                *read,
                batch.encoder_outputs,
                duration_s=batch.duration_s,
                input_features=batch.input_features,
                feature_mask=batch.attention_mask,
                alignment_heads=settings.alignment_heads,
            )
        return output if batch.num_samples == 1 else _best_first(output, batch.num_samples)

    def _decode_verified(self, batch: Batch, settings: MDMASRGenerationConfig) -> tuple[GenerateOutput, Read]:
        """The donor's own text, and anew what Whisper's thresholds refuse."""
        prompts = self._with_previous(batch.prompt_ids.tolist(), batch.previous_ids, settings)
        prefixes = batch.prefix_ids or [[] for _ in prompts]
        limits = self._text_limits(prompts, prefixes, settings)
        seeds, streamer = self._seeds(batch, settings.temperatures), batch.streamer
        # Times of tokens read the frames again, and what is written again may.
        may_spend = batch.is_encoded_here and self._has_stock(batch) and not settings.return_token_timestamps
        # What is certain to be refused need not be written to its end.
        is_tried_again = not batch.synced_gpus and (self._has_stock(batch) or len(settings.temperatures) > 1)
        may_stop = is_tried_again and settings.compression_ratio_threshold is not None

        def show(texts: list[list[int]], committed: list[int]) -> None:
            value = np.full((len(texts), max(map(len, texts))), self.config.pad_token_id)
            for row, ids in zip(value, texts, strict=True):
                row[: len(ids)] = ids
            streamer.put_draft(value=self.to_output(value), num_committed=self.to_output(np.array(committed)))

        def write(
            rows: np.ndarray, outputs: Any, is_open: np.ndarray, temperature: float, may_stop: bool = may_stop
        ) -> VerifiedText:
            places = rows.tolist()
            text = VerifiedText.begin([prompts[row] for row in places], [prefixes[row] for row in places], max(limits))
            # What is decoded anew is not shown: it may be a part of the batch.
            is_shown = hasattr(streamer, "put_draft") and len(places) == len(prompts)
            hypotheses = self._hypotheses(places, batch.draft_ids, settings)

            def write_open(model: Any, is_open: np.ndarray) -> None:
                decoder = VerifiedDecoder(
                    model,
                    text,
                    outputs,
                    settings,
                    limits=[limits[row] for row in places],
                    is_open=is_open,
                    prompt_length=batch.prompt_ids.shape[1],
                    hypotheses=hypotheses,
                    temperature=temperature,
                    seeds=seeds[rows],
                    hotwords=batch.hotwords and batch.hotwords.take_rows(places),
                    synced_gpus=batch.synced_gpus,
                    may_spend=may_spend or outputs is not batch.encoder_outputs,
                    stops_loops=may_stop,
                )
                decoder.run(show if is_shown else None)

            if is_shown or batch.synced_gpus:
                write_open(self, is_open)
            else:
                self.write_rows(write_open, is_open, outputs)
            if may_spend and outputs is batch.encoder_outputs:
                self.spend(outputs)
            return text

        text = write(np.arange(len(prompts)), batch.encoder_outputs, batch.has_speech, settings.temperatures[0])
        # Where processes wait for each other, one cannot take more steps than the others know of.
        if not batch.synced_gpus:
            self._write_again(text, write, batch, settings)
        output = self._text_output(text, batch.has_speech & ~self._silent(text, settings), settings)
        return output, (text.tokens[:, : text.lengths.max()], None, text.starts)

    def _write_again(
        self, text: VerifiedText, write: Callable[..., VerifiedText], batch: Batch, settings: MDMASRGenerationConfig
    ) -> None:
        """Puts other texts in the places of those that are refused: one with the silence that Whisper's encoder was
        trained with, then, where it still repeats itself, others at rising temperatures. Of texts that are all
        refused, one that does not repeat itself stays, of these the most probable; a loop is written to its end."""
        temperatures = settings.temperatures
        has_stock = self._has_stock(batch)
        refused = self._refused(text, batch.has_speech, settings, is_own=has_stock)
        if not has_stock:
            # What is only improbable is no better drawn than it is: the temperature rises for what repeats itself.
            refused, temperatures = refused & self._repeating(text, settings), temperatures[1:]
        stock, stock_rows = batch.encoder_outputs, np.arange(len(refused))
        # The attempt whose text stays, the first being 0.
        kept = np.zeros(len(refused), dtype=np.int64)
        for attempt, temperature in enumerate(temperatures, start=1):
            rows = refused.nonzero()[0]
            if not len(rows):
                break
            if has_stock and attempt == 1:
                stock_rows = rows
                stock = self.encode(*batch.features(rows), trailing_silence_s=STOCK_DURATION_S)
                stock = self.prepare_cross_attention(stock)
            every = np.ones(len(rows), dtype=bool)
            again = write(rows, self.take_rows(stock, np.searchsorted(stock_rows, rows)), every, temperature)
            ranks = ((self._rank(again, i, settings), self._rank(text, row, settings)) for i, row in enumerate(rows))
            better = np.array([new >= old for new, old in ranks])
            still = self._refused(again, every, settings)
            text.replace(rows, again, better | ~still)
            kept[rows[better | ~still]] = attempt
            refused[rows] = still & self._repeating(again, settings)
        for attempt in np.unique(kept[text.is_stopped]):
            rows = (text.is_stopped & (kept == attempt)).nonzero()[0]
            if attempt:
                outputs = self.take_rows(stock, np.searchsorted(stock_rows, rows))
            elif has_stock and batch.is_encoded_here:
                # They may have been spent.
                outputs = self.prepare_cross_attention(self.encode(*batch.features(rows)))
            else:
                outputs = self.take_rows(batch.encoder_outputs, rows)
            temperature, every = [settings.temperatures[0], *temperatures][attempt], np.ones(len(rows), dtype=bool)
            text.replace(rows, write(rows, outputs, every, temperature, may_stop=False), every)

    def _has_stock(self, batch: Batch) -> bool:
        """Whether what is refused is encoded anew, with the silence that the encoder was trained with."""
        return batch.input_features is not None and self.config.encoder_config.model_type == "whisper"

    def _with_previous(
        self, prompts: list[list[int]], previous_ids: list[list[int]] | None, settings: MDMASRGenerationConfig
    ) -> list[list[int]]:
        """Prompts with the text before them, its last tokens, as many as Whisper takes: half of its positions."""
        if previous_ids is None:
            return prompts
        start = (settings.prompt_template or {}).get("previous")
        if start is None:
            raise ValueError("`previous_ids`: this model's prompt has no place for earlier text. Leave them out.")
        most = self.config.decoder_config.max_position_embeddings // 2 - 1
        return [
            [start, *previous[-most:], *prompt] if previous else prompt
            for prompt, previous in zip(prompts, previous_ids, strict=True)
        ]

    def _text_limits(
        self, prompts: list[list[int]], prefixes: list[list[int]], settings: MDMASRGenerationConfig
    ) -> list[int]:
        """The most tokens of each row, prompt included."""
        capacity = min(settings.max_length, self.config.decoder_config.max_position_embeddings)
        limits = [min(len(prompt) + (settings.max_new_tokens or capacity), capacity) for prompt in prompts]
        for prompt, prefix, limit in zip(prompts, prefixes, limits, strict=True):
            if len(prompt) + len(prefix) >= limit:
                raise ValueError(
                    f"Prompt and `prefix_ids` have {len(prompt) + len(prefix)} tokens, but with a token of text at "
                    f"most {limit} fit. Shorten them, or raise `max_length` or `max_new_tokens`."
                )
        return limits

    def _hypotheses(
        self, rows: list[int], draft_ids: list[list[int]] | None, settings: MDMASRGenerationConfig
    ) -> list[Hypothesis | None]:
        """What the caller takes some rows' texts for; of `draft_ids` (B lists), those of these rows."""
        if draft_ids is None or "hypothesis" not in settings.draft_branches:
            return [None] * len(rows)
        eos = self.config.eos_token_id
        return [Hypothesis([i for i in draft_ids[row] if i != eos], eos) for row in rows]

    def _refused(
        self, text: VerifiedText, decoded: np.ndarray, settings: MDMASRGenerationConfig, is_own: bool = False
    ) -> np.ndarray:
        """The rows (B,) whose text Whisper's thresholds refuse, silence excepted; on frames of the audio's own length,
        which have less silence than Whisper was trained with, also those that look like a loop."""
        bound, log_prob_bound = settings.compression_ratio_threshold, settings.logprob_threshold
        if bound is None and log_prob_bound is None:
            return np.zeros_like(decoded)
        refused = []
        for row in range(len(decoded)):
            repeats = self._repeats(text, row, settings)
            repeats = repeats or (is_own and bound is not None and is_suspicious(text.decoded_ids(row)))
            is_improbable = log_prob_bound is not None and mean_log_prob(text.row_log_probs(row)) < log_prob_bound
            refused.append(repeats or is_improbable)
        return np.array(refused) & decoded & ~self._silent(text, settings)

    def _silent(self, text: VerifiedText, settings: MDMASRGenerationConfig) -> np.ndarray:
        """The rows (B,) in which nobody speaks."""
        threshold = settings.no_speech_threshold
        return text.no_speech > (1.0 if threshold is None else threshold)

    def _repeats(self, text: VerifiedText, row: int, settings: MDMASRGenerationConfig) -> bool:
        return repeats_itself(text.text_ids(row), self.config.vocab_size, settings.compression_ratio_threshold)

    def _repeating(self, text: VerifiedText, settings: MDMASRGenerationConfig) -> np.ndarray:
        """The rows (B,) whose text repeats itself."""
        return np.array([self._repeats(text, row, settings) for row in range(len(text.lengths))])

    def _rank(self, text: VerifiedText, row: int, settings: MDMASRGenerationConfig) -> tuple[bool, float]:
        """What a refused text is better by than another: it does not repeat itself, and is more probable, a loop up to
        where it is one."""
        length = loop_length(text.decoded_ids(row))
        return not self._repeats(text, row, settings), mean_log_prob(text.row_log_probs(row)[:length])

    def _pad_token_id(self, settings: MDMASRGenerationConfig) -> int:
        return self.config.pad_token_id if settings.pad_token_id is None else settings.pad_token_id

    def _check_rows(self, name: str, ids: Any, batch_size: int) -> list[list[int]] | None:
        """Token ids as B lists; one list of `previous_ids` is for all rows."""
        if ids is None:
            return None
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
        if name == "previous_ids" and all(isinstance(row, int) for row in rows):
            rows = [rows] * batch_size
        if len(rows) != batch_size or not all(isinstance(row, (list, tuple)) for row in rows):
            raise ValueError(f"`{name}` must be a list of {batch_size} lists of token ids, one per utterance.")
        if any(type(i) is not int or not 0 <= i < self.config.vocab_size for row in rows for i in row):
            raise ValueError(f"`{name}` must be token ids below {self.config.vocab_size}.")
        return [list(row) for row in rows]

    def _check_samples(self, settings: MDMASRGenerationConfig) -> None:
        draws = not self.config.has_drafts and settings.sampler.needs_noise
        if not (settings.temperatures[0] > 0 or draws):
            raise ValueError(
                f"`num_return_sequences={settings.num_return_sequences}` would return the same text each time. Set "
                "`temperature` above 0"
                + ("." if self.config.has_drafts else ", or take the sampler 'random' or 'dfm'.")
            )

    def _settle_generation_config(
        self, generation_config: Any, kwargs: dict[str, Any], given: set[str]
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
            # A plain GenerationConfig of transformers, as stock code makes them: take over what has a meaning here.
            for key, value in generation_config.to_diff_dict().items():
                if hasattr(settings, key) and value is not None and key != "transformers_version":
                    setattr(settings, key, value)
        prompt_slots, sampler_settings, values = self._sort_arguments(kwargs, given, settings)
        for name, value in values.items():
            setattr(settings, name, value)
        settings.sampler = make_sampler(settings.sampler, **sampler_settings)
        settings.validate()
        self._check_kind(settings)
        if settings.return_token_timestamps:
            check_alignment_heads(settings.alignment_heads, self.config.decoder_config)
        if settings.num_beams not in (None, 1):
            _warn_once(f"`num_beams={settings.num_beams}` is ignored: masked diffusion has no beams.")
        eos = settings.eos_token_id
        if eos is not None and self.config.eos_token_id not in (eos if isinstance(eos, list) else [eos]):
            raise ValueError(
                f"`eos_token_id={eos}` contradicts the model's {self.config.eos_token_id}, with which its canvas was "
                "trained. "
                "Leave it out."
            )
        return settings, prompt_slots

    def _sort_arguments(
        self, kwargs: dict[str, Any], given: set[str], settings: MDMASRGenerationConfig
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Keyword arguments as slots of the prompt, settings of the sampler, and other settings."""
        has_drafts, kinds = self.config.has_drafts, ("a canvas", "drafts")
        wrong = set(kwargs) & set(CANVAS_SETTINGS) if has_drafts else set(kwargs) & set(DRAFT_SETTINGS) | given
        if wrong:
            raise ValueError(
                f"{sorted(wrong)} are for checkpoints with {kinds[not has_drafts]}, but this one decodes with "
                f"{kinds[has_drafts]}. Leave them out, or load another checkpoint."
            )
        slots = set((settings.prompt_template or {}).get("slots", {})) | set(_PROMPT_SLOTS)
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if name not in _IGNORED_ARGUMENTS and (value is not None or name in _MEANINGFUL_NONES)
        }
        settable = {name for name in vars(settings) if not name.startswith("_")}
        if unknown := sorted(set(kwargs) - slots - settable - set(_SAMPLER_SETTINGS)):
            raise ValueError(f"{unknown} are not arguments of MDM-ASR's `generate`. See MDMASRGenerationConfig.")
        of_prompt = {name: value for name, value in kwargs.items() if name in slots}
        of_sampler = {name: value for name, value in kwargs.items() if name in _SAMPLER_SETTINGS}
        return of_prompt, of_sampler, {n: value for n, value in kwargs.items() if n not in of_prompt | of_sampler}

    def _check_kind(self, settings: MDMASRGenerationConfig) -> None:
        """Raises ValueError where the checkpoint cannot do what the settings ask for."""
        sampler, config, vocab_size = settings.sampler, self.config, self.config.vocab_size
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if wrong := [i for i in getattr(settings, name) or () if not 0 <= i < vocab_size]:
                raise ValueError(f"`{name}` has {wrong[:5]}, but ids go from 0 to {vocab_size - 1}.")
        if not config.has_drafts:
            if len(settings.temperatures) > 1:
                raise ValueError("`temperature` must be one number: a canvas has no fallbacks.")
            return
        if sampler.name != "pbeb_conf" or sampler.lambda_ is not None:
            raise ValueError(
                f"`sampler` {sampler.to_dict()} cannot be used by a checkpoint with drafts, which are proposed from "
                "left to right: its sampler is 'pbeb_conf' with `lambda_` None, and `gamma` is free. Convert the "
                "donor with `draft_layers=0` for the others."
            )
        most = config.decoder_config.draft_length
        if settings.draft_length is not None and settings.draft_length > most:
            raise ValueError(f"`draft_length` ({settings.draft_length}) must be at most the checkpoint's {most}.")

    def _seeds(self, batch: Batch, temperatures: list[float]) -> np.ndarray:
        """A seed for each row (B * n,). Texts that fall back to a temperature are drawn alike in every batch, unless
        there are generators."""
        generator, num_rows = batch.generator, len(batch.prompt_ids)
        if generator is None and temperatures[0] == 0:
            return np.zeros(num_rows, dtype=np.int64)
        if isinstance(generator, list):
            return np.concatenate([self.draw_seeds(one, batch.num_samples) for one in generator])
        return self.draw_seeds(generator, num_rows)

    def draw_seeds(self, generator: Any, number: int) -> np.ndarray:
        """Seeds (N,) by a generator, a number, or None."""
        if not isinstance(generator, np.random.Generator):
            generator = np.random.default_rng(generator)
        return generator.integers(2**31, size=number)

    def _text_output(
        self, text: VerifiedText, has_text: np.ndarray, settings: MDMASRGenerationConfig
    ) -> GenerateOutput:
        """The texts without their prompts; an end of text alone, of confidence 0, for rows (B,) without one."""
        eos, num_full = self.config.eos_token_id, 0
        lengths = np.where(has_text, text.lengths - text.starts, 1)
        blanks = {"tokens": self._pad_token_id(settings), "log_probs": -np.inf, "commit_steps": 0, "branches": 0}
        shape = len(lengths), int(lengths.max())
        rows = {name: np.full(shape, blank, getattr(text, name).dtype) for name, blank in blanks.items()}
        for row, (has, length) in enumerate(zip(has_text, lengths, strict=True)):
            if not has:
                rows["tokens"][row, 0], rows["commit_steps"][row, 0] = eos, text.nfe[row]
                continue
            for name, values in rows.items():
                values[row, :length] = getattr(text, name)[row, text.starts[row] : text.lengths[row]]
            num_full += rows["tokens"][row, length - 1] != eos
        if num_full:
            logger.warning(
                f"{num_full} of {len(has_text)} texts filled up without an end of text, so the end of their speech "
                "may be missing. Raise `max_new_tokens` or `max_length`, or split the audio."
            )
        # Of improbable draws, too, there is something left.
        has_log_prob = np.isfinite(rows["log_probs"])
        confidence = np.where(has_log_prob, np.exp(rows["log_probs"]).clip(1e-30), np.float32(0))
        output = self._make_output(rows["tokens"], confidence, rows["commit_steps"], text.nfe)
        output.accepted_drafts, output.rejected_drafts = text.accepted, text.rejected
        output.token_branches, output.struck_drafts = rows["branches"], text.struck
        output.no_speech = None if settings.no_speech_token_id is None else text.no_speech
        return output

    def _make_output(
        self, sequences: np.ndarray, confidence: np.ndarray, commit_steps: np.ndarray, nfe: np.ndarray
    ) -> GenerateOutput:
        num_tokens = (commit_steps > 0).sum(axis=-1)
        return GenerateOutput(
            sequences=sequences,
            confidence=confidence,
            commit_steps=commit_steps,
            nfe=nfe,
            num_steps=int(nfe.max()),
            tokens_per_evaluation=(num_tokens / np.maximum(nfe, 1)).astype(np.float32),
        )

    def _prepare_prompt(
        self, decoder_input_ids: Any, batch_size: int, settings: MDMASRGenerationConfig, slots: dict[str, Any]
    ) -> np.ndarray:
        """The visible prompt (B, P): the one given, or the one the settings' template makes of the slots."""
        if decoder_input_ids is None:
            template = settings.prompt_template or {"tokens": [self.config.decoder_start_token_id]}
            return build_prompt_ids(template, batch_size, **slots)
        if slots:
            raise ValueError(f"`decoder_input_ids` and {sorted(slots)} both set the prompt. Pass one of them.")
        prompt_ids = to_numpy(decoder_input_ids)
        if prompt_ids.ndim != 2 or prompt_ids.shape[0] not in (1, batch_size):
            raise ValueError(
                f"`decoder_input_ids` of shape {prompt_ids.shape} must be a prompt of shape ({batch_size}, P)."
            )
        return np.broadcast_to(prompt_ids, (batch_size, prompt_ids.shape[1]))

    def _check_generator(self, generator: Any, batch_size: int) -> Any:
        if not isinstance(generator, (list, tuple)):
            return generator
        if len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries for a batch of {batch_size}. Pass one per row."
            )
        return list(generator)

    def write_rows(self, write: Callable[[Any, np.ndarray], None], is_open: np.ndarray, encoder_outputs: Any) -> None:
        """Has open rows (B,) written by `write`, which takes the model to do it with and which rows: all, or several
        calls have some each."""
        write(self, is_open)

    def spend(self, encoder_outputs: Any) -> None:
        """Told of outputs that nobody reads any more."""

    def _any_unfinished(self, unfinished: bool, synced_gpus: bool) -> bool:
        """Whether there are rows that are open."""
        return unfinished

    def find_speech(self, input_features: Any, attention_mask: Any, min_duration_s: float) -> tuple[np.ndarray, Any]:
        """
        Which rows (B,) of features (B, T, mel bins) or waveforms (B, N) hold a signal at all, and are longer than so
        many seconds; and the mask, if there is one. Digital silence gives features that do not change over time. Rows
        without a signal have their mask opened, since an encoder returns NaN for a row of padding only.

        Raises:
            ValueError: features that are not finite, or of another shape; a mask of another shape.
        """
        features = to_numpy(input_features)
        if not np.isfinite(features).all():
            raise ValueError(
                "`input_features` hold NaN or infinity. Check the audio, and that it went through this model's "
                "processor."
            )
        frames = features if features.ndim == 3 else features[..., None]
        if frames.ndim != 3 or frames.shape[1] == 0:
            raise ValueError(
                f"`input_features` of shape {features.shape} must be (B, T, mel bins) or waveforms (B, N), T or N at "
                "least 1. Hand the audio to this model's processor, which pads short clips."
            )
        has_mask = attention_mask is not None
        inside = to_numpy(attention_mask).astype(bool) if has_mask else np.ones(frames.shape[:2], dtype=bool)
        if inside.shape != frames.shape[:2]:
            raise ValueError(
                f"`attention_mask` of shape {inside.shape} must be {frames.shape[:2]}, as `input_features` have it."
            )
        highest = np.where(inside[..., None], frames, -np.inf).max(axis=1)
        lowest = np.where(inside[..., None], frames, np.inf).min(axis=1)
        is_long = inside.sum(axis=-1) > min_duration_s * self.config.input_frames_per_s
        has_speech = (highest > lowest).any(axis=-1) & is_long
        return has_speech, inside | ~has_speech[:, None] if has_mask else None
