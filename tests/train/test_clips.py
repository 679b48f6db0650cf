# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Clips of audio without transcripts: what is planned, and what is read."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdm_asr_hf.train.clips import SpeechClips

RATE = 16_000


@pytest.fixture
def speech(tmp_path):
    """Eighty recordings of 2 s, each at a level of its own, one of 70 s whose samples rise, and a text file."""
    for i in range(80):
        soundfile.write(tmp_path / f"{i:03d}.wav", np.full(2 * RATE, (i + 1) / 100), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "long.wav", np.arange(70 * RATE) / (70 * RATE), RATE, subtype="FLOAT")
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


def spans(clips):
    return [(span.row, span.start_s, span.stop_s) for clip in clips for span in clip.spans]


def test_every_recording_but_those_held_out_comes_once_in_every_pass(speech):
    clips, held_out = SpeechClips(speech, passes=2), SpeechClips(speech, held_out=True)
    assert len(clips) == 2 and len(held_out) == 1
    first, second = clips.plan(0), clips.plan(1)
    rows = sorted(row for row, *_ in spans(first) if row != 80)
    assert rows == [i for i in range(80) if i % 40 != 20] == sorted(row for row, *_ in spans(second) if row != 80)
    assert {row for row, *_ in spans(held_out.plan(0))} == {20, 60}
    assert first != second and first == SpeechClips(speech, passes=2).plan(0)
    # Those held out are as they were, and whatever comes again comes changed.
    assert all(clip.duration_s == 2.0 and clip.augment_seed is None for clip in held_out.plan(0))
    assert all(clip.augment_seed is not None for clip in second)


def test_clips_are_joined_cut_and_read_as_planned(speech):
    clips = SpeechClips(speech)
    plan = [clip for seed in range(3) for clip in SpeechClips(speech, seed=seed).plan(0)]
    durations_s = np.array([clip.duration_s for clip in plan])
    assert durations_s.min() >= 1.0 and durations_s.max() <= 28.0
    assert any(len(clip.spans) > 3 for clip in plan) and any(len(clip.spans) == 1 for clip in plan)
    assert any(sum(clip.cut_s) > 0.5 for clip in plan) and any(min(clip.silence_s) > 0.1 for clip in plan)
    for clip in plan[:40]:
        if clip.augment_seed is None:
            assert len(clips.read(clip, RATE)) / RATE == pytest.approx(clip.duration_s, abs=2e-3)

    pieces = [span for span in spans(SpeechClips(speech).plan(0)) if span[0] == 80]
    pieces = sorted(pieces, key=lambda span: span[1])
    assert pieces[0][1] == 0.0 and pieces[-1][2] == 70.0
    assert all(before[2] == after[1] for before, after in zip(pieces, pieces[1:], strict=False))
    assert all(1.0 <= stop - start <= 27.0 for _, start, stop in pieces)
    clips = SpeechClips(speech)
    clip = next(clip for clip in clips.plan(0) if clip.spans[0].row == 80 and clip.spans[0].start_s > 5)
    plain = type(clip)(clip.spans[:1])
    samples = clips.read(plain, RATE)
    assert samples[0] == pytest.approx(clip.spans[0].start_s / 70, abs=1e-4)
    assert samples[-1] == pytest.approx(clip.spans[0].stop_s / 70, abs=1e-4)

    clips = SpeechClips(speech)
    clip = next(clip for clip in clips.plan(0) if len(clip.spans) > 1 and clip.spans[0].row != 80)
    clip = type(clip)(clip.spans, clip.pauses_s, cut_s=(0.5, 0.25), silence_s=(0.1, 0.2))
    samples = clips.read(clip, RATE)
    assert not samples[: round(0.1 * RATE)].any() and not samples[-round(0.2 * RATE) :].any()
    assert samples[round(0.1 * RATE)] == pytest.approx((clip.spans[0].row + 1) / 100)
    assert len(samples) == pytest.approx(clip.duration_s * RATE, abs=3)


def test_nonsense_raises(speech, tmp_path):
    with pytest.raises(ValueError, match="`passes`.*0"):
        SpeechClips(speech, passes=0)
    with pytest.raises(ValueError, match="is no folder"):
        SpeechClips(tmp_path / "nowhere")
    few = tmp_path / "few"
    few.mkdir()
    soundfile.write(few / "one.wav", np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="one recording only"):
        SpeechClips(few)


def test_a_data_set_of_datasets_is_read_as_its_files_are(speech, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = [str(path) for path in sorted(speech.glob("*.wav"))]
    rows = [{"path": None, "bytes": Path(path).read_bytes()} for path in paths]
    data = datasets.Dataset.from_dict({"audio": rows})
    data.save_to_disk(tmp_path / "saved")
    saved, files = SpeechClips(tmp_path / "saved"), SpeechClips(speech)
    plan = files.plan(0)
    assert saved.plan(0) == plan
    for clip in [plan[0], max(plan, key=lambda clip: clip.spans[0].row)]:
        np.testing.assert_allclose(saved.read(clip, RATE), files.read(clip, RATE), atol=1e-4)
