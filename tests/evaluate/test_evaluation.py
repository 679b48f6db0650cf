# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets, rows and folders of an evaluation; the same rows from any batches and processes."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from tables import each
from tiny_data import RATE_HZ, ROOT, save_model, write_data, write_metadata
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_model, tiny_processor

from mdm_asr_hf.evaluate import evaluation
from mdm_asr_hf.evaluate.data import PRESETS, load_data
from mdm_asr_hf.evaluate.evaluation import TIMES, evaluate_model, measure_batch_1, write_evaluation
from mdm_asr_hf.evaluate.scoring import read_rows, score
from mdm_asr_hf.transcribe.transcriber import Transcriber
from mdm_asr_hf.transcribe.voice_activity import make_vad

SECONDS = (0.5, 1.2, 0.3, 0.9, 0.7, 1.0, 0.4)


@pytest.fixture
def folder(tmp_path):
    """Seven clips of different lengths, the third without words, and a row whose file is no audio."""
    texts = [f"word {i}" if i != 2 else "" for i in range(7)]
    data = write_data(tmp_path / "clips", SECONDS, texts, prefix="audio/")
    (data / "audio" / "bad.wav").write_text("These are notes.\n" * 100)
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    lines.insert(4, '{"file_name": "audio/bad.wav", "text": "bad"}\n')
    (data / "metadata.jsonl").write_text("".join(lines))
    return data


@pytest.fixture(scope="module")
def model():
    return tiny_drafts_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def canvas():
    model = tiny_model("whisper")
    model.generation_config.canvas_length = 12
    return model


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), model, processor)


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


# Data sets.


