#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measures `mdm-asr serve` under load: shared batches against one at a time, and another server beside them.

    python benchmarks/run_serve.py --data DIR --output OUT [--model OUT8] [--peer http://127.0.0.1:9000]
    python benchmarks/run_serve.py --rescore OUT

DIR is an audiofolder: audio files and a metadata.jsonl with `file_name` per line. Writes
    OUT/raw.jsonl     the run; each request's clip, its seconds, and whether it had the text of its clip
    OUT/results.json  from raw.jsonl alone, as `--rescore OUT` makes it again
    OUT/results.md    the same as tables
A client sends its next request when it has the answer to the one before. The text of a clip is what the same server
answers when nothing else runs; an answer is wrong if it is another text, and lost if it is an error or none. The peer
has to run already, and is one with OpenAI's API. Memory is the server's resident memory, before,
at half of the requests, and after; its CPU time is of all cores together.
With `--fuzz-s`, schemathesis sends what the server's description allows and what it forbids for so many seconds, some
of it with audio, and counts answers of 500 and above.
"""

import argparse
import asyncio
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Row, make_parser, run, table

BATCHES, ALONE, PEER = "batches", "one at a time", "peer"
ROUTE = "/v1/audio/transcriptions"


def read_clips(folder: Path, number: int) -> list[Row]:
    """The first clips of a folder: name, seconds, and content."""
    import soundfile

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    paths = [folder / row["file_name"] for row in rows[:number]]
    return [
        {"name": path.name, "duration_s": soundfile.info(path).duration, "content": path.read_bytes()}
        for path in paths
    ]


def join_clips(clips: list[Row], seconds: float) -> Row:
    """A long recording of clips with pauses between them, at least so long."""
    import numpy as np
    import soundfile

    parts, length_s = [], 0.0
    for i in range(10**6):
        if length_s >= seconds:
            break
        samples, rate = soundfile.read(io.BytesIO(clips[i % len(clips)]["content"]), dtype="float32")
        parts += [samples, np.zeros(rate // 2, dtype=np.float32)]
        length_s += len(samples) / rate + 0.5
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(parts), rate, format="FLAC")
    return {"name": "long", "duration_s": length_s, "content": file.getvalue()}


@contextmanager
def serving(options: list[str]) -> Iterator[tuple[str, int]]:
    """A server of our own: its address and process id."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", "from mdm_asr_cli import main; main()", "serve", "--port", "0", *options]
        process = subprocess.Popen(command, stderr=log)
        try:
            found = None
            while found is None:
                time.sleep(0.1)
                log.seek(0)
                said = log.read()
                found = re.search(r"running on (http://\S+)", said)
                if process.poll() is not None:
                    raise ValueError(f"`mdm-asr serve` ended: {said}")
            yield found[1], process.pid
        finally:
            process.terminate()
            process.wait()


def memory_mb(pid: int | None) -> float | None:
    if pid is None:
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024


