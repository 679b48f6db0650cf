# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line: what it prints where, and one line for everything that goes wrong."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from canary_donors import (
    SPECIAL_TOKENS,
    needs_parakeet_features,
    nemo_settings,
    nemo_vocab_size,
    nemo_weights,
    write_nemo,
)
from demo_recording import RECORDING, TEXT
from safetensors.torch import load_file, save_file
from tables import each
from tiny_data import save_model
from tiny_models import tiny_drafts_model, tiny_processor
from tiny_sentencepiece import ENGLISH, GERMAN, train
from transformers import (
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from whisper_donors import save_donor

from mdm_asr_hf import (
    MDMASRConfig,
    MDMASRForConditionalGeneration,
    MDMASRProcessor,
    default_checkpoint,
)
from mdm_asr_hf.loading import generation_settings

RATE_HZ = 16_000


@pytest.fixture
def run(run_command):
    """Runs the command in this process; gives exit code, the lines on stdout and those on stderr."""

    def run(*arguments):
        code, out, err = run_command(*arguments)
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def bad_files(tmp_path):
    """Name -> what the error says about it."""
    (tmp_path / "notes.wav").write_text("These are notes and no audio.\n" * 100)
    (tmp_path / "zero_bytes.wav").touch()
    soundfile.write(tmp_path / "no_samples.wav", np.zeros(0), RATE_HZ)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan] * 8000), RATE_HZ, subtype="FLOAT")
    (tmp_path / "cut.flac").write_bytes(RECORDING.read_bytes()[:40_000])
    (tmp_path / "folder").mkdir()
    return {
        tmp_path / "missing.wav": "does not exist",
        tmp_path / "notes.wav": "not audio",
        tmp_path / "zero_bytes.wav": "is empty",
        tmp_path / "no_samples.wav": "is empty",
        tmp_path / "nan.wav": "NaN",
        tmp_path / "cut.flac": "truncated",
        tmp_path / "folder": "is a directory",
    }


@pytest.fixture
def silence(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE_HZ), RATE_HZ)
    return tmp_path / "silence.wav"


def test_files_give_their_texts_or_json_in_order(run, silence):
    assert run("transcribe", RECORDING) == (0, [TEXT], [])

    code, out, err = run("transcribe", RECORDING, silence, RECORDING, "--batch-size", 3)
    assert (code, err) == (0, [])
    assert out == [f"{RECORDING}\t{TEXT}", f"{silence}\t", f"{RECORDING}\t{TEXT}"]

    code, out, _ = run("transcribe", "--json", RECORDING, silence)
    spoken, silent = map(json.loads, out)
    assert list(spoken) == ["file", "text", "confidence", "nfe", "duration_s"] and code == 0
    assert (spoken["file"], spoken["text"]) == (str(RECORDING), TEXT)
    assert spoken["duration_s"] == round(soundfile.info(RECORDING).duration, 3)
    # This clip is one the model is sure of; 14 words, two marks and the end in half as many evaluations.
    assert 0.5 < spoken["confidence"] <= 1 and 1 < spoken["nfe"] <= 9
    assert silent == {"file": str(silence), "text": "", "confidence": None, "nfe": 0, "duration_s": 1.0}


def test_settings_reach_generate(run, silence):
    def nfe(*options):
        row = json.loads(run("transcribe", "--json", RECORDING, *options)[1][0])
        assert row["text"] == TEXT
        return row["nfe"]

    # Without drafts, an evaluation a token; with gamma = 0, the masks draft one each time.
    undrafted = nfe("--set", "draft_branches=[]")
    few = nfe("--gamma", 0, "--set", 'draft_branches=["masks"]')
    assert nfe() < few < undrafted == len(TEXT.split()) + 3

    def text(*files):
        options = ("--set", "temperature=2", "--set", "max_new_tokens=6", "--batch-size", 2)
        return run("transcribe", *files, *options)[1][0].split("\t")[-1]

    torch.manual_seed(1)
    first = text(RECORDING)
    torch.manual_seed(2)
    assert text(RECORDING, silence) == first and not TEXT.startswith(first)


def test_each_bad_file_gives_one_line_beside_good_ones(run, bad_files):
    for path, message in list(bad_files.items())[:2]:
        code, out, err = run("transcribe", path)
        assert (code, out, len(err)) == (1, [], 1), (path, err)
        assert err[0].startswith("error: ") and str(path) in err[0] and message in err[0]

    for batch_size in (1, 4):
        files = [RECORDING, *bad_files, RECORDING]
        code, out, err = run("transcribe", *files, "--batch-size", batch_size)
        assert code == 1
        assert out == [f"{RECORDING}\t{TEXT}"] * 2
        for (path, message), line in zip(bad_files.items(), err, strict=True):
            assert line.startswith("error: ") and str(path) in line and message in line


