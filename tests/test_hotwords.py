"""Hotwords: which logits are raised, against hand-made canvases and a slow reference; and through generate()."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from mdm_asr_hf import default_checkpoint
from mdm_asr_hf.hotwords_mdm_asr import (
    MAX_HOTWORD_TOKENS,
    TOKEN_FACTOR,
    HotwordIds,
    HotwordTrie,
    encode_hotwords,
    spellings,
)
from mdm_asr_hf.sampling_mdm_asr import EBConfConfig, sampler_step

MASK, EOS, V = 9, 8, 9
REPOSITORY = Path(__file__).parent.parent
LIBRISPEECH = REPOSITORY.parent / "shared" / "speech" / "eval" / "librispeech"


def raised(hotword_ids, rows, logits, boost=5.0, threshold=3.0):
    """The (row, position, token) that are raised on canvases, given as lists; also checks by how much."""
    tokens = torch.tensor(rows)
    ended = (tokens == EOS).cummax(-1).values
    candidates = (tokens == MASK) & ~ended
    text = ~ended
    trie = HotwordTrie.build(hotword_ids, len(rows), V)
    flat = logits[candidates].clone()
    before = flat.clone()
    places, unbiased = trie.raise_logits(flat, tokens, candidates, text, boost=boost, threshold=threshold)
    changed = (flat != before).nonzero().tolist()
    assert [flat[place, token].item() for place, token in changed] == [
        before[place, token].item() + boost for place, token in changed
    ]
    assert places.tolist() == sorted({place for place, _ in changed}) and torch.equal(unbiased, before[places])
    cells = candidates.nonzero().tolist()
    return {(*cells[place], token) for place, token in changed}


def flat_logits(*shape, best=0, height=10.0):
    """Token `best` is ahead of all others, by far, everywhere."""
    logits = torch.zeros(*shape, V)
    logits[..., best] = height
    return logits


def test_a_word_is_raised_at_all_its_open_positions_where_it_is_plausible():
    logits = flat_logits(1, 4)
    # 1 + 4 = 5 nats behind over two tokens, 2.5 on average.
    logits[0, 1, 3], logits[0, 2, 4] = 9.0, 6.0
    canvas = [[MASK] * 4]
    assert raised([[3, 4]], canvas, logits, threshold=2.5) == {(0, 1, 3), (0, 2, 4)}
    assert raised([[3, 4]], canvas, logits, threshold=2.4) == set()


def test_one_token_that_is_out_of_the_question_rules_a_word_out():
    assert TOKEN_FACTOR == 2.5
    logits = flat_logits(1, 4)
    logits[0, 0, 3], logits[0, 1, 4], logits[0, 2, 5], logits[0, 3, 6] = 10.0, 10.0, 10.0, 7.25
    assert raised([[3, 4, 5, 6]], [[MASK] * 4], logits, threshold=1.0) == set()
    logits[0, 3, 6] = 7.5
    assert len(raised([[3, 4, 5, 6]], [[MASK] * 4], logits, threshold=1.0)) == 4


def test_a_suppressed_token_stays_suppressed():
    logits = flat_logits(1, 2)
    logits[0, 0, 3], logits[0, 1, 4] = 10.0, -torch.inf
    assert raised([[3, 4]], [[MASK] * 2], logits, threshold=1e6) == set()


def test_a_committed_part_extends_the_word_to_the_right_and_to_the_left():
    logits = flat_logits(1, 3)
    logits[0, :, 3], logits[0, :, 4], logits[0, :, 5] = 5.0, 5.0, 5.0
    word = [[3, 4, 5]]
    # 5 nats behind at two of three positions, 10 / 3 on average; at all of them it would be 5.
    assert raised(word, [[3, MASK, MASK]], logits, threshold=3.4) == {(0, 1, 4), (0, 2, 5)}
    assert raised(word, [[MASK, MASK, 5]], logits, threshold=3.4) == {(0, 0, 3), (0, 1, 4)}
    assert raised(word, [[MASK, 4, MASK]], logits, threshold=3.4) == {(0, 0, 3), (0, 2, 5)}
    assert raised(word, [[MASK, MASK, MASK]], logits, threshold=3.4) == set()
    assert raised(word, [[3, MASK, MASK]], logits, threshold=3.3) == set()


@pytest.mark.parametrize(
    "canvas",
    [[3, 4, MASK, MASK], [MASK, 6, MASK, EOS], [6, 6, 6, MASK], [3, 4, 5, MASK], [MASK, MASK, EOS, MASK]],
    ids=["another token follows", "another amid it", "beyond the canvas", "complete", "beyond the end of text"],
)
def test_where_a_word_does_not_fit(canvas):
    logits = torch.zeros(1, 4, V)
    # Nothing is implausible: what rules it out is the canvas.
    word = [[3, 4, 5]] if canvas != [3, 4, MASK, MASK] else [[3, 6, 5]]
    assert raised(word, [canvas], logits) == set()


def test_no_word_ends_amid_another():
    logits = torch.zeros(1, 3, V)
    assert raised([[3, 4]], [[MASK, 4, 7]], logits) == {(0, 0, 3)}
    assert raised(HotwordIds([[3, 4]], [0], inner_ids=[7]), [[MASK, 4, 7]], logits) == set()
    assert raised(HotwordIds([[3, 4]], [0], inner_ids=[7]), [[MASK, 4, 6]], logits) == {(0, 0, 3)}
    # What is still open after it may become anything.
    assert raised(HotwordIds([[3, 4]], [0], inner_ids=[7]), [[MASK, 4, MASK]], logits) == {(0, 0, 3)}


def test_of_contradicting_words_the_most_plausible_is_raised():
    logits = flat_logits(1, 3)
    logits[0, 0, 3], logits[0, 1, 4], logits[0, 2, 5] = 9.0, 9.5, 9.8
    # [3, 4] is 0.75 behind on average, [4, 5] is 0.35: at position 1 they agree, so that both stay.
    assert raised([[3, 4], [4, 5]], [[MASK] * 3], logits) == {(0, 0, 3), (0, 1, 4), (0, 2, 5)}
    logits[0, 1, 6] = 9.0
    # [3, 6] is 1 behind and wants another token at position 1.
    assert raised([[3, 6], [4, 5]], [[MASK] * 3], logits) == {(0, 1, 4), (0, 2, 5)}
    assert raised([[3, 6]], [[MASK] * 3], logits) == {(0, 0, 3), (0, 1, 6)}


def test_a_word_and_its_longer_form_do_not_contradict():
    logits = flat_logits(1, 2)
    logits[0, 0, 3], logits[0, 1, 4] = 9.5, 8.0
    assert raised([[3], [3, 4]], [[MASK] * 2], logits) == {(0, 0, 3), (0, 1, 4)}
    # Nor does the short one, once it is written, keep the long one from being completed.
    assert raised([[3], [3, 4]], [[3, MASK]], logits) == {(0, 1, 4)}


def test_a_word_is_raised_once_where_its_place_is_uncertain():
    logits = flat_logits(1, 5)
    logits[0, 1, 3], logits[0, 2, 3], logits[0, 4, 3] = 9.0, 9.5, 8.0
    # Neighbours are the same word; one position between them makes two.
    assert raised([[3]], [[MASK] * 5], logits) == {(0, 2, 3), (0, 4, 3)}
    assert raised([[3]], [[MASK, 3, MASK, MASK, MASK]], logits) == {(0, 4, 3)}
    # Equally plausible ones: the left one.
    logits[0, 1, 3] = 9.5
    assert raised([[3]], [[MASK] * 5], logits) == {(0, 1, 3), (0, 4, 3)}


def test_spellings_of_a_word_are_the_same_word():
    logits = flat_logits(1, 2)
    logits[0, 0, 3], logits[0, 1, 4] = 9.5, 9.0
    assert raised([[3], [4]], [[MASK] * 2], logits) == {(0, 0, 3), (0, 1, 4)}
    assert raised(HotwordIds([[3], [4]], words=[0, 0]), [[MASK] * 2], logits) == {(0, 0, 3)}


def test_each_row_has_its_own_words():
    logits = torch.zeros(3, 2, V)
    canvas = [[MASK] * 2] * 3
    assert raised([[[3, 4]], [], [[5, 6]]], canvas, logits) == {(0, 0, 3), (0, 1, 4), (2, 0, 5), (2, 1, 6)}
    assert raised([[3, 4]], canvas, logits) == {(r, i, t) for r in range(3) for i, t in ((0, 3), (1, 4))}


def slow_reference(words, owners, inner, canvas, logits, threshold):
    """What is raised in one row, by the definition: every word at every position."""
    length = canvas.index(EOS) if EOS in canvas else len(canvas)
    found = []
    for sequence, owner in zip(words, owners, strict=True):
        for start in range(length - len(sequence) + 1):
            gaps = []
            for i, token in enumerate(sequence, start=start):
                if canvas[i] == MASK:
                    gaps.append(float(logits[i].max() - logits[i, token]))
                else:
                    gaps.append(0.0 if canvas[i] == token else float("inf"))
            end = start + len(sequence)
            if max(gaps) > TOKEN_FACTOR * threshold or (end < length and canvas[end] in inner):
                continue
            mean = round(sum(gaps) / len(gaps) * 1000)
            if mean <= round(threshold * 1000):
                is_open = any(canvas[i] == MASK for i in range(start, end))
                found.append(((mean, start), start, sequence, owner, is_open))
    result = set()
    for rank, start, sequence, owner, is_open in found:
        cells = {start + i: token for i, token in enumerate(sequence) if canvas[start + i] == MASK}
        agrees = all(
            token
            == min(
                (other_rank, other[i - other_start])
                for other_rank, other_start, other, _, _ in found
                if 0 <= i - other_start < len(other)
            )[1]
            for i, token in cells.items()
        )
        is_first = all(
            other_rank >= rank
            or other_owner != owner
            or other_start > start + len(sequence)
            or start > other_start + len(other)
            for other_rank, other_start, other, other_owner, _ in found
        )
        if agrees and is_first and is_open:
            result |= set(cells.items())
    return result


sequences = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(
    words=st.lists(sequences, min_size=1, max_size=8, unique_by=tuple),
    num_words=st.integers(1, 8),
    inner=st.sets(st.integers(0, 5), max_size=3),
    rows=st.lists(st.lists(st.sampled_from([MASK, MASK, 0, 1, 2, 3, 4, 5, EOS]), min_size=7, max_size=7), max_size=3),
    threshold=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_it_does_what_the_definition_says_and_a_batch_is_its_rows(words, num_words, inner, rows, threshold, seed):
    # One row is always there, with something open in it.
    rows = [[MASK] * 7, *rows]
    # Quarters, so that no mean lies at the edge of the sampler's grid.
    logits = torch.randint(-8, 9, (len(rows), 7, V), generator=torch.Generator().manual_seed(seed)) / 4.0
    hotwords = HotwordIds(words, [i % num_words for i in range(len(words))], inner)
    together = raised(hotwords, rows, logits, threshold=threshold)
    for r, row in enumerate(rows):
        expected = slow_reference(words, hotwords.words, inner, row, logits[r], threshold)
        assert {(i, t) for one, i, t in together if one == r} == expected
        assert {(i, t) for _, i, t in raised([hotwords], [row], logits[r : r + 1], threshold=threshold)} == expected
    shuffled = HotwordIds(words[::-1], hotwords.words[::-1], inner)
    assert raised(shuffled, rows, logits, threshold=threshold) == together


def test_the_sampler_takes_the_raised_token_without_growing_bolder():
    canvas = torch.full((1, 2), MASK)
    logits = torch.zeros(2, V)
    logits[0, 1], logits[1, 2] = 3.0, 1.0
    arguments = dict(mask_token_id=MASK, steps_left=9, candidates=canvas == MASK)
    plain = sampler_step(EBConfConfig(gamma=0.5), logits, canvas, **arguments)
    assert plain.committed.tolist() == [[True, False]]
    boosted, places = logits.clone(), torch.tensor([1])
    boosted[1, 3] += 12.0
    # The entropy of a sure position would let both through.
    bold = sampler_step(EBConfConfig(gamma=0.5), boosted, canvas, **arguments)
    assert bold.committed.tolist() == [[True, True]]
    step = sampler_step(EBConfConfig(gamma=0.5), boosted, canvas, unbiased=(places, logits[places]), **arguments)
    assert step.committed.sum() == 1 and step.tokens.tolist() == [[1, 3]]
    assert torch.equal(step.confidence, bold.confidence)


# The processor's part


def test_spellings():
    assert spellings("McDonald rd") == ["McDonald rd", "mcdonald rd", "Mcdonald Rd", "MCDONALD RD"]
    assert spellings("ab") == ["ab", "Ab", "AB"] and spellings("7") == ["7"]


def test_hotword_ids_are_tokens_as_in_a_text():
    processor = tiny_processor()
    ids = processor.hotword_ids(["bad", " new  cab "])
    space, letters = 3, {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=4)}
    # The vocabulary has no capitals, so that other spellings drop out.
    bad, new, cab = (list(map(letters.get, word)) for word in ("bad", "new", "cab"))
    assert ids == [[space, *bad], [space, *new, space, *cab]]
    assert ids.words == [0, 1]
    assert ids[0] == processor(text="bad").labels[0, :-1].tolist()
    # Not what begins with a blank, nor punctuation, nor special tokens.
    assert set(letters.values()) <= set(ids.inner_ids) and not {1, 2, space, 30, 31, 32} & set(ids.inner_ids)
    assert pickle.loads(pickle.dumps(ids)).words == [0, 1]
    assert processor.hotword_ids([]) == []


@pytest.mark.parametrize("words", ["Quilter", None, 3, [""], ["ok", " "], ["?!"], [None], [["a"]], ["a" * 30]])
def test_what_is_no_word_raises(words):
    with pytest.raises(ValueError, match="`hotwords`"):
        tiny_processor().hotword_ids(words)


def test_a_spelling_that_takes_too_many_tokens_is_left_out():
    tokenizer = tiny_tokenizer()
    assert len(encode_hotwords(["a" * (MAX_HOTWORD_TOKENS - 1)], tokenizer, " ")) == 1
    with pytest.raises(ValueError, match="takes 25 tokens"):
        encode_hotwords(["a" * MAX_HOTWORD_TOKENS], tokenizer, " ")


@pytest.mark.parametrize(
    "hotword_ids",
    ["abc", 5, [3, 4], [[]], [[1] * 30], [[VOCAB_SIZE]], [[-1]], [[1.5]], [[[3]], [[4]]], [[[3]], [4]]],
)
def test_what_are_no_hotword_ids_raises(hotword_ids):
    with pytest.raises(ValueError, match="`hotword_ids`"):
        HotwordTrie.build(hotword_ids, 3, VOCAB_SIZE)


def test_nothing_to_build():
    for nothing in ([], [[], [], []], HotwordIds(), [HotwordIds()] * 3):
        assert HotwordTrie.build(nothing, 3, VOCAB_SIZE) is None


# Through generate()


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def contains(sequence, word):
    sequence = list(sequence)
    return any(sequence[i : i + len(word)] == word for i in range(len(sequence)))


def test_without_hotwords_nothing_changes(model):
    features, mask = tiny_inputs()
    arguments = dict(input_features=features, attention_mask=mask, return_dict_in_generate=True, canvas_length=12)
    plain = model.generate(**arguments)
    for extra in (
        dict(hotword_ids=[]),
        dict(hotword_ids=[[], [], []]),
        dict(hotword_ids=[[5, 6, 7]], hotword_boost=0.0),
    ):
        other = model.generate(**arguments, **extra)
        assert torch.equal(plain.sequences, other.sequences) and torch.equal(plain.confidence, other.confidence)
        assert torch.equal(plain.nfe, other.nfe)


def test_a_forced_word_is_written_and_a_batch_is_its_rows(model):
    features, mask = tiny_inputs()
    words = [[[5, 6, 7], [9, 10]], [], [[11, 12, 13, 14]]]
    arguments = dict(hotword_boost=1000.0, hotword_threshold=1000.0, canvas_length=12)
    batch = model.generate(features, mask, hotword_ids=words, **arguments)
    assert contains(batch[0].tolist(), [5, 6, 7]) and contains(batch[2].tolist(), [11, 12, 13, 14])
    plain = model.generate(features, mask, canvas_length=12)
    for i in range(3):
        n = int(mask[i].sum())
        single = model.generate(
            features[i : i + 1, :n], mask[i : i + 1, :n], hotword_ids=words[i] or [[]][:0], **arguments
        )[0]
        width = min(len(single), batch.shape[1])
        assert torch.equal(single[:width], batch[i, :width])
        if i == 1:
            assert torch.equal(plain[1][:width], single[:width])


def test_samples_of_an_utterance_share_its_words(model):
    features, mask = tiny_inputs()
    words = [[[5, 6, 7]], [[8, 9, 10]], [[11, 12, 13]]]
    out = model.generate(
        features,
        mask,
        hotword_ids=words,
        hotword_boost=1000.0,
        hotword_threshold=1000.0,
        num_return_sequences=2,
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        canvas_length=12,
    )
    for i, row in enumerate(out.tolist()):
        assert contains(row, words[i // 2][0])


@pytest.mark.parametrize("name", ["hotword_boost", "hotword_threshold"])
def test_settings_are_checked(model, name):
    features, mask = tiny_inputs()
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.generate(features, mask, **{name: -1.0})
    with pytest.raises(ValueError, match="lists for 2 rows"):
        model.generate(features, mask, hotword_ids=[[[3]], [[4]]])


# Real weights


@pytest.fixture(scope="module")
def real():
    folder = default_checkpoint()
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype="float32").eval(), AutoProcessor.from_pretrained(
        folder
    )


def test_words_that_were_not_said_leave_a_clear_recording_alone(real):
    model, processor = real
    inputs = processor(next((REPOSITORY / "demo").glob("*.flac")))
    words = ["Kubernetes", "Olbinett", "Mulrady", "Firefox", "spectacular", "automaton", "treaty", "mansion"]
    plain = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, hotword_ids=processor.hotword_ids(words)), plain)


def test_hotwords_of_the_real_tokenizer(real):
    _, processor = real
    ids = processor.hotword_ids(["Quilter"])
    assert processor.tokenizer.convert_ids_to_tokens(ids[0]) == ["ĠQu", "il", "ter"]
    assert [processor.tokenizer.decode(one) for one in ids] == [" Quilter", " quilter", " QUILTER"]
    inner = set(ids.inner_ids)
    (il,), (stop,), (word,) = (processor.tokenizer.encode(t, add_special_tokens=False) for t in ("il", ".", " the"))
    assert il in inner and stop not in inner and word not in inner


def test_a_name_that_was_said_is_written(real):
    recording = LIBRISPEECH / "audio" / "1272-128104-0014.flac"
    if not recording.is_file():
        pytest.skip("LibriSpeech does not lie beside the repository.")
    model, processor = real
    inputs = processor(recording)
    assert "quilter" not in processor.decode(model.generate(**inputs))[0].lower()
    words = ["quilter", "mulrady", "olbinett", "firefox", "cosette", "sherman"]
    hotword_ids = processor.hotword_ids(words)
    text = processor.decode(model.generate(**inputs, hotword_ids=hotword_ids))[0]
    # Which of its spellings is the model's choice, and a close one: with two positions behind, the capital.
    assert text.lower().startswith("by harry quilter")
    text = processor.decode(model.generate(**inputs, hotword_ids=hotword_ids, active_behind=2))[0]
    assert text.startswith("By Harry Quilter")
