# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
A thousand hostile inputs: each gives a result or a ValueError of one line, and never another exception, a crash or a
hang. They run in a process of their own, since the decoders are C libraries: if it dies, the input is kept.

By hand, more of them or one again: `python tests/test_fuzz.py FIRST STOP FOLDER`.
"""

import contextlib
import faulthandler
import gc
import io
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mdm_asr_hf import MDMASRPipeline, audio_mdm_asr

NUM_CASES = 1000
# Wall time of one input. Most take a millisecond.
TIMEOUT_S = 20
RATES_HZ = [16_000, 16_000, 8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 7_999.5, np.int64(8_000), None]
BAD_RATES_HZ = [999, 0, -16_000, 2**31, float("nan"), float("inf"), 1e300, "16000", True, [16_000], 1j]
MAGIC = [
    b"",
    b"RIFF\x24\x10\x00\x00WAVEfmt ",
    b"fLaC\x00\x00\x00\x22",
    b"OggS\x00\x02",
    b"ID3\x04\x00",
    b"\xff\xfb\x90",
]
MAGIC += [
    b"FORM\x00\x00\x10\x00AIFF",
    b"caff\x00\x01\x00\x00",
    b".snd\x00\x00\x00\x18",
    b"RF64\xff\xff\xff\xffWAVE",
    b"riff",
]
ENCODINGS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAVEX", "PCM_16"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("CAF", "PCM_16"),
]
DTYPES = "f2 f4 f4 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ?1 c8 c16 S3 U2 O M8[s] >i2 >f4".replace("?1", "?").split()
TENSOR_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint8, torch.int64]
TENSOR_DTYPES += [torch.bool, torch.complex64]


# --- inputs ---


def make_case(seed, folder):
    """(what it is, the input, its sampling rate) of a seed, always the same."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    kind = rng.choices(["random_bytes", "damaged", "array", "tensor", "container", "object"], [15, 40, 20, 8, 9, 8])[0]
    rate = random_rate(rng)
    if kind == "random_bytes":
        content = rng.choice(MAGIC) + numbers.bytes(rng.choice([0, 1, 10, 100, 1000, 5000]))
        return kind, as_file(rng, content, folder), rate
    if kind == "damaged":
        return kind, as_file(rng, damage(rng, encoded(rng, numbers)), folder), rate
    if kind == "array":
        return kind, array(rng, numbers), rate
    if kind == "tensor":
        return kind, tensor(rng, numbers), rate
    if kind == "container":
        return kind, container(rng, numbers, folder), rate
    return kind, anything(rng, folder), rate


def random_rate(rng):
    return rng.choice(RATES_HZ if rng.random() < 0.85 else BAD_RATES_HZ)


def encoded(rng, numbers):
    """A short recording in a random format."""
    format, subtype = rng.choice(ENCODINGS)
    channels = rng.choice([1, 1, 1, 2, 2, 3])
    rate = 48_000 if subtype == "OPUS" else rng.choice([8_000, 16_000, 22_050, 44_100, 48_000])
    channels = min(channels, 2) if format == "MP3" or "ADPCM" in subtype else channels
    samples = numbers.uniform(-0.5, 0.5, (rng.choice([0, 1, 100, 2_000, 8_000, 20_000]), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def damage(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        if not content:
            break
        way = rng.randrange(7)
        # Headers are the most delicate.
        place = rng.randrange(min(len(content), 64) if rng.random() < 0.6 else len(content))
        if way == 0:
            del content[place:]
        elif way == 1:
            for _ in range(rng.choice([1, 3, 20])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif way == 2:
            content[place : place + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
            )
        elif way == 3:
            del content[place : place + rng.choice([1, 2, 7, 500])]
        elif way == 4:
            content[place:place] = rng.randbytes(rng.choice([1, 2, 7, 500]))
        elif way == 5:
            content[place] = rng.randrange(256)
        else:
            content += content[place : place + 3000]
    return bytes(content)


def as_file(rng, content, folder):
    form = rng.randrange(6)
    if form == 0:
        return io.BytesIO(content)
    if form == 1:
        return {"bytes": content, "path": rng.choice([None, "clip.wav"])}
    if form == 2:
        return rng.choice([bytearray, memoryview])(content)
    if form == 3:
        path = folder / f"case{rng.choice(['.wav', '.flac', '.ogg', '.mp3', '', '.txt'])}"
        path.write_bytes(content)
        return rng.choice([path, str(path)])
    return content


def array(rng, numbers):
    shape = tuple(rng.choice([0, 1, 2, 3, 9, 300, 4000]) for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 3])))
    if np.prod(shape) > 100_000:
        shape = (4000, 2)
    dtype = np.dtype(rng.choice(DTYPES))
    scale = rng.choice([0, 0.1, 1, 1, 2, 200, 1e30])
    with np.errstate(all="ignore"):
        values = numbers.uniform(-1, 1, shape) * scale
        if rng.random() < 0.15 and values.size and values.ndim:
            values[..., :1] = rng.choice([np.nan, np.inf, -np.inf])
        samples = (
            np.asarray(values).astype("i8").astype(dtype) if dtype.kind == "M" else np.asarray(values).astype(dtype)
        )
    if samples.ndim == 1 and rng.random() < 0.3:
        return rng.choice([samples[::2], samples[::-1], samples.tolist(), memoryview(samples.tobytes())])
    return samples


def tensor(rng, numbers):
    shape = [rng.choice([0, 1, 2, 300, 4000]) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    shape = shape if np.prod(shape) < 100_000 else [4000, 2]
    samples = torch.tensor(numbers.uniform(-1, 1, shape)).to(rng.choice(TENSOR_DTYPES))
    way = rng.randrange(8)
    if way == 0 and samples.is_floating_point():
        return samples.requires_grad_()
    if way == 1:
        return samples.to("meta")
    if way == 2:
        return samples.to_sparse() if samples.ndim else samples
    if way == 3:
        return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)])
    return samples


