# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Canary donors in NeMo's format: archives with the true names at small width, against NeMo's equations."""

import math
import os
import tarfile

import canary_donors
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from canary_donors import (
    CHANNELS,
    DECODER_WIDTH,
    ENCODER_WIDTH,
    KERNEL,
    MASK_EMBEDDING,
    NUM_HEADS,
    NUM_LAYERS,
    NUM_MEL_BINS,
    POSITIONS,
    SPECIAL_TOKENS,
    check_drafts,
    features,
    load_processor,
    logits_in_pieces,
    needs_parakeet_features,
    nemo_settings,
    nemo_vocab_size,
    nemo_weights,
    write_nemo,
)
from tables import each
from tiny_sentencepiece import ENGLISH, GERMAN, train
from transformers import ParakeetFeatureExtractor

from mdm_asr_hf.convert.canary import canary_processor, from_canary
from mdm_asr_hf.modeling_mdm_asr import MDMASRForConditionalGeneration
from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids
from mdm_asr_hf.tokenization_mdm_asr import MDMASRAggregateTokenizer


@pytest.fixture(scope="module")
def spm_models():
    return {
        "spl_tokens": train([" ".join(SPECIAL_TOKENS)], len(SPECIAL_TOKENS) + 2, SPECIAL_TOKENS),
        "en": train(ENGLISH, 40),
        "de": train(GERMAN, 43),
    }


@pytest.fixture
def nemo(tmp_path, spm_models):
    """A function that writes an archive after `change(settings, weights)` and gives its path."""

    def write(change=None, extra=(), mode="w", encoder_bias=True, name="canary-tiny.nemo"):
        settings, weights = nemo_settings(spm_models), nemo_weights(nemo_vocab_size(spm_models), encoder_bias)
        if change is not None:
            change(settings, weights)
        return write_nemo(tmp_path / name, settings, weights, spm_models, extra, mode)

    return write


def expected_names(name):
    """Our name of a NeMo tensor, piece by piece, independent of the converter's substitutions."""
    parts = name.split(".")
    if parts[0] == "encoder":
        table = {"pre_encode": "subsampling", "out": "linear", "batch_norm": "norm", "linear_pos": "relative_k_proj"}
        table |= {f"linear_{x}": f"{x}_proj" for x in "qkv"} | {"linear_out": "o_proj"}
        table |= {f"pos_bias_{x}": f"bias_{x}" for x in "uv"}
        if parts[1] == "pre_encode":
            table["conv"] = "layers"
        return ".".join(["model", "encoder", *(table.get(part, part) for part in parts[1:])])
    if parts[0] == "encoder_decoder_proj":
        return f"model.encoder_projection.{parts[-1]}"
    if parts[0] == "log_softmax":
        return f"proj_out.{parts[-1]}"
    if parts[1] == "_embedding":
        return f"model.decoder.{'embed_tokens' if 'token' in parts[2] else 'embedding_layernorm'}.{parts[-1]}"
    if parts[2] == "final_layer_norm":
        return f"model.decoder.layer_norm.{parts[-1]}"
    table = {"layer_norm_1": "self_attn_layer_norm", "layer_norm_2": "cross_attn_layer_norm"}
    table |= {"layer_norm_3": "mlp_layer_norm", "first_sub_layer": "self_attn", "second_sub_layer": "cross_attn"}
    table |= {"query_net": "q_proj", "key_net": "k_proj", "value_net": "v_proj", "out_projection": "o_proj"}
    table |= {"dense_in": "fc1", "dense_out": "fc2"}
    rest = [table.get(part, part) for part in parts[4:] if part != "third_sub_layer"]
    return ".".join(["model.decoder.layers", parts[3], *rest])


