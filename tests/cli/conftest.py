# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of commands share."""

import copy
import functools
from pathlib import Path

import pytest

from mdm_asr_hf import loading


@pytest.fixture(scope="module", autouse=True)
def loads_a_checkpoint_once():
    """A checkpoint is read once, until its weights change, and each command has generation settings of its own."""
    load = loading.load_model

    @functools.cache
    def read(changed_ns, *arguments):
        return load(*arguments)

    def load_model(model, *arguments):
        weights = Path(model) / "model.safetensors"
        if not weights.is_file():
            return load(model, *arguments)
        loaded, processor = read(weights.stat().st_mtime_ns, model, *arguments)
        loaded = copy.copy(loaded)
        loaded.generation_config = copy.deepcopy(loaded.generation_config)
        return loaded, processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", load_model)
        yield
