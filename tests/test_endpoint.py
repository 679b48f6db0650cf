# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""endpoints/handler.py, called as Inference Endpoints call it."""

import base64
import importlib.util
import json

import pytest
from demo_recording import RECORDING, ROOT, TEXT
from tables import each


@pytest.fixture(scope="module")
def handler():
    spec = importlib.util.spec_from_file_location("handler", ROOT / "endpoints" / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler("")


def test_audio_in_bytes_or_base64_gives_text_and_times(handler):
    content = RECORDING.read_bytes()
    result = handler({"inputs": content})
    assert result["text"] == TEXT
    body = json.dumps({"inputs": base64.b64encode(content).decode(), "parameters": {"timestamps": True}})
    timed = json.loads(json.dumps(handler(json.loads(body))))
    words = [word for segment in timed["segments"] for word in segment["words"]]
    assert timed["text"] == TEXT and [word["text"] for word in words] == TEXT.split()
    assert all(0 <= word["start_s"] <= word["end_s"] <= timed["duration_s"] for word in words)


@each(
    "data, message",
    [
        ({}, "`inputs` must be the bytes"),
        ({"inputs": ""}, "`inputs` must be the bytes"),
        ({"inputs": "/etc/passwd"}, "`inputs` must be the bytes"),
        ({"inputs": b"no audio at all"}, "."),
        ({"inputs": b"RIFF", "parameters": {"beams": 5}}, "`parameters` has .'beams'."),
    ],
)
def test_what_cannot_be_used_is_said_on_one_line(handler, data, message):
    with pytest.raises(ValueError, match=message) as error:
        handler(data)
    assert "\n" not in str(error.value)
