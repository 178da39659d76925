"""How sure a mean is: paired bootstrap over users, training seeds as the outer level, Holm over a table.

The user is the unit that is resampled (Efron & Tibshirani, 1993): a draw gives every user a weight, the same one in
every stage and for every method, so that differences are paired and stages that share users stay correlated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.interactions import IntArray
from stages.metrics import FloatArray

Draws = npt.NDArray[np.float32]

_CHUNK = 4_000_000
"""Weights held at a time: 16 MB of float32."""
_ROUNDING = 1e-6
"""Differences below it are float32 rounding; one user in a million could make them."""


@dataclass(frozen=True)
class Block:
    """Columns of ratios over the same users: sum of `above` / sum of `below`.

    Attributes:
        users: (n,) which of all users the rows are.
        above: (n, C) numerators; 0 where a user has none.
        below: (n, G) denominators, G <= C.
        group: (C,) which column of `below` divides each column of `above`.
    """

    users: IntArray
    above: npt.NDArray[np.float32]
    below: npt.NDArray[np.float32]
    group: IntArray


def user_weights(users: int, draws: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Multinomial weights of a bootstrap over `users`, in chunks of draws.

    Yields:
        (d, users) how often each user was drawn; rows sum to `users`. The first draws of a long bootstrap are those of
        a short one with the same seed.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // max(users, 1))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = generator.integers(0, users, size=(size, users), dtype=np.int32).astype(np.int64)
        drawn += np.arange(size)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users).astype(np.float32)


def bootstrap_ratios(blocks: Sequence[Block], users: int, draws: int, seed: int) -> list[Draws]:
    """Bootstrap several blocks with the same draws of users.

    Args:
        blocks: what to resample.
        users: number of users over all blocks.
        draws: number of draws.
        seed: of the draws.

    Returns:
        For each block (draws, C); NaN where a draw holds no user of a column.
    """
    results = [np.full((draws, block.above.shape[1]), np.nan, dtype=np.float32) for block in blocks]
    start = 0
    for weights in user_weights(users, draws, seed):
        stop = start + len(weights)
        for block, result in zip(blocks, results, strict=True):
            mine = weights[:, block.users]
            below = (mine @ block.below)[:, block.group]
            np.divide(mine @ block.above, below, out=result[start:stop], where=below > 0)
        start = stop
    return results


def bootstrap_means(values: FloatArray, draws: int, seed: int) -> Draws:
    """Bootstrap the mean over users of each column.

    Args:
        values: (users, C), one mean a user (average inside a user first); NaN where undefined for that user.
        draws: number of draws.
        seed: of the draws.

    Returns:
        (draws, C); the same draw weighs users alike in every column, so differences of columns are paired.
    """
    defined, group = np.unique(np.isfinite(values), axis=1, return_inverse=True)
    above = np.nan_to_num(values).astype(np.float32)
    block = Block(np.arange(len(values)), above, defined.astype(np.float32), group)
    return bootstrap_ratios([block], len(values), draws, seed)[0]


def seed_weights(seeds: Sequence[int], draws: int, seed: int) -> npt.NDArray[np.float32]:
    """(draws, S) weights of training seeds drawn with replacement; rows sum to 1.

    Two methods trained with the same seeds get the same weights, which pairs them.
    """
    generator = np.random.default_rng([seed, *seeds])
    drawn = generator.integers(0, len(seeds), size=(draws, len(seeds)))
    return (drawn[:, :, None] == np.arange(len(seeds))).mean(axis=1, dtype=np.float32)


def over_seeds(draws: Sequence[Draws], weights: npt.NDArray[np.float32]) -> Draws:
    """Draws of the mean over training seeds: seeds are resampled first, users (already in `draws`) second.

    Args:
        draws: for each of S seeds (draws, C).
        weights: (draws, S) from `seed_weights`.

    Returns:
        (draws, C).
    """
    if len(draws) == 1:
        return draws[0]
    total = np.zeros_like(draws[0])
    for place, one in enumerate(draws):
        drawn = weights[:, place, None]
        total += np.where(drawn > 0, drawn * one, 0)
    return total


def paired_differences(draws: Draws, reference: Draws) -> Draws:
    """Draw by draw, a method minus its reference; what is only float32 rounding becomes exactly 0."""
    difference = draws - reference
    return np.where(np.abs(difference) < _ROUNDING, np.float32(0), difference)


def interval(draws: Draws, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of each column.

    Returns:
        (low, high), each (C,); undefined draws are left out, NaN where all are.
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.full((2, draws.shape[1]), np.nan)
    defined = np.isfinite(draws)
    whole = defined.all(axis=0)
    if whole.any():
        bounds[:, whole] = np.quantile(draws[:, whole], tails, axis=0)
    for column in np.flatnonzero(defined.any(axis=0) & ~whole):
        bounds[:, column] = np.quantile(draws[defined[:, column], column], tails)
    return bounds[0], bounds[1]


def two_sided_p(differences: Draws) -> FloatArray:
    """Two-sided bootstrap p-value of each column: twice the smaller tail beyond 0, never below 2 / (draws + 1).

    Returns:
        (C,); NaN where no draw is defined.
    """
    draws = np.isfinite(differences).sum(axis=0)
    below, above = (differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0)
    p = np.minimum(1.0, 2.0 * (np.minimum(below, above) + 1) / (draws + 1))
    return np.where(draws > 0, p, np.nan)


def holm(p: Sequence[float]) -> FloatArray:
    """Holm's step-down adjustment (1979) over the comparisons of one table.

    Returns:
        (m,) adjusted p-values in the order given, at most 1; NaN stays NaN and counts as no comparison.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted
