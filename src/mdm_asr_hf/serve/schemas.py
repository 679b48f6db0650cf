# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's request and answers about transcriptions."""

import math
import zlib
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ..transcribe.subtitles import WRITERS
from ..transcribe.transcript import Segment, Transcript

# Characters: of a prompt, a donor takes some hundred tokens.
Text = Annotated[str, Field(max_length=10_000)]


class TranscriptionRequest(BaseModel):
    """The form of `POST /v1/audio/transcriptions`. Fields that are not here are refused, not passed over."""

    model_config = ConfigDict(extra="forbid")

    # As OpenAI describes it.
    file: Annotated[UploadFile, WithJsonSchema({"type": "string", "format": "binary"})]
    model: Annotated[str, Field(max_length=1000)]
    language: Annotated[str | None, Field(max_length=100)] = None
    prompt: Text | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0
    granularities: Annotated[list[Literal["word", "segment"]], Field(alias="timestamp_granularities[]")] = []
    stream: bool = False
    # Long recordings are cut at pauses, whatever it says.
    chunking_strategy: Literal["auto"] | None = None
    # Ours, parted by commas; and OpenAI's name for them.
    hotwords: Text | None = None
    keywords: Annotated[list[Text], Field(alias="keywords[]", max_length=1000)] = []

    @model_validator(mode="after")
    def _check_together(self) -> "TranscriptionRequest":
        if self.granularities and self.response_format != "verbose_json":
            raise ValueError("`timestamp_granularities[]` needs `response_format=verbose_json`.")
        if self.stream and self.response_format not in ("json", "text"):
            raise ValueError(f"`stream` and `response_format={self.response_format}` exclude each other. Use json.")
        return self

    @property
    def wants_times(self) -> bool:
        return self.response_format in ("srt", "vtt", "verbose_json")


def split_words(text: str | None) -> list[str]:
    """Words that are parted by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def plain_answer(transcript: Transcript, response_format: str) -> str:
    """What `text`, `srt` and `vtt` are answered with."""
    return f"{transcript.text}\n" if response_format == "text" else WRITERS[response_format](transcript)


def usage(transcript: Transcript) -> dict[str, Any]:
    """What OpenAI charges by: whole seconds of audio."""
    return {"type": "duration", "seconds": math.ceil(transcript.duration_s)}


def verbose_answer(
    transcript: Transcript, language: str, temperature: float, granularities: list[str], tokenizer: Any
) -> dict[str, Any]:
    """What `verbose_json` is answered with; by default with segments, and with words where these are asked for."""
    answer = {
        "task": "transcribe",
        "language": language,
        "duration": transcript.duration_s,
        "text": transcript.text,
        "usage": usage(transcript),
    }
    if "segment" in granularities or not granularities:
        spoken = [segment for segment in transcript.segments if segment.text]
        answer["segments"] = [_segment(i, one, temperature, tokenizer) for i, one in enumerate(spoken)]
    if "word" in granularities:
        answer["words"] = [{"word": word.text, "start": word.start_s, "end": word.end_s} for word in transcript.words]
    return answer


def _segment(place: int, segment: Segment, temperature: float, tokenizer: Any) -> dict[str, Any]:
    text = segment.text.encode()
    return {
        "id": place,
        "seek": round(segment.start_s * 100),
        "start": segment.start_s,
        "end": segment.end_s,
        "text": segment.text,
        "tokens": tokenizer.encode(segment.text, add_special_tokens=False),
        "temperature": temperature,
        "avg_logprob": math.log(max(segment.confidence or 0.0, 1e-10)),
        # As Whisper computes it.
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": segment.no_speech or 0.0,
    }


__all__ = ["TranscriptionRequest", "plain_answer", "split_words", "usage", "verbose_answer"]
