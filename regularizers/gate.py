"""GEMS's gate: how much each objective's own subspace contributes to the fused update.

α (2,) weighs the two specific contributions; the shared one always counts 1. A plain implementation gives the gate's
weights no gradient, since α enters only inside the optimiser's update. `hypergradient` repairs that: the loss one step
later is a function of α, and its derivative is an inner product of that step's gradient with this step's contribution
(Baydin et al., 2018, for the learning rate). Tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEARNED = ("hypergradient", "lookahead")
"""Kinds whose MLP is trained: by the next step's gradient, or by that of another batch before the step is final."""
GATES = ("constant", "released", "rule", "frozen_mlp", *LEARNED)
RELEASED = (0.4, 0.4, 0.2)
"""Weights of loss, norm and sample share in the released code, where a larger loss gives a larger weight."""
BETAS, EPS = (0.9, 0.999), 1e-8
RMS_DECAY = 0.99


@dataclass(frozen=True)
class Gate:
    """State of the gate's MLP 3 → hidden → 2 and its Adam; one flat vector φ, so that it is stored as tensors.

    Attributes:
        phi: (5·hidden + hidden + 2,) weights: W_1 (hidden, 3), b_1, W_2 (2, hidden), b_2, flattened in that order.
        first: Adam's mean over φ.
        second: Adam's mean square over φ.
        steps: () int64, updates of φ so far.
        square: () running mean of h², for the scale of the hypergradient.
    """

    phi: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    square: Tensor


def fresh_gate(hidden: int, generator: torch.Generator) -> Gate:
    """A random MLP whose output layer is small, so that α starts near (½, ½)."""
    parts = [
        torch.randn(3 * hidden, generator=generator) / 3**0.5,
        torch.zeros(hidden),
        0.1 * torch.randn(2 * hidden, generator=generator) / hidden**0.5,
        torch.zeros(2),
    ]
    phi = torch.cat(parts)
    return Gate(phi, torch.zeros_like(phi), torch.zeros_like(phi), torch.zeros((), dtype=torch.int64), torch.zeros(()))


def shares(values: Tensor) -> Tensor:
    """(2,) non-negative numbers -> their shares; (½, ½) where both are 0."""
    total = values.sum()
    return torch.where(total > 0, values / total.clamp_min(1e-30), torch.full_like(values, 0.5))


def features(losses: Tensor, usual: Tensor, norms: Tensor, samples: Tensor) -> Tensor:
    """z (3, 2): loss share, gradient-norm share and sample share of both objectives.

    Args:
        losses: (2,) token-mean losses.
        usual: (2,) their mean over the warm-up, which divides them: the share would mostly encode the two entropies.
        norms: (2,) gradient norms.
        samples: (2,) label tokens.
    """
    return torch.stack([shares(losses / usual.clamp_min(1e-30)), shares(norms), shares(samples)])


def scores(phi: Tensor, z: Tensor) -> Tensor:
    """o (2,) = W_2 ReLU(W_1 z + b_1) + b_2 for the first objective's features z (3,)."""
    hidden = (len(phi) - 2) // 6
    inner, bias, outer, last = phi.split([3 * hidden, hidden, 2 * hidden, 2])
    return outer.view(2, hidden) @ torch.relu(inner.view(hidden, 3) @ z + bias) + last


def weights(kind: str, phi: Tensor, z: Tensor, temperature: float) -> Tensor:
    """α (2,), summing to 1.

    Args:
        kind: one of `GATES`.
        phi: the MLP's weights; unused by the kinds without one.
        z: (3, 2) as `features` gives them.
        temperature: τ of the softmax; a larger one is more even.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in GATES:
        raise ValueError(f"gate is {kind!r}; choose one of {', '.join(GATES)}")
    if kind == "constant":
        return torch.full_like(z[0], 0.5)
    if kind == "released":
        return torch.tensor(RELEASED, dtype=z.dtype) @ z
    if kind == "rule":
        return (-(z[0] + z[1]) / temperature).softmax(dim=0)
    return (scores(phi, z[:, 0]) / temperature).softmax(dim=0)


def hypergradient(later: Tensor, contribution: Tensor, rate: float) -> Tensor:
    """∂L/∂α_j = −η ⟨G(t+1), D_j(t)⟩ over a stack of matrices, both in the same reduced form.

    Args:
        later: (…, rows, r) gradient of the shared loss at the moved weights, through the directions D_j moved along.
        contribution: (…, rows, r) D_j of the step before in those directions, without its α and the rate.
        rate: η of the step before.
    """
    return -rate * (later * contribution).sum()


def gate_gradient(phi: Tensor, z: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """∂L/∂φ from ∂L/∂α = `slope` (2,): through the softmax, ((diag α − α αᵀ)/τ)·slope, then back through the MLP.

    Args:
        phi: weights the α of that step was computed with.
        z: (3, 2) features of that step.
        slope: (2,) hypergradient, divided by its running size.
        temperature: τ.
    """
    with torch.enable_grad():
        leaf = phi.detach().requires_grad_(True)
        output = scores(leaf, z[:, 0])
        alpha = (output.detach() / temperature).softmax(dim=0)
        upstream = (alpha * slope - alpha * (alpha @ slope)) / temperature
        (gradient,) = torch.autograd.grad(output, leaf, grad_outputs=upstream)
    return gradient


def learned(gate: Gate, z: Tensor, slope: Tensor, temperature: float, rate: float, clip: float = 1.0) -> Gate:
    """The gate after one Adam step on φ against the hypergradient `slope` (2,), scaled by its running RMS.

    Args:
        gate: state; a new one is returned.
        z: (3, 2) features of the step that `slope` is about.
        slope: (2,) ∂L/∂α.
        temperature: τ.
        rate: of Adam.
        clip: bound on the norm of ∂L/∂φ.
    """
    steps = int(gate.steps) + 1
    square = RMS_DECAY * gate.square + (1 - RMS_DECAY) * slope.square().mean()
    scaled = slope / (square / (1 - RMS_DECAY**steps)).sqrt().clamp_min(1e-30)
    gradient = gate_gradient(gate.phi, z, scaled, temperature)
    gradient = gradient * (clip / gradient.norm().clamp_min(clip))
    first = BETAS[0] * gate.first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * gate.second + (1 - BETAS[1]) * gradient.square()
    move = (first / (1 - BETAS[0] ** steps)) / ((second / (1 - BETAS[1] ** steps)).sqrt() + EPS)
    return replace(gate, phi=gate.phi - rate * move, first=first, second=second, steps=gate.steps + 1, square=square)
