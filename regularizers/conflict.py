"""How much two objectives' gradients, or the updates made of them, oppose each other. Tensors only."""

from __future__ import annotations

import torch
from torch import Tensor


def conflict(a: Tensor, b: Tensor) -> Tensor:
    """ρ = 1 − ⟨a, b⟩ / (‖a‖ ‖b‖), the gradient conflict coefficient (GEMS, Zhao et al., 2026, eq. 21).

    0 for parallel matrices, 1 for orthogonal ones, 2 for opposed ones; above 1 the cosine is negative. In many
    dimensions two noisy gradients of one and the same objective are nearly orthogonal, so ρ near 1 means nothing beside
    a ρ near 1 between two batches of one objective, its noise floor.

    Args:
        a: gradient or update of one objective.
        b: that of the other, of the same shape.

    Returns:
        Scalar, float64; NaN where either is 0 and has no direction.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"a is {tuple(a.shape)} but b is {tuple(b.shape)}")
    x, y = a.double().flatten(), b.double().flatten()
    lengths = x.norm() * y.norm()
    return torch.where(lengths > 0, 1 - (x @ y) / lengths, torch.full_like(lengths, torch.nan))
