#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains MDM-ASR: a canvas with iterative self-correction, a donor with its drafts, or drafts alone. Settings come from
a YAML file, from the command line, or from both:

    python training/run_train.py training/configs/finetune.yaml --train_sources DIR --output_dir OUT
    python training/run_train.py training/configs/drafts.yaml --donor DONOR --train_sources AUDIO --output_dir OUT
    accelerate launch --num_processes 8 training/run_train.py training/configs/paper.yaml --output_dir OUT

Writes the model with its processor, checkpoints, and `results.json` with the command, versions, settings and the log.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
import yaml
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mdm_asr_hf import MDMASRForConditionalGeneration, MDMASRProcessor, __version__, default_checkpoint
from mdm_asr_hf.data.augmentation import Augmenter
from mdm_asr_hf.data.mixing import load_sources
from mdm_asr_hf.data.sources import MAX_BAD_SHARE, describe_skipped
from mdm_asr_hf.prompt_mdm_asr import with_prompt_defaults
from mdm_asr_hf.train.collator import DataCollatorForMDMASR
from mdm_asr_hf.train.distillation import train_drafts
from mdm_asr_hf.train.trainer import ISCTTrainer, MDMASRTrainingArguments, setting

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class ModelArguments:
    model: str = setting("default", "An MDM-ASR folder or id; 'default': the package's own.")
    donor: str | None = setting(None, "Start from a Whisper or Canary checkpoint (folder, id or .nemo) instead.")
    donor_kind: str = setting("whisper", "'whisper' or 'canary'.")
    draft_layers: int | None = setting(
        None, "Of a donor's drafts: by default as many as it has; 0 is the paper's canvas."
    )
    vocab_size: int | None = setting(None, "Shrink a Whisper donor's vocabulary to N ids, for a canvas.")
    encoder_trailing_silence_s: float | None = setting(
        None, "Seconds of silence behind the audio, for Whisper encoders."
    )
    encoder_min_duration_s: float | None = setting(
        None, "Seconds of audio and silence together, at least, for Whisper encoders."
    )
    freeze_encoder: bool = setting(False, "Keep the encoder as it is.")
    freeze_embeddings: bool = setting(
        False, "Keep token (and tied output) and position embeddings as they are; [MASK] still learns."
    )
    lora_rank: int = setting(0, "Train adapters of this rank in the decoder's projections instead of all its weights.")
    trained_share: float = setting(1.0, "Save this share of what was learnt, the rest as before (arXiv 2109.01903).")
    shift_logits: bool | None = setting(
        None, "Read a canvas's logits one position earlier, as the donor predicts. Default: yes for donors."
    )


@dataclass
class DataArguments:
    train_sources: list[str] = setting(
        [], "Folders, manifests, data set names, or JSON objects with the settings of `Source`."
    )
    eval_sources: list[str] = setting([], "The same, for evaluation.")
    join_utterances: bool = setting(False, "Join utterances into windows, anew each epoch.")
    join_min_s: float = setting(1.0, "Shortest window in seconds.")
    join_max_s: float = setting(25.0, "Longest window in seconds.")
    augment: bool = setting(False, "Noise, speed, room and gain on the fly.")
    language: str | None = setting(
        None, "Of rows whose source tells none; what the saved model's prompt says unless it is told."
    )
    on_bad_row: str = setting("raise", "'raise' at rows that cannot be used, or 'skip'.")
    max_bad_share: float = setting(MAX_BAD_SHARE, "With 'skip': more bad rows than this share end the training.")
    benchmark_input: int = setting(0, "Only measure the input pipeline, over so many batches, and stop.")


@dataclass
class DistillationArguments:
    """Of drafts that learn by the donor's own text, from audio without transcripts: see `train_drafts`."""

    distill: bool = setting(False, "Learn what the donor says itself; no transcripts.")
    cache: str | None = setting(None, "For what the donor makes of the audio.")
    silence_s: float = setting(1.0, "Behind the audio, taken for more.")
    encoder_steps: int | None = setting(None, "Of the encoder's stage; default: 500 for a Whisper; 0 leaves it out.")
    draft_steps: int = setting(6000, "Of the masks' stage.")


