"""Gradient subspaces (GaLore, Zhao et al., 2024; GEMS, Zhao et al., 2026): bases, moments on refresh, Adam inside.

Every matrix here is *oriented*: its basis lies on the right, gradient ≈ (G V) Vᵀ. A basis on the left of W is a basis
on the right of Wᵀ, so the caller hands the transposed view and one set of formulas serves both sides. Letters:
G (rows × cols) an oriented gradient, V (cols × r) an orthonormal basis, M and S (rows × r) the moments. Tensors only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

SIDES = ("short", "left", "right")
REFRESHES = ("power", "rsvd", "svd")
ON_REFRESH = ("rotate", "keep", "reset")
SHARED_GRADIENTS = ("sum", "pooled", "normalised")
JOINED = 2
"""A single subspace in place of three has so many times the shared one's rank: as many directions as they together."""
OVERSAMPLING = 8
POWER_STEPS = 2


def side_of(shape: Sequence[int], side: str) -> Literal["left", "right"]:
    """Which side of an (m, n) weight carries the basis: the shorter one, the right one of a square matrix (GaLore).

    Args:
        shape: (m, n) of the weight, out × in.
        side: "short", or "left" / "right" for every matrix.

    Raises:
        ValueError: an unknown side, or a weight that is no matrix (a flattened shard).
    """
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; choose one of {', '.join(SIDES)}")
    if len(shape) != 2:
        raise ValueError(f"a weight of shape {tuple(shape)} has no sides; sharded, flattened weights are not supported")
    if side == "left" or (side == "short" and shape[0] < shape[1]):
        return "left"
    return "right"


