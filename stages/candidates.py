"""Whom a target stands among in the 99 + 1 mode, and where titles are ranked: drawn outside of what its user has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.errors import UserError
from stages.interactions import IntArray
from stages.ranking import Asking

NEGATIVES = 99
LIFT = 1e3
"""Above every Gumbel key that can be drawn."""
ROWS = 256
"""Queries drawn for, or scored, at once."""


def draw_candidates(
    asking: Asking,
    query: IntArray,
    item: IntArray,
    weights: npt.NDArray[np.floating],
    seed: int,
    negatives: int = NEGATIVES,
    first: Callable[[IntArray], Any] | None = None,
) -> tuple[IntArray, IntArray]:
    """Each target's candidates in shuffled order.

    Negatives are drawn without replacement in proportion to their weights, outside the user's whole history and all
    targets of the query (Gumbel keys: the largest of log weight plus noise).

    Args:
        asking: the queries' histories, whole.
        query: (M,) rising, the query of each target.
        item: (M,) its item.
        weights: (I,) of every item that may be drawn; an item of weight 0 is drawn when no other is left.
        seed: of the draw.
        negatives: how many.
        first: numbers of b queries -> (b, I) sparse; items with a score, the best ones first, are taken before any is
            drawn, equal ones by lot.

    Returns:
        Items (M, negatives + 1) and the target's column (M,).

    Raises:
        UserError: fewer items are left to draw from.
    """
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        heavy = np.maximum(np.log(weights), -1e6)
    found = np.empty((len(query), negatives + 1), dtype=np.int64)
    place = rng.integers(0, negatives + 1, len(query))
    for start in range(0, len(query), ROWS):
        own = slice(start, start + ROWS)
        keys = heavy + rng.gumbel(size=(len(query[own]), len(weights)))
        if first is not None:
            scored = first(query[own]).tocoo()
            keys[scored.row, scored.col] = LIFT + scored.data + 1e-9 * keys[scored.row, scored.col]
        _strike(keys, asking, query, item, own)
        if int(np.isfinite(keys).sum(axis=1).min(initial=negatives)) < negatives:
            raise UserError(
                f"evaluation.negatives needs {negatives} items outside a user's history; this catalogue of "
                f'{len(weights)} has fewer, set evaluation.negatives = "off"'
            )
        best = np.argpartition(-keys, negatives - 1, axis=1)[:, :negatives]
        found[own, :negatives] = rng.permuted(np.sort(best, axis=1), axis=1)
    # The target changes places with whoever stands in its column.
    line = np.arange(len(query))
    found[:, negatives] = found[line, np.minimum(place, negatives - 1)]
    found[line, place] = item
    return found, place


def _strike(keys: npt.NDArray[np.float64], asking: Asking, query: IntArray, item: IntArray, own: slice) -> None:
    """Take out of the draw what a row's user has, and every target of its query."""
    rows = query[own]
    for line, history in enumerate(asking.histories(rows)):
        keys[line, history[history < keys.shape[1]]] = -np.inf
    low, high = np.searchsorted(query, rows), np.searchsorted(query, rows, side="right")
    for line, (first, last) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        targets = item[first:last]
        keys[line, targets[targets < keys.shape[1]]] = -np.inf
