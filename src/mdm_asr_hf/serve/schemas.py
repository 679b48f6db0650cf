# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's request and answers about transcriptions."""

import math
import zlib
from typing import Annotated, Any, Literal

from fastapi import Response, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse
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


def answer(transcript: Transcript, asked: TranscriptionRequest, language: str, tokenizer: Any) -> Response:
    """A transcript in the format that was asked for; `verbose_json` has segments unless words alone are."""
    if asked.response_format == "text":
        return PlainTextResponse(f"{transcript.text}\n")
    if asked.response_format in ("srt", "vtt"):
        kind = "text/vtt" if asked.response_format == "vtt" else "text/plain"
        return PlainTextResponse(WRITERS[asked.response_format](transcript), media_type=kind)
    # What OpenAI charges by.
    usage = {"type": "duration", "seconds": math.ceil(transcript.duration_s)}
    values = {"text": transcript.text, "usage": usage}
    if asked.response_format == "verbose_json":
        values |= {"task": "transcribe", "language": language, "duration": transcript.duration_s}
        if "segment" in asked.granularities or not asked.granularities:
            spoken = [segment for segment in transcript.segments if segment.text]
            values["segments"] = [_segment(i, one, asked.temperature, tokenizer) for i, one in enumerate(spoken)]
        if "word" in asked.granularities:
            values["words"] = [{"word": one.text, "start": one.start_s, "end": one.end_s} for one in transcript.words]
    return JSONResponse(values)


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
