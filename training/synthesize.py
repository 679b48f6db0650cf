#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Makes training speech from text with any text-to-speech callable, in many processes.

    python training/synthesize.py --tts my_tts:synth --text sentences.txt.gz --output speech --hours 10 --processes 8

`--tts` names `module:function` or `path/to/file.py:function`; the function takes (text, NumPy generator) and returns
(mono float samples in -1..1, sampling rate in Hz). Everything random in it should come from the generator: then a
sentence sounds the same whatever the number of processes.

The output can be read while it grows, by `load_sources({"path": "speech", "growing": True, ...})`, and is an
audiofolder for `datasets`:

    speech/synthesis.json                         command, versions, settings, and at the end the totals
    speech/shard-00000/metadata.jsonl             one line per file, written once the file is complete
    speech/shard-00000/audio/000000042.flac       named by the number of the sentence

The same command again goes on where it stopped, with any number of processes and of hours; sentences that failed are
tried again. When the text is used up before the hours are full, it is read again, with other random numbers.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

FORMATS = {"flac": {"format": "FLAC", "subtype": "PCM_16"}, "ogg": {"format": "OGG", "subtype": "OPUS"}}
# The settings that decide how a sentence sounds: a folder holds one choice of them.
FIXED = ("tts", "text", "text_sha256", "seed", "format")
# A process that makes so many sentences in a row fail has a broken voice, not broken sentences.
MAX_ERRORS_IN_A_ROW = 20
MAX_CRASHES = 20
# Exit status of a process that gives up.
BROKEN_VOICE = 3
MAX_DURATION_S = 600.0
REPORT_EVERY_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--tts", required=True, help="module:function or path/to/file.py:function")
    parser.add_argument("--text", required=True, type=Path, help="one sentence per line; .txt or .txt.gz, UTF-8")
    parser.add_argument("--output", required=True, type=Path, help="folder to make, or to go on with")
    parser.add_argument("--hours", required=True, type=float, help="of speech, all in all")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=sorted(FORMATS), default="flac", help="ogg (Opus) takes a tenth of flac")
    parser.add_argument("--language", help="written into every line of metadata")
    options = parser.parse_args(arguments)
    if not options.hours > 0 or options.processes < 1 or options.seed < 0:
        parser.error("--hours and --processes must be positive, and --seed not negative")
    try:
        return synthesize(options, sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def synthesize(options: argparse.Namespace, command: list[str]) -> int:
    """Runs the processes until the hours are full. Returns the exit status."""
    # Here, where the voices' processes do not wait for it.
    from mdm_asr_hf.data.sources import read_sentences

    sentences = read_sentences(options.text, "--text")
    settings = {
        "command": ["training/synthesize.py", *command],
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "soundfile": soundfile.__version__},
        "tts": options.tts,
        "text": options.text.name,
        "text_sha256": hashlib.sha256("\n".join(sentences).encode()).hexdigest(),
        "num_sentences": len(sentences),
        "seed": options.seed,
        "format": options.format,
    }
    summary_path = options.output / "synthesis.json"
    check_settings(summary_path, settings)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(summary_path, settings)
    done, done_s = find_done(options.output)

    # Each voice in a process of its own computes with one thread; this must be set before NumPy is loaded there.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    shared = {
        "next": context.Value("q", 0),
        "seconds": context.Value("d", done_s),
        "target_s": options.hours * 3600,
        "working_on": context.Array("q", [-1] * options.processes, lock=False),
        # Written at once, without a thread of its own: a process that crashes takes no message with it.
        "messages": context.SimpleQueue(),
    }
    job = {"tts": options.tts, "sentences": sentences, "done": done, "output": options.output, "seed": options.seed}
    job |= {"format": options.format, "language": options.language}

    def start(number: int) -> Any:
        process = context.Process(target=run_process, args=(number, job, shared), daemon=True)
        process.start()
        return process

    started, start_s, errors, examples = time.monotonic(), done_s, Counter(), []
    processes = [start(number) for number in range(options.processes)]
    print(f"{len(sentences)} sentences, {done_s / 3600:.2f} of {options.hours:g} h are there", flush=True)
    reported, failure = started, None
    try:
        running = True
        while running:
            running = False
            collect(shared["messages"], errors, examples)
            for number, process in enumerate(processes):
                running |= process.exitcode != 0
                if process.exitcode == BROKEN_VOICE:
                    collect(shared["messages"], errors, examples)
                    raise RuntimeError(f"the voice does not work; the last error: {examples[-1] if examples else '?'}")
                if process.exitcode not in (None, 0):
                    index = shared["working_on"][number]
                    errors["crash of the process"] += 1
                    examples.append(f"sentence {index}: the process ended with status {process.exitcode}")
                    print(f"warning: {examples[-1]}", file=sys.stderr, flush=True)
                    if errors["crash of the process"] > MAX_CRASHES:
                        raise RuntimeError(f"{MAX_CRASHES} processes crashed; the last at {examples[-1]}")
                    # The counter stands behind the sentence: the new process goes on with the next ones.
                    processes[number] = start(number)
            if time.monotonic() - reported >= REPORT_EVERY_S:
                reported = time.monotonic()
                print(progress(shared["seconds"].value, start_s, reported - started, options, errors), flush=True)
            time.sleep(0.05)
    except RuntimeError as error:
        failure = str(error)
    except KeyboardInterrupt:
        # What is there is whole, and the totals below tell how much it is.
        failure = "interrupted"
    finally:
        for process in processes:
            process.terminate()
            process.join()
    collect(shared["messages"], errors, examples)

    wall_s = time.monotonic() - started
    total = shared["seconds"].value
    print(progress(total, start_s, wall_s, options, errors), flush=True)
    totals = {"hours": round(total / 3600, 4), "wall_s": round(wall_s, 1), "num_processes": options.processes}
    totals |= {"real_time_factor": round((total - start_s) / max(wall_s, 1e-9), 2), "errors": dict(errors)}
    write_json(summary_path, settings | totals | {"example_errors": examples[:20]})
    if failure:
        print(f"stopped: {failure}", file=sys.stderr, flush=True)
        return 1
    return 0


