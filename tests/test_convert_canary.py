"""The Canary donors: tiny models in transformers' format, and NeMo archives with the true names, written here."""

import io
import math
import os
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from test_tokenization import ENGLISH, GERMAN, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CanaryConfig,
    CanaryForConditionalGeneration,
    CanaryProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
)

from mdm_asr_hf.convert_canary import canary_processor, from_canary
from mdm_asr_hf.generation_mdm_asr import MDMASRGenerationConfig
from mdm_asr_hf.modeling_mdm_asr import MDMASRForConditionalGeneration
from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids
from mdm_asr_hf.tokenization_mdm_asr import MDMASRAggregateTokenizer

POSITIONS = "transf_decoder._embedding.position_embedding.pos_enc"
MASK_EMBEDDING = "model.decoder.input_only_embeddings.weight"
SPECIAL_TOKENS = [
    *("<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|nopnc|>"),
    *("<|startofcontext|>", "<|itn|>", "<|noitn|>", "<|timestamp|>", "<|notimestamp|>", "<|diarize|>"),
    *("<|nodiarize|>", "<|emo:undefined|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"),
]
NUM_MEL_BINS = 16


def randomize(model):
    """Weights far from their initial values, so that no part of the network goes unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.square() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return model.eval()


def make_causal(model, attention):
    decoder = model.model.decoder
    decoder.config.is_causal = True
    for layer in decoder.layers:
        layer.self_attn.is_causal = True
    # The decoder alone: eager ParakeetEncoders of older transformers turn padded batches into NaN.
    decoder.set_attn_implementation(attention)
    assert decoder.config._attn_implementation == attention
    return model


def features(batch_size=2, num_frames=96):
    """Random features (B, T, mel bins), the second row a third shorter, and their mask (B, T)."""
    values = torch.randn(batch_size, num_frames, NUM_MEL_BINS, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch_size, num_frames, dtype=torch.long)
    mask[1:, num_frames * 2 // 3 :] = 0
    return values, mask


def load_processor(path):
    processor = canary_processor(path)
    audio = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    return processor, processor.feature_extractor(audio, sampling_rate=16000, return_tensors="pt")


# transformers' format


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    vocab = {token: index for index, token in enumerate(["<unk>", *SPECIAL_TOKENS, "hello", "world"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|startoftranscript|>",
        eos_token="<|endoftext|>",
    )
    # 21 named ids, 24 rows: the mask has to skip three.
    vocab_size = 24
    config = CanaryConfig(
        vocab_size=vocab_size,
        encoder_config={
            "model_type": "parakeet_encoder",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "num_mel_bins": NUM_MEL_BINS,
            "subsampling_conv_channels": 4,
            "scale_input": False,
            "layerdrop": 0.0,
        },
        decoder_config={
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
        },
    )
    donor = randomize(CanaryForConditionalGeneration(config))
    donor.save_pretrained(folder)
    extractor = ParakeetFeatureExtractor(feature_size=NUM_MEL_BINS)
    CanaryProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return folder, donor


def copy_with_weights(folder, target, change):
    """A copy of `folder` whose tensors went through `change`."""
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_native_logits_equal_the_donors(native, attention):
    folder, donor = native
    model = make_causal(from_canary(MDMASRForConditionalGeneration, folder), attention)
    assert not model.training and model.dtype == torch.float32
    values, mask = features()
    ids = torch.randint(0, 24, (2, 12), generator=torch.Generator().manual_seed(2))
    ids_mask = torch.ones_like(ids)
    ids_mask[1, 9:] = 0
    inputs = {
        "input_features": values,
        "attention_mask": mask,
        "decoder_input_ids": ids,
        "decoder_attention_mask": ids_mask,
    }
    with torch.no_grad():
        expected, logits = donor(**inputs).logits, model(**inputs).logits
    assert expected.std() > 0.1  # the comparison would be empty on logits near zero
    assert logits.shape == (2, 12, 24)
    for row, length in enumerate((12, 9)):
        torch.testing.assert_close(logits[row, :length], expected[row, :length], rtol=0, atol=1e-5)


def test_native_mask_embedding_is_the_only_new_parameter(native):
    folder, donor = native
    model = from_canary(MDMASRForConditionalGeneration, folder)
    embedding = donor.model.decoder.embed_tokens.weight
    torch.testing.assert_close(model.state_dict()[MASK_EMBEDDING], embedding.mean(dim=0, keepdim=True))
    num_parameters = sum(p.numel() for p in donor.parameters())
    assert sum(p.numel() for p in model.parameters()) == num_parameters + embedding.shape[1]
    assert all(p.requires_grad for p in model.parameters())
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert model.config.mask_token_id == 24 and model.config.vocab_size == 24


def test_native_prompt_and_special_ids(native):
    folder, _ = native
    model, (processor, batch) = from_canary(MDMASRForConditionalGeneration, folder), load_processor(folder)
    assert isinstance(model.generation_config, MDMASRGenerationConfig)
    template = model.generation_config.prompt_template
    assert processor.prompt_template == template
    names = ["<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|de|>", "<|de|>", "<|nopnc|>"]
    names += ["<|noitn|>", "<|notimestamp|>", "<|nodiarize|>"]
    prompt = build_prompt_ids(template, language="de", punctuation=False)[0].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(prompt) == names
    translation = build_prompt_ids(template, language="de", target_language="en")[0].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(translation)[3:6] == ["<|de|>", "<|en|>", "<|pnc|>"]
    assert processor.tokenizer.mask_token_id == model.config.mask_token_id
    # Ids 2, 3 and 7 by their place in SPECIAL_TOKENS, behind <unk>.
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.decoder_start_token_id) == (2, 3, 7)
    assert batch["input_features"].shape[-1] == NUM_MEL_BINS
    sequences = model.generate(**batch, language="de")
    assert sequences.shape[0] == 1 and int(sequences.max()) < 24


def test_native_model_survives_a_round_trip(native, tmp_path):
    model = from_canary(MDMASRForConditionalGeneration, native[0])
    model.save_pretrained(tmp_path)
    loaded = MDMASRForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.generation_config.prompt_template == model.generation_config.prompt_template


def test_native_dtype(native):
    model = from_canary(MDMASRForConditionalGeneration, native[0], dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Positions are computed in single precision, whatever the weights are in.
    assert model.model.encoder.encode_positions.inv_freq.dtype == torch.float32
    with pytest.raises(ValueError, match="'float33'"):
        from_canary(MDMASRForConditionalGeneration, native[0], dtype="float33")


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda w: w.pop("model.decoder.layers.1.encoder_attn.k_proj.bias"), "layers.1.encoder_attn.k_proj.bias"),
        (lambda w: w.pop("model.encoder.layers.0.conv.norm.running_mean"), "layers.0.conv.norm.running_mean"),
        (lambda w: w.update({"model.decoder.surprise.weight": torch.ones(1)}), "1 unknown: model.decoder.surprise"),
        (lambda w: w.update({"model.decoder.norm.weight": torch.ones(5)}), r"model.decoder.norm.weight is \(5,\)"),
        (lambda w: w.update({"proj_out.weight": torch.ones(24, 16)}), "output weights differ"),
    ],
)
def test_native_loading_is_strict(native, tmp_path, change, name):
    folder = copy_with_weights(native[0], tmp_path / "changed", change)
    with pytest.raises(ValueError, match=name):
        from_canary(MDMASRForConditionalGeneration, folder)


def test_native_needs_safetensors_and_a_processor(native, tmp_path):
    folder = copy_with_weights(native[0], tmp_path / "changed", lambda weights: None)
    (folder / "model.safetensors").unlink()
    torch.save(native[1].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors only"):
        from_canary(MDMASRForConditionalGeneration, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="donor's processor"):
        canary_processor(folder)


# NeMo's format

ENCODER_WIDTH, DECODER_WIDTH, INNER, NUM_LAYERS, NUM_HEADS, CHANNELS, KERNEL = 16, 24, 40, 2, 2, 4, 9


@pytest.fixture(scope="module")
def spm_models():
    return {
        "spl_tokens": train([" ".join(SPECIAL_TOKENS)], len(SPECIAL_TOKENS) + 2, SPECIAL_TOKENS),
        "en": train(ENGLISH, 40),
        "de": train(GERMAN, 43),
    }


def nemo_vocab_size(spm_models):
    num_tokens = len(MDMASRAggregateTokenizer(models=spm_models))
    assert num_tokens % 8 != 0  # so that rounding up is tested
    return num_tokens + -num_tokens % 8


def sinusoids(num_positions, width):
    """NeMo's: sine and cosine of each frequency side by side, divided by the root of the width."""
    table = torch.zeros(num_positions, width)
    for channel in range(0, width, 2):
        angles = torch.arange(num_positions) / 10000 ** (channel / width)
        table[:, channel], table[:, channel + 1] = angles.sin(), angles.cos()
    return table / math.sqrt(width)


