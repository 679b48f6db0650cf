# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The first draft: a small CTC head on the encoder's frames writes the whole utterance at once, letter by letter
(Mask-CTC, arXiv 2005.08700). What of it is left behind the committed text is proposed, in the donor's tokens.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

# How GPT-2's and Whisper's byte-level BPE part a text before they merge.
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
# Tokens with more characters than this are left out of the table; no word of speech is one.
LONGEST_TOKEN = 16


class MDMASRCTCLayer(nn.Module):
    """Pre-LayerNorm Transformer block over all frames."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv_proj, self.o_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor, mask: torch.BoolTensor | None) -> torch.Tensor:
        shape = (*states.shape[:-1], 3, self.num_heads, -1)
        query, key, value = self.qkv_proj(self.attention_norm(states)).view(shape).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + self.o_proj(attended.transpose(1, 2).flatten(2))
        return states + self.fc2(nn.functional.gelu(self.fc1(self.mlp_norm(states))))


class MDMASRCTCHead(nn.Module):
    """
    Characters from frames: a projection, a depth-wise convolution over time, Transformer layers.

    Attributes:
        token_characters (`torch.ByteTensor` of shape (V, 16)): how each token is written in characters, 1 being the
            first of `characters`, and 0 behind its end; all 0 where it cannot be.
    """

    def __init__(self, config: Any, frame_width: int):
        super().__init__()
        width = config.ctc_hidden_size
        self.characters = config.ctc_characters
        self.input_projection = nn.Linear(frame_width, width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2, groups=width)
        layers = [MDMASRCTCLayer(width, config.ctc_attention_heads) for _ in range(config.ctc_layers)]
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(width)
        # The first class is CTC's blank.
        self.output = nn.Linear(width, len(self.characters) + 1)
        self.token_characters = nn.Buffer(torch.zeros((config.vocab_size, LONGEST_TOKEN), dtype=torch.uint8))
        self._spelling: Spelling | None = None

    def forward(self, frames: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, characters + 1) of frames (B, T, D); `frame_mask` (B, T) is 0 for padding."""
        states, mask = self.input_projection(frames), None
        if frame_mask is not None:
            inside = frame_mask.bool()
            states = states * inside[..., None].to(states.dtype)
            mask = inside[:, None, None]
        states = states + self.convolution(states.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            states = layer(states, mask)
        return self.output(self.layer_norm(states))

    def write(self, frames: torch.Tensor, frame_mask: torch.Tensor | None = None) -> list[str]:
        """The text of each row, by the best character of each frame."""
        best = self(frames, frame_mask).argmax(dim=-1)
        is_new = best != nn.functional.pad(best, (1, 0), value=0)[:, :-1]
        kept = is_new & (best > 0)
        if frame_mask is not None:
            kept = kept & frame_mask.bool()
        return [
            "".join(self.characters[c - 1] for c in row[keep].tolist()).strip()
            for row, keep in zip(best.cpu(), kept.cpu(), strict=True)
        ]

    @property
    def spelling(self) -> "Spelling":
        """The donor's tokens in characters, made of the table on first use."""
        if self._spelling is None:
            self._spelling = Spelling(self.characters, self.token_characters)
        return self._spelling

    def set_tokens(self, texts: Sequence[str | None]) -> None:
        """Fills the table with the texts of the V tokens; None, or what holds other characters, stays out."""
        number = {character: i for i, character in enumerate(self.characters, start=1)}
        table = torch.zeros_like(self.token_characters)
        for token_id, text in enumerate(texts):
            if text and len(text) <= LONGEST_TOKEN and all(character in number for character in text):
                table[token_id, : len(text)] = torch.tensor([number[character] for character in text])
        self.token_characters.copy_(table)
        self._spelling = None


class Spelling:
    """Texts to the donor's tokens and back, as far as the table of its tokens goes."""

    def __init__(self, characters: str, token_characters: torch.Tensor):
        alphabet = np.array(["", *characters])
        table = token_characters.cpu().numpy()
        self.texts = ["".join(alphabet[row[row > 0]]) for row in table]
        self.ids: dict[str, int] = {}
        for token_id, text in enumerate(self.texts):
            if text:
                self.ids.setdefault(text, token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; those that cannot be written in characters count as nothing."""
        return "".join(self.texts[token_id] for token_id in ids)

    def encode(self, text: str, limit: int) -> list[int]:
        """The first `limit` tokens of a text: in each word, the pair is joined whose token has the lowest id, which is
        the order of merges of a byte-level BPE. Characters without a token end it."""
        ids: list[int] = []
        for word in _WORDS.findall(text):
            if len(ids) >= limit:
                break
            parts = list(word)
            while len(parts) > 1:
                joined = [self.ids.get(left + right) for left, right in zip(parts, parts[1:], strict=False)]
                best = min((i for i in joined if i is not None), default=None)
                if best is None:
                    break
                place = joined.index(best)
                parts[place : place + 2] = ["".join(parts[place : place + 2])]
            if any(part not in self.ids for part in parts):
                break
            ids += [self.ids[part] for part in parts]
        return ids[:limit]


class Remainder:
    """
    What of a draft is left behind the committed text: the prefix of the draft that is nearest to that text, in edit
    distance, is cut off.

    Args:
        draft (`str` or `list[int]`): characters, or tokens.
    """

    def __init__(self, draft: str | Sequence[int]):
        self.draft = draft
        self._items = np.array([ord(item) if isinstance(item, str) else item for item in draft], dtype=np.int64)
        self._places = np.arange(len(draft) + 1)
        # Edit distances of the committed text to every prefix of the draft.
        self._distances = self._places.copy()
        self._last: int | None = None

    def advance(self, committed: str | Sequence[int]) -> None:
        """Takes note of what was committed since."""
        for item in committed:
            self._last = ord(item) if isinstance(item, str) else item
            changed = self._distances[:-1] + (self._items != self._last)
            row = np.concatenate([self._distances[:1] + 1, np.minimum(changed, self._distances[1:] + 1)])
            # Insertions: the least of what stands to the left, a step for each place.
            self._distances = np.minimum.accumulate(row - self._places) + self._places

    def rest(self) -> str | Sequence[int]:
        """The draft behind its prefix. Of several, the longest one if it ends as the text does, else the shortest."""
        if self._last is None:
            return self.draft
        nearest = np.flatnonzero(self._distances == self._distances.min())
        longest = int(nearest[-1])
        ends_alike = longest > 0 and self._items[longest - 1] == self._last
        return self.draft[longest if ends_alike else int(nearest[0]) :]


class FirstDraft:
    """The first draft of one row: a text of the CTC head, or tokens that the caller has, such as of a hypothesis."""

    def __init__(self, draft: str | Sequence[int], spelling: Spelling | None, eos_token_id: int):
        self._remainder, self._spelling, self._eos_token_id = Remainder(draft), spelling, eos_token_id

    @classmethod
    def of_text(cls, text: str, spelling: Spelling, eos_token_id: int) -> "FirstDraft":
        # Texts begin with a blank, as the donor's do.
        return cls(f" {text}" if text else "", spelling, eos_token_id)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes note of committed tokens; those without a text in characters count as nothing."""
        if self._spelling is None:
            self._remainder.advance(token_ids)
        else:
            self._remainder.advance(self._spelling.decode(token_ids))

    def propose(self, limit: int) -> list[int]:
        """The next tokens, `limit` of them at most; behind the last of all comes the end of text."""
        rest = self._remainder.rest()
        if self._spelling is None:
            return [*rest[:limit], self._eos_token_id][:limit]
        ids = self._spelling.encode(rest, limit)
        if len(ids) < limit and len(self._spelling.decode(ids)) == len(rest):
            ids.append(self._eos_token_id)
        return ids


__all__ = ["FirstDraft", "MDMASRCTCHead", "Remainder", "Spelling"]
