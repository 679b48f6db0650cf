# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What a donor makes of clips, and the stages that learn it."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tables import each
from tiny_data import save_model
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq

from mdm_asr_hf.train import donor_cache
from mdm_asr_hf.train.clips import SpeechClips
from mdm_asr_hf.train.distillation import STAGES, add_silence, measure, set_short_list, train_stage
from mdm_asr_hf.train.donor_cache import CachedSpeech, DistillationCollator, recode_cache, write_cache

RATE, EOS = 16_000, 1


def short_model(**settings):
    model = tiny_drafts_model(dtype=torch.float32, **settings)
    model.generation_config.max_new_tokens = 30
    return model


@pytest.fixture
def speech(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        soundfile.write(tmp_path / f"{i:02d}.wav", 0.1 * rng.standard_normal(RATE + 400 * i), RATE)
    return tmp_path


@pytest.fixture
def cache(speech, tmp_path, monkeypatch):
    """Random models loop, as no donor that has learnt does."""
    monkeypatch.setattr(donor_cache, "_why_not", lambda *text: None)
    write_cache(short_model(), tiny_processor(), SpeechClips(speech), tmp_path / "cache")
    return CachedSpeech(tmp_path / "cache")


def fabricate(folder, model, texts, seconds=(1.0, 0.6, 0.35), times=4):
    """A cache of the clips of `tiny_inputs` with texts of our own."""
    features, mask = tiny_inputs(seconds=seconds)
    with torch.no_grad():
        encoded = model.encode(features, mask)
    rows = []
    for i, text in enumerate(texts * times):
        i %= len(texts)
        ids = torch.tensor([*text, EOS], dtype=torch.int32)
        certain = torch.stack([ids, (ids + 1) % VOCAB_SIZE], dim=-1)
        rows.append(
            {
                "seconds": seconds[i],
                "features": features[i, : int(mask[i].sum())].half(),
                "frames": encoded.last_hidden_state[i, : int(encoded.attention_mask[i].sum())].half(),
                "text": ids,
                "prompt": torch.tensor([VOCAB_SIZE], dtype=torch.int32),
                "token_ids": certain,
                "log_probs": torch.tensor([0.9, 0.05]).log().expand(len(ids), 2).half(),
            }
        )
    folder.mkdir(parents=True)
    donor_cache.write_block(folder / "block-00000.safetensors", rows, Counter())
    return CachedSpeech(folder)


TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15]]


# ---- The cache ----


