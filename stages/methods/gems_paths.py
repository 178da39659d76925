"""What each objective's own subspace proposed in GEMS's last step, before it was fused with the others.

Read off the moments that the step left behind; nothing of the step depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.methods.contract import Step
from stages.methods.gems_stack import BETAS, Stack
from stages.methods.gems_step import GemsStep


@torch.no_grad()
def own_updates(step: Step) -> dict[str, dict[str, Tensor]]:
    """−a · D_j of every linear map, by objective: after Adam, before fusion, null space and rate.

    Args:
        step: of any method.

    Returns:
        Objective -> map -> (m, n); empty for a method, or a step of GEMS, without a subspace an objective.
    """
    if not isinstance(step, GemsStep) or any(len(stack.widths) < 3 for stack in step.stacks):
        return {}
    found: dict[str, dict[str, Tensor]] = {}
    for number, objective in enumerate(step.objectives, start=1):
        found[objective] = {}
        for stack in step.stacks:
            if int(stack.steps[number]):
                found[objective] |= _of(stack, number)
    return {objective: moves for objective, moves in found.items() if moves}


def _of(stack: Stack, number: int) -> dict[str, Tensor]:
    """N_j Vᵀ of the maps of a stack, as Adam's moments say it: N = M̂ / (√Ŝ + ε)."""
    part, count = stack.part(number), int(stack.steps[number])
    mean = stack.first[..., part] / (1 - BETAS[0] ** count)
    root = (stack.second[..., part] / (1 - BETAS[1] ** count)).sqrt() + stack.settings.eps
    whole = -stack.settings.scale * (mean / root) @ stack.basis[..., part].mT  # (L, rows, cols)
    return {name: stack.orient(whole[i]).clone() for i, name in enumerate(stack.names)}
