# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""A donor's weights as a model of this package."""
