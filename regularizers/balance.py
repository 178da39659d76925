"""Balance among experts that belong to objectives (LoRAMoE, Dou et al., 2023). Tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BALANCES = ("repaired", "as_printed")


def localized_balance(mass: Tensor, experts: Sequence[int], samples: Sequence[int], skew: float, how: str) -> Tensor:
    """Squared coefficient of variation of the experts' weighted routing mass: Var(Z) / mean(Z)².

    Z = Q ∘ I over experts and samples, Q the routing mass. As printed, I is 1 + δ where expert and sample are of one
    type and 1 − δ elsewhere; equal entries of Z then give an expert *less* of its own type, against the text. Repaired,
    Q is divided by I instead, and an expert gets (1 + δ) / (1 − δ) times as much of its own type. δ = 0 is plain
    balance.

    Args:
        mass: Q (E, S), mean routing weight of each expert over the tokens of each sample; were they summed, samples of
            different lengths would count as imbalance.
        experts: (E,) type of each expert.
        samples: (S,) type of each sample.
        skew: δ in [0, 1).
        how: "repaired" or "as_printed".

    Returns:
        Scalar, 0 where Z is even.

    Raises:
        ValueError: an unknown choice, a skew outside [0, 1), or types that do not fit the mass.
    """
    if how not in BALANCES:
        raise ValueError(f"balance is {how!r}; choose one of {', '.join(BALANCES)}")
    if not 0 <= skew < 1:
        raise ValueError(f"skew is {skew:g}; it must lie in [0, 1)")
    if mass.shape != (len(experts), len(samples)):
        raise ValueError(f"mass is {tuple(mass.shape)} for {len(experts)} experts and {len(samples)} samples")
    same = torch.tensor(experts)[:, None] == torch.tensor(samples)
    importance = torch.where(same, 1 + skew, 1 - skew).to(mass)
    weighted = mass * importance if how == "as_printed" else mass / importance
    return weighted.var(unbiased=False) / weighted.mean().square().clamp_min(1e-30)
