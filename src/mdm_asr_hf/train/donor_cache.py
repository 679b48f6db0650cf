# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What a donor makes of clips, kept on disk: features, frames, its own greedy text, its probabilities."""

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.sources import BadRows, describe_skipped
from ..diffusion_mdm_asr import TeacherOutput
from ..encoder_mdm_asr import MDMASREncoderOutput
from ..files import replacing
from ..safeguards_mdm_asr import NO_SAFEGUARDS, is_suspicious
from .clips import SpeechClips

logger = logging.get_logger(__name__)

VERSION = 1
# Padded seconds of audio that the donor works through at once, and what a clip counts at least.
BATCH_S, LEAST_S = 240.0, 15.0
# Probabilities that are kept of each token; the others count as one.
NUM_PROBABILITIES = 32
# A text of more tokens than this by its seconds is no speech.
TOKENS_PER_S, TOKENS_BESIDE = 7.0, 12
# A longer clip with fewer tokens than that is one of which the donor left a part out.
SPARSE_TOKENS_PER_S, SPARSE_S = 1.0, 4.0
UNREADABLE, NO_SPEECH, LOOPS, GAPS = "unreadable", "without speech", "whose text loops", "whose text has gaps"


def write_cache(
    model: Any,
    processor: Any,
    clips: SpeechClips,
    folder: str | Path,
    *,
    report: Callable[[str], None] = logger.info,
    **prompt_slots: Any,
) -> None:
    """
    Lets the donor transcribe all blocks of clips that are not in the folder yet, every process its share of them. A
    block that was begun when the work stopped is done anew.

    Args:
        model ([`MDMASRForConditionalGeneration`]): of which the donor decodes alone, with the silence behind the audio
            that its configuration says.
        folder (`str` or `Path`): is made.
        report (`Callable`): is told about each block, in one line.
        prompt_slots: of the prompt, such as `language`.

    Raises:
        ValueError: the folder holds what another donor or another source made, more than 5 % of the clips cannot be
            read (their first causes are told), or the disk is full.
    """
    bad, num_clips = BadRows(), 0
    rate = processor.feature_extractor.sampling_rate

    def transcribe(block: int, left_out: Counter) -> list[dict[str, Any]]:
        nonlocal num_clips
        rows = []
        for batch in _batches(clips.plan(block), lambda clip: clip.duration_s):
            samples = []
            for clip in batch:
                try:
                    samples.append(clips.read(clip, rate))
                except ValueError as error:
                    left_out[UNREADABLE] += 1
                    bad.add(error)
            if samples:
                slots, languages = dict(prompt_slots), [clips.language(clip) for clip in batch]
                if "language" not in slots and all(languages) and len(languages) == len(samples):
                    slots["language"] = languages
                rows += _transcribe(model, processor, samples, slots, left_out)
            num_clips += len(batch)
            clips.check_readable(bad, num_clips, is_sample=True)
        clips.check_readable(bad, num_clips)
        return rows

    # Not the number of recordings, since a source may grow.
    source = {"seed": clips.seed, "held_out": clips.held_out, "max_s": clips.max_s}
    names = [f"block-{block:05d}.safetensors" for block in range(len(clips))]
    _write_blocks(folder, model, source, names, transcribe, report, bad)


@torch.no_grad()
def recode_cache(
    model: Any,
    cache: "CachedSpeech",
    folder: str | Path,
    *,
    report: Callable[[str], None] = logger.info,
) -> None:
    """
    The same clips as another encoder hears them: its frames, and what the donor writes on these. Block by block, as
    [`write_cache`].

    Args:
        model ([`MDMASRForConditionalGeneration`]): whose encoder has learnt.
        cache ([`CachedSpeech`]): with features.
    """

    def recode(block: int, left_out: Counter) -> list[dict[str, Any]]:
        rows = []
        for indices in _batches(cache.block_rows(block), lambda index: float(cache.durations_s[index])):
            batch = [cache[index] for index in indices]
            features, mask = (x.to(model.device) for x in _pad_and_mask([row["features"].float() for row in batch]))
            prompts = torch.stack([row["prompt"].long() for row in batch]).to(model.device)
            encoded = model.prepare_cross_attention(model.encode(features, mask))
            written = _greedy_texts(model, features, mask, encoded, decoder_input_ids=prompts)
            seconds = [float(row["seconds"]) for row in batch]
            rows += [row for _, row in _rows(model, written, encoded, seconds, prompts, left_out)]
        return rows

    source, names = str(cache.folder), cache.block_names
    _write_blocks(folder, model, source, names, recode, report, BadRows())


