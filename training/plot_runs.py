#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Draws what run_train.py and run_eval.py wrote:

    python training/plot_runs.py curve OUT.png isct=RUN/results.json plain=RUN/results.json
    python training/plot_runs.py steps OUT.png isct=EVAL_AT_2,EVAL_AT_4,... plain=EVAL_AT_2,...

`curve` shows the losses of the log; `steps` the WER of each evaluation folder against its bound of denoising steps.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw_curve(axes, name: str, file: str) -> None:
    log = json.loads(Path(file).read_text(encoding="utf-8"))["log"]
    for key in ("loss_step_1", "loss_step_2"):
        points = [(entry["step"], float(entry[key])) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{name}: {key}")
    axes.set(xlabel="optimizer steps", ylabel="masked diffusion loss")


def draw_steps(axes, name: str, folders: str) -> None:
    points = []
    for folder in folders.split(","):
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        points.append((metrics["max_denoising_steps"], metrics["wer"]))
    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="denoising steps at most (NFE)", ylabel="WER %", xscale="log")
    axes.minorticks_off()
    axes.set_xticks([2, 4, 8, 16, 32], labels=["2", "4", "8", "16", "32"])


def main(kind: str, output: str, *series: str) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for one in series:
        name, _, source = one.partition("=")
        {"curve": draw_curve, "steps": draw_steps}[kind](axes, name, source)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("curve", "steps"):
        raise SystemExit(__doc__.strip())
    main(*sys.argv[1:])
