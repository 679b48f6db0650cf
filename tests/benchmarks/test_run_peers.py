# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/run_peers.py: which clips are compared, tables from raw rows by hand, and whole runs of tiny models."""

import json
from argparse import Namespace

import common
import numpy as np
import peers
import pytest
import run_peers
import soundfile
import torch
from canary_donors import randomize
from tiny_data import ROOT, byte_tokenizer, save_donor, save_model, write_data
from tiny_models import tiny_drafts_model, tiny_inputs, tiny_processor
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration


def entry(name, duration_s):
    return {"id": name, "duration_s": duration_s}


def names(clips):
    return [[one["id"] for one in clip] for clip in clips]


# Clips


def test_clips_are_chosen_joined_and_batched(tmp_path):
    entries = [entry("a", 9.0), entry("b", 10.1), entry("c", 9.8), entry("d", 12.0), entry("e", 10.0)]
    assert names(run_peers.choose_clips(entries, 10, 3)) == [["e"], ["b"], ["c"]]
    # 8.5 to 11.5 s: "d" is too long.
    with pytest.raises(ValueError, match="has 4 clips of 8.5 to 11.5 s.*`--clips` asks for 5"):
        run_peers.choose_clips(entries, 10, 5)

    chapter = [entry(f"audio/1-2-{i}.flac", s) for i, s in enumerate([4.0, 5.0, 1.2, 9.0, 3.0])]
    # 1-2-0 to 1-2-2 last 10.2 s and 1-2-0 and 1-2-1 9 s; 1-2-3 is itself one of 10 s; 1-2-4 alone is too short.
    # The next chapter's is another speaker's, and "x" names no chapter.
    entries = [*reversed(chapter), entry("audio/1-3-0.flac", 7.0), entry("audio/x.flac", 5.0)]
    clips = run_peers.choose_clips(entries, 10, 2)
    assert names(clips) == [["audio/1-2-3.flac"], [f"audio/1-2-{i}.flac" for i in range(3)]]
    with pytest.raises(ValueError, match="has 2 clips"):
        run_peers.choose_clips(entries, 10, 3)

    data = write_data(tmp_path / "data", (0.5, 0.6, 0.3), prefix="5-")
    (clip,) = run_peers.make_clips(data, [1.1], 1)[1.1]
    assert clip["id"] == "5-0.wav+5-1.wav" and clip["reference"] == "word 0 word 1"
    expected = np.concatenate([soundfile.read(data / f"5-{i}.wav", dtype="float32")[0] for i in (0, 1)])
    np.testing.assert_array_equal(clip["samples"], expected)
    assert clip["duration_s"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="at most 26"):
        run_peers.make_clips(data, [28.0], 1)
    assert run_peers.batches_of([0, 1, 2], 2) == [[0, 1], [2, 0]]
    assert run_peers.batches_of([0, 1], 5) == [[0, 1, 0, 1, 0]]


def test_settings_of_ours(tmp_path, monkeypatch, setting, capsys):
    assert peers.parse_settings("") == {}
    parsed = peers.parse_settings("gamma=0.2,branches=none,window-s=7,dtype=int8")
    assert parsed == {"gamma": 0.2, "draft_branches": [], "window_s": 7.0, "dtype": "int8"}
    assert peers.parse_settings(f"onnx={tmp_path}") == {"onnx": str(tmp_path)}
    for text, message in (
        ("beams=5", "'beams=5' must be NAME=VALUE"),
        ("gamma=", "'gamma=' must be NAME=VALUE"),
        ("gamma=1,gamma=2", "each NAME once"),
        ("gamma=many", "'many' is not of type float"),
        ("dtype=int4", "`dtype=` must be one of"),
        (f"dtype=int8,onnx={tmp_path}", "without an export"),
        ("onnx=gone", "there is no folder 'gone'"),
    ):
        with pytest.raises(ValueError, match=message):
            peers.parse_settings(text)
    peer = peers.Peer("onnx", "out/int8", "ours-tiny", "int8", "onnx=out/int8,gamma=0.2")
    assert peer.label == "ours-tiny, ONNX Runtime, gamma=0.2, int8" and peer.is_ours
    assert peer.encoder_label == "ours-tiny, ONNX Runtime, encoder alone, int8"

    model, seconds = tiny_drafts_model(dtype=torch.float32), {}
    with peers.watch_stages(model, seconds):
        model.generate(*tiny_inputs(), max_new_tokens=20)
    assert list(seconds) == ["encoder", "causal rows", "drafts"]
    before = dict(seconds)
    model.generate(*tiny_inputs(), max_new_tokens=20)
    assert seconds == before

    # Beside other work, where the package by itself takes fewer threads, it has those it is given.
    numbers = []
    monkeypatch.setattr("mdm_asr_hf.cores.free_cores", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    ours = str(setting / "tiny-ours")
    peers.load_peer(peers.Peer("ours", ours, "ours", "float32"), "cpu", 2)
    assert numbers.pop() == 2
    common.load_ours(Namespace(model=ours, threads=2))
    assert numbers.pop() == 2

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="`ctranslate2` is not installed.*--skip faster-whisper"):
        run(setting, tmp_path / "output", "--donor", str(setting / "tiny-donor"))
    with pytest.raises(SystemExit):
        run_peers.main(["--data", str(setting / "data"), "--output", str(tmp_path / "output")])
    assert "--donor is needed" in capsys.readouterr().err