def _write_blocks(
    folder: str | Path,
    model: Any,
    source: Any,
    names: Sequence[str],
    make_rows: Callable[[int, Counter], list[dict[str, Any]]],
    report: Callable[[str], None],
    bad: BadRows,
) -> None:
    """
    This process's share of the blocks that are not in the folder, which the same donor and source have to have made.
    `make_rows` counts what it leaves out, and notes in `bad` what was wrong with what cannot be read.
    """
    folder = Path(folder)
    description, path = {"version": VERSION, **describe_donor(model), "source": source}, folder / "cache.json"
    if not path.exists():
        # At once: other processes may be about to read it.
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    there = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name in description if there.get(name) != description[name]]
    if different:
        raise ValueError(
            f"The cache {str(folder)!r} was made otherwise ({different[0]}: {there.get(different[0])}, now "
            f"{description[different[0]]}). Name another folder, or remove it."
        )
    state = PartialState()
    for block in range(state.process_index, len(names), state.num_processes):
        if (folder / names[block]).exists():
            continue
        left_out: Counter = Counter()
        rows = make_rows(block, left_out)
        write_block(folder / names[block], rows, left_out)
        minutes = sum(row["seconds"] for row in rows) / 60
        done = f"block {block + 1} of {len(names)}: {len(rows)} clips, {minutes:.0f} minutes"
        causes = f" ({bad})" if left_out[UNREADABLE] else ""
        report(f"{done}; left out: {describe_skipped(left_out)}{causes}")


def describe_donor(model: Any) -> dict[str, Any]:
    """What a cache belongs to: the donor's weights, by a checksum, its vocabulary and its silence."""
    config, digest = model.config, hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith("model.decoder.drafts.") and "input_only" not in name:
            # In the precision that every donor is run in, whichever it was loaded in.
            total = parameter.detach().bfloat16().double().sum().item()
            digest.update(f"{name} {tuple(parameter.shape)} {total:.6g}".encode())
    return {
        "donor": digest.hexdigest()[:16],
        "vocab_size": config.vocab_size,
        "width": model.get_encoder().config.hidden_size,
        "silence_s": [config.encoder_trailing_silence_s, config.encoder_min_duration_s],
    }


def _batches(items: Sequence[Any], duration_s: Callable[[Any], float]) -> Iterator[list[Any]]:
    """Items of about the same duration together, as many as fit."""
    batch: list[Any] = []
    for item in sorted(items, key=duration_s, reverse=True):
        if batch and (len(batch) + 1) * max(duration_s(batch[0]), LEAST_S) > BATCH_S:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.no_grad()
