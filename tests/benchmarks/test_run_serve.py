# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the server: its counts and percentiles, on made-up requests."""

import pytest
from run_serve import summarise_row, to_markdown

HEAD = {"system": "batches", "scene": "clips", "clients": 8, "wall_s": 10.0, "mb": [100.4, 105.2, 110.4]}
HEAD |= {"cpu_s": 2.0}


def test_requests_by_hand():
    rights = [True] * 7 + [False] + [None] * 2
    rows = [{"clip": "a", "duration_s": 5.0, "seconds": 1.0 + k, "right": right} for k, right in enumerate(rights)]
    scene = summarise_row(HEAD | {"requests": rows})
    assert (scene["requests"], scene["wrong"], scene["lost"]) == (10, 1, 2)
    # What was lost does not count as done, nor does its wait.
    assert (scene["rtfx"], scene["requests_per_s"]) == (pytest.approx(4.0), pytest.approx(0.8))
    assert (scene["p50_s"], scene["p95_s"]) == (4.0, 8.0)
    text = to_markdown({"run": {"command": "python x"}, "scenes": [scene], "fuzz": None})
    assert "| batches | clips | 8 | 10 | 1 | 2 | 4.0 | 0.80 | 4.000 | 8.000 | 8.000 | 3.00 | 100, 105, 110 |" in text

    found = {"fuzz_s": 5, "statuses": {"200 /health": 7.0, "500 /x": 2.0, "503 /y": 1.0}, "healthy": True}
    text = to_markdown({"run": {"command": "python x"}, "scenes": [], "fuzz": found})
    assert "10 requests, 3 answers of 500 and above, healthy after: True" in text
