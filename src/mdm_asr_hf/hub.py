# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Publishing a checkpoint on the Hub: model, processor, generation settings, code and card in one commit."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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


class PushResult(NamedTuple):
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

    Raises:
        ValueError: the folder is no complete checkpoint, the weights do not fit its settings, there is no card, or the
            card lacks metadata that the Hub needs.
        HfHubHTTPError: the Hub refused.
    """
    validate_repo_id(repo_id)
    staged = Path(tempfile.mkdtemp(prefix="mdm-asr-push-"))
    is_kept = False
    try:
        files = _stage(Path(folder), staged, with_code, Path(card or Path(folder) / CARD))
        if dry_run:
            is_kept = True
            return PushResult(files, folder=staged)
        api = HfApi()
        # With the owner, where `repo_id` left it out.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"`repo_id` {repo_id!r} exists and is public. Make it private, or choose another name.")
        # `upload_folder` may split a folder into several commits, between which the repository would not load.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=staged / name) for name in files],
            commit_message=f"Upload model, processor{', code' if with_code else ''} and card",
        )
        return PushResult(files, url=commit.commit_url)
    finally:
        if not is_kept:
            shutil.rmtree(staged)


def _stage(folder: Path, staged: Path, with_code: bool, card: Path) -> list[str]:
    """Writes what is uploaded into the folder `staged`; returns the paths in it, sorted."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` {str(folder)!r} has no config.json. Pass what `save_pretrained` wrote.")
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(f"`folder` {str(folder)!r} has no model.safetensors. Save the model in it.")
    remedy = "model_cards/make_card.py writes a card; pass it as `card`."
    if not card.is_file():
        raise ValueError(f"There is no model card {str(card)!r}. {remedy}")
    metadata = ModelCard.load(card).data
    if missing := [name for name in NEEDED_METADATA if not metadata.get(name)]:
        raise ValueError(f"The model card {str(card)!r} has no {', '.join(missing)} in its metadata. {remedy}")

    config = AutoConfig.from_pretrained(folder)
    with saving_code(with_code):
        if with_code:
            with torch.device("meta"):
                model = AutoModelForSpeechSeq2Seq.from_config(config)
            custom_object_save(model, staged, config=config)
        config.save_pretrained(staged)
        AutoProcessor.from_pretrained(folder).save_pretrained(staged)
    if not with_code:
        # References to code, which a folder that came from the Hub has.
        for path in staged.glob("*config.json"):
            values = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_code)
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for pattern in COPIED:
        for file in folder.glob(pattern):
            shutil.copyfile(file, staged / file.name)
    shutil.copyfile(card, staged / CARD)
    # What is uploaded is what is checked. On the CPU, since a GPU may be at work on something else.
    load_model(str(staged), device="cpu")
    return sorted(str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file())


def _without_code(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name != "auto_map"}


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
