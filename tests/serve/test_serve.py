# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr serve`: OpenAI's clients against a running server, shared batches, limits and faults."""
# ruff: noqa: E402 (the extra may not be installed)

import contextlib
import gc
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import venv
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo_recording import RECORDING, ROOT, TEXT

for module in ("fastapi", "uvicorn", "websockets", "python_multipart", "prometheus_client", "openai", "httpx"):
    pytest.importorskip(module)

import httpx
import openai
import soundfile
import typer
import uvicorn
import yaml
from extras import brought_by, link
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_exports import exported_checkpoint, graphs_of
from openai.types.audio import Transcription, TranscriptionVerbose
from pydantic import TypeAdapter
from tone_models import RATE, ToneModel, ToneProcessor, clip, recording, text_of
from websockets.sync.client import connect

from mdm_asr_cli.app import app as command_line
from mdm_asr_hf.serve import batching, live
from mdm_asr_hf.serve.app import Service, make_app
from mdm_asr_hf.serve.batching import BatchedTranscriber, Batcher
from mdm_asr_hf.serve.limits import Limits
from mdm_asr_hf.serve.metrics import Metrics
from mdm_asr_hf.transcribe.streaming import StreamUpdate
from mdm_asr_hf.transcribe.subtitles import WRITERS
from mdm_asr_hf.transcribe.transcriber import Transcriber
from mdm_asr_hf.transcribe.windows import Window

ROUTE = "/v1/audio/transcriptions"
WINDOW_S = 5.0


class Processor(ToneProcessor):
    def __init__(self):
        super().__init__(max_duration_s=WINDOW_S)
        self.tokenizer.encode = lambda text, **options: [3 + int(word[1:]) for word in text.split()]

    def previous_ids(self, text):
        return [3 + int(word[1:]) for word in text.split()]