@each("encoder_bias, mode", [(True, "w"), (False, "w:gz")])
def test_every_tensor_arrives(nemo, spm_models, encoder_bias, mode):
    def change(settings, weights):
        settings["encoder"]["use_bias"] = encoder_bias

    path = nemo(change, mode=mode, encoder_bias=encoder_bias)
    model = from_canary(MDMASRForConditionalGeneration, path, draft_layers=0)
    weights = nemo_weights(nemo_vocab_size(spm_models), encoder_bias)
    state = model.state_dict()
    # The decoder's width is reordered: 0, 2, 4, ..., 1, 3, 5, ... These are the dimensions of that width.
    order = [*range(0, DECODER_WIDTH, 2), *range(1, DECODER_WIDTH, 2)]
    computed = {"preprocessor.featurizer.window", "preprocessor.featurizer.fb", POSITIONS}
    seen = set()
    for name, tensor in weights.items():
        if name in computed:
            continue
        ours = expected_names(name)
        seen.add(ours)
        if ours.startswith("model.decoder") or ours == "proj_out.weight":
            kind = ours.split(".")[-2]
            from_frames = "cross_attn" in ours and kind in ("k_proj", "v_proj")
            if kind in ("o_proj", "fc2") or "norm" in kind:
                tensor = tensor[order]
            elif ours.endswith(".weight") and not from_frames:
                tensor = tensor[:, order]
        assert torch.equal(state[ours], tensor), name
    assert set(state) - seen == {MASK_EMBEDDING}
    mean = weights["transf_decoder._embedding.token_embedding.weight"].mean(dim=0)[order]
    torch.testing.assert_close(state[MASK_EMBEDDING][0], mean)


@each("draft_layers", [None, 1])
def test_drafts_start_as_the_donors_last_layers(nemo, spm_models, draft_layers):
    weights = nemo_weights(nemo_vocab_size(spm_models))
    embedding = weights["transf_decoder._embedding.token_embedding.weight"]
    model = from_canary(MDMASRForConditionalGeneration, nemo(), draft_layers=draft_layers)
    check_drafts(model, draft_layers or 2, embedding, weights["transf_decoder._decoder.final_layer_norm.weight"])


