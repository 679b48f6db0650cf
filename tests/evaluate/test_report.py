# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""The HTML report: what it holds, that no text can break out of it, and what a browser makes of it."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import soundfile

from mdm_asr_hf.encoding_mdm_asr import json_text
from mdm_asr_hf.evaluate import report
from mdm_asr_hf.evaluate.report import make_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "input", "line", "rect", "circle", "polyline", "br"}
HOSTILE = (
    "</script><script>document.title='HACKED'</script><img src=x onerror=alert(1)> & \"quoted\" 'it' <!-- {{ 7 }}"
)


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def __getitem__(self, name):
        return self.attributes[name]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag=None, **attributes):
        """The descendants of a tag with attributes; `css` is one of the classes."""
        css = attributes.pop("css", None)
        found = []
        for child in self.children:
            if isinstance(child, Node):
                fits = tag in (None, child.tag) and attributes.items() <= child.attributes.items()
                if fits and (css is None or css in (child.attributes.get("class") or "").split()):
                    found.append(child)
                found += child.all(tag, **attributes, **({"css": css} if css else {}))
        return found


class Tree(HTMLParser):
    """A tree of the page; an element that is not closed in its turn fails."""

    def __init__(self, html):
        super().__init__()
        self.root = self.node = Node("root", {}, None)
        self.feed(html)
        self.close()
        assert self.node is self.root, f"<{self.node.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes, self.node)
        self.node.children.append(node)
        if tag not in VOID:
            self.node = node

    def handle_startendtag(self, tag, attributes):
        self.node.children.append(Node(tag, attributes, self.node))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert tag == self.node.tag, f"</{tag}> inside <{self.node.tag}>"
            self.node = self.node.parent

    def handle_data(self, data):
        self.node.children.append(data)


def parse(path):
    return Tree(path.read_text(encoding="utf-8")).root


def row(name, reference, hypothesis, *, confidence=0.9, steps=None, **more):
    words = hypothesis.split()
    tokens = [
        {"text": f" {word}" if i else word, "confidence": 0.5 + 0.1 * i, "step": (steps or range(1, 99))[i]}
        for i, word in enumerate(words)
    ]
    defaults = {"dataset": "set", "audio": None, "duration_s": 2.5, "language": "en", "nfe": len(words)}
    return {
        "id": name,
        "reference": reference,
        "hypothesis": hypothesis,
        "confidence": confidence,
        "is_full": False,
        "tokens": tokens,
        **defaults,
        **more,
    }


ROWS = [
    row("right", "all of it", "all of it", nfe=2, duration_s=9.0),
    row("one of four", "red green blue black", "red grin blue black", confidence=0.6, steps=[1, 3, 2, 2], nfe=4),
    row("nothing said", "", "ghost words", confidence=0.2, duration_s=5.0, nfe=7),
    row("half", "a b c d", "a c d e", duration_s=1.0, nfe=1, is_full=True, steps=[1, 1, 1, 1]),
    row("empty", "gone", "", confidence=None, tokens=[], nfe=0),
]


def write(folder, rows, metrics=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json_text(one) + "\n" for one in rows)
    (folder / "hypotheses.jsonl").write_text(lines, encoding="utf-8")
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


RECORD = {
    "metrics": {
        "wer": 41.67,
        "mean_nfe": 2.8,
        "rtfx": None,
        "ece": 3.5,
        "num_utterances": 12345,
        "rtfx_batch_1": {"rtfx": 7.25},
        "by_duration": [
            {"from_s": 0.0, "to_s": 4.0, "num_utterances": 3, "wer": 50.0, "mean_nfe": 1.67},
            {"from_s": 4.0, "to_s": None, "num_utterances": 2, "wer": None, "mean_nfe": 4.5},
        ],
        "reliability": [
            {"low": 0.0, "high": 0.1, "count": 0, "confidence": None, "accuracy": None},
            {"low": 0.5, "high": 0.6, "count": 10, "confidence": 0.55, "accuracy": 0.4},
            {"low": 0.9, "high": 1.0, "count": 40, "confidence": 0.96, "accuracy": 0.9},
        ],
        "reliability_unit": "word",
    },
    "intervals": {"wer": [20.0, 61.5], "mean_nfe": [1.5, 4.25]},
    "settings": {"sampler": {"name": "pbeb_conf", "gamma": 0.05}, "batch_size": 8},
    "model": "some/model",
    "data": [{"name": "set", "path": "nowhere", "num_utterances": 5}],
    "normaliser": "the normaliser",
    "command": "mdm-asr evaluate --data set",
}


