# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Subtitles: what other people's parsers read back is what was said, in cues a reader can follow."""

import io
import json
from datetime import timedelta

import srt
import webvtt
from hypothesis import example, given
from hypothesis import strategies as st

from mdm_asr_hf.transcribe.subtitles import WRITERS, make_cues, to_json, to_srt, to_txt, to_vtt
from mdm_asr_hf.transcribe.transcript import Segment, Transcript, Word


def timed(text, start_s, seconds_a_word=0.5):
    """Words that follow each other without pauses."""
    return [
        Word(word, start_s + i * seconds_a_word, start_s + (i + 1) * seconds_a_word)
        for i, word in enumerate(text.split())
    ]


def transcript_of(*word_lists, duration_s=None):
    """A segment of each list of words."""
    segments = [
        Segment(words[0].start_s, words[-1].end_s, " ".join(word.text for word in words), words)
        for words in word_lists
    ]
    text = " ".join(segment.text for segment in segments)
    return Transcript(text, duration_s or (segments[-1].end_s if segments else 0.0), segments)


def vtt_cues(content):
    """(start, end, text) as webvtt-py reads them."""
    return [(one.start, one.end, one.text) for one in webvtt.from_buffer(io.StringIO(content))]


# --- hand-made ---


def test_the_formats_letter_by_letter():
    transcript = transcript_of(timed("Salt & <pepper>.", 1.0, 0.25), timed("Bye", 3661.5, 0.75), duration_s=3700.0)
    assert to_srt(transcript) == (
        "1\n00:00:01,000 --> 00:00:02,000\nSalt & <pepper>.\n\n2\n01:01:01,500 --> 01:01:02,500\nBye\n"
    )
    assert to_vtt(transcript) == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:02.000\nSalt &amp; &lt;pepper&gt;.\n\n01:01:01.500 --> 01:01:02.500\nBye\n"
    )
    assert to_txt(transcript) == "Salt & <pepper>.\nBye\n"
    values = json.loads(to_json(transcript, file="kitchen.wav"))
    assert values.pop("file") == "kitchen.wav" and values == transcript.to_dict()
    assert values["segments"][1]["words"][0] == {
        "text": "Bye",
        "start_s": 3661.5,
        "end_s": 3662.25,
        "confidence": None,
    }

    for segments in ([], [Segment(0.0, 3.0, "")]):
        transcript = Transcript("", 3.0, segments)
        assert (to_srt(transcript), to_vtt(transcript), to_txt(transcript)) == ("", "WEBVTT\n", "")
        assert list(srt.parse(to_srt(transcript))) == [] and vtt_cues(to_vtt(transcript)) == []
        assert json.loads(to_json(transcript)) == transcript.to_dict()

    transcript = transcript_of(timed("still here", 123 * 3600 + 4 * 60 + 5.25))
    assert "123:04:05,250 --> 123:04:06,250" in to_srt(transcript)
    assert vtt_cues(to_vtt(transcript)) == [("123:04:05.250", "123:04:06.250", "still here")]


def test_cues_by_hand():
    # 14 words in 7 s would fit two lines; the sentence ends after nine.
    words = timed("We went down to the sea in the morning. The water was cold and very clear that day.", 0.0)
    assert [" ".join(cue.lines) for cue in make_cues(transcript_of(words))] == [
        "We went down to the sea in the morning.",
        "The water was cold and very clear that day.",
    ]

    words = timed("so that was the first thing", 0.0) + timed("and this is the second one of them all", 3.6)
    assert [" ".join(cue.lines) for cue in make_cues(transcript_of(words))] == [
        "so that was the first thing",
        "and this is the second one of them all",
    ]
    # Across 1.5 s and less a cue may stand, across more it does not, short as both sides are.
    for pause_s, num_cues in ((1.5, 1), (1.75, 2)):
        words = [Word("yes", 0.0, 0.5), Word("no", 0.5 + pause_s, 1.0 + pause_s)]
        assert len(make_cues(transcript_of(words))) == num_cues

    words = [Word("hm", 1.0, 1.125)]
    assert make_cues(transcript_of(words, duration_s=10.0))[0].end_s == 2.0
    assert make_cues(transcript_of(words, duration_s=1.5))[0].end_s == 1.5
    # It gives way to the next one.
    words.append(Word("yes", 1.4, 1.6))
    segments = [Segment(one.start_s, one.end_s, one.text, [one]) for one in words]
    assert [(c.start_s, c.end_s) for c in make_cues(Transcript("", 9.0, segments))] == [(1.0, 1.4), (1.4, 2.4)]

    # 12 words of 9 letters in 12 s: cues of at most 7 s hold at most 7 of them, two lines of 42 columns hold 8.
    text = " ".join(["ninechars"] * 12)
    cues = make_cues(Transcript(text, 20.0, [Segment(4.0, 16.0, text)]))
    assert [word for cue in cues for line in cue.lines for word in line.split()] == text.split()
    assert [cue.start_s for cue in cues][0] == 4.0 and cues[-1].end_s == 16.0
    boundaries = [round(cue.start_s) for cue in cues]
    assert boundaries == [cue.start_s for cue in cues] and all(c.end_s - c.start_s <= 7 for c in cues)
    # Words with times in one segment do not help those in another.
    untimed = Transcript("", 4.0, [Segment(0.0, 2.0, "a b", [Word("a"), Word("b")]), Segment(2.0, 4.0, "c d")])
    assert [(c.start_s, c.end_s, c.lines) for c in make_cues(untimed)] == [(0, 2, ["a b"]), (2, 4, ["c d"])]


