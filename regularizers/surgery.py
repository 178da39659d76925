"""Gradient surgery (PCGrad, Yu et al., 2020): two gradients, each without what contradicts the other. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ of two lists of equally shaped tensors, taken as one long vector each."""
    return torch.stack([(x.float() * y.float()).sum() for x, y in zip(a, b, strict=True)]).sum()


def without_conflict(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
    """Both gradients as they are; where ⟨a, b⟩ < 0, each without its component along the original other.

    Args:
        a: gradients of one objective, one long vector cut into tensors.
        b: those of the other, shapes alike.

    Returns:
        What is left of `a`, what is left of `b`, and whether the two were in conflict.
    """
    product = inner(a, b)
    if not bool(product < 0):
        return [*a], [*b], False
    along_b, along_a = product / inner(b, b), product / inner(a, a)
    left = [x - along_b * y for x, y in zip(a, b, strict=True)]
    return left, [y - along_a * x for x, y in zip(a, b, strict=True)], True
