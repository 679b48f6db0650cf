"""How many cores there are to work on."""

import os

from mdm_asr_hf.cores import free_cores, num_cores


def test_cores_that_may_be_used_and_are_free(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    file = tmp_path / "file"
    for text, expected in (("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)):
        file.write_text(f"{text}\n")
        assert num_cores(str(file)) == expected, text
    # The third number says how many threads run, its own among them.
    for running, expected in ((1, 4), (5, 4), (6, 3), (8, 1), (40, 1)):
        file.write_text(f"0.52 0.58 0.59 {running}/597 12345\n")
        assert free_cores(str(file)) == expected, running
    assert num_cores(str(tmp_path / "none")) == free_cores(str(tmp_path / "none")) == 4
