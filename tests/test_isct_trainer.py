"""ISCTTrainer: self-correction steps, their logs, evaluation, freezing, averaged weights, resuming, NaN."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import EOS, Clips, trainable_model
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from transformers import EvalPrediction, HfArgumentParser, TrainerCallback

from mdm_asr_hf.objective_mdm_asr import DiffusionObjective, DraftObjective
from mdm_asr_hf.train.trainer import (
    TRAINING_WEIGHTS_NAME,
    ISCTTrainer,
    MDMASRTrainingArguments,
    WeightAverage,
    make_wer_metric,
)

MASK = VOCAB_SIZE + 1


def arguments(tmp_path, **settings):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 3,
        "lr_scheduler_type": "constant",
    } | settings
    return MDMASRTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )


def make_trainer(tmp_path, model=None, callbacks=None, **settings):
    model = trainable_model() if model is None else model
    data = Clips()
    return ISCTTrainer(
        model, arguments(tmp_path, **settings), train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_training_lowers_the_loss_and_logs_every_step(tmp_path, num_steps):
    trainer = make_trainer(tmp_path, isct_steps=num_steps, max_steps=60, logging_steps=20)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    names = [f"{kind}_step_{i + 1}" for kind in ("loss", "accuracy") for i in range(num_steps)]
    for name in names:
        assert len(logged(trainer, name)) == 3
        assert (after[f"eval_{name}"] < before[f"eval_{name}"] / 2) == name.startswith("loss")
    assert f"loss_step_{num_steps + 1}" not in trainer.state.log_history[0]
    assert after["eval_accuracy_step_1"] > 0.9 > before["eval_accuracy_step_1"]
    # Between two logs both are means over the same batches.
    for entry in trainer.state.log_history:
        if "loss_step_1" in entry:
            assert entry["loss"] == pytest.approx(sum(entry[f"loss_step_{i + 1}"] for i in range(num_steps)), rel=1e-5)
    assert after["eval_loss"] == pytest.approx(sum(after[f"eval_loss_step_{i + 1}"] for i in range(num_steps)))


def test_logged_steps_are_means_over_the_batches_between_logs(tmp_path):
    seen = []

    class Recorder(ISCTTrainer):
        def compute_loss(self, *args, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            seen.append([*outputs.step_losses.tolist(), *outputs.step_accuracies.tolist()])
            return loss

    settings = dict(max_steps=4, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    trainer = Recorder(trainable_model(), arguments(tmp_path, **settings), train_dataset=Clips())
    trainer.train()
    means = torch.tensor(seen).view(2, 4, 4).mean(dim=1)
    names = ["loss_step_1", "loss_step_2", "accuracy_step_1", "accuracy_step_2"]
    torch.testing.assert_close(torch.tensor([logged(trainer, name) for name in names]).T, means)


def test_the_second_step_sees_wrong_tokens_of_the_model(tmp_path):
    seen = []

    class Recorder(ISCTTrainer):
        def compute_loss(self, *args, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            seen.append(outputs.canvases)
            return loss

    model = trainable_model()
    model.generation_config.canvas_length = 8
    settings = dict(train_sampling_strategy="sequential", max_steps=4)
    Recorder(model, arguments(tmp_path, **settings), train_dataset=Clips()).train()
    targets = torch.tensor([[*text, EOS] + [EOS] * (7 - len(text)) for text in Clips.texts])
    first_wrong = [int(((one != targets) & (one != MASK)).sum()) for one, _ in seen]
    second_wrong = [int(((two != targets) & (two != MASK)).sum()) for _, two in seen]
    assert first_wrong == [0] * 4 and sum(second_wrong) > 10
    for one, two in seen:
        # What the first step saw is carried over or masked again, never changed.
        shown = one != MASK
        assert ((two == targets) | (two == MASK))[shown].all()


def test_the_objective_gets_the_arguments(tmp_path):
    args = arguments(
        tmp_path,
        isct_steps=3,
        noise_schedule="cosine",
        position_biased_share=0.5,
        band_width=4.0,
        isct_sample_predictions=True,
        isct_stop_gradient=False,
        eos_weight=0.3,
        loss_weighting="flat",
        low_discrepancy_timesteps=False,
    )
    assert args.make_objective() == DiffusionObjective(
        schedule="cosine",
        num_steps=3,
        position_biased_share=0.5,
        band_width=4.0,
        sample_predictions=True,
        stop_gradient=False,
        eos_weight=0.3,
        weighting="flat",
        low_discrepancy=False,
    )
    trainer = ISCTTrainer(trainable_model(), args, train_dataset=Clips())
    trainer.train()
    assert len(logged(trainer, "loss_step_3")) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"noise_schedule": "quadratic"}, "`noise_schedule` 'quadratic' is unknown.*cosine.*linear"),
        ({"isct_steps": 0}, "`isct_steps`.* 0"),
        ({"position_biased_share": 1.5}, "`position_biased_share`.*1.5"),
        ({"band_width": 0.0}, "`band_width`.*0.0"),
        ({"eos_weight": -1.0}, "`eos_weight`.*-1.0"),
        ({"loss_weighting": "even"}, "`loss_weighting`.*'even'"),
        ({"ema_decay": 1.0}, "`ema_decay`.*1.0.*None"),
        ({"causal_anneal_steps": -1}, "`causal_anneal_steps`.*-1"),
        ({"freeze_lower_layers": -2}, "`freeze_lower_layers`.*-2"),
        ({"max_seconds_per_batch": 0.0}, "`max_seconds_per_batch`.*0.0"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1`"),
        ({"draft_frontiers": 0}, "`draft_frontiers`.* 0"),
        ({"draft_place_decay": 2.0}, "`draft_place_decay`.*2.0"),
        ({"draft_weight": -1.0}, "`draft_weight`.*-1.0"),
        ({"freeze_encoder": True, "encoder_learning_rate": 1e-4}, "`encoder_learning_rate=0.0001`.*`freeze_encoder`"),
    ],
)
def test_nonsense_in_the_arguments_raises_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_nonsense_for_the_trainer_raises(tmp_path):
    with pytest.raises(ValueError, match="`freeze_lower_layers=3`.* 2 layers"):
        make_trainer(tmp_path, freeze_lower_layers=3)
    with pytest.raises(ValueError, match="`causal_anneal_steps=4`.* stays causal"):
        make_trainer(tmp_path, tiny_drafts_model(), causal_anneal_steps=4)
    with pytest.raises(ValueError, match="MDMASRTrainingArguments, got NoneType"):
        ISCTTrainer(trainable_model())
    with pytest.raises(ValueError, match="`compute_loss_func`"):
        ISCTTrainer(trainable_model(), arguments(tmp_path), compute_loss_func=lambda *a: 0)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="no `labels`.*DataCollatorForMDMASR"):
        trainer.compute_loss(trainer.model, {"input_features": Clips().features})


def test_arguments_come_from_a_command_line_and_have_sane_defaults(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--isct_steps", "1", "--ema_decay", "0.99", "--freeze_encoder"]
    (args,) = HfArgumentParser(MDMASRTrainingArguments).parse_args_into_dataclasses(line)
    assert args.isct_steps == 1 and args.ema_decay == 0.99 and args.freeze_encoder and args.isct_stop_gradient
    assert args.remove_unused_columns is False
    json.dumps(args.to_dict(), default=str)
    best = arguments(
        tmp_path, predict_with_generate=True, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps"
    )
    assert best.metric_for_best_model == "wer" and best.greater_is_better is False
    assert arguments(tmp_path, metric_for_best_model="eval_dev_wer").greater_is_better is False
    assert arguments(tmp_path, metric_for_best_model="accuracy_step_1").greater_is_better is True
    assert arguments(tmp_path, metric_for_best_model="loss").greater_is_better is False


def test_several_gpus_in_one_process_become_one(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 4
    trainer = ISCTTrainer(trainable_model(), args, train_dataset=Clips())
    assert trainer.args.n_gpu == 1


# ---- Evaluation ----


def test_evaluation_is_deterministic_and_leaves_training_alone(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    state = torch.get_rng_state()
    first = trainer.evaluate()
    torch.manual_seed(123)
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]

    # The order of batches does not matter, nor does what was masked in training.
    data = Clips()
    turned = torch.utils.data.Subset(data, [2, 3, 0, 1])
    assert trainer.evaluate(turned)["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    other = make_trainer(
        tmp_path,
        per_device_eval_batch_size=2,
        position_biased_share=1.0,
        eos_weight=0.1,
        loss_weighting="flat",
        noise_schedule="cosine",
    )
    assert other.evaluate()["eval_loss_step_1"] == pytest.approx(first["eval_loss_step_1"], rel=1e-6)

    # Not every batch has the same masks.
    canvases = []
    for rows in ([0, 1], [2, 3]):
        batch = torch.utils.data.default_collate([data[i] for i in rows])
        _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
        canvases.append(outputs.canvases[0][:, :6] == MASK)
    assert (canvases[0] != canvases[1]).any()
    torch.set_rng_state(state)
    drawn = torch.rand(3)
    torch.set_rng_state(state)
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    trainer.compute_loss(trainer.model.eval(), batch)
    assert torch.equal(torch.rand(3), drawn)


def test_evaluation_weighs_rows_not_batches(tmp_path):
    # Batches of 3 and 1: 3/4 and 1/4 of the mean.
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3)
    data, losses = Clips(), []
    for rows in ([0, 1, 2], [3]):
        batch = torch.utils.data.default_collate([data[i] for i in rows])
        losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-5)
    assert metrics["eval_loss_step_1"] + metrics["eval_loss_step_2"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_wer_by_hand():
    processor = tiny_processor()
    tokenizer = processor.tokenizer

    def ids(texts, width=30):
        rows = [[*tokenizer.encode(" " + text), EOS] if text else [EOS] for text in texts]
        return torch.tensor([row + [-100] * (width - len(row)) for row in rows]).numpy()

    references = ["it's a big cat", "uh so long", "mister fox"]
    hypotheses = ["it is, a cat!", "so very long", "mr. fox"]
    metric = make_wer_metric(processor)
    # "it is a big cat" misses "big"; "uh" is no word, "very" too much; "mister" is "mr": 2 of 5 + 2 + 2 words.
    result = metric(EvalPrediction(predictions=ids(hypotheses), label_ids=ids(references)))
    assert result["wer"] == pytest.approx(100 * 2 / 9)
    # "big " and "very " of 15 + 7 + 10 characters.
    assert result["cer"] == pytest.approx(100 * 9 / 32)
    # A text where nothing is said counts as insertions.
    result = metric(EvalPrediction(predictions=ids([*hypotheses, "a word"]), label_ids=ids([*references, ""])))
    assert result["wer"] == pytest.approx(100 * 4 / 9)
    with pytest.raises(ValueError, match="no word.*text column"):
        metric(EvalPrediction(predictions=ids(hypotheses), label_ids=ids(["", "", ""])))
    # Other languages keep what English shortens: "it s a big cat" against "it is a cat" etc.
    result = make_wer_metric(processor, language="de")(EvalPrediction(ids(hypotheses), ids(references)))
    assert result["wer"] == pytest.approx(100 * (2 + 2 + 1) / 10)
    result = make_wer_metric(tokenizer, normalizer=lambda text: "x")(EvalPrediction(ids(hypotheses), ids(references)))
    assert result["wer"] == 0.0


def test_wer_of_generate_picks_the_best_checkpoint(tmp_path):
    model, data = trainable_model(), Clips()
    args = arguments(
        tmp_path,
        predict_with_generate=True,
        max_steps=150,
        logging_steps=150,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=30,
        save_steps=30,
        load_best_model_at_end=True,
        per_device_eval_batch_size=3,
        generation_max_length=40,
        ema_decay=0.5,
    )
    trainer = ISCTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tiny_processor())
    before = trainer.evaluate()
    trainer.train()
    rates = logged(trainer, "eval_wer")
    assert before["eval_wer"] > 50 and min(rates[1:]) == 0.0
    assert trainer.state.best_metric == 0.0 and trainer.state.best_global_step < 150
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(tensor, weights(best)[name]) for name, tensor in weights(model).items())
    # The metric is that of the texts `generate` gives.
    output = trainer.predict(data)
    texts = [[i for i in row if i > 2] for row in output.predictions.tolist()]
    assert texts == Clips.texts and output.metrics["test_wer"] == 0.0
    assert (tmp_path / "checkpoint-30" / "processor_config.json").exists()


def test_a_prompt_of_the_batch_reaches_generate(tmp_path):
    trainer = make_trainer(tmp_path, predict_with_generate=True)
    data = Clips()
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    prompts = torch.tensor([[60, 5], [60, 6], [60, 7], [60, 8]])
    _, tokens, labels = trainer.prediction_step(trainer.model, {**batch, "prompt_ids": prompts}, False)
    expected = trainer.model.generate(data.features, attention_mask=data.mask, decoder_input_ids=prompts)
    assert torch.equal(tokens, expected) and torch.equal(labels, batch["labels"])
    del batch["labels"]
    loss, tokens, labels = trainer.prediction_step(trainer.model, batch, False)
    assert loss is None and labels is None and tokens.shape[0] == 4


# ---- Freezing ----


class Walker(torch.utils.data.Dataset):
    """Clips for the Parakeet encoder, whose batch normalisation keeps running statistics."""

    def __init__(self):
        self.features, self.mask = tiny_inputs("parakeet", seconds=(0.5, 0.4, 0.45, 0.3))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        labels = torch.tensor([5 + i, 6, EOS])
        return {"input_features": self.features[i], "attention_mask": self.mask[i], "labels": labels}


def test_freezing_really_freezes(tmp_path):
    model = tiny_model("parakeet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = arguments(tmp_path, freeze_encoder=True, freeze_embeddings=True, freeze_lower_layers=1, weight_decay=0.1)
    ISCTTrainer(model, args, train_dataset=Walker()).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    kept = set(before) - changed
    frozen = ("model.encoder.", "model.decoder.layers.0.", "model.decoder.embed_tokens", "proj_out.weight")
    assert not any(name.startswith(frozen) for name in changed)
    assert all(name.startswith(frozen) for name in kept), sorted(name for name in kept if not name.startswith(frozen))
    assert "model.decoder.input_only_embeddings.weight" in changed
    assert any("running_mean" in name for name in kept)
    assert model.model.encoder.training is False


def test_without_freezing_everything_learns(tmp_path):
    model = tiny_model("parakeet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ISCTTrainer(model, arguments(tmp_path), train_dataset=Walker()).train()
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert same == []


# ---- Drafts ----


def test_donor_and_drafts_learn_the_labels(tmp_path):
    model, data = tiny_drafts_model(dtype=torch.float32), Clips()
    trainer = make_trainer(tmp_path, model, max_steps=60, logging_steps=20, predict_with_generate=True)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("loss_donor", "loss_drafts"):
        assert len(logged(trainer, name)) == 3 and after[f"eval_{name}"] < before[f"eval_{name}"] / 4
        assert before[f"eval_{name}"] == trainer_of(tmp_path).evaluate()[f"eval_{name}"]
    assert after["eval_loss"] == pytest.approx(after["eval_loss_donor"] + after["eval_loss_drafts"])
    assert after["eval_accuracy_donor"] == 1.0 and after["eval_accuracy_drafts"] > 0.9
    assert "loss_step_1" not in trainer.state.log_history[0]
    output = model.generate(data.features, attention_mask=data.mask, return_dict_in_generate=True)
    assert [[i for i in row if i > 2] for row in output.sequences.tolist()] == Clips.texts
    # The longest text and its end, in two evaluations: a token of the donor's own, then three drafts and one more.
    assert output.nfe[0] == 2 and output.accepted_drafts[0, 0] == 3


def trainer_of(tmp_path):
    """A trainer of the model as it was, whose evaluation is seeded by the texts."""
    return make_trainer(tmp_path, tiny_drafts_model(dtype=torch.float32))


def test_drafts_learn_alone_and_the_texts_stay(tmp_path):
    model, data = tiny_drafts_model(dtype=torch.float32, decoder_config=dict(dropout=0.3)), Clips()
    before, text = weights(model), model.generate(data.features, data.mask)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".drafts." in name)
    trainer = make_trainer(tmp_path, model, draft_frontiers=4, draft_weight=2.0, max_steps=40, weight_decay=0.1)
    assert trainer._objective == DraftObjective(num_frontiers=4, draft_weight=2.0)
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".drafts." in name}
    assert end["eval_loss_donor"] == start["eval_loss_donor"]
    assert end["eval_loss_drafts"] < 0.7 * start["eval_loss_drafts"]
    assert torch.equal(model.generate(data.features, data.mask), text)
    # The donor's dropout is off meanwhile, and the drafts' on.
    decoder = model.get_decoder()
    model.train()
    trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    assert not decoder.layers.training and not decoder.dropout.training and not model.get_encoder().training
    assert decoder.drafts.training


def test_the_donor_may_learn_slowly(tmp_path):
    model = tiny_drafts_model(dtype=torch.float32)
    trainer = make_trainer(tmp_path, model, donor_learning_rate=1e-5)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    slow = {name for name, rate in named.items() if rate == 1e-5}
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in slow and "model.decoder.embed_tokens.weight" in slow
    assert not any("drafts" in name or "encoder." in name for name in slow)
    assert set(named.values()) == {1e-5, 3e-3}


# ---- Averaged weights, checkpoints ----


def test_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.3)
    value = 1.0
    for step, weight in enumerate((2.0, 4.0, 0.0), start=1):
        model.weight.data.fill_(weight)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * weight
        assert average.average["weight"].item() == pytest.approx(value)
    # 2/11, 3/12, then 0.3.
    assert value == pytest.approx(0.3 * (0.25 * (2 / 11 + 2 * 9 / 11) + 0.75 * 4))
    with average.in_model():
        assert model.weight.item() == pytest.approx(value)
    assert model.weight.item() == 0.0


class Snapshots(TrainerCallback):
    def __init__(self, model):
        self.steps = [weights(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def test_averaged_weights_are_evaluated_saved_and_left_in_the_model(tmp_path):
    model = trainable_model()
    snapshots = Snapshots(model)
    trainer = make_trainer(
        tmp_path,
        model,
        callbacks=[snapshots],
        ema_decay=0.22,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        max_steps=4,
    )
    trainer.train()
    expected, averages = snapshots.steps[0], []
    for step, now in enumerate(snapshots.steps[1:], start=1):
        decay = min(0.22, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
        averages.append(expected)
    torch.testing.assert_close(weights(model), averages[3])

    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")
    torch.testing.assert_close(weights(saved), averages[2])
    raw = load_file(tmp_path / "checkpoint-3" / TRAINING_WEIGHTS_NAME)
    trained = {name: snapshots.steps[3][name] for name, p in model.named_parameters() if p.requires_grad}
    assert {f"weight.{name}" for name in trained} == {name for name in raw if name.startswith("weight.")}
    assert all(torch.equal(raw[f"weight.{name}"], tensor) for name, tensor in trained.items())
    plain = make_trainer(tmp_path, saved)
    assert plain.evaluate()["eval_loss"] == pytest.approx(logged(trainer, "eval_loss")[0], rel=1e-5)
    # Saving by hand after training saves the average, too.
    trainer.save_model(str(tmp_path / "final"))
    torch.testing.assert_close(weights(type(model).from_pretrained(tmp_path / "final")), averages[3])
    assert not (tmp_path / "final" / TRAINING_WEIGHTS_NAME).exists()


RUN = dict(
    max_steps=7,
    save_strategy="steps",
    save_steps=1,
    eval_strategy="steps",
    eval_steps=3,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    lr_scheduler_type="linear",
    causal_anneal_steps=5,
    position_biased_share=0.5,
)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("step", [2, 3])  # At the end of an epoch (4 clips, 2 a step) and within one.
def test_resuming_gives_the_uninterrupted_run(tmp_path, ema_decay, step):
    def run(folder, **kwargs):
        model = tiny_model("whisper", decoder_config={"dropout": 0.1, "attention_dropout": 0.1})
        model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 2.0, 6
        trainer = make_trainer(folder, model, ema_decay=ema_decay, **RUN)
        if kwargs:
            torch.manual_seed(99)  # What came before must not matter.
        trainer.train(**kwargs)
        return trainer

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "part" / f"checkpoint-{step}")
    resumed = run(tmp_path / "part", resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{step}"))
    assert resumed.state.global_step == 7
    for name in ("loss", "loss_step_1", "loss_step_2", "accuracy_step_2", "eval_loss", "grad_norm"):
        assert logged(resumed, name) == logged(whole, name), name
    assert len(set(logged(whole, "loss"))) == 7
    first, second = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_with_other_frozen_weights_raises(tmp_path):
    make_trainer(tmp_path, ema_decay=0.9, save_strategy="steps", save_steps=3).train()
    other = make_trainer(tmp_path, ema_decay=0.9, freeze_encoder=True, max_steps=4)
    with pytest.raises(ValueError, match="other trained parameters.*freezing"):
        other.train(resume_from_checkpoint=True)


def test_resuming_without_the_average_goes_on_with_the_trained_weights(tmp_path):
    snapshots = Snapshots(model := trainable_model())
    make_trainer(tmp_path, model, callbacks=[snapshots], ema_decay=0.9, save_strategy="steps", save_steps=3).train()

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.weights = weights(model)

    trainer = make_trainer(tmp_path, callbacks=[begin := Begin()], max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(begin.weights[name], snapshots.steps[3][name]) for name in begin.weights)


# ---- Steps ----


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training(tmp_path, poison):
    model = trainable_model()
    trainer = make_trainer(tmp_path, model, learning_rate=0.004, max_steps=5)
    original, calls = model.forward, []

    def forward(*args, **kwargs):
        outputs = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            outputs["loss"] = outputs["loss"] * poison
        return outputs

    model.forward = forward
    snapshots = Snapshots(model)
    trainer.add_callback(snapshots)
    with pytest.raises(ValueError, match="loss of step 3 is .*learning rate of 0.004.*`learning_rate`"):
        trainer.train()
    assert len(snapshots.steps) == 3
    assert all(torch.equal(p, snapshots.steps[2][name]) for name, p in model.named_parameters())


def test_gradient_accumulation_equals_one_large_batch(tmp_path, monkeypatch):
    # At t = 1 all positions of both steps are masked, so that nothing is random.
    monkeypatch.setattr("mdm_asr_hf.objective_mdm_asr.sample_timesteps", lambda n, device=None, **_: torch.ones(n))
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = trainable_model()
        model.generation_config.canvas_length = 8
        trainer = make_trainer(
            tmp_path,
            model,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            optim="sgd",
        )
        trainer.train()
        results.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), logged(trainer, "accuracy_step_2")))
        results[-1] += (weights(model),)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_view_of_the_future_opens_step_by_step(tmp_path):
    model = trainable_model()
    trainer = make_trainer(tmp_path, model, causal_anneal_steps=4, max_steps=6, eval_strategy="steps", eval_steps=1)
    original, training, evaluation = model.forward, [], []

    def forward(*args, **kwargs):
        (training if model.training else evaluation).append(kwargs.get("future_visibility"))
        return original(*args, **kwargs)

    model.forward = forward
    trainer.train()
    assert training == [0.0, 0.25, 0.5, 0.75, None, None]
    assert evaluation == [None] * 6
    assert logged(trainer, "future_visibility") == [0.25, 0.5, 0.75]


def test_bf16_and_gradient_checkpointing_train_alike(tmp_path):
    curves = {}
    for name, settings in {
        "plain": {},
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
        "both, frozen": {"bf16": True, "gradient_checkpointing": True, "freeze_encoder": True},
    }.items():
        trainer = make_trainer(tmp_path, max_steps=4, predict_with_generate=True, **settings)
        trainer.train()
        curves[name] = torch.tensor(logged(trainer, "loss"))
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert trainer.predict(Clips()).predictions.shape[0] == 4
    torch.testing.assert_close(curves["checkpointing"], curves["plain"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(curves["bf16"], curves["plain"])
    torch.testing.assert_close(curves["bf16"][:2], curves["plain"][:2], atol=0.0, rtol=0.05)


def test_compiled_training_gives_the_same_losses(tmp_path, monkeypatch):
    # What dynamo makes of the objective, without the minutes that inductor takes.
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        trainer = make_trainer(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3, **settings)
        trainer.train()
        losses.append(torch.tensor(logged(trainer, "loss") + logged(trainer, "eval_loss")))
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not os.environ.get("MDM_ASR_SLOW_TESTS"), reason="takes minutes; set MDM_ASR_SLOW_TESTS=1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_training_gives_the_same_losses(tmp_path, monkeypatch):
    # At t = 1: the random numbers of compiled code are others.
    monkeypatch.setattr("mdm_asr_hf.objective_mdm_asr.sample_timesteps", lambda n, device=None, **_: torch.ones(n))
    losses = []
    for settings in ({}, {"torch_compile": True}):
        torch._dynamo.reset()
        trainer = make_trainer(tmp_path, max_steps=3, **settings)
        trainer.train()
        losses.append(torch.tensor(logged(trainer, "loss")))
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)


def test_spec_augment_reaches_the_model(tmp_path):
    model, data = trainable_model(), Clips()
    settings = dict(
        spec_augment=True,
        spec_augment_time_masks=3,
        spec_augment_time_share=0.2,
        spec_augment_frequency_masks=1,
        spec_augment_frequency_width=30,
        train_sampling_strategy="sequential",
        max_steps=1,
    )
    trainer = make_trainer(tmp_path, model, **settings)
    original, seen = model.forward, {}

    def forward(*args, **kwargs):
        seen[model.training] = kwargs["input_features"]
        return original(*args, **kwargs)

    model.forward = forward
    trainer.train()
    trainer.evaluate()
    assert torch.equal(seen[False], data.features)
    changed = seen[True] != data.features
    for row, mask in zip(changed, data.mask.bool(), strict=True):
        assert not row[~mask].any()
        # Whole frames, and whole bins.
        frames, bins = row[mask].all(dim=1), row[mask].all(dim=0)
        assert torch.equal(row[mask], frames[:, None] | bins)
        assert frames.sum() <= 3 * 0.2 * mask.sum() and bins.sum() <= 30
    assert changed.any()


# ---- Batches of bounded seconds ----


class Timed(Clips):
    """Ten clips that know how long they are, and how often an epoch has begun."""

    def __init__(self):
        self.features, self.mask = tiny_inputs("whisper", seconds=[0.3 + 0.02 * i for i in range(10)])
        self.durations_s = self.mask.sum(dim=1) / 100
        self.texts = [[5 + i, 6 + i] for i in range(10)]
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


class TimedStream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rows = Timed()

    def __iter__(self):
        for i in range(10):
            yield {**self.rows[i], "duration_s": float(self.rows.durations_s[i])}


def collate(rows):
    rows = rows[0] if isinstance(rows[0], list) else rows
    return torch.utils.data.default_collate([{k: v for k, v in row.items() if k != "duration_s"} for row in rows])


class SeenRows(ISCTTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.__dict__.setdefault("seen", []).append((inputs["labels"][:, 0] - 5).tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def seconds_trainer(folder, data, **settings):
    args = arguments(folder, max_seconds_per_batch=1.2, **{"save_strategy": "steps", "save_steps": 1, **settings})
    return SeenRows(trainable_model(), args, train_dataset=data, data_collator=collate)


def test_batches_of_bounded_seconds_and_resuming_within_the_second_epoch(tmp_path):
    whole = seconds_trainer(tmp_path / "whole", Timed(), max_steps=8)
    whole.train()
    durations_s = Timed().durations_s
    assert all(len(rows) * durations_s[rows].max() <= 1.2 + 1e-6 for rows in whole.seen)
    per_epoch = len(whole.get_train_dataloader())
    assert 4 <= per_epoch < 6
    assert sorted(sum(whole.seen[:per_epoch], [])) == list(range(10))
    assert whole.seen[per_epoch:] != whole.seen[: 8 - per_epoch]  # Another order in the second epoch.
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")
    part = seconds_trainer(tmp_path / "part", Timed(), max_steps=8)
    part.train(resume_from_checkpoint=True)
    assert part.seen == whole.seen[6:] and logged(part, "loss") == logged(whole, "loss")


def test_batches_of_bounded_seconds_from_a_stream(tmp_path):
    trainer = seconds_trainer(tmp_path, TimedStream(), max_steps=4)
    trainer.train()
    durations_s = Timed().durations_s
    assert all(len(rows) * durations_s[rows].max() <= 1.2 + 1e-6 for rows in trainer.seen)
    assert max(map(len, trainer.seen)) > 1


def test_batches_of_bounded_seconds_need_durations(tmp_path):
    with pytest.raises(ValueError, match="`max_seconds_per_batch`.*`durations_s`"):
        seconds_trainer(tmp_path, Clips()).get_train_dataloader()