def nemo_shapes(vocab_size, encoder_bias=True):
    """Name and shape of every tensor of a Canary checkpoint, written out from NeMo's module definitions."""
    shapes = {}

    def linear(name, outputs, inputs, bias=True, kernel=()):
        shapes[f"{name}.weight"] = (outputs, inputs, *kernel)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def layer_norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    e, d = ENCODER_WIDTH, DECODER_WIDTH
    shapes["preprocessor.featurizer.window"] = (400,)
    shapes["preprocessor.featurizer.fb"] = (1, NUM_MEL_BINS, 257)
    for index, (inputs, size) in {0: (1, 3), 2: (1, 3), 3: (CHANNELS, 1), 5: (1, 3), 6: (CHANNELS, 1)}.items():
        linear(f"encoder.pre_encode.conv.{index}", CHANNELS, inputs, kernel=(size, size))
    linear("encoder.pre_encode.out", e, CHANNELS * NUM_MEL_BINS // 8)
    for n in range(NUM_LAYERS):
        layer = f"encoder.layers.{n}"
        for name in ("norm_feed_forward1", "norm_conv", "norm_self_att", "norm_feed_forward2", "norm_out"):
            layer_norm(f"{layer}.{name}", e)
        for name in ("feed_forward1", "feed_forward2"):
            linear(f"{layer}.{name}.linear1", 4 * e, e, encoder_bias)
            linear(f"{layer}.{name}.linear2", e, 4 * e, encoder_bias)
        linear(f"{layer}.conv.pointwise_conv1", 2 * e, e, encoder_bias, (1,))
        linear(f"{layer}.conv.depthwise_conv", e, 1, encoder_bias, (KERNEL,))
        linear(f"{layer}.conv.pointwise_conv2", e, e, encoder_bias, (1,))
        layer_norm(f"{layer}.conv.batch_norm", e)
        shapes[f"{layer}.conv.batch_norm.running_mean"] = shapes[f"{layer}.conv.batch_norm.running_var"] = (e,)
        shapes[f"{layer}.conv.batch_norm.num_batches_tracked"] = ()
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            linear(f"{layer}.self_attn.{name}", e, e, encoder_bias)
        linear(f"{layer}.self_attn.linear_pos", e, e, bias=False)
        shapes[f"{layer}.self_attn.pos_bias_u"] = shapes[f"{layer}.self_attn.pos_bias_v"] = (NUM_HEADS, e // NUM_HEADS)
    linear("encoder_decoder_proj", d, e)
    shapes["transf_decoder._embedding.token_embedding.weight"] = (vocab_size, d)
    shapes[POSITIONS] = (64, d)
    layer_norm("transf_decoder._embedding.layer_norm", d)
    for n in range(NUM_LAYERS):
        layer = f"transf_decoder._decoder.layers.{n}"
        for index in (1, 2, 3):
            layer_norm(f"{layer}.layer_norm_{index}", d)
        for sub_layer in ("first_sub_layer", "second_sub_layer"):
            for name in ("query_net", "key_net", "value_net", "out_projection"):
                linear(f"{layer}.{sub_layer}.{name}", d, d)
        linear(f"{layer}.third_sub_layer.dense_in", INNER, d)
        linear(f"{layer}.third_sub_layer.dense_out", d, INNER)
    layer_norm("transf_decoder._decoder.final_layer_norm", d)
    linear("log_softmax.mlp.layer0", vocab_size, d)
    return shapes


def nemo_weights(vocab_size, encoder_bias=True):
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in nemo_shapes(vocab_size, encoder_bias).items():
        weights[name] = 0.3 * torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            weights[name] = weights[name].square() + 0.5
        elif name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
    weights[POSITIONS] = sinusoids(64, DECODER_WIDTH)
    weights["log_softmax.mlp.layer0.weight"] = weights["transf_decoder._embedding.token_embedding.weight"]
    return weights


def nemo_settings(spm_models):
    """What model_config.yaml holds of a canary-180m-flash, at small width."""
    langs = {
        name: {"dir": f"/training/{name}", "type": "bpe", "model_path": f"nemo:0123_{name}_tokenizer.model"}
        for name in spm_models
    }
    return {
        "sample_rate": 16000,
        "prompt_format": "canary2",
        "model_defaults": {"asr_enc_hidden": ENCODER_WIDTH, "lm_dec_hidden": DECODER_WIDTH},
        "tokenizer": {"dir": None, "type": "agg", "langs": langs},
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": NUM_MEL_BINS,
            "n_fft": 512,
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-5,
            "pad_to": 0,
            "pad_value": 0.0,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": NUM_MEL_BINS,
            "feat_out": -1,
            "n_layers": NUM_LAYERS,
            "d_model": ENCODER_WIDTH,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": CHANNELS,
            "causal_downsampling": False,
            "reduction": None,
            "reduction_factor": 1,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": NUM_HEADS,
            "att_context_size": [-1, -1],
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": KERNEL,
            "conv_norm_type": "batch_norm",
            "conv_context_size": None,
            "dropout": 0.1,
        },
        "transf_encoder": {"num_layers": 0},
        "transf_decoder": {
            "pre_ln_final_layer_norm": True,
            "config_dict": {
                "max_sequence_length": 64,
                "num_token_types": 0,
                "learn_positional_encodings": False,
                "hidden_size": DECODER_WIDTH,
                "inner_size": INNER,
                "num_layers": NUM_LAYERS,
                "num_attention_heads": NUM_HEADS,
                "hidden_act": "relu",
                "pre_ln": True,
                "vocab_size": "None",
            },
        },
        "head": {"num_layers": 1, "num_classes": nemo_vocab_size(spm_models)},
    }


def write_nemo(path, settings, weights, spm_models, extra=(), mode="w"):
    """A NeMo archive: settings, weights and the tokenizers' files, `extra` members first."""
    checkpoint = io.BytesIO()
    torch.save(weights, checkpoint)
    members = {"./model_config.yaml": yaml.safe_dump(settings, sort_keys=False).encode()}
    members["./model_weights.ckpt"] = checkpoint.getvalue()
    members |= {f"./0123_{name}_tokenizer.model": model for name, model in spm_models.items()}
    with tarfile.open(path, mode) as archive:
        for info, content in extra:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


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


@pytest.mark.parametrize("encoder_bias, mode", [(True, "w"), (False, "w:gz")])
def test_nemo_every_tensor_arrives(nemo, spm_models, encoder_bias, mode):
    def change(settings, weights):
        settings["encoder"]["use_bias"] = encoder_bias

    model = from_canary(MDMASRForConditionalGeneration, nemo(change, mode=mode, encoder_bias=encoder_bias))
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


@pytest.mark.parametrize("xscaling", [False, True])
def test_nemo_logits_equal_the_reference(nemo, spm_models, xscaling):
    def change(settings, weights):
        settings["encoder"]["xscaling"] = xscaling

    vocab_size = nemo_vocab_size(spm_models)
    w = nemo_weights(vocab_size)
    model = make_causal(from_canary(MDMASRForConditionalGeneration, nemo(change)), "sdpa")
    values, mask = features()
    ids = torch.randint(0, vocab_size, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        frames = model.encode(values, mask)
        logits = model(input_features=values, attention_mask=mask, decoder_input_ids=ids).logits
        for row, num_frames in enumerate(mask.sum(dim=-1).tolist()):
            expected = reference_encoder(w, values[row, :num_frames], math.sqrt(ENCODER_WIDTH) if xscaling else 1.0)
            got = frames.last_hidden_state[row, : len(expected)]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            assert int(frames.attention_mask[row].sum()) == len(expected)
            projected = F.linear(expected, w["encoder_decoder_proj.weight"], w["encoder_decoder_proj.bias"])
            expected = reference_decoder(w, ids[row], projected)
            assert expected.std() > 0.1
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


def test_nemo_same_width_has_no_projection(nemo, spm_models, monkeypatch):
    monkeypatch.setitem(globals(), "DECODER_WIDTH", ENCODER_WIDTH)

    def change(settings, weights):
        del weights["encoder_decoder_proj.weight"], weights["encoder_decoder_proj.bias"]

    model = from_canary(MDMASRForConditionalGeneration, nemo(change))
    assert model.model.encoder_projection is None


def test_nemo_config_prompt_and_processor(nemo, spm_models, tmp_path):
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


def test_nemo_features_equal_the_extractors(nemo):
    processor, batch = load_processor(nemo())
    audio = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    stock = ParakeetFeatureExtractor(feature_size=NUM_MEL_BINS)(audio, sampling_rate=16000, return_tensors="pt")
    num_frames = int(stock["attention_mask"].sum())
    torch.testing.assert_close(
        torch.as_tensor(batch["input_features"])[0, :num_frames], stock["input_features"][0, :num_frames]
    )


def test_nemo_first_prompt_format(nemo):
    def change(settings, weights):
        settings["prompt_format"] = "canary"

    model = from_canary(MDMASRForConditionalGeneration, nemo(change))
    template = model.generation_config.prompt_template
    # Transcript 4, de 16, transcribe 17 or translate 18, de 16 or en 15, pnc 5.
    assert build_prompt_ids(template, language="de").tolist() == [[4, 16, 17, 16, 5]]
    ids = build_prompt_ids(template, language="de", target_language="en", task="translate")
    assert ids.tolist() == [[4, 16, 18, 15, 5]]
    assert model.config.decoder_start_token_id == 4


def test_nemo_in_a_folder(nemo, native, tmp_path):
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


@pytest.mark.parametrize(
    "change, message",
    [
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
        (lambda s, w: s["tokenizer"].update(type="bpe"), "'bpe'.*canary-1b-v2"),
        (lambda s, w: s["tokenizer"]["langs"]["de"].update(type="wpe"), "langs.de"),
        (lambda s, w: s["tokenizer"]["langs"]["de"].update(model_path="nemo:lost.model"), "lost.model.*langs.de"),
        (lambda s, w: s["tokenizer"]["langs"].pop("spl_tokens"), "spl_tokens"),
    ],
)
def test_nemo_what_does_not_fit_is_named(nemo, change, message):
    with pytest.raises(ValueError, match=message):
        from_canary(MDMASRForConditionalGeneration, nemo(change))


def test_nemo_old_checkpoints_may_lack_the_batch_counter(nemo):
    def change(settings, weights):
        del weights["encoder.layers.0.conv.batch_norm.num_batches_tracked"]

    model = from_canary(MDMASRForConditionalGeneration, nemo(change))
    assert [int(layer.conv.norm.num_batches_tracked) for layer in model.model.encoder.layers] == [0, 7]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["TEST_CANARY_FOLDER"],)


def test_nemo_pickled_code_is_refused_and_not_run(nemo, tmp_path, monkeypatch):
    folder = tmp_path / "made_by_the_pickle"
    monkeypatch.setenv("TEST_CANARY_FOLDER", str(folder))
    path = nemo(lambda settings, weights: weights.update(payload=RunsCode()))
    with pytest.raises(ValueError, match="more than tensors"):
        from_canary(MDMASRForConditionalGeneration, path)
    assert not folder.exists()


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


@pytest.mark.parametrize("kind", unsafe_members())
@pytest.mark.parametrize("with_filter", [True, False])
def test_nemo_unsafe_members_are_refused(nemo, monkeypatch, kind, with_filter):
    if not with_filter:  # as in Python before 3.11.4
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    path = nemo(extra=[(unsafe_members()[kind], b"")])
    with pytest.raises(ValueError, match="read safely"):
        canary_processor(path)


def test_nemo_damaged_archives_are_refused(nemo, tmp_path, spm_models):
    path = nemo()
    text = tmp_path / "text.nemo"
    text.write_text("no archive")
    cut = tmp_path / "cut.nemo"
    cut.write_bytes(path.read_bytes()[:30_000])
    for broken in (text, cut):
        with pytest.raises(ValueError, match="NeMo archive"):
            from_canary(MDMASRForConditionalGeneration, broken)
    incomplete = tmp_path / "incomplete.nemo"
    with tarfile.open(path) as source, tarfile.open(incomplete, "w") as target:
        for member in source:
            if "weights" not in member.name:
                target.addfile(member, source.extractfile(member))
    with pytest.raises(ValueError, match="lacks model_weights.ckpt"):
        from_canary(MDMASRForConditionalGeneration, incomplete)
    canary_processor(incomplete)  # which needs no weights
