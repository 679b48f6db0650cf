# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Whisper donors: tiny random models with a real byte-level BPE, English-only and multilingual."""

import copy
import json

import numpy as np
import pytest
import torch
from canary_donors import check_drafts, logits_in_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tables import each
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput
from whisper_donors import (
    GREEDY,
    NUM_MEL_BINS,
    NUM_MERGES,
    NUM_TEXT,
    NUM_TIMESTAMPS,
    SENTENCES,
    SPECIALS,
    WIDTH,
    save_donor,
    train_bpe,
)

import mdm_asr_hf  # registers the Auto classes
from mdm_asr_hf.convert import common
from mdm_asr_hf.convert.whisper import (
    whisper_processor,
    whisper_prompt_template,
    whisper_tokenizer,
)
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids

MASK_EMBEDDING = "model.decoder.input_only_embeddings.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


KINDS = ("english", "multilingual")


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    """Kind -> a donor of that kind."""
    made = {}
    for kind in KINDS:
        folder, multilingual = tmp_path_factory.mktemp("whisper") / "donor", kind == "multilingual"
        model, tokenizer = save_donor(folder, multilingual)
        made[kind] = {"folder": folder, "model": model, "tokenizer": tokenizer, "multilingual": multilingual}
    return made


@pytest.fixture(scope="module")
def english(donors):
    return donors["english"]["folder"], donors["english"]["model"]


@pytest.fixture(scope="module")
def multilingual(donors):
    return donors["multilingual"]["folder"], donors["multilingual"]["model"]


def from_whisper(folder, **kwargs):
    return mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(folder, **kwargs)


