# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""How many cores there are to work on."""

import os
import time
from pathlib import Path

# How often, and how far apart, is looked at what else runs.
LOOKS, LOOK_EVERY_S = 5, 0.005


def free_cores(loadavg: str = "/proc/loadavg") -> int:
    """
    Of `num_cores`, those that nothing else runs on at this moment, and one at least: threads that share a core with
    other work keep all others waiting in each of hundreds of operations, so that one alone is faster.
    """
    num_running = []
    try:
        for _ in range(LOOKS):
            num_running.append(int(Path(loadavg).read_text().split()[3].partition("/")[0]))
            time.sleep(LOOK_EVERY_S)
    except (OSError, ValueError, IndexError):
        return num_cores()
    # This one is among them.
    others = sorted(num_running)[LOOKS // 2] - 1
    return max(1, min(num_cores(), (os.cpu_count() or 1) - others))


def num_cores(quota: str = "/sys/fs/cgroup/cpu.max") -> int:
    """The cores that this process may use: of the machine, of those it is tied to, and of its container's quota."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        used_us, period_us = Path(quota).read_text().split()
        return max(1, min(number, round(int(used_us) / int(period_us))))
    except (OSError, ValueError):
        # There is none, or it is "max".
        return number
