import numpy as np
import pytest
import torch
from remote_code import noise
from tiny_data import save_model
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
    return save_model(tmp_path, tiny_model(), tiny_processor())


def test_auto_classes_find_ours(folder):
    assert type(AutoConfig.from_pretrained(folder)) is MDMASRConfig
    assert type(AutoModel.from_pretrained(folder)) is MDMASRModel
    assert type(AutoModelForSpeechSeq2Seq.from_pretrained(folder)) is MDMASRForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)) is MDMASRProcessor
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is MDMASRFeatureExtractor
    assert len(AutoTokenizer.from_pretrained(folder)) == 62
    # The Open ASR Leaderboard's script looks here.
    assert MDMASRConfig in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

    base, full = AutoModel.from_pretrained(folder), AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    features, mask = tiny_inputs()
    ids = torch.full((3, 5), 61)
    with torch.no_grad():
        hidden = base(features, mask, decoder_input_ids=ids).last_hidden_state
        torch.testing.assert_close(full.proj_out(hidden), full(features, mask, decoder_input_ids=ids).logits)

    # The calls of open_asr_leaderboard/transformers/run_eval.py, in its order.
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


def test_the_stock_pipeline_transcribes_as_generate_and_ours_gives_more(folder):
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
