import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tables import each
from tiny_models import PARAKEET_ENCODER, tiny_config, tiny_drafts_model, tiny_inputs, tiny_model
from transformers import AutoConfig

from mdm_asr_hf import (
    MDMASRConfig,
    MDMASRDecoderConfig,
    MDMASRForConditionalGeneration,
    MDMASRGenerationConfig,
    PBEBConfSampler,
)

TEMPLATE = {
    "tokens": [7, "language", "target_language", "punctuation", 9],
    "slots": {
        "language": {"en": 62, "de": 71},
        "target_language": {"en": 62, "de": 71},
        "punctuation": {"true": 5, "false": 6},
    },
    "defaults": {"language": "en", "target_language": "@language", "punctuation": "true"},
}


def test_round_trip(tmp_path):
    config = tiny_config("parakeet")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MDMASRConfig) and loaded.model_type == "mdm_asr"
    assert loaded.decoder_config.to_dict() == config.decoder_config.to_dict()
    assert loaded.encoder_config.to_dict() == config.encoder_config.to_dict()
    assert loaded.mask_token_id == 61 and loaded.num_token_ids == 62 and loaded.vocab_size == 60

    config = MDMASRConfig(decoder_config=MDMASRDecoderConfig(vocab_size=100, num_input_only_tokens=3))
    assert config.mask_token_id == 102
    assert config.encoder_config.model_type == "parakeet_encoder"

    assert not tiny_config().has_drafts and not tiny_config().decoder_config.is_causal
    config = tiny_config(decoder_config=dict(draft_layers=1, draft_length=3))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.has_drafts and loaded.decoder_config.is_causal
    # All ids can be drafted where no short list is asked for.
    assert loaded.decoder_config.draft_vocab_size == 60 and loaded.decoder_config.draft_length == 3


DRAFTS = dict(draft_layers=2, max_position_embeddings=40)


@each(
    "settings, message",
    [
        (dict(mask_token_id=5), "`mask_token_id` .5. must be an input-only id"),
        (dict(mask_token_id=62), "`mask_token_id`"),
        (dict(eos_token_id=60), "`eos_token_id` .60. must be a predictable id"),
        (dict(pad_token_id=99), "`pad_token_id`"),
        (dict(decoder_start_token_id=61), "`decoder_start_token_id`"),
        (dict(encoder_trailing_silence_s=-1), "`encoder_trailing_silence_s`"),
        (dict(input_frames_per_s=0), "`input_frames_per_s`"),
        (dict(is_encoder_decoder=False), "`is_encoder_decoder=False`"),
        (dict(decoder_config=dict(position_embedding_type="rotary")), "`position_embedding_type`"),
        (dict(decoder_config=dict(num_input_only_tokens=0)), "`num_input_only_tokens`"),
        (dict(decoder_config=dict(num_attention_heads=3, num_key_value_heads=2)), "`num_attention_heads`"),
        (dict(decoder_config=dict(num_attention_heads=0)), "`num_attention_heads`"),
        (dict(decoder_config=dict(hidden_size="16")), "`hidden_size`"),
        (dict(decoder_config=dict(hidden_size=15, head_dim=8)), "even `hidden_size`"),
        (dict(decoder_config=dict(dropout=1.0)), "`dropout`"),
        (dict(decoder_config=dict(draft_layers=9)), "`draft_layers` .9. .* `num_hidden_layers` .8."),
        (dict(decoder_config=dict(draft_layers=-1)), "`draft_layers`"),
        (dict(decoder_config=dict(draft_layers=True)), "`draft_layers`"),
        (dict(decoder_config=DRAFTS | dict(draft_length=0)), "`draft_length` .0. must be an integer from 1 to 38"),
        (dict(decoder_config=DRAFTS | dict(draft_length=39)), "`draft_length` .39. must be an integer from 1 to 38"),
        (dict(decoder_config=DRAFTS | dict(draft_vocab_size=61)), "`draft_vocab_size` .61. .* `vocab_size` .60."),
        (dict(decoder_config=DRAFTS | dict(draft_vocab_size=0)), "`draft_vocab_size`"),
        (dict(decoder_config=DRAFTS, mask_token_id=60, decoder_start_token_id=61), "`mask_token_id` .60. .* last id"),
    ],
)
def test_contradictory_settings_raise(settings, message):
    base = dict(encoder_config=PARAKEET_ENCODER, eos_token_id=1, pad_token_id=2, decoder_start_token_id=60)
    decoder = dict(vocab_size=60, num_input_only_tokens=2, hidden_size=16, num_attention_heads=2)
    settings = base | settings | {"decoder_config": decoder | settings.get("decoder_config", {})}
    with pytest.raises(ValueError, match=message) as error:
        MDMASRConfig(**settings)
    assert "\n" not in str(error.value)


def test_a_short_list_that_cannot_work_is_refused_on_loading(tmp_path):
    model = tiny_drafts_model(decoder_config=dict(draft_vocab_size=20))
    token_ids = model.get_decoder().drafts.head.token_ids
    model.save_pretrained(tmp_path / "sound")
    assert MDMASRForConditionalGeneration.from_pretrained(tmp_path / "sound").config.has_drafts
    for name, wrong, message in (
        ("no-end", torch.arange(20, 40), "short list of 20 ids .* lacks the end of text .1."),
        ("outside", torch.tensor([*range(1, 20), 60]), "ids beyond the vocabulary .60."),
    ):
        token_ids.copy_(wrong)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            MDMASRForConditionalGeneration.from_pretrained(tmp_path / name)


