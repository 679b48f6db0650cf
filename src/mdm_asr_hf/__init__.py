# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDM-ASR (arXiv 2602.18952): masked-diffusion speech recognition as a transformers model. Importing registers it."""

from importlib import import_module
from importlib.util import find_spec

from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .loading import default_checkpoint
from .onnx.model import OnnxMDMASR
from .onnx.processing import OnnxProcessor
from .sampling_mdm_asr import ConfTopKSampler, DFMSampler, EBConfSampler, PBEBConfSampler, RandomSampler
from .transcribe.streaming import StreamingTranscriber
from .transcribe.transcriber import Transcriber

# Exported models run without PyTorch, and where it is missing.
if find_spec("torch") is not None:
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForSpeechSeq2Seq,
        AutoProcessor,
    )

    from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
    from .decoder_mdm_asr import MDMASRDecoder
    from .diffusion_mdm_asr import DiffusionObjective
    from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
    from .int8 import MDMASRInt8Config, quantize_int8
    from .modeling_mdm_asr import MDMASRForConditionalGeneration, MDMASRModel, MDMASROutput
    from .onnx.export import export_onnx
    from .processing_mdm_asr import MDMASRProcessor
    from .tokenization_mdm_asr import MDMASRAggregateTokenizer
    from .torch_generation_mdm_asr import MDMASRGenerateOutput
    from .transcribe.pipeline import MDMASRPipeline

    AutoConfig.register(MDMASRConfig.model_type, MDMASRConfig, exist_ok=True)
    AutoConfig.register(MDMASRDecoderConfig.model_type, MDMASRDecoderConfig, exist_ok=True)
    AutoModel.register(MDMASRConfig, MDMASRModel, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(MDMASRConfig, MDMASRForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(MDMASRConfig, MDMASRFeatureExtractor, exist_ok=True)
    AutoProcessor.register(MDMASRConfig, MDMASRProcessor, exist_ok=True)

__version__ = "0.1.0"

# Imported on first use: training brings in much that transcribing does not need.
_ON_FIRST_USE = {
    "DataCollatorForMDMASR": ".train.collator",
    "ISCTTrainer": ".train.trainer",
    "MDMASRTrainingArguments": ".train.trainer",
    "load_sources": ".data.mixing",
    "make_wer_metric": ".train.trainer",
}


def __getattr__(name: str):
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    if name in __all__:
        raise ImportError(f'`{name}` needs PyTorch: `pip install ".[torch]"` in a clone of this project.')
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ConfTopKSampler",
    "DFMSampler",
    "DataCollatorForMDMASR",
    "DiffusionObjective",
    "EBConfSampler",
    "ISCTTrainer",
    "MDMASRAggregateTokenizer",
    "MDMASRConfig",
    "MDMASRDecoder",
    "MDMASRDecoderConfig",
    "MDMASRFeatureExtractor",
    "MDMASRForConditionalGeneration",
    "MDMASRGenerateOutput",
    "MDMASRGenerationConfig",
    "MDMASRInt8Config",
    "MDMASRModel",
    "MDMASROutput",
    "MDMASRPipeline",
    "MDMASRProcessor",
    "MDMASRTrainingArguments",
    "OnnxMDMASR",
    "OnnxProcessor",
    "PBEBConfSampler",
    "RandomSampler",
    "StreamingTranscriber",
    "Transcriber",
    "default_checkpoint",
    "export_onnx",
    "load_sources",
    "make_wer_metric",
    "quantize_int8",
]
