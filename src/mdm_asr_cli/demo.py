# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr demo`: a page to look at the drafts with."""

from typing import Annotated

import typer

from .options import Device, Model, Precision, TrustRemoteCode
from .terminal import command, load_named_model, quiet_libraries


@command("demo", quiet=False)
def demo(
    model: Model = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first from 7860 on that is free.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also by a public link, through gradio's servers.")] = False,
    device: Device = None,
    dtype: Precision = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Show in a browser how a text comes about, draft by draft.

    From a file or the microphone; with confidences, words to click on and hear, and the donor's own decoding beside
    it. Needs the extra `demo`.
    """
    from mdm_asr_hf.demo.page import launch

    with quiet_libraries():
        loaded, processor = load_named_model(model, device, trust_remote_code, dtype)
    try:
        launch(loaded, processor, host=host, port=port, share=share)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}, port {port or 'from 7860 on'}. Choose --host and --port."
        ) from error
