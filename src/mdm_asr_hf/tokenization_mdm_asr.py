# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Tokenizer of the Canary flash donors: one SentencePiece model per language behind one contiguous range of ids."""

import base64
import json
import os
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizer

from .configuration_mdm_asr import MDMASRConfig

SPECIAL_MODEL = "spl_tokens"
WORD_START = "▁"


class MDMASRAggregateTokenizer(PreTrainedTokenizer):
    r"""
    Several SentencePiece models share one vocabulary: ids are laid out model after model, in the order of `models`, as
    NeMo's aggregate tokenizer does. The model named `"spl_tokens"` holds the prompt and control tokens (`<pad>`,
    `<|endoftext|>`, `<|en|>`, ...), every other one the text of one language. Tokens added later, such as the mask,
    take the ids that follow.

    The languages share pieces, so a token of the language `de` is written `de:▁und`; special tokens are written as
    they are. Encoding needs to know the language; decoding does not.

    ```python
    tokenizer("Guten Tag", language="de")
    tokenizer(["Guten Tag", "Hello"], language=["de", "en"], padding=True)
    ```

    Args:
        vocab_file (`str`, *optional*): the file `save_pretrained` wrote: the models, in order, base64-encoded in JSON.
            One file, because the Auto classes download only files whose names they know in advance.
        models (`dict[str, bytes]`, *optional*): name to serialised SentencePiece model; instead of `vocab_file`.
        language (`str`, *optional*): the language texts are encoded in when a call names none. Defaults to `"en"`
            where there is one, else to the first language.
    """

    vocab_files_names = {"vocab_file": "aggregate_vocab.json"}
    model_input_names = ["input_ids", "attention_mask"]
    takes_language = True

    def __init__(
        self,
        vocab_file: str | None = None,
        models: dict[str, bytes] | None = None,
        language: str | None = None,
        unk_token: str = "<unk>",
        bos_token: str = "<|startoftranscript|>",
        eos_token: str = "<|endoftext|>",
        pad_token: str = "<pad>",
        **kwargs,
    ):
        if (vocab_file is None) == (models is None):
            raise ValueError(
                f"{type(self).__name__} needs exactly one of `vocab_file` and `models`. A folder to load from must "
                f"hold {self.vocab_files_names['vocab_file']!r}."
            )
        if vocab_file is not None:
            saved = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
            models = {entry["name"]: base64.b64decode(entry["model"]) for entry in saved["models"]}
        self._load_models(models)
        if language is None:
            language = "en" if self._find_language("en") else self.languages[0]
        self.language = self._checked_language(language)
        super().__init__(
            language=self.language,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            # Of the arguments all that are given are kept, and these in their own file.
            models=None,
            **kwargs,
        )

    def _load_models(self, models: dict[str, bytes]) -> None:
        if SPECIAL_MODEL not in models or len(models) < 2:
            raise ValueError(
                f"`models` must hold {SPECIAL_MODEL!r} and at least one language, got {list(models)}. A single "
                "SentencePiece model is not an aggregate: load it with transformers' own tokenizers."
            )
        self._models, self._offsets, self._tokens, self._pieces = {}, {}, [], []
        self._base_special_ids = []
        for name, serialised in models.items():
            model = sentencepiece.SentencePieceProcessor()
            try:
                model.LoadFromSerializedProto(serialised)
            except RuntimeError as error:
                raise ValueError(f"`models[{name!r}]` is not a SentencePiece model.") from error
            self._models[name], self._offsets[name] = model, len(self._tokens)
            for index in range(model.get_piece_size()):
                piece = model.id_to_piece(index)
                if name == SPECIAL_MODEL or model.is_control(index) or model.is_unknown(index):
                    self._base_special_ids.append(len(self._tokens))
                self._tokens.append(piece if name == SPECIAL_MODEL else f"{name}:{piece}")
                self._pieces.append(piece)
        self._token_ids = {token: index for index, token in enumerate(self._tokens)}
        if len(self._token_ids) != len(self._tokens):
            raise ValueError(f"`models` {list(models)} give two ids the same token. Rename the languages.")

    # Vocabulary

    @property
    def languages(self) -> list[str]:
        """The languages text can be encoded in, in the order of their ids."""
        return [name for name in self._models if name != SPECIAL_MODEL]

    @property
    def token_offsets(self) -> dict[str, int]:
        """The first id of every SentencePiece model, in the order of the ids."""
        return dict(self._offsets)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return {**self._token_ids, **self.added_tokens_encoder}

    @property
    def all_special_ids(self) -> list[int]:
        # A range, not a list of a thousand registered tokens: special tokens in a text are not looked for, as in NeMo.
        return list(dict.fromkeys([*self._base_special_ids, *super().all_special_ids]))

    def _convert_token_to_id(self, token: str) -> int:
        return self._token_ids.get(token, self._token_ids.get(str(self.unk_token)))

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._tokens):
            raise ValueError(
                f"Token id {index} is outside the vocabulary of {len(self)} tokens. Replace the label padding -100 "
                f"by `pad_token_id` ({self.pad_token_id}) before decoding."
            )
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens as NeMo does: `▁` is a space, the ends are stripped."""
        pieces = (self._pieces[self._token_ids[token]] if token in self._token_ids else token for token in tokens)
        return "".join(pieces).replace(WORD_START, " ").strip()

    # Encoding

    def set_language(self, language: str) -> None:
        """Sets the language of texts whose call names none; `save_pretrained` keeps it."""
        self.language = self._checked_language(language)

    def _find_language(self, language: str) -> str | None:
        if language in self.languages:
            return language
        # Some models name their languages with a region, their prompts without: "en" is "en-US" when that is unique.
        regional = [name for name in self.languages if name.split("-")[0] == language]
        return regional[0] if len(regional) == 1 else None

    def _checked_language(self, language: str) -> str:
        found = self._find_language(language)
        if found is None:
            raise ValueError(f"`language` {language!r} is unknown to this tokenizer. Choose one of {self.languages}.")
        return found

    def tokenize(self, text: str, language: str | None = None, split_special_tokens: bool | None = None, **kwargs):
        """Text to tokens in `language` (default: `self.language`); registered tokens (`<pad>`, ...) stay whole."""
        model_name = self.language if language is None else self._checked_language(language)
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        tokens = []
        for part in [text] if split_special_tokens else self.tokens_trie.split(text):
            if part in self._added_tokens_encoder and not split_special_tokens:
                tokens.append(part)
            else:
                # By way of ids: as pieces, SentencePiece returns an unknown character itself instead of <unk>.
                offset = self._offsets[model_name]
                tokens += [self._tokens[offset + index] for index in self._models[model_name].encode(part)]
        return tokens

    def _encode_plus(self, text, *args, language: str | list[str] | None = None, **kwargs):
        if isinstance(language, (list, tuple)):
            if isinstance(text, str) or len(text) != len(language):
                raise ValueError(f"`language` lists {len(language)} languages: pass as many texts, in a list.")
            rows = [
                self.convert_tokens_to_ids(self.tokenize(row, language=name)) if isinstance(row, str) else row
                for row, name in zip(text, language, strict=True)
            ]
            text, language = [row or "" for row in rows], None  # the base class takes ids, but no empty list
        return super()._encode_plus(text, *args, language=language, **kwargs)

    # Saving

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        models = [
            {
                "name": name,
                "offset": self._offsets[name],
                "model": base64.b64encode(model.serialized_model_proto()).decode("ascii"),
            }
            for name, model in self._models.items()
        ]
        Path(path).write_text(json.dumps({"models": models}, indent=1) + "\n", encoding="utf-8")
        return (path,)


# By its name alone, `AutoTokenizer` finds only classes that are registered, and falls back to another without a word.
AutoTokenizer.register(MDMASRConfig, tokenizer_class=MDMASRAggregateTokenizer, exist_ok=True)
