# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks but those of peers and the server: what they count, by hand, and runs of tiny models."""

import gzip
import json

import numpy as np
import pytest
import run_drafts
import run_hotwords
import run_lossless
import run_safeguards
import run_scale
import run_serve
import run_streaming
import run_timestamps
import soundfile
import timing
import torch
from demo_recording import RECORDING, STARTS_S
from tables import each
from tiny_data import RATE_HZ, ROOT, save_model, write_data
from tiny_models import tiny_drafts_model, tiny_processor

from mdm_asr_hf.sampling_mdm_asr import make_sampler

# By the forced aligner of pocketsphinx, in seconds.


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """What a run sets is taken back."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    model = tiny_drafts_model(dtype=torch.float32)
    model.generation_config.max_new_tokens = 20
    # Of random weights, no draft is sure.
    model.generation_config.sampler = make_sampler(model.generation_config.sampler, gamma=100.0)
    save_model(root / "model", model, tiny_processor())
    write_data(root / "data", (0.75, 1.0, 1.25), ["one two"] * 3)
    return root


def run(script, folder, output, *arguments):
    """What results.json holds; made again of raw.jsonl, it is the same."""
    common = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--output", str(output)]
    results = script.main([*map(str, arguments), *common])
    before = (output / "results.json").read_bytes(), (output / "results.md").read_bytes()
    script.main([*map(str, arguments[:1] if arguments and script is run_drafts else ()), "--rescore", str(output)])
    assert before == ((output / "results.json").read_bytes(), (output / "results.md").read_bytes())
    return results


# Drafts


@each("what", ["decoding", "silence"])
def test_every_condition_of_drafts_has_a_line(folder, tmp_path, what):
    lines = {line["condition"]: line for line in run(run_drafts, folder, tmp_path / "out", what)["lines"]}
    if what == "silence":
        assert list(lines)[0] == "0.5 s" and lines["5 s, 15 s in all"]["encoder_ms"] > lines["0.5 s"]["encoder_ms"]
        return
    assert list(lines) == list(run_drafts.decoding_conditions(3))
    assert all(line["same_texts"] == 3 for line in lines.values())
    alone = lines["none: the donor's loop"]
    assert alone["tokens_per_evaluation"] == 1.0 and alone["drafts_per_evaluation"] == 0.0
    one, two = (lines[f"masks, K = {k} drafts"]["drafts_per_evaluation"] for k in (1, 2))
    assert 0 < one < two
    # What was fitted was the sequential head.
    assert lines["masks"]["nfe"] < lines["masks without the sequential head"]["nfe"] <= alone["nfe"]


def test_rules_and_lines_by_hand():
    from mdm_asr_hf import torch_generation_mdm_asr, verified_decoding_mdm_asr
    from mdm_asr_hf.drafting_mdm_asr import cut_drafts

    # 0.9, 0.6 and 0.5, whose products are 0.9, 0.54 and 0.27; the last of them is an end of text.
    log_probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]]).log()

    def number(*rule):
        with run_drafts.proposing_by(rule):
            measures = torch_generation_mdm_asr.entropy(log_probs).numpy()
            _, counts = verified_decoding_mdm_asr.cut_drafts(np.array([[4, 4, 7]]), measures, np.array([3]), 0.0, 7)
        return int(counts[0])

    assert [number("confidence", c) for c in (0.95, 0.6, 0.5, 0.3, 0.2)] == [1, 1, 2, 2, 3]
    assert number("random", 1) == 1 and verified_decoding_mdm_asr.cut_drafts is cut_drafts

    rows = [
        {
            "set": "a",
            "reference": "Red green blue grey.",
            "stock": "red green glue grey",
            "own": "Red, green blue grey",
        },
        {"set": "a", "reference": "pink gold", "stock": "pink", "own": "no no no no no no"},
        {"set": "b", "reference": "cyan", "stock": "cyan", "own": "cyan"},
    ]
    counts = [{"nfe": 2, "tokens": 6}, {"nfe": 4, "tokens": 7}, {"nfe": 3, "tokens": 3}]
    rows = [{"is_same": i != 1, "is_loop": True, **one, **counts[i]} for i, one in enumerate(rows)]
    first, second = run_lossless.summarise(rows)["sets"]
    # Of six words: a substitution and a deletion; two substitutions and four insertions.
    assert (first["wer_stock"], first["wer_own"]) == (33.33, 100.0)
    assert (first["same_ids"], first["ids_of_the_loop"], first["loops"]) == (1, 2, 1)
    assert (first["nfe"], first["tokens_per_evaluation"]) == (3.0, round(13 / 6, 3))
    assert second["utterances"] == 1 and second["wer_own"] == 0.0


# Losslessness and safeguards


def test_published_tables_are_of_their_results():
    folder = ROOT / "benchmarks" / "results" / "lossless"
    summary = json.loads((folder / "results.json").read_text())
    assert run_lossless.to_markdown(summary) == (folder / "results.md").read_text()
    assert (folder / "results.md").read_text() in (ROOT / "README.md").read_text()
    # Not one id differs.
    assert all(line["same_ids"] == line["ids_of_the_loop"] == line["utterances"] for line in summary["sets"])

    script = {"lossless": run_lossless, "lossless-base": run_lossless, "safeguards": run_safeguards}
    script |= {"scale": run_scale, "scale-kills": run_scale, "serve": run_serve, "serve-memory": run_serve}
    for name in [*script, "drafts", "silence"]:
        folder = ROOT / "benchmarks" / "results" / name
        summary = json.loads((folder / "results.json").read_text())
        assert script.get(name, run_drafts).to_markdown(summary) == (folder / "results.md").read_text()


def test_sounds_texts_and_loops(folder, tmp_path):
    pytest.importorskip("scipy")
    import sounds

    made = [sounds.make(i) for i in range(len(sounds.KINDS))]
    assert len({kind for kind, _ in made}) == len(made)
    for kind, samples in made:
        assert 0.5 * RATE_HZ <= len(samples) <= 15 * RATE_HZ and np.isfinite(samples).all(), kind
        assert kind == "digital" or 1e-3 * 0.99 <= np.abs(samples).max() <= 0.9

    rows = [
        {"group": "sounds", "text": "", "bare": "la la la la"},
        {"group": "sounds", "text": "you", "bare": "you"},
        {"group": "crops", "text": "a b a b a b"},
    ]
    sounds, crops = run_safeguards.summarise(rows)["groups"]
    assert sounds == {"group": "sounds", "clips": 2, "texts": 1, "text_loops": 0, "bares": 2, "bare_loops": 1}
    assert crops == {"group": "crops", "clips": 1, "texts": 1, "text_loops": 1, "bares": None, "bare_loops": None}
    groups = run(run_safeguards, folder, tmp_path / "out", "--crops", 3, "--sounds", 2)["groups"]
    assert [(one["group"], one["clips"]) for one in sorted(groups, key=str)] == [
        ("crops: data", 3),
        ("made sounds", 2),
    ]


# Hotwords


def test_hotwords_by_hand(tmp_path):
    with gzip.open(tmp_path / "texts.txt.gz", "wt") as file:
        file.write("The cat.\nthe dog and the bird\na cat\n")
    assert run_hotwords.common_words(tmp_path / "texts.txt.gz", 3) == {"the", "cat", "a"}
    texts = {"1": "the quilter met basil", "2": "the the olbinett", "3": "cosette and basil"}
    lists = run_hotwords.make_lists(texts, {"the", "and", "met"}, 2, seed=0)
    assert lists["1"]["own"] == ["basil", "quilter"] and lists["3"]["own"] == ["basil", "cosette"]
    for key, text in texts.items():
        drawn = lists[key]["distractors"]
        assert len(set(drawn)) == 2 and not set(drawn) & set(text.split())
        assert run_hotwords.take(lists[key], "none+1") == drawn[:1]
        assert run_hotwords.take(lists[key], "own+2") == lists[key]["own"] + drawn
        assert run_hotwords.take(lists[key], "") == lists[key]["own"]
    with pytest.raises(ValueError, match="`--distractors` asks for 3"):
        run_hotwords.make_lists(texts, {"the", "and", "met"}, 3, seed=0)

    rows = [
        # One list word right, one wrong, one other word wrong; and a list word put in.
        {"reference": "the quilter met basil here", "hypothesis": "a quilter met bazil here"},
        {"reference": "they walk home", "hypothesis": "they walk basil home"},
    ]
    rows = [row | {"words": words} for row, words in zip(rows, (["quilter", "basil"], ["basil"]), strict=True)]
    # 1 of 2 missed and 1 put in; 1 of 6 others wrong.
    counts = {"u_wer": 16.67, "b_wer": 100.0, "recall": 50.0, "precision": 50.0, "num_false": 1}
    assert run_hotwords.biased_counts(rows) == counts
    assert run_hotwords.biased_counts([rows[1] | {"words": []}])["recall"] is None


def test_hotwords_and_a_stream_of_a_tiny_model(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("one two\n")
    write_data(tmp_path / "data", (0.5, 0.6), ["one rarely", "two seldom"])
    (tmp_path / "model").symlink_to(folder / "model")
    arguments = ("--texts", tmp_path / "texts.txt", "--distractors", 1)
    results = run(run_hotwords, tmp_path, tmp_path / "out", *arguments)["results"]
    assert [(one["list"], one["num_utterances"]) for one in results] == [
        ("no hotwords", 2),
        ("own+1", 2),
        ("none+1", 2),
    ]
    assert [("difference" in one) for one in results] == [False, True, True]

    write_data(tmp_path / "data", (5.5, 2.0))
    results = run(run_streaming, tmp_path, tmp_path / "streams", "--clock", "process", "--policy", "margin_s=0.6")
    # One is too short.
    assert (results["recordings"], results["audio_s"]) == (1, 5.5)


# Streaming


def update(time_s, partial="", committed="", latency_s=0.1, is_final=False, new=()):
    common = {"time_s": time_s, "partial": partial, "committed": committed, "latency_s": latency_s}
    return common | {"nfe": 2, "is_final": is_final, "new": list(new)}


def test_streams_by_hand():
    updates = [update(0.5, "a dock"), update(1.0, "A dog, barks"), update(1.5, "barks", "a dog")]
    assert run_streaming.count_revised([*updates, update(2.0, "", "a dog barks")]) == (1, 6)
    assert run_streaming.count_revised([update(0.5, "a dog"), update(1.0, "a")]) == (1, 2)

    word = {"text": "dog", "start_s": 0.4, "end_s": 0.8}

    def row(onset_s):
        updates = [update(0.5), update(1.0, "dog"), update(2.0, "", "dog", 0.2, True, [word])]
        texts = {"reference": "dog", "streaming": "dog", "offline": "dog"}
        return {"updates": updates, "onset_s": onset_s, "duration_s": 2.0, **texts}

    silent = {**row(0.0), "updates": [update(1.0, is_final=True)], "reference": "cat", "streaming": ""}
    results = run_streaming.summarise([row(0.3), row(0.0), silent])
    assert results["first_text_s"] == {"median": 0.95, "mean": 0.95, "p90": 1.07, "n": 2}
    assert results["commit_latency_s"]["median"] == 1.4 and results["wer_streaming"] == 33.33
    assert results["rtf"] == pytest.approx(0.15) and results["evaluations_per_update"]["mean"] == 2


# Times of words


def test_times_by_hand():
    generator = np.random.default_rng(0)
    noise = [generator.normal(0, 1e-4, 8000).astype(np.float32) for _ in range(2)]
    tone = np.sin(2 * np.pi * 220 * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
    clip = np.concatenate([noise[0], tone, noise[1][:4000]])
    assert timing.speech_span(clip, RATE_HZ) == pytest.approx((0.5, 1.5), abs=0.015)
    assert timing.speech_span(np.zeros(RATE_HZ, np.float32), RATE_HZ) == (0.0, 1.0)
    joined = timing.join_clips([clip, clip], ["one two", "three"], RATE_HZ, generator)
    assert (joined.text, joined.starts_s[1], joined.ends_s[0]) == ("one two three", None, None)
    for known_s, inside in (joined.starts_s[0], 1), (joined.ends_s[1], -1), (joined.starts_s[2], 1):
        place = round(known_s * RATE_HZ)
        around = [np.abs(joined.samples[place + side * 640 :][:320]).max() for side in (-2 * inside, inside)]
        assert around[0] < 0.01 < 0.5 < around[1]

    assert timing.match_words("The cat, sat on".split(), "the CAT on it".split()) == [(0, 0), (1, 1), (3, 2)]
    common = {"set": "d", "system": "mdm-asr"}
    rows = [
        # The second word was not recognised; of joined clips only the outermost times are known.
        common
        | {"kind": "checked", "known": [["a", 0.1, 0.2], ["b", 0.2, 0.4], ["c", 0.4, 0.6]]}
        | {"words": [["A", 0.13, 0.2], ["c.", 0.3, 0.66]]},
        common
        | {"kind": "joined", "known": [["a", 0.5, None], ["b", None, 0.9]]}
        | {"words": [["a", 0.5, 0.6], ["b", 0.6, 0.95]]},
    ]
    found = {(one["kind"], one["side"]): one for one in run_timestamps.summarise(rows)["results"]}
    assert (found["checked", "start"]["num_words"], found["checked", "start"]["mean_ms"]) == (2, 65.0)
    assert found["aligner", "end"]["median_ms"] == found["checked", "end"]["median_ms"]
    assert (found["joined", "start"]["median_ms"], found["joined", "end"]["median_signed_ms"]) == (0.0, 50.0)
    numbers = run_timestamps.describe([0.01, -0.03, 0.06, 0.3])
    assert (numbers["num_words"], numbers["median_ms"], numbers["mean_ms"]) == (4, 45.0, 100.0)
    assert [numbers[f"within_{ms}_ms"] for ms in (50, 100, 200)] == [0.5, 0.75, 0.75]
    assert (numbers["median_signed_ms"], numbers["p90_ms"]) == (35.0, 228.0)


def test_forced_aligner_on_a_recording():
    pytest.importorskip("pocketsphinx")
    samples, _ = soundfile.read(RECORDING, dtype="float32")
    aligner, words = timing.ForcedAligner(), (ROOT / "demo" / "transcript.txt").read_text().split()
    times_s = aligner.align(samples, words)
    assert [start for start, _ in times_s] == pytest.approx(STARTS_S, abs=0.03)
    assert aligner.align(samples, ["qwxzk"]) is None


def test_times_of_a_tiny_model(folder, tmp_path, monkeypatch):
    class Aligner:
        def align(self, samples, words):
            return [(0.1 * i, 0.1 * i + 0.1) for i in range(len(words))]

    monkeypatch.setattr(timing, "ForcedAligner", Aligner)
    data = write_data(tmp_path / "data", (0.75, 1.0, 1.25), ["a b c"] * 3)
    arguments = [str(data), "--model", str(folder / "model"), "--limit", "2", "--joined", "1"]
    run_timestamps.main([*arguments, "--output", str(tmp_path / "out")])
    rows = [json.loads(one) for one in (tmp_path / "out" / "raw.jsonl").read_text().splitlines()][1:]
    assert len(rows) == 3 and sum(row["kind"] == "joined" for row in rows) == 1
