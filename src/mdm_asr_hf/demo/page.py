# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The page: a recording, its text draft by draft, and the donor's own decoding beside it."""

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..evaluate.steps import SCRIPT, STYLE
from ..loading import generation_settings
from ..transcribe.transcriber import Transcriber
from .drawing import draw_drafts, draw_error, draw_figures, draw_result
from .watching import Watched, watch

DRAFTS, ONE_BY_ONE = "with drafts", "token by token"
# A stereo recording of the longest that is taken, in 24 bits at 48 kHz.
MAX_FILE_SIZE = "200mb"
# Seconds: how often the recordings of the page are looked through, and how old those are that go.
DELETE_CACHE = (600, 3600)
INTRODUCTION = """# Verified drafts
Masked diffusion drafts, the donor's decoder verifies. Black is committed, <mark class="masks">marked</mark> a draft
that was accepted, <del class="masks">struck</del> one that was not. The more orange a word, the less sure; click on
one to hear it."""


def make_page(model: Any, processor: Any) -> gr.Blocks:
    """The page of a model and its processor."""
    if not model.config.has_drafts:
        raise ValueError("`model` decodes a canvas, and the page shows drafts. Take a checkpoint with drafts.")
    gamma = model.generation_config.sampler_config.gamma
    top = 2 * gamma if gamma and math.isfinite(gamma) else 8.0

    def show(path: str | None, gamma: float, is_compared: bool) -> Iterator[tuple[str, str, str]]:
        """HTML of the text with drafts, of the one without, and of both's figures."""
        shown, results = ["", ""], []
        yield *shown, ""
        if path is None:
            return
        asked = [(DRAFTS, {"gamma": gamma}), (ONE_BY_ONE, {"draft_branches": []})]
        for side, (name, given) in enumerate(asked[: 1 + is_compared]):
            drafts = {}
            try:
                for event in watch(model, processor, path, generation_settings(model, **given)):
                    if isinstance(event, Watched):
                        results.append((name, event))
                        shown[side] = draw_result(event, path)
                    else:
                        drafts[event.start_s] = event
                        shown[side] = draw_drafts(drafts.values())
                    yield *shown, draw_figures(results) if results else ""
            except ValueError as error:
                shown[side] = draw_error(error)
                yield *shown, ""
                return

    with gr.Blocks(title="mdm-asr", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown(INTRODUCTION)
        audio = gr.Audio(
            label="Recording", sources=["upload", "microphone"], type="filepath", editable=False, buttons=[]
        )
        with gr.Row():
            with gr.Column():
                slider = gr.Slider(
                    *(0, top, min(gamma, top)),
                    step=top / 100,
                    label="gamma",
                    info="Entropy, in nats, that drafts may have.",
                )
                compared = gr.Checkbox(label="Compare with the donor, token by token")
            figures = gr.HTML(elem_id="figures")
        with gr.Row():
            left, right = gr.HTML(elem_id="drafts"), gr.HTML(elem_id="one-by-one")
        gr.on(
            [audio.upload, audio.stop_recording, audio.clear, slider.release, compared.input],
            show,
            [audio, slider, compared],
            [left, right, figures],
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
    return page


def launch(
    model: Any,
    processor: Any,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    **options: Any,
) -> Any:
    """
    Serves the page until it is interrupted.

    Args:
        host (`str`, *optional*): the address to listen on. Default: GRADIO_SERVER_NAME, else 127.0.0.1.
        port (`int`, *optional*): Default: GRADIO_SERVER_PORT, else the first from 7860 that is free.
        share (`bool`): also by a public link, through gradio's servers.
        options: further ones of `gradio.Blocks.launch`, whose result is returned.

    Raises:
        ValueError: a model that decodes a canvas.
        OSError: no such address, or the port is taken.
    """
    if host is not None:
        # gradio would try a hundred ports, for minutes.
        socket.create_server((host, port or 0)).close()
    page = make_page(model, processor)
    # What a first call takes longer is not the drafts'.
    Transcriber(model, processor, timestamps=True).warm_up()
    script, style = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        head=f"<script>{SCRIPT}{script}</script>",
        css=STYLE + style,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        ssr_mode=False,
        **options,
    )
