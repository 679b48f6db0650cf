# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of `mdm-asr demo`: what it tells of each evaluation, that no text breaks out, and a browser on it."""

import json
import os
import re
import shutil
import socket
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
from demo_recording import RECORDING, TEXT
from tiny_models import tiny_model, tiny_processor

from mdm_asr_hf.loading import default_checkpoint, generation_settings, load_model

gradio = pytest.importorskip("gradio", reason="gradio is not installed: `pip install '.[demo]'`")

from mdm_asr_hf.demo.drawing import draw_drafts, draw_error, draw_figures, draw_result  # noqa: E402
from mdm_asr_hf.demo.page import launch, make_page  # noqa: E402
from mdm_asr_hf.demo.watching import Draft, Watched, _Follower, watch  # noqa: E402
from mdm_asr_hf.transcribe.transcript import Segment, Transcript, Word  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='HACKED'\"> & {{ 7 }} ${7} 'it'"


class Letters:
    """A tokenizer whose ids are letters; 0 is the end of text."""

    def decode(self, ids, **kwargs):
        return "".join(map(chr, ids)).replace("\0", "")


def follow(*evaluations):
    follower = _Follower(Letters(), 0.0)
    for text, number in evaluations:
        draft = follower.follow([*map(ord, text)], number)
    return [(text, kind) for text, kind in draft.stretches if text]


def test_the_drafts_lead_to_the_text(loaded):
    # One of the donor's own, with three drafts; two are right, and the donor goes on differently.
    assert follow(("abcd", 1)) == [("a", "own"), ("bcd", "pending")]
    own = [("a", "own"), ("bc", "accepted"), ("d", "struck"), ("X", "own")]
    assert follow(("abcd", 1), ("abcXyz", 4)) == [*own, ("yz", "pending")]
    # All are right, and the end follows.
    assert follow(("abcd", 1), ("abcXyz", 4), ("abcXyz\0", 7)) == [*own, ("yz", "accepted")]
    # A text that was refused is written anew.
    assert follow(("abcd", 1), ("abcXyz", 4), ("bcd", 1)) == [("b", "own"), ("cd", "pending")]

    *drafts, watched = watch(*loaded, str(RECORDING), generation_settings(loaded[0]))
    assert watched.transcript.text == TEXT and len(drafts) == watched.transcript.nfe + 1
    stretches = drafts[-1].stretches
    assert "".join(text for text, kind in stretches if kind in ("own", "accepted")).strip() == TEXT
    # What was told on the way is what the output says.
    accepted = "".join(text for text, kind in stretches if kind == "accepted")
    (steps,) = watched.steps
    assert accepted == "".join(token["text"] for token in steps["tokens"] if token["branch"] == "masks") != ""
    struck = [text for text, kind in stretches if kind == "struck" and text]
    assert struck == [one["text"].replace(steps["end"]["text"], "") for one in steps["struck_drafts"]] != []


def test_a_canvas_is_refused():
    with pytest.raises(ValueError, match="Take a checkpoint with drafts"):
        make_page(tiny_model(), tiny_processor())


def test_drawn_texts_are_escaped_and_names_have_no_folder(loaded, tmp_path):
    word = Word(HOSTILE, 0.0, 1.0, 0.5)
    transcript = Transcript(HOSTILE, 1.0, [Segment(0.0, 1.0, HOSTILE, [word], 0.5, 1)], warnings=[HOSTILE])
    token = {"text": HOSTILE, "confidence": 0.5, "step": 1, "branch": None}
    steps = {"nfe": 1, "tokens": [token], "end": None, "struck_drafts": [{**token, "place": 0, "branch": "masks"}]}
    watched = Watched(transcript, 1.0, [steps])
    pages = [
        draw_drafts([Draft(0.0, [(HOSTILE, kind) for kind in ("own", "accepted", "struck", "pending")])]),
        draw_result(watched, f"/x/{HOSTILE}.wav"),
        draw_figures([(HOSTILE, watched)]),
        draw_error(ValueError(HOSTILE)),
    ]
    for page in pages:
        assert "<img" not in page and "&lt;img src=x onerror=&#34;" in page and "it'" not in page

    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "long.wav", np.zeros(8_000 * 601, dtype=np.int16), 8_000)
    (tmp_path / "bad.wav").write_bytes(b"no audio\n")
    for name in ("empty.wav", "long.wav", "bad.wav"):
        with pytest.raises(ValueError) as caught:
            [*watch(*loaded, str(tmp_path / name), generation_settings(loaded[0]))]
        message = str(caught.value)
        assert name in message and str(tmp_path) not in message and "\n" not in message, message


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(default_checkpoint()))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    # What the microphone hears, again and again: words few enough that three seconds hold each of them whole.
    samples, rate = soundfile.read(RECORDING)
    samples = samples[round(0.4 * rate) : round(2.6 * rate)]
    speech = tmp_path_factory.mktemp("microphone") / "speech.wav"
    soundfile.write(speech, samples, rate, subtype="PCM_16")
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        arguments.append(f"--use-file-for-fake-audio-capture={speech}")
        found = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(loaded):
    app, url, _ = launch(*loaded, host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    app.get_blocks().close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1100, "height": 880})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    context.close()


