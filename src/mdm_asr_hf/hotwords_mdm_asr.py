# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
Hotwords: raises the logits of given words wherever they fit on the canvas.

A word of n tokens can stand at any n neighbouring positions that are open or already hold its tokens: a committed part
extends it to the right and to the left. In each step
```
1. every such placement that the model finds plausible is found with a trie of all words: how far its tokens lie behind
   the most probable ones, in nats and on average, is at most the threshold. Words that were not said stay out.
2. Of placements that contradict each other, the most plausible one is kept: other tokens at the same position, or the
   same word twice, one position apart. The model is less sure where a word stands than which it is, and raising it
   at all its places writes it twice.
3. The boost is added to the tokens of what is left, at all of their open positions at once.
```
Trie-based shallow fusion in autoregressive models (arXiv 2104.02194) raises only what continues the text to its left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .sampling_mdm_asr import RANK_RESOLUTION

# A word of more tokens than this is a sentence, which the canvas should not be forced into.
MAX_HOTWORD_TOKENS = 24
# One token of a word may lie this many times the threshold behind the best one; it keeps the trie's search narrow.
TOKEN_FACTOR = 2.5
# What begins a word in the pieces of byte-level BPE and of SentencePiece.
_WORD_STARTS = ("\u0120", "\u2581")


