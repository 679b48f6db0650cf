"""ISCTTrainer by the clock, with a learning rate for the encoder, and on labels that stay on their device."""

import pytest
import torch
from test_isct_trainer import Timed, arguments, collate, logged, make_trainer, weights
from test_trainers import trainable_model
from tiny_models import tiny_inputs, tiny_model

from mdm_asr_hf.train.trainer import ISCTTrainer, TrainingClock


class FakeTime:
    """A clock that one step of training moves on by `step_s`."""

    def __init__(self, monkeypatch, step_s):
        self.now, self.step_s = 100.0, step_s
        monkeypatch.setattr("mdm_asr_hf.train.trainer.time.monotonic", self)
        look = TrainingClock.look

        def moving_look(clock, step):
            look(clock, step)
            self.now += self.step_s

        monkeypatch.setattr(TrainingClock, "look", moving_look)

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    "schedule, factors",
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, 0.853553, 0.5, 0.146447, 0.0]),
        ("constant", [1.0] * 5),
    ],
)
def test_training_ends_by_the_clock_and_the_learning_rate_follows_it(tmp_path, monkeypatch, schedule, factors):
    FakeTime(monkeypatch, step_s=15.0)
    trainer = make_trainer(
        tmp_path, max_minutes=1.0, max_steps=1000, lr_scheduler_type=schedule, save_strategy="steps", save_steps=500
    )
    trainer.train()
    # Five steps begin, at 0, 15, 30, 45 and 60 of 60 seconds. The rate of each is set after the step before it, by
    # the time seen then.
    assert trainer.state.global_step == 5
    assert logged(trainer, "learning_rate") == pytest.approx([3e-3 * f for f in [1.0, *factors[:-1]]], abs=1e-8)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").exists()


def test_warmup_counts_steps_also_by_the_clock(tmp_path, monkeypatch):
    FakeTime(monkeypatch, step_s=1.0)
    trainer = make_trainer(tmp_path, max_minutes=10.0, max_steps=4, lr_scheduler_type="constant", warmup_steps=3)
    trainer.train()
    assert trainer.state.global_step == 4
    assert logged(trainer, "learning_rate") == pytest.approx([3e-3 * f for f in (0.25, 0.5, 0.75, 1.0)])


def test_a_clock_that_others_share_looks_only_now_and_then(monkeypatch):
    monkeypatch.setattr("mdm_asr_hf.train.trainer.broadcast_object_list", lambda values: [0.5])
    clock = TrainingClock(1.0, is_distributed=True)
    clock.look(3)
    assert clock.share == 0.0
    clock.look(10)
    assert clock.share == 0.5  # What the first process says.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_minutes": 0}, "`max_minutes` must be positive, got 0"),
        ({"max_minutes": 1.0, "lr_scheduler_type": "polynomial"}, "`lr_scheduler_type` 'polynomial'.*'cosine'"),
        ({"encoder_learning_rate": -1e-5}, "`encoder_learning_rate` must be positive"),
        ({"encoder_learning_rate": 1e-5, "freeze_encoder": True}, "no effect with `freeze_encoder`"),
    ],
)
def test_nonsense_raises(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_the_encoder_learns_at_its_own_rate(tmp_path):
    model = trainable_model()
    before = weights(model)
    # Plain gradient descent with a rate of 0 moves nothing; the encoder's is larger.
    trainer = make_trainer(
        tmp_path, model, learning_rate=0.0, encoder_learning_rate=1e-2, optim="sgd", max_steps=2, weight_decay=0.1
    )
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("model.encoder.") for name in moved)
    assert logged(trainer, "learning_rate") == [0.0, 0.0]
    # Each parameter is in one group, and norms and biases still have no weight decay.
    groups = trainer.optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    assert sum(sizes) == sum(p.requires_grad for p in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]


def test_what_the_donor_knows_learns_at_its_own_rate(tmp_path):
    model = trainable_model()
    before = weights(model)
    trainer = make_trainer(
        tmp_path, model, learning_rate=1e-2, donor_learning_rate=1e-30, optim="sgd", max_steps=2, freeze_encoder=True
    )
    trainer.train()
    # A bias of 0 moves even at such a rate.
    moved = {name for name, p in model.named_parameters() if (p - before[name]).abs().max() > 1e-20}
    assert any("self_attn.q_proj" in name for name in moved) and any("input_only" in name for name in moved)
    assert not any("cross_attn" in name or "fc1" in name or "embed_tokens" in name for name in moved)
    assert logged(trainer, "learning_rate") == [1e-2, 1e-2]