def copy_with(folder, target, change_weights=None, change_config=None):
    """A copy of the donor in `folder` with other weights or another config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if change_weights is not None:
        weights = load_file(folder / "model.safetensors")
        change_weights(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    if change_config is not None:
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (target / "config.json").write_text(json.dumps(config))
    return target


def donor_logits(model, features, ids):
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=ids).logits


# Weights


@each("kind", KINDS)
@each("attention", ["sdpa", "eager"])
def test_logits_equal_the_donors(donors, attention, kind):
    donor = donors[kind]
    stock = donor["model"]
    stock.set_attn_implementation(attention)
    model = from_whisper(donor["folder"], encoder_trailing_silence_s=0)
    model.set_attn_implementation(attention)
    assert not model.training and model.dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 3000, NUM_MEL_BINS, generator=generator)
    ids = torch.randint(0, stock.config.vocab_size, (2, 32), generator=generator)
    expected = donor_logits(stock, features.transpose(1, 2), ids)
    assert expected.std() > 0.1  # the comparison would be empty on logits near zero
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=ids).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        logits = logits_in_pieces(model, model.encode(features), ids, (3, 1, 9, 1, 18))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_short_audio_and_full_silence_equal_the_donors_30_seconds(english):
    folder, stock = english
    audio = np.random.default_rng(0).normal(size=24_000).astype(np.float32)
    audio[-800:] = 0  # so that no window reaches from the audio into what lies behind it
    padded = WhisperFeatureExtractor(feature_size=NUM_MEL_BINS)(audio, sampling_rate=16_000, return_tensors="pt")
    inputs = whisper_processor(folder)(audio, sampling_rate=16_000)
    assert inputs["input_features"].shape == (1, 150, NUM_MEL_BINS)
    ids = torch.randint(0, stock.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(2))
    expected = donor_logits(stock, padded["input_features"], ids)

    def distance(silence_s):
        model = from_whisper(folder, encoder_trailing_silence_s=silence_s, encoder_min_duration_s=0)
        with torch.no_grad():
            return (model(**inputs, decoder_input_ids=ids).logits - expected).abs().max()

    assert distance(28.5) < 1e-5 < 1e-3 < distance(0)


@each("kind", KINDS)
def test_every_tensor_arrives_and_the_mask_embedding_is_new(donors, kind):
    donor = donors[kind]
    model, stock = from_whisper(donor["folder"], draft_layers=0), donor["model"]
    state, theirs = model.state_dict(), stock.state_dict()
    names = {"encoder_attn": "cross_attn", "encoder_attn_layer_norm": "cross_attn_layer_norm"}
    names |= {"final_layer_norm": "mlp_layer_norm", "out_proj": "o_proj"}
    seen = set()
    for name, tensor in theirs.items():
        parts = name.split(".")
        if parts[:2] == ["model", "decoder"]:
            parts = [names.get(part, part) for part in parts]
        seen.add(".".join(parts))
        assert torch.equal(state[".".join(parts)], tensor), name
    assert set(state) - seen == {MASK_EMBEDDING}
    vocab_size = stock.config.vocab_size
    assert state[EMBEDDING].shape[0] == model.config.vocab_size == model.config.mask_token_id == vocab_size
    torch.testing.assert_close(state[MASK_EMBEDDING], theirs[EMBEDDING].mean(dim=0, keepdim=True))
    num_parameters = sum(p.numel() for p in stock.parameters())
    assert sum(p.numel() for p in model.parameters()) == num_parameters + WIDTH
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@each("kind", KINDS)
def test_drafts_start_as_the_donors_last_layers(donors, english, monkeypatch, kind):
    donor = donors[kind]
    for draft_layers in [None, 1]:
        model, decoder = from_whisper(donor["folder"], draft_layers=draft_layers), donor["model"].model.decoder
        check_drafts(model, draft_layers or 2, decoder.embed_tokens.weight, decoder.layer_norm.weight)

    monkeypatch.setattr(common, "DRAFT_VOCAB_SIZE", 5)
    model = from_whisper(english[0])
    # 256 bytes and 30 merges stand before the end of text.
    assert model.model.decoder.drafts.head.token_ids.tolist() == [0, 1, 2, 3, 286]
    assert model.config.decoder_config.draft_vocab_size == 5


KEY = "model.decoder.layers.1.encoder_attn.k_proj.weight"


@each(
    "change, message",
    [
        (lambda w: w.pop(KEY), f"1 missing: {KEY}"),
        (lambda w: w.pop("model.encoder.conv1.bias"), "1 missing: model.encoder.conv1.bias"),
        (lambda w: w.pop(EMBEDDING), f"2 missing: .*{EMBEDDING}"),
        (
            lambda w: w.update({"model.decoder.layers.1.encoder_attn.k_proj.bias": torch.ones(16)}),
            "1 unknown: .*k_proj",
        ),
        (lambda w: w.update({"model.decoder.layers.2.fc1.bias": torch.ones(40)}), "1 unknown: .*layers.2.fc1.bias"),
        (lambda w: w.update({MASK_EMBEDDING: torch.ones(1, 16)}), "1 unknown: .*input_only"),
        (lambda w: w.update({KEY: torch.ones(16, 15)}), rf"{KEY} is \(16, 15\), not \(16, 16\)"),
        (lambda w: w.update({EMBEDDING: w[EMBEDDING][:-1]}), rf"{EMBEDDING} is \(302, 16\), not \(303, 16\)"),
        (lambda w: w.update({"proj_out.weight": w[EMBEDDING] + 1}), "output weights differ"),
    ],
)
@each("vocab_size", [None, 260])
def test_loading_is_strict(english, tmp_path, vocab_size, change, message):
    folder = copy_with(english[0], tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        from_whisper(folder, vocab_size=vocab_size, draft_layers=0 if vocab_size else None)


def test_what_the_donor_stores_is_read(english, tmp_path):
    folder = copy_with(english[0], tmp_path / "twice", lambda w: w.update({"proj_out.weight": w[EMBEDDING].clone()}))
    assert torch.equal(from_whisper(folder).state_dict()[EMBEDDING], english[1].state_dict()[EMBEDDING])

    folder = copy_with(english[0], tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    english[1].save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(from_whisper(folder).state_dict()[EMBEDDING], english[1].state_dict()[EMBEDDING])

    stock, _ = save_donor(tmp_path / "half", False, torch.float16)
    model = from_whisper(tmp_path / "half")
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # ready to train
    assert model.config.dtype == torch.float32 and model.config.encoder_config.dtype != torch.float16
    theirs = stock.state_dict()
    assert torch.equal(model.state_dict()[EMBEDDING], theirs[EMBEDDING].float())
    torch.testing.assert_close(model.state_dict()[MASK_EMBEDDING][0], theirs[EMBEDDING].double().mean(dim=0).float())
    for dtype, expected in [(None, torch.float16), ("auto", torch.float16), ("bfloat16", torch.bfloat16)]:
        assert {p.dtype for p in from_whisper(tmp_path / "half", dtype=dtype).parameters()} == {expected}
    model.save_pretrained(tmp_path / "saved")
    assert {p.dtype for p in AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "saved").parameters()} == {
        torch.float32
    }
    for dtype in ("float33", torch.int8):
        with pytest.raises(ValueError, match=f"`dtype` .*{str(dtype)}"):
            from_whisper(tmp_path / "half", dtype=dtype)


def test_donors_that_cannot_be_read(english, tmp_path):
    folder = copy_with(english[0], tmp_path / "other", change_config=lambda c: c.update(model_type="speech_to_text"))
    with pytest.raises(ValueError, match="no Whisper donor.*'speech_to_text'"):
        from_whisper(folder)
    with pytest.raises(ValueError, match="no Whisper donor.*None"):
        whisper_processor(tmp_path)
    folder = copy_with(english[0], tmp_path / "without_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        from_whisper(folder)
    folder = copy_with(english[0], tmp_path / "more_bins", change_config=lambda c: c.update(num_mel_bins=9))
    with pytest.raises(ValueError, match="gives 8 mel bins, its encoder takes 9"):
        whisper_processor(folder)

    folder = copy_with(english[0], tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(english[1].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks model.safetensors.*safetensors only"):
        from_whisper(folder)

    for draft_layers in (3, -1, 1.0, True):
        with pytest.raises(ValueError, match=f"`draft_layers` .{draft_layers}. must be an integer from 0 .* to 2"):
            from_whisper(english[0], draft_layers=draft_layers)
    for draft_layers in (None, 2):
        with pytest.raises(ValueError, match="`vocab_size` .260. changes the text .* `draft_layers=0`"):
            from_whisper(english[0], vocab_size=260, draft_layers=draft_layers)


# The donor's text


def frames(batch_size=12):
    return 6 * torch.randn(batch_size, 12, WIDTH, generator=torch.Generator().manual_seed(1))


def stock_texts(stock, hidden_states, **options):
    """What transformers' own `generate` writes: ids (B, L) without prompts, padded with the end of text."""
    # Of the features only the length counts, beside the encoder's output.
    features = torch.zeros(len(hidden_states), NUM_MEL_BINS, 3000)
    return stock.generate(features, encoder_outputs=BaseModelOutput(last_hidden_state=hidden_states), **options)


