# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Who may ask, how much, how many at once and for how long; and errors in OpenAI's form."""

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from .metrics import Metrics

# What is read of a body that is refused: a client that still sends does not see the answer.
DRAIN_S = 5.0
OPEN_PATHS = ("/health",)
# What has a model's time, and so a place among those that run.
LIMITED_PATHS = ("/v1/audio/transcriptions", "/v1/stream")
TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 408: "timeout", 413: "too_large", 429: "rate_limit_exceeded"}


@dataclass(frozen=True)
class Limits:
    """
    Args:
        api_key (`str`, *optional*): what `Authorization: Bearer` has to be.
        max_bytes (`int`): of a request's body.
        max_audio_s (`float`): seconds of audio of a request or a live stream.
        max_requests (`int`): that run at once, live streams among them.
        timeout_s (`float`): from a request's start to its text; and of silence on a live stream's connection.
    """

    api_key: str | None = None
    max_bytes: int = 25 * 2**20
    max_audio_s: float = 4 * 3600.0
    max_requests: int = 64
    timeout_s: float = 600.0

    def __post_init__(self):
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("`api_key` is empty. Leave it out to let everybody in.")


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it, on one line."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": param, "code": CODES.get(status)}}


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """The answer to a request that failed."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
    return JSONResponse(error_body(status, message, param), status, headers)


class Guard:
    """
    ASGI middleware that holds requests to [`Limits`], bodies while they come, and counts them.

    `scope["deadline"]` tells the application, in `time.monotonic`, when a request's time is over.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.num_running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 500
        scope["deadline"] = started + self.limits.timeout_s
        headers = dict(scope["headers"])

        async def noting_send(message: Any) -> None:
            nonlocal status
            status = {"websocket.accept": 101}.get(message["type"], message.get("status", status))
            await send(message)

        is_limited = scope["path"] in LIMITED_PATHS
        try:
            if (refusal := self._refusal(scope["path"], headers)) is not None:
                if scope["type"] == "http" and b"expect" not in headers:
                    await _drain(receive, self.limits.max_bytes)
                return await refusal(scope, receive, noting_send)
            self._run(is_limited)
            try:
                await self.app(scope, self._bounded(scope, receive), noting_send)
            finally:
                self._run(-is_limited)
        finally:
            # A path that nobody serves is the caller's word.
            route = scope["path"] if is_limited else getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            if is_limited and scope["type"] == "http":
                self.metrics.request_s.labels(route).observe(time.monotonic() - started)

    def _run(self, change: int) -> None:
        self.num_running += change
        self.metrics.running.set(self.num_running)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """The answer to a request that is not let in."""
        limits = self.limits
        if limits.api_key is not None and path not in OPEN_PATHS:
            wanted = f"bearer {limits.api_key}".encode()
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + key.strip(), wanted):
                return error_response(401, "The API key is missing or wrong. Send `Authorization: Bearer KEY`.")
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > limits.max_bytes:
            return error_response(413, _too_large(limits))
        if path in LIMITED_PATHS and self.num_running >= limits.max_requests:
            return error_response(429, f"{self.num_running} requests are running, as many as may. Try again later.")
        return None

    def _bounded(self, scope: Any, receive: Any) -> Any:
        """`receive` for a body that keeps to its time and size."""
        if scope["type"] != "http":
            return receive
        size, is_complete = 0, False

        async def bounded() -> Any:
            nonlocal size, is_complete
            if is_complete:
                # Tells that the client has gone, which may take any time.
                return await receive()
            try:
                async with asyncio.timeout(scope["deadline"] - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"The request did not come within {self.limits.timeout_s:g} s.") from error
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.limits.max_bytes:
                await _drain(receive, self.limits.max_bytes, is_complete)
                raise HTTPException(413, _too_large(self.limits))
            return message

        return bounded


def _too_large(limits: Limits) -> str:
    return (
        f"The request has more than {limits.max_bytes / 2**20:g} MiB. Send compressed audio, such as FLAC, or parts."
    )


async def _drain(receive: Any, max_bytes: int, is_complete: bool = False) -> None:
    try:
        async with asyncio.timeout(DRAIN_S):
            while not is_complete and max_bytes > 0:
                message = await receive()
                max_bytes -= len(message.get("body", b""))
                is_complete = not message.get("more_body", False)
    except TimeoutError:
        pass