def container(rng, numbers, folder):
    inner = array(rng, numbers)
    rate = random_rate(rng)
    file = as_file(rng, encoded(rng, numbers), folder)
    return rng.choice(
        [
            (inner, rate),
            (inner,),
            [inner, inner],
            [inner, None, file],
            (file, rate),
            {"array": inner, "sampling_rate": rate},
            {"raw": inner, "sampling_rate": rate},
            {"array": inner},
            {"array": None, "path": None, "bytes": None},
            {"path": file if isinstance(file, str) else "gone.flac"},
            {"bytes": "text"},
            {"array": file, "sampling_rate": 16_000},
            [file, file],
            {"sampling_rate": rate},
        ]
    )


class Unreadable:
    def read(self, *_):
        raise OSError("the disk is gone")


class Text:
    def read(self, *_):
        return "text"


class BrokenDecoder:
    def get_all_samples(self):
        raise RuntimeError("no such stream")


def anything(rng, folder):
    cycle = []
    cycle.append(cycle)
    return rng.choice(
        [
            *(
                None,
                True,
                0,
                -1,
                1.5,
                float("nan"),
                1j,
                "",
                "a",
                "\0",
                "\ud800",
                "x" * 5000,
                b"",
                b"\0",
                "https://example.org/a.wav",
            ),
            *(
                [],
                (),
                {},
                set(),
                [[]],
                [[[]]],
                [None],
                ["a"],
                [1, "b"],
                [0.1, None],
                [1, [2, 3]],
                ([], 16_000),
                {1: 2},
                cycle,
            ),
            *(
                [10**400],
                [True, False],
                [0.0] * 500,
                [[0.0] * 500, [0.0] * 400],
                (0.5, 16_000),
                ("a", 16_000),
                ([0.1], [0.2]),
            ),
            *(
                object(),
                Unreadable(),
                Text(),
                BrokenDecoder(),
                iter([0.0]),
                range(5),
                len,
                int,
                np.nan,
                np.float32(0.5),
            ),
            *(
                folder,
                str(folder),
                folder / "gone.wav",
                Path("/dev/null"),
                "/dev/full",
                os.devnull.encode(),
                io.StringIO("text"),
            ),
        ]
    )


# --- the process that runs them ---


def run_cases(first, stop, folder):
    """Prints a line of JSON when all cases are done; `folder/case.json` names the one that runs."""
    from tiny_models import tiny_drafts_model, tiny_processor
    from transformers import pipeline

    from mdm_asr_hf.audio_mdm_asr import AudioStream, load_audio
    from mdm_asr_hf.evaluate.evaluation import peak_memory_mib
    from mdm_asr_hf.transcribe.transcriber import Transcriber

    torch.set_num_threads(1)
    model, processor = tiny_drafts_model(dtype=torch.float32), tiny_processor()
    model.generation_config.max_new_tokens = 6
    transcriber = Transcriber(model, processor, max_window_s=1.0, vad="energy")
    pipe = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        processor=processor,
        pipeline_class=MDMASRPipeline,
    )

    def generate(audio, rate):
        inputs = processor(audio, sampling_rate=rate)
        return processor.batch_decode(model.generate(**inputs))

    def stream(audio, rate):
        return np.concatenate([np.zeros(0, np.float32), *AudioStream(audio, sampling_rate=rate, block_s=0.1)])

    # load_audio takes every input, and one of the others does.
    takers = {
        "generate": generate,
        "stream": stream,
        "transcribe": lambda audio, rate: transcriber.transcribe(audio, sampling_rate=rate),
        "pipeline": lambda audio, rate: pipe(audio),
    }
    outcomes, slowest_s, said = Counter(), (0.0, None), Counter()
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.update([record.msg])
    logging.getLogger("mdm_asr_hf").addHandler(listener)
    warnings.showwarning = lambda message, *where: said.update([str(message)])
    tempfile.tempdir = str(folder / "temporary")
    (folder / "temporary").mkdir()
    handles = open_files()
    for seed in range(first, stop):
        name = ("generate", "stream", "transcribe", "stream", "generate", "pipeline")[seed % 6]
        result = None
        for taker, call in (("load", lambda audio, rate: load_audio(audio, sampling_rate=rate)), (name, takers[name])):
            (folder / "case.json").write_text(json.dumps({"seed": seed, "taker": taker}))
            # Made anew, since a file can be read once.
            kind, audio, rate = make_case(seed, folder)
            faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
            before_s = time.monotonic()
            loaded, result = result, None
            try:
                result = call(audio, rate)
                outcomes[f"{taker} {kind}: result"] += 1
                if isinstance(result, np.ndarray):
                    assert result.dtype == np.float32 and result.ndim == 1 and np.isfinite(result).all(), result
            except ValueError as error:
                outcomes[f"{taker} {kind}: ValueError"] += 1
                message = str(error)
                assert 10 < len(message) < 4500 and "\n" not in message, f"not a clear message: {message!r}"
            finally:
                faulthandler.cancel_dump_traceback_later()
            # Read in blocks or at once, an input gives the same.
            if taker == "stream":
                assert (loaded is None) == (result is None), f"only one of load and stream can read {audio!r:.300}"
                assert result is None or (len(loaded) == len(result) and np.allclose(loaded, result, atol=1e-3)), audio
            slowest_s = max(slowest_s, (time.monotonic() - before_s, seed))
    report = {"outcomes": outcomes, "slowest_s": slowest_s, "said": said.most_common(5)}
    report["peak_mib"] = peak_memory_mib("cpu")
    report |= {"left_open": sorted(open_files() - handles), "left_lying": os.listdir(tempfile.tempdir)}
    print(json.dumps(report))


def open_files():
    """What this process has open, apart from what leads to no file."""
    gc.collect()
    paths = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            paths.add(os.readlink(f"/proc/self/fd/{handle}"))
    # ONNX Runtime keeps a database of its own open.
    return {
        path for path in paths if path.startswith("/") and not path.startswith("/proc/") and ".onnxruntime" not in path
    }


def keep_case(seed, folder, target):
    """Saves an input that a run did not survive; gives where."""
    target.mkdir(parents=True, exist_ok=True)
    _, audio, _ = make_case(seed, folder)
    if isinstance(audio, (str, os.PathLike)):
        with contextlib.suppress(OSError, ValueError):
            audio = Path(audio).read_bytes()
    content = audio.getvalue() if isinstance(audio, io.BytesIO) else audio
    content = content["bytes"] if isinstance(content, dict) and "bytes" in content else content
    path = target / f"fuzz-{seed}"
    path.write_bytes(bytes(content) if isinstance(content, (bytes, bytearray, memoryview)) else pickle.dumps(content))
    return path


def test_hostile_inputs_give_results_or_value_errors(tmp_path):
    command = [sys.executable, __file__, "0", str(NUM_CASES), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        case = json.loads((tmp_path / "case.json").read_text())
        path = keep_case(case["seed"], tmp_path, tmp_path / "kept")
        raise AssertionError(f"{case} ended with {done.returncode}; its input is {path}\n{done.stderr[-3000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    outcomes = Counter(report["outcomes"])
    assert sum(n for name, n in outcomes.items() if name.startswith("load ")) == NUM_CASES
    assert sum(outcomes.values()) == 2 * NUM_CASES
    # Both outcomes occur everywhere, or the inputs would show little.
    for taker in ("load", "generate", "stream", "transcribe", "pipeline"):
        for kind in ("damaged", "array"):
            assert outcomes[f"{taker} {kind}: result"] > 0 and outcomes[f"{taker} {kind}: ValueError"] > 0, outcomes
    assert not report["left_open"] and not report["left_lying"], report
    # Who sends a thousand bad recordings reads no thousand lines of the same.
    assert all(number < NUM_CASES / 10 for _, number in report["said"]), report["said"]
    assert report["peak_mib"] < 3000 and report["slowest_s"][0] < TIMEOUT_S


def test_to_the_pipeline_numbers_are_one_recording():
    from tiny_models import tiny_model, tiny_processor

    processor = tiny_processor()
    pipe = MDMASRPipeline(
        model=tiny_model(), tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 8_000)
    alone = pipe(samples.astype(np.float32), max_denoising_steps=2)
    assert alone["text"] and pipe(samples.tolist(), max_denoising_steps=2) == alone
    assert pipe((samples, 16_000), max_denoising_steps=2) == alone
    assert pipe([samples, samples], max_denoising_steps=2) == [alone] * 2
    assert pipe((samples, samples), max_denoising_steps=2) == [alone] * 2
    with pytest.raises(ValueError, match="empty list"):
        pipe([])


def test_a_crash_is_seen_and_its_input_is_kept(tmp_path):
    """The net itself: a process that dies by a signal has left the seed, from which the input is made again."""
    child = os.fork()
    if not child:
        try:
            # Garbage sessions of ONNX Runtime have threads that are not here: to collect one is to wait for ever.
            gc.freeze()
            signal.alarm(TIMEOUT_S)
            # The crash is meant: no traceback of it.
            faulthandler.disable()
            audio_mdm_asr.load_audio = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGSEGV)
            run_cases(7, 8, tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
    case = json.loads((tmp_path / "case.json").read_text())
    assert case["seed"] == 7 and case["taker"] == "load"
    assert keep_case(7, tmp_path, tmp_path / "kept").exists()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "helpers"))
    run_cases(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
