# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""PEFT's LoRA wraps the model, trains with the stock Trainer and with ISCTTrainer, and merges back."""

import pytest
import torch
from tiny_models import tiny_drafts_model
from tiny_training import Clips, arguments, logged, make_trainer, trainable_model, weights
from transformers import Trainer, TrainingArguments

from mdm_asr_hf import MDMASRForConditionalGeneration

peft = pytest.importorskip("peft")


def wrapped(model, *more_modules, **settings):
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", *more_modules], **settings)
    )


def canvas_logits(model):
    """Logits of a canvas of masks, which say more than a loss."""
    canvas = torch.cat([torch.full((4, 1), 60), torch.full((4, 7), 61)], dim=1)
    inputs = {name: value for name, value in Clips().batch().items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs, decoder_input_ids=canvas).logits


def test_lora_trains_generates_and_merges_back(tmp_path):
    for is_ours in [False, True]:
        model, data, settings = wrapped(trainable_model()), Clips(), {"learning_rate": 2e-2, "max_steps": 15}
        if is_ours:
            trainer = make_trainer(tmp_path, model, **settings)
        else:
            args = arguments(tmp_path, TrainingArguments, **settings)
            trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {"encoder", "self_attn", "cross_attn"} <= {part for name in trained for part in name.split(".")}
        before_logits, before, base = canvas_logits(model), trainer.evaluate()["eval_loss"], weights(model)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.9 * before
        changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, base[name])}
        assert changed and changed <= trained and all("lora_" in name for name in changed)
        logits = canvas_logits(model)
        assert (logits - before_logits).abs().max() > 0.1
        tokens = model.generate(input_features=data.features, attention_mask=data.mask)
        merged = model.merge_and_unload()
        assert type(merged) is MDMASRForConditionalGeneration
        torch.testing.assert_close(canvas_logits(merged), logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.generate(data.features, attention_mask=data.mask), tokens)
        merged.save_pretrained(tmp_path / "merged")
        loaded = MDMASRForConditionalGeneration.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(canvas_logits(loaded), logits, atol=1e-5, rtol=1e-5)

    model = wrapped(tiny_drafts_model(dtype=torch.float32), "fc1")
    trainer = make_trainer(tmp_path, model, learning_rate=2e-2, max_steps=15)
    assert {".drafts." in name for name, p in model.named_parameters() if p.requires_grad} == {False, True}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert all(after[f"eval_loss_{part}"] < before[f"eval_loss_{part}"] for part in ("donor", "drafts"))


def test_adapter_checkpoints_resume_with_an_average_and_the_mask_can_learn_in_full(tmp_path):
    runs = []
    settings = dict(ema_decay=0.5, save_strategy="steps", save_steps=2, predict_with_generate=True, max_steps=4)
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(
            tmp_path, wrapped(trainable_model(), modules_to_save=["input_only_embeddings"]), **settings
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append((logged(trainer, "loss"), weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())
    assert any("input_only_embeddings" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert trainer.predict(Clips()).predictions.shape[0] == 4
    adapter = peft.PeftModel.from_pretrained(trainable_model(), tmp_path / "checkpoint-4")
    torch.testing.assert_close(canvas_logits(adapter), canvas_logits(trainer.model))
