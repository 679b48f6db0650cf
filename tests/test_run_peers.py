# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/run_peers.py: which clips are compared, tables from raw rows by hand, and whole runs of tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from canary_donors import randomize
from test_convert_whisper import save_tokenizer
from tiny_models import tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from mdm_asr_hf.onnx import model as onnx_model
from mdm_asr_hf.onnx import processing as onnx_processing

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ggml  # noqa: E402
import peers  # noqa: E402
import run_peers  # noqa: E402


def entry(file_name, duration_s):
    return {"file_name": file_name, "duration_s": duration_s}


def names(clips):
    return [[one["file_name"] for one in clip] for clip in clips]


# Clips


def test_the_nearest_utterances_are_chosen():
    entries = [entry("a", 9.0), entry("b", 10.1), entry("c", 9.8), entry("d", 12.0), entry("e", 10.0)]
    assert names(run_peers.choose_clips(entries, 10, 3)) == [["e"], ["b"], ["c"]]
    # 8.5 to 11.5 s: "d" is too long.
    assert names(run_peers.choose_clips(entries, 10, 4))[3] == ["a"]
    with pytest.raises(ValueError, match="has 4 clips of 8.5 to 11.5 s.*`--clips` asks for 5"):
        run_peers.choose_clips(entries, 10, 5)


def test_short_utterances_of_one_chapter_are_joined_where_long_ones_are_too_few():
    chapter = [entry(f"audio/1-2-{i}.flac", s) for i, s in enumerate([4.0, 5.0, 1.2, 9.0, 3.0])]
    # 1-2-0 to 1-2-2 last 10.2 s and 1-2-0 and 1-2-1 9 s; 1-2-3 is itself one of 10 s; 1-2-4 alone is too short.
    # The next chapter's is another speaker's, and "x" names no chapter.
    entries = [*reversed(chapter), entry("audio/1-3-0.flac", 7.0), entry("audio/x.flac", 5.0)]
    clips = run_peers.choose_clips(entries, 10, 2)
    assert names(clips) == [["audio/1-2-3.flac"], [f"audio/1-2-{i}.flac" for i in range(3)]]
    with pytest.raises(ValueError, match="has 2 clips"):
        run_peers.choose_clips(entries, 10, 3)


def test_no_utterance_is_used_twice():
    entries = [entry(f"7-{i:02}.wav", 1.0 + 0.1 * (i % 4)) for i in range(40)]
    clips = names(run_peers.choose_clips(entries, 5, 9))
    used = [name for clip in clips for name in clip]
    assert len(clips) == 9 and len(used) == len(set(used))
    durations = {one["file_name"]: one["duration_s"] for one in entries}
    assert all(4.25 <= sum(durations[name] for name in clip) <= 5.75 for clip in clips)


