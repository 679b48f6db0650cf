# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources, mixtures, joined windows, batches of bounded seconds and the collator."""

import csv
import io
import itertools
import json
import multiprocessing
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
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model, tiny_processor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from mdm_asr_hf.data.augmentation import Augmenter
from mdm_asr_hf.data.mixing import JoinedStream
from mdm_asr_hf.data.sources import BadRowError, BadRows, Utterances, read_manifest
from mdm_asr_hf.train.collator import (
    DataCollatorForMDMASR,
    JoinedUtterances,
    JoinSettings,
    Mixture,
    SecondsBatches,
    SecondsBatchSampler,
    Source,
    load_sources,
    max_label_tokens,
)

RATE = 16_000
EOS = 1
# Streams of `datasets` sleep when they end, for threads that have not ended here.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
TEMPLATE = {
    "tokens": [3, "language", "punctuation"],
    "slots": {"language": {"en": 10, "de": 11}, "punctuation": {"true": 5, "false": 6}},
    "defaults": {"language": "en", "punctuation": "true"},
}


def tone(seconds, hz=300.0):
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def write_folder(folder, seconds=(0.3, 0.5, 0.4), *, form="jsonl", **columns):
    """An audiofolder of tones; `columns` gives further columns, or None to leave one of the usual out."""
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


def utterances(durations_s, **columns):
    rows = [{"audio": f"{i}.wav", "text": f"t{i}", "duration_s": d} for i, d in enumerate(durations_s)]
    return Utterances([row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)])


def collator(**settings):
    return DataCollatorForMDMASR(tiny_processor(), **settings)


@pytest.fixture
def prompted():
    processor = tiny_processor()
    processor.prompt_template = TEMPLATE
    return processor


# Sources


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_audiofolder(tmp_path, form):
    data = load_sources(write_folder(tmp_path / "a", form=form, language=["en", "de", "en"]))
    assert len(data) == 3
    assert [data[i]["text"] for i in range(3)] == ["word a", "word b", "word c"]
    assert data[1]["audio"] == str(tmp_path / "a" / "audio/1.wav") and data[1]["language"] == "de"
    assert [data[i]["duration_s"] for i in range(3)] == pytest.approx([0.3, 0.5, 0.4])
    np.testing.assert_allclose(data.durations_s, [0.3, 0.5, 0.4])


def test_manifest_with_other_columns(tmp_path):
    write_folder(tmp_path / "a")
    manifest = tmp_path / "m.tsv"
    manifest.write_text("sentence\tpath\tclient_id\tduration\nHALLO DU\ta/audio/0.wav\ts1\t0.25\n")
    (row,) = load_sources({"path": str(manifest), "text_column": "sentence", "lowercase": True, "language": "de"})
    assert (row["text"], row["speaker"], row["language"], row["duration_s"]) == ("hallo du", "s1", "de", 0.25)
    assert row["audio"] == str(tmp_path / "a/audio/0.wav")


def test_splits_are_not_merged(tmp_path):
    write_folder(tmp_path / "a" / "train")
    write_folder(tmp_path / "a" / "test", seconds=(0.2,))
    assert len(load_sources(tmp_path / "a")) == 3
    assert len(load_sources({"path": str(tmp_path / "a"), "split": "test"})) == 1


def test_hub_data_set_with_audio_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = io.BytesIO()
    soundfile.write(content, tone(0.5), RATE, format="WAV")
    rows = [{"audio": {"bytes": content.getvalue(), "path": None}, "sentence": f"hello {i}"} for i in "ab"]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    source = {"path": str(tmp_path / "data"), "text_column": "sentence"}
    data = load_sources(source)
    assert sorted(row["text"] for row in data) == ["hello a", "hello b"]
    np.testing.assert_allclose(data.durations_s, [0.5, 0.5])
    assert collator()([data[0], data[1]])["attention_mask"].sum(dim=1).tolist() == [50, 50]
    streamed = list(load_sources({**source, "streaming": True}))
    assert sorted(row["text"] for row in streamed) == ["hello a", "hello b"]
    assert [row["duration_s"] for row in streamed] == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"`text_column` 'words' is not in .*\['audio', 'sentence'\]"):
        load_sources({**source, "text_column": "words", "streaming": True})


