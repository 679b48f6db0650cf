# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""transcribe_dataset: archives of audio to shards of transcripts, by actors of Ray, on one machine or many."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cores import num_cores
from ..data.archives import Archive, AudioRow
from ..encoding_mdm_asr import json_text
from ..files import replacing
from ..loading import default_checkpoint, generation_settings, load_model, model_identity
from .transcriber import Transcriber
from .transcript import Transcript

# Those who read a folder of Parquet pass over names with an underscore.
RUN_FILE = "_run.json"
# Where nothing tells how large rows are.
MAX_SHARD_ROWS = 4096
# Ray tries a shard again whose worker died, for ever: so many times a run are enough.
MAX_TRIES = 6
# If nothing else comes before, nothing will.
MAX_FAILURES = 8
OBJECT_STORE_BYTES = 200 * 2**20
REPORT_S = 5.0


def transcribe_dataset(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    format: str = "parquet",
    actors: int | None = None,
    threads: int = 1,
    gpus: float = 0.0,
    shard_mb: float = 16.0,
    split: str | None = None,
    config: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    settings: list[str] | None = None,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Transcribes an archive of audio, shard by shard, by a pool of Ray actors; called again, only the shards that are
    not there yet.

    Each file `shard-NNNNN` has the rows of its shard, in order: `id`, `text`, `words` (text, confidence, start_s and
    end_s), `confidence`, `nfe`, `duration_s`, `language`, `warnings`, and `error`, which is null but for rows that
    cannot be transcribed. A shard is there as a whole or not at all. Ray runs in this process, or as
    RAY_ADDRESS says, on a cluster, whose machines have `output`, `source` and this package at the same paths.

    Args:
        source, split, config: of [`Archive`]. Ids that come twice get #2, #3 behind them.
        output: the folder for the shards, on a disk that all machines share.
        model (`str`, *optional*): a checkpoint, or what [`export_onnx`] wrote.
        format (`str`): "parquet" or "jsonl".
        actors (`int`, *optional*): that transcribe at the same time; by default as many as there is room for.
        threads (`int`), gpus (`float`): CPU threads and GPUs of each, a share of one GPU or a whole number.
        shard_mb (`float`): MB of stored audio in a shard, about: what a kill may cost each actor.
        dtype, trust_remote_code: as for [`load_model`].
        settings (`list[str]`, *optional*): NAME=VALUE of generation settings.
        report (`Callable`, *optional*): is called with lines about the progress.
        options: of [`Transcriber`], such as `timestamps`, `language`, `batch_size`.

    Returns:
        `rows`, `shards` and `shards_before` of the archive; `new_rows`, `errors`, `duration_s` (of audio) and
        `seconds` of this run.

    Raises:
        ValueError: an argument, a source or a model that cannot be used, `output` of another run, or shards that could
            not be written. The others stay.
    """
    if not gpus >= 0 or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"`gpus` must be a share of one or a whole number, got {gpus!r}.")
    if not shard_mb > 0:
        raise ValueError(f"`shard_mb` must be positive, got {shard_mb!r}.")
    report = report or (lambda line: None)
    archive = Archive(os.path.abspath(source) if os.path.exists(source) else str(source), split, config)
    model = str(model or default_checkpoint())
    model = os.path.abspath(model) if os.path.isdir(model) else model
    output = Path(os.path.abspath(output))
    kind, rows = archive.list_rows()
    shards = cut_shards(rows, shard_mb)
    decoding = {"dtype": dtype, "settings": settings or [], **options}
    run = {"rows": _digest(rows), "format": format, "shard_mb": shard_mb, "model": model_identity(model), **decoding}
    # Which changes no text.
    run.pop("batch_size", None)
    _open_output(output, run)
    paths = [output / f"shard-{i:05d}.{format}" for i in range(len(shards))]
    todo = [i for i, path in enumerate(paths) if not path.is_file()]
    _remove_leftovers(output)
    totals = {"new_rows": 0, "errors": 0, "duration_s": 0.0}
    failures: list[str] = []
    started = reported = time.monotonic()
    report(f"{len(rows)} rows in {len(shards)} shards, of which {len(shards) - len(todo)} are there")
    units = [{"path": paths[i], "rows": shards[i]} for i in todo]
    worker = {"archive": archive, "kind": kind, "trust_remote_code": trust_remote_code, "model": model}
    worker |= {"threads": threads, "decoding": decoding}
    for number, result in enumerate(_run_actors(units, worker, actors, threads, gpus) if todo else (), start=1):
        failures += [result["failure"]] if result["failure"] else []
        if len(failures) == MAX_FAILURES and not totals["new_rows"]:
            break
        totals = {name: total + result[name] for name, total in totals.items()}
        now = time.monotonic()
        if now - reported > REPORT_S or number == len(todo):
            reported = now
            report(
                f"{number} of {len(todo)} shards, {totals['new_rows']} rows, {totals['errors']} of them errors, "
                f"{totals['duration_s'] / 3600:.2f} hours of audio at {totals['duration_s'] / (now - started):.1f} "
                "times real time"
            )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        why = failures[0] if failures else "Ray lost them."
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards, from {missing[0]} on, could not be written: {why} The others "
            "are there; the same call tries again."
        )
    _remove_leftovers(output)
    counts = {"rows": len(rows), "shards": len(shards), "shards_before": len(shards) - len(todo)}
    return {**counts, **totals, "seconds": time.monotonic() - started}


def cut_shards(rows: list[AudioRow], shard_mb: float) -> list[list[AudioRow]]:
    """Rows, in order, in shards of at most so many MB, unless one row alone has more."""
    shards: list[list[AudioRow]] = []
    num_bytes = 0
    for row in rows:
        is_full = num_bytes + row.num_bytes > shard_mb * 1e6 or (shards and len(shards[-1]) == MAX_SHARD_ROWS)
        if not shards or is_full:
            shards.append([])
            num_bytes = 0
        shards[-1].append(row)
        num_bytes += row.num_bytes
    return shards


class ShardWorker:
    """What an actor does: loads a model once, and writes shards."""

    def __init__(
        self,
        archive: Archive,
        kind: str,
        model: str,
        threads: int,
        decoding: dict[str, Any],
        trust_remote_code: bool = False,
    ):
        self.archive, self.kind, self.decoding = archive, kind, decoding
        self.loading = (model, None, trust_remote_code, decoding["dtype"], threads)

    @cached_property
    def transcriber(self) -> Transcriber:
        """Loaded with the first shard, so that a worker that dies of it counts among that shard's tries."""
        options = {name: value for name, value in self.decoding.items() if name not in ("dtype", "settings")}
        loaded, processor = load_model(*self.loading)
        settings = generation_settings(loaded, self.decoding["settings"])
        return Transcriber(loaded, processor, settings=settings, **options)

    def write(self, path: Path, rows: list[AudioRow]) -> dict[str, Any]:
        """Gives `new_rows`, `errors`, `duration_s` in seconds, and `failure`, the reason why nothing was written, or
        ""."""
        tries = path.with_name(f".{path.stem}.tries")
        try:
            with open(tries, "ab") as file:
                file.write(b".")
            if tries.stat().st_size > MAX_TRIES:
                raise RuntimeError(f"a worker died of it {MAX_TRIES} times, maybe for want of memory")
            lines = [to_row(row.id, one) for row, one in zip(rows, self._transcribe(rows), strict=True)]
            with replacing(path) as temporary:
                {".parquet": _write_parquet, ".jsonl": _write_jsonl}[path.suffix](lines, temporary)
            tries.unlink(missing_ok=True)
        except Exception as error:
            return _nothing_written(_reason(error))
        errors = sum(line["error"] is not None for line in lines)
        duration_s = sum(line["duration_s"] or 0.0 for line in lines)
        return {"new_rows": len(rows), "errors": errors, "duration_s": duration_s, "failure": ""}

    def _transcribe(self, rows: list[AudioRow]) -> list[Transcript | ValueError]:
        try:
            return [result for _, result in self.transcriber.transcribe_all(self.archive.read(self.kind, rows))]
        except Exception as error:
            if len(rows) == 1:
                raise
            reason = error
        # One of them is worse than bad. If all are, it is not the rows.
        results, num_broken = [], 0
        for row in rows:
            try:
                results += self._transcribe([row])
            except Exception as error:
                results.append(ValueError(_reason(error)))
                num_broken += 1
        if num_broken == len(rows):
            raise reason
        return results


def _nothing_written(reason: str) -> dict[str, Any]:
    return {"new_rows": 0, "errors": 0, "duration_s": 0.0, "failure": reason.rstrip(".") + "."}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


def to_row(row_id: str, result: Transcript | ValueError) -> dict[str, Any]:
    """What is written of a row."""
    if isinstance(result, Transcript) and result.duration_s == 0:
        result = ValueError("It is empty (no samples). Record or export it again.")
    names = ("text", "words", "confidence", "nfe", "duration_s", "language", "warnings")
    if isinstance(result, ValueError):
        return {"id": row_id, **dict.fromkeys(names), "error": str(result)}
    values = {name: getattr(result, name) for name in names}
    return {"id": row_id, **values, "words": [dataclasses.asdict(word) for word in result.words], "error": None}


def _write_parquet(lines: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    word = pa.struct({"text": text, "start_s": number, "end_s": number, "confidence": number})
    columns = {"id": text, "text": text, "words": pa.list_(word), "confidence": number, "nfe": pa.int64()}
    columns |= {"duration_s": number, "language": text, "warnings": pa.list_(text), "error": text}
    pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(columns)), path)


