#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Finds the cross-attention heads whose attention tells best when words were spoken, for `return_token_timestamps`.

    python training/find_alignment_heads.py --data FOLDER [--model FOLDER_OR_ID] [--output OUT] [--write]

Known times come from two sources: clips of DATA joined with silences between them, where the first word of each clip
starts where its speech does, in any language; and for English, word times of the forced aligner of pocketsphinx, if
it is installed (`pip install pocketsphinx`). An aligned clip counts only if its first word starts, and its last one
ends, where the energy of the speech does, to 150 and 250 ms; in the others aligner or transcript are mostly wrong.

Each (layer, head) is scored by itself on the clips' transcripts; then the best one is joined by the one that lowers
the error most, until none does. The error is the mean over words of |start - known start| plus half that of the
ends, in ms, each at most 500; aligned and joined clips count alike. DATA must not be what timestamps are reported on.

--output OUT    heads.json: the error of every head, the path of the choice, arguments and versions
--write         also sets `alignment_heads` in the generation_config.json of the model's folder
--settings N    instead tries N random [`AlignmentSettings`] with the model's own heads, and lists them by error
"""

import argparse
import dataclasses
import importlib.metadata
import json
import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_hf.alignment_mdm_asr import (
    AlignmentSettings,
    align_row,
    check_alignment_heads,
    frame_duration_s,
    token_attention,
)
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.evaluation_data_mdm_asr import load_data
from mdm_asr_hf.timing_mdm_asr import ForcedAligner, TimedSpeech, join_clips, speech_span
from mdm_asr_hf.transcript_mdm_asr import Word, group_words, token_texts

# An error is counted as no more than this: far away is wrong, however far.
LARGEST_S = 0.5
# A second head has to lower the error by this many ms.
LEAST_GAIN_MS = 0.2
NUM_CANDIDATES = 24
SETTINGS_GRID = {
    "smoothing_s": (0.06, 0.1, 0.14),
    "peak_weight": (0.0, 0.25, 0.5, 1.0, 2.0),
    "floor": (1e-3, 1e-2, 3e-2),
    "gap_cost": (1.0, 2.0, 3.0, 4.0, 6.0),
    "silence_cost": (0.0, 0.5, 1.0, 2.0),
    "silent_level": (0.1, 0.2, 0.3),
    "speech_level": (0.2, 0.3, 0.4, 0.5),
    "pause_s": (0.02, 0.04, 0.06, 0.1),
}


@dataclasses.dataclass
class Clip:
    """A recording with known times as the model sees it: attention (A, W, T) of all heads, features, token texts."""

    speech: TimedSpeech
    attention: torch.Tensor
    features: torch.Tensor
    frame_s: float
    duration_s: float
    pieces: list[str]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """What heads.json holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, manifest or name, as `mdm-asr evaluate` takes it")
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()), help="folder or id")
    parser.add_argument("--aligned", type=int, default=150, help="clips for the forced aligner; 0: joined clips only")
    parser.add_argument("--joined", type=int, default=50, help="recordings of --clips clips each")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--longest-s", type=float, default=18.0, help="longest recording used")
    parser.add_argument("--most-heads", type=int, default=8)
    parser.add_argument("--settings", type=int, default=0, metavar="N")
    parser.add_argument("--language", help="of the speech, for prompts with a place for it")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.write and not (Path(options.model) / "generation_config.json").is_file():
        parser.error(f"--write needs a folder with a generation_config.json, not {options.model!r}")

    model = AutoModelForSpeechSeq2Seq.from_pretrained(options.model).eval().to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    aligned, joined, counts = timed_speech(options, processor.feature_extractor.sampling_rate)
    print(f"{len(aligned)} aligned clips, {len(joined)} of joined clips; {dict(counts)}", file=sys.stderr)
    if not aligned and not joined:
        parser.error(f"--data {options.data}: no clip with known times")
    decoder = model.config.decoder_config
    heads = [
        (layer, head) for layer in range(decoder.num_hidden_layers) for head in range(decoder.num_attention_heads)
    ]
    groups = [
        [see(model, processor, speech, heads, options.language) for speech in group] for group in (aligned, joined)
    ]
    groups = [group for group in groups if group]

    def error_ms(chosen: list[int], settings: AlignmentSettings = AlignmentSettings()) -> float:  # noqa: B008
        return float(np.mean([group_error_ms(group, chosen, settings) for group in groups]))

    report = {
        "command": "python " + shlex.join(["training/find_alignment_heads.py", *(arguments or sys.argv[1:])]),
        "versions": {name: importlib.metadata.version(name) for name in ("mdm_asr_hf", "torch", "transformers")},
        "num_aligned": len(aligned),
        "num_joined": len(joined),
        "left_out": dict(counts),
    }
    if options.settings:
        own = check_alignment_heads(model.generation_config.alignment_heads, decoder)
        report["settings"] = try_settings(options, lambda settings: error_ms([heads.index(h) for h in own], settings))
        for trial in report["settings"][:10]:
            print(json.dumps(trial))
    else:
        report |= choose(heads, error_ms, options.most_heads)
        print(json.dumps(report["path"][-1]))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = "settings.json" if options.settings else "heads.json"
        (options.output / name).write_text(json.dumps(report, indent=1) + "\n")
    if options.write and not options.settings:
        path = Path(options.model) / "generation_config.json"
        config = json.loads(path.read_text())
        config["alignment_heads"] = report["path"][-1]["alignment_heads"]
        path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    return report