def upload(page, path):
    page.set_input_files("input[type=file]", str(path))


def words(page, side="drafts"):
    page.wait_for_selector(f"#{side} .word")
    return " ".join(page.locator(f"#{side} .word").all_inner_texts())


def test_browser_hears_words_and_downloads(page, tmp_path):
    upload(page, RECORDING)
    assert words(page) == TEXT
    # Of the figures, the evaluations: fewer than tokens.
    name, nfe, seconds, _ = page.locator("#figures td, #figures th").all_inner_texts()[4:]
    assert name == "with drafts" and 1 < int(nfe) < 15 and float(seconds) > 0
    page.locator("#drafts .word", has_text="treasure").click()
    audio = page.locator("#drafts audio")
    page.wait_for_function("audio => !audio.paused", arg=audio.element_handle())
    page.wait_for_function("audio => audio.paused", arg=audio.element_handle())
    start, end = (
        float(page.locator(".word", has_text="treasure").get_attribute(f"data-{x}")) for x in ("start", "end")
    )
    assert 0 < start < end <= audio.evaluate("audio => audio.currentTime") < end + 0.4
    # The steps are there to be gone through, as in the report.
    assert page.locator("#drafts mark.masks:visible").count() > 1
    page.locator("#drafts .stepper input").fill("1")
    own = page.locator("#drafts .drafts span:visible").all_inner_texts()
    accepted = page.locator("#drafts .drafts mark:visible").all_inner_texts()
    # The donor adds one to what it accepts of the drafts that begin the text.
    assert len(own) == 1 and accepted and TEXT.startswith("".join(accepted + own).strip())
    assert page.locator("#drafts .stepper output").inner_text().startswith("evaluation 1 of")
    for name, check in (
        ("SRT", lambda text: text.startswith("1\n00:00:0") and "treasure was" in text),
        ("JSON", lambda text: json.loads(text)["text"] == TEXT),
    ):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert download.value.suggested_filename == f"common_voice_en_48.{name.lower()}"
        download.value.save_as(tmp_path / name)
        assert check((tmp_path / name).read_text(encoding="utf-8"))
    # Nothing comes from elsewhere.
    assert {urlsplit(one).netloc for one in page.requested if not one.startswith(("data:", "blob:"))} == {
        urlsplit(page.url).netloc
    }


def test_browser_compares_and_slides(page):
    page.get_by_label("Compare with the donor").check()
    upload(page, RECORDING)
    assert words(page, "one-by-one") == TEXT == words(page)
    page.get_by_text("The texts are the same.").wait_for()
    numbers = [int(one) for one in page.locator("#figures td:nth-child(2)").all_inner_texts()]
    assert numbers[0] < numbers[1]
    if path := os.environ.get("SCREENSHOT"):
        page.mouse.move(0, 0)
        page.screenshot(path=path)
    # Without entropy to spend, nearly nothing is drafted.
    number = page.get_by_label("number input for gamma")
    number.fill("0")
    number.blur()
    page.wait_for_function("number => +document.querySelector('#figures td')?.textContent > number", arg=numbers[0])
    assert words(page) == TEXT


def test_browser_records(page):
    page.get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(3_300)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    assert "treasure" in words(page)


def test_browser_shows_what_is_wrong_with_a_file(page, tmp_path):
    bad = tmp_path / "<img src=x onerror=document.title='HACKED'>.wav"
    bad.write_bytes(b"no audio\n")
    upload(page, bad)
    alert = page.locator("#drafts .error")
    alert.wait_for()
    assert '.wav" is not audio' in alert.inner_text() and "\n" not in alert.inner_text()
    assert page.locator("#drafts img").count() == 0 and page.title() == "mdm-asr"
    # The page still takes another.
    page.get_by_label("Clear").first.click()
    upload(page, RECORDING)
    assert words(page) == TEXT


def test_command_and_space(run_command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run_command("demo", "--port", port)
    assert code == 1 and f"error: cannot listen on 127.0.0.1, port {port}. Choose" in err
    code, _, err = run_command("demo", "--model", "missing")
    assert code == 1 and "`model` 'missing' is neither a folder" in err.splitlines()[-1]

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["torch"]}
    lines = (root / "spaces" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines and not [line for line in lines if not line.startswith("--") and line not in asked]
    front = re.match(r"---\n(.*?)\n---\n", (root / "spaces" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert {"sdk: gradio", "app_file: app.py"} <= set(front.group(1).splitlines())
