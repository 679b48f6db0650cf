# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Canary donors in transformers' format: a tiny one, saved and converted."""

import numpy as np
import pytest
import soundfile
import torch
from canary_donors import (
    MASK_EMBEDDING,
    NUM_MEL_BINS,
    check_drafts,
    features,
    frames,
    load_processor,
    logits_in_pieces,
    needs_parakeet_features,
    save_native_donor,
)
from safetensors.torch import load_file, save_file
from tables import each
from transformers import CanaryForConditionalGeneration

from mdm_asr_hf.convert.canary import canary_processor, from_canary
from mdm_asr_hf.generation_configuration_mdm_asr import MDMASRGenerationConfig
from mdm_asr_hf.modeling_mdm_asr import MDMASRForConditionalGeneration
from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids
from mdm_asr_hf.train import clips, donor_cache
from mdm_asr_hf.train.distillation import train_drafts

pytestmark = needs_parakeet_features


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return folder, save_native_donor(folder)


def copy_with_weights(folder, target, change):
    """A copy of `folder` whose tensors went through `change`."""
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@each("attention", ["sdpa", "eager"])
def test_logits_equal_the_donors(native, attention):
    folder, donor = native
    model = from_canary(MDMASRForConditionalGeneration, folder)
    # The decoder alone: eager ParakeetEncoders of older transformers turn padded batches into NaN.
    for decoder in (model.model.decoder, donor.model.decoder):
        decoder.set_attn_implementation(attention)
    assert not model.training and model.dtype == torch.float32
    values, mask = features()
    ids = torch.randint(0, 24, (2, 64), generator=torch.Generator().manual_seed(2))
    inputs = {"input_features": values, "attention_mask": mask, "decoder_input_ids": ids}
    with torch.no_grad():
        expected, logits = donor(**inputs).logits, model(**inputs).logits
        pieces = logits_in_pieces(model, model.encode(values, mask), ids, (9, 1, 20, 1, 33))
    assert expected.std() > 0.1  # the comparison would be empty on logits near zero
    assert expected.shape == (2, 64, 24)
    for ours in (logits, pieces):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@each("draft_branches", [["masks"], []])
def test_texts_equal_the_donors(native, draft_branches):
    folder, donor = native
    model = from_canary(MDMASRForConditionalGeneration, folder)
    languages = {"language": ["de", "en"] * 4, "punctuation": [True, True, False, False] * 2}
    prompts = torch.from_numpy(build_prompt_ids(model.generation_config.prompt_template, 8, **languages))
    expected = donor.generate(encoder_outputs=frames(), decoder_input_ids=prompts, max_length=64, do_sample=False)
    expected = expected[:, prompts.shape[1] :]
    # Some come to an end, others fill all the positions that the prompt leaves.
    num_ended = int((expected == model.config.eos_token_id).any(dim=1).sum())
    assert 0 < num_ended < 8 and expected.shape[1] == 64 - 9
    texts = model.generate(encoder_outputs=frames(), **languages, draft_branches=draft_branches)
    assert torch.equal(texts, expected)


@each("draft_layers", [None, 1])
def test_drafts_start_as_the_donors_last_layers(native, draft_layers):
    folder, donor = native
    model = from_canary(MDMASRForConditionalGeneration, folder, draft_layers=draft_layers)
    check_drafts(model, draft_layers or 2, donor.model.decoder.embed_tokens.weight, donor.model.decoder.norm.weight)
    with pytest.raises(ValueError, match="`draft_layers` .3. must be an integer from 0"):
        from_canary(MDMASRForConditionalGeneration, folder, draft_layers=3)


