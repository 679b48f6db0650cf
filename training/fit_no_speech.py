#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Fits the decision that nothing was said, see `no_speech_mdm_asr`: a linear probe on the encoder's frames, and how much
the confidences of what was decoded count beside it.

    python training/fit_no_speech.py --speech DIR1 DIR2 --recordings DIR3 --output OUT [--write]

--speech: folders with metadata.jsonl. Every utterance is heard under one condition: as it is, in noise, in a room,
quiet, whispered, by telephone, cut to a word's length, or within a longer stretch of noise. Their pauses, as
silero-vad finds them (if it is installed), are non-speech.
--recordings: folders of real sounds without speech, also in subfolders by kind (optional).
Besides, sounds made by formulas (`non_speech.py`).

What the probe gives is judged on data of kinds and utterances it was not fitted on. Writes OUT/report.json,
OUT/windows.npz (with `--reuse`, taken from there) and OUT/decoded.jsonl; `--write` stores the result in the
checkpoint's generation_config.json.
"""

import argparse
import importlib.util
import json
import shlex
import sys
import zlib
from pathlib import Path

import non_speech
import numpy as np
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.augmentation_mdm_asr import add_noise, add_room, change_speed
from mdm_asr_hf.evaluation_mdm_asr import load_data
from mdm_asr_hf.no_speech_mdm_asr import surest_tokens, window_means

RATE_HZ = 16000
# Half a second, which a short word fills, every tenth of a second.
WINDOW_S, STEP_S = 0.5, 0.1
CONDITIONS = {
    "clean": 0.2,
    "noisy": 0.27,
    "room": 0.1,
    "quiet": 0.05,
    "whispered": 0.1,
    "telephone": 0.05,
    "short": 0.12,
    "within noise": 0.11,
}
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
# Of log-odds: where what was decoded may change the decision, and so is looked at.
DOUBTFUL = (-4.0, 8.0)
NUM_FOLDS = 4
# For the maximum over windows, a soft one, so that several windows learn.
SHARPNESS = 2.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(mdm_asr_hf.default_checkpoint()), help="default: the package's")
    parser.add_argument("--speech", required=True, nargs="+", help="folders or manifests")
    parser.add_argument("--recordings", nargs="*", default=[], type=Path, help="folders of sounds without speech")
    parser.add_argument("--limit", type=int, help="utterances of each of --speech at most")
    parser.add_argument("--num_made", type=int, default=2000, help="sounds made by formulas")
    parser.add_argument("--crops", type=int, default=4, help="how often each of --recordings is heard")
    parser.add_argument("--quick", action="store_true", help="fit once, on three quarters, and judge on the rest")
    parser.add_argument("--max_doubtful", type=int, help="doubtful clips that are decoded at most, drawn by seed")
    parser.add_argument("--penalty", type=float, default=0.01, help="on the squares of the probe's weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--write", action="store_true", help="store the result in the checkpoint")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.model, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(args.model)
    sounds = Sounds(args)
    frames_per_s = encoder_frames_per_s(model, processor)
    sizes = round(WINDOW_S * frames_per_s), round(STEP_S * frames_per_s)
    windows, owners = encode(args, model, processor, sounds, sizes)

    labels = np.array([kind.startswith("speech") for kind in sounds.kinds], dtype=np.float64)
    scores, folds = np.full(len(labels), np.nan), np.array([sounds.fold(i) for i in range(len(labels))])
    for fold in range(1 if args.quick else NUM_FOLDS):
        weights, bias = fit_probe(windows, owners, labels, folds != fold, args.penalty)
        scores = np.where(folds == fold, highest(windows @ weights + bias, owners), scores)
    decoded = decode(args, model, processor, sounds, scores)
    confidence_weight, confidence_offset = fit_confidence(scores, decoded, labels)
    if not args.quick:
        weights, bias = fit_probe(windows, owners, labels, np.ones(len(labels), dtype=bool), args.penalty)
    both = scores + confidence_weight * np.array([decoded.get(i, confidence_offset) for i in range(len(scores))])
    both -= confidence_weight * confidence_offset
    held_out = judge(sounds.kinds, labels, scores, both)
    fitted = confidence_weight, confidence_offset
    gain = [
        one["wrong_by_probe"] - one["wrong_by_both"] for one in (held_out["all speech"], held_out["all non-speech"])
    ]
    if min(gain) < 0 or max(gain) == 0:
        # Where they cost speech, the confidences have no say.
        confidence_weight = confidence_offset = 0.0
    no_speech = {
        "weights": [round(float(one), 4) for one in weights],
        "bias": round(float(bias), 4),
        "window_frames": sizes[0],
        "step_frames": sizes[1],
        "confidence_weight": confidence_weight,
        "confidence_offset": confidence_offset,
        "threshold": 0.5,
    }
    report = {
        "held_out": held_out,
        "fitted_confidence_weight_and_offset": fitted,
        "no_speech": no_speech,
        "num_doubtful": len(decoded),
        "command": shlex.join(["python", "training/fit_no_speech.py", *(argv if argv is not None else sys.argv[1:])]),
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(held_out, indent=1), fitted, confidence_weight)
    if args.write:
        file = Path(args.model) / "generation_config.json"
        config = json.loads(file.read_text()) | {"no_speech": no_speech}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return 0


class Sounds:
    """The clips to fit on, by index: each is made anew when it is asked for, always the same."""

    def __init__(self, args: argparse.Namespace):
        self.seed, self.items, self.cached_pauses = args.seed, [], {}
        files = [
            (f"recorded {file.parent.name}", file)
            for folder in args.recordings
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in AUDIO_SUFFIXES
        ]
        self.recordings = [load_audio(str(file), target_sampling_rate=RATE_HZ) for _, file in files]
        for path in args.speech:
            data = load_data(path)
            chosen = np.random.default_rng(args.seed).permutation(len(data))[: args.limit or len(data)]
            for k in sorted(chosen.tolist()):
                self.items.append((f"speech {self._draw_condition(len(self.items))}", data.rows[k]["id"], data, k))
            if importlib.util.find_spec("silero_vad"):
                for k in chosen[: len(chosen) // 2].tolist():
                    for start, end in pauses(load_audio(data.clip(k), target_sampling_rate=RATE_HZ)):
                        self.items.append(("pause", data.rows[k]["id"], data, (k, start, end)))
        for i in range(args.num_made):
            kind = list(non_speech.KINDS)[i % len(non_speech.KINDS)]
            self.items.append((f"made {kind}", str(i), None, kind))
        for turn in range(args.crops):
            for k, (kind, file) in enumerate(files):
                self.items.append((kind, file.name, None, (k, turn)))
        self.kinds = [kind for kind, *_ in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def fold(self, i: int) -> int:
        """Speech and pauses are left out by utterance, other sounds a whole kind at a time."""
        kind, name, data, _ = self.items[i]
        return zlib.crc32((name if data is not None else kind).encode()) % NUM_FOLDS

    def _draw_condition(self, i: int) -> str:
        return str(np.random.default_rng([self.seed, i, 1]).choice(list(CONDITIONS), p=list(CONDITIONS.values())))

    def __getitem__(self, i: int) -> np.ndarray:
        kind, _, data, place = self.items[i]
        rng = np.random.default_rng([self.seed, i, 2])
        if kind == "pause":
            k, start, end = place
            return load_audio(data.clip(k), target_sampling_rate=RATE_HZ)[start:end]
        if data is not None:
            samples = load_audio(data.clip(place), target_sampling_rate=RATE_HZ)
            return self._under(kind.removeprefix("speech "), samples, rng)
        if kind.startswith("made"):
            return non_speech.make(place, int(RATE_HZ * 10 ** rng.uniform(-0.5, 1.18)), rng)
        k, turn = place
        samples = self.recordings[k]
        if turn:
            size = int(RATE_HZ * 10 ** rng.uniform(-0.4, 0.7))
            start = int(rng.integers(max(1, len(samples) - size)))
            samples = samples[start : start + size] if np.any(samples[start : start + size]) else samples
            samples = samples * 10 ** (rng.uniform(-30, 0) / 20)
            if rng.random() < 0.3:
                samples = change_speed(samples, rng.uniform(0.8, 1.25))
        return samples.astype(np.float32)

    def _noise(self, size: int, rng: np.random.Generator) -> np.ndarray:
        if self.recordings and rng.random() < 0.35:
            samples = self.recordings[int(rng.integers(len(self.recordings)))]
            start = int(rng.integers(max(1, len(samples) - size)))
            return np.resize(samples[start : start + size], size)
        return non_speech.make(str(rng.choice(list(non_speech.KINDS))), size, rng)

    def _under(self, condition: str, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if condition == "noisy":
            samples = add_noise(samples, self._noise(len(samples), rng), rng.uniform(-2, 20))
        elif condition == "room":
            samples = add_room(samples, RATE_HZ, rng, rt60_s=rng.uniform(0.2, 0.9), drr_db=rng.uniform(-6, 8))
        elif condition == "quiet":
            samples = samples * 10 ** (-rng.uniform(20, 45) / 20)
        elif condition == "whispered":
            samples = whisper(samples, rng)
        elif condition == "telephone":
            spectrum, frequencies = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / RATE_HZ)
            spectrum[(frequencies < 300) | (frequencies > 3400)] = 0
            samples = np.fft.irfft(spectrum, len(samples))
        elif condition == "short":
            samples = loud_part(samples, int(rng.uniform(0.25, 0.6) * RATE_HZ), rng)
        elif condition == "within noise":
            samples = loud_part(samples, int(rng.uniform(0.8, 3) * RATE_HZ), None)
            around = int(rng.uniform(2, 8) * RATE_HZ)
            noise = self._noise(around + len(samples), rng)
            noise *= np.std(samples) * 10 ** (-rng.uniform(5, 30) / 20) / (np.std(noise) + 1e-9)
            start = int(rng.integers(around))
            noise[start : start + len(samples)] += samples
            samples = noise
        if rng.random() < 0.3:
            samples = samples * 10 ** (rng.uniform(-25, 0) / 20)
        return (samples / max(1.0, np.abs(samples).max(initial=0))).astype(np.float32)


def loud_part(samples: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """`size` samples where the clip is loudest, or drawn from the louder third of places."""
    if len(samples) <= size:
        return samples
    power = np.convolve(np.square(samples, dtype=np.float64), np.ones(size), "valid")[:: RATE_HZ // 100]
    loudest = np.flatnonzero(power >= np.quantile(power, 0.7))
    start = RATE_HZ // 100 * int(power.argmax() if rng is None else rng.choice(loudest))
    return samples[start : start + size]


def whisper(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip without its voice: noise through each frame's spectral envelope, smoothed by cepstrum."""
    size, hop, kept = 400, 100, 22
    window, padded = np.hanning(size), np.pad(samples, (size, size))
    noise, out = rng.standard_normal(len(padded)), np.zeros(len(padded))
    for start in range(0, len(padded) - size, hop):
        log_spectrum = np.log(np.abs(np.fft.rfft(padded[start : start + size] * window, 512)) + 1e-6)
        cepstrum = np.fft.irfft(log_spectrum)
        cepstrum[kept : 1 - kept] = 0
        excitation = np.fft.rfft(noise[start : start + size] * window, 512)
        shaped = np.fft.irfft(excitation / np.abs(excitation).mean() * np.exp(np.fft.rfft(cepstrum).real))
        out[start : start + size] += shaped[:size] * window
    out = out[size:-size]
    return 0.1 * out / (np.abs(out).max(initial=0) + 1e-9)


_vad = None


def pauses(samples: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of at least 0.35 s in which silero-vad hears nothing, at a low threshold and with a margin."""
    global _vad
    from silero_vad import get_speech_timestamps, load_silero_vad

    _vad = _vad or load_silero_vad()
    _vad.reset_states()
    spoken = get_speech_timestamps(
        torch.from_numpy(samples), _vad, threshold=0.2, min_speech_duration_ms=60, speech_pad_ms=60
    )
    edges = [0, *(edge for one in spoken for edge in (one["start"], one["end"])), len(samples)]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= 0.35 * RATE_HZ]


def encoder_frames_per_s(model, processor) -> float:
    second = processor(np.random.default_rng(0).standard_normal(10 * RATE_HZ) * 0.1, sampling_rate=RATE_HZ)
    with torch.no_grad():
        frames = model.encode(torch.as_tensor(np.asarray(second["input_features"]))).last_hidden_state
    return round(frames.shape[1] / 10)


def encode(args, model, processor, sounds: Sounds, sizes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Windows (N, D) of all clips, and the clip each belongs to (N,)."""
    file = args.output / "windows.npz"
    if args.reuse and file.exists():
        held = np.load(file)
        return held["windows"].astype(np.float32), held["owners"]
    windows, owners = [], []
    for i in range(len(sounds)):
        inputs = processor(sounds[i], sampling_rate=RATE_HZ, return_tensors="pt")
        _, mask = model.find_speech(inputs["input_features"], inputs["attention_mask"], 0.0)
        with torch.no_grad():
            frames = model.encode(inputs["input_features"], mask).last_hidden_state
        means = window_means(frames, torch.tensor([frames.shape[1]]), *sizes)[0]
        windows.append(means.half().numpy())
        owners.append(np.full(len(means), i))
    windows, owners = np.concatenate(windows), np.concatenate(owners)
    np.savez(file, windows=windows, owners=owners)
    return windows.astype(np.float32), owners


def highest(evidence: np.ndarray, owners: np.ndarray) -> np.ndarray:
    result = np.full(owners.max() + 1, -np.inf)
    np.maximum.at(result, owners, evidence)
    return result


def fit_probe(
    windows: np.ndarray, owners: np.ndarray, labels: np.ndarray, used: np.ndarray, penalty: float
) -> tuple[np.ndarray, float]:
    """Logistic regression of clips on the soft maximum over their windows."""
    inside = used[owners]
    places = torch.from_numpy((np.cumsum(used) - 1)[owners[inside]])
    inputs = torch.from_numpy(windows[inside])
    centre, spread = inputs.mean(dim=0), inputs.std(dim=0) + 1e-4
    inputs = (inputs - centre) / spread
    targets = torch.from_numpy(labels[used]).float()
    weights, bias = torch.zeros(inputs.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        evidence = SHARPNESS * (inputs @ weights + bias)
        top = torch.full((len(targets),), -torch.inf).scatter_reduce(0, places, evidence.detach(), "amax")
        total = torch.zeros(len(targets)).scatter_add(0, places, (evidence - top[places]).exp())
        pooled = (top + total.log()) / SHARPNESS
        loss = torch.nn.functional.binary_cross_entropy_with_logits(pooled, targets)
        loss = loss + penalty * weights.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    scaled = (weights / spread).detach()
    return scaled.numpy(), float(bias.detach() - (centre * scaled).sum())


def decode(args, model, processor, sounds: Sounds, scores: np.ndarray) -> dict[int, float]:
    """How sure the surest tokens are of the doubtful clips that give any text."""
    file = args.output / "decoded.jsonl"
    known = {}
    if args.reuse and file.exists():
        known = {row["index"]: row for row in map(json.loads, file.read_text().splitlines())}
    doubtful = [i for i, score in enumerate(scores) if DOUBTFUL[0] < score < DOUBTFUL[1]]
    if args.max_doubtful and args.max_doubtful < len(doubtful):
        doubtful = sorted(np.random.default_rng(args.seed).permutation(doubtful)[: args.max_doubtful].tolist())
    for i in doubtful:
        if i in known:
            continue
        inputs = processor(sounds[i], sampling_rate=RATE_HZ, return_tensors="pt")
        output = model.generate(
            **inputs,
            return_dict_in_generate=True,
            no_speech=None,
            confidence_temperature=1.0,
            confidence_bias=0.0,
            confidence_context={"mean": 0.0, "pace": 0.0},
        )
        is_text = (output.confidence > 0) & (output.sequences != model.config.eos_token_id)
        known[i] = {
            "index": i,
            "kind": sounds.kinds[i],
            "score": round(float(scores[i]), 3),
            "surest": float(surest_tokens(output.confidence, is_text)[0]) if is_text.any() else None,
            "text": processor.batch_decode(output.sequences)[0],
        }
    file.write_text("".join(json.dumps(known[i]) + "\n" for i in sorted(known)))
    return {i: known[i]["surest"] for i in doubtful if known[i]["surest"] is not None}


def fit_confidence(scores: np.ndarray, decoded: dict[int, float], labels: np.ndarray) -> tuple[float, float]:
    """Weight and offset of the surest tokens beside the probe, whose own weight stays 1."""
    indices = np.array(sorted(decoded))
    probe, surest = scores[indices], np.array([decoded[i] for i in indices])
    signs = 2 * labels[indices] - 1
    # Both classes count alike, whatever their number among the doubtful.
    shares = np.where(signs > 0, 0.5 / (signs > 0).sum(), 0.5 / (signs < 0).sum())

    values = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")
    probe, surest, signs, shares = map(torch.from_numpy, (probe, surest, signs, shares))

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        log_odds = probe + values[0] * (surest - values[1])
        loss = -(shares * torch.nn.functional.logsigmoid(signs * log_odds)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight, offset = values.tolist()
    return round(max(weight, 0.0), 3), round(offset, 3)


def judge(kinds: list[str], labels: np.ndarray, probe: np.ndarray, both: np.ndarray) -> dict:
    """Per kind: clips, and the share judged wrong by the probe alone and with the confidences, in per cent. Speech of
    a word's length and of recordings is listed, so that a sum hides nothing."""
    kinds = np.array(kinds)
    result = {}
    # What the probe judges to be no speech is not decoded.
    both = np.where(probe < 0, probe, both)
    for kind in [*sorted(set(kinds)), "all speech", "all non-speech"]:
        inside = kinds == kind
        if kind.startswith("all"):
            inside = labels == (kind == "all speech")
        inside &= ~np.isnan(probe)
        if not inside.any():
            continue
        wrong = [(one[inside] >= 0) != (labels[inside] > 0) for one in (probe, both)]
        result[kind] = {
            "clips": int(inside.sum()),
            "wrong_by_probe": round(100 * float(wrong[0].mean()), 2),
            "wrong_by_both": round(100 * float(wrong[1].mean()), 2),
        }
    return result


if __name__ == "__main__":
    raise SystemExit(main())