def _write_jsonl(lines: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json_text(line) + "\n" for line in lines), encoding="utf-8", newline="\n")


def _digest(rows: list[AudioRow]) -> str:
    listed = "".join(f"{row.id}\0{row.num_bytes}\0" for row in rows)
    return f"{len(rows)} rows, {hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def _open_output(output: Path, run: dict[str, Any]) -> None:
    """Makes the folder, or raises ValueError where it is another run's."""
    run = json.loads(json.dumps(run, default=str))
    path = output / RUN_FILE
    try:
        if not path.is_file():
            if any(output.glob("shard-*")):
                raise ValueError(f"`output` {str(output)!r} has shards but no {RUN_FILE}. Choose another folder.")
            with replacing(path) as temporary:
                temporary.write_text(json_text(run, indent=1), encoding="utf-8")
        before = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`output` {str(output)!r} cannot be written: {error}") from error
    for name in {**run, **before}:
        if run.get(name) != before.get(name):
            raise ValueError(
                f"`output` {str(output)!r} is of another run: its {name!r} is {before.get(name)!r:.200}, not "
                f"{run.get(name)!r:.200}. Choose another folder."
            )


def _remove_leftovers(output: Path) -> None:
    """Of workers that died: counts of tries, and shards half written."""
    for leftover in output.glob(".shard-*"):
        leftover.unlink(missing_ok=True)