class HotwordIds(list):
    """
    Token sequences of hotwords, a list of lists, as [`~MDMASRProcessor.hotword_ids`] makes them. `generate` takes
    plain lists, too; it then treats every sequence as a word of its own and lets it end anywhere.

    Attributes:
        words (`list[int]`): which word each sequence is a spelling of.
        inner_ids (`list[int]`): tokens that go on with a word: none of them may follow a hotword.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] = (), words: Sequence[int] = (), inner_ids: Any = ()):
        super().__init__(sequences)
        self.words, self.inner_ids = list(words), list(inner_ids)


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
    sequences, owners, known = [], [], set()
    for index, word in enumerate(words):
        if not isinstance(word, str) or not any(letter.isalnum() for letter in word):
            raise ValueError(f"`hotwords` holds {word!r:.80} at {index}, which is no word. Take it out.")
        for spelling in spellings(" ".join(word.split())):
            ids = tuple(tokenizer.encode(text_prefix + spelling, add_special_tokens=False, **arguments))
            if len(ids) > MAX_HOTWORD_TOKENS and spelling == word:
                raise ValueError(
                    f"`hotwords` holds {word!r:.80}, which takes {len(ids)} tokens, more than {MAX_HOTWORD_TOKENS}. "
                    "Give its rare words alone."
                )
            # In capitals, words take far more tokens; a vocabulary may lack some letters of a spelling.
            if len(ids) > MAX_HOTWORD_TOKENS or ids in known or tokenizer.unk_token_id in ids or not ids:
                continue
            known.add(ids)
            sequences.append(list(ids))
            owners.append(index)
    return HotwordIds(sequences, owners, inner_ids(tokenizer) if sequences else ())


def inner_ids(tokenizer: Any) -> list[int]:
    """Tokens that go on with the word before them: their text begins with a letter or a digit, not with a blank."""
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    candidates = [
        [i]
        for i, piece in enumerate(pieces)
        # Pieces of an aggregate tokenizer have their language in front of them.
        if piece is not None and i not in special and not any(start in piece for start in _WORD_STARTS)
    ]
    texts = tokenizer.batch_decode(candidates, clean_up_tokenization_spaces=False)
    return [i for (i,), text in zip(candidates, texts, strict=True) if text[:1].isalnum()]


@dataclass
class HotwordTrie:
    """
    The tries of a batch in one: nodes in the order of their depth, the children of each next to each other.

    Attributes:
        token, parent, first_child, num_children (`torch.LongTensor` of shape (nodes,)): a root's token and parent are
            -1.
        word (`torch.LongTensor` of shape (nodes,)): the word that ends here, or -1.
        longest (`torch.LongTensor` of shape (nodes,)): tokens of the longest sequence through here.
        roots (`torch.LongTensor` of shape (B,)): of each row.
        depth (`int`): tokens of the longest sequence.
        is_inner (`torch.BoolTensor` of shape (V,)): tokens that no hotword ends before.
    """

    token: torch.LongTensor
    parent: torch.LongTensor
    first_child: torch.LongTensor
    num_children: torch.LongTensor
    word: torch.LongTensor
    longest: torch.LongTensor
    roots: torch.LongTensor
    depth: int
    is_inner: torch.BoolTensor

    @classmethod
    def build(
        cls, hotword_ids: Sequence, batch_size: int, vocab_size: int, device: torch.device | str = "cpu"
    ) -> "HotwordTrie | None":
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
        distinct = {id(one): one for one in lists}
        fields: dict[str, list[int]] = {
            name: [] for name in ("token", "parent", "first_child", "num_children", "word")
        }

        def add(token: int, parent: int, word: int) -> int:
            for name, value in zip(fields, (token, parent, 0, 0, word), strict=True):
                fields[name].append(value)
            return len(fields["token"]) - 1

        is_inner = torch.zeros(vocab_size, dtype=torch.bool)
        level, roots, num_words = [], {}, 0
        for key, sequences in distinct.items():
            tree: dict = {}
            owners = getattr(sequences, "words", None) or range(len(sequences))
            for sequence, owner in zip(sequences, owners, strict=True):
                node = tree
                for token in _checked(sequence, vocab_size):
                    node = node.setdefault(token, {})
                node.setdefault(None, num_words + owner)
            num_words += max(owners, default=-1) + 1
            inner = torch.tensor([i for i in getattr(sequences, "inner_ids", ()) if i < vocab_size], dtype=torch.long)
            is_inner[inner] = True
            roots[key] = add(-1, -1, -1)
            level.append((roots[key], tree))
        depth = 0
        while True:
            deeper = []
            for node, tree in level:
                children = [(token, subtree) for token, subtree in tree.items() if token is not None]
                fields["first_child"][node], fields["num_children"][node] = len(fields["token"]), len(children)
                deeper += [(add(token, node, subtree.get(None, -1)), subtree) for token, subtree in children]
            if not deeper:
                break
            level, depth = deeper, depth + 1
        if depth == 0:
            return None
        longest = [0] * len(fields["token"])
        for node in reversed(range(len(longest))):
            if (parent := fields["parent"][node]) >= 0:
                its_depth, above = 1, parent
                while (above := fields["parent"][above]) >= 0:
                    its_depth += 1
                longest[node] = max(longest[node], its_depth)
                longest[parent] = max(longest[parent], longest[node])
        fields["longest"] = longest
        tensors = {name: torch.tensor(values, device=device) for name, values in fields.items()}
        its_roots = torch.tensor([roots[id(one)] for one in lists], device=device)
        return cls(**tensors, roots=its_roots, depth=depth, is_inner=is_inner.to(device))

    def take_rows(self, rows: torch.LongTensor) -> "HotwordTrie":
        """The same for rows of the batch, which may repeat."""
        return HotwordTrie(**{**vars(self), "roots": self.roots[rows.to(self.roots.device)]})

    def raise_logits(
        self,
        logits: torch.Tensor,
        tokens: torch.LongTensor,
        candidates: torch.BoolTensor,
        text: torch.BoolTensor,
        *,
        boost: float,
        threshold: float,
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        One step's boosts.

        Args:
            logits (`torch.Tensor` of shape (N, V)): of the N candidates, in row-major order. Changed in place.
            tokens (`torch.LongTensor` of shape (B, L)): the canvas.
            candidates (`torch.BoolTensor` of shape (B, L)): its open positions.
            text (`torch.BoolTensor` of shape (B, L)): the positions words can stand at: candidates, and committed
                ones before the end of text.
            boost (`float`): what is added.
            threshold (`float`): nats that a placement's tokens may lie, on average, behind the best ones. Committed
                ones lie 0 behind.

        Returns:
            The rows of `logits` that were raised, (M,) in rising order, and their logits before, (M, V).
        """
        placements = self._find(logits, tokens, candidates, text, threshold)
        last, node, key, length, num_open = placements
        # Where each placement's tokens stand, from its last one back.
        owners, positions, covered = [], [], []
        one, place = torch.arange(len(node), device=node.device), last
        while len(node):
            owners.append(one)
            positions.append(place)
            covered.append(self.token[node])
            going_on = self.token[self.parent[node]] >= 0
            one, place, node = one[going_on], place[going_on] - 1, self.parent[node][going_on]
        if not owners:
            return tokens.new_empty(0), logits[:0]
        owner, position, token = torch.cat(owners), torch.cat(positions), torch.cat(covered)
        is_open = candidates.flatten()[position]
        owner_open, position_open, token_open = owner[is_open], position[is_open], token[is_open]
        kept = (
            self._agree(owner_open, position_open, token_open, key, tokens.numel())
            & self._first_of_word(placements, tokens.shape)
            & (num_open > 0)
        )
        position_open, token_open = position_open[kept[owner_open]], token_open[kept[owner_open]]
        places = candidates.flatten().cumsum(0)[position_open] - 1
        # Once each, however many words ask for it.
        flat = (places * logits.shape[1] + token_open).unique()
        places = (flat // logits.shape[1]).unique()
        unbiased = logits[places]
        logits.view(-1)[flat] += boost
        return places, unbiased

    def _find(
        self,
        logits: torch.Tensor,
        tokens: torch.LongTensor,
        candidates: torch.BoolTensor,
        text: torch.BoolTensor,
        threshold: float,
    ) -> tuple[torch.Tensor, ...]:
        """
        The P plausible placements, complete ones among them: last position in the flat canvas, node, rank key, number
        of tokens, number of open ones.
        """
        length = tokens.shape[1]
        best = logits.amax(dim=-1)
        lowest = best - TOKEN_FACTOR * threshold
        is_open, is_text, canvas = candidates.flatten(), text.flatten(), tokens.flatten()
        place = is_open.cumsum(0) - 1
        start, node = self._starts(logits, lowest, tokens, candidates, text)
        num_open = is_open[start].long()
        at = place[start].clamp(min=0)
        behind = (best[at] - logits[at, self.token[node]]).where(is_open[start], 0.0)
        found = []
        for step in range(self.depth):
            if step > 0:
                # A part of a word goes on where the text does, and where it is not yet too far behind.
                position = start + step
                room = (self.num_children[node] > 0) & (start % length + step < length)
                room &= is_text[position.where(room, start)]
                node, start, behind, num_open = node[room], start[room], behind[room], num_open[room]
                # Every pair of such a part and a child of its node.
                counts = self.num_children[node]
                owner = torch.repeat_interleave(counts)
                within = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
                node = self.first_child[node][owner] + within
                position = position[room][owner]
                token, opens, at = self.token[node], is_open[position], place[position].clamp(min=0)
                value = logits[at, token]
                fits = torch.where(opens, value >= lowest[at], canvas[position] == token).nonzero()[:, 0]
                owner, node, opens = owner[fits], node[fits], opens[fits]
                start, num_open = start[owner], num_open[owner] + opens
                behind = behind[owner] + (best[at[fits]] - value[fits]).where(opens, 0.0)
            possible = behind <= threshold * self.longest[node] + RANK_RESOLUTION * self.depth
            node, start, behind, num_open = node[possible], start[possible], behind[possible], num_open[possible]
            # On the sampler's grid, so that a batch decides as its rows do; ties go to the left.
            mean = torch.round(behind / (step + 1) / RANK_RESOLUTION)
            ends = (self.word[node] >= 0) & (mean <= round(threshold / RANK_RESOLUTION))
            after = start + step + 1
            has_next = (start % length + step + 1 < length) & ends
            after = after.where(has_next, start)
            goes_on = is_text[after] & ~is_open[after] & self.is_inner[canvas[after].clamp(max=len(self.is_inner) - 1)]
            ends &= ~(has_next & goes_on)
            key = (-mean[ends].long() + 1) * length - start[ends] % length
            found.append((start[ends] + step, node[ends], key, torch.full_like(key, step + 1), num_open[ends]))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _starts(
        self,
        logits: torch.Tensor,
        lowest: torch.Tensor,
        tokens: torch.LongTensor,
        candidates: torch.BoolTensor,
        text: torch.BoolTensor,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Where words can begin, in the flat canvas, and the nodes of their first tokens. Most of the work; root by root
        since rows with lists of their own share few tokens.
        """
        starts, nodes = [], []
        row = candidates.nonzero()[:, 0]
        flat = candidates.flatten().nonzero()[:, 0]
        # A committed token begins a word that something is open of, or a complete one beside another that is not.
        committed = text & ~candidates & _near(candidates, 2 * self.depth)
        for root in self.roots.unique().tolist():
            children = slice(int(self.first_child[root]), int(self.first_child[root] + self.num_children[root]))
            first = self.token[children]
            its_rows = self.roots == root
            its = its_rows[row].nonzero()[:, 0]
            # Much faster than indexing both at once.
            values = (logits if len(its) == len(logits) else logits[its]).index_select(1, first)
            place, child = (values >= lowest[its, None]).nonzero(as_tuple=True)
            known = (committed & its_rows[:, None]).flatten().nonzero()[:, 0]
            where, its_child = (tokens.flatten()[known, None] == first).nonzero(as_tuple=True)
            starts += [flat[its[place]], known[where]]
            nodes += [child + children.start, its_child + children.start]
        return torch.cat(starts), torch.cat(nodes)

    @staticmethod
    def _agree(
        owner: torch.Tensor, position: torch.Tensor, token: torch.Tensor, key: torch.Tensor, num_positions: int
    ) -> torch.BoolTensor:
        """Which placements (P,) have, at all of their open positions, the token of the best placement there."""
        lowest = torch.iinfo(torch.long).min
        keys = key[owner]
        highest = keys.new_full((num_positions,), lowest).scatter_reduce(0, position, keys, "amax")
        is_best = keys == highest[position]
        tokens = token.new_full((num_positions,), torch.iinfo(torch.long).max)
        tokens = tokens.scatter_reduce(0, position[is_best], token[is_best], "amin")
        differs = torch.zeros_like(key).index_add_(0, owner, (token != tokens[position]).long())
        return differs == 0

    def _first_of_word(self, placements: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.BoolTensor:
        """Which placements (P,) no better one of the same word overlaps or touches; complete ones count."""
        last, node, key, length, _ = placements
        num_rows, width = shape
        groups, group = torch.unique(self.word[node] * num_rows + last // width, return_inverse=True)
        # A position more at either side, and one between rows.
        first = last % width - length + 1
        highest = key.new_full((len(groups) * (width + 2),), torch.iinfo(torch.long).min)
        cell = group * (width + 2) + first
        for step in range(self.depth + 2):
            inside = step < length + 2
            highest.scatter_reduce_(0, (cell + step)[inside], key[inside], "amax")
        kept = torch.ones_like(key, dtype=torch.bool)
        for step in range(1, self.depth + 1):
            inside = step <= length
            kept[inside] &= highest[(cell + step)[inside]] <= key[inside]
        return kept


def _near(candidates: torch.BoolTensor, distance: int) -> torch.BoolTensor:
    """Positions (B, L) with an open one at most `distance` away."""
    return torch.nn.functional.max_pool1d(candidates.float()[:, None], 2 * distance + 1, 1, distance)[:, 0] > 0


def _one_list_per_row(hotword_ids: Any, batch_size: int) -> list[Sequence[Sequence[int]]]:
    hotword_ids = hotword_ids.tolist() if isinstance(hotword_ids, torch.Tensor) else hotword_ids
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


__all__ = ["HotwordIds", "HotwordTrie", "encode_hotwords", "inner_ids", "spellings"]
