# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""training/voice_activity.py."""

import onnx
import pytest
import voice_activity

from mdm_asr_hf.transcribe.voice_activity import SILERO_FILE


def test_the_package_has_the_graph_that_the_script_makes(tmp_path):
    pytest.importorskip("silero_vad")
    voice_activity.main([str(tmp_path / "graph.onnx")])
    made, kept = onnx.load(tmp_path / "graph.onnx"), onnx.load(SILERO_FILE)
    assert made.graph == kept.graph and "MIT" in kept.doc_string
