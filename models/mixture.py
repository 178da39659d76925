"""LoRA-MoE (Dou et al., 2023): linear maps with several LoRA experts and a router that mixes them token by token.

y = W x + s Σ_e ω_e(x) B_e A_e x with ω = softmax(R x). What is mixed depends on the token, so nothing can be folded
into W: a trained mixture answers as it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

PARTS = ("lora_A", "lora_B", "router")


class MixtureLinear(nn.Module):
    """A frozen linear map with E experts, A (E, r, d_in) ~ U(±1/√d_in), B (E, d_out, r) = 0, and a router R (E, d_in).

    Attributes:
        inside: gives (B, T) of a pass, False on padding; the routing of each that a backward may follow is then noted.
        routed: what was noted, (B, E) a pass, oldest first: mean routing weights of a row's own tokens; whoever reads
            it empties it.
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base
        d_out, d_in = base.weight.shape
        bound = 1 / math.sqrt(d_in)
        self.lora_A = nn.Parameter(torch.empty(experts, rank, d_in).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(experts, d_out, rank))
        self.router = nn.Parameter(torch.empty(experts, d_in).uniform_(-bound, bound, generator=generator))
        self.scale = alpha / rank
        self.inside: Callable[[], Tensor] | None = None
        self.routed: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        weights = (inputs @ self.router.T).softmax(dim=-1)  # (..., E)
        if self.inside is not None and self.training and torch.is_grad_enabled():
            own = self.inside().to(weights)
            self.routed.append((weights * (own / own.sum(dim=1, keepdim=True))[..., None]).sum(dim=1))
        experts, rank, _ = self.lora_A.shape
        inner = (inputs @ self.lora_A.flatten(0, 1).T).unflatten(-1, (experts, rank)) * weights[..., None]
        outer = self.lora_B.permute(0, 2, 1).flatten(0, 1)  # (E·r, d_out)
        return self.base_layer(inputs) + self.scale * (inner.flatten(-2) @ outer)

    def get_delta_weight(self) -> Tensor:
        """(d_out, d_in) what the experts add where each has the same weight: no single matrix says what they do."""
        return self.scale * torch.einsum("eor,eri->oi", self.lora_B, self.lora_A) / len(self.lora_A)


def attach(
    stack: nn.Module, experts: int, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> dict[str, MixtureLinear]:
    """Put a fresh mixture on every linear map whose last name is in `targets`; everything else stops training.

    Raises:
        ValueError: no module matches, or the rank exceeds a matrix.
    """
    stack.requires_grad_(False)
    found = [(n, m) for n, m in stack.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if not found:
        raise ValueError(f"targets {list(targets)} match no linear map of the backbone")
    generator = torch.Generator().manual_seed(seed)
    mixtures = {}
    for name, module in found:
        if rank > min(module.weight.shape):
            d_out, d_in = module.weight.shape
            least = min(min(one.weight.shape) for _, one in found)
            raise ValueError(f"rank {rank} exceeds {name}, which is {d_out} x {d_in}; give at most {least}")
        mixtures[name] = MixtureLinear(module, experts, rank, alpha, generator).to(module.weight.device)
        stack.set_submodule(name, mixtures[name])
    return mixtures


def matrices(mixtures: Mapping[str, MixtureLinear]) -> dict[str, nn.Parameter]:
    """Every trained tensor, `<map>.lora_A`, `<map>.lora_B` and `<map>.router`."""
    return {f"{name}.{part}": cast(nn.Parameter, getattr(m, part)) for name, m in mixtures.items() for part in PARTS}
