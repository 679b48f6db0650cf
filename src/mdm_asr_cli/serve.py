# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr serve`: OpenAI's audio API, on a port."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, DType, Model, Precision, TrustRemoteCode
from .terminal import Failure, load_named_model, quiet_libraries
from .transcribe import Vad


def register(app: typer.Typer) -> None:
    """Adds the command of this module to the application."""
    app.command()(serve)


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MDM_ASR_API_KEY", help="What clients have to send. Better in the environment."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the model's operations. Default: one for each core.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows decoded together. Does not change the text.")] = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="That run at once; more get 429.")] = 64,
    max_mb: Annotated[int, typer.Option(min=1, help="MiB of a request; more gets 413.")] = 25,
    max_audio_s: Annotated[int, typer.Option(min=1, help="Seconds of audio of a request; more gets 413.")] = 14_400,
    timeout_s: Annotated[
        int, typer.Option(min=1, help="Seconds from a request to its text, else 408; and to finish after SIGTERM.")
    ] = 600,
    vad: Annotated[
        Vad, typer.Option(help="How speech is found. Default: silero, if silero-vad is installed, else energy.")
    ] = Vad.auto,
    device: Device = None,
    dtype: Precision = DType.float32,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Serve OpenAI's audio API, and live audio over WebSockets.

    POST /v1/audio/transcriptions, GET /v1/models, /health, /metrics, and WebSocket /v1/stream. Needs the extra
    `serve`. SIGTERM finishes the requests that run.
    """
    from mdm_asr_hf import default_checkpoint

    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
        import websockets  # noqa: F401

        from mdm_asr_hf.serve.app import make_app, make_service
        from mdm_asr_hf.serve.limits import Limits
        from mdm_asr_hf.serve.live import add_live
    except ModuleNotFoundError as error:
        raise Failure(f'`serve` needs {error.name}: `pip install ".[serve]"` in a clone of this project') from error
    with quiet_libraries():
        source = model or str(default_checkpoint())
        try:
            limits = Limits(api_key, max_mb * 2**20, max_audio_s, max_requests, timeout_s)
            loaded, processor = load_named_model(source, device, trust_remote_code, dtype.value, threads)
            service = make_service(loaded, processor, Path(source).name or source, limits, batch_size, vad.value)
            service.warm_up()
        except (ValueError, RuntimeError) as error:
            raise Failure(error) from error
    app = make_app(service)
    add_live(app, service)
    uvicorn.run(
        app,
        host=host,
        port=port,
        access_log=False,
        timeout_graceful_shutdown=timeout_s,
        # Of 16-bit samples at 16 kHz, eight seconds.
        ws_max_size=2**18,
    )


__all__ = ["register", "serve"]
