"""Vectors as tuples of codes: residual quantisation, frozen once it is fitted.

At each level a vector's residual is replaced by the number of its nearest centroid, and what is left goes to the next
level. Centroids and residuals are kept on a grid of 2^-20: with norms of at most 32 every product and sum of a distance
is then exact in float64, so a vector's codes depend on neither its batch, the threads, nor the machine's BLAS.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

FloatArray: TypeAlias = npt.NDArray[np.floating]
IntArray: TypeAlias = npt.NDArray[np.int64]

GRID = 2.0**20
LARGEST_NORM = 32.0
_BLOCK = 8192  # vectors whose distances are held at once
_SAMPLE = 256  # vectors a centroid is fitted on, at most


class Quantizer(Protocol):
    """A fitted quantizer: nothing in it changes any more."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes at each level."""
        ...

    def encode(self, vectors: FloatArray) -> IntArray:
        """Codes (n, levels) of vectors (n, d); a row's codes do not depend on the other rows."""
        ...

    def nearest(self, vector: FloatArray) -> IntArray:
        """All codes of the last level by rising distance, for one vector (d,) under its own earlier codes."""
        ...

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything `from_arrays` needs to rebuild the quantizer."""
        ...


@dataclass(frozen=True)
class ResidualKMeans:
    """One k-means codebook a level, each fitted on what the earlier levels left over.

    Attributes:
        codebooks: one (codes, d) array a level, on the grid.
    """

    codebooks: tuple[FloatArray, ...]

    @classmethod
    def fit(cls, vectors: FloatArray, levels: int, codes_per_level: int, seed: int) -> Self:
        """Fit on vectors (n, d); a level has `codebook_size` codes.

        Raises:
            ValueError: no vectors, a number that is not finite, or a norm above 32.
        """
        residual = on_grid(vectors)
        codebooks = []
        for level in range(levels):
            codebook = on_grid(centroids(residual, codes_per_level, seed + level))
            residual = residual - codebook[nearest_codes(residual, codebook)]
            codebooks.append(codebook)
        return cls(tuple(codebooks))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Self:
        """Rebuild from `arrays()`."""
        return cls(stacked(arrays, "codebook"))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes at each level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    def encode(self, vectors: FloatArray) -> IntArray:
        """Codes (n, levels) of vectors (n, d)."""
        return residual_codes(vectors, self.codebooks)

    def nearest(self, vector: FloatArray) -> IntArray:
        """All codes of the last level by rising distance, for one vector (d,)."""
        return last_level_order(vector, self.codebooks)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """`codebook.<level>` for every level."""
        return {f"codebook.{level}": codebook for level, codebook in enumerate(self.codebooks)}


def codebook_size(distinct: int, bound: int) -> int:
    """Codes of a level: a quarter of the distinct vectors (a code should be shared), at least 2, at most `bound`.

    Never more than there are distinct vectors, so a level may have a single code.
    """
    return min(bound, max(2, distinct // 4), distinct)


def centroids(vectors: FloatArray, bound: int, seed: int) -> FloatArray:
    """K-means centroids (k, d) of vectors (n, d), k by `codebook_size`; seeded.

    Beyond 256 vectors a centroid, a seeded sample stands for the rest.

    Raises:
        ValueError: there are no vectors.
    """
    if not len(vectors):
        raise ValueError("a quantizer needs at least one vector to be fitted on, got none; is stage 0 empty?")
    distinct = np.unique(vectors, axis=0)
    size = codebook_size(len(distinct), bound)
    if size == len(distinct):
        return distinct
    if len(vectors) > _SAMPLE * size:
        chosen = np.random.default_rng(seed).choice(len(vectors), _SAMPLE * size, replace=False)
        vectors = vectors[np.sort(chosen)]
    # One thread: threads add their partial sums in the order in which they end.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct clusters than asked for is no harm
        fitted = KMeans(size, max_iter=100, random_state=seed).set_params(n_init=1).fit(vectors)
    return np.asarray(fitted.cluster_centers_)


def on_grid(vectors: FloatArray) -> FloatArray:
    """Vectors (n, d) in float64, rounded to multiples of 2^-20.

    Raises:
        ValueError: a number that is not finite, or a row longer than 32.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"vectors must be a finite (n, d) array, got shape {rows.shape}; look for NaN in their source")
    longest = float(np.sqrt((rows * rows).sum(axis=1)).max(initial=0.0))
    if longest > LARGEST_NORM:
        raise ValueError(f"vectors must have norms of at most {LARGEST_NORM:g}, got {longest:g}; normalise the rows")
    return np.rint(rows * GRID) / GRID


def residual_codes(vectors: FloatArray, codebooks: Sequence[FloatArray]) -> IntArray:
    """Greedy residual codes (n, levels): at each level the nearest centroid, ties to the lower code."""
    codes = np.empty((len(vectors), len(codebooks)), dtype=np.int64)
    for start in range(0, len(vectors), _BLOCK):
        residual = on_grid(vectors[start : start + _BLOCK])
        for level, codebook in enumerate(codebooks):
            chosen = nearest_codes(residual, codebook)
            codes[start : start + _BLOCK, level] = chosen
            residual = residual - codebook[chosen]
    return codes


def nearest_codes(residual: FloatArray, codebook: FloatArray) -> IntArray:
    """Number of the nearest centroid of each residual (n, d); ties to the lower number."""
    parts = [
        _distances(residual[start : start + _BLOCK], codebook).argmin(axis=1)
        for start in range(0, len(residual), _BLOCK)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def last_level_order(vector: FloatArray, codebooks: Sequence[FloatArray]) -> IntArray:
    """Codes of the last level by rising distance to what the earlier levels leave of `vector` (d,)."""
    residual = on_grid(np.asarray(vector)[None, :])
    for codebook in codebooks[:-1]:
        residual = residual - codebook[nearest_codes(residual, codebook)]
    return np.argsort(_distances(residual, codebooks[-1])[0], kind="stable")


def stacked(arrays: Mapping[str, npt.NDArray[np.generic]], name: str) -> tuple[FloatArray, ...]:
    """Arrays `name.0`, `name.1`, … in order."""
    count = sum(key.startswith(f"{name}.") for key in arrays)
    return tuple(np.asarray(arrays[f"{name}.{place}"], dtype=np.float64) for place in range(count))


def _distances(residual: FloatArray, codebook: FloatArray) -> FloatArray:
    """Squared distances (n, codes) less the residual's own square, which orders nothing."""
    return (codebook * codebook).sum(axis=1) - 2.0 * (residual @ codebook.T)
