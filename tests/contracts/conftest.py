# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Tells the tests that this package skips from those that transformers skips itself."""

import sys
from collections import Counter


def pytest_terminal_summary(terminalreporter):
    if "tests.test_modeling_common" not in sys.modules:
        return
    reasons = Counter()
    for report in terminalreporter.getreports("skipped"):
        path, _, reason = report.longrepr
        if not path.endswith("test_contracts.py"):
            reason = "(by transformers, for what a model or a machine has not)"
        reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section("skipped")
    for reason, number in reasons.items():
        terminalreporter.write_line(f"{number:4} {reason}")
