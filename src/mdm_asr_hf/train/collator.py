# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""From data sets to batches: sources to rows, rows to batches of bounded seconds, these to what the model takes."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from transformers.utils import logging

from ..audio_mdm_asr import load_audio
from ..data.mixing import (
    JoinedStream,
    JoinedUtterances,
    JoinSettings,
    Mixture,
    stream_generator,
)
from ..data.sources import (
    BAD_ROW_REASONS,
    LONG_AUDIO,
    LONG_TEXT,
    MAX_BAD_SHARE,
    UNREADABLE,
    BadRowError,
    BadRows,
    Source,
    StreamedSources,
    check_bad_share,
    check_on_bad_row,
    check_text,
    describe_skipped,
    load_utterances,
    shared_integer,
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


def load_sources(
    specs: Any,
    *,
    join: JoinSettings | dict[str, Any] | bool | None = None,
    seed: int = 0,
    on_bad_row: str = "raise",
    max_duration_s: float | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    shuffle_buffer_rows: int = 256,
    process_index: int = 0,
    num_processes: int = 1,
) -> Mixture | IterableDataset:
    """
    Sources of speech with transcripts as one data set.

    Args:
        specs: one source or a list of them; each a [`Source`], a dict of its settings, or a path or name.
        join ([`JoinSettings`] or `dict` or `bool`, *optional*): join utterances of each source into windows.
        seed (`int`): of joins, turns and shuffling.
        on_bad_row (`str`): "raise", or "skip" rows that cannot be trained on and count them (`.skipped`). In streams
            the collator finds them.
        max_duration_s (`float`, *optional*): rows that last longer are bad. Not for streams.
        max_bad_share (`float`): more bad rows than this share of a source's are an error, also with "skip".
        shuffle_buffer_rows, process_index, num_processes: for streams, see [`StreamedSources`].

    Returns:
        [`Mixture`], of random access, or if any source is streamed or growing, an iterable data set. Both yield rows
        {"audio", "text", "duration_s", "language", "speaker", "row"}, or windows of them, for
        [`DataCollatorForMDMASR`].

    Raises:
        ValueError: a missing file or column, bad rows (see above), weights for some sources only.
    """
    check_on_bad_row(on_bad_row, max_bad_share)
    sources = [Source.of(spec) for spec in (specs if isinstance(specs, (list, tuple)) else [specs])]
    if not sources:
        raise ValueError("`specs` is empty. Pass at least one source.")
    weights = [source.weight for source in sources]
    if None in weights and any(weights):
        raise ValueError(f"`weight` is set for some sources only, {weights}. Set it for all or for none.")
    if join is True or isinstance(join, dict):
        join = JoinSettings(**(join if isinstance(join, dict) else {}))
    if any(source.streaming or source.growing for source in sources):
        stream = StreamedSources(
            sources,
            seed=seed,
            on_bad_row=on_bad_row,
            max_duration_s=max_duration_s,
            max_bad_share=max_bad_share,
            shuffle_buffer_rows=shuffle_buffer_rows,
            process_index=process_index,
            num_processes=num_processes,
        )
        return JoinedStream(stream, join, seed) if join else stream
    limits = {"max_duration_s": max_duration_s, "max_bad_share": max_bad_share}
    parts = [load_utterances(source, on_bad_row=on_bad_row, **limits) for source in sources]
    if join:
        parts = [JoinedUtterances(part, join, seed + i) for i, part in enumerate(parts)]
    return Mixture(parts, None if None in weights else weights, seed)


class SecondsBatchSampler(Sampler[list[int]]):
    """
    Batches of rows of about the same duration, limited by padded seconds: rows x longest <= `max_seconds`.

    Every index comes exactly once per epoch, in random company and order: rows of one duration class (`length_ratio`)
    change places, and so do batches. Every epoch has the same number of batches: the Trainer counts them once, and
    would drop the rest of a longer epoch and resume at another place.

    Several processes: the number of batches is a multiple of `num_processes`, by splitting the batches with most
    rows, so that `accelerate`, which deals batches out in turn, has none to repeat or to drop; the batches of one
    step are of about the same length. (Versions of accelerate that refuse batches of varying size want
    `even_batches=False`, which is as good.) All processes must use the same seed.

    Args:
        data: a data set with `durations_s`, or a sequence of durations in s. If it has `epoch` and `set_epoch`, they
            are the sampler's too.
        max_seconds (`float`): of audio in a batch, padding included.
        max_rows (`int`, *optional*): of a batch.
        seed (`int`)
        shuffle (`bool`): False gives the same batches, from short to long, in every epoch: for evaluation.
        num_processes (`int`, *optional*): default: the environment's WORLD_SIZE, which launchers set, or 1.
        length_ratio (`float`): durations that differ by less than this factor count as the same.
    """

    # What accelerate reads of a batch sampler: batches vary in size, and the last one is not dropped.
    batch_size = None
    drop_last = False

    def __init__(
        self,
        data: Any,
        max_seconds: float,
        max_rows: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_processes: int | None = None,
        length_ratio: float = 1.1,
    ):
        if not max_seconds > 0:
            raise ValueError(f"`max_seconds` must be positive, got {max_seconds!r}.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1 or None, got {max_rows!r}.")
        if not length_ratio >= 1:
            raise ValueError(f"`length_ratio` must be at least 1, got {length_ratio!r}.")
        self.data, self.seed, self.shuffle = data, seed, shuffle
        self.max_seconds, self.max_rows = float(max_seconds), max_rows
        self.num_processes = int(os.environ.get("WORLD_SIZE", 1)) if num_processes is None else num_processes
        self._own_epoch = 0
        try:
            durations_s = np.asarray(getattr(data, "durations_s", data), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`data` of type {type(data).__name__} has no `durations_s`. Use `load_sources`, or pass a list."
            ) from error
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
        step = math.log(length_ratio) if shuffle and length_ratio > 1 else None
        ends_s = sorted_s
        if step is not None:
            ends_s = np.exp(np.ceil(np.log(np.maximum(sorted_s, 0.1)) / step) * step)
            ends_s = np.minimum(ends_s, max(sorted_s[-1], 0.1))
        self._class = np.unique(ends_s, return_inverse=True)[1]
        self._sizes = self._split(self._pack(ends_s))

    def _pack(self, ends_s: np.ndarray) -> list[int]:
        """Sizes of batches of rows sorted by duration."""
        sizes = [0]
        for end_s in ends_s:
            size = sizes[-1] + 1
            too_long = size > 1 and size * end_s > self.max_seconds + TOLERANCE_S
            if too_long or (self.max_rows is not None and size > self.max_rows):
                sizes.append(0)
            sizes[-1] += 1
        return sizes

    def _split(self, sizes: list[int]) -> list[int]:
        """Sizes of a number of batches that the processes can share."""
        if len(self._order) < self.num_processes:
            raise ValueError(
                f"{len(self._order)} rows are too few for {self.num_processes} processes. Use fewer processes."
            )
        while len(sizes) % self.num_processes:
            i = max(range(len(sizes)), key=sizes.__getitem__)
            if sizes[i] < 2:
                raise ValueError(
                    f"{len(sizes)} batches of one row cannot be shared by {self.num_processes} processes. Raise "
                    "`max_seconds` or `max_rows`, so that some hold two."
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
        order, turns = self._order, np.arange(len(self._sizes))
        if self.shuffle:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = order[np.lexsort((rng.random(len(order)), self._class))]
            turns = rng.permutation(turns.reshape(-1, self.num_processes)).ravel()
        ends = np.cumsum(self._sizes)
        for turn in turns:
            yield order[ends[turn] - self._sizes[turn] : ends[turn]].tolist()


class SecondsBatches(IterableDataset):
    """
    The same for streams: collects `buffer_rows` rows, sorts them by duration and yields batches, lists of rows, in
    random order. A DataLoader takes it with `batch_size=1`: [`DataCollatorForMDMASR`] unpacks the list.

    Args:
        rows: an iterable of rows with `duration_s`, such as `load_sources` returns; `set_epoch` is passed on.
        max_seconds, max_rows, seed: as in [`SecondsBatchSampler`].
        buffer_rows (`int`): more rows give less padding, and a longer wait for the first batch.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        max_seconds: float,
        max_rows: int | None = None,
        seed: int = 0,
        buffer_rows: int = 256,
    ):
        if not max_seconds > 0 or buffer_rows < 1 or (max_rows is not None and max_rows < 1):
            raise ValueError(
                f"`max_seconds`, `max_rows` and `buffer_rows` must be positive, got {max_seconds!r}, {max_rows!r}, "
                f"{buffer_rows!r}."
            )
        self.rows, self.max_seconds, self.max_rows = rows, float(max_seconds), max_rows
        self.seed, self.buffer_rows = seed, buffer_rows
        self._epoch = shared_integer()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))
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
            if len(buffer) >= self.buffer_rows:
                batches = self._pack(buffer)
                # The last one is not full: it waits for company, unless it is all there is.
                buffer = batches.pop() if len(batches) > 1 else []
                yield from (batches[i] for i in rng.permutation(len(batches)))
        batches = self._pack(buffer)
        yield from (batches[i] for i in rng.permutation(len(batches)))

    def _pack(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        batches: list[list[dict[str, Any]]] = []
        for row in sorted(rows, key=lambda row: row["duration_s"]):
            size = len(batches[-1]) + 1 if batches else 0
            is_full = size * row["duration_s"] > self.max_seconds + TOLERANCE_S
            if not batches or is_full or (self.max_rows is not None and size > self.max_rows):
                batches.append([])
            batches[-1].append(row)
        return batches


class DataCollatorForMDMASR:
    """
    Makes batches for training, features and labels included: run it in the workers of a DataLoader.

    A row holds audio (of any form `load_audio` takes) and text; or is a window, with `parts` and `pauses_s`, as
    [`JoinedUtterances`] gives; or is done already, with `input_features` (T, mel bins) and `labels`.

    Args:
        processor ([`MDMASRProcessor`])
        audio_column, text_column (`str`): where rows hold these.
        language_column (`str`, *optional*): a language per row, for the prompt and for tokenizers that take one. Rows
            without one have the `language` of `prompt_slots`, or else the prompt's own.
        augment (*optional*): called with (samples, sampling rate in Hz, NumPy generator), returns samples. One with
            `takes_other_clips` also gets those of the batch as `other_clips`.
        on_bad_row (`str`): "raise" at rows that cannot be trained on, or "skip" them, see `skipped`. A batch of which
            no row is left becomes half a second of silence without text, with a warning.
        max_bad_share (`float`): more bad rows than this share of those so far, by more than chance, are an error, also
            with "skip".
        max_label_tokens (`int`, *optional*): longest transcript in tokens, its end of text included, that the model's
            canvas can hold; see [`max_label_tokens`]. Longer ones are bad rows: nothing is cut off.
        max_duration_s (`float`, *optional*): longer audio makes a row bad. Default: the feature extractor's.
        allow_empty_text (`bool`): rows without speech, to be trained as such.
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
        audio_column: str = "audio",
        text_column: str = "text",
        language_column: str | None = None,
        augment: Callable[..., np.ndarray] | None = None,
        on_bad_row: str = "raise",
        max_bad_share: float = MAX_BAD_SHARE,
        max_label_tokens: int | None = None,
        max_duration_s: float | None = None,
        allow_empty_text: bool = False,
        seed: int = 0,
        **prompt_slots: Any,
    ):
        check_on_bad_row(on_bad_row, max_bad_share)
        if max_label_tokens is not None and max_label_tokens < 1:
            raise ValueError(f"`max_label_tokens` must be at least 1 or None, got {max_label_tokens!r}.")
        self.processor, self.augment, self.on_bad_row, self.seed = processor, augment, on_bad_row, seed
        self.audio_column, self.text_column, self.language_column = audio_column, text_column, language_column
        self.max_bad_share, self._bad_rows = max_bad_share, BadRows()
        self.max_label_tokens, self.allow_empty_text = max_label_tokens, allow_empty_text
        self.max_duration_s = max_duration_s or getattr(processor.feature_extractor, "max_duration_s", None)
        self.prompt_slots = prompt_slots
        if prompt_slots:
            # A slot that the prompt does not have is an error now, not in a worker.
            processor.get_prompt_ids(**prompt_slots)
        self._counts = torch.zeros((MAX_NUM_WORKERS + 1, len(COUNTED)), dtype=torch.int64).share_memory_()

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

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        # Streams come as batches of one list of rows.
        rows = [row for item in rows for row in (item if isinstance(item, list) else [item])]
        if not rows:
            raise ValueError("The batch has no rows.")
        are_done = ["input_features" in row for row in rows]
        if any(are_done) != all(are_done):
            raise ValueError("Some rows of a batch hold `input_features` and some do not. Prepare all or none.")
        make = self._from_features if all(are_done) else self._from_audio
        examples = []
        for i, row in enumerate(rows):
            self._count("rows", len(row.get("parts", [row])))
            try:
                example = make(row, row_name(row, i, self.audio_column))
                examples += [] if example is None else [example]
            except BadRowError as error:
                self._handle(error)
        if not examples:
            self._count(EMPTY_BATCH)
            if all(are_done):
                raise ValueError("All rows of a batch are bad, see the warnings. Leave them out of the data set.")
            logger.warning("All rows of a batch are bad: it becomes silence without text.")
            num_samples = round(SILENCE_S * self._sampling_rate)
            labels = self._labels("", self._language(rows[0]))
            examples = [{**rows[0], "clip": np.zeros(num_samples, np.float32), "labels": labels}]
        batch = self._pad_features(examples) if all(are_done) else self._extract(examples)
        batch["labels"] = _pad([np.asarray(one["labels"]) for one in examples], IGNORED_LABEL, np.int64)
        if self.language_column is not None or self.prompt_slots:
            slots = dict(self.prompt_slots)
            if self.language_column is not None:
                slots["language"] = [self._language(one) for one in examples]
            batch["prompt_ids"] = self.processor.get_prompt_ids(batch_size=len(examples), **slots)
        return {name: torch.as_tensor(value) for name, value in batch.items()}

    def _from_features(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        labels = _column(row, "labels", "labels", name)
        labels = np.asarray(labels)
        self._check_labels(labels[labels != IGNORED_LABEL], name)
        return {**row, "labels": labels[labels != IGNORED_LABEL]}

    def _from_audio(self, row: dict[str, Any], name: str) -> dict[str, Any] | None:
        """Adds `clip` and `labels` to a row. None for a window all of whose utterances were skipped."""
        clips, texts, pauses_s = [], [], []
        windowed = "parts" in row
        for i, part in enumerate(row["parts"] if windowed else [row]):
            its_name = row_name(part, i, self.audio_column) if windowed else name
            try:
                text = self._text(part, its_name)
                clip = self._load(part, its_name)
            except BadRowError as error:
                # One bad utterance of a window does not spoil the others.
                if not windowed:
                    raise
                self._handle(error)
                continue
            pauses_s.append(row["pauses_s"][i - 1] if clips else 0.0)
            texts.append(text)
            clips.append(clip)
        if not clips:
            return None
        clip = np.concatenate(
            [np.pad(one, (round(p * self._sampling_rate), 0)) for one, p in zip(clips, pauses_s, strict=True)]
        )
        self._check_duration(len(clip) / self._sampling_rate, name)
        text = row.get("separator", " ").join(texts)
        labels = self._labels(text, self._language(row))
        self._check_labels(labels, name)
        return {**row, "clip": clip, "labels": labels}

    def _text(self, row: dict[str, Any], name: str) -> str:
        text = _column(row, self.text_column, "text_column", name)
        check_text(text, name, self.text_column, allow_empty=self.allow_empty_text)
        return text.strip()

    def _load(self, row: dict[str, Any], name: str) -> np.ndarray:
        audio = _column(row, self.audio_column, "audio_column", name)
        duration_s = row.get("duration_s")
        if isinstance(duration_s, (int, float)):
            self._check_duration(duration_s, name)
        try:
            return load_audio(audio, target_sampling_rate=self._sampling_rate, max_duration_s=self.max_duration_s)
        except ValueError as error:
            reason = LONG_AUDIO if " s, more than the " in str(error) else UNREADABLE
            raise BadRowError.of(name, reason, str(error)) from error

    def _check_duration(self, duration_s: float, name: str) -> None:
        # Resampling may round up.
        if self.max_duration_s is not None and duration_s > self.max_duration_s + 1e-3:
            detail = f"It lasts {duration_s:.2f} s, more than the {self.max_duration_s:g} s of the model. Split it."
            raise BadRowError.of(name, LONG_AUDIO, detail)

    def _check_labels(self, labels: np.ndarray, name: str) -> None:
        if self.max_label_tokens is not None and len(labels) > self.max_label_tokens:
            detail = f"It has {len(labels)} tokens, more than {self.max_label_tokens}. Split audio and transcript."
            raise BadRowError.of(name, LONG_TEXT, detail)

    def _language(self, row: dict[str, Any]) -> str | None:
        own = row.get(self.language_column) if self.language_column else None
        return own or self.prompt_slots.get("language")

    def _labels(self, text: str, language: str | None) -> np.ndarray:
        # The one that the prompt is told, too.
        target_language = self.prompt_slots.get("target_language")
        return np.asarray(
            self.processor(text=text, language=language, target_language=target_language, return_tensors="np")[
                "labels"
            ][0]
        )

    @property
    def _sampling_rate(self) -> float:
        return self.processor.feature_extractor.sampling_rate

    def _extract(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        clips = [one["clip"] for one in examples]
        if self.augment is not None:
            clips = [self._augmented(i, one, clips) for i, one in enumerate(examples)]
        extract = self.processor.feature_extractor
        features = extract(
            clips,
            sampling_rate=self._sampling_rate,
            padding=True,
            return_attention_mask=True,
            return_tensors="np",
        )
        names = {"input_values": "input_features"}
        return {names.get(name, name): value for name, value in features.items()}

    def _augmented(self, index: int, row: dict[str, Any], clips: list[np.ndarray]) -> np.ndarray:
        # With a seed of its own, a row is augmented alike by any worker, and after resuming.
        seed = row.get("augment_seed")
        seed = int(torch.randint(2**62, ())) if seed is None else int(seed)
        arguments = [clips[index], self._sampling_rate, np.random.default_rng([self.seed, seed])]
        if getattr(self.augment, "takes_other_clips", False):
            augmented = self.augment(*arguments, other_clips=clips[:index] + clips[index + 1 :])
        else:
            augmented = self.augment(*arguments)
        # A clip near the limit that is played more slowly would exceed it.
        is_too_long = self.max_duration_s is not None and len(augmented) > self.max_duration_s * self._sampling_rate
        return clips[index] if is_too_long else augmented

    def _pad_features(self, examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        features = [np.asarray(one["input_features"], dtype=np.float32) for one in examples]
        masks = [np.ones(len(one), dtype=np.int64) for one in features]
        return {"input_features": _pad(features, 0.0, np.float32), "attention_mask": _pad(masks, 0, np.int64)}

    def _handle(self, error: BadRowError) -> None:
        """Raises the error, or counts and reports the row."""
        if self.on_bad_row == "raise":
            raise error
        count = self._count(error.reason)
        if count <= NUM_REPORTED or math.log10(count).is_integer():
            logger.warning(f"Skipped (no. {count} for this reason): {error}")
        # Those of the other workers count, too.
        self._bad_rows.add(str(error))
        num_bad = self.num_skipped
        check_bad_share(
            self._bad_rows, self.num_rows, "the batches", self.max_bad_share, num_bad=num_bad, is_sample=True
        )

    def _count(self, what: str, number: int = 1) -> int:
        worker = get_worker_info()
        counts = self._counts[worker.id % MAX_NUM_WORKERS if worker else MAX_NUM_WORKERS]
        counts[COUNTED.index(what)] += number
        return int(counts[COUNTED.index(what)])


def max_label_tokens(config: Any, prompt_length: int) -> int:
    """Longest label, its end of text included, that a canvas behind a prompt of `prompt_length` tokens can hold."""
    return config.decoder_config.max_position_embeddings - prompt_length


def row_name(row: dict[str, Any], index: int, audio_column: str = "audio") -> str:
    """What to call a row in a message: where it stands, and the file it is about, as far as known."""
    if "parts" in row:
        others = f" and {len(row['parts']) - 1} more" if len(row["parts"]) > 1 else ""
        return f"the window of {row_name(row['parts'][0], index, audio_column)}{others}"
    audio = row.get(audio_column)
    audio = getattr(audio, "_hf_encoded", None) or audio
    path = audio.get("path") if isinstance(audio, dict) else audio
    path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    parts = [str(row.get("row") or f"row {index} of the batch")]
    if path and path not in parts[0]:
        parts.append(f"({path})")
    return " ".join(parts)


def _column(row: dict[str, Any], column: str, setting: str, name: str) -> Any:
    if column not in row:
        raise ValueError(f"{name} has no column {column!r}, but {sorted(row)}. Set `{setting}` to the right one.")
    return row[column]


def _pad(arrays: list[np.ndarray], value: float, dtype: Any) -> np.ndarray:
    """Stacks (N, ...) arrays of several lengths to (B, longest, ...)."""
    padded = np.full((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), value, dtype=dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded


__all__ = [
    "DataCollatorForMDMASR",
    "JoinSettings",
    "JoinedUtterances",
    "Mixture",
    "SecondsBatchSampler",
    "SecondsBatches",
    "Source",
    "load_sources",
    "max_label_tokens",
]