def cpu_s(pid: int | None) -> float | None:
    """Seconds of all cores that a process has used: what a machine that others use, too, disturbs less."""
    if pid is None:
        return None
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Load:
    """Requests to one server. What each row says is in the module's docstring."""

    def __init__(self, system: str, url: str, pid: int | None):
        import httpx

        self.system, self.url, self.pid = system, url, pid
        self.client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))
        self.texts: dict[str, str] = {}

    async def ask(self, clip: Row) -> tuple[float, str | None]:
        """Seconds, and the text; None if there is none."""
        import httpx

        started = time.perf_counter()
        try:
            files = {"file": (f"{clip['name']}.flac", clip["content"])}
            answer = await self.client.post(self.url + ROUTE, files=files, data={"model": "whisper-1"})
            text = answer.json()["text"].strip() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError):
            text = None
        return time.perf_counter() - started, text

    async def learn(self, clips: list[Row]) -> None:
        for clip in clips:
            _, text = await self.ask(clip)
            if text is None:
                raise ValueError(f"{self.url} does not transcribe {clip['name']}. Is it a server like OpenAI's?")
            self.texts[clip["name"]] = text

    async def run(
        self, scene: str, num_clients: int, clips: list[Row], num_requests: int, beside: Any = None
    ) -> list[Row]:
        """Rows of requests by so many clients, which take turns at the clips; `beside`, one more sends a long one."""
        todo = iter(range(num_requests))
        rows, is_over = [], False
        mb = [memory_mb(self.pid)]
        before_cpu_s, started = cpu_s(self.pid), time.perf_counter()

        async def client() -> None:
            for i in todo:
                clip = clips[i % len(clips)]
                seconds, text = await self.ask(clip)
                right = None if text is None else text == self.texts[clip["name"]]
                rows.append(
                    {"clip": clip["name"], "duration_s": clip["duration_s"], "seconds": seconds, "right": right}
                )
                if len(rows) == num_requests // 2:
                    mb.append(memory_mb(self.pid))

        async def other() -> None:
            while beside is not None and not is_over:
                await self.ask(beside)

        long = asyncio.create_task(other())
        if beside is not None:
            await asyncio.sleep(1.0)
        await asyncio.gather(*(client() for _ in range(num_clients)))
        wall_s, is_over = time.perf_counter() - started - (1.0 if beside else 0.0), True
        long.cancel()
        head = {"system": self.system, "scene": scene, "clients": num_clients, "wall_s": wall_s}
        head["mb"] = [*mb, memory_mb(self.pid)]
        head["cpu_s"] = None if before_cpu_s is None else cpu_s(self.pid) - before_cpu_s
        return [head | {"requests": rows}]


