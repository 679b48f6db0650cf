# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The ASR pipeline with what the stock one lacks: audio of any form and length, times of words, and confidences."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from ..audio_mdm_asr import AudioStream, is_audio_batch, is_audio_stream
from ..processing_mdm_asr import MDMASRProcessor
from .joining import DecodedWindow, join_windows, keep_once
from .transcriber import read_output, window_lengths
from .transcript import Transcript, round_share
from .voice_activity import make_vad
from .windows import Window, cut_windows

logger = logging.get_logger(__name__)

# Of the stock pipeline's arguments, those that have no meaning here.
_IGNORED_ARGUMENTS = ("ignore_warning", "decoder_kwargs")


class MDMASRPipeline(AutomaticSpeechRecognitionPipeline):
    """
    `pipeline("automatic-speech-recognition", model=folder, pipeline_class=MDMASRPipeline)`.

    Takes audio in every form the processor takes (files without ffmpeg, any sampling rate without torchaudio) and of
    any length, one or a list, generator or data set of them: recordings are cut at pauses as `windows` says,
    and the windows of all are decoded in batches of `batch_size`. Arguments, of the pipeline or of its call:

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
        preprocess, forward, postprocess = {}, {**(generate_kwargs or {}), **kwargs}, {}
        if chunk_length_s:
            settings = self.model.generation_config
            lengths = window_lengths(chunk_length_s, settings, self.feature_extractor, name="chunk_length_s")
            preprocess["lengths"] = lengths
        if vad is not None:
            make_vad(vad, self.feature_extractor.sampling_rate)
            preprocess["vad"] = vad
        if hotwords:
            forward["hotword_ids"] = self._processor.hotword_ids(hotwords)
        if return_timestamps is not None:
            forward["return_token_timestamps"] = bool(return_timestamps)
            postprocess["return_timestamps"] = return_timestamps
        if return_language is not None:
            postprocess["return_language"] = return_language
        return preprocess, forward, postprocess

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

    @property
    def _processor(self) -> Any:
        if self.processor is not None:
            return self.processor
        template = getattr(self.model.generation_config, "prompt_template", None)
        return MDMASRProcessor(self.feature_extractor, self.tokenizer, template)

    def preprocess(
        self, inputs: Any, lengths: tuple[float, float] | None = None, vad: str = "auto"
    ) -> Iterator[dict[str, Any]]:
        """The windows of one recording; at least one, which is empty if nobody speaks."""
        rate_hz = self.feature_extractor.sampling_rate
        lengths = lengths or window_lengths(None, self.model.generation_config, self.feature_extractor)
        stream = AudioStream(inputs, target_sampling_rate=rate_hz)
        try:
            windows = cut_windows(stream, rate_hz, make_vad(vad, rate_hz), *lengths)
            is_empty = True
            for window in windows:
                is_empty = False
                yield self._features(window, window.is_last)
            if is_empty:
                yield self._features(Window(0.0, stream.duration_s, np.zeros(0, dtype=np.float32)), True)
        finally:
            stream.close()

    def _features(self, window: Window, is_last: bool) -> dict[str, Any]:
        features = self.feature_extractor(
            window.samples,
            sampling_rate=self.feature_extractor.sampling_rate,
            return_tensors="pt",
            return_attention_mask=True,
        )
        # Only the times are still needed, and they pass through the stock batching as they are.
        window = dataclasses.replace(window, samples=window.samples[:0])
        return {"is_last": is_last, "window": window, **features.to(dtype=self.model.dtype)}

    def _forward(self, model_inputs: dict[str, Any], **kwargs) -> dict[str, Any]:
        is_last, window = model_inputs["is_last"], model_inputs["window"]
        windows = window if isinstance(window, list) else [window]
        kwargs["return_dict_in_generate"] = True
        if any(one.needs_times for one in windows):
            kwargs["return_token_timestamps"] = True
        # The pipeline's own defaults; before transformers 5.23 they were part of `self.generation_config`.
        if hasattr(self, "_prepare_generate_kwargs"):
            kwargs = self._prepare_generate_kwargs(kwargs)
        output = self.model.generate(
            model_inputs["input_features"], attention_mask=model_inputs["attention_mask"], **kwargs
        )
        decoded = read_output(output, windows, self.tokenizer, self.model.config.eos_token_id)
        return {"is_last": is_last, "window": decoded if isinstance(window, list) else decoded[0]}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_timestamps: str | bool = False,
        return_language: bool = False,
    ) -> dict[str, Any]:
        windows: list[DecodedWindow] = [output["window"] for output in model_outputs]
        transcript = join_windows(windows, windows[-1].end_s, with_times=bool(return_timestamps))
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
            result["chunks"] = _chunks(transcript, return_timestamps)
        if return_language:
            result["language"] = transcript.language
        return result


def _chunks(transcript: Transcript, kind: str | bool) -> list[dict[str, Any]]:
    """Words or segments; their texts, put together, are the transcript's."""
    parts = transcript.words if kind == "word" else [segment for segment in transcript.segments if segment.text]
    chunks, position = [], 0
    for part in parts:
        end = transcript.text.index(part.text, position) + len(part.text)
        chunks.append({"text": transcript.text[position:end], "timestamp": (part.start_s, part.end_s)})
        position = end
    return chunks


__all__ = ["MDMASRPipeline"]
