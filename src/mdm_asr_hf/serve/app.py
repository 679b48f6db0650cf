# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The application: OpenAI's routes on a [`Batcher`]."""

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..audio_mdm_asr import audio_duration_s
from ..transcribe.joining import DecodedWindow, join_texts, join_windows
from ..transcribe.transcript import Transcript
from .batching import BatchedTranscriber, Batcher
from .limits import Guard, Limits, error_body, error_response
from .live import add_live
from .metrics import Metrics
from .schemas import TranscriptionRequest, answer, split_words

# What clients send that know no other model.
USUAL_NAME = "whisper-1"
# Of checkpoints whose prompt has no language: they are made of English-only Whispers.
ONLY_LANGUAGE, ITS_NAMES = "en", ("en", "english")
# The client has gone: nobody reads this status but `/metrics`.
GONE = 499


class Service:
    """
    A model that is served, with what its routes share.

    Args:
        model, processor: of one checkpoint.
        name (`str`): that clients know it by.
        limits ([`Limits`]): of requests.
        batch_size (`int`): windows decoded together, at most.
        vad (`str`): as for [`Transcriber`].
    """

    def __init__(self, model: Any, processor: Any, name: str, limits: Limits, batch_size: int = 8, vad: str = "auto"):
        self.model, self.processor, self.name, self.limits, self.vad = model, processor, name, limits, vad
        self.metrics = Metrics()
        self.batcher = Batcher(batch_size, self.metrics.note_batch)
        self.metrics.queue.set_function(self.batcher.num_waiting)
        # One for each request that may run: most of them wait for the batcher.
        self.threads = ThreadPoolExecutor(limits.max_requests, thread_name_prefix="request")

    def check_name(self, name: str) -> None:
        if name not in (self.name, USUAL_NAME):
            raise HTTPException(404, f"`model={name!r}` is not served here. Use {self.name!r}.")

    @property
    def has_languages(self) -> bool:
        return "language" in (self.model.generation_config.prompt_template or {}).get("slots", {})

    def language(self, given: str | None) -> str | None:
        """What the prompt takes; of a model that writes one language only, nothing."""
        if not given or self.has_languages:
            return given or None
        if given.strip().lower().split("-")[0] not in ITS_NAMES:
            raise ValueError(f"`language={given!r}`: this model writes English only. Leave it out.")
        return None

    def language_of(self, transcript: Transcript, given: str | None) -> str:
        return transcript.language or given or ("und" if self.has_languages else ONLY_LANGUAGE)

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
        """A model that cannot decode is found before there is a client, and the first one does not wait longer."""
        try:
            BatchedTranscriber(self.batcher, self.model, self.processor, timestamps=True).warm_up()
        except RuntimeError as error:
            raise ValueError(f"The model cannot decode: {error}") from error


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
    add_live(app, service)

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
        # The content alone, never a name: nothing of the caller's choice is opened.
        work = in_thread(transcriber.transcribe, content)
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
        return answer(transcript, asked, service.language_of(transcript, asked.language), service.processor.tokenizer)

    return app


def _in_thread(service: Service, function: Callable, *args: Any) -> asyncio.Future:
    future = asyncio.get_running_loop().run_in_executor(service.threads, function, *args)
    # Of a request that is over, nobody asks what has become of it.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


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

    work = _in_thread(service, partial(transcriber.transcribe, content, on_window=on_window))
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
        yield _event(error_body(400, str(error)))
    except TimeoutError:
        yield _event(error_body(408, _too_slow(service)))
    except Exception:
        yield _event(error_body(500, _INTERNAL))
    finally:
        service.batcher.drop(transcriber)


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


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
