# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr export`: a checkpoint in a form that runs without PyTorch's weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Model, TrustRemoteCode
from .terminal import command, load_named_model


@command("export", "cannot export: ")
def export(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write.")],
    model: Model = None,
    export_format: Annotated[Literal["onnx"], typer.Option("--format", help="Of the graphs.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the matrix products to 8 bits.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Export a checkpoint to ONNX, for CPUs.

    Writes graphs, embeddings, settings and processor. `transcribe` and `stream` take the folder as --model. Needs
    the extra `export`, and a checkpoint that decodes by drafts.
    """
    from mdm_asr_hf.onnx.export import export_onnx

    loaded, processor = load_named_model(model, "cpu", trust_remote_code)
    export_onnx(loaded, output, int8=int8, processor=processor)
    files = sorted(path for path in output.iterdir() if path.suffix in (".onnx", ".data", ".safetensors"))
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in files)
    print(f"wrote {output}: {sizes}")
