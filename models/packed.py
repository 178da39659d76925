"""Linear maps of a model that only answers, multiplied by oneDNN from weights laid out for it beforehand.

torch hands float32 products to MKL, which on AMD's processors leaves the wider half of AVX-512 unused. oneDNN uses all
of it, and by this road, which torch's own compiler takes for frozen models, can be asked for (docs/log.md has both).
Sums are taken in another order, so scores differ from `F.linear`'s by rounding. bfloat16 is oneDNN's anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import processor

ROWS = 320
"""Rows of a product that the layout is chosen for: the beams of a batch. Any other number of rows is right too."""
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


class PackedLinear(nn.Module):
    """A float32 map on the CPU whose weight can no longer be read or trained; made for inference mode.

    Args:
        base: y = x·Wᵀ + b; it is not kept.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        operators: Any = torch.ops.mkldnn
        self.operator = operators._linear_pointwise
        self.packed: Tensor = operators._reorder_linear_weight(base.weight.detach(), ROWS)
        self.added = None if base.bias is None else base.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return self.operator(x, self.packed, self.added, "none", [], "")


def gains(device: torch.device) -> bool:
    """Whether packing is worth it, and can be had: on AMD's processors with AVX-512."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    known = processor.told("vendor_id") == "AuthenticAMD" and "avx512f" in processor.features()
    return known and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)


def pack(stack: nn.Module) -> None:
    """Replace every plain float32 linear map of a model that nobody trains or reads weights of any more."""
    for name, module in list(stack.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            stack.set_submodule(name, PackedLinear(module))
