# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Small SentencePiece models of two languages."""

import io

import sentencepiece

SPECIAL_TOKENS = ["<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>"]
ENGLISH = ["the cat sat on the mat", "a dog in the sun", "the end of the day", "sun and moon and cat"]
GERMAN = ["der hund und die katze", "die sonne am ende", "der tag und das ende", "katze und hund und maus"]


def train(sentences, vocab_size, special_tokens=()):
    """A serialised SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        user_defined_symbols=list(special_tokens),
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()
