# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders that bring their code, loaded where the package is not."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np

from mdm_asr_hf import MDMASRConfig, MDMASRFeatureExtractor, MDMASRForConditionalGeneration, MDMASRProcessor


def noise(num_samples=16000, seed=0):
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


REMOTE = """
import sys
sys.modules["mdm_asr_hf"] = None  # importing the package fails, whether or not it is installed
import numpy as np, json
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
clip, found = np.load(sys.argv[1]), []
for folder in sys.argv[2:]:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "MDMASRConfig"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    direct = processor.decode(model.generate(**processor(clip, sampling_rate=16000)))[0]
    pipe = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
    try:
        type(model).from_whisper("nowhere")
        hint = None
    except ImportError as error:
        hint = str(error)
    found.append({"type": pipe.type, "pipeline": pipe(clip)["text"].strip(), "direct": direct, "hint": hint})
print(json.dumps(found))
"""


def transcribe_as_remote_code(folders, clip, tmp_path):
    """Loads saved folders with trust_remote_code in a process that cannot import the package; what each gives."""
    np.save(tmp_path / "clip.npy", clip)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REMOTE), str(tmp_path / "clip.npy"), *map(str, folders)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def save_with_code(model, processor, folder):
    """What a user does to publish a folder that loads without the package."""
    classes = (MDMASRConfig, MDMASRFeatureExtractor, MDMASRProcessor, MDMASRForConditionalGeneration)
    for one in classes[:3]:
        one.register_for_auto_class()
    MDMASRForConditionalGeneration.register_for_auto_class("AutoModelForSpeechSeq2Seq")
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        for one in classes:
            one._auto_class = None