class Model(ToneModel):
    """Tones, heard one batch at a time, each once `gate` is open."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def generate(self, *args, **kwargs):
        self.begun.release()
        assert self.gate.wait(20)
        return super().generate(*args, **kwargs)


@contextlib.contextmanager
def running(model=None, batch_size=8, **limits):
    """A server in a thread: its address, and its service."""
    service = Service(model or Model(), Processor(), "tones", Limits(**limits), batch_size, "energy")
    app = make_app(service)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="critical", access_log=False, timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wav(samples, format="WAV"):
    content = io.BytesIO()
    soundfile.write(content, samples, RATE, format=format, subtype="PCM_16")
    return content.getvalue()


def spoken(*words):
    return wav(clip(words))


# A long one: ten windows and more.
LONG = [[k % 24, (k + 5) % 24, (k + 11) % 24] * 3 for k in range(10)]


def long_wav():
    return wav(recording(LONG, [1.0] * len(LONG)))


def client(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 20} | options)


def transcribe(url, content, **options):
    options = {"model": "tones", "file": ("a.wav", content)} | options
    return client(url).audio.transcriptions.create(**options)


def post(url, content, **fields):
    return httpx.post(url + ROUTE, files={"file": ("a.wav", content)}, data={"model": "tones"} | fields, timeout=20)


# --- shared batches ---

texts = st.lists(st.lists(st.integers(0, 23), min_size=2, max_size=5), min_size=1, max_size=8)


@given(st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=15)
def test_each_gets_its_own_text(asked, batch_size):
    model, sizes = Model(jitter_s=0.02), []
    batcher = Batcher(batch_size, lambda windows, results, seconds: sizes.append(len(windows)))

    def one(what):
        clips, timestamps = what
        transcriber = BatchedTranscriber(
            batcher, model, Processor(), vad="energy", timestamps=timestamps, hotwords=[f"w{clips[0][0]}"]
        )
        return transcriber.transcribe(recording(clips, [1.0] * len(clips)), sampling_rate=RATE)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(one, asked))
    batcher.close()
    assert [transcript.text for transcript in found] == [text_of(clips) for clips, _ in asked]
    assert [all(word.start_s is not None for word in transcript.words) for transcript in found] == [
        timestamps for _, timestamps in asked
    ]
    assert max(sizes) <= batch_size
    # Of each window its own request's words.
    assert all(len(call["hotword_ids"]) in (1, call["batch_size"]) for call in model.calls)


def test_short_requests_do_not_wait_behind_long_ones():
    model = Model()
    model.gate.clear()
    with running(model, batch_size=4) as (url, service), ThreadPoolExecutor(3) as pool:
        long = pool.submit(transcribe, url, long_wav())
        assert model.begun.acquire(timeout=20)
        short = [pool.submit(transcribe, url, spoken(1, k), prompt=f"w{k}") for k in (2, 3)]
        wait_for(lambda: service.batcher.num_waiting() == len(LONG) - 4 + 2)
        model.gate.set()
        assert [one.result().text for one in short] == ["w1 w2", "w1 w3"] and long.result().text == text_of(LONG)
    # One window each in turn: both are in the second batch, which is full, beside the long one's.
    assert [call["batch_size"] for call in model.calls] == [4, 4, 4]
    assert sorted(model.calls[1]["previous_ids"]) == [[], [], [5], [6]]


def test_windows_that_cannot_be_decoded_are_their_own_requests_alone(caplog):
    def fails(rows):
        if any(float(row.abs().max()) > 0.9 for row in rows):
            raise OSError("the device is gone")
        return any(float(row.abs().max()) < 0.1 for row in rows)

    with running(Model(fails=fails)) as (url, service), ThreadPoolExecutor(3) as pool:
        contents = [spoken(1, 2), wav(3.2 * clip([1, 2])), wav(0.2 * clip([3]))] * 2
        good, broken, bad, *again = pool.map(lambda content: post(url, content), contents)
        assert (good.json()["text"], broken.status_code, bad.status_code) == ("w1 w2", 500, 400)
        assert "cannot be decoded" in bad.json()["error"]["message"] and "device" not in broken.text
        assert "the device is gone" in caplog.text
        assert [one.status_code for one in again] == [200, 500, 400] and httpx.get(f"{url}/health").is_success


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_or_hangs_is_noticed():
    def fails(rows):
        raise SystemExit

    with running(Model(fails=fails)) as (url, service):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        first, second = post(url, spoken(1)), post(url, spoken(1))
        assert (first.status_code, second.status_code, httpx.get(f"{url}/health").status_code) == (500, 503, 503)
        with pytest.raises(openai.InternalServerError, match="started again"):
            transcribe(url, spoken(1))

    model = Model()
    model.gate.clear()
    with running(model, timeout_s=0.5) as (url, service):
        for stream in (False, True):
            with pytest.raises((openai.APIStatusError, openai.APIError), match="no transcript within 0.5 s"):
                list(transcribe(url, spoken(1), stream=stream))
            time.sleep(0.1)
            assert httpx.get(f"{url}/health").status_code == (503 if model.begun.acquire(timeout=1) else 200)
            model.gate.set()
            time.sleep(0.1)
            model.gate.clear()
        model.gate.set()
        assert transcribe(url, spoken(1)).text == "w1"


def test_what_clients_leave_is_not_decoded():
    model = Model()
    model.gate.clear()
    with running(model, batch_size=1) as (url, service), ThreadPoolExecutor(1) as pool:
        first = pool.submit(transcribe, url, spoken(1))
        assert model.begun.acquire(timeout=20)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + ROUTE, files={"file": long_wav()}, data={"model": "tones"}, timeout=1)
        wait_for(lambda: service.batcher.num_waiting() == 0)
        model.gate.set()
        assert first.result().text == "w1" and len(model.calls) == 1


def test_batches_are_as_long_as_the_model_is_fast(monkeypatch):
    monkeypatch.setattr(batching, "BATCH_TIME_S", 0.05)

    def sizes(seconds):
        """Of batches of windows of a second, by a model that takes so many seconds for each."""
        model, found = Model(), []
        batcher = Batcher(8, lambda windows, results, seconds: found.append(len(windows)))
        decode = model.generate

        def slow(input_features, **kwargs):
            time.sleep(seconds * len(input_features))
            return decode(input_features, **kwargs)

        model.generate = slow
        transcriber = BatchedTranscriber(batcher, model, Processor())
        for future in batcher.submit(transcriber, [Window(0.0, 1.0, clip([1])) for _ in range(24)]):
            assert future.result().pieces == [" w1"]
        batcher.close()
        return found

    # It is taken for 80 times as fast as the speech at first.
    fast, slow = sizes(0.0), sizes(0.1)
    assert fast[0] == slow[0] == 4 and max(fast) > 4 and slow[-2] < 4


@pytest.fixture
def no_collection():
    """What lives on in a cycle would be found later only, with all the audio that it holds."""
    gc.disable()
    yield
    gc.enable()


def test_nothing_of_a_request_stays(monkeypatch, no_collection):
    made, init = weakref.WeakSet(), BatchedTranscriber.__init__

    def noting_init(self, *args, **kwargs):
        made.add(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(BatchedTranscriber, "__init__", noting_init)
    with running() as (url, service):
        for k in range(20):
            assert post(url, spoken(k), stream="true" if k % 2 else "false").is_success
        assert post(url, b"nothing").status_code == 400
        # An answer is there before its request is over.
        wait_for(lambda: not made and service.metrics.registry.get_sample_value("mdm_asr_requests_running") == 0)


# --- OpenAI's client ---


def strictly(kind, answer):
    """Checks an answer as the client itself does not."""
    TypeAdapter(kind).validate_json(answer, strict=True)


def test_formats():
    with running() as (url, service):
        content, text = long_wav(), text_of(LONG)
        raw = client(url).audio.transcriptions.with_raw_response
        answer = raw.create(model="whisper-1", file=("a.wav", content))
        strictly(Transcription, answer.content)
        assert answer.parse().text == text
        assert transcribe(url, content, response_format="text") == f"{text}\n"
        for format in ("srt", "vtt"):
            expected = Transcriber(Model(), Processor(), vad="energy", timestamps=True).transcribe(content)
            assert transcribe(url, content, response_format=format) == WRITERS[format](expected)
        for asked in ([], ["segment"], ["word"], ["word", "segment"]):
            options = {"timestamp_granularities": asked} if asked else {}
            answer = raw.create(
                model="tones", file=("a.wav", content), response_format="verbose_json", temperature=0.5, **options
            )
            strictly(TranscriptionVerbose, answer.content)
            verbose = answer.parse()
            assert (verbose.text, verbose.language) == (text, "en")
            assert verbose.duration == pytest.approx(expected.duration_s)
            assert (verbose.segments is not None) == ("word" not in asked or "segment" in asked)
            assert (verbose.words is not None) == ("word" in asked)
            for segment, other in zip(verbose.segments or [], expected.segments, strict=not verbose.words):
                assert (segment.start, segment.end, segment.text) == (other.start_s, other.end_s, other.text)
                assert segment.tokens == [3 + int(word[1:]) for word in other.text.split()]
                assert segment.avg_logprob == pytest.approx(np.log(0.9), abs=1e-4) and segment.temperature == 0.5
            for word, other in zip(verbose.words or [], expected.words, strict=bool(verbose.words)):
                assert (word.word, word.start, word.end) == (other.text, other.start_s, other.end_s)


@given(clips=texts, pause_s=st.sampled_from([0.06, 0.4, 1.0]))
@settings(max_examples=10)
def test_deltas_are_the_text(shared_server, clips, pause_s):
    url, _ = shared_server
    content = wav(recording(clips, [pause_s] * len(clips)))
    *deltas, done = transcribe(url, content, stream=True)
    assert [event.type for event in deltas] == ["transcript.text.delta"] * len(deltas)
    assert done.type == "transcript.text.done" and done.text == transcribe(url, content).text
    assert "".join(event.delta for event in deltas) == done.text and all(event.delta for event in deltas)


@pytest.fixture(scope="module")
def shared_server():
    with running() as server:
        yield server


def test_text_comes_before_the_recording_is_done():
    model = Model()
    with running(model, batch_size=2) as (url, service):
        events = transcribe(url, long_wav(), stream=True)
        first = next(events)
        assert text_of(LONG).startswith(first.delta) and first.delta != text_of(LONG)
        assert len(list(events)) > 1


def test_models_and_errors(shared_server, tmp_path):
    url, _ = shared_server
    assert [model.id for model in client(url).models.list()] == ["tones"]
    assert client(url).models.retrieve("tones").object == "model"
    with pytest.raises(openai.NotFoundError, match="Use 'tones'"):
        client(url).models.retrieve("../etc")

    url, _ = shared_server
    # Would be waited for if it were opened.
    os.mkfifo(tmp_path / "a.wav")
    playlists = [f"#EXTM3U\n#EXTINF:1,a\n{tmp_path}/a.wav\n", f"[playlist]\nFile1={tmp_path}/a.wav\n"]
    playlists += [f"ffconcat version 1.0\nfile {tmp_path}/a.wav\n", f"file://{tmp_path}/a.wav", f"{tmp_path}/a.wav"]
    bad = [b"", b"RIFF", spoken(1)[:100], bytes(10_000), *(text.encode() for text in playlists)]
    for content in bad:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                transcribe(url, content, stream=stream)
            error = caught.value.body
            assert error["type"] == "invalid_request_error" and "`file`" in error["message"]
            assert "\n" not in error["message"] and str(tmp_path) not in error["message"]
    for options, param, message in (
        ({"temperature": 3}, "temperature", "less than or equal to 1"),
        ({"response_format": "diarized_json"}, "response_format", "verbose_json"),
        ({"timestamp_granularities": ["word"]}, None, "needs `response_format=verbose_json`"),
        ({"stream": True, "response_format": "srt"}, None, "exclude each other"),
        ({"language": "de"}, None, "English only"),
        ({"extra_body": {"hotword": "x"}}, "hotword", "no such field"),
        ({"extra_body": {"hotwords": "w1 " * 5000}}, "hotwords", "at most 10000"),
        ({"include": ["logprobs"]}, "include[]", "no such field"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
            transcribe(url, spoken(1), **options)
        assert caught.value.param == param
    for path in (f"{tmp_path}/a.wav", "http://localhost/a.wav"):
        answer = httpx.post(url + ROUTE, data={"model": "tones", "file": path})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"
    with pytest.raises(openai.NotFoundError, match="'gpt-5'. is not served"):
        transcribe(url, spoken(1), model="gpt-5")
    assert httpx.get(url + ROUTE).status_code == 405 and httpx.post(url + ROUTE, json=[1]).status_code == 400
    assert transcribe(url, spoken(3), language="en").text == "w3"


# --- limits ---


def test_keys_sizes_and_concurrency_are_limited():
    with running(api_key="sécret") as (url, service):
        for key in ("wrong", "s", "secret"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client(url, api_key=key).audio.transcriptions.create(model="tones", file=("a.wav", spoken(1)))
        with pytest.raises(Exception, match="401"):
            connect(f"{url.replace('http', 'ws')}/v1/stream")
        assert httpx.get(f"{url}/health").is_success and httpx.get(f"{url}/metrics").status_code == 401
        header = {"Authorization": "bearer sécret".encode()}
        assert httpx.get(f"{url}/v1/models", headers=header).is_success

    with running(max_bytes=200_000, max_audio_s=5.0) as (url, service):
        # As much as fits, and more: of known and of unknown length.
        assert transcribe(url, spoken(1, 2)).text == "w1 w2"
        for content in (wav(np.zeros(10 * RATE)), wav(np.zeros(1000 * RATE))):
            with pytest.raises(openai.APIStatusError, match="more than 0.19") as caught:
                transcribe(url, content)
            assert caught.value.status_code == 413

        def body():
            for _ in range(30):
                yield bytes(10_000)

        answer = httpx.post(url + ROUTE, content=body(), headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert answer.status_code in (400, 413)
        answer = httpx.post(url + ROUTE, content=body(), headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert answer.status_code == 413
        with pytest.raises(openai.APIStatusError, match="lasts 6 s, more than 5 s") as caught:
            transcribe(url, wav(np.zeros(6 * RATE), "FLAC"))
        assert caught.value.status_code == 413

    model = Model()
    model.gate.clear()
    with running(model, max_requests=2) as (url, service), ThreadPoolExecutor(2) as pool:
        both = [pool.submit(transcribe, url, spoken(k)) for k in (1, 2)]
        wait_for(lambda: service.metrics.registry.get_sample_value("mdm_asr_requests_running") == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests are running") as caught:
            transcribe(url, spoken(3))
        assert int(caught.value.response.headers["Retry-After"]) >= 1 and httpx.get(f"{url}/health").is_success
        # The client tries again by itself.
        third = client(url, max_retries=5).audio.transcriptions
        threading.Timer(0.2, model.gate.set).start()
        assert third.create(model="tones", file=("a.wav", spoken(3))).text == "w3"
        assert [one.result().text for one in both] == ["w1", "w2"]


def test_bodies_that_do_not_come(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with running(timeout_s=1.0) as (url, service):
        with socket.create_connection(("127.0.0.1", int(url.split(":")[-1]))) as connection:
            head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            head += 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
            connection.sendall(head.encode() + bytes(3_000_000))
            time.sleep(0.3)
            # What is too large for memory has no name in the file system, and so ends with the process.
            assert list(tmp_path.iterdir()) == []
            assert connection.recv(20).startswith(b"HTTP/1.1 408")
        assert transcribe(url, spoken(1)).text == "w1"


class Echo:
    """Stands in for a [`StreamingTranscriber`]: a word for each second that it heard."""

    def __init__(self, model, processor, **options):
        self.num_samples = 0

    def feed(self, samples, rate_hz):
        assert samples.dtype == np.int16
        self.num_samples += len(samples)
        seconds = self.num_samples / rate_hz
        return StreamUpdate("word " * int(seconds), [], "tail", seconds)

    def finish(self):
        return StreamUpdate("word " * int(self.num_samples / RATE), [], "", self.num_samples / RATE, is_final=True)


def test_live_limits(monkeypatch):
    monkeypatch.setattr(live, "StreamingTranscriber", Echo)
    with running(max_requests=1, max_audio_s=10.0, timeout_s=1.0) as (url, service):
        address = f"{url.replace('http', 'ws')}/v1/stream"
        with connect(address) as socket_:
            with pytest.raises(Exception, match="429"):
                connect(address)
            for _ in range(30):
                socket_.send(bytes(2 * RATE // 10))
            socket_.send("end")
            updates = [json.loads(message) for message in socket_]
        assert updates[-1]["is_final"] and updates[-1]["text"] == "word " * 3
        assert "".join(update["committed"] for update in updates) == updates[-1]["text"]
        for num_seconds, message in ((11, "more than 10 s"), (1, "no audio for 1 s")):
            wait_for(lambda: service.metrics.registry.get_sample_value("mdm_asr_requests_running") == 0)
            with connect(address) as socket_, pytest.raises(Exception, match=message):
                for _ in range(num_seconds):
                    socket_.send(bytes(2 * RATE))
                while True:
                    socket_.recv(timeout=10)
        wait_for(lambda: service.metrics.registry.get_sample_value("mdm_asr_requests_running") == 0)
        # One that goes without a word.
        connect(address).socket.close()
        wait_for(lambda: service.metrics.registry.get_sample_value("mdm_asr_requests_running") == 0)
        assert transcribe(url, spoken(1)).text == "w1"


def test_what_makes_no_sense_is_said_and_help_is_fast(run_command):
    for arguments, code, message in (
        (["--max-mb", 0], 2, "--max-mb"),
        (["--timeout-s", "nan"], 2, "--timeout-s"),
        (["--api-key", " "], 1, "`api_key` is empty"),
        (["--model", "/nowhere"], 1, "cannot load the model"),
    ):
        found, out, err = run_command("serve", *arguments)
        assert (found, out) == (code, "") and message in err and (code == 2 or len(err.splitlines()) == 1)

    code = (
        "import sys; from mdm_asr_cli import main\n"
        "sys.argv = ['mdm-asr', 'serve', '--help']\n"
        "try: main()\n"
        "except SystemExit: print([name for name in ('torch', 'fastapi', 'uvicorn', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--api-key" in done.stdout


def test_metrics(shared_server):
    url, service = shared_server
    before = service.metrics.registry.get_sample_value

    def counts():
        names = ("audio_seconds_total", "evaluations_total", "tokens_total", "batch_windows_count")
        return [before(f"mdm_asr_{name}") for name in names]

    start = counts()
    transcribe(url, spoken(1, 2, 3))
    audio_s, evaluations, tokens, batches = np.subtract(counts(), start)
    # With the end, a token each of the tone model's evaluations.
    assert audio_s == pytest.approx(len(clip([1, 2, 3])) / RATE) and (evaluations, tokens, batches) == (4, 4, 1)
    text = httpx.get(f"{url}/metrics").text
    assert f'mdm_asr_requests_total{{route="{ROUTE}",status="200"}}' in text and "mdm_asr_rtfx " in text
    assert Metrics().registry is not service.metrics.registry


# --- the command, and a real model ---


@contextlib.contextmanager
def started(line, log):
    """A server by its command: its process and address."""
    with log.open("w") as file:
        process = subprocess.Popen(line, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        while not (found := re.search(r"running on http://[\d.]+(:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, f"http://127.0.0.1{found[1]}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`mdm-asr serve` with the checkpoint of the package."""
    code = "from mdm_asr_cli import main; main()"
    line = [sys.executable, "-c", code, "serve", "--port", "0", "--threads", "1", "--timeout-s", "60"]
    with started(line, tmp_path_factory.mktemp("serve") / "log") as server:
        yield server


