"""Time-decayed co-occurrence: what people took next to the items you took last.

A counter of a few lines that many generative recommenders do not beat (evaluation of arXiv 2605.07125), so it stands
in every table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from models.baselines.popularity import Popularity, backfilled, best_entries, held, padded
from models.recommender import BoolArray, IntArray, Recommendations

REACH = 3
"""Places before a target that are linked to it."""
NEIGHBOURS = 60
"""Strongest links kept an item."""
RECENT = 10
"""Newest history items that vote."""

# Link weights 1, 1/2, 1/3 (and half of that backwards) times 12, votes 1/1 … 1/10 times 2520: all integers, so that
# equal scores are equal bit for bit and ties are broken by item number, not by rounding.
_LINK_UNIT = 12
_VOTE_UNIT = 2520
_WEIGHT_BITS, _SIGNED_BITS = 4, 63


class ItemGraph:
    """Scores items by their links with the last ten history items, each vote divided by 1 + recency.

    For every training event, 1, 1/2 and 1/3 are added to the links from the items 1, 2 and 3 places before it in the
    user's row, and half of that to the links back. With `backfill`, items without any link to the history follow
    behind in order of popularity, with scores below 0: a person without history gets a list, too.

    Args:
        users: (N,) user of each event; a user's events stand together, oldest first.
        items: (N,) item numbers.
        targets: (N,) bool, which events are training events; the others only serve as context before them.
        known: items numbered 0 … known - 1 may be recommended.
        exclude_history: never recommend what is in the history.
        backfill: fill a list up with popular items; without it, a list ends where the links end.

    Raises:
        ValueError: a training event's item is not known.
    """

    def __init__(
        self,
        users: IntArray,
        items: IntArray,
        targets: npt.NDArray[np.bool_],
        known: int,
        exclude_history: bool,
        backfill: bool = True,
    ) -> None:
        self.known = known
        self.popularity = Popularity(items[targets], known, exclude_history)
        self.links = _sparse(*_strongest(*_links(users, items, targets, known), NEIGHBOURS), known)
        self.exclude_history = exclude_history
        self.backfill = backfill

    def recommend(
        self,
        histories: Sequence[IntArray],
        k: int,
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> Recommendations:
        """Rank items for each history, whatever is searched for; see `models.recommender.Recommender`."""
        votes = _votes(histories, self.known) @ self.links  # (B, known)
        rows, items, scores = _entries(votes)
        if self.exclude_history:
            free = ~held(histories, rows, items, self.known)
            rows, items, scores = rows[free], items[free], scores[free]
        top, values = best_entries(rows, items, scores, items, (len(histories), k))
        values /= _LINK_UNIT * _VOTE_UNIT
        return backfilled(self.popularity, histories, top, values, k) if self.backfill else padded(top, values, k)


def _links(
    users: IntArray, items: IntArray, targets: npt.NDArray[np.bool_], known: int
) -> tuple[IntArray, IntArray, IntArray]:
    """(E,) each: item in the history, rising, item to recommend, rising within it, and their summed weight."""
    pairs = []
    for lag in range(1, REACH + 1):
        row = lag + np.flatnonzero(targets[lag:] & (users[lag:] == users[:-lag]))
        before, after = items[row - lag], items[row]
        # A link and its weight as one number, so that one sort brings equal links together.
        pairs.append((before * known + after) << _WEIGHT_BITS | _LINK_UNIT // lag)
        pairs.append((after * known + before) << _WEIGHT_BITS | _LINK_UNIT // (2 * lag))
    keys = np.concatenate(pairs).astype(np.int64)
    keys.sort()
    link, weight = keys >> _WEIGHT_BITS, keys & (2**_WEIGHT_BITS - 1)
    first = np.flatnonzero(np.diff(link, prepend=-1))
    sums = np.add.reduceat(weight, first) if len(first) else weight
    rows = link[first] // max(known, 1)
    return rows, link[first] - rows * known, sums


def _strongest(rows: IntArray, columns: IntArray, weights: IntArray, count: int) -> tuple[IntArray, IntArray, IntArray]:
    """The `count` heaviest links of each row, in the order they came in; of equal weights the lower item numbers."""
    lengths = np.bincount(rows, minlength=1)
    long = np.flatnonzero(lengths[rows] > count)  # entries of rows from which some must go
    row, column, lightness = rows[long], columns[long], weights.max(initial=0) - weights[long]
    # `row` rises, before a sort by it and after; the count-th of its entries is the last to stay.
    own = lengths[lengths > count]
    last = np.cumsum(own) - own + count - 1
    kept = np.ones(len(rows), dtype=bool)
    widths = [int(part.max(initial=0)).bit_length() for part in (lightness, column)]
    if int(row.max(initial=0)).bit_length() + sum(widths) < _SIGNED_BITS:
        keys = ((row << widths[0] | lightness) << widths[1]) | column
        kept[long] = keys <= np.repeat(np.sort(keys)[last], own)
    else:
        order = np.lexsort((column, lightness, row))
        place = np.arange(len(order)) - np.repeat(last - count + 1, own)
        kept[long[order[place >= count]]] = False
    return rows[kept], columns[kept], weights[kept]


def _sparse(rows: IntArray, columns: IntArray, weights: IntArray, size: int) -> sparse.csr_array:
    """(size, size) of entries that stand in order, row by row."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=size))])
    return sparse.csr_array((weights.astype(np.float64), columns, starts), shape=(size, size))


def _votes(histories: Sequence[IntArray], known: int) -> sparse.csr_array:
    """(B, known) integer votes of the newest history items; items that are not known have none."""
    recent = [history[-RECENT:][::-1] for history in histories]
    rows = np.repeat(np.arange(len(recent)), [len(items) for items in recent])
    items = np.concatenate([*recent, np.empty(0, dtype=np.int64)]).astype(np.int64)
    recency = np.arange(len(rows)) - np.searchsorted(rows, rows)
    votes = (_VOTE_UNIT // (1 + recency)).astype(np.float64)
    heard = items < known
    return sparse.coo_array((votes[heard], (rows[heard], items[heard])), shape=(len(recent), known)).tocsr()


def _entries(matrix: Any) -> tuple[IntArray, IntArray, npt.NDArray[np.float64]]:
    """(row, column, value) of every stored entry."""
    entries = matrix.tocoo()
    return entries.row.astype(np.int64), entries.col.astype(np.int64), entries.data
