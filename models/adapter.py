"""LoRA (Hu et al., 2021) folded into the weight it adapts: one matmul a layer, forward and backward.

`y = (W + s·B·A)·x` is computed by forming `W + s·B·A` once a pass, which costs r·d_out·d_in multiply-adds however many
tokens there are, instead of two thin products a token. The price is that adapter dropout cannot exist; it is 0.
Going back, autograd would form the gradient of the whole weight, d_out·d_in multiply-adds a token, only to project it
on A and B; a layer of at least `WIDE` weights takes that of A and B from thin products instead (`FoldedLinear`).
Files are PEFT's: `adapter_model.safetensors` and `adapter_config.json`, loadable by `peft.PeftModel.from_pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

WIDE = 2**18
"""Weights from which a layer's adapter goes back by thin products; below, they measured no faster (docs/log.md)."""


def is_wide(d_out: int, d_in: int) -> bool:
    """Whether an adapter on a layer of this shape goes back by thin products: it rounds, hence trains, differently."""
    return d_out * d_in >= WIDE


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


class FoldedLinear(torch.autograd.Function):
    """`y = x·W'ᵀ + bias` with `W' = W + s·B·A` as given; going back, W' gets no gradient, but B and A do.

    With D (N, d_out) the gradient of y: dx = D·W', dB = s·Dᵀ·(x·Aᵀ), dA = s·(D·B)ᵀ·x, which costs 2·r·(d_out + d_in)
    multiply-adds a token in place of d_out·d_in. `bias` is frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        out = torch.nn.functional.linear(x, folded, bias)
        ctx.scale, ctx.kind = scale, x.dtype
        # Under autocast `out` and the products below are in the narrower type.
        ctx.save_for_backward(x.to(out.dtype), folded.to(out.dtype), a, b)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the context's name)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        (grad,), (x, folded, a, b) = grad_outputs, ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)  # (N, d_out), (N, d_in)
        to_x, to_a, to_b = None, None, None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ folded).to(ctx.kind)
        if ctx.needs_input_grad[2]:
            to_a = ((rows @ b.to(rows.dtype)).mul_(ctx.scale).T @ inputs).to(a.dtype)
        if ctx.needs_input_grad[3]:
            to_b = (rows.T @ (inputs @ a.to(rows.dtype).T).mul_(ctx.scale)).to(b.dtype)
        return to_x, None, to_a, to_b, None, None


def _thin_forward(self: nn.Linear, x: Tensor) -> Tensor:
    """`forward` of a wide layer with an adapter: the same function, another way back."""
    part, original = _part_of(self), _original_of(self)
    if not torch.is_grad_enabled() or original.requires_grad:
        return torch.nn.functional.linear(x, self.weight, self.bias)
    with torch.no_grad():
        folded = self.weight
    return cast(Tensor, FoldedLinear.apply(x, folded, part.lora_A, part.lora_B, part.scale, self.bias))


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
        if is_wide(d_out, d_in):
            module.forward = MethodType(_thin_forward, module)


def fold(stack: nn.Module) -> None:
    """Make the adapted weights plain weights; the function the model computes does not change."""
    for module in list(stack.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            vars(module).pop("forward", None)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    stack.requires_grad_(False)


def detach(stack: nn.Module) -> None:
    """Take the adapter off; the weights below it are as they were."""
    for module in list(stack.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            vars(module).pop("forward", None)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    stack.requires_grad_(False)


def adapter_of(stack: nn.Module) -> dict[str, LowRank]:
    """The adapter's parts by the name of the linear map they sit on, in module order."""
    parts = {}
    for name, module in stack.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parts[name] = _part_of(module)
    return parts


def _part_of(module: nn.Linear) -> LowRank:
    chain = cast(nn.Sequential, cast(nn.ModuleDict, module.parametrizations)["weight"])
    return cast(LowRank, chain[0])


def _original_of(module: nn.Linear) -> Tensor:
    return cast(Tensor, cast(nn.ModuleDict, module.parametrizations)["weight"].original)


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
