"""Prompt templates: what they accept, what they say, and what they refuse."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from mdm_asr_hf.prompt_mdm_asr import (
    build_prompt_ids,
    prompt_values,
    slot_value,
    validate_prompt_template,
    with_prompt_defaults,
)

CODES = {"en": 10, "de": 11, "zh": 12, "pt": 13}
WHISPER = {
    "tokens": [1, "language", "task", 2],
    "slots": {"language": CODES, "task": {"transcribe": 20, "translate": 21}},
    "defaults": {"language": "en", "task": "transcribe"},
    "detectable": ["language"],
    "translation": {"task": "translate", "targets": ["en"]},
}
CANARY = {
    "tokens": [3, "language", "target_language", "punctuation"],
    "slots": {"language": CODES, "target_language": CODES, "punctuation": {"true": 30, "false": 31}},
    "defaults": {"language": "en", "target_language": "@language", "punctuation": "true"},
}
ALL = {"tokens": [1, "language"], "slots": {"language": {code: 100 + i for i, code in enumerate(LANGUAGES)}}}


def test_one_token_per_item_whatever_the_rows_say():
    ids = build_prompt_ids(CANARY, 3, language=["de", None, "zh"], target_language=[None, "de", "en"])
    assert ids.tolist() == [[3, 11, 11, 30], [3, 10, 11, 30], [3, 12, 10, 30]]
    ids = build_prompt_ids(CANARY, 2, punctuation=[False, None], target_language="pt")
    assert ids.tolist() == [[3, 10, 13, 31], [3, 10, 13, 30]]
    assert build_prompt_ids({"tokens": [7, 8]}, 2, language=None).tolist() == [[7, 8]] * 2
    assert prompt_values({"tokens": [7]}, 2) == [{}, {}]

    for value in (True, "true", "True", "yes", 1, "1"):
        assert slot_value(CANARY, "punctuation", value) == "true"
    for value in (False, "false", "no", 0):
        assert slot_value(CANARY, "punctuation", value) == "false"


def test_spellings_of_a_language():
    for spelling in ["de", "DE", "German", "german", "<|de|>", "<|DE|>", "de-DE", "de_de", "de-Latn-AT", " de "]:
        assert build_prompt_ids(WHISPER, language=spelling).tolist() == [[1, 11, 20, 2]]

    for spelling, code in [
        ("zh-CN", "zh"),
        ("cmn_hans_cn", "zh"),
        ("Mandarin", "zh"),
        ("pt-BR", "pt"),
        ("nb-NO", "no"),
        ("jv", "jw"),
    ] + [("fil_ph", "tl"), ("Castilian", "es"), ("yue-Hant-HK", "yue"), ("haitian creole", "ht"), ("no", "no")]:
        assert slot_value(ALL, "language", spelling) == code

    template = {"tokens": [1, "language"], "slots": {"language": {"en-US": 5, "pt-BR": 6, "pt-PT": 7}}}
    for spelling in ("en", "en-us", "EN_US", "English", "<|en-US|>"):
        assert slot_value(template, "language", spelling) == "en-US"
    assert slot_value(template, "language", "pt-pt") == "pt-PT"
    # Which Portuguese is meant nobody knows.
    for spelling in ("pt", "Portuguese", "pt-AO"):
        with pytest.raises(ValueError, match="is not known"):
            slot_value(template, "language", spelling)

    template = {"tokens": ["language"], "slots": {"language": {"chinese": 5, "mandarin": 5, "zh": 5, "german": 6}}}
    assert [slot_value(template, "language", one) for one in ("Mandarin", "zh-TW", "GERMAN")] == ["zh", "zh", "german"]

    def message(language):
        with pytest.raises(ValueError) as error:
            slot_value(ALL, "language", language)
        return str(error.value)

    assert "Did you mean one of ['de', 'ka']?" in message("germn")
    assert re.search(r"Did you mean one of \[.*'fr'.*\]\? It knows 100 languages, by code", message("frensh"))
    assert "Use one of its 100 languages, by code or English name, such as ['af', 'am', 'ar']." in message("qqqqqq")
    # Of few, all.
    with pytest.raises(ValueError, match=re.escape("Use one of ['de', 'en', 'pt', 'zh'].")):
        slot_value(WHISPER, "language", "germn")
    with pytest.raises(ValueError, match=re.escape("Use one of ['false', 'true'].")):
        slot_value(CANARY, "punctuation", "maybe")


@given(code=st.sampled_from(sorted(LANGUAGES)), row=st.integers(0, 3), upper=st.booleans(), named=st.booleans())
def test_a_row_says_its_own_language_and_no_other(code, row, upper, named):
    spelling = LANGUAGES[code] if named else code
    languages = ["en", "de", "fr", "es"]
    languages[row] = spelling.upper() if upper else spelling
    expected = [list(LANGUAGES).index(one) + 100 for one in ("en", "de", "fr", "es")]
    expected[row] = 100 + list(LANGUAGES).index(code)
    assert build_prompt_ids(ALL, 4, language=languages)[:, 1].tolist() == expected


@given(st.text())
def test_any_other_text_is_refused_in_one_line(text):
    try:
        found = slot_value(ALL, "language", text)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and message.startswith(f"`language={text!r}` is not known")
        assert len(message) - len(repr(text)) < 200  # not all hundred
    else:
        assert found in LANGUAGES


# Translation


def test_tasks_and_defaults_follow_from_the_languages():
    def tasks(**slots):
        return [values["task"] for values in prompt_values(WHISPER, 1, **slots)]

    assert tasks() == tasks(language="de") == tasks(target_language="en") == ["transcribe"]
    assert tasks(language="de", target_language="en") == ["translate"]
    assert tasks(language="de", task="translate") == ["translate"]
    always = with_prompt_defaults(WHISPER, task="translate")
    assert prompt_values(always, language="de")[0]["task"] == "translate"
    # Named languages say more than a default.
    assert prompt_values(always, language="de", target_language="de")[0]["task"] == "transcribe"
    with pytest.raises(ValueError, match=re.escape("translates into ['en'] only, not from 'en' into 'de'")):
        tasks(target_language="de")

    assert prompt_values(WHISPER, 2, language=["auto", "German"]) == [
        {"language": None, "task": "transcribe"},
        {"language": "de", "task": "transcribe"},
    ]
    with pytest.raises(ValueError, match=re.escape("needs a `language`: only `generate` can detect it, from audio.")):
        build_prompt_ids(WHISPER, 2, language=["auto", "de"])
    with pytest.raises(ValueError, match=r"cannot detect the language. Pass one of \['de', 'en', 'pt', 'zh'\]"):
        prompt_values(CANARY, language="auto")
    with pytest.raises(ValueError, match="cannot detect the language. Leave the argument out"):
        prompt_values({"tokens": [7]}, language="auto")
    with pytest.raises(ValueError, match="`target_language='auto'` is not known"):
        prompt_values(WHISPER, target_language="auto")

    changed = with_prompt_defaults(CANARY, language="German", punctuation=False, target_language=None)
    assert changed["defaults"] == {"language": "de", "target_language": "@language", "punctuation": "false"}
    assert CANARY["defaults"]["language"] == "en"
    assert build_prompt_ids(changed).tolist() == [[3, 11, 11, 31]]
    assert build_prompt_ids(changed, language="zh", punctuation=True).tolist() == [[3, 12, 12, 30]]
    assert with_prompt_defaults(WHISPER, language="auto")["defaults"]["language"] == "auto"
    for slots, message in (
        (dict(language="xx"), "`language='xx'` is not known"),
        (dict(mood="good"), "`mood='good'` has no place"),
        (dict(target_language="en"), "'target_language'.* have no place of their own"),
    ):
        with pytest.raises(ValueError, match=message):
            with_prompt_defaults(WHISPER, **slots)


# Errors


def test_templates_that_do_not_fit_and_wrong_arguments():
    for change, message in [
        (dict(tokens=[]), "non-empty list `tokens`"),
        (dict(tokens=[1, "mood"]), "uses the slot 'mood'"),
        (dict(tokens=[1, True]), "must be token ids or slot names"),
        (dict(defaults={"language": "xx"}), "default language='xx'"),
        (dict(defaults={"task": "auto"}), "default task='auto'"),
        (dict(detectable=["task"]), "has 'task' detectable"),
        (dict(tokens=["language", 1]), "has 'language' detectable.* behind fixed token ids"),
        (dict(tokens=[1, "task", "language"]), "has 'language' detectable"),
        (dict(translation={"task": "sing"}), "translation .*'sing'.* must name one of several values"),
        (dict(translation={"task": "translate", "targets": ["xx"]}), "translation .* values of the slot 'language'"),
        (dict(slot={}), r"the unknown parts \['slot'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            validate_prompt_template({**WHISPER, **change})

    with pytest.raises(ValueError, match="`language` has 3 values for a batch of 2"):
        build_prompt_ids(WHISPER, 2, language=["de", "en", "de"])
    with pytest.raises(ValueError, match="`mood='good'` has no place in this model's prompt, which takes "):
        build_prompt_ids(WHISPER, mood="good")
    with pytest.raises(ValueError, match="`language='de'` has no place .* which is fixed. Leave the argument out"):
        build_prompt_ids({"tokens": [7]}, language="de")
    with pytest.raises(ValueError, match=re.escape("`language` has no default in this model's prompt. Pass one of [")):
        build_prompt_ids({**CANARY, "defaults": {"target_language": "@language", "punctuation": "true"}})
    with pytest.raises(ValueError, match="no default .* such as"):
        build_prompt_ids(ALL)
