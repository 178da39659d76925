"""What evaluation and service ask of any recommender: ranked items for histories, with queries where one searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Recommendations:
    """Ranked lists for B histories.

    Attributes:
        items: (B, k) item numbers, best first; -1 where fewer than k items exist.
        scores: (B, k) falling; -inf beside -1.
        groups: (B, k) items of one row with the same group number are tied (they share a semantic ID).
    """

    items: IntArray
    scores: npt.NDArray[np.float32]
    groups: IntArray


class Recommender(Protocol):
    """Anything that ranks the catalogue known to it."""

    def recommend(
        self,
        histories: Sequence[IntArray],
        k: int,
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> Recommendations:
        """Rank items for each history.

        Args:
            histories: B arrays of item numbers, oldest first; may be empty.
            k: length of each list.
            queries: B texts to search for; None asks for recommendations.
            searched: which items of each history came by a search; None: none did.

        Returns:
            Lists ordered by falling score, ties by item number.
        """
        ...
