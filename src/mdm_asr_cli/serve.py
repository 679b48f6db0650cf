# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr serve`: OpenAI's audio API, on a port."""

from pathlib import Path
from typing import Annotated

import typer

from .options import BatchSize, Device, Model, Precision, TrustRemoteCode, VoiceActivity
from .terminal import command, load_named_model, quiet_libraries


@command("serve", quiet=False, runs_exports=True)
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MDM_ASR_API_KEY", help="What clients have to send. Better in the environment."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the model's operations. Default: one for each core that is free.")
    ] = None,
    batch_size: BatchSize = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="That run at once; more get 429.")] = 64,
    max_mb: Annotated[int, typer.Option(min=1, help="MiB of a request; more gets 413.")] = 25,
    max_audio_s: Annotated[int, typer.Option(min=1, help="Seconds of audio of a request; more gets 413.")] = 14_400,
    timeout_s: Annotated[
        int, typer.Option(min=1, help="Seconds from a request to its text, else 408; and to finish after SIGTERM.")
    ] = 600,
    vad: VoiceActivity = "auto",
    device: Device = None,
    dtype: Precision = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Serve OpenAI's audio API, and live audio over WebSockets.

    POST /v1/audio/transcriptions, GET /v1/models, /health, /metrics, and WebSocket /v1/stream. Needs the extra
    `serve`. SIGTERM finishes the requests that run.
    """
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn
    import websockets  # noqa: F401

    from mdm_asr_hf.loading import default_checkpoint
    from mdm_asr_hf.serve.app import Service, make_app
    from mdm_asr_hf.serve.limits import Limits

    limits = Limits(api_key, max_mb * 2**20, max_audio_s, max_requests, timeout_s)
    name = Path(model or default_checkpoint()).name or model
    with quiet_libraries():
        loaded, processor = load_named_model(model, device, trust_remote_code, dtype, threads)
        service = Service(loaded, processor, name, limits, batch_size, vad)
        service.warm_up()
    uvicorn.run(
        make_app(service),
        host=host,
        port=port,
        access_log=False,
        timeout_graceful_shutdown=timeout_s,
        # Of 16-bit samples at 16 kHz, eight seconds.
        ws_max_size=2**18,
    )
