# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The settings of training: those of Seq2SeqTrainingArguments, and those of the objectives."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments

from ..objective_mdm_asr import DiffusionObjective, DraftObjective

# Names of the objectives' settings among the training arguments, of a canvas and with drafts.
_OBJECTIVE_FIELDS = {
    "noise_schedule": "schedule",
    "isct_steps": "num_steps",
    "position_biased_share": "position_biased_share",
    "band_width": "band_width",
    "isct_sample_predictions": "sample_predictions",
    "isct_stop_gradient": "stop_gradient",
    "low_discrepancy_timesteps": "low_discrepancy",
    "eos_weight": "eos_weight",
    "loss_weighting": "weighting",
}
_DRAFT_FIELDS = {
    "draft_frontiers": "num_frontiers",
    "draft_place_decay": "place_decay",
    "draft_weight": "draft_weight",
}
_LOWER_IS_BETTER = ("wer", "cer")
# Factors of the peak learning rate by the share of the time that is over, for `max_minutes`.
CLOCKED_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MDMASRTrainingArguments(Seq2SeqTrainingArguments):
    """
    Training arguments of [`ISCTTrainer`]: those of `Seq2SeqTrainingArguments`, and the ones below, each with its help
    text. `metric_for_best_model` "wer" and "cer" are better when lower, and "wer" is the default where
    `predict_with_generate` and `load_best_model_at_end` are set.
    """

    isct_steps: int = _setting(2, "Self-correction steps per batch: 2 is the paper's ISCT, 1 the plain loss.")
    noise_schedule: str = _setting("linear", "Noise schedule: 'linear' (the paper's), 'cosine' or 'log_linear'.")
    position_biased_share: float = _setting(
        0.0, "Share of rows whose masks are position-biased, as at inference; 0 is the paper's."
    )
    band_width: float = _setting(8.0, "Width, in tokens, of the mixed band of position-biased masks.")
    isct_sample_predictions: bool = _setting(
        False, "Later steps see tokens drawn from the model instead of its arg-max tokens."
    )
    isct_stop_gradient: bool = _setting(True, "No gradient passes from one self-correction step into the one before.")
    eos_weight: float = _setting(1.0, "Weight of the loss behind the first end-of-text token; 1 is the paper's.")
    loss_weighting: str = _setting(
        "bound", "'bound': masked tokens weigh as the paper's; 'flat': all alike, for gradients of less variance."
    )
    low_discrepancy_timesteps: bool = _setting(True, "Spread the times of a batch evenly over (0, 1].")
    draft_frontiers: int = _setting(12, "With drafts: positions of each text, drawn at random, to draft behind.")
    draft_place_decay: float = _setting(0.75, "With drafts: the k-th draft of a block weighs this to the power of k.")
    draft_weight: float = _setting(1.0, "With drafts: the weight of their loss beside the donor's.")
    causal_anneal_steps: int = _setting(
        0,
        "Optimizer steps over which the decoder's view of later positions opens from none, as the autoregressive "
        "donor had it, to all. 0: all from the start.",
    )
    freeze_encoder: bool = _setting(
        False, "Keep the encoder as it is: no gradients, no dropout, no running statistics."
    )
    freeze_embeddings: bool = _setting(
        False, "Keep token (and tied output) and position embeddings as they are; [MASK] still learns."
    )
    freeze_lower_layers: int = _setting(0, "Keep the lowest so many decoder layers as they are.")
    encoder_learning_rate: float | None = _setting(
        None,
        "Peak learning rate of the encoder, such as a tenth of `learning_rate`, with which it adapts to shorter "
        "silence or other rooms and keeps what it knows. None: `learning_rate`.",
    )
    donor_learning_rate: float | None = _setting(
        None,
        "Peak learning rate of what serves the decoder as it served the donor: with drafts, all but what drafts; on a "
        "canvas, all but the self-attention and the embedding of [MASK]. A low one keeps what the donor knows. None: "
        "`learning_rate`.",
    )
    max_minutes: float | None = _setting(
        None,
        "Ends training after so many minutes, or after `max_steps` if they come first. The learning rate then follows "
        "the clock: it falls to 0 at the end of the time, however many steps that allows.",
    )
    ema_decay: float | None = _setting(
        None,
        "Decay of an exponential moving average of the trained weights, such as 0.999. The average is what is "
        "evaluated and saved. None: no average.",
    )
    spec_augment: bool = _setting(False, "Mask bands of time and of frequency of the features.")
    spec_augment_time_masks: int = _setting(2, "Bands of time per utterance.")
    spec_augment_time_share: float = _setting(0.05, "Longest band of time, as a share of the utterance.")
    spec_augment_frequency_masks: int = _setting(2, "Bands of frequency per utterance.")
    spec_augment_frequency_width: int = _setting(15, "Widest band of frequency, in mel bins.")
    max_seconds_per_batch: float | None = _setting(
        None,
        "Seconds of audio, padding included, that a device takes at once, in batches of similar lengths. Replaces "
        "`per_device_train_batch_size`. None: batches of a fixed number of utterances.",
    )
    remove_unused_columns: bool = _setting(False, "Drop columns the model does not know before the collator.")
    logging_nan_inf_filter: bool = _setting(False, "Filter NaN losses out of the logs. Training stops at them anyway.")

    def __post_init__(self):
        try:
            self.make_objective()
            self.make_draft_objective()
        except ValueError as error:
            message = str(error)
            for name, inner in (_OBJECTIVE_FIELDS | _DRAFT_FIELDS).items():
                message = message.replace(f"`{inner}`", f"`{name}`")
            # `PositionBiasedMasking` calls its band's width so.
            raise ValueError(message.replace("`width`", "`band_width`")) from error
        for name in ("causal_anneal_steps", "freeze_lower_layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, got {getattr(self, name)!r}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {self.ema_decay!r}. None turns it off.")
        for name in ("encoder_learning_rate", "donor_learning_rate", "max_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}. None turns it off.")
        if self.encoder_learning_rate is not None and self.freeze_encoder:
            raise ValueError(
                f"`encoder_learning_rate={self.encoder_learning_rate}` has no effect with `freeze_encoder`. Set one."
            )
        if self.max_minutes is not None and self.lr_scheduler_type not in CLOCKED_SCHEDULES:
            raise ValueError(
                f"`lr_scheduler_type` {str(self.lr_scheduler_type)!r} cannot follow the clock of `max_minutes`. Use "
                f"one of {sorted(CLOCKED_SCHEDULES)}."
            )
        if self.max_seconds_per_batch is not None and not self.max_seconds_per_batch > 0:
            raise ValueError(f"`max_seconds_per_batch` must be positive, got {self.max_seconds_per_batch!r}.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` is not part of the masked diffusion "
                "objective. Leave it 0."
            )
        if self.metric_for_best_model is None and self.load_best_model_at_end and self.predict_with_generate:
            self.metric_for_best_model = "wer"
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(_LOWER_IS_BETTER):
            self.greater_is_better = False
        if self.accelerator_config is None:
            # Batches of a stream vary in length, so that one process cannot read them for all.
            self.accelerator_config = {"dispatch_batches": False}
        if self.data_seed is None:
            # Processes draw different masks (see `_TrainingHooks`), but must agree on the order of the data.
            self.data_seed = self.seed
        super().__post_init__()

    def make_objective(self) -> DiffusionObjective:
        """The objective that these arguments describe, of a canvas."""
        return DiffusionObjective(**{inner: getattr(self, name) for name, inner in _OBJECTIVE_FIELDS.items()})

    def make_draft_objective(self) -> DraftObjective:
        """The objective that these arguments describe, with drafts."""
        return DraftObjective(**{inner: getattr(self, name) for name, inner in _DRAFT_FIELDS.items()})


__all__ = ["CLOCKED_SCHEDULES", "MDMASRTrainingArguments"]
