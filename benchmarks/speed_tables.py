# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What run_speed.py writes from a raw.jsonl: results.json, results.md and results.png. No model runs."""

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from run_peers import table
from work import STAGES

COLUMNS = ("features", *STAGES, "rest")
# Resamples of the utterances for the intervals of WER.
NUM_BOOTSTRAP, BOOTSTRAP_SEED = 1000, 0
SETTING = ("gamma", "lambda", "ahead", "behind", "commit", "revise", "steps")


# Stages


def summarise_stages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Per system, backend, batch size and length:

    - `wall_s`: seconds of one transcription of a batch, the median of the rounds, and `rtfx`, `rtfx_min`, `rtfx_max`;
    - `stages_s`: likewise of each stage. "rest" is what is in none: the canvas, masks, detokenizing;
    - `encode_s`, `decode_s`: of the encoder, and of all else that `generate` does; `decode_over_encode`: their ratio;
    - `mean_nfe`, `positions` of an utterance, `evaluations` of a batch;
    - `macs` of an utterance by stage, and `decoder_attention_macs`, see `work.Work`; of PyTorch only.
    """
    keys = ("system", "backend", "dtype", "settings", "batch_size", "length_s")
    works = {tuple(row[key] for key in keys): row for row in rows if row["kind"] == "work"}
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
        for name in ("macs", "decoder_attention_macs"):
            result[name] = works.get(key, {}).get(name)
        results.append(result)
    return results


def _median(group: list[dict[str, Any]], value: Any) -> float:
    """Of the rounds, for one batch."""
    return round(median(value(row) / row["num_batches"] for row in group), 6)


def stages_to_markdown(results: list[dict[str, Any]]) -> list[str]:
    parts = []
    for batch_size in sorted({result["batch_size"] for result in results}):
        head = [f"batch size {batch_size}, ms", "s", "all", *COLUMNS, "decode / encode", "RTFx", "NFE", "positions"]
        head += ["encoder MMAC", "decoder MMAC", "of it attention"]
        lines = []
        for result in [one for one in results if one["batch_size"] == batch_size]:
            line = [system_label(result), f"{result['length_s']:g}", f"{1000 * result['wall_s']:.1f}"]
            line += [f"{1000 * result['stages_s'][stage]:.1f}" for stage in COLUMNS]
            line += [f"{result['decode_over_encode']:.2f}", f"{result['rtfx']:.1f}"]
            line += [f"{result['mean_nfe']:.1f}", f"{result['positions']:.0f}"]
            if result["macs"]:
                macs = result["macs"]
                decoder = sum(macs[stage] for stage in ("cross keys", "decoder", "output layer"))
                numbers = (macs["encoder"], decoder, result["decoder_attention_macs"])
                line += [f"{number / 1e6:.0f}" for number in numbers]
            else:
                line += ["", "", ""]
            lines.append(line)
        parts.append(table(head, lines))
    parts.append(
        "Milliseconds of one batch, medians; NFE, positions and MMAC (millions of multiply-accumulates) of one "
        "utterance. Decode is all that `generate` does but the encoder."
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


# Front


def summarise_front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Per setting, over all data sets:

    - `wer` in per cent with a bootstrap interval over the utterances, `wer_by_dataset`;
    - `mean_nfe`, `positions`, `decoder_s` of an utterance, and `rtfx_decoder`;
    - `on_front`: whether no other setting has a lower WER at no more evaluations, or fewer evaluations at no higher
      WER; and `on_front_of_positions`, the same of positions.
    """
    import numpy as np

    from mdm_asr_hf.scoring_mdm_asr import count_errors, normaliser

    normalise = normaliser("en")
    sets = {row["dataset"] for row in rows if row["kind"] == "done"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    complete: dict[tuple, set[str]] = {}
    for row in rows:
        if row["kind"] in ("utterance", "done"):
            # Older runs had no choice of some.
            key = tuple(row["setting"].get(name) for name in SETTING)
            if row["kind"] == "utterance":
                groups.setdefault(key, []).append(row)
            else:
                complete.setdefault(key, set()).add(row["dataset"])
    results = []
    for key, group in groups.items():
        if complete.get(key) != sets:
            # A run that was cut off: it would be compared on other utterances.
            continue
        texts = [[normalise(row[side]) for row in group] for side in ("reference", "hypothesis")]
        counts = count_errors(*texts)
        errors, words = counts[:, :3].sum(axis=1), counts[:, 3]
        drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(group), (NUM_BOOTSTRAP, len(group)))
        resampled = 100 * errors[drawn].sum(axis=1) / words[drawn].sum(axis=1).clip(1)
        result = dict(zip(SETTING, key, strict=True)) | {"num_utterances": len(group)}
        result["wer"] = round(100 * int(errors.sum()) / max(int(words.sum()), 1), 2)
        result["wer_interval"] = [round(float(one), 2) for one in np.percentile(resampled, [2.5, 97.5])]
        result["wer_by_dataset"] = {}
        for dataset in dict.fromkeys(row["dataset"] for row in group):
            among = np.array([row["dataset"] == dataset for row in group])
            wer = 100 * int(errors[among].sum()) / max(int(words[among].sum()), 1)
            result["wer_by_dataset"][dataset] = round(wer, 2)
        for name, source in (("mean_nfe", "nfe"), ("positions", "positions"), ("decoder_s", "decoder_s")):
            result[name] = round(mean(row[source] for row in group), 4 if name == "decoder_s" else 2)
        seconds = sum(row["decoder_s"] for row in group)
        result["rtfx_decoder"] = round(sum(row["duration_s"] for row in group) / seconds, 2)
        results.append(result)
    for name, cost in (("on_front", "mean_nfe"), ("on_front_of_positions", "positions")):
        for one in results:
            here = (one["wer"], one[cost])
            better = [(o["wer"], o[cost]) for o in results if o["wer"] <= here[0] and o[cost] <= here[1]]
            one[name] = all(pair == here for pair in better)
    return results


