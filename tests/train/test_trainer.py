# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""ISCTTrainer, and the stock trainers: steps, logs, evaluation, freezing, averages, resuming, the clock, NaN."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tables import each
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from tiny_training import EOS, Clips, arguments, collate, logged, make_trainer, trainable_model, weights
from transformers import (
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mdm_asr_hf.diffusion_mdm_asr import DiffusionObjective, DraftObjective
from mdm_asr_hf.train.trainer import TRAINING_WEIGHTS_NAME, ISCTTrainer, make_wer_metric

MASK = VOCAB_SIZE + 1


class Recorder(ISCTTrainer):
    """Keeps what the objective gave, and the labels, of each training batch."""

    def compute_loss(self, model, inputs, *args, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        if model.training:
            self.__dict__.setdefault("seen", []).append((outputs, inputs["labels"]))
        return (loss, outputs) if return_outputs else loss


class Snapshots(TrainerCallback):
    """The weights before training and after each step."""

    def __init__(self, model):
        self.steps = [weights(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


# Steps


def test_training_lowers_the_loss_and_logs_means_of_every_step(tmp_path):
    settings = dict(isct_steps=3, max_steps=20, logging_steps=10, per_device_train_batch_size=2)
    trainer = make_trainer(tmp_path, cls=Recorder, gradient_accumulation_steps=2, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    names = [f"{kind}_step_{i + 1}" for kind in ("loss", "accuracy") for i in range(3)]
    for name in names:
        assert (after[f"eval_{name}"] < before[f"eval_{name}"] / 2) == name.startswith("loss")
    seen = torch.tensor([[*one.step_losses, *one.step_accuracies] for one, _ in trainer.seen])
    means = torch.tensor([logged(trainer, name) for name in names]).T
    torch.testing.assert_close(means, seen.view(2, 20, 6).mean(dim=1))
    assert logged(trainer, "loss") == pytest.approx(means[:, :3].sum(dim=1).tolist(), rel=1e-5)


def test_the_objective_is_the_given_one_and_its_second_step_sees_wrong_tokens(tmp_path):
    trainer = make_trainer(tmp_path, isct_steps=3, position_biased_share=0.5)
    assert trainer.objective == DiffusionObjective(num_steps=3, position_biased_share=0.5)
    # Evaluated with the paper's, so that losses of all runs can be compared.
    assert trainer.evaluation_objective == DiffusionObjective(num_steps=3)
    drafts = make_trainer(tmp_path, tiny_drafts_model(dtype=torch.float32), draft_weight=0.5)
    assert drafts.objective == drafts.evaluation_objective == DraftObjective(draft_weight=0.5)
    given = DiffusionObjective(num_steps=1, position_biased_share=1.0)
    trainer = make_trainer(tmp_path, objective=given, max_steps=1)
    trainer.train()
    assert trainer.objective is given and len(logged(trainer, "loss_step_1")) == 1
    assert "loss_step_2" not in trainer.state.log_history[0]

    model = trainable_model()
    model.generation_config.canvas_length = 8
    trainer = make_trainer(tmp_path, model, cls=Recorder, train_sampling_strategy="sequential", max_steps=4)
    trainer.train()
    targets = torch.tensor([[*text, EOS] + [EOS] * (7 - len(text)) for text in Clips.texts])
    seen = [outputs.canvases for outputs, _ in trainer.seen]
    assert all(((one == targets) | (one == MASK)).all() for one, _ in seen)
    assert sum(int(((two != targets) & (two != MASK)).sum()) for _, two in seen) > 10
    for one, two in seen:
        # What the first step saw is carried over or masked again, never changed.
        assert ((two == targets) | (two == MASK))[one != MASK].all()


def test_gradient_accumulation_equals_one_large_batch(tmp_path, monkeypatch):
    # At t = 1 all positions of both steps are masked, so that nothing is random.
    monkeypatch.setattr("mdm_asr_hf.diffusion_mdm_asr.sample_timesteps", lambda n, device=None, **_: torch.ones(n))
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = trainable_model()
        model.generation_config.canvas_length = 8
        settings = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, optim="sgd")
        trainer = make_trainer(tmp_path, model, train_sampling_strategy="sequential", **settings)
        trainer.train()
        results.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), weights(model)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@each("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training(tmp_path, poison):
    model = trainable_model()
    trainer = make_trainer(tmp_path, model, learning_rate=0.004, callbacks=[snapshots := Snapshots(model)])
    original = model.forward

    def forward(*args, **kwargs):
        outputs = original(*args, **kwargs)
        if len(snapshots.steps) == 3:
            outputs["loss"] = outputs["loss"] * poison
        return outputs

    model.forward = forward
    with pytest.raises(ValueError, match="loss of step 3 is .*learning rate of 0.004.*`learning_rate`"):
        trainer.train()
    assert all(torch.equal(p, snapshots.steps[2][name]) for name, p in model.named_parameters())


def test_bf16_checkpointing_and_compiling_train_alike(tmp_path):
    curves = {}
    for name, settings in {
        "plain": {},
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
        # What dynamo makes of the objective, without the minutes that inductor takes.
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    }.items():
        torch._dynamo.reset()
        model = trainable_model(decoder_config={"num_hidden_layers": 1})
        trainer = make_trainer(tmp_path, model, max_steps=2, **settings)
        trainer.train()
        curves[name] = torch.tensor(logged(trainer, "loss"))
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    for name in ("checkpointing", "compiled"):
        torch.testing.assert_close(curves[name], curves["plain"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(curves["bf16"], curves["plain"])
    torch.testing.assert_close(curves["bf16"], curves["plain"], atol=0.0, rtol=0.05)


def test_spec_augment_reaches_the_model_in_training_alone(tmp_path):
    model, data, seen = trainable_model(), Clips(), {}
    trainer = make_trainer(tmp_path, model, spec_augment=True, train_sampling_strategy="sequential", max_steps=1)
    original = model.forward

    def forward(*args, **kwargs):
        seen[model.training] = kwargs["input_features"]
        return original(*args, **kwargs)

    model.forward = forward
    trainer.train()
    trainer.evaluate()
    assert torch.equal(seen[False], data.features)
    changed = seen[True] != data.features
    assert changed.any() and not changed[data.mask == 0].any()


# Bad input


def test_nonsense_raises_at_once(tmp_path):
    for settings, message in [
        ({"isct_steps": 0}, "`isct_steps`.* 0"),
        ({"position_biased_share": 1.5}, "`position_biased_share`.*1.5"),
        ({"draft_weight": -1.0}, "`draft_weight`.*-1.0"),
        ({"ema_decay": 1.0}, "`ema_decay`.*1.0.*None"),
        ({"max_minutes": 0}, "`max_minutes` must be positive, got 0"),
        ({"encoder_learning_rate": -1e-5}, "`encoder_learning_rate` must be positive"),
        ({"max_seconds_per_batch": 0.0}, "`max_seconds_per_batch`.*0.0"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1`"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **settings)

    with pytest.raises(ValueError, match="MDMASRTrainingArguments, got NoneType"):
        ISCTTrainer(trainable_model())
    with pytest.raises(ValueError, match="`compute_loss_func`"):
        ISCTTrainer(trainable_model(), arguments(tmp_path), compute_loss_func=lambda *a: 0)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="no `labels`.*DataCollatorForMDMASR"):
        trainer.compute_loss(trainer.model, {"input_features": Clips().features})
    with pytest.raises(ValueError, match="`lr_scheduler_type` 'greedy' cannot follow the clock of `max_minutes`"):
        make_trainer(tmp_path, max_minutes=1.0, lr_scheduler_type="greedy", eval_strategy="steps").train()
    with pytest.raises(ValueError, match="`max_seconds_per_batch`.*`durations_s`"):
        make_trainer(tmp_path, max_seconds_per_batch=1.2).get_train_dataloader()


def test_wer_picks_the_best_checkpoint(tmp_path):
    args = dict(eval_strategy="steps", save_strategy="steps", predict_with_generate=True)
    best = arguments(tmp_path, load_best_model_at_end=True, **args)
    assert best.metric_for_best_model == "wer" and best.greater_is_better is False
    assert arguments(tmp_path, metric_for_best_model="accuracy_step_1").greater_is_better is True
    json.dumps(best.to_dict(), default=str)
    best._n_gpu = 4
    assert ISCTTrainer(trainable_model(), best, train_dataset=Clips(), eval_dataset=Clips()).args.n_gpu == 1

    processor = tiny_processor()

    def ids(texts, width=30):
        rows = [[*processor.tokenizer.encode(" " + text), EOS] if text else [EOS] for text in texts]
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


# Evaluation


def test_evaluation_is_deterministic_and_weighs_rows(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    first = trainer.evaluate()
    torch.manual_seed(123)
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]
    # The order of batches does not matter, nor does what was masked in training.
    turned = torch.utils.data.Subset(Clips(), [2, 3, 0, 1])
    assert trainer.evaluate(turned)["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    other = make_trainer(tmp_path, per_device_eval_batch_size=2, position_biased_share=1.0)
    assert other.evaluate()["eval_loss_step_1"] == pytest.approx(first["eval_loss_step_1"], rel=1e-6)
    # Not every batch has the same masks, and none is drawn from the generator of training.
    state, canvases = torch.get_rng_state(), []
    for rows in ([0, 1], [2, 3]):
        _, outputs = trainer.compute_loss(trainer.model.eval(), Clips().batch(rows), return_outputs=True)
        canvases.append(outputs.canvases[0][:, :6] == MASK)
    assert (canvases[0] != canvases[1]).any() and torch.equal(torch.get_rng_state(), state)

    # Batches of 3 and 1: 3/4 and 1/4 of the mean.
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=3)
    losses = [trainer.compute_loss(trainer.model.eval(), Clips().batch(rows)).item() for rows in ([0, 1, 2], [3])]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], rel=1e-5)
    assert metrics["eval_loss_step_1"] + metrics["eval_loss_step_2"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_wer_of_generate_picks_the_best_checkpoint(tmp_path):
    model, data = trainable_model(), Clips()
    steps = dict(eval_strategy="steps", save_strategy="steps", eval_steps=30, save_steps=30, max_steps=120)
    settings = dict(predict_with_generate=True, generation_max_length=40, load_best_model_at_end=True, ema_decay=0.5)
    args = arguments(tmp_path, logging_steps=120, per_device_eval_batch_size=3, **steps, **settings)
    trainer = ISCTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tiny_processor())
    assert trainer.evaluate()["eval_wer"] > 50
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_wer")) == 0.0
    assert trainer.state.best_global_step < 120
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(tensor, weights(best)[name]) for name, tensor in weights(model).items())
    # The metric is that of the texts `generate` gives.
    output = trainer.predict(data)
    assert [[i for i in row if i > 2] for row in output.predictions.tolist()] == Clips.texts
    assert output.metrics["test_wer"] == 0.0 and (tmp_path / "checkpoint-30" / "processor_config.json").exists()

    trainer, data = make_trainer(tmp_path, predict_with_generate=True), Clips()
    batch = {**data.batch(), "prompt_ids": torch.tensor([[60, 5], [60, 6], [60, 7], [60, 8]])}
    _, tokens, labels = trainer.prediction_step(trainer.model, batch, False)
    expected = trainer.model.generate(data.features, attention_mask=data.mask, decoder_input_ids=batch["prompt_ids"])
    assert torch.equal(tokens, expected) and torch.equal(labels, batch["labels"])
    del batch["labels"]
    loss, tokens, labels = trainer.prediction_step(trainer.model, batch, False)
    assert loss is None and labels is None and torch.equal(tokens, expected)


# What learns, and how fast


def test_what_is_frozen_stays_and_all_else_learns(tmp_path):
    """The Parakeet encoder keeps running statistics, too."""
    for is_frozen in (True, False):
        model = tiny_model("parakeet")
        if is_frozen:
            model.model.encoder.requires_grad_(False)
            model.get_decoder().embed_tokens.requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        make_trainer(tmp_path, model, data=Clips("parakeet"), weight_decay=0.1).train()
        kept = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
        frozen = ("model.encoder.", "model.decoder.embed_tokens", "proj_out.weight")
        assert kept == ({name for name in before if name.startswith(frozen)} if is_frozen else set())
        assert model.model.encoder.training is not is_frozen


def test_the_encoder_learns_at_its_own_rate_also_where_a_run_goes_on(tmp_path):
    model = trainable_model()
    before = weights(model)
    settings = dict(learning_rate=0.0, encoder_learning_rate=1e-2, optim="sgd", weight_decay=0.1, max_steps=4)
    settings |= dict(save_strategy="steps", save_steps=2, lr_scheduler_type="linear")
    trainer = make_trainer(tmp_path, model, **settings)
    trainer.train()
    # Plain gradient descent with a rate of 0 moves nothing; the encoder's is larger.
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("model.encoder.") for name in moved)
    assert logged(trainer, "learning_rate") == [0.0] * 4
    # Each parameter is in one group, and norms and biases still have no weight decay.
    groups = trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    again = make_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, weights(model)[name]) for name, p in again.model.named_parameters())


def test_drafts_learn_alone_or_with_the_donor(tmp_path):
    model, data = tiny_drafts_model(dtype=torch.float32), Clips()
    trainer = make_trainer(tmp_path, model, max_steps=60, logging_steps=20, predict_with_generate=True)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("loss_donor", "loss_drafts"):
        assert len(logged(trainer, name)) == 3 and after[f"eval_{name}"] < before[f"eval_{name}"] / 4
    assert after["eval_loss"] == pytest.approx(after["eval_loss_donor"] + after["eval_loss_drafts"])
    assert after["eval_accuracy_donor"] == 1.0 and after["eval_accuracy_drafts"] > 0.9
    output = model.generate(data.features, attention_mask=data.mask, return_dict_in_generate=True)
    assert [[i for i in row if i > 2] for row in output.sequences.tolist()] == Clips.texts
    # The longest text and its end, in two evaluations: a token of the donor's own, then three drafts and one more.
    assert output.nfe[0] == 2 and output.accepted_drafts[0, 0] == 3

    model, data = tiny_drafts_model(dtype=torch.float32, decoder_config=dict(dropout=0.3)), Clips()
    before, text = weights(model), model.generate(data.features, data.mask)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".drafts." in name)
    trainer = make_trainer(tmp_path, model, max_steps=20, weight_decay=0.1)
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".drafts." in name}
    assert end["eval_loss_donor"] == start["eval_loss_donor"]
    assert end["eval_loss_drafts"] < 0.9 * start["eval_loss_drafts"]
    assert torch.equal(model.generate(data.features, data.mask), text)
    # The donor's dropout is off meanwhile, and the drafts' on.
    decoder = model.train().get_decoder()
    trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    assert not decoder.layers.training and not decoder.dropout.training and not model.get_encoder().training
    assert decoder.drafts.training


# Averaged weights, checkpoints


def test_averaged_weights_are_evaluated_saved_and_left_in_the_model(tmp_path):
    model = trainable_model()
    steps = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, max_steps=4)
    trainer = make_trainer(tmp_path, model, callbacks=[snapshots := Snapshots(model)], ema_decay=0.22, **steps)
    trainer.train()
    # 2/11, then 0.22: the decay begins low.
    expected, averages = snapshots.steps[0], []
    for step, now in enumerate(snapshots.steps[1:], start=1):
        decay = min(0.22, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
        averages.append(expected)
    torch.testing.assert_close(weights(model), averages[3])
    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")
    torch.testing.assert_close(weights(saved), averages[2])
    raw = load_file(tmp_path / "checkpoint-3" / TRAINING_WEIGHTS_NAME)
    assert raw and all(torch.equal(tensor, snapshots.steps[3][name]) for name, tensor in raw.items())
    evaluated = make_trainer(tmp_path, saved).evaluate()["eval_loss"]
    assert evaluated == pytest.approx(logged(trainer, "eval_loss")[0], rel=1e-5)
    # Saving by hand after training saves the average, too.
    trainer.save_model(str(tmp_path / "final"))
    torch.testing.assert_close(weights(type(model).from_pretrained(tmp_path / "final")), averages[3])


@each("ema_decay, step", [(None, 2), (0.9, 3)])  # At the end of an epoch, and within one.
def test_resuming_gives_the_uninterrupted_run(tmp_path, ema_decay, step):
    settings = dict(save_strategy="steps", save_steps=step, eval_strategy="steps", eval_steps=2, max_steps=5)
    settings |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, lr_scheduler_type="linear")

    def run(folder, **kwargs):
        model = trainable_model(decoder_config={"dropout": 0.1, "attention_dropout": 0.1})
        trainer = make_trainer(folder, model, ema_decay=ema_decay, position_biased_share=0.5, **settings)
        if kwargs:
            torch.manual_seed(99)  # What came before must not matter.
        trainer.train(**kwargs)
        return trainer

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "part" / f"checkpoint-{step}")
    resumed = run(tmp_path / "part", resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    for name in ("loss", "loss_step_1", "loss_step_2", "accuracy_step_2", "eval_loss", "grad_norm"):
        assert logged(resumed, name) == logged(whole, name), name
    assert len(set(logged(whole, "loss"))) == 5
    first, second = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


# The clock


@each(
    "schedule, factors",
    [
        ("linear", [1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [1.0] * 5),
    ],
)
def test_training_ends_by_the_clock_and_the_learning_rate_follows_it(tmp_path, monkeypatch, schedule, factors):
    # Steps begin at 0, 15, 30, 45 and 60 of 60 seconds. The rate of each is set after the one before, by its time.
    times = itertools.count(0.0, 15.0)
    start = [next(times)]
    monkeypatch.setattr("mdm_asr_hf.train.trainer.time.monotonic", lambda: start.pop() if start else next(times) - 15)
    steps = dict(max_steps=1000, save_strategy="steps", save_steps=500)
    trainer = make_trainer(tmp_path, max_minutes=1.0, lr_scheduler_type=schedule, **steps)
    trainer.train()
    assert trainer.state.global_step == 5 and (tmp_path / "checkpoint-5" / "model.safetensors").exists()
    assert logged(trainer, "learning_rate") == pytest.approx([3e-3 * factor for factor in factors], abs=1e-8)
    if schedule == "linear":
        # Warmup counts steps.
        monkeypatch.undo()
        trainer = make_trainer(tmp_path, max_minutes=1e6, lr_scheduler_type=schedule, warmup_steps=2, max_steps=4)
        trainer.train()
        assert logged(trainer, "learning_rate") == pytest.approx([3e-3 * factor for factor in (0.0, 0.5, 1.0, 1.0)])


# Batches of bounded seconds


class Timed(Clips):
    """Ten clips that know how long they are."""

    def __init__(self):
        self.features, self.mask = tiny_inputs("whisper", seconds=[0.3 + 0.02 * i for i in range(10)])
        self.durations_s = self.mask.sum(dim=1) / 100
        self.texts = [[5 + i, 6 + i] for i in range(10)]


class TimedStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        rows = Timed()
        for i in range(10):
            yield {**rows[i], "duration_s": float(rows.durations_s[i])}


def seconds_trainer(folder, data, **settings):
    args = arguments(folder, max_seconds_per_batch=1.2, save_strategy="steps", save_steps=6, **settings)
    trainer = Recorder(trainable_model(), args, train_dataset=data, data_collator=collate)
    return trainer, lambda: [(labels[:, 0] - 5).tolist() for _, labels in trainer.seen]


def test_batches_of_bounded_seconds(tmp_path):
    whole, seen = seconds_trainer(tmp_path, Timed(), max_steps=8)
    metrics = whole.train().metrics
    durations_s = Timed().durations_s
    assert all(len(rows) * durations_s[rows].max() <= 1.2 + 1e-6 for rows in seen())
    per_epoch = len(whole.get_train_dataloader())
    assert 4 <= per_epoch < 6 and sorted(sum(seen()[:per_epoch], [])) == list(range(10))
    assert seen()[per_epoch:] != seen()[: 8 - per_epoch]  # Another order in the second epoch.
    part, seen_again = seconds_trainer(tmp_path, Timed(), max_steps=8)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert seen_again() == seen()[6:] and logged(part, "loss") == logged(whole, "loss")
    # What this process worked through.
    rows = sum(seen(), [])
    assert metrics["train_rows_per_s"] * metrics["train_runtime"] == pytest.approx(len(rows), rel=0.05)
    audio_s = metrics["train_audio_s_per_s"] * metrics["train_runtime"]
    assert audio_s == pytest.approx(float(durations_s[rows].sum()), rel=0.05)

    trainer, seen = seconds_trainer(tmp_path, TimedStream(), max_steps=4)
    trainer.train()
    assert all(len(rows) * Timed().durations_s[rows].max() <= 1.2 + 1e-6 for rows in seen())
    assert max(map(len, seen())) > 1


# The stock trainers


@each("make_model", [trainable_model, lambda: tiny_drafts_model(dtype=torch.float32)])
def test_the_stock_trainers_train_and_predict_with_generate_also_in_half_precision(tmp_path, make_model):
    model, batch = make_model(), Clips().batch()
    before = model(**batch).step_losses
    Trainer(model, arguments(tmp_path, TrainingArguments, max_steps=20), train_dataset=Clips()).train()
    assert (model.eval()(**batch).step_losses < 0.7 * before).all()

    model, data = make_model(), Clips()
    args = arguments(
        tmp_path,
        Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=20,
        bf16=True,
        max_steps=1,
    )
    trainer = Seq2SeqTrainer(model, args, train_dataset=data, processing_class=tiny_processor())
    predictions = trainer.predict(data).predictions
    # The trainer has put autocast around `forward`, and not around what encodes.
    expected = model.generate(data.features, attention_mask=data.mask, max_length=20)
    assert predictions[:, : expected.shape[1]].tolist() == expected.tolist()


# What training asks of the model


def test_the_canvas_of_training_is_that_of_generate():
    model = tiny_model()
    model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 7.0, 3
    features, mask = tiny_inputs("whisper", seconds=[0.6, 0.57, 1.0, 1.29])
    labels = torch.tensor([[5, 6], [7, -100], [8, 9], [5, -100]])
    duration_s = model.audio_duration_s(features, mask)
    planned = model.canvas_lengths(duration_s, 4, 1, model.generation_config)
    assert planned == [8, 7, 10, 13]  # ceil(7 * 0.6) + 3, ...
    # Audio padded far beyond its longest row gives a wider tensor, of which the rows use as much as before.
    for padded_s, width in ((mask.shape[1] / 100, 13), (3.0, 24)):
        targets, canvas_mask, _ = model._lay_canvas(labels, duration_s, padded_s, 1)
        assert canvas_mask.sum(dim=-1).tolist() == planned and targets.shape == (4, width)
    # A longer prompt leaves less room for it.
    capacity = model.config.decoder_config.max_position_embeddings
    model.generation_config.canvas_length = capacity - 1
    with pytest.raises(ValueError, match=f"canvas of {capacity - 1} tokens.*positions for {capacity - 3}"):
        model(features[:1], mask[:1], labels=labels[:1], prompt_ids=torch.full((1, 3), 5))


def test_training_never_reads_a_number_off_the_device(monkeypatch):
    """A stand-in for a GPU, on which such a read waits for all work: the ways to do it raise."""
    model = trainable_model().train()
    features, mask = tiny_inputs("whisper", seconds=[0.5, 0.3])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # As for labels on a GPU.

    def refuse(self, *args):
        raise AssertionError("read a number off a tensor")

    # Tensors of the batch, not those that are made on the host to plan the width of the canvas.
    class Remote(torch.Tensor):
        __bool__ = __int__ = __float__ = item = tolist = refuse

    def loss(labels):
        remote = [x.as_subclass(Remote) for x in (features, mask, torch.tensor(labels))]
        with pytest.raises(AssertionError, match="read a number"):
            bool((remote[1] > 0).all())
        return model(remote[0], remote[1], labels=remote[2]).loss.as_subclass(torch.Tensor)

    good = loss([[5, 6, 7], [8, -100, -100]])
    good.backward()
    # Labels with holes spoil the loss where they cannot raise.
    assert good.isfinite() and loss([[5, -100, 7], [8, -100, -100]]).isnan()
