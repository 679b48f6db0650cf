# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The HTML of the page. Whatever is not the page's own is escaped, by `Markup.format`."""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from ..evaluate.steps import lay_out
from ..transcribe.subtitles import to_json, to_srt
from ..transcribe.transcript import Transcript, Word
from .watching import Draft, Watched

_STRETCHES = {
    "own": Markup("<span>{}</span>"),
    "accepted": Markup('<mark class="masks">{}</mark>'),
    "struck": Markup('<del class="masks">{}</del>'),
    "pending": Markup("<i>{}</i>"),
}
_STEPS = Markup(
    '<details class="steps" data-steps="{}"{}><summary>Drafts{}, {} evaluations</summary><div class="decoding"></div>'
    "</details>"
)
_DOWNLOAD = Markup('<a class="download" download="{}" href="data:{};base64,{}">{}</a>')


def draw_drafts(drafts: Iterable[Draft]) -> Markup:
    """The texts in work, a paragraph a window."""
    return Markup().join(
        Markup('<p class="drafts">{}</p>').format(
            Markup().join(_STRETCHES[kind].format(text) for text, kind in one.stretches if text)
        )
        for one in drafts
    )


def draw_result(watched: Watched, path: str) -> Markup:
    """The words to click on, warnings, downloads, and the steps to go through."""
    transcript = watched.transcript
    words = Markup(" ").join(map(_word, transcript.words)) if transcript.words else "No speech was found."
    # Relative: the page may lie in a folder of its host.
    parts = [Markup('<audio preload="auto" src="gradio_api/file={}"></audio>').format(quote(path))]
    parts.append(Markup('<p class="words">{}</p><p class="unheard quiet" role="status"></p>').format(words))
    parts += [Markup('<p class="quiet">{}</p>').format(warning) for warning in transcript.warnings]
    parts.append(_downloads(transcript, Path(path)))
    decodings = [one for one in map(lay_out, watched.steps) if one is not None]
    for number, decoding in enumerate(decodings, start=1):
        of = f" of part {number}" if len(decodings) > 1 else ""
        is_open = Markup(" open") if number == 1 else ""
        parts.append(_STEPS.format(json.dumps(decoding), is_open, of, decoding["steps"]))
    return Markup('<div class="result">{}</div>').format(Markup().join(parts))


def draw_figures(results: Sequence[tuple[str, Watched]]) -> Markup:
    """NFE and seconds, and of several whether their texts are the same."""
    rows = Markup().join(
        Markup("<tr><th>{}</th><td>{}</td><td>{:.2f}</td><td>{}</td></tr>").format(
            name, one.transcript.nfe, one.seconds, _percent(one.transcript.confidence)
        )
        for name, one in results
    )
    texts, told = {one.transcript.text for _, one in results}, ""
    if len(results) > 1:
        told = f"The texts are {'the same' if len(texts) == 1 else 'not the same'}."
    return Markup(
        '<table class="figures"><tr><th></th><th>NFE</th><th>seconds</th><th>confidence</th></tr>{}</table><p>{}</p>'
    ).format(rows, told)


def draw_error(error: ValueError) -> Markup:
    """Its one line."""
    return Markup('<p class="error" role="alert">{}</p>').format(str(error))


def _word(word: Word) -> Markup:
    return Markup(
        '<button class="word" style="--doubt: {doubt:.0f}%" data-start="{start:.3f}" data-end="{end:.3f}" '
        'title="{sure}, {start:.2f} to {end:.2f} s">{text}</button>'
    ).format(
        doubt=100 * (1 - word.confidence),
        start=word.start_s,
        end=word.end_s,
        sure=_percent(word.confidence),
        text=word.text,
    )


def _percent(confidence: float | None) -> str:
    return "–" if confidence is None else f"{100 * confidence:.0f} %"


def _downloads(transcript: Transcript, path: Path) -> Markup:
    links = []
    for suffix, kind, text in (
        ("srt", "application/x-subrip", to_srt(transcript)),
        ("json", "application/json", to_json(transcript, path.name)),
    ):
        content = base64.b64encode(text.encode()).decode("ascii")
        links.append(_DOWNLOAD.format(f"{path.stem}.{suffix}", kind, content, suffix.upper()))
    return Markup("<p>Download {}</p>").format(Markup(" ").join(links))
