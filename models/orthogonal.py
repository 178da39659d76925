"""PEFT's Orthogonal Subspace Fine-tuning on a stack: the top singular triples of a weight stay, the rest trains.

`peft.tuners.osf` does the work, this module puts its layers in place and reads the weights off. The library keeps the
gradients of U_low and V_low orthogonal to the preserved directions; what the optimiser makes of them it does not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.osf.layer import Linear as OsfLinear

NAME = "default"
"""PEFT's name of its only adapter."""


def attach(stack: nn.Module, targets: Sequence[str], preserved: float) -> dict[str, OsfLinear]:
    """Decompose every linear map whose last name is in `targets`; everything else stops training.

    Args:
        stack: with plain weights.
        targets: last names.
        preserved: share of the singular triples, largest first, that stay as they are.

    Returns:
        PEFT's layers by the name of the map.

    Raises:
        ValueError: no map matches, or nothing of one is preserved or left to train.
    """
    from peft.tuners.osf.config import OSFConfig  # seconds of imports that only this method needs
    from peft.tuners.osf.layer import Linear as OsfLinear

    stack.requires_grad_(False)
    found = [(n, m) for n, m in stack.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if not found:
        raise ValueError(f"adapter.targets {list(targets)} match no linear map of the backbone")
    layers = {}
    for name, module in found:
        size = min(module.weight.shape)
        rank = int(size * preserved)
        if not 0 < rank < size:
            raise ValueError(
                f"preserved = {preserved:g} keeps {rank} of the {size} singular directions of {name}; "
                f"give at least {1 / size:g}"
            )
        layers[name] = OsfLinear(module, NAME, config=OSFConfig(), effective_rank=rank)
        stack.set_submodule(name, layers[name])
    return layers


def parameters(layers: Mapping[str, OsfLinear]) -> list[nn.Parameter]:
    """What trains: U_low, S_low and V_low of every map."""
    return [parameter for layer in layers.values() for parameter in layer.osf_svd_params.parameters()]


@torch.no_grad()
def merged(layers: Mapping[str, OsfLinear]) -> dict[str, Tensor]:
    """W as it is now, by `<map>.weight`."""
    bases = {name: cast(nn.Linear, layer.get_base_layer()).weight for name, layer in layers.items()}
    return {f"{name}.weight": weight + layers[name].get_delta_weight(NAME) for name, weight in bases.items()}
