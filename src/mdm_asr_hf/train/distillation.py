# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The stages that make a donor fast, of its own text alone: a shorter silence behind the audio, and drafts."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..data.mixing import Mixture
from ..data.sources import Source, describe_skipped
from ..diffusion_mdm_asr import DraftObjective
from ..encoder_mdm_asr import WHISPER_FRAMES_PER_S
from ..evaluate.scoring import count_errors
from ..safeguards_mdm_asr import NO_SAFEGUARDS
from .clips import SpeechClips
from .donor_cache import CachedSpeech, DistillationCollator, recode_cache, without_remarks, write_cache
from .trainer import ISCTTrainer, MDMASRTrainingArguments

# Texts that the short list is counted on.
NUM_COUNTED = 20_000
# Held-out clips that progress is measured on, and how often.
NUM_MEASURED, MEASURE_EVERY_S = 48, 300.0


@dataclass(frozen=True)
class Stage:
    """
    What is learnt together.

    Args:
        objective ([`DraftObjective`])
        trained (`str`): a pattern of the names of the parameters that learn.
        part (`str`): what it reads of the cache, see [`DistillationCollator`].
        learning_rate (`float`): its peak.
    """

    objective: DraftObjective
    trained: str
    part: str
    learning_rate: float


STAGES = {
    # Two thousandths of the encoder: none of the donor's weights, so that nothing it knows is lost.
    "encoder": Stage(
        DraftObjective(donor_weight=0.0, draft_weight=0.0, frame_weight=1.0, logit_weight=1.0),
        r"^model\.encoder\.silence_embeddings$",
        "encoder",
        1e-2,
    ),
    "drafts": Stage(
        DraftObjective(donor_weight=0.0), r"^model\.decoder\.(drafts\.|input_only_embeddings)", "decoder", 4e-4
    ),
}


def add_silence(model: Any, silence_s: float) -> None:
    """Lets a Whisper encoder learn the frames of so many seconds of silence, and hear no more behind the audio."""
    encoder = model.get_encoder()
    # An odd frame of audio more.
    encoder.config.silence_frames = math.ceil(silence_s * WHISPER_FRAMES_PER_S / 2) + 1
    learnt = torch.zeros(encoder.config.silence_frames, encoder.config.d_model, device=model.device)
    encoder.silence_embeddings = nn.Parameter(learnt)
    model.config.encoder_trailing_silence_s, model.config.encoder_min_duration_s = silence_s, 0.0


def set_short_list(model: Any, texts: Sequence[Sequence[int]]) -> None:
    """Lets untrained drafts have the ids that these texts use most, and the end of text."""
    counts, buffer = Counter(token for text in texts for token in text), model.draft_token_ids
    wanted = [model.config.eos_token_id, *(i for i, _ in counts.most_common()), *range(model.config.vocab_size)]
    buffer.copy_(torch.tensor(sorted(list(dict.fromkeys(wanted))[: len(buffer)])))


@torch.no_grad()
def measure(model: Any, rows: Sequence[dict[str, torch.Tensor]], batch_size: int = 16) -> dict[str, float]:
    """
    What decoding gives on cached clips with features, as a user would decode them: tokens an evaluation, and the share
    of the teacher's tokens that the donor writes on this encoder's frames.
    """
    tokens = evaluations = wrong = num_taught = 0
    rows = sorted(rows, key=lambda row: float(row["seconds"]))
    with without_remarks():
        for first in range(0, len(rows), batch_size):
            batch = DistillationCollator("encoder")(rows[first : first + batch_size])
            features, mask = (batch[name].to(model.device) for name in ("input_features", "attention_mask"))
            encoded = model.encode(features, mask)
            found = model.generate(
                input_features=features,
                attention_mask=mask,
                encoder_outputs=encoded,
                decoder_input_ids=batch["prompt_ids"].to(model.device),
                **NO_SAFEGUARDS,
                # Before there is a silence that ends a text, none would come to its end.
                max_new_tokens=batch["labels"].shape[1] + 10,
                return_dict_in_generate=True,
            )
            lengths = (found.commit_steps > 0).sum(dim=-1)
            tokens, evaluations = tokens + int(lengths.sum()), evaluations + int(found.nfe.sum())
            taught = [row[row != -100] for row in batch["labels"]]
            said = [row[:n] for row, n in zip(found.sequences, lengths, strict=True)]
            # Tokens are counted as words are.
            words = ([" ".join(map(str, ids.tolist())) for ids in texts] for texts in (taught, said))
            *errors, number = count_errors(*words).sum(axis=0).tolist()
            wrong, num_taught = wrong + sum(errors), num_taught + number
    return {
        "tokens_per_evaluation": tokens / max(evaluations, 1),
        "token_agreement": 1.0 - wrong / max(num_taught, 1),
    }


