import copy

import pytest
import torch
from tables import each
from tiny_data import save_model
from tiny_models import tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from torch import nn
from transformers import AutoModelForSpeechSeq2Seq

from mdm_asr_hf import MDMASRInt8Config, default_checkpoint, int8, quantize_int8
from mdm_asr_hf.diffusion_mdm_asr import lay_blocks
from mdm_asr_hf.int8 import Int8Linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"), tiny_model("whisper"), tiny_processor())


def test_int8_layers_by_hand_and_under_autocast():
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        # Scales 1 / 127 and 2 / 127: the weights are 127, 64 and -127, 32 of them.
        linear.weight.copy_(torch.tensor([[1.0, 64 / 127], [-2.0, 64 / 127]]))
        linear.bias.copy_(torch.tensor([0.0, 1.0]))
    layer = Int8Linear(linear)
    # The largest of a position is 127 steps.
    outputs = layer(torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(outputs, torch.tensor([[1 - 64 / 127, 1 - 2 - 64 / 127]]), atol=2e-2, rtol=0)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (2, 2)
    assert layer(torch.empty(0, 2)).shape == (0, 2)

    # 8 products of the largest activation and the largest weight: 8 x 3 x 2, of which 16 bits hold half.
    linear = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0] * 8, [-2.0] * 8]))
    torch.testing.assert_close(Int8Linear(linear)(torch.full((1, 8), 3.0)), torch.tensor([[48.0, -48.0]]))

    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    states = torch.randn(3, 5, 64)
    exact, close = linear(states), Int8Linear(linear)(states)
    assert close.shape == exact.shape
    assert (close - exact).norm() / exact.norm() < 0.02
    # A row of zeros has no scale of its own.
    with torch.no_grad():
        linear.weight[3] = 0.0
    assert torch.allclose(Int8Linear(linear)(states)[..., 3], linear.bias[3])

    for dtype in [torch.bfloat16, torch.float16]:
        linear = nn.Linear(64, 48)
        layer, states = Int8Linear(linear), torch.randn(3, 5, 64).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer(states), layer(states.float()))
        assert torch.allclose(layer(states), linear(states.float()), atol=0.1)


@each("bias", [True, False])
@each("engines", [int8.FIXED_STEPS_ENGINES, ()])
def test_a_position_depends_on_no_other(monkeypatch, bias, engines):
    monkeypatch.setattr(int8, "FIXED_STEPS_ENGINES", engines)
    torch.manual_seed(0)
    # One huge, one of zeros.
    states = torch.randn(4, 5, 64) * torch.tensor([1.0, 1e4, 0.0, 0.1])[:, None, None]
    for width in (48, 64, 200):
        linear = nn.Linear(64, width, bias=bias)
        layer = Int8Linear(linear)
        exact, close = linear(states), layer(states)
        errors = ((close - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2)).clamp(min=1e-9)).tolist()
        assert max(errors) < 0.02 and close[2].equal(exact[2])
        for row in range(4):
            assert layer(states[row, 1:3]).equal(close[row, 1:3])


@each("encoder", ["whisper", "parakeet"])
@each("parts", [("encoder",), ("decoder",), ("encoder", "decoder")])
@each("has_drafts", [False, True])
def test_the_named_parts_become_int8(encoder, parts, has_drafts):
    model = tiny_drafts_model(encoder, dtype=torch.float32) if has_drafts else tiny_model(encoder)
    model = quantize_int8(model, parts)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            part = "encoder" if name.startswith("model.encoder.") else "decoder"
            assert isinstance(module, Int8Linear) == (part in parts), name
    features, mask = tiny_inputs(encoder)
    out = model.generate(features, attention_mask=mask, return_dict_in_generate=True, return_token_timestamps=True)
    assert out.confidence.isfinite().all() and out.token_timestamps.isfinite().all()


