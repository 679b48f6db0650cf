# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources, mixtures, streams, joined windows, batches of bounded seconds and the collator."""

import csv
import io
import itertools
import json
import pickle
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from tiny_models import tiny_model, tiny_processor
from torch.utils.data import DataLoader

from mdm_asr_hf.data.augmentation import Augmenter
from mdm_asr_hf.data.mixing import JoinSettings, Mixture, SpeechStream, load_sources
from mdm_asr_hf.data.sources import BadRowError, BadRows, GrowingFolder, Source, Utterances, read_manifest
from mdm_asr_hf.train import collator as collating
from mdm_asr_hf.train.collator import (
    DataCollatorForMDMASR,
    SecondsBatches,
    SecondsBatchSampler,
)

RATE = 16_000
EOS = 1
# Streams of `datasets` sleep when they end, for threads that have not ended here.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def tone(seconds, hz=300.0):
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def write_folder(folder, seconds=(0.3, 0.5, 0.4), *, form="jsonl", **columns):
    """An audiofolder of tones, "word a" and so on; `columns` gives further columns."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i, one_s in enumerate(seconds):
        soundfile.write(folder / f"audio/{i}.wav", tone(one_s, 200 + 50 * i), RATE)
        row = {"file_name": f"audio/{i}.wav", "text": f"word {chr(97 + i % 26)}"}
        rows.append(row | {name: values[i] for name, values in columns.items()})
    with open(folder / f"metadata.{form}", "w", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_rows(durations_s, **columns):
    rows = [{"audio": f"{i}.wav", "text": f"t{i}", "duration_s": float(d)} for i, d in enumerate(durations_s)]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


def collator(**settings):
    return DataCollatorForMDMASR(tiny_processor(), **settings)


@pytest.fixture
def prompted():
    processor = tiny_processor()
    processor.prompt_template = {
        "tokens": [3, "language", "punctuation"],
        "slots": {"language": {"en": 10, "de": 11}, "punctuation": {"true": 5, "false": 6}},
        "defaults": {"language": "en", "punctuation": "true"},
    }
    return processor


# Sources


@each("form", ["jsonl", "csv"])
def test_a_folder_with_splits(tmp_path, form):
    folder = write_folder(tmp_path / "a" / "train", form=form, language=["en", "de", "en"])
    write_folder(tmp_path / "a" / "test", seconds=(0.2,))
    data = load_sources(tmp_path / "a")
    assert [data[i]["text"] for i in range(len(data))] == ["word a", "word b", "word c"]
    assert data[1]["audio"] == str(folder / "audio/1.wav") and data[1]["language"] == "de"
    np.testing.assert_allclose(data.durations_s, [0.3, 0.5, 0.4])
    assert len(load_sources({"path": str(tmp_path / "a"), "split": "test"})) == 1


def test_manifests_of_other_programs(tmp_path):
    # A byte order mark, line ends of Windows, another name of the text, two files in one, texts like numbers.
    write_folder(tmp_path)
    for form in ("csv", "tsv", "jsonl"):
        rows = [{"audio": f"audio/{i}.wav", "sentence": text} for i, text in enumerate(("GRÖSSER", "null", "1984"))]
        if form == "jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        else:
            separator = {"csv": ",", "tsv": "\t"}[form]
            lines = [separator.join(row) for row in (rows[0], *(row.values() for row in rows))]
        marks = ["\ufeff" if form == "jsonl" or not i else "" for i in range(len(lines))]
        content = "".join(f"{mark}{line}\r\n" for mark, line in zip(marks, lines, strict=True))
        manifest = tmp_path / f"m.{form}"
        manifest.write_bytes((content + "\r\n").encode())
        data = load_sources({"path": str(manifest), "lowercase": True, "language": "de"})
        assert [row["text"] for row in data] == ["grösser", "null", "1984"]
        assert [row["audio"] for row in data] == [str(tmp_path / row["audio"]) for row in rows]
        assert data[0]["language"] == "de" and data[2]["duration_s"] == pytest.approx(0.4)
        manifest.write_bytes(content.encode("utf-16"))
        with pytest.raises(ValueError, match=f"m.{form}' is not in UTF-8.*Save it so"):
            load_sources(manifest)

    (tmp_path / "m.tsv").write_text('path\ttext\na\t"one\n\ntwo"\nb\tsay "x"\n\nc\t"say" "x"\n"d"\t"say ""x"""\n')
    texts = [row["text"] for _, row, _ in read_manifest(tmp_path / "m.tsv")]
    assert texts == ["one\n\ntwo", 'say "x"', 'say "x"', 'say "x"']

    def text(source=None, **columns):
        (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "audio/0.wav", **columns}))
        return load_sources({"path": str(tmp_path / "m.jsonl"), **(source or {})})[0]["text"]

    assert text(transcript="x") == "x" and text(transcript="x", text="y") == "y"
    assert text({"text_column": "raw_text"}, raw_text="x", sentence="y") == "x"
    with pytest.raises(ValueError, match=r"`text_column` is not told, and .*\['sentence', 'raw_text'\]. Name"):
        text(raw_text="x", sentence="y")
    with pytest.raises(ValueError, match=r"`text_column` 'text' is not in .*\['audio', 'words'\]"):
        text(words="x")
    for setting in ("audio_column", "language_column", "duration_column"):
        with pytest.raises(ValueError, match=rf"`{setting}` 'nope' is not in .*\['audio', 'text'\]"):
            text({setting: "nope"}, text="x")


def test_a_data_set_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = io.BytesIO()
    soundfile.write(content, tone(0.5), RATE, format="WAV")
    rows = [{"audio": {"bytes": content.getvalue(), "path": None}, "sentence": f"hello {i}"} for i in "ab"]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    source = {"path": str(tmp_path / "data"), "text_column": "sentence"}
    for data in (load_sources(source), load_sources({**source, "streaming": True})):
        rows = list(data)
        assert sorted(row["text"] for row in rows) == ["hello a", "hello b"]
        assert [row["duration_s"] for row in rows] == [0.5, 0.5]
        assert collator()(rows)["attention_mask"].sum(dim=1).tolist() == [50, 50]
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"`text_column` 'words' is not in .*\['audio', 'sentence'\]"):
            load_sources({**source, "text_column": "words", "streaming": streaming})
    (row, _) = load_sources({**source, "text_column": "audio", "streaming": True})
    with pytest.raises(BadRowError, match="holds .*bytes.*, not text"):
        collator()([row])


@each(
    ("line", "reason", "message"),
    [
        ('{"file_name": "audio/0.wav", "text": "..."}', "empty transcript", "line 4: empty transcript. It is '...'"),
        ('{"file_name": "audio/0.wav", "text": null}', "no transcript", "line 4: no transcript.*'text' holds None"),
        ('{"file_name": "audio/0.wav", "text": 1984}', "no transcript", "'text' holds 1984"),
        ('{"file_name": "audio/0.wav", "text": NaN}', "no transcript", "'text' holds nan"),
        ('{"file_name": "audio/0.wav"}', "no transcript", "'text' holds None"),
        ('{"text": "x"}', "unreadable audio", "'file_name' holds None, not a path"),
        ('{"file_name": "audio/9.wav", "text": "x"}', "unreadable audio", "line 4: unreadable audio.*9.wav"),
        ('{"file_name": "audio/bad.wav", "text": "x"}', "unreadable audio", "line 4: unreadable audio.*bad.wav"),
        ('{"file_name": "audio/0.wav", "text": "x", "duration_s": 99}', "audio too long", "99.00 s, more than 30"),
    ],
)
def test_bad_rows_raise_or_are_counted(tmp_path, line, reason, message):
    folder = write_folder(tmp_path / "a", duration_s=[0.3, None, None])
    (folder / "audio/bad.wav").write_bytes(b"nothing")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(BadRowError, match=message) as info:
        load_sources(folder, max_duration_s=30.0)
    assert info.value.reason == reason and str(folder) in str(info.value)
    for join in (None, {"max_s": 5.0}):
        with pytest.raises(
            ValueError, match=f"^1 of 4 rows of .* cannot be used, more than 20 %: 1 like: .*{message}"
        ):
            load_sources(folder, max_duration_s=30.0, on_bad_row="skip", max_bad_share=0.2, join=join)
        data = load_sources(folder, max_duration_s=30.0, on_bad_row="skip", max_bad_share=0.25, join=join)
        assert sum(len(row.get("parts", "1")) for row in data) == 3 and data.skipped == {reason: 1}


def test_causes_are_counted_whatever_the_names():
    messages = [f"a/m.jsonl line {i}: unreadable audio. 'x{i}.wav' does not exist. Check the path." for i in range(9)]
    messages.insert(1, "a/m.jsonl line 77: empty transcript. It is '...'.")
    bad = BadRows([*messages, "third", "fourth", "fifth"])
    assert len(bad) == 13
    assert str(bad) == (
        "9 like: a/m.jsonl line 0: unreadable audio. 'x0.wav' does not exist. Check the path; 1 like: a/m.jsonl line "
        "77: empty transcript. It is '...'; 1 like: third; and 2 causes more."
    )


def test_bad_manifests_specs_and_settings(tmp_path):
    for name, content, message in [
        ("m.jsonl", "nonsense\n", "line 1 is not JSON"),
        ("m.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("m.jsonl", "[" * 10**5, "line 1 is not JSON"),
        (
            "m.jsonl",
            '{"audio": "x", "text": "x", "duration": "long"}\n',
            "line 1: `duration_column` .*'long', not sec",
        ),
        ("m.jsonl", '{"audio": "x", "text": "x"}\n', "has no rows to use. They were left out: 1 like: .*line 1: unre"),
        ("m.jsonl", "\n", "has no rows"),
        ("m.csv", "audio,text\nx.wav,one, two\n", "more or fewer fields"),
        ("m.csv", 'audio,text\nx.wav,"one\ny.wav,two\n', "m.csv line [12] is no row .*Is a quote not closed"),
        ("m.csv", 'audio,text\nx.wav,"one\n' + "y.wav,two\n" * 20_000, "m.csv line [12] is no row"),
        ("m.txt", "x", "is not a manifest"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_sources(tmp_path / name, on_bad_row="skip", max_bad_share=1.0)

    folder = str(write_folder(tmp_path / "a"))
    for specs, settings, message in (
        ([], {}, "is empty"),
        ({"path": folder, "colour": 1}, {}, "A source must be"),
        ({"text_column": "x"}, {}, "A source must be"),
        ([folder, {"path": folder, "weight": 2.0}], {}, "for some sources only"),
        ({"path": folder, "weight": 0.0}, {}, "must be positive"),
        (str(tmp_path / "none.jsonl"), {}, "does not exist"),
        ({"path": folder + "/metadata.jsonl", "split": "test"}, {}, "has no splits"),
        ({"path": str(tmp_path / "none"), "growing": True}, {}, "`growing` needs a folder"),
        ([folder, {"path": folder, "growing": True}], {}, "give each of several sources a `weight`"),
        (folder, {"on_bad_row": "ignore"}, "`on_bad_row`.*'ignore'"),
        (folder, {"max_bad_share": 1.1}, "`max_bad_share`.*1.1"),
        (folder, {"join": {"min_s": 3.0, "max_s": 2.0}}, "must be 0 < min_s"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sources(specs, **settings)

    with pytest.raises(ValueError, match=r"row 0 .* no column 'text', but \['audio', 'sentence'\]. Rename"):
        collator(on_bad_row="skip")([{"audio": (tone(0.2), RATE), "sentence": "a"}])
    for settings, message in (({"on_bad_row": "drop"}, "`on_bad_row`"), ({"max_bad_share": "1%"}, "`max_bad.*'1%'")):
        with pytest.raises(ValueError, match=message):
            collator(**settings)


# Mixtures and streams


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 5.0), min_size=3, max_size=3),
    st.integers(0, 9),
)
def test_weights_give_shares_and_every_row_its_turn(sizes, weights, seed):
    parts = [Utterances(make_rows(np.linspace(1, 9, size), part=[p] * size)) for p, size in enumerate(sizes)]
    mixture = Mixture(parts, weights[: len(sizes)], seed)
    total, counts, bounds = sum(weights[: len(sizes)]), Counter(), mixture.durations_s.copy()
    expected = [max(1, round(sum(sizes) * weight / total)) for weight, _ in zip(weights, sizes, strict=False)]
    for epoch in range(24):
        mixture.set_epoch(epoch)
        rows = [mixture[i] for i in range(len(mixture))]
        assert [sum(row["part"] == p for row in rows) for p in range(len(sizes))] == expected
        assert all(row["duration_s"] <= bound for row, bound in zip(rows, bounds, strict=True))
        counts.update((row["part"], row["text"]) for row in rows)
    for p, size in enumerate(sizes):
        seen = [counts[p, f"t{i}"] for i in range(size)]
        # Groups that take turns differ in size by one; with up to 12 of them, 24 epochs even that out.
        assert min(seen) >= 1 and sum(seen) == 24 * expected[p]
        if expected[p] % size == 0:
            assert set(seen) == {24 * expected[p] // size}


def test_mixtures_and_windows():
    mixture = Mixture([Utterances(make_rows([3.0, 1.0])), Utterances(make_rows([2.0]))])
    seeds = set()
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        assert [mixture[i]["duration_s"] for i in range(3)] == [3.0, 1.0, 2.0]
        seeds |= {mixture[i]["augment_seed"] for i in range(3)}
    assert len(seeds) == 6
    with pytest.raises(IndexError):
        mixture[3]

    rows = make_rows(np.random.default_rng(0).uniform(0.3, 1.5, 6000))
    stream = SpeechStream([Utterances(rows)], join=JoinSettings(min_s=1.0, max_s=25.0))
    actual_s = [window["duration_s"] for window in stream]
    shares = np.histogram(actual_s, bins=np.linspace(1, 25, 7))[0] / len(actual_s)
    np.testing.assert_allclose(shares, 1 / 6, atol=0.05)


@given(st.integers(0, 100), st.integers(1, 80))
def test_windows_hold_every_utterance_once_and_whole(seed, num_rows):
    durations_s = np.random.default_rng(seed).uniform(0.5, 8.0, num_rows)
    rows = make_rows(durations_s, language=["en" if i % 3 else "de" for i in range(num_rows)])
    settings = {"join": JoinSettings(max_s=20.0), "seed": seed}
    stream = SpeechStream([Utterances(rows)], **settings)
    first = list(stream)
    assert first == list(stream)
    assert sorted(part["text"] for window in first for part in window["parts"]) == sorted(r["text"] for r in rows)
    for window in first:
        parts, pauses_s = window["parts"], window["pauses_s"]
        assert {part["language"] for part in parts} == {window["language"]}
        assert len(pauses_s) == len(parts) - 1 and all(0.1 <= pause_s <= 0.5 for pause_s in pauses_s)
        assert window["duration_s"] == pytest.approx(sum(part["duration_s"] for part in parts) + sum(pauses_s))
        assert len(parts) == 1 or window["duration_s"] <= 20.0 + 1e-9
    stream.set_epoch(1)
    assert list(stream) != first
    # Repeated, the second pass is the second epoch.
    again = itertools.islice(SpeechStream([Utterances(rows)], **settings, repeat=True), len(first), None)
    assert next(again) == next(iter(stream))


def test_local_sources_and_growing_folders_are_mixed(tmp_path):
    for name, seconds in (("a", 0.2), ("b", 0.3)):
        write_folder(tmp_path / name, seconds=[seconds] * 12, language=["en"] * 12)
    paths = [str(tmp_path / name) for name in "ab"]

    def parts(data):
        return [part["audio"].replace(str(tmp_path), "") for window in data for part in window["parts"]]

    data = load_sources(paths, join={"max_s": 3.0})
    assert len(set(parts(data))) == len(parts(data)) == 24 and max(len(row["parts"]) for row in data) > 4
    first = parts(data)
    data.set_epoch(1)
    assert parts(data) != first
    # Workers share the rows.
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert sorted(parts(loader)) == sorted(first)
    weighted = load_sources([{"path": path, "weight": w} for path, w in zip(paths, (3, 1), strict=True)], join={})
    shares = Counter(part[:2] for part in parts(weighted))
    # It ends when b has been read through; a begins anew meanwhile.
    assert shares["/b"] == 12 and shares["/a"] > 20

    write_folder(tmp_path / "c", seconds=[0.2] * 20)
    write_folder(tmp_path / "g" / "shard-00000", seconds=[0.3] * 20)
    specs = [
        {"path": str(tmp_path / "c"), "weight": 1.0},
        {"path": str(tmp_path / "g"), "weight": 3.0, "growing": True},
    ]
    stream = load_sources(specs, repeat=True)
    rows = list(itertools.islice(stream, 400))
    assert stream.is_growing
    assert sum("/g/" in row["audio"] for row in rows) / 400 == pytest.approx(0.75, abs=0.07)
    assert len({row["audio"] for row in rows}) == 40
    batches = SecondsBatches(load_sources(specs, join={"max_s": 2.0}), 8.0)
    loader = DataLoader(batches, batch_size=1, collate_fn=collator(), num_workers=2)
    for batch in itertools.islice(loader, 3):
        assert batch["attention_mask"].numel() <= 800 and len(batch["labels"]) == len(batch["attention_mask"])


def test_growing_folder_new_rows_first_then_again(tmp_path, monkeypatch):
    for i in range(2):
        write_folder(tmp_path / "s" / f"shard-0000{i}", seconds=[0.2, 0.3], sentence=[2 * i, 2 * i + 1])
    assert sorted(row["text"] for row in load_sources(tmp_path / "s")) == ["word a", "word a", "word b", "word b"]
    # Audio would need torchcodec; where it is does not.
    stream = datasets.load_dataset("audiofolder", data_dir=str(tmp_path / "s"), split="train", streaming=True)
    rows = list(stream.cast_column("audio", datasets.Value("string")))
    assert sorted((row["sentence"], row["audio"]) for row in rows) == [
        (i, str(tmp_path / f"s/shard-0000{i // 2}/audio/{i % 2}.wav")) for i in range(4)
    ]

    monkeypatch.setattr("mdm_asr_hf.data.sources.POLL_S", 0.0)
    for name, place in (("shards", "shard-00000"), ("alone", ".")):
        folder = write_folder(tmp_path / name / place, seconds=[0.2] * 6)
        lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
        # Two whole lines and half of the third: what a reader may find at any time.
        (folder / "metadata.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
        growing = GrowingFolder(Source(str(tmp_path / name), growing=True))
        rows = growing.read(0, 0, 0, 1)
        first = [next(rows)["text"] for _ in range(4)]
        assert sorted(first[:2]) == sorted(first[2:]) == ["word a", "word b"]
        with open(folder / "metadata.jsonl", "a") as file:
            file.write(lines[2][10:] + "".join(lines[3:]))
        assert sorted(next(rows)["text"] for _ in range(4)) == ["word c", "word d", "word e", "word f"]
        assert sorted(next(rows)["text"] for _ in range(6)) == [f"word {letter}" for letter in "abcdef"]
        # Another worker's lines.
        others = growing.read(0, 0, 1, 3)
        assert {next(others)["text"] for _ in range(6)} == {"word b", "word e"}


# Batches


@given(st.lists(st.floats(0.05, 30.0), min_size=4, max_size=120), st.floats(30.0, 200.0), st.integers(1, 4))
def test_batches_hold_every_row_once_within_limits_and_processes_share_them(durations_s, max_seconds, num_processes):
    try:
        sampler = SecondsBatchSampler(durations_s, max_seconds, seed=3, num_processes=num_processes)
    except ValueError as error:
        # Only rows that stand alone cannot be dealt out evenly.
        assert "batches of one row" in str(error) and len(durations_s) % num_processes
        return
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(durations_s)))
        assert len(batches) == len(sampler) and len(batches) % num_processes == 0 and batches == list(sampler)
        assert all(len(batch) * max(durations_s[i] for i in batch) <= max_seconds + 1e-6 for batch in batches)
    shards = [list(BatchSamplerShard(sampler, num_processes, i, even_batches=False)) for i in range(num_processes)]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(len(durations_s)))
    # What the processes do in one step takes about as long: the ranges of the steps hardly overlap.
    longest = [[max(durations_s[i] for i in batch) for batch in batches] for batches in zip(*shards, strict=True)]
    assert sum(max(step) - min(step) for step in longest) < 1.5 * max(durations_s)


def test_batches_are_shuffled_resumed_or_refused():
    durations_s = np.random.default_rng(0).uniform(1, 25, 500)
    sampler = SecondsBatchSampler(durations_s, 200.0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    # The shortest and longest rows have no others to change places with.
    assert len({frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}) < 0.1 * len(first)
    padded = sum(len(batch) * durations_s[batch].max() for batch in first)
    assert durations_s.sum() / padded > 0.9
    # The limit is used: hardly more batches than the padded seconds ask for.
    assert len(first) < 1.15 * durations_s.sum() / 200 + 2
    means = [durations_s[batch].mean() for batch in first]
    assert means != sorted(means)
    assert list(SecondsBatchSampler(durations_s, 200.0, seed=1)) != first

    mixture = Mixture([Utterances(make_rows(np.random.default_rng(0).uniform(0.5, 8.0, 100)))])

    def batches(skip=0, epoch=1):
        sampler = SecondsBatchSampler(mixture, 40.0, num_processes=2)
        loader = DataLoader(mixture, batch_sampler=sampler, collate_fn=lambda rows: [row["text"] for row in rows])
        loader = prepare_data_loader(loader, num_processes=2, process_index=1, even_batches=False)
        if skip:
            loader = skip_first_batches(loader, skip)
        # As accelerate forwards it: to the data set, which the sampler asks.
        loader.set_epoch(epoch)
        return list(loader)

    assert batches(skip=2) == batches()[2:] and batches(epoch=0) != batches()

    for durations_s, num_processes, message in [
        ([1.0, 31.0], 1, "Row 1 lasts 31.00 s, more than `max_seconds=30`"),
        ([], 1, "at least one"),
        ([1.0, float("nan")], 1, "NaN"),
        ([1.0], 2, "1 batches of one row cannot be shared by 2 processes"),
    ]:
        with pytest.raises(ValueError, match=message):
            SecondsBatchSampler(durations_s, 30.0, num_processes=num_processes)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 40))
def test_batches_of_a_stream(seed, num_rows, buffer_rows):
    rows = make_rows(np.random.default_rng(seed).uniform(0.5, 8.0, num_rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collating, "BUFFER_ROWS", buffer_rows)
        batches = list(SecondsBatches(rows, 20.0, seed))
    assert sorted(row["text"] for batch in batches for row in batch) == sorted(row["text"] for row in rows)
    assert all(len(batch) * max(row["duration_s"] for row in batch) <= 20.0 + 1e-6 for batch in batches)
    with pytest.raises(ValueError, match="lasts .* more than `max_seconds=0.1`"):
        list(SecondsBatches(rows, 0.1))


# The collator


class Decoder:
    """What datasets >= 4 gives: torchcodec's decoder."""

    def __init__(self, samples):
        self.samples = samples

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(self.samples)[None], sample_rate=RATE)


def test_batch_of_audio_and_text(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), RATE)
    rows = [
        {"audio": str(tmp_path / "a.wav"), "text": "ab"},
        {"audio": {"array": tone(0.8)[::2], "sampling_rate": 8000}, "text": " c "},
        {"audio": {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}, "text": "a b"},
        {"audio": Decoder(tone(0.3)), "text": "a"},
    ]
    batch = collator()(rows)
    assert sorted(batch) == ["attention_mask", "input_features", "labels"]
    assert batch["input_features"].shape == (4, 80, 80)
    assert batch["attention_mask"].sum(dim=1).tolist() == [50, 80, 50, 30]
    space, a, b, c = 3, 4, 5, 6
    assert batch["labels"].tolist() == [
        [space, a, b, EOS, -100],
        [space, c, EOS, -100, -100],
        [space, a, space, b, EOS],
        [space, a, EOS, -100, -100],
    ]
    direct = tiny_processor()(audio=[(tone(0.5), RATE)], text="ab")
    alone = collator()([{"audio": (tone(0.5), RATE), "text": "ab"}])
    for name in alone:
        torch.testing.assert_close(alone[name], direct[name])
    assert torch.isfinite(tiny_model()(**batch).loss)

    # All that a canvas of 300 positions holds behind a prompt of one token.
    row = {"audio": (tone(0.2), RATE), "text": "a" * 297}
    batch = collator(max_label_tokens=299)([row])
    assert batch["labels"].shape == (1, 299) and torch.isfinite(tiny_model()(**batch).loss)


def window(rows, pauses_s):
    return {"parts": rows, "pauses_s": pauses_s, "language": None, "duration_s": 1.0}


def test_windows_are_joined_and_prompted(prompted):
    clips = [tone(0.3), tone(0.2, 500.0)]
    parts = [{"audio": (clip, RATE), "text": text, "duration_s": 0.3} for clip, text in zip(clips, "ab", strict=True)]
    batch = collator()([window(parts, [0.25])])
    whole = np.concatenate([clips[0], np.zeros(round(0.25 * RATE), np.float32), clips[1]])
    expected = tiny_processor()(audio=(whole, RATE), text="a b")
    torch.testing.assert_close(batch["input_features"], expected["input_features"])
    assert batch["labels"].tolist() == expected["labels"].tolist()

    rows = [{"audio": (tone(0.2), RATE), "text": "a", "lang": language} for language in ("de", "en", None)]
    batch = DataCollatorForMDMASR(prompted, language_column="lang", punctuation=False)(rows)
    assert batch["prompt_ids"].tolist() == [[3, 11, 6], [3, 10, 6], [3, 10, 6]]
    assert "prompt_ids" not in DataCollatorForMDMASR(prompted)(rows)
    assert DataCollatorForMDMASR(prompted, language="de")(rows)["prompt_ids"].tolist() == [[3, 11, 5]] * 3
    with pytest.raises(ValueError, match="has no place in this model's prompt"):
        DataCollatorForMDMASR(prompted, mood="good")
    rows[0]["lang"] = "xx"
    with pytest.raises(ValueError, match="`language='xx'` is not known"):
        DataCollatorForMDMASR(prompted, language_column="lang")(rows)


def bad_rows(folder):
    (folder / "bad.wav").write_bytes(b"RIFF0000WAVEnothing")
    soundfile.write(folder / "long.wav", np.zeros(31 * 4000, np.float32), 4000)
    good = (tone(0.2), RATE)
    return {
        "unreadable audio": {"audio": str(folder / "bad.wav"), "text": "a"},
        "empty transcript": {"audio": good, "text": "  ", "row": "m.jsonl line 7"},
        "transcript longer than the canvas": {"audio": good, "text": "abcdefgh"},
        "audio too long": {"audio": str(folder / "long.wav"), "text": "a"},
    }


@each(
    ("reason", "message"),
    [
        ("unreadable audio", r"row 0 of the batch \(.*bad.wav\): unreadable audio"),
        ("empty transcript", "m.jsonl line 7: empty transcript"),
        ("transcript longer than the canvas", "It has 10 tokens, more than 9"),
        ("audio too long", r"long.wav\): audio too long.*lasts 31.00 s"),
    ],
)
def test_a_bad_row_raises_or_is_counted(tmp_path, reason, message):
    row, good = bad_rows(tmp_path)[reason], {"audio": (tone(0.2), RATE), "text": "abcdefg"}
    with pytest.raises(BadRowError, match=message) as info:
        collator(max_label_tokens=9)([row])
    # As a DataLoader's worker hands it on.
    assert info.value.reason == reason == pickle.loads(pickle.dumps(info.value)).reason
    collate = collator(max_label_tokens=9, on_bad_row="skip")
    assert len(collate([row, good, row])["labels"]) == 1
    assert collate.skipped == {reason: 2} and collate.num_rows == 3
    assert collate.report() == f"2 of 3 rows skipped: 2 {reason}."
    # In a window the good utterances stay, without the pause before the bad one.
    if reason != "transcript longer than the canvas":
        collate = collator(on_bad_row="skip")
        batch = collate([window([{**one, "duration_s": 0.2} for one in (row, good)], [0.4])])
        assert batch["attention_mask"].sum() == 20 and batch["labels"].shape == (1, 9)
        assert collate.skipped == {reason: 1} and collate.num_rows == 2


def test_bad_rows_become_silence_and_end_with_their_causes(tmp_path, prompted):
    collate = DataCollatorForMDMASR(prompted, on_bad_row="skip", language_column="language")
    batch = collate([{**row, "language": "de"} for row in list(bad_rows(tmp_path).values())[:2]])
    assert batch["labels"].tolist() == [[EOS]] and batch["attention_mask"].tolist() == [[1] * 50]
    assert batch["prompt_ids"].tolist() == [[3, 11, 5]]
    assert collate.skipped["batches without a usable row"] == 1
    assert collate.report().startswith("2 of 2 rows skipped")
    with pytest.raises(ValueError, match="Nothing was learnt: 2 of 2 rows skipped: .*1 like: row 0.*bad.wav"):
        collate.check_any()

    good, (unreadable, empty, *_) = {"audio": (tone(0.1), RATE), "text": "a"}, bad_rows(tmp_path).values()

    def seen(rows, **settings):
        """How many rows were collated, one by one, and the error."""
        collate = collator(on_bad_row="skip", **settings)
        collate.processor.feature_extractor.extractor = None
        collate._read = lambda row, name: [row] if row is good else DataCollatorForMDMASR._read(collate, row, name)
        for number, row in enumerate(rows, start=1):
            try:
                collate._count("rows")
                collate._read(row, "row 0")
            except ValueError as error:
                return number, str(error)
        return number, ""

    # Where nothing can be used it shows at once, and nothing stands in for more than three batches.
    number, message = seen([unreadable, unreadable, empty, unreadable] * 5)
    assert number == 4 and message.startswith(
        "4 of 4 rows of the batches cannot be used, more than 1 %: 3 like: row 0"
    )
    assert "bad.wav" in message and "; 1 like: row 0: empty transcript" in message
    assert seen([unreadable, good] * 20)[0] < 16
    # One of a hundred may come first, or thrice; not four of a hundred for ever.
    assert seen([*[empty] * 3, *[good] * 97]) == (100, "")
    assert seen([empty, *[good] * 99] * 10) == (1000, "")
    assert 150 < seen([empty, *[good] * 24] * 20)[0] < 300
    assert seen([unreadable, good] * 20, max_bad_share=0.5) == (40, "")


def test_workers_augment_by_row_and_count_what_they_skip():
    rows = [{"audio": (tone(0.5, 200 + 20 * i), RATE), "text": "a", "augment_seed": i} for i in range(8)]
    collate = collator(augment=Augmenter())
    plain, first = collator()(rows)["input_features"], collate(rows)["input_features"]
    torch.manual_seed(5)
    assert torch.equal(collate(rows)["input_features"], first)
    other = collator(augment=Augmenter(), seed=1)(rows)["input_features"]
    assert all(one.shape != first.shape or not torch.equal(one, first) for one in (plain, other))
    # Longer than the model takes: the clip stays as it was.
    long = collator(augment=lambda samples, rate, rng, other_clips: np.tile(samples, 100))
    assert long(rows[:1])["attention_mask"].sum() == 50

    rows = [{"audio": (tone(0.2), RATE), "text": text} for text in ("a", "", "a", "")]
    collate = collator(on_bad_row="skip", max_bad_share=0.5)
    collate(rows)
    list(DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=2))
    assert collate.skipped == {"empty transcript": 4} and collate.num_rows == 8
