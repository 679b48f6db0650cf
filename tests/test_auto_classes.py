import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_model, tiny_processor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

from mdm_asr_hf import (
    MDMASRConfig,
    MDMASRFeatureExtractor,
    MDMASRForConditionalGeneration,
    MDMASRModel,
    MDMASRPipeline,
    MDMASRProcessor,
)


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    return tmp_path


def noise(num_samples=16000, seed=0):
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


def test_auto_classes_find_ours(folder):
    assert type(AutoConfig.from_pretrained(folder)) is MDMASRConfig
    assert type(AutoModel.from_pretrained(folder)) is MDMASRModel
    assert type(AutoModelForSpeechSeq2Seq.from_pretrained(folder)) is MDMASRForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)) is MDMASRProcessor
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is MDMASRFeatureExtractor
    assert len(AutoTokenizer.from_pretrained(folder)) == 62
    # The Open ASR Leaderboard's script looks here.
    assert MDMASRConfig in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING


def test_the_base_model_loads_the_weights_of_the_full_one(folder):
    base, full = AutoModel.from_pretrained(folder), AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    features, mask = tiny_inputs()
    ids = torch.full((3, 5), 61)
    with torch.no_grad():
        hidden = base(features, mask, decoder_input_ids=ids).last_hidden_state
        torch.testing.assert_close(full.proj_out(hidden), full(features, mask, decoder_input_ids=ids).logits)


def test_the_stock_pipeline_transcribes_as_generate_does(folder):
    pipe = pipeline("automatic-speech-recognition", model=str(folder))
    assert pipe.type == "seq2seq"
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    clips = [noise(), noise(9000, 1), noise(24000, 2)]
    expected = processor.batch_decode(model.generate(**processor(clips, sampling_rate=16000)))
    assert len(set(expected)) == 3
    assert [pipe(clip.copy())["text"].strip() for clip in clips] == expected
    assert [out["text"].strip() for out in pipe([clip.copy() for clip in clips], batch_size=3)] == expected
    quick = pipe(clips[0].copy(), generate_kwargs={"max_denoising_steps": 1, "sampler": "conf_top_k"})
    assert isinstance(quick["text"], str)


def test_our_pipeline_gives_what_the_stock_one_drops(folder):
    pipe = pipeline("automatic-speech-recognition", model=str(folder), pipeline_class=MDMASRPipeline)
    stock = pipeline("automatic-speech-recognition", model=str(folder))
    clips = [noise(), noise(9000, 1)]
    outputs = pipe([{"array": clip, "sampling_rate": 16000} for clip in clips], batch_size=2)
    for clip, out in zip(clips, outputs, strict=True):
        assert out["text"] == stock(clip.copy())["text"].strip()
        values = [token["confidence"] for token in out["tokens"]]
        assert out["nfe"] >= 1 and values and all(0 < value <= 1 for value in values)
        assert min(values) * 0.5 <= out["confidence"] <= 1
        assert "".join(token["text"] for token in out["tokens"]).strip() == out["text"]
    silent = pipe({"array": np.zeros(16000), "sampling_rate": 16000})
    assert silent == {"text": "", "confidence": None, "nfe": 0, "tokens": []}


def test_the_leaderboards_calls(folder):
    """The calls of open_asr_leaderboard/transformers/run_eval.py, in its order."""
    config = AutoConfig.from_pretrained(folder)
    assert type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(folder)
    audios = [noise(), noise(9000, 1)]
    inputs = processor(audios, sampling_rate=16000, return_tensors="pt", padding="longest", return_attention_mask=True)
    inputs = inputs.to("cpu", dtype=torch.bfloat16)
    texts = processor.decode(model.generate(**inputs, max_new_tokens=200))
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert not hasattr(processor, "apply_transcription_request")


REMOTE = """
import sys
sys.modules["mdm_asr_hf"] = None  # importing the package fails, whether or not it is installed
import numpy as np, json
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
folder, clip = sys.argv[1], np.load(sys.argv[2])
model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "MDMASRConfig"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
direct = processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]
pipe = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
try:
    type(model).from_whisper("nowhere")
    hint = None
except ImportError as error:
    hint = str(error)
print(json.dumps({"type": pipe.type, "pipeline": pipe(clip)["text"].strip(), "direct": direct, "hint": hint}))
"""


def transcribe_as_remote_code(folder, clip, tmp_path):
    """Loads a saved folder with trust_remote_code in a process that cannot import the package."""
    np.save(tmp_path / "clip.npy", clip)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REMOTE), str(folder), str(tmp_path / "clip.npy")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def save_with_code(model, processor, folder):
    """What a user does to publish a folder that loads without the package."""
    classes = (MDMASRConfig, MDMASRFeatureExtractor, MDMASRProcessor, MDMASRForConditionalGeneration)
    for one in classes[:3]:
        one.register_for_auto_class()
    MDMASRForConditionalGeneration.register_for_auto_class("AutoModelForSpeechSeq2Seq")
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        for one in classes:
            one._auto_class = None


def test_a_saved_folder_loads_where_the_package_is_not_installed(tmp_path):
    model, processor, clip = tiny_model(), tiny_processor(), noise()
    expected = processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]
    folder = tmp_path / "folder"
    save_with_code(model, processor, folder)
    assert "custom_pipelines" not in (folder / "config.json").read_text()
    out = transcribe_as_remote_code(folder, clip, tmp_path)
    assert out["type"] == "seq2seq" and out["pipeline"] == out["direct"] == expected != ""
    assert "pip install ." in out["hint"]
    # The converters, and what only they need, do not travel.
    assert not list(folder.glob("convert_*"))