class Progress(TrainerCallback):
    """Measures held-out speech every five minutes and at the end, and says it in one line."""

    def __init__(self, trainer: ISCTTrainer, rows: Sequence[dict], report: Callable[[str], None], name: str):
        self.trainer, self.rows, self.report, self.name = trainer, rows, report, name
        self.measured: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.began_at, self.looked = time.monotonic(), state.global_step, 0.0
        if state.global_step == 0:
            self._measure(state)

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.looked > MEASURE_EVERY_S:
            self._measure(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._measure(state)

    def _measure(self, state):
        if not state.is_world_process_zero:
            return
        model = self.trainer.core_model
        was_training = model.training
        model.eval()
        with self.trainer.averaged_weights(), self.trainer.accelerator.autocast():
            found = measure(model, self.rows)
        model.train(was_training)
        elapsed_s, done = time.monotonic() - self.began, state.global_step - self.began_at
        per_step_s = elapsed_s / done if done else 0.0
        clips_per_s = self.trainer.num_rows / elapsed_s if done else 0.0
        self.measured.append({"step": state.global_step, "seconds": elapsed_s, **found})
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        left = f"{clips_per_s:.1f} clips/s, {(state.max_steps - state.global_step) * per_step_s / 60:.0f} min left"
        self.report(f"{self.name} {state.global_step} of {state.max_steps}: {shown}" + (f"; {left}" if done else ""))
        self.looked = time.monotonic()


def train_stage(
    name: str,
    model: Any,
    caches: Sequence[CachedSpeech],
    held_out: Sequence[dict],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    report: Callable[[str], None] = print,
    objective: DraftObjective | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Runs one of the `STAGES` by [`ISCTTrainer`]; where it was begun before, from its last checkpoint on.

    Args:
        model ([`MDMASRForConditionalGeneration`]): is trained, in place.
        caches: what the donor made of each source; of "drafts", with the frames that `model` hears.
        held_out: rows of a cache with features, to measure on.
        output (`str` or `Path`): for checkpoints.
        weights (*optional*): the share of each source, relative to the others'.
        report (`Callable`): is told of the progress, in lines.
        objective ([`DraftObjective`], *optional*): instead of the stage's own.
        arguments: of [`MDMASRTrainingArguments`].

    Returns:
        `dict`: the settings, the log, and what was measured on the way.
    """
    stage = STAGES[name]
    settings = {
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "max_seconds_per_batch": 120.0,
        "warmup_steps": 50,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": True,
        "logging_steps": 50,
        "save_steps": 100,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **arguments,
    }
    if settings["lr_scheduler_type"] == "warmup_stable_decay":
        # A quarter of the gain comes while the learning rate falls.
        decay = {"num_decay_steps": max(1, settings["max_steps"] // 5), "min_lr_ratio": 0.0}
        settings.setdefault("lr_scheduler_kwargs", decay)
    arguments = MDMASRTrainingArguments(str(output), **settings)
    # What the stage does not train is frozen.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(stage.trained, parameter_name) is not None)
    objective = objective or stage.objective
    data = Mixture(list(caches), weights, seed=arguments.seed)
    collator = DistillationCollator(stage.part)
    trainer = ISCTTrainer(model, arguments, objective, data_collator=collator, train_dataset=data)
    progress = Progress(trainer, held_out, report, name)
    trainer.add_callback(progress)
    resume = get_last_checkpoint(str(output)) if Path(output).is_dir() else None
    trained = trainer.train(resume_from_checkpoint=resume)
    model.eval()
    hours, log = float(data.durations_s.sum() / 3600), trainer.state.log_history
    kept = {"objective": asdict(objective), "hours": hours, "train": trained.metrics}
    return {**kept, "log": log, "held_out": progress.measured}


def train_drafts(
    donor: str,
    sources: Sequence[Any],
    output: str | Path,
    *,
    cache: str | Path | None = None,
    silence_s: float = 1.0,
    encoder_steps: int | None = None,
    draft_steps: int = 6000,
    isct_steps: int = 1,
    language: str | None = None,
    report: Callable[[str], None] = print,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Makes a model of a donor that writes its text in few evaluations, from audio alone. What was done when it stopped
    is not done again.

    Args:
        donor (`str`): a Whisper or Canary checkpoint, or a model of this package with drafts, which go on to learn.
        sources: audio; each a path, the name of a data set, or a dict of the settings of [`Source`], of which `weight`
            is its share of the clips, and of `passes`, how often it is cut and changed anew, see [`SpeechClips`].
        output: the folder for the model; its folder `training` keeps caches and checkpoints.
        cache (*optional*): where what the donor makes of the audio is kept, if not in `output`.
        silence_s (`float`): behind the audio, which a Whisper encoder learns to take for more.
        encoder_steps, draft_steps (`int`): of each stage; 0 leaves it out. `encoder_steps` are 500 by default with a
            Whisper encoder, and 0 with any other, which needs no silence.
        isct_steps (`int`): 2 trains the masks in two steps, see `num_steps` of [`DraftObjective`].
        language (`str`, *optional*): of the speech, where the sources do not tell and the donor should not guess.
        report (`Callable`): is told of the progress, in lines.
        arguments: of [`MDMASRTrainingArguments`], for all stages.

    Returns:
        `dict`: what each stage was like, also in `output`/results.json.

    Raises:
        ValueError: no audio, audio that cannot be read or in which nobody speaks, a cache of another donor, a donor
            without drafts, or a disk that is full.
    """
    output, state = Path(output), PartialState()
    work, cache = output / "training", Path(cache or output / "training" / "cache")
    settings = [{"text_column": None, **(one if isinstance(one, dict) else {"path": one})} for one in sources]
    passes = [one.pop("passes", 1) for one in settings]
    audio = [Source.of(one) for one in settings]
    if not audio:
        raise ValueError("`sources` is empty. Name at least one folder, manifest or data set of audio.")
    model, processor = _load(donor)
    steps = _plan_steps(model.config.encoder_config.model_type, encoder_steps, draft_steps)
    arguments = {"bf16": computes_bf16(), "use_cpu": not torch.cuda.is_available(), **arguments}
    slots = {} if language is None else {"language": language}

    def caches(name: str, fill: Callable[[int, Path], None]) -> list[CachedSpeech]:
        folders = [cache / name / str(index) for index in range(len(audio))]
        for index, folder in enumerate(folders):
            fill(index, folder)
        state.wait_for_everyone()
        return [CachedSpeech(folder) for folder in folders]

    def transcribe(index: int, folder: Path, held_out: bool = False) -> None:
        how = {"held_out": held_out, "passes": 1 if held_out else passes[index]}
        clips = SpeechClips(audio[index], max_duration_s=processor.feature_extractor.max_duration_s, **how)
        teacher = model.to(state.device, torch.bfloat16 if arguments["bf16"] else torch.float32)
        write_cache(teacher, processor, clips, folder, report=report, **slots)

    donor_caches = caches("donor", transcribe)
    held_out = [
        row
        for one in caches("held-out", lambda i, folder: transcribe(i, folder, held_out=True))
        for row in map(one.__getitem__, one.places(-(-NUM_MEASURED // len(audio))))
    ]
    # As it was loaded: bf16 keeps three digits.
    model, processor = _load(donor)
    if not model.has_trained_drafts:
        places = [(one, i) for one in donor_caches for i in one.places(NUM_COUNTED // len(audio))]
        set_short_list(model, [one[i]["text"].tolist() for one, i in places])
    weights = [one.weight for one in audio]
    weights = None if None in weights else weights
    results = {"donor": str(donor), "sources": [], "stages": {}}
    for source, one in zip(audio, donor_caches, strict=True):
        hours, left_out = float(one.durations_s.sum() / 3600), describe_skipped(one.left_out)
        results["sources"].append({"clips": len(one), "hours": hours, "left_out": one.left_out})
        report(f"{source.path}: {len(one)} clips, {hours:.1f} hours; left out: {left_out}")
    objectives = {name: stage.objective for name, stage in STAGES.items()}
    if draft_steps:
        objectives["drafts"] = replace(objectives["drafts"], num_steps=isct_steps)
        model.config.decoder_config.draft_hints = isct_steps == 2
        model.config.decoder_config.draft_start = True
    learnt = donor_caches
    for name, number in steps.items():
        if not number:
            continue
        if name == "encoder":
            add_silence(model, silence_s)
        elif steps["encoder"] and learnt is donor_caches:
            model.to(state.device)
            learnt = caches("frames", lambda i, folder: recode_cache(model, donor_caches[i], folder, report=report))
        folder, done = work / name, work / name / "results.json"
        if done.exists():
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            model.tie_weights()
            results["stages"][name] = json.loads(done.read_text(encoding="utf-8"))
            continue
        how = {"weights": weights, "report": report, "objective": objectives[name], "max_steps": number, **arguments}
        results["stages"][name] = train_stage(name, model, learnt, held_out, folder, **how)
        if state.is_main_process:
            model.save_pretrained(folder)
            done.write_text(json.dumps(results["stages"][name], indent=2) + "\n", encoding="utf-8")
        state.wait_for_everyone()
    if state.is_main_process:
        model.save_pretrained(output)
        processor.save_pretrained(output)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _plan_steps(encoder_type: str, encoder_steps: int | None, draft_steps: int) -> dict[str, int]:
    """Steps of each stage, in their order."""
    if encoder_steps is None:
        encoder_steps = 500 if encoder_type == "whisper" else 0
    if not encoder_steps and not draft_steps:
        raise ValueError("`encoder_steps` and `draft_steps` are both 0. Nothing would be trained.")
    if encoder_steps and encoder_type != "whisper":
        raise ValueError(f"`encoder_steps={encoder_steps}` teaches a Whisper encoder, not {encoder_type!r}. Set 0.")
    return {"encoder": encoder_steps, "drafts": draft_steps}


def _load(donor: str) -> tuple[Any, Any]:
    """A donor as a model with drafts, in fp32, and its processor."""
    from ..convert.common import donor_kind
    from ..modeling_mdm_asr import MDMASRForConditionalGeneration
    from ..processing_mdm_asr import MDMASRProcessor

    kind = donor_kind(donor)
    if kind != "mdm_asr":
        make = f"from_{kind}"
        return getattr(MDMASRForConditionalGeneration, make)(donor).eval(), getattr(MDMASRProcessor, make)(donor)
    model = MDMASRForConditionalGeneration.from_pretrained(donor, dtype=torch.float32)
    if not model.config.has_drafts:
        raise ValueError(f"`donor` {str(donor)!r} is a canvas, which has no drafts. Pass a Whisper or a Canary.")
    return model.eval(), MDMASRProcessor.from_pretrained(donor)


def computes_bf16() -> bool:
    """Whether bf16 is fast here: on a GPU that has it, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
