"""The benchmark of hotwords: its lists and its rates, on made-up texts."""

import gzip
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from run_hotwords import biased_counts, common_words, make_lists, take

TEXTS = {"1": "the quilter met basil", "2": "the the olbinett", "3": "cosette and basil"}


def test_common_words_are_the_most_frequent_ones(tmp_path):
    path = tmp_path / "texts.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("The cat.\nthe dog and the bird\na cat\n")
    assert common_words(path, 2) == {"the", "cat"} and common_words(path, 3) == {"the", "cat", "a"}


def test_lists_hold_what_was_said_and_what_was_not():
    lists = make_lists(TEXTS, {"the", "and", "met"}, 2, seed=0)
    assert lists["1"]["own"] == ["basil", "quilter"] and lists["3"]["own"] == ["basil", "cosette"]
    for one_id, text in TEXTS.items():
        drawn = lists[one_id]["distractors"]
        assert len(set(drawn)) == 2 and not set(drawn) & set(text.split())
        assert take(lists[one_id], "none+1") == drawn[:1]
        assert take(lists[one_id], "own+2") == lists[one_id]["own"] + drawn
    assert lists == make_lists(TEXTS, {"the", "and", "met"}, 2, seed=0)
    with pytest.raises(ValueError, match="`--distractors` asks for 3"):
        make_lists(TEXTS, {"the", "and", "met"}, 3, seed=0)


def test_biased_and_unbiased_errors_are_told_apart():
    rows = [
        # One list word right, one wrong, one other word wrong.
        {"reference": "the quilter met basil here", "hypothesis": "a quilter met bazil here"},
        # A list word put in.
        {"reference": "they walk home", "hypothesis": "they walk basil home"},
    ]
    counts = biased_counts(rows, [{"quilter", "basil"}, {"basil"}])
    assert counts["num_said"] == 2 and counts["num_recognised"] == 2 and counts["num_false"] == 1
    # 1 of 2 missed and 1 put in; 1 of 6 others wrong.
    assert (counts["b_wer"], counts["u_wer"]) == (100.0, 16.67)
    assert (counts["recall"], counts["precision"]) == (50.0, 50.0)
    assert biased_counts(rows[1:], [set()])["recall"] is None
