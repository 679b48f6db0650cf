# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Where utterances for training and evaluation come from, and how they are mixed and varied."""
