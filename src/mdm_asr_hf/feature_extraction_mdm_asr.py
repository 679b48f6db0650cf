# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Feature extraction: one guarded door in front of any stock feature extractor of transformers."""

import inspect
import math
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BatchFeature, SequenceFeatureExtractor, WhisperFeatureExtractor
from transformers.utils import DummyObject, logging

from .audio_mdm_asr import check_duration, check_rate, is_audio_batch, to_mono_float32

logger = logging.get_logger(__name__)

DEFAULT_FRONTEND = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}
# A batch is at least this long, counting padding: the convolutions of some encoders need a few hundred samples.
MIN_BATCH_DURATION_S = 0.1
# Frames of the stock extractors at or below this count are not finite once normalised: their variance divides by
# (frames - 1). Log-mel frames are 10 ms apart and 25 ms wide; Seamless joins two.
MIN_NORMALISED_DURATION_S = {"ParakeetFeatureExtractor": 0.02, "SeamlessM4TFeatureExtractor": 0.035}
SEAMLESS_HOP_S = 0.01
# Frames after a clip whose window still reaches into it, and one that is silence whole.
WHISPER_EXTRA_FRAMES = 3
# Whisper's log-mel is (max(log10 mel, loudest - 8) + 4) / 4, with log10 mel >= -10 (arXiv 2212.04356).
WHISPER_DYNAMIC_RANGE, WHISPER_FLOOR = 2.0, -1.5


class MDMASRFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns checked audio into the features a stock extractor of transformers computes, with these differences:

    - it never cuts audio: what is too long raises;
    - it refuses what would give NaN or wrong features (NaN samples, another sampling rate, unscaled integers);
    - the features of a clip do not depend on the batch it is in, and every clip has an attention mask;
    - the names are always `input_features` and `attention_mask`, for waveforms too.

    Args:
        frontend (`dict` or feature extractor, *optional*): the stock extractor, or what its `to_dict` gives: its class
            name under `feature_extractor_type` and its settings. Whisper's 80-bin log-mel by default.
        max_duration_s (`float`, *optional*): longer clips raise. None sets no limit here.
        return_attention_mask (`bool`): the default of the call's argument of this name.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        frontend: dict[str, Any] | SequenceFeatureExtractor | None = None,
        max_duration_s: float | None = None,
        return_attention_mask: bool = True,
        **kwargs: Any,
    ):
        # What transformers itself writes beside the settings of a saved extractor.
        saved = {k: kwargs.pop(k) for k in ("auto_map", "processor_class") if k in kwargs}
        kwargs.pop("feature_extractor_type", None)
        if kwargs:
            raise ValueError(
                f"Unknown argument {sorted(kwargs)[0]!r} of {type(self).__name__}. Settings of the stock extractor "
                "belong into `frontend`."
            )
        if max_duration_s is not None and not (isinstance(max_duration_s, (int, float)) and max_duration_s > 0):
            raise ValueError(f"`max_duration_s` must be positive or None, got {max_duration_s!r}.")
        self.frontend = _build_frontend(DEFAULT_FRONTEND if frontend is None else frontend)
        self.max_duration_s = max_duration_s
        super().__init__(
            feature_size=self.frontend.feature_size,
            sampling_rate=self.frontend.sampling_rate,
            padding_value=self.frontend.padding_value,
            return_attention_mask=return_attention_mask,
            **saved,
        )

    @property
    def frames_per_s(self) -> float:
        """Feature frames per second of audio; for waveforms, the sampling rate."""
        if hasattr(self.frontend, "hop_length") and not self.is_waveform:
            return self.sampling_rate / self.frontend.hop_length
        if hasattr(self.frontend, "stride") and hasattr(self.frontend, "num_mel_bins"):
            return 1 / (SEAMLESS_HOP_S * self.frontend.stride)
        return float(self.sampling_rate)

    @property
    def is_waveform(self) -> bool:
        """Whether the features are the samples themselves, as wav2vec 2.0 takes them."""
        return self.frontend.model_input_names[0] == "input_values"

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: float | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        return_attention_mask: bool | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one clip or a list of B clips; a clip is an array, tensor or list as [`load_audio`] takes it.
            sampling_rate (`int`): the clips' rate in Hz. Another one than this extractor's raises.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; None gives NumPy arrays too.
            padding (`bool` or `str`): `True` or `"longest"`; `"max_length"` pads further, to `max_length` samples or
                Whisper's 30 seconds; `False` expects clips of one length.
            return_attention_mask (`bool`): `False` leaves the mask out. The model needs it wherever clips were padded.
            truncation (`bool`): never done.
            max_length, pad_to_multiple_of (`int`, *optional*): numbers of samples to pad to, as in stock extractors.
            kwargs: arguments of the stock extractor's call, such as `device`.

        Returns:
            [`BatchFeature`] with
            - **input_features** (B, T, mel bins), for Whisper too, or (B, N) for waveforms; float32. Time comes
            second, as the
              batching of the stock pipeline expects.
            - **attention_mask** (B, T) or (B, N), 1 where a frame belongs to the clip; an empty clip has none.

        Raises:
            ValueError: for audio that is not finite, has another rate, another shape, or lasts too long.
        """
        self._check_call(sampling_rate, truncation, kwargs)
        clips = self._check_clips(raw_speech)
        num_samples = self._padded_num_samples([len(c) for c in clips], padding, max_length, pad_to_multiple_of)
        # Each clip goes alone: what the stock extractors do at the end of a clip depends on the batch around it.
        is_whisper = isinstance(self.frontend, WhisperFeatureExtractor)
        extract = self._extract_whisper if is_whisper else self._extract_other
        # Under autocast, a log-mel would have the three digits of its half precision.
        with torch.autocast(torch.device(kwargs.get("device") or "cpu").type, enabled=False):
            features, num_valid_frames, silences = zip(*(extract(clip, kwargs) for clip in clips), strict=True)
        for i, one in enumerate(features):
            if not np.isfinite(one).all():
                raise ValueError(
                    f"Clip {i} gives features that are not finite with {type(self.frontend).__name__}. Is it audio?"
                )

        least = math.ceil(num_samples * self.frames_per_s / self.sampling_rate)
        num_frames = max(least, *map(len, features))
        batch = np.stack(
            [_pad_frames(one, num_frames, silence) for one, silence in zip(features, silences, strict=True)]
        )
        data = {"input_features": batch}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            data["attention_mask"] = (np.arange(num_frames) < np.array(num_valid_frames)[:, None]).astype(np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """The settings, for preprocessor_config.json and processor_config.json."""
        output = {
            "feature_extractor_type": type(self).__name__,
            "frontend": self.frontend.to_dict(),
            "max_duration_s": self.max_duration_s,
        }
        if not self.return_attention_mask:
            output["return_attention_mask"] = False
        if getattr(self, "auto_map", None) is not None:
            output["auto_map"] = dict(self.auto_map)
        return output

    def _check_call(self, sampling_rate: float | None, truncation: bool, kwargs: dict[str, Any]) -> None:
        known = inspect.signature(type(self.frontend).__call__).parameters
        unknown = sorted(name for name in kwargs if name not in known)
        if unknown:
            raise ValueError(
                f"Unknown argument {unknown[0]!r}: neither {type(self).__name__} nor {type(self.frontend).__name__} "
                "takes it. Leave it out."
            )
        if truncation:
            logger.warning_once("`truncation` is ignored: audio is never cut. Set `max_duration_s` for an error.")
        if sampling_rate is None:
            logger.warning_once(
                f"`sampling_rate` was not given: the samples are taken to be at {self.sampling_rate} Hz."
            )
        elif check_rate(sampling_rate, "sampling_rate") != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate={sampling_rate}`, but these features need {self.sampling_rate} Hz. Resample the "
                "audio, or hand it to the processor, which does."
            )

    def _check_clips(self, raw_speech: Any) -> list[np.ndarray]:
        is_batch = is_audio_batch(raw_speech)
        clips = []
        for i, samples in enumerate(raw_speech if is_batch else [raw_speech]):
            try:
                if not (isinstance(samples, (list, tuple)) or hasattr(samples, "__array__")):
                    raise ValueError(
                        f"`raw_speech` of type {type(samples).__name__} is not an array of samples. Hand files and "
                        "dataset entries to the processor, which reads them."
                    )
                clips.append(to_mono_float32(samples))
                check_duration(len(clips[-1]), self.sampling_rate, self.max_duration_s)
            except ValueError as error:
                raise ValueError(f"Clip {i} of {len(raw_speech)}: {error}" if is_batch else str(error)) from error
        return clips

    def _padded_num_samples(
        self, lengths: list[int], padding: bool | str, max_length: int | None, pad_to_multiple_of: int | None
    ) -> int:
        """Number of samples the batch is padded to."""
        strategy = getattr(padding, "value", padding)
        num_samples = max(lengths)
        if strategy == "max_length":
            max_length = max_length or getattr(self.frontend, "n_samples", None)
            if max_length is None:
                raise ValueError("`padding='max_length'` needs `max_length`, a number of samples.")
            num_samples = max(num_samples, max_length)
        elif strategy in (False, None, "do_not_pad"):
            if len(set(lengths)) > 1:
                raise ValueError(f"`padding={padding!r}`, but the clips differ in length. Pass `padding='longest'`.")
        elif strategy not in (True, "longest"):
            raise ValueError(f"`padding` must be True, False, 'longest' or 'max_length', got {padding!r}.")
        num_samples = max(num_samples, math.ceil(MIN_BATCH_DURATION_S * self.sampling_rate))
        if pad_to_multiple_of:
            num_samples = math.ceil(num_samples / pad_to_multiple_of) * pad_to_multiple_of
        return num_samples

    def _extract_whisper(self, clip: np.ndarray, kwargs: dict[str, Any]) -> tuple[np.ndarray, int, float]:
        """One clip's features (T, mel bins), how many of these frames are the clip's, and the value of silence."""
        frontend = self.frontend
        num_frames = math.ceil(len(clip) / frontend.hop_length)
        # The stock extractor pads to 30 s with zeros. Its dynamic range takes the loudest frame of all, so the frames
        # that overlap the end of the clip are needed; behind them all frames are silence. A clip that fills the 30 s
        # is reflected at its end there, and so here.
        num_samples = (num_frames + WHISPER_EXTRA_FRAMES) * frontend.hop_length
        if len(clip) <= frontend.n_samples:
            num_samples = min(num_samples, frontend.n_samples)
        padded = np.pad(clip, (0, max(num_samples, frontend.n_fft) - len(clip)))
        features = frontend(
            padded,
            sampling_rate=self.sampling_rate,
            padding="longest",
            truncation=False,
            return_attention_mask=False,
            return_tensors="np",
            **kwargs,
        )["input_features"][0].T
        # Zeros are loud in this log-mel, so padding is the clip's own silence, as in the stock extractor.
        silence = max(float(features.max()) - WHISPER_DYNAMIC_RANGE, WHISPER_FLOOR)
        return features[:num_frames], num_frames, silence

    def _extract_other(self, clip: np.ndarray, kwargs: dict[str, Any]) -> tuple[np.ndarray, int, float]:
        """The same for any other extractor; features are (T, mel bins) or (N,)."""
        min_duration_s = MIN_NORMALISED_DURATION_S.get(type(self.frontend).__name__, 1 / self.sampling_rate)
        min_samples = math.ceil(min_duration_s * self.sampling_rate)
        output = self.frontend(
            [np.pad(clip, (0, max(0, min_samples - len(clip))))],
            sampling_rate=self.sampling_rate,
            padding="longest",
            truncation=False,
            return_attention_mask=True,
            return_tensors="np",
            **kwargs,
        )
        features = np.asarray(output[self.frontend.model_input_names[0]][0], dtype=np.float32)
        num_valid_frames = len(features)
        if "attention_mask" in output:
            num_valid_frames = int(np.asarray(output["attention_mask"][0]).sum())
        if len(clip) < min_samples:
            num_valid_frames = min(num_valid_frames, int(len(clip) * self.frames_per_s / self.sampling_rate))
            features[num_valid_frames:] = self.padding_value
        return features, num_valid_frames, self.padding_value


def _pad_frames(features: np.ndarray, num_frames: int, value: float) -> np.ndarray:
    width = [(0, num_frames - len(features))] + [(0, 0)] * (features.ndim - 1)
    return np.pad(features, width, constant_values=value)


def _build_frontend(frontend: dict[str, Any] | SequenceFeatureExtractor) -> SequenceFeatureExtractor:
    if isinstance(frontend, dict):
        settings = dict(frontend)
        name = settings.pop("feature_extractor_type", None)
        settings.pop("processor_class", None)
        frontend_class = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(frontend_class, DummyObject):
            # What transformers puts in the place of a class whose dependencies are missing.
            needed = ", ".join(frontend_class._backends)
            raise ValueError(f"`frontend` {name!r} needs {needed} with this version of transformers. Install it.")
        if not (isinstance(frontend_class, type) and issubclass(frontend_class, SequenceFeatureExtractor)):
            raise ValueError(
                f"`frontend['feature_extractor_type']` must name a speech feature extractor of transformers, "
                f"such as 'WhisperFeatureExtractor' or 'ParakeetFeatureExtractor', got {name!r}."
            )
        frontend = frontend_class(**settings)
    if not isinstance(frontend, SequenceFeatureExtractor) or isinstance(frontend, MDMASRFeatureExtractor):
        raise ValueError(
            f"`frontend` must be a stock speech feature extractor or its dict, got {type(frontend).__name__}."
        )
    return frontend