def reference_encoder(w, values, xscale):
    """FastConformer as NeMo defines it, for features (T, mel bins) without padding: frames (T', width)."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def conv(function, name, x, **kwargs):
        return function(x, w[f"{name}.weight"], w[f"{name}.bias"], **kwargs)

    x = values[None, None]
    for index in range(7):
        name = f"encoder.pre_encode.conv.{index}"
        if index in (1, 4):
            x = F.relu(x)
        elif index in (3, 6):
            x = conv(F.conv2d, name, x)
        else:
            x = conv(F.conv2d, name, x, stride=2, padding=1, groups=1 if index == 0 else CHANNELS)
    x = F.relu(x)[0]
    x = linear("encoder.pre_encode.out", x.transpose(0, 1).flatten(1)) * xscale
    length, head_dim = len(x), ENCODER_WIDTH // NUM_HEADS

    distances = torch.arange(length)[:, None] - torch.arange(length)[None]
    angles = distances[..., None] / 10000 ** (torch.arange(0, ENCODER_WIDTH, 2) / ENCODER_WIDTH)
    positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    for n in range(NUM_LAYERS):
        layer = f"encoder.layers.{n}"

        def feed_forward(name, x, layer=layer):
            return linear(f"{layer}.{name}.linear2", F.silu(linear(f"{layer}.{name}.linear1", x)))

        x = x + 0.5 * feed_forward("feed_forward1", norm(f"{layer}.norm_feed_forward1", x))
        y = norm(f"{layer}.norm_self_att", x)
        attn = f"{layer}.self_attn"
        q, k, v = (linear(f"{attn}.linear_{i}", y).view(length, NUM_HEADS, head_dim) for i in "qkv")
        p = linear(f"{attn}.linear_pos", positions).view(length, length, NUM_HEADS, head_dim)
        scores = torch.einsum("ihd,jhd->hij", q + w[f"{attn}.pos_bias_u"], k)
        scores = scores + torch.einsum("ihd,ijhd->hij", q + w[f"{attn}.pos_bias_v"], p)
        y = torch.einsum("hij,jhd->ihd", (scores / math.sqrt(head_dim)).softmax(-1), v).flatten(1)
        x = x + linear(f"{attn}.linear_out", y)
        y = norm(f"{layer}.norm_conv", x).T[None]
        y = F.glu(conv(F.conv1d, f"{layer}.conv.pointwise_conv1", y), dim=1)
        y = conv(F.conv1d, f"{layer}.conv.depthwise_conv", y, padding=KERNEL // 2, groups=ENCODER_WIDTH)
        statistics = (w[f"{layer}.conv.batch_norm.{i}"] for i in ("running_mean", "running_var", "weight", "bias"))
        y = conv(F.conv1d, f"{layer}.conv.pointwise_conv2", F.silu(F.batch_norm(y, *statistics)))
        x = x + y[0].T
        x = x + 0.5 * feed_forward("feed_forward2", norm(f"{layer}.norm_feed_forward2", x))
        x = norm(f"{layer}.norm_out", x)
    return x


def reference_decoder(w, ids, frames):
    """NeMo's pre-LayerNorm decoder with its causal mask, for ids (L,) and frames (T, width): logits (L, V)."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attention(name, x, states, mask):
        q, k, v = (
            linear(f"{name}.{net}", inputs).unflatten(-1, (NUM_HEADS, -1)).transpose(0, 1)
            for net, inputs in (("query_net", x), ("key_net", states), ("value_net", states))
        )
        root = math.sqrt(math.sqrt(q.shape[-1]))
        scores = (q / root) @ (k / root).transpose(-1, -2) + mask
        return linear(f"{name}.out_projection", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    embedding, body = "transf_decoder._embedding", "transf_decoder._decoder"
    x = w[f"{embedding}.token_embedding.weight"][ids] + w[f"{embedding}.position_embedding.pos_enc"][: len(ids)]
    x = norm(f"{embedding}.layer_norm", x)
    causal = torch.full((len(ids), len(ids)), -10000.0).triu(1)
    for n in range(NUM_LAYERS):
        layer = f"{body}.layers.{n}"
        y = norm(f"{layer}.layer_norm_1", x)
        x = x + attention(f"{layer}.first_sub_layer", y, y, causal)
        x = x + attention(f"{layer}.second_sub_layer", norm(f"{layer}.layer_norm_2", x), frames, torch.zeros(1))
        y = F.relu(linear(f"{layer}.third_sub_layer.dense_in", norm(f"{layer}.layer_norm_3", x)))
        x = x + linear(f"{layer}.third_sub_layer.dense_out", y)
    return linear("log_softmax.mlp.layer0", norm(f"{body}.final_layer_norm", x))


@each("xscaling", [False, True])
def test_logits_equal_the_reference(nemo, spm_models, xscaling):
    def change(settings, weights):
        settings["encoder"]["xscaling"] = xscaling

    vocab_size = nemo_vocab_size(spm_models)
    w = nemo_weights(vocab_size)
    model = from_canary(MDMASRForConditionalGeneration, nemo(change))
    values, mask = features()
    ids = torch.randint(0, vocab_size, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        frames = model.encode(values, mask)
        logits = model(input_features=values, attention_mask=mask, decoder_input_ids=ids).logits
        pieces = logits_in_pieces(model, frames, ids, (5, 1, 14))
        for row, num_frames in enumerate(mask.sum(dim=-1).tolist()):
            expected = reference_encoder(w, values[row, :num_frames], math.sqrt(ENCODER_WIDTH) if xscaling else 1.0)
            got = frames.last_hidden_state[row, : len(expected)]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            assert int(frames.attention_mask[row].sum()) == len(expected)
            projected = F.linear(expected, w["encoder_decoder_proj.weight"], w["encoder_decoder_proj.bias"])
            expected = reference_decoder(w, ids[row], projected)
            assert expected.std() > 0.1
            for ours in (logits[row], pieces[row]):
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_same_width_has_no_projection(nemo, monkeypatch):
    monkeypatch.setattr(canary_donors, "DECODER_WIDTH", ENCODER_WIDTH)

    def change(settings, weights):
        del weights["encoder_decoder_proj.weight"], weights["encoder_decoder_proj.bias"]

    model = from_canary(MDMASRForConditionalGeneration, nemo(change))
    assert model.model.encoder_projection is None


@needs_parakeet_features
def test_config_prompt_and_processor(nemo, spm_models, tmp_path):
    path = nemo()
    model, (processor, batch) = from_canary(MDMASRForConditionalGeneration, path), load_processor(path)
    vocab_size = nemo_vocab_size(spm_models)
    assert model.config.decoder_config.num_input_only_tokens == 1
    assert model.config.vocab_size == model.config.mask_token_id == vocab_size
    assert model.config.input_frames_per_s == 100.0
    tokenizer = processor.tokenizer
    assert isinstance(tokenizer, MDMASRAggregateTokenizer)
    assert tokenizer.mask_token_id == vocab_size and len(tokenizer) == vocab_size + 1
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.decoder_start_token_id) == (2, 3, 7)
    # From the order of SPECIAL_TOKENS, <unk> being 0: context 7, transcript 4, emotion 14, en 15, en 15, pnc 5,
    # noitn 9, notimestamp 11, nodiarize 13.
    template = model.generation_config.prompt_template
    assert processor.prompt_template == template
    assert build_prompt_ids(template).tolist() == [[7, 4, 14, 15, 15, 5, 9, 11, 13]]
    assert build_prompt_ids(template, language="de", punctuation=False).tolist() == [[7, 4, 14, 16, 16, 6, 9, 11, 13]]
    assert batch["input_features"].shape[-1] == NUM_MEL_BINS
    text = tokenizer("hund und katze", language="de").input_ids
    assert tokenizer.decode([*text, tokenizer.mask_token_id, 3], skip_special_tokens=True) == "hund und katze"
    assert int(model.generate(**batch, language="de").max()) < vocab_size

    labels = processor(text=["hund", "und katze"], language="de")["labels"]
    assert labels[1].tolist() == [*tokenizer("und katze", language="de").input_ids, tokenizer.eos_token_id]

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = type(processor).from_pretrained(tmp_path / "saved")
    assert loaded.prompt_template == template
    assert loaded.tokenizer("hund", language="de").input_ids == tokenizer("hund", language="de").input_ids


@needs_parakeet_features
def test_features_equal_the_extractors(nemo):
    processor, batch = load_processor(nemo())
    audio = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    stock = ParakeetFeatureExtractor(feature_size=NUM_MEL_BINS)(audio, sampling_rate=16000, return_tensors="pt")
    num_frames = int(stock["attention_mask"].sum())
    torch.testing.assert_close(
        torch.as_tensor(batch["input_features"])[0, :num_frames], stock["input_features"][0, :num_frames]
    )

    assert canary_processor(without_weights(nemo())).tokenizer.languages == ["en", "de"]


def test_folders(nemo, tmp_path):
    path = nemo()
    assert from_canary(MDMASRForConditionalGeneration, path.parent).config.mask_token_id % 8 == 0
    # An export of the encoder alone may lie beside it.
    (path.parent / "config.json").write_text('{"model_type": "parakeet_ctc"}')
    assert from_canary(MDMASRForConditionalGeneration, str(path.parent)).config.mask_token_id % 8 == 0
    nemo(name="another.nemo")
    with pytest.raises(ValueError, match="'parakeet_ctc'.*2 `.nemo` files"):
        canary_processor(path.parent)
    with pytest.raises(ValueError, match="no `.nemo` file"):
        canary_processor(tmp_path / "absent.nemo")


QUERY = "transf_decoder._decoder.layers.0.first_sub_layer.query_net.weight"
HEAD = "log_softmax.mlp.layer0.weight"


def test_what_does_not_fit_is_named(nemo):
    for change, message in [
        (lambda s, w: w.update({"transf_encoder._layer.0.weight": torch.ones(1)}), "unknown: transf_encoder._layer.0"),
        (lambda s, w: w.update({"preprocessor.new": torch.ones(1)}), "1 unknown: preprocessor.new"),
        (lambda s, w: w.pop(QUERY), f"1 missing: {QUERY}"),
        (lambda s, w: w.pop("encoder_decoder_proj.bias"), "missing: encoder_decoder_proj.bias"),
        (lambda s, w: w.update({QUERY: torch.ones(24, 23)}), rf"{QUERY} is \(24, 23\), not \(24, 24\)"),
        (lambda s, w: w.update({HEAD: w[HEAD] + 1}), "output weights differ"),
        (lambda s, w: w.update({POSITIONS: torch.zeros(64, 24)}), "sinusoids"),
        (lambda s, w: s["encoder"].update(n_layers=3), "missing: encoder.layers.2"),
        (lambda s, w: s["encoder"].update(n_layers=1), "unknown: encoder.layers.1"),
        (lambda s, w: s["encoder"].update(n_heads=4), "pos_bias_u is"),
        (lambda s, w: s["encoder"].update(conv_norm_type="layer_norm"), "encoder.conv_norm_type.*'layer_norm'"),
        (lambda s, w: s["encoder"].update(att_context_size=[128, 128]), "encoder.att_context_size"),
        (lambda s, w: s["encoder"].pop("subsampling"), "encoder.subsampling.*'striding'"),
        (lambda s, w: s["encoder"].update(d_model="${model.width}"), "encoder.d_model.*model.width"),
        (lambda s, w: s["encoder"].update(feat_in=80), "encoder.feat_in"),
        (lambda s, w: s["preprocessor"].update(normalize="all_features"), "preprocessor.normalize.*'all_features'"),
        (lambda s, w: s["preprocessor"].update(window="hamming"), "preprocessor.window"),
        (lambda s, w: s["preprocessor"].update(log_zero_guard_type="clamp"), "log_zero_guard_type"),
        (lambda s, w: s["preprocessor"].update(highfreq=4000), "preprocessor.highfreq"),
        (lambda s, w: s["transf_decoder"]["config_dict"].update(pre_ln=False), "config_dict.pre_ln"),
        (lambda s, w: s["transf_decoder"]["config_dict"].update(learn_positional_encodings=True), "learn_positional"),
        (lambda s, w: s["transf_encoder"].update(num_layers=2), "transf_encoder.num_layers"),
        (lambda s, w: s["head"].update(num_classes=8), "head.num_classes"),
        (lambda s, w: s.update(prompt_format="canary3"), "'canary3'"),
        (lambda s, w: s.update(prompt_format=["canary"]), r"\['canary'\], not one of"),
        (lambda s, w: s["tokenizer"].update(type="bpe"), "'bpe'.*canary-1b-v2"),
        (lambda s, w: s["tokenizer"]["langs"]["de"].update(type="wpe"), "langs.de"),
        (lambda s, w: s["tokenizer"]["langs"]["de"].update(model_path="nemo:lost.model"), "lost.model.*langs.de"),
        (lambda s, w: s["tokenizer"]["langs"].pop("spl_tokens"), "spl_tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_canary(MDMASRForConditionalGeneration, nemo(change))

    def change(settings, weights):
        del weights["encoder.layers.0.conv.batch_norm.num_batches_tracked"]

    model = from_canary(MDMASRForConditionalGeneration, nemo(change))
    assert [int(layer.conv.norm.num_batches_tracked) for layer in model.model.encoder.layers] == [0, 7]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["TEST_CANARY_FOLDER"],)


def unsafe_members():
    def link(name, target, kind):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    return {
        "parent": tarfile.TarInfo("../outside.model"),
        "hidden parent": tarfile.TarInfo("./a/../../outside.model"),
        "absolute": tarfile.TarInfo("/tmp/outside.model"),
        "symbolic link": link("./model_config.yaml", "/etc/passwd", tarfile.SYMTYPE),
        "inner link": link("./a.model", "model_config.yaml", tarfile.SYMTYPE),
        "hard link": link("./a.model", "../b.model", tarfile.LNKTYPE),
        "device": link("./a.model", "", tarfile.CHRTYPE),
    }


@each("kind", unsafe_members())
def test_unsafe_members_are_refused(nemo, kind):
    path = nemo(extra=[(unsafe_members()[kind], b"")])
    with pytest.raises(ValueError, match="read safely"):
        canary_processor(path)


def test_damaged_and_pickled_archives_are_refused(nemo, tmp_path, monkeypatch):
    path = nemo()
    text = tmp_path / "text.nemo"
    text.write_text("no archive")
    cut = tmp_path / "cut.nemo"
    cut.write_bytes(path.read_bytes()[:30_000])
    for broken in (text, cut):
        with pytest.raises(ValueError, match="NeMo archive"):
            from_canary(MDMASRForConditionalGeneration, broken)

    with pytest.raises(ValueError, match="lacks model_weights.ckpt"):
        from_canary(MDMASRForConditionalGeneration, without_weights(nemo()))

    folder = tmp_path / "made_by_the_pickle"
    monkeypatch.setenv("TEST_CANARY_FOLDER", str(folder))
    path = nemo(lambda settings, weights: weights.update(payload=RunsCode()))
    with pytest.raises(ValueError, match="more than tensors"):
        from_canary(MDMASRForConditionalGeneration, path)
    assert not folder.exists()


def without_weights(path):
    incomplete = path.with_name("incomplete.nemo")
    with tarfile.open(path) as source, tarfile.open(incomplete, "w") as target:
        for member in source:
            if "weights" not in member.name:
                target.addfile(member, source.extractfile(member))
    return incomplete