def test_a_cache_holds_what_the_donor_makes_of_each_clip(cache, speech):
    model, processor = short_model(), tiny_processor()
    clips = SpeechClips(speech)
    plan = clips.plan(0)
    assert len(cache) == len(plan) - sum(cache.left_out.values()) > 0
    longest = max(plan, key=lambda clip: len(clips.read(clip, RATE)))
    assert cache.durations_s.max() == pytest.approx(len(clips.read(longest, RATE)) / RATE)
    row = cache[int(cache.durations_s.argmax())]
    inputs = processor(clips.read(longest, RATE), sampling_rate=RATE)
    with torch.no_grad():
        encoded = model.encode(**inputs)
        text = model.generate(**inputs, temperature=0.0)[0]
        ids = torch.cat([torch.tensor([VOCAB_SIZE]), text[:-1]])[None]
        log_probs = model(decoder_input_ids=ids, encoder_outputs=encoded).logits[0].log_softmax(dim=-1)
    torch.testing.assert_close(row["frames"].float(), encoded.last_hidden_state[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(row["features"].float(), inputs["input_features"][0], atol=1e-3, rtol=1e-3)
    assert row["text"].tolist() == text.tolist() and row["prompt"].tolist() == [VOCAB_SIZE]
    best, places = log_probs.topk(row["token_ids"].shape[1])
    assert (places == row["token_ids"]).float().mean() > 0.99
    torch.testing.assert_close(row["log_probs"].float(), best, atol=1e-2, rtol=1e-2)

    other = short_model(decoder_config={"vocab_size": VOCAB_SIZE, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="was made otherwise .donor"):
        write_cache(other, tiny_processor(), SpeechClips(speech), cache.folder)
    with pytest.raises(ValueError, match="was made otherwise .source"):
        write_cache(short_model(), tiny_processor(), SpeechClips(speech, seed=1), cache.folder)


def test_a_cache_goes_on_where_it_stopped_and_grows_with_its_source(speech, tmp_path, monkeypatch):
    monkeypatch.setattr("mdm_asr_hf.train.clips.BLOCK_S", 4.0)
    monkeypatch.setattr(donor_cache, "_why_not", lambda *text: None)
    model, said, folder = short_model(), [], tmp_path / "cache"
    write_cache(model, tiny_processor(), SpeechClips(speech), folder, report=said.append)
    blocks = {path.name: path.read_bytes() for path in folder.glob("block-*")}
    assert len(said) == len(blocks) >= 3 and said[0].startswith(f"block 1 of {len(blocks)}:")
    # A block that was begun does not bear its name, and is done anew.
    last = max(blocks)
    (folder / last).rename((folder / last).with_suffix(".part"))
    write_cache(model, tiny_processor(), SpeechClips(speech), folder, report=said.append)
    assert len(said) == len(blocks) + 1
    assert {path.name: path.read_bytes() for path in folder.glob("block-*.safetensors")} == blocks
    # The work of two processes is that of one.
    other = tmp_path / "other"
    for index in (1, 0):
        state = SimpleNamespace(process_index=index, num_processes=2)
        monkeypatch.setattr(donor_cache, "PartialState", lambda state=state: state)
        write_cache(model, tiny_processor(), SpeechClips(speech), other)
    assert {path.name: path.read_bytes() for path in other.glob("block-*")} == blocks


def test_what_nothing_can_be_learnt_from_is_left_out_and_counted(speech, tmp_path, monkeypatch):
    model, said = short_model(), []
    monkeypatch.setattr(donor_cache, "is_suspicious", lambda ids: True)
    write_cache(model, tiny_processor(), SpeechClips(speech), tmp_path / "loops", report=said.append)
    assert "whose text loops" in said[-1]
    with pytest.raises(ValueError, match="No clip in .* can be learnt from: .*loops.*Nothing was trained"):
        CachedSpeech(tmp_path / "loops")
    with pytest.raises(ValueError, match="holds no cache"):
        CachedSpeech(tmp_path)
    for path in speech.glob("*.wav"):
        soundfile.write(path, np.zeros(RATE), RATE)
    write_cache(model, tiny_processor(), SpeechClips(speech), tmp_path / "silent", report=said.append)
    assert f"{len(SpeechClips(speech).plan(0))} without speech" in said[-1]


def test_recordings_that_cannot_be_read_stop_it_with_their_causes(speech, tmp_path, monkeypatch):
    paths = sorted(speech.glob("*.wav"))
    manifest = speech / "speech.jsonl"
    manifest.write_text("".join(json.dumps({"audio": path.name, "duration": 1.0}) + "\n" for path in paths))
    clips = SpeechClips(manifest)
    for path in paths[::2]:
        path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"\d of \d+ rows of .* cannot be used, more than 5 %: .*wav.*Mend or remove"):
        write_cache(short_model(), tiny_processor(), clips, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("block-*"))
    said = []
    monkeypatch.setattr("mdm_asr_hf.train.clips.MOST_UNREADABLE", 1.0)
    write_cache(short_model(), tiny_processor(), clips, tmp_path / "cache", report=said.append)
    assert re.search(r"[1-9] unreadable.* \([1-9] like: '.*wav' is not audio", said[-1])
    monkeypatch.undo()
    # Their headers are read, where nothing tells how long they are.
    with pytest.raises(ValueError, match="6 of 12 rows of .* cannot be used, more than 5 %: 6 like: .*00.wav"):
        SpeechClips(speech)


def test_a_full_disk_keeps_what_is_whole(cache, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(donor_cache, "save_file", full)
    with pytest.raises(ValueError, match="Free some space"):
        recode_cache(short_model(), cache, tmp_path / "frames")
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["cache.json"]


def test_another_encoder_gives_its_own_frames_and_texts(cache, tmp_path):
    model = short_model()
    model.config.encoder_trailing_silence_s = 0.1
    recode_cache(model, cache, tmp_path / "frames")
    frames = CachedSpeech(tmp_path / "frames")
    assert "features" not in frames[0] and frames[0]["prompt"].tolist() == [VOCAB_SIZE]
    row = cache[0]
    with torch.no_grad():
        expected = model.encode(row["features"].float()[None]).last_hidden_state[0]
    same = [one for one in map(frames.__getitem__, range(len(frames))) if len(one["frames"]) == len(expected)]
    assert any(torch.allclose(one["frames"].float(), expected, atol=2e-2) for one in same)


@each(
    ("num_tokens", "seconds", "why"),
    [(1, 3.0, "without speech"), (12, 3.0, None), (60, 3.0, "whose text loops"), (9, 10.0, "whose text has gaps")],
)
def test_why_a_clip_is_left_out(num_tokens, seconds, why):
    text = torch.tensor([*range(2, num_tokens + 1), EOS])
    assert donor_cache._why_not(text, seconds, EOS) == why
    # Without its end a text has no end.
    assert donor_cache._why_not(torch.tensor([5, 6, 7]), 3.0, EOS) == "whose text loops"


# ---- Batches ----


def test_batches_hold_the_audio_and_its_teacher(tmp_path):
    model = tiny_drafts_model(dtype=torch.float32)
    cache = fabricate(tmp_path / "cache", model, TEXTS, times=1)
    rows = [cache[0], cache[2]]
    batch = DistillationCollator("encoder")(rows)
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9, 10, EOS], [14, 15, EOS, -100, -100, -100, -100]]
    assert batch["attention_mask"].sum(dim=-1).tolist() == [100, 35]
    teacher = batch["teacher"]
    # Half as many frames, none of the silence behind them.
    assert teacher.num_frames.tolist() == [50, 17] and teacher.frames.shape[1] == 50
    frames = DistillationCollator("decoder")(rows)
    assert frames["encoder_outputs"].attention_mask.sum(dim=-1).tolist() == [len(row["frames"]) for row in rows]
    assert "teacher" not in frames and "input_features" not in frames


# ---- The stages ----


def stage_arguments(**settings):
    return {"use_cpu": True, "bf16": False, "warmup_steps": 1, "save_steps": 4, **settings}


@each("name", list(STAGES))
def test_a_stage_learns_its_part_and_leaves_the_rest(name, tmp_path):
    model = tiny_drafts_model(dtype=torch.float32)
    if name == "encoder":
        add_silence(model, 0.3)
    texts = TEXTS if name == "encoder" else [[5, 6, 7], [11, 12], [14]]
    cache = fabricate(tmp_path / "cache", model, texts)
    before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    said = []
    found = train_stage(
        name,
        model,
        [cache],
        [cache[i] for i in range(3)],
        tmp_path / "out",
        report=said.append,
        **stage_arguments(max_steps=20, learning_rate=3e-3, logging_steps=5, save_strategy="no"),
    )
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    mine = {
        "encoder": ("model.encoder.silence_embeddings",),
        "drafts": ("model.decoder.drafts.", "model.decoder.input_only_embeddings"),
    }[name]
    assert (
        changed and all(n.startswith(mine) for n in changed) and "model.encoder.embed_positions.weight" not in changed
    )
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    # A random encoder hardly hears its silence.
    assert losses[-1] < (1.0 if name == "encoder" else 0.8) * losses[0]
    parts = {"encoder": {"frames", "logits"}, "drafts": {"drafts"}}[name]
    assert {key for entry in found["log"] for key in entry if key.startswith("loss_")} == {f"loss_{p}" for p in parts}
    assert said[0].startswith(f"{name} 0 of 20: tokens per evaluation") and "clips/s" in said[-1]
    assert [one["step"] for one in found["held_out"]] == [0, 20]


def test_a_stage_that_was_killed_takes_the_same_course(tmp_path, monkeypatch):
    monkeypatch.setattr("mdm_asr_hf.train.distillation.MEASURE_EVERY_S", -1.0)

    def train(folder, steps=6, **settings):
        model = tiny_drafts_model(dtype=torch.float32)
        add_silence(model, 0.3)
        folder_of_cache = tmp_path / f"cache-{folder}"
        cache = CachedSpeech(folder_of_cache) if folder_of_cache.exists() else fabricate(folder_of_cache, model, TEXTS)
        arguments = stage_arguments(max_steps=6, save_strategy="steps", max_seconds_per_batch=2.0, **settings)
        rows = [cache[0]]
        if steps < 6:
            # As if it were killed: at the end of a step that a checkpoint was written at.
            with pytest.raises(KeyboardInterrupt):
                train_stage("encoder", model, [cache], rows, tmp_path / folder, report=Stop(steps), **arguments)
            return None
        train_stage("encoder", model, [cache], rows, tmp_path / folder, report=lambda line: None, **arguments)
        return model.state_dict()

    whole = train("whole")
    train("killed", steps=5)
    resumed = train("killed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


class Stop:
    """Interrupts a training when it reports a step: progress is measured at every one."""

    def __init__(self, at):
        self.at = at

    def __call__(self, line):
        if line.startswith(f"encoder {self.at} "):
            raise KeyboardInterrupt


def test_what_is_measured_is_what_decoding_gives(tmp_path):
    model = tiny_drafts_model(dtype=torch.float32)
    features, mask = tiny_inputs()
    output = model.generate(features, attention_mask=mask, return_dict_in_generate=True)
    lengths = (output.commit_steps > 0).sum(dim=-1)
    texts = [row[: n - 1].tolist() for row, n in zip(output.sequences, lengths, strict=True)]
    cache = fabricate(tmp_path / "cache", model, texts, times=1)
    found = measure(model, [cache[i] for i in range(3)])
    assert found["tokens_per_evaluation"] == pytest.approx(float(lengths.sum() / output.nfe.sum()), rel=0.05)
    assert found["token_agreement"] > 0.95
    # One token of another text is one error.
    wrong = [[3, *texts[0][1:]], *texts[1:]]
    cache = fabricate(tmp_path / "wrong", model, wrong, times=1)
    worse = measure(model, [cache[i] for i in range(3)])
    assert worse["token_agreement"] == pytest.approx(found["token_agreement"] - 1 / float(lengths.sum()), abs=1e-6)

    model = tiny_model(decoder_config={"draft_layers": 1, "draft_vocab_size": 6})
    set_short_list(model, [[5, 5, 5, 9, EOS], [9, 7, EOS]])
    assert model.draft_token_ids.tolist() == [0, 1, 2, 5, 7, 9]


# ---- The command ----


@pytest.fixture
def donor(tmp_path, monkeypatch):
    monkeypatch.setattr(donor_cache, "_why_not", lambda *text: None)
    return save_model(tmp_path / "donor", short_model(), tiny_processor())


def run_training(run_command, donor, speech, output, *more, steps=2):
    numbers = ("--encoder-steps", steps, "--draft-steps", steps)
    return run_command("train-drafts", donor, speech, "--output", output, *numbers, "--silence", 0.1, *more)


def test_train_drafts_makes_a_model_of_audio_alone(run_command, donor, speech, tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    for path in speech.glob("*.wav"):
        path.rename(folder / path.name)
    source = json.dumps({"path": str(folder), "passes": 2})
    code, out, err = run_training(run_command, donor, source, tmp_path / "out")
    assert code == 0, err
    said = out.splitlines()
    for stage in STAGES:
        assert sum(line.startswith(f"{stage} 2 of 2: tokens per evaluation") for line in said) == 1
    assert re.fullmatch(r"wrote .*out: \d\.\d\d tokens an evaluation on speech that was held out", said[-1])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert model.config.encoder_trailing_silence_s == 0.1 and model.config.encoder_min_duration_s == 0.0
    assert model.config.decoder_config.draft_start and not model.config.decoder_config.draft_hints
    before = short_model().state_dict()
    trained = model.state_dict()
    assert trained.pop("model.encoder.silence_embeddings").abs().sum() > 0
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    # Of the donor's own weights none, and so every text behind a long silence stays.
    mine = ("model.decoder.drafts.", "model.decoder.input_only_embeddings")
    assert changed and all(name.startswith(mine) for name in changed)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["stages"]) == list(STAGES)
    assert results["sources"][0]["clips"] > 0 and results["sources"][0]["left_out"] == {}
    assert any(line.startswith(f"{folder}: {results['sources'][0]['clips']} clips, 0.0 hours") for line in said)
    # What is done is not done again, and gives the same model.
    code, out, _ = run_training(run_command, donor, source, tmp_path / "out")
    assert code == 0 and not any("of 2:" in line for line in out.splitlines())
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_trained_is_one_line(run_command, donor, speech, tmp_path):
    save_model(tmp_path / "canvas", tiny_model(), tiny_processor())
    for model, audio, steps, said in (
        (donor, speech, 0, "are both 0. Nothing would be trained"),
        (donor, tmp_path / "nowhere", 2, "nowhere"),
        (tmp_path / "canvas", speech, 2, "is a canvas, which has no drafts"),
    ):
        code, _, err = run_training(run_command, model, audio, tmp_path / "out", steps=steps)
        last = err.splitlines()[-1]
        assert code == 1 and said in last and last.startswith("error: cannot train drafts")