# Tables


def time_row(system, number, wall_s, length_s=2.0, *, ours=False, task="transcribe", texts=None):
    row = {"kind": "time", "task": task, "system": system, "is_ours": ours, "batch_size": 1}
    row |= {"length_s": length_s, "round": number, "wall_s": wall_s, "audio_s": 4.0}
    if texts:
        names = ("reference", "hypothesis", "nfe") if ours else ("reference", "hypothesis")
        row["utterances"] = [dict(zip(names, one, strict=True)) for one in texts]
    return row


@pytest.fixture
def rows():
    """Ours stands first in each round, and its slow first round must not count."""
    ours, peer = (
        [("I can't go", "i can not go", 3), ("a b c", "a c", 6)],
        [("I can't go", "I can go"), ("a b c", "A, b. C!")],
    )
    return [
        time_row("ours", 1, 8.0, ours=True, texts=ours),
        time_row("peer", 1, 2.0, texts=peer),
        time_row("encoder", 1, 0.5, task="encode"),
        {"kind": "memory", "system": "peer", "batch_size": 1, "mib": {"peak": 321.4, "before": 30.0}},
        *(time_row("ours", i, s, ours=True) | {"stages_ms": {"encoder": 9.0 * i}} for i, s in ((2, 1.0), (3, 0.8))),
        *(time_row("peer", i, s) for i, s in ((2, 4.0), (3, 1.6))),
        time_row("ours", 1, 2.0, 5.0, ours=True, texts=ours[:1]),
        time_row("peer", 1, 1.0, 5.0, texts=peer[:1]),
        time_row("encoder", 1, 0.25, 5.0, task="encode"),
    ]


def markdown(rows):
    machine = {"cpu": "a CPU", "num_cores": 2, "load_before": 0.1}
    run = {"machine": machine, "threads": 2, "versions": {"torch": "2", "onnx": None}, "command": "the command"}
    return run_peers.to_markdown({"run": run, **run_peers.summarise(rows)})


def test_medians_and_tables_by_hand(rows):
    summary = run_peers.summarise(rows)
    results = {(one["system"], one["length_s"]): one for one in summary["results"]}
    ours, peer = results["ours", 2.0], results["peer", 2.0]
    assert (ours["wall_s"], ours["rtfx"], ours["rtfx_min"], ours["rtfx_max"]) == (1.0, 4.0, 0.5, 5.0)
    assert (peer["wall_s"], peer["rtfx"], peer["num_rounds"]) == (2.0, 2.0, 3)
    # "i can not go" and "a b c" are 7 words, of which either system misses one.
    assert (ours["wer"], ours["num_errors"], ours["num_words"], peer["wer"]) == (14.29, 1, 7, 14.29)
    assert ours["mean_nfe"] == 4.5 and peer["memory_mib"] == {"peak": 321.4, "before": 30.0}
    # The medians are 1 s and 2 s of ours, 2 s and 1 s of the peer; encoders have none.
    assert [one["times_as_fast"] for one in summary["ratios"]] == [2.0, 0.5]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| system, batch size 1 | WER % 2 s | WER % 5 s | WER % all | RTFx 2 s | RTFx 5 s | MiB |"
    # Of 4 words of the clip of 5 s the peer misses one, of the 11 of both lengths two. Ours comes last.
    assert lines[2] == "| peer | 14.3 | 25.0 | 18.2 | 2.0 | 4.0 | 321 |"
    assert lines[3] == "| ours | 14.3 | 0.0 | 9.1 | 4.0 | 2.0 |  |"
    for line in (
        "| encoder | 8.0 | 16.0 |",
        "| ours | 2 s | 22.5 | 0.0 | 0.0 | 0.0 | 4.5 |",
        "| ours | peer | 2.00 | 0.50 |",
    ):
        assert line in lines
    # The least number of rounds; ours took from 0.8 to 8 s, RTFx 5 to 0.5 around 4.
    assert any("rounds: 1." in line and "112 % of its median" in line for line in lines)
    rows[3]["mib"]["peak_device"] = 900.0
    assert "| GPU MiB |" in markdown(rows) and "| 4.0 | 900 |" in markdown(rows)

    for name in ["peers", "peers-base", "recording", "cost"]:
        folder = ROOT / "benchmarks" / "results" / name
        made = run_peers.to_markdown(json.loads((folder / "results.json").read_text()))
        assert made.split("Medians;")[0] == (folder / "results.md").read_text().split("Medians;")[0]


