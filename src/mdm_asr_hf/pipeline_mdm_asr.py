# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The ASR pipeline with what the stock one drops: confidences, the number of decoder evaluations, and every form of
audio."""

from typing import Any

from transformers import AutomaticSpeechRecognitionPipeline

from .audio_mdm_asr import load_audio
from .confidence_mdm_asr import utterance_confidence


class MDMASRPipeline(AutomaticSpeechRecognitionPipeline):
    """
    `pipeline("automatic-speech-recognition", model=folder, pipeline_class=MDMASRPipeline)`.

    Takes audio in every form the processor takes (files without ffmpeg, any sampling rate without torchaudio), and
    returns `{"text": ..., "confidence": ..., "nfe": ..., "tokens": [{"text": ..., "confidence": ...}, ...]}`: the
    utterance's confidence is the geometric mean over its tokens and the end of text.
    """

    def preprocess(self, inputs: Any, **kwargs):
        sampling_rate = self.feature_extractor.sampling_rate
        samples = load_audio(
            inputs,
            target_sampling_rate=sampling_rate,
            max_duration_s=getattr(self.feature_extractor, "max_duration_s", None),
        )
        yield from super().preprocess(samples, **kwargs)

    def _forward(self, model_inputs: dict[str, Any], **kwargs) -> dict[str, Any]:
        is_last = model_inputs.pop("is_last")
        features = model_inputs.pop("input_features")
        attention_mask = model_inputs.pop("attention_mask", None)
        kwargs.pop("return_timestamps", None)
        kwargs.pop("return_language", None)
        kwargs["return_dict_in_generate"] = True
        # The pipeline's own defaults; before transformers 5.23 they were part of `self.generation_config`.
        if hasattr(self, "_prepare_generate_kwargs"):
            kwargs = self._prepare_generate_kwargs(kwargs)
        output = self.model.generate(features, attention_mask=attention_mask, **kwargs)
        return {
            "is_last": is_last,
            "tokens": output.sequences,
            "confidence": output.confidence,
            "nfe": output.nfe,
            **model_inputs,
        }

    def postprocess(self, model_outputs: list[dict[str, Any]], **kwargs) -> dict[str, Any]:
        output = model_outputs[0]
        # 0 marks padding, and the end of text that a row without speech is given.
        confidence = output["confidence"][0]
        confidence = confidence[confidence > 0]
        ids = output["tokens"][0][: len(confidence)].tolist()
        special = set(self.tokenizer.all_special_ids)
        tokens = [
            {"text": self.tokenizer.decode([token_id]), "confidence": value}
            for token_id, value in zip(ids, confidence.tolist(), strict=True)
            if token_id not in special
        ]
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            "confidence": utterance_confidence(output["confidence"])[0],
            "nfe": int(output["nfe"][0]),
            "tokens": tokens,
        }


__all__ = ["MDMASRPipeline"]
