# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The trainer, a Seq2SeqTrainer: of a canvas, with iterative self-correction (arXiv 2602.18952), or of drafts."""

import contextlib
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, Seq2SeqTrainer, TrainerCallback
from transformers.utils import logging

from ..alignment_mdm_asr import frame_duration_s
from ..evaluate.scoring import count_errors, normaliser
from ..objective_mdm_asr import DiffusionObjective, DraftObjective
from ..safeguards_mdm_asr import NO_SAFEGUARDS
from .arguments import CLOCKED_SCHEDULES, MDMASRTrainingArguments

logger = logging.get_logger(__name__)

# What a donor lacks, by its parameters' names: what drafts; and on a canvas, what has to look ahead, and the mask.
_DRAFTS = re.compile(r"(^|\.)drafts\.")
_NEW_ON_A_CANVAS = re.compile(r"(^|\.)(self_attn|self_attn_layer_norm|input_only_embeddings)\.")
# Beside the averaged weights of a checkpoint: what training goes on with.
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"


def make_wer_metric(
    processor: Any, language: str | None = None, normalizer: Callable[[str], str] | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    A `compute_metrics` for `predict_with_generate`: word and character error rates in per cent, over all words of the
    set.

    Args:
        processor: the processor or tokenizer whose `decode` turns ids into text. Negative ids are padding.
        language (`str`, *optional*): "en" normalises with Whisper's English normaliser (without its table of
            spellings, unless the tokenizer has one), any other with its basic one. Default: the prompt's language.
        normalizer (`Callable`, *optional*): your own, instead.

    Raises:
        ValueError: (the metric) there is no word in the references.
    """
    if language is None:
        language = ((getattr(processor, "prompt_template", None) or {}).get("defaults") or {}).get("language", "en")
    tokenizer = getattr(processor, "tokenizer", processor)
    normalize = normalizer or normaliser(language, getattr(tokenizer, "english_spelling_normalizer", None))

    def texts(rows: Any) -> list[str]:
        rows = rows[0] if isinstance(rows, tuple) else rows
        kept = [[int(token) for token in row if token >= 0] for row in rows]
        return [normalize(processor.decode(row, skip_special_tokens=True)).strip() for row in kept]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        references, hypotheses = texts(prediction.label_ids), texts(prediction.predictions)
        metrics = {}
        for name, characters in (("wer", False), ("cer", True)):
            *errors, num_said = count_errors(references, hypotheses, characters=characters).sum(axis=0).tolist()
            if not num_said:
                raise ValueError("The references of the evaluation set hold no word. Check its text column.")
            metrics[name] = 100 * sum(errors) / num_said
        return metrics

    return compute_metrics


class WeightAverage:
    """
    An exponential moving average, in fp32, of the parameters of a model that are trained. Its decay starts low, as
    min(`decay`, (1 + n) / (10 + n)) after n updates, so that short runs do not keep their first weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def update(self, num_updates: int):
        """Takes the parameters in after optimizer step `num_updates` (from 1)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        current = [p.detach().float() for p in self.parameters.values()]
        # A checkpoint is read before the model is on its device.
        self.average = {name: self.average[name].to(p.device) for name, p in self.parameters.items()}
        get_ema_multi_avg_fn(decay)(list(self.average.values()), current, num_updates)

    @torch.no_grad()
    def copy_to_model(self):
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the averaged weights inside the context."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(kept[name])

    def save(self, path: Path):
        """Writes the average and the model's own weights."""
        tensors = {f"average.{name}": tensor.contiguous() for name, tensor in self.average.items()}
        # Clones: parameters may share storage, which safetensors refuses.
        tensors |= {f"weight.{name}": p.detach().clone().contiguous() for name, p in self.parameters.items()}
        save_file(tensors, path)

    @torch.no_grad()
    def load(self, path: Path):
        """Reads what `save` wrote, into the average and the model."""
        tensors = load_file(path)
        expected = {f"{kind}.{name}" for kind in ("average", "weight") for name in self.parameters}
        if different := sorted(expected ^ set(tensors)):
            raise ValueError(
                f"{path} was written with other trained parameters ({different[0]!r} and {len(different) - 1} more "
                "differ). Resume with the freezing options the run began with."
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            self.average[name] = tensors[f"average.{name}"].to(parameter.device)


class TrainingClock:
    """
    Which share of `minutes` of training is over, the same for all processes. It counts from `start`, so a resumed run
    has the whole time again.
    """

    # Asking the other processes waits for the device.
    STEPS_BETWEEN_LOOKS = 10

    def __init__(self, minutes: float, is_distributed: bool = False):
        self.seconds, self.is_distributed = 60.0 * minutes, is_distributed
        self.started, self.share = time.monotonic(), 0.0

    def start(self):
        self.started, self.share = time.monotonic(), 0.0

    def look(self, step: int):
        if self.is_distributed and step % self.STEPS_BETWEEN_LOOKS:
            return
        share = min((time.monotonic() - self.started) / self.seconds, 1.0)
        self.share = float(broadcast_object_list([share])[0]) if self.is_distributed else share


class _TrainingHooks(TrainerCallback):
    """What [`ISCTTrainer`] does at the beginning of training and after each step."""

    def __init__(self, trainer: "ISCTTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:
            # All processes start with one seed. They would mask alike, which covers fewer times per step.
            torch.manual_seed(args.seed + 1_000_003 * args.process_index)
        self.trainer._begin_average()
        self.trainer._shard_methods()
        if self.trainer.clock is not None:
            self.trainer.clock.start()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.clock is not None:
            self.trainer.clock.look(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._batch_sampler is not None:
            # accelerate does not reach a sampler behind batches that it skips on resuming.
            self.trainer._batch_sampler.set_epoch(int(round(state.epoch or 0.0, 6)))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.weight_average is not None:
            self.trainer.weight_average.update(state.global_step)
        if self.trainer.clock is not None and self.trainer.clock.share >= 1.0:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"


class ISCTTrainer(Seq2SeqTrainer):
    r"""
    Trains MDM-ASR with the objective of its [`MDMASRTrainingArguments`]: on a canvas [`DiffusionObjective`], with
    drafts [`DraftObjective`], the donor's and the drafts' cross-entropy on the labels.

    - All self-correction steps of a batch run in one forward of the (wrapped) model, so that DDP, gradient
      accumulation and gradient checkpointing need no care. The loss is a mean over the tokens of a micro-batch;
      micro-batches weigh alike.
    - Logs `loss_step_1`, `accuracy_step_1`, ... (loss, and accuracy of masked tokens, of each step) beside `loss`;
      with drafts `loss_donor`, `loss_drafts` and their accuracies.
    - Evaluates with the paper's masks whatever the training masks are, seeded by the texts of a batch:
      `eval_loss_step_1` can be compared between runs, and depends neither on the order of batches nor on what came
      before. With `predict_with_generate` it transcribes by `generate()`, without Whisper's safeguards, and, with a
      processor, reports WER and CER.
    - `train()` reports `train_rows_per_s` and `train_audio_s_per_s`, what one process worked through, and with
      [`DataCollatorForMDMASR`] `train_rows_skipped`, of the sources and in its batches of all epochs; these are in the
      log, too, as `rows_skipped` so far. Training on bad rows alone raises a ValueError.
    - `max_minutes` ends training by the clock, with the learning rate following it.
    - A loss that is NaN or infinite raises a ValueError before the optimizer's step.
    - `ema_decay`: the averaged weights are evaluated and saved as the weights of every checkpoint; what training goes
      on with is saved beside them. After `train()` the model has the averaged weights.

    Args:
        model ([`MDMASRForConditionalGeneration`]): or one that PEFT wrapped.
        args ([`MDMASRTrainingArguments`]).
        processing_class (*optional*): the processor; saved with the checkpoints, and decodes for WER.
        compute_metrics (*optional*): default with `predict_with_generate`: [`make_wer_metric`].
        objective ([`DraftObjective`], *optional*): with drafts, instead of the one that `args` describe. What is
            frozen already stays so.
        kwargs: further arguments of `Seq2SeqTrainer`.
    """

    # The loss is a mean of the micro-batch: training_step divides it by the gradient accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MDMASRTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        objective: DraftObjective | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, MDMASRTrainingArguments):
            raise ValueError(f"`args` must be MDMASRTrainingArguments, got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace the objective. Use Seq2SeqTrainer, or leave it out.")
        if args.n_gpu > 1:
            logger.warning(
                f"Training uses one of {args.n_gpu} GPUs. Start it with `accelerate launch` or `torchrun` to use all."
            )
            # DataParallel would split and join the outputs of the objective's steps.
            args._n_gpu = 1
        if args.predict_with_generate and compute_metrics is None and processing_class is not None:
            compute_metrics = make_wer_metric(processing_class)
        self.weight_average: WeightAverage | None = None
        self.clock = None if args.max_minutes is None else TrainingClock(args.max_minutes, args.world_size > 1)
        self._objective = args.make_objective()
        # The paper's, so that losses of all runs can be compared.
        self._evaluation_objective = DiffusionObjective(
            num_steps=args.isct_steps, low_discrepancy=args.low_discrepancy_timesteps
        )
        self._batch_sampler: Any = None
        self._step_sums: torch.Tensor | None = None
        self._num_summed = 0
        self._num_rows: int = 0
        self._audio_s: float | torch.Tensor = 0.0
        self._evaluated_steps: list[torch.Tensor] = []
        self._finite: tuple[torch.Tensor, Any] | None = None
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        # Wherever it is decided: this model never divides by the number of labels.
        self.model_accepts_loss_kwargs = False
        if args.ema_decay is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("`ema_decay` does not work with sharded parameters. Use DDP, or leave it out.")
        self._freeze()
        if self.core_model.config.has_drafts:
            self._objective = self._evaluation_objective = objective or args.make_draft_objective()
        self.add_callback(_TrainingHooks(self))

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if getattr(self, "model", None) is not None:
            # Made anew for a trial; the first one is frozen in `__init__`.
            self.model = model
            self._freeze()
        return model

    @property
    def core_model(self) -> nn.Module:
        """The MDM-ASR model inside the wrappers of Accelerate and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _freeze(self):
        core, args = self.core_model, self.args
        decoder, has_drafts = core.get_decoder(), core.config.has_drafts
        if args.causal_anneal_steps and has_drafts:
            raise ValueError(
                f"`causal_anneal_steps={args.causal_anneal_steps}` opens a canvas, but a model with drafts stays "
                "causal. Leave it out."
            )
        if args.freeze_lower_layers > len(decoder.layers):
            raise ValueError(
                f"`freeze_lower_layers={args.freeze_lower_layers}`, but the decoder has {len(decoder.layers)} layers."
            )
        frozen = list(decoder.layers[: args.freeze_lower_layers])
        if args.freeze_encoder:
            frozen.append(core.get_encoder())
        if args.freeze_embeddings:
            # The mask's embedding, which no donor has, is in `input_only_embeddings` and still learns.
            frozen += [decoder.embed_tokens, decoder.embed_positions]
        for module in frozen:
            module.requires_grad_(False)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.encoder_learning_rate is not None:
            encoder = self.core_model.get_encoder().parameters()
            _set_learning_rate(optimizer, encoder, self.args.encoder_learning_rate)
        if is_new and self.args.donor_learning_rate is not None:
            own = _DRAFTS if self.core_model.config.has_drafts else _NEW_ON_A_CANVAS
            named = self.core_model.get_decoder().named_parameters()
            _set_learning_rate(optimizer, (p for n, p in named if not own.search(n)), self.args.donor_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.clock is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        factor = CLOCKED_SCHEDULES[self.args.lr_scheduler_type]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: min((step + 1) / (warmup_steps + 1), 1.0) * factor(self.clock.share),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        if self.args.max_seconds_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        from .collator import SecondsBatches, SecondsBatchSampler

        args, dataset = self.args, self.train_dataset
        limits = {"max_seconds": args.max_seconds_per_batch, "seed": args.data_seed}
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            # Batches of rows, which the collator unpacks.
            dataset = dataset if isinstance(dataset, SecondsBatches) else SecondsBatches(dataset, **limits)
            batching = {"batch_size": 1}
        else:
            timed = dataset
            if not hasattr(dataset, "durations_s"):
                if "duration_s" not in (getattr(dataset, "column_names", None) or ()):
                    raise ValueError(
                        "`max_seconds_per_batch` needs to know how long the rows of `train_dataset` are. Make it with "
                        "`load_sources`, or give it `durations_s` or a column `duration_s`."
                    )
                timed = dataset["duration_s"]
            self._batch_sampler = SecondsBatchSampler(timed, num_processes=args.world_size, **limits)
            batching = {"batch_sampler": self._batch_sampler}
        loader = DataLoader(
            dataset,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            **batching,
        )
        # The sampler has as many batches for every process; some versions of accelerate cannot even out varying ones.
        even_batches, self.accelerator.even_batches = self.accelerator.even_batches, False
        loader = self.accelerator.prepare(loader)
        self.accelerator.even_batches = even_batches
        return loader

    def _shard_methods(self):
        """Lets FSDP gather a layer's weights for the method that is called beside its forward."""
        if not self.is_fsdp_enabled:
            return
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        for layer in self.core_model.get_decoder().layers:
            if isinstance(layer, FSDPModule) and "cross_key_value" not in vars(layer):
                register_fsdp_forward_method(layer, "cross_key_value")

    # ---- Loss ----

    def future_visibility(self) -> float | None:
        """The share of later positions the decoder sees at the current step; None is the full attention."""
        steps, done = self.args.causal_anneal_steps, self.state.global_step
        return done / steps if done < steps else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs.get("labels") is None:
            raise ValueError(
                "The batch has no `labels`. Collate it with DataCollatorForMDMASR, or call the processor with `text`."
            )
        inputs = dict(inputs)
        if not model.training:
            generator = torch.Generator().manual_seed(_texts_checksum(inputs["labels"]))
            outputs = model(**inputs, objective=self._evaluation_objective, generator=generator)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        # `training_step` has just put everything into training mode; dropout and running statistics of what is frozen
        # must stay off.
        encoder, decoder = self.core_model.get_encoder(), self.core_model.get_decoder()
        for learning, modules in ((encoder, [encoder]), (decoder.layers, [decoder.layers, decoder.dropout])):
            if not any(parameter.requires_grad for parameter in learning.parameters()):
                for module in modules:
                    module.eval()
        if self.args.spec_augment:
            inputs = self._augment(inputs)
        if (visibility := self.future_visibility()) is not None:
            inputs["future_visibility"] = visibility
        outputs = model(**inputs, objective=self._objective)
        loss = outputs["loss"]
        steps = torch.cat([outputs["step_losses"].float(), outputs["step_accuracies"].float()]).detach()
        self._step_sums = steps if self._step_sums is None else self._step_sums + steps
        self._num_summed += 1
        self._count_audio(inputs)
        self._finite = _to_host(torch.isfinite(loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def _count_audio(self, inputs: dict[str, Any]):
        rate, mask = self.core_model.config.input_frames_per_s, inputs.get("attention_mask")
        if mask is None and inputs.get("encoder_outputs") is not None:
            # Frames that were encoded before.
            config, mask = self.core_model.config, inputs["encoder_outputs"].attention_mask
            rate = 1.0 / frame_duration_s(config.encoder_config, config.input_frames_per_s)
        if mask is not None:
            self._num_rows += len(mask)
            self._audio_s = self._audio_s + mask.sum() / rate

    def _augment(self, inputs: dict[str, Any]) -> dict[str, Any]:
        from ..data.augmentation import spec_augment

        features = spec_augment(
            inputs["input_features"],
            inputs.get("attention_mask"),
            num_time_masks=self.args.spec_augment_time_masks,
            max_time_share=self.args.spec_augment_time_share,
            num_freq_masks=self.args.spec_augment_frequency_masks,
            max_freq_bins=self.args.spec_augment_frequency_width,
        )
        return inputs | {"input_features": features}

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Asked only now, when the device has the backward pass queued, so that it does not wait for the answer.
        finite, event = self._finite
        if event is not None:
            event.synchronize()
        if not finite.item():
            raise ValueError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, at a learning rate of "
                f"{self._get_learning_rate():.3g}. Training on would spoil the weights; the optimizer has not used "
                "this batch. Resume from the last checkpoint with a lower `learning_rate`, more `warmup_steps`, a "
                "lower `max_grad_norm`, or `bf16` instead of `fp16`; if it happens in the first steps, check the "
                "features for NaN."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._num_summed:
            sums = torch.cat([self._step_sums, self._step_sums.new_tensor([float(self._num_summed)])])
            sums = self.accelerator.reduce(sums, "sum").tolist()
            logs |= self._step_metrics([total / sums[-1] for total in sums[:-1]])
            self._step_sums, self._num_summed = None, 0
            if (visibility := self.future_visibility()) is not None:
                logs["future_visibility"] = visibility
            if hasattr(self.data_collator, "num_skipped"):
                logs["rows_skipped"] = self.data_collator.num_skipped
        super().log(logs, start_time)

    def _step_metrics(self, values: list[float]) -> dict[str, float]:
        """Names for the losses and the accuracies of the S steps, or of the parts that are learnt with drafts."""
        if self.core_model.config.has_drafts:
            losses = list(self._objective.parts)
            right = [part for part in losses if part in ("donor", "drafts", "logits")]
        else:
            losses = right = [f"step_{i + 1}" for i in range(len(values) // 2)]
        names = [f"loss_{one}" for one in losses] + [f"accuracy_{one}" for one in right]
        # Without a share to tell there is one of 0.
        return dict(zip(names, values, strict=False))

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        inputs = self._prepare_inputs(inputs)
        labels, loss, predictions = inputs.get("labels"), None, None
        with torch.no_grad():
            if labels is not None:
                with self.compute_loss_context_manager():
                    loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss, predictions = loss.detach().mean(), outputs["logits"]
                steps = torch.cat([outputs["step_losses"].float(), outputs["step_accuracies"].float()])
                # Once per row, as Trainer does with the loss, so that both weigh batches alike.
                self._evaluated_steps.append(self.gather_function(steps.repeat(len(labels), 1)).cpu())
                del outputs
            if prediction_loss_only:
                return loss, None, None
            if self.args.predict_with_generate:
                predictions = self._generate(inputs, gen_kwargs)
        if predictions is None:
            raise ValueError("Without `labels` there is nothing to predict. Set `predict_with_generate=True`.")
        return loss, predictions, labels

    def _generate(self, inputs: dict[str, Any], gen_kwargs: dict[str, Any]) -> torch.LongTensor:
        gen_kwargs = {k: v for k, v in (gen_kwargs or getattr(self, "_gen_kwargs", {})).items() if v is not None}
        gen_kwargs.setdefault("synced_gpus", self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.core_model.config.has_drafts:
            # Early in a training nearly every text would be refused, and decoded six times over.
            gen_kwargs = {**NO_SAFEGUARDS, **gen_kwargs}
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        if "prompt_ids" in inputs:
            inputs["decoder_input_ids"] = inputs.pop("prompt_ids")
        with self.accelerator.autocast():
            return self.model.generate(**inputs, **gen_kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._evaluated_steps = []
        self._shard_methods()
        # Seq2SeqTrainer counts the rows twice that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        with self._averaged_weights():
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        if self._evaluated_steps:
            means = torch.cat(self._evaluated_steps).mean(dim=0).tolist()
            output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._step_metrics(means).items()})
            self._evaluated_steps = []
        return output

    # ---- Averaged weights and checkpoints ----

    def train(self, *args, **kwargs):
        self.weight_average, self._step_sums, self._num_summed = None, None, 0
        self._num_rows, self._audio_s = 0, 0.0
        output = super().train(*args, **kwargs)
        # Of this process; the Trainer's own figures assume batches of a fixed number of rows.
        runtime_s = output.metrics["train_runtime"]
        output.metrics["train_rows_per_s"] = round(self._num_rows / runtime_s, 3)
        output.metrics["train_audio_s_per_s"] = round(float(self._audio_s) / runtime_s, 3)
        if hasattr(self.data_collator, "num_skipped"):
            self.data_collator.check_any()
            left_out = sum(getattr(self.train_dataset, "skipped", {}).values())
            output.metrics["train_rows_skipped"] = left_out + self.data_collator.num_skipped
        if self.weight_average is not None:
            # The best checkpoint, once loaded, has its own averaged weights.
            if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
                self.weight_average.copy_to_model()
            self.weight_average = None
        return output

    def _begin_average(self):
        if self.args.ema_decay is not None and self.weight_average is None:
            self.weight_average = WeightAverage(self.accelerator.unwrap_model(self.model), self.args.ema_decay)

    def _averaged_weights(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.weight_average is None else self.weight_average.in_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        with self._averaged_weights():
            super().save_model(output_dir, _internal_call)
        resumable = _internal_call and self.args.should_save and not self.args.save_only_model
        if self.weight_average is not None and resumable:
            self.weight_average.save(Path(output_dir) / TRAINING_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / TRAINING_WEIGHTS_NAME
        if path.exists():
            # Training goes on with its own weights, also where it goes on without an average.
            average = WeightAverage(self.accelerator.unwrap_model(self.model), self.args.ema_decay or 0.0)
            average.load(path)
            self.weight_average = average if self.args.ema_decay is not None else None
        elif self.args.ema_decay is not None:
            logger.warning(f"{resume_from_checkpoint} has no averaged weights: the average begins with its weights.")


def _set_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float):
    """Moves parameters into groups of their own."""
    own = {id(p) for p in parameters}
    # Behind the others: the first group's learning rate is the one that is logged.
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def _texts_checksum(labels: torch.LongTensor) -> int:
    """A number that depends on the texts of a batch (B, L), and not on their padding."""
    rows = labels.cpu().numpy()
    return zlib.crc32(b"".join(row[row != -100].tobytes() for row in rows))


def _to_host(flag: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Starts the copy of a tensor to the host. Returns it and the event, if any, to wait for."""
    if not flag.is_cuda:
        return flag, None
    copied = flag.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copied, event


__all__ = ["ISCTTrainer", "MDMASRTrainingArguments", "WeightAverage", "make_wer_metric"]