def own_texts(model, hidden_states, **options):
    return model.generate(
        encoder_outputs=MDMASREncoderOutput(last_hidden_state=hidden_states), **{**GREEDY, **options}
    )


def languages_of(donor, batch_size):
    if not donor["multilingual"]:
        return {}
    return {"language": ["de", "en", "zh", "de"] * (batch_size // 4), "task": "translate"}


@pytest.fixture(scope="module")
def converted(donors):
    return {kind: from_whisper(donor["folder"]) for kind, donor in donors.items()}


@each("kind", KINDS)
@each("options", [{}, {"draft_branches": []}, {"draft_length": 2}])
def test_texts_equal_the_donors(donors, converted, options, kind):
    donor, converted = donors[kind], converted[kind]
    hidden_states, stock, eos = frames(), donor["model"], NUM_TEXT[donor["multilingual"]]
    asked = languages_of(donor, 12)
    expected = stock_texts(stock, hidden_states, **asked)
    # Some come to an end, others fill all the positions that the prompt leaves.
    is_ended = (expected == eos).any(dim=1)
    assert 0 < is_ended.sum() < 12 and expected.shape[1] == 32 - (4 if asked else 2)
    assert torch.equal(own_texts(converted, hidden_states, **asked, **options), expected)


@each("kind", KINDS)
def test_what_is_suppressed_is_what_the_donor_suppresses(donors, converted, kind):
    donor, converted = donors[kind], converted[kind]
    hidden_states, stock, asked = frames(), donor["model"], languages_of(donor, 12)
    expected = stock_texts(stock, hidden_states, **asked)
    # Without timestamps, at which transformers cuts a text.
    of_text = list(range(NUM_TEXT[donor["multilingual"]] + 1, stock.config.vocab_size))
    for name, other in (("suppress_tokens", of_text), ("begin_suppress_tokens", None)):
        kept = getattr(stock.generation_config, name)
        try:
            setattr(stock.generation_config, name, other)
            others = stock_texts(stock, hidden_states, **asked)
        finally:
            setattr(stock.generation_config, name, kept)
        assert others.shape != expected.shape or not torch.equal(others, expected)
        assert torch.equal(own_texts(converted, hidden_states, **asked, **{name: other}), others)
    for number in (1, 7):
        short = stock_texts(stock, hidden_states, **asked, max_new_tokens=number)
        assert torch.equal(own_texts(converted, hidden_states, **asked, max_new_tokens=number), short)


@each("kind", KINDS)
def test_texts_behind_earlier_text_equal_the_donors(donors, converted, kind):
    donor, converted = donors[kind], converted[kind]
    hidden_states, stock, asked = frames(), donor["model"], languages_of(donor, 12)
    expected = stock_texts(stock, hidden_states, **asked)
    start = stock.generation_config.prev_sot_token_id
    # The latter fills half of the 32 positions, with its start.
    for previous in ([5, 60, 72], list(range(0, 150, 10))):
        behind = stock_texts(stock, hidden_states, **asked, prompt_ids=torch.tensor([start, *previous]))
        assert not torch.equal(behind[:, :7], expected[:, :7])
        assert torch.equal(own_texts(converted, hidden_states, **asked, previous_ids=previous), behind)
    # What is too long keeps its end.
    longer = own_texts(converted, hidden_states, **asked, previous_ids=[9, 8, 7, *previous])
    assert torch.equal(longer, behind)


@each("kind", KINDS)
@each("dtype", [None, torch.float16])
def test_the_donor_comes_back(donors, tmp_path, dtype, kind):
    donor = donors[kind]
    stock = copy.deepcopy(donor["model"]).to(dtype or torch.float32)
    model = from_whisper(donor["folder"], dtype=dtype)
    model.to_whisper().save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == stock.dtype and loaded.config.to_dict().keys() == stock.config.to_dict().keys()
    theirs = stock.state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for name, value in stock.generation_config.to_diff_dict().items():
        assert name == "transformers_version" or getattr(loaded.generation_config, name) == value, name
    hidden_states, asked = frames().to(stock.dtype), languages_of(donor, 12)
    assert torch.equal(stock_texts(loaded, hidden_states, **asked), stock_texts(stock, hidden_states, **asked))
    # It is no view of the model, whose training goes on.
    embedding = model.to_whisper().get_input_embeddings().weight
    assert embedding.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_the_donor_comes_back_of_what_was_trained(english):
    model = from_whisper(english[0])
    model.get_encoder().silence_embeddings = torch.nn.Parameter(torch.ones(5, model.get_encoder().config.d_model))
    model.get_encoder().config.silence_frames = 5
    expected, found = from_whisper(english[0]).to_whisper(), model.to_whisper()
    assert found.config.to_dict() == expected.config.to_dict()
    expected, found = expected.state_dict(), found.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    model = from_whisper(english[0])
    model.config.tie_word_embeddings = False
    model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight + 1.0)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    donor = model.to_whisper()
    assert donor.config.vocab_size == model.config.vocab_size and not donor.config.tie_word_embeddings
    assert torch.equal(donor.proj_out.weight, model.proj_out.weight)
    assert torch.equal(donor.get_input_embeddings().weight, model.get_input_embeddings().weight)

    with pytest.raises(ValueError, match="`to_whisper` needs a model with drafts"):
        from_whisper(english[0], draft_layers=0).to_whisper()


# Vocabulary


@each("kind", KINDS)
def test_truncated_vocabularies_hold_the_donors_tokens(donors, kind):
    donor = donors[kind]
    for vocab_size in [256, 270, 256 + NUM_MERGES]:
        tokenizer, donor_ids = whisper_tokenizer(donor["folder"], vocab_size)
        kept = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
        if donor["multilingual"]:
            languages = ["<|en|>", "<|zh|>", "<|de|>", "<|transcribe|>", "<|translate|>"]
            kept = [*kept[:2], *languages, kept[2]]
        expected = {**{token: vocab_size + i for i, token in enumerate(kept)}, "<|mask|>": vocab_size + len(kept)}
        vocab = tokenizer.get_vocab()
        assert {token: i for token, i in vocab.items() if i >= vocab_size} == expected
        assert sorted(vocab.values()) == list(range(vocab_size + len(kept) + 1))
        theirs = donor["tokenizer"].get_vocab()
        assert donor_ids == [*range(vocab_size), *(theirs[token] for token in kept)]
        assert all(vocab[token] == i for token, i in theirs.items() if i < vocab_size)
        _, merges = train_bpe()
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        assert [tuple(pair) for pair in bpe["merges"]] == merges[: vocab_size - 256]

    tokenizer, donor_ids = whisper_tokenizer(donor["folder"])
    num_ids = donor["model"].config.vocab_size
    assert donor_ids == list(range(num_ids))
    assert tokenizer.mask_token_id == num_ids and len(tokenizer) == num_ids + 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(num_ids + 1))
    eos = NUM_TEXT[donor["multilingual"]]
    assert tokenizer.convert_tokens_to_ids(SPECIALS) == list(range(eos, eos + len(SPECIALS)))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (eos, eos)
    # Two timestamps had a name, four are named here.
    first = eos + len(SPECIALS)
    times = [f"<|0.{hundredth:02}|>" for hundredth in (0, 2, 4, 6, 8, 10)]
    assert tokenizer.convert_tokens_to_ids(times) == list(range(first, first + NUM_TIMESTAMPS))
    for text in [*SENTENCES, "été 🦜"]:
        ids = tokenizer(text).input_ids
        assert ids == donor["tokenizer"](text, add_special_tokens=False).input_ids
    assert tokenizer.decode([*ids, first, eos, num_ids], skip_special_tokens=True) == "été 🦜"