def progress(total_s: float, start_s: float, wall_s: float, options: argparse.Namespace, errors: Counter) -> str:
    factor = (total_s - start_s) / max(wall_s, 1e-9)
    return (
        f"{total_s / 3600:.3f} of {options.hours:g} h, {factor:.1f} x real time "
        f"({factor / options.processes:.1f} per process), {errors.total()} errors"
        + (f" ({', '.join(f'{count} {name}' for name, count in errors.most_common(3))})" if errors else "")
    )


def collect(messages: Any, errors: Counter, examples: list[str]) -> None:
    while not messages.empty():
        kind, text = messages.get()
        errors[kind] += 1
        examples.append(text)
        if len(examples) <= 5:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def run_process(number: int, job: dict[str, Any], shared: dict[str, Any]) -> None:
    """Takes the next sentence until the hours are full, or the voice turns out not to work at all."""
    try:
        tts = load_callable(job["tts"])
    except Exception as error:
        shared["messages"].put((type(error).__name__, " ".join(str(error).split())))
        sys.exit(BROKEN_VOICE)
    sentences, folder = job["sentences"], job["output"] / f"shard-{number:05d}"
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    metadata = open_for_appending(folder / "metadata.jsonl")
    num_errors_in_a_row = 0
    # A parent that was killed cannot end its processes, and another run may go on in the same folder.
    while multiprocessing.parent_process().is_alive():
        with shared["next"].get_lock():
            index = shared["next"].value
            shared["next"].value += 1
        with shared["seconds"].get_lock():
            if shared["seconds"].value >= shared["target_s"]:
                return
        if index in job["done"]:
            continue
        shared["working_on"][number] = index
        text = sentences[index % len(sentences)]
        try:
            samples, rate = check_speech(*tts(text, np.random.default_rng([job["seed"], index])))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            shared["messages"].put((type(error).__name__, f"sentence {index} ({text[:60]!r}): {reason}"))
            num_errors_in_a_row += 1
            if num_errors_in_a_row >= MAX_ERRORS_IN_A_ROW:
                sys.exit(BROKEN_VOICE)
            continue
        num_errors_in_a_row = 0
        name, duration_s = f"audio/{index:09d}.{job['format']}", len(samples) / rate
        write_audio(folder / name, samples, rate, job["format"])
        row = {"file_name": name, "text": text, "duration_s": round(duration_s, 4), "sentence": index}
        row |= {"language": job["language"]} if job["language"] else {}
        # One write of a whole line to a file opened for appending: readers see all of it or nothing.
        os.write(metadata, (json.dumps(row, ensure_ascii=False) + "\n").encode())
        with shared["seconds"].get_lock():
            shared["seconds"].value += duration_s


def load_callable(spec: str) -> Callable[[str, np.random.Generator], tuple[np.ndarray, float]]:
    """The function that `module:function` or `path/to/file.py:function` names."""
    module_name, _, function_name = spec.rpartition(":")
    if not module_name or not function_name:
        raise ValueError(f"--tts must be module:function or path/to/file.py:function, got {spec!r}")
    folder = os.getcwd()
    if module_name.endswith(".py"):
        # Its neighbours can be imported, as if it were run as a script.
        folder, module_name = str(Path(module_name).resolve().parent), Path(module_name).stem
    sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--tts {spec!r} cannot be loaded: {error}") from error


def check_speech(samples: Any, rate: Any) -> tuple[np.ndarray, int]:
    """Mono float32 samples in -1..1 and their rate, or ValueError."""
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise ValueError(f"speech must be mono float samples, got {samples.dtype} of shape {samples.shape}")
    if rate != int(rate) or not 1000 <= rate <= 192_000:
        raise ValueError(f"the sampling rate must be whole, in Hz, got {rate!r}")
    if not samples.size or not np.isfinite(samples).all() or not np.any(samples):
        raise ValueError("speech is empty, silent or not finite")
    if len(samples) > MAX_DURATION_S * rate:
        raise ValueError(f"speech lasts {len(samples) / rate:.0f} s")
    # Louder than full scale would be clipped.
    peak = np.abs(samples).max()
    return (samples / max(peak, 1.0)).astype(np.float32), int(rate)


def write_audio(path: Path, samples: np.ndarray, rate: int, audio_format: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    soundfile.write(temporary, samples, rate, **FORMATS[audio_format])
    os.replace(temporary, path)


def open_for_appending(path: Path) -> int:
    """A descriptor; the rest of a line that a killed process left is cut off first."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def find_done(output: Path) -> tuple[set[int], float]:
    """Numbers of the sentences that are there already, and their seconds."""
    done, seconds = set(), 0.0
    for manifest in sorted(output.glob("shard-*/metadata.jsonl")):
        for line in manifest.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                row = json.loads(line)
                done.add(row["sentence"])
                seconds += row["duration_s"]
    return done, seconds


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on in a folder that was begun with another voice, text, seed or format."""
    before = json.loads(path.read_text()) if path.exists() else settings
    for name in FIXED:
        if before.get(name) != settings[name]:
            raise ValueError(
                f"{str(path.parent)!r} was begun with {name} {before.get(name)!r}, not {settings[name]!r}. "
                "Use another --output"
            )


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    # Asked to end, it ends as at Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