def timed_speech(options: argparse.Namespace, rate_hz: int) -> tuple[list[TimedSpeech], list[TimedSpeech], Counter]:
    """Aligned clips, recordings of joined clips, and how many clips were left out why."""
    data = load_data(options.data)
    order = list(range(len(data)))
    random.Random(options.seed).shuffle(order)
    aligner = None
    if options.aligned:
        try:
            aligner = ForcedAligner()
        except ImportError as error:
            print(f"{error} Joined clips only.", file=sys.stderr)
    aligned, pool, counts = [], [], Counter()
    for i in order:
        if len(pool) >= options.joined * options.clips and (aligner is None or len(aligned) >= options.aligned):
            break
        row = data.rows[i]
        text = row["text"].strip()
        if not text or row["duration_s"] > options.longest_s:
            counts["long or without text"] += 1
            continue
        samples = load_audio(data.clip(i), target_sampling_rate=rate_hz)
        if aligner is not None and len(aligned) < options.aligned and rate_hz == aligner.rate_hz:
            words = text.split()
            times_s = aligner.align(samples, words)
            if times_s is None:
                counts["not alignable"] += 1
                continue
            start_s, end_s = speech_span(samples, rate_hz)
            if abs(times_s[0][0] - start_s) > 0.15 or abs(times_s[-1][1] - end_s) > 0.25:
                counts["aligned outside the speech"] += 1
                continue
            starts_s, ends_s = map(list, zip(*times_s, strict=True))
            aligned.append(TimedSpeech(row["id"], samples, text, starts_s, ends_s))
        elif row["duration_s"] * options.clips < options.longest_s:
            pool.append((row["id"], samples, text))
        else:
            counts["too long to join"] += 1
    generator = np.random.default_rng(options.seed)
    joined = []
    for k in range(0, len(pool) - options.clips + 1, options.clips):
        names, clips, texts = zip(*pool[k : k + options.clips], strict=True)
        joined.append(join_clips(clips, texts, rate_hz, generator, name="+".join(names)))
    return aligned, joined[: options.joined], counts