@pytest.fixture(scope="module")
def shrunk(multilingual):
    return [whisper_tokenizer(multilingual[0], vocab_size)[0] for vocab_size in (256, 270)]


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives_a_truncated_vocabulary(shrunk, text):
    for tokenizer, vocab_size in zip(shrunk, (256, 270), strict=True):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < vocab_size


@each("kind", KINDS)
def test_embeddings_follow_the_tokens(donors, shrunk, kind):
    donor = donors[kind]
    for vocab_size in [None, 270]:
        model = from_whisper(donor["folder"], vocab_size=vocab_size, draft_layers=0)
        tokenizer, _ = whisper_tokenizer(donor["folder"], vocab_size)
        decoder, stock = model.model.decoder, donor["model"].model.decoder.embed_tokens.weight
        ours = torch.cat([decoder.embed_tokens.weight, decoder.input_only_embeddings.weight])
        assert len(ours) == len(tokenizer) == model.config.num_token_ids
        theirs = donor["tokenizer"].get_vocab()
        rows = []
        for token, i in tokenizer.get_vocab().items():
            if token in theirs:
                rows.append(i)
                assert torch.equal(ours[i], stock[theirs[token]]), token
        assert len(rows) == len(tokenizer) - 1 - (NUM_TIMESTAMPS - 2 if vocab_size is None else 0)
        assert model.config.mask_token_id == tokenizer.mask_token_id
        # The end of text is the last that can be predicted of a shrunk vocabulary.
        assert model.config.vocab_size == (donor["model"].config.vocab_size if vocab_size is None else 271)
        torch.testing.assert_close(ours[-1], ours[:-1].mean(dim=0))

    num_ids = [len(tokenizer("the cat and the 🦜").input_ids) for tokenizer in shrunk]
    assert num_ids[0] == 16 + 4  # every character one byte, the parrot four
    assert num_ids[1] < num_ids[0]
    assert [tokenizer.decode(tokenizer("the 🦜 été").input_ids) for tokenizer in shrunk] == ["the 🦜 été"] * 2


