"""Proximal terms: what it costs an adapter to move away from its anchor, and the gradient of that cost.

Knows tensors and their names, nothing of models, strengths or training. All of it computes in float32 and never
branches on a tensor's value, so a step on a GPU does not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PENALTIES = ("softmax_kl", "squared_l2")
REDUCTIONS = ("sum", "mean")
SCALES = ("none", "size")


@dataclass(frozen=True)
class Proximal:
    """A proximal term over many matrices, without its strength.

    Attributes:
        value: scalar, float32: the term, scaled and reduced.
        nats: scalar, float32: the plain sum of softmax-KL over the matrices, whichever penalty was asked for.
        gradients: d value / d matrix by name, float32, each in its matrix's shape.
    """

    value: Tensor
    nats: Tensor
    gradients: dict[str, Tensor]


def softmax_kl(current: Tensor, anchor: Tensor) -> Tensor:
    """KL(softmax(current) || softmax(anchor)), each matrix flattened to one distribution.

    PESO's proximal term (Yoo et al., 2025, eq. 12). For small moves it is half the softmax-weighted variance of
    `current - anchor`, so adding a constant to every entry costs nothing.

    Args:
        current: adapter matrix being trained, any shape; differentiable, once.
        anchor: the same matrix at the end of the previous stage; receives no gradient.

    Returns:
        Scalar in nats, float32, never negative; exactly 0, with gradient exactly 0, at the anchor.

    Raises:
        ValueError: the shapes differ.
    """
    return _SoftmaxKl.apply(current, anchor)


def softmax_kl_gradient(current: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax_kl` and its gradient in closed form, p * (gap - kl) with gap = log p - log q.

    Args:
        current: adapter matrix being trained, any shape.
        anchor: the same matrix at the end of the previous stage.

    Returns:
        Scalar in nats, and the gradient in the shape of `current`; both float32 and detached.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("current", current, anchor)
    value, gradient = _softmax_kl_rows(_row(current), _row(anchor))
    return value[0], gradient.view(current.shape)


def squared_l2(current: Tensor, anchor: Tensor) -> Tensor:
    """Half the squared distance, ||current - anchor||^2 / 2: the sibling with the identity as its metric.

    Args:
        current: adapter matrix being trained, any shape; differentiable.
        anchor: the same matrix at the end of the previous stage; receives no gradient.

    Returns:
        Scalar in squared weight units, float32.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("current", current, anchor)
    return (current.float() - anchor.detach().float()).square().sum() / 2