def test_a_wrong_column_names_those_there_are(tmp_path):
    write_folder(tmp_path / "a")
    for setting in ("text_column", "audio_column", "language_column", "speaker_column", "duration_column"):
        with pytest.raises(ValueError, match=rf"`{setting}` 'nope' is not in .*\['file_name', 'text'\]"):
            load_sources({"path": str(tmp_path / "a"), setting: "nope"})


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"file_name": "audio/0.wav", "text": " "}', "empty transcript", "line 4: empty transcript"),
        ('{"file_name": "audio/0.wav", "text": "..."}', "empty transcript", "line 4: empty transcript. It is '...'"),
        ('{"file_name": "audio/0.wav", "text": null}', "no transcript", "line 4: no transcript.*'text' holds None"),
        ('{"file_name": "audio/0.wav", "text": 1984}', "no transcript", "'text' holds 1984"),
        ('{"file_name": "audio/0.wav", "text": NaN}', "no transcript", "'text' holds nan"),
        ('{"file_name": "audio/0.wav", "text": ["x"]}', "no transcript", "holds .'x'.*not text"),
        ('{"file_name": "audio/0.wav"}', "no transcript", "'text' holds None"),
        ('{"text": "x"}', "unreadable audio", "'file_name' holds None, not a path"),
        ('{"file_name": "audio/9.wav", "text": "x"}', "unreadable audio", "line 4: unreadable audio.*9.wav"),
        ('{"file_name": "audio/bad.wav", "text": "x"}', "unreadable audio", "line 4: unreadable audio.*bad.wav"),
        ('{"file_name": null, "text": "x"}', "unreadable audio", "not a path"),
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
    with pytest.raises(ValueError, match=f"^1 of 4 rows of .* cannot be used, more than 20 %: 1 like: .*{message}"):
        load_sources(folder, max_duration_s=30.0, on_bad_row="skip", max_bad_share=0.2)
    data = load_sources(folder, max_duration_s=30.0, on_bad_row="skip", max_bad_share=0.25)
    assert len(data) == 3 and data.skipped == {reason: 1}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_manifests_of_other_programs(tmp_path, form):
    """A byte order mark, line ends of Windows, another name of the text, and two files put together."""
    write_folder(tmp_path)
    rows = [{"audio": f"audio/{i}.wav", "sentence": text} for i, text in enumerate(("größer", "größer", "x"))]
    if form == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        separator = {"csv": ",", "tsv": "\t"}[form]
        lines = [separator.join(row) for row in (rows[0], *(row.values() for row in rows))]
    marks = ["\ufeff" if form == "jsonl" or not i else "" for i in range(len(lines))]
    content = "".join(f"{mark}{line}\r\n" for mark, line in zip(marks, lines, strict=True))
    manifest = tmp_path / f"m.{form}"
    manifest.write_bytes((content + "\r\n").encode())
    data = load_sources(manifest)
    assert [row["text"] for row in data] == ["größer", "größer", "x"]
    assert [row["audio"] for row in data] == [str(tmp_path / row["audio"]) for row in rows]
    manifest.write_bytes(content.encode("utf-16"))
    with pytest.raises(ValueError, match=f"m.{form}' is not in UTF-8.*Save it so"):
        load_sources(manifest)


def test_quotes_are_taken_as_they_come(tmp_path):
    (tmp_path / "m.tsv").write_text('path\ttext\na\t"one\n\ntwo"\nb\tsay "x"\n\nc\t"say" "x"\n"d"\t"say ""x"""\n')
    texts = [row["text"] for _, row, _ in read_manifest(tmp_path / "m.tsv")]
    assert texts == ["one\n\ntwo", 'say "x"', 'say "x"', 'say "x"']


def test_usual_columns_of_texts_are_found(tmp_path):
    write_folder(tmp_path)

    def text(source=None, **columns):
        row = {"audio": "audio/0.wav", **columns}
        (tmp_path / "m.jsonl").write_text(json.dumps(row))
        return load_sources({"path": str(tmp_path / "m.jsonl"), **(source or {})})[0]["text"]

    for name in ("text", "sentence", "transcription", "transcript", "raw_text"):
        assert text(**{name: "x"}) == "x"
        assert name == "text" or text(**{name: "x", "text": "y"}) == "y"
    assert text({"text_column": "raw_text"}, raw_text="x", sentence="y") == "x"
    with pytest.raises(ValueError, match=r"`text_column` is not told, and .*\['sentence', 'raw_text'\]. Name"):
        text(raw_text="x", sentence="y")
    with pytest.raises(ValueError, match=r"`text_column` 'text' is not in .*\['audio', 'words'\]"):
        text(words="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ("[" * 10**5, "line 1 is not JSON"),
        ('{"audio": "x.wav", "text": 7}\n', "line 1: no transcript. `text_column` 'text' holds 7"),
        ('{"audio": "x.wav", "text": "x", "duration": "long"}\n', "line 1: `duration_column` 'duration' holds"),
        ("\n", "has no rows"),
    ],
)
def test_bad_manifests(tmp_path, content, message):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_sources(tmp_path / "m.jsonl", on_bad_row="skip")


def test_bad_specs(tmp_path):
    folder = write_folder(tmp_path / "a")
    (tmp_path / "m.csv").write_text("audio,text\nx.wav,one, two\n")
    rows = {"end": "y.wav,two\n", "later": 'y.wav,"two", and\n', "many": "y.wav,two\n" * 20_000}
    for name, more in rows.items():
        (tmp_path / f"{name}.csv").write_text(f'audio,text\nx.wav,"one\n{more}')
    for specs, message in (
        ([], "is empty"),
        ({"path": str(folder), "colour": 1}, "A source must be"),
        ({"text_column": "x"}, "A source must be"),
        ([str(folder), {"path": str(folder), "weight": 2.0}], "for some sources only"),
        ({"path": str(folder), "weight": 0.0}, "must be positive"),
        (str(tmp_path / "none.jsonl"), "does not exist"),
        ({"path": str(tmp_path / "m.csv"), "split": "test"}, "has no splits"),
        (str(tmp_path / "m.csv"), "more or fewer fields"),
        *((str(tmp_path / f"{name}.csv"), f"{name}.csv line [12] is no row .*Is a quote not closed") for name in rows),
        ({"path": str(tmp_path / "none"), "growing": True}, "`growing` needs a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sources(specs)
    with pytest.raises(ValueError, match="`on_bad_row`"):
        load_sources(folder, on_bad_row="ignore")


# Mixtures


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 5.0), min_size=3, max_size=3),
    st.integers(0, 9),
)
def test_weights_give_shares_and_every_row_its_turn(sizes, weights, seed):
    parts = [utterances(np.linspace(1, 9, size), speaker=[str(p)] * size) for p, size in enumerate(sizes)]
    mixture = Mixture(parts, weights[: len(sizes)], seed)
    total, counts, bounds = sum(weights[: len(sizes)]), Counter(), mixture.durations_s.copy()
    expected = [max(1, round(sum(sizes) * weight / total)) for weight, _ in zip(weights, sizes, strict=False)]
    for epoch in range(24):
        mixture.set_epoch(epoch)
        rows = [mixture[i] for i in range(len(mixture))]
        assert [sum(row["speaker"] == str(p) for row in rows) for p in range(len(sizes))] == expected
        assert all(row["duration_s"] <= bound for row, bound in zip(rows, bounds, strict=True))
        counts.update((row["speaker"], row["text"]) for row in rows)
    for p, size in enumerate(sizes):
        seen = [counts[str(p), f"t{i}"] for i in range(size)]
        # Groups that take turns differ in size by one; with up to 12 of them, 24 epochs even that out.
        assert min(seen) >= 1 and sum(seen) == 24 * expected[p]
        if expected[p] % size == 0:
            assert set(seen) == {24 * expected[p] // size}


def test_mixture_without_weights_is_every_row_once():
    mixture = Mixture([utterances([3.0, 1.0]), utterances([2.0])])
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        assert [mixture[i]["duration_s"] for i in range(3)] == [3.0, 1.0, 2.0]
    seeds = {mixture[i]["augment_seed"] for i in range(3)}
    mixture.set_epoch(0)
    assert len(seeds | {mixture[i]["augment_seed"] for i in range(3)}) == 6
    with pytest.raises(IndexError):
        mixture[3]


# Joined utterances


def joined(seed=0, num=60, **settings):
    durations_s = np.random.default_rng(seed).uniform(0.5, 8.0, num)
    languages, speakers = ["en" if i % 3 else "de" for i in range(num)], [str(i % 4) for i in range(num)]
    data = utterances(durations_s, language=languages, speaker=speakers)
    return JoinedUtterances(data, JoinSettings(**settings), seed)


@given(st.integers(0, 200), st.integers(1, 80), st.booleans())
def test_windows_hold_every_utterance_once_and_whole(seed, num, same_speaker):
    windows = joined(seed, num, min_s=1.0, max_s=20.0, same_speaker=same_speaker)
    assert len(windows.durations_s) == len(windows)
    before = windows.durations_s.copy()
    for epoch in (0, 1):
        windows.set_epoch(epoch)
        seen = []
        for i in range(len(windows)):
            window = windows[i]
            parts = window["parts"]
            seen += [part["text"] for part in parts]
            assert len({part["language"] for part in parts}) == 1 and window["language"] == parts[0]["language"]
            assert not same_speaker or len({part["speaker"] for part in parts}) == 1
            assert window["text"] == " ".join(part["text"] for part in parts)
            assert len(window["pauses_s"]) == len(parts) - 1
            assert all(0.1 <= pause <= 0.5 for pause in window["pauses_s"])
            duration_s = sum(part["duration_s"] for part in parts) + sum(window["pauses_s"])
            assert window["duration_s"] == pytest.approx(duration_s)
            assert duration_s <= windows.durations_s[i] + 1e-9
            assert len(parts) == 1 or windows.durations_s[i] <= 20.0 + 1e-9
        assert sorted(seen) == sorted(f"t{i}" for i in range(num))
        np.testing.assert_array_equal(windows.durations_s, before)


def test_joins_are_seeded_and_fresh_each_epoch():
    def companies(windows, epoch):
        windows.set_epoch(epoch)
        parts = [[part["text"] for part in windows[i]["parts"]] for i in range(len(windows))]
        return {pair for texts in parts for pair in itertools.pairwise(texts)}

    windows = joined(num=300)
    first, second = companies(windows, 0), companies(windows, 1)
    assert first == companies(joined(num=300), 0) and second == companies(joined(num=300), 1)
    assert len(first & second) < 0.2 * len(first)


def test_window_lengths_are_uniform():
    short = utterances(np.random.default_rng(0).uniform(0.3, 1.5, 6000))
    windows = JoinedUtterances(short, JoinSettings(min_s=1.0, max_s=25.0))
    actual_s = np.array([windows[i]["duration_s"] for i in range(len(windows))])
    shares = np.histogram(actual_s, bins=np.linspace(1, 25, 7))[0] / len(windows)
    np.testing.assert_allclose(shares, 1 / 6, atol=0.04)
    assert actual_s.max() <= 25.0


def test_rows_without_speaker_stay_alone():
    windows = JoinedUtterances(utterances([1.0] * 6, speaker=[None] * 6), JoinSettings(same_speaker=True))
    assert len(windows) == 6


def test_joining_a_mixture_says_how():
    with pytest.raises(ValueError, match="Join each source's"):
        JoinedUtterances(Mixture([utterances([1.0])]))
    for settings in ({"min_s": 3.0, "max_s": 2.0}, {"min_pause_s": -1.0}):
        with pytest.raises(ValueError, match="must be 0 <"):
            JoinSettings(**settings)


@given(st.integers(0, 100), st.booleans())
def test_joined_stream(seed, same_speaker):
    rows = joined(seed).utterances.rows
    stream = JoinedStream(rows, JoinSettings(max_s=20.0, same_speaker=same_speaker), seed)
    first, again = list(stream), list(stream)
    assert first == again
    assert sorted(part["text"] for window in first for part in window["parts"]) == sorted(r["text"] for r in rows)
    for window in first:
        assert len({part["language"] for part in window["parts"]}) == 1
        assert not same_speaker or len({part["speaker"] for part in window["parts"]}) == 1
        assert len(window["parts"]) == 1 or window["duration_s"] <= 20.0 + 1e-9
    stream.set_epoch(1)
    assert list(stream) != first


# Batches


@given(
    st.lists(st.floats(0.05, 30.0), min_size=4, max_size=120),
    st.floats(30.0, 200.0),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(1, 4),
    st.booleans(),
)
def test_batches_hold_every_row_once_within_limits(durations_s, max_seconds, max_rows, num_processes, shuffle):
    try:
        sampler = SecondsBatchSampler(
            durations_s, max_seconds, max_rows, seed=3, num_processes=num_processes, shuffle=shuffle
        )
    except ValueError as error:
        # Only rows that stand alone cannot be dealt out evenly.
        assert "batches of one row" in str(error) and len(durations_s) % num_processes
        return
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(durations_s)))
        assert len(batches) == len(sampler) and len(batches) % num_processes == 0
        for batch in batches:
            assert len(batch) * max(durations_s[i] for i in batch) <= max_seconds + 1e-6
            assert len(batch) <= (max_rows or len(durations_s))
        assert batches == list(sampler)


def test_batches_are_shuffled_by_epoch_and_hold_like_lengths():
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
    other = SecondsBatchSampler(durations_s, 200.0, seed=1)
    assert list(other) != first


@given(st.integers(4, 60), st.integers(1, 4), st.booleans())
def test_processes_share_the_batches(num_rows, num_processes, even_batches):
    durations_s = np.random.default_rng(num_rows).uniform(1, 10, num_rows)
    sampler = SecondsBatchSampler(durations_s, 30.0, num_processes=num_processes)
    shards = [
        list(BatchSamplerShard(sampler, num_processes, index, even_batches=even_batches))
        for index in range(num_processes)
    ]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(num_rows))
    # What the processes do in one step takes about as long: the ranges of the steps hardly overlap.
    longest = [[max(durations_s[i] for i in batch) for batch in batches] for batches in zip(*shards, strict=True)]
    assert sum(max(step) - min(step) for step in longest) < 1.5 * durations_s.max()


def test_resuming_skips_what_was_done():
    windows = joined(num=100, max_s=12.0)
    mixture = Mixture([windows])

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


def test_samplers_take_the_number_of_processes_of_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert len(SecondsBatchSampler([1.0] * 10, 100.0)) == 3
    assert [len(batch) for batch in SecondsBatchSampler([1.0] * 10, 100.0, num_processes=1)] == [10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 31.0], 30.0), "Row 1 lasts 31.00 s, more than `max_seconds=30`"),
        (([1.0], 0.0), "`max_seconds` must be positive"),
        (([1.0], 9.0, 0), "`max_rows` must be at least 1"),
        (([], 9.0), "at least one"),
        (([1.0, float("nan")], 9.0), "NaN"),
        (([{"text": "x"}], 9.0), "has no `durations_s`"),
    ],
)
def test_sampler_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SecondsBatchSampler(*arguments)
    with pytest.raises(ValueError, match="too few for 2 processes"):
        SecondsBatchSampler([1.0], 9.0, num_processes=2)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 40))
def test_batches_of_a_stream(seed, num_rows, buffer_rows):
    rows = utterances(np.random.default_rng(seed).uniform(0.5, 8.0, num_rows)).rows
    stream = SecondsBatches(rows, 20.0, 6, seed, buffer_rows)
    batches = list(stream)
    assert sorted(row["text"] for batch in batches for row in batch) == sorted(row["text"] for row in rows)
    for batch in batches:
        assert 1 <= len(batch) <= 6 and len(batch) * max(row["duration_s"] for row in batch) <= 20.0 + 1e-6
    with pytest.raises(ValueError, match="lasts .* more than `max_seconds=0.1`"):
        list(SecondsBatches(rows, 0.1))


# The collator


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


class Decoder:
    """What datasets >= 4 gives: torchcodec's decoder."""

    def __init__(self, samples):
        self.samples = samples

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(self.samples)[None], sample_rate=RATE)


def test_batch_trains_a_model():
    rows = [{"audio": (tone(s), RATE), "text": "ab"} for s in (0.4, 0.7)]
    loss = tiny_model()(**collator()(rows)).loss
    assert torch.isfinite(loss)


def test_batch_of_features_and_labels():
    rows = [{"input_features": np.full((n, 80), float(n)), "labels": [4] * n + [EOS]} for n in (3, 5)]
    batch = collator(max_label_tokens=6)(rows)
    assert batch["input_features"].shape == (2, 5, 80) and batch["input_features"].dtype == torch.float32
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[4, 4, 4, EOS, -100, -100], [4] * 5 + [EOS]]
    assert (batch["input_features"][0, :3] == 3).all() and (batch["input_features"][0, 3:] == 0).all()
    with pytest.raises(BadRowError, match="row 1 of the batch: transcript longer than the canvas. It has 6 tokens"):
        collator(max_label_tokens=5)(rows)
    with pytest.raises(ValueError, match="Prepare all or none"):
        collator()([rows[0], {"audio": (tone(0.2), RATE), "text": "a"}])


def test_windows_are_joined_with_their_pauses(tmp_path):
    clips = [tone(0.3), tone(0.2, 500.0)]
    parts = [{"audio": (clip, RATE), "text": text, "duration_s": 0.3} for clip, text in zip(clips, "ab", strict=True)]
    window = JoinSettings().window(parts, [0.25])
    batch = collator()([window])
    whole = np.concatenate([clips[0], np.zeros(round(0.25 * RATE), np.float32), clips[1]])
    expected = tiny_processor()(audio=(whole, RATE), text="a b")
    torch.testing.assert_close(batch["input_features"], expected["input_features"])
    assert batch["labels"].tolist() == expected["labels"].tolist()


def test_prompts_by_row(prompted):
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


def test_wrong_columns_always_raise():
    row = {"sound": (tone(0.2), RATE), "sentence": "a"}
    with pytest.raises(ValueError, match=r"no column 'text', but \['sentence', 'sound'\]. Set `text_column`"):
        collator(on_bad_row="skip")([row])
    with pytest.raises(ValueError, match="no column 'audio'.*Set `audio_column`"):
        collator(on_bad_row="skip", text_column="sentence")([row])
    assert collator(audio_column="sound", text_column="sentence")([row])["labels"].tolist() == [[3, 4, EOS]]


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


@pytest.mark.parametrize(
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
    assert info.value.reason == reason
    collate = collator(max_label_tokens=9, on_bad_row="skip")
    assert len(collate([row, good, row])["labels"]) == 1
    assert collate.skipped == {reason: 2} and collate.num_rows == 3
    assert collate.report() == f"2 of 3 rows skipped: 2 {reason}."
    # In a window the good utterances stay, without the pause before the bad one.
    if reason != "transcript longer than the canvas":
        collate = collator(on_bad_row="skip")
        batch = collate([JoinSettings().window([{**one, "duration_s": 0.2} for one in (row, good)], [0.4])])
        assert batch["attention_mask"].sum() == 20 and batch["labels"].shape == (1, 9)
        assert collate.skipped == {reason: 1} and collate.num_rows == 2


def test_a_batch_of_bad_rows_becomes_silence_and_says_so(tmp_path, prompted, caplog):
    rows = list(bad_rows(tmp_path).values())[:2]
    collate = DataCollatorForMDMASR(prompted, on_bad_row="skip", language_column="language")
    batch = collate([{**row, "language": "de"} for row in rows])
    assert batch["labels"].tolist() == [[EOS]] and batch["attention_mask"].tolist() == [[1] * 50]
    assert batch["prompt_ids"].tolist() == [[3, 11, 5]]
    assert collate.skipped["batches without a usable row"] == 1
    assert collate.report().startswith("2 of 2 rows skipped")
    with pytest.raises(ValueError, match="All rows of a batch are bad"):
        collator(on_bad_row="skip", max_label_tokens=1)([{"input_features": np.zeros((2, 80)), "labels": [4, 1]}])


def test_a_source_of_bad_rows_ends_with_its_causes(tmp_path):
    """All paths are wrong, though the manifest knows the durations; and one row of a hundred, or two."""
    folder = write_folder(tmp_path / "a", seconds=[0.1] * 100, duration_s=[0.1] * 100)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lost = [line.replace("audio/", "sound/") for line in lines]
    manifest = folder / "m.jsonl"
    for growing in ({}, {"streaming": True}):
        manifest.write_text("\n".join(lost[:98] + ['{"file_name": "audio/0.wav", "text": ""}'] * 2))
        with pytest.raises(ValueError) as error:
            load_sources({"path": str(manifest), **growing}, on_bad_row="skip")
        first, second = str(error.value).split("; ")[:2]
        assert first.startswith(f"100 of 100 rows of {str(manifest)!r} cannot be used, more than 1 %: 98 like: ")
        assert "m.jsonl line 1: unreadable audio" in first and "sound/0.wav' does not exist" in first
        assert second.startswith("2 like: ") and "line 99: empty transcript" in second and "\n" not in str(error.value)
        manifest.write_text("\n".join(lost[:1] + lines[1:]))
        data = load_sources({"path": str(manifest), **growing}, on_bad_row="skip")
        assert data.skipped == {"unreadable audio": 1}
        manifest.write_text("\n".join(lost[:2] + lines[2:]))
        with pytest.raises(ValueError, match="2 of 100 rows.*more than 1 %"):
            load_sources({"path": str(manifest), **growing}, on_bad_row="skip")
    with pytest.raises(ValueError, match="None|has no rows to train on. They were left out: 1 like"):
        manifest.write_text(lost[0])
        load_sources(manifest, on_bad_row="skip", max_bad_share=1.0)


def test_batches_of_bad_rows_end_with_their_causes(tmp_path):
    good, (unreadable, empty, *_) = {"audio": (tone(0.1), RATE), "text": "a"}, bad_rows(tmp_path).values()

    def seen(rows, **settings):
        """How many rows were collated, one by one, and the error."""
        collate = collator(on_bad_row="skip", **settings)
        for number, row in enumerate(rows, start=1):
            try:
                collate([row])
            except ValueError as error:
                return number, str(error)
        return number, ""

    # Where nothing can be used it shows at once, and nothing stands in for more than three batches.
    number, message = seen([unreadable, unreadable, empty, unreadable] * 5)
    assert number == 4 and message.startswith(
        "4 of 4 rows of the batches cannot be used, more than 1 %: 3 like: row 0"
    )
    assert "bad.wav" in message and "; 1 like: m.jsonl line 7: empty transcript" in message
    assert seen([unreadable, good] * 20)[0] < 16
    # One of a hundred may come first, or thrice; not four of a hundred for ever.
    rare = [empty, *[good] * 99]
    assert seen([*[empty] * 3, *[good] * 97]) == (100, "")
    assert seen(rare * 10) == (1000, "")
    assert 150 < seen([empty, *[good] * 24] * 20)[0] < 300
    assert seen([unreadable, good] * 20, max_bad_share=0.5) == (40, "")
    # So few that nothing ends it in between.
    collate = collator(on_bad_row="skip")
    collate([unreadable, empty])
    with pytest.raises(ValueError, match="Nothing was learnt: 2 of 2 rows skipped: .*1 like: row 0.*bad.wav"):
        collate.check_any()
    collate([good])
    collate.check_any()


def test_causes_are_counted_whatever_the_names():
    messages = [f"a/m.jsonl line {i}: unreadable audio. 'x{i}.wav' does not exist. Check the path." for i in range(9)]
    messages.insert(1, "a/m.jsonl line 77: empty transcript. It is '...'.")
    bad = BadRows([*messages, "third", "fourth", "fifth"])
    assert len(bad) == 13
    assert str(bad) == (
        "9 like: a/m.jsonl line 0: unreadable audio. 'x0.wav' does not exist. Check the path; 1 like: a/m.jsonl line "
        "77: empty transcript. It is '...'; 1 like: third; and 2 causes more."
    )


def test_empty_text_can_be_allowed():
    rows = [{"audio": (np.zeros(8000, np.float32), RATE), "text": ""}]
    assert collator(allow_empty_text=True)(rows)["labels"].tolist() == [[EOS]]


def test_augmentation_depends_on_the_row_not_on_the_worker():
    rows = [{"audio": (tone(0.5, 200 + 20 * i), RATE), "text": "a", "augment_seed": i} for i in range(4)]
    augment = Augmenter(noise_prob=1.0, noises=("white", "babble"))
    collate = collator(augment=augment)
    plain, first = collator()(rows), collate(rows)
    torch.manual_seed(5)
    again = collate(rows)
    assert torch.equal(first["input_features"], again["input_features"])
    assert not torch.equal(first["input_features"][:, :45], plain["input_features"][:, :45])
    other = collator(augment=augment, seed=1)(rows)["input_features"]
    assert other.shape != first["input_features"].shape or not torch.equal(other, first["input_features"])


def test_augmentation_of_any_callable_and_near_the_limit():
    rows = [{"audio": (tone(0.5), RATE), "text": "a"}]
    twice = collator(augment=lambda samples, rate, rng: np.tile(samples, 2))
    assert twice(rows)["attention_mask"].sum() == 100
    # Longer than the model takes: the clip stays as it was.
    limited = collator(augment=lambda samples, rate, rng: np.tile(samples, 2), max_duration_s=0.7)
    assert limited(rows)["attention_mask"].sum() == 50


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="spawning takes seconds")
def test_workers_count_and_see_the_epoch(tmp_path):
    folder = write_folder(tmp_path / "a", seconds=[0.2] * 5 + [0.3], duration_s=[0.2] * 5 + [0.3])
    (folder / "audio/1.wav").write_bytes(b"nothing")
    mixture = Mixture([load_sources(folder, join=JoinSettings(max_s=1.2)).parts[0]])
    sampler = SecondsBatchSampler(mixture, 2.0)
    collate = collator(on_bad_row="skip")
    loader = DataLoader(
        mixture,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        epochs.append([batch["labels"].tolist() for batch in loader])
    # Persistent workers make other joins in other epochs.
    assert len({repr(one) for one in epochs}) > 1
    assert collate.skipped == {"unreadable audio": 4} and collate.num_rows == 24


def test_bad_row_errors_come_back_from_workers():
    error = pickle.loads(pickle.dumps(BadRowError.of("row 1", "audio too long", "Split it.")))
    assert str(error) == "row 1: audio too long. Split it." and error.reason == "audio too long"
    # What a DataLoader does with the exception of a worker.
    try:
        collator()([{"audio": (tone(0.2), RATE), "text": ""}])
    except BadRowError:
        wrapped = ExceptionWrapper(where="in a worker")
    with pytest.raises(BadRowError, match="row 0 of the batch: empty transcript"):
        wrapped.reraise()


def test_what_a_worker_counts_is_not_lost(tmp_path):
    rows = [{"audio": (tone(0.2), RATE), "text": text} for text in ("a", "", "a", "")]
    collate = collator(on_bad_row="skip", max_bad_share=0.5)
    collate(rows)
    list(DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=2))
    assert collate.skipped == {"empty transcript": 4} and collate.num_rows == 8


def test_longest_label_of_a_model():
    assert max_label_tokens(tiny_config(), prompt_length=1) == 299
    model = tiny_model()
    row = {"audio": (tone(0.2), RATE), "text": "a" * 297}
    batch = collator(max_label_tokens=299)([row])
    assert batch["labels"].shape == (1, 299) and torch.isfinite(model(**batch).loss)
    with pytest.raises(BadRowError, match="transcript longer than the canvas"):
        collator(max_label_tokens=299)([{**row, "text": "a" * 298}])
    assert VOCAB_SIZE > EOS


def test_collator_settings():
    for settings, message in (
        ({"on_bad_row": "drop"}, "`on_bad_row`"),
        ({"max_bad_share": 1.1}, "`max_bad_share`.*1.1"),
        ({"max_bad_share": "1%"}, "`max_bad_share`.*'1%'"),
        ({"max_label_tokens": 0}, "`max_label_tokens`"),
    ):
        with pytest.raises(ValueError, match=message):
            collator(**settings)
    with pytest.raises(ValueError, match="no rows"):
        collator()([])


# Streams


def test_streams_are_mixed_by_weight(tmp_path):
    write_folder(tmp_path / "a", seconds=[0.2] * 20, speaker=["a"] * 20)
    write_folder(tmp_path / "g" / "shard-00000", seconds=[0.3] * 20, speaker=["g"] * 20)
    specs = [
        {"path": str(tmp_path / "a"), "weight": 1.0},
        {"path": str(tmp_path / "g"), "weight": 3.0, "growing": True},
    ]
    rows = list(itertools.islice(load_sources(specs, seed=0), 400))
    share = sum(row["speaker"] == "g" for row in rows) / 400
    assert share == pytest.approx(0.75, abs=0.07)
    assert len({row["audio"] for row in rows}) == 40
    # The same, down to batches.
    stream = SecondsBatches(load_sources(specs, join={"max_s": 2.0}, seed=0), 8.0, buffer_rows=32)
    loader = DataLoader(stream, batch_size=1, collate_fn=collator(), num_workers=2)
    for batch in itertools.islice(loader, 4):
        assert batch["attention_mask"].numel() <= 800 and len(batch["labels"]) == len(batch["attention_mask"])
    with pytest.raises(ValueError, match="give each of several sources a `weight`"):
        load_sources([str(tmp_path / "a"), {"path": str(tmp_path / "g"), "growing": True}])


@pytest.mark.parametrize("place", ["shard-00000", "."])
def test_growing_folder_new_rows_first_then_again(tmp_path, monkeypatch, place):
    monkeypatch.setattr("mdm_asr_hf.data.sources.POLL_S", 0.0)
    folder = write_folder(tmp_path / "g" / place, seconds=[0.2] * 6)
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    # Two whole lines and half of the third: what a reader may find at any time.
    (folder / "metadata.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
    rows = iter(load_sources({"path": str(tmp_path / "g"), "growing": True}))
    first = [next(rows)["text"] for _ in range(4)]
    assert sorted(first[:2]) == sorted(first[2:]) == ["word a", "word b"]
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(lines[2][10:] + "".join(lines[3:]))
    assert sorted(next(rows)["text"] for _ in range(4)) == ["word c", "word d", "word e", "word f"]
    assert sorted(next(rows)["text"] for _ in range(6)) == [f"word {letter}" for letter in "abcdef"]


def test_processes_read_other_rows_of_a_stream(tmp_path):
    write_folder(tmp_path / "a", seconds=[0.2] * 12)
    spec = Source(str(tmp_path / "a"), streaming=True)
    shares = [{row["text"] for row in load_sources(spec, num_processes=2, process_index=index)} for index in range(2)]
    assert shares[0].isdisjoint(shares[1]) and len(shares[0] | shares[1]) == 12


def test_a_stream_reads_every_source_once_at_least(tmp_path):
    write_folder(tmp_path / "a", seconds=[0.2] * 3)
    write_folder(tmp_path / "b", seconds=[0.2] * 9)
    stream = load_sources([{"path": str(tmp_path / name), "weight": 1.0, "streaming": True} for name in "ab"])
    first, again = [row["audio"] for row in stream], [row["audio"] for row in stream]
    assert first == again and set(first) == {
        str(tmp_path / n / f"audio/{i}.wav") for n, k in ("a3", "b9") for i in range(int(k))
    }
    shorter = [audio for audio in first if "/a/" in audio]
    assert len(set(shorter[:3])) == 3 and len(shorter) > 3
    stream.set_epoch(1)
    assert [row["audio"] for row in stream] != first
    # Workers share the rows.
    alone = load_sources({"path": str(tmp_path / "b"), "streaming": True})
    seen = [row["audio"] for row in DataLoader(alone, batch_size=None, num_workers=2)]
    assert len(seen) == len(set(seen)) == 9


def test_what_synthesize_writes_is_an_audiofolder(tmp_path):
    for i in range(2):
        write_folder(tmp_path / "s" / f"shard-0000{i}", seconds=[0.2, 0.3], sentence=[2 * i, 2 * i + 1])
    assert sorted(row["text"] for row in load_sources(tmp_path / "s")) == ["word a", "word a", "word b", "word b"]
    # Audio would need torchcodec; where it is does not.
    stream = datasets.load_dataset("audiofolder", data_dir=str(tmp_path / "s"), split="train", streaming=True)
    rows = list(stream.cast_column("audio", datasets.Value("string")))
    assert sorted((row["sentence"], row["audio"]) for row in rows) == [
        (i, str(tmp_path / f"s/shard-0000{i // 2}/audio/{i % 2}.wav")) for i in range(4)
    ]
