# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""From rows to batches: of bounded seconds, and of these what the model takes."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from transformers.utils import logging

from ..audio_mdm_asr import load_audio
from ..data.mixing import Epoch, stream_generator
from ..data.sources import (
    BAD_ROW_REASONS,
    LONG_AUDIO,
    LONG_TEXT,
    MAX_BAD_SHARE,
    UNREADABLE,
    BadRowError,
    BadRows,
    check_bad_share,
    check_on_bad_row,
    check_text,
    describe_skipped,
)
from ..processing_mdm_asr import IGNORED_LABEL

logger = logging.get_logger(__name__)

EMPTY_BATCH = "batches without a usable row"
# Counters of the collator: one row for each worker of a DataLoader, so that none overwrites another's, and one for the
# main process. Column 0 counts all rows.
MAX_NUM_WORKERS = 256
COUNTED = ("rows", *BAD_ROW_REASONS, EMPTY_BATCH)
# A worker reports its first few bad rows, then only the 10th, 100th, ...
NUM_REPORTED = 5
SILENCE_S = 0.5
# What rounding may add to a sum of durations.
TOLERANCE_S = 1e-6
# Rows whose durations differ by less than this factor change places; rows of a stream that are sorted at a time.
LENGTH_RATIO, BUFFER_ROWS = 1.1, 256


def pack(sorted_s: Iterable[float], max_seconds: float) -> list[int]:
    """Sizes of batches of rows sorted by duration, each of at most `max_seconds`, padding included."""
    sizes: list[int] = []
    for duration_s in sorted_s:
        if not sizes or (sizes[-1] + 1) * duration_s > max_seconds + TOLERANCE_S:
            sizes.append(0)
        sizes[-1] += 1
    return sizes