def _transcribe(
    model: Any, processor: Any, samples: list[np.ndarray], prompt_slots: dict[str, Any], left_out: Counter
) -> list[dict[str, Any]]:
    """A cache's rows of clips (N,), with all that a teacher knows."""
    extract = processor.feature_extractor
    features = extract(
        samples, sampling_rate=extract.sampling_rate, padding=True, return_attention_mask=True, return_tensors="pt"
    ).to(model.device)
    mask = features["attention_mask"]
    features = features["input_values" if extract.is_waveform else "input_features"]
    encoded = model.prepare_cross_attention(model.encode(features, mask))
    written = _greedy_texts(model, features, mask, encoded, **prompt_slots)
    slots = dict(prompt_slots) if written.languages is None else {**prompt_slots, "language": written.languages}
    prompts = torch.as_tensor(processor.get_prompt_ids(batch_size=len(samples), **slots)).to(model.device)
    ids = torch.cat([prompts, written.sequences[:, :-1]], dim=-1)
    states = model.model(decoder_input_ids=ids, encoder_outputs=encoded).last_hidden_state
    logits = model.proj_out(states[:, prompts.shape[1] - 1 :])
    log_probs, token_ids = logits.float().log_softmax(dim=-1).topk(min(NUM_PROBABILITIES, logits.shape[-1]), dim=-1)
    seconds, rows = [len(one) / extract.sampling_rate for one in samples], []
    for i, kept in _rows(model, written, encoded, seconds, prompts, left_out):
        kept["features"] = features[i, : int(mask[i].sum())].half().cpu()
        kept["token_ids"] = token_ids[i, : len(kept["text"])].int().cpu()
        kept["log_probs"] = log_probs[i, : len(kept["text"])].half().cpu()
        rows.append(kept)
    return rows


@contextmanager
def without_remarks() -> Iterator[None]:
    """Inside, `generate` says nothing of texts that come to no end: they are left out, or measured as they are."""
    log = logging.get_logger("mdm_asr_hf.generation_mdm_asr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _greedy_texts(
    model: Any, features: torch.Tensor, mask: torch.Tensor, encoded: MDMASREncoderOutput, **inputs: Any
) -> Any:
    """The donor's own, without drafts; empty where nobody speaks; those that loop are left out afterwards."""
    settings = {**NO_SAFEGUARDS, "no_speech_threshold": model.generation_config.no_speech_threshold, **inputs}
    settings |= {"draft_branches": [], "return_dict_in_generate": True}
    with without_remarks():
        return model.generate(input_features=features, attention_mask=mask, encoder_outputs=encoded, **settings)


