# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The handler of a Hugging Face Inference Endpoint: beside requirements.txt in a model's repository it serves that model.
"""

import base64
import binascii
from dataclasses import asdict
from typing import Any

from mdm_asr_hf import Transcriber
from mdm_asr_hf.loading import default_checkpoint, load_model

PARAMETERS = ("timestamps", "language", "hotwords", "previous_text")


class EndpointHandler:
    """
    Args:
        path (`str`): the repository's folder; by default the checkpoint of the package.
    """

    def __init__(self, path: str = ""):
        self.model, self.processor = load_model(path or str(default_checkpoint()))

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            data (`dict`): `inputs`, the bytes of an audio file, or as JSON has them in base64; `parameters`, of those
                of [`Transcriber`] some.

        Returns:
            `dict`: text, segments with words, and what else a [`Transcript`] has.

        Raises:
            ValueError: no audio, audio that cannot be read, or another parameter.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if isinstance(inputs, str):
            # Never a path or an address: nothing of the caller's choice is opened.
            try:
                inputs = base64.b64decode(inputs, validate=True)
            except binascii.Error as error:
                raise ValueError("`inputs` must be the bytes of an audio file, in JSON as base64.") from error
        if not isinstance(inputs, (bytes, bytearray)) or not inputs:
            raise ValueError("`inputs` must be the bytes of an audio file. Send it as the body of the request.")
        if unknown := sorted(set(parameters) - set(PARAMETERS)):
            raise ValueError(f"`parameters` has {unknown}, but takes {list(PARAMETERS)}. Leave the others out.")
        return asdict(Transcriber(self.model, self.processor, **parameters).transcribe(inputs))


__all__ = ["EndpointHandler"]