def test_lines_by_hand():
    # 46 letters need two lines; greedily they would be 42 and 4.
    cues = make_cues(transcript_of(timed("one two three four five six seven eight now end", 0.0, 0.2)))
    assert [cue.lines for cue in cues] == [["one two three four five", "six seven eight now end"]]

    # A wide character takes two columns: 21 a line, 42 a cue.
    cues = make_cues(transcript_of([Word("字" * 50, 0.0, 10.0)]))
    assert sum(len(line) for cue in cues for line in cue.lines) == 50
    assert all(len(line) <= 21 for cue in cues for line in cue.lines) and len(cues) == 2


# --- for all transcripts ---

# Words as a tokenizer may bring them forth: any script, markup, arrows, marks of the formats themselves.
word_texts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=60),
    st.sampled_from(
        ["<i>", "-->", "&amp;", "1", "WEBVTT", "NOTE", "STYLE", "{\\an8}", "00:00:01,000", "hello.", "a,"]
    ),
)


@st.composite
def transcripts(draw):
    """Segments in order of time, with or without word times, which may overlap a little as alignments do."""
    segments, time_s = [], draw(st.floats(0, 1e6))
    for _ in range(draw(st.integers(0, 5))):
        start_s = time_s = time_s + draw(st.floats(0, 3))
        words = []
        has_times = draw(st.booleans())
        for text in draw(st.lists(word_texts, max_size=30)):
            time_s += draw(st.floats(-0.05, 2))
            end_s = time_s + draw(st.floats(0, 9))
            words.append(Word(text, time_s, end_s) if has_times else Word(text))
            time_s = end_s
        time_s = max(time_s, start_s)
        segments.append(Segment(start_s, time_s, " ".join(word.text for word in words), words))
    return Transcript(" ".join(segment.text for segment in segments), time_s, segments)


def check_cues(cues, transcript):
    """Parsed (start_ms, end_ms, text) are what was said, in order, at readable lengths."""
    said = "".join(transcript.text.split())
    assert "".join("".join(text.split()) for _, _, text in cues) == said
    previous_end_ms = 0
    for start_ms, end_ms, text in cues:
        assert previous_end_ms <= start_ms < end_ms <= start_ms + 7000
        previous_end_ms = end_ms
        lines = text.split("\n")
        assert 1 <= len(lines) <= 2 and all(0 < len(line) <= 42 for line in lines if line.isascii())


@given(transcripts())
@example(Transcript("1 --> 2", 1.0, [Segment(0.0, 1.0, "1 --> 2")]))
def test_srt_is_read_back(transcript):
    parsed = list(srt.parse(to_srt(transcript)))
    assert [one.index for one in parsed] == list(range(1, len(parsed) + 1))
    ms = timedelta(milliseconds=1)
    check_cues([(round(one.start / ms), round(one.end / ms), one.content) for one in parsed], transcript)


@given(transcripts())
@example(Transcript("1 --> 2", 1.0, [Segment(0.0, 1.0, "1 --> 2 &lt; <b>")]))
def test_vtt_is_read_back(transcript):
    content = to_vtt(transcript)
    assert content.startswith("WEBVTT\n")
    parsed = webvtt.from_buffer(io.StringIO(content))

    def ms(timestamp):
        hours, minutes, seconds = timestamp.split(":")
        return round((int(hours) * 3600 + int(minutes) * 60) * 1000 + float(seconds) * 1000)

    cues = []
    for one in parsed:
        raw = one.raw_text
        assert "<" not in raw and ">" not in raw
        cues.append((ms(one.start), ms(one.end), raw.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")))
    check_cues(cues, transcript_of_segments(transcript))


def transcript_of_segments(transcript):
    """With the text of its segments, which the writers go by."""
    return Transcript(" ".join(s.text for s in transcript.segments), transcript.duration_s, transcript.segments)


@given(transcripts())
def test_json_and_txt_are_read_back(transcript):
    assert json.loads(to_json(transcript)) == transcript.to_dict()
    assert to_txt(transcript).split() == transcript.text.split()


@given(st.text(max_size=40))
def test_no_text_breaks_a_file(text):
    """Not even control characters, line breaks and NUL, which no tokenizer should give."""
    transcript = Transcript(text, 2.0, [Segment(0.0, 2.0, text)])
    for write in WRITERS.values():
        content = write(transcript)
        assert "\0" not in content and "\n\n\n" not in content
    parsed = list(srt.parse(to_srt(transcript)))
    assert len(parsed) <= len(text) and all(one.content.strip() for one in parsed)