@each("kind", KINDS)
def test_vocabularies_that_cannot_be_are_refused(donors, english, tmp_path, kind):
    donor = donors[kind]
    for vocab_size in [255, 257 + NUM_MERGES, -1, 300.0, True]:
        with pytest.raises(ValueError, match=rf"from 256 \(bytes only\) to 286, got {vocab_size}"):
            from_whisper(donor["folder"], vocab_size=vocab_size, draft_layers=0)

    folder = copy_with(english[0], tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(NUM_TIMESTAMPS)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="exceed the 303 rows"):
        whisper_tokenizer(folder)


def swap_merges(vocab):
    names = {i: token for token, i in vocab.items()}
    vocab[names[260]], vocab[names[261]] = 261, 260


def lose_a_byte(vocab):
    vocab["two bytes"] = vocab.pop("Ā")


def test_another_bpe_cannot_be_cut_and_added_words_stay(english, tmp_path):
    for change in (swap_merges, lose_a_byte):
        folder = copy_with(english[0], tmp_path / change.__name__)
        spec = json.loads((folder / "tokenizer.json").read_text())
        change(spec["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(ValueError, match="256 bytes and then its merges in order"):
            whisper_tokenizer(folder, 270)
        assert len(whisper_tokenizer(folder)[0]) == 304  # as a whole it is fine

    folder = copy_with(english[0], tmp_path / "words")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zirkonium"])
    tokenizer.save_pretrained(folder)
    tokenizer, _ = whisper_tokenizer(folder)
    ids = tokenizer("the zirkonium").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "zirkonium"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the zirkonium"
    assert ids[-1] not in from_whisper(folder, draft_layers=0).generation_config.suppress_tokens


# Prompt


def test_english_prompt(english, multilingual, tmp_path):
    model = from_whisper(english[0])
    template = model.generation_config.prompt_template
    # Of SPECIALS, from 286 on: start of transcript is the second, no timestamps the eleventh.
    assert build_prompt_ids(template, batch_size=2).tolist() == [[287, 296]] * 2
    assert model.config.decoder_start_token_id == 287
    assert model.generation_config.max_new_tokens == 32 - 2
    with pytest.raises(ValueError, match="`language='de'` has no place"):
        build_prompt_ids(template, language="de")
    with pytest.raises(ValueError, match="`language='de'` has no place"):
        model.generate(torch.randn(1, 100, NUM_MEL_BINS), language="de")

    ids = {"<|startoftranscript|>": 1, "<|transcribe|>": 2, "<|translate|>": 3, "<|notimestamps|>": 4}
    with pytest.raises(ValueError, match="no language tokens"):
        whisper_prompt_template(ids, multilingual=True)
    template = whisper_prompt_template({**ids, "<|de|>": 5}, multilingual=True, can_detect=False)
    assert template["defaults"]["language"] == "de"

    with pytest.raises(ValueError, match="30"):
        whisper_processor(english[0])(np.zeros(16_000 * 31, np.float32), sampling_rate=16_000)

    # Both kinds list the languages: generation_config.json tells, or else the number of tokens.

    def num_prompt_tokens(folder):
        return len(whisper_processor(folder, vocab_size=256).prompt_template["tokens"])

    assert (num_prompt_tokens(english[0]), num_prompt_tokens(multilingual[0])) == (2, 4)
    silent = copy_with(multilingual[0], tmp_path / "silent")
    (silent / "generation_config.json").unlink()
    assert num_prompt_tokens(silent) == 2  # as few tokens as no multilingual model has
    for size, expected in [(51864, 2), (51865, 4), (51866, 4)]:
        folder = copy_with(silent, tmp_path / str(size), change_config=lambda c, size=size: c.update(vocab_size=size))
        assert num_prompt_tokens(folder) == expected


@each("vocab_size", [None, 260])
def test_multilingual_prompt(multilingual, vocab_size):
    model = from_whisper(multilingual[0], vocab_size=vocab_size, draft_layers=0 if vocab_size else None)
    processor = whisper_processor(multilingual[0], vocab_size=vocab_size)
    template = model.generation_config.prompt_template
    assert processor.prompt_template == template
    assert model.generation_config.max_new_tokens == 32 - 4

    def prompts(**slots):
        batch = build_prompt_ids(template, **slots)
        return [" ".join(processor.tokenizer.convert_ids_to_tokens(row)) for row in batch.tolist()]

    start, end = "<|startoftranscript|> ", " <|notimestamps|>"
    # The donor detects the language where none is given; what is shrunk to text cannot.
    assert template["defaults"] == {"language": "en" if vocab_size else "auto", "task": "transcribe"}
    for language in ("de", "german", "German", "<|de|>"):
        assert prompts(language=language, task="translate") == [f"{start}<|de|> <|translate|>{end}"]
    rows = prompts(batch_size=3, language=["mandarin", "en", "de"], task=["transcribe", "translate", "transcribe"])
    assert rows == [
        f"{start}<|zh|> <|transcribe|>{end}",
        f"{start}<|en|> <|translate|>{end}",
        f"{start}<|de|> <|transcribe|>{end}",
    ]
    features = torch.randn(2, 100, NUM_MEL_BINS, generator=torch.Generator().manual_seed(3))
    assert len(model.generate(features, language=["de", "chinese"])) == 2
    # The tokenizer has no token for French.
    for unknown in ("fr", "french", "klingon"):
        with pytest.raises(ValueError, match=f"`language='{unknown}'` is not known"):
            model.generate(features, language=unknown)
    with pytest.raises(ValueError, match="3 values for a batch of 2"):
        model.generate(features, language=["de", "en", "de"])
    with pytest.raises(ValueError, match="`task='sing'`"):
        model.generate(features, task="sing")


@each("vocab_size", [None, 260])
@each(
    "settings, defaults",
    [
        (lambda ids: {"language": "german", "task": "translate"}, {"language": "de", "task": "translate"}),
        (lambda ids: {"language": "<|zh|>"}, {"language": "zh"}),
        (lambda ids: {"task": "translate", "forced_decoder_ids": [[1, ids["<|de|>"]]]}, {"task": "translate"}),
        (
            lambda ids: {"forced_decoder_ids": [[1, ids["<|de|>"]], [2, ids["<|translate|>"]]]},
            {"language": "de", "task": "translate"},
        ),
        # As released multilingual checkpoints have it.
        (lambda ids: {"forced_decoder_ids": [[1, None], [2, ids["<|transcribe|>"]]]}, {}),
    ],
)
def test_the_donors_own_language_and_task_are_the_default(multilingual, tmp_path, vocab_size, settings, defaults):
    folder = copy_with(multilingual[0], tmp_path / "tuned")
    file = folder / "generation_config.json"
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    file.write_text(json.dumps(json.loads(file.read_text()) | settings(ids)))
    template = whisper_processor(folder, vocab_size=vocab_size).prompt_template
    expected = {"language": "en" if vocab_size else "auto", "task": "transcribe"} | defaults
    assert template["defaults"] == expected
    model = from_whisper(folder, vocab_size=vocab_size, draft_layers=0 if vocab_size else None)
    assert model.generation_config.prompt_template == template


# Saving and loading


@each("kind", KINDS)
@each("vocab_size, draft_layers", [(None, None), (None, 0), (270, 0)])
def test_round_trip_through_auto_classes(donors, tmp_path, vocab_size, draft_layers, kind):
    donor = donors[kind]
    model = from_whisper(
        donor["folder"], vocab_size=vocab_size, draft_layers=draft_layers, encoder_trailing_silence_s=0.5
    )
    processor = mdm_asr_hf.MDMASRProcessor.from_whisper(donor["folder"], vocab_size=vocab_size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = (
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(loaded) is type(model) and type(its_processor) is type(processor)
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.encoder_trailing_silence_s == 0.5

    settings = loaded.generation_config
    assert settings.to_dict() == model.generation_config.to_dict()
    assert settings.prompt_template == its_processor.prompt_template == processor.prompt_template
    eos = NUM_TEXT[donor["multilingual"]]
    if draft_layers is None:
        stated = donor["model"].generation_config
        assert settings.suppress_tokens == stated.suppress_tokens
        assert settings.begin_suppress_tokens == stated.begin_suppress_tokens
    elif vocab_size is None:
        # Everything behind the end of text that the donor can predict.
        assert settings.suppress_tokens == list(range(eos + 1, donor["model"].config.vocab_size))
    else:
        assert settings.suppress_tokens is None  # what remains cannot be predicted

    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert its_processor.tokenizer.mask_token_id == loaded.config.mask_token_id
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    audio = np.random.default_rng(1).normal(size=16_000).astype(np.float32)
    inputs, expected = (p(audio, text="the 🦜", sampling_rate=16_000) for p in (its_processor, processor))
    assert torch.equal(inputs["input_features"], expected["input_features"])
    assert torch.equal(inputs["labels"], expected["labels"])
    # Whisper's texts begin with a space.
    assert its_processor.tokenizer.decode(inputs["labels"][0, :-1]) == " the 🦜"
    assert inputs["labels"][0, -1] == loaded.config.eos_token_id
    prompt_ids = processor.get_prompt_ids(**({"language": "de"} if donor["multilingual"] else {}))
    with torch.no_grad():
        logits = (m(**i, prompt_ids=prompt_ids).logits for m, i in ((loaded, inputs), (model, expected)))
        assert torch.equal(*logits)
    del inputs["labels"]
    options = GREEDY if draft_layers is None else {}
    sequences = loaded.generate(**inputs, **options)
    assert torch.equal(sequences, model.generate(**inputs, **options))
    assert its_processor.decode(sequences) == processor.decode(sequences)
    if vocab_size is None:
        assert not set(sequences.flatten().tolist()) & set(settings.suppress_tokens)
