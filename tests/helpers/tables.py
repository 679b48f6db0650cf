# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Tests over tables."""

import functools
import inspect

import pytest
import torch


def each(names, cases):
    """
    Runs a test for each of `cases`, which are values of the arguments `names`, as one test; the case that fails is
    named. Each begins with the seed, and has patches, a folder and an output of its own, as a test has.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names

    def decorate(test):
        def run(**fixtures):
            for number, case in enumerate(cases):
                values = dict(zip(names, case if len(names) > 1 else [case], strict=True))
                own = dict(fixtures)
                if "tmp_path" in own:
                    own["tmp_path"] = own["tmp_path"] / str(number)
                    own["tmp_path"].mkdir()
                if "capsys" in own:
                    own["capsys"].readouterr()
                if "caplog" in own:
                    own["caplog"].clear()
                torch.manual_seed(0)
                try:
                    with pytest.MonkeyPatch.context() as patch:
                        if "monkeypatch" in own:
                            own["monkeypatch"] = patch
                        test(**own, **values)
                except BaseException as error:
                    error.add_note(f"where {', '.join(f'{name} = {value!r}' for name, value in values.items())}")
                    raise

        functools.update_wrapper(run, test, updated=())
        del run.__wrapped__
        run.pytestmark = getattr(test, "pytestmark", [])
        kept = [p for p in inspect.signature(test).parameters.values() if p.name not in names]
        run.__signature__ = inspect.Signature(kept)
        return run

    return decorate
