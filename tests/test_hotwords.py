"""Hotwords: states of texts and raised logits by hand, and against a slow definition; the processor's token ids."""

import pickle

import pytest
import torch
from demo_recording import LIBRISPEECH, RECORDING, needs_librispeech
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_processor, tiny_tokenizer
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from mdm_asr_hf import default_checkpoint
from mdm_asr_hf.hotwords_mdm_asr import (
    CONTINUATION_FACTOR,
    MAX_HOTWORD_TOKENS,
    HotwordAutomaton,
    HotwordIds,
    encode_hotwords,
    spellings,
)

V = 12


def state_of(automaton, text, row=0):
    state = automaton.roots[row]
    for token in text:
        state = automaton.advance(state, token)
    return state


def raised(automaton, text, row=0):
    """Token -> what is added behind a text, as part of the boost."""
    logits = torch.zeros(1, V)
    automaton.raise_logits(logits, [state_of(automaton, text, row)], 1.0)
    return {token: pytest.approx(value) for token, value in enumerate(logits[0].tolist()) if value}


def build(*words, batch_size=1):
    return HotwordAutomaton.build([list(word) for word in words], batch_size, V)


# States


def test_states_and_failure_links():
    automaton = build([3, 4, 5], [4, 6, 7])
    root = automaton.roots[0]
    states = [state_of(automaton, text) for text in ([], [3], [3, 4], [3, 4, 5], [4], [4, 6], [4, 6, 7])]
    assert len(set(states)) == len(states)
    assert state_of(automaton, [9]) == state_of(automaton, [6]) == state_of(automaton, [3, 5]) == root
    assert state_of(automaton, [9, 4, 3]) == state_of(automaton, [3, 3]) == state_of(automaton, [3])
    # By the failure link of [3, 4] to [4], and by that of [3, 4, 5] to nothing.
    assert state_of(automaton, [3, 4, 6]) == state_of(automaton, [4, 6])
    assert state_of(automaton, [3, 4, 5, 4]) == state_of(automaton, [4])
    assert state_of(automaton, [3, 4, 5, 6]) == root

    automaton = build([1, 2, 1, 2, 3], [2, 1, 4], [5])
    # Of [1, 2, 1], the shorter beginnings are [2, 1] and [1].
    assert state_of(automaton, [1, 2, 1, 4]) == state_of(automaton, [2, 1, 4])
    assert state_of(automaton, [1, 2, 1, 1]) == state_of(automaton, [1])
    assert state_of(automaton, [1, 2, 1, 5]) == state_of(automaton, [5])
    assert state_of(automaton, [1, 2, 1, 2, 1]) == state_of(automaton, [1, 2, 1])


# What is raised


def test_shares_by_hand():
    assert CONTINUATION_FACTOR == 2.0
    automaton = build([3, 4, 5], [6, 7])
    beginnings = {3: 1 / 3, 6: 1 / 2}
    assert raised(automaton, []) == raised(automaton, [9]) == beginnings
    # Two of three tokens, twice as much since it goes on.
    assert raised(automaton, [3]) == beginnings | {4: 4 / 3}
    assert raised(automaton, [9, 3, 4]) == beginnings | {5: 2.0}
    assert raised(automaton, [3, 4, 9]) == beginnings

    # A bare blank of no letters begins nothing.
    words = HotwordIds([[1, 2], [3, 4, 5]], {1: 3, 2: 1, 3: 0, 4: 1, 5: 4})
    automaton = HotwordAutomaton.build(words, 1, V)
    assert raised(automaton, []) == {1: 3 / 4}
    assert raised(automaton, [3]) == {1: 3 / 4, 4: 2 / 5}
    assert raised(automaton, [3, 4]) == {1: 3 / 4, 5: 2.0}

    automaton = build([3], [4, 5])
    states = [state_of(automaton, text) for text in ([], [4])]
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(2, V, dtype=dtype)
        automaton.raise_logits(logits, states, 6.0)
        assert logits.dtype == dtype
        assert logits[:, 3:6].tolist() == [[6.0, 3.0, 0.0], [6.0, 3.0, 12.0]] and int((logits != 0).sum()) == 5

    automaton = build([3], [4, 5])
    logits = torch.zeros(2, V)
    logits[0, 2] = logits[1, 1] = 1.0
    expected = logits.clone()
    expected[1, 3], expected[1, 4], expected[1, 5] = 6.0, 3.0, 12.0
    automaton.raise_logits(logits, [state_of(automaton, [4])] * 2, 6.0, eos_token_id=2)
    assert torch.equal(logits, expected)


