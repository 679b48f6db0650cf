"""The benchmark of streaming: which recordings it takes, and its numbers, on made-up updates."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from run_streaming import choose_recordings, count_revised, summarize


def update(time_s, partial="", committed="", latency_s=0.1, is_final=False, new=()):
    return {
        "time_s": time_s,
        "partial": partial,
        "committed": committed,
        "latency_s": latency_s,
        "nfe": 2,
        "is_final": is_final,
        "new": list(new),
    }


def test_clips_that_fit_are_taken_once_and_joined_to_the_length():
    arguments = SimpleNamespace(data="DIR", seed=0, clips=3, joined=2, joined_s=12.0, min_s=5.0, max_s=8.0)
    durations_s = [4.9, 8.1] + [6.0] * 9
    chosen = choose_recordings(durations_s, arguments)
    assert [len(one) for one in chosen] == [1, 1, 1, 2, 2]
    clips = [i for one in chosen for i in one]
    assert len(set(clips)) == len(clips) and min(clips) >= 2
    assert chosen == choose_recordings(durations_s, arguments)
    with pytest.raises(SystemExit, match="`--data DIR` holds no clip of 5.0 to 8.0 s"):
        choose_recordings([1.0], arguments)


def test_revised_words_are_those_that_the_next_update_has_otherwise():
    updates = [
        update(0.5, "a dock"),
        update(1.0, "A dog, barks"),
        update(1.5, "barks", "a dog"),
        update(2.0, "", "a dog barks"),
    ]
    assert count_revised(updates) == (1, 6)
    assert count_revised([update(0.5, "a dog"), update(1.0, "a")]) == (1, 2)


def test_the_first_text_counts_from_the_onset_and_with_the_computing():
    word = {"text": "dog", "start_s": 0.4, "end_s": 0.8}

    def row(onset_s):
        updates = [update(0.5), update(1.0, "dog"), update(2.0, "", "dog", 0.2, True, [word])]
        return {"updates": updates, "onset_s": onset_s, "duration_s": 2.0, "reference": "dog", "streaming": "dog"}

    silent = {"updates": [update(1.0, is_final=True)], "onset_s": 0.0, "duration_s": 2.0, "reference": "cat"}
    results = summarize([row(0.3), row(0.0), {**silent, "streaming": ""}])
    assert results["first_text_s"] == {"median": 0.95, "mean": 0.95, "p90": 1.1, "n": 2}
    assert (results["first_text_within_1_s"], results["recordings"]) == (1, 3)
    assert results["commit_latency_s"]["median"] == 1.4 and results["commit_latency_without_computing_s"]["n"] == 2
    assert results["wer_streaming"] == pytest.approx(33.33) and results["rtf"] == pytest.approx(0.15)
    assert results["evaluations_per_update"]["mean"] == 2 and "wer_offline" not in results
