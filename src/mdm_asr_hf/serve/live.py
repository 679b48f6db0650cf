# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Live audio over a WebSocket: 16-bit samples in, text out while the speech goes on."""

import asyncio
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, WebSocket, WebSocketDisconnect

from ..transcribe.streaming import StreamingTranscriber, StreamUpdate
from .limits import error_response
from .schemas import split_words

if TYPE_CHECKING:
    from .app import Service

# Messages that wait, behind which a client that sends faster than it is decoded is held back.
MAX_WAITING = 32
END = "end"
# RFC 6455.
POLICY, TOO_BIG = 1008, 1009


def add_live(app: FastAPI, service: "Service") -> None:
    """Adds `/v1/stream`."""

    @app.websocket("/v1/stream")
    async def stream(
        websocket: WebSocket,
        model: Annotated[str | None, Query()] = None,
        language: Annotated[str | None, Query(max_length=100)] = None,
        hotwords: Annotated[str | None, Query(max_length=10_000)] = None,
        sampling_rate: Annotated[int, Query(ge=8000, le=192_000)] = 16_000,
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            if model is not None:
                service.check_name(model)
            transcriber = StreamingTranscriber(
                service.model,
                service.processor,
                hotwords=split_words(hotwords) or None,
                keep_up=True,
                language=service.language(language),
            )
        except ValueError as error:
            await websocket.send_denial_response(error_response(400, str(error)))
            return
        await websocket.accept()
        blocks: asyncio.Queue = asyncio.Queue(MAX_WAITING)
        reader = asyncio.create_task(_read(websocket, blocks, service.limits.timeout_s))
        written, heard_s, rest = 0, 0.0, b""
        try:
            while True:
                ended, data = await _take_all(blocks)
                data = rest + data
                whole = len(data) // 2 * 2
                rest, samples = data[whole:], np.frombuffer(data[:whole], "<i2")
                feed = partial(_feed, transcriber, samples, sampling_rate, ended)
                for update in await loop.run_in_executor(service.threads, feed):
                    service.metrics.note_live(update.time_s - heard_s, update)
                    heard_s = update.time_s
                    await websocket.send_json(_row(update, written))
                    written = len(update.committed)
                if ended:
                    await websocket.close()
                    return
                if heard_s > service.limits.max_audio_s:
                    await websocket.close(TOO_BIG, f"more than {service.limits.max_audio_s:g} s")
                    return
        except TimeoutError:
            await websocket.close(POLICY, f"no audio for {service.limits.timeout_s:g} s")
        except ValueError as error:
            await websocket.close(POLICY, str(error)[:120])
        except WebSocketDisconnect:
            pass
        finally:
            reader.cancel()


async def _read(websocket: WebSocket, blocks: asyncio.Queue, longest_s: float) -> None:
    """Puts what comes into the queue: samples, None at their end, or what has gone wrong."""
    try:
        while True:
            async with asyncio.timeout(longest_s):
                message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            if (data := message.get("bytes")) is None:
                if message.get("text") != END:
                    raise ValueError(f"Send 16-bit samples as binary messages, and the text {END!r} behind them.")
                await blocks.put(None)
                return
            await blocks.put(data)
    except (TimeoutError, ValueError, WebSocketDisconnect) as error:
        await blocks.put(error)


async def _take_all(blocks: asyncio.Queue) -> tuple[bool, bytes]:
    """All that has come, at least one message; and whether the audio has ended."""
    found = [await blocks.get()]
    while not blocks.empty():
        found.append(blocks.get_nowait())
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found[-1] is None, b"".join(one for one in found if one is not None)


def _feed(transcriber: StreamingTranscriber, samples: np.ndarray, rate_hz: int, is_end: bool) -> list[StreamUpdate]:
    update = transcriber.feed(samples, rate_hz) if len(samples) else None
    last = transcriber.finish() if is_end else None
    return [one for one in (update, last) if one is not None]


def _row(update: StreamUpdate, written: int) -> dict[str, Any]:
    """An update as JSON: `committed` is what it adds to the text; the last one has all of it, too."""
    values = dataclasses.asdict(update) | {"committed": update.committed[written:]}
    return values | {"text": update.committed} if update.is_final else values
