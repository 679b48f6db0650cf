# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OnnxProcessor: audio to Whisper's features and token ids to text, by NumPy and tiktoken, without transformers."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..audio_mdm_asr import load_audio_batch
from ..drafting_mdm_asr import one_thread_product
from ..encoding_mdm_asr import check_unicode, text_prefix_of
from ..hotwords_mdm_asr import HotwordIds, encode_hotwords

# Whisper's log-mel lies within 8 / 4 of its loudest value and above (-10 + 4) / 4 (arXiv 2212.04356).
LEAST_POWER, DYNAMIC_RANGE, FLOOR = 1e-10, 2.0, -1.5
# Frames behind a clip that its windows reach into, and one that is silence whole; and the fewest of a batch.
EXTRA_FRAMES, LEAST_FRAMES = 3, 10
FRAMES_AT_ONCE = 64
MEL_FILE, TOKENIZER_FILE = "mel_filters.npy", "tokenizer.json"

# How GPT-2 splits a text into words, and the visible character by which its vocabulary writes each byte.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_CHARACTERS = [*map(chr, VISIBLE), *(chr(256 + place) for place in range(len(HIDDEN)))]
# For `str.translate`; what is hidden stands for nothing itself.
CHARACTER_BYTES = {256 + place: byte for place, byte in enumerate(HIDDEN)} | dict.fromkeys(HIDDEN, "\uffff")


class Features(dict):
    """What a processor returns: arrays, which lie where an exported model wants them."""

    def to(self, *where: Any) -> "Features":
        return self


