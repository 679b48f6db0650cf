"""Tiny random models and tokenizers that the tests share."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from mdm_asr_hf import MDMASRConfig, MDMASRFeatureExtractor, MDMASRForConditionalGeneration, MDMASRProcessor

VOCAB_SIZE = 60
PAD, START = 2, VOCAB_SIZE
WHISPER_ENCODER = dict(
    model_type="whisper",
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    num_mel_bins=80,
    max_source_positions=1500,
    vocab_size=VOCAB_SIZE,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)
PARAKEET_ENCODER = dict(
    model_type="parakeet_encoder",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    subsampling_conv_channels=8,
    num_mel_bins=80,
    conv_kernel_size=5,
    scale_input=False,
    layerdrop=0.0,
)
WAV2VEC2_ENCODER = dict(
    model_type="wav2vec2",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=[8, 8],
    conv_kernel=[10, 4],
    conv_stride=[80, 4],
    num_feat_extract_layers=2,
    # Group normalisation over time would mix padding in: "layer" is what batched models use.
    feat_extract_norm="layer",
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)
ENCODERS = {"whisper": WHISPER_ENCODER, "parakeet": PARAKEET_ENCODER, "wav2vec2": WAV2VEC2_ENCODER}
WHISPER_DECODER = dict(
    position_embedding_type="learned",
    embedding_layernorm=False,
    attention_key_bias=False,
    output_bias=False,
    hidden_act="gelu",
    hidden_size=16,
)
CANARY_DECODER = dict(hidden_size=24)
# Of drafts: from left to right.
DRAFT_SAMPLER = {"name": "pbeb_conf", "gamma": 3.0, "lambda_": None}
# A seed, and the token of its texts that is made their end: those of the clips of `tiny_inputs` then end at different
# lengths.
ENDS = {"whisper": (294, 38), "parakeet": (6, 47), "wav2vec2": (5, 17)}


def tiny_config(encoder="whisper", **settings):
    decoder = dict(
        vocab_size=VOCAB_SIZE,
        num_input_only_tokens=2,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        max_position_embeddings=300,
    )
    decoder |= WHISPER_DECODER if encoder == "whisper" else CANARY_DECODER
    decoder |= settings.pop("decoder_config", {})
    return MDMASRConfig(
        encoder_config=ENCODERS[encoder] | settings.pop("encoder_config", {}),
        decoder_config=decoder,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=VOCAB_SIZE,
        encoder_trailing_silence_s=settings.pop("encoder_trailing_silence_s", 0.3),
        input_frames_per_s=16000.0 if encoder == "wav2vec2" else 100.0,
        **settings,
    )


def tiny_model(encoder="whisper", seed=0, **settings):
    """A model whose random weights are large enough that its logits differ from position to position."""
    torch.manual_seed(seed)
    model = MDMASRForConditionalGeneration(tiny_config(encoder, initializer_range=0.02, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.model.decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if "embed" not in name else 20.0)
    if model.config.has_drafts:
        model.generation_config.sampler = DRAFT_SAMPLER
    return model


def tiny_drafts_model(encoder="whisper", dtype=torch.float64, **settings):
    """
    A model that decodes by drafts, half of which are right: their head is fitted to the model's own texts of
    `tiny_inputs()`, which are of 20, 11 and 31 tokens with Whisper's encoder. In double precision, so that a text is
    the same in every batch and tree.
    """
    seed, last_token = ENDS[encoder]
    settings["decoder_config"] = {"draft_layers": 2, "draft_length": 3} | settings.get("decoder_config", {})
    torch.manual_seed(seed)
    model = MDMASRForConditionalGeneration(tiny_config(encoder, **settings)).eval().double()
    model.generation_config.sampler = DRAFT_SAMPLER
    # Whisper's decoder hears much of its random encoder, and little of others.
    factors = (8.0, 3.0) if encoder == "whisper" else (20.0, 0.3)
    with torch.no_grad():
        if encoder == "whisper":
            # Sinusoids would drown what random layers make of the audio.
            model.get_encoder().embed_positions.weight.normal_(std=0.02)
        for name, parameter in model.model.named_parameters():
            if parameter.dim() > 1 and name.startswith("decoder"):
                parameter.mul_(30.0 if "embed_positions" in name else factors["embed" in name])
            elif parameter.dim() > 1 and name.startswith("encoder_projection"):
                parameter.mul_(100.0)
        embedding = model.get_input_embeddings().weight
        ends = [model.config.eos_token_id, last_token]
        embedding[ends] = embedding[ends[::-1]]
    fit_drafts(model, encoder)
    return model.to(dtype)


@torch.no_grad()
def fit_drafts(model, encoder="whisper", num_tokens=24):
    """Fits the last layer of the sequential head, by least squares, to the donor's states of its own texts."""
    decoder = model.get_decoder()
    head, length = decoder.drafts.head, decoder.config.draft_length
    outputs = model.prepare_cross_attention(model.encode(*tiny_inputs(encoder)))
    ids = torch.full((len(outputs.last_hidden_state), 1), model.config.decoder_start_token_id)
    while ids.shape[1] < num_tokens + length + 2:
        logits = model(decoder_input_ids=ids, encoder_outputs=outputs).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=-1)
    frontiers = torch.arange(num_tokens).expand(len(ids), -1)
    blocks = model._lay_blocks(ids, frontiers)
    result = model.model(decoder_input_ids=ids, encoder_outputs=outputs, frontiers=frontiers, block_ids=blocks)
    places = frontiers[..., None] + torch.arange(length + 2)
    rows = torch.arange(len(ids))[:, None, None]
    known, states = decoder.embed_ids(ids)[rows, places], result.draft_hidden_states
    seen = []
    handle = head.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    head(states, known[:, :, 1:-1], known[:, :, :-2])
    handle.remove()
    inputs = torch.nn.functional.pad(seen[0], (0, 1), value=1.0).flatten(0, 2)
    wanted = (result.last_hidden_state[rows, places[..., 1:-1]] - states).flatten(0, 2)
    solution = torch.linalg.lstsq(inputs, wanted).solution
    head.out.weight.copy_(solution[:-1].T)
    head.out.bias.copy_(solution[-1])