def write_data(folder, durations_s, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = []
    for i, duration_s in enumerate(durations_s):
        samples = 0.1 * rng.standard_normal(round(16_000 * duration_s))
        soundfile.write(folder / f"5-{i}.wav", samples, 16_000)
        lines.append(json.dumps({"file_name": f"5-{i}.wav", "text": f"Text number {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def test_joined_clips_hold_the_samples_and_texts_one_after_the_other(tmp_path):
    data = write_data(tmp_path / "data", [0.5, 0.6, 0.3])
    clip = run_peers.make_clips(data, [1.1], 1)[1.1][0]
    assert clip["id"] == "5-0.wav+5-1.wav" and clip["reference"] == "Text number 0 Text number 1"
    expected = np.concatenate([soundfile.read(data / f"5-{i}.wav", dtype="float32")[0] for i in (0, 1)])
    np.testing.assert_array_equal(clip["samples"], expected)
    assert clip["duration_s"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="at most 26"):
        run_peers.make_clips(data, [28.0], 1)
    with pytest.raises(ValueError, match="no metadata.jsonl"):
        run_peers.make_clips(tmp_path, [1.0], 1)


def test_batches_are_full():
    assert run_peers.batches_of([0, 1, 2], 1) == [[0], [1], [2]]
    assert run_peers.batches_of([0, 1, 2], 2) == [[0, 1], [2, 0]]
    assert run_peers.batches_of([0, 1], 5) == [[0, 1, 0, 1, 0]]


def test_settings_of_ours():
    assert peers.parse_settings("") == {}
    parsed = peers.parse_settings("sampler=conf_top_k,k=2,steps=64,lambda=0.1")
    assert parsed == {"sampler": "conf_top_k", "k": 2, "max_denoising_steps": 64, "lambda_": 0.1}
    with pytest.raises(ValueError, match="'beams=5' must be NAME=VALUE"):
        peers.parse_settings("beams=5")
    with pytest.raises(ValueError, match="'many' is not of type int"):
        peers.parse_settings("steps=many")


def test_the_exported_folder_of_ours():
    assert peers.read_ours("gamma=0.2,onnx=a/b,steps=4") == ("a/b", "", "gamma=0.2,steps=4")
    assert peers.read_ours("onnx=a") == ("a", "", "") and peers.read_ours("k=2") == ("", "", "k=2")
    assert peers.read_ours("dtype=int8,k=2") == ("", "int8", "k=2")
    for text in ("onnx=,k=2", "onnx=a,onnx=b", "dtype="):
        with pytest.raises(ValueError, match="must have one value"):
            peers.read_ours(text)
    for text in ("dtype=int4", "dtype=int8,onnx=a"):
        with pytest.raises(ValueError, match="`dtype=` must be one of"):
            peers.read_ours(text)
    peer = peers.Peer("onnx", "model", "ours-tiny", "int8", "gamma=0.2,k=2", "out/int8")
    assert peer.label == "ours-tiny, ONNX Runtime, gamma=0.2 k=2, int8" and peer.is_ours
    assert peer.encoder_label == "ours-tiny, ONNX Runtime, encoder alone, int8"


# Tables


def time_row(system, round_number, wall_s, length_s=2.0, *, ours=False, task="transcribe", texts=None, batch_size=1):
    row = {"kind": "time", "task": task, "system": system, "is_ours": ours, "batch_size": batch_size}
    row |= {"length_s": length_s, "round": round_number, "wall_s": wall_s, "audio_s": 4.0}
    if texts:
        row["utterances"] = [
            {"id": str(i), "reference": reference, "duration_s": 2.0, "hypothesis": hypothesis} | extra
            for i, (reference, hypothesis, extra) in enumerate(texts)
        ]
    return row


@pytest.fixture
def rows():
    """Ours stands first in each round, and its slow first round must not count."""
    ours = [("I can't go", "i can not go", {"nfe": 3}), ("a b c", "a c", {"nfe": 6})]
    peer = [("I can't go", "I can go", {}), ("a b c", "A, b. C!", {})]
    return [
        time_row("ours", 1, 8.0, ours=True, texts=ours),
        time_row("peer", 1, 2.0, texts=peer),
        time_row("encoder", 1, 0.5, task="encode"),
        {"kind": "memory", "system": "peer", "batch_size": 1, "mib": {"peak": 321.4, "before": 30.0}},
        *(time_row("ours", i, s, ours=True) for i, s in ((2, 1.0), (3, 0.8))),
        *(time_row("peer", i, s) for i, s in ((2, 4.0), (3, 1.6))),
        *(time_row("encoder", i, 0.5, task="encode") for i in (2, 3)),
        time_row("ours", 1, 2.0, 5.0, ours=True, texts=ours[:1]),
        time_row("peer", 1, 1.0, 5.0, texts=peer[:1]),
        time_row("encoder", 1, 0.25, 5.0, task="encode"),
    ]


def test_medians_and_wer_by_hand(rows):
    results = {(one["system"], one["length_s"]): one for one in run_peers.summarise(rows)["results"]}
    ours, peer = results["ours", 2.0], results["peer", 2.0]
    assert (ours["wall_s"], ours["rtfx"], ours["rtfx_min"], ours["rtfx_max"]) == (1.0, 4.0, 0.5, 5.0)
    assert (peer["wall_s"], peer["rtfx"], peer["num_rounds"]) == (2.0, 2.0, 3)
    # "i can not go" and "a b c" are 7 words, of which either system misses one.
    assert (ours["wer"], ours["num_errors"], ours["num_words"]) == (14.29, 1, 7)
    assert peer["wer"] == 14.29 and "mean_nfe" not in peer
    assert ours["mean_nfe"] == 4.5 and ours["memory_mib"] is None
    assert peer["memory_mib"] == {"peak": 321.4, "before": 30.0}
    assert results["encoder", 5.0]["rtfx"] == 16.0 and "wer" not in results["encoder", 5.0]


def test_the_table_has_ours_last(rows):
    tables = run_peers.to_markdown(run_peers.summarise(rows))
    lines = tables.splitlines()
    assert lines[0] == "| system, batch size 1 | WER % 2 s | WER % 5 s | WER % all | RTFx 2 s | RTFx 5 s | MiB |"
    # Of 4 words of the clip of 5 s the peer misses one, of the 11 of both lengths two.
    assert lines[2] == "| peer | 14.3 | 25.0 | 18.2 | 2.0 | 4.0 | 321 |"
    assert lines[3] == "| ours | 14.3 | 0.0 | 9.1 | 4.0 | 2.0 |  |"
    assert "| encoder | 8.0 | 16.0 |" in lines
    # The least number of rounds; ours took from 0.8 to 8 s, RTFx 5 to 0.5 around 4.
    assert "rounds: 1." in tables and "112 % of its median" in tables


def test_ratios_to_each_peer(rows):
    rows += [time_row("other", 1, 3.0, s, texts=[("a", "a", {})]) for s in (2.0, 5.0)]
    summary = run_peers.summarise(rows)
    # The medians are 1 s and 2 s of ours, 2 s and 1 s of the peer, 3 s of the other; encoders have none.
    found = {(one["peer"], one["length_s"]): one["times_as_fast"] for one in summary["ratios"]}
    assert found == {("peer", 2.0): 2.0, ("peer", 5.0): 0.5, ("other", 2.0): 3.0, ("other", 5.0): 1.5}
    lines = run_peers.to_markdown(summary).splitlines()
    start = lines.index("| times as fast, batch size 1 | as | 2 s | 5 s |")
    assert lines[start + 2 : start + 5] == ["| ours | peer | 2.00 | 0.50 |", "| ours | other | 3.00 | 1.50 |", ""]


def test_device_memory_goes_first_where_it_was_measured(rows):
    rows[3]["mib"]["peak_device"] = 900.0
    tables = run_peers.to_markdown(run_peers.summarise(rows))
    assert "| GPU MiB |" in tables and "| 4.0 | 900 |" in tables and "321" not in tables


# Runs


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A donor that stops after 12 tokens, a model of ours, and data with two clips each of 0.5 and 1 s."""
    root = tmp_path_factory.mktemp("peers")
    save_tokenizer(root / "tiny-donor", multilingual=False)
    first = json.loads((root / "tiny-donor" / "tokenizer.json").read_text())["model"]["vocab"]
    eos = len(first) if "<|endoftext|>" not in first else first["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=eos + 17,
        num_mel_bins=80,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=40,
        pad_token_id=eos,
        bos_token_id=eos,
        eos_token_id=eos,
        decoder_start_token_id=eos + 1,
    )
    donor = randomize(WhisperForConditionalGeneration(config))
    donor.generation_config = GenerationConfig(
        is_multilingual=False,
        eos_token_id=eos,
        decoder_start_token_id=eos + 1,
        pad_token_id=eos,
        max_length=12,
        no_timestamps_token_id=eos + 10,
        suppress_tokens=list(range(eos + 1, eos + 17)),
        begin_suppress_tokens=[eos],
    )
    donor.save_pretrained(root / "tiny-donor")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(root / "tiny-donor")
    tiny_model().save_pretrained(root / "tiny-ours")
    tiny_processor().save_pretrained(root / "tiny-ours")
    write_data(root / "data", [0.5, 0.52, 1.0, 0.97])
    return root


def run(setting, output, *arguments):
    arguments = [*("--data", str(setting / "data"), "--model", str(setting / "tiny-ours")), *arguments]
    arguments += ["--output", str(output), "--lengths", "0.5", "1", "--clips", "2", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        run_peers.main(arguments)
    finally:
        torch.set_num_threads(before)
    return [json.loads(line) for line in (output / "raw.jsonl").read_text().splitlines()]


def measure_memory_of(monkeypatch, which):
    """Every one is a process that imports torch: some will do here."""
    measure = run_peers.measure_memory
    monkeypatch.setattr(run_peers, "measure_memory", lambda peers, *rest: measure(peers[which], *rest))


def test_transformers_and_ours(setting, tmp_path, capsys, monkeypatch):
    for name in run_peers.THREAD_VARIABLES:
        # So that what the run sets is taken back.
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(run_peers, "SETTLE_S", 0.0)
    measure_memory_of(monkeypatch, slice(1))
    output = tmp_path / "output"
    arguments = ["--donor", str(setting / "tiny-donor"), "--skip", "faster-whisper", "whisper.cpp", "--rounds", "2"]
    arguments += ["--batch-sizes", "1", "3", "--ours", "steps=4", "--ours", "sampler=conf_top_k,k=2"]
    rows = run(setting, output, *arguments)
    first, memory, times = rows[0], rows[1:3], rows[3:]
    assert first["kind"] == "run" and first["settings"]["threads"] == 1
    assert first["command"].startswith("python benchmarks/run_peers.py --data")
    systems = [
        "tiny-donor, transformers, float32",
        "tiny-ours, steps=4, float32",
        "tiny-ours, sampler=conf_top_k k=2, float32",
    ]
    assert [(row["system"], row["batch_size"]) for row in memory] == [(systems[0], 1), (systems[0], 3)]
    assert 0 < memory[0]["mib"]["before"] < memory[0]["mib"]["peak"] <= memory[1]["mib"]["peak"]

    # The systems take turns, and every shape comes once a round.
    order = [systems[0], "tiny-donor, encoder alone, float32", systems[1], "tiny-ours, encoder alone, float32"]
    order.append(systems[2])
    shapes = [(round_number, b, s) for round_number in (1, 2) for b in (1, 3) for s in (0.5, 1.0)]
    expected = [(*shape, system) for shape in shapes for system in order]
    assert [(r["round"], r["batch_size"], r["length_s"], r["system"]) for r in times] == expected
    assert all(row["wall_s"] > 0 for row in times)
    # Two clips, and at batch size 3 the first of them once more: the nearer one to 0.5 s, or to 1 s.
    audio = {(row["batch_size"], row["length_s"]): row["audio_s"] for row in times}
    assert audio == {(1, 0.5): 1.02, (3, 0.5): 1.52, (1, 1.0): 1.97, (3, 1.0): 2.97}

    texts = {}
    for row in times:
        assert ("utterances" in row) == (row["task"] == "transcribe" and row["round"] == 1)
        for one in row.get("utterances", ()):
            texts.setdefault((row["system"], one["id"]), set()).add(one["hypothesis"])
            assert ("nfe" in one) == row["is_ours"] and (not row["is_ours"] or one["nfe"] <= 32)
    # The same text in a batch as alone, and not the same from every system.
    assert len(texts) == 3 * 4 and all(len(found) == 1 for found in texts.values())
    assert len({frozenset(found) for found in texts.values()}) > 3

    results = (output / "results.json").read_text()
    table = (output / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert table.index(systems[0]) < table.index(systems[1]) < table.index(systems[2]) and first["command"] in table
    for name in ("results.json", "results.md"):
        (output / name).unlink()
    run_peers.main(["--rescore", str(output)])
    assert (output / "results.json").read_text() == results and (output / "results.md").read_text() == table
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_faster_whisper(setting, tmp_path, monkeypatch):
    faster_whisper = pytest.importorskip("faster_whisper")
    monkeypatch.setattr(run_peers, "SETTLE_S", 0.0)
    measure_memory_of(monkeypatch, slice(1, 3))
    for name in run_peers.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    work = tmp_path / "work"
    arguments = ["--donor", str(setting / "tiny-donor"), "--rounds", "1", "--batch-sizes", "2", "--work", str(work)]
    rows = run(setting, tmp_path / "output", *arguments, "--skip", "transformers", "whisper.cpp")
    found = {
        one["id"]: one["hypothesis"]
        for row in rows
        for one in row.get("utterances", ())
        if row["system"] == "tiny-donor, faster-whisper, float32"
    }
    memory = {row["system"]: row["mib"]["peak"] for row in rows if row["kind"] == "memory"}
    assert set(memory) == {"tiny-donor, faster-whisper, int8", "tiny-ours, its own settings, float32"}
    # It does not hold torch.
    assert memory["tiny-donor, faster-whisper, int8"] < memory["tiny-ours, its own settings, float32"]

    # The texts are those of the library's own `transcribe`, one clip at a time.
    model = faster_whisper.WhisperModel(str(work / "float32"), device="cpu", compute_type="float32", cpu_threads=1)
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
    monkeypatch.setattr(run_peers, "SETTLE_S", 0.0)
    measure_memory_of(monkeypatch, slice(1, 2))
    for name in run_peers.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    # The library has Whisper's ids in its code, and stops after half the positions less 4: here 12 tokens.
    config = WhisperConfig(
        vocab_size=51864,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_target_positions=32,
        decoder_start_token_id=50257,
    )
    donor = randomize(WhisperForConditionalGeneration(config))
    tokenizer = save_tokenizer(tmp_path / "donor", multilingual=False)
    letters = [i for token, i in tokenizer.get_vocab().items() if token.isascii() and token.isalpha()]
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
    arguments = ["--donor", str(tmp_path / "donor"), "--rounds", "1", "--batch-sizes", "2", "1", "--recording", "0.02"]
    rows = run(setting, tmp_path / "output", *arguments, "--skip", "faster-whisper")
    system = "donor, whisper.cpp, "
    # One clip at a time, whatever the others do.
    assert {(row["system"], row["batch_size"]) for row in rows if row["kind"] == "memory"} == {(system + "f16", 1)}
    assert {row["batch_size"] for row in rows if row["kind"] == "time" and system in row["system"]} == {1}
    texts = {}
    for row in rows:
        if row["kind"] == "time" and row["batch_size"] == 1:
            texts.setdefault(row["system"], []).extend(one["hypothesis"] for one in row.get("utterances", ()))
    assert texts[system + "f16"] == texts["donor, transformers, float32"] and all(texts[system + "q8_0"])
    assert len(texts[system + "f16"]) == 4 and len(set(texts[system + "f16"])) > 1
    recordings = {row["system"]: row["hypothesis"] for row in rows if row["kind"] == "recording"}
    assert recordings[system + "f16"] and recordings[system + "q8_0"]


def test_a_vocabulary_that_whisper_cpp_does_not_know(setting, tmp_path):
    with pytest.raises(ValueError, match="vocabularies only.*--skip whisper.cpp"):
        ggml.write_ggml(str(setting / "tiny-donor"), tmp_path / "ggml.bin", "f16")


class Exported:
    """What an exported model looks like from outside, with PyTorch inside."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    @classmethod
    def from_pretrained(cls, folder, num_threads=0):
        assert Path(folder).name == "fast" and num_threads == 1
        return cls(tiny_model().eval())


def test_ours_in_onnx_runtime(setting, tmp_path, monkeypatch):
    (tmp_path / "fast").mkdir()
    monkeypatch.setattr(onnx_model, "OnnxMDMASR", Exported)
    monkeypatch.setattr(onnx_processing.OnnxProcessor, "from_pretrained", lambda folder: tiny_processor())
    find_spec = peers.find_spec
    monkeypatch.setattr(peers, "find_spec", lambda name: "onnx" in name or find_spec(name))
    monkeypatch.setattr(run_peers, "SETTLE_S", 0.0)
    measure_memory_of(monkeypatch, slice(0))
    for name in run_peers.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    arguments = ["--skip", *run_peers.PEERS, "--rounds", "1", "--batch-sizes", "2"]
    arguments += ["--recording", "0.02"]
    arguments += ["--ours", "steps=4", "--ours", f"onnx={tmp_path / 'fast'},steps=4", "--dtypes", "float32"]
    rows = run(setting, tmp_path / "output", *arguments)
    systems = ["tiny-ours, steps=4, float32", "tiny-ours, encoder alone, float32"]
    systems += ["tiny-ours, ONNX Runtime, steps=4, fast", "tiny-ours, ONNX Runtime, encoder alone, fast"]
    assert [row["system"] for row in rows if row.get("length_s") == 0.5] == systems
    texts = [row["utterances"] for row in rows if row.get("length_s") == 0.5 and row["task"] == "transcribe"]
    assert texts[0] == texts[1] and texts[0][0]["hypothesis"]
    recordings = [row for row in rows if row["kind"] == "recording"]
    assert [row["system"] for row in recordings] == systems[::2] and recordings[0]["audio_s"] >= 1.2
    assert recordings[0]["hypothesis"] == recordings[1]["hypothesis"] and recordings[0]["reference"]
    assert "| a recording of 0 minutes, batches of 2 |" in (tmp_path / "output" / "results.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        run(setting, tmp_path / "output", *arguments[:-4], "--ours", f"onnx={tmp_path / 'gone'}")
    assert "there is no such folder" in stopped.value.code


def test_ours_is_taken_apart():
    model, seconds = tiny_drafts_model(dtype=torch.float32), {}
    with peers.watch_stages(model, seconds):
        model.generate(*tiny_inputs(), max_new_tokens=20)
    assert list(seconds) == ["encoder", "causal rows", "drafts"] and min(seconds.values()) > 0
    before = dict(seconds)
    model.generate(*tiny_inputs(), max_new_tokens=20)
    assert seconds == before
    utterance = {"id": "a", "reference": "a b", "duration_s": 1.0, "hypothesis": "a", "nfe": 3}
    row = {"kind": "time", "task": "transcribe", "system": "ours", "is_ours": True, "batch_size": 1, "length_s": 1.0}
    rows = [row | {"round": i, "wall_s": 0.5, "audio_s": 1.0, "stages_ms": {"encoder": 8.0 + i}} for i in (1, 2, 3)]
    rows[0]["utterances"] = [utterance]
    assert "| ours | 1 s | 10.0 | 0.0 | 0.0 | 0.0 | 3.0 |" in run_peers.to_markdown(run_peers.summarise(rows))


def test_a_peer_that_is_not_installed(monkeypatch, setting, tmp_path, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(setting, tmp_path / "output", "--donor", str(setting / "tiny-donor"))
    assert "`ctranslate2` is not installed" in stopped.value.code and "--skip faster-whisper" in stopped.value.code
    with pytest.raises(SystemExit):
        run_peers.main(["--data", str(setting / "data"), "--output", str(tmp_path / "output")])
    assert "--donor is needed" in capsys.readouterr().err


def test_importing_the_script_imports_no_peer():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import run_peers, peers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "run_peers" in loaded and not {"torch", "transformers", "ctranslate2", "faster_whisper"} & loaded
