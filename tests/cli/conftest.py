# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of commands share."""

import copy
import functools

import pytest

from mdm_asr_hf import loading


@pytest.fixture(scope="module", autouse=True)
def loads_the_checkpoint_once():
    """The package's own checkpoint is read once, and each command has generation settings of its own."""
    load, own = loading.load_model, str(loading.default_checkpoint())
    read = functools.cache(load)

    def load_model(model, *arguments):
        if model != own:
            return load(model, *arguments)
        loaded, processor = read(model, *arguments)
        loaded = copy.copy(loaded)
        loaded.generation_config = copy.deepcopy(loaded.generation_config)
        return loaded, processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", load_model)
        yield
