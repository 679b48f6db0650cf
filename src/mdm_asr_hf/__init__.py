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
from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
from .generation_mdm_asr import MDMASRGenerateOutput, MDMASRGenerationConfig
from .modeling_mdm_asr import MDMASRDecoder, MDMASRForConditionalGeneration, MDMASRModel
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


def default_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package: model, processor, generation settings and card."""
    return Path(__file__).parent / "checkpoints" / DEFAULT_CHECKPOINT_NAME


__all__ = [
    "ConfTopKConfig",
    "DFMConfig",
    "EBConfConfig",
    "MDMASRAggregateTokenizer",
    "MDMASRConfig",
    "MDMASRDecoder",
    "MDMASRDecoderConfig",
    "MDMASRFeatureExtractor",
    "MDMASRForConditionalGeneration",
    "MDMASRGenerateOutput",
    "MDMASRGenerationConfig",
    "MDMASRModel",
    "MDMASRPipeline",
    "MDMASRProcessor",
    "PBEBConfConfig",
    "RandomConfig",
    "default_checkpoint",
]
