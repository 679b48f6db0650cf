# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The systems that run_peers.py compares, each behind `transcribe`: from samples in memory to texts.

Every system imports its own libraries when it is loaded, so that a process which measures one system's memory holds
nothing of the others, and so that a peer which is left out need not be installed.
"""

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import RATE_HZ

MODULES = {"faster-whisper": ("ctranslate2", "faster_whisper"), "whisper.cpp": ("pywhispercpp",)}
MODULES |= {"onnx": ("onnxruntime",)}


def read_branches(text: str) -> list[str]:
    """Of "masks+hypothesis"; "none" is plain autoregressive decoding."""
    return [] if text == "none" else text.split("+")


# Names of `--ours gamma=0.05,draft-length=4`, what they are called here, and their types.
OUR_SETTINGS = {
    "gamma": ("gamma", float),
    "branches": ("draft_branches", read_branches),
    "draft-length": ("draft_length", int),
    "window-s": ("window_s", float),
    "dtype": ("dtype", str),
    "onnx": ("onnx", str),
}
OUR_DTYPES = ("float32", "float16", "bfloat16", "int8")


def parse_settings(text: str) -> dict[str, Any]:
    """
    What "onnx=FOLDER,gamma=3,draft-length=4" stands for.

    Raises:
        ValueError: a name that is no setting, a value that does not fit it, a folder that is not there.
    """
    settings: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in pair.partition("="))
        if not value or name not in OUR_SETTINGS or OUR_SETTINGS[name][0] in settings:
            known = ", ".join(OUR_SETTINGS)
            raise ValueError(f"`--ours` {text!r}: {pair!r} must be NAME=VALUE, each NAME once and one of {known}.")
        argument, kind = OUR_SETTINGS[name]
        try:
            settings[argument] = kind(value)
        except ValueError as error:
            raise ValueError(f"`--ours` {text!r}: {value!r} is not of type {kind.__name__}.") from error
    if settings.get("dtype", "float32") not in OUR_DTYPES or {"dtype", "onnx"} <= set(settings):
        raise ValueError(f"`--ours` {text!r}: `dtype=` must be one of {', '.join(OUR_DTYPES)}, without an export.")
    if "onnx" in settings and not Path(settings["onnx"]).is_dir():
        raise ValueError(f"`--ours` {text!r}: there is no folder {settings['onnx']!r}. Export the checkpoint first.")
    return settings


@dataclass(frozen=True)
class Peer:
    """
    What to load and how to call it.

    Args:
        kind (`str`): "transformers", "compiled", "faster-whisper", "whisper.cpp", "ours" or "onnx", which is ours in
            ONNX Runtime.
        source (`str`): folder or id of the checkpoint; what was converted or exported.
        name (`str`): what tables call the checkpoint.
        dtype (`str`): of torch, the compute type of CTranslate2, or the kind of ggml's matrices; the name of the
            exported folder for ONNX Runtime.
        settings (`str`): of ours, as in "gamma=3,draft-length=4"; empty for the checkpoint's own.
    """

    kind: str
    source: str
    name: str
    dtype: str
    settings: str = ""

    @property
    def label(self) -> str:
        pairs = [pair for pair in self.settings.split(",") if pair and not pair.startswith(("onnx=", "dtype="))]
        settings = " ".join(pairs) or "its own settings"
        named = {"compiled": "transformers, torch.compile", "ours": settings, "onnx": f"ONNX Runtime, {settings}"}
        return f"{self.name}, {named.get(self.kind, self.kind)}, {self.dtype}"

    @property
    def encoder_label(self) -> str:
        """Of the encoder alone, which does not know the settings it is decoded with."""
        engine = "ONNX Runtime, " if self.kind == "onnx" else ""
        return f"{self.name}, {engine}encoder alone, {self.dtype}"

    def can_batch(self, batch_size: int) -> bool:
        """whisper.cpp takes one recording after the other."""
        return batch_size == 1 or self.kind != "whisper.cpp"

    @property
    def is_ours(self) -> bool:
        return self.kind in ("ours", "onnx")


class TransformersWhisper:
    """The autoregressive donor, greedy, on its stock 30-second features."""

    def __init__(self, peer: Peer, device: str, threads: int):
        torch = _torch(threads)
        from transformers import AutoProcessor, WhisperForConditionalGeneration

        self.device, self.dtype = device, getattr(torch, peer.dtype)
        self.processor = AutoProcessor.from_pretrained(peer.source)
        model = WhisperForConditionalGeneration.from_pretrained(peer.source, dtype=self.dtype)
        self.model = model.to(device).eval()
        self.options = {"do_sample": False, "num_beams": 1}
        if getattr(model.generation_config, "is_multilingual", False):
            self.options |= {"language": "en", "task": "transcribe"}
        if peer.kind == "compiled":
            # As Whisper's model cards do it. transformers would compile a second time on CUDA by itself.
            self.options["cache_implementation"] = "static"
            model.generation_config.disable_compile = True
            encoder = model.get_encoder()
            encoder.forward = torch.compile(encoder.forward)
            model.forward = torch.compile(model.forward, mode="reduce-overhead" if device == "cuda" else "default")

    def transcribe(self, clips: list[np.ndarray]) -> list[dict[str, Any]]:
        ids = self.model.generate(self.encoder_inputs(clips), **self.options)
        return [{"hypothesis": text.strip()} for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def encoder_inputs(self, clips: list[np.ndarray]) -> Any:
        extracted = self.processor.feature_extractor(clips, sampling_rate=RATE_HZ, return_tensors="pt")
        return extracted.input_features.to(self.device, self.dtype)

    def encode(self, features: Any) -> None:
        import torch

        with torch.no_grad():
            self.model.get_encoder()(features)


class FasterWhisper:
    """
    The donor's weights in CTranslate2, with the features and the tokenizer of faster-whisper.

    The calls are those of `faster_whisper.BatchedInferencePipeline` for its pieces of 30 seconds, without its checks
    of the result: that pipeline batches the pieces of one recording, and here each clip is a recording of its own.
    """

    def __init__(self, peer: Peer, device: str, threads: int):
        from faster_whisper import WhisperModel
        from faster_whisper.audio import pad_or_trim
        from faster_whisper.tokenizer import Tokenizer

        self.whisper = WhisperModel(
            peer.source, device=device, compute_type=peer.dtype, cpu_threads=threads, num_workers=1
        )
        is_multilingual = self.whisper.model.is_multilingual
        self.tokenizer = Tokenizer(self.whisper.hf_tokenizer, is_multilingual, task="transcribe", language="en")
        self.prompt = self.whisper.get_prompt(self.tokenizer, [], without_timestamps=True)
        self.max_length = json.loads((Path(peer.source) / "benchmark.json").read_text())["max_length"]
        self.pad_or_trim = pad_or_trim

    def transcribe(self, clips: list[np.ndarray]) -> list[dict[str, Any]]:
        extract = self.whisper.feature_extractor
        features = np.stack([self.pad_or_trim(extract(clip)[..., :-1]) for clip in clips])
        results = self.whisper.model.generate(
            self.whisper.encode(features),
            [self.prompt] * len(clips),
            beam_size=1,
            max_length=self.max_length,
            sampling_temperature=0.0,
        )
        return [{"hypothesis": self.tokenizer.decode(result.sequences_ids[0]).strip()} for result in results]

    def transcribe_recording(self, samples: np.ndarray, batch_size: int) -> str:
        """By the library's own pipeline for long recordings, as it comes: pieces that it finds speech in."""
        from faster_whisper import BatchedInferencePipeline

        options = {"batch_size": batch_size, "beam_size": 1, "language": "en", "without_timestamps": True}
        segments, _ = BatchedInferencePipeline(self.whisper).transcribe(samples, **options)
        return " ".join(segment.text for segment in segments)

    def transcribe_in_turn(self, samples: np.ndarray) -> str:
        """As the library does it without that pipeline: windows from timestamp to timestamp, hotter again where one
        looks wrong."""
        segments, _ = self.whisper.transcribe(samples, beam_size=1, language="en")
        return " ".join(segment.text for segment in segments)


class WhisperCpp:
    """The donor's weights in whisper.cpp, by pywhispercpp."""

    def __init__(self, peer: Peer, device: str, threads: int):
        from pywhispercpp.model import Model

        # The donor's configuration suppresses the same tokens in transformers and faster-whisper.
        options = {"language": "en", "suppress_nst": True, "print_progress": False}
        self.model = Model(peer.source, redirect_whispercpp_logs_to=None, n_threads=threads, **options)

    def transcribe(self, clips: list[np.ndarray]) -> list[dict[str, Any]]:
        return [{"hypothesis": self._transcribe(clip, no_timestamps=True, temperature_inc=0.0)} for clip in clips]

    def transcribe_recording(self, samples: np.ndarray, batch_size: int) -> str:
        """As the library does it unasked: windows from timestamp to timestamp, hotter again where one looks wrong."""
        return self._transcribe(samples, no_timestamps=False, temperature_inc=0.2)

    def _transcribe(self, samples: np.ndarray, **options) -> str:
        # The library keeps options for the next call, so that every call has all that differ.
        return " ".join(segment.text for segment in self.model.transcribe(samples, **options)).strip()


class OurModel:
    """MDM-ASR, with one way of decoding."""

    def __init__(self, peer: Peer, device: str, threads: int):
        from mdm_asr_hf.loading import generation_settings

        settings, self.device = parse_settings(peer.settings), device
        is_exported = settings.pop("onnx", None) is not None
        self.no_grad = nullcontext if is_exported else _torch(threads).no_grad
        # An export has a device and a precision of its own.
        where = (None, "float32") if is_exported else (device, peer.dtype)
        self.model, self.processor = _load_ours(peer.source, *where, threads)
        settings.pop("dtype", None)
        self.window_s = settings.pop("window_s", None)
        self.settings = generation_settings(self.model, **settings)
        # Seconds of the parts of `transcribe` so far.
        self.stages: dict[str, float] = {}

    def transcribe(self, clips: list[np.ndarray]) -> list[dict[str, Any]]:
        with watch_stages(self.model, self.stages):
            if self.window_s is not None:
                # As `mdm-asr transcribe` does: cut at pauses, all windows of all clips in common batches.
                found = self._transcriber(64).transcribe_all(clips, sampling_rate=RATE_HZ)
                return [{"hypothesis": one.text, "nfe": one.nfe} for _, one in found]
            output = self.model.generate(**self.encoder_inputs(clips), generation_config=self.settings)
            texts = self.processor.batch_decode(output.sequences)
            return [{"hypothesis": text, "nfe": nfe} for text, nfe in zip(texts, output.nfe.tolist(), strict=True)]

    def transcribe_recording(self, samples: np.ndarray, batch_size: int) -> str:
        """As `mdm-asr transcribe` does."""
        with watch_stages(self.model, self.stages):
            return self._transcriber(batch_size).transcribe(samples, sampling_rate=RATE_HZ).text

    def _transcriber(self, batch_size: int) -> Any:
        from mdm_asr_hf.transcribe.transcriber import Transcriber

        window = {} if self.window_s is None else {"max_window_s": self.window_s}
        return Transcriber(self.model, self.processor, settings=self.settings, batch_size=batch_size, **window)

    def encoder_inputs(self, clips: list[np.ndarray]) -> Any:
        return self.processor(clips, sampling_rate=RATE_HZ).to(self.device)

    def encode(self, inputs: Any) -> None:
        with self.no_grad():
            self.model.encode(**inputs)


