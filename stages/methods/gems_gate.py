"""What GEMS's gate learns from: how the loss after a step hangs on the weights α it was fused with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from regularizers import gate as gates
from stages.methods.gems_stack import Stack


@dataclass(frozen=True)
class Batch:
    """Sums over one batch's micro-batches, by objective.

    Attributes:
        losses: as the loop gives them: Σ cross-entropy / targets of the whole batch.
        shares: targets of the objective / targets of the whole batch.
    """

    losses: dict[str, float]
    shares: dict[str, float]


def delayed_slopes(stacks: Sequence[Stack], factors: Mapping[str, float], scale: float, rate: float) -> list[float]:
    """∂L/∂α of the step before, from this step's own gradients at the moved weights.

    Args:
        stacks: with this step's images, and the directions moved along at the one before.
        factors: of each objective's gradient in the shared loss.
        scale: a.
        rate: η of the step before.
    """
    slope = [0.0, 0.0]
    for stack in stacks:
        later = sum(
            (stack.through(stack.images[name]) * factor for name, factor in factors.items()),
            torch.zeros_like(stack.first),
        )
        for j in (1, 2):
            part = stack.part(j)
            contribution = cast(Tensor, stack.moved)[..., part] * scale
            slope[j - 1] += float(gates.hypergradient(later[..., part], contribution, rate))
    return slope


def ahead_slopes(stacks: Sequence[Stack], scale: float, rate: float) -> list[float]:
    """∂L/∂α of the step just taken, from the gradients that another batch left in `.grad`, which are dropped.

    Args:
        stacks: with the directions moved along.
        scale: a.
        rate: η of this step.
    """
    slope = [0.0, 0.0]
    for stack in stacks:
        moved = cast(Tensor, stack.moved)
        for i, weight in enumerate(stack.weights):
            if weight.grad is not None:
                later = stack.orient(weight.grad) @ stack.reach[i]  # (rows, R)
                for j in (1, 2):
                    part = stack.part(j)
                    slope[j - 1] += float(gates.hypergradient(later[:, part], moved[i][:, part] * scale, rate))
            weight.grad = None
    return slope