def test_clips_that_fail_or_have_no_end_are_named(run, silence):
    code, out, err = run("transcribe", silence, RECORDING, "--set", "max_new_tokens=3", "--batch-size", 2)
    assert code == 0 and out[1] == f"{RECORDING}\tHe had found" and len(err) == 1
    assert err[0].startswith(f"warning: {RECORDING}: ") and "max_new_tokens" in err[0]

    # The prompt fills all there is: the error comes from `generate`, for every file.
    code, out, err = run("transcribe", silence, RECORDING, "--set", "max_length=2", "--batch-size", 2)
    assert (code, out, len(err)) == (1, [], 2)
    assert str(silence) in err[0] and str(RECORDING) in err[1] and "max_length" in err[0]


def test_bad_checkpoints_give_one_line(run, tmp_path):
    def fails(folder, message):
        code, out, err = run("transcribe", RECORDING, "--model", folder)
        assert (code, out, len(err)) == (1, [], 1), err
        assert str(folder) in err[0] and message in err[0], err

    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, "config.json")

    other = tmp_path / "other"
    WhisperConfig(d_model=8).save_pretrained(other)
    fails(other, "mdm-asr convert")

    folder = save_model(tmp_path / "copy", tiny_drafts_model(dtype=torch.float32), tiny_processor())
    weights = load_file(folder / "model.safetensors")
    name = "model.decoder.layer_norm.bias"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    fails(folder, f"missing {name}")
    save_file(weights | {"extra.weight": weights[name].clone()}, folder / "model.safetensors", {"format": "pt"})
    fails(folder, "unexpected extra.weight")
    (folder / "model.safetensors").write_bytes(b"not weights" * 10)
    fails(folder, "Safetensor")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    fails(folder, "model.safetensors")