class SecondsBatchSampler(Sampler[list[int]]):
    """
    Batches of rows of about the same duration, limited by padded seconds, rows x longest <= `max_seconds`, where the
    Trainer's `group_by_length` has a fixed number of rows. Every index comes once per epoch, in random company and
    order. Every epoch has the same number of batches, which the Trainer counts once: a multiple of `num_processes`, so
    that `accelerate`, which deals them out in turn, has none to repeat or to drop; those of one step are about alike.

    Args:
        data: a data set with `durations_s`, or a sequence of durations in s. If it has `epoch` and `set_epoch`, they
            are the sampler's too.
        max_seconds (`float`): of audio in a batch, padding included.
    """

    # What accelerate reads of a batch sampler: batches vary in size, and the last one is not dropped.
    batch_size = None
    drop_last = False

    def __init__(self, data: Any, max_seconds: float, seed: int = 0, num_processes: int = 1):
        self.data, self.max_seconds, self.seed, self.num_processes = data, float(max_seconds), seed, num_processes
        self._own_epoch = 0
        durations_s = np.asarray(getattr(data, "durations_s", data), dtype=np.float64)
        if durations_s.ndim != 1 or not durations_s.size or not (durations_s >= 0).all():
            raise ValueError("`data` must have one duration in s per row, at least one, none negative or NaN.")
        longest = int(durations_s.argmax())
        if durations_s[longest] > self.max_seconds + TOLERANCE_S:
            raise ValueError(
                f"Row {longest} lasts {durations_s[longest]:.2f} s, more than `max_seconds={max_seconds:g}` of a "
                "batch. Raise it, or leave longer rows out (`max_duration_s` of `load_sources`)."
            )
        self._order = np.argsort(durations_s, kind="stable")
        sorted_s = durations_s[self._order]
        # Classes are about the upper ends of their durations: whoever is drawn for a place in a batch fits.
        step = math.log(LENGTH_RATIO)
        ends_s = np.exp(np.ceil(np.log(np.maximum(sorted_s, 0.1)) / step) * step)
        ends_s = np.minimum(ends_s, max(sorted_s[-1], 0.1))
        self._class = np.unique(ends_s, return_inverse=True)[1]
        self._sizes = self._split(pack(ends_s, self.max_seconds))

    def _split(self, sizes: list[int]) -> list[int]:
        """Sizes of a number of batches that the processes can share."""
        while len(sizes) % self.num_processes:
            i = max(range(len(sizes)), key=sizes.__getitem__)
            if sizes[i] < 2:
                raise ValueError(
                    f"{len(sizes)} batches of one row cannot be shared by {self.num_processes} processes. Raise "
                    "`max_seconds`, so that some hold two, or use fewer processes."
                )
            sizes[i : i + 1] = [sizes[i] - sizes[i] // 2, sizes[i] // 2]
        return sizes

    @property
    def epoch(self) -> int:
        return getattr(self.data, "epoch", self._own_epoch)

    def set_epoch(self, epoch: int) -> None:
        self._own_epoch = int(epoch)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = self._order[np.lexsort((rng.random(len(self._order)), self._class))]
        turns = rng.permutation(np.arange(len(self._sizes)).reshape(-1, self.num_processes)).ravel()
        ends = np.cumsum(self._sizes)
        for turn in turns:
            yield order[ends[turn] - self._sizes[turn] : ends[turn]].tolist()


class SecondsBatches(Epoch, IterableDataset):
    """
    The same for streams: collects some rows, sorts them by duration and yields batches, lists of rows, in random
    order. A DataLoader takes it with `batch_size=1`: [`DataCollatorForMDMASR`] unpacks the list.

    Args:
        rows: an iterable of rows with `duration_s`; `set_epoch` is passed on.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], max_seconds: float, seed: int = 0):
        super().__init__()
        self.rows, self.max_seconds, self.seed = rows, float(max_seconds), seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        rng, buffer = stream_generator(self.seed + 1, self.epoch), []
        for row in self.rows:
            if row["duration_s"] > self.max_seconds + TOLERANCE_S:
                raise ValueError(
                    f"{row_name(row, 0)} lasts {row['duration_s']:.2f} s, more than `max_seconds="
                    f"{self.max_seconds:g}` of a batch. Raise it."
                )
            buffer.append(row)
            if len(buffer) >= BUFFER_ROWS:
                batches = self._batches(buffer)
                # The last one is not full: it waits for company, unless it is all there is.
                buffer = batches.pop() if len(batches) > 1 else []
                yield from (batches[i] for i in rng.permutation(len(batches)))
        batches = self._batches(buffer)
        yield from (batches[i] for i in rng.permutation(len(batches)))

    def _batches(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        rows = sorted(rows, key=lambda row: row["duration_s"])
        ends = np.cumsum([0, *pack((row["duration_s"] for row in rows), self.max_seconds)])
        return [rows[first:last] for first, last in zip(ends[:-1], ends[1:], strict=True)]


class DataCollatorForMDMASR:
    """
    Makes batches of rows with "audio", of any form `load_audio` takes, and "text", or of windows of such, as
    [`SpeechStream`] gives: run it in the workers of a DataLoader.

    Args:
        processor ([`MDMASRProcessor`])
        language_column (`str`, *optional*): a language per row, for the prompt and for tokenizers that take one. Rows
            without one have the `language` of `prompt_slots`, or else the prompt's own.
        augment ([`Augmenter`], *optional*): or another callable with its arguments.
        on_bad_row (`str`): "raise" at rows that cannot be trained on, or "skip" them, see `skipped`. A batch of which
            no row is left becomes half a second of silence without text, with a warning.
        max_bad_share (`float`): more bad rows than this share of those so far, by more than chance, are an error, also
            with "skip".
        max_label_tokens (`int`, *optional*): longest transcript in tokens, its end of text included, that the model's
            canvas can hold; longer ones are bad rows.
        seed (`int`): of the augmentation, together with a row's `augment_seed`.
        prompt_slots: further slots of the decoder prompt for all rows, such as `punctuation=False`, or
            `target_language="en"` where texts are translations.

    Returns, when called with B rows:
        - **input_features** (B, T, mel bins) or (B, N), **attention_mask** (B, T) or (B, N);
        - **labels** (B, L): text tokens, end of text, then -100; the model fills its canvas with end of text;
        - **prompt_ids** (B, P), if there is a language column or a slot.
    """

    def __init__(
        self,
        processor: Any,
        language_column: str | None = None,
        augment: Callable[..., np.ndarray] | None = None,
        on_bad_row: str = "raise",
        max_bad_share: float = MAX_BAD_SHARE,
        max_label_tokens: int | None = None,
        seed: int = 0,
        **prompt_slots: Any,
    ):
        check_on_bad_row(on_bad_row, max_bad_share)
        self.processor, self.language_column, self.augment, self.seed = processor, language_column, augment, seed
        self.on_bad_row, self.max_bad_share, self._bad_rows = on_bad_row, max_bad_share, BadRows()
        self.max_label_tokens, self.prompt_slots = max_label_tokens, prompt_slots
        self.sampling_rate = processor.feature_extractor.sampling_rate
        self.max_duration_s = getattr(processor.feature_extractor, "max_duration_s", None)
        if prompt_slots:
            # A slot that the prompt does not have is an error now, not in a worker.
            processor.get_prompt_ids(**prompt_slots)
        self._counts = torch.zeros((MAX_NUM_WORKERS + 1, len(COUNTED)), dtype=torch.int64).share_memory_()

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        # Streams come as batches of one list of rows.
        rows = [row for item in rows for row in (item if isinstance(item, list) else [item])]
        examples = []
        for i, row in enumerate(rows):
            self._count("rows", len(row.get("parts", [row])))
            try:
                examples += self._read(row, row_name(row, i))
            except BadRowError as error:
                self._handle(error)
        if not examples:
            self._count(EMPTY_BATCH)
            logger.warning("All rows of a batch are bad: it becomes silence without text.")
            silence = np.zeros(round(SILENCE_S * self.sampling_rate), np.float32)
            examples = [{**rows[0], "clip": silence, "labels": self._labels("", self._language(rows[0]))}]
        clips = [one["clip"] for one in examples]
        if self.augment is not None:
            clips = [self._augmented(i, one, clips) for i, one in enumerate(examples)]
        batch = self.processor.feature_extractor(
            clips, sampling_rate=self.sampling_rate, padding=True, return_attention_mask=True, return_tensors="np"
        )
        batch = {"input_features" if name == "input_values" else name: value for name, value in batch.items()}
        labels = [torch.as_tensor(one["labels"]) for one in examples]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        if self.language_column is not None or self.prompt_slots:
            slots = dict(self.prompt_slots)
            if self.language_column is not None:
                slots["language"] = [self._language(one) for one in examples]
            batch["prompt_ids"] = self.processor.get_prompt_ids(batch_size=len(examples), **slots)
        return {name: torch.as_tensor(value) for name, value in batch.items()}

    def _read(self, row: dict[str, Any], name: str) -> list[dict[str, Any]]:
        """The row with its `clip` and `labels`; nothing of a window all of whose utterances were skipped."""
        clips, texts = [], []
        parts, pauses_s = row.get("parts", [row]), [0.0, *row.get("pauses_s", [])]
        for i, (part, pause_s) in enumerate(zip(parts, pauses_s, strict=True)):
            its_name = row_name(part, i) if "parts" in row else name
            try:
                for column in ("text", "audio"):
                    if column not in part:
                        raise ValueError(f"{its_name} has no column {column!r}, but {sorted(part)}. Rename yours.")
                check_text(part["text"], its_name, "text")
                clip = self._load(part, its_name)
            except BadRowError as error:
                # One bad utterance of a window does not spoil the others.
                self._handle(error)
                continue
            clips.append(np.pad(clip, (round(pause_s * self.sampling_rate) if clips else 0, 0)))
            texts.append(part["text"].strip())
        if not clips:
            return []
        clip = np.concatenate(clips)
        self._check_duration(len(clip) / self.sampling_rate, name)
        labels = self._labels(" ".join(texts), self._language(row))
        if self.max_label_tokens is not None and len(labels) > self.max_label_tokens:
            detail = f"It has {len(labels)} tokens, more than {self.max_label_tokens}. Split audio and transcript."
            raise BadRowError.of(name, LONG_TEXT, detail)
        return [{**row, "clip": clip, "labels": labels}]

    def _load(self, row: dict[str, Any], name: str) -> np.ndarray:
        # A row that tells its length is not read in vain.
        self._check_duration(row.get("duration_s") or 0.0, name)
        try:
            clip = load_audio(row["audio"], target_sampling_rate=self.sampling_rate)
        except ValueError as error:
            raise BadRowError.of(name, UNREADABLE, str(error)) from error
        self._check_duration(len(clip) / self.sampling_rate, name)
        return clip

    def _check_duration(self, duration_s: float, name: str) -> None:
        # Resampling may round up.
        if self.max_duration_s is not None and duration_s > self.max_duration_s + 1e-3:
            detail = f"It lasts {duration_s:.2f} s, more than the {self.max_duration_s:g} s of the model. Split it."
            raise BadRowError.of(name, LONG_AUDIO, detail)

    def _language(self, row: dict[str, Any]) -> str | None:
        own = row.get(self.language_column) if self.language_column else None
        return own or self.prompt_slots.get("language")

    def _labels(self, text: str, language: str | None) -> np.ndarray:
        # The one that the prompt is told, too.
        slots = {"language": language, "target_language": self.prompt_slots.get("target_language")}
        return np.asarray(self.processor(text=text, return_tensors="np", **slots)["labels"][0])

    def _augmented(self, index: int, row: dict[str, Any], clips: list[np.ndarray]) -> np.ndarray:
        # With a seed of its own, a row is augmented alike by any worker, and after resuming.
        seed = row.get("augment_seed")
        rng = np.random.default_rng([self.seed, int(torch.randint(2**62, ()) if seed is None else seed)])
        augmented = self.augment(clips[index], self.sampling_rate, rng, clips[:index] + clips[index + 1 :])
        # A clip near the limit that is played more slowly would exceed it.
        is_too_long = self.max_duration_s is not None and len(augmented) > self.max_duration_s * self.sampling_rate
        return clips[index] if is_too_long else augmented

    # Bad rows

    @property
    def num_rows(self) -> int:
        """Rows seen so far, by this process and its DataLoader workers."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were skipped so far, by this process and its DataLoader workers, per reason."""
        totals = self._counts.sum(dim=0).tolist()
        return {name: count for name, count in zip(COUNTED[1:], totals[1:], strict=True) if count}

    @property
    def num_skipped(self) -> int:
        """Rows of these that were skipped."""
        return sum(count for name, count in self.skipped.items() if name != EMPTY_BATCH)

    def check_any(self) -> None:
        """Raises ValueError if there were rows and none could be trained on: too few to end it in between."""
        if self.num_rows and self.num_skipped == self.num_rows:
            raise ValueError(f"Nothing was learnt: {self.report()} {self._bad_rows if self._bad_rows else ''}".strip())

    def report(self) -> str:
        """One line about the rows skipped so far."""
        return f"{self.num_skipped} of {self.num_rows} rows skipped: {describe_skipped(self.skipped)}."

    def _handle(self, error: BadRowError) -> None:
        """Raises the error, or counts and reports the row."""
        if self.on_bad_row == "raise":
            raise error
        count = self._count(error.reason)
        if count <= NUM_REPORTED or math.log10(count).is_integer():
            logger.warning(f"Skipped (no. {count} for this reason): {error}")
        self._bad_rows.add(str(error))
        # Those of the other workers count, too.
        share = {"num_bad": self.num_skipped, "is_sample": True}
        check_bad_share(self._bad_rows, self.num_rows, "the batches", self.max_bad_share, **share)

    def _count(self, what: str, number: int = 1) -> int:
        worker = get_worker_info()
        counts = self._counts[worker.id % MAX_NUM_WORKERS if worker else MAX_NUM_WORKERS]
        counts[COUNTED.index(what)] += number
        return int(counts[COUNTED.index(what)])


def row_name(row: dict[str, Any], index: int) -> str:
    """What to call a row in a message: where it stands, and the file it is about, as far as known."""
    if "parts" in row:
        others = f" and {len(row['parts']) - 1} more" if len(row["parts"]) > 1 else ""
        return f"the window of {row_name(row['parts'][0], index)}{others}"
    audio = row.get("audio")
    audio = getattr(audio, "_hf_encoded", None) or audio
    path = audio.get("path") if isinstance(audio, dict) else audio
    name = str(row.get("row") or f"row {index} of the batch")
    if isinstance(path, (str, os.PathLike)) and os.fspath(path) not in name:
        name += f" ({os.fspath(path)})"
    return name