def test_folders_manifests_and_splits(folder, tmp_path):
    data = load_data(folder)
    assert (data.name, data.path, len(data)) == ("clips", str(folder), 7)
    assert [row["id"] for row in data.rows] == [f"audio/{i}.wav" for i in range(7)]
    assert data.rows[2]["text"] == "" and data.rows[1]["audio_path"] == "audio/1.wav"
    assert [row["duration_s"] for row in data.rows] == list(SECONDS)
    (skipped,) = data.skipped
    assert skipped["id"] == "audio/bad.wav" and "unreadable audio" in skipped["reason"]
    limited = load_data(folder, limit=2)
    assert [row["id"] for row in limited.rows] == ["audio/0.wav", "audio/1.wav"] and limited.sha256 == data.sha256
    with pytest.raises(ValueError, match="`limit`"):
        load_data(folder, limit=0)
    bad = '{"file_name": "audio/bad.wav", "text": "a"}\n' * 3 + '{"file_name": "audio/no.wav", "text": null}\n'
    (folder / "bad.jsonl").write_text(bad)
    message = "None of the 4 rows of .*can be measured: 3 like: .*line 1: unreadable audio.*; 1 like: .*no transcript"
    with pytest.raises(ValueError, match=message):
        load_data(folder / "bad.jsonl")
    (folder / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl' has no rows"):
        load_data(folder / "empty.jsonl")

    other = folder.parent / "elsewhere.wav"
    soundfile.write(other, np.zeros(800), RATE_HZ)
    table = f"path,sentence,lang\naudio/0.wav,eins,de\naudio/0.wav,zwei,de\n{other},drei,fr\n"
    (folder / "test.csv").write_text(table)
    data = load_data(folder / "test.csv", text_column="sentence")
    assert [row["text"] for row in data.rows] == ["eins", "zwei", "drei"]
    # The same file twice is two rows; one outside of the folder has its whole path.
    assert [row["id"] for row in data.rows] == ["audio/0.wav", "audio/0.wav#2", str(other)]
    assert [row["language"] for row in data.rows] == ["de", "de", "fr"]
    assert {row["language"] for row in load_data(folder / "test.csv", language="nl").rows} == {"nl"}
    with pytest.raises(ValueError, match="`text_column` 'words' is not in .*'sentence'"):
        load_data(folder / "test.csv", text_column="words")

    entries = [{"file_name": "audio/0.wav", "text": text} for text in ("yes no", "", "...", None, 1984, float("nan"))]
    write_metadata(folder, [*entries, {"file_name": "audio/0.wav"}, {"text": "no audio"}])
    data = load_data(folder)
    assert [row["text"] for row in data.rows] == ["yes no", "", "..."]
    assert [one["id"] for one in data.skipped[:4]] == [f"audio/0.wav#{i}" for i in (4, 5, 6, 7)]
    assert ["no transcript" in one["reason"] for one in data.skipped] == [True] * 4 + [False]
    # Of two words there is one; what is heard where there is none is inserted.
    rows = [{"reference": row["text"], "hypothesis": "yes", "duration_s": 1.0, "nfe": 1} for row in data.rows]
    assert score(rows)["metrics"]["wer"] == 150.0

    names = ["a.wav", "a.wav#2", "a.wav", "a.wav", "b.wav", "b.wav"]
    for name in set(names):
        shutil.copy(folder / "audio" / "0.wav", folder / name)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    ids = [row["id"] for row in load_data(folder).rows]
    assert ids == ["a.wav", "a.wav#2", "a.wav#3", "a.wav#4", "b.wav", "b.wav#2"]

    for name in ("train", "test"):
        write_data(tmp_path / "splits" / name, (0.5,), [name])
    assert [row["id"] for row in load_data(tmp_path / "splits").rows] == ["test/0.wav"]
    assert load_data(tmp_path / "splits", split="train").rows[0]["text"] == "train"
    assert load_data(tmp_path / "splits" / "train").rows[0]["text"] == "train"


def test_data_sets_of_datasets_and_the_hub(folder, tmp_path, model, processor, monkeypatch):
    entries = [
        {"audio": {"bytes": (folder / "audio" / f"{i}.wav").read_bytes(), "path": None}, "transcript": text, "id": one}
        for i, text, one in ((1, "one", "b"), (0, "zero", "a"))
    ]
    table = datasets.Dataset.from_list(entries).cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": table.select([1]), "test": table}).save_to_disk(tmp_path / "saved")
    data = load_data(tmp_path / "saved", text_column="transcript", language="de")
    found = [(row["id"], row["text"], row["audio_path"], row["duration_s"]) for row in data.rows]
    assert found == [("b", "one", None, 1.2), ("a", "zero", None, 0.5)]
    rows = evaluate_model(model, processor, data)
    from_files = evaluate_model(model, processor, load_data(folder, limit=2))
    assert [row["hypothesis"] for row in rows] == [row["hypothesis"] for row in from_files[::-1]]
    assert (rows[0]["audio"], rows[0]["language"]) == (None, "de")
    assert len(load_data(tmp_path / "saved", text_column="transcript", limit=1)) == 1

    def load_dataset(path, name, split, streaming):
        seen.append((path, name, split))
        columns = {"audio": [{"bytes": b"", "path": "x.wav"}], "id": ["7"], "text": ["A b"], "audio_length_s": [2.5]}
        return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("ami")
    assert seen == [("hf-audio/esb-datasets-test-only-sorted", "ami", "test")]
    assert data.name == "ami" and data.rows[0]["id"] == "7" and data.rows[0]["duration_s"] == 2.5
    assert load_data("owner/some", name="de", duration_column="audio_length_s").name == "some-de-test"
    assert seen[-1] == ("owner/some", "de", "test")

    def fail(*args, **kwargs):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=f"no such data set.*{', '.join(PRESETS)}"):
        load_data("librispeech-clean")


# Rows.