def _run_actors(
    units: list[dict[str, Any]], worker: dict[str, Any], actors: int | None, threads: int, gpus: float
) -> Iterator[dict[str, Any]]:
    """What workers say of each shard, as it is done."""
    # It tells its makers of each start.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # Nothing is scaled there, and the first autoscaler's process is waited for at the end, a second in vain.
        os.environ.setdefault("RAY_enable_autoscaler_v2", "1")
        # They run tasks, and there are actors alone.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    # The command of an exported model does without PyTorch, which each of Ray's processes would load for itself.
    left_out = [name for name in ("torch", "transformers") if sys.modules.get(name, sys) is None]
    hook = {"worker_process_setup_hook": lambda: sys.modules.update(dict.fromkeys(left_out))} if left_out else {}
    is_ours = not ray.is_initialized()
    if is_ours:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": hook}
        if not os.environ.get("RAY_ADDRESS"):
            cores = (actors or max(num_cores() // threads, 1)) * threads
            quiet |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
            quiet |= {"object_store_memory": OBJECT_STORE_BYTES}
        ray.init(**quiet)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(
            int(min(one.get("CPU", 0) // threads, one.get("GPU", 0) / gpus + 1e-6 if gpus else math.inf))
            for one in machines
        )
        if not room:
            raise ValueError(
                f"`threads={threads}`, `gpus={gpus:g}`: no machine that Ray has is so large. Ask for less."
            )
        size = min(actors or room, room, len(units))
        one = ray.remote(ShardWorker).options(num_cpus=threads, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)
        starting = {actor.__ray_ready__.remote(): actor for actor in (one.remote(**worker) for _ in range(size))}
        # The next shard lies ready at an actor, which would wait for the driver, but where there are few: the first
        # actor would take those of one that still starts.
        num_ahead = 2 if len(units) >= 4 * size else 1
        waiting, working = deque(units), {}
        while working or (waiting and starting):
            (done,), _ = ray.wait([*starting, *working])
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                # Ray starts those that die again: this one cannot start.
                yield _nothing_written("no actor starts: " + str(error).strip().splitlines()[-1])
                return
            if done in starting:
                actor, num_free = starting.pop(done), num_ahead
            else:
                actor, num_free = working.pop(done), 1
                yield result
            for _ in range(min(num_free, len(waiting))):
                working[actor.write.remote(**waiting.popleft())] = actor
    finally:
        if is_ours:
            ray.shutdown()
