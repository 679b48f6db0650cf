# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny random Whisper donors with a real byte-level BPE, English-only and multilingual."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from canary_donors import randomize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

NUM_MEL_BINS, WIDTH, NUM_MERGES = 8, 16, 30
# Ids: 256 bytes, 30 merges, and in a multilingual vocabulary one empty token, as Whisper's has it.
NUM_TEXT = {False: 256 + NUM_MERGES, True: 256 + NUM_MERGES + 1}
SPECIALS = [
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]
NUM_TIMESTAMPS = 6
SENTENCES = ["the cat sat on the mat", "the dog and the cat", "der hund und die katze", "that is the end of the day"]
# Greedy, and nothing decoded anew.
GREEDY = {
    "temperature": 0.0,
    "no_speech_threshold": None,
    "logprob_threshold": None,
    "compression_ratio_threshold": None,
}


# Writes released ones, where it lies beside the repository and can get them.
GET_WHISPER = Path(__file__).parents[3] / "shared" / "tools" / "get_whisper.py"
needs_released_whisper = pytest.mark.skipif(not GET_WHISPER.is_file(), reason="nothing here writes a released Whisper")


def save_released(name, folder):
    """A released Whisper, in this process, which has imported what it takes; skips where it cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(GET_WHISPER), name, str(folder)])
        try:
            runpy.run_path(str(GET_WHISPER), run_name="__main__")
        except Exception as error:
            pytest.skip(f"the donor's weights cannot be had: {error}")


def train_bpe():
    """Vocabulary and merges of a byte-level BPE in GPT-2's order: bytes first, then one id per merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + NUM_MERGES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    assert [bpe["vocab"][left + right] for left, right in merges] == list(range(256, 256 + NUM_MERGES))
    return bpe["vocab"], merges


def save_tokenizer(folder, multilingual):
    vocab, merges = train_bpe()
    if multilingual:
        vocab[""] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    # The first two timestamps have a name, the others do not: both is found in tokenizer files.
    tokenizer.add_tokens(["<|0.00|>", "<|0.02|>"])
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_donor(folder, multilingual, dtype=torch.float32, max_target_positions=32):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder, multilingual)
    eos = NUM_TEXT[multilingual]
    config = WhisperConfig(
        vocab_size=eos + len(SPECIALS) + NUM_TIMESTAMPS,
        num_mel_bins=NUM_MEL_BINS,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=40,
        max_target_positions=max_target_positions,
        pad_token_id=eos,
        bos_token_id=eos,
        eos_token_id=eos,
        decoder_start_token_id=eos + 1,
    )
    donor = randomize(WhisperForConditionalGeneration(config))
    with torch.no_grad():
        # So that one text differs from another, and tokens from their neighbours.
        donor.model.decoder.layer_norm.bias.zero_()
        donor.model.decoder.embed_positions.weight.mul_(3)
        donor.model.encoder.layer_norm.weight.mul_(4)
    ids = tokenizer.get_vocab()
    donor.generation_config = GenerationConfig(
        is_multilingual=multilingual,
        max_length=max_target_positions,
        return_timestamps=False,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        # All ids of text but fifteen, so that texts come to an end.
        suppress_tokens=[i for i in range(config.vocab_size) if (i % 20 or i > eos) and i != eos],
        begin_suppress_tokens=[140, 180, eos],
        **{name: getattr(config, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")},
        decoder_start_token_id=config.decoder_start_token_id,
    )
    if multilingual:
        languages = [token for token in SPECIALS if token[2:-2] in LANGUAGES]
        donor.generation_config.lang_to_id = {token: ids[token] for token in languages}
        donor.generation_config.task_to_id = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    donor.to(dtype).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=NUM_MEL_BINS).save_pretrained(folder)
    return donor, tokenizer