def test_resuming_with_two_learning_rates_gives_the_uninterrupted_run(tmp_path):
    settings = {
        "encoder_learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(tmp_path / "a", max_steps=4, **settings)
    whole.train()
    again = make_trainer(tmp_path / "a", max_steps=4, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, p in again.model.named_parameters():
        torch.testing.assert_close(p, dict(whole.model.named_parameters())[name], atol=0, rtol=0)


def test_throughput_counts_rows_and_seconds_of_this_process(tmp_path):
    data = Timed()
    trainer = ISCTTrainer(
        trainable_model(), arguments(tmp_path, max_steps=3), train_dataset=data, data_collator=collate
    )
    metrics = trainer.train().metrics
    assert metrics["train_rows_per_s"] * metrics["train_runtime"] == pytest.approx(4 + 4 + 2, rel=0.01)
    total_s = float(data.durations_s.sum())
    assert metrics["train_audio_s_per_s"] * metrics["train_runtime"] == pytest.approx(total_s, rel=0.05)


def test_the_canvas_of_training_is_that_of_generate():
    model = tiny_model()
    model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 7.0, 3
    seconds = [0.6, 0.57, 1.0, 1.29]
    features, mask = tiny_inputs("whisper", seconds=seconds)
    labels = torch.tensor([[5, 6], [7, -100], [8, 9], [5, -100]])
    duration_s = model.audio_duration_s(features, mask)
    planned = model.canvas_lengths(duration_s, 4, 1, model.generation_config)
    assert planned == [8, 7, 10, 13]  # ceil(7 * 0.6) + 3, ...
    targets, canvas_mask, is_sound = model._lay_canvas(labels, duration_s, mask.shape[1] / 100, 1)
    assert canvas_mask.sum(dim=-1).tolist() == planned and targets.shape == (4, 13)
    assert is_sound is None  # Checked at once, since the labels are not on a GPU.
    # Audio padded far beyond its longest row gives a wider tensor, of which the rows use as much as before.
    targets, canvas_mask, _ = model._lay_canvas(labels, duration_s, 3.0, 1)
    assert canvas_mask.sum(dim=-1).tolist() == planned and targets.shape == (4, 24)


def test_a_longer_prompt_leaves_less_room_for_the_canvas():
    model = tiny_model()
    capacity = model.config.decoder_config.max_position_embeddings
    features, mask = tiny_inputs("whisper", seconds=[0.5])
    model.generation_config.canvas_length = capacity - 1
    assert model(features, mask, labels=torch.tensor([[5, 6]])).logits.shape[1] == capacity - 1
    with pytest.raises(ValueError, match=f"canvas of {capacity - 1} tokens.*positions for {capacity - 3}"):
        model(features, mask, labels=torch.tensor([[5, 6]]), prompt_ids=torch.full((1, 3), 5))


def test_training_never_reads_a_number_off_the_device(monkeypatch):
    """A stand-in for a GPU, on which such a read waits for all work: the ways to do it raise."""
    model = trainable_model().train()
    features, mask = tiny_inputs("whisper", seconds=[0.5, 0.3])
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # As for labels on a GPU.

    def refuse(self, *args):
        raise AssertionError("read a number off a tensor")

    # Tensors of the batch, not those that are made on the host to plan the width of the canvas.
    class Remote(torch.Tensor):
        __bool__ = __int__ = __float__ = item = tolist = refuse

    remote = [x.as_subclass(Remote) for x in (features, mask, labels)]
    with pytest.raises(AssertionError, match="read a number"):
        bool((remote[1] > 0).all())
    output = model(remote[0], remote[1], labels=remote[2])
    assert torch.Tensor.isfinite(output.loss.detach().as_subclass(torch.Tensor))
    output.loss.as_subclass(torch.Tensor).backward()


def test_labels_with_holes_spoil_the_loss_where_they_cannot_raise(monkeypatch):
    model = trainable_model()
    features, mask = tiny_inputs("whisper", seconds=[0.5])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model(features, mask, labels=torch.tensor([[5, 6, 7]])).loss.isfinite()
    assert model(features, mask, labels=torch.tensor([[5, -100, 7]])).loss.isnan()