# Runs


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A donor that stops after 12 tokens, a model of ours, and data with two clips each of 0.5 and 1 s."""
    root = tmp_path_factory.mktemp("peers")
    save_donor(root / "tiny-donor")
    model = tiny_drafts_model(dtype=torch.float32)
    model.generation_config.max_new_tokens = 12
    save_model(root / "tiny-ours", model, tiny_processor())
    write_data(root / "data", (0.5, 0.52, 1.0, 0.97), prefix="5-")
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        # So that what the run sets is taken back.
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(run_peers, "SETTLE_S", 0.0)
    # Every one is a process that imports torch: the first will do here.
    measure = run_peers.measure_memory
    monkeypatch.setattr(run_peers, "measure_memory", lambda peers, *rest: measure(peers[:1], *rest))


def run(setting, output, *arguments):
    arguments = [*("--data", str(setting / "data"), "--model", str(setting / "tiny-ours")), *arguments]
    arguments += ["--output", str(output), "--lengths", "0.5", "1", "--clips", "2", "--threads", "1"]
    run_peers.main(arguments)
    return [json.loads(line) for line in (output / "raw.jsonl").read_text().splitlines()]


def test_transformers_and_ours(setting, tmp_path):
    output = tmp_path / "output"
    arguments = ["--donor", str(setting / "tiny-donor"), "--skip", "faster-whisper", "whisper.cpp", "--rounds", "2"]
    arguments += ["--batch-sizes", "1", "3", "--ours", "branches=none", "--ours", "gamma=1", "--recording", "0.02"]
    rows = run(setting, output, *arguments)
    memory, times = ([row for row in rows if row["kind"] == kind] for kind in ("memory", "time"))
    systems = ["tiny-donor, transformers, float32", "tiny-ours, branches=none, float32", "tiny-ours, gamma=1, float32"]
    assert [(row["system"], row["batch_size"]) for row in memory] == [(systems[0], 1), (systems[0], 3)]
    assert memory[0]["mib"]["before"] < memory[0]["mib"]["peak"] <= memory[1]["mib"]["peak"]

    # The systems take turns, and every shape comes once a round.
    order = [systems[0], "tiny-donor, encoder alone, float32", systems[1], "tiny-ours, encoder alone, float32"]
    order.append(systems[2])
    shapes = [(number, b, s) for number in (1, 2) for b in (1, 3) for s in (0.5, 1.0)]
    expected = [(*shape, system) for shape in shapes for system in order]
    assert [(r["round"], r["batch_size"], r["length_s"], r["system"]) for r in times] == expected
    # Two clips, and at batch size 3 the first of them once more: the nearer one to 0.5 s, or to 1 s.
    audio = {(row["batch_size"], row["length_s"]): row["audio_s"] for row in times}
    assert audio == {(1, 0.5): 1.02, (3, 0.5): 1.52, (1, 1.0): 1.97, (3, 1.0): 2.97}

    texts = {}
    for row in times:
        assert ("utterances" in row) == (row["task"] == "transcribe" and row["round"] == 1)
        for one in row.get("utterances", ()):
            texts.setdefault((row["is_ours"], one["id"]), set()).add(one["hypothesis"])
    # The same text in a batch as alone, with drafts as without, and not the same of both.
    assert len(texts) == 2 * 4 and all(len(found) == 1 for found in texts.values())
    assert len({frozenset(found) for found in texts.values()}) > 2
    recordings = [row for row in rows if row["kind"] == "recording" and row["round"] == 1]
    assert [row["system"] for row in recordings] == systems[1:] and recordings[0]["audio_s"] >= 1.2
    assert recordings[0]["hypothesis"] == recordings[1]["hypothesis"]
    before = [(output / name).read_bytes() for name in ("results.json", "results.md")]
    run_peers.main(["--rescore", str(output)])
    assert before == [(output / name).read_bytes() for name in ("results.json", "results.md")]


def test_faster_whisper(setting, tmp_path):
    faster_whisper = pytest.importorskip("faster_whisper")
    arguments = ["--donor", str(setting / "tiny-donor"), "--rounds", "1", "--batch-sizes", "2"]
    rows = run(setting, tmp_path / "output", *arguments, "--skip", "transformers", "whisper.cpp")
    utterances = [(row["system"], one) for row in rows for one in row.get("utterances", ())]
    found = {one["id"]: one["hypothesis"] for system, one in utterances if system.endswith("faster-whisper, float32")}
    # The texts are those of the library's own `transcribe`, one clip at a time.
    peers.convert_for_faster_whisper(str(setting / "tiny-donor"), tmp_path / "work", "float32")
    model = faster_whisper.WhisperModel(str(tmp_path / "work"), device="cpu", compute_type="float32", cpu_threads=1)
    model.max_length = 12
    options = {"beam_size": 1, "temperature": 0.0, "without_timestamps": True, "condition_on_previous_text": False}
    # The library knows by heart which tokens Whisper's own checkpoints suppress.
    options["suppress_tokens"] = GenerationConfig.from_pretrained(setting / "tiny-donor").suppress_tokens
    assert len(found) == 4
    for name, hypothesis in found.items():
        samples = soundfile.read(setting / "data" / name, dtype="float32")[0]
        assert "".join(part.text for part in model.transcribe(samples, **options)[0]).strip() == hypothesis != ""


def test_whisper_cpp(setting, tmp_path, monkeypatch):
    pytest.importorskip("pywhispercpp")
    import ggml

    # That of the donor by transformers, measured elsewhere.
    monkeypatch.setattr(run_peers, "measure_memory", lambda *arguments: [])

    with pytest.raises(ValueError, match="vocabularies only.*--skip whisper.cpp"):
        ggml.write_ggml(str(setting / "tiny-donor"), tmp_path / "ggml.bin", "f16")
    # The library has Whisper's ids in its code, and stops after half the positions less 4: here 12 tokens.
    sizes = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("attention_heads", 1), ("ffn_dim", 256))
    }
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "max_target_positions": 32, "decoder_start_token_id": 50257}
    config = WhisperConfig(vocab_size=51864, d_model=64, **sizes)
    donor = randomize(WhisperForConditionalGeneration(config))
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "donor")
    letters = [
        i for token, i in tokenizer.get_vocab().items() if len(token) == 1 and token.isascii() and token.isalpha()
    ]
    with torch.no_grad():
        # So that no token comes that either would suppress, and that one text differs from another.
        donor.model.decoder.embed_tokens.weight[[i for i in range(config.vocab_size) if i not in letters]] = 0
        donor.model.decoder.layer_norm.bias.zero_()
        donor.model.decoder.embed_positions.weight.mul_(3)
        donor.model.decoder.embed_tokens.weight.mul_(0.2)
        for name, weight in donor.named_parameters():
            # The library attends to keys of zero behind the last one, too, which high scores leave no weight.
            weight.mul_(10 if "q_proj" in name else 1)
    ids = {"eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    donor.generation_config = GenerationConfig(**ids, max_length=12, no_timestamps_token_id=50362)
    donor.save_pretrained(tmp_path / "donor")
    WhisperFeatureExtractor().save_pretrained(tmp_path / "donor")
    arguments = ["--donor", str(tmp_path / "donor"), "--rounds", "1", "--batch-sizes", "2", "1"]
    rows = run(setting, tmp_path / "output", *arguments, "--skip", "faster-whisper")
    system = "donor, whisper.cpp, "
    # One clip at a time, whatever the others do.
    assert {row["batch_size"] for row in rows if row["kind"] == "time" and system in row["system"]} == {1}
    texts = {}
    for row in rows:
        if row["kind"] == "time" and row["batch_size"] == 1:
            texts.setdefault(row["system"], []).extend(one["hypothesis"] for one in row.get("utterances", ()))
    assert texts[system + "f16"] == texts["donor, transformers, float32"] and all(texts[system + "q8_0"])
    assert len(texts[system + "f16"]) == 4 and len(set(texts[system + "f16"])) > 1
