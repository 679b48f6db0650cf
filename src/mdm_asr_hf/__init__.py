# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDM-ASR (arXiv 2602.18952): masked-diffusion speech recognition as a transformers model. Importing registers it."""

from importlib.util import find_spec
from pathlib import Path

from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .onnx_mdm_asr import OnnxMDMASR
from .onnx_processing_mdm_asr import OnnxProcessor
from .sampler_configuration_mdm_asr import ConfTopKConfig, DFMConfig, EBConfConfig, PBEBConfConfig, RandomConfig
from .streaming_mdm_asr import StreamingTranscriber
from .transcription_mdm_asr import Transcriber

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
    from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
    from .int8_mdm_asr import MDMASRInt8Config, quantize_int8
    from .modeling_mdm_asr import MDMASRForConditionalGeneration, MDMASRModel, MDMASROutput
    from .objective_mdm_asr import DiffusionObjective
    from .onnx_export_mdm_asr import export_onnx
    from .pipeline_mdm_asr import MDMASRPipeline
    from .processing_mdm_asr import MDMASRProcessor
    from .tokenization_mdm_asr import MDMASRAggregateTokenizer
    from .torch_generation_mdm_asr import MDMASRGenerateOutput

    AutoConfig.register(MDMASRConfig.model_type, MDMASRConfig, exist_ok=True)
    AutoConfig.register(MDMASRDecoderConfig.model_type, MDMASRDecoderConfig, exist_ok=True)
    AutoModel.register(MDMASRConfig, MDMASRModel, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(MDMASRConfig, MDMASRForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(MDMASRConfig, MDMASRFeatureExtractor, exist_ok=True)
    AutoProcessor.register(MDMASRConfig, MDMASRProcessor, exist_ok=True)

__version__ = "0.1.0"

DEFAULT_CHECKPOINT_NAME = "mdm-asr-tiny-en"

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
    if name in __all__:
        raise ImportError(f'`{name}` needs PyTorch: `pip install "mdm_asr_hf[torch]"`.')
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
    "OnnxProcessor",
    "PBEBConfConfig",
    "RandomConfig",
    "StreamingTranscriber",
    "Transcriber",
    "default_checkpoint",
    "export_onnx",
    "load_sources",
    "make_wer_metric",
    "quantize_int8",
]