def test_utterances_metrics_settings_and_plots(tmp_path):
    root = parse(make_report(write(tmp_path, ROWS)))
    articles = root.all("article")
    assert [article.all("h3")[0].text for article in articles] == [
        "nothing said",  # words where none were said: no bound
        "empty",
        "half",
        "one of four",
        "right",
    ]
    assert [article["data-wer"] for article in articles] == ["Infinity", "100.0", "50.0", "25.0", "0.0"]
    assert [article["id"] for article in articles] == ["u=3", "u=5", "u=4", "u=2", "u=1"]
    assert [article["data-confidence"] for article in articles] == ["0.2", "", "0.9", "0.6", "0.9"]
    assert [article["data-kinds"] for article in articles] == ["wrong", "wrong empty", "wrong full", "wrong", ""]

    def pairs(article):
        return [
            (pair.attributes.get("data-op"), *(word.text for word in pair.all("span")))
            for pair in article.all(css="pair")
            if "names" not in pair["class"]
        ]

    assert pairs(articles[3]) == [
        (None, "red", "red"),
        ("S", "green", "grin"),
        (None, "blue", "blue"),
        (None, "black", "black"),
    ]
    # "a b c d" and "a c d e": the cheapest way is to drop b and to add e.
    assert pairs(articles[2]) == [
        (None, "a", "a"),
        ("D", "b", "***"),
        (None, "c", "c"),
        (None, "d", "d"),
        ("I", "***", "e"),
    ]
    facts = [fact.text for fact in articles[2].all(css="facts")[0].all("li")]
    assert facts[:2] == ["WER 50.0 %", "2 of 4 words: 0 S, 1 D, 1 I"]
    assert "no end of text, the last words may be missing" in facts
    assert articles[0].all(css="facts")[0].all("b")[0].text == "WER ∞ %"
    frequent = {button["data-filter"] for button in root.all(id="frequent")[0].all("button")}
    assert frequent == {"green→grin", "b→***", "gone→***", "***→e", "***→ghost", "***→words"}

    root = parse(make_report(write(tmp_path, ROWS, RECORD)))
    cards = [tuple(part.text for part in card.all()) for card in root.all(id="metrics")[0].all("li")]
    assert cards == [
        ("WER", "41.67 %", "20.00 to 61.50"),
        ("mean NFE", "2.80", "1.50 to 4.25"),
        ("ECE", "3.50 %"),
        ("utterances", "12,345"),
        ("RTFx, batch 1", "7.25"),
    ]
    assert root.all(id="command")[0].text == RECORD["command"]
    lines = {line.all("th")[0].text: line.all("td")[0].text for line in root.all(css="settings")[0].all("tr")}
    assert lines["settings.sampler.gamma"] == "0.05" and lines["data.1.path"] == "nowhere"
    assert root.all("title")[0].text.strip() == "some/model · set · error analysis"
    buckets = [[cell.text for cell in line.all("td")[:4]] for line in root.all(id="durations")[0].all("tr")[1:]]
    assert buckets == [["0 to 4", "3", "1.7", "50.00"], ["from 4", "2", "4.5", "–"]]
    dots = root.all(id="reliability")[0].all("circle")
    # The empty bin has no point. x = 40 + 250 confidence, y = 210 - 200 accuracy.
    assert [(float(dot["cx"]), float(dot["cy"])) for dot in dots] == [(177.5, 130.0), (280.0, 30.0)]


def drafted_row():
    """ "a b c", of which the masks drafted "b" and " x" where "c" is, and the hypothesis the end."""

    def token(text, step, branch, confidence=0.5):
        return {"text": text, "confidence": confidence, "step": step, "branch": branch}

    return row(
        "drafted",
        "a b d",
        "a b c",
        nfe=9,  # of these, seven of a text that was refused
        tokens=[token(" a", 1, None), token(" b", 2, "masks"), token(" c", 2, None)],
        end=token("<eos>", 3, "hypothesis"),
        accepted_drafts={"masks": 4, "hypothesis": 1},
        rejected_drafts={"masks": 6, "hypothesis": 0},
        struck_drafts=[
            {"place": 1, "branch": "hypothesis", "text": " y<eos>"},
            {"place": 2, "branch": "masks", "text": " x"},
        ],
    )


