# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Hotwords: raises the donor's logits of given words, by shallow fusion with their trie (arXiv 2104.02194).

What is raised depends on the text before a position and on the logits there alone, so that the text does not depend on
how it was cut into evaluations. Of the text before, a state of an Aho-Corasick automaton knows the longest beginning
of a word that it ends with, and through its failure links the shorter ones. There are raised
```
the first tokens of all words, by w = (letters of the word that are written with it) / (letters of the word),
the tokens that go on with a word, by w = CONTINUATION_FACTOR * (the same share):
    logit += w * boost.
```
A greedy text cannot take a false start back. What says little of a word, such as its first letter, therefore begins it
only where the donor all but writes it anyway. Of tokens that begin with a blank, none begins a word amid another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .drafting_mdm_asr import choose_tokens
from .encoding_mdm_asr import check_unicode

# A word of more tokens than this is a sentence, which the text should not be forced into.
MAX_HOTWORD_TOKENS = 24
# On tiny.en, 1 writes 83.4 % of the listed words that were said, 2 writes 84.7 %, and words that were not said add
# 0.2 % WER with either. Without shares they add 8 %, with shares of tokens in place of letters 1.2 %.
CONTINUATION_FACTOR = 2.0


class HotwordIds(list):
    """
    Token sequences of hotwords, a list of lists, as [`~MDMASRProcessor.hotword_ids`] makes them. `generate` takes
    plain lists, too; every token then counts as one letter.

    Attributes:
        letters (`dict[int, int]`): how many letters the text of each token has.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] = (), letters: Any = ()):
        super().__init__(sequences)
        self.letters: dict[int, int] = dict(letters)


def spellings(word: str) -> list[str]:
    """A word as given, in lower case, with each part capitalised, and in capitals; each once."""
    lower = word.lower()
    capitalised = " ".join(part[:1].upper() + part[1:] for part in lower.split(" "))
    return list(dict.fromkeys((word, lower, capitalised, word.upper())))


def encode_hotwords(words: Sequence[str], tokenizer: Any, text_prefix: str = "", **arguments: Any) -> HotwordIds:
    """
    The token sequences of all spellings of the words, as they stand in a text.

    Args:
        words (`list[str]`): words or phrases.
        tokenizer ([`PreTrainedTokenizerBase`]).
        text_prefix (`str`): what every text begins with, see [`MDMASRProcessor`].
        arguments: of the tokenizer, such as `language`.

    Raises:
        ValueError: not a list of words, a word that is empty or that takes more than `MAX_HOTWORD_TOKENS` tokens.
    """
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise ValueError(f"`hotwords` must be a list of words, got {words!r:.80}. Put a single word into a list.")
    sequences: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        if not isinstance(word, str) or not any(letter.isalnum() for letter in word):
            raise ValueError(f"`hotwords` holds {word!r:.80} at {index}, which is no word. Take it out.")
        for spelling in spellings(" ".join(check_unicode(word, "hotwords").split())):
            ids = tuple(tokenizer.encode(text_prefix + spelling, add_special_tokens=False, **arguments))
            if len(ids) > MAX_HOTWORD_TOKENS and spelling == word:
                raise ValueError(
                    f"`hotwords` holds {word!r:.80}, which takes {len(ids)} tokens, more than {MAX_HOTWORD_TOKENS}. "
                    "Give its rare words alone."
                )
            # In capitals, words take far more tokens; a vocabulary may lack some letters of a spelling.
            if ids and len(ids) <= MAX_HOTWORD_TOKENS and tokenizer.unk_token_id not in ids:
                sequences[ids] = None
    known = sorted({token for ids in sequences for token in ids})
    texts = tokenizer.batch_decode([[token] for token in known], clean_up_tokenization_spaces=False) if known else []
    letters = {token: len(text.strip()) for token, text in zip(known, texts, strict=True)}
    return HotwordIds(map(list, sequences), letters)


@dataclass
class _State:
    """Of texts that end with the same beginning of a word, and with no longer one."""

    # Of the next shorter beginning that they end with; a root's is itself.
    failure: int
    root: int
    # The state behind each token that goes on with the word.
    children: dict[int, int] = field(default_factory=dict)
    # How much of the word's letters is written; of several words, of that with the fewest.
    share: float = 0.0
    # What the word begins with that is complete here.
    first_token: int | None = None


@dataclass
class HotwordAutomaton:
    """
    The Aho-Corasick automata of a batch in one; states are numbered through.

    Attributes:
        roots (`list[int]` of length B): the state of each row's empty text, in which no word has begun.
    """

    roots: list[int]
    _states: list[_State] = field(default_factory=list, repr=False)
    _cache: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, hotword_ids: Sequence, batch_size: int, vocab_size: int) -> "HotwordAutomaton | None":
        """
        Args:
            hotword_ids (`list[list[int]]` or `list` of B such): token sequences for all rows, or for each row its own.
            vocab_size (`int`): V, the tokens that can be predicted.

        Returns:
            None if there are no hotwords.

        Raises:
            ValueError: neither of the two forms, an empty or too long sequence, ids that cannot be predicted.
        """
        lists = _one_list_per_row(hotword_ids, batch_size)
        automaton, roots = cls([]), {}
        for sequences in lists:
            if id(sequences) not in roots:
                roots[id(sequences)] = automaton._add(sequences, vocab_size)
        automaton.roots = [roots[id(sequences)] for sequences in lists]
        return automaton if any(map(len, lists)) else None

    def _add(self, sequences: Sequence[Sequence[int]], vocab_size: int) -> int:
        """Adds the states of one list of words. Returns its root."""
        states, root = self._states, len(self._states)
        states.append(_State(root, root))
        letters = getattr(sequences, "letters", {})
        for sequence in sequences:
            counts = [letters.get(token, 1) for token in _checked(sequence, vocab_size)]
            at, written = states[root], 0
            for token, count in zip(sequence, counts, strict=True):
                if token not in at.children:
                    at.children[token] = len(states)
                    states.append(_State(root, root))
                at, written = states[at.children[token]], written + count
                at.share = max(at.share, written / max(sum(counts), 1))
            at.first_token = sequence[0]
        # In the order of their depth: a state's failure is known before its children need it.
        queue = list(states[root].children.values())
        for state in queue:
            for token, child in states[state].children.items():
                states[child].failure = self.advance(states[state].failure, token)
                queue.append(child)
        return root

    def advance(self, state: int, token: int) -> int:
        """The state of a text with one more token."""
        while (child := self._states[state].children.get(token)) is None:
            if state == self._states[state].root:
                return state
            state = self._states[state].failure
        return child

    def take_rows(self, rows: Sequence[int]) -> "HotwordAutomaton":
        """The same for rows of the batch, which may repeat. A text's state stays the same."""
        return replace(self, roots=[self.roots[row] for row in rows])

    def raise_logits(
        self,
        logits: Any,
        states: Sequence[int],
        boost: float,
        eos_token_id: int | None = None,
    ) -> None:
        """
        Raises hotwords, in place.

        Args:
            logits (`np.ndarray`, or `torch.Tensor` on a GPU, of shape (N, V)): of N positions.
            states (`list[int]` of length N): of the texts before them.
            boost (`float`): what is added to a word's only token, in nats.
            eos_token_id (`int`, *optional*): where it is the best token, nothing is raised: a hotword that begins the
                text would begin it anew, without end.
        """
        raised = [self._raised(state) for state in states]
        rows = np.arange(len(states)).repeat([len(tokens) for tokens, _ in raised])
        tokens, weights = (np.concatenate(parts) for parts in zip(*raised, strict=True))
        if eos_token_id is not None:
            goes_on = (choose_tokens(logits[None])[0] != eos_token_id)[rows]
            rows, tokens, weights = rows[goes_on], tokens[goes_on], weights[goes_on]
        added = boost * weights
        logits[rows, tokens] += added if isinstance(logits, np.ndarray) else logits.new_tensor(added)

    def _raised(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (C,) that may be raised behind a state, and how much (C,), as parts of the boost."""
        if state not in self._cache:
            endings, at = [], self._states[state]
            while at is not (root := self._states[at.root]):
                endings.append(at)
                at = self._states[at.failure]
            weights = {token: self._states[child].share for token, child in root.children.items()}
            for at in endings:
                for token, child in at.children.items():
                    weights[token] = max(weights.get(token, 0.0), CONTINUATION_FACTOR * self._states[child].share)
            for at in endings:
                # Raised again at once, a word just written could be written for ever.
                weights.pop(at.first_token, None)
            self._cache[state] = np.array([*weights], dtype=np.int64), np.array([*weights.values()], dtype=np.float32)
        return self._cache[state]


def _one_list_per_row(hotword_ids: Any, batch_size: int) -> list[Sequence[Sequence[int]]]:
    hotword_ids = hotword_ids.tolist() if hasattr(hotword_ids, "tolist") else hotword_ids
    is_list = isinstance(hotword_ids, Sequence) and not isinstance(hotword_ids, str)
    if not is_list or not all(isinstance(one, Sequence) and not isinstance(one, str) for one in hotword_ids):
        raise ValueError(
            f"`hotword_ids` must be a list of token sequences, or one such list per row, got {hotword_ids!r:.80}. "
            "Get them from `processor.hotword_ids`."
        )
    is_per_row = not isinstance(hotword_ids, HotwordIds) and (
        any(isinstance(one, HotwordIds) or (len(one) and isinstance(one[0], Sequence)) for one in hotword_ids)
        # One empty list per row: no row has hotwords.
        or (len(hotword_ids) == batch_size and not any(hotword_ids))
    )
    if not is_per_row:
        return [hotword_ids] * batch_size
    if len(hotword_ids) != batch_size:
        raise ValueError(
            f"`hotword_ids` has lists for {len(hotword_ids)} rows, but there are {batch_size}. Pass one per row, or "
            "one list of token sequences for all."
        )
    return list(hotword_ids)


def _checked(sequence: Any, vocab_size: int) -> list[int]:
    if not isinstance(sequence, Sequence) or not 1 <= len(sequence) <= MAX_HOTWORD_TOKENS:
        raise ValueError(
            f"`hotword_ids` holds {sequence!r:.80}, but a word has 1 to {MAX_HOTWORD_TOKENS} tokens. Leave it out."
        )
    for token in sequence:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(
                f"`hotword_ids` holds the token {token!r}, but they must be ids from 0 to {vocab_size - 1}, which can "
                "be predicted. Get them from this model's processor."
            )
    return list(sequence)
