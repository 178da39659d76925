"""Fitting the item graph beside a scipy item-kNN of the same co-occurrence, and beside `implicit` on the same events.

    python -m benchmarks.baselines

scipy multiplies shifted event-item matrices (the links at 1, 2 and 3 places) and keeps the 60 strongest of each row;
that both sides hold the same links is asserted first. `implicit` (optional: pip install implicit) counts every pair of
a user's items instead, another co-occurrence: a row without a claim, kept from an earlier run where it is not there.
The limit is that of memory: users, items and targets read once, the links written once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable

import numpy as np
from scipy import sparse

from benchmarks.measure import Row, Work, alternate, faster, report, stored
from models.baselines.item_graph import NEIGHBOURS, REACH, ItemGraph
from stages.interactions import IntArray

USERS, ITEMS, MEAN_EVENTS = 50_000, 25_000, 12
CLAIM = "item graph fit"


def main() -> None:
    """Measure the fit of the item graph beside others', and record the rows."""
    rng = np.random.default_rng(0)
    lengths = 3 + rng.geometric(1 / (MEAN_EVENTS - 3), USERS)
    users = np.repeat(np.arange(USERS), lengths)
    items = (ITEMS * rng.random(len(users)) ** 2).astype(np.int64)
    targets = np.ones(len(items), dtype=bool)

    def ours() -> ItemGraph:
        """The baseline as every comparison fits it."""
        return ItemGraph(users, items, targets, ITEMS, exclude_history=False)

    mine, theirs = ours().links, strongest(links(users, items))
    check(mine, theirs)
    pair = alternate(ours, lambda: strongest(links(users, items)), repetitions=5)
    note = f"{len(items):,} events on {ITEMS:,} items, {mine.nnz:,} links kept, the same on both sides"
    parts = [users, items, targets, mine.data, mine.indices, mine.indptr]
    work = Work(bytes=sum(part.nbytes for part in parts))
    row = faster(CLAIM, "scipy item-kNN", pair, mark=1, unit="events/s", amount=len(items), work=work, note=note)
    report("baselines", [row])
    beside_implicit(ours, users, items, work)


def links(users: IntArray, items: IntArray) -> sparse.csr_array:
    """Summed weights 1, 1/2, 1/3 forward and half of that backward, times 12, as products of sparse matrices."""
    total = sparse.csr_array((ITEMS, ITEMS))
    for lag in range(1, REACH + 1):
        row = lag + np.flatnonzero(users[lag:] == users[:-lag])
        events, ones = np.arange(len(row)), np.ones(len(row))
        before = sparse.csr_array((ones, (events, items[row - lag])), shape=(len(row), ITEMS))
        after = sparse.csr_array((ones, (events, items[row])), shape=(len(row), ITEMS))
        together = before.T @ after
        total = total + (12 // lag) * together + (12 // (2 * lag)) * together.T
    return total.tocsr()


def strongest(matrix: sparse.csr_array) -> sparse.csr_array:
    """The strongest entries of each row, as item-kNN code keeps them."""
    matrix.sort_indices()
    columns, weights, starts = [], [], [0]
    for row in range(matrix.shape[0]):
        own = slice(matrix.indptr[row], matrix.indptr[row + 1])
        best = np.argsort(-matrix.data[own], kind="stable")[:NEIGHBOURS]
        columns.append(matrix.indices[own][best])
        weights.append(matrix.data[own][best])
        starts.append(starts[-1] + len(best))
    return sparse.csr_array((np.concatenate(weights), np.concatenate(columns), starts), shape=matrix.shape)


def check(mine: sparse.csr_array, theirs: sparse.csr_array) -> None:
    """See that both sides hold the same links."""
    gap = abs(mine - theirs)
    if gap.nnz and gap.max() > 0:
        raise SystemExit("the two sides hold different links; a time would mean nothing")


def beside_implicit(ours: Callable[[], object], users: IntArray, items: IntArray, work: Work) -> None:
    """`implicit`'s item-item neighbours of the same events, on one thread; its row stays where it is not installed."""
    script, rival = "baselines, implicit", "implicit's ItemItemRecommender"
    if importlib.util.find_spec("implicit") is None:
        print(f"{script}: skipped: implicit is not installed", file=sys.stderr)
        if not any(row["script"] == script for row in stored()):
            report(script, [Row(name=CLAIM, rival=rival, note="implicit is not installed")])
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from implicit.nearest_neighbours import ItemItemRecommender

    matrix = sparse.csr_matrix((np.ones(len(users)), (users, items)), shape=(USERS, ITEMS))

    def fit() -> None:
        """As its documentation has it."""
        ItemItemRecommender(K=NEIGHBOURS, num_threads=1).fit(matrix, show_progress=False)

    pair = alternate(ours, fit, repetitions=5)
    note = "implicit counts all pairs of a user's items, not those within 3 places"
    row = faster(CLAIM, rival, pair, mark=None, unit="events/s", amount=len(items), work=work, note=note)
    report(script, [row])


if __name__ == "__main__":
    main()