def test_overlapping_words_and_rows_with_words_of_their_own():
    automaton = build([3, 4, 5], [4, 6])
    beginnings = {3: 1 / 3, 4: 1 / 2}
    assert raised(automaton, [3, 4]) == beginnings | {5: 2.0, 6: 2.0}
    assert raised(automaton, [4]) == beginnings | {6: 2.0}
    # What begins a word and goes on with another goes on.
    assert raised(automaton, [3]) == beginnings | {4: 4 / 3}

    automaton = build([3], [3, 4])
    # Of the shorter word, 3 is all.
    assert raised(automaton, []) == {3: 1.0}
    assert raised(automaton, [3]) == {4: 2.0}

    automaton = build([3], [4, 5], [5, 6], [7, 7])
    assert raised(automaton, []) == {3: 1.0, 4: 0.5, 5: 0.5, 7: 0.5}
    assert raised(automaton, [3]) == {4: 0.5, 5: 0.5, 7: 0.5}
    assert raised(automaton, [4, 5]) == {3: 1.0, 5: 0.5, 6: 2.0, 7: 0.5}
    assert raised(automaton, [7]) == {3: 1.0, 4: 0.5, 5: 0.5, 7: 2.0}
    assert raised(automaton, [7, 7]) == {3: 1.0, 4: 0.5, 5: 0.5}
    # A token later it does.
    assert raised(automaton, [3, 9]) == raised(automaton, [])

    lists = [[[3, 4]], [], [[5]]]
    automaton = HotwordAutomaton.build(lists, 3, V)
    assert len(set(automaton.roots)) == 3
    assert [raised(automaton, [3], row) for row in range(3)] == [{3: 0.5, 4: 2.0}, {}, {5: 1.0}]
    taken = automaton.take_rows([2, 0, 0])
    assert taken.roots == [automaton.roots[row] for row in (2, 0, 0)]
    # States stay what they are.
    assert taken.advance(taken.roots[1], 3) == automaton.advance(automaton.roots[0], 3)
    shared = HotwordAutomaton.build([[3, 4]], 3, V)
    assert shared.roots[0] == shared.roots[2]
    same = HotwordAutomaton.build([lists[0]] * 3, 3, V)
    assert same.roots[0] == same.roots[2] and raised(same, [3], 2) == {3: 0.5, 4: 2.0}


def slow_definition(words, letters, text):
    def share(word, number):
        count = [letters.get(token, 1) for token in word]
        return sum(count[:number]) / max(sum(count), 1)

    weights = {}
    endings = [text[i:] for i in range(len(text) + 1)]
    for word in words:
        for ending in endings:
            n = len(ending)
            if word[:n] == ending and len(word) > n:
                weight = share(word, n + 1) * (CONTINUATION_FACTOR if n else 1.0)
                weights[word[n]] = max(weights.get(word[n], 0.0), weight)
    for word in words:
        if word in endings:
            weights.pop(word[0], None)
    return {token: pytest.approx(weight) for token, weight in weights.items() if weight}


tokens = st.integers(0, 4)


@given(
    words=st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=8),
    letters=st.dictionaries(tokens, st.integers(0, 5)),
    text=st.lists(tokens, max_size=12),
)
def test_it_does_what_the_definition_says(words, letters, text):
    automaton = HotwordAutomaton.build([HotwordIds(), HotwordIds(words, letters)], 2, V)
    assert raised(automaton, text, row=1) == slow_definition(words, letters, text)
    assert raised(automaton, text, row=0) == {}
    backwards = HotwordAutomaton.build(HotwordIds(words[::-1], letters), 1, V)
    assert raised(backwards, text) == raised(automaton, text, row=1)


# The processor's part


