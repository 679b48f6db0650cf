# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The training script, on a tiny model and a language of tones."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import run_train
import tones
import torch
import yaml
from tables import each
from tiny_data import save_model
from tiny_models import tiny_drafts_model, tiny_model, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tones, "NUM_ROWS", {"train": 12, "eval": 3})
        tones.main(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path):
    return save_model(tmp_path / "model", tiny_model(), tiny_processor())


def arguments(model_folder, data, tmp_path, *more):
    return [
        *("--model", str(model_folder), "--train_sources", str(data / "train"), "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "2", "--max_seconds_per_batch", "15", "--use_cpu", "true", "--report_to", "none"),
        *("--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true", *more),
    ]


def test_it_trains_evaluates_and_saves_what_loads_and_goes_on(model_folder, data, tmp_path):
    """With windows, which are a stream: a run that goes on takes the same course."""
    more = ["--eval_sources", str(data / "eval"), "--predict_with_generate", "true", "--join_utterances", "true"]
    more += ["--join_max_s", "8", "--augment", "true", "--save_strategy", "steps", "--save_steps", "1"]
    argv = arguments(model_folder, data, tmp_path, *more)
    results = run_train.main(argv)
    assert results["before"]["eval_wer"] > 0 and results["after"]["eval_wer"] > 0
    assert results["before"]["eval_loss"] != results["after"]["eval_loss"]
    losses = [entry["loss_step_2"] for entry in results["log"] if "loss_step_2" in entry]
    assert len(set(losses)) == 2
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["versions"]["mdm_asr_hf"] and stored["skipped"].startswith("0 of")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    clip = next((data / "eval").glob("*.flac"))
    assert isinstance(processor.decode(model.generate(**processor(clip)))[0], str)
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    again = run_train.main(argv)
    assert [entry["loss_step_2"] for entry in again["log"] if "loss_step_2" in entry] == losses


@each("lora_rank", [0, 2])
def test_a_donor_and_its_drafts_learn_a_share_of_transcripts(data, tmp_path, monkeypatch, lora_rank):
    """The share is half of the way from the first weights to the trained ones; with adapters, of what they add."""
    model, whole, keep_share = tiny_drafts_model(dtype=torch.float32), {}, run_train.keep_share
    save_model(tmp_path / "model", model, tiny_processor())

    def note_whole(model, *arguments):
        trained = copy.deepcopy(model)
        whole.update((trained.merge_and_unload() if lora_rank else trained).state_dict())
        keep_share(model, *arguments)

    monkeypatch.setattr(run_train, "keep_share", note_whole)
    more = ["--lora_rank", str(lora_rank), "--freeze_encoder", "true", "--learning_rate", "1e-3"]
    more += ["--trained_share", "0.5", "--eval_sources", str(data / "eval")]
    results = run_train.main(arguments(tmp_path / "model", data, tmp_path, *more))
    saved = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval().state_dict()
    assert results["after"]["eval_loss_donor"] < results["before"]["eval_loss_donor"]
    before = model.state_dict()
    changed = {name for name, tensor in saved.items() if not torch.equal(tensor, before[name])}
    assert any(".drafts." in name for name in changed) and any("decoder.layers" in name for name in changed)
    assert ("proj_out.weight" in changed) == (lora_rank == 0)
    assert not any("encoder." in name for name in changed - {n for n in changed if "decoder." in n})
    name = "model.decoder.layers.0.cross_attn.q_proj.weight"
    assert name in changed
    torch.testing.assert_close(saved[name], (whole[name] + before[name]) / 2)


def test_the_recipe_of_drafts_is_the_command(data, tmp_path, monkeypatch):
    """The settings that are given reach the stages, and no others."""
    called = {}
    monkeypatch.setattr(run_train, "train_drafts", lambda *args, **settings: called.update(args=args, **settings))
    recipe = str(TRAINING / "configs" / "drafts.yaml")
    more = ["--donor", "whisper", "--train_sources", "a", '{"path": "b", "passes": 2}', "--output_dir", "out"]
    run_train.main([recipe, *more, "--draft_steps", "5", "--learning_rate", "1e-3", "--use_cpu", "true"])
    assert called == {
        "args": ("whisper", ["a", {"path": "b", "passes": 2}], "out"),
        **{"language": None, "cache": None, "silence_s": 1.0},
        **{"encoder_steps": None, "draft_steps": 5},
        **{"max_seconds_per_batch": 120.0, "learning_rate": 1e-3, "use_cpu": True},
    }


def test_yaml_settings_and_the_recipes_are_valid(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sources = [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5}]
    settings = {"learning_rate": 0.001, "isct_steps": 3, "freeze_encoder": True, "output_dir": "out"}
    recipe.write_text(yaml.safe_dump({"train_sources": sources, **settings}))
    model, data_arguments, _, training, _ = run_train.read_arguments([str(recipe), "--isct_steps", "1"])
    assert run_train.parse_sources(data_arguments.train_sources) == sources
    assert training.learning_rate == 0.001 and training.isct_steps == 1 and model.freeze_encoder

    # fsdp.yaml has settings of accelerate, tested elsewhere.
    for recipe in sorted(set((TRAINING / "configs").glob("*.yaml")) - {TRAINING / "configs" / "fsdp.yaml"}):
        argv = [str(recipe), "--output_dir", str(tmp_path), "--bf16", "false", "--train_sources", "a"]
        model_arguments, _, distillation, _, _ = run_train.read_arguments(argv)
        # Those of a canvas convert a donor to one.
        assert (model_arguments.draft_layers == 0) == (recipe.stem in ("canvas", "paper"))
        assert distillation.distill == (recipe.stem == "drafts")


def test_the_papers_columns_on_local_folders(model_folder, tmp_path, monkeypatch):
    """The paper recipe's sources, with its columns and weights, on folders of the same columns."""
    monkeypatch.setattr(tones, "NUM_ROWS", {"train": 3})
    recipe = yaml.safe_load((TRAINING / "configs" / "paper.yaml").read_text())
    sources = []
    for i, source in enumerate(recipe["train_sources"]):
        folder = tmp_path / f"source{i}"
        tones.main(folder)
        manifest = folder / "train" / "metadata.jsonl"
        column = source.get("text_column", "text")
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        manifest.write_text("\n".join(json.dumps({column: row.pop("text").upper(), **row}) for row in rows) + "\n")
        kept = {k: v for k, v in source.items() if k in ("weight", "text_column", "lowercase")}
        sources.append(json.dumps({"path": str(folder / "train"), **kept}))
    argv = arguments(model_folder, tmp_path, tmp_path)
    start = argv.index("--train_sources")
    results = run_train.main([*argv[: start + 1], *sources, *argv[start + 2 :]])
    assert results["train"]["train_loss"] > 0


def test_the_input_pipeline_can_be_measured_alone(model_folder, data, tmp_path):
    results = run_train.main(arguments(model_folder, data, tmp_path, "--benchmark_input", "3"))
    assert results["input_rows_per_s"] > 0 and results["input_audio_s_per_s"] > 0
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_rows_that_were_skipped_are_in_the_log_and_the_result(model_folder, data, tmp_path):
    """One of twelve is found when the source is read, and one when its audio is."""
    rows = [json.loads(line) for line in (data / "train" / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["file_name"] = str(data / "train" / row["file_name"])
        row["text"] = "" if i == 0 else row["text"]
    rows[1]["file_name"] = str(tmp_path / "bad.flac")
    (tmp_path / "bad.flac").write_bytes(b"no audio")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = arguments(model_folder, data, tmp_path, "--on_bad_row", "skip", "--num_train_epochs", "1")
    argv[argv.index("--train_sources") + 1] = str(tmp_path / "m.jsonl")
    argv[argv.index("--max_steps") + 1] = "-1"
    with pytest.raises(
        ValueError, match="1 of 12 rows of .*m.jsonl' cannot be used, more than 1 %: 1 like: .*line 1: e"
    ):
        run_train.main(argv)
    results = run_train.main([*argv, "--max_bad_share", "0.1"])
    assert [entry["rows_skipped"] for entry in results["log"] if "rows_skipped" in entry][-1] == 1
    assert results["train"]["train_rows_skipped"] == 2
    assert "1 of 11 rows skipped: 1 unreadable audio. Left out of the sources before: 1 empty" in results["skipped"]
    # Nothing but bad audio, whose duration is told.
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match="Nothing was learnt: 1 of 1 rows skipped: .*bad.flac"):
        run_train.main(argv)


def test_clear_errors(model_folder, data, tmp_path):
    source = json.dumps({"path": str(data / "train"), "text_column": "transcript"})
    argv = arguments(model_folder, data, tmp_path)
    argv[argv.index("--train_sources") + 1] = source
    with pytest.raises(ValueError, match="'transcript' is not in .*'duration_s', 'file_name', 'text'"):
        run_train.main(argv)
    with pytest.raises(ValueError, match="`train_sources` is empty"):
        run_train.main(["--output_dir", str(tmp_path / "out")])
    frozen = ["--freeze_encoder", "true", "--encoder_learning_rate", "1e-4"]
    with pytest.raises(ValueError, match="`encoder_learning_rate=0.0001` has no effect with `freeze_encoder`"):
        run_train.main(arguments(model_folder, data, tmp_path, *frozen))
