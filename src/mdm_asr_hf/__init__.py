# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDM-ASR (arXiv 2602.18952): masked-diffusion speech recognition as a transformers model. Importing registers it."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
)

from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .decoder_mdm_asr import MDMASRDecoder
from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .generation_mdm_asr import MDMASRGenerateOutput
from .int8_mdm_asr import MDMASRInt8Config, quantize_int8
from .modeling_mdm_asr import MDMASRForConditionalGeneration, MDMASRModel, MDMASROutput
from .objective_mdm_asr import DiffusionObjective
from .onnx_export_mdm_asr import export_onnx
from .onnx_mdm_asr import OnnxMDMASR
from .pipeline_mdm_asr import MDMASRPipeline
from .processing_mdm_asr import MDMASRProcessor
from .sampling_mdm_asr import ConfTopKConfig, DFMConfig, EBConfConfig, PBEBConfConfig, RandomConfig
from .tokenization_mdm_asr import MDMASRAggregateTokenizer

__version__ = "0.1.0"

DEFAULT_CHECKPOINT_NAME = "mdm-asr-tiny-en"

AutoConfig.register(MDMASRConfig.model_type, MDMASRConfig, exist_ok=True)
AutoConfig.register(MDMASRDecoderConfig.model_type, MDMASRDecoderConfig, exist_ok=True)
AutoModel.register(MDMASRConfig, MDMASRModel, exist_ok=True)
AutoModelForSpeechSeq2Seq.register(MDMASRConfig, MDMASRForConditionalGeneration, exist_ok=True)
AutoFeatureExtractor.register(MDMASRConfig, MDMASRFeatureExtractor, exist_ok=True)
AutoProcessor.register(MDMASRConfig, MDMASRProcessor, exist_ok=True)


# Imported on first use: the trainer brings in much that transcribing does not need.
_TRAINING = ("ISCTTrainer", "MDMASRTrainingArguments", "make_wer_metric")
_DATA = ("DataCollatorForMDMASR", "load_sources")


def __getattr__(name: str):
    if name in _TRAINING:
        from . import training_mdm_asr

        return getattr(training_mdm_asr, name)
    if name in _DATA:
        from . import data_mdm_asr

        return getattr(data_mdm_asr, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def default_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package: model, processor, generation settings and card."""
    return Path(__file__).parent / "checkpoints" / DEFAULT_CHECKPOINT_NAME


__all__ = [
    "ConfTopKConfig",
    "DFMConfig",
    "DataCollatorForMDMASR",
    "DiffusionObjective",
    "EBConfConfig",
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
    "PBEBConfConfig",
    "RandomConfig",
    "default_checkpoint",
    "export_onnx",
    "load_sources",
    "make_wer_metric",
    "quantize_int8",
]