def squared_l2_gradient(current: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """`squared_l2` and its gradient, current - anchor.

    Args:
        current: adapter matrix being trained, any shape.
        anchor: the same matrix at the end of the previous stage.

    Returns:
        Scalar in squared weight units, and the gradient in the shape of `current`; both float32 and detached.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("current", current, anchor)
    value, gradient = _squared_l2_rows(_row(current), _row(anchor))
    return value[0], gradient.view(current.shape)


def proximal_term(
    current: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    penalty: str,
    reduction: str,
    scale: str,
    modules: int,
) -> Proximal:
    """One penalty over all matrices, with its gradients, equal-sized matrices computed together.

    Args:
        current: matrices being trained, by name.
        anchors: their values at the end of the previous stage; further names are ignored.
        penalty: "softmax_kl" or "squared_l2", taken of each matrix apart.
        reduction: "sum" over matrices (the paper), or "mean": that sum divided by `modules` (PESO's release).
        scale: "none", or "size": each matrix's penalty times its number of entries, which makes softmax-KL the
            mean-centred half squared distance, so that one strength means the same at any width or rank.
        modules: number of wrapped linear maps, two matrices each; used by "mean" only.

    Returns:
        The term without its strength.

    Raises:
        ValueError: an unknown choice, no matrices, `modules` below 1, a matrix without an anchor or of another shape.

    Example:
        >>> move = {"q_proj.A": torch.tensor([[0.0, 2.0]])}
        >>> term = proximal_term(move, {"q_proj.A": torch.zeros(1, 2)}, "squared_l2", "sum", "none", modules=1)
        >>> term.value, term.gradients["q_proj.A"]
        (tensor(2.), tensor([[0., 2.]]))
    """
    _check_choices(penalty, reduction, scale, modules)
    with torch.no_grad():
        values: list[Tensor] = []
        nats: list[Tensor] = []
        gradients: dict[str, Tensor] = {}
        for names in _equal_sizes(current, anchors):
            rows = torch.stack([_row(current[name])[0] for name in names])  # (g, n)
            anchor_rows = torch.stack([_row(anchors[name])[0] for name in names])
            kl, gradient = _softmax_kl_rows(rows, anchor_rows)
            nats.append(kl.sum())
            value = kl
            if penalty == "squared_l2":
                value, gradient = _squared_l2_rows(rows, anchor_rows)
            factor = (rows.shape[1] if scale == "size" else 1) / (modules if reduction == "mean" else 1)
            values.append(value.sum() * factor)
            gradient = gradient * factor
            gradients.update({name: row.view(current[name].shape) for name, row in zip(names, gradient, strict=True)})
        return Proximal(torch.stack(values).sum(), torch.stack(nats).sum(), gradients)


def o_lora_overlap(past: Sequence[Tensor], current: Tensor) -> Tensor:
    """O-LoRA's penalty (Wang et al., 2023): sum over past adapters of ||A_i A^T||_F^2; 0 for orthogonal row spaces.

    Args:
        past: (r_i, d) matrices A of frozen past adapters; receive no gradient.
        current: (r, d) matrix A being trained; differentiable.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: a past matrix has another width.
    """
    total = current.new_zeros((), dtype=torch.float32)
    for index, matrix in enumerate(past):
        if matrix.shape[1] != current.shape[1]:
            raise ValueError(
                f"past[{index}] is {tuple(matrix.shape)} but current is {tuple(current.shape)}: "
                "rows must be equally long; pass adapters of the same layer"
            )
        total = total + (matrix.detach().float() @ current.float().T).square().sum()
    return total


class _SoftmaxKl(torch.autograd.Function):
    """The stable value with the closed-form gradient: autograd through it would lose digits to 1 - exp(-gap)."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, anchor: Tensor) -> Tensor:
        value, gradient = softmax_kl_gradient(current, anchor)
        ctx.save_for_backward(gradient)
        ctx.dtype = current.dtype
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(ctx.dtype), None


def _softmax_kl_rows(current: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """KL and its gradient for each row of (g, n) float32: (g,) and (g, n)."""
    log_q = anchor.log_softmax(dim=1)
    move = current - anchor
    move = move - move.amax(dim=1, keepdim=True)  # softmax does not see the shift; the largest entry is now 0
    # gap = log p - log q, from the difference: subtracting two log-softmaxes leaves only the rounding of numbers
    # near -log n. Where the moves are so wide that 1 + growth cancels, logsumexp is the accurate one.
    q = log_q.exp()
    growth = (q * move.expm1()).sum(dim=1, keepdim=True)
    wide = (log_q + move).logsumexp(dim=1, keepdim=True)
    gap = move - torch.where(growth > -0.5, growth.log1p(), wide)
    # Sums to 1 within rounding, as the gradient's sum needs; exp(log q + gap) does not where anchors lie far apart.
    p = current.softmax(dim=1)
    # Each summand is >= 0; the textbook sum p*gap cancels to rounding noise when n is large.
    # Far below the anchor p underflows before expm1 overflows, and 0 * inf is not a number.
    near = p * (gap + torch.expm1(-gap))
    kl = torch.where(gap > -20.0, near, p * gap + (q - p)).sum(dim=1)
    return kl, p * (gap - kl[:, None])


def _squared_l2_rows(current: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Half squared distance and its gradient for each row of (g, n) float32: (g,) and (g, n)."""
    move = current - anchor
    return move.square().sum(dim=1) / 2, move


def _row(matrix: Tensor) -> Tensor:
    return matrix.detach().float().reshape(1, -1)


def _equal_sizes(current: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names grouped by number of entries and device, after checking each against its anchor."""
    if not current:
        raise ValueError("current holds no matrices; the method must train at least one adapter matrix to anchor")
    groups: dict[tuple[int, torch.device], list[str]] = {}
    for name, matrix in current.items():
        if name not in anchors:
            raise ValueError(
                f"matrix {name!r} has no anchor; rank and targets of the adapter must stay as in the previous stage"
            )
        _check_shapes(f"matrix {name!r}", matrix, anchors[name])
        groups.setdefault((matrix.numel(), matrix.device), []).append(name)
    return list(groups.values())


def _check_shapes(what: str, current: Tensor, anchor: Tensor) -> None:
    if current.shape != anchor.shape:
        raise ValueError(
            f"{what} is {tuple(current.shape)} but its anchor is {tuple(anchor.shape)}; "
            "keep rank and targets as in the previous stage"
        )
    if current.numel() == 0:
        raise ValueError(f"{what} is {tuple(current.shape)}: a matrix without entries has no softmax; remove it")


def _check_choices(penalty: str, reduction: str, scale: str, modules: int) -> None:
    chosen = {"penalty": (penalty, PENALTIES), "reduction": (reduction, REDUCTIONS), "scale": (scale, SCALES)}
    for argument, (value, choices) in chosen.items():
        if value not in choices:
            raise ValueError(f"{argument} is {value!r}; choose one of {', '.join(choices)}")
    if modules < 1:
        raise ValueError(f"modules is {modules}; it counts the wrapped linear maps and must be at least 1")