def test_drafts_stand_where_they_were_struck(tmp_path):
    root = parse(make_report(write(tmp_path, [drafted_row(), ROWS[0]])))
    stored = json.loads(root.all("script", id="decodings")[0].text)
    assert stored["1"] == {
        "steps": 3,
        "items": [
            [" a", 1, None, 0.5],
            [" y[END]", 2, "hypothesis"],
            [" b", 2, "masks", 0.5],
            [" x", 2, "masks"],
            [" c", 2, None, 0.5],
            ["[END]", 3, "hypothesis", 0.5],
        ],
    }
    facts = [fact.text for fact in root.all("article")[0].all(css="facts")[0].all("li")]
    assert "masks 4 of 10 right" in facts and "hypothesis 1 of 1 right" in facts
    canvas = [["all", 0.5, 1], [" of", 0.6, 2], [" it", 0.7, 3]]
    assert stored["2"] == {"steps": 3, "tokens": canvas}
    summaries = [details.all("summary")[0].text for details in root.all(css="steps")]
    assert summaries == ["Drafts, 3 evaluations", "Canvas, 3 steps"]
    assert root.all(id="drafts-legend") and not parse(make_report(write(tmp_path, ROWS))).all(id="drafts-legend")

    names = ("id", "reference", "hypothesis", "nfe", "confidence", "duration_s")
    rows = [{name: one[name] for name in names if name != "id"} for one in ROWS]
    # By the path of the file itself.
    path = make_report(write(tmp_path, rows) / "hypotheses.jsonl")
    root = parse(path)
    cards = {card.all("small")[0].text: card.all("b")[0].text for card in root.all(id="metrics")[0].all("li")}
    # 6 errors in 12 words.
    assert path == tmp_path / "report.html" and (cards["WER"], cards["utterances"]) == ("50.00 %", "5")
    assert len(root.all("article")) == 5 and root.all("h3")[0].text == "row 3"
    assert root.all(id="durations") and not root.all(css="steps") and not root.all(css="settings")


def hostile_folder(folder):
    one = row(HOSTILE, HOSTILE, "</script><b>bold</b> <!-- & 'x' \u2028", dataset=HOSTILE, language="<i>")
    one["tokens"] = [{"text": HOSTILE, "confidence": 0.5, "step": 1}]
    record = {**RECORD, "model": HOSTILE, "command": HOSTILE, "normaliser": HOSTILE, HOSTILE: {"a": HOSTILE}}
    return write(folder, [one], {**record, "data": [{"name": HOSTILE, "path": HOSTILE}]}), one


def test_no_text_breaks_out(tmp_path):
    folder, one = hostile_folder(tmp_path)
    page = make_report(folder).read_text(encoding="utf-8")
    root = Tree(page).root
    # The texts are there as they were, as texts.
    article = root.all("article")[0]
    assert article.all("h3")[0].text == HOSTILE
    assert [text.text for text in article.all("dd")] == [one["reference"], one["hypothesis"]]
    assert root.all(id="command")[0].text == HOSTILE and root.all("h1")[0].text == f"{HOSTILE} · {HOSTILE}"
    # And nothing came of them: two scripts, no image, no handler, no bold of theirs.
    data, script = root.all("script")
    assert json.loads(data.text) == {"1": {"steps": one["nfe"], "tokens": [[HOSTILE, 0.5, 1]]}}
    assert not root.all("img") and not root.all("i") and "<!-- " not in page
    assert not [node for node in root.all() if any(name.startswith("on") for name in node.attributes)]
    assert "bold" not in [node.text for node in root.all("b")]
    # Nothing but the script of the page may run, and nothing may be loaded from elsewhere.
    policy = root.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    digest = base64.b64encode(hashlib.sha256(script.text.encode("utf-8")).digest()).decode("ascii")
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy
    links = [node.attributes.get(name) or "" for node in root.all() for name in ("src", "href")]
    assert not [link for link in links if urlsplit(link).netloc] and "url(" not in page and "@import" not in page


