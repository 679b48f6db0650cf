import json

import pytest
from tiny_models import PARAKEET_ENCODER, tiny_config
from transformers import AutoConfig

from mdm_asr_hf import MDMASRConfig, MDMASRDecoderConfig, MDMASRGenerationConfig, PBEBConfConfig
from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids

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


def test_the_mask_is_the_last_input_only_id_by_default():
    config = MDMASRConfig(decoder_config=MDMASRDecoderConfig(vocab_size=100, num_input_only_tokens=3))
    assert config.mask_token_id == 102
    assert config.encoder_config.model_type == "parakeet_encoder"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mask_token_id=5), "`mask_token_id` .5. must be an input-only id"),
        (dict(mask_token_id=62), "`mask_token_id`"),
        (dict(eos_token_id=60), "`eos_token_id` .60. must be a predictable id"),
        (dict(pad_token_id=99), "`pad_token_id`"),
        (dict(decoder_start_token_id=61), "`decoder_start_token_id`"),
        (dict(encoder_trailing_silence_s=-1), "`encoder_trailing_silence_s`"),
        (dict(input_frames_per_s=0), "`input_frames_per_s`"),
        (dict(tie_word_embeddings=False), "`tie_word_embeddings=False`"),
        (dict(is_encoder_decoder=False), "`is_encoder_decoder=False`"),
        (dict(decoder_config=dict(position_embedding_type="rotary")), "`position_embedding_type`"),
        (dict(decoder_config=dict(num_input_only_tokens=0)), "`num_input_only_tokens`"),
        (dict(decoder_config=dict(num_attention_heads=3, num_key_value_heads=2)), "`num_attention_heads`"),
        (dict(decoder_config=dict(num_attention_heads=0)), "`num_attention_heads`"),
        (dict(decoder_config=dict(hidden_size="16")), "`hidden_size`"),
        (dict(decoder_config=dict(hidden_size=15, head_dim=8)), "even `hidden_size`"),
        (dict(decoder_config=dict(dropout=1.0)), "`dropout`"),
        (dict(decoder_config=dict(tie_word_embeddings=False)), "`tie_word_embeddings=False`"),
    ],
)
def test_contradictory_settings_raise(settings, message):
    base = dict(encoder_config=PARAKEET_ENCODER, eos_token_id=1, pad_token_id=2, decoder_start_token_id=60)
    decoder = dict(vocab_size=60, num_input_only_tokens=2, hidden_size=16, num_attention_heads=2)
    settings = base | settings | {"decoder_config": decoder | settings.get("decoder_config", {})}
    with pytest.raises(ValueError, match=message):
        MDMASRConfig(**settings)


# --- generation config ---


def test_generation_config_round_trip(tmp_path):
    config = MDMASRGenerationConfig(
        sampler=PBEBConfConfig(gamma=0.3, lambda_=0.1),
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
    assert loaded.sampler_config == PBEBConfConfig(gamma=0.3, lambda_=0.1)
    for name in (
        "max_denoising_steps",
        "canvas_length",
        "temperature",
        "suppress_tokens",
        "prompt_template",
        "max_length",
    ):
        assert getattr(loaded, name) == getattr(config, name)


def test_generation_defaults_are_the_papers():
    config = MDMASRGenerationConfig()
    assert config.sampler_config == PBEBConfConfig(gamma=0.05, lambda_=0.2)
    assert config.max_denoising_steps == 32 and config.temperature == 0 and config.canvas_length is None
    # What the stock pipeline and Seq2SeqTrainer read.
    assert config.num_beams == 1 and config.max_length is not None


@pytest.mark.parametrize(
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
    ],
)
def test_generation_settings_that_make_no_sense_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        MDMASRGenerationConfig(**settings)


# --- prompts ---


def test_prompts():
    assert build_prompt_ids(TEMPLATE).tolist() == [[7, 62, 62, 5, 9]]
    assert build_prompt_ids(TEMPLATE, language="de").tolist() == [[7, 71, 71, 5, 9]]
    assert build_prompt_ids(TEMPLATE, language="<|de|>", target_language="EN", punctuation=False).tolist() == [
        [7, 71, 62, 6, 9]
    ]
    assert build_prompt_ids(TEMPLATE, 2, language=["de", "en"]).tolist() == [[7, 71, 71, 5, 9], [7, 62, 62, 5, 9]]
    assert build_prompt_ids({"tokens": [4, 5]}, 2, language=None).tolist() == [[4, 5], [4, 5]]


@pytest.mark.parametrize(
    "slots, message",
    [
        (dict(language="fr"), "`language='fr'` is not known.*'de', 'en'"),
        (dict(language=["de"]), "`language` has 1 values for a batch of 2"),
        (dict(task="translate"), "`task='translate'` has no place"),
    ],
)
def test_unknown_prompt_values_raise(slots, message):
    with pytest.raises(ValueError, match=message):
        build_prompt_ids(TEMPLATE, 2, **slots)


def test_a_fixed_prompt_takes_no_language():
    with pytest.raises(ValueError, match="which is fixed"):
        build_prompt_ids({"tokens": [4]}, language="en")
