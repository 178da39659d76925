"""The weights a decoder stack computes with, whatever sits on its linear maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.input_moments import linear_maps

BASE = ".base_layer"
"""What PEFT, and `models.mixture` after it, call the map below an adapter."""


def base_maps(stack: nn.Module) -> dict[str, nn.Linear]:
    """Every linear map by the name it has without an adapter around it."""
    return {name.removesuffix(BASE): module for name, module in linear_maps(stack).items()}


@torch.no_grad()
def effective_weights(stack: nn.Module) -> dict[str, Tensor]:
    """Copies of W of every linear map, with what an adapter adds to it; a mixture adds its experts' mean."""
    weights = {}
    for name, module in base_maps(stack).items():
        around = stack.get_submodule(name)
        weight = module.weight.detach().clone()
        if around is not module:
            delta = around.get_delta_weight  # pyright: ignore[reportAttributeAccessIssue]
            weight += delta(*getattr(around, "active_adapters", ()))  # pyright: ignore[reportCallIssue]
        weights[name] = weight
    return weights
