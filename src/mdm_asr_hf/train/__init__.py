# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Training by a donor's own text: clips of any speech, what the donor makes of them, and the stages that learn it."""
