#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
How often sounds without speech give a text, and how much speech the no-speech decision costs.

    python benchmarks/run_no_speech.py --data DIR1 DIR2 ... --recordings DIR3 ... --output OUT

200 made sounds (`sounds.py`), the files in the folders --recordings (sounds without speech, in subfolders by kind),
and of --data (folders with metadata.jsonl) all utterances as they are and a part of them in noise, made 40 dB quieter,
whispered, and cut to single words of up to 0.6 s, where the model's own timestamps put words that it is sure of.

Writes OUT/clips.jsonl with the probability, text and decoder evaluations of every clip, with and without the decision,
OUT/results.json and OUT/results.md.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import sounds
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.augmentation_mdm_asr import add_noise
from mdm_asr_hf.evaluation_mdm_asr import load_data
from mdm_asr_hf.no_speech_mdm_asr import no_speech_probability
from mdm_asr_hf.scoring_mdm_asr import count_errors, normaliser
from mdm_asr_hf.transcript_mdm_asr import group_words, token_texts

RATE_HZ = sounds.RATE_HZ
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
MAX_S = 15.0
LONGEST_WORD_S, SHORTEST_WORD_S, SURE_WORD = 0.6, 0.2, 0.9
NOISES = ("white", "pink", "fan", "typing", "piano_like", "applause", "murmur", "rainfall", "engine")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()))
    parser.add_argument("--data", nargs="*", default=[], help="folders of speech")
    parser.add_argument("--recordings", nargs="*", default=[], type=Path, help="folders of sounds without speech")
    parser.add_argument("--num_sounds", type=int, default=200)
    parser.add_argument("--part", type=int, default=60, help="utterances of each of --data in noise, and so on")
    parser.add_argument(
        "--decisions", action="store_true", help="decode only sounds that are taken for speech: many times as fast"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(argv)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.model, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(args.model)
    if model.generation_config.no_speech is None:
        raise SystemExit("This model's generation config has no `no_speech`. Fit it with training/fit_no_speech.py.")
    runner = Runner(model, processor, args.batch_size, args.decisions)
    rows = []
    made = [sounds.make(i) for i in range(args.num_sounds)]
    rows += runner.run([("made", kind, f"{kind} {i}", clip, None) for i, (kind, clip) in enumerate(made)])
    for folder in args.recordings:
        rows += runner.run(list(recordings(folder)))
    for folder in args.data:
        rows += runner.run(list(speech(folder, args.part, runner)))
        print(folder, len(rows), file=sys.stderr, flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {
        "groups": summarise(rows),
        "threshold": model.generation_config.no_speech["threshold"],
        "probe_ms_per_10_s": runner.time_probe(),
        "command": shlex.join(
            ["python", "benchmarks/run_no_speech.py", *(argv if argv is not None else sys.argv[1:])]
        ),
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = to_markdown(results)
    (args.output / "results.md").write_text(text)
    print(text)
    return 0


def recordings(folder: Path):
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in AUDIO_SUFFIXES:
            samples = load_audio(str(file), target_sampling_rate=RATE_HZ)
            for k, start in enumerate(range(0, max(len(samples) - RATE_HZ // 2, 1), int(MAX_S * RATE_HZ))):
                clip = samples[start : start + int(MAX_S * RATE_HZ)]
                kind = file.parent.relative_to(folder).as_posix()
                yield f"recorded: {folder.name}", file.stem if kind == "." else kind, f"{file.name} {k}", clip, None


def speech(folder: str, part: int, runner: "Runner"):
    data = load_data(folder)
    rng = np.random.default_rng(0)
    chosen = set(rng.permutation(len(data))[:part].tolist())
    for i in range(len(data)):
        clip, entry = load_audio(data.clip(i), target_sampling_rate=RATE_HZ), data.rows[i]
        yield "speech", data.name, entry["id"], clip, entry["text"]
        if i not in chosen:
            continue
        for snr_db in (10, 5, 0):
            kind = str(rng.choice(NOISES))
            noisy = add_noise(clip, sounds.KINDS[kind](len(clip), rng), snr_db)
            yield f"speech, {snr_db} dB SNR", data.name, f"{entry['id']} {kind}", noisy, entry["text"]
        yield "speech, 40 dB quieter", data.name, entry["id"], clip * np.float32(0.01), entry["text"]
        yield "speech, whispered", data.name, entry["id"], whispered(clip, rng), entry["text"]
        for word, cut in runner.short_words(clip):
            yield "single words of up to 0.6 s", data.name, entry["id"], cut, word


def whispered(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Linear prediction of 20 ms pieces, excited by noise instead of their residue."""
    size, hop, order = 400, 200, 16
    window, out = np.hanning(size + 1)[:-1], np.zeros(len(clip) + size)
    padded = np.pad(clip.astype(np.float64), (0, size))
    for start in range(0, len(clip), hop):
        piece = padded[start : start + size] * window
        r = np.correlate(piece, piece, "full")[size - 1 : size + order]
        if r[0] < 1e-9:
            continue
        matrix = r[np.abs(np.subtract.outer(np.arange(order), np.arange(order)))] + 1e-4 * r[0] * np.eye(order)
        a = np.linalg.solve(matrix, r[1:])
        shaped = sounds.lfilter([1], np.r_[1, -a], rng.standard_normal(size))
        out[start : start + size] += shaped * window * np.sqrt(r[0] / (np.square(shaped).sum() + 1e-12))
    return (0.05 * out[: len(clip)] / (np.abs(out).max() + 1e-9)).astype(np.float32)


class Runner:
    def __init__(self, model, processor, batch_size: int, only_decisions: bool = False):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.only_decisions = only_decisions
        self.settings = model.generation_config.no_speech
        if only_decisions and self.settings["confidence_weight"]:
            raise SystemExit("--decisions: this model's confidences have a say in the decision, so decode.")

    def run(self, clips: list[tuple]) -> list[dict]:
        order = sorted(range(len(clips)), key=lambda i: -len(clips[i][3]))
        rows = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            inputs = self.processor([clips[i][3] for i in batch], sampling_rate=RATE_HZ, return_tensors="pt")
            if self.only_decisions:
                for i, row in zip(batch, self.decide(inputs, [clips[i] for i in batch]), strict=True):
                    rows[i] = row
                continue
            gated = self.model.generate(**inputs, return_dict_in_generate=True)
            # Only what the decision emptied can differ without it.
            emptied = gated.no_speech > self.model.generation_config.no_speech["threshold"]
            plain = {}
            if emptied.any():
                outputs = {name: values[emptied] for name, values in inputs.items()}
                texts = self.processor.batch_decode(self.model.generate(**outputs, no_speech=None))
                plain = dict(zip(emptied.nonzero().flatten().tolist(), texts, strict=True))
            texts = self.processor.batch_decode(gated.sequences)
            for k, i in enumerate(batch):
                group, kind, name, clip, reference = clips[i]
                rows[i] = {
                    "group": group,
                    "kind": kind,
                    "id": name,
                    "duration_s": round(len(clip) / RATE_HZ, 3),
                    "no_speech": round(float(gated.no_speech[k]), 6),
                    "text": texts[k].strip(),
                    "text_without": plain.get(k, texts[k]).strip(),
                    "nfe": int(gated.nfe[k]),
                    "reference": reference,
                }
        return [rows[i] for i in range(len(clips))]

    def decide(self, inputs, clips: list[tuple]) -> list[dict]:
        """The same rows without texts, but of sounds that are taken for speech."""
        settings = self.model.generation_config
        has_signal, mask = self.model.find_speech(
            inputs["input_features"], inputs["attention_mask"], settings.min_duration_s
        )
        with torch.no_grad():
            encoded = self.model.encode(inputs["input_features"], mask)
        no_speech = no_speech_probability(encoded, self.settings).masked_fill(~has_signal, 1.0)
        rows = []
        for k, (group, kind, name, clip, reference) in enumerate(clips):
            text, is_empty = None, bool(no_speech[k] > self.settings["threshold"])
            if is_empty:
                text = ""
            elif reference is None:
                own = self.processor(clip, sampling_rate=RATE_HZ, return_tensors="pt")
                text = self.processor.batch_decode(self.model.generate(**own))[0].strip()
            rows.append(
                {
                    "group": group,
                    "kind": kind,
                    "id": name,
                    "duration_s": round(len(clip) / RATE_HZ, 3),
                    "no_speech": round(float(no_speech[k]), 6),
                    "text": text,
                    "text_without": None,
                    "nfe": 0 if is_empty else None,
                    "reference": reference,
                }
            )
        return rows

    def short_words(self, clip: np.ndarray, most: int = 4) -> list[tuple[str, np.ndarray]]:
        inputs = self.processor(clip, sampling_rate=RATE_HZ, return_tensors="pt")
        output = self.model.generate(
            **inputs, return_dict_in_generate=True, return_token_timestamps=True, no_speech=None
        )
        length = int((output.sequences[0] != self.model.config.eos_token_id).sum())
        pieces = token_texts(self.processor.tokenizer, output.sequences[0, :length].tolist())
        times = output.token_timestamps[0, :length].tolist()
        words = group_words(pieces, output.confidence[0, :length].tolist(), times)
        found = []
        for word in words:
            if word.confidence >= SURE_WORD and SHORTEST_WORD_S <= word.end_s - word.start_s <= LONGEST_WORD_S:
                found.append((word.text, clip[int(word.start_s * RATE_HZ) : int(word.end_s * RATE_HZ)]))
        return found[:most]

    def time_probe(self) -> float:
        inputs = self.processor(np.random.default_rng(0).standard_normal(10 * RATE_HZ), sampling_rate=RATE_HZ)
        with torch.no_grad():
            encoded = self.model.encode(torch.as_tensor(np.asarray(inputs["input_features"])))
        no_speech_probability(encoded, self.model.generation_config.no_speech)
        start = time.perf_counter()
        for _ in range(20):
            no_speech_probability(encoded, self.model.generation_config.no_speech)
        return round((time.perf_counter() - start) / 20 * 1e3, 3)


def summarise(rows: list[dict]) -> list[dict]:
    normalise = normaliser()
    result = []
    for group in dict.fromkeys(row["group"] for row in rows):
        for kind in ["all", *sorted({row["kind"] for row in rows if row["group"] == group})]:
            inside = [row for row in rows if row["group"] == group and kind in ("all", row["kind"])]
            one = {
                "group": group,
                "kind": kind,
                "clips": len(inside),
                "not_decoded": sum(r["nfe"] == 0 for r in inside),
            }
            if inside[0]["reference"] is None:
                for name, key in (("with_text", "text"), ("with_text_without_decision", "text_without")):
                    known = all(row[key] is not None for row in inside)
                    one[name] = sum(bool(normalise(row[key])) for row in inside) if known else None
                one["false_text_percent"] = round(100 * one["with_text"] / len(inside), 2)
            else:
                lost = [row for row in inside if row["text"] == "" and row["text_without"] != ""]
                one["lost"] = len(lost)
                one["lost_percent"] = round(100 * len(lost) / len(inside), 2)
                references = [normalise(row["reference"]) for row in inside]
                words = count_errors(references, references)[:, 3]
                one["lost_words_percent"] = round(
                    100 * sum(w for w, row in zip(words, inside, strict=True) if row in lost) / max(words.sum(), 1), 2
                )
                for name, key in (("wer", "text"), ("wer_without_decision", "text_without")):
                    if any(row[key] is None for row in inside):
                        one[name] = None
                        continue
                    errors = count_errors(references, [normalise(row[key]) for row in inside])
                    one[name] = round(100 * errors[:, :3].sum() / max(errors[:, 3].sum(), 1), 2)
            result.append({k: v if not isinstance(v, np.generic) else v.item() for k, v in one.items()})
    return result


def to_markdown(results: dict) -> str:
    lines = [
        "| sounds without speech | clips | with a text | without the decision | false texts % | not decoded |",
        "|---|---|---|---|---|---|",
    ]
    for one in results["groups"]:
        if "with_text" in one:
            name = one["group"] if one["kind"] == "all" else f"- {one['kind']}"
            cells = (one["clips"], one["with_text"], one["with_text_without_decision"], one["false_text_percent"])
            lines.append(f"| {name} | {' | '.join(map(str, cells))} | {one['not_decoded']} |")
    lines += [
        "",
        "| speech | clips | lost | lost % | lost words % | WER % | WER % without the decision |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results["groups"]:
        if "lost" in one:
            name = one["group"] if one["kind"] == "all" else f"- {one['kind']}"
            keys = ("clips", "lost", "lost_percent", "lost_words_percent", "wer", "wer_without_decision")
            lines.append(f"| {name} | {' | '.join(str(one[key]) for key in keys)} |")
    lines += [
        "",
        f"The probe takes {results['probe_ms_per_10_s']} ms for 10 s.",
        "",
        "```",
        results["command"],
        "```",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
