# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""For schemathesis in run_serve.py: half of the files it sends are audio, some of it cut off or with bytes changed."""

import os
import random
from pathlib import Path
from typing import Any

import schemathesis

SAMPLE = Path(os.environ["FUZZ_SAMPLE"]).read_bytes()


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or "file" not in body:
        return body
    # By the case, so that it can be replayed.
    chance = random.Random(repr(sorted(body.items(), key=str)))
    kind, content = chance.randrange(6), bytearray(SAMPLE)
    if kind >= 3:
        return body
    if kind == 1:
        del content[chance.randrange(len(content)) :]
    if kind == 2:
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
    # The rest as it is, but for what only one value of fits.
    body = {name: value for name, value in body.items() if name != "language" or chance.random() < 0.2}
    return {**body, "file": bytes(content), "model": "whisper-1"}