def _rows(
    model: Any,
    written: Any,
    encoded: MDMASREncoderOutput,
    seconds: list[float],
    prompts: torch.LongTensor,
    left_out: Counter,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch that something can be learnt from, with what every stage needs."""
    num_frames = [encoded.last_hidden_state.shape[1]] * len(seconds)
    if encoded.attention_mask is not None:
        num_frames = encoded.attention_mask.long().sum(dim=-1).tolist()
    for i, length in enumerate((written.commit_steps > 0).sum(dim=-1).tolist()):
        text = written.sequences[i, :length].int().cpu()
        if why := _why_not(text, seconds[i], model.config.eos_token_id):
            left_out[why] += 1
            continue
        frames = encoded.last_hidden_state[i, : num_frames[i]].half().cpu()
        yield i, {"seconds": seconds[i], "frames": frames, "text": text, "prompt": prompts[i].int().cpu()}


def _why_not(text: torch.Tensor, seconds: float, eos_token_id: int) -> str | None:
    ids = text.tolist()
    if len(ids) < 2:
        return NO_SPEECH
    if ids[-1] != eos_token_id or len(ids) > TOKENS_PER_S * seconds + TOKENS_BESIDE or is_suspicious(ids):
        return LOOPS
    if seconds > SPARSE_S and len(ids) < SPARSE_TOKENS_PER_S * seconds:
        return GAPS
    return None


def write_block(path: Path, rows: list[dict[str, Any]], left_out: Counter) -> None:
    """Writes utterances into one file, whole or not at all."""
    tensors = {"seconds": torch.tensor([row["seconds"] for row in rows], dtype=torch.float32)}
    for name in ("features", "frames", "text", "prompt", "token_ids", "log_probs"):
        if parts := [row[name] for row in rows if name in row]:
            tensors[name] = torch.cat(parts)
            tensors[f"{name}_ends"] = torch.tensor([len(part) for part in parts]).cumsum(0)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"left_out": json.dumps(left_out)})
    except (OSError, SafetensorError) as error:
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "Free some space and start again: the blocks before it are kept." if is_full else str(error)
        raise ValueError(f"{str(path)!r} cannot be written. {remedy}") from error


class CachedSpeech(Dataset):
    """
    The clips of a cache that [`write_cache`] wrote.

    Attributes:
        durations_s (`np.ndarray` of shape (N,)): of the clips, in s.
        left_out (`dict[str, int]`): how many clips were left out, by the cause.

    Rows: {"seconds", "frames" (T, D), "text" (L,), "prompt" (P,), and where they were kept "features" (T', M),
    "token_ids" (L, 32), "log_probs" (L, 32)}.

    Raises:
        ValueError: a folder without a block, or blocks without a clip.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("block-*.safetensors"))
        if not paths:
            raise ValueError(f"{str(folder)!r} holds no cache. Let the donor transcribe speech first.")
        self._paths, self._ends, self._files = [], [], {}
        seconds, left_out = [], Counter()
        for path in paths:
            with safe_open(path, "pt") as file:
                left_out += Counter(json.loads(file.metadata()["left_out"]))
                its_seconds = file.get_tensor("seconds").numpy()
                if not len(its_seconds):
                    continue
                names = [name.removesuffix("_ends") for name in file.keys() if name.endswith("_ends")]
                self._ends.append({name: file.get_tensor(f"{name}_ends").numpy() for name in names})
            self._paths.append(path)
            seconds.append(its_seconds)
        self.left_out = dict(left_out)
        if not seconds:
            raise ValueError(f"No clip in {str(folder)!r} can be learnt from: {self.left_out}. Nothing was trained.")
        self.durations_s = np.concatenate(seconds).astype(np.float64)
        self._first = np.cumsum([0, *map(len, seconds)])

    @property
    def block_names(self) -> list[str]:
        return [path.name for path in self._paths]

    def block_rows(self, block: int) -> range:
        return range(int(self._first[block]), int(self._first[block + 1]))

    def places(self, number: int) -> list[int]:
        """So many places, evenly spread over the cache."""
        number = min(number, len(self))
        return [i * len(self) // number for i in range(number)]

    def __len__(self) -> int:
        return len(self.durations_s)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        block = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[block])
        path = self._paths[block]
        if path not in self._files:
            self._files[path] = safe_open(path, "pt")
        file, found = self._files[path], {"seconds": torch.tensor(self.durations_s[index])}
        for name, ends in self._ends[block].items():
            found[name] = file.get_slice(name)[int(ends[row - 1]) if row else 0 : int(ends[row])]
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Workers open the files anew.
        return {**vars(self), "_files": {}}


@dataclass(frozen=True)
class DistillationCollator:
    """
    Batches of cached clips, for [`ISCTTrainer`].

    Args:
        part (`str`): "encoder": features and all that its teacher knows; "decoder": frames as they are.
    """

    part: str

    def __call__(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "labels": _pad([row["text"].long() for row in rows], -100),
            "prompt_ids": torch.stack([row["prompt"].long() for row in rows]),
        }
        if self.part == "encoder":
            features = [row["features"].float() for row in rows]
            # Of the audio itself: Whisper's second convolution halves its frames.
            own = [len(one) // 2 for one in features]
            batch["input_features"], batch["attention_mask"] = _pad_and_mask(features)
            batch["teacher"] = TeacherOutput(
                frames=_pad([row["frames"][:n].float() for row, n in zip(rows, own, strict=True)], 0.0),
                num_frames=torch.tensor(own),
                token_ids=_pad([row["token_ids"].long() for row in rows], 0),
                log_probs=_pad([row["log_probs"].float() for row in rows], 0.0),
            )
        else:
            frames, mask = _pad_and_mask([row["frames"].float() for row in rows])
            batch["encoder_outputs"] = MDMASREncoderOutput(last_hidden_state=frames, attention_mask=mask.bool())
        return batch


def _pad(parts: list[torch.Tensor], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def _pad_and_mask(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, ...) of parts (T, ...), and a mask (B, T) of 1 where they are."""
    lengths = torch.tensor([len(part) for part in parts])
    return _pad(parts, 0.0), (torch.arange(int(lengths.max())) < lengths[:, None]).long()