def test_rows_are_what_generate_gives(folder, model, canvas, processor):
    for one in (model, canvas):
        eos = one.config.eos_token_id
        rows = evaluate_model(one, processor, folder, batch_size=3)
        assert [row["id"] for row in rows] == [f"audio/{i}.wav" for i in range(7)]
        for row, duration_s in zip(rows, SECONDS, strict=True):
            output = one.generate(**processor(folder / row["audio"]), return_dict_in_generate=True)
            assert row["hypothesis"] == processor.batch_decode(output.sequences)[0]
            assert row["nfe"] == int(output.nfe[0]) and row["duration_s"] == duration_s
            ids = output.sequences[0].tolist()
            assert row["is_full"] == (eos not in ids) == (row["end"] is None)
            said = row["tokens"] + ([row["end"]] if row["end"] else [])
            assert len(said) == len(ids) and "".join(t["text"] for t in row["tokens"]).strip() == row["hypothesis"]
            assert [t["step"] for t in said] == output.commit_steps[0].tolist()
            assert [t["confidence"] for t in said] == pytest.approx(output.confidence[0].tolist(), abs=1e-3)
            if one is model:
                check_drafts(row, said, output, ids, processor.tokenizer)
        # Not all alike, or the above says little.
        assert len({row["hypothesis"] for row in rows}) > 1 and max(row["nfe"] for row in rows) > 1
        assert one is not model or sum(row["accepted_drafts"]["masks"] for row in rows) > 10
    assert not rows[0].keys() & {"accepted_drafts", "struck_drafts"}

    settings = copy.deepcopy(model.generation_config)
    # Whoever gives token 3 any probability at all does not speak.
    settings.no_speech_token_id, settings.no_speech_threshold = 3, 0.0
    row = evaluate_model(model, processor, load_data(folder, limit=1), settings=settings)[0]
    assert (row["hypothesis"], row["tokens"], row["end"], row["confidence"]) == ("", [], None, None)
    assert row["nfe"] > 0 and row["is_full"] is False and row["struck_drafts"] == []


def check_drafts(row, said, output, ids, tokenizer):
    branches = [token["branch"] for token in said]
    numbers = {None: 0, "masks": 1, "hypothesis": 2}
    assert [numbers[one] for one in branches] == output.token_branches[0].tolist()
    for i, name in enumerate(("masks", "hypothesis")):
        assert row["accepted_drafts"][name] == int(output.accepted_drafts[0, i]) >= branches.count(name)
        struck = [(place, its_ids) for place, branch, its_ids in output.struck_drafts[0] if branch == i]
        assert row["rejected_drafts"][name] == sum(len(its_ids) for _, its_ids in struck)
        texts = [(place, tokenizer.decode(its_ids)) for place, its_ids in struck]
        assert [(one["place"], one["text"]) for one in row["struck_drafts"] if one["branch"] == name] == texts
        # Struck for what the donor said in its place.
        assert all(ids[place] != its_ids[0] for place, its_ids in struck)


@each("vad", ["energy", "none"])
def test_what_is_longer_than_the_model_takes_is_cut_as_transcribe_does(folder, model, processor, monkeypatch, vad):
    # A second of every one and a half is sound; without its detector, windows overlap.
    monkeypatch.setattr(evaluation, "make_vad", lambda name, rate_hz: make_vad(vad, rate_hz))
    monkeypatch.setattr(processor.feature_extractor, "max_duration_s", 3.0)
    times_s = np.arange(11 * RATE_HZ) / RATE_HZ
    sound = np.random.default_rng(1).standard_normal(len(times_s)) * np.where(times_s % 1.5 < 1, 0.1, 1e-4)
    soundfile.write(folder / "audio" / "1.wav", sound, RATE_HZ)
    soundfile.write(folder / "audio" / "2.wav", np.zeros(5 * RATE_HZ), RATE_HZ)
    rows = evaluate_model(model, processor, folder, batch_size=3)
    assert [row["id"] for row in rows] == [f"audio/{i}.wav" for i in range(7)]
    transcriber = Transcriber(model, processor, vad=vad)
    for row in rows[1:3]:
        expected = transcriber.transcribe(folder / row["audio"])
        found = (row["hypothesis"], row["duration_s"], row["nfe"], row["confidence"])
        assert found == (expected.text, expected.duration_s, expected.nfe, expected.confidence)
        assert "".join(token["text"] for token in row["tokens"]).replace(" ", "") == expected.text.replace(" ", "")
    steps = [token["step"] for token in rows[1]["tokens"]]
    assert steps == sorted(steps) and 0 < steps[-1] <= rows[1]["nfe"] and "times_s" not in rows[1]
    others = evaluate_model(model, processor, folder, batch_size=1)
    assert [row["hypothesis"] for row in others] == [row["hypothesis"] for row in rows]