def test_hotword_ids_are_tokens_as_in_a_text():
    assert spellings("McDonald rd") == ["McDonald rd", "mcdonald rd", "Mcdonald Rd", "MCDONALD RD"]
    assert spellings("ab") == ["ab", "Ab", "AB"] and spellings("7") == ["7"]

    processor = tiny_processor()
    ids = processor.hotword_ids(["bad", " new  cab ", "bad"])
    space, letters = 3, {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=4)}
    # The vocabulary has no capitals, so that other spellings drop out.
    bad, new, cab = (list(map(letters.get, word)) for word in ("bad", "new", "cab"))
    assert ids == [[space, *bad], [space, *new, space, *cab]]
    assert ids[0] == processor(text="bad").labels[0, :-1].tolist()
    assert ids.letters == {space: 0} | {letters[letter]: 1 for letter in "badnewc"}
    assert pickle.loads(pickle.dumps(ids)).letters == ids.letters
    assert processor.hotword_ids([]) == []

    tokenizer = tiny_tokenizer()
    assert len(encode_hotwords(["a" * (MAX_HOTWORD_TOKENS - 1)], tokenizer, " ")) == 1
    with pytest.raises(ValueError, match="takes 25 tokens"):
        encode_hotwords(["a" * MAX_HOTWORD_TOKENS], tokenizer, " ")


def test_what_is_no_word_and_no_ids_raises():
    for words in ["Quilter", None, 3, [""], ["ok", " "], ["?!"], [None], [["a"]], ["a" * 30], ["caf\udce9"]]:
        with pytest.raises(ValueError, match="`hotwords`"):
            tiny_processor().hotword_ids(words)

    for hotword_ids in [
        "abc",
        5,
        [3, 4],
        [[]],
        [[1] * 30],
        [[VOCAB_SIZE]],
        [[-1]],
        [[1.5]],
        [[[3]], [[4]]],
        [[[3]], [4]],
    ]:
        with pytest.raises(ValueError, match="`hotword_ids`"):
            HotwordAutomaton.build(hotword_ids, 3, VOCAB_SIZE)

    for nothing in ([], [[], [], []], HotwordIds(), [HotwordIds()] * 3):
        assert HotwordAutomaton.build(nothing, 3, VOCAB_SIZE) is None

    model, (features, mask) = tiny_drafts_model("whisper"), tiny_inputs()
    with pytest.raises(ValueError, match="`hotword_boost`"):
        model.generate(features, mask, hotword_boost=-1.0)
    with pytest.raises(ValueError, match="lists for 2 rows"):
        model.generate(features, mask, hotword_ids=[[[3]], [[4]]])


# Through generate()


def test_hotwords_do_not_depend_on_drafts_or_batch():
    model = tiny_drafts_model("whisper")
    features, mask = tiny_inputs("whisper")
    words = [[20, 21, 22], [7], [40, 8]]
    arguments = {"hotword_ids": words, "hotword_boost": 1.0, "max_new_tokens": 24}
    plain = model.generate(features.double(), mask, max_new_tokens=24)
    loop = model.generate(features.double(), mask, draft_branches=[], **arguments)
    assert loop.shape != plain.shape or not torch.equal(loop, plain)
    assert torch.equal(model.generate(features.double(), mask, **arguments), loop)
    for row in range(3):
        length = int(mask[row].sum())
        alone = model.generate(features[row : row + 1, :length].double(), mask[row : row + 1, :length], **arguments)
        assert alone[0].tolist() == loop[row, : alone.shape[1]].tolist()
    # Confidence is the donor's, of the words too.
    output = model.generate(features.double(), mask, return_dict_in_generate=True, **arguments)
    assert float(output.confidence.max()) < 0.9


# Real weights


@pytest.fixture(scope="module")
def real():
    folder = default_checkpoint()
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype="float32").eval()
    return model, AutoProcessor.from_pretrained(folder)


def test_hotwords_of_the_real_tokenizer(real):
    model, processor = real
    inputs = processor(RECORDING)
    words = ["Kubernetes", "Olbinett", "Mulrady", "Firefox", "spectacular", "automaton", "treaty", "mansion"]
    plain = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, hotword_ids=processor.hotword_ids(words)), plain)

    ids = processor.hotword_ids(["Quilter"])
    assert processor.tokenizer.convert_ids_to_tokens(ids[0]) == ["ĠQu", "il", "ter"]
    assert [processor.tokenizer.decode(one) for one in ids] == [" Quilter", " quilter", " QUILTER"]


@needs_librispeech
def test_a_name_that_was_said_is_written(real):
    model, processor = real
    inputs = processor(LIBRISPEECH / "audio" / "1272-128104-0014.flac")
    plain = processor.decode(model.generate(**inputs))[0]
    hotword_ids = processor.hotword_ids(["Quilter", "mulrady", "olbinett", "firefox", "cosette", "sherman"])
    text = processor.decode(model.generate(**inputs, hotword_ids=hotword_ids))[0]
    assert "Quilter" in text and text.count("Quilter") >= plain.count("Quilter")
