# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Measuring a model: data sets, timed batches over one or several processes, and the folder of results."""

import copy
import hashlib
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from ..audio_mdm_asr import DURATION_TOLERANCE_S, load_audio
from ..confidence_mdm_asr import utterance_confidence
from ..data.sources import Source, check_on_bad_row
from ..encoder_mdm_asr import MDMASREncoderOutput
from ..encoding_mdm_asr import json_text
from ..generation_configuration_mdm_asr import BRANCHES, MDMASRGenerationConfig
from ..int8 import is_int8
from ..prompt_mdm_asr import AUTO, prompt_values
from ..transcribe.joining import DecodedWindow, join_windows, keep_once
from ..transcribe.transcriber import longest_window_s
from ..transcribe.voice_activity import make_vad
from ..transcribe.windows import Window, cut_windows
from .data import PRESETS, EvaluationData, load_data, report_skipped
from .scoring import HYPOTHESES_NAME, METRICS_NAME, describe_normaliser, score
from .steps import read_steps

logger = logging.get_logger(__name__)

PACKAGES = (
    "mdm_asr_hf",
    "transformers",
    "torch",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "jiwer",
    "soundfile",
    "soxr",
)


@dataclass
class EncodedBatch:
    """
    Utterances that share a batch, as the encoder left them, on the CPU.

    Args:
        indices: places of the rows in their data set.
        features (`torch.Tensor` of shape (B, T, mel bins) or (B, N)), mask (B, T) or (B, N): the processor's.
        encoder_outputs ([`MDMASREncoderOutput`]): frames and their mask.
        durations_s: of the clips.
        features_s, encoder_s: wall seconds a row, the batch's shared out evenly.
        windows: of one utterance that is longer than what the model takes, whose rows these are; None of whole ones.
    """

    indices: list[int]
    features: torch.Tensor
    mask: torch.Tensor | None
    encoder_outputs: MDMASREncoderOutput
    durations_s: list[float]
    features_s: float
    encoder_s: float
    windows: list[Window] | None = None

    def to(self, device: torch.device) -> "EncodedBatch":
        outputs = self.encoder_outputs
        if not isinstance(outputs, MDMASREncoderOutput):
            # Of ONNX Runtime, on the CPU.
            return self
        moved = {k: v.to(device) for k, v in outputs.items() if isinstance(v, torch.Tensor)}
        mask = None if self.mask is None else self.mask.to(device)
        return replace(
            self, features=self.features.to(device), mask=mask, encoder_outputs=MDMASREncoderOutput(**moved)
        )


@dataclass
class EncodedData:
    """A data set that went through the encoder: `data` and its batches."""

    data: EvaluationData
    batches: list[EncodedBatch]


