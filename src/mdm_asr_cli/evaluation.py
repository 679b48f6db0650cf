# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The commands of `mdm-asr` that measure a model, and publish it."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .options import (
    CanvasLength,
    Device,
    DType,
    Gamma,
    Lambda,
    Model,
    OtherSettings,
    Precision,
    Sampler,
    Steps,
    TrustRemoteCode,
)
from .terminal import Failure, load_named_model, quiet_libraries
from .terminal import report as warn

# torch and transformers take seconds to import, and help and usage errors need neither.
if TYPE_CHECKING:
    from mdm_asr_hf.evaluate.data import EvaluationData


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the application."""
    app.command()(evaluate)
    app.command()(score)
    app.command()(report)
    app.command()(push)


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
    dtype: Precision = DType.float32,
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
    from mdm_asr_hf.evaluate.evaluation import load_data, process_index_and_number

    try:
        with quiet_libraries() as collector:
            index, _ = process_index_and_number(device)
            try:
                names: dict[str, EvaluationData] = {}
                for one in [*data, *(more_data or [])]:
                    loaded = load_data(
                        one, limit=limit, split=split, name=config, text_column=text_column, language=language
                    )
                    loaded.name = _unique(loaded.name, names)
                    names[loaded.name] = loaded
                results = run_evaluation(
                    names,
                    output,
                    model=model,
                    language=language,
                    batch_size=batch_size,
                    device=device,
                    dtype=dtype.value,
                    seed=seed,
                    batch_1_rows=batch_1_rows,
                    trust_remote_code=trust_remote_code,
                    command=shlex.join(["mdm-asr", *sys.argv[1:]]),
                    others=others,
                    gamma=gamma,
                    sampler=sampler,
                    lambda_=lambda_,
                    max_denoising_steps=max_denoising_steps,
                    canvas_length=canvas_length,
                )
            except (ValueError, OSError) as error:
                raise Failure(error) from error
            finally:
                # Texts without an end are counted in the metrics, for the whole set and not batch by batch; what was
                # skipped, also by other processes, is reported below.
                told = ("Skipped ", "without an end of text")
                collector.messages = [one for one in collector.messages if not any(part in one for part in told)]
                if index == 0:
                    collector.flush_to_stderr()
        if index == 0:
            for one in names.values():
                for skipped in one.skipped:
                    warn("warning", f"{one.name}: skipped {skipped['id']}: {skipped['reason']}")
            _print_table(results)
    finally:
        leave_processes()


def run_evaluation(
    data: "dict[str, EvaluationData]",
    output: Path,
    *,
    model: str | None = None,
    language: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    batch_1_rows: int = 16,
    trust_remote_code: bool = False,
    command: str | None = None,
    **decoding: Any,
) -> dict[str, dict[str, Any]]:
    """
    Measures a model on data sets and writes their folders.

    Args:
        data: name -> data set. One alone is written to `output` itself, several to subfolders with their names.
        decoding: for `loading.generation_settings`.

    Returns:
        Name -> what its metrics.json holds; empty in all processes but the first.
    """
    import torch

    from mdm_asr_hf.data.sources import BadRows
    from mdm_asr_hf.evaluate.evaluation import (
        evaluate_model,
        measure_batch_1,
        peak_memory_mib,
        process_index_and_number,
        write_evaluation,
    )
    from mdm_asr_hf.loading import DEFAULT_CHECKPOINT_NAME, default_checkpoint, generation_settings

    index, _ = process_index_and_number(device)
    path = model or str(default_checkpoint())
    loaded, processor = load_named_model(path, device, trust_remote_code, dtype)
    settings = generation_settings(loaded, **decoding)
    results = {}
    for name, one in data.items():
        if torch.device(loaded.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(loaded.device)
        common = {"settings": settings, "language": language, "seed": seed}
        rows = evaluate_model(loaded, processor, one, batch_size=batch_size, progress=True, **common)
        peak_memory = peak_memory_mib(loaded.device)
        if index != 0:
            continue
        if not rows:
            causes = BadRows(skipped["reason"] for skipped in one.skipped)
            raise ValueError(f"None of the {len(causes)} rows of {one.path!r} could be transcribed: {causes}")
        batch_1 = measure_batch_1(loaded, processor, one, num_rows=batch_1_rows, **common) if batch_1_rows else None
        results[name] = write_evaluation(
            output if len(data) == 1 else output / name,
            rows,
            model=loaded,
            model_name=model or DEFAULT_CHECKPOINT_NAME,
            model_path=path,
            settings=settings,
            data=one,
            batch_size=batch_size,
            seed=seed,
            command=command,
            batch_1=batch_1,
            peak_memory=peak_memory,
        )
    return results


def _unique(name: str, taken: Any) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def leave_processes() -> None:
    """Ends what joined the processes of a launch, if there are several."""
    from mdm_asr_hf.evaluate.evaluation import process_index_and_number

    if process_index_and_number()[1] > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


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

    try:
        files = find_results(path)
        results = {name: score_rows(read_rows(file), language=language) for name, file in files.items()}
    except (ValueError, OSError) as error:
        raise Failure(error) from error
    if as_json:
        print(json.dumps(next(iter(results.values())) if len(results) == 1 else results, indent=2))
    else:
        _print_table(results)


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

    with quiet_libraries() as collector:
        try:
            files = find_results(folder)
            if output is not None and len(files) > 1:
                raise ValueError(
                    f"`--output` is one file, but {str(folder)!r} holds {len(files)} data sets. Leave it out, and "
                    "each gets its own, or name the folder of one."
                )
            for file in files.values():
                path = make_report(file, output, audio_root=audio_root, embed_audio=embed_audio)
                print(f"wrote {path}", flush=True)
        except (ValueError, OSError) as error:
            raise Failure(error) from error
        finally:
            collector.flush_to_stderr()


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
    from huggingface_hub.errors import HfHubHTTPError

    from mdm_asr_hf import hub

    with quiet_libraries() as collector:
        try:
            result = hub.push(folder, repo_id, private=private, with_code=not no_code, card=card, dry_run=dry_run)
        except (ValueError, OSError, HfHubHTTPError) as error:
            raise Failure(error) from error
        collector.flush_to_stderr()
    if dry_run:
        print("\n".join(result.files))
        print(f"gathered {len(result.files)} files in {result.folder}")
    else:
        print(f"uploaded {len(result.files)} files: {result.url}")


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    console = Console()
    # In a pipe or file nobody sees where a line of 80 would break.
    (console if console.is_terminal else Console(width=200)).print(results_table(results))


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """One line per data set, with the 95 % interval of the WER, and the mean of several."""
    table = Table(box=None, pad_edge=False)
    columns = {
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
    }
    for heading, key in (("masks %", "acceptance_rate_masks"), ("hypothesis %", "acceptance_rate_hypothesis")):
        if all(key in result["metrics"] for result in results.values()):
            columns[heading] = key
    table.add_column("data")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, result in results.items():
        metrics, interval = result["metrics"], result["intervals"].get("wer")
        cells = ["-" if metrics[key] is None else str(metrics[key]) for key in columns.values()]
        if interval is not None:
            cells[1] += escape(f" ({interval[0]} to {interval[1]})")
        table.add_row(escape(name), *cells)
    if len(results) > 1:
        means = []
        for key in columns.values():
            values = [result["metrics"][key] for result in results.values()]
            means.append(
                "" if key in ("num_utterances", "num_loops") or None in values else f"{sum(values) / len(values):.2f}"
            )
        table.add_row("mean", *means)
    return table


__all__ = ["evaluate", "leave_processes", "push", "register", "report", "results_table", "run_evaluation", "score"]
