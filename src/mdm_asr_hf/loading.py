# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Loads models and processors by name: the package's own checkpoint, folders, ids on the Hub, exported models."""

import copy
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and transformers take seconds to import, and are not there where exported models run alone.
if TYPE_CHECKING:
    from .generation_configuration_mdm_asr import MDMASRGenerationConfig
    from .modeling_mdm_asr import MDMASRForConditionalGeneration
    from .processing_mdm_asr import MDMASRProcessor

DEFAULT_CHECKPOINT_NAME = "mdm-asr-tiny-en"


def default_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package: model, processor, generation settings and card."""
    return Path(__file__).parent / "checkpoints" / DEFAULT_CHECKPOINT_NAME


def load_model(
    model: str,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    num_threads: int | None = None,
) -> tuple["MDMASRForConditionalGeneration", "MDMASRProcessor"]:
    """
    Loads a checkpoint in one of the precisions of the command line, or a folder that [`export_onnx`] wrote, which
    has its own; and its processor. Operations take so many threads, by default one for each core that is free.

    Raises:
        ValueError, OSError: not an MDM-ASR checkpoint, missing or unknown weights, no such device, or a precision that
            it does not have.
    """
    from .cores import free_cores
    from .onnx.model import OnnxMDMASR, is_onnx_folder

    if is_onnx_folder(model):
        for name, value, usable in (("device", device, (None, "cpu")), ("dtype", dtype, ("float32",))):
            if value not in usable:
                raise ValueError(
                    f"`{name}` {value!r} cannot be used with the ONNX model {model!r}, which has one. Leave it out."
                )
        return OnnxMDMASR.from_pretrained(model, num_threads), _onnx_processor(model)
    if find_spec("torch") is None:
        raise ValueError(
            'it needs PyTorch: `pip install ".[torch]"` in a clone of this project. Without it, `--model` takes a '
            "folder that `mdm-asr export` wrote."
        )
    import torch
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

    from .int8 import quantize_int8

    torch.set_num_threads(num_threads or min(torch.get_num_threads(), free_cores()))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` {device!r} cannot be used ({error}). Leave it out, or use 'cpu'.") from error
    looks_like_path = "/" not in model.strip("/") or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).exists():
        raise ValueError(f"`model` {model!r} is neither a folder nor an id of the form owner/name. Check the path.")

    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(model, **remote)
    if config.model_type != "mdm_asr":
        raise ValueError(
            f"`model` {model!r} is a {config.model_type!r} checkpoint, not MDM-ASR's. `mdm-asr convert` makes one of "
            "a Whisper or Canary checkpoint."
        )
    processor = AutoProcessor.from_pretrained(model, **remote)
    loaded, info = AutoModelForSpeechSeq2Seq.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **remote
    )
    # transformers only logs these, and a missing weight is a random one.
    kinds = ("missing", "unexpected", "mismatched")
    if problems := [f"{kind} {name}" for kind in kinds for name in info.get(f"{kind}_keys", ())]:
        raise ValueError(f"The weights of {model!r} do not fit its configuration: {'; '.join(problems[:5])}.")
    loaded = loaded.to(device).eval()
    return quantize_int8(loaded) if dtype == "int8" else loaded.to(getattr(torch, dtype)), processor


def _onnx_processor(folder: str) -> Any:
    """Of a Whisper donor's export, NumPy's; of others, transformers'."""
    from .onnx.processing import MEL_FILE, OnnxProcessor

    if (Path(folder) / MEL_FILE).is_file() or find_spec("transformers") is None:
        return OnnxProcessor.from_pretrained(folder)
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def model_identity(source: str) -> list[Any]:
    """A checkpoint's name and, of a folder, what changes when its weights do."""
    weights = []
    if Path(source).is_dir():
        weights = sorted(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".onnx", ".data"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return [source, version("mdm_asr_hf"), stats]


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
