# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What run_speed.py writes from a raw.jsonl: results.json, results.md and results.png. No model runs."""

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from run_peers import table

# Where `generate` spends its time, in the order of a transcription.
STAGES = ("encoder", "cross keys", "decoder", "output layer", "draft head", "sampler")
COLUMNS = ("features", *STAGES, "rest")


def summarise_stages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Per system, backend, batch size and length:

    - `wall_s`: seconds of one transcription of a batch, the median of the rounds, and `rtfx`, `rtfx_min`, `rtfx_max`;
    - `stages_s`: likewise of each stage. "rest" is what is in none: the canvas, masks, detokenizing;
    - `encode_s`, `decode_s`: of the encoder, and of all else that `generate` does; `decode_over_encode`: their ratio;
    - `mean_nfe`, `positions` of an utterance, `evaluations`, the decoder's calls, of a batch.
    """
    keys = ("system", "backend", "dtype", "settings", "batch_size", "length_s")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "time":
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    results = []
    for key, group in groups.items():
        first = group[0]
        result = dict(zip(keys, key, strict=True)) | {"num_rounds": len(group), "num_clips": first["num_clips"]}
        rtfx = [row["audio_s"] / row["wall_s"] for row in group]
        result |= {"wall_s": _median(group, lambda row: row["wall_s"]), "rtfx": round(median(rtfx), 2)}
        result |= {"rtfx_min": round(min(rtfx), 2), "rtfx_max": round(max(rtfx), 2)}
        result["stages_s"] = {
            stage: _median(group, lambda row, stage=stage: row["stages"].get(stage, 0.0)) for stage in COLUMNS[:-1]
        }
        result["stages_s"]["rest"] = _median(
            group, lambda row: row["wall_s"] - sum(s for stage, s in row["stages"].items() if stage != "generate")
        )
        result["encode_s"] = result["stages_s"]["encoder"]
        result["decode_s"] = _median(group, lambda row: row["stages"]["generate"] - row["stages"]["encoder"])
        result["decode_over_encode"] = round(result["decode_s"] / result["encode_s"], 3)
        result |= {"mean_nfe": round(mean(first["nfe"]), 2)}
        result |= {"positions": round(first["positions"] / first["num_clips"], 2)}
        result |= {"evaluations": round(first["evaluations"] / first["num_batches"], 2)}
        results.append(result)
    return results


def _median(group: list[dict[str, Any]], value: Any) -> float:
    """Of the rounds, for one batch."""
    return round(median(value(row) / row["num_batches"] for row in group), 6)


def stages_to_markdown(results: list[dict[str, Any]]) -> list[str]:
    parts = []
    for batch_size in sorted({result["batch_size"] for result in results}):
        head = [f"batch size {batch_size}, ms", "s", "all", *COLUMNS, "decode / encode", "RTFx", "NFE", "positions"]
        lines = []
        for result in [one for one in results if one["batch_size"] == batch_size]:
            line = [system_label(result), f"{result['length_s']:g}", f"{1000 * result['wall_s']:.1f}"]
            line += [f"{1000 * result['stages_s'][stage]:.1f}" for stage in COLUMNS]
            line += [f"{result['decode_over_encode']:.2f}", f"{result['rtfx']:.1f}"]
            line += [f"{result['mean_nfe']:.1f}", f"{result['positions']:.0f}"]
            lines.append(line)
        parts.append(table(head, lines))
    parts.append(
        "Milliseconds of one batch, medians; NFE and positions of one utterance. Decode is all that `generate` does "
        "but the encoder."
    )
    return parts


def system_label(result: dict[str, Any]) -> str:
    return result["system"] if result["backend"] == "torch" else f"{result['system']}, ONNX Runtime {result['dtype']}"


def plot_stages(results: list[dict[str, Any]]) -> Any:
    """Seconds by stage, stacked, against the length: a line of panels per system, a panel per batch size."""
    from matplotlib.figure import Figure

    batch_sizes = sorted({result["batch_size"] for result in results})
    systems = list(dict.fromkeys(map(system_label, results)))
    figure = Figure(figsize=(1.5 + 4 * len(batch_sizes), 1 + 3 * len(systems)), layout="constrained")
    panels = figure.subplots(len(systems), len(batch_sizes), squeeze=False, sharey="col")
    for line, system in zip(panels, systems, strict=True):
        for panel, batch_size in zip(line, batch_sizes, strict=True):
            cells = [one for one in results if (system_label(one), one["batch_size"]) == (system, batch_size)]
            cells.sort(key=lambda one: one["length_s"])
            bottom = [0.0] * len(cells)
            for stage in COLUMNS:
                heights = [one["stages_s"][stage] / batch_size for one in cells]
                panel.bar(range(len(cells)), heights, bottom=bottom, label=stage)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            panel.set_xticks(range(len(cells)), [f"{one['length_s']:g}" for one in cells])
            panel.set_title(f"{system}, batch size {batch_size}", fontsize=9)
            panel.grid(axis="y", alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("length of the clips, s")
    for line in panels:
        line[0].set_ylabel("s per utterance")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of results.json: the run, and the results."""
    return {"run": next(row for row in rows if row["kind"] == "run"), "results": summarise_stages(rows)}


def to_markdown(summary: dict[str, Any]) -> str:
    run = summary["run"]
    parts = stages_to_markdown(summary["results"])
    machine, versions = run["machine"], run["versions"]
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    parts.append(
        f"{device}{machine['cpu']}, {machine['num_cores']} cores, {run['settings']['threads']} threads. Load before "
        f"the run: {machine['load_before']}. "
        + ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        + "."
    )
    parts.append(f"```bash\n{run['command']}\n```")
    return "\n\n".join(parts) + "\n"


def write_results(folder: Path) -> dict[str, Any]:
    """Makes results.json, results.md and results.png of a folder's raw.jsonl."""
    path = folder / "raw.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Run without --rescore first.")
    summary = summarise([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    if not summary["results"]:
        raise ValueError(f"{str(path)!r} holds nothing complete. Start the run again.")
    (folder / "results.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(to_markdown(summary), encoding="utf-8")
    try:
        plot_stages(summary["results"]).savefig(folder / "results.png", dpi=150)
    except ImportError:
        print("results.png needs matplotlib, which is not installed.", file=sys.stderr)
    return summary


__all__ = ["summarise", "to_markdown", "write_results"]
