from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regularizers import gate as gates
from regularizers.gate import features, fresh_gate, gate_gradient, hypergradient, learned, scores, weights

LOUD = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]])
"""z of a batch whose first objective has the larger loss and gradient."""


def phi(seed: int = 0) -> Tensor:
    return torch.randn(6 * 4 + 2, generator=torch.Generator().manual_seed(seed))


def test_features_are_shares_of_losses_against_their_usual_size() -> None:
    z = features(
        torch.tensor([6.0, 1.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0])
    )
    torch.testing.assert_close(z, torch.tensor([[0.8, 0.2], [0.25, 0.75], [0.25, 0.75]]))
    torch.testing.assert_close(gates.shares(torch.zeros(2)), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("kind", gates.GATES)
def test_weights_are_positive_and_sum_to_one(kind: str) -> None:
    alpha = weights(kind, phi(), LOUD, 1.0)
    assert float(alpha.sum()) == pytest.approx(1)
    assert bool((alpha > 0).all())


def test_the_rule_holds_the_loud_objective_back_and_the_released_one_pushes_it() -> None:
    assert torch.equal(weights("constant", phi(), LOUD, 1.0), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(
        weights("released", phi(), LOUD, 1.0)[0], torch.tensor(0.4 * 0.8 + 0.4 * 0.6 + 0.2 * 0.5)
    )
    expected = torch.tensor([-1.4, -0.6]).softmax(dim=0)
    torch.testing.assert_close(weights("rule", phi(), LOUD, 1.0), expected)
    assert float(weights("rule", phi(), LOUD, 10.0)[0]) > float(expected[0])  # a high temperature evens out
    with pytest.raises(ValueError, match="gate is 'moe'; choose one of constant, released, rule"):
        weights("moe", phi(), LOUD, 1.0)


def test_a_plain_implementation_gives_the_gate_no_gradient() -> None:
    own = phi().requires_grad_(True)
    weight = torch.ones(3, requires_grad=True)
    alpha = weights("frozen_mlp", own, LOUD, 1.0)
    weight.square().sum().backward()
    with torch.no_grad():
        weight -= 0.1 * alpha[0] * weight.grad
    assert own.grad is None


def test_the_gate_gradient_is_that_of_autograd_through_the_softmax() -> None:
    own, slope = phi().requires_grad_(True), torch.tensor([0.3, -0.7])
    ((scores(own, LOUD[:, 0]) / 0.7).softmax(dim=0) * slope).sum().backward()
    torch.testing.assert_close(gate_gradient(own, LOUD, slope, 0.7), own.grad)


def test_the_hypergradient_is_the_slope_of_the_next_loss_along_the_contribution() -> None:
    generator = torch.Generator().manual_seed(0)
    start, contribution, target = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    rate, alpha = 0.1, 0.3

    def loss(weight: float) -> Tensor:
        return (start - rate * weight * contribution - target).square().sum() / 2

    later = start - rate * alpha * contribution - target
    slope = float(loss(alpha + 1e-3) - loss(alpha - 1e-3)) / 2e-3
    assert float(hypergradient(later, contribution, rate)) == pytest.approx(slope, rel=1e-6)


def test_learning_moves_weight_to_the_objective_whose_contribution_lowers_the_loss() -> None:
    gate = fresh_gate(16, torch.Generator().manual_seed(0))
    before = weights("hypergradient", gate.phi, LOUD, 1.0)
    for scale in (1.0, 1e-6):  # its running size is divided out
        own = gate
        for _ in range(50):
            own = learned(own, LOUD, torch.tensor([-2.0, 1.0]) * scale, 1.0, 1e-2)
        after = weights("hypergradient", own.phi, LOUD, 1.0)
        assert float(after[0]) > float(before[0]) + 0.1
    assert int(own.steps) == 50
    assert int(gate.steps) == 0


def test_a_long_gradient_of_the_gate_is_cut_to_the_bound_and_a_short_one_is_left() -> None:
    fresh, slope = fresh_gate(4, torch.Generator().manual_seed(0)), torch.tensor([1.0, -1.0])  # of root mean square 1
    lengths = {}
    for temperature in (1e-2, 10.0):
        whole = gate_gradient(fresh.phi, LOUD, slope, temperature)
        taken = learned(fresh, LOUD, slope, temperature, 1e-2).first / 0.1
        lengths[temperature] = float(whole.norm())
        torch.testing.assert_close(taken, whole / max(1.0, float(whole.norm())), atol=1e-6, rtol=1e-4)
    assert lengths[10.0] < 1 < lengths[1e-2]
