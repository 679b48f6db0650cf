# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The application: OpenAI's routes on a [`Batcher`]."""

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Form, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..audio_mdm_asr import audio_duration_s
from ..transcribe.joining import DecodedWindow, join_texts, join_windows
from ..transcribe.transcript import Transcript
from .batching import BatchedTranscriber, Batcher
from .limits import Guard, Limits, error_response
from .metrics import Metrics
from .schemas import TranscriptionRequest, plain_answer, split_words, usage, verbose_answer

# What clients send that know no other model.
USUAL_NAME = "whisper-1"
# Of checkpoints whose prompt has no language: they are made of English-only Whispers.
ONLY_LANGUAGE, ITS_NAMES = "en", ("en", "english")
# The client has gone: nobody reads this status but `/metrics`.
GONE = 499


@dataclass
class Service:
    """A model that is served, under a name, with what its routes share."""

    model: Any
    processor: Any
    name: str
    limits: Limits
    vad: str
    batcher: Batcher
    metrics: Metrics
    # One for each request that may run: most of them wait for the batcher.
    threads: ThreadPoolExecutor

    def check_name(self, name: str) -> None:
        if name not in (self.name, USUAL_NAME):
            raise HTTPException(404, f"`model={name!r}` is not served here. Use {self.name!r}.")

    def language(self, given: str | None) -> str | None:
        """What the prompt takes; of a model that writes one language only, nothing."""
        template = self.model.generation_config.prompt_template or {}
        if not given or "language" in template.get("slots", {}):
            return given or None
        if given.strip().lower().split("-")[0] not in ITS_NAMES:
            raise ValueError(f"`language={given!r}`: this model writes English only. Leave it out.")
        return None

    def language_of(self, transcript: Transcript, given: str | None) -> str:
        has_choice = "language" in (self.model.generation_config.prompt_template or {}).get("slots", {})
        return transcript.language or given or ("und" if has_choice else ONLY_LANGUAGE)

    def transcriber(self, asked: TranscriptionRequest) -> BatchedTranscriber:
        settings = None
        if asked.temperature > 0:
            settings = copy.deepcopy(self.model.generation_config)
            settings.temperature = asked.temperature
        return BatchedTranscriber(
            self.batcher,
            self.model,
            self.processor,
            settings=settings,
            vad=self.vad,
            timestamps=asked.wants_times,
            hotwords=[*split_words(asked.hotwords), *asked.keywords] or None,
            previous_text=asked.prompt,
            language=self.language(asked.language),
        )

    def warm_up(self) -> None:
        """Decodes noise, twice in a batch: what a first call takes longer is not the first client's, and a model that
        cannot decode is found before there is one."""
        noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10
        transcriber = BatchedTranscriber(self.batcher, self.model, self.processor, timestamps=True)
        for _, result in transcriber.transcribe_all([noise, noise], sampling_rate=16_000):
            if isinstance(result, ValueError):
                raise result


def make_service(
    model: Any, processor: Any, name: str, limits: Limits, batch_size: int = 8, vad: str = "auto"
) -> Service:
    """A model ready to be served: batches of `batch_size` windows, and a thread for each request that may run."""
    metrics = Metrics()
    batcher = Batcher(batch_size, metrics.note_batch)
    metrics.watch_queue(batcher.num_waiting)
    threads = ThreadPoolExecutor(limits.max_requests, thread_name_prefix="request")
    return Service(model, processor, name, limits, vad, batcher, metrics, threads)