@each("encoder", ["whisper", "parakeet"])
def test_the_text_is_the_same_with_any_drafts_in_any_batch(encoder):
    model = quantize_int8(tiny_drafts_model(encoder, dtype=torch.float32))
    features, mask = tiny_inputs(encoder)
    expected = model.generate(features, mask, max_new_tokens=30, draft_branches=[])
    assert len({tuple(row) for row in expected.tolist()}) > 1
    for length in (1, 2, 3):
        output = model.generate(features, mask, max_new_tokens=30, draft_length=length, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected) and output.accepted_drafts.sum() > 0
    for row in range(3):
        length = int(mask[row].sum())
        alone = model.generate(features[row : row + 1, :length], mask[row : row + 1, :length], max_new_tokens=30)
        assert torch.equal(alone[0], expected[row, : alone.shape[1]])


def test_from_pretrained_quantizes_and_bad_uses_are_named(folder, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=MDMASRInt8Config()).eval()
    by_hand = quantize_int8(AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval())
    assert isinstance(model.proj_out, Int8Linear) and model.dtype == torch.float32 and model.is_quantized
    features, mask = tiny_inputs("whisper")
    assert model.generate(features, attention_mask=mask).equal(by_hand.generate(features, attention_mask=mask))
    # In half precision on the Hub or not: int8 starts from fp32.
    config = MDMASRInt8Config(parts=["decoder"])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float16, quantization_config=config)
    assert model.dtype == torch.float32 and not isinstance(model.model.encoder.layers[0].fc1, Int8Linear)

    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=MDMASRInt8Config())
    with pytest.raises(ValueError, match="mdm_asr_int8"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be saved. Save the model in fp32"):
        quantize_int8(tiny_model("whisper")).state_dict()

    with pytest.raises(ValueError, match="`parts` must be of"):
        MDMASRInt8Config(parts=["head"])
    with pytest.raises(ValueError, match="`parts` must be of"):
        quantize_int8(tiny_model("whisper"), ())
    with pytest.raises(ValueError, match="`tie_word_embeddings=False`.* `parts=.'encoder',.`"):
        quantize_int8(tiny_model("whisper", tie_word_embeddings=False))
    with pytest.raises(ValueError, match="Resize the model in fp32"):
        quantize_int8(tiny_model("whisper")).resize_token_embeddings(70)
    with pytest.raises(ValueError, match="int8 needs a model in fp32"):
        quantize_int8(tiny_model("whisper").to(torch.bfloat16))
    with pytest.raises(ValueError, match="int8 runs on CPUs"):
        quantize_int8(tiny_model("whisper").to("meta"))
    with pytest.raises(ValueError, match="int8 runs on CPUs"):
        AutoModelForSpeechSeq2Seq.from_pretrained(folder, device_map="cuda", quantization_config=MDMASRInt8Config())


def test_the_default_checkpoint_in_int8_predicts_what_it_does_in_fp32():
    model = AutoModelForSpeechSeq2Seq.from_pretrained(default_checkpoint(), dtype=torch.float32).eval()
    int8 = quantize_int8(copy.deepcopy(model))
    features, mask = tiny_inputs("whisper", seconds=(2.0,))
    frames, close = model.encode(features, mask), int8.encode(features, mask)
    difference = (frames.last_hidden_state - close.last_hidden_state).norm() / frames.last_hidden_state.norm()
    assert difference < 0.2
    # The prompt and a text.
    ids = torch.tensor([[50257, 50362, 679, 550, 1043, 810, 465, 9966, 373]])
    arguments = dict(decoder_input_ids=ids, encoder_outputs=frames, frontiers=torch.tensor([[1, 4, 7]]))
    arguments["block_ids"] = lay_blocks(ids[:, [2, 5, 8]], 8, model.config.mask_token_id)
    exact, close = (one(**arguments) for one in (model, int8))
    exact_log, close_log = (one.logits.log_softmax(dim=-1) for one in (exact, close))
    assert (exact_log.exp() * (exact_log - close_log)).sum(dim=-1).max() < 0.1
    difference = (exact.draft_hidden_states - close.draft_hidden_states).norm() / exact.draft_hidden_states.norm()
    assert difference < 0.1
