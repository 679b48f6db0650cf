import gc
import os
import sys

# Two workers on two cores: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate.utils.memory
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=40)
settings.load_profile("default")


def pytest_collection_finish():
    # What was imported stays, and need not be looked through with each collection: a tenth of the time of an export.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    # Before and after each training: nearly half a second, for models of a few kilobytes.
    accelerate.utils.memory.clear_device_cache = lambda garbage_collection=False: None


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