def evaluate_model(
    model: Any,
    processor: Any,
    data: "str | Path | Source | EvaluationData",
    *,
    settings: MDMASRGenerationConfig | None = None,
    batch_size: int = 8,
    language: str | None = None,
    seed: int = 0,
    on_bad_row: str = "skip",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """
    Transcribes a data set and returns the rows of its hypotheses.jsonl, in its order.

    Batches are of similar lengths, the longest first. What is longer than the model takes at once is cut into windows,
    as [`Transcriber`] does; its row is their rows put together. Under `accelerate launch` the processes share the
    batches, and each gets the rows of all.

    Args:
        settings ([`MDMASRGenerationConfig`], *optional*): instead of the model's own.
        batch_size (`int`): utterances decoded together.
        language (`str`, *optional*): of the speech, where no column of the data set tells. The model's prompt gets it,
            if it has a place for it. "auto": as detected, by models that can, which is multilingual Whisper's default.
        seed (`int`): of what is drawn. Each row has a generator of its own, made of this and its id, so that it does
            not depend on the batch.
        on_bad_row (`str`): "skip" reports what cannot be read or decoded and adds it to `data.skipped`; "raise" ends
            there.
        progress (`bool`): show a bar on stderr, if that is a terminal.

    Returns:
        Dicts with "id", "dataset", "audio", "reference", "hypothesis", "duration_s", "language", "nfe", "confidence",
        "is_full", "tokens" and "end", the end of text ("text", "confidence", "step"), and "features_s", "encoder_s",
        "decoder_s": the row's share of its batch's wall time, without reading the file. Of checkpoints with drafts,
        tokens also have the "branch" that drafted them, None for the donor's own, and rows have "accepted_drafts" and
        "rejected_drafts" (branch -> number), and "struck_drafts" ("place" among the tokens, "branch", "text").

    Raises:
        ValueError: the data set, the settings, and what `on_bad_row` says.
    """
    data = load_data(data, on_bad_row=on_bad_row)
    runner = _Runner(model, processor, data, settings, language, seed, on_bad_row)
    process_index, num_processes = process_index_and_number(model.device)
    batches = _batches(data, batch_size)
    mine = batches[process_index::num_processes]
    runner.warm_up(batches)
    rows: dict[int, dict[str, Any]] = {}
    with _bar(len(mine), data.name, progress and process_index == 0) as advance:
        for indices in mine:
            for batch in runner.encode(indices):
                rows |= runner.decode(batch)
            advance()
    return _merge(data, rows, runner.skipped)


def encode_dataset(
    model: Any,
    processor: Any,
    data: "str | Path | Source | EvaluationData",
    *,
    settings: MDMASRGenerationConfig | None = None,
    batch_size: int = 8,
    on_bad_row: str = "skip",
    progress: bool = False,
) -> EncodedData:
    """
    Runs features and encoder over a data set once, for [`decode_encoded`] with many settings. The frames stay on the
    CPU: for Whisper tiny about 80 kB, its features 32 kB, per second of audio. One process does all.
    """
    data = load_data(data, on_bad_row=on_bad_row)
    runner = _Runner(model, processor, data, settings, None, 0, on_bad_row)
    batches = _batches(data, batch_size)
    runner.warm_up(batches)
    encoded = []
    with _bar(len(batches), f"{data.name}, encoder", progress) as advance:
        for indices in batches:
            encoded += [batch.to(torch.device("cpu")) for batch in runner.encode(indices)]
            advance()
    _add_skipped(data, runner.skipped)
    return EncodedData(data, encoded)


def decode_encoded(
    model: Any,
    processor: Any,
    encoded: EncodedData,
    settings: MDMASRGenerationConfig | None = None,
    *,
    language: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The rows [`evaluate_model`] gives, from what [`encode_dataset`] made; the encoder's times are of then."""
    runner = _Runner(model, processor, encoded.data, settings, language, seed, "skip")
    rows: dict[int, dict[str, Any]] = {}
    with _bar(len(encoded.batches), f"{encoded.data.name}, decoder", progress) as advance:
        if encoded.batches:
            runner.decode(encoded.batches[-1].to(model.device), is_counted=False)
        for batch in encoded.batches:
            rows |= runner.decode(batch.to(model.device))
            advance()
    _add_skipped(encoded.data, runner.skipped)
    return [rows[i] for i in sorted(rows)]


def measure_batch_1(
    model: Any,
    processor: Any,
    data: EvaluationData,
    *,
    settings: MDMASRGenerationConfig | None = None,
    num_rows: int = 16,
    language: str | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """
    The RTFx at batch size 1, over `num_rows` utterances spread evenly over the lengths. None without rows.

    Returns:
        `{"num_utterances", "audio_s", "rtfx", "rtfx_encoder", "rtfx_decoder"}`.
    """
    by_length = sorted(range(len(data)), key=lambda i: data.rows[i]["duration_s"])
    num_rows = min(num_rows, len(by_length))
    # The middles of `num_rows` equal parts.
    subset = data.select(by_length[int((k + 0.5) * len(by_length) / num_rows)] for k in range(num_rows))
    runner = _Runner(model, processor, subset, settings, language, seed, "skip")
    batches = [[i] for i in range(len(subset))]
    runner.warm_up(batches)
    rows = [row for indices in batches for batch in runner.encode(indices) for row in runner.decode(batch).values()]
    if not rows:
        return None
    names = ("num_utterances", "audio_s", "rtfx", "rtfx_encoder", "rtfx_decoder")
    metrics = score(rows, num_bootstrap=0)["metrics"]
    return {name: metrics[name] for name in names}


def _batches(data: EvaluationData, batch_size: int) -> list[list[int]]:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(data)), key=lambda i: (-data.rows[i]["duration_s"], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@contextmanager
def _bar(total: int, description: str, is_shown: bool) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (is_shown and console.is_terminal)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


class _Runner:
    """Takes batches of one data set through features, encoder and decoder, and times each."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        data: EvaluationData,
        settings: MDMASRGenerationConfig | None,
        language: str | None,
        seed: int,
        on_bad_row: str,
    ):
        check_on_bad_row(on_bad_row)
        self.model, self.processor, self.data = model, processor, data
        self.settings = copy.deepcopy(settings if settings is not None else model.generation_config)
        self.settings.return_dict_in_generate = True
        self.settings.validate()
        self.language, self.seed, self.on_bad_row = language, seed, on_bad_row
        self.takes_language = "language" in ((self.settings.prompt_template or {}).get("slots") or {})
        if language == AUTO:
            # Raises if this model cannot tell.
            prompt_values(self.settings.prompt_template or {"tokens": [0]}, language=language)
        self.rate_hz = processor.feature_extractor.sampling_rate
        self.max_duration_s = getattr(processor.feature_extractor, "max_duration_s", None) or math.inf
        self.max_window_s = longest_window_s(None, self.settings, processor.feature_extractor)
        # Of an utterance that is cut: what its windows so far gave; None if one of them failed.
        self.parts: dict[int, list[tuple[DecodedWindow, dict[str, Any]]] | None] = {}
        self.skipped: list[dict[str, str]] = []

    def warm_up(self, batches: Sequence[Sequence[int]]) -> None:
        """Runs the shortest readable utterance, uncounted: first calls set up kernels and memory."""
        skipped, self.skipped = self.skipped, []
        on_bad_row, self.on_bad_row = self.on_bad_row, "skip"
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            for indices in reversed(batches):
                for batch in self.encode(indices[-1:]):
                    self.decode(batch)
                    return
        finally:
            logger.setLevel(level)
            self.skipped, self.on_bad_row, self.parts = skipped, on_bad_row, {}

    @torch.no_grad()
    def encode(self, indices: Sequence[int]) -> Iterator[EncodedBatch]:
        """
        One batch of the rows whose audio can be read; several, if they cannot be encoded together or one has to be
        cut; none.
        """
        clips = {}
        for i in indices:
            try:
                clip = load_audio(self.data.clip(i), target_sampling_rate=self.rate_hz)
                if not len(clip):
                    raise ValueError("The audio is empty (no samples). Record or export it again.")
                if len(clip) / self.rate_hz > self.max_duration_s + DURATION_TOLERANCE_S:
                    yield from self._encode_windows(i, clip, len(indices))
                    continue
                clips[i] = clip
            except ValueError as error:
                self._skip(i, error)
        yield from self._encode_clips(clips)

    def _encode_windows(self, index: int, clip: np.ndarray, batch_size: int) -> Iterator[EncodedBatch]:
        """The batches of an utterance that is cut; of one without speech, that of a window without samples."""
        duration_s = len(clip) / self.rate_hz
        windows = list(cut_windows([clip], self.rate_hz, make_vad("auto", self.rate_hz), self.max_window_s))
        windows = windows or [Window(0.0, duration_s, clip[:0], is_last=True)]
        for start in range(0, len(windows), batch_size):
            some = windows[start : start + batch_size]
            batch = self._encode_together(dict(enumerate(window.samples for window in some)))
            # Its samples are encoded: without them, what waits is small.
            some = [replace(window, samples=window.samples[:0]) for window in some]
            yield replace(batch, indices=[index] * len(some), durations_s=[duration_s] * len(some), windows=some)

    def _encode_clips(self, clips: dict[int, Any]) -> Iterator[EncodedBatch]:
        if not clips:
            return
        try:
            batch = self._encode_together(clips)
        except ValueError as error:
            if len(clips) > 1:
                for i, clip in clips.items():
                    yield from self._encode_clips({i: clip})
                return
            self._skip(next(iter(clips)), error)
            return
        yield batch

    def _encode_together(self, clips: dict[int, Any]) -> EncodedBatch:
        device, times = self.model.device, [self._now()]
        inputs = self.processor(list(clips.values()), sampling_rate=self.rate_hz, return_tensors="pt").to(device)
        mask = inputs.pop("attention_mask", None)
        (features,) = inputs.values()
        times.append(self._now())
        # As `generate` does, which cannot be timed in between.
        _, open_mask = self.model.find_speech(features, mask, self.settings.min_duration_s)
        outputs = self.model.encode(features, open_mask)
        times.append(self._now())
        features_s, encoder_s = ((end - start) / len(clips) for start, end in zip(times, times[1:], strict=False))
        durations_s = [len(clip) / self.rate_hz for clip in clips.values()]
        return EncodedBatch(list(clips), features, mask, outputs, durations_s, features_s, encoder_s)

    @torch.no_grad()
    def decode(self, batch: EncodedBatch, is_counted: bool = True) -> dict[int, dict[str, Any]]:
        """Place -> row of hypotheses.jsonl."""
        entries = [self.data.rows[i] for i in batch.indices]
        languages = [entry["language"] or self.language for entry in entries]
        start = self._now()
        try:
            # Each call anew: `generate` keeps what it prepares to itself.
            outputs = self.model.prepare_cross_attention(batch.encoder_outputs)
            output = self.model.generate(
                input_features=batch.features,
                attention_mask=batch.mask,
                encoder_outputs=outputs,
                generation_config=self.settings,
                generator=[_row_seed(self.seed, entry["id"]) for entry in entries],
                return_token_timestamps=any(window.needs_times for window in batch.windows or ()),
                **({"language": languages} if self.takes_language else {}),
            )
        except ValueError as error:
            if len(entries) == 1:
                # Of an utterance that is cut, it is enough that one window fails.
                if is_counted and self.parts.get(batch.indices[0], ()) is not None:
                    self._skip(batch.indices[0], error)
                if batch.windows is not None:
                    self.parts[batch.indices[0]] = None
                return {}
            parts = [self.decode(_take(self.model, batch, k), is_counted) for k in range(len(entries))]
            return {i: row for part in parts for i, row in part.items()}
        decoder_s = (self._now() - start) / len(entries)
        if output.languages is not None:
            # Where nothing says what is spoken, the prompt's, which may be detected; what the data set says stays.
            languages = [
                detected if one in (None, AUTO) else one
                for one, detected in zip(languages, output.languages, strict=True)
            ]
        confidences = utterance_confidence(output.confidence)
        rows = []
        for k, entry in enumerate(entries):
            row = {
                "id": entry["id"],
                "dataset": self.data.name,
                "audio": entry["audio_path"],
                "reference": entry["text"],
                **self._read_row(output, k),
                "duration_s": round(batch.durations_s[k], 3),
                "language": languages[k],
                "confidence": None if confidences[k] is None else round(confidences[k], 4),
                "features_s": round(batch.features_s, 6),
                "encoder_s": round(batch.encoder_s, 6),
                "decoder_s": round(decoder_s, 6),
            }
            rows.append(row)
        if batch.windows is None:
            return dict(zip(batch.indices, rows, strict=True))
        return self._join(batch.indices[0], batch.windows, rows, output)

    def _join(
        self, index: int, windows: Sequence[Window], rows: Sequence[dict[str, Any]], output: Any
    ) -> dict[int, dict[str, Any]]:
        """Keeps the rows of an utterance's windows; once the last is among them, gives the row of all."""
        parts = self.parts.setdefault(index, [])
        for k, (window, row) in enumerate(zip(windows, rows, strict=True)):
            if parts is None:
                return {}
            tokens, times_s = row["tokens"], None
            if output.token_timestamps is not None:
                times_s = [
                    tuple(min(window.start_s + time_s, window.end_s) for time_s in times)
                    for times in output.token_timestamps[k].tolist()[: len(tokens)]
                ]
            values = {name: row[name] for name in ("nfe", "confidence", "language", "is_full")}
            pieces, confidences = ([token[name] for token in tokens] for name in ("text", "confidence"))
            parts.append(
                (DecodedWindow.of(window, pieces=pieces, confidences=confidences, times_s=times_s, **values), row)
            )
        if not windows[-1].is_last:
            return {}
        return {index: _joined_row(self.parts.pop(index))}

    def _read_row(self, output: Any, row: int) -> dict[str, Any]:
        """What a row of an output of `generate` says: its text, token by token, and how it came about."""
        steps = read_steps(output, row, self.processor.tokenizer, self.model.config.eos_token_id)
        length = len(steps["tokens"])
        return {
            "hypothesis": self.processor.decode(output.sequences[row].tolist()[:length]) if length else "",
            "is_full": steps["nfe"] > 0 and steps["end"] is None and float(output.confidence[row][0]) > 0,
            **steps,
        }

    def _skip(self, index: int, error: Exception) -> None:
        if self.on_bad_row == "raise":
            raise ValueError(f"{self.data.rows[index]['id']}: {error}") from error
        report_skipped(self.skipped, self.data.rows[index]["id"], error)

    def _now(self) -> float:
        if torch.device(self.model.device).type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _joined_row(parts: Sequence[tuple[DecodedWindow, dict[str, Any]]]) -> dict[str, Any]:
    """The row of an utterance, of those of its windows."""
    windows, rows = [window for window, _ in parts], [row for _, row in parts]
    transcript = join_windows(windows, windows[-1].end_s)
    joined = {
        **rows[0],
        "hypothesis": transcript.text,
        "confidence": rows[0]["confidence"] if len(rows) == 1 else transcript.confidence,
        "language": transcript.language or rows[0]["language"],
        "nfe": transcript.nfe,
        "is_full": any(row["is_full"] for row in rows),
        "tokens": [],
        "end": None,
    }
    for name in ("features_s", "encoder_s", "decoder_s"):
        joined[name] = round(sum(row[name] for row in rows), 6)
    if has_drafts := "struck_drafts" in rows[0]:
        joined["struck_drafts"] = []
        for name in ("accepted_drafts", "rejected_drafts"):
            joined[name] = {branch: sum(row[name][branch] for row in rows) for branch in BRANCHES}
    # Steps of a window come behind those of the windows before it.
    nfe = 0
    for row, kept in zip(rows, keep_once(windows), strict=True):
        offset = len(joined["tokens"]) - kept.start
        joined["tokens"] += [{**row["tokens"][k], "step": row["tokens"][k]["step"] + nfe} for k in kept]
        if row["end"] is not None:
            joined["end"] = {**row["end"], "step": row["end"]["step"] + nfe}
        if has_drafts:
            joined["struck_drafts"] += [
                {**struck, "place": struck["place"] + offset}
                for struck in row["struck_drafts"]
                if kept.start <= struck["place"] <= kept.stop
            ]
        nfe += row["nfe"]
    return joined


def _add_skipped(data: EvaluationData, skipped: list[dict[str, str]]) -> None:
    # The same data may be measured with many settings.
    known = {entry["id"] for entry in data.skipped}
    data.skipped += [entry for entry in skipped if entry["id"] not in known]


def _row_seed(seed: int, one_id: str) -> int:
    # Of 32 bits: torch's generators on the CPU take no more of a seed.
    return zlib.crc32(f"{seed} {one_id}".encode())


def _take(model: Any, batch: EncodedBatch, k: int) -> EncodedBatch:
    """Row k of a batch as a batch."""
    return replace(
        batch,
        indices=[batch.indices[k]],
        features=batch.features[k : k + 1],
        mask=None if batch.mask is None else batch.mask[k : k + 1],
        encoder_outputs=model.take_rows(batch.encoder_outputs, np.array([k])),
        durations_s=[batch.durations_s[k]],
        windows=None if batch.windows is None else [batch.windows[k]],
    )


def process_index_and_number(device: torch.device | str | None = None) -> tuple[int, int]:
    """
    Index and number of processes; joins them, if `accelerate launch` or torchrun started several. The first call
    settles whether they talk as CPU processes do: for the `device` "cpu", or where there is nothing else.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if num_launched <= 1:
        return 0, 1
    from accelerate import PartialState

    on_cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    state = PartialState(cpu=on_cpu)
    if state.num_processes != num_launched:
        raise RuntimeError(
            f"{num_launched} processes were started, but `accelerate` joins {state.num_processes}. Launch with "
            "`accelerate launch --multi_gpu --num_processes N`, also on a CPU, or with torchrun."
        )
    return state.process_index, state.num_processes


def _gather(values: list[Any]) -> list[Any]:
    """The lists of all processes as one, on each of them."""
    if process_index_and_number()[1] == 1:
        return values
    from accelerate.utils import gather_object

    return gather_object(values)


def _merge(
    data: EvaluationData, rows: dict[int, dict[str, Any]], skipped: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """All processes' rows in the order of the data set, each once."""
    gathered = _gather(list(rows.items()))
    all_skipped = _gather(skipped)
    merged = dict(gathered)
    missing = {row["id"] for i, row in enumerate(data.rows) if i not in merged} - {one["id"] for one in all_skipped}
    if len(merged) != len(gathered) or missing:
        raise RuntimeError(
            f"The processes gave {len(gathered)} rows of {len(merged)} utterances, {len(missing)} lack."
        )
    _add_skipped(data, all_skipped)
    return [merged[i] for i in sorted(merged)]


def peak_memory_mib(device: torch.device | str) -> float | None:
    """
    The most memory this process had, in MiB: what torch allocated on a GPU since its statistics were reset; elsewhere
    the resident memory of the whole process, libraries included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def model_sha256(model_name: str | Path) -> str | None:
    """The checksum of a checkpoint's safetensors, one after the other; None where they are not on this machine."""
    folder = Path(model_name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(str(model_name), "config.json")
        except ValueError:
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest() if files else None


def machine(device: torch.device | str) -> dict[str, Any]:
    """What the numbers were measured on."""
    device = torch.device(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
    }


def describe_settings(settings: MDMASRGenerationConfig, has_drafts: bool = False) -> dict[str, Any]:
    """The part of the generation settings that a measurement depends on, and which decoding it was: of checkpoints
    with drafts, or on a canvas."""
    if has_drafts:
        names = ("draft_branches", "draft_length", "temperature")
        names += ("no_speech_threshold", "logprob_threshold", "compression_ratio_threshold")
        gamma = settings.sampler_config.gamma
        return {"decoding": "drafts", "gamma": gamma, **{name: getattr(settings, name) for name in names}}
    return {
        "decoding": "canvas",
        "sampler": settings.sampler,
        "max_denoising_steps": settings.max_denoising_steps,
        "canvas": {k: getattr(settings, k) for k in ("canvas_length", "canvas_tokens_per_s", "canvas_extra_tokens")},
        "temperature": settings.temperature,
    }


def write_evaluation(
    folder: str | Path,
    rows: Sequence[dict[str, Any]],
    *,
    model: Any,
    model_name: str,
    model_path: str | Path | None = None,
    settings: MDMASRGenerationConfig | None = None,
    data: EvaluationData | dict[str, Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    command: str | None = None,
    batch_1: dict[str, Any] | None = None,
    peak_memory: float | None = None,
    num_bootstrap: int = 1000,
) -> dict[str, Any]:
    """
    Writes `folder`/hypotheses.jsonl and `folder`/metrics.json, and returns what the latter holds.

    Args:
        rows: of [`evaluate_model`].
        model_name (`str`), model_path (*optional*): the model as it was given, and where its weights are, for their
            checksum; by default the same.
        settings (*optional*): those used; by default the model's own.
        data (*optional*): the data set measured, or a dict that describes it.
        command (`str`, *optional*): that repeats this.
        batch_1 (*optional*): of [`measure_batch_1`].
        peak_memory (`float`, *optional*): in MiB, see [`peak_memory_mib`].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json_text(row) + "\n" for row in rows)
    (folder / HYPOTHESES_NAME).write_text(lines, encoding="utf-8")
    scored = score(rows, num_bootstrap=num_bootstrap)
    described = data.describe() | {"num_utterances": len(rows)} if isinstance(data, EvaluationData) else data
    languages = sorted({row.get("language") or "en" for row in rows})
    names = {describe_normaliser(language): None for language in languages}
    content = {
        "metrics": {**scored["metrics"], "rtfx_batch_1": batch_1, "peak_memory_mib": peak_memory},
        "intervals": scored["intervals"],
        "settings": {
            **describe_settings(
                settings if settings is not None else model.generation_config, model.config.has_drafts
            ),
            "batch_size": batch_size,
            "seed": seed,
            "dtype": "int8" if is_int8(model) else str(model.dtype).removeprefix("torch."),
            "num_threads": torch.get_num_threads(),
            "num_processes": process_index_and_number()[1],
            "num_bootstrap": num_bootstrap,
        },
        "normaliser": "; ".join(names),
        "model": model_name,
        "model_sha256": model_sha256(model_path or model_name),
        "data": [] if data is None else [described],
        "command": command,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": machine(model.device),
    }
    text = json_text(content, indent=2)
    (folder / METRICS_NAME).write_text(text + "\n", encoding="utf-8")
    return content


__all__ = [
    "PRESETS",
    "EncodedData",
    "EvaluationData",
    "decode_encoded",
    "encode_dataset",
    "evaluate_model",
    "load_data",
    "measure_batch_1",
    "model_sha256",
    "peak_memory_mib",
    "process_index_and_number",
    "write_evaluation",
]
