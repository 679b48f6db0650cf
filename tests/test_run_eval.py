# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""training/run_eval.py: from a folder of recordings to metrics that follow from the file of hypotheses."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdm_asr_hf.evaluate.scoring import read_rows, score

ROOT = Path(__file__).parents[1]
RECORDING = ROOT / "demo" / "common_voice_en_48.flac"
# As Whisper tiny.en writes it.
TEXT = "He had found where his treasure was, and was frightened of what might happen."

spec = importlib.util.spec_from_file_location("run_eval", ROOT / "training" / "run_eval.py")
run_eval = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_eval)


@pytest.fixture
def folder(tmp_path):
    """A silent clip that is longer than the spoken one."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(RECORDING, data / "spoken.flac")
    soundfile.write(data / "silent.wav", np.zeros(16_000 * 6), 16_000)
    entries = [{"file_name": "spoken.flac", "text": TEXT + " Indeed."}, {"file_name": "silent.wav", "text": "uh"}]
    (data / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return data


def test_folder_to_metrics(folder, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = ["--data", str(folder), "--output", str(output), "--gamma", "0.2"]
    result = run_eval.main(arguments)
    # The order of the metadata, though the longer clip is decoded first.
    spoken, silent = read_rows(output)
    assert (spoken["id"], spoken["reference"], spoken["hypothesis"]) == ("spoken.flac", TEXT + " Indeed.", TEXT)
    assert spoken["duration_s"] == pytest.approx(soundfile.info(RECORDING).duration, abs=0.01)
    assert 1 < spoken["nfe"] <= 14 and 0.5 < spoken["confidence"] <= 1
    assert (silent["id"], silent["hypothesis"], silent["nfe"], silent["confidence"]) == ("silent.wav", "", 0, None)

    assert result == json.loads((output / "metrics.json").read_text())
    metrics, settings = result["metrics"], result["settings"]
    # One word of the 14 that were said and the one that was not.
    assert metrics["wer"] == round(100 / (len(TEXT.split()) + 1), 2)
    assert (settings["decoding"], settings["gamma"], result["model"]) == ("drafts", 0.2, "mdm-asr-tiny-en")
    assert result["command"] == " ".join(["python training/run_eval.py", *arguments])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {name: metrics[name] for name in ("wer", "cer", "mean_nfe", "rtfx", "num_utterances")}

    rescored = run_eval.main(["--rescore", str(output)])
    assert rescored["metrics"].items() <= metrics.items() and rescored["intervals"] == result["intervals"]
    assert json.loads(capsys.readouterr().out) == rescored["metrics"]


def test_data_and_output_are_needed(capsys):
    with pytest.raises(SystemExit):
        run_eval.main(["--data", "somewhere"])
    assert "--data and --output are needed" in capsys.readouterr().err


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards" / "results").glob("*/*")), ids=lambda path: path.name)
def test_published_metrics_follow_from_their_hypotheses(folder):
    published = json.loads((folder / "metrics.json").read_text())
    # Folders of before there were groups have the metrics at the top, beside settings.
    published = published.get("metrics", published)
    scored = score(read_rows(folder), num_bootstrap=0)["metrics"]
    assert {"wer", "cer", "mean_nfe", "num_utterances", "num_reference_words", "audio_s"} <= published.keys()
    # Older rows have no times and tokens: what needs them is None.
    common = {name for name in published if scored.get(name) is not None}
    assert {name: published[name] for name in common} == {name: scored[name] for name in common}