# Of version 0.1: names that its files have and this one's do not, and the other way round.
NEW_DECODER = ("draft_layers", "draft_length", "draft_vocab_size", "draft_state_scale", "draft_embedding_scale")
NEW_CONFIG = ("encoder_min_duration_s",)
OLD_GENERATION = {
    "_from_model_config": False,
    "active_ahead": 8,
    "active_behind": 0,
    "canvas_tokens_per_s": 7.0,
    "commit_ahead": 4,
    "confidence_bias": -1.049,
    "confidence_context": {"mean": 0.442, "pace": 0.563},
    "confidence_temperature": 1.194,
    "eos_token_id": 1,
    "max_denoising_steps": 128,
    "max_window_s": 7.0,
    "no_speech": {"bias": 2.0, "weights": [0.1]},
    "repair_rounds": 0,
    "sampler": {"gamma": 0.05, "lambda_": None, "name": "pbeb_conf"},
    "temperature": 0.0,
}


def test_a_checkpoint_of_version_0_1_is_a_canvas_and_says_so_in_one_line(tmp_path, caplog):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in NEW_CONFIG:
        del stored[name]
    for name in NEW_DECODER:
        del stored["decoder_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "generation_config.json").write_text(json.dumps(OLD_GENERATION))
    loaded = MDMASRForConditionalGeneration.from_pretrained(tmp_path)
    (record,) = [one for one in caplog.records if one.name.startswith("mdm_asr_hf")]
    assert "version 0.1" in record.message and "active_ahead" in record.message and "\n" not in record.message
    assert not loaded.config.has_drafts and loaded.generation_config.max_denoising_steps == 128
    features, mask = tiny_inputs()
    own = dict(sampler=OLD_GENERATION["sampler"], max_denoising_steps=128)
    assert torch.equal(loaded.generate(features, mask), model.generate(features, mask, **own))


def test_a_folder_with_a_ctc_head_loads_without_it(tmp_path, caplog):
    model = tiny_drafts_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = {"ctc_characters": " ab", "ctc_hidden_size": 16, "ctc_layers": 1, "ctc_attention_heads": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"draft_branches": ["masks", "first_draft"]}))
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"ctc_head.output.weight": torch.zeros(4, 16)}, path, {"format": "pt"})
    loaded, report = MDMASRForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not caplog.records
    assert not any("ctc" in name for name in loaded.config.to_dict())
    assert loaded.generation_config.draft_branches == ["masks", "hypothesis"]
    features, mask = tiny_inputs()
    assert torch.equal(loaded.generate(features, mask), model.generate(features, mask))


# --- generation config ---


def test_generation_config_round_trip_and_the_papers_defaults(tmp_path):
    config = MDMASRGenerationConfig()
    assert config.sampler_config == PBEBConfSampler(gamma=0.05, lambda_=0.2)
    assert config.max_denoising_steps == 32 and config.temperature == 0 and config.canvas_length is None
    # What the stock pipeline and Seq2SeqTrainer read.
    assert config.num_beams == 1 and config.max_length is not None

    config = MDMASRGenerationConfig(
        sampler=PBEBConfSampler(gamma=0.3, lambda_=0.1),
        max_denoising_steps=8,
        canvas_length=64,
        temperature=0.5,
        suppress_tokens=[3],
        prompt_template=TEMPLATE,
        max_length=100,
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored["sampler"] == {"name": "pbeb_conf", "gamma": 0.3, "lambda_": 0.1}
    loaded = MDMASRGenerationConfig.from_pretrained(tmp_path)
    assert loaded.sampler_config == PBEBConfSampler(gamma=0.3, lambda_=0.1)
    for name in (
        "max_denoising_steps",
        "canvas_length",
        "temperature",
        "suppress_tokens",
        "prompt_template",
        "max_length",
    ):
        assert getattr(loaded, name) == getattr(config, name)


@each(
    "settings, message",
    [
        (dict(gama=0.1), "gama"),
        (dict(sampler="beam"), "`sampler`"),
        (dict(sampler={"name": "random", "gamma": 1.0}), "gamma"),
        (dict(max_denoising_steps=0), "`max_denoising_steps`"),
        (dict(canvas_length=-1), "`canvas_length`"),
        (dict(temperature=-0.1), "`temperature`"),
        (dict(temperature=float("nan")), "`temperature`"),
        (dict(prompt_template={"tokens": ["language"]}), "language"),
        (dict(prompt_template={"tokens": []}), "`prompt_template`"),
        (dict(temperature=[]), "`temperature` is an empty list"),
        (dict(temperature=[0.0, -0.2]), "`temperature`"),
        (dict(draft_branches=["mask"]), "`draft_branches`"),
        (dict(draft_branches="masks"), "`draft_branches`"),
        (dict(draft_length=0), "`draft_length`"),
        (dict(no_speech_threshold="0.6"), "`no_speech_threshold`"),
        (dict(logprob_threshold=True), "`logprob_threshold`"),
        (dict(compression_ratio_threshold=[1.3]), "`compression_ratio_threshold`"),
    ],
)
def test_generation_settings_that_make_no_sense_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        MDMASRGenerationConfig(**settings)
