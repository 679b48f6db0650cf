# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The trainer, a Seq2SeqTrainer: of a canvas, with iterative self-correction (arXiv 2602.18952), or of drafts."""

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..alignment_mdm_asr import frame_duration_s
from ..data.augmentation import spec_augment
from ..diffusion_mdm_asr import DiffusionObjective, DraftObjective
from ..evaluate.scoring import count_errors, normaliser
from ..processing_mdm_asr import IGNORED_LABEL
from ..safeguards_mdm_asr import NO_SAFEGUARDS
from .collator import SecondsBatches, SecondsBatchSampler

logger = logging.get_logger(__name__)

# Beside the averaged weights of a checkpoint: what training goes on with.
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"
# Several processes follow the first one's clock. Asking it waits for the device.
STEPS_BETWEEN_LOOKS = 10


def setting(default: Any, text: str) -> Any:
    """A field of a dataclass that `HfArgumentParser` reads, with its help text."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class MDMASRTrainingArguments(Seq2SeqTrainingArguments):
    """
    Training arguments of [`ISCTTrainer`]: those of `Seq2SeqTrainingArguments`, and the ones below, each with its help
    text. `metric_for_best_model` "wer" and "cer" are better when lower, and "wer" is the default where
    `predict_with_generate` and `load_best_model_at_end` are set.
    """

    isct_steps: int = setting(2, "Self-correction steps per batch: 2 is the paper's ISCT, 1 the plain loss.")
    position_biased_share: float = setting(
        0.0, "Share of rows whose masks are position-biased, as at inference; 0 is the paper's."
    )
    draft_weight: float = setting(1.0, "With drafts: the weight of their loss beside the donor's.")
    encoder_learning_rate: float | None = setting(
        None,
        "Peak learning rate of the encoder, such as a tenth of `learning_rate`, with which it adapts to shorter "
        "silence or other rooms and keeps what it knows. None: `learning_rate`.",
    )
    max_minutes: float | None = setting(
        None,
        "Ends training after so many minutes, or after `max_steps` if they come first. The learning rate then follows "
        "the clock: its schedule is over at the end of the time, however many steps that allows.",
    )
    ema_decay: float | None = setting(
        None,
        "Decay of an exponential moving average of the trained weights, such as 0.999. The average is what is "
        "evaluated and saved. None: no average.",
    )
    spec_augment: bool = setting(False, "Mask bands of time and of frequency of the features.")
    max_seconds_per_batch: float | None = setting(
        None,
        "Seconds of audio, padding included, that a device takes at once, in batches of similar lengths. Replaces "
        "`per_device_train_batch_size`. None: batches of a fixed number of utterances.",
    )
    remove_unused_columns: bool = setting(False, "Drop columns the model does not know before the collator.")
    logging_nan_inf_filter: bool = setting(False, "Filter NaN losses out of the logs. Training stops at them anyway.")

    def __post_init__(self):
        try:
            self.make_objective(has_drafts=False)
            self.make_objective(has_drafts=True)
        except ValueError as error:
            raise ValueError(str(error).replace("`num_steps`", "`isct_steps`")) from error
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {self.ema_decay!r}. None turns it off.")
        for name in ("encoder_learning_rate", "max_minutes", "max_seconds_per_batch"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}. None turns it off.")
        if self.label_smoothing_factor:
            raise ValueError(f"`label_smoothing_factor={self.label_smoothing_factor}` has no place here. Leave it 0.")
        if self.metric_for_best_model is None and self.load_best_model_at_end and self.predict_with_generate:
            self.metric_for_best_model = "wer"
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(("wer", "cer")):
            self.greater_is_better = False
        if self.accelerator_config is None:
            # Batches of a stream vary in length, so that one process cannot read them for all.
            self.accelerator_config = {"dispatch_batches": False}
        if self.data_seed is None:
            # Processes draw different masks (see `_Steps`), but must agree on the order of the data.
            self.data_seed = self.seed
        super().__post_init__()

    def make_objective(self, has_drafts: bool) -> DiffusionObjective | DraftObjective:
        """What a model with drafts, or a canvas, minimises by these arguments."""
        if has_drafts:
            return DraftObjective(draft_weight=self.draft_weight)
        return DiffusionObjective(num_steps=self.isct_steps, position_biased_share=self.position_biased_share)


def make_wer_metric(processor: Any, language: str | None = None) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    A `compute_metrics` for `predict_with_generate`: word and character error rates in per cent, over all words of the
    set.

    Args:
        processor: the processor or tokenizer whose `decode` turns ids into text. Negative ids are padding.
        language (`str`, *optional*): "en" normalises with Whisper's English normaliser (without its table of
            spellings), any other with its basic one. Default: the prompt's language.

    Raises:
        ValueError: (the metric) there is no word in the references.
    """
    if language is None:
        language = ((getattr(processor, "prompt_template", None) or {}).get("defaults") or {}).get("language", "en")
    normalize = normaliser(language)

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


