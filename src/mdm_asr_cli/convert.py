# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""`mdm-asr convert`: a donor's weights as a model of this package."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .terminal import command


@command(failure="cannot convert {donor}: ")
def convert(
    donor: Annotated[
        str, typer.Argument(metavar="DONOR", help="A Whisper or Canary checkpoint: folder, .nemo file or id.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.")],
    kind: Annotated[
        Literal["whisper", "canary"] | None,
        typer.Option(help="Of the donor. Default: what its config.json or suffix says."),
    ] = None,
    draft_layers: Annotated[
        int | None,
        typer.Option(
            help="Of the masks that draft. Default: the donor's number; 0: the paper's canvas, to be trained."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="For a canvas: keep N ids of a Whisper donor's vocabulary, the first ones.")
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Add the code, for trust_remote_code where this package is not installed."),
    ] = False,
) -> None:
    """
    Make an MDM-ASR model of a Whisper or Canary checkpoint.

    Writes model, processor and generation settings. The result gives the donor's text at once; training its drafts
    makes it faster. With `--draft-layers 0` it is a canvas, which transcribes nothing before it is trained.
    """
    from mdm_asr_hf.convert.common import donor_kind
    from mdm_asr_hf.hub import saving_code
    from mdm_asr_hf.modeling_mdm_asr import MDMASRForConditionalGeneration
    from mdm_asr_hf.processing_mdm_asr import MDMASRProcessor

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`OUTPUT` {str(output)!r} exists and is not an empty folder. Remove it or choose another.")
    kind = kind or donor_kind(donor)
    if kind not in ("whisper", "canary"):
        raise ValueError(f"its config.json says {kind!r}: it is a model of this package already, no donor.")
    options = {} if vocab_size is None else {"vocab_size": vocab_size}
    if options and kind != "whisper":
        raise ValueError("`--vocab-size` is for Whisper donors only. Leave it out.")
    with saving_code(with_code):
        model = getattr(MDMASRForConditionalGeneration, f"from_{kind}")(donor, draft_layers=draft_layers, **options)
        processor = getattr(MDMASRProcessor, f"from_{kind}")(donor, **options)
        model.save_pretrained(output)
        processor.save_pretrained(output)
    print(f"wrote {output}: {model.num_parameters() / 1e6:.1f} M parameters of {donor} ({kind})")
