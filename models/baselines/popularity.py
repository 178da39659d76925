"""What everybody takes: the most counted items, over all training events or over the newest stages only.

Knows nothing of the person; whoever beats it has learned something about people.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.recommender import BoolArray, IntArray, Recommendations


class Popularity:
    """Ranks the known items by how often they were a training event; ties by item number.

    Args:
        items: (N,) item numbers of the training events.
        known: items numbered 0 … known - 1 may be recommended.
        exclude_history: never recommend what is in the history.

    Raises:
        ValueError: an item number outside 0 … known - 1.
    """

    def __init__(self, items: IntArray, known: int, exclude_history: bool) -> None:
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < known:
            raise ValueError(
                f"items must lie in 0 … {known - 1}, got {items.min()} … {items.max()}; count known items only"
            )
        self.counts = np.bincount(items, minlength=known)
        self.exclude_history = exclude_history
        # Sorting by falling count with a stable sort leaves equal counts in item order.
        self.order = np.argsort(-self.counts, kind="stable").astype(np.int64)

    def recommend(
        self,
        histories: Sequence[IntArray],
        k: int,
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> Recommendations:
        """Rank items for each history, whatever is searched for; see `models.recommender.Recommender`."""
        longest = max((len(history) for history in histories), default=0) if self.exclude_history else 0
        top = self.order[: k + longest]
        refused = np.zeros((len(histories), len(top)), dtype=bool)
        if self.exclude_history:
            refused = held(histories, np.arange(len(histories))[:, None], top, len(self.counts))
        places = np.argsort(refused, axis=1, kind="stable")[:, :k]
        items = np.where(np.take_along_axis(refused, places, axis=1), -1, top[places])
        return padded(items, np.where(items >= 0, self.counts[items], -np.inf), k)


class RecentPopularity(Popularity):
    """`Popularity` over the newest stages only.

    Args:
        items: (N,) item numbers of the training events.
        stages: (N,) stage of each event.
        window: how many of the newest stages count, at least 1.
        known: items numbered 0 … known - 1 may be recommended.
        exclude_history: never recommend what is in the history.

    Raises:
        ValueError: window below 1, or an item that is not known.
    """

    def __init__(self, items: IntArray, stages: IntArray, window: int, known: int, exclude_history: bool) -> None:
        if window < 1:
            raise ValueError(f"window counts stages and must be at least 1, got {window}; use 1 for the newest alone")
        newest = int(stages.max(initial=0))
        super().__init__(items[stages > newest - window], known, exclude_history)
        self.window = window


def held(histories: Sequence[IntArray], rows: IntArray, items: IntArray, known: int) -> npt.NDArray[np.bool_]:
    """Whether an item (below `known`) is in the history with number `rows`; `rows` and `items` broadcast."""
    stride = known + 1  # one spare number a row, for history items that are not known
    owned = np.concatenate([*histories, np.empty(0, dtype=np.int64)])
    owners = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return np.isin(rows * stride + items, owners * stride + np.minimum(owned, known))


def best_entries(
    rows: IntArray, items: IntArray, scores: npt.NDArray[np.floating], ties: IntArray, shape: tuple[int, int]
) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """The best items of each list and their scores, both of `shape` (B, k); -1 and -inf where there are fewer.

    Args:
        rows: (E,) list of each entry.
        items: (E,) its item.
        scores: (E,) its score.
        ties: (E,) decides between equal scores, the lowest first.
        shape: (B, k).
    """
    order = np.lexsort((ties, -scores, rows))
    rows, items, scores = rows[order], items[order], scores[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = place < shape[1]
    top, values = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf)
    top[rows[kept], place[kept]] = items[kept]
    values[rows[kept], place[kept]] = scores[kept]
    return top, values


def backfilled(
    popularity: Popularity,
    histories: Sequence[IntArray],
    top: IntArray,
    values: npt.NDArray[np.float64],
    k: int,
) -> Recommendations:
    """Popular items behind those found, with scores below 0, so that lists are as long as the catalogue allows."""
    known = len(popularity.counts)
    popular = popularity.recommend(histories, 2 * k)  # at most k of them are in the list already
    fresh = (popular.items >= 0) & ~held(list(top), np.arange(len(top))[:, None], popular.items, known)
    fill = np.where(fresh, popular.items, -1)
    behind = np.where(fresh, -1.0 / (1.0 + popularity.counts[popular.items]), -np.inf)
    items = np.concatenate([top, fill], axis=1)
    places = np.argsort(items < 0, axis=1, kind="stable")[:, :k]
    scores = np.concatenate([values, behind], axis=1)
    return padded(np.take_along_axis(items, places, axis=1), np.take_along_axis(scores, places, axis=1), k)


def padded(items: IntArray, scores: npt.NDArray[np.floating], k: int) -> Recommendations:
    """Lists of up to k items as `Recommendations` in which no two items are tied."""
    rows, found = items.shape
    full = np.full((rows, k), -1, dtype=np.int64)
    full[:, :found] = items
    values = np.full((rows, k), -np.inf, dtype=np.float32)
    values[:, :found] = scores
    return Recommendations(full, values, np.tile(np.arange(k, dtype=np.int64), (rows, 1)))
