#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures long recordings, made of clips whose transcripts are known.

    python benchmarks/run_long.py lengths --data DIR --output OUT      # WER by the length of a single window
    python benchmarks/run_long.py joined --data DIR --output OUT       # WER of joined files beside their clips' own
    python benchmarks/run_long.py memory --data DIR --output OUT       # memory and time of a recording of three hours

DIR is an audiofolder: audio files and a metadata.jsonl with `file_name` and `text` per line. Every command writes
OUT/raw.jsonl (the run, and every text beside its reference), OUT/results.json and OUT/results.md; `--rescore OUT`
makes the latter two again from the first.
"""

import argparse
import json
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("mdm_asr_hf", "transformers", "torch", "numpy", "soundfile", "soxr", "jiwer")
RATE_HZ = 16_000
# Between the clips in a window of a given length.
PAUSE_S = 0.2


# Recordings


def read_clips(data: Path) -> list[dict[str, Any]]:
    """The clips of a folder: `id`, `group` (who speaks, or which corpus it is of), `text`, `path`, `duration_s`."""
    import soundfile

    path = data / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"`--data` {str(data)!r} has no metadata.jsonl. Pass an audiofolder, see --help.")
    clips = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        audio = data / entry["file_name"]
        clips.append(
            {
                "id": entry["file_name"],
                "group": str(entry.get("corpus") or entry.get("speaker_id") or ""),
                "text": entry["text"],
                "path": audio,
                "duration_s": entry.get("duration_s") or soundfile.info(audio).duration,
            }
        )
    return clips


def join(
    clips: list[dict[str, Any]], pauses_s: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """
    Samples (N,) of clips one after the other, with pauses between them drawn from a range, and when each begins and
    ends. A pause holds the noise of the clip before, looped, since digital silence would be easy to find.
    """
    from mdm_asr_hf.audio_mdm_asr import load_audio

    parts, times_s, position = [], [], 0
    for i, clip in enumerate(clips):
        samples = load_audio(clip["path"], target_sampling_rate=RATE_HZ)
        parts.append(samples)
        times_s.append((position / RATE_HZ, (position + len(samples)) / RATE_HZ))
        position += len(samples)
        num_pause = round(rng.uniform(*pauses_s) * RATE_HZ) if i + 1 < len(clips) else 0
        if num_pause:
            parts.append(room_noise(samples, num_pause, rng))
            position += num_pause
    return np.concatenate(parts), times_s


def room_noise(samples: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of the level of a clip's quietest tenth of a second."""
    size = min(RATE_HZ // 10, len(samples))
    power = np.convolve(samples.astype(np.float64) ** 2, np.ones(size) / size, mode="valid")
    return (rng.standard_normal(num_samples) * np.sqrt(max(power.min(), 0.0))).astype(np.float32)


def choose(
    clips: list[dict[str, Any]], max_clip_s: float, total_s: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Clips of at most `max_clip_s`, of `total_s` together, those of one group one after the other."""
    chosen, lasted_s = [], 0.0
    for k in rng.permutation(len(clips)).tolist():
        if clips[k]["duration_s"] <= max_clip_s and lasted_s < total_s:
            chosen.append(clips[k])
            lasted_s += clips[k]["duration_s"]
    return sorted(chosen, key=lambda clip: clip["group"])


def pack(clips: list[dict[str, Any]], length_s: float, pause_s: float) -> list[list[dict[str, Any]]]:
    """The clips in lists of one group each that last `length_s` at most, pauses included."""
    lists: list[list[dict[str, Any]]] = []
    lasted_s = 0.0
    for clip in clips:
        lasted_s += pause_s + clip["duration_s"]
        if not lists or lists[-1][-1]["group"] != clip["group"] or lasted_s > length_s:
            lists.append([])
            lasted_s = clip["duration_s"]
        lists[-1].append(clip)
    return lists


# Measurements


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers.utils import logging

    from mdm_asr_hf import default_checkpoint
    from mdm_asr_hf.loading import load_model

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_model(arguments.model or str(default_checkpoint()), arguments.device, False)


def measure_lengths(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same clips in windows of each length, every window decoded at once."""
    import torch

    model, processor = load(arguments)
    rng = np.random.default_rng(arguments.seed)
    clips = choose(read_clips(arguments.data), min(arguments.lengths), arguments.seconds, rng)
    for length_s in arguments.lengths:
        rows = []
        for chosen in pack(clips, length_s, PAUSE_S):
            samples, _ = join(chosen, (PAUSE_S, PAUSE_S), np.random.default_rng(arguments.seed))
            rows.append(([clip["id"] for clip in chosen], " ".join(clip["text"] for clip in chosen), samples))
        rows.sort(key=lambda row: -len(row[2]))
        for start in range(0, len(rows), arguments.batch_size):
            batch = rows[start : start + arguments.batch_size]
            inputs = processor([samples for _, _, samples in batch], sampling_rate=RATE_HZ).to(model.device)
            mask = inputs["attention_mask"]
            with torch.no_grad():
                outputs = model.encode(inputs["input_features"], mask)
            for steps in arguments.steps or [model.generation_config.max_denoising_steps]:
                begin = time.perf_counter()
                output = model.generate(
                    **inputs,
                    encoder_outputs=model.prepare_cross_attention(outputs),
                    max_denoising_steps=steps,
                    return_dict_in_generate=True,
                )
                seconds = (time.perf_counter() - begin) / len(batch)
                texts = processor.batch_decode(output.sequences)
                for (ids, reference, samples), text, nfe in zip(batch, texts, output.nfe.tolist(), strict=True):
                    yield {
                        "kind": "window",
                        "length_s": length_s,
                        "steps": steps,
                        "clips": ids,
                        "duration_s": len(samples) / RATE_HZ,
                        "reference": reference,
                        "hypothesis": text,
                        "nfe": nfe,
                        "decoder_s": seconds,
                    }


def measure_joined(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The clips one by one, then the same clips as files."""
    from mdm_asr_hf.transcribe.transcriber import Transcriber

    model, processor = load(arguments)
    clips = read_clips(arguments.data)
    rng = np.random.default_rng(arguments.seed)
    order = rng.permutation(len(clips))[: arguments.files * arguments.clips_per_file]
    files = [
        [clips[k] for k in order[start : start + arguments.clips_per_file]]
        for start in range(0, len(order), arguments.clips_per_file)
    ]
    settings = model.generation_config
    if arguments.steps:
        settings.max_denoising_steps = arguments.steps[0]

    def transcriber(**options) -> Transcriber:
        return Transcriber(
            model,
            processor,
            settings=settings,
            batch_size=arguments.batch_size,
            **{"max_window_s": arguments.window_s, **options},
        )

    def texts_of(name: str, one: Transcriber, audios: list, references: list[tuple[Any, str]]) -> Iterator[dict]:
        begin = time.perf_counter()
        for i, result in one.transcribe_all(audios, sampling_rate=RATE_HZ):
            if isinstance(result, ValueError):
                raise result
            yield {
                "kind": "file",
                "system": name,
                "id": references[i][0],
                "duration_s": result.duration_s,
                "reference": references[i][1],
                "hypothesis": result.text,
                "nfe": result.nfe,
                "windows": len(result.segments),
                "decoded_s": sum(s.end_s - s.start_s for s in result.segments),
                "warnings": result.warnings,
                "since_start_s": time.perf_counter() - begin,
            }

    every = [clip for file in files for clip in file]
    references = [(clip["id"], clip["text"]) for clip in every]
    paths = [clip["path"] for clip in every]
    whole = transcriber(max_window_s=processor.feature_extractor.max_duration_s)
    yield from texts_of("the clips, each as one window", whole, paths, references)
    yield from texts_of("the clips", transcriber(), paths, references)
    for pauses_s in ((0.2, 1.5), (0.0, 0.0)):
        joined = [join(file, pauses_s, np.random.default_rng(arguments.seed))[0] for file in files]
        references = [("+".join(c["id"] for c in file), " ".join(c["text"] for c in file)) for file in files]
        pause = "pauses of 0.2 to 1.5 s" if pauses_s[1] else "no pauses"
        for vad in arguments.vad:
            yield from texts_of(f"joined, {pause}, vad={vad}", transcriber(vad=vad), joined, references)


def measure_memory(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A stereo file of 44.1 kHz, of the clips in a loop, by the path of a user."""
    import soundfile
    import soxr

    from mdm_asr_hf.evaluate.evaluation import peak_memory_mib
    from mdm_asr_hf.transcribe.transcriber import Transcriber

    clips = read_clips(arguments.data)[: arguments.clips_per_file]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        rng = np.random.default_rng(arguments.seed)
        samples, _ = join(clips, (0.2, 1.5), rng)
        stereo = np.stack([soxr.resample(samples, RATE_HZ, 44_100)] * 2, axis=1)
        references = []
        with soundfile.SoundFile(path, "w", 44_100, 2, "PCM_16") as file:
            while file.frames < arguments.hours * 3600 * 44_100:
                file.write(stereo)
                references.append(" ".join(clip["text"] for clip in clips))
        num_bytes, duration_s = path.stat().st_size, file.frames / 44_100
        del samples, stereo
        # What making the file took is no part of it.
        start_mib = peak_memory_mib("cpu")
        model, processor = load(arguments)
        settings = model.generation_config
        if arguments.steps:
            settings.max_denoising_steps = arguments.steps[0]
        if arguments.gamma is not None:
            settings.sampler["gamma"] = arguments.gamma
        transcriber = Transcriber(
            model, processor, settings=settings, batch_size=arguments.batch_size, max_window_s=arguments.window_s
        )
        loaded_mib = peak_memory_mib("cpu")
        begin, done_s, shown_s = time.perf_counter(), 0.0, 0.0

        def on_progress(seconds: float) -> None:
            nonlocal done_s, shown_s
            done_s += seconds
            if done_s - shown_s >= 600:
                shown_s = done_s
                print(f"{done_s:.0f} s done, {peak_memory_mib('cpu'):.0f} MiB", file=sys.stderr, flush=True)

        ((_, result),) = transcriber.transcribe_all([path], on_progress)
        if isinstance(result, ValueError):
            raise result
        yield {
            "kind": "memory",
            "duration_s": duration_s,
            "file_bytes": num_bytes,
            "steps": settings.max_denoising_steps,
            "sampler": settings.sampler,
            "window_s": transcriber.max_window_s,
            "vad": getattr(transcriber.vad, "name", "none"),
            "windows": len(result.segments),
            "words": len(result.words),
            "seconds": time.perf_counter() - begin,
            "reported_s": done_s,
            "peak_before_loading_mib": start_mib,
            "peak_loaded_mib": loaded_mib,
            "peak_mib": peak_memory_mib("cpu"),
            "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "reference": " ".join(references),
            "hypothesis": result.text,
        }


# Results


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of the rows of raw.jsonl."""
    from mdm_asr_hf.evaluate.scoring import count_errors, normaliser

    normalise = normaliser("en")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        name = {
            "window": lambda row: f"up to {row['length_s']:g} s, {row['steps']} steps",
            "file": lambda row: row["system"],
            "memory": lambda row: f"{row['duration_s'] / 3600:.2f} h",
        }[row["kind"]](row)
        groups.setdefault(name, []).append(row)
    results = {}
    for name, group in groups.items():
        errors = count_errors(
            [normalise(row["reference"]) for row in group], [normalise(row["hypothesis"]) for row in group]
        )
        substituted, deleted, inserted, words = errors.sum(axis=0).tolist()
        result = {
            "recordings": len(group),
            "duration_s": round(sum(row["duration_s"] for row in group), 1),
            "words": words,
            "wer": round(100 * (substituted + deleted + inserted) / max(words, 1), 2),
            "deleted": round(100 * deleted / max(words, 1), 2),
            "inserted": round(100 * inserted / max(words, 1), 2),
        }
        for key in ("nfe", "windows"):
            if key in group[0]:
                result[key] = round(sum(row[key] for row in group) / len(group), 2)
        if group[0]["kind"] == "memory":
            result |= {k: v for k, v in group[0].items() if k not in ("kind", "reference", "hypothesis", "duration_s")}
            result["rtfx"] = round(group[0]["duration_s"] / group[0]["seconds"], 2)
        results[name] = result
    return results


def write_results(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "raw.jsonl").read_text(encoding="utf-8").splitlines()]
    results = summarise(rows)
    (output / "results.json").write_text(json.dumps({"run": rows[0], "results": results}, indent=1) + "\n")
    lines = ["| | " + " | ".join(next(iter(results.values()))) + " |"]
    lines.append("|---" * (1 + len(next(iter(results.values())))) + "|")
    for name, result in results.items():
        lines.append(f"| {name} | " + " | ".join(str(value) for value in result.values()) + " |")
    text = "\n".join(lines) + f"\n\n`{rows[0]['command']}`\n"
    (output / "results.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("lengths", "joined", "memory"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rescore", type=Path, metavar="OUT")
    parser.add_argument("--model", help="a checkpoint; default: the one in the package")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="default: the checkpoint's")
    parser.add_argument("--gamma", type=float, help="memory: of the sampler")
    parser.add_argument("--lengths", type=float, nargs="+", default=[5, 7, 8, 10, 12, 16, 20, 28])
    parser.add_argument("--seconds", type=float, default=300, help="lengths: of the clips together")
    parser.add_argument("--window-s", type=float, help="joined, memory: longest window; default: the checkpoint's")
    parser.add_argument("--files", type=int, default=10, help="joined: number of files")
    parser.add_argument("--clips-per-file", type=int, default=20)
    parser.add_argument("--vad", nargs="+", default=["silero", "energy", "none"], help="joined: each in turn")
    parser.add_argument("--hours", type=float, default=3.0, help="memory: of the recording")
    arguments = parser.parse_args()
    if arguments.rescore:
        write_results(arguments.rescore)
        return
    if not (arguments.what and arguments.data and arguments.output):
        parser.error("what to measure, --data and --output are needed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = {
        "kind": "run",
        "command": "python " + shlex.join(["benchmarks/run_long.py", *sys.argv[1:]]),
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": platform.processor() or platform.machine(),
    }
    measure = {"lengths": measure_lengths, "joined": measure_joined, "memory": measure_memory}[arguments.what]
    with open(arguments.output / "raw.jsonl", "w", encoding="utf-8") as file:
        print(json.dumps(run), file=file, flush=True)
        for row in measure(arguments):
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    write_results(arguments.output)


if __name__ == "__main__":
    main()
