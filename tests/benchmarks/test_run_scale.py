# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of archives: its ratios and costs, on made-up runs."""

import pytest
from run_scale import EMPTY, LOOP, ONE, TWO, summarise, to_markdown

RUN = {"run": {"command": "python x"}}


def made_up():
    """An hour of audio in 500 clips of 100 kB; started, the loop takes 100 s, an actor 105 s, two 60 s."""
    rows = [{"listing": {"rows": 500, "seconds": 0.5, "bytes_a_row": 100.0, "audio_bytes": 50_000_000}}]
    for system, start_s, full_s in ((LOOP, 10.0, 110.0), (ONE, 20.0, 125.0), (TWO, 25.0, 85.0)):
        common = {"system": system, "load": 0.0, "shards": 13}
        rows.append(common | {"seconds": start_s, "clips": 2, "audio_s": 0.0, "texts": {"a": "x"}})
        # A slower round does not count.
        for seconds in (full_s + 3, full_s):
            texts = {"a": "x", "b": "y" if system != TWO else "z"}
            rows.append(common | {"seconds": seconds, "clips": 500, "audio_s": 3600.0, "texts": texts})
    rows.append(
        {"system": EMPTY, "seconds": 35.0, "load": 0.0, "shards": 100, "clips": 100, "audio_s": 0.0, "texts": {}}
    )
    return rows


def test_archives_by_hand():
    summary = summarise(made_up())
    assert summary["overhead"] == pytest.approx(0.05)
    assert summary["overhead_with_start"] == pytest.approx(125 / 110 - 1)
    assert (summary["speedup"], summary["shards_per_s"]) == (pytest.approx(1.75), pytest.approx(10.0))
    assert [one["other_texts"] for one in summary["systems"].values()] == [0, 0, 1]
    # 10,000 hours at 60 times real time, 5 million clips listed at 1000 a second, 500 GB in shards of 16 MB.
    one, _, hundred = summary["archive"]
    assert one["hours"] == pytest.approx(10_000 / 60 + (5000 + 25) / 3600)
    assert (one["list_min"], one["shards"]) == (pytest.approx(5000 / 60), pytest.approx(31_250))
    assert one["references_mb"] == pytest.approx(500)
    # 100 machines read 6,000 seconds of 13.9 kB a second, and take 5.2 shards of the 10 that one driver hands out.
    assert hundred["read_mb_per_s"] == pytest.approx(100 * 60 * 50_000_000 / 3600 / 1e6)
    assert hundred["head_share"] == pytest.approx(hundred["read_mb_per_s"] / 16 / 10)
    assert "Two actors: 1.75 times one." in to_markdown(RUN | summary)

    rows = made_up()
    for row in rows:
        if row.get("system") == TWO and row["audio_s"]:
            row["seconds"] = 24.0
    with pytest.raises(ValueError, match="no longer than the start"):
        summarise(rows)

    row = {"kills": {"actor": 5, "run": 5}, "runs": 6, "clips": 1000, "ids": 999, "missing": 1, "twice": 0}
    text = to_markdown(RUN | summarise([row]))
    assert "5 of an actor and 5 of the whole run; 6 runs. Ids at the end: 999, missing 1, twice 0." in text
