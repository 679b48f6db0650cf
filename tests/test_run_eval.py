# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""training/run_eval.py: hand-computed scores, and metrics that follow from the file of hypotheses."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
RECORDING = ROOT / "demo" / "common_voice_en_48.flac"
TEXT = (ROOT / "demo" / "transcript.txt").read_text().strip()

spec = importlib.util.spec_from_file_location("run_eval", ROOT / "training" / "run_eval.py")
run_eval = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_eval)


def row(reference, hypothesis, nfe=1, duration_s=1.0):
    return {"reference": reference, "hypothesis": hypothesis, "nfe": nfe, "duration_s": duration_s}


def test_score_by_hand():
    rows = [
        # Normalised: "the cat can not sit" of 5 words, one of them ("cat", 3 letters of 19) said as "dog".
        row("The cat can't sit.", "the DOG can not sit", nfe=2, duration_s=1.5),
        # Three words, one deleted: "b" and a space of 5 letters.
        row("a b c", "a c", nfe=5, duration_s=2.0),
    ]
    assert run_eval.score(rows) == {
        "wer": 25.0,  # (1 + 1) / (5 + 3)
        "cer": round(100 * (3 + 2) / (19 + 5), 2),
        "mean_nfe": 3.5,
        "num_utterances": 2,
        "num_reference_words": 8,
        "audio_s": 3.5,
    }


def test_words_said_where_there_are_none_count():
    # 3 insertions in 4 words; "uh" is taken out by the normaliser, which would join number words to one.
    rows = [row("a b c d", "a b c d"), row("uh", "la la la")]
    assert run_eval.score(rows)["wer"] == 75.0


@pytest.fixture
def folder(tmp_path):
    """A silent clip that is longer than the spoken one, and so decoded after it but listed before."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(RECORDING, data / "spoken.flac")
    soundfile.write(data / "silent.wav", np.zeros(16_000 * 6), 16_000)
    entries = [{"file_name": "silent.wav", "text": "uh"}, {"file_name": "spoken.flac", "text": TEXT + " Indeed."}]
    (data / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return data


def test_folder_to_metrics(folder, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = ["--data", str(folder), "--output", str(output), "--gamma", "0.2", "--steps", "20"]
    metrics = run_eval.main(arguments)
    silent, spoken = run_eval.read_jsonl(output / "hypotheses.jsonl")
    assert list(spoken) == ["id", "reference", "hypothesis", "nfe", "confidence", "duration_s"]
    assert (spoken["id"], spoken["reference"], spoken["hypothesis"]) == ("spoken.flac", TEXT + " Indeed.", TEXT)
    assert spoken["duration_s"] == pytest.approx(soundfile.info(RECORDING).duration, abs=0.01)
    assert 1 < spoken["nfe"] <= 20 and 0.5 < spoken["confidence"] <= 1
    assert (silent["id"], silent["hypothesis"], silent["nfe"], silent["confidence"]) == ("silent.wav", "", 0, None)

    assert metrics == json.loads((output / "metrics.json").read_text())
    # One word of the 14 that were said and the one that was not.
    assert metrics["wer"] == round(100 / (len(TEXT.split()) + 1), 2)
    assert metrics["sampler"] == {"name": "pbeb_conf", "gamma": 0.2, "lambda_": 0.2}
    assert metrics["max_denoising_steps"] == 20 and metrics["model"] == "mdm-asr-tiny-en"
    assert metrics["command"] == " ".join(["python training/run_eval.py", *arguments])
    assert metrics["rtfx"] == pytest.approx(metrics["audio_s"] / metrics["wall_s"], rel=0.02)
    assert set(run_eval.PACKAGES) < set(metrics["versions"])

    capsys.readouterr()
    rescored = run_eval.main(["--rescore", str(output)])
    assert rescored.items() <= metrics.items()
    assert json.loads(capsys.readouterr().out) == rescored


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards" / "results").glob("*/*")), ids=lambda path: path.name)
def test_published_metrics_follow_from_their_hypotheses(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert run_eval.score(run_eval.read_jsonl(folder / "hypotheses.jsonl")).items() <= metrics.items()
