# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The second branch of drafts: a text that the caller has, such as an earlier hypothesis. What of it is left behind the
committed text is proposed.
"""

from collections.abc import Sequence

import numpy as np


class Remainder:
    """
    What of a draft is left behind the committed text: the prefix of the draft that is nearest to that text, in edit
    distance, is cut off.

    Args:
        draft (`list[int]`): N token ids.
    """

    def __init__(self, draft: Sequence[int]):
        self.draft = draft
        self._ids = np.array(draft, dtype=np.int64)
        self._places = np.arange(len(draft) + 1)
        # Edit distances (N + 1,) of the committed text to every prefix of the draft.
        self._distances = self._places.copy()
        self._last: int | None = None

    def advance(self, committed: Sequence[int]) -> None:
        """Takes note of the tokens that were committed since."""
        for token_id in committed:
            self._last = token_id
            changed = self._distances[:-1] + (self._ids != token_id)
            row = np.concatenate([self._distances[:1] + 1, np.minimum(changed, self._distances[1:] + 1)])
            # Insertions: the least of what stands to the left, a step for each place.
            self._distances = np.minimum.accumulate(row - self._places) + self._places

    def rest(self) -> Sequence[int]:
        """The draft behind its prefix. Of several, the longest one if it ends as the text does, else the shortest."""
        if self._last is None:
            return self.draft
        nearest = np.flatnonzero(self._distances == self._distances.min())
        longest = int(nearest[-1])
        ends_alike = longest > 0 and self._ids[longest - 1] == self._last
        return self.draft[longest if ends_alike else int(nearest[0]) :]


class Hypothesis:
    """
    What one row's text may turn out to be.

    Args:
        ids (`list[int]`): its tokens, without an end of text.
        eos_token_id (`int`): the end of text, which is proposed behind the last of them.
    """

    def __init__(self, ids: Sequence[int], eos_token_id: int):
        self._remainder, self._eos_token_id = Remainder(ids), eos_token_id

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes note of committed tokens."""
        self._remainder.advance(token_ids)

    def propose(self, limit: int) -> list[int]:
        """The next tokens, `limit` of them at most; behind the last of all comes the end of text."""
        return [*self._remainder.rest()[:limit], self._eos_token_id][:limit]


__all__ = ["Hypothesis", "Remainder"]