def front_to_markdown(results: list[dict[str, Any]]) -> list[str]:
    datasets = list(dict.fromkeys(name for result in results for name in result["wer_by_dataset"]))
    head = [*SETTING, "WER %", "95 %", *(f"WER % {name}" for name in datasets), "NFE", "positions"]
    head += ["decoder ms", "decoder RTFx", "front"]
    lines = []
    for result in sorted(results, key=lambda one: one["mean_nfe"]):
        line = ["none" if result[name] is None else f"{result[name]}" for name in SETTING]
        low, high = result["wer_interval"]
        line += [f"{result['wer']:.2f}", f"{low:.2f} to {high:.2f}"]
        line += [f"{result['wer_by_dataset'][name]:.2f}" for name in datasets]
        line += [f"{result['mean_nfe']:.2f}", f"{result['positions']:.0f}", f"{1000 * result['decoder_s']:.1f}"]
        fronts = (("on_front", "NFE"), ("on_front_of_positions", "positions"))
        line += [f"{result['rtfx_decoder']:.1f}", ", ".join(text for name, text in fronts if result[name])]
        lines.append(line)
    note = (
        f"{results[0]['num_utterances']} utterances; positions and milliseconds of one, as its share of its batch. "
        "Front: no other setting has a lower WER for as little of it."
    )
    return [table(head, lines), note]


def plot_front(results: list[dict[str, Any]]) -> Any:
    """WER against evaluations, and against positions: a line per lambda, window and bound, its points by gamma."""
    from matplotlib.figure import Figure

    lines: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        lines.setdefault(tuple(result[name] for name in SETTING[1:]), []).append(result)
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (lambda_, ahead, behind, commit, revise, steps), points in lines.items():
        points.sort(key=lambda one: float(one["gamma"]))
        window = "whole canvas" if ahead is None else f"ahead {ahead}, behind {behind}"
        label = f"lambda {lambda_:g}, {window}, {steps} steps"
        label += "" if commit is None else f", committed among {commit}"
        label += "" if revise is None else f", revised above {revise:g}"
        for panel, cost in zip(panels, ("mean_nfe", "positions"), strict=True):
            panel.plot([one[cost] for one in points], [one["wer"] for one in points], marker="o", label=label)
            for one in points:
                panel.annotate(
                    one["gamma"], (one[cost], one["wer"]), fontsize=6, textcoords="offset points", xytext=(3, 3)
                )
    panels[0].set(xlabel="decoder evaluations of an utterance", ylabel="WER, %; the points: gamma")
    panels[1].set(xlabel="decoder positions computed for an utterance", xscale="log")
    for panel in panels:
        panel.grid(alpha=0.3, which="both")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


# Both


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of results.json: the run, and the results of its part."""
    run = next(row for row in rows if row["kind"] == "run")
    results = (summarise_front if run["part"] == "front" else summarise_stages)(rows)
    return {"run": run, "results": results}


def to_markdown(summary: dict[str, Any]) -> str:
    run = summary["run"]
    parts = (front_to_markdown if run["part"] == "front" else stages_to_markdown)(summary["results"])
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
        draw = plot_front if summary["run"]["part"] == "front" else plot_stages
        draw(summary["results"]).savefig(folder / "results.png", dpi=150)
    except ImportError:
        print("results.png needs matplotlib, which is not installed.", file=sys.stderr)
    return summary


__all__ = ["summarise", "to_markdown", "write_results"]
