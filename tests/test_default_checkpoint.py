"""The checkpoint that comes with the package, on real speech."""

import json

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from demo_recording import LIBRISPEECH, RECORDING, TEXT, needs_librispeech
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration, pipeline
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from whisper_donors import needs_released_whisper, save_released

from mdm_asr_hf import MDMASRPipeline, default_checkpoint

MAX_BYTES = 96 * 2**20

normalize = EnglishTextNormalizer({})


@pytest.fixture(scope="module")
def model():
    return AutoModelForSpeechSeq2Seq.from_pretrained(default_checkpoint()).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(default_checkpoint())


@pytest.fixture(scope="module")
def clip():
    samples, rate = soundfile.read(RECORDING, dtype="float32")
    assert rate == 16000 and samples.ndim == 1
    return samples


@pytest.fixture(scope="module")
def transcript(model, processor, clip):
    """What the model makes of the recording."""
    return processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]


def test_it_is_complete_small_and_offline(model):
    folder = default_checkpoint()
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= MAX_BYTES
    assert not list(folder.glob("*.bin")) and (folder / "README.md").exists()
    assert model.dtype == torch.float32 and model.config.has_drafts


def test_golden_transcript(model, processor, clip, transcript):
    assert transcript == TEXT
    pipe = pipeline("automatic-speech-recognition", model=str(default_checkpoint()))
    assert pipe(clip.copy())["text"].strip() == TEXT
    output = model.generate(**processor(clip, sampling_rate=16000), return_dict_in_generate=True)
    # 16 tokens and an end.
    assert output.nfe[0] <= 7 and output.accepted_drafts[0, 0] >= 9 and output.accepted_drafts[0, 1] == 0
    assert output.no_speech[0] < 0.1 and output.confidence.min() > 0.2
    draft_ids = output.sequences.tolist()
    again = model.generate(**processor(clip, sampling_rate=16000), draft_ids=draft_ids, return_dict_in_generate=True)
    assert again.sequences.tolist() == draft_ids and again.nfe[0] <= 2 and again.accepted_drafts[0, 1] >= 15

    model = AutoModelForSpeechSeq2Seq.from_pretrained(default_checkpoint(), dtype=torch.bfloat16)
    text = processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]
    assert jiwer.wer(normalize(transcript), normalize(text)) <= 0.15


def test_the_text_is_that_of_the_whisper_in_it(model, processor):
    files = [RECORDING]
    if LIBRISPEECH.exists():
        files += [LIBRISPEECH / row["file_name"] for row in librispeech() if row["duration_s"] < 10][:2]
    eos, donor = model.config.eos_token_id, model.to_whisper()
    inputs = processor(files)
    output = model.generate(**inputs, temperature=0.0, compression_ratio_threshold=None, logprob_threshold=None)
    for file, row in zip(files, output.tolist(), strict=True):
        # The stock class knows no mask of frames: each clip alone.
        with torch.no_grad():
            encoded = model.encode(**processor(file))
        assert encoded.attention_mask.all()
        frames = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
        [expected] = donor.generate(encoder_outputs=frames).tolist()
        assert [i for i in row if i != eos] == [i for i in expected if i != eos]


@needs_released_whisper
def test_the_whisper_in_it_is_the_donor_bit_by_bit(model, tmp_path):
    save_released("tiny.en", tmp_path)
    donor = WhisperForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).state_dict()
    own = model.to_whisper().half().state_dict()
    assert set(own) == set(donor)
    assert [name for name in donor if not torch.equal(own[name], donor[name])] == []


def test_every_form_and_rate_of_the_audio_gives_the_transcript(model, processor, clip, transcript):
    forms = {
        "path": RECORDING,
        "bytes": RECORDING.read_bytes(),
        "dict": {"array": clip, "sampling_rate": 16000},
        "float64": (clip.astype(np.float64), 16000),
        "int16": (np.round(clip * 32767).astype(np.int16), 16000),
        "stereo": (np.stack([clip, clip]), 16000),
        "tensor": torch.from_numpy(clip),
    }
    inputs = processor(list(forms.values()), sampling_rate=16000)
    texts = processor.batch_decode(model.generate(**inputs))
    assert dict(zip(forms, texts, strict=True)) == dict.fromkeys(forms, transcript)

    for rate in [8000, 44100, 48000]:
        import soxr

        text = processor.decode(model.generate(**processor(soxr.resample(clip, 16000, rate), sampling_rate=rate)))[0]
        # 8 kHz speech has lost its upper half.
        assert jiwer.wer(normalize(transcript), normalize(text)) <= (0.35 if rate == 8000 else 0.0)


def test_what_is_too_long_or_no_speech(clip, model, processor):
    pipe = pipeline("automatic-speech-recognition", model=str(default_checkpoint()), pipeline_class=MDMASRPipeline)
    speech = pipe(str(RECORDING))
    assert speech["text"].strip() == TEXT and speech["nfe"] == 4
    noise = np.random.default_rng(0).standard_normal(len(clip)).astype(np.float32) * 0.1
    unheard = pipe(noise)
    assert unheard["text"] == "" and unheard["confidence"] is None and unheard["nfe"] <= 1

    clips = [np.zeros(n, np.float32) for n in (0, 16000, 80000)] + [np.full(n, 0.1, np.float32) for n in (1, 160, 400)]
    out = model.generate(**processor(clips, sampling_rate=16000), return_dict_in_generate=True)
    assert processor.batch_decode(out.sequences) == [""] * 6 and out.nfe.tolist() == [0] * 6

    with pytest.raises(ValueError, match="30"):
        processor(np.zeros(31 * 16000, np.float32), sampling_rate=16000)
    pipe = pipeline("automatic-speech-recognition", model=str(default_checkpoint()))
    with pytest.raises(ValueError, match="30"):
        pipe(np.zeros(31 * 16000, np.float32))


def librispeech():
    return [json.loads(line) for line in (LIBRISPEECH / "metadata.jsonl").read_text().splitlines()]


@needs_librispeech
def test_word_error_rate_on_librispeech_clips(model, processor):
    """Every twenty-fourth clip in order of length; these have 7.7 %, in 4 tokens an evaluation."""
    rows = sorted(librispeech(), key=lambda row: row["duration_s"])[::24]
    references, texts, num_tokens, num_evaluations = [], [], 0, 0
    for start in range(0, len(rows), 7):
        batch = rows[start : start + 7]
        inputs = processor([LIBRISPEECH / row["file_name"] for row in batch])
        output = model.generate(**inputs, return_dict_in_generate=True)
        texts += processor.batch_decode(output.sequences)
        references += [row["text"] for row in batch]
        num_tokens += int((output.confidence > 0).sum())
        num_evaluations += int(output.nfe.sum())
    wer = jiwer.wer([normalize(r) for r in references], [normalize(t) for t in texts])
    assert wer < 0.082 and num_tokens / num_evaluations > 3.9
