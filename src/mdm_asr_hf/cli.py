# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line, `mdm-asr`: a thin shell over the Python API."""

import copy
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import cli_evaluation, cli_export, cli_streaming, cli_training, cli_transcribe
from .encoding_mdm_asr import print_anything

# torch and transformers take seconds to import, and help and usage errors need neither.
if TYPE_CHECKING:
    from .generation_configuration_mdm_asr import MDMASRGenerationConfig
    from .modeling_mdm_asr import MDMASRForConditionalGeneration
    from .processing_mdm_asr import MDMASRProcessor

app = typer.Typer(
    help="Speech recognition by masked diffusion (arXiv 2602.18952).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_transcribe.register(app)


class DonorKind(StrEnum):
    whisper = "whisper"
    canary = "canary"


class Failure(Exception):
    """What ends a command with one line on stderr and exit code 1."""


def one_line(error: Any) -> str:
    """An error's message on one line, without terminal codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__


def report(kind: str, message: Any) -> None:
    print(f"{kind}: {one_line(message)}", file=sys.stderr, flush=True)


class _Collector(logging.Handler):
    """Keeps the library's warnings, so that the command can say which file they are about."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def flush_to_stderr(self, about: str = "") -> None:
        for message in self.messages:
            report("warning", f"{about}: {message}" if about else message)
        self.messages.clear()


@contextmanager
def quiet_libraries() -> Iterator[_Collector]:
    """Keeps transformers' bars, logs and deprecations off the terminal; collects the warnings of this package."""
    if find_spec("transformers") is not None:
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging

        hub_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    collector = _Collector()
    # Code that came with a checkpoint (trust_remote_code) logs under the second name.
    loggers = [logging.getLogger(name) for name in ("mdm_asr_hf", "transformers_modules")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield collector
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def load_model(
    model: str, device: str | None = None, trust_remote_code: bool = False, dtype: str = "float32"
) -> tuple["MDMASRForConditionalGeneration", "MDMASRProcessor"]:
    """
    Loads a checkpoint in one of the precisions of `cli_options.DType`, or a folder that [`export_onnx`] wrote, which
    has its own; and its processor.

    Raises:
        ValueError, OSError: not an MDM-ASR checkpoint, missing or unknown weights, no such device, or a precision that
            it does not have.
    """
    from .onnx_mdm_asr import OnnxMDMASR, is_onnx_folder

    if is_onnx_folder(model):
        if device not in (None, "cpu"):
            raise ValueError(f"`device` {device!r} cannot be used with the ONNX model {model!r}. Leave it out.")
        if dtype != "float32":
            raise ValueError(
                f"`dtype` {dtype!r} cannot be used with the ONNX model {model!r}. Leave it out, or export it with "
                "--int8."
            )
        return OnnxMDMASR.from_pretrained(model), _onnx_processor(model)
    if find_spec("torch") is None:
        raise ValueError(
            'it needs PyTorch: `pip install "mdm_asr_hf[torch]"`. Without it, `--model` takes a folder that '
            "`mdm-asr export` wrote."
        )
    import torch
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

    from .int8_mdm_asr import quantize_int8

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` {device!r} cannot be used ({one_line(error)}). Leave it out, or use 'cpu'."
        ) from error
    looks_like_path = "/" not in model.strip("/") or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).exists():
        raise ValueError(f"`model` {model!r} is neither a folder nor an id of the form owner/name. Check the path.")

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if config.model_type != "mdm_asr":
        raise ValueError(
            f"`model` {model!r} is a {config.model_type!r} checkpoint, not MDM-ASR's. `mdm-asr convert` makes one of "
            "a Whisper or Canary checkpoint."
        )
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    loaded, info = AutoModelForSpeechSeq2Seq.from_pretrained(
        model,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    # transformers only logs these, and a missing weight is a random one.
    problems = [
        f"{kind.removesuffix('_keys')} {name}" for kind in ("missing_keys", "unexpected_keys") for name in info[kind]
    ]
    problems += [f"mismatched {entry}" for entry in info.get("mismatched_keys", ())]
    if problems:
        raise ValueError(
            f"The weights of {model!r} do not fit its configuration: {'; '.join(map(str, problems[:5]))}."
        )
    loaded = loaded.to(device).eval()
    return quantize_int8(loaded) if dtype == "int8" else loaded.to(getattr(torch, dtype)), processor


def _onnx_processor(folder: str) -> Any:
    """Of a Whisper donor's export, NumPy's; of others, transformers'."""
    from .onnx_processing_mdm_asr import MEL_FILE, OnnxProcessor

    if (Path(folder) / MEL_FILE).is_file() or find_spec("transformers") is None:
        return OnnxProcessor.from_pretrained(folder)
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def load_named_model(
    model: str, device: str | None = None, trust_remote_code: bool = False, dtype: str = "float32"
) -> tuple["MDMASRForConditionalGeneration", "MDMASRProcessor"]:
    """
    [`load_model`] for commands: shows what is being loaded, and names it where that fails.

    Raises:
        ValueError: whatever went wrong.
    """
    try:
        with Console(stderr=True).status(f"loading {escape(model)}"):
            return load_model(model, device, trust_remote_code, dtype)
    except Exception as error:
        # A damaged folder: transformers, tokenizers and safetensors each raise classes of their own.
        name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"cannot load the model {model}: {name}{error}") from error


def generation_settings(
    model: "MDMASRForConditionalGeneration", others: list[str] | None = None, **given: Any
) -> "MDMASRGenerationConfig":
    """
    The checkpoint's generation settings with those given, checked as `generate` checks its arguments.

    Args:
        others (`list[str]`, *optional*): NAME=VALUE of any further setting, the value as JSON has it.
        given: settings by name, those of the sampler among them; None keeps the checkpoint's.
    """
    settings = copy.copy(model.generation_config)
    given = {name: value for name, value in given.items() if value is not None}
    for one in others or []:
        name, _, value = one.partition("=")
        if name not in vars(settings) or name.startswith("_"):
            raise ValueError(
                f"`--set {one}`: {name!r} is not a setting of generation. Use one of generation_config.json."
            )
        try:
            given[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`--set {one}`: {value!r} is not a JSON value, such as 0.5, null or [1, 2].") from error
        if given[name] is None:
            # As an argument of `generate`, None is no wish.
            setattr(settings, name, given.pop(name))
    settings, _ = model._settle_generation_config(settings, given, set())
    settings.return_dict_in_generate = True
    return settings


@app.command()
def convert(
    donor: Annotated[
        str, typer.Argument(metavar="DONOR", help="A Whisper or Canary checkpoint: folder, .nemo file or id.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.")],
    kind: Annotated[
        DonorKind | None, typer.Option(help="Of the donor. Default: what its config.json or suffix says.")
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
    vocab_text: Annotated[
        Path | None, typer.Option(help="A file of sentences: keep the ids that they use most, not the first ones.")
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
    from .modeling_mdm_asr import MDMASRForConditionalGeneration
    from .processing_mdm_asr import MDMASRProcessor

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Failure(f"`OUTPUT` {str(output)!r} exists and is not an empty folder. Remove it or choose another.")
    with quiet_libraries() as collector:
        try:
            kind = kind or _guess_kind(donor)
            options = {}
            for name, value in (("vocab_size", vocab_size), ("vocab_text", vocab_text)):
                if value is None:
                    continue
                if kind is not DonorKind.whisper:
                    option = f"--{name.replace('_', '-')}"
                    raise ValueError(f"`{option} {value}` is for Whisper donors only. Leave it out.")
                options[name] = value
            with saving_code(with_code):
                convert_model = getattr(MDMASRForConditionalGeneration, f"from_{kind.value}")
                model = convert_model(donor, draft_layers=draft_layers, **options)
                processor = getattr(MDMASRProcessor, f"from_{kind.value}")(donor, **options)
                model.save_pretrained(output)
                processor.save_pretrained(output)
        except (ValueError, OSError) as error:
            raise Failure(f"cannot convert {donor}: {error}") from error
        collector.flush_to_stderr()
    print(f"wrote {output}: {model.num_parameters() / 1e6:.1f} M parameters of {donor} ({kind.value})")


def _guess_kind(donor: str) -> DonorKind:
    from .convert_common import donor_kind

    kind = donor_kind(donor)
    if kind not in DonorKind.__members__:
        raise ValueError(f"its config.json says {kind!r}: it is a model of this package already, no donor.")
    return DonorKind(kind)


@contextmanager
def saving_code(enabled: bool) -> Iterator[None]:
    """Makes `save_pretrained` copy the code too, for the time of the context."""
    from .configuration_mdm_asr import MDMASRConfig
    from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
    from .modeling_mdm_asr import MDMASRForConditionalGeneration
    from .processing_mdm_asr import MDMASRProcessor
    from .tokenization_mdm_asr import MDMASRAggregateTokenizer

    auto_classes = {
        MDMASRConfig: "AutoConfig",
        MDMASRFeatureExtractor: "AutoFeatureExtractor",
        MDMASRForConditionalGeneration: "AutoModelForSpeechSeq2Seq",
        MDMASRProcessor: "AutoProcessor",
        MDMASRAggregateTokenizer: "AutoTokenizer",
    }
    before = {one_class: one_class._auto_class for one_class in auto_classes}
    try:
        if enabled:
            for one_class, name in auto_classes.items():
                one_class.register_for_auto_class(name)
        yield
    finally:
        for one_class, name in before.items():
            one_class._auto_class = name


cli_export.register(app)
cli_evaluation.register(app)
cli_streaming.register(app)
cli_training.register(app)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"mdm-asr {version('mdm_asr_hf')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    print_anything()
    try:
        app()
    except Failure as error:
        report("error", error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if find_spec("torch") is not None:
            raise
        report("error", f'this command needs {error.name}: `pip install "mdm_asr_hf[torch]"`')
        sys.exit(1)


__all__ = ["app", "convert", "generation_settings", "load_model", "main"]
