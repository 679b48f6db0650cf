# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr`: settles what PyTorch reads once, when it is loaded, and so cannot stand in the package that loads it."""

import os


def main() -> None:
    # OpenMP's threads spin while they wait for each other, and take several times as long where other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mdm_asr_hf.cli import main as run

    run()


__all__ = ["main"]
