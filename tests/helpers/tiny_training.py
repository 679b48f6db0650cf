# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Data and arguments that the tests of training share."""

import torch
from tiny_models import tiny_inputs, tiny_model

from mdm_asr_hf.train.trainer import ISCTTrainer, MDMASRTrainingArguments

EOS = 1


class Clips(torch.utils.data.Dataset):
    """A few random clips, each with a text of its own."""

    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]

    def __init__(self, encoder="whisper"):
        self.features, self.mask = tiny_inputs(encoder, seconds=(0.5, 0.4, 0.45, 0.3))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        labels = torch.tensor([*self.texts[i], EOS] + [-100] * (4 - len(self.texts[i])))
        return {"input_features": self.features[i], "attention_mask": self.mask[i], "labels": labels}

    def batch(self, rows=range(4)):
        return torch.utils.data.default_collate([self[i] for i in rows])


def collate(rows):
    """Of rows or of one batch of them, as a stream gives it; their durations decided what is in it."""
    rows = rows[0] if isinstance(rows[0], list) else rows
    return torch.utils.data.default_collate([{k: v for k, v in row.items() if k != "duration_s"} for row in rows])


def trainable_model(**settings):
    """A canvas whose texts have room for those of the clips."""
    model = tiny_model("whisper", **settings)
    model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 2.0, 6
    return model


def arguments(folder, cls=MDMASRTrainingArguments, **settings):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | settings
    return cls(output_dir=str(folder), **settings)


def make_trainer(folder, model=None, callbacks=None, objective=None, data=None, cls=ISCTTrainer, **settings):
    model, data = trainable_model() if model is None else model, data or Clips()
    return cls(
        model, arguments(folder, **settings), objective, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
