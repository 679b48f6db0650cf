import os
import sys

# Two workers on two cores: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# A file's tests run in one worker, which makes what they share once. What takes longest begins, or one worker would be
# left with it at the end.
LONGEST = ("test_snippets.py", "test_onnx.py", "test_dataset.py", "test_trainer.py", "test_serve.py")

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=40)
settings.load_profile("default")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs `mdm-asr` in this process; gives exit code, stdout and stderr."""
    from mdm_asr_cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mdm-asr", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run