def ranks_of(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Ranks of the shared and of each objective's subspace: min(r, m, n) and min(max(1, r // 2), m, n).

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; a subspace needs at least 1 direction")
    return min(rank, *shape), min(max(1, rank // 2), *shape)


def caps(shapes: Sequence[tuple[int, int]], rank: int, subspaces: Literal["three", "one"] = "three") -> list[str]:
    """One sentence for each shape whose ranks are capped, with the number of subspaces concerned.

    Args:
        shapes: of the matrices.
        rank: r of the shared subspace of three.
        subspaces: of a matrix: ranks r, r // 2 and r // 2, or one of rank 2r.
    """
    wanted = [JOINED * rank] if subspaces == "one" else [rank, *2 * [max(1, rank // 2)]]
    sentences = []
    for shape, count in Counter(shapes).items():
        capped = count * sum(min(one, *shape) < one for one in wanted)
        if capped:
            sentences.append(
                f"rank {wanted[0]} exceeds {count} matrices of {shape[0]} x {shape[1]}: "
                f"{capped} of their {len(wanted) * count} subspaces are capped at {min(shape)}"
                + (", so their state is smaller than that of three" if subspaces == "one" else "")
            )
    return sentences


def state_floats(rows: int, cols: int, ranks: Sequence[int]) -> int:
    """Floats of bases and moments of one matrix: Σ_s (cols·r_s + 2·rows·r_s)."""
    return sum((cols + 2 * rows) * rank for rank in ranks)


def ranks(shape: Sequence[int], rank: int, subspaces: Literal["three", "one"]) -> list[int]:
    """Ranks of all subspaces of a matrix: r, r // 2 and r // 2, or 2r alone, capped as `ranks_of` does."""
    if subspaces == "one":
        return [ranks_of(shape, rank * JOINED)[0]]
    shared, specific = ranks_of(shape, rank)
    return [shared, specific, specific]


def too_large(
    shapes: Sequence[tuple[int, ...]], rank: int, side: str, subspaces: Literal["three", "one"]
) -> tuple[int, int] | None:
    """Floats of bases and moments of these matrices, and of Adam's moments, where the former are more; else None."""
    floats = weights = 0
    for shape, count in Counter(shapes).items():
        rows, cols = shape if side_of(shape, side) == "right" else shape[::-1]
        floats += count * state_floats(rows, cols, ranks(shape, rank, subspaces))
        weights += count * rows * cols
    return (floats, 2 * weights) if floats > 2 * weights else None


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (cols × r) of the columns; columns that depend on others are replaced by further directions.

    Householder QR: orthonormal to rounding whatever the rank, which Gram-Schmidt is not.
    """
    return torch.linalg.qr(columns).Q


def power_basis(gradient: Tensor, basis: Tensor) -> Tensor:
    """One block power step from the old basis: V ← qr(Gᵀ (G V)); two products and a QR."""
    return orthonormal(gradient.T @ (gradient @ basis))


def randomized_basis(gradient: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The top `rank` right singular vectors by randomized SVD (Halko et al., 2011), oversampling 8, two power steps."""
    rows, cols = gradient.shape
    width = min(rank + OVERSAMPLING, rows, cols)
    start = torch.randn(cols, width, generator=generator, dtype=gradient.dtype).to(gradient.device)
    reach = orthonormal(gradient @ start)  # (rows, width)
    for _ in range(POWER_STEPS):
        reach = orthonormal(gradient @ orthonormal(gradient.T @ reach))
    return torch.linalg.svd(reach.T @ gradient, full_matrices=False).Vh[:rank].T


def svd_basis(gradient: Tensor, rank: int) -> Tensor:
    """The top `rank` right singular vectors, exactly."""
    return torch.linalg.svd(gradient, full_matrices=False).Vh[:rank].T


def refreshed(kind: str, gradient: Tensor, basis: Tensor, first: bool, generator: torch.Generator) -> Tensor:
    """A basis for `gradient` in place of `basis`.

    Args:
        kind: "power": a warm-started block power step, a randomized SVD the first time; "rsvd"; "svd".
        gradient: (rows, cols), float32, finite.
        basis: (cols, r) old one.
        first: there was no basis before; `basis` gives only the rank and what a zero gradient leaves.
        generator: of the randomized start.

    Returns:
        (cols, r), orthonormal; the old one where the gradient is 0.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in REFRESHES:
        raise ValueError(f"refresh is {kind!r}; choose one of {', '.join(REFRESHES)}")
    if not bool(gradient.any()):
        return basis
    if kind == "svd":
        return svd_basis(gradient, basis.shape[1])
    if kind == "rsvd" or first:
        return randomized_basis(gradient, basis.shape[1], generator)
    return power_basis(gradient, basis)


def separated(specific: Tensor, shared: Tensor) -> Tensor:
    """The specific basis with the shared span taken out, orthonormal again (where shared leaves room for it)."""
    once = specific - shared @ (shared.T @ specific)
    return orthonormal(once - shared @ (shared.T @ once))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """‖AᵀB‖_F² / min(r_a, r_b) of orthonormal bases (…, cols, r): 0 for orthogonal spans, 1 for nested ones."""
    return (a.mT @ b).square().sum(dim=(-2, -1)) / min(a.shape[-1], b.shape[-1])


def carried_moments(
    how: str, first: Tensor, second: Tensor, old: Tensor, new: Tensor, steps: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Adam's moments after the basis turned from `old` to `new`.

    `rotate`, with C = newᵀ old: M ← M Cᵀ; with μ = M / bc₁ and var = max(S / bc₂ − μ², 0), S ← bc₂ |var (C∘C)ᵀ +
    (μ Cᵀ)²|, as LDAdam (Robert et al., 2025) does at every step. `keep` leaves numbers that belong to other axes
    (GaLore); `reset` starts from zero.

    Args:
        how: "rotate", "keep" or "reset".
        first: (rows, r) mean M, not bias-corrected.
        second: (rows, r) mean square S, not bias-corrected.
        old: (cols, r) basis the moments belong to.
        new: (cols, r) basis from now on.
        steps: Adam steps taken so far, t_s; it goes on.
        betas: decay rates of M and S.

    Raises:
        ValueError: an unknown choice.
    """
    if how not in ON_REFRESH:
        raise ValueError(f"on_refresh is {how!r}; choose one of {', '.join(ON_REFRESH)}")
    if how == "reset":
        return torch.zeros_like(first), torch.zeros_like(second)
    if how == "keep" or steps == 0:
        return first, second
    turn = old.T @ new  # Cᵀ (r, r)
    one, two = (1 - beta**steps for beta in betas)
    mean = first / one
    spread = (second / two - mean.square()).clamp_min(0)
    return first @ turn, two * (spread @ turn.square() + (mean @ turn).square()).abs()


def adam(
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    steps: int | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Adam (Kingma & Ba, 2015) inside a subspace: updates the moments in place, returns N = M̂ / (√Ŝ + ε).

    Args:
        first: (…, r) M; changed.
        second: (…, r) S; changed.
        gradient: (…, r) projected gradient.
        steps: t_s with this step counted, from 1; or int64, shaped to broadcast with `first`.
        betas: decay rates.
        eps: outside the root, where small gradients keep their full step.
    """
    one, two = betas
    first.lerp_(gradient, 1 - one)
    second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
    return first.div(second.div(_debias(two, steps)).sqrt_().add_(eps)).div_(_debias(one, steps))


def _debias(beta: float, steps: int | Tensor) -> float | Tensor:
    """1 − β^t, in float64 where t is a tensor: in float32 it loses four digits at t = 1."""
    return (1 - beta ** steps.double()).float() if isinstance(steps, Tensor) else 1 - beta**steps


def shared_weights(kind: str, shares: Sequence[float], loudness: Sequence[float]) -> list[float]:
    """What each objective's token-mean gradient is multiplied by before they are added to the shared gradient.

    Args:
        kind: "sum": 1 (the paper); "pooled": n_j / Σ n; "normalised": 1 / running norm, times the mean of those norms
            so that the sum keeps its size.
        shares: n_j / Σ n, label tokens of each objective in the batch.
        loudness: running norm of each objective's gradient; 0 where it has had none, which then counts 1.

    Raises:
        ValueError: an unknown choice.
    """
    if kind not in SHARED_GRADIENTS:
        raise ValueError(f"shared_grad is {kind!r}; choose one of {', '.join(SHARED_GRADIENTS)}")
    if kind == "sum":
        return [1.0] * len(shares)
    if kind == "pooled":
        return [share / sum(shares) for share in shares]
    known = [norm for norm in loudness if norm > 0]
    middle = sum(known) / max(1, len(known))
    return [middle / norm if norm > 0 else 1.0 for norm in loudness]