def tiny_inputs(encoder="whisper", seconds=(1.0, 0.6, 0.35), seed=0):
    """Random features of clips of several lengths, padded with garbage, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    rate = 16000 if encoder == "wav2vec2" else 100
    lengths = torch.tensor([round(s * rate) for s in seconds])
    shape = (len(seconds), int(lengths.max())) + (() if encoder == "wav2vec2" else (80,))
    features = torch.randn(shape, generator=generator) * (0.1 if encoder == "wav2vec2" else 1.0)
    mask = (torch.arange(shape[1]) < lengths[:, None]).long()
    return features, mask


def generate(model, seconds=(1.0, 0.6), **kwargs):
    features, mask = tiny_inputs("whisper", seconds=seconds)
    return model.generate(features, attention_mask=mask, return_dict_in_generate=True, **kwargs)


def tiny_tokenizer():
    """Byte-level tokens of the letters, with the ids `tiny_config` expects: eos 1, pad 2, start 60, mask 61."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "<pad>", "Ġ", *"abcdefghijklmnopqrstuvwxyz'.,?!"])}
    while len(vocab) < VOCAB_SIZE:
        vocab[f"<unused{len(vocab)}>"] = len(vocab)
    vocab |= {"<start>": VOCAB_SIZE, "<mask>": VOCAB_SIZE + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<start>"],
    )


def tiny_processor():
    extractor = MDMASRFeatureExtractor(WhisperFeatureExtractor(feature_size=80), max_duration_s=30.0)
    return MDMASRProcessor(extractor, tiny_tokenizer(), prompt_template={"tokens": [VOCAB_SIZE]}, text_prefix=" ")
