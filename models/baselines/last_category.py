"""More of the same: popular items of the category of what a user took last, whatever is searched for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from models.recommender import IntArray


class LastCategory:
    """Scores items of the last history item's category above all others, each part by popularity.

    Two items share a category where they have any in common. Behind an empty history, or an item without a category or
    of number `known` and above, popularity alone counts.

    Args:
        categories: names of each known item's categories, by item number; empty where it has none.
        counts: (known,) how often each item was a training event.
    """

    def __init__(self, categories: Sequence[Sequence[str]], counts: IntArray) -> None:
        names = {name: place for place, name in enumerate(sorted({name for own in categories for name in own}))}
        pairs = sorted({(item, names[name]) for item, own in enumerate(categories) for name in own})
        item, name = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        # The spare last row is an item without a category.
        shape = (len(counts) + 1, len(names) + 1)
        self.members: Any = sparse.csr_array((np.ones(len(pairs)), (item, name)), shape=shape)
        self.counts = counts

    def score(self, histories: Sequence[IntArray], candidates: IntArray, **request: Any) -> npt.NDArray[np.float64]:
        """Scores of a few candidates a history.

        Args:
            histories: B arrays of item numbers, oldest first; may be empty.
            candidates: (B, K) item numbers.
            request: what else a recommender is told; nothing of it counts.

        Returns:
            (B, K).
        """
        known = len(self.counts)
        last = np.array([min(own[-1], known) if len(own) else known for own in histories], dtype=np.int64)
        rows = self.members[np.repeat(last, candidates.shape[1])] * self.members[candidates.ravel()]
        shared = np.asarray(rows.sum(axis=1)).reshape(candidates.shape) > 0
        return self.counts[candidates] + shared * (1.0 + self.counts.max(initial=0))
