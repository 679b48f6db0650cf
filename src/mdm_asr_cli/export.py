# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr export`: a checkpoint in a form that runs without PyTorch's weights."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import Model, TrustRemoteCode
from .terminal import Failure, load_named_model, quiet_libraries


class ExportFormat(StrEnum):
    onnx = "onnx"


def register(app: typer.Typer) -> None:
    """Adds the command of this module to the application."""
    app.command()(export)


def export(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write.")],
    model: Model = None,
    export_format: Annotated[ExportFormat, typer.Option("--format", help="Of the graphs.")] = ExportFormat.onnx,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the matrix products to 8 bits.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Export a checkpoint to ONNX, for CPUs.

    Writes graphs, embeddings, settings and processor. `transcribe` and `stream` take the folder as --model. Needs
    the extra `export`, and a checkpoint that decodes by drafts.
    """
    from mdm_asr_hf import default_checkpoint
    from mdm_asr_hf.onnx.export import export_onnx

    with quiet_libraries() as collector:
        source = model or str(default_checkpoint())
        try:
            loaded, processor = load_named_model(source, "cpu", trust_remote_code)
            export_onnx(loaded, output, int8=int8, processor=processor)
        except (ValueError, OSError, ImportError) as error:
            raise Failure(f"cannot export {source}: {error}") from error
        collector.flush_to_stderr()
    files = sorted(path for path in output.iterdir() if path.suffix in (".onnx", ".data", ".safetensors"))
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in files)
    print(f"wrote {output}: {sizes}")


__all__ = ["export", "register"]