def test_drafts_learn_from_audio_alone(native, tmp_path, monkeypatch):
    folder, donor = native
    # Random models loop, as no donor that has learnt does.
    monkeypatch.setattr(donor_cache, "_why_not", lambda *text: None)
    monkeypatch.setattr(clips, "ALONE_SHARE", 1.0)
    rng = np.random.default_rng(0)
    for i in range(50):
        soundfile.write(tmp_path / f"{i:02d}.wav", 0.1 * rng.standard_normal(16_000), 16_000)
    settings = {"draft_steps": 40, "use_cpu": True, "bf16": False, "learning_rate": 1e-3}
    found = train_drafts(str(folder), [tmp_path], tmp_path / "out", language="de", logging_steps=10, **settings)
    assert list(found["stages"]) == ["drafts"]
    losses = [entry["loss"] for entry in found["stages"]["drafts"]["log"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    # The donor is the donor's still, and writes the same.
    model = MDMASRForConditionalGeneration.from_pretrained(tmp_path / "out")
    languages = {"language": "de", "punctuation": True}
    prompts = torch.from_numpy(build_prompt_ids(model.generation_config.prompt_template, 8, **languages))
    expected = donor.generate(encoder_outputs=frames(), decoder_input_ids=prompts, max_length=64, do_sample=False)
    assert torch.equal(model.generate(encoder_outputs=frames(), **languages), expected[:, prompts.shape[1] :])
    with pytest.raises(ValueError, match="`encoder_steps=1` teaches a Whisper encoder"):
        train_drafts(str(folder), [tmp_path], tmp_path / "other", encoder_steps=1)


def test_model_and_mask_survive_a_round_trip(native, tmp_path):
    folder, donor = native
    model = from_canary(MDMASRForConditionalGeneration, folder, draft_layers=0)
    embedding = donor.model.decoder.embed_tokens.weight
    torch.testing.assert_close(model.state_dict()[MASK_EMBEDDING], embedding.mean(dim=0, keepdim=True))
    num_parameters = sum(p.numel() for p in donor.parameters())
    assert sum(p.numel() for p in model.parameters()) == num_parameters + embedding.shape[1]
    assert all(p.requires_grad for p in model.parameters())
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert model.config.mask_token_id == 24 and model.config.vocab_size == 24

    model = from_canary(MDMASRForConditionalGeneration, native[0])
    model.save_pretrained(tmp_path)
    loaded = MDMASRForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.generation_config.prompt_template == model.generation_config.prompt_template


def test_prompt_and_special_ids(native):
    folder, _ = native
    model, (processor, batch) = from_canary(MDMASRForConditionalGeneration, folder), load_processor(folder)
    assert isinstance(model.generation_config, MDMASRGenerationConfig)
    template = model.generation_config.prompt_template
    assert processor.prompt_template == template
    names = ["<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|de|>", "<|de|>", "<|nopnc|>"]
    names += ["<|noitn|>", "<|notimestamp|>", "<|nodiarize|>"]
    prompt = build_prompt_ids(template, language="de", punctuation=False)[0].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(prompt) == names
    translation = build_prompt_ids(template, language="de", target_language="en")[0].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(translation)[3:6] == ["<|de|>", "<|en|>", "<|pnc|>"]
    assert processor.tokenizer.mask_token_id == model.config.mask_token_id
    # Ids 2, 3 and 7 by their place in SPECIAL_TOKENS, behind <unk>.
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.decoder_start_token_id) == (2, 3, 7)
    assert batch["input_features"].shape[-1] == NUM_MEL_BINS
    sequences = model.generate(**batch, language="de")
    assert sequences.shape[0] == 1 and int(sequences.max()) < 24


def test_dtype_and_half_precision(native, tmp_path):
    model = from_canary(MDMASRForConditionalGeneration, native[0], dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Positions are computed in single precision, whatever the weights are in.
    assert model.model.encoder.encode_positions.inv_freq.dtype == torch.float32
    with pytest.raises(ValueError, match="'float33'"):
        from_canary(MDMASRForConditionalGeneration, native[0], dtype="float33")

    folder = copy_with_weights(native[0], tmp_path / "half", lambda weights: None)
    donor = CanaryForConditionalGeneration.from_pretrained(native[0], dtype=torch.bfloat16)
    donor.save_pretrained(folder)
    half = from_canary(MDMASRForConditionalGeneration, folder, draft_layers=0)
    single = from_canary(MDMASRForConditionalGeneration, folder, dtype=torch.float32, draft_layers=0)
    assert half.dtype == torch.bfloat16 and single.dtype == torch.float32
    # Positions do not take over the precision of the weights.
    torch.testing.assert_close(
        half.model.encoder.encode_positions.inv_freq, single.model.encoder.encode_positions.inv_freq, rtol=0, atol=0
    )
    for name, tensor in half.state_dict().items():
        if name != MASK_EMBEDDING:
            assert torch.equal(single.state_dict()[name], tensor.to(single.state_dict()[name].dtype)), name
    # The mean is rounded once, not at every sum.
    embedding = donor.model.decoder.embed_tokens.weight.detach()
    torch.testing.assert_close(single.state_dict()[MASK_EMBEDDING][0], embedding.double().mean(dim=0).float())


def test_loading_is_strict(native, tmp_path):
    changes = [
        (lambda w: w.pop("model.decoder.layers.1.encoder_attn.k_proj.bias"), "layers.1.encoder_attn.k_proj.bias"),
        (lambda w: w.pop("model.encoder.layers.0.conv.norm.running_mean"), "layers.0.conv.norm.running_mean"),
        (lambda w: w.update({"model.decoder.surprise.weight": torch.ones(1)}), "1 unknown: model.decoder.surprise"),
        (lambda w: w.update({"model.decoder.norm.weight": torch.ones(5)}), r"model.decoder.norm.weight is \(5,\)"),
        (lambda w: w.update({"proj_out.weight": torch.ones(24, 16)}), "output weights differ"),
    ]
    for number, (change, name) in enumerate(changes):
        folder = copy_with_weights(native[0], tmp_path / str(number), change)
        with pytest.raises(ValueError, match=name):
            from_canary(MDMASRForConditionalGeneration, folder)

    folder = copy_with_weights(native[0], tmp_path / "changed", lambda weights: None)
    (folder / "model.safetensors").unlink()
    torch.save(native[1].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors only"):
        from_canary(MDMASRForConditionalGeneration, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="donor's processor"):
        canary_processor(folder)
