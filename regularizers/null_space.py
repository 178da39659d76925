"""The null space of what must not change: which input directions are protected, and updates without them.

y = W x with W (m × n); K (n × k) spans the protected inputs. An update D keeps y on them iff D K = 0, so the projector
stands on the right of D, whatever side the subspaces use. It is applied after Adam, whose element-wise division would
turn a projected gradient back into K. Tensors only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NULL_SPACES = ("orthogonal", "off", "paper_literal")
RULES = ("energy", "relative", "absolute", "fixed")


@dataclass(frozen=True)
class Protection:
    """The protected input directions of one linear map.

    Attributes:
        basis: K (n, k), float32, orthonormal.
        energy: share of the inputs' second moment inside K.
    """

    basis: Tensor
    energy: float

    @property
    def share(self) -> float:
        """k / n."""
        return self.basis.shape[1] / self.basis.shape[0]

    @property
    def left_over(self) -> float:
        """√((1 − e) / (1 − k/n)): how much of its output change an isotropic update of fixed norm keeps."""
        return math.sqrt(max(0.0, 1 - self.energy) / (1 - self.share))

    def numbers(self) -> dict[str, float]:
        """k, k / n, energy and what is left over, by name."""
        k = self.basis.shape[1]
        return {"k": k, "k_over_n": self.share, "energy": self.energy, "left_over": self.left_over}


def remove(rows: Tensor, protected: Tensor) -> Tensor:
    """D (I − K Kᵀ): `rows` (…, n) without what lies in the span of the orthonormal `protected` (n, k)."""
    return rows - (rows @ protected) @ protected.T


def project(rows: Tensor, protected: Tensor | None, how: str) -> Tensor:
    """`rows` (…, n) as `null_space = how` lets them through.

    Args:
        rows: vectors over the n inputs of a linear map.
        protected: K (n, k); None leaves the rows as they are.
        how: "orthogonal": I − K Kᵀ; "off": everything; "paper_literal": K Kᵀ, the projector as printed (eq. 19-20),
            which keeps exactly what the text says to remove: a negative control.

    Raises:
        ValueError: an unknown choice.
    """
    if how not in NULL_SPACES:
        raise ValueError(f"null_space is {how!r}; choose one of {', '.join(NULL_SPACES)}")
    if how == "off" or protected is None:
        return rows
    if how == "paper_literal":
        return (rows @ protected) @ protected.T
    return remove(rows, protected)


def protect(second_moment: Tensor, tokens: int, rule: str, value: float) -> Protection:
    """The top eigenvectors of an input's second moment, as many as the rule says.

    Args:
        second_moment: Σ x xᵀ (n, n) over `tokens` inputs, un-centred.
        tokens: how many inputs were summed.
        rule: "energy": fewest directions with this share of the trace; "relative": eigenvalues of at least this share
            of the largest; "absolute": mean squares of at least this size (not scale-free); "fixed": this many.
        value: the rule's number.

    Raises:
        ValueError: fewer tokens than input dimensions, an unknown rule or a number outside its range, no direction left
            to train.
    """
    size = second_moment.shape[0]
    if tokens < size:
        raise ValueError(f"{tokens} tokens cannot span an input of {size} dimensions; give a larger corpus")
    values, vectors = torch.linalg.eigh(second_moment.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # falling
    if not float(values[0]) > 0:
        raise ValueError("all inputs are 0; the corpus holds nothing to protect")
    count = count_protected(values / tokens, rule, value)
    if count == size:
        raise ValueError(f"nothing left to train: {rule} {value:g} protects all {size} input directions; lower it")
    energy = float(values[:count].sum() / values.sum())
    return Protection(vectors[:, :count].float().contiguous(), energy)


def count_protected(values: Tensor, rule: str, number: float) -> int:
    """How many of the falling eigenvalues `values` (n,) of the mean second moment the rule protects; at least 1.

    Raises:
        ValueError: an unknown rule, or a number outside its range.
    """
    if rule not in RULES:
        raise ValueError(f"k_rule is {rule!r}; choose one of {', '.join(RULES)}")
    if rule == "fixed":
        if not (1 <= number <= len(values) and number == int(number)):
            raise ValueError(f"k_value is {number:g}; fixed takes a whole number from 1 to {len(values) - 1}")
        return int(number)
    if not (0 < number < 1 or (rule == "absolute" and number > 0)):
        raise ValueError(
            f"k_value is {number:g}; {rule} takes a number {'above 0' if rule == 'absolute' else 'in (0, 1)'}"
        )
    if rule == "energy":
        within = values.cumsum(0) / values.sum()
        return int((within < number).sum()) + 1
    least = number * values[0] if rule == "relative" else torch.as_tensor(number, dtype=values.dtype)
    return max(1, int((values >= least).sum()))


def decay_to_start(weight: Tensor, start: Tensor, protected: Tensor | None, how: str) -> Tensor:
    """The direction of a weight decay that leaves W K alone: (W − W_0) (I − K Kᵀ)."""
    return project(weight - start, protected, how)
