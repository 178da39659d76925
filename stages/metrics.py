"""Ranking metrics as pure functions of ranks; nothing here knows a model, a file or a user's id.

A target is found at `rank` (1-based, 0 = not in the list) inside a group of `tied` list places that the model cannot
tell apart: the target stands at each of the places rank … rank + tied - 1 with the same probability, and every metric
is the expectation over that. Undefined is NaN (null in a file), never 0.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from stages.interactions import IntArray

FloatArray: TypeAlias = npt.NDArray[np.float64]

HIT_CUTOFFS = (1, 5, 10, 20)
NDCG_CUTOFFS = (5, 10, 20)
RECALL_CUTOFFS = (10, 20)
METRICS = (
    *(f"hit_at_{k}" for k in HIT_CUTOFFS),
    *(f"ndcg_at_{k}" for k in NDCG_CUTOFFS),
    "mrr",
    *(f"recall_at_{k}" for k in RECALL_CUTOFFS),
)


def hit_at_k(rank: IntArray, tied: IntArray, k: int, found: IntArray | int = 1) -> FloatArray:
    """Probability that a target stands in the first k places.

    Args:
        rank: (Q,) first place of the tie group, 0 = not retrieved.
        tied: (Q,) size of the group, at least 1.
        k: cut-off, in places.
        found: how many of a query's targets are in the group; any one of them counts.

    Returns:
        (Q,) in [0, 1]: 1 - C(tied - slots, found) / C(tied, found), slots = the group's places among the first k.
    """
    found = np.broadcast_to(np.asarray(found, dtype=np.int64), rank.shape)
    slots = np.clip(k - rank + 1, 0, tied)
    missed = np.ones(rank.shape)
    for drawn in range(int(found.max(initial=0))):
        left = np.maximum(tied - slots - drawn, 0) / np.maximum(tied - drawn, 1)
        missed *= np.where(drawn < found, left, 1.0)
    return np.where(rank > 0, 1.0 - missed, 0.0)


def ndcg_at_k(rank: IntArray, tied: IntArray, k: int) -> FloatArray:
    """Expected 1[place <= k] / log2(place + 1): NDCG of a query with one target (Järvelin & Kekäläinen, 2002).

    Returns:
        (Q,) in [0, 1]. For a set it is the target's discounted gain, not yet divided by the ideal.
    """
    gained = _discounts(k)
    first, last = np.clip(rank - 1, 0, k), np.clip(rank + tied - 1, 0, k)
    return np.where(rank > 0, (gained[last] - gained[first]) / tied, 0.0)


def reciprocal_rank(rank: IntArray, tied: IntArray, found: IntArray | int = 1) -> FloatArray:
    """Expected 1 / place of the first target, 0 where none was retrieved.

    Returns:
        (Q,): the sum over places p of (P[hit by p] - P[hit by p - 1]) / p.
    """
    deepest = int((rank + tied - 1).max(initial=0))
    total, before = np.zeros(rank.shape), np.zeros(rank.shape)
    for place in range(1, deepest + 1):
        by_now = hit_at_k(rank, tied, place, found)
        total += (by_now - before) / place
        before = by_now
    return total


def recall_at_k(query: IntArray, rank: IntArray, tied: IntArray, sizes: IntArray, k: int) -> FloatArray:
    """Expected share of a query's targets among the first k places.

    Args:
        query: (M,) which query each target belongs to.
        rank: (M,) as in `hit_at_k`, one entry a target.
        tied: (M,) likewise.
        sizes: (Q,) number of targets of each query.
        k: cut-off, in places.

    Returns:
        (Q,) in [0, 1]; NaN for a query without targets.
    """
    retrieved = np.bincount(query, weights=hit_at_k(rank, tied, k), minlength=len(sizes))
    return _ratio(retrieved, sizes)


def set_ndcg_at_k(query: IntArray, rank: IntArray, tied: IntArray, sizes: IntArray, k: int) -> FloatArray:
    """Expected DCG over all targets of a query, divided by the ideal DCG of min(size, k) targets.

    Arguments and undefined case as in `recall_at_k`; with one target a query it equals `ndcg_at_k`.
    """
    gained = np.bincount(query, weights=ndcg_at_k(rank, tied, k), minlength=len(sizes))
    return _ratio(gained, _discounts(k)[np.minimum(sizes, k)])


def first_groups(query: IntArray, rank: IntArray, tied: IntArray, queries: int) -> tuple[IntArray, IntArray, IntArray]:
    """The best-placed tie group of each query that holds a target; hit and MRR of a set depend on it alone.

    Returns:
        (rank, tied, found), each (Q,): rank 0, tied 1, found 0 where no target was retrieved.
    """
    best = np.full(queries, np.iinfo(np.int64).max)
    retrieved = rank > 0
    np.minimum.at(best, query[retrieved], rank[retrieved])
    in_best = retrieved & (rank == best[query])
    sizes = np.ones(queries, dtype=np.int64)
    sizes[query[in_best]] = tied[in_best]
    found = np.bincount(query[in_best], minlength=queries)
    return np.where(found > 0, best, 0), sizes, found


def query_metrics(query: IntArray, rank: IntArray, tied: IntArray, sizes: IntArray) -> dict[str, FloatArray]:
    """Every metric of `METRICS` for each query, from the ranks of all its targets.

    Arguments as in `recall_at_k`.

    Returns:
        name -> (Q,); NaN for a query without targets.
    """
    first_rank, first_tied, found = first_groups(query, rank, tied, len(sizes))
    defined = np.where(sizes > 0, 1.0, np.nan)
    columns = {f"hit_at_{k}": defined * hit_at_k(first_rank, first_tied, k, found) for k in HIT_CUTOFFS}
    columns |= {f"ndcg_at_{k}": set_ndcg_at_k(query, rank, tied, sizes, k) for k in NDCG_CUTOFFS}
    columns["mrr"] = defined * reciprocal_rank(first_rank, first_tied, found)
    columns |= {f"recall_at_{k}": recall_at_k(query, rank, tied, sizes, k) for k in RECALL_CUTOFFS}
    return columns


def user_means(user: IntArray, values: FloatArray, users: int) -> FloatArray:
    """Average inside each user first.

    Args:
        user: (Q,) user number of each query, below `users`.
        values: (Q, C) metrics; NaN entries are left out.
        users: how many users there are.

    Returns:
        (users, C); NaN for a user without a defined value.
    """
    defined = np.isfinite(values)
    means = np.empty((users, values.shape[1]))
    for column in range(values.shape[1]):
        here = defined[:, column]
        sums = np.bincount(user[here], weights=values[here, column], minlength=users)
        means[:, column] = _ratio(sums, np.bincount(user[here], minlength=users))
    return means


def _discounts(k: int) -> FloatArray:
    """(k + 1,) summed gain of the first 0 … k places."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))])


def _ratio(above: npt.NDArray[np.number], below: npt.NDArray[np.number]) -> FloatArray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
