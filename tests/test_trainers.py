"""The stock Trainer and Seq2SeqTrainer fine-tune the model."""

import pytest
import torch
from tiny_models import tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

EOS = 1


class Clips(torch.utils.data.Dataset):
    """A few random clips, each with a text of its own."""

    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]

    def __init__(self):
        self.features, self.mask = tiny_inputs("whisper", seconds=(0.5, 0.4, 0.45, 0.3))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {
            "input_features": self.features[i],
            "attention_mask": self.mask[i],
            "labels": torch.tensor([*self.texts[i], EOS] + [-100] * (5 - len(self.texts[i]) - 1)),
        }


def trainable_model():
    model = tiny_model("whisper")
    model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 2.0, 6
    return model


def arguments(cls, tmp_path, **settings):
    return cls(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def test_the_stock_trainer_learns_and_generate_reads_it_back(tmp_path):
    model, data = trainable_model(), Clips()
    trainer = Trainer(
        model, arguments(TrainingArguments, tmp_path, max_steps=150, save_strategy="no", seed=1), train_dataset=data
    )
    before = trainer.evaluate(data)["eval_loss"]
    assert before == trainer.evaluate(data)["eval_loss"]  # masking is seeded in evaluation
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < before / 10
    sequences = model.generate(data.features, attention_mask=data.mask)
    texts = [[i for i in row if i > 2] for row in sequences.tolist()]
    assert texts == Clips.texts


def test_the_stock_trainer_lowers_the_losses_of_donor_and_drafts(tmp_path):
    model, data = tiny_drafts_model(dtype=torch.float32), Clips()
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    before = model(**batch).step_losses
    settings = dict(max_steps=20, save_strategy="no", lr_scheduler_type="constant")
    Trainer(model, arguments(TrainingArguments, tmp_path, **settings), train_dataset=data).train()
    assert (model.eval()(**batch).step_losses < 0.7 * before).all()


def test_gradient_accumulation_gives_the_same_gradients_as_one_batch(tmp_path):
    # At t = 1 nothing is random: two steps of two rows average to the batch of four, since all rows weigh alike.
    gradients = []
    for batch_size, steps in ((4, 1), (2, 2)):
        model, data = trainable_model(), Clips()
        model.generation_config.canvas_length = 8
        original = model.forward

        def forward(*args, _original=original, **kwargs):
            return _original(*args, timesteps=torch.ones(len(kwargs["labels"])), **kwargs)

        model.forward = forward
        args = arguments(
            TrainingArguments,
            tmp_path,
            max_steps=1,
            save_strategy="no",
            max_grad_norm=0.0,
            remove_unused_columns=False,
        )
        args.per_device_train_batch_size, args.gradient_accumulation_steps = batch_size, steps

        class Recorder(Trainer):
            def create_optimizer(self, *a, **k):
                optimizer = super().create_optimizer(*a, **k)
                inner = optimizer.step

                def step(*a, **k):
                    gradients.append(
                        {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
                    )
                    return inner(*a, **k)

                optimizer.step = step
                return optimizer

        trainer = Recorder(model, args, train_dataset=data)
        assert trainer.model_accepts_loss_kwargs is False
        trainer._get_train_sampler = lambda *a, data=data, **k: torch.utils.data.SequentialSampler(data)
        trainer.train()
    first, second = gradients
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("make_model", [trainable_model, lambda: tiny_drafts_model(dtype=torch.float32)])
def test_seq2seq_trainer_predicts_in_half_precision(tmp_path, make_model):
    model, data = make_model(), Clips()
    settings = dict(predict_with_generate=True, generation_max_length=20, bf16=True)
    trainer = Seq2SeqTrainer(
        model, arguments(Seq2SeqTrainingArguments, tmp_path, **settings), processing_class=tiny_processor()
    )
    predictions = trainer.predict(data).predictions
    # The trainer has put autocast around `forward`, and not around what encodes.
    expected = model.generate(data.features, attention_mask=data.mask, max_length=20)
    assert predictions[:, : expected.shape[1]].tolist() == expected.tolist()


@pytest.mark.parametrize("generation_max_length", [None, 20])
def test_seq2seq_trainer_predicts_with_generate(tmp_path, generation_max_length):
    model, data = trainable_model(), Clips()
    seen = {}

    def compute_metrics(prediction):
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"exact": 0.5}

    trainer = Seq2SeqTrainer(
        model,
        arguments(
            Seq2SeqTrainingArguments,
            tmp_path,
            max_steps=2,
            predict_with_generate=True,
            generation_max_length=generation_max_length,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_processor(),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exact"] == 0.5 and metrics["eval_loss"] > 0
    assert seen["predictions"].shape[0] == 4 == seen["labels"].shape[0]
    expected = model.generate(data.features, attention_mask=data.mask, max_length=generation_max_length)
    assert seen["predictions"][:, : expected.shape[1]].tolist() == expected.tolist()
    # The checkpoint it saved is complete.
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    assert (checkpoint / "generation_config.json").exists() and (checkpoint / "model.safetensors").exists()
    assert type(model).from_pretrained(checkpoint).generation_config.canvas_extra_tokens == 6