class WhisperLogMel:
    """
    Whisper's features of audio of its own length.

    Args:
        filters (`np.ndarray` of shape (frequencies, mel bins)): from power to mel.
        sampling_rate (`int`), hop_length (`int`), max_duration_s (`float`): of the checkpoint.
    """

    def __init__(self, filters: np.ndarray, sampling_rate: int, hop_length: int, max_duration_s: float):
        self.filters, self.sampling_rate = filters.astype(np.float32), sampling_rate
        self.hop_length, self.max_duration_s = hop_length, max_duration_s
        # The filters have half of a window's frequencies.
        self.window_length = 2 * (len(filters) - 1)
        # Periodic.
        self.window = np.hanning(self.window_length + 1)[:-1].astype(np.float32)

    def __call__(self, clips: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features (B, T, mel bins) of clips, and their mask (B, T). Padding is silence."""
        lengths = [math.ceil(len(clip) / self.hop_length) for clip in clips]
        num_frames = max(LEAST_FRAMES, *lengths)
        features = np.empty((len(clips), num_frames, self.filters.shape[1]), np.float32)
        for row, clip, length in zip(features, clips, lengths, strict=True):
            log_mel = self._log_mel(clip, length)
            row[:length] = log_mel[:length]
            row[length:] = max(float(log_mel.max()) - DYNAMIC_RANGE, FLOOR)
        return features, np.arange(num_frames) < np.array(lengths)[:, None]

    def _log_mel(self, clip: np.ndarray, length: int) -> np.ndarray:
        num_samples = (length + EXTRA_FRAMES) * self.hop_length
        longest = round(self.max_duration_s * self.sampling_rate)
        # What fills the 30 s is reflected at its end, as Whisper has it.
        num_samples = max(min(num_samples, longest) if len(clip) <= longest else num_samples, self.window_length)
        half = self.window_length // 2
        samples = np.pad(np.pad(clip, (0, num_samples - len(clip))), half, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(samples, self.window_length)[:: self.hop_length]
        mel = np.empty((num_samples // self.hop_length, self.filters.shape[1]), np.float32)
        # Some at once, which stay in a core's cache.
        for start in range(0, len(mel), FRAMES_AT_ONCE):
            some = slice(start, min(start + FRAMES_AT_ONCE, len(mel)))
            spectrum = np.fft.rfft(frames[some] * self.window)
            power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
            mel[some] = one_thread_product(power, self.filters)
        log_mel = np.log10(np.maximum(mel, LEAST_POWER))
        return (np.maximum(log_mel, log_mel.max() - 4 * DYNAMIC_RANGE) + 4) / 4


class Tokenizer:
    """
    Byte-level byte pairs, as GPT-2 and Whisper have them, behind the names that transformers' tokenizers have.

    tiktoken rather than tokenizers, which brings the Hub's client: together six times its size.

    Args:
        path: a tokenizer.json, as tokenizers writes it.
        unk_token (`str`, *optional*): stands for what the vocabulary lacks.

    Raises:
        ValueError: another kind of tokenizer.
    """

    def __init__(self, path: str | Path, unk_token: str | None = None):
        content = json.loads(Path(path).read_text("utf-8"))
        self._model, self._added = (
            content["model"],
            {token["content"]: token["id"] for token in content["added_tokens"]},
        )
        if self._model.get("type") != "BPE" or "ByteLevel" not in json.dumps(content["pre_tokenizer"]):
            raise ValueError(
                f"{str(path)!r} is no byte-level BPE tokenizer. Load the processor by transformers' AutoProcessor."
            )
        self._vocabulary = self._model["vocab"] | self._added
        self._pieces = {token_id: _piece(token) for token, token_id in self._vocabulary.items()}
        self.all_special_ids = [token["id"] for token in content["added_tokens"] if token["special"]]
        self._special = frozenset(self.all_special_ids)
        self.unk_token_id = None if unk_token is None else self._vocabulary.get(unk_token)

    @cached_property
    def _encoding(self) -> tuple[Any, list[int | None]]:
        """tiktoken's encoding, and ids by its own. Most recordings are transcribed without it."""
        from tiktoken import Encoding

        # It joins the pair of the lowest id first, tokenizers that of the first rule: so it has ids by rule.
        rules = ("".join(rule).replace(" ", "") for rule in self._model["merges"])
        tokens = list(dict.fromkeys([*BYTE_CHARACTERS, *rules]))
        encoding = Encoding(
            "vocabulary",
            pat_str=WORDS,
            mergeable_ranks={_piece(token): rank for rank, token in enumerate(tokens)},
            special_tokens={token: len(tokens) + place for place, token in enumerate(self._added)},
        )
        return encoding, [self._vocabulary.get(token, self.unk_token_id) for token in [*tokens, *self._added]]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        encoding, ids = self._encoding
        found = (ids[own] for own in encoding.encode(text, allowed_special="all"))
        return [token_id for token_id in found if token_id is not None]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        skipped = self._special if skip_special_tokens else ()
        pieces = (self._pieces.get(token_id, b"") for token_id in token_ids if token_id not in skipped)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return [self.decode(row, **options) for row in rows]


def _piece(token: str) -> bytes:
    """The bytes that a token of such a vocabulary stands for."""
    try:
        return token.translate(CHARACTER_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


class OnnxProcessor:
    """
    The processor of a folder that `export_onnx` wrote of a Whisper donor's model, for [`OnnxMDMASR`]: what
    [`MDMASRProcessor`] does for transcribing, in arrays of NumPy.

    Args:
        feature_extractor ([`WhisperLogMel`]), tokenizer ([`Tokenizer`])
        text_prefix (`str`, *optional*): what every text begins with. By default what fits the tokenizer.
    """

    def __init__(self, feature_extractor: WhisperLogMel, tokenizer: Tokenizer, text_prefix: str | None = None):
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
        self.text_prefix = text_prefix_of(tokenizer) if text_prefix is None else text_prefix

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "OnnxProcessor":
        """
        Raises:
            ValueError: a folder without these files, as of other encoders than Whisper's: their features are those of
                transformers, and `AutoProcessor` loads them.
        """
        folder = Path(folder)
        if missing := [name for name in (MEL_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]:
            raise ValueError(
                f"`folder` {str(folder)!r} has no {', '.join(missing)}. Export it again; of other encoders than "
                "Whisper's, load the processor by transformers' AutoProcessor."
            )
        settings = json.loads((folder / "processor_config.json").read_text("utf-8"))
        tokenizer_settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        extractor = settings["feature_extractor"]
        return cls(
            WhisperLogMel(
                np.load(folder / MEL_FILE),
                extractor["frontend"]["sampling_rate"],
                extractor["frontend"]["hop_length"],
                extractor["max_duration_s"],
            ),
            Tokenizer(folder / TOKENIZER_FILE, tokenizer_settings.get("unk_token")),
            settings.get("text_prefix"),
        )

    def __call__(self, audio: Any, sampling_rate: float | None = None, return_tensors: None = None) -> Features:
        """
        Args:
            audio: one clip, or a list, data set or column of B clips, of any form [`load_audio`] takes. Other rates
                are resampled.
            sampling_rate (`int`): rate in Hz of samples that do not carry their own.
            return_tensors: taken for the sake of other processors' callers; arrays are what there is.

        Returns:
            `input_features` (B, T, mel bins) and `attention_mask` (B, T).

        Raises:
            ValueError: audio that cannot be used.
        """
        extractor = self.feature_extractor
        clips = load_audio_batch(
            audio,
            sampling_rate=sampling_rate,
            target_sampling_rate=extractor.sampling_rate,
            max_duration_s=extractor.max_duration_s,
        )
        features, mask = extractor(clips)
        return Features(input_features=features, attention_mask=mask)

    def hotword_ids(self, words: list[str]) -> HotwordIds:
        """See [`~MDMASRProcessor.hotword_ids`]."""
        return encode_hotwords(words, self.tokenizer, self.text_prefix)

    def previous_ids(self, text: str) -> list[int]:
        """See [`~MDMASRProcessor.previous_ids`]."""
        text = check_unicode(text, "text").strip()
        return self.tokenizer.encode(self.text_prefix + text) if text else []

    def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:
        """Text of token ids (L,)."""
        return self.tokenizer.decode(np.asarray(token_ids).tolist(), skip_special_tokens=skip_special_tokens).strip()

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        """Texts of token ids (B, L)."""
        return [self.decode(row, skip_special_tokens) for row in rows]
