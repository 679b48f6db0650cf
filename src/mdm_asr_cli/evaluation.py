# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The commands of `mdm-asr` that measure a model, and publish it."""

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .options import (
    CanvasLength,
    Device,
    Gamma,
    Lambda,
    Model,
    OtherSettings,
    Precision,
    Sampler,
    Steps,
    TrustRemoteCode,
)
from .terminal import command, load_named_model, quiet_libraries
from .terminal import report as warn


@command()
def evaluate(
    data: Annotated[
        list[str],
        typer.Option(
            metavar="DATA",
            help="A folder with metadata.jsonl or .csv, a manifest (.jsonl, .csv, .tsv), a data set of `datasets`, or "
            "librispeech-test-clean, librispeech-test-other, earnings22, ami, voxpopuli, mls-de, mls-es, mls-fr. "
            "Several: --data A B, or --data A --data B.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write hypotheses.jsonl and metrics.json.")],
    # An option of typer takes one value: those behind it arrive here.
    more_data: Annotated[list[str] | None, typer.Argument(metavar="DATA", hidden=True)] = None,
    model: Model = None,
    split: Annotated[str | None, typer.Option(help="Of the data. Default: test, where it has splits.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a data set of `datasets`.")] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of the transcripts. Default: text, or its like."),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of the speech, such as de: chooses prompt and normaliser. Default: en.")
    ] = None,
    gamma: Gamma = None,
    others: OtherSettings = None,
    sampler: Sampler = None,
    lambda_: Lambda = None,
    max_denoising_steps: Steps = None,
    canvas_length: CanvasLength = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Utterances decoded together.")] = 8,
    device: Device = None,
    dtype: Precision = "float32",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each data set.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn: samplers, temperatures.")] = 0,
    batch_1_rows: Annotated[
        int, typer.Option(min=0, help="Utterances to measure the speed at batch size 1 on; 0: not at all.")
    ] = 16,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Measure a model: error rates, speed, calibration.

    Writes hypotheses.jsonl (every utterance, nothing normalised) and metrics.json into FOLDER, or into a subfolder
    for each of several data sets. `mdm-asr score` computes the metrics again from the former. What is longer than the
    model takes at once is cut as `transcribe` does it; what cannot be read is reported, counted and left out. Under
    `accelerate launch` the processes share the utterances.
    """
    import torch

    from mdm_asr_hf.data.sources import BadRows
    from mdm_asr_hf.evaluate.evaluation import (
        evaluate_model,
        load_data,
        measure_batch_1,
        peak_memory_mib,
        process_index_and_number,
        write_evaluation,
    )
    from mdm_asr_hf.loading import DEFAULT_CHECKPOINT_NAME, default_checkpoint, generation_settings

    index, num_processes = process_index_and_number(device)
    results, sets = {}, {}
    try:
        with quiet_libraries() as collector:
            for one in [*data, *(more_data or [])]:
                loaded = load_data(
                    one, limit=limit, split=split, name=config, text_column=text_column, language=language
                )
                names = itertools.chain([loaded.name], (f"{loaded.name}-{n}" for n in itertools.count(2)))
                loaded.name = next(name for name in names if name not in sets)
                sets[loaded.name] = loaded
            path = model or str(default_checkpoint())
            loaded_model, processor = load_named_model(path, device, trust_remote_code, dtype)
            settings = generation_settings(
                loaded_model,
                others,
                gamma=gamma,
                sampler=sampler,
                lambda_=lambda_,
                max_denoising_steps=max_denoising_steps,
                canvas_length=canvas_length,
            )
            common = {"settings": settings, "language": language, "seed": seed}
            for name, one in sets.items():
                if torch.device(loaded_model.device).type == "cuda":
                    torch.cuda.reset_peak_memory_stats(loaded_model.device)
                rows = evaluate_model(loaded_model, processor, one, batch_size=batch_size, progress=True, **common)
                peak_memory = peak_memory_mib(loaded_model.device)
                if index != 0:
                    continue
                if not rows:
                    causes = BadRows(skipped["reason"] for skipped in one.skipped)
                    raise ValueError(f"None of the {len(causes)} rows of {one.path!r} could be transcribed: {causes}")
                batch_1 = None
                if batch_1_rows:
                    batch_1 = measure_batch_1(loaded_model, processor, one, num_rows=batch_1_rows, **common)
                results[name] = write_evaluation(
                    output if len(sets) == 1 else output / name,
                    rows,
                    model=loaded_model,
                    model_name=model or DEFAULT_CHECKPOINT_NAME,
                    model_path=path,
                    settings=settings,
                    data=one,
                    batch_size=batch_size,
                    seed=seed,
                    command=shlex.join(["mdm-asr", *sys.argv[1:]]),
                    batch_1=batch_1,
                    peak_memory=peak_memory,
                )
        if index == 0:
            # Texts without an end are counted in the metrics, for the whole set and not batch by batch; what was
            # skipped, also by other processes, is told here.
            collector.report(without=("Skipped ", "without an end of text"))
            for one in sets.values():
                for skipped in one.skipped:
                    warn("warning", f"{one.name}: skipped {skipped['id']}: {skipped['reason']}")
            _print_table(results)
    finally:
        if num_processes > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


@command()
def score(
    path: Annotated[
        Path, typer.Argument(metavar="FILE_OR_FOLDER", help="A hypotheses.jsonl, or a folder with one or several.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with all metrics instead of a table.")] = False,
    language: Annotated[
        str | None, typer.Option(help="Whose normaliser to use. Default: each row's own, else en.")
    ] = None,
) -> None:
    """
    Compute the metrics again, from hypotheses.jsonl alone.
    """
    from mdm_asr_hf.evaluate.scoring import find_results, read_rows
    from mdm_asr_hf.evaluate.scoring import score as score_rows

    results = {name: score_rows(read_rows(file), language=language) for name, file in find_results(path).items()}
    if as_json:
        print(json.dumps(next(iter(results.values())) if len(results) == 1 else results, indent=2))
    else:
        _print_table(results)


@command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `mdm-asr evaluate` wrote, for one or several data sets.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write. Default: report.html beside the hypotheses."),
    ] = None,
    audio_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the audio files are. Default: where they were when evaluated."),
    ] = None,
    embed_audio: Annotated[
        bool, typer.Option("--embed-audio", help="Put the audio into the file; for small sets, up to 100 MiB.")
    ] = False,
) -> None:
    """
    Write the error analysis of an evaluation: one HTML file, no network.

    The utterances, worst first, with aligned errors, audio and the drafts, or the canvas, step by step; WER by
    duration, calibration.
    """
    from mdm_asr_hf.evaluate.report import make_report
    from mdm_asr_hf.evaluate.scoring import find_results

    files = find_results(folder)
    if output is not None and len(files) > 1:
        raise ValueError(
            f"`--output` is one file, but {str(folder)!r} holds {len(files)} data sets. Leave it out, and each gets "
            "its own, or name the folder of one."
        )
    for file in files.values():
        path = make_report(file, output, audio_root=audio_root, embed_audio=embed_audio)
        print(f"wrote {path}", flush=True)


@command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint, with its card as README.md.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    no_code: Annotated[
        bool, typer.Option("--no-code", help="Leave out the code that trust_remote_code needs.")
    ] = False,
    card: Annotated[Path | None, typer.Option(metavar="FILE", help="The card. Default: FOLDER/README.md.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only gather the files that would be uploaded, and list them.")
    ] = False,
) -> None:
    """
    Upload a checkpoint to the Hub: model, processor, generation settings, code and card in one commit.

    Needs the token of `hf auth login`. Pickles and states of training in FOLDER are not uploaded.
    """
    from mdm_asr_hf import hub

    result = hub.push(folder, repo_id, private=private, with_code=not no_code, card=card, dry_run=dry_run)
    if dry_run:
        print("\n".join(result.files))
        print(f"gathered {len(result.files)} files in {result.folder}")
    else:
        print(f"uploaded {len(result.files)} files: {result.url}")


# Headings of the table that scores are printed in, and the metrics below them; the last two only of drafts.
COLUMNS = {
    "utterances": "num_utterances",
    "WER %": "wer",
    "CER %": "cer",
    "NFE": "mean_nfe",
    "tokens/NFE": "tokens_per_nfe",
    "RTFx": "rtfx",
    "ECE %": "ece",
    "empty %": "empty_rate",
    "repeating %": "repetition_rate",
    "loops": "num_loops",
    "masks %": "acceptance_rate_masks",
    "hypothesis %": "acceptance_rate_hypothesis",
}


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    console = Console()
    # In a pipe or file nobody sees where a line of 80 would break.
    (console if console.is_terminal else Console(width=200)).print(results_table(results))


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """One line per data set, with the 95 % interval of the WER, and the mean of several."""
    rows = {name: result["metrics"] for name, result in results.items()}
    columns = {
        heading: key
        for heading, key in COLUMNS.items()
        if not key.startswith("acceptance_rate") or all(key in row for row in rows.values())
    }
    table = Table("data", box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = ["-" if row[key] is None else str(row[key]) for key in columns.values()]
        if (interval := results[name]["intervals"].get("wer")) is not None:
            cells[1] += escape(f" ({interval[0]} to {interval[1]})")
        table.add_row(escape(name), *cells)
    if len(rows) > 1:
        values = {key: [row[key] for row in rows.values()] for key in columns.values()}
        table.add_row(
            "mean",
            *(
                "" if key.startswith("num_") or None in its else f"{sum(its) / len(its):.2f}"
                for key, its in values.items()
            ),
        )
    return table
