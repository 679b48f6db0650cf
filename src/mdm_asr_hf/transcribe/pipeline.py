# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The ASR pipeline with what the stock one lacks: audio of any form and length, times of words, and confidences."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from ..audio_mdm_asr import is_audio_batch, is_audio_stream
from ..processing_mdm_asr import MDMASRProcessor
from .joining import DecodedWindow, keep_once
from .transcriber import Transcriber, window_lengths
from .transcript import Transcript, round_share
from .voice_activity import make_vad

logger = logging.get_logger(__name__)

# Of the stock pipeline's arguments, those that have no meaning here.
_IGNORED_ARGUMENTS = ("ignore_warning", "decoder_kwargs")


class _PipelineTranscriber(Transcriber):
    """Decodes windows as soon as they make a batch: what comes one by one is not waited for."""

    def _is_full(self, pool: list[Any]) -> bool:
        return len(pool) >= self.batch_size


class MDMASRPipeline(AutomaticSpeechRecognitionPipeline):
    """
    `pipeline("automatic-speech-recognition", model=folder, pipeline_class=MDMASRPipeline)`.

    Takes audio in every form the processor takes (files without ffmpeg, any sampling rate without torchaudio) and of
    any length, one or a list, generator or data set of them. A [`Transcriber`] cuts recordings at pauses, and decodes
    the windows of all in batches of `batch_size`. Arguments, of the pipeline or of its call:

    - `return_timestamps` (`"word"` or `True`): adds `"chunks"`, words or segments as `{"text", "timestamp"}`, with
      times `(start, end)` in seconds from the start of the recording;
    - `return_language` (`bool`): adds `"language"`, given or detected;
    - `chunk_length_s` (`float`): the longest window, by default the checkpoint's; `stride_length_s` has no meaning,
      since windows overlap only where there is no pause;
    - `vad` (`str`): how speech is found, see [`Transcriber`];
    - `hotwords` (`list[str]`): words to expect;
    - all else, and what is in `generate_kwargs`, goes to `generate`: `language`, `gamma`, `previous_ids`, ...

    Returns `{"text": ..., "confidence": ..., "nfe": ..., "tokens": [{"text": ..., "confidence": ...}, ...]}`: the
    confidence of a window is the geometric mean over its tokens and the end of text; that of a recording of several
    windows is their mean, weighted by words.
    """

    # Not needed but for hotwords: the stock pipeline's parts do for the rest.
    _load_processor = None

    def _sanitize_parameters(
        self,
        return_timestamps: str | bool | None = None,
        return_language: bool | None = None,
        chunk_length_s: float | None = None,
        stride_length_s: Any = None,
        vad: str | None = None,
        hotwords: list[str] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in _IGNORED_ARGUMENTS:
            kwargs.pop(name, None)
        if stride_length_s is not None:
            logger.warning_once(
                "`stride_length_s` is ignored: windows overlap only where there is no pause to cut at."
            )
        if return_timestamps not in (None, True, False, "word"):
            raise ValueError(f"`return_timestamps` must be 'word', True or False, got {return_timestamps!r}.")
        if chunk_length_s:
            window_lengths(chunk_length_s, None, self.feature_extractor, name="chunk_length_s")
        if vad is not None:
            make_vad(vad, self.feature_extractor.sampling_rate)
        options = {"max_window_s": chunk_length_s or None, "vad": vad, "hotwords": hotwords}
        results = {"return_timestamps": return_timestamps, "return_language": return_language}
        return _given(options), {**(generate_kwargs or {}), **kwargs}, _given(results)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        # The stock pipeline takes the numbers of one recording, `(samples, rate)` or floats, for a batch.
        if isinstance(inputs, (list, tuple)):
            if not is_audio_batch(inputs):
                return super().__call__([inputs], **kwargs)[0]
            inputs = list(inputs)
        elif not isinstance(inputs, torch.utils.data.Dataset):
            # Of a data set, no more is read at once than is decoded; the stock pipeline would take it for a recording.
            if is_audio_batch(inputs):
                return list(super().__call__((one for one in inputs), **kwargs))
            if is_audio_stream(inputs):
                return super().__call__((one for one in inputs), **kwargs)
        return super().__call__(inputs, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """What all calls come to: the result of each recording."""
        # The pipeline's own defaults; before transformers 5.23 they were part of `self.generation_config`.
        if hasattr(self, "_prepare_generate_kwargs"):
            forward_params = self._prepare_generate_kwargs(forward_params)
        # Which may be one of transformers' own.
        config = forward_params.pop("generation_config", None)
        settings = None if config is None else self.model._settle_generation_config(config, {}, set())[0]
        processor = self.processor
        if processor is None:
            template = getattr(self.model.generation_config, "prompt_template", None)
            processor = MDMASRProcessor(self.feature_extractor, self.tokenizer, template)
        transcriber = _PipelineTranscriber(
            self.model,
            processor,
            settings=settings,
            batch_size=batch_size,
            timestamps=bool(postprocess_params.get("return_timestamps")),
            **preprocess_params,
        )
        transcriber.arguments |= forward_params | {"return_dict_in_generate": True}
        # Of data sets, some can only be asked for a row.
        recordings = inputs if hasattr(inputs, "__iter__") else (inputs[i] for i in range(len(inputs)))
        decoded: dict[int, list[DecodedWindow]] = {}
        for i, transcript in transcriber.transcribe_all(
            recordings, on_window=lambda i, window: decoded.setdefault(i, []).append(window)
        ):
            if isinstance(transcript, ValueError):
                raise transcript
            windows = sorted(decoded.pop(i, []), key=lambda window: window.start_s)
            yield _result(transcript, windows, **postprocess_params)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _result(
    transcript: Transcript,
    windows: list[DecodedWindow],
    return_timestamps: str | bool = False,
    return_language: bool = False,
) -> dict[str, Any]:
    for warning in transcript.warnings:
        logger.info(warning)
    result = {
        "text": transcript.text,
        "confidence": transcript.segments[0].confidence if len(windows) == 1 else transcript.confidence,
        "nfe": transcript.nfe,
        "tokens": [
            {"text": window.pieces[k], "confidence": round_share(window.confidences[k])}
            for window, kept in zip(windows, keep_once(windows), strict=True)
            for k in kept
        ],
    }
    if return_timestamps:
        parts = transcript.words if return_timestamps == "word" else [one for one in transcript.segments if one.text]
        result["chunks"], position = [], 0
        for part in parts:
            # Put together, their texts are the transcript's.
            end = transcript.text.index(part.text, position) + len(part.text)
            result["chunks"].append({"text": transcript.text[position:end], "timestamp": (part.start_s, part.end_s)})
            position = end
    if return_language:
        result["language"] = transcript.language
    return result
