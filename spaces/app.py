# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Space: the page of `mdm-asr demo`, with the checkpoint of the package."""

from mdm_asr_hf.demo.page import launch
from mdm_asr_hf.loading import default_checkpoint, load_model

launch(*load_model(str(default_checkpoint())))