def silence(path, num_samples=800):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(num_samples), 16_000)
    return path


def players(path):
    """Number of the utterance -> the file its player's source leads to, from the report's own folder."""
    articles = {article["data-number"]: article.all("audio") for article in parse(path).all("article")}
    for players_of_one in articles.values():
        for player in players_of_one:
            assert player["preload"] == "none" and "controls" in player.attributes
            assert not urlsplit(player["src"]).scheme and not player["src"].startswith("/")
    return {number: (path.parent / unquote(audio[0]["src"])).resolve() for number, audio in articles.items() if audio}


def test_audio_is_found_or_embedded(tmp_path, monkeypatch):
    data = tmp_path / "data set"
    odd = silence(data / "audio" / "a: b#c%20?ü.wav")
    absolute = silence(tmp_path / "elsewhere" / "x.flac")
    silence(data / "by-id.wav")
    (data / "secret.txt").write_text("not audio")
    rows = [
        row("1", "a", "a", audio="audio/a: b#c%20?ü.wav"),
        row("2", "a", "a", audio=str(absolute)),
        row("3", "a", "a", audio="audio/missing.wav"),
        row("4", "a", "a", audio="secret.txt"),
        row("by-id.wav", "a", "a"),
    ]
    expected = {"1": odd.resolve(), "2": absolute.resolve(), "5": (data / "by-id.wav").resolve()}
    folder = write(tmp_path / "results" / "run", rows)
    output = tmp_path / "reports" / "deep" / "report.html"
    assert players(make_report(folder, output, audio_root=data)) == expected
    # Without a root: the folder of the data, by the name of its set.
    folder = write(tmp_path / "results" / "run", rows, {**RECORD, "data": [{"name": "set", "path": str(data)}]})
    assert players(make_report(folder)) == expected
    # Or of its manifest.
    (data / "metadata.jsonl").touch()
    named = {**RECORD, "data": [{"name": "set", "path": str(data / "metadata.jsonl")}]}
    assert players(make_report(write(tmp_path / "results" / "manifest", rows, named))) == expected
    # Through a link, ".." would lead elsewhere.
    (tmp_path / "link").symlink_to(tmp_path / "reports" / "deep")
    assert players(make_report(folder, tmp_path / "link" / "linked.html")) == expected

    clip = silence(tmp_path / "a.wav")
    folder = write(tmp_path, [row("1", "a", "a", audio="a.wav"), row("2", "a", "a", audio="b.wav")])
    (player,) = parse(make_report(folder, embed_audio=True)).all("audio")
    kind, content = player["src"].split(",")
    assert kind == "data:audio/wav;base64" and base64.b64decode(content) == clip.read_bytes()
    monkeypatch.setattr(report, "_MAX_EMBEDDED_MIB", 1e-3)
    with pytest.raises(ValueError, match="`embed_audio` would put"):
        make_report(folder, embed_audio=True)
    make_report(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    silence(tmp_path / "run" / "a.wav").rename(tmp_path / "run" / name)
    folder = write(tmp_path / "run", [row(name, "a", "a", audio=name)])
    page = make_report(folder)
    assert 'src="caf%E9.wav"' in page.read_text() and "caf\\udce9.wav" in page.read_text()


def test_command_and_errors(tmp_path, run_command):
    clip = silence(tmp_path / "data" / "a.wav")
    rows = [row("1", "a", "b", audio="a.wav")]
    folder, output = write(tmp_path / "all" / "one", rows), tmp_path / "one.html"
    done = run_command("report", folder, "--audio-root", clip.parent, "--output", output)
    assert done == (0, f"wrote {output}\n", "")
    assert players(output) == {"1": clip.resolve()}
    run_command("report", folder, "--audio-root", clip.parent, "--embed-audio")
    assert parse(folder / "report.html").all("audio")[0]["src"].startswith("data:audio/wav;base64,")

    write(tmp_path / "all" / "two", rows)
    written = [tmp_path / "all" / name / "report.html" for name in ("one", "two")]
    assert run_command("report", tmp_path / "all") == (0, "".join(f"wrote {path}\n" for path in written), "")
    code, out, err = run_command("report", tmp_path / "all", "--output", output)
    assert (code, out) == (1, "") and err.startswith("error: `--output` is one file, but") and err.count("\n") == 1
    code, out, err = run_command("report", folder, "--audio-root", tmp_path / "all")
    assert code == 0 and err.startswith("warning: None of the rows' audio files is in `audio_root`")
    code, out, err = run_command("report", tmp_path / "nothing")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ")

    folder = write(tmp_path / "f", ROWS)
    with pytest.raises(ValueError, match="`audio_root` .*missing"):
        make_report(folder, audio_root=tmp_path / "missing")
    with pytest.raises(ValueError, match="has no rows"):
        make_report(write(tmp_path / "none", []))
    with pytest.raises(ValueError, match="neither"):
        make_report(tmp_path)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="metrics.json is not JSON"):
        make_report(folder)
    (folder / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not of `mdm-asr evaluate`"):
        make_report(folder)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


def browse(page, tmp_path, fragment=""):
    """The page's tree after its script has run, and what went to the console."""
    arguments = "--headless --no-sandbox --disable-gpu --disable-background-networking --virtual-time-budget=2000"
    done = subprocess.run(
        [
            CHROMIUM,
            *arguments.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            page.resolve().as_uri() + fragment,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Tree(done.stdout).root, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_browser_shows_the_view_in_the_address(tmp_path):
    page = make_report(write(tmp_path, [*ROWS, drafted_row()], RECORD))
    root, console = browse(page, tmp_path, "#u=2&step=2&sort=confidence&filter=***→")
    assert console == []
    # Rising confidence, the one without it last. Insertions only, and the utterance that was asked for.
    order = ["nothing said", "one of four", "right", "half", "drafted", "empty"]
    articles = root.all("article")
    assert [article.all("h3")[0].text for article in articles] == order
    hidden = [article.all("h3")[0].text for article in articles if "hidden" in article.attributes]
    assert hidden == ["right", "drafted", "empty"]
    assert (root.all(id="shown")[0].text, root.all(id="turn")[0].text) == ("2 of 6 utterances", "↑ rising")
    # Only the canvas that was asked for is drawn: after step 2, "grin" of step 3 is still masked.
    assert [one.parent["data-steps"] for one in root.all(css="decoding") if one.all(css="cell")] == ["2"]
    cells = [(*(part.text for part in cell.all()), "fresh" in cell["class"]) for cell in root.all(css="cell")]
    assert cells == [
        ("red", "1 · 50 %", False),
        ("[MASK]", "\u00a0", False),
        ("blue", "2 · 70 %", True),
        ("black", "2 · 80 %", True),
    ]
    assert root.all(css="stepper")[0].all("output")[0].text == "step 2 of 4: 2 committed, 3 of 4 tokens done"
    root, console = browse(page, tmp_path, "#u=6&step=2")
    (text,) = root.all(css="drafts")
    shown = [(one.tag, one.text, "fresh" in one["class"]) for one in text.all() if "hidden" not in one.attributes]
    words = [("span", " a"), ("del", " y[END]"), ("mark", " b"), ("del", " x"), ("span", " c")]
    assert console == [] and shown == [(*word, i > 0) for i, word in enumerate(words)]
    assert root.all(css="stepper")[0].all("output")[0].text == (
        "evaluation 2 of 3: 1 of the donor, 1 drafted by masks, 0 by the hypothesis, 2 struck; 3 of 4 tokens done"
    )


@needs_chromium
def test_browser_runs_nothing_of_the_texts(tmp_path):
    folder, _ = hostile_folder(tmp_path)
    page = make_report(folder)
    root, console = browse(page, tmp_path, "#u=1&step=1")
    assert console == [] and root.all("title")[0].text.endswith("error analysis")
    (cell,) = root.all(css="cell")
    assert cell.all(css="token")[0].text == HOSTILE.strip() and not root.all("img")
    # Were a script to get in all the same, the policy stops it, and the console says so.
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</main>", "</main><script>document.title='HACKED'</script>"), encoding="utf-8")
    root, console = browse(page, tmp_path)
    assert root.all("title")[0].text.endswith("error analysis") and "Content Security Policy" in "".join(console)
