# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Publishing a checkpoint on the Hub: model, processor, generation settings, code and card in one commit."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.dynamic_module_utils import custom_object_save

from .configuration_mdm_asr import MDMASRConfig
from .feature_extraction_mdm_asr import MDMASRFeatureExtractor
from .loading import load_model
from .modeling_mdm_asr import MDMASRForConditionalGeneration
from .processing_mdm_asr import MDMASRProcessor
from .tokenization_mdm_asr import MDMASRAggregateTokenizer

CARD = "README.md"
# Taken as they are. Everything else that is uploaded is written anew, so that what else lies in the folder of a
# training run (optimiser states, pickles, logs) stays there.
COPIED = ("model*.safetensors", "model.safetensors.index.json", "generation_config.json", "LICENSE*", "NOTICE*")
NEEDED_METADATA = ("license", "library_name", "pipeline_tag")


@dataclass(frozen=True)
class PushResult:
    """
    What was, or would be, uploaded.

    Args:
        files (`list[str]`): paths in the repository, sorted.
        folder (`Path`, *optional*): where they lie, after a dry run.
        url (`str`, *optional*): of the commit, unless it was a dry run.
    """

    files: list[str]
    folder: Path | None = None
    url: str | None = None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    with_code: bool = True,
    card: str | Path | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> PushResult:
    """
    Uploads a checkpoint to the Hub, in one commit, and makes the repository if there is none.

    Args:
        folder: a folder that `save_pretrained` of the model and of the processor wrote. Weights, generation settings
            and licence files are uploaded byte by byte, the other settings as this version of the package writes them.
        repo_id (`str`): owner/name.
        private (`bool`): make the repository private. One that exists and is public is refused.
        with_code (`bool`): add the code, so that it loads with `trust_remote_code=True` where this package is not.
        card (*optional*): the model card; by default the folder's README.md.
        dry_run (`bool`): only gather the files, in a temporary folder that is left to the caller.
        endpoint (`str`, *optional*): of another Hub than huggingface.co.
        token (`str`, *optional*): by default the one of `hf auth login`.

    Raises:
        ValueError: the folder is no complete checkpoint, the weights do not fit its settings, there is no card, or the
            card lacks metadata that the Hub needs.
        HfHubHTTPError: the Hub refused.
    """
    validate_repo_id(repo_id)
    staged = Path(tempfile.mkdtemp(prefix="mdm-asr-push-"))
    is_kept = False
    try:
        files = stage(folder, staged, with_code=with_code, card=card)
        if dry_run:
            is_kept = True
            return PushResult(files, folder=staged)
        api = HfApi(endpoint=endpoint, token=token)
        # With the owner, where `repo_id` left it out.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"`repo_id` {repo_id!r} exists and is public. Make it private, or choose another name.")
        # `upload_folder` may split a folder into several commits, between which the repository would not load.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=staged / name) for name in files],
            commit_message="Upload model, processor, code and card"
            if with_code
            else "Upload model, processor and card",
        )
        return PushResult(files, url=commit.commit_url)
    finally:
        if not is_kept:
            shutil.rmtree(staged)


def stage(
    folder: str | Path, destination: str | Path, *, with_code: bool = True, card: str | Path | None = None
) -> list[str]:
    """
    Writes what [`push`] uploads into the folder `destination`; returns the paths in it, sorted. Same errors.
    """
    folder, destination = Path(folder), Path(destination)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` {str(folder)!r} has no config.json. Pass what `save_pretrained` wrote.")
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(f"`folder` {str(folder)!r} has no model.safetensors. Save the model in it.")
    card = Path(card) if card else folder / CARD
    check_card(card)

    config = AutoConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    destination.mkdir(parents=True, exist_ok=True)
    with saving_code(with_code):
        if with_code:
            with torch.device("meta"):
                model = AutoModelForSpeechSeq2Seq.from_config(config)
            custom_object_save(model, destination, config=config)
        config.save_pretrained(destination)
        processor.save_pretrained(destination)
    if not with_code:
        for path in destination.glob("*config.json"):
            _drop_auto_map(path)
    for pattern in COPIED:
        for file in folder.glob(pattern):
            shutil.copyfile(file, destination / file.name)
    shutil.copyfile(card, destination / CARD)
    # What is uploaded is what is checked. On the CPU, since a GPU may be at work on something else.
    load_model(str(destination), device="cpu")
    return sorted(str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file())


@contextmanager
def saving_code(enabled: bool) -> Iterator[None]:
    """Makes `save_pretrained` copy the code too, for the time of the context."""
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


def check_card(card: Path) -> None:
    """Raises ValueError if there is no card, or if it lacks metadata."""
    remedy = "model_cards/make_card.py writes a card; pass it as `card`."
    if not card.is_file():
        raise ValueError(f"There is no model card {str(card)!r}. {remedy}")
    data = ModelCard.load(card).data
    missing = [name for name in NEEDED_METADATA if not data.get(name)]
    if missing:
        raise ValueError(f"The model card {str(card)!r} has no {', '.join(missing)} in its metadata. {remedy}")


def _drop_auto_map(path: Path) -> None:
    """Takes out references to code, which a folder that came from the Hub has and its files without code must not."""

    def drop(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop(entry) for key, entry in value.items() if key != "auto_map"}
        return value

    content = json.loads(path.read_text(encoding="utf-8"))
    if (without := drop(content)) != content:
        path.write_text(json.dumps(without, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["PushResult", "check_card", "push", "saving_code", "stage"]