def read_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataArguments, DistillationArguments, MDMASRTrainingArguments, set[str]]:
    """YAML settings, if the first argument is such a file, overridden by those of the command line; and the names of
    what was given."""
    settings = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        for name, value in (yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}).items():
            values = value if isinstance(value, list) else [value]
            settings += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
        argv = argv[1:]
    parser = HfArgumentParser((ModelArguments, DataArguments, DistillationArguments, MDMASRTrainingArguments))
    given = {one[2:].partition("=")[0] for one in [*settings, *argv] if one.startswith("--")}
    return *parser.parse_args_into_dataclasses(args=[*settings, *argv]), given


def parse_sources(sources: list[str]) -> list:
    return [json.loads(source) if source.startswith("{") else source for source in sources]


def load_model(arguments: ModelArguments):
    """The model to train, in fp32, with what is frozen, and its processor."""
    if arguments.donor is not None:
        if arguments.donor_kind not in ("whisper", "canary"):
            raise ValueError(f"`donor_kind` must be 'whisper' or 'canary', got {arguments.donor_kind!r}.")
        options = {} if arguments.vocab_size is None else {"vocab_size": arguments.vocab_size}
        processor = getattr(MDMASRProcessor, f"from_{arguments.donor_kind}")(arguments.donor, **options)
        make = getattr(MDMASRForConditionalGeneration, f"from_{arguments.donor_kind}")
        model = make(arguments.donor, draft_layers=arguments.draft_layers, **options).float()
    else:
        source = str(default_checkpoint()) if arguments.model == "default" else arguments.model
        model = AutoModelForSpeechSeq2Seq.from_pretrained(source, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(source)
    for name in ("encoder_trailing_silence_s", "encoder_min_duration_s", "shift_logits"):
        if getattr(arguments, name) is not None:
            setattr(model.config, name, getattr(arguments, name))
    model.config.validate_architecture()
    decoder = model.get_decoder()
    if arguments.freeze_encoder:
        model.get_encoder().requires_grad_(False)
    if arguments.freeze_embeddings:
        # The mask's embedding, which no donor has, is in `input_only_embeddings` and still learns.
        decoder.embed_tokens.requires_grad_(False)
        decoder.embed_positions.requires_grad_(False)
    return model, processor


def with_adapters(model: MDMASRForConditionalGeneration, rank: int) -> "PeftModel":
    """The model with low-rank adapters (LoRA, arXiv 2106.09685) in all projections of the decoder and its drafts."""
    from peft import LoraConfig, get_peft_model

    projections = r"model\.decoder\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections))


@torch.no_grad()
def keep_share(model: torch.nn.Module, start: dict[str, torch.Tensor], share: float) -> None:
    """Moves the trained weights back towards `start`; of adapters, what they add."""
    for name, parameter in model.named_parameters():
        # An adapter adds B A, and starts with B = 0.
        if name in start and ".lora_A." not in name:
            parameter.lerp_(start[name].to(parameter), 1.0 - share)


def benchmark_input(trainer: ISCTTrainer, num_batches: int) -> dict[str, float]:
    """Rows and seconds of audio per second that the input pipeline alone delivers."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    num_rows, num_frames, start = 0, 0, time.perf_counter()
    for _, batch in zip(range(num_batches), batches, strict=False):
        num_rows += len(batch["labels"])
        num_frames += int(batch["attention_mask"].sum())
    elapsed_s = time.perf_counter() - start
    audio_s = num_frames / trainer.core_model.config.input_frames_per_s
    return {"input_rows_per_s": num_rows / elapsed_s, "input_audio_s_per_s": audio_s / elapsed_s}


def distill(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    distillation: DistillationArguments,
    arguments: MDMASRTrainingArguments,
    given: set[str],
) -> dict:
    """Drafts of a donor, by its own text, with the training settings that were given."""
    own = {f.name for f in fields(MDMASRTrainingArguments)} - {"output_dir"}
    settings = {name: value for name, value in asdict(distillation).items() if name != "distill"}
    return train_drafts(
        model_arguments.donor or str(default_checkpoint()),
        parse_sources(data_arguments.train_sources),
        arguments.output_dir,
        language=data_arguments.language,
        **settings,
        **{name: getattr(arguments, name) for name in sorted(given & own)},
    )


def main(argv: list[str]) -> dict:
    model_arguments, data_arguments, distillation, arguments, given = read_arguments(argv)
    if not data_arguments.train_sources:
        raise ValueError("`train_sources` is empty. Name at least one folder, manifest or data set.")
    if distillation.distill:
        return distill(model_arguments, data_arguments, distillation, arguments, given)
    if model_arguments.freeze_encoder and arguments.encoder_learning_rate is not None:
        raise ValueError(
            f"`encoder_learning_rate={arguments.encoder_learning_rate}` has no effect with `freeze_encoder`. Set one."
        )
    if data_arguments.benchmark_input and arguments.max_steps < 1:
        # Windows are a stream, whose end the trainer wants to be told.
        arguments.max_steps = 1
    set_seed(arguments.seed)
    model, processor = load_model(model_arguments)
    config = model.config
    if model_arguments.lora_rank:
        model = with_adapters(model, model_arguments.lora_rank)
    slots = {} if data_arguments.language is None else {"language": data_arguments.language}
    if slots:
        # What is saved transcribes this language without being told.
        for part in (model.generation_config, processor):
            part.prompt_template = with_prompt_defaults(part.prompt_template or {"tokens": [0]}, **slots)
    template = processor.prompt_template or {"tokens": [0]}
    # Each row's own, if the data tell.
    language_column = "language" if "language" in (template.get("slots") or {}) else None
    bad_rows = {"on_bad_row": data_arguments.on_bad_row, "max_bad_share": data_arguments.max_bad_share}
    limits = {**bad_rows, "max_duration_s": processor.feature_extractor.max_duration_s}
    join = None
    if data_arguments.join_utterances:
        join = {"min_s": data_arguments.join_min_s, "max_s": data_arguments.join_max_s}
    sources = parse_sources(data_arguments.train_sources)
    train = load_sources(sources, join=join, seed=arguments.seed, repeat=True, **limits)
    evaluation = None
    if data_arguments.eval_sources:
        evaluation = load_sources(parse_sources(data_arguments.eval_sources), **limits)
    collators = [
        DataCollatorForMDMASR(
            processor,
            language_column=language_column,
            augment=augment,
            # What a canvas holds behind the prompt.
            max_label_tokens=config.decoder_config.max_position_embeddings - len(template["tokens"]),
            seed=arguments.seed,
            **bad_rows,
            **slots,
        )
        for augment in (Augmenter() if data_arguments.augment else None, None)
    ]
    collator = collators[0]
    data = {"data_collator": collator, "train_dataset": train, "eval_dataset": evaluation}
    trainer = TrainerWithPlainEvaluation(model, arguments, processing_class=processor, **data)
    trainer.evaluation_collator = collators[1]
    if data_arguments.benchmark_input:
        results = benchmark_input(trainer, data_arguments.benchmark_input)
        print(json.dumps(results))
        return results

    results = {
        "command": "python training/run_train.py " + " ".join(argv),
        "versions": {"mdm_asr_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "model": asdict(model_arguments),
        "data": asdict(data_arguments),
        "num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if evaluation is not None:
        results["before"] = trainer.evaluate()
    # A stream that changes meanwhile cannot be brought to the place where a run stopped.
    arguments.ignore_data_skip |= train.is_growing
    start = {}
    if model_arguments.trained_share != 1:
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    resume = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    results["train"] = trainer.train(resume_from_checkpoint=resume).metrics
    keep_share(model, start, model_arguments.trained_share)
    if evaluation is not None:
        results["after"] = trainer.evaluate()
    if model_arguments.lora_rank and trainer.is_world_process_zero():
        # Merged, so that the result loads as any other.
        model.merge_and_unload().save_pretrained(arguments.output_dir)
        processor.save_pretrained(arguments.output_dir)
    elif not model_arguments.lora_rank:
        trainer.save_model(arguments.output_dir)
    results["log"] = trainer.state.log_history
    results["skipped"] = collator.report()
    if train.skipped:
        results["skipped"] += f" Left out of the sources before: {describe_skipped(train.skipped)}."
    if trainer.is_world_process_zero():
        Path(arguments.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        shown = {name: results[name] for name in ("before", "after") if name in results}
        print(json.dumps(shown, indent=2), results["skipped"], sep="\n")
    return results


class TrainerWithPlainEvaluation(ISCTTrainer):
    """Evaluates without augmentation."""

    evaluation_collator = None

    def get_eval_dataloader(self, eval_dataset=None):
        training_collator, self.data_collator = self.data_collator, self.evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator


if __name__ == "__main__":
    main(sys.argv[1:])
