# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The aggregate tokenizer against the SentencePiece models it is made of."""

import json

import numpy as np
import pytest
import sentencepiece
import torch
from tiny_sentencepiece import ENGLISH, GERMAN, SPECIAL_TOKENS, train
from transformers import AddedToken, AutoTokenizer

from mdm_asr_hf.tokenization_mdm_asr import MDMASRAggregateTokenizer


def load(serialised):
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(serialised)
    return model


@pytest.fixture(scope="module")
def models():
    return {
        "spl_tokens": train([" ".join(SPECIAL_TOKENS)], len(SPECIAL_TOKENS) + 2, SPECIAL_TOKENS),
        "en": train(ENGLISH, 40),
        "de": train(GERMAN, 44),
    }


@pytest.fixture
def tokenizer(models):
    return MDMASRAggregateTokenizer(models=models)


def test_ids_follow_the_models(models, tokenizer):
    sizes = {name: load(model).get_piece_size() for name, model in models.items()}
    # Special tokens first: <unk>, the six above and "▁", that is eight.
    assert sizes["spl_tokens"] == 8
    assert tokenizer.token_offsets == {"spl_tokens": 0, "en": 8, "de": 8 + sizes["en"]}
    assert tokenizer.vocab_size == len(tokenizer) == sum(sizes.values())
    assert tokenizer.languages == ["en", "de"]

    reordered = MDMASRAggregateTokenizer(models={name: models[name] for name in ("spl_tokens", "de", "en")})
    assert reordered.token_offsets == {"spl_tokens": 0, "de": 8, "en": 8 + sizes["de"]}

    # SentencePiece puts <unk> at 0 and user-defined symbols after it, in their order.
    assert tokenizer.unk_token_id == 0
    assert tokenizer.pad_token_id == 2
    assert tokenizer.eos_token_id == 3
    assert tokenizer.bos_token_id == 4
    assert tokenizer.convert_tokens_to_ids(["<|en|>", "<|de|>"]) == [5, 6]

    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    ids = list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    # Both languages know "▁d": one piece, two ids.
    assert vocab["en:▁d"] != vocab["de:▁d"]


def test_each_language_has_its_model(models, tokenizer):
    for language, text in [("en", "the cat and the dog"), ("de", "der hund und die maus")]:
        expected = [tokenizer.token_offsets[language] + index for index in load(models[language]).encode(text)]
        assert tokenizer(text, language=language).input_ids == expected
        assert tokenizer.decode(expected) == text
        assert tokenizer.decode(torch.tensor(expected)) == text
        assert tokenizer.decode(np.array(expected)) == text

    assert tokenizer.language == "en"
    english, german = (tokenizer("sun", language=language).input_ids for language in ("en", "de"))
    assert english != german
    assert tokenizer("sun").input_ids == english
    assert tokenizer(["sun", "sun", ""], language=["de", "en", "de"]).input_ids == [german, english, []]
    assert tokenizer(text_target="sun", language="de").input_ids == german
    tokenizer.set_language("de")
    assert tokenizer("sun").input_ids == german
    assert MDMASRAggregateTokenizer(models=models, language="de")("sun").input_ids == german
    with pytest.raises(ValueError, match="'xx'.*en.*de"):
        tokenizer("sun", language="xx")
    with pytest.raises(ValueError, match="2 languages"):
        tokenizer(["sun"], language=["de", "en"])

    regional = {"spl_tokens": models["spl_tokens"], "en-US": models["en"], "de-DE": models["de"]}
    tokenizer = MDMASRAggregateTokenizer(models=regional)
    assert tokenizer.language == "en-US"
    assert tokenizer("katze", language="de").input_ids == tokenizer("katze", language="de-DE").input_ids


def test_decoding_skips_mixes_and_pads(tokenizer):
    batch = tokenizer(["the cat", "the cat sat on the mat"], padding=True, return_tensors="pt")
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert set(batch.input_ids[0][batch.attention_mask[0] == 0].tolist()) == {tokenizer.pad_token_id}
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == ["the cat", "the cat sat on the mat"]

    prompt = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|de|>"])
    ids = prompt + tokenizer("hund", language="de").input_ids + [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids) == "<|startoftranscript|><|de|> hund<|endoftext|><pad>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hund"
    unknown = tokenizer("hund Ж", language="de").input_ids
    assert unknown[-1] == tokenizer.token_offsets["de"]  # the German model's own <unk>
    assert tokenizer.decode(unknown, skip_special_tokens=True) == "hund"

    ids = tokenizer("the hund", language="en").input_ids + tokenizer("katze", language="de").input_ids
    assert tokenizer.decode(ids) == "the hund katze"

    size = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<|mask|>", special=True)})
    assert tokenizer.mask_token_id == size and tokenizer.vocab_size == size
    ids = tokenizer("the cat<|mask|>").input_ids
    assert ids[-1] == size
    assert tokenizer.decode(ids) == "the cat<|mask|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat"


def test_save_and_load(tmp_path, tokenizer, models):
    for loader in [MDMASRAggregateTokenizer, AutoTokenizer]:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        tokenizer.set_language("de")
        tokenizer.save_pretrained(tmp_path)
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is MDMASRAggregateTokenizer
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.token_offsets == tokenizer.token_offsets
        assert loaded.language == "de" and loaded.mask_token_id == len(tokenizer) - 1
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        for language, text in (("en", "the cat on the mat"), ("de", "katze und hund")):
            assert loaded(text, language=language).input_ids == tokenizer(text, language=language).input_ids
        # A second round trip changes nothing.
        loaded.save_pretrained(tmp_path / "again")
        for name in ("aggregate_vocab.json", "tokenizer_config.json"):
            first, second = (json.loads((folder / name).read_text()) for folder in (tmp_path, tmp_path / "again"))
            for config in (first, second):
                config.pop("is_local", None)
                config.pop("local_files_only", None)
            assert first == second

    with pytest.raises(ValueError, match="exactly one of"):
        MDMASRAggregateTokenizer()
    with pytest.raises(ValueError, match="spl_tokens"):
        MDMASRAggregateTokenizer(models={"en": models["en"], "de": models["de"]})
    with pytest.raises(ValueError, match="'en'.*not a SentencePiece model"):
        MDMASRAggregateTokenizer(models={"spl_tokens": models["spl_tokens"], "en": b"not a model"})
    for index in (-100, len(tokenizer)):
        with pytest.raises(ValueError, match=f"{index} is outside"):
            tokenizer.decode([index])
