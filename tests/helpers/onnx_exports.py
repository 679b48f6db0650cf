# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Exports to ONNX that tests share: what PyTorch makes of a graph takes most of the time of an export."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from filelock import FileLock

import mdm_asr_hf
from mdm_asr_hf.onnx import export


def exported_checkpoint(tmp_path_factory):
    """The folder of the export of the checkpoint of the package, made once for all workers of a run."""
    root = Path(tmp_path_factory.getbasetemp())
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "mdm-asr-tiny-en-onnx"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            export.export_onnx(mdm_asr_hf.default_checkpoint(), part)
            part.rename(folder)
    return folder


@contextmanager
def graphs_of(exported):
    """Inside, exports take the graphs of this one, and only quantise them."""

    def copy(model, path):
        for file in exported.glob(f"{path.name}*"):
            shutil.copyfile(file, path.with_name(file.name))

    names = ("_export_encoder", "_export_decoder", "_export_drafts")
    with mock.patch.multiple(export, **dict.fromkeys(names, copy)):
        yield
