"""LoRA (Hu et al., 2021) folded into the weight it adapts: one matmul a layer, forward and backward.

`y = (W + s·B·A)·x` is computed by forming `W + s·B·A` once a pass, which costs r·d_out·d_in multiply-adds however many
tokens there are, instead of two thin products a token. The price is that adapter dropout cannot exist; it is 0.
Files are PEFT's: `adapter_model.safetensors` and `adapter_config.json`, loadable by `peft.PeftModel.from_pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """The map W ↦ W + (alpha / r)·B·A, with A (r, d_in) ~ U(±1/√d_in) and B (d_out, r) = 0 at birth."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        d_out, d_in = shape
        bound = 1 / math.sqrt(d_in)
        self.lora_A = nn.Parameter(torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """(d_out, d_in) -> (d_out, d_in)."""
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def attach(stack: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put a fresh adapter on every linear map whose last name is in `targets`; everything else stops training.

    Raises:
        ValueError: an adapter is there already, no module matches, or the rank exceeds a matrix.
    """
    if adapter_of(stack):
        raise ValueError("the model has an adapter already; fold it first")
    stack.requires_grad_(False)
    found = [(n, m) for n, m in stack.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if not found:
        raise ValueError(f"adapter.targets {list(targets)} match no linear map of the backbone")
    generator = torch.Generator().manual_seed(seed)
    for name, module in found:
        d_out, d_in = module.weight.shape
        if rank > min(d_out, d_in):
            raise ValueError(f"adapter.rank {rank} exceeds {name}, which is {d_out} x {d_in}; lower the rank")
        part = LowRank((d_out, d_in), rank, alpha, generator).to(module.weight.device)
        parametrize.register_parametrization(module, "weight", part)


def fold(stack: nn.Module) -> None:
    """Make the adapted weights plain weights; the function the model computes does not change."""
    for module in list(stack.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    stack.requires_grad_(False)


def detach(stack: nn.Module) -> None:
    """Take the adapter off; the weights below it are as they were."""
    for module in list(stack.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    stack.requires_grad_(False)


def adapter_of(stack: nn.Module) -> dict[str, LowRank]:
    """The adapter's parts by the name of the linear map they sit on, in module order."""
    parts = {}
    for name, module in stack.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            chain = cast(nn.Sequential, cast(nn.ModuleDict, module.parametrizations)["weight"])
            parts[name] = cast(LowRank, chain[0])
    return parts


def matrices(stack: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained matrix of the adapter, `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    return {
        f"{name}.{side}.weight": getattr(part, side)
        for name, part in adapter_of(stack).items()
        for side in ("lora_A", "lora_B")
    }


def snapshot(stack: nn.Module) -> dict[str, Tensor]:
    """Copies of `matrices`, without gradient: a proximal term's anchor."""
    return {name: value.detach().clone() for name, value in matrices(stack).items()}


def load(stack: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the attached adapter to `values`, named as by `matrices`.

    Raises:
        ValueError: names or shapes differ (another rank or other targets).
    """
    own = matrices(stack)
    if own.keys() != values.keys():
        odd = sorted(own.keys() ^ values.keys())[0]
        raise ValueError(f"the stored adapter and the model disagree on {odd}; rank or targets were changed")
    for name, value in values.items():
        if own[name].shape != value.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} on disk but {tuple(own[name].shape)} in the model")
        with torch.no_grad():
            own[name].copy_(value)


def add_product(stack: nn.Module, values: Mapping[str, Tensor], scale: float, normalise: bool) -> None:
    """W ← W + scale·B·A for every stored pair; with `normalise`, each factor is divided by its Frobenius norm first.

    The sum over past adapters of the cumulative methods; call it before `attach`.

    Raises:
        ValueError: a factor of norm 0 that would have to be normalised.
    """
    modules = dict(stack.named_modules())
    for name in sorted({key.removesuffix(".lora_A.weight") for key in values if key.endswith(".lora_A.weight")}):
        a, b = values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"]
        if normalise:
            if not (a.norm() > 0 and b.norm() > 0):
                raise ValueError(f"{name}: a past adapter of norm 0 cannot be normalised; use cumulative_sum")
            a, b = a / a.norm(), b / b.norm()
        weight = cast(nn.Linear, modules[name]).weight
        with torch.no_grad():
            weight.addmm_(b.to(weight), a.to(weight), alpha=scale)


def peft_names(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names as PEFT writes them for a causal LM whose stack is called `prefix`."""
    return {f"base_model.model.{prefix}.{name}": value.contiguous() for name, value in values.items()}


def own_names(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `peft_names`."""
    return {name.removeprefix(f"base_model.model.{prefix}."): value for name, value in values.items()}


def peft_config(rank: int, alpha: float, targets: Sequence[str]) -> dict[str, object]:
    """`adapter_config.json` for PEFT; the base is named portably, never by a path of this machine."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "driftrec-backbone",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }
