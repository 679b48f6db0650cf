# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores against hand-computed numbers, and what must not change them."""

import gzip
import json
import math

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_asr_hf.evaluate.scoring import (
    align,
    compare,
    count_errors,
    count_repetitions,
    describe_normaliser,
    find_results,
    most_in_a_row,
    normaliser,
    read_rows,
    score,
    word_confidences,
    word_error_rate,
)


def row(reference, hypothesis, nfe=1, duration_s=1.0, **more):
    return {"reference": reference, "hypothesis": hypothesis, "nfe": nfe, "duration_s": duration_s, **more}


def tokens(*pairs):
    return [{"text": text, "confidence": confidence, "step": 1} for text, confidence in pairs]


def metrics_of(rows, **settings):
    return score(rows, num_bootstrap=0, **settings)["metrics"]


def test_error_rates_by_hand():
    rows = [
        # Normalised: "the cat can not sit" of 5 words, one of them ("cat", 3 letters of 19) said as "dog".
        row("The cat can't sit.", "the DOG can not sit", nfe=2, duration_s=1.5),
        # Three words, one deleted: "b" and a space of 5 letters.
        row("a b c", "a c", nfe=5, duration_s=2.0),
    ]
    expected = {
        "wer": 25.0,  # (1 + 1) / (5 + 3)
        "cer": round(100 * (3 + 2) / (19 + 5), 2),
        # "The", "cat", "can't" and "sit." of 4 are others, and one word is too much; then 1 of 3.
        "wer_raw": round(100 * (4 + 1 + 1) / (4 + 3), 2),
        "mean_nfe": 3.5,
        "num_utterances": 2,
        "num_reference_words": 8,
        "num_substitutions": 1,
        "num_deletions": 1,
        "num_insertions": 0,
        "audio_s": 3.5,
    }
    metrics = metrics_of(rows)
    assert expected.items() <= metrics.items()
    # Rows of older folders: no tokens, no times.
    unknown = ("tokens_per_nfe", "rtfx", "rtfx_encoder", "rtfx_decoder", "ece", "num_full", "num_accepted_drafts")
    assert all(metrics[name] is None for name in unknown)
    assert metrics["reliability"] == []

    # 3 insertions in 4 words; "uh" is taken out by the normaliser, which would join number words to one.
    rows = [row("a b c d", "a b c d"), row("uh", "la la la"), row("", "")]
    metrics = metrics_of(rows)
    assert metrics["wer"] == 75.0 and metrics["num_insertions"] == 3
    assert metrics["cer"] == round(100 * 8 / 7, 2)
    # Nothing but silence has no rate.
    assert metrics_of([row("", "la")])["wer"] is None
    assert score([row("", "la")], num_bootstrap=10)["intervals"]["wer"] is None

    rows = [row("a", " "), row("b", "b"), row("c", "c"), row("uh", ""), row("", "")]
    assert metrics_of(rows)["empty_rate"] == round(100 / 3, 2)


def test_normalisers():
    assert normaliser("en")("It's colour, Mr. Fox!") == "it is colour mister fox"
    assert normaliser("de")("Straße, Nr. 5!") == "straße nr 5 "
    assert normaliser(None)("can't") == "can not"
    assert [normaliser(language)(text) for language in ("en", "de") for text in ("...", "?!", "…", "-")] == [""] * 8
    assert describe_normaliser("en") == "transformers EnglishTextNormalizer({}), no spelling table"
    assert describe_normaliser("de") == "transformers BasicTextNormalizer()"
    # Each row by its own language, unless one is given: "it's" is "it is" in English, "it s" elsewhere.
    rows = [row("it is", "it's", language="en"), row("it is", "it's", language="de")]
    assert metrics_of(rows)["wer"] == 25.0
    assert metrics_of(rows, language="en")["wer"] == 0.0
    assert metrics_of(rows, language="de")["wer"] == 50.0


def test_alignments_and_counts_are_jiwers():
    assert align("The cat can't sit.", "a cat can not sit down") == [
        ("substitute", ["the"], ["a"]),
        ("equal", ["cat", "can", "not", "sit"], ["cat", "can", "not", "sit"]),
        ("insert", [], ["down"]),
    ]
    assert align("", "") == []
    assert align("a", "") == [("delete", ["a"], [])]

    references, hypotheses = ["a b c d", "", "x  y"], ["a x d d e", "la", "y"]
    counts = count_errors(references, hypotheses)
    assert counts.tolist() == [[2, 0, 1, 4], [0, 0, 1, 0], [0, 1, 0, 2]]
    output = jiwer.process_words(references, hypotheses)
    assert counts.sum(axis=0).tolist()[:3] == [output.substitutions, output.deletions, output.insertions]
    characters = count_errors(references, hypotheses, characters=True).sum(axis=0)
    assert characters[:3].sum() / characters[3] == jiwer.cer(["a b c d", "", "x y"], hypotheses)
    assert count_errors([], []).shape == (0, 4)
    assert word_error_rate(["It's so.", ""], ["it is", "uh"]) == 33.33 and word_error_rate([""], ["a"]) is None


def test_repetitions_and_loops_by_hand():
    assert count_repetitions("the the the cat")[1] == 2
    assert count_repetitions("in the box in the box")[3] == 1
    assert not any(count_repetitions("a b a c a").values())
    sentence = "we went down to the sea"
    rows = [
        row("a b c", "a b b c"),
        row("in the box", "in the in the box"),
        row(sentence, f"{sentence} {sentence}"),
        # Said so.
        row("no no no", "No, no, no."),
        row("that that is", "that that is is"),
        row("a b c", "a b c"),
    ]
    assert metrics_of(rows)["repetition_rate"] == round(100 * 4 / 6, 2)

    for text, times in (("", 0), ("a", 1), ("a b", 1), ("so a b a b a b", 3), ("a a b b b b", 4), ("a b c a b", 1)):
        assert most_in_a_row(text) == times, text
    sentence = "we went down to the sea in the morning"
    rows = [
        row(sentence, " ".join([sentence] * 3)),
        row("go", "Go. Go! Go?"),
        row("go go", "go go go"),
        row("a b", "a b a b"),
        row("no no no no", "no no no"),
    ]
    assert metrics_of(rows)["num_loops"] == 3


def test_drafts_speed_and_durations_by_hand():
    rows = [
        # Three tokens and the end of text; a full canvas without one; a silent clip that nothing was decoded of.
        row("a b", "a b.", nfe=2, tokens=tokens((" a", 1), (" b", 1), (".", 1)), is_full=False),
        row("a b", "a b", nfe=4, tokens=tokens((" a", 1), (" b", 1)), is_full=True),
        row("", "", nfe=0, tokens=[], is_full=False),
    ]
    metrics = metrics_of(rows)
    assert metrics["tokens_per_nfe"] == 1.0
    assert metrics["num_full"] == 1

    def drafts(*counts):
        pairs = [dict(zip(("masks", "hypothesis"), one, strict=True)) for one in counts]
        return dict(zip(("accepted_drafts", "rejected_drafts"), pairs, strict=True))

    rows = [row("a", "a", **drafts((3, 1), (1, 0))), row("b", "b", **drafts((0, 0), (4, 0)))]
    result = score(rows, num_bootstrap=100)
    metrics = result["metrics"]
    assert (metrics["acceptance_rate_masks"], metrics["acceptance_rate_hypothesis"]) == (37.5, 100.0)
    assert metrics["num_accepted_drafts"] == {"masks": 3, "hypothesis": 1}
    assert metrics["num_rejected_drafts"] == {"masks": 5, "hypothesis": 0}
    # Either utterance alone has 75 or 0 %.
    assert result["intervals"]["acceptance_rate_masks"] == [0.0, 75.0]

    rows = [
        row("a", "a", duration_s=3.0, features_s=0.5, encoder_s=1.0, decoder_s=2.0),
        row("a", "a", duration_s=1.0, features_s=0.0, encoder_s=0.25, decoder_s=0.25),
    ]
    metrics = metrics_of(rows)
    assert (metrics["rtfx"], metrics["rtfx_encoder"], metrics["rtfx_decoder"]) == (1.0, 3.2, round(4 / 2.25, 2))

    rows = [
        row("a b", "a", nfe=2, duration_s=3.99),
        row("a b", "a b", nfe=4, duration_s=4.0),
        row("a b", "x b", nfe=6, duration_s=7.0),
        row("a", "", nfe=8, duration_s=15.0),
    ]
    buckets = metrics_of(rows)["by_duration"]
    assert [(b["from_s"], b["to_s"], b["num_utterances"], b["wer"], b["mean_nfe"]) for b in buckets] == [
        (0.0, 4.0, 1, 50.0, 2.0),
        (4.0, 8.0, 2, 25.0, 5.0),
        (15.0, None, 1, 100.0, 8.0),
    ]


def test_confidences_and_calibration_by_hand():
    one = row(
        "the cat is here",
        "The café is 21 here.",
        tokens=tokens((" The", 0.5), (" ca", 0.5), ("f", 0.5), ("", 0.5), ("é", 0.5), (" is", 0.9))
        + tokens((" twenty", 0.5), (" one", 0.4), (" here", 0.8), (".", 0.1)),
    )
    # Punctuation does not count, a token without text is its character's, and "21" is both of its words.
    assert word_confidences(one) == [
        ("the", 0.5, True),
        ("cafe", 0.0625, False),
        ("is", 0.9, True),
        ("21", 0.2, False),
        ("here", 0.8, True),
    ]
    contracted = row("i can not", "I can't", tokens=tokens((" I", 0.5), (" can", 0.5), ("'t", 0.5)))
    assert word_confidences(contracted) == [("i", 0.5, True), ("can", 0.25, True), ("not", 0.25, True)]
    assert word_confidences(row("a", "a")) == []

    rows = [
        row("a b", "a x", tokens=tokens((" a", 0.95), (" x", 0.95))),
        row("c d", "c d", tokens=tokens((" c", 1.0), (" d", 0.35))),
    ]
    metrics = metrics_of(rows)
    assert metrics["reliability"] == [
        {"low": 0.3, "high": 0.4, "count": 1, "confidence": 0.35, "accuracy": 1.0},
        {"low": 0.9, "high": 1.0, "count": 3, "confidence": round(2.9 / 3, 4), "accuracy": round(2 / 3, 4)},
    ]
    # |0.35 - 1| and |2.9 - 2|, over 4 words.
    assert metrics["ece"] == round(100 * (0.65 + 0.9) / 4, 2)
    assert metrics["reliability_unit"] == "word"


def test_intervals_are_the_bootstraps():
    rng = np.random.default_rng(0)
    # 200 utterances of 10 words, each word wrong with probability 0.3.
    wrong = rng.random((200, 10)) < 0.3
    rows = [
        row(" ".join("w" * 10), " ".join("x" if bad else "w" for bad in one), nfe=int(one.sum()), id=str(i))
        for i, one in enumerate(wrong)
    ]
    result = score(rows, num_bootstrap=2000)
    low, high = result["intervals"]["wer"]
    assert low < result["metrics"]["wer"] < high
    # The standard error of the mean of 200 utterances.
    expected = 2 * 1.96 * 100 * wrong.mean(axis=1).std() / math.sqrt(200)
    assert high - low == pytest.approx(expected, rel=0.1)
    # The same utterances are drawn for each metric: NFE is a tenth of the WER here.
    assert result["intervals"]["mean_nfe"] == [pytest.approx(low / 10, abs=0.01), pytest.approx(high / 10, abs=0.01)]
    assert score(rows, num_bootstrap=0)["intervals"] == {}

    rng = np.random.default_rng(1)
    rows, others = [], []
    for i in range(100):
        # Utterances differ widely; the second system has one more error in each.
        errors = int(rng.integers(0, 9))
        rows.append(row("w " * 10, "x " * errors + "w " * (10 - errors), id=i))
        others.append(row("w " * 10, "x " * (errors + 1) + "w " * (9 - errors), id=i))
    result = compare(others, rows)
    assert result == {"difference": 10.0, "interval": [10.0, 10.0]}
    low, high = score(rows)["intervals"]["wer"]
    assert high - low > 5
    assert compare(rows, others[::-1])["difference"] == -10.0
    with pytest.raises(ValueError, match="same ids"):
        compare(rows, others[1:])
    with pytest.raises(ValueError, match="`metric` 'speed' is not one of.*wer"):
        compare(rows, others, metric="speed")


words = st.lists(st.sampled_from(["a", "b", "the", "can't", "uh", "twenty", "one", "Mr."]), max_size=5).map(" ".join)


@st.composite
def scored_rows(draw):
    rows = []
    for i in range(draw(st.integers(1, 6))):
        hypothesis = draw(words)
        parts = [(" " + word, draw(st.sampled_from([0.1, 0.55, 1.0]))) for word in hypothesis.split()]
        rows.append(
            row(
                draw(words),
                hypothesis,
                nfe=draw(st.integers(0, 5)),
                duration_s=draw(st.floats(0, 40)),
                id=str(i),
                tokens=tokens(*parts),
                is_full=draw(st.booleans()),
                **{name: draw(st.floats(1e-3, 2)) for name in ("features_s", "encoder_s", "decoder_s")},
            )
        )
    return rows


@settings(max_examples=40, deadline=None)
@given(scored_rows(), st.randoms())
def test_every_word_is_counted_once_in_any_order(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert score(rows, num_bootstrap=20) == score(shuffled, num_bootstrap=20)
    metrics = metrics_of(rows)
    assert sum(b["num_utterances"] for b in metrics["by_duration"]) == len(rows)
    assert sum(b["num_reference_words"] for b in metrics["by_duration"]) == metrics["num_reference_words"]
    normalise = normaliser("en")
    references = [normalise(one["reference"]) for one in rows]
    if metrics["num_reference_words"]:
        assert metrics["wer"] == round(100 * jiwer.wer(references, [normalise(r["hypothesis"]) for r in rows]), 2)
    # Every recognised word has a confidence, and the correct ones are those that neither insertion nor substitution.
    num_heard = sum(len(normalise(one["hypothesis"]).split()) for one in rows)
    assert sum(b["count"] for b in metrics["reliability"]) == num_heard
    num_correct = num_heard - metrics["num_insertions"] - metrics["num_substitutions"]
    assert sum(b["count"] * b["accuracy"] for b in metrics["reliability"]) == pytest.approx(num_correct, abs=0.01)
    # Twice the same rows is the same rates.
    doubled = metrics_of(rows + [{**one, "id": one["id"] + "again"} for one in rows])
    names = ("wer", "cer", "wer_raw", "mean_nfe", "tokens_per_nfe", "ece", "empty_rate", "repetition_rate", "rtfx")
    assert {name: doubled[name] for name in names} == pytest.approx({name: metrics[name] for name in names}, abs=0.011)


def test_files(tmp_path):
    rows = [row("a\u2028b", "a b", id="1"), row("ä", "ä", id="2")]
    lines = [json.dumps(one, ensure_ascii=False) for one in rows]
    for name in ("one", "two/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "hypotheses.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "one" / "hypotheses.jsonl") == rows
    assert find_results(tmp_path / "one") == {"one": tmp_path / "one" / "hypotheses.jsonl"}
    assert list(find_results(tmp_path)) == ["one", "two/deep"]
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "hypotheses.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read_rows(tmp_path / "zip") == rows and list(find_results(tmp_path)) == ["one", "two/deep", "zip"]
    bad = tmp_path / "bad.jsonl"
    for text, message in (
        (lines[0] + "\n{", "bad.jsonl line 2 is not JSON"),
        ('{"reference": "a"}', "line 1 has no 'hypothesis'"),
        ("[1]", "line 1 is not a JSON object"),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(bad)
    for read in (read_rows, find_results):
        with pytest.raises(ValueError, match="Check the path"):
            read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`rows` is empty"):
        score([])
    with pytest.raises(ValueError, match="Row 0 .*has no 'nfe'"):
        score([{"reference": "a", "hypothesis": "a", "duration_s": 1.0}])
