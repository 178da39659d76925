"""One number a question about R[i][j], the metric on stage j's tests after training stage i.

Every function takes R as a (T + 1, T + 1) array with NaN in cells that were not measured, and returns NaN where a
cell it needs is missing. Definitions after Lopez-Paz & Ranzato (2017) and Chaudhry et al. (2018).
"""

from __future__ import annotations

import numpy as np

from stages.metrics import FloatArray


def average_performance(R: FloatArray) -> float:
    """Mean of R[T][j] over all j: the last model on every stage."""
    return float(R[-1].mean())


def learning_accuracy(R: FloatArray) -> float:
    """Mean of R[j][j]: how well a stage is learnt when its turn comes (plasticity)."""
    return float(np.diagonal(R).mean())


def next_performance(R: FloatArray) -> float:
    """Mean of R[j][j + 1]: what an update does for the coming stage. NaN for a single stage."""
    return _mean(np.diagonal(R, offset=1))


def backward_transfer(R: FloatArray) -> float:
    """Mean over j < T of R[T][j] - R[j][j]; negative where later stages spoilt earlier ones."""
    return _mean(R[-1, :-1] - np.diagonal(R)[:-1])


def forgetting(R: FloatArray) -> float:
    """Mean over j < T of max over i < T of R[i][j], minus R[T][j]."""
    return _mean(R[:-1, :-1].max(axis=0) - R[-1, :-1]) if len(R) > 1 else float("nan")


def forward_transfer(R: FloatArray, base: FloatArray) -> float:
    """Mean over j >= 1 of R[j - 1][j] - base[j].

    Args:
        R: as above.
        base: (T + 1,) the yardstick on each stage's tests; here recent popularity. Its first entry is not used.
    """
    return _mean(np.diagonal(R, offset=1) - base[1:])


def retained_accuracy(R: FloatArray) -> float:
    """Mean over i of the mean over j <= i of R[i][j]: at any time, the stages met so far."""
    return float(np.mean([R[i, : i + 1].mean() for i in range(len(R))]))


def harmonic(learning: float, retained: float) -> float:
    """Harmonic mean of learning and retained accuracy; 0 where either is 0."""
    return 2 * learning * retained / (learning + retained) if learning + retained else 0.0


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else float("nan")
