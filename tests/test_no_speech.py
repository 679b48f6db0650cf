"""The decision that nothing was said."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from mdm_asr_hf import MDMASRGenerationConfig, default_checkpoint
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
from mdm_asr_hf.no_speech_mdm_asr import no_speech_probability, surest_tokens, window_means, with_confidence

RATE_HZ = 16000
RECORDING = next((Path(__file__).parent.parent / "demo").glob("*.flac"))


def settings_of(width=16, **changes):
    """Weights of 0, so that the bias decides, and no say for the confidences."""
    values = dict(
        weights=[0.0] * width,
        bias=0.0,
        window_frames=4,
        step_frames=2,
        confidence_weight=0.0,
        confidence_offset=0.0,
        threshold=0.5,
    )
    return values | changes


def test_windows_by_hand():
    values = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7], [1, 2, 3, 90, 90, 90, 90]])
    windows = window_means(values, torch.tensor([7, 3]), window_frames=4, step_frames=2)
    # Starts 0 and 2, and 3, the last that fits; the second row is shorter than a window.
    torch.testing.assert_close(windows, torch.tensor([[2.5, 4.5, 5.5], [2, 2, 2]], dtype=torch.float64))
    many = window_means(torch.stack([values, -values], dim=-1), torch.tensor([7, 3]), 4, 2)
    torch.testing.assert_close(many, torch.stack([windows, -windows], dim=-1))


def test_probability_by_hand():
    frames = torch.tensor([[[1.0, 0], [3, 0], [0, 1], [0, 1], [9, 9]], [[0.0, 1], [0, 3], [50, 0], [50, 0], [50, 0]]])
    outputs = MDMASREncoderOutput(
        last_hidden_state=frames, attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    )
    probe = settings_of(weights=[1.0, -1.0], bias=0.5, window_frames=2, step_frames=1)
    # Evidence 1, 3, -1, -1: its windows are 2, 1, -1, the largest 2, with the bias 2.5. The second row: -2 + 0.5.
    expected = torch.tensor([1 / (1 + math.exp(2.5)), 1 / (1 + math.exp(-1.5))])
    torch.testing.assert_close(no_speech_probability(outputs, probe), expected)


def test_surest_tokens_and_their_say_by_hand():
    confidence = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.9], [0.5, 0.25, 0, 0, 0.9], [0, 0, 0, 0, 0.9]])
    is_text = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    surest = math.log(0.5) * torch.tensor([2.0, 1.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(surest_tokens(confidence, is_text), surest)
    probe = settings_of(confidence_weight=2.0, confidence_offset=math.log(0.5))
    after = with_confidence(torch.tensor([0.5, 0.2, 0.3]), confidence, is_text, probe)
    # Odds of no speech: 1 * 2^2, and 1/4 * 2^1; what has no text keeps its own.
    torch.testing.assert_close(after, torch.tensor([4 / 5, 1 / 3, 0.3]))


@pytest.mark.parametrize(
    "wrong, name",
    [
        ([], "no_speech"),
        ({"weights": [1.0]}, "no_speech"),
        (settings_of(extra=1), "no_speech"),
        (settings_of(weights=[]), "weights"),
        (settings_of(weights=[1.0, float("nan")]), "weights"),
        (settings_of(weights=["1"]), "weights"),
        (settings_of(bias=None), "bias"),
        (settings_of(confidence_weight=float("inf")), "confidence_weight"),
        (settings_of(window_frames=0), "window_frames"),
        (settings_of(step_frames=2.0), "step_frames"),
        (settings_of(threshold=0), "threshold"),
        (settings_of(threshold=1.5), "threshold"),
        (settings_of(threshold=True), "threshold"),
    ],
)
def test_malformed_settings_are_refused(wrong, name):
    with pytest.raises(ValueError, match=name):
        MDMASRGenerationConfig(no_speech=wrong)


def test_settings_survive_saving(tmp_path):
    MDMASRGenerationConfig(no_speech=settings_of()).save_pretrained(tmp_path)
    assert MDMASRGenerationConfig.from_pretrained(tmp_path).no_speech == settings_of()


@pytest.mark.parametrize("encoder", ["whisper", "parakeet", "wav2vec2"])
def test_generate_leaves_out_rows_without_speech(encoder):
    model = tiny_model(encoder)
    features, mask = tiny_inputs(encoder)
    arguments = dict(attention_mask=mask, return_dict_in_generate=True)
    plain = model.generate(features, **arguments)
    assert plain.no_speech is None
    # The first row's frames lie on one side of where the others' are.
    frames = model.encode(features, mask)
    width = frames.last_hidden_state.shape[-1]
    ones = settings_of(width, weights=torch.randn(width).tolist())
    odds = -torch.logit(no_speech_probability(frames, ones).double()).detach()
    probe = ones | {"bias": -float(odds.sort().values[1:].mean())}
    is_speech = odds + probe["bias"] > 0
    assert is_speech.any() and not is_speech.all()
    output = model.generate(features, no_speech=probe, **arguments)
    assert ((output.no_speech < 0.5) == is_speech).all()
    for row, spoken in enumerate(is_speech.tolist()):
        length = int((plain.confidence[row] > 0).sum()) if spoken else 1
        expected = plain.sequences[row, :length].tolist() if spoken else [model.config.eos_token_id]
        assert output.sequences[row, :length].tolist() == expected
        assert bool(output.nfe[row]) == spoken
        own = features[row : row + 1, : int(mask[row].sum())]
        alone = model.generate(own, no_speech=probe, return_dict_in_generate=True)
        torch.testing.assert_close(alone.no_speech, output.no_speech[row : row + 1], rtol=1e-4, atol=1e-5)
    outputs_only = model.generate(encoder_outputs=model.prepare_cross_attention(frames), no_speech=probe, **arguments)
    torch.testing.assert_close(outputs_only.no_speech, output.no_speech)


def test_doubtful_text_is_taken_back():
    model = tiny_model()
    features, mask = tiny_inputs()
    arguments = dict(attention_mask=mask, return_dict_in_generate=True)
    plain = model.generate(features, **arguments)
    # So strict that no text is sure enough, although the probe let it pass.
    strict = settings_of(bias=2.0, confidence_weight=1.0, confidence_offset=10.0)
    output = model.generate(features, no_speech=strict, **arguments)
    assert (output.sequences == model.config.eos_token_id)[:, 0].all() and output.sequences.shape[1] == 1
    assert (output.confidence == 0).all() and (output.no_speech > 0.5).all()
    assert output.nfe.tolist() == plain.nfe.tolist() and output.commit_steps[:, 0].tolist() == plain.nfe.tolist()


def test_none_switches_the_models_own_off():
    model = tiny_model()
    features, mask = tiny_inputs()
    plain = model.generate(features, attention_mask=mask)
    model.generation_config.no_speech = settings_of(bias=-5.0)
    assert (model.generate(features, attention_mask=mask) == model.config.eos_token_id).all()
    assert model.generate(features, attention_mask=mask, no_speech=None).equal(plain)


def test_drafted_text_stays():
    model = tiny_model()
    features, mask = tiny_inputs()
    silent = settings_of(bias=-5.0, confidence_weight=1.0, confidence_offset=10.0)
    drafts = [[5, 6], [-100], []]
    output = model.generate(
        features, attention_mask=mask, no_speech=silent, draft_ids=drafts, return_dict_in_generate=True
    )
    assert output.sequences[0, :2].tolist() == [5, 6] and output.nfe[0] > 0
    assert (output.sequences[1:, 0] == model.config.eos_token_id).all() and (output.nfe[1:] == 0).all()
    assert (output.no_speech > 0.9).all()


def test_samples_of_a_row_share_its_probability():
    model = tiny_model()
    features, mask = tiny_inputs()
    features[1] = 0.25
    output = model.generate(
        features,
        attention_mask=mask,
        no_speech=settings_of(bias=1.0),
        num_return_sequences=2,
        temperature=1.0,
        return_dict_in_generate=True,
    )
    expected = 1 / (1 + math.e)
    # The second is a constant: no signal at all.
    assert output.no_speech.tolist() == pytest.approx([expected, expected, 1, 1, expected, expected])
    assert output.nfe[2:4].tolist() == [0, 0]


def test_a_probe_of_another_encoder_is_refused():
    features, mask = tiny_inputs()
    with pytest.raises(ValueError, match="3 weights, but the encoder's frames have 16"):
        tiny_model().generate(features, attention_mask=mask, no_speech=settings_of(3))


@pytest.fixture(scope="module")
def model():
    return AutoModelForSpeechSeq2Seq.from_pretrained(default_checkpoint(), dtype="float32").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(default_checkpoint())


def _white(num, rng):
    return rng.standard_normal(num)


def _hum(num, rng):
    t = np.arange(num) / RATE_HZ
    return sum(np.sin(2 * np.pi * 50 * k * t + rng.uniform(0, 6)) / k for k in range(1, 20)) + 0.01 * _white(num, rng)


def _chords(num, rng):
    out = np.zeros(num)
    for start in range(0, num, RATE_HZ // 2):
        t = np.arange(num - start) / RATE_HZ
        root = 220 * 2 ** (rng.integers(0, 12) / 12)
        for step in (0, 4, 7):
            wave = sum(np.sin(2 * np.pi * root * 2 ** (step / 12) * k * t) / k for k in (1, 2, 3, 4))
            out[start:] += wave * np.minimum(t / 0.02, 1) * np.exp(-3 * t)
    return out


def _breath(num, rng):
    t = np.arange(num) / RATE_HZ
    spectrum, hz = np.fft.rfft(rng.standard_normal(num)), np.fft.rfftfreq(num, 1 / RATE_HZ)
    air = np.fft.irfft(
        spectrum * (np.exp(-(((hz - 900) / 500) ** 2)) + 0.4 * np.exp(-(((hz - 2600) / 900) ** 2))), num
    )
    return air * np.sin(np.pi * t / 1.7) ** 2


SOUNDS = {"white noise": _white, "hum": _hum, "chords": _chords, "breath": _breath}


@pytest.mark.parametrize("kind", SOUNDS)
def test_sounds_without_speech_give_no_text(model, processor, kind):
    rng = np.random.default_rng(0)
    clips = []
    for duration_s, level_db in ((0.5, -30), (1, -3), (2, -50), (4, -20), (8, -35), (15, -6)):
        sound = SOUNDS[kind](int(duration_s * RATE_HZ), rng)
        clips.append((sound / np.abs(sound).max() * 10 ** (level_db / 20)).astype(np.float32))
    output = model.generate(
        **processor(clips, sampling_rate=RATE_HZ, return_tensors="pt"), return_dict_in_generate=True
    )
    assert processor.batch_decode(output.sequences) == [""] * len(clips)
    assert (output.no_speech > 0.5).all()


def test_zeros_give_no_text_and_cost_nothing(model, processor):
    clips = [np.zeros(int(s * RATE_HZ), dtype=np.float32) for s in (0.5, 3, 15)]
    output = model.generate(
        **processor(clips, sampling_rate=RATE_HZ, return_tensors="pt"), return_dict_in_generate=True
    )
    assert processor.batch_decode(output.sequences) == [""] * 3
    assert output.nfe.tolist() == [0, 0, 0] and output.no_speech.tolist() == [1, 1, 1]


def test_speech_stays(model, processor):
    """As it is, very quiet, in noise, as a part of a long stretch of noise, and beside silence in one batch."""
    speech, rate = soundfile.read(RECORDING, dtype="float32")
    assert rate == RATE_HZ
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(len(speech)).astype(np.float32) * speech.std()
    long = rng.standard_normal(12 * RATE_HZ).astype(np.float32) * 0.03 * speech.std()
    long[5 * RATE_HZ : 5 * RATE_HZ + len(speech)] += speech
    clips = [speech, speech * 0.01, speech + 0.3 * noise, long, np.zeros_like(speech)]
    inputs = processor(clips, sampling_rate=RATE_HZ, return_tensors="pt")
    output = model.generate(**inputs, return_dict_in_generate=True, max_denoising_steps=8)
    assert (output.no_speech[:4] < 0.1).all() and output.no_speech[4] == 1
    texts = processor.batch_decode(output.sequences)
    assert all(texts[:4]) and not texts[4]
    for i in (0, 3):
        alone = model.generate(
            **processor(clips[i], sampling_rate=RATE_HZ, return_tensors="pt"),
            return_dict_in_generate=True,
            max_denoising_steps=8,
        )
        torch.testing.assert_close(alone.no_speech, output.no_speech[i : i + 1], rtol=1e-3, atol=1e-6)
