# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The command line, `mdm-asr`: a thin shell over the Python API, which takes seconds to import and so is not imported
before a command runs.
"""

import os


def main() -> None:
    """Runs a command."""
    # Read once, when PyTorch is loaded: OpenMP's threads spin while they wait for each other, and take several times
    # as long where other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .app import main as run

    run()
