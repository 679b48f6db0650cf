# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The code blocks of the documentation, run as they are printed and in that order, in a folder with recordings and tiny
random donors of the names they mention, where nothing can be imported but what the page says to install. What they
upload goes to a Hub on this machine. A block that no test can run is marked `no-run` and why, in a word; of some the
arguments are read all the same. Those of docs/serving.md that need the server run in tests/serve.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import soundfile
from canary_donors import save_native_donor
from extras import brought_by, hidden
from hub import hub_on_this_machine, uploaded
from onnx_exports import exported_checkpoint
from packaging.version import Version
from snippet_server import CLIENT
from tiny_data import save_model
from tiny_models import tiny_drafts_model, tiny_processor
from whisper_donors import save_donor

from mdm_asr_hf.audio_mdm_asr import load_audio

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "training" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "model_cards").glob("mdm-asr-*.md")),
]
BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INSTALL = re.compile(r'pip install "\.\[([\w,]+)\]"')
# What cannot be there where tests run; of what takes hours, devices or recordings of its own, the arguments are read.
ONLY_READ = {"data", "gpu", "microphone", "training"}
REASONS = {"docker", "server", "setup", *ONLY_READ}
# README.md says so; `[torch]` does not bring it.
CANARY_NEEDS_LIBROSA = Version(version("transformers")) < Version("5.23")
# Runs the program without its own options.
ACCELERATE = """#!/bin/sh
until [ -f "$1" ]; do shift || exit; done
case $1 in *.py) set python "$@" ;; esac
"$@"
"""
SPEECH = ("common_voice", "librispeech", "speechocean762", "vctk")


def blocks(page):
    """Language, reason not to run it or None, code, and extras to install, of each block that is code."""
    text = page.read_text("utf-8")
    default = INSTALL.search(text)
    found = []
    for indent, language, options, code in BLOCK.findall(text):
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        if language not in ("bash", "python") and not (language == "text" and code.startswith("$ ")):
            continue
        own = INSTALL.search(code) or default
        reason = re.fullmatch(r" no-run (\w+)", options)
        assert reason or not options, f"{page.name}: ```{language}{options}"
        found.append((language, reason and reason[1], code, own and own[1]))
    return found


