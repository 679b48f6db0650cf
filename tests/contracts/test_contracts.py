# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
transformers' own common tests, which `make contracts` brings, on tiny models of all encoders and both kinds.

`generate` is the package's own, not that of transformers' GenerationMixin, whose GenerationTesterMixin does not apply.
"""

import copy
import json
import os
import tempfile
import unittest
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

common = pytest.importorskip("tests.test_modeling_common", reason="transformers' own tests come with `make contracts`")

# ruff: noqa: E402
# Where the pipelines' tests look for tiny models, as soon as they are imported.
FOLDER = tempfile.TemporaryDirectory()
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = FOLDER.name
PARTS = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": ["MDMASRFeatureExtractor"]}
(Path(FOLDER.name) / "reports").mkdir()
(Path(FOLDER.name) / "reports/tiny_model_summary.json").write_text(
    json.dumps({"MDMASRForConditionalGeneration": PARTS})
)

import tiny_models
from tests.test_configuration_common import ConfigTester
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin
from tests.test_tokenization_common import TokenizerTesterMixin
from tiny_models import ENCODERS, VOCAB_SIZE
from tiny_sentencepiece import ENGLISH, GERMAN, SPECIAL_TOKENS, train

from mdm_asr_hf import (
    MDMASRAggregateTokenizer,
    MDMASRConfig,
    MDMASRFeatureExtractor,
    MDMASRForConditionalGeneration,
    MDMASRModel,
    MDMASRProcessor,
)
from tests import test_pipeline_mixin as pipelines

KINDS = {"Canvas": 0, "Drafts": 2}
# Frames of a second: Whisper's with 0.3 s of silence; Parakeet's are an eighth of the mel's.
NUM_FRAMES = {"whisper": 65, "parakeet": 13, "wav2vec2": 50}
# What transformers' tests know of its own models by their names.
common.MODEL_MAPPING_NAMES["mdm_asr"] = "MDMASRModel"


class ModelTester:
    """What transformers' tests want to know of a model."""

    batch_size, decoder_seq_length = 3, 7
    hidden_size, num_attention_heads, num_hidden_layers = 16, 2, 2
    is_training = True

    def __init__(self, encoder, draft_layers, test_name):
        self.encoder, self.draft_layers, self.test_name = encoder, draft_layers, test_name
        self.seq_length = self.encoder_seq_length = self.key_length = NUM_FRAMES[encoder]

    def get_config(self):
        decoder = {"hidden_size": self.hidden_size, "draft_layers": self.draft_layers, "draft_length": 3}
        return tiny_models.tiny_config(self.encoder, decoder_config=decoder)

    def prepare_config_and_inputs_for_common(self):
        features, mask = tiny_models.tiny_inputs(self.encoder)
        ids = torch.randint(3, VOCAB_SIZE, (self.batch_size, self.decoder_seq_length))
        if not self.draft_layers:
            ids[:, 1::3] = self.get_config().mask_token_id
        inputs = {"input_features": features, "decoder_input_ids": ids}
        if "resize" in self.test_name:
            # Where these put the last id of a vocabulary.
            inputs["input_ids"] = ids
        # Where there is a mask, these take the encoder's for the decoder's.
        if "eager_matches_sdpa" not in self.test_name:
            inputs["attention_mask"] = mask
        return self.get_config(), inputs


class CompositeConfigTester(ConfigTester):
    def create_and_test_config_from_pretrained_custom_kwargs(self):
        # A decoder of 20 ids beside a mask of id 61, which only `config.vocab_size = 20` moves.
        with self.parent.assertRaisesRegex(ValueError, "must be"):
            super().create_and_test_config_from_pretrained_custom_kwargs()
        config = self.parent.model_tester.get_config()
        config.vocab_size = 20
        self.parent.assertEqual(MDMASRConfig(**config.to_dict()).mask_token_id, 21)


