# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The processor: audio to features, text to labels, token ids to text."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .audio_mdm_asr import load_audio_batch
from .configuration_mdm_asr import converter
from .encoding_mdm_asr import check_unicode, text_prefix_of
from .hotwords_mdm_asr import HotwordIds, encode_hotwords
from .prompt_mdm_asr import build_prompt_ids, prompt_values, validate_prompt_template

IGNORED_LABEL = -100
# Of the call's arguments, those that labels take, too; and those that are of no matter where there is no audio.
TEXT_ARGUMENTS = ("padding", "max_length")
AUDIO_ARGUMENTS = (*TEXT_ARGUMENTS, "sampling_rate", "return_attention_mask")


class MDMASRProcessor(ProcessorMixin):
    r"""
    A feature extractor and a tokenizer behind one call.

    Args:
        feature_extractor ([`MDMASRFeatureExtractor`]): or a stock feature extractor.
        tokenizer ([`PreTrainedTokenizerBase`]): with an end-of-text token. One whose `takes_language` is true is
            called with `language=`, as an aggregate of one tokenizer per language needs.
        prompt_template (`dict`, *optional*): the decoder prompt, the same as in generation_config.json.
        text_prefix (`str`, *optional*): what the donor put before every text; Whisper a space, Canary nothing. By
            default what fits the tokenizer.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        prompt_template: dict[str, Any] | None = None,
        text_prefix: str | None = None,
    ):
        if prompt_template is not None:
            validate_prompt_template(prompt_template)
        if text_prefix is None:
            text_prefix = text_prefix_of(tokenizer)
        if not isinstance(text_prefix, str):
            raise ValueError(f"`text_prefix` must be a string, got {text_prefix!r}.")
        super().__init__(feature_extractor, tokenizer)
        self.prompt_template = prompt_template
        self.text_prefix = text_prefix

    @classmethod
    def from_whisper(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "MDMASRProcessor":
        """The processor of a Whisper donor, see `convert.whisper.whisper_processor`."""
        return converter("whisper", "whisper_processor")(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_canary(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "MDMASRProcessor":
        """The processor of a Canary donor or .nemo file, see `convert.canary.canary_processor`."""
        return converter("canary", "canary_processor")(pretrained_model_name_or_path, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "labels"]

    def __call__(
        self,
        audio: Any = None,
        text: str | list[str] | None = None,
        *,
        language: str | list[str] | None = None,
        target_language: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            audio: one clip, or a list, data set or column of B clips, of any form [`load_audio`] takes. Other rates
                are resampled.
            text (`str` or `list[str]`, *optional*): transcripts, for training.
            language (`str` or `list[str]`, *optional*): of the text, for tokenizers that take one. By default the
                prompt's.
            target_language (`str` or `list[str]`, *optional*): of the text, where it translates what is said in
                `language`.
            sampling_rate (`int`): rate in Hz of samples that do not carry their own.
            return_tensors (`str`, *optional*): `"pt"`, the default, `"np"`, or None for NumPy arrays and lists.
            padding (`bool` or `str`), max_length (`int`): of the features, see [`MDMASRFeatureExtractor`]; and
                `"max_length"` of the labels, which are otherwise as long as the longest.
            return_attention_mask (`bool`): by default True; the model needs the mask wherever clips were padded.
            kwargs: further arguments of the feature extractor. Unknown ones raise. Those for audio or text alone may
                stand in `audio_kwargs` and `text_kwargs`.

        Returns:
            [`BatchFeature`] with `input_features` and `attention_mask` (see [`MDMASRFeatureExtractor`]) if there is
            audio, and with **labels** (B, L) if there is text: its tokens, end of text, then -100.

        Raises:
            ValueError: audio that cannot be used, texts that do not match it, unknown arguments.
        """
        if audio is None and text is None:
            raise ValueError("`audio` and `text` are both None. Pass audio to transcribe, text for labels, or both.")
        data, return_tensors, audio_kwargs, text_kwargs = {}, *self._split_arguments(kwargs)
        if audio is not None:
            clips = load_audio_batch(
                audio,
                sampling_rate=audio_kwargs.pop("sampling_rate", None),
                target_sampling_rate=self.feature_extractor.sampling_rate,
                max_duration_s=getattr(self.feature_extractor, "max_duration_s", None),
            )
            features = self.feature_extractor(
                clips,
                sampling_rate=self.feature_extractor.sampling_rate,
                return_tensors=return_tensors,
                **audio_kwargs,
            )
            data.update(features)
        elif unknown := sorted(set(audio_kwargs) - set(AUDIO_ARGUMENTS)):
            raise ValueError(f"Unknown argument {unknown[0]!r} of {type(self).__name__}. Leave it out.")
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) for one in texts):
                raise ValueError(f"`text` must be a string or a non-empty list of strings, got {text!r:.80}.")
            if audio is not None and len(texts) != len(clips):
                raise ValueError(f"`text` has {len(texts)} entries for {len(clips)} clips. Pass one per clip.")
            data["labels"] = self._labels(texts, language, target_language, **text_kwargs)
        return BatchFeature(data, tensor_type=return_tensors)

    def _split_arguments(self, kwargs: dict[str, Any]) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
        """`return_tensors`, and the arguments for audio and for text, each as transformers merges them."""
        names = ("common_kwargs", "audio_kwargs", "text_kwargs")
        common, audio, text = (dict(kwargs.pop(name, None) or {}) for name in names)
        for name, own in (("audio_kwargs", audio), ("text_kwargs", text)):
            if twice := sorted(set(own) & set(kwargs)):
                raise ValueError(f"`{twice[0]}` was passed twice, in `{name}` and beside it. Leave one out.")
        if unknown := sorted(set(text) - set(TEXT_ARGUMENTS)):
            raise ValueError(f"`text_kwargs` has {unknown[0]!r}, but takes {list(TEXT_ARGUMENTS)}. Leave it out.")
        shared = common | kwargs
        return_tensors = shared.pop("return_tensors", "pt")
        text = getattr(self.tokenizer, "init_kwargs", {}) | shared | text
        return return_tensors, shared | audio, {name: text[name] for name in TEXT_ARGUMENTS if name in text}

    def get_prompt_ids(
        self,
        language: str | list[str] | None = None,
        target_language: str | list[str] | None = None,
        punctuation: bool | list[bool] | None = None,
        batch_size: int = 1,
        **slots: Any,
    ) -> torch.LongTensor:
        """
        The decoder prompt (B, P) that `generate` builds from the same arguments; further ones are the prompt's other
        slots, such as `task` of Whisper donors or `itn` of Canary's.

        Raises:
            ValueError: the processor has no prompt, or the prompt does not know a value.
        """
        if self.prompt_template is None:
            raise ValueError("This processor has no `prompt_template`. Give it the one of generation_config.json.")
        slots.update(language=language, target_language=target_language, punctuation=punctuation)
        return torch.from_numpy(build_prompt_ids(self.prompt_template, batch_size, **slots))

    def hotword_ids(self, words: list[str], language: str | None = None) -> HotwordIds:
        """
        The token sequences of words to expect, for `generate(hotword_ids=...)`: each word as given, in lower case,
        capitalised, and in capitals.

        Args:
            words (`list[str]`): words or phrases, such as names.
            language (`str`, *optional*): for tokenizers that take one. By default the prompt's.

        Raises:
            ValueError: an entry that is no word, or that takes more tokens than a word does.
        """
        (its_language,) = self._languages(1, language, None)
        arguments = {} if its_language is None else {"language": its_language}
        return encode_hotwords(words, self.tokenizer, self.text_prefix, **arguments)

    def previous_ids(self, text: str) -> list[int]:
        """The tokens of the text before an audio, for `generate(previous_ids=...)`, as a Whisper donor takes them."""
        return self._text_ids(text)

    def _text_ids(self, text: str, **arguments: Any) -> list[int]:
        # Nothing said has no tokens, not the prefix's.
        if not (text := check_unicode(text, "text").strip()):
            return []
        return self.tokenizer.encode(self.text_prefix + text, add_special_tokens=False, **arguments)

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str | list[str]:
        """
        Text of token ids (L,), or the texts of a batch (B, L), as `generate` returns them.

        Args:
            token_ids: a list, array, tensor, or the output of `generate(return_dict_in_generate=True)`. Negative ids,
                such as the -100 of labels, are padding.
            skip_special_tokens (`bool`): leave end of text, padding and prompt tokens out.
            kwargs: further arguments of the tokenizer's `decode`.
        """
        rows = _to_list(token_ids)
        if isinstance(rows, list) and any(isinstance(row, list) for row in rows):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in rows]
        ids = [i for i in (rows if isinstance(rows, list) else [rows]) if i >= 0]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs).strip()

    def batch_decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """[`~MDMASRProcessor.decode`] of every row of a batch (B, L)."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in _to_list(token_ids)]

    def _labels(
        self,
        texts: list[str],
        language: str | list[str] | None,
        target_language: str | list[str] | None,
        padding: bool | str = True,
        max_length: int | None = None,
    ) -> np.ndarray:
        """Labels (B, L): text tokens, end of text, -100."""
        eos_token_id = self.tokenizer.eos_token_id
        if eos_token_id is None:
            raise ValueError("The tokenizer has no `eos_token`, which ends every label. Set it.")
        languages = self._languages(len(texts), language, target_language)
        rows = []
        for one, its_language in zip(texts, languages, strict=True):
            arguments = {} if its_language is None else {"language": its_language}
            rows.append([*self._text_ids(one, **arguments), eos_token_id])
        length = max(map(len, rows))
        if padding == "max_length":
            length = max(length, max_length or 0)
        labels = np.full((len(rows), length), IGNORED_LABEL, dtype=np.int64)
        for label, row in zip(labels, rows, strict=True):
            label[: len(row)] = row
        return labels

    def _languages(
        self, batch_size: int, language: str | list[str] | None, target_language: str | list[str] | None
    ) -> list[str | None]:
        """The language to tokenize each text with; None where the tokenizer takes none."""
        if not getattr(self.tokenizer, "takes_language", False):
            # One vocabulary for all languages: the arguments may still be given, since the prompt needs them.
            return [None] * batch_size
        given = {"language": language, "target_language": target_language}
        for name, value in given.items():
            if isinstance(value, (list, tuple)) and len(value) != batch_size:
                raise ValueError(
                    f"`{name}` has {len(value)} values for {batch_size} texts. Pass one, or one per text."
                )
        slots = (self.prompt_template or {}).get("slots") or {}
        if "language" in slots:
            # What the prompt would say, so that text and prompt cannot differ.
            asked = {name: value for name, value in given.items() if value is not None}
            rows = prompt_values(self.prompt_template, batch_size, **asked)
        else:
            rows = [
                {name: value[i] if isinstance(value, (list, tuple)) else value for name, value in given.items()}
                for i in range(batch_size)
            ]
        languages = [row.get("target_language") or row["language"] for row in rows]
        if None in languages:
            raise ValueError("This tokenizer needs the `language` of `text`. Pass one, or one per text.")
        return languages


def _to_list(token_ids: Any) -> Any:
    token_ids = getattr(token_ids, "sequences", token_ids)
    if hasattr(token_ids, "tolist"):
        return token_ids.tolist()
    if isinstance(token_ids, (list, tuple)):
        return [_to_list(item) for item in token_ids]
    return token_ids
