"""Which item of a history stands nearest to a recommended one: looked up afterwards, no part of the model's score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from models.recommender import IntArray

Kind = Literal["again", "taken_together", "similar"]


@dataclass(frozen=True)
class Reason:
    """The nearest history item.

    Attributes:
        item: its number.
        kind: `again`: the recommended item itself; `taken_together`: the strongest link of the item graph; `similar`:
            the longest common beginning of semantic IDs.
        shared: levels of the semantic ID that agree.
    """

    item: int
    kind: Kind
    shared: int


class Reasons:
    """Looks up nearness among the items known to a model.

    Args:
        codes: (I, L) semantic IDs, item number by row.
        links: (known, known) weights of the item graph, row = item in the history.
        known: items numbered 0 … known - 1 have links.
    """

    def __init__(self, codes: IntArray, links: sparse.csr_array, known: int) -> None:
        self.codes, self.known = codes, known
        entries = links.tocoo()
        keys = entries.row.astype(np.int64) * self.known + entries.col
        order = np.argsort(keys)
        # A sentinel at the end, so that a key beyond the last is looked up without a special case.
        self.keys = np.append(keys[order], np.iinfo(np.int64).max)
        self.weights = np.append(entries.data[order], 0.0)

    def nearest(self, items: IntArray, history: IntArray) -> list[Reason | None]:
        """For each item the nearest of `history` (oldest first); None where nothing in it is near.

        An equal item comes before a linked one, a linked one before a similar one; draws go to the newer history item.
        """
        past = history[::-1]  # argmax takes the first of equals: the newest
        if not len(past) or not len(items):
            return [None] * len(items)
        weights = self._weights(items, past)  # (k, H)
        shared = np.cumprod(self.codes[items][:, None] == self.codes[past], axis=2).sum(axis=2)  # (k, H)
        return [self._best(int(item), past, weights[row], shared[row]) for row, item in enumerate(items)]

    def neighbours(self, item: int, count: int) -> list[int]:
        """The `count` other items most strongly linked from `item`, strongest first."""
        if item >= self.known:
            return []
        low, high = np.searchsorted(self.keys, [item * self.known, (item + 1) * self.known])
        found = self.keys[low:high] - item * self.known
        order = np.argsort(-self.weights[low:high], kind="stable")
        return found[order[found[order] != item]][:count].tolist()

    def _weights(self, items: IntArray, past: IntArray) -> np.ndarray:
        keys = np.minimum(past, self.known) * self.known + items[:, None]
        place = np.searchsorted(self.keys, keys)
        found = (self.keys[place] == keys) & (past < self.known) & (items[:, None] < self.known)
        return np.where(found, self.weights[place], 0.0)

    @staticmethod
    def _best(item: int, past: IntArray, weights: np.ndarray, shared: np.ndarray) -> Reason | None:
        if (same := np.flatnonzero(past == item)).size:
            return Reason(item, "again", int(shared[same[0]]))
        if weights.max() > 0:
            place = int(weights.argmax())
            return Reason(int(past[place]), "taken_together", int(shared[place]))
        place = int(shared.argmax())
        return Reason(int(past[place]), "similar", int(shared[place])) if shared[place] else None
