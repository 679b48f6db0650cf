# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Publishing: the files that are gathered, what a Hub on this machine receives, and that it loads by itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import hub_on_this_machine, uploaded
from huggingface_hub import ModelCard, constants
from remote_code import noise, save_with_code, transcribe_as_remote_code
from safetensors.torch import load_file, save_file
from tables import each
from tiny_data import save_model
from tiny_models import tiny_drafts_model, tiny_model, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from mdm_asr_hf import default_checkpoint
from mdm_asr_hf.hub import push

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: automatic-speech-recognition
---

# tiny
"""


@pytest.fixture
def folder(tmp_path):
    """What a training run leaves: a checkpoint in bf16, a card, and files that are nobody's business."""
    folder = tmp_path / "run"
    save_model(folder, tiny_drafts_model(dtype=torch.bfloat16), tiny_processor())
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache")
    (folder / "optimizer.pt").write_bytes(b"0")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"0")
    return folder


@pytest.fixture
def staged_by():
    """Dry runs whose folders are removed afterwards."""
    folders = []

    def stage(*args, **kwargs):
        result = push(*args, "user/tiny", dry_run=True, **kwargs)
        folders.append(result.folder)
        return result

    yield stage
    for folder in folders:
        shutil.rmtree(folder)


def transcribe(folder, clip):
    model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    return processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]


def test_what_is_uploaded_or_saved_with_code_loads_where_the_package_is_not_installed(folder, staged_by, tmp_path):
    result = staged_by(folder)
    assert result.url is None and result.folder != folder
    assert result.files == sorted(path.name for path in result.folder.iterdir())
    expected = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "LICENSE"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "README.md", "modeling_mdm_asr.py"}
    assert expected < set(result.files)
    # The weights as they are, the settings in their dtype, and neither states of training nor converters.
    names = ("model.safetensors", "generation_config.json", "README.md")
    assert all((result.folder / name).read_bytes() == (folder / name).read_bytes() for name in names)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "AutoModelForSpeechSeq2Seq" in config["auto_map"]
    assert not [name for name in result.files if name.startswith(("optimizer", "checkpoint", "convert_"))]

    # And a folder that its user saved with the code.
    model, processor, clip = tiny_model(), tiny_processor(), noise()
    save_with_code(model, processor, tmp_path / "saved")
    assert "custom_pipelines" not in (tmp_path / "saved" / "config.json").read_text()
    assert not list((tmp_path / "saved").glob("convert_*"))
    expected = [transcribe(folder, clip), processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]]
    found = transcribe_as_remote_code([result.folder, tmp_path / "saved"], clip, tmp_path)
    for out, text in zip(found, expected, strict=True):
        assert out["type"] == "seq2seq" and out["direct"] == out["pipeline"] == text != ""
        assert "pip install ." in out["hint"]


def test_the_folder_holds_its_card_and_no_other_code(folder, staged_by, tmp_path):
    with_code = staged_by(folder)
    # A folder that came from the Hub with its code is published again without.
    result = staged_by(with_code.folder, with_code=False)
    assert not [name for name in result.files if name.endswith(".py")]
    for name in result.files:
        assert not name.endswith(".json") or "auto_map" not in (result.folder / name).read_text()
    clip = noise()
    assert transcribe(result.folder, clip) == transcribe(folder, clip) != ""

    staged_by(folder)
    tiny_model().save_pretrained(folder.parent / "plain")
    assert not list((folder.parent / "plain").glob("*.py"))

    card = tmp_path / "card.md"
    card.write_text(CARD.replace("# tiny", "# another"))
    result = staged_by(folder, card=card)
    assert "# another" in (result.folder / "README.md").read_text()


def test_the_default_checkpoint_is_fit_for_publication(staged_by):
    result = staged_by(default_checkpoint())
    assert ModelCard.load(result.folder / "README.md").data.base_model == "openai/whisper-tiny.en"
    weights = [(path / "model.safetensors").stat().st_size for path in (result.folder, default_checkpoint())]
    assert weights[0] == weights[1]


def without(name):
    return lambda folder: (folder / name).unlink()


def drop_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "decoder" in name)
    save_file(
        {key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )


def card_without_licence(folder):
    (folder / "README.md").write_text(CARD.replace("license: apache-2.0\n", ""))


@each(
    "damage, message",
    [
        (without("config.json"), "no config.json"),
        (without("model.safetensors"), "no model.safetensors"),
        (without("README.md"), "no model card"),
        (card_without_licence, "has no license"),
        (drop_a_weight, "missing model.decoder"),
    ],
)
def test_what_is_incomplete_is_not_uploaded(folder, hub, tmp_path, damage, message):
    folder = shutil.copytree(folder, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        push(folder, "user/tiny")
    assert hub.requests == []


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with hub_on_this_machine() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


def test_one_commit_brings_everything(folder, hub, staged_by):
    result = push(folder, "user/tiny", private=True)
    assert result.url == f"{hub.endpoint}/user/tiny/commit/1" and result.folder is None
    assert {token for _, _, token, _ in hub.requests} == {"Bearer hf_test"}
    creation = [lines[0] for _, path, _, lines in hub.requests if path == "/api/repos/create"]
    assert len(creation) == 1 and creation[0]["name"] == "tiny"
    # How it is said depends on the version of huggingface_hub.
    assert creation[0].get("private") is True or creation[0]["visibility"] == "private"

    received = uploaded(hub.requests)
    # What the first test loads.
    staged = staged_by(folder).folder
    assert received == {path.name: path.read_bytes() for path in staged.iterdir()}
    assert sorted(received) == result.files


def test_what_shall_be_private_does_not_go_into_a_public_repository(folder, hub):
    hub.is_private = False
    with pytest.raises(ValueError, match="is public"):
        push(folder, "user/tiny", private=True)
    assert not [path for _, path, _, _ in hub.requests if path.endswith("/commit/main")]


def test_no_temporary_folder_is_left(folder, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    push(folder, "user/tiny")
    drop_a_weight(folder)
    with pytest.raises(ValueError, match="missing"):
        push(folder, "user/tiny")
    assert not list(Path(tmp_path).glob("mdm-asr-push-*"))


def test_the_command_lists_uploads_or_says_why_not_on_one_line(folder, hub, run_command):
    code, out, _ = run_command("push", folder, "user/tiny", "--no-code", "--dry-run")
    *files, last = out.splitlines()
    staged = Path(last.split(" in ")[1])
    try:
        assert sorted(path.name for path in staged.iterdir()) == files
        assert code == 0 and "README.md" in files and "modeling_mdm_asr.py" not in files
    finally:
        shutil.rmtree(staged)

    code, out, _ = run_command("push", folder, "user/tiny", "--private")
    assert code == 0 and f"{hub.endpoint}/user/tiny/commit/1" in out
    (folder / "README.md").unlink()
    for name, message in (("user/too/many/slashes", ""), ("user/tiny", "no model card")):
        code, _, err = run_command("push", folder, name)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and message in err
