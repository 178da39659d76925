"""Trained matrices as stored: whole, or as their move since the stage began where two thin factors are smaller.

`<name>` holds a whole weight; `<name>.left` (m, ρ) and `<name>.right` (ρ, n) say W = W_before + left·right. A move in
few gradient directions has a low rank; what the factors leave out is below `TOLERANCE` of the weight's norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6
"""Of ‖W‖: about sixteen roundings of float32, below what the steps' own rounding left in the weight."""


def smallest(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each weight of `after` whole or as factors of its move from `before`, whichever takes fewer numbers.

    Args:
        before: weights at the start of the stage; those without a counterpart are stored whole.
        after: weights at its end.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in after.items():
        factors = None
        if weight.dim() == 2 and name in before:
            factors = factored(weight - before[name], TOLERANCE * float(weight.norm()))
        if factors is None:
            stored[name] = weight
        else:
            stored[f"{name}.left"], stored[f"{name}.right"] = factors
    return stored


def factored(move: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """(m, ρ) and (ρ, n) whose product is `move` (m, n) up to `tolerance` in norm; None where they are no smaller.

    From the eigenvectors of the smaller Gram matrix in float64, which is exact enough for a tolerance in float32.
    """
    rows, cols = move.shape
    wide = (move if rows >= cols else move.T).double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)  # rising
    left_out = values.clamp_min(0).cumsum(0)
    rank = max(1, len(values) - int((left_out <= tolerance**2).sum()))
    if rank * (rows + cols) >= rows * cols:
        return None
    kept = vectors[:, -rank:]
    thin, base = (wide @ kept).to(move.dtype), kept.T.to(move.dtype)
    return (thin, base) if rows >= cols else (base.T.contiguous(), thin.T.contiguous())


def put(module: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Set the weights of `module`, which stands where the stage began, to what `smallest` stored."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in stored.items():
            if name in own:
                own[name].copy_(value)
            elif name.endswith(".left"):
                weight = own[name.removesuffix(".left")]
                right = stored[name.removesuffix("left") + "right"]
                weight.addmm_(value.to(weight.device), right.to(weight.device))


def in_words(stored: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights are stored which way, and the numbers they take."""
    deltas = sum(name.endswith(".left") for name in stored)
    return {
        "whole": len(stored) - 2 * deltas,
        "as_delta": deltas,
        "numbers": sum(value.numel() for value in stored.values()),
    }
