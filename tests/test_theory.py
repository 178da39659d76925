"""What quadratic theory says of a proximal term, checked numerically; the KL is the project's own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from regularizers.proximal import proximal_term, softmax_kl

Array = npt.NDArray[np.float64]


def random_problem(size: int, seed: int) -> tuple[Array, Array, Array]:
    """A curvature of full rank, an optimum and a starting point."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(size, size))
    return root @ root.T / size, generator.normal(size=size), generator.normal(size=size)


def proximal_optimum(curvature: Array, metric: Array, strength: float, optimum: Array, start: Array) -> Array:
    """Minimum-norm minimiser of (v - v*)' S (v - v*) / 2 + strength (v - v0)' H (v - v0) / 2."""
    return np.linalg.pinv(curvature + strength * metric) @ (curvature @ optimum + strength * metric @ start)


def softmax_metric(size: int, seed: int) -> tuple[Array, Array]:
    """H = diag(p) - p p', whose null space is the constant vector, and p."""
    p = np.exp(np.random.default_rng(seed).normal(size=size))
    p /= p.sum()
    return np.diag(p) - np.outer(p, p), p


def interpolation_error(curvature: Array, metric: Array, strength: float, optimum: Array, start: Array) -> float:
    """Largest distance of the optimum's H-coordinates from the weights rho/(rho+s) and s/(rho+s)."""
    values, vectors = np.linalg.eigh(metric)
    kept = values > 1e-12
    whitener = vectors[:, kept] / np.sqrt(values[kept])
    rho, inner = np.linalg.eigh(whitener.T @ curvature @ whitener)
    q = whitener @ inner  # S q = rho H q on the range of H, q' H q = 1
    solved, wanted, began = (
        q.T @ metric @ v for v in (proximal_optimum(curvature, metric, strength, optimum, start), optimum, start)
    )
    return float(np.abs(solved - (rho * wanted + strength * began) / (rho + strength)).max())


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_each_direction_is_a_weighted_mean_of_optimum_and_anchor(strength: float) -> None:
    curvature, optimum, start = random_problem(12, 0)
    metric, _ = softmax_metric(12, 1)
    centring = np.eye(12) - 1 / 12
    centred = centring @ curvature @ centring
    assert interpolation_error(centred, metric, strength, optimum, start) <= 1e-10


def test_the_weighted_mean_needs_a_curvature_that_ignores_constant_shifts() -> None:
    curvature, optimum, start = random_problem(12, 0)
    metric, _ = softmax_metric(12, 1)
    assert interpolation_error(curvature, metric, 1.0, optimum, start) > 1e-3


def test_under_squared_l2_flat_directions_stay_at_the_anchor() -> None:
    generator = np.random.default_rng(2)
    examples = generator.normal(size=(5, 9))  # five examples see five directions of nine
    optimum, start, strength = generator.normal(size=9), generator.normal(size=9), 0.7
    solved = proximal_optimum(examples.T @ examples, np.eye(9), strength, optimum, start)
    _, sigma, rows = np.linalg.svd(examples)
    weight = np.concatenate([sigma**2 / (sigma**2 + strength), np.zeros(4)])
    expected = weight * (rows @ optimum) + (1 - weight) * (rows @ start)
    assert np.abs(rows @ solved - expected).max() <= 1e-10
    assert np.abs((rows @ (solved - start))[5:]).max() <= 1e-10


def test_gradient_descent_on_the_squared_l2_term_reaches_that_optimum() -> None:
    curvature, optimum, start = (torch.tensor(value, dtype=torch.float32) for value in random_problem(6, 3))
    v = start.clone()
    for _ in range(2000):
        term = proximal_term({"v": v}, {"v": start}, "squared_l2", "sum", "none", 1)
        v = v - 0.1 * (curvature @ (v - optimum) + 0.5 * term.gradients["v"])
    arrays = [value.double().numpy() for value in (curvature, optimum, start)]
    expected = proximal_optimum(arrays[0], np.eye(6), 0.5, arrays[1], arrays[2])
    np.testing.assert_allclose(v.numpy(), expected, atol=1e-5)


def softmax(anchor: Array) -> Array:
    p = np.exp(anchor - anchor.max())
    return p / p.sum()


def kl(current: Array, anchor: Array) -> float:
    """The project's divergence of two float64 vectors."""
    return softmax_kl(torch.tensor(current), torch.tensor(anchor)).item()


def cumulants(p: Array, move: Array) -> tuple[float, float, float]:
    """Second, third and fourth cumulant of `move` under p."""
    centred = move - p @ move
    second, third, fourth = (float(p @ centred**power) for power in (2, 3, 4))
    return second, third, fourth - 3 * second**2


def test_locally_the_divergence_is_half_the_variance_of_the_move() -> None:
    generator = np.random.default_rng(4)
    anchor, direction = generator.normal(size=50), generator.normal(size=50)
    p = softmax(anchor)
    metric = np.diag(p) - np.outer(p, p)
    gaps = []
    for size in (1e-1, 1e-2, 1e-3):
        move = size * direction
        half_variance = cumulants(p, move)[0] / 2
        assert half_variance == pytest.approx(move @ metric @ move / 2, rel=1e-9)
        gaps.append(abs(kl(anchor + move, anchor) / half_variance - 1))
    assert gaps[0] > 5 * gaps[1] > 0  # the remainder is of third order
    assert gaps[2] < 2e-3


def test_matrices_contribute_apart() -> None:
    generator = torch.Generator().manual_seed(5)
    anchors = {name: torch.randn(3, 5, generator=generator) for name in ("A", "B")}
    moved = {name: anchor + torch.randn(3, 5, generator=generator) for name, anchor in anchors.items()}
    both = proximal_term(moved, anchors, "softmax_kl", "sum", "none", 1)
    one = proximal_term({**moved, "B": anchors["B"]}, anchors, "softmax_kl", "sum", "none", 1)
    assert torch.equal(both.gradients["A"], one.gradients["A"])
    assert both.value.item() == pytest.approx(sum(softmax_kl(moved[name], anchors[name]).item() for name in anchors))
    assert torch.count_nonzero(one.gradients["B"]) == 0


def test_current_first_weighs_skew_a_third_and_anchor_first_a_sixth() -> None:
    generator = np.random.default_rng(6)
    anchor = generator.normal(size=2000)
    move = 0.05 * (generator.exponential(size=2000) - 1)  # skewed
    p = softmax(anchor)
    second, third, fourth = cumulants(p, move)
    forward, reverse = kl(anchor + move, anchor), kl(anchor, anchor + move)
    assert (forward - second / 2) / third == pytest.approx(1 / 3, abs=0.02)
    assert (reverse - second / 2) / third == pytest.approx(1 / 6, abs=0.02)
    assert (forward - second / 2 - fourth / 8) / third == pytest.approx(1 / 3, abs=0.003)
    assert (reverse - second / 2 - fourth / 24) / third == pytest.approx(1 / 6, abs=0.003)