class ModelTests(common.ModelTesterMixin):
    all_model_classes = (MDMASRModel, MDMASRForConditionalGeneration)
    all_generative_model_classes = ()
    is_encoder_decoder = True
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester(self.encoder, self.draft_layers, self._testMethodName)
        self.config_tester = CompositeConfigTester(self, config_class=MDMASRConfig)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        inputs.pop("input_ids", None)
        if return_labels and model_class is MDMASRForConditionalGeneration:
            # Labels alone, as a collator makes them.
            inputs["labels"] = inputs.pop("decoder_input_ids").clamp(max=VOCAB_SIZE - 1)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_encoder_decoder_loss_no_double_shift(self):
        if self.draft_layers:
            return super().test_encoder_decoder_loss_no_double_shift()
        # A canvas bears a loss where it is masked: of one that is masked whole it is the cross-entropy.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        labels = inputs["decoder_input_ids"].clamp(max=VOCAB_SIZE - 1)
        inputs["decoder_input_ids"] = torch.full_like(labels, config.mask_token_id)
        output = MDMASRForConditionalGeneration(config).eval()(**inputs, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        grads = [torch.autograd.grad(loss, output.logits, retain_graph=True)[0] for loss in (output.loss, expected)]
        torch.testing.assert_close(*grads)

    def test_logits_to_keep(self):
        # As GenerationTesterMixin asks.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = MDMASRForConditionalGeneration(config).eval()
        with torch.no_grad():
            everything, last = (model(**inputs, logits_to_keep=number).logits for number in (0, 1))
        torch.testing.assert_close(last, everything[:, -1:])


for encoder in ENCODERS:
    for kind, draft_layers in KINDS.items():
        name, settings = f"{encoder.title()}{kind}Test", {"encoder": encoder, "draft_layers": draft_layers}
        globals()[name] = type(name, (ModelTests, unittest.TestCase), settings)
del ModelTests


class FeatureExtractorTester:
    batch_size, feature_size = 3, 80
    min_seq_length, seq_length_diff, max_seq_length = 400, 800, 2000

    def prepare_feat_extract_dict(self):
        return {"max_duration_s": 30.0}

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        lengths = [self.max_seq_length] * 3 if equal_length else [400, 1200, 2000]
        clips = [np.random.default_rng(0).random((length, self.feature_size)) for length in lengths]
        return clips if numpify else [clip.tolist() for clip in clips]


class FeatureExtractorTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = MDMASRFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractorTester()


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MDMASRProcessor
    text_input_name = "labels"

    @classmethod
    def _setup_feature_extractor(cls):
        return tiny_models.tiny_processor().feature_extractor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_models.tiny_tokenizer()

    @staticmethod
    def prepare_processor_dict():
        return {"prompt_template": {"tokens": [VOCAB_SIZE]}, "text_prefix": " "}

    @unittest.skip("What `generate` writes is decoded to plain text by default, without the tokens that end it.")
    def test_tokenizer_decode_defaults(self):
        pass

    @unittest.skip("Of a text the processor makes labels, not a tokenizer's inputs; `attention_mask` is the audio's.")
    def test_subprocessor_defaults_0_text(self):
        pass


class AggregateTokenizerTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = MDMASRAggregateTokenizer

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        special = train([" ".join(SPECIAL_TOKENS)], len(SPECIAL_TOKENS) + 2, SPECIAL_TOKENS)
        models = {"spl_tokens": special, "en": train(ENGLISH, 40), "de": train(GERMAN, 44)}
        MDMASRAggregateTokenizer(models=models).save_pretrained(cls.tmpdirname)


class SpeechPipelineTests(unittest.TestCase):
    """What transformers' own class of this kind, which no release on PyPI holds, asks of the stock pipeline."""

    def get_test_pipeline(self, model, tokenizer, feature_extractor, dtype="float32"):
        asr = transformers.AutomaticSpeechRecognitionPipeline(
            model=model, tokenizer=tokenizer, feature_extractor=feature_extractor, dtype=dtype
        )
        return asr, [np.zeros(34000), np.random.default_rng(0).standard_normal(14000)]

    def run_pipeline_test(self, asr, examples):
        self.assertEqual(asr.type, "seq2seq")
        for example in examples:
            output = asr(example)
            self.assertEqual(list(output), ["text"])
            self.assertIsInstance(output["text"], str)
        with self.assertRaises(ValueError):
            asr({"raw": examples[0], "stride": (0, 4000), "sampling_rate": 16000})
        with self.assertRaisesRegex(ValueError, "^We cannot return_timestamps yet on non-CTC models"):
            asr(examples[0], return_timestamps="char")


class PipelineTests(pipelines.PipelineTesterMixin):
    pipeline_model_mapping = {"automatic-speech-recognition": MDMASRForConditionalGeneration}

    @classmethod
    def setUpClass(cls):
        pipelines.transformers_module.MDMASRFeatureExtractor = MDMASRFeatureExtractor
        task = pipelines.pipeline_test_mapping["automatic-speech-recognition"]
        task["test"] = f"{__name__}.{SpeechPipelineTests.__name__}"
        make_model = tiny_models.tiny_drafts_model if cls.draft_layers else tiny_models.tiny_model
        for part in (make_model().float(), tiny_models.tiny_processor()):
            part.save_pretrained(f"{FOLDER.name}/mdm_asr/MDMASRForConditionalGeneration")


for name in dir(PipelineTests):
    if name.startswith("test_") and "automatic_speech_recognition" not in name:
        # Of another task.
        setattr(PipelineTests, name, None)
for kind, draft_layers in KINDS.items():
    name, settings = f"{kind}PipelineTest", {"draft_layers": draft_layers}
    globals()[name] = type(name, (PipelineTests, unittest.TestCase), settings)
del PipelineTests