class WeightAverage(TrainerCallback):
    """
    An exponential moving average, in fp32, of the parameters of a trainer's model that are trained. Its decay starts
    low, as min(`decay`, (1 + n) / (10 + n)) after n updates, so that short runs do not keep their first weights. A
    checkpoint has the average for its weights, and beside it what training goes on with. After training the model has
    the average.
    """

    def __init__(self, trainer: "ISCTTrainer", decay: float):
        self.trainer, self.decay = trainer, decay
        self.parameters: dict[str, nn.Parameter] = {}
        self.average: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the averaged weights inside the context, if they have begun."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy_to_model(self.average)
        try:
            yield
        finally:
            self._copy_to_model(own)

    @torch.no_grad()
    def _copy_to_model(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Of a checkpoint the model has read the average.
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        if self.trainer.resumed_from:
            path = Path(self.trainer.resumed_from, TRAINING_WEIGHTS_NAME)
            if path.exists():
                self._copy_to_model(load_file(path))
            else:
                logger.warning(f"{path.parent} has no averaged weights: the average begins with its weights.")

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.float(), 1.0 - decay)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and not args.save_only_model:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            # Clones: parameters may share storage, which safetensors refuses.
            own = {name: p.detach().clone().contiguous() for name, p in self.parameters.items()}
            save_file(own, folder / TRAINING_WEIGHTS_NAME)

    def on_train_end(self, args, state, control, **kwargs):
        # The best checkpoint, once loaded, has its own averaged weights.
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._copy_to_model(self.average)
        self.parameters = self.average = {}


class TrainingClock(TrainerCallback):
    """
    Which `share` of `minutes` of training is over, the same for all processes, and their end. A resumed run has the
    whole time again.
    """

    def __init__(self, minutes: float):
        self.seconds, self.share = 60.0 * minutes, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.share = time.monotonic(), 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and state.global_step % STEPS_BETWEEN_LOOKS:
            return
        share = min((time.monotonic() - self.started) / self.seconds, 1.0)
        self.share = float(broadcast_object_list([share])[0]) if args.world_size > 1 else share

    def on_step_end(self, args, state, control, **kwargs):
        if self.share >= 1.0:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"