@torch.no_grad()
def see(model: Any, processor: Any, speech: TimedSpeech, heads: list[tuple[int, int]], language: str | None) -> Clip:
    """Attention to a recording of the tokens of its own transcript."""
    rate_hz = processor.feature_extractor.sampling_rate
    slots = {} if language is None else {"language": language}
    inputs = processor(speech.samples, text=speech.text, sampling_rate=rate_hz, return_tensors="pt", **slots)
    labels, mask = inputs.pop("labels").to(model.device), inputs.pop("attention_mask").to(model.device)
    features = next(iter(inputs.values())).to(model.device)
    outputs = model.prepare_cross_attention(model.encode(features, mask))
    settings = model.generation_config
    template = settings.prompt_template or {"tokens": [model.config.decoder_start_token_id]}
    prompt_ids = mdm_asr_hf.prompt_mdm_asr.build_prompt_ids(template, 1, **slots).to(model.device)
    duration_s = model.audio_duration_s(features, mask)
    length = max(int(model.planned_tokens(duration_s, 1, settings)), labels.shape[1])
    attention = token_attention(model, labels, labels == labels, [length], prompt_ids, outputs, heads)[0]
    num_frames = attention.shape[-1] if outputs.attention_mask is None else int(outputs.attention_mask.sum())
    frame_s = frame_duration_s(model.config.encoder_config, model.config.input_frames_per_s)
    return Clip(
        speech,
        attention[..., :num_frames].half(),
        features[0, : int(mask.sum())].cpu(),
        frame_s or float(duration_s) / num_frames,
        float(duration_s),
        token_texts(processor.tokenizer, labels[0].tolist()),
    )


def group_error_ms(group: list[Clip], chosen: list[int], settings: AlignmentSettings) -> float:
    """Mean error of word starts plus half that of word ends, in ms, of some of the heads."""
    starts, ends = [], []
    for clip in group:
        times_s = align_row(
            clip.attention[chosen].float(), clip.frame_s, clip.duration_s, clip.features, settings=settings
        )
        found = word_times(group_words(clip.pieces, [1.0] * len(clip.pieces), times_s), clip.speech.text.split())
        for time_s, start_s, end_s in zip(found, clip.speech.starts_s, clip.speech.ends_s, strict=True):
            if start_s is not None:
                starts.append(min(abs(time_s[0] - start_s), LARGEST_S))
            if end_s is not None:
                ends.append(min(abs(time_s[1] - end_s), LARGEST_S))
    return 1000 * float(np.mean(starts) + 0.5 * np.mean(ends))


def word_times(words: list[Word], texts: list[str]) -> list[tuple[float, float]]:
    """
    Start and end of each blank-separated text. Of a language without blanks there are more words than texts: a text
    starts with the word its first character is in.
    """
    owners = [word for word in words for _ in word.text]
    if len(owners) != sum(map(len, texts)):
        raise ValueError(f"{texts!r:.80} does not come back from its tokens. Normalise the transcripts.")
    ends = np.cumsum([len(text) for text in texts])
    return [(owners[end - len(text)].start_s, owners[end - 1].end_s) for end, text in zip(ends, texts, strict=True)]


def choose(heads: list[tuple[int, int]], error_ms: Any, most_heads: int) -> dict[str, Any]:
    """Errors of the single heads, and the path of the greedy choice."""
    single = sorted((error_ms([i]), i) for i in range(len(heads)))
    chosen, path = [], []
    while len(chosen) < most_heads:
        candidates = [i for _, i in single[:NUM_CANDIDATES] if i not in chosen]
        error, best = min(((error_ms([*chosen, i]), i) for i in candidates), default=(np.inf, -1))
        if path and error > path[-1]["error_ms"] - LEAST_GAIN_MS:
            break
        chosen.append(best)
        path.append({"error_ms": round(error, 2), "alignment_heads": sorted(list(heads[i]) for i in chosen)})
        print(json.dumps(path[-1]), file=sys.stderr)
    return {"heads": [{"head": list(heads[i]), "error_ms": round(error, 2)} for error, i in single], "path": path}


def try_settings(options: argparse.Namespace, error_ms: Any) -> list[dict[str, Any]]:
    """The default settings and random ones, by rising error."""
    generator, trials, start = random.Random(options.seed), [], time.monotonic()
    for number in range(options.settings + 1):
        drawn = {name: generator.choice(values) for name, values in SETTINGS_GRID.items()} if number else {}
        settings = AlignmentSettings(**drawn)
        if settings.speech_level <= settings.silent_level:
            continue
        trials.append(
            {
                "error_ms": round(error_ms(settings), 2),
                "is_default": settings == AlignmentSettings(),
                **dataclasses.asdict(settings),
            }
        )
    print(f"{len(trials)} settings in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return sorted(trials, key=lambda trial: trial["error_ms"])


if __name__ == "__main__":
    main()
