# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Measuring a model: timed batches over one or several processes, and the folder of results."""

import copy
import hashlib
import math
import os
import platform
import time
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..audio_mdm_asr import DURATION_TOLERANCE_S, load_audio
from ..cores import num_cores
from ..data.sources import Source
from ..encoding_mdm_asr import json_text
from ..generation_configuration_mdm_asr import BRANCHES, MDMASRGenerationConfig, check_number
from ..generation_mdm_asr import utterance_confidence
from ..int8 import is_int8
from ..prompt_mdm_asr import AUTO, prompt_values
from ..transcribe.joining import DecodedWindow, join_windows, keep_once
from ..transcribe.transcriber import window_lengths
from ..transcribe.voice_activity import make_vad
from ..transcribe.windows import Window, cut_windows
from .data import EvaluationData, load_data
from .scoring import HYPOTHESES_NAME, METRICS_NAME, describe_normaliser, score
from .steps import read_steps

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "accelerate", "datasets", "tokenizers")
PACKAGES += ("numpy", "jiwer", "soundfile", "soxr")
TIMES = ("features_s", "encoder_s", "decoder_s")


def evaluate_model(
    model: Any,
    processor: Any,
    data: "str | Path | Source | EvaluationData",
    *,
    settings: MDMASRGenerationConfig | None = None,
    batch_size: int = 8,
    language: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """
    Transcribes a data set and returns the rows of its hypotheses.jsonl, in its order.

    Batches are of similar lengths, the longest first. What is longer than the model takes at once is cut as
    [`Transcriber`] does it; what cannot be read or decoded is reported and added to `data.skipped`. Under
    `accelerate launch` the processes share the batches, and each gets the rows of all.

    Args:
        settings ([`MDMASRGenerationConfig`], *optional*): instead of the model's own.
        batch_size (`int`): utterances decoded together.
        language (`str`, *optional*): of the speech, where no column of the data set tells. The model's prompt gets it,
            if it has a place for it. "auto": as detected, by models that can, which is multilingual Whisper's default.
        seed (`int`): of what is drawn. Each row has a generator of its own, made of this and its id, so that it does
            not depend on the batch.
        progress (`bool`): show a bar on stderr, if that is a terminal.

    Returns:
        Dicts with "id", "dataset", "audio", "reference", "hypothesis", "duration_s", "language", "nfe", "confidence",
        "is_full", "tokens" and "end", the end of text ("text", "confidence", "step"), and "features_s", "encoder_s",
        "decoder_s": the row's share of its batch's wall time, without reading the file. Of checkpoints with drafts,
        tokens also have the "branch" that drafted them, None for the donor's own, and rows have "accepted_drafts" and
        "rejected_drafts" (branch -> number), and "struck_drafts" ("place" among the tokens, "branch", "text").

    Raises:
        ValueError: the data set, the settings, the batch size.
    """
    data = load_data(data)
    runner = _Runner(model, processor, data, settings, language, seed)
    process_index, num_processes = process_index_and_number(model.device)
    batches = _batches(data, batch_size)
    mine = batches[process_index::num_processes]
    runner.warm_up(batches)
    rows: dict[int, dict[str, Any]] = {}
    # None: where it is no terminal there is no bar.
    for indices in tqdm(mine, data.name, leave=False, disable=None if progress and process_index == 0 else True):
        rows |= runner.transcribe(indices)
    return _merge(data, rows, runner.skipped)


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
    runner = _Runner(model, processor, subset, settings, language, seed)
    batches = [[i] for i in range(len(subset))]
    runner.warm_up(batches)
    rows = [row for indices in batches for row in runner.transcribe(indices).values()]
    if not rows:
        return None
    metrics = score(rows, num_bootstrap=0)["metrics"]
    names = ("num_utterances", "audio_s", "rtfx", "rtfx_encoder", "rtfx_decoder")
    return {name: metrics[name] for name in names}


def _batches(data: EvaluationData, batch_size: int) -> list[list[int]]:
    check_number("batch_size", batch_size, lowest=1, is_integer=True)
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(data)), key=lambda i: (-data.rows[i]["duration_s"], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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
    ):
        self.model, self.processor, self.data = model, processor, data
        self.settings = copy.deepcopy(settings if settings is not None else model.generation_config)
        self.settings.return_dict_in_generate = True
        self.settings.validate()
        self.language, self.seed = language, seed
        template = self.settings.prompt_template or {"tokens": [0]}
        self.takes_language = "language" in (template.get("slots") or {})
        if language == AUTO:
            # Raises if this model cannot tell.
            prompt_values(template, language=language)
        extractor = processor.feature_extractor
        self.rate_hz = extractor.sampling_rate
        self.max_duration_s = getattr(extractor, "max_duration_s", None) or math.inf
        self.window_lengths = window_lengths(None, self.settings, extractor)
        self.skipped: list[tuple[str, ValueError]] = []

    def warm_up(self, batches: Sequence[Sequence[int]]) -> None:
        """Runs the shortest readable utterance, uncounted: first calls set up kernels and memory."""
        any(self.transcribe(indices[-1:]) for indices in reversed(batches))
        self.skipped = []

    @torch.no_grad()
    def transcribe(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Place -> row of hypotheses.jsonl, of those that can be read and decoded."""
        clips, rows = {}, {}
        for i in indices:
            try:
                clip = load_audio(self.data.clip(i), target_sampling_rate=self.rate_hz)
                if not len(clip):
                    raise ValueError("The audio is empty (no samples). Record or export it again.")
                if len(clip) / self.rate_hz > self.max_duration_s + DURATION_TOLERANCE_S:
                    rows[i] = self._row_of_windows(i, clip, len(indices))
                else:
                    clips[i] = clip
            except ValueError as error:
                self.skipped.append((self.data.rows[i]["id"], error))
        return rows | self._rows_of_clips(clips)

    def _rows_of_clips(self, clips: dict[int, np.ndarray]) -> dict[int, dict[str, Any]]:
        """One by one, where they cannot be decoded together."""
        try:
            return dict(zip(clips, self._rows(list(clips), list(clips.values())), strict=True)) if clips else {}
        except ValueError as error:
            if len(clips) > 1:
                return {i: row for one in clips.items() for i, row in self._rows_of_clips(dict([one])).items()}
            self.skipped += [(self.data.rows[i]["id"], error) for i in clips]
            return {}

    def _row_of_windows(self, index: int, clip: np.ndarray, batch_size: int) -> dict[str, Any]:
        """Of a clip that has to be cut. One without any speech is a window without samples."""
        duration_s = len(clip) / self.rate_hz
        windows = list(cut_windows([clip], self.rate_hz, make_vad("auto", self.rate_hz), *self.window_lengths))
        windows = windows or [Window(0.0, duration_s, clip[:0])]
        rows = []
        for start in range(0, len(windows), batch_size):
            some = windows[start : start + batch_size]
            with_times = any(window.needs_times for window in some)
            rows += self._rows([index] * len(some), [window.samples for window in some], with_times)
        return {**_joined_row(windows, rows), "duration_s": round(duration_s, 3)}

    def _rows(
        self, indices: Sequence[int], clips: Sequence[np.ndarray], with_times: bool = False
    ) -> list[dict[str, Any]]:
        """Rows of hypotheses.jsonl, `with_times` also with "times_s" of their tokens."""
        entries = [self.data.rows[i] for i in indices]
        languages = [entry["language"] or self.language for entry in entries]
        times = [self._now()]
        inputs = self.processor(clips, sampling_rate=self.rate_hz, return_tensors="pt").to(self.model.device)
        mask = inputs.pop("attention_mask", None)
        (features,) = inputs.values()
        times.append(self._now())
        # As `generate` does, which cannot be timed in between.
        _, open_mask = self.model.find_speech(features, mask, self.settings.min_duration_s)
        outputs = self.model.encode(features, open_mask)
        times.append(self._now())
        output = self.model.generate(
            input_features=features,
            attention_mask=mask,
            encoder_outputs=self.model.prepare_cross_attention(outputs),
            generation_config=self.settings,
            # Of 32 bits: torch's generators on the CPU take no more of a seed.
            generator=[zlib.crc32(f"{self.seed} {entry['id']}".encode()) for entry in entries],
            return_token_timestamps=with_times,
            **({"language": languages} if self.takes_language else {}),
        )
        times.append(self._now())
        seconds = {name: round(float(one), 6) for name, one in zip(TIMES, np.diff(times) / len(entries), strict=True)}
        if output.languages is not None:
            # Where nothing says what is spoken, the prompt's, which may be detected; what the data set says stays.
            pairs = zip(languages, output.languages, strict=True)
            languages = [detected if one in (None, AUTO) else one for one, detected in pairs]
        rows = []
        for k, (entry, confidence) in enumerate(zip(entries, utterance_confidence(output.confidence), strict=True)):
            steps = read_steps(output, k, self.processor.tokenizer, self.model.config.eos_token_id)
            length = len(steps["tokens"])
            row = {
                "id": entry["id"],
                "dataset": self.data.name,
                "audio": entry["audio_path"],
                "reference": entry["text"],
                "hypothesis": self.processor.decode(output.sequences[k].tolist()[:length]) if length else "",
                "is_full": steps["nfe"] > 0 and steps["end"] is None and float(output.confidence[k][0]) > 0,
                **steps,
                "duration_s": round(len(clips[k]) / self.rate_hz, 3),
                "language": languages[k],
                "confidence": None if confidence is None else round(confidence, 4),
                **seconds,
            }
            if with_times:
                row["times_s"] = output.token_timestamps[k].tolist()[:length]
            rows.append(row)
        return rows

    def _now(self) -> float:
        if torch.device(self.model.device).type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _joined_row(windows: Sequence[Window], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a clip that was cut, of those of its windows."""
    decoded = []
    for window, row in zip(windows, rows, strict=True):
        times_s = row.pop("times_s", None)
        if times_s is not None:
            times_s = [tuple(min(window.start_s + one, window.end_s) for one in times) for times in times_s]
        values = {name: row[name] for name in ("nfe", "confidence", "language", "is_full")}
        pieces, confidences = ([token[name] for token in row["tokens"]] for name in ("text", "confidence"))
        decoded.append(DecodedWindow.of(window, pieces=pieces, confidences=confidences, times_s=times_s, **values))
    transcript = join_windows(decoded, windows[-1].end_s)
    joined = {
        **rows[0],
        "hypothesis": transcript.text,
        "confidence": rows[0]["confidence"] if len(rows) == 1 else transcript.confidence,
        "language": transcript.language or rows[0]["language"],
        "nfe": transcript.nfe,
        "is_full": any(row["is_full"] for row in rows),
        "tokens": [],
        "end": None,
        **{name: round(sum(row[name] for row in rows), 6) for name in TIMES},
    }
    if has_drafts := "struck_drafts" in rows[0]:
        joined["struck_drafts"] = []
        for name in ("accepted_drafts", "rejected_drafts"):
            joined[name] = {branch: sum(row[name][branch] for row in rows) for branch in BRANCHES}
    # Steps of a window come behind those of the windows before it.
    nfe = 0
    for row, kept in zip(rows, keep_once(decoded), strict=True):
        offset = len(joined["tokens"]) - kept.start
        joined["tokens"] += [{**row["tokens"][k], "step": row["tokens"][k]["step"] + nfe} for k in kept]
        if row["end"] is not None:
            joined["end"] = {**row["end"], "step": row["end"]["step"] + nfe}
        for struck in row["struck_drafts"] if has_drafts else ():
            if kept.start <= struck["place"] <= kept.stop:
                joined["struck_drafts"].append({**struck, "place": struck["place"] + offset})
        nfe += row["nfe"]
    return joined


def process_index_and_number(device: torch.device | str | None = None) -> tuple[int, int]:
    """
    Index and number of processes; joins them, if `accelerate launch` or torchrun started several. The first call
    settles whether they talk as CPU processes do: for the `device` "cpu", or where there is nothing else.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if num_launched <= 1:
        return 0, 1
    on_cpu = not torch.accelerator.is_available() if device is None else torch.device(device).type == "cpu"
    state = PartialState(cpu=on_cpu)
    if state.num_processes != num_launched:
        raise RuntimeError(
            f"{num_launched} processes were started, but `accelerate` joins {state.num_processes}. Launch with "
            "`accelerate launch --multi_gpu --num_processes N`, also on a CPU, or with torchrun."
        )
    return state.process_index, state.num_processes


def _merge(
    data: EvaluationData, rows: dict[int, dict[str, Any]], skipped: list[tuple[str, ValueError]]
) -> list[dict[str, Any]]:
    """All processes' rows in the order of the data set, each once."""
    gathered, all_skipped = gather_object(list(rows.items())), gather_object(skipped)
    merged = dict(gathered)
    missing = {row["id"] for i, row in enumerate(data.rows) if i not in merged} - {one_id for one_id, _ in all_skipped}
    if len(merged) != len(gathered) or missing:
        raise RuntimeError(
            f"The processes gave {len(gathered)} rows of {len(merged)} utterances, {len(missing)} lack."
        )
    for one_id, error in all_skipped:
        data.skip(one_id, error)
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
        # Not getrusage on Linux, where a child starts with its parent's peak.
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 2**10, 1)
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows.
        return None
    # Bytes on macOS.
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)


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
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
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
        "num_cores": num_cores(),
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
        "sampler": settings.sampler_config.to_dict(),
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
    data: EvaluationData | None = None,
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
        command (`str`, *optional*): that repeats this.
        batch_1 (*optional*): of [`measure_batch_1`].
        peak_memory (`float`, *optional*): in MiB, see [`peak_memory_mib`].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json_text(row) + "\n" for row in rows)
    (folder / HYPOTHESES_NAME).write_text(lines, encoding="utf-8")
    scored = score(rows, num_bootstrap=num_bootstrap)
    settings = settings if settings is not None else model.generation_config
    normalisers = map(describe_normaliser, sorted({row.get("language") or "en" for row in rows}))
    content = {
        "metrics": {**scored["metrics"], "rtfx_batch_1": batch_1, "peak_memory_mib": peak_memory},
        "intervals": scored["intervals"],
        "settings": {
            **describe_settings(settings, model.config.has_drafts),
            "batch_size": batch_size,
            "seed": seed,
            "dtype": "int8" if is_int8(model) else str(model.dtype).removeprefix("torch."),
            "num_threads": torch.get_num_threads(),
            "num_processes": process_index_and_number()[1],
            "num_bootstrap": num_bootstrap,
        },
        "normaliser": "; ".join(dict.fromkeys(normalisers)),
        "model": model_name,
        "model_sha256": model_sha256(model_path or model_name),
        "data": [] if data is None else [data.describe() | {"num_utterances": len(rows)}],
        "command": command,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": machine(model.device),
    }
    (folder / METRICS_NAME).write_text(json_text(content, indent=2) + "\n", encoding="utf-8")
    return content