def make_app(service: Service) -> FastAPI:
    """The ASGI application. Its lifespan ends with the service's threads."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.batcher.close()
        service.threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="mdm-asr", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics)
    _add_errors(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.batcher.is_healthy(service.limits.timeout_s):
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the decoding thread has ended or hangs"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "mdm-asr"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return card

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        request: Request, asked: Annotated[TranscriptionRequest, Form(media_type="multipart/form-data")]
    ) -> Response:
        service.check_name(asked.model)
        if not service.batcher.is_healthy(service.limits.timeout_s):
            raise HTTPException(503, "The decoding thread has ended or hangs. The server has to be started again.")
        content, in_thread = await asked.file.read(), partial(_in_thread, service)
        duration_s = await in_thread(audio_duration_s, content)
        if duration_s > service.limits.max_audio_s:
            raise HTTPException(
                413, f"`file` lasts {duration_s:.0f} s, more than {service.limits.max_audio_s:g} s. Send it in parts."
            )
        transcriber = await in_thread(service.transcriber, asked)
        deadline = asyncio.get_running_loop().time() + request.scope["deadline"] - time.monotonic()
        if asked.stream:
            events = _events(service, transcriber, content, deadline)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        work = in_thread(_transcribe, transcriber, content)
        gone = asyncio.create_task(_wait_until_gone(request))
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=GONE)
            transcript = work.result()
        except TimeoutError as error:
            raise HTTPException(408, _too_slow(service)) from error
        finally:
            gone.cancel()
            service.batcher.drop(transcriber)
        if asked.response_format == "json":
            return JSONResponse({"text": transcript.text, "usage": usage(transcript)})
        if asked.response_format != "verbose_json":
            kind = "text/vtt" if asked.response_format == "vtt" else "text/plain"
            return Response(plain_answer(transcript, asked.response_format), media_type=f"{kind}; charset=utf-8")
        language = service.language_of(transcript, asked.language)
        tokenizer = service.processor.tokenizer
        return JSONResponse(verbose_answer(transcript, language, asked.temperature, asked.granularities, tokenizer))

    return app


def _in_thread(service: Service, function: Callable, *args: Any) -> asyncio.Future:
    future = asyncio.get_running_loop().run_in_executor(service.threads, function, *args)
    # Of a request that is over, nobody asks what has become of it.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _transcribe(
    transcriber: BatchedTranscriber, content: bytes, on_window: Callable[[int, DecodedWindow], None] | None = None
) -> Transcript:
    # The content alone, never a name: nothing of the caller's choice is opened.
    ((_, result),) = transcriber.transcribe_all([content], on_window=on_window)
    if isinstance(result, ValueError):
        raise result
    return result


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: Service, transcriber: BatchedTranscriber, content: bytes, deadline: float
) -> AsyncIterator[str]:
    """Server-sent events of a transcript: what each window adds to the text, then all of it, or an error."""
    loop, texts = asyncio.get_running_loop(), asyncio.Queue()
    run: list[DecodedWindow] = []
    sent = ""

    def on_window(i: int, window: DecodedWindow) -> None:
        # They come in order. What windows share is settled when the last of them is there.
        run.append(window)
        if window.overlap_after_s == 0:
            loop.call_soon_threadsafe(texts.put_nowait, join_windows(run, window.end_s).text)
            run.clear()

    work = _in_thread(service, _transcribe, transcriber, content, on_window)
    work.add_done_callback(lambda _: texts.put_nowait(None))
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                text = await texts.get()
            if text is None:
                break
            before, sent = sent, join_texts([sent, text])
            if sent != before:
                yield _event({"type": "transcript.text.delta", "delta": sent[len(before) :]})
        yield _event({"type": "transcript.text.done", "text": work.result().text})
    except ValueError as error:
        yield _error_event(400, str(error))
    except TimeoutError:
        yield _error_event(408, _too_slow(service))
    except Exception:
        yield _error_event(500, _INTERNAL)
    finally:
        service.batcher.drop(transcriber)


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _error_event(status: int, message: str) -> str:
    return f"data: {error_response(status, message).body.decode()}\n\n"


_INTERNAL = "The server failed. Its log says why."


def _too_slow(service: Service) -> str:
    return f"There was no transcript within {service.limits.timeout_s:g} s. Send shorter audio, or try again later."


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = next((str(one) for one in first["loc"][1:]), None)
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = [field.alias or name for name, field in TranscriptionRequest.model_fields.items()]
            message = f"This server has no such field. It has {', '.join(known)}"
        return error_response(400, message if param is None else f"`{param}`: {message}", param)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ValueError)
    async def unusable(request: Request, error: ValueError) -> Response:
        return error_response(400, str(error).replace("the audio", "`file`", 1))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(500, _INTERNAL)


__all__ = ["Service", "make_app", "make_service"]