@contextmanager
def watch_stages(model: Any, seconds: dict[str, float]) -> Iterator[None]:
    """Inside, adds to `seconds` what encoding takes, evaluating causal rows, and drafting; where several threads do so
    side by side, their mean."""
    kind, lock = type(model), threading.Lock()
    encode, begin_steps = kind.encode, kind.begin_steps

    def timed(stage: str, its_model: Any, call: Any) -> Any:
        share = 1 if its_model is model else 1 / model.workers.num_threads

        def watched(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            with lock:
                seconds[stage] = seconds.get(stage, 0.0) + share * (time.perf_counter() - start)
            return result

        return watched

    def begin(its_model, *args):
        steps = begin_steps(its_model, *args)
        steps.verify = timed("causal rows", its_model, steps.verify)
        steps.propose = timed("drafts", its_model, steps.propose)
        return steps

    kind.encode = lambda its_model, *args, **kwargs: timed("encoder", its_model, encode)(its_model, *args, **kwargs)
    kind.begin_steps = begin
    try:
        yield
    finally:
        kind.encode, kind.begin_steps = encode, begin_steps


# Several settings of ours share one model.
@cache
def _load_ours(source: str, device: str | None, dtype: str, threads: int | None) -> tuple[Any, Any]:
    from mdm_asr_hf.loading import load_model

    return load_model(source, device, dtype=dtype, num_threads=threads)


def _torch(threads: int) -> Any:
    """torch and transformers with the threads fixed, and without transformers' warnings and bars."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return torch


def load_peer(peer: Peer, device: str, threads: int) -> Any:
    """Raises ValueError or OSError where its checkpoint cannot be used."""
    classes = {"faster-whisper": FasterWhisper, "whisper.cpp": WhisperCpp, "ours": OurModel, "onnx": OurModel}
    return classes.get(peer.kind, TransformersWhisper)(peer, device, threads)


def require_peer(kind: str) -> None:
    """Raises ValueError where what it needs is not installed."""
    for module in MODULES.get(kind, ()):
        if find_spec(module) is None:
            install = "pip install -r benchmarks/requirements.txt"
            raise ValueError(f"`{module}` is not installed: {install}, or leave it out (--skip {kind}).")


def convert_for_faster_whisper(donor: str, folder: Path, quantization: str) -> None:
    """Writes the donor's weights for CTranslate2, with what faster-whisper needs beside them."""
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoFeatureExtractor, AutoTokenizer, GenerationConfig

    TransformersConverter(donor).convert(str(folder), quantization=quantization, force=True)
    AutoTokenizer.from_pretrained(donor).save_pretrained(folder)
    AutoFeatureExtractor.from_pretrained(donor).save_pretrained(folder)
    # The bound that the donor itself has in transformers. Whisper's is 448.
    max_length = GenerationConfig.from_pretrained(donor).max_length or 448
    (folder / "benchmark.json").write_text(json.dumps({"max_length": max_length}), encoding="utf-8")


def measure_memory(peer: Peer, batches: Iterable[list[np.ndarray]], device: str, threads: int) -> list[dict[str, Any]]:
    """
    Loads the peer and transcribes each batch twice, smaller ones first. To be called in a process that has done
    nothing else.

    Returns:
        For each batch, in MiB: `peak`, the most that this process held until then, and `before`, what Python, NumPy
        and the clips took of it; on CUDA `peak_device` too, the most device memory in use beside the empty context.
    """
    before = _peak_rss_mib()
    watch = None
    if device == "cuda":
        watch = _DeviceMemory()
    elif peer.kind in ("faster-whisper", "onnx"):
        # CTranslate2 imports torch and transformers for its converters where they are installed, as this package does
        # for its models. Those who only transcribe with ONNX Runtime or CTranslate2 do not have them.
        sys.modules["torch"] = sys.modules["transformers"] = None
    system = load_peer(peer, device, threads)
    rows = []
    for clips in batches:
        for _ in range(2):
            system.transcribe(clips)
        rows.append({"peak": round(_peak_rss_mib(), 1), "before": round(before, 1)})
        if watch is not None:
            rows[-1]["peak_device"] = round(watch.peak_mib(), 1)
    return rows


class _DeviceMemory(threading.Thread):
    """Looks every few milliseconds at how much of the GPU is taken, whoever allocates it: torch or CTranslate2."""

    def __init__(self):
        import torch

        super().__init__(daemon=True)
        self.read = torch.cuda.mem_get_info
        self.lowest_free = self.free_before = self.read()[0]
        self.start()

    def run(self) -> None:
        while True:
            self.lowest_free = min(self.lowest_free, self.read()[0])
            time.sleep(0.002)

    def peak_mib(self) -> float:
        """The most that was taken until now."""
        return (self.free_before - min(self.lowest_free, self.read()[0])) / 2**20


def _peak_rss_mib() -> float:
    """Most resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage on Linux, where a child starts with its parent's peak.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    # Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