class _Steps(TrainerCallback):
    """What [`ISCTTrainer`] does at the beginning of training and of each epoch."""

    def __init__(self, trainer: "ISCTTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:
            # All processes start with one seed. They would mask alike, which covers fewer times per step.
            torch.manual_seed(args.seed + 1_000_003 * args.process_index)
        self.trainer.shard_methods()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.batch_sampler is not None:
            # accelerate does not reach a sampler behind batches that it skips on resuming.
            self.trainer.batch_sampler.set_epoch(int(round(state.epoch or 0.0, 6)))


class ISCTTrainer(Seq2SeqTrainer):
    r"""
    Trains MDM-ASR: a canvas by masked diffusion with the paper's iterative self-correction, a model with drafts by the
    donor's and the drafts' cross-entropy on the labels. What goes into a step of a canvas:

    ```
    batch -> SpecAugment -> encoder, once
          -> draw t, mask the labels, predict:                                        loss of step 1
          -> put the predictions into the masked places, draw t anew, mask, predict:  loss of step 2
          -> the sum of both
    ```

    All steps run in one forward of the (wrapped) model, so that DDP, gradient accumulation and checkpointing need no
    care. The loss is a mean over the tokens of a micro-batch; micro-batches weigh alike. What is frozen has neither
    gradients, dropout nor running statistics. A loss that is NaN or infinite, and training on bad rows alone, raise a
    ValueError.

    - Logs `loss_step_1`, `accuracy_step_1` (of masked tokens), ...; with drafts `loss_donor`, `loss_drafts` and their
      accuracies; with [`DataCollatorForMDMASR`] `rows_skipped`.
    - Evaluates with the paper's masks, seeded by the texts of a batch: `eval_loss_step_1` can be compared between
      runs. With `predict_with_generate` it transcribes, without Whisper's safeguards, and reports WER and CER.
    - `train()` reports `train_rows_per_s` and `train_audio_s_per_s`, what one process worked through, and
      `train_rows_skipped`, of the sources and in the batches of all epochs.

    Args:
        model ([`MDMASRForConditionalGeneration`]): or one that PEFT wrapped.
        args ([`MDMASRTrainingArguments`]).
        objective ([`DiffusionObjective`] or [`DraftObjective`], *optional*): instead of the one that `args` describe.
        kwargs: further arguments of `Seq2SeqTrainer`. A `processing_class` is saved with the checkpoints, and decodes
            for WER: `compute_metrics` is by default [`make_wer_metric`], with `predict_with_generate`.
    """

    # The loss is a mean of the micro-batch: training_step divides it by the gradient accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MDMASRTrainingArguments | None = None,
        objective: DiffusionObjective | DraftObjective | None = None,
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
        if args.predict_with_generate and kwargs.get("processing_class") is not None:
            kwargs["compute_metrics"] = kwargs.get("compute_metrics") or make_wer_metric(kwargs["processing_class"])
        self.batch_sampler: SecondsBatchSampler | None = None
        self.clock: TrainingClock | None = None
        self.weight_average: WeightAverage | None = None
        self.resumed_from: str | None = None
        self._begin_sums()
        self._evaluated_steps: list[torch.Tensor] = []
        super().__init__(model, args, **kwargs)
        # Wherever it is decided: this model never divides by the number of labels.
        self.model_accepts_loss_kwargs = False
        self.objective = self.evaluation_objective = objective or args.make_objective(
            self.core_model.config.has_drafts
        )
        if isinstance(self.objective, DiffusionObjective):
            # The paper's, so that losses of all runs can be compared.
            self.evaluation_objective = DiffusionObjective(num_steps=self.objective.num_steps)
        self.add_callback(_Steps(self))
        if args.max_minutes is not None:
            self.clock = TrainingClock(args.max_minutes)
            self.add_callback(self.clock)
        if args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("`ema_decay` does not work with sharded parameters. Use DDP, or leave it out.")
            self.weight_average = WeightAverage(self, args.ema_decay)
            self.add_callback(self.weight_average)

    @property
    def core_model(self) -> nn.Module:
        """The MDM-ASR model inside the wrappers of Accelerate and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def shard_methods(self) -> None:
        """Lets FSDP gather a layer's weights for the method that is called beside its forward."""
        if not self.is_fsdp_enabled:
            return
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        for layer in self.core_model.get_decoder().layers:
            if isinstance(layer, FSDPModule) and "cross_key_value" not in vars(layer):
                register_fsdp_forward_method(layer, "cross_key_value")

    # ---- What a run is set up with ----

    def get_train_dataloader(self) -> DataLoader:
        if self.args.max_seconds_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        args, dataset = self.args, self.train_dataset
        limits = {"max_seconds": args.max_seconds_per_batch, "seed": args.data_seed}
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            # Batches of rows, which the collator unpacks.
            dataset, batching = SecondsBatches(dataset, **limits), {"batch_size": 1}
        else:
            timed = dataset
            if not hasattr(dataset, "durations_s"):
                if "duration_s" not in (getattr(dataset, "column_names", None) or ()):
                    raise ValueError(
                        "`max_seconds_per_batch` needs to know how long the rows of `train_dataset` are. Make it with "
                        "`load_sources`, or give it `durations_s` or a column `duration_s`."
                    )
                timed = dataset["duration_s"]
            self.batch_sampler = SecondsBatchSampler(timed, num_processes=args.world_size, **limits)
            batching = {"batch_sampler": self.batch_sampler}
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer, own_rate = super().create_optimizer(model), self.args.encoder_learning_rate
        if is_new and own_rate is not None:
            encoder = {id(p) for p in self.core_model.get_encoder().parameters()}
            # Behind the others: the first group's learning rate is the one that is logged.
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in encoder]
                group["params"] = [p for p in group["params"] if id(p) not in encoder]
                optimizer.add_param_group({**group, "params": moved, "lr": own_rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.clock is not None:
            if not hasattr(scheduler, "lr_lambdas"):
                raise ValueError(
                    f"`lr_scheduler_type` {self.args.lr_scheduler_type.value!r} cannot follow the clock of "
                    "`max_minutes`. Use 'linear', 'cosine' or 'constant'."
                )
            scheduler.lr_lambdas = [self._by_the_clock(one, num_training_steps) for one in scheduler.lr_lambdas]
        return scheduler

    def _by_the_clock(self, factor: Callable[[float], float], num_steps: int) -> Callable[[int], float]:
        """A schedule of steps that, its warmup over, is as far as the clock's time."""
        warmup = self.args.get_warmup_steps(num_steps)
        return lambda step: factor(step if step < warmup else warmup + self.clock.share * (num_steps - warmup))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        self._begin_sums()
        resumed_from = resume_from_checkpoint or None
        self.resumed_from = get_last_checkpoint(self.args.output_dir) if resumed_from is True else resumed_from
        output = super().train(resume_from_checkpoint, **kwargs)
        # Of this process; the Trainer's own figures assume batches of a fixed number of rows.
        runtime_s = output.metrics["train_runtime"]
        output.metrics["train_rows_per_s"] = round(self.num_rows / runtime_s, 3)
        output.metrics["train_audio_s_per_s"] = round(float(self._audio_s) / runtime_s, 3)
        if hasattr(self.data_collator, "num_skipped"):
            self.data_collator.check_any()
            left_out = sum(getattr(self.train_dataset, "skipped", {}).values())
            output.metrics["train_rows_skipped"] = left_out + self.data_collator.num_skipped
        return output

    # ---- A step ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs.get("labels") is None:
            raise ValueError("The batch has no `labels`. Collate it with DataCollatorForMDMASR.")
        if not model.training:
            rows = inputs["labels"].cpu().numpy()
            # The texts of the batch, and not their padding.
            seed = zlib.crc32(b"".join(row[row != IGNORED_LABEL].tobytes() for row in rows))
            generator = torch.Generator().manual_seed(seed)
            outputs = model(**inputs, objective=self.evaluation_objective, generator=generator)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        self._keep_frozen()
        if self.args.spec_augment:
            features = spec_augment(inputs["input_features"], inputs.get("attention_mask"))
            inputs = {**inputs, "input_features": features}
        outputs = model(**inputs, objective=self.objective)
        self._add_to_sums(inputs, outputs)
        self._finite = _to_host(torch.isfinite(outputs["loss"].detach()))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _keep_frozen(self) -> None:
        # `training_step` has just put everything into training mode; dropout and running statistics of what is frozen
        # must stay off.
        encoder, decoder = self.core_model.get_encoder(), self.core_model.get_decoder()
        for learning, modules in ((encoder, [encoder]), (decoder.layers, [decoder.layers, decoder.dropout])):
            if not any(parameter.requires_grad for parameter in learning.parameters()):
                for module in modules:
                    module.eval()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Asked only now, when the device has the backward pass queued, so that it does not wait for the answer.
        finite, event = self._finite
        if event is not None:
            event.synchronize()
        if not finite.item():
            raise ValueError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, at a learning rate of "
                f"{self._get_learning_rate():.3g}; the optimizer has not used this batch. Resume from the last "
                "checkpoint with a lower `learning_rate` or `max_grad_norm`, more `warmup_steps`, or `bf16` instead "
                "of `fp16`; if it happens in the first steps, check the features for NaN."
            )
        return loss

    # ---- What is logged ----

    def _begin_sums(self) -> None:
        self._step_sums: torch.Tensor | None = None
        self._num_summed, self.num_rows, self._audio_s = 0, 0, 0.0

    def _add_to_sums(self, inputs: dict[str, Any], outputs: Any) -> None:
        steps = _steps_of(outputs).detach()
        self._step_sums = steps if self._step_sums is None else self._step_sums + steps
        self._num_summed += 1
        config, mask = self.core_model.config, inputs.get("attention_mask")
        rate = config.input_frames_per_s
        if mask is None and inputs.get("encoder_outputs") is not None:
            # Frames that were encoded before.
            mask, rate = inputs["encoder_outputs"].attention_mask, 1.0 / frame_duration_s(config.encoder_config, rate)
        if mask is not None:
            self.num_rows += len(mask)
            self._audio_s = self._audio_s + mask.sum() / rate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._num_summed:
            sums = torch.cat([self._step_sums, self._step_sums.new_tensor([float(self._num_summed)])])
            sums = self.accelerator.reduce(sums, "sum").tolist()
            logs |= self._step_metrics([total / sums[-1] for total in sums[:-1]])
            self._step_sums, self._num_summed = None, 0
            if hasattr(self.data_collator, "num_skipped"):
                logs["rows_skipped"] = self.data_collator.num_skipped
        super().log(logs, start_time)

    def _step_metrics(self, values: list[float]) -> dict[str, float]:
        """Names for the losses and the accuracies of the S steps, or of the parts that are learnt with drafts."""
        if isinstance(self.objective, DraftObjective):
            losses = list(self.objective.parts)
            right = [part for part in losses if part in ("donor", "drafts", "logits")]
        else:
            losses = right = [f"step_{i + 1}" for i in range(len(values) // 2)]
        names = [f"loss_{one}" for one in losses] + [f"accuracy_{one}" for one in right]
        # Without a share to tell there is one of 0.
        return dict(zip(names, values, strict=False))

    # ---- Evaluation and checkpoints ----

    def averaged_weights(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.weight_average is None else self.weight_average.in_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        with self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._evaluated_steps = []
        self.shard_methods()
        # Seq2SeqTrainer counts the rows twice that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        with self.averaged_weights():
            kwargs["metric_key_prefix"] = metric_key_prefix
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self._evaluated_steps:
            means = torch.cat(self._evaluated_steps).mean(dim=0).tolist()
            output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._step_metrics(means).items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        inputs = self._prepare_inputs(inputs)
        labels, loss, predictions = inputs.get("labels"), None, None
        with torch.no_grad():
            if labels is not None:
                with self.compute_loss_context_manager():
                    loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss, predictions = loss.detach().mean(), outputs["logits"]
                # Once per row, as Trainer does with the loss, so that both weigh batches alike.
                steps = _steps_of(outputs).repeat(len(labels), 1)
                self._evaluated_steps.append(self.gather_function(steps).cpu())
            if prediction_loss_only:
                return loss, None, None
            if self.args.predict_with_generate:
                predictions = self._generate(inputs, gen_kwargs or getattr(self, "_gen_kwargs", {}))
        if predictions is None:
            raise ValueError("Without `labels` there is nothing to predict. Set `predict_with_generate=True`.")
        return loss, predictions, labels

    def _generate(self, inputs: dict[str, Any], gen_kwargs: dict[str, Any]) -> torch.LongTensor:
        settings = {"synced_gpus": self.is_fsdp_enabled or self.is_deepspeed_enabled}
        if self.core_model.config.has_drafts:
            # Early in a training nearly every text would be refused, and decoded six times over.
            settings |= NO_SAFEGUARDS
        settings |= {name: value for name, value in gen_kwargs.items() if value is not None}
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if "prompt_ids" in inputs:
            inputs["decoder_input_ids"] = inputs.pop("prompt_ids")
        with self.accelerator.autocast():
            return self.model.generate(**inputs, **settings)


def _steps_of(outputs: Any) -> torch.Tensor:
    """Losses and accuracies of the steps, in one tensor."""
    return torch.cat([outputs["step_losses"].float(), outputs["step_accuracies"].float()])


def _to_host(flag: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Starts the copy of a tensor to the host. Returns it and the event, if any, to wait for."""
    if not flag.is_cuda:
        return flag, None
    copied = flag.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copied, event
