# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets, rows and folders of an evaluation; the same rows from any batches and processes."""

import copy
import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from test_distributed import LAUNCHERS, launch
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_model, tiny_processor

from mdm_asr_hf.evaluate import evaluation
from mdm_asr_hf.evaluate.evaluation import (
    PRESETS,
    decode_encoded,
    describe_settings,
    encode_dataset,
    evaluate_model,
    load_data,
    measure_batch_1,
    peak_memory_mib,
    write_evaluation,
)
from mdm_asr_hf.evaluate.scoring import read_rows, score
from mdm_asr_hf.transcribe.transcriber import Transcriber
from mdm_asr_hf.transcribe.transcript import token_texts
from mdm_asr_hf.transcribe.voice_activity import make_vad

ROOT = Path(__file__).parents[1]
RATE_HZ = 16_000
SECONDS = (0.5, 1.2, 0.3, 0.9, 0.7, 1.0, 0.4)
TIMES = ("features_s", "encoder_s", "decoder_s")


def write_clips(folder, seconds=SECONDS):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i, duration_s in enumerate(seconds):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(round(duration_s * RATE_HZ)), RATE_HZ)


def write_metadata(folder, entries, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def folder(tmp_path):
    """Seven clips of different lengths, the third without words, and a row whose file is no audio."""
    data = tmp_path / "clips"
    write_clips(data / "audio")
    (data / "audio" / "bad.wav").write_text("These are notes.\n" * 100)
    entries = [{"file_name": f"audio/{i}.wav", "text": f"word {i}" if i != 2 else ""} for i in range(len(SECONDS))]
    write_metadata(data, [*entries[:4], {"file_name": "audio/bad.wav", "text": "bad"}, *entries[4:]])
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
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


# Data sets.


def test_folder(folder):
    data = load_data(folder)
    assert (data.name, data.path, len(data)) == ("clips", str(folder), 7)
    assert [row["id"] for row in data.rows] == [f"audio/{i}.wav" for i in range(7)]
    assert data.rows[2]["text"] == "" and data.rows[1]["audio_path"] == "audio/1.wav"
    assert [row["duration_s"] for row in data.rows] == list(SECONDS)
    (skipped,) = data.skipped
    assert skipped["id"] == "audio/bad.wav" and "unreadable audio" in skipped["reason"]
    with pytest.raises(ValueError, match="unreadable audio"):
        load_data(folder, on_bad_row="raise")
    limited = load_data(folder, limit=2, label="two")
    assert [row["id"] for row in limited.rows] == ["audio/0.wav", "audio/1.wav"]
    assert limited.name == "two" and limited.sha256 == data.sha256
    with pytest.raises(ValueError, match="`limit`"):
        load_data(folder, limit=0)
    bad = '{"file_name": "audio/bad.wav", "text": "a"}\n' * 3 + '{"file_name": "audio/no.wav", "text": null}\n'
    (folder / "bad.jsonl").write_text(bad)
    message = (
        r"None of the 4 rows of .*bad.jsonl' can be measured: 3 like: .*line 1: unreadable audio.*; 1 like: .*null"
    )
    with pytest.raises(ValueError, match=message.replace("null", "line 4: no transcript")):
        load_data(folder / "bad.jsonl")
    (folder / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl' has no rows"):
        load_data(folder / "empty.jsonl")


def test_manifest_with_other_columns(folder):
    other = folder.parent / "elsewhere.wav"
    soundfile.write(other, np.zeros(800), RATE_HZ)
    table = f"path,sentence,lang\naudio/0.wav,eins,de\naudio/0.wav,zwei,de\n{other},drei,fr\n"
    (folder / "test.csv").write_text(table)
    data = load_data(folder / "test.csv", text_column="sentence")
    assert [row["text"] for row in data.rows] == ["eins", "zwei", "drei"]
    # The same file twice is two rows; one outside of the folder has its whole path.
    assert [row["id"] for row in data.rows] == ["audio/0.wav", "audio/0.wav#2", str(other)]
    assert [row["language"] for row in data.rows] == ["de", "de", "fr"]
    assert {row["language"] for row in load_data(folder / "test.csv", text_column="sentence", language="nl").rows} == {
        "nl"
    }
    assert [row["text"] for row in load_data(folder / "test.csv").rows] == ["eins", "zwei", "drei"]
    with pytest.raises(ValueError, match="`text_column` 'words' is not in .*'sentence'"):
        load_data(folder / "test.csv", text_column="words")


def test_a_row_without_a_transcript_is_no_empty_reference(folder):
    entries = [{"file_name": "audio/0.wav", "text": text} for text in ("yes no", "", "...", None, 1984, float("nan"))]
    write_metadata(folder, [*entries, {"file_name": "audio/0.wav"}, {"text": "no audio"}])
    data = load_data(folder)
    assert [row["text"] for row in data.rows] == ["yes no", "", "..."]
    assert [one["id"] for one in data.skipped[:4]] == [f"audio/0.wav#{i}" for i in (4, 5, 6, 7)]
    assert ["no transcript" in one["reason"] for one in data.skipped] == [True] * 4 + [False]
    assert "unreadable audio" in data.skipped[4]["reason"]
    with pytest.raises(ValueError, match="line 4: no transcript. `text_column` 'text' holds None, not text"):
        load_data(folder, on_bad_row="raise")
    # Of two words there is one; what is heard where there is none is inserted.
    rows = [{"reference": row["text"], "hypothesis": "yes", "duration_s": 1.0, "nfe": 1} for row in data.rows]
    assert score(rows)["metrics"]["wer"] == 150.0


def test_every_row_has_an_id_of_its_own(folder):
    names = ["a.wav", "a.wav#2", "a.wav", "a.wav", "b.wav", "b.wav"]
    for name in set(names):
        shutil.copy(folder / "audio" / "0.wav", folder / name)
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    ids = [row["id"] for row in load_data(folder).rows]
    assert ids == ["a.wav", "a.wav#2", "a.wav#3", "a.wav#4", "b.wav", "b.wav#2"]


def test_the_test_split_is_the_default(folder, tmp_path):
    for name, text in (("train", "a"), ("test", "b")):
        write_clips(tmp_path / "splits" / name, (0.5,))
        write_metadata(tmp_path / "splits" / name, [{"file_name": "0.wav", "text": text}])
    data = load_data(tmp_path / "splits")
    assert [(row["id"], row["text"]) for row in data.rows] == [("test/0.wav", "b")]
    assert load_data(tmp_path / "splits", split="train").rows[0]["text"] == "a"
    assert load_data(tmp_path / "splits" / "train").rows[0]["text"] == "a"


def test_data_set_of_datasets(folder, tmp_path, model, processor):
    entries = [
        {"audio": {"bytes": (folder / "audio" / f"{i}.wav").read_bytes(), "path": None}, "transcript": text, "id": one}
        for i, text, one in ((1, "one", "b"), (0, "zero", "a"))
    ]
    table = datasets.Dataset.from_list(entries).cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": table.select([1]), "test": table}).save_to_disk(tmp_path / "saved")
    data = load_data(tmp_path / "saved", text_column="transcript", language="de")
    assert [(row["id"], row["text"], row["audio_path"]) for row in data.rows] == [
        ("b", "one", None),
        ("a", "zero", None),
    ]
    assert [row["duration_s"] for row in data.rows] == [1.2, 0.5]
    rows = evaluate_model(model, processor, data)
    from_files = {row["reference"]: row for row in evaluate_model(model, processor, load_data(folder))}
    assert [row["hypothesis"] for row in rows] == [
        from_files["word 1"]["hypothesis"],
        from_files["word 0"]["hypothesis"],
    ]
    assert (rows[0]["audio"], rows[0]["language"]) == (None, "de")
    assert len(load_data(tmp_path / "saved", text_column="transcript", limit=1)) == 1


def test_presets_are_the_leaderboards(monkeypatch):
    expected = {
        "librispeech-test-clean": (
            "hf-audio/esb-datasets-test-only-sorted",
            "librispeech",
            "test.clean",
            "text",
            "en",
        ),
        "librispeech-test-other": (
            "hf-audio/esb-datasets-test-only-sorted",
            "librispeech",
            "test.other",
            "text",
            "en",
        ),
        "earnings22": ("hf-audio/esb-datasets-test-only-sorted", "earnings22", "test", "text", "en"),
        "ami": ("hf-audio/esb-datasets-test-only-sorted", "ami", "test", "text", "en"),
        "voxpopuli": ("hf-audio/esb-datasets-test-only-sorted", "voxpopuli", "test", "text", "en"),
        "mls-de": ("facebook/multilingual_librispeech", "german", "test", "transcript", "de"),
        "mls-es": ("facebook/multilingual_librispeech", "spanish", "test", "transcript", "es"),
        "mls-fr": ("facebook/multilingual_librispeech", "french", "test", "transcript", "fr"),
    }
    assert {k: (s.path, s.name, s.split, s.text_column, s.language) for k, s in PRESETS.items()} == expected

    def load_dataset(path, name, split, streaming):
        seen.append((path, name, split))
        columns = {"audio": [{"bytes": b"", "path": "x.wav"}], "id": ["7"], "text": ["A b"], "audio_length_s": [2.5]}
        audio = datasets.Audio(decode=False)
        return datasets.Dataset.from_dict(columns).cast_column("audio", audio)

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
    with pytest.raises(ValueError, match="no such data set.*librispeech-test-clean, .*mls-fr"):
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
            assert all(row[name] > 0 for name in TIMES)
            assert (row["dataset"], row["language"]) == ("clips", None)
        # Not all alike, or the above says little.
        assert len({row["hypothesis"] for row in rows}) > 1 and max(row["nfe"] for row in rows) > 1


def test_rows_tell_what_became_of_the_drafts(folder, model, canvas, processor):
    rows = evaluate_model(model, processor, folder)
    for row in rows:
        output = model.generate(**processor(folder / row["audio"]), return_dict_in_generate=True)
        ids = output.sequences[0].tolist()
        branches = [token["branch"] for token in [*row["tokens"], row["end"]]]
        numbers = {None: 0, "masks": 1, "hypothesis": 2}
        assert [numbers[one] for one in branches] == output.token_branches[0].tolist()
        for i, name in enumerate(("masks", "hypothesis")):
            assert row["accepted_drafts"][name] == int(output.accepted_drafts[0, i]) >= branches.count(name)
            struck = [(place, its_ids) for place, branch, its_ids in output.struck_drafts[0] if branch == i]
            assert row["rejected_drafts"][name] == sum(len(its_ids) for _, its_ids in struck)
            texts = [(place, processor.tokenizer.decode(its_ids)) for place, its_ids in struck]
            assert [(one["place"], one["text"]) for one in row["struck_drafts"] if one["branch"] == name] == texts
            # Struck for what the donor said in its place.
            assert all(ids[place] != its_ids[0] for place, its_ids in struck)
    assert sum(row["accepted_drafts"]["masks"] for row in rows) > 10
    assert not evaluate_model(canvas, processor, folder)[0].keys() & {"accepted_drafts", "struck_drafts"}


def test_what_was_taken_for_silence_has_no_text(folder, model, processor):
    settings = copy.deepcopy(model.generation_config)
    # Whoever gives token 3 any probability at all does not speak.
    settings.no_speech_token_id, settings.no_speech_threshold = 3, 0.0
    row = evaluate_model(model, processor, load_data(folder, limit=1), settings=settings)[0]
    assert (row["hypothesis"], row["tokens"], row["end"], row["confidence"]) == ("", [], None, None)
    assert row["nfe"] > 0 and row["is_full"] is False and row["struck_drafts"] == []


@pytest.mark.parametrize("kind, temperature", [("drafts", 0.0), ("drafts", 1.0), ("random canvas", 1.0)])
def test_batches_do_not_matter(folder, model, canvas, processor, kind, temperature):
    model = model if kind == "drafts" else canvas
    settings = copy.deepcopy(model.generation_config)
    settings.temperature, settings.max_new_tokens = temperature, 24
    if kind == "random canvas":
        settings.sampler = "random"

    def rows_of(data, **more):
        rows = timeless(evaluate_model(model, processor, data, settings=settings, **more))
        return [{name: row[name] for name in ("hypothesis", "nfe", "is_full")} for row in rows]

    whole = rows_of(folder, batch_size=3)
    assert rows_of(folder, batch_size=1) == rows_of(folder, batch_size=8) == whole
    assert rows_of(load_data(folder, limit=3))[-1]["hypothesis"] == whole[2]["hypothesis"]
    assert (rows_of(folder, seed=1) == whole) == (temperature == 0)


def test_encoding_once_gives_the_same_rows(folder, model, processor):
    # A silent clip needs its features for being told.
    soundfile.write(folder / "audio" / "3.wav", np.zeros(RATE_HZ), RATE_HZ)
    encoded = encode_dataset(model, processor, folder, batch_size=3)
    assert all(batch.encoder_outputs.last_hidden_state.device.type == "cpu" for batch in encoded.batches)
    num_evaluations = []
    for branches in (["masks", "hypothesis"], []):
        settings = copy.deepcopy(model.generation_config)
        settings.draft_branches = branches
        rows = decode_encoded(model, processor, encoded, settings)
        expected = evaluate_model(model, processor, folder, batch_size=3, settings=settings)
        assert timeless(rows) == timeless(expected)
        num_evaluations.append(sum(row["nfe"] for row in rows))
        assert (rows[3]["hypothesis"], rows[3]["nfe"], rows[3]["is_full"]) == ("", 0, False)
        assert all(row[name] > 0 for row in rows for name in TIMES)
    # Without drafts, an evaluation for each token.
    assert num_evaluations[0] < num_evaluations[1] == sum(len(row["tokens"]) + 1 for row in rows if row["nfe"])
    assert not settings.return_dict_in_generate and len(encoded.data.skipped) == 1


@pytest.mark.parametrize("vad", ["energy", "none"])
def test_what_is_longer_than_the_model_takes_is_cut_as_transcribe_does(folder, model, processor, monkeypatch, vad):
    # A second of every one and a half is sound; without its detector, windows overlap.
    monkeypatch.setattr(evaluation, "make_vad", lambda name, rate_hz: make_vad(vad, rate_hz))
    monkeypatch.setattr(processor.feature_extractor, "max_duration_s", 3.0)
    times_s = np.arange(11 * RATE_HZ) / RATE_HZ
    sound = np.random.default_rng(1).standard_normal(len(times_s)) * np.where(times_s % 1.5 < 1, 0.1, 1e-4)
    soundfile.write(folder / "audio" / "1.wav", sound, RATE_HZ)
    soundfile.write(folder / "audio" / "2.wav", np.zeros(5 * RATE_HZ), RATE_HZ)
    data = load_data(folder)
    settings = copy.deepcopy(model.generation_config)
    rows = evaluate_model(model, processor, data, settings=settings, batch_size=3)
    assert [row["id"] for row in rows] == [f"audio/{i}.wav" for i in range(7)]
    transcriber = Transcriber(model, processor, settings=settings, vad=vad)
    for i in (1, 2):
        expected = transcriber.transcribe(folder / "audio" / f"{i}.wav")
        row = rows[i]
        assert (row["hypothesis"], row["duration_s"]) == (expected.text, expected.duration_s)
        assert (row["nfe"], row["confidence"]) == (expected.nfe, expected.confidence)
        assert "".join(token["text"] for token in row["tokens"]).replace(" ", "") == expected.text.replace(" ", "")
    assert len(transcriber.transcribe(folder / "audio" / "1.wav").segments) > 3
    steps = [token["step"] for token in rows[1]["tokens"]]
    assert steps == sorted(steps) and 0 < steps[-1] <= rows[1]["nfe"]
    assert sum(rows[1]["accepted_drafts"].values()) <= len(steps) * 2
    # Whatever the batches are, and if encoded beforehand.
    encoded = encode_dataset(model, processor, data, settings=settings, batch_size=2)
    for others in (
        evaluate_model(model, processor, data, settings=settings, batch_size=1),
        decode_encoded(model, processor, encoded, settings),
    ):
        for name in ("hypothesis", "nfe", "is_full", "duration_s"):
            assert [row[name] for row in others] == [row[name] for row in rows]


def test_what_cannot_be_decoded_does_not_stop_the_rest(folder, canvas, processor):
    model = canvas
    data = load_data(folder)
    # Broken after its header was read; and a clip too long for the canvas that 100 tokens a second ask for.
    (folder / "audio" / "5.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "audio" / "1.wav", np.random.default_rng(0).standard_normal(4 * RATE_HZ) * 0.1, RATE_HZ)
    settings = copy.deepcopy(model.generation_config)
    settings.canvas_length, settings.canvas_tokens_per_s = None, 100.0
    rows = evaluate_model(model, processor, data, settings=settings, batch_size=4)
    assert [row["id"] for row in rows] == [f"audio/{i}.wav" for i in (0, 2, 3, 4, 6)]
    assert sorted(one["id"] for one in data.skipped) == ["audio/1.wav", "audio/5.wav", "audio/bad.wav"]
    assert any("canvas of 410 tokens" in one["reason"] for one in data.skipped)
    # Measuring it again does not report them twice.
    evaluate_model(model, processor, data, settings=settings)
    assert len(data.skipped) == 3
    with pytest.raises(ValueError, match="audio/[15].wav: "):
        evaluate_model(model, processor, load_data(data), settings=settings, on_bad_row="raise")
    with pytest.raises(ValueError, match="`batch_size`"):
        evaluate_model(model, processor, data, batch_size=0)


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


def test_token_texts_make_the_text(processor):
    tokenizer = processor.tokenizer

    class Bytes:
        def decode(self, ids, **kwargs):
            return bytes(ids).decode(errors="replace")

    ids = list("a é€ b".encode())
    assert token_texts(Bytes(), ids) == ["a", " ", "", "é", "", "", "€", " ", "b"]
    assert "".join(token_texts(Bytes(), ids[:-4])).startswith("a é")
    ids = tokenizer.encode(" it's, so.")
    assert token_texts(tokenizer, ids) == [tokenizer.decode([one]) for one in ids]
    assert token_texts(tokenizer, []) == []


def test_batch_size_1_is_measured_over_all_lengths(folder, model, processor, monkeypatch):
    batches = []
    encode = evaluation._Runner._encode_together

    def spy(self, clips):
        batches.append([round(len(clip) / RATE_HZ, 2) for clip in clips.values()])
        return encode(self, clips)

    monkeypatch.setattr(evaluation._Runner, "_encode_together", spy)
    data = load_data(folder)
    result = measure_batch_1(model, processor, data, num_rows=3)
    # Sorted: 0.3 0.4 0.5 0.7 0.9 1.0 1.2; the first is the warm-up.
    assert batches[1:] == [[0.4], [0.7], [1.0]]
    assert result["num_utterances"] == 3 and result["audio_s"] == 2.1
    assert 0 < result["rtfx"] < result["rtfx_encoder"] and result["rtfx"] < result["rtfx_decoder"]
    assert measure_batch_1(model, processor, data)["num_utterances"] == 7
    assert len(data.skipped) == 1


def test_folder_of_results(folder, model, processor, checkpoint, tmp_path):
    data = load_data(folder)
    rows = evaluate_model(model, processor, data)
    content = write_evaluation(
        tmp_path / "out",
        rows[:-1],
        model=model,
        model_name="some name",
        model_path=checkpoint,
        data=data,
        batch_size=8,
        command="a command",
        batch_1={"rtfx": 1.5},
        peak_memory=peak_memory_mib("cpu"),
    )
    assert content == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert read_rows(tmp_path / "out") == rows[:-1]
    scored = score(read_rows(tmp_path / "out"))
    assert scored["metrics"].items() <= content["metrics"].items() and scored["intervals"] == content["intervals"]
    assert content["metrics"].keys() - scored["metrics"].keys() == {"rtfx_batch_1", "peak_memory_mib"}
    # torch alone is more than 50 MiB, and no test takes 100 GiB.
    assert 50 < content["metrics"]["peak_memory_mib"] < 1e5
    settings = content["settings"]
    assert (settings["decoding"], settings["gamma"], settings["dtype"]) == ("drafts", 3.0, "float32")
    assert settings["draft_branches"] == ["masks", "hypothesis"] and settings["logprob_threshold"] is None
    assert content["model"] == "some name" and len(content["model_sha256"]) == 64
    assert content["model_sha256"] != evaluation.model_sha256(tmp_path)
    (described,) = content["data"]
    assert (described["name"], described["num_utterances"], described["num_skipped"]) == ("clips", 6, 1)
    assert set(evaluation.PACKAGES) < set(content["versions"])
    assert content["machine"]["device"] == "cpu" and content["machine"]["num_cores"] >= 1
    assert content["normaliser"] == "transformers EnglishTextNormalizer({}), no spelling table"


def test_settings_say_which_decoding_it_was(canvas):
    settings = describe_settings(canvas.generation_config)
    assert settings["decoding"] == "canvas" and settings["canvas"]["canvas_length"] == 12
    assert settings["sampler"]["name"] == "pbeb_conf" and settings["max_denoising_steps"] == 32


def test_half_precision(folder, model, processor):
    rows = evaluate_model(copy.deepcopy(model).to(torch.bfloat16), processor, folder)
    assert len(rows) == 7 and all(row["tokens"] for row in rows if row["hypothesis"])


# Processes.


def test_processes_lose_and_double_nothing(folder, model, processor, monkeypatch):
    data = load_data(folder)
    expected = timeless(evaluate_model(model, processor, data, batch_size=2))
    shares = []
    for index in range(3):
        monkeypatch.setattr(evaluation, "process_index_and_number", lambda device=None, index=index: (index, 3))
        monkeypatch.setattr(evaluation, "_merge", lambda data, rows, skipped: rows)
        shares.append(evaluate_model(model, processor, data, batch_size=2))
    monkeypatch.undo()
    assert sorted(i for share in shares for i in share) == list(range(7))
    gathered = [pair for share in reversed(shares) for pair in share.items()]

    def merge(pairs):
        results = iter([pairs, []])
        monkeypatch.setattr(evaluation, "_gather", lambda values: next(results))
        return evaluation._merge(data, {}, [])

    assert timeless(merge(gathered)) == expected
    with pytest.raises(RuntimeError, match="6 rows of 6 utterances, 1 lack"):
        merge(gathered[1:])
    with pytest.raises(RuntimeError, match="8 rows of 7 utterances"):
        merge([*gathered, gathered[0]])


def test_two_processes_write_what_one_does(folder, checkpoint, tmp_path):
    (folder / "audio" / "6.wav").write_bytes((folder / "audio" / "6.wav").read_bytes()[:2000])
    # Drawn, so that rows that got another generator would show.
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    drawing = shutil.copytree(checkpoint, tmp_path / "drawing")
    (drawing / "generation_config.json").write_text(json.dumps(settings | {"temperature": 1.0}))
    script = [ROOT / "training" / "run_eval.py", "--data", folder, "--model", drawing, "--batch-size", 2]
    script += ["--device", "cpu"]
    launch(*LAUNCHERS["accelerate"].split(), *script, "--output", tmp_path / "two")
    sys.argv, before = [str(one) for one in [*script, "--output", tmp_path / "one"]], sys.argv
    try:
        from test_run_eval import run_eval

        one = run_eval.main()
    finally:
        sys.argv = before
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (one["settings"]["num_processes"], two["settings"]["num_processes"]) == (1, 2)
    rows = timeless(read_rows(tmp_path / "two"))
    for row, other in zip(rows, timeless(read_rows(tmp_path / "one")), strict=True):
        # Batches differ in nothing but which process they are on.
        assert row == other
    assert len(rows) == 6
    assert [s["id"] for s in two["data"][0]["skipped"]] == ["audio/bad.wav", "audio/6.wav"]
    assert one["data"] == two["data"]
    assert {k: v for k, v in one["metrics"].items() if k[:4] not in ("rtfx", "peak")}.items() <= two["metrics"].items()


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


def test_an_evaluation_of_bad_rows_tells_their_causes(folder, checkpoint, tmp_path, run_command):
    """Durations are told, so that the audio is read only when it is its turn."""
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