@pytest.fixture
def place(clone, page, tmp_path, tmp_path_factory):
    shutil.copytree(clone, tmp_path / "clone", symlinks=True)
    if page.name == "scale.md":
        (tmp_path / "clone" / "OUT8").symlink_to(exported_checkpoint(tmp_path_factory))
    yield tmp_path / "clone"
    # The checkpoint of the package is copied there.
    shutil.rmtree(tmp_path / "clone" / "MODEL")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("src", "demo", "training", "benchmarks", "endpoints", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    speech = load_audio(ROOT / "demo" / "common_voice_en_48.flac")
    for name in ("recording.wav", "recording.flac", "a.wav", "talk.mp3", "talk.flac", "b.mp3"):
        soundfile.write(folder / name, speech[8000:40000], 16_000)
    row = json.dumps({"file_name": "a.flac", "text": "he had found where his treasure was"})
    for name in ("DIR", *(f"speech/eval/{one}" for one in SPEECH)):
        (folder / name).mkdir(parents=True)
        shutil.copy(folder / "recording.flac", folder / name / "a.flac")
        (folder / name / "metadata.jsonl").write_text(row + "\n")
    save_donor(folder / "openai" / "whisper-small", multilingual=True)
    if not CANARY_NEEDS_LIBROSA:
        save_native_donor(folder / "nvidia" / "canary-1b-v2")
    save_model(folder / "MODEL", tiny_drafts_model(), tiny_processor())
    return folder


@pytest.fixture(scope="module")
def hub():
    with hub_on_this_machine() as server:
        yield server


@pytest.fixture(scope="module")
def commands(clone, hub, tmp_path_factory):
    """Gives the folder of programs, for the path, that see what these extras install; without any, all there is."""
    processes, folders, sockets = [], {}, {}

    def socket_of(base):
        """Of the server that has imported what these extras bring, and nothing else."""
        if base in sockets:
            return sockets[base]
        folder = tmp_path_factory.mktemp("server")
        path = sockets[base] = str(folder / "socket")
        server = ROOT / "tests" / "helpers" / "snippet_server.py"
        source = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        source["HF_DATASETS_CACHE"] = str(folder / "datasets")
        command = [sys.executable, server, path, json.dumps(hidden(brought_by(base)))]
        processes.append(subprocess.Popen(command, env=source, cwd=clone))
        # Beside other work its imports take a minute and more.
        for _ in range(3000):
            if os.path.exists(path) or processes[-1].poll() is not None:
                break
            time.sleep(0.1)
        return path

    def start(extras):
        if extras in folders:
            return folders[extras]
        distributions = extras and brought_by(extras)
        if extras and distributions is None:
            return None
        folder = folders[extras] = tmp_path_factory.mktemp("bin")
        client = CLIENT.format(
            python=sys.executable,
            path=socket_of("torch" if not extras or brought_by("torch") <= distributions else ""),
            hidden=hidden(distributions) if extras else [],
            exported=str(exported_checkpoint(tmp_path_factory)) if extras and "onnxscript" in distributions else None,
        )
        for name in ("mdm-asr", "python"):
            (folder / name).write_text(client)
        (folder / "pip").write_text("#!/bin/sh\nexit 0\n")
        (folder / "curl").write_text("#!/bin/sh\ncat talk.mp3\n")
        settings = f"HF_ENDPOINT={hub.endpoint} HF_TOKEN=hf_test HF_HUB_OFFLINE=0 HF_HUB_DISABLE_UPDATE_CHECK=1"
        (folder / "hf").write_text(f'#!/bin/sh\n{settings} exec {sys.executable} -m huggingface_hub.cli.hf "$@"\n')
        (folder / "accelerate").write_text(ACCELERATE)
        raw = load_audio(clone / "talk.flac") * 2**15
        (folder / "raw").write_bytes(raw.astype("<i2").tobytes())
        (folder / "arecord").write_text(f"#!/bin/sh\ncat {folder}/raw\n")
        for program in folder.iterdir():
            program.chmod(0o755)
        return folder

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run_as_printed(page, place, commands, hub):
    cells = blocks(page)
    assert all(reason is None or reason in REASONS for _, reason, _, _ in cells)
    assert not cells or all(extras for *_, extras in cells), "The page does not say what to install."
    python = []
    for language, reason, code, extras in cells:
        if "from_canary(" in code and CANARY_NEEDS_LIBROSA:
            warnings.warn(f"{page.name}: without librosa, not run: {code}", stacklevel=1)
            continue
        if reason is None and language == "python":
            python.append((extras, code))
            continue
        if reason is not None and reason not in ONLY_READ:
            continue
        if (folder := commands(None if reason else extras)) is None:
            warnings.warn(f"{page.name}: without {extras}, not run: {code}", stacklevel=1)
            continue
        expected = None
        if language == "text":
            code, expected = code.removeprefix("$ ").split("\n", 1)
        (place / ".venv").mkdir(exist_ok=True)
        (place / ".venv" / "bin").unlink(missing_ok=True)
        (place / ".venv" / "bin").symlink_to(folder)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        if reason is not None:
            environment["ONLY_READ"] = "1"
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", code], cwd=place, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert expected is None or done.stdout == expected
        if "hf upload" in code:
            files = set(uploaded(hub.requests))
            assert {"config.json", "handler.py", "mdm_asr_hf/loading.py"} <= files
            assert not [path for path in files if "checkpoints" in path]
    # In one process, so that the names of one block are there in the next.
    if python and (folder := commands(python[0][0])) is not None:
        assert len({extras for extras, _ in python}) == 1
        (place / "blocks.py").write_text("\n".join(code for _, code in python))
        done = subprocess.run([folder / "python", "blocks.py"], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_page_that_lacks_an_extra_is_found():
    for extras, there, missing in (
        ("onnx", {"numpy", "onnxruntime", "soundfile"}, {"torch", "transformers", "onnxscript"}),
        ("torch", {"torch", "transformers", "jinja2"}, {"onnx", "pytest", "hypothesis"}),
        ("export", {"torch", "onnxscript"}, {"peft", "pytest"}),
    ):
        modules = hidden(brought_by(extras))
        assert not there & set(modules) and missing <= set(modules)