def test_a_recording_by_command_and_the_pages_commands_as_printed(command, monkeypatch, capsys):
    _, url = command
    with RECORDING.open("rb") as file:
        assert client(url).audio.transcriptions.create(model="whisper-1", file=file).text == TEXT
    verbose = transcribe(url, RECORDING.read_bytes(), model="mdm-asr-tiny-en", response_format="verbose_json")
    assert verbose.text == TEXT and verbose.segments[0].tokens and verbose.duration == pytest.approx(4.632)

    page = (ROOT / "docs/serving.md").read_text()
    blocks = re.findall(r"```python[^\n]*\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(ROOT)
    for code in blocks:
        exec(code.replace("127.0.0.1:8000", url.removeprefix("http://")), {})
        assert "found where his treasure was" in capsys.readouterr().out

    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    blocks = re.findall(r"```bash[^\n]*\n(.*?)```", page, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:8000", url), comments=True)
        done = subprocess.run(
            [*words, "-sS", "--fail-with-body"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert "treasure" in done.stdout or ROUTE not in line


def test_live_audio(command):
    _, url = command
    samples, rate = soundfile.read(RECORDING, dtype="int16")
    samples = samples if samples.ndim == 1 else samples[:, 0]
    updates = []
    with connect(f"{url.replace('http', 'ws')}/v1/stream?sampling_rate={rate}&language=en") as socket_:
        data = samples.tobytes()
        # Cut amid samples.
        for start in range(0, len(data), 9_999):
            socket_.send(data[start : start + 9_999])
        socket_.send("end")
        for message in socket_:
            updates.append(json.loads(message))
    assert [update["is_final"] for update in updates] == [False] * (len(updates) - 1) + [True]
    assert "".join(update["committed"] for update in updates) == updates[-1]["text"]
    assert [word["text"] for update in updates for word in update["new"]] == updates[-1]["text"].split()
    assert updates[-1]["text"].endswith("frightened of what might happen.")
    for query, status in (("language=de", 400), ("model=x", 404), ("sampling_rate=1", 403)):
        with pytest.raises(Exception, match=str(status)):
            connect(f"{url.replace('http', 'ws')}/v1/stream?{query}")
    with connect(f"{url.replace('http', 'ws')}/v1/stream") as socket_:
        socket_.send("hello")
        with pytest.raises(Exception, match="16-bit samples"):
            socket_.recv()


def test_npm_client(command, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("needs Node")
    install = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=10000", "openai"]
    try:
        installed = subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        installed = False
    if not installed:
        pytest.skip("npm cannot install openai")
    script = tmp_path / "client.mjs"
    script.write_text("""
import fs from "fs";
import OpenAI from "openai";
const [url, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const create = (body) => client.audio.transcriptions.create(body);
const ask = (options) => create({ file: fs.createReadStream(path), model: "whisper-1", ...options });
const seen = { text: (await ask({})).text, srt: await ask({ response_format: "srt" }), delta: "" };
seen.words = (await ask({ response_format: "verbose_json", timestamp_granularities: ["word"] })).words.length;
for await (const event of await ask({ stream: true })) {
  if (event.type === "transcript.text.delta") seen.delta += event.delta;
  if (event.type === "transcript.text.done") seen.done = event.text;
}
try { await ask({ model: "x" }); } catch (error) { seen.error = error.constructor.name; }
seen.models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify(seen));
""")
    _, url = command
    done = subprocess.run(
        ["node", script, url, RECORDING], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    seen = json.loads(done.stdout)
    assert (seen["text"], seen["delta"], seen["done"]) == (TEXT, TEXT, TEXT) and seen["words"] == len(TEXT.split())
    assert seen["srt"].startswith("1\n00:00:00,") and seen["error"] == "NotFoundError"
    assert seen["models"] == ["mdm-asr-tiny-en"]


def test_sigterm_finishes_what_runs(command):
    process, url = command
    content = RECORDING.read_bytes()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(transcribe, url, content, model="whisper-1") for _ in range(4)]
        wait_for(lambda: "running 4.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert [answer.result().text for answer in answers] == [TEXT] * 4
    # uvicorn ends by the signal that it was sent, once all is done.
    assert process.wait(20) == -signal.SIGTERM
    with pytest.raises(openai.APIConnectionError):
        transcribe(url, spoken(1))


# --- the image ---


def test_the_image():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [name for line in lines for found in re.findall(r"\[([a-z,]+)\]\"", line) for name in found.split(",")]
    assert asked == ["export", "onnx", "serve"] and set(asked) <= set(extras)
    command = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT")).removeprefix("ENTRYPOINT "))
    composed = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["mdm-asr"]
    # Click parses them; what it does not know, it refuses.
    parsed = (
        typer.main.get_command(command_line).commands["serve"].make_context("serve", command[2:] + composed["command"])
    )
    assert (
        parsed.params["host"] == "0.0.0.0"
        and float(composed["stop_grace_period"].rstrip("s")) > parsed.params["timeout_s"]
    )
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] != "0" and composed["read_only"]
    exported = next(line.split("--output ")[1].split()[0] for line in lines if "mdm-asr export" in line)
    assert parsed.params["model"] == exported
    check = next(line for line in lines if line.startswith("HEALTHCHECK"))
    assert f"127.0.0.1:{parsed.params['port']}/health" in check


def test_the_images_steps_make_a_server(tmp_path, tmp_path_factory, run_command):
    export, final = re.split(r"^FROM .*$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    (tmp_path / "src").mkdir()
    # The server has its weights in /models.
    left_out = shutil.ignore_patterns("*.egg-info", "__pycache__", "model.safetensors")
    shutil.copytree(ROOT / "src", tmp_path / "src" / "src", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "src")
    venv.create(tmp_path / "venv")
    here, there = Path(sys.executable).parent, tmp_path / "venv" / "bin"
    (there / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {there}/python "$@"\n')
    (there / "pip").chmod(0o755)
    # What the wheel depends on is not unpacked anew.
    link(brought_by("onnx,serve"), tmp_path / "venv")

    def at(line):
        return re.sub(r"(?<!\S)/(src|wheels|models)\b", rf"{tmp_path}/\1", line)

    def run(line, programs):
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PIP_NO_DEPS": "1"}
        return subprocess.run(["bash", "-c", at(line)], env=environment, capture_output=True, text=True)

    # What the first stage installs is here; and users are for containers.
    steps = [(line, here) for line in re.findall(r"^RUN (.*)$", export, flags=re.MULTILINE) if "install" not in line]
    steps += [(line, there) for line in re.findall(r"^RUN (.*)$", final, flags=re.MULTILINE) if "useradd" not in line]
    assert len(steps) == 3
    for line, programs in steps:
        if line.startswith("mdm-asr export "):
            with graphs_of(exported_checkpoint(tmp_path_factory)):
                code, _, err = run_command(*shlex.split(at(line))[1:])
            assert code == 0, err
            continue
        done = run(line, programs)
        if "pip " in line and re.search("connection|No matching distribution", done.stderr, flags=re.IGNORECASE):
            pytest.skip("needs a package index")
        assert done.returncode == 0, (line, done.stderr)
    assert run("python -c 'import torch'", there).returncode != 0
    entry, check = (
        re.search(rf"^{word}.*?(\[.*\])$", final, flags=re.MULTILINE) for word in ("ENTRYPOINT", "HEALTHCHECK")
    )
    words = [one.replace("/models", f"{tmp_path}/models") for one in json.loads(entry[1])]
    with started([there / words[0], *words[1:], "--port", "0"], tmp_path / "log") as (process, url):
        program, *arguments = json.loads(check[1])
        arguments = [one.replace("http://127.0.0.1:8000", url) for one in arguments]
        assert subprocess.run([there / program, *arguments]).returncode == 0
        assert transcribe(url, RECORDING.read_bytes(), model="mdm-asr-tiny-en").text == TEXT
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