async def load_up(load: Load, clips: list[Row], args: argparse.Namespace) -> list[Row]:
    await load.learn(clips)
    rows = []
    for num_clients in args.clients:
        number = max(args.requests, 2 * num_clients)
        rows += await load.run("clips", num_clients, clips, number)
    if args.long_s:
        long = join_clips(clips, args.long_s)
        rows += await load.run("beside a long file", 1, clips, args.requests // 4, long)
    if args.growth and load.system == BATCHES:
        rows += await load.run("growth", 8, clips, args.growth)
    await load.client.aclose()
    for row in rows:
        print(*cells(summarise_row(row)), sep=" | ", file=sys.stderr, flush=True)
    return rows


def fuzz(url: str, seconds: int, clip: Row, folder: Path) -> Row:
    """What schemathesis finds; its report is in the folder."""
    sample = folder.resolve() / "sample.flac"
    sample.write_bytes(clip["content"])
    command = [str(Path(sys.executable).with_name("schemathesis")), "fuzz", f"{url}/openapi.json"]
    command += ["--max-time", str(seconds), "--checks", "not_a_server_error", "--continue-on-failure"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "serve_hooks", "FUZZ_SAMPLE": str(sample)}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    sample.unlink()
    (folder / "fuzz.txt").write_text(done.stdout + done.stderr)
    import httpx

    counts: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if found := re.match(r'mdm_asr_requests_total\{route="(.*)",status="(\d+)"\} (\S+)', line):
            counts[f"{found[2]} {found[1]}"] = float(found[3])
    healthy = httpx.get(f"{url}/health").status_code == 200
    return {"fuzz_s": seconds, "exit_code": done.returncode, "statuses": counts, "healthy": healthy}


def summarise_row(row: Row) -> Row:
    """Of the requests of a scene: throughput, latencies, and what went wrong."""
    import numpy as np

    requests = row["requests"]
    answered = [one for one in requests if one["right"] is not None]
    seconds = [one["seconds"] for one in answered]
    summary = {name: row[name] for name in ("system", "scene", "clients", "mb")}
    summary |= {
        "requests": len(requests),
        "lost": len(requests) - len(answered),
        "wrong": sum(not one["right"] for one in answered),
        "rtfx": sum(one["duration_s"] for one in answered) / row["wall_s"],
        "requests_per_s": len(answered) / row["wall_s"],
    }
    duration_s = sum(one["duration_s"] for one in answered)
    # Beside a long file, most of it is that one's.
    if row["cpu_s"] is not None and duration_s and row["scene"] == "clips":
        summary["cpu_s_per_minute"] = 60 * row["cpu_s"] / duration_s
    for share in (50, 95, 99):
        # The least that so large a share of them does not exceed.
        summary[f"p{share}_s"] = float(np.percentile(seconds, share, method="inverted_cdf")) if seconds else None
    return summary


def summarise(rows: list[Row]) -> Row:
    return {
        "scenes": [summarise_row(row) for row in rows if "requests" in row],
        "fuzz": next((row for row in rows if "fuzz_s" in row), None),
    }


HEAD = ["system", "scene", "clients", "requests", "wrong", "lost", "RTFx", "requests/s", "p50 s", "p95 s", "p99 s"]
HEAD += ["CPU s a minute of audio", "MB before, at half, after"]


def cells(scene: Row) -> list[Any]:
    """Of a scene's line, as `HEAD` has them."""

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    line = [scene[name] for name in ("system", "scene", "clients", "requests", "wrong", "lost")]
    line += [shown(scene["rtfx"], 1), shown(scene["requests_per_s"], 2)]
    line += [shown(scene[f"p{share}_s"], 3) for share in (50, 95, 99)]
    line += [shown(scene.get("cpu_s_per_minute"), 2)]
    return [*line, ", ".join(shown(mb, 0) for mb in scene["mb"])]


def to_markdown(summary: Row) -> str:
    lines = [f"```bash\n{summary['run']['command']}\n```", "", table(HEAD, map(cells, summary["scenes"]))]
    if found := summary["fuzz"]:
        bad = sum(number for name, number in found["statuses"].items() if name >= "500")
        lines += ["", f"schemathesis, {found['fuzz_s']} s: {sum(found['statuses'].values()):.0f} requests, "]
        lines[-1] += f"{bad:.0f} answers of 500 and above, healthy after: {found['healthy']}."
        lines += ["", *(f"- {name}: {number:.0f}" for name, number in sorted(found["statuses"].items()))]
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace) -> Iterator[Row]:
    clips = read_clips(args.data[0], args.clips)
    options = ["--max-requests", str(max([*args.clients, 8]) + 2)]
    options += ["--model", args.model] if args.model else []
    options += ["--threads", str(args.threads)] if args.threads else []
    for system, batch_size in ((BATCHES, args.batch_size), (ALONE, 1)):
        with serving([*options, "--batch-size", str(batch_size)]) as (url, pid):
            yield from asyncio.run(load_up(Load(system, url, pid), clips, args))
            if system == BATCHES and args.fuzz_s:
                yield fuzz(url, args.fuzz_s, clips[0], args.output)
    if args.peer:
        yield from asyncio.run(load_up(Load(PEER, args.peer.rstrip("/"), args.peer_pid), clips, args))


def main(argv: list[str] | None = None) -> Row:
    parser = make_parser(__doc__, data=1, threads=None)
    parser.add_argument("--threads", type=int, help="of the server; default: its own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of each number of clients")
    parser.add_argument("--long-s", type=float, default=600.0, help="seconds of the long file; 0 leaves it out")
    parser.add_argument(
        "--growth", type=int, default=1000, help="requests for memory's growth, of batches; 0 leaves it out"
    )
    parser.add_argument("--fuzz-s", type=int, default=0, help="seconds of schemathesis")
    parser.add_argument("--peer", metavar="URL", help="another server with OpenAI's API")
    parser.add_argument("--peer-pid", type=int, help="its process, for its memory")
    return run(parser, parser.parse_args(argv), measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
