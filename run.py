#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Sets up a virtual environment in .venv and runs the demo or the tests in it. Needs Python 3.11 or newer, nothing else.

    python3 run.py demo                 transcribe the recording in demo/
    python3 run.py test [ARGUMENTS]     run the tests; arguments go to pytest
    python3 run.py check                style, docstrings, complexity, imports that go one way, types, copies

PyTorch is installed for the CPU. For another build, set MDM_ASR_TORCH to what pip should install, such as "torch"
(PyPI's, on Linux with CUDA) or "torch --index-url https://download.pytorch.org/whl/cu130". What is installed already
is kept, until pyproject.toml, Python, MDM_ASR_TORCH or the folder's place changes.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
RECORDING = "demo/common_voice_en_48.flac"
# Nothing here needs the Hub, and without it nothing waits for a network.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fail(message: str) -> None:
    say(f"error: {message}")
    sys.exit(1)


def pip(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess:
    command = [str(BIN / "python"), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    # pip's own messages go to stderr: stdout is for the transcript.
    return subprocess.run(command, stdout=sys.stderr, stderr=subprocess.DEVNULL if capture else None)


def torch_requirement() -> str:
    """The line of pyproject.toml about torch."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies = project["optional-dependencies"]["torch"]
    return next(line for line in dependencies if re.match(r"torch\b", line))


def install_torch() -> None:
    override = os.environ.get("MDM_ASR_TORCH")
    if override:
        if pip("--quiet", *shlex.split(override)).returncode:
            fail(f"pip could not install MDM_ASR_TORCH={override!r}, see above.")
        return
    requirement = torch_requirement()
    # torch's dependencies come with the package's. A wheel at hand (PIP_FIND_LINKS) wins.
    if pip("--quiet", "--no-index", "--no-deps", requirement, capture=True).returncode == 0:
        return
    # On PyPI, Linux wheels bring gigabytes of CUDA; elsewhere they are for the CPU anyway.
    if sys.platform == "linux":
        if (
            pip(
                "--quiet", "--no-deps", "--timeout=15", "--retries=1", "--index-url", CPU_WHEELS, requirement
            ).returncode
            == 0
        ):
            return
        say(f"{CPU_WHEELS} cannot be used: installing PyPI's build of torch, which is larger.")
    if pip("--quiet", requirement).returncode:
        fail("pip could not install torch, see above. Is there a network connection?")


def set_up(extra: str) -> None:
    """Makes .venv hold the package, editable, with the optional dependencies `extra`."""
    place = f"{ROOT}\n{sys.version}\n{os.environ.get('MDM_ASR_TORCH', '')}"
    content = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    place_stamp = VENV / ".place"
    # The tests' installation serves the demo too.
    stamps = [VENV / f".installed-{name}" for name in {extra, "test"}]
    is_new = not place_stamp.is_file() or place_stamp.read_text() != place
    if not is_new and any(stamp.is_file() and stamp.read_text() == content for stamp in stamps):
        return
    if is_new:
        if not (find_spec("venv") and find_spec("ensurepip")):
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            fail(f"this Python cannot make virtual environments. On Debian: apt install python{version}-venv")
        say("Setting up .venv; the first time this downloads about 400 MB.")
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], stdout=sys.stderr).returncode:
            fail(f"could not make {VENV}, see above.")
        say("1/2 torch ...")
        install_torch()
        place_stamp.write_text(place)
    say("2/2 mdm_asr_hf and its dependencies ...")
    if pip("--quiet", "--editable", f"{ROOT}[{extra}]").returncode:
        fail("pip could not install the package, see above. Is there a network connection?")
    (VENV / f".installed-{extra}").write_text(content)


def demo() -> int:
    set_up("torch")
    say(f"$ mdm-asr transcribe {RECORDING}")
    command = [str(BIN / "mdm-asr"), "transcribe", RECORDING]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    print(done.stdout, end="", flush=True)
    if done.returncode:
        return done.returncode
    check = [str(BIN / "python"), "demo/check.py"]
    return subprocess.run(check, cwd=ROOT, env=ENVIRONMENT, input=done.stdout, text=True, encoding="utf-8").returncode


def test(arguments: list[str]) -> int:
    set_up("test")
    # Two processes with one thread each: small models gain nothing from more threads, and would fight for cores. Each
    # takes whole files, whose tests share what is slow to make.
    command = [str(BIN / "python"), "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}).returncode


def check() -> int:
    set_up("test")
    commands = (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["lint-imports"],
        ["mypy"],
        ["pylint", "src"],
    )
    codes = [subprocess.run([str(BIN / name), *rest], cwd=ROOT).returncode for name, *rest in commands]
    return max(codes)


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (no installer has checked it yet)
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}.")
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command == "demo" and not arguments:
        return demo()
    if command == "test":
        return test(arguments)
    if command == "check" and not arguments:
        return check()
    print(__doc__.strip(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
