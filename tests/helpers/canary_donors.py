# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Donors for the converters' tests: tiny models with every part of the real ones, and NeMo archives written here."""

import io
import math
import tarfile

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CanaryConfig,
    CanaryForConditionalGeneration,
    CanaryProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
)

from mdm_asr_hf.convert.canary import canary_processor
from mdm_asr_hf.convert.common import DRAFTS
from mdm_asr_hf.decoder_mdm_asr import DraftingCache
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
from mdm_asr_hf.tokenization_mdm_asr import MDMASRAggregateTokenizer


def parakeet_features_missing():
    try:
        ParakeetFeatureExtractor()
    except ImportError:
        return True
    return False


needs_parakeet_features = pytest.mark.skipif(
    parakeet_features_missing(), reason="this transformers computes Parakeet features with librosa, which is not there"
)

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


def logits_in_pieces(model, encoder_outputs, ids, sizes):
    """Logits (B, L, V) of ids (B, L) that come in pieces of these sizes, the keys of the pieces before being kept."""
    config = model.config.decoder_config
    shape = (len(ids), config.num_key_value_heads, ids.shape[1], config.head_dim)
    cache = DraftingCache(config.num_hidden_layers, shape)
    pieces, first = [], 0
    for size in sizes:
        places = torch.arange(first, first + size).expand(len(ids), -1)
        first += size
        cache.place(places, first)
        outputs = model(
            decoder_input_ids=ids[:, places[0]],
            decoder_attention_mask=torch.arange(first) <= places[..., None],
            encoder_outputs=encoder_outputs,
            position_ids=places,
            past_key_values=cache,
        )
        pieces.append(outputs.logits)
    return torch.cat(pieces, dim=1)


def check_drafts(model, draft_layers, embedding, norm_weight):
    """That a model's drafts start as its donor's last layers, with scales from the donor's embedding and norm."""
    state, config = model.state_dict(), model.config.decoder_config
    assert config.draft_layers == draft_layers and config.is_causal
    drafts = {name.removeprefix(DRAFTS): tensor for name, tensor in state.items() if name.startswith(DRAFTS)}
    first = config.num_hidden_layers - draft_layers
    names = [name for name in drafts if name.startswith("layers.")]
    assert {int(name.split(".")[1]) for name in names} == set(range(draft_layers))
    # Keys and values of the frames are the donor's.
    assert not [name for name in names if "cross_attn.k_proj" in name or "cross_attn.v_proj" in name]
    for name in names:
        _, index, rest = name.split(".", 2)
        assert torch.equal(drafts[name], state[f"model.decoder.layers.{first + int(index)}.{rest}"]), name
    for name in ("layer_norm.weight", "layer_norm.bias"):
        assert torch.equal(drafts[name], state[f"model.decoder.{name}"])
    # Masks of a block start alike, and the sequential head changes nothing.
    for name in ("offset_embeddings.weight", "head.out.weight", "head.out.bias"):
        assert not drafts[name].any()
    token_ids = drafts["head.token_ids"].tolist()
    assert len(set(token_ids)) == len(token_ids) == config.draft_vocab_size and model.config.eos_token_id in token_ids
    assert config.draft_state_scale == pytest.approx(norm_weight.square().mean().sqrt().item(), abs=1e-4)
    assert config.draft_embedding_scale == pytest.approx(1 / embedding.square().mean().sqrt().item(), abs=1e-4)


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


def frames(batch_size=8):
    """Frames (B, T, width), every second row shorter, as the encoder returns them."""
    states = 0.3 * torch.randn(batch_size, 12, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(batch_size, 12, dtype=torch.long)
    mask[1::2, 7:] = 0
    return MDMASREncoderOutput(last_hidden_state=states, attention_mask=mask)


@torch.no_grad()
def vary_texts(donor):
    """Makes tokens differ from their neighbours, and some texts end: by weaker embeddings, and by an output bias that
    evens out what is said everywhere, but for the end of text."""
    donor.model.decoder.embed_tokens.weight.mul_(0.3)
    donor.model.decoder.norm.weight.mul_(3)
    donor.proj_out.bias.zero_()
    ids = torch.randint(0, 24, (8, 64), generator=torch.Generator().manual_seed(4))
    logits = donor(encoder_outputs=frames(), decoder_input_ids=ids).logits
    donor.proj_out.bias.copy_(-logits.mean(dim=(0, 1)))
    donor.proj_out.bias[donor.config.eos_token_id] += 0.5 * logits.std(dim=(0, 1)).mean()


def save_native_donor(folder):
    """A donor in transformers' format, saved with its processor."""
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
    vary_texts(donor)
    donor.save_pretrained(folder)
    extractor = ParakeetFeatureExtractor(feature_size=NUM_MEL_BINS)
    CanaryProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return donor


# NeMo's format

ENCODER_WIDTH, DECODER_WIDTH, INNER, NUM_LAYERS, NUM_HEADS, CHANNELS, KERNEL = 16, 24, 40, 2, 2, 4, 9


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
