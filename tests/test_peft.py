"""PEFT's LoRA wraps the model, trains with the stock Trainer and with ISCTTrainer, and merges back."""

import pytest
import torch
from test_trainers import Clips, trainable_model
from tiny_models import tiny_drafts_model
from transformers import Trainer, TrainingArguments

from mdm_asr_hf import MDMASRForConditionalGeneration
from mdm_asr_hf.objective_mdm_asr import DiffusionObjective
from mdm_asr_hf.train.trainer import TRAINING_WEIGHTS_NAME, ISCTTrainer, MDMASRTrainingArguments

peft = pytest.importorskip("peft")


def wrapped_model(**settings):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    return peft.get_peft_model(trainable_model(), peft.LoraConfig(**settings))


def make_trainer(cls, tmp_path, model, **settings):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "max_steps": 40,
        "logging_steps": 1,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    } | settings
    arguments = MDMASRTrainingArguments if cls is ISCTTrainer else TrainingArguments
    args = arguments(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return cls(model, args, train_dataset=Clips(), eval_dataset=Clips())


def canvas_logits(model, data):
    """Logits of a canvas of masks, which say more than a loss."""
    prompt = torch.full((4, 1), 60)
    canvas = torch.full((4, 7), 61)
    with torch.no_grad():
        inputs = {"input_features": data.features, "attention_mask": data.mask}
        return model.eval()(**inputs, decoder_input_ids=torch.cat([prompt, canvas], dim=1)).logits


@pytest.mark.parametrize("cls", [Trainer, ISCTTrainer])
def test_lora_trains_generates_and_merges_back(tmp_path, cls):
    model, data = wrapped_model(), Clips()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in names)
    assert {"encoder", "self_attn", "cross_attn"} <= {part for name in names for part in name.split(".")}
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before_logits = canvas_logits(model, data)

    trainer = make_trainer(cls, tmp_path, model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)

    logits = canvas_logits(model, data)
    assert (logits - before_logits).abs().max() > 0.1
    tokens = model.eval().generate(input_features=data.features, attention_mask=data.mask)
    merged = model.merge_and_unload()
    assert type(merged) is MDMASRForConditionalGeneration
    torch.testing.assert_close(canvas_logits(merged, data), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.generate(data.features, attention_mask=data.mask), tokens)
    merged.save_pretrained(tmp_path / "merged")
    loaded = MDMASRForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(canvas_logits(loaded, data), logits, atol=1e-5, rtol=1e-5)


def test_lora_trains_donor_and_drafts(tmp_path):
    plain, data = tiny_drafts_model(dtype=torch.float32), Clips()
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"]))
    trainer = make_trainer(ISCTTrainer, tmp_path, model, max_steps=20)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    assert {".drafts." in name for name in names} == {False, True}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss_drafts"] < before["eval_loss_drafts"]
    assert after["eval_loss_donor"] < before["eval_loss_donor"]
    merged = model.eval().merge_and_unload()
    assert merged.generate(data.features, attention_mask=data.mask).shape[0] == len(data.features)


def test_adapter_checkpoints_resume_with_an_average_and_the_mask_can_learn_in_full(tmp_path):
    settings = dict(modules_to_save=["input_only_embeddings"])
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(
            ISCTTrainer,
            tmp_path,
            wrapped_model(**settings),
            max_steps=4,
            ema_decay=0.5,
            save_strategy="steps",
            save_steps=2,
            freeze_lower_layers=1,
            predict_with_generate=True,
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and (checkpoint / TRAINING_WEIGHTS_NAME).exists()

    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert any("input_only_embeddings" in name for name in trained)
    assert any("decoder.layers.1." in name for name in trained)
    assert not any("decoder.layers.0." in name for name in trained)
    assert trainer.predict(Clips()).predictions.shape[0] == 4
    adapter = peft.PeftModel.from_pretrained(trainable_model(), tmp_path / "checkpoint-4")
    torch.testing.assert_close(canvas_logits(adapter, Clips()), canvas_logits(trainer.model, Clips()))


def test_the_objective_passes_through_the_wrapper():
    model, data = wrapped_model(), Clips()
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    outputs = [one.eval()(**batch, objective=DiffusionObjective(num_steps=3)) for one in (model, trainable_model())]
    # A fresh adapter changes nothing.
    assert len(outputs[0].canvases) == 3 and torch.equal(outputs[0].step_losses, outputs[1].step_losses)