def run_python(code, *arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_a_fresh_process_prints_nothing_else(silence):
    """No load bars, library logs or deprecations, on neither stream."""
    command = "from mdm_asr_cli import main; main()"
    done = run_python(command, "transcribe", RECORDING, silence)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{RECORDING}\t{TEXT}\n{silence}\t\n", "")


@each("arguments", [["--version"], ["--help"], ["transcribe", "--help"], ["evaluate", "--help"]])
def test_help_waits_for_no_library(arguments):
    code = f"import mdm_asr_cli, os, sys; sys.argv[1:] = {arguments}\n"
    code += "try: mdm_asr_cli.main()\nexcept SystemExit: pass\n"
    code += "print({'torch', 'transformers', 'numpy'} & set(sys.modules), os.environ['OMP_WAIT_POLICY'])"
    output = run_python(code, OMP_WAIT_POLICY="ACTIVE").stdout
    # Threads that wait sleep, unless one wants them to spin.
    assert len(output.splitlines()) > 1 and output.endswith("set() ACTIVE\n")
    if arguments == ["--version"]:
        os.environ.pop("OMP_WAIT_POLICY", None)
        assert run_python(code).stdout.endswith("set() PASSIVE\n")


def test_version_help_and_bad_options(run):
    assert run("--version") == (0, ["mdm-asr 0.1.0"], [])
    code, out, _ = run("--help")
    assert code == 0 and all(any(name in line for line in out) for name in ("transcribe", "convert"))
    assert run("transcribe")[0] == 2

    for options, message in [
        (["--gamma", "-1"], "gamma"),
        (["--sampler", "best"], "pbeb_conf"),
        (["--sampler", "random", "--gamma", "1"], "gamma"),
        (["--steps", "5"], "canvas"),
        (["--canvas-length", "50"], "canvas"),
        (["--sampler", "eb_conf"], "drafts"),
        (["--language", "de"], "language"),
        (["--device", "abacus"], "device"),
        (["--model", "/no/such/folder"], "Check the path"),
        (["--model", "no_such_folder"], "Check the path"),
    ]:
        code, out, err = run("transcribe", RECORDING, RECORDING, *options)
        assert (code, out, len(err)) == (1, [], 1)
        assert err[0].startswith("error: ") and message in err[0]


# --- convert ---


@pytest.fixture(scope="module")
def whisper_donor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    save_donor(folder, multilingual=False, max_target_positions=64)
    return folder


def test_convert_whisper(run, whisper_donor, tmp_path):
    code, out, err = run("convert", whisper_donor, tmp_path / "model")
    assert (code, len(out), err) == (0, 1, []) and str(tmp_path / "model") in out[0]
    model = MDMASRForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.config.decoder_config.draft_layers == 2
    # What was written transcribes, if only nonsense.
    code, out, _ = run("transcribe", RECORDING, "--model", tmp_path / "model", "--set", "max_new_tokens=4")
    assert code == 0 and out
    # With its code, as `mdm-asr push` writes it.
    assert run("convert", whisper_donor, tmp_path / "coded", "--with-code")[0] == 0
    assert (tmp_path / "coded" / "modeling_mdm_asr.py").is_file()
    # Later saves of this process are not changed.
    assert MDMASRConfig._auto_class is None and MDMASRForConditionalGeneration._auto_class is None


def test_convert_to_a_canvas(run, whisper_donor, tmp_path):
    canvas = ("--draft-layers", 0)
    code, out, err = run("convert", whisper_donor, tmp_path / "model", "--vocab-size", 258, *canvas)
    assert (code, len(out), err) == (0, 1, []) and str(tmp_path / "model") in out[0]
    model = MDMASRForConditionalGeneration.from_pretrained(tmp_path / "model")
    donor = WhisperForConditionalGeneration.from_pretrained(whisper_donor)
    # 256 bytes and two merges, and end of text, which the donor has at 286.
    embeddings = model.get_input_embeddings().weight
    assert embeddings.shape == (259, 16)
    assert torch.equal(embeddings[258], donor.get_input_embeddings().weight[286])
    processor = MDMASRProcessor.from_pretrained(tmp_path / "model")
    # Of " the" the first merge is left: the third, which adds the e, was cut off.
    assert processor.tokenizer.tokenize(" the") == ["Ġ", "th", "e"]
    assert model.generation_config.prompt_template == processor.prompt_template
    # The options of a canvas are its own, and those of drafts are not.
    code, out, _ = run("transcribe", "--json", RECORDING, "--model", tmp_path / "model", "--steps", 2)
    assert code == 0 and json.loads(out[0])["nfe"] == 2
    code, _, err = run("transcribe", RECORDING, "--model", tmp_path / "model", "--set", "draft_length=2")
    assert (code, len(err)) == (1, 1) and "canvas" in err[0]


@needs_parakeet_features
def test_convert_nemo(run, tmp_path):
    spm_models = {"spl_tokens": train([" ".join(SPECIAL_TOKENS)], len(SPECIAL_TOKENS) + 2, SPECIAL_TOKENS)}
    spm_models |= {"en": train(ENGLISH, 40), "de": train(GERMAN, 43)}
    weights = nemo_weights(nemo_vocab_size(spm_models))
    donor = write_nemo(tmp_path / "tiny.nemo", nemo_settings(spm_models), weights, spm_models)
    code, out, err = run("convert", donor, tmp_path / "model")
    assert (code, len(out), err) == (0, 1, []) and out[0].endswith("(canary)")
    options = ("--model", tmp_path / "model", "--set", "max_new_tokens=4")
    assert run("transcribe", RECORDING, *options, "--language", "de")[0] == 0
    code, out, err = run("transcribe", RECORDING, RECORDING, *options, "--language", "tlh")
    assert (code, out, len(err)) == (1, [], 1) and "tlh" in err[0] and "['de', 'en']" in err[0]


def test_convert_errors_give_one_line(run, whisper_donor, tmp_path):
    def fails(message, *arguments):
        code, out, err = run("convert", *arguments)
        assert (code, out, len(err)) == (1, [], 1), err
        assert err[0].startswith("error: ") and message in err[0], err

    output = tmp_path / "output"
    fails("--kind", tmp_path, output)
    fails("no `.nemo` file", tmp_path / "missing.nemo", output)
    fails("for Whisper donors only", tmp_path / "missing.nemo", output, "--vocab-size", 300)
    fails("'mdm_asr'", default_checkpoint(), output)
    fails("draft_layers=0", whisper_donor, output, "--vocab-size", 300)
    fails("`draft_layers` (7)", whisper_donor, output, "--draft-layers", 7)
    fails("`vocab_size` must be", whisper_donor, output, "--vocab-size", 10, "--draft-layers", 0)
    assert not output.exists()
    output.mkdir()
    (output / "precious.txt").touch()
    fails("not an empty folder", whisper_donor, output)
    assert os.listdir(output) == ["precious.txt"]


def test_any_setting_can_be_given_and_a_bad_one_is_named():
    model = tiny_drafts_model()
    model.generation_config.max_new_tokens = 7
    settings = generation_settings(
        model, ["draft_length=2", "max_new_tokens=null", "alignment_heads=[[0, 1]]"], gamma=1.5
    )
    assert (settings.draft_length, settings.max_new_tokens, settings.alignment_heads) == (2, None, [[0, 1]])
    assert settings.sampler.gamma == 1.5 and model.generation_config.max_new_tokens == 7
    for bad, message in (
        ("draft=1", "'draft' is not a setting"),
        ("gamma", "'gamma' is not a setting"),
        ("draft_length=off", "'off' is not a JSON value"),
        ("draft_length=-1", "draft_length"),
    ):
        with pytest.raises(ValueError, match=message):
            generation_settings(model, [bad])
