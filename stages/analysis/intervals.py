"""How sure an analysis is: a bootstrap over users for answers that turned, over pairs and maps for conflict."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl

from stages.interactions import BoolArray
from stages.metrics import FloatArray
from stages.statistics import Block, bootstrap_ratios, interval, user_weights

SEED = 0
"""Of the draws: an analysis that is made again gives the same intervals."""
SHARES = {"lost_share": ("lost", "before"), "lost_of_all": ("lost", "cases")}
SHARES |= {"gained_share": ("gained", "wrong"), "gained_of_all": ("gained", "cases")}
"""What is counted above and below the line."""

Pool = TypeVar("Pool", bound=Hashable)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Answers:
    """Two models' answers to the same N test cases.

    Attributes:
        users: (N,) ids of those who are asked about.
        before: (N,) whether the earlier model was right.
        after: (N,) whether the later one is.
    """

    users: pl.Series
    before: BoolArray
    after: BoolArray

    def counts(self) -> dict[str, BoolArray]:
        """(N,) whether a case counts as each of the names in `SHARES`."""
        before, after = self.before, self.after
        found = {"cases": np.ones_like(before), "before": before, "wrong": ~before}
        return found | {"lost": before & ~after, "gained": ~before & after}


def share_intervals(pools: Mapping[Pool, Sequence[Answers]], draws: int) -> dict[Pool, dict[str, Interval]]:
    """95 % percentile intervals of the shares of answers that turned, resampling users.

    A draw gives every user one weight in all of a pool's answers, and in all pools: a user's cases stay together.

    Args:
        pools: answers that are counted together.
        draws: of the bootstrap.

    Returns:
        Pool -> name in `SHARES` -> (low, high); without shares of nothing.
    """
    if not pools:
        return {}
    place = np.repeat(np.arange(len(pools)), [sum(len(a.before) for a in own) for own in pools.values()])
    answers = [one for own in pools.values() for one in own]
    names = pl.concat([one.users for one in answers])
    users = names.unique().sort()
    cell = users.search_sorted(names).to_numpy().astype(np.int64) * len(pools) + place
    counts = [one.counts() for one in answers]

    def summed(kinds: Sequence[str]) -> np.ndarray:
        """(users, pools x kinds)"""
        size = len(users) * len(pools)
        columns = [np.bincount(cell, np.concatenate([one[kind] for one in counts]), size) for kind in kinds]
        return np.stack(columns, axis=1).reshape(len(users), -1).astype(np.float32)

    below = sorted({denominator for _, denominator in SHARES.values()})
    group = [len(below) * pool + below.index(own) for pool in range(len(pools)) for _, own in SHARES.values()]
    block = Block(
        np.arange(len(users)), summed([own for own, _ in SHARES.values()]), summed(below), np.array(group, np.int64)
    )
    low, high = interval(bootstrap_ratios([block], len(users), draws, SEED)[0])
    ends = np.stack([low, high], axis=1).reshape(len(pools), len(SHARES), 2).tolist()
    return {
        pool: {name: (own[0], own[1]) for name, own in zip(SHARES, row, strict=True) if np.isfinite(own).all()}
        for pool, row in zip(pools, ends, strict=True)
    }


Combine = Callable[[Sequence[FloatArray]], FloatArray]
"""Means of each table by column (…, columns) -> the quantity by column."""


def crossed_interval(tables: Sequence[FloatArray], combine: Combine, draws: int) -> Interval | None:
    """95 % percentile interval of a quantity made of tables' column means, their rows and columns drawn apart.

    One batch enters every map, one map meets every batch: cells are not independent, rows and columns are (the
    pigeonhole bootstrap; Owen, 2007). It shows (n - 1) / n of the variance of n rows, so that few are too narrow.

    Args:
        tables: (rows, columns) each; NaN where a cell is undefined.
        combine: makes the quantity; its mean over columns is what the interval is of.
        draws: of the bootstrap.

    Returns:
        (low, high); None with fewer than two rows or columns, or without a defined column.
    """
    if min(tables[0].shape) < 2 or not np.isfinite(combine([column_means(table) for table in tables])).any():
        return None
    rows, columns = (
        np.concatenate(list(user_weights(size, draws, seed))).astype(np.float64)
        for size, seed in zip(tables[0].shape, (SEED, SEED + 1), strict=True)
    )
    values = combine([column_means(table, rows) for table in tables])  # (draws, columns)
    defined = np.isfinite(values)
    above, below = (np.where(defined, values, 0.0) * columns).sum(axis=1), (defined * columns).sum(axis=1)
    means = np.divide(above, below, out=np.full(draws, np.nan), where=below > 0)
    low, high = interval(means[:, None].astype(np.float32))
    return float(low[0]), float(high[0])


def column_means(table: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """(columns,) mean of each column over its defined cells; (draws, columns) with (draws, rows) weights."""
    own = np.ones((1, len(table))) if weights is None else weights
    defined = np.isfinite(table).astype(np.float64)
    below = own @ defined
    means = np.divide(own @ np.nan_to_num(table), below, out=np.full(below.shape, np.nan), where=below > 0)
    return means[0] if weights is None else means