@each("kind, temperature", [("drafts", 1.0), ("random canvas", 1.0)])
def test_batches_do_not_matter(folder, model, canvas, processor, kind, temperature):
    model = model if kind == "drafts" else canvas
    settings = copy.deepcopy(model.generation_config)
    settings.temperature, settings.max_new_tokens = temperature, 24
    if kind == "random canvas":
        settings.sampler = "random"

    def rows_of(data, **more):
        rows = evaluate_model(model, processor, data, settings=settings, **more)
        return [(row["hypothesis"], row["nfe"], row["is_full"]) for row in rows]

    whole = rows_of(folder, batch_size=3)
    assert rows_of(folder, batch_size=1) == whole and rows_of(load_data(folder, limit=3)) == whole[:3]
    assert rows_of(folder, seed=1) != whole


def test_what_cannot_be_decoded_does_not_stop_the_rest(folder, canvas, processor):
    data = load_data(folder)
    # Broken after its header was read; and a clip too long for the canvas that 100 tokens a second ask for.
    (folder / "audio" / "5.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "audio" / "1.wav", np.random.default_rng(0).standard_normal(4 * RATE_HZ) * 0.1, RATE_HZ)
    settings = copy.deepcopy(canvas.generation_config)
    settings.canvas_length, settings.canvas_tokens_per_s = None, 100.0
    for _ in range(2):
        # Measuring it again does not report them twice.
        rows = evaluate_model(canvas, processor, data, settings=settings, batch_size=4)
        assert [row["id"] for row in rows] == [f"audio/{i}.wav" for i in (0, 2, 3, 4, 6)]
        assert sorted(one["id"] for one in data.skipped) == ["audio/1.wav", "audio/5.wav", "audio/bad.wav"]
    assert any("canvas of 410 tokens" in one["reason"] for one in data.skipped)
    with pytest.raises(ValueError, match="`batch_size`"):
        evaluate_model(canvas, processor, data, batch_size=0)


def test_the_language_reaches_the_prompt(folder, model, processor, monkeypatch):
    (folder / "two.csv").write_text("path,text,lang\naudio/0.wav,a,de\naudio/1.wav,b,\n")
    seen = []
    generate = type(model).generate

    def spy(self, *args, **kwargs):
        seen.append(kwargs.pop("language", "nothing"))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    rows = evaluate_model(model, processor, folder / "two.csv", language="fr")
    assert [row["language"] for row in rows] == ["de", "fr"] and set(seen) == {"nothing"}
    settings = copy.deepcopy(model.generation_config)
    settings.prompt_template = {
        "tokens": [VOCAB_SIZE, "language"],
        "slots": {"language": {"de": 5, "fr": 6}},
        "defaults": {"language": "de"},
    }
    seen.clear()
    evaluate_model(model, processor, folder / "two.csv", language="fr", settings=settings)
    # First the warm-up; the longer clip comes first.
    assert seen == [["de"], ["fr", "de"]]


def test_batch_size_1_is_measured_over_all_lengths(folder, model, processor, monkeypatch):
    batches = []
    rows = evaluation._Runner._rows

    def spy(self, indices, clips, *more):
        batches.append([round(len(clip) / RATE_HZ, 2) for clip in clips])
        return rows(self, indices, clips, *more)

    monkeypatch.setattr(evaluation._Runner, "_rows", spy)
    result = measure_batch_1(model, processor, load_data(folder), num_rows=3)
    # Sorted: 0.3 0.4 0.5 0.7 0.9 1.0 1.2; the first is the warm-up.
    assert batches[1:] == [[0.4], [0.7], [1.0]]
    assert result["num_utterances"] == 3 and result["audio_s"] == 2.1
    assert result["rtfx"] < min(result["rtfx_encoder"], result["rtfx_decoder"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's own")
def test_peak_memory_is_not_that_of_the_program_that_started_it(monkeypatch):
    inherited_mib = 2**20
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=inherited_mib * 2**10))
    assert 50 < evaluation.peak_memory_mib("cpu") < inherited_mib


def test_folder_of_results(folder, model, canvas, processor, checkpoint, tmp_path):
    data = load_data(folder)
    rows = evaluate_model(model, processor, data)
    options = {"model_name": "some name", "model_path": checkpoint, "data": data, "batch_1": {"rtfx": 1.5}}
    content = write_evaluation(tmp_path / "out", rows[:-1], model=model, batch_size=8, command="it", **options)
    assert content == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert read_rows(tmp_path / "out") == rows[:-1]
    scored = score(read_rows(tmp_path / "out"))
    assert scored["metrics"].items() <= content["metrics"].items() and scored["intervals"] == content["intervals"]
    assert content["metrics"].keys() - scored["metrics"].keys() == {"rtfx_batch_1", "peak_memory_mib"}
    settings = content["settings"]
    assert (settings["decoding"], settings["gamma"], settings["dtype"]) == ("drafts", 3.0, "float32")
    assert content["model"] == "some name" and re.fullmatch("[0-9a-f]{64}", content["model_sha256"])
    assert evaluation.model_sha256(tmp_path) is None
    (described,) = content["data"]
    assert (described["name"], described["num_utterances"], described["num_skipped"]) == ("clips", 6, 1)
    assert set(evaluation.PACKAGES) < set(content["versions"])
    settings = evaluation.describe_settings(canvas.generation_config)
    assert settings["decoding"] == "canvas" and settings["canvas"]["canvas_length"] == 12


# Processes.


def test_processes_lose_and_double_nothing(folder, model, processor, monkeypatch):
    data = load_data(folder)
    rows = dict(enumerate(evaluate_model(model, processor, data, batch_size=2)))

    def merge(pairs):
        results = iter([pairs, []])
        monkeypatch.setattr(evaluation, "gather_object", lambda values: next(results))
        return evaluation._merge(data, {}, [])

    pairs = [*rows.items()]
    assert merge(pairs[::-1]) == list(rows.values())
    with pytest.raises(RuntimeError, match="6 rows of 6 utterances, 1 lack"):
        merge(pairs[1:])
    with pytest.raises(RuntimeError, match="8 rows of 7 utterances"):
        merge([*pairs, pairs[0]])


# The commands.


def test_commands(folder, checkpoint, tmp_path, run_command):
    manifest = folder / "few.jsonl"
    write_metadata(folder, [{"file_name": f"audio/{i}.wav", "text": "a b"} for i in (0, 4)], "few.jsonl")
    arguments = ["--model", checkpoint, "--gamma", 0.5, "--set", "draft_length=2", "--batch-1-rows", 1]
    arguments += ["--device", "cpu"]
    code, out, err = run_command("evaluate", "--data", folder, manifest, "--output", tmp_path / "out", *arguments)
    assert code == 0
    assert "clips: skipped audio/bad.wav: " in err and err.count("warning") == 1
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["data", "clips", "few", "mean"]
    contents = {name: json.loads((tmp_path / "out" / name / "metrics.json").read_text()) for name in ("clips", "few")}
    wers = [content["metrics"]["wer"] for content in contents.values()]
    low, high = contents["few"]["intervals"]["wer"]
    assert f"{wers[1]} ({low} to {high})" in lines[2] and f"{sum(wers) / 2:.2f}" in lines[3]
    settings = contents["few"]["settings"]
    assert (settings["decoding"], settings["gamma"], settings["draft_length"]) == ("drafts", 0.5, 2)
    assert "masks %" in lines[0] and str(contents["few"]["metrics"]["acceptance_rate_masks"]) in lines[2]
    assert contents["few"]["metrics"]["rtfx_batch_1"]["num_utterances"] == 1
    assert contents["few"]["command"].startswith("mdm-asr evaluate --data ")
    assert {row["dataset"] for row in read_rows(tmp_path / "out" / "few")} == {"few"}

    code, out, err = run_command("score", tmp_path / "out" / "few", "--json")
    scored = json.loads(out)
    assert (code, err) == (0, "") and scored["metrics"].items() <= contents["few"]["metrics"].items()
    assert scored["intervals"] == contents["few"]["intervals"]
    code, out, _ = run_command("score", tmp_path / "out")
    assert [line.split()[0] for line in out.splitlines()] == ["data", "clips", "few", "mean"]
    assert list(json.loads(run_command("score", tmp_path / "out", "--json")[1])) == ["clips", "few"]

    # One data set alone is written to the folder itself.
    code, out, _ = run_command(
        "evaluate", "--data", manifest, "--output", tmp_path / "alone", *arguments, "--limit", 1
    )
    assert code == 0 and len(read_rows(tmp_path / "alone")) == 1
    half = ["--dtype", "bfloat16", "--batch-1-rows", 0]
    code, out, _ = run_command("evaluate", "--data", manifest, "--output", tmp_path / "half", *arguments, *half)
    content = json.loads((tmp_path / "half" / "metrics.json").read_text())
    assert content["settings"]["dtype"] == "bfloat16" and content["metrics"]["rtfx_batch_1"] is None


def test_what_goes_wrong_is_one_line(folder, checkpoint, tmp_path, run_command):
    for arguments, message in (
        (["score", tmp_path / "nothing"], "holds no hypotheses.jsonl"),
        (["evaluate", "--data", folder, "--text-column", "words", "--output", tmp_path / "x"], "`text_column`"),
        (["evaluate", "--data", folder, "--model", tmp_path / "no", "--output", tmp_path / "x"], "`model`"),
        (["evaluate", "--data", folder, "--gamma", "-1", "--model", checkpoint, "--output", tmp_path / "x"], "gamma"),
        (["evaluate", "--data", folder, "--steps", "5", "--model", checkpoint, "--output", tmp_path / "x"], "canvas"),
    ):
        code, out, err = run_command(*arguments)
        lines = [line for line in err.splitlines() if not line.startswith("warning")]
        assert (code, out, len(lines)) == (1, "", 1)
        assert lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "x").exists()

    # Durations are told, so that the audio is read only when it is its turn.
    names = ["lost/0.wav", "lost/1.wav", "audio/bad.wav", "audio/empty.wav"]
    soundfile.write(folder / "audio" / "empty.wav", np.zeros(0), RATE_HZ)
    write_metadata(folder, [{"file_name": name, "text": "a", "duration": 1.0} for name in names])
    code, out, err = run_command(
        "evaluate", "--data", folder, "--model", checkpoint, "--device", "cpu", "--output", tmp_path / "x"
    )
    (line,) = err.splitlines()
    assert (code, out) == (1, "") and line.startswith(f"error: None of the 4 rows of {str(folder)!r} could be transcr")
    assert ": 2 like: '" in line and "lost/0.wav' does not exist" in line
    assert "1 like: '" in line and "is not audio" in line and "1 like: The audio is empty" in line


@each("folder", sorted((ROOT / "model_cards" / "results").glob("*/*")))
def test_published_metrics_follow_from_their_hypotheses(folder):
    published = json.loads((folder / "metrics.json").read_text())["metrics"]
    scored = score(read_rows(folder), num_bootstrap=0)["metrics"]
    assert {"wer", "mean_nfe", "num_utterances"} <= published.keys() and scored.items() <= published.items()
