# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What all converters share: reading a donor's files, and a model that every tensor of them arrives in."""

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoFeatureExtractor
from transformers.configuration_utils import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from ..configuration_mdm_asr import MDMASRConfig

MASK_TOKEN = "<|mask|>"

# This model's names of the token embedding, which is Whisper's and Canary's too, of the embedding of the ids that are
# never predicted, and of the output weights, which are tied to the token embedding.
EMBEDDING = "model.decoder.embed_tokens.weight"
INPUT_ONLY_EMBEDDINGS = "model.decoder.input_only_embeddings.weight"
OUTPUT = "proj_out.weight"
DRAFTS, LAYERS = "model.decoder.drafts.", "model.decoder.layers."
# Of drafts that are yet to be trained: byte-level vocabularies have the commonest tokens first.
DRAFT_VOCAB_SIZE = 16384
# Proposed from left to right, within this budget of entropy.
DRAFT_SAMPLER = {"name": "pbeb_conf", "gamma": 4.0, "lambda_": None}

# How many names of each kind of fault a message lists.
MAX_NAMES_SHOWN = 20


def find_file(path_or_id: str | Path, name: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """The file `name` of a folder or Hub id, or None if there is none."""
    file = cached_file(str(path_or_id), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return None if file is None else Path(file)


def read_json(path_or_id: str | Path, name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The JSON file `name` of a folder or Hub id; empty if there is none."""
    file = find_file(path_or_id, name, hub_kwargs)
    return {} if file is None else json.loads(file.read_text(encoding="utf-8"))


def donor_kind(path_or_id: str | Path) -> str:
    """
    What a checkpoint is: "whisper" or "canary", which can be donors, or "mdm_asr".

    Raises:
        ValueError: anything else.
    """
    path = Path(path_or_id)
    if path.suffix == ".nemo" or (path.is_dir() and any(path.glob("*.nemo"))):
        return "canary"
    model_type = PreTrainedConfig.get_config_dict(str(path_or_id))[0].get("model_type")
    if model_type is None:
        raise ValueError("no config.json says what it is. Check the path; of a .nemo file, pass `--kind canary`.")
    if model_type not in ("whisper", "canary", "mdm_asr"):
        raise ValueError(f"its config.json says {model_type!r}, but only Whisper and Canary can be donors.")
    return model_type


def read_safetensors(path_or_id: str | Path, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    All tensors of a folder or Hub id in transformers' format, from one file or several.

    Raises:
        ValueError: they are not there as safetensors. Pickled weights are not read, since unpickling can run code.
    """
    names = ["model.safetensors"]
    if index := read_json(path_or_id, "model.safetensors.index.json", hub_kwargs):
        names = sorted(set(index["weight_map"].values()))
    tensors = {}
    for name in names:
        file = find_file(path_or_id, name, hub_kwargs)
        if file is None:
            raise ValueError(
                f"`path_or_id` {str(path_or_id)!r} lacks {name}. Weights are loaded from safetensors only: save the "
                "donor with `save_pretrained` of a current transformers."
            )
        tensors |= load_file(file)
    return tensors


def first_line(error: Exception) -> str:
    """What an error says, short enough to quote in another."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_part(auto_class: type, path_or_id: str | Path, hub_kwargs: dict[str, Any]) -> Any:
    """The donor's tokenizer or feature extractor."""
    try:
        return auto_class.from_pretrained(str(path_or_id), **hub_kwargs)
    except Exception as error:  # what a folder without them raises depends on the version
        raise ValueError(
            f"`path_or_id` {str(path_or_id)!r} lacks the tokenizer or the feature extractor. Save the donor's "
            "processor beside its weights: the decoder prompt is made of the tokenizer's tokens. "
            f"({auto_class.__name__}: {first_line(error)})"
        ) from error


def load_frontend(path_or_id: str | Path, num_mel_bins: int, hub_kwargs: dict[str, Any]) -> Any:
    """The donor's feature extractor, which must give as many mel bins as its encoder takes."""
    frontend = load_part(AutoFeatureExtractor, path_or_id, hub_kwargs)
    if frontend.feature_size != num_mel_bins:
        raise ValueError(
            f"The donor's feature extractor gives {frontend.feature_size} mel bins, its encoder takes {num_mel_bins}."
        )
    return frontend


def _resolve_dtype(dtype: str | torch.dtype | None, own: torch.dtype) -> torch.dtype:
    """The dtype that was asked for; `own` for None and `"auto"`."""
    found = own if dtype in (None, "auto") else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` {dtype!r} is not one of torch's for weights. Pass for example 'bfloat16'.")
    return found


def encoder_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """A donor's encoder configuration without its dtype, which is the model's to decide."""
    return {name: value for name, value in config.to_dict().items() if name != "dtype"}


def make_model(
    model_class: type,
    config: MDMASRConfig,
    donor: dict[str, torch.Tensor],
    names: Sequence[tuple[str, str]],
    num_rows: int,
    *,
    dtype: str | torch.dtype | None = None,
    donor_ids: Sequence[int] | None = None,
    computed: Collection[str] = (),
    arrange: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> nn.Module:
    """
    The model of a configuration, in evaluation mode, with a donor's weights, an embedding of the mask, and drafts that
    are yet to be trained if the configuration says so.

    Args:
        donor: the donor's tensors under its own names.
        names: substitutions (pattern, replacement) that make this model's names the donor's, in their order.
        num_rows (`int`): rows of the donor's token embedding, which may be more than this model's.
        dtype (*optional*): of the model; None and "auto" keep the donor's own.
        donor_ids (*optional*): the donor's ids of ids 0, 1, ..., without the mask; by default the same.
        computed: the donor's names of buffers that it stores but that are not learned.
        arrange (*optional*): changes the weights, under this model's names, in place.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape, by the donor's names; an output that is not
            tied to the token embedding; or a dtype that is none.
    """
    with no_init_weights():
        model = model_class(config)
    weights = _match_weights(model, donor, names, num_rows, computed)
    if arrange is not None:
        arrange(weights)
    rows = weights[EMBEDDING] if donor_ids is None else weights[EMBEDDING][donor_ids]
    dtype = _resolve_dtype(dtype, own=rows.dtype)
    # The mask stands for every token it may turn out to be: their mean lies amid the inputs the decoder knows.
    rows = torch.cat([rows.float(), rows.float().mean(dim=0, keepdim=True)])
    num_predicted = config.decoder_config.vocab_size
    weights[EMBEDDING] = weights[OUTPUT] = rows[:num_predicted].clone()
    weights[INPUT_ONLY_EMBEDDINGS] = rows[num_predicted:].clone()
    if config.has_drafts:
        _add_drafts(model, weights)
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def rename(name: str, names: Sequence[tuple[str, str]]) -> str:
    """A name after all substitutions (pattern, replacement), in their order."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _match_weights(
    model: nn.Module,
    donor: dict[str, torch.Tensor],
    names: Sequence[tuple[str, str]],
    num_rows: int,
    computed: Collection[str],
) -> dict[str, torch.Tensor]:
    """All of the donor's tensors under this model's names; what drafts is not the donor's."""
    shapes = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name != INPUT_ONLY_EMBEDDINGS and not name.startswith(DRAFTS)
    }
    shapes[EMBEDDING] = shapes[OUTPUT] = torch.Size([num_rows, shapes[EMBEDDING][1]])
    if EMBEDDING in donor:
        donor = {OUTPUT: donor[EMBEDDING], **donor}  # transformers stores tied weights once
    weights, used, missing, misshapen = {}, set(), [], []
    for name, shape in shapes.items():
        donor_name = rename(name, names)
        used.add(donor_name)
        tensor = donor.get(donor_name)
        if tensor is None and name.endswith(".num_batches_tracked"):
            tensor = torch.zeros(shape, dtype=torch.long)  # a counter that only a cumulative average would use
        if tensor is None:
            missing.append(donor_name)
        elif tensor.shape != shape:
            misshapen.append(f"{donor_name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        else:
            weights[name] = tensor
    faults = {
        "missing": missing,
        "unknown": sorted(set(donor) - used - set(computed)),
        "of another shape than the settings say": misshapen,
    }
    faults = [f"{len(all_)} {kind}: {', '.join(all_[:MAX_NAMES_SHOWN])}" for kind, all_ in faults.items() if all_]
    if faults:
        raise ValueError(f"The donor's tensors do not fit a model of its settings; {'; '.join(faults)}.")
    if not torch.equal(weights[OUTPUT], weights[EMBEDDING]):
        raise ValueError("The donor's output weights differ from its token embedding, but this model ties them.")
    return weights


def draft_settings(draft_layers: int | None, num_layers: int, vocab_size: int) -> dict[str, Any]:
    """
    The decoder's settings of drafts that start from a donor of so many layers and tokens. `draft_layers`: None for as
    many as the donor has, 0 for none.

    Raises:
        ValueError: more layers than the donor has, or no number.
    """
    draft_layers = num_layers if draft_layers is None else draft_layers
    if type(draft_layers) is not int or not 0 <= draft_layers <= num_layers:
        raise ValueError(f"`draft_layers` ({draft_layers!r}) must be an integer from 0 (a canvas) to {num_layers}.")
    if not draft_layers:
        return {}
    return {"draft_layers": draft_layers, "draft_vocab_size": min(DRAFT_VOCAB_SIZE, vocab_size)}


def _add_drafts(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """
    Adds the drafts' first weights, in place: copies of the donor's last layers and of its last norm, no difference
    between the masks of a block, and a sequential head that changes nothing yet.
    """
    config, state = model.config.decoder_config, model.state_dict()
    first = config.num_hidden_layers - config.draft_layers
    for name in (name for name in state if name.startswith(DRAFTS)):
        inner = name.removeprefix(DRAFTS)
        if inner.startswith("layers."):
            index, _, rest = inner.removeprefix("layers.").partition(".")
            weights[name] = weights[f"{LAYERS}{first + int(index)}.{rest}"].clone()
        elif inner.startswith("layer_norm."):
            weights[name] = weights[f"model.decoder.{inner}"].clone()
        elif inner == "head.token_ids":
            others = [i for i in range(len(state[name])) if i != model.config.eos_token_id]
            weights[name] = torch.tensor(sorted([*others[: len(state[name]) - 1], model.config.eos_token_id]))
        elif inner.startswith("head.mix.weight"):
            weights[name] = torch.empty(state[name].shape)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                nn.init.kaiming_uniform_(weights[name], a=math.sqrt(5))
        else:
            weights[name] = torch.zeros(state[name].shape)
    # What the last norm makes of a state has about the norm's weights as its root mean square.
    scale = weights["model.decoder.layer_norm.weight"].float().square().mean().sqrt()
    config.draft_state_scale = round(float(scale), 4)
    config.draft_embedding_scale = round(float(1 / weights[EMBEDDING].float().square().mean().sqrt()), 4)
