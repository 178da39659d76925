from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regularizers import subspace
from regularizers.subspace import (
    adam,
    caps,
    carried_moments,
    orthonormal,
    overlap,
    power_basis,
    randomized_basis,
    ranks,
    ranks_of,
    refreshed,
    separated,
    shared_weights,
    side_of,
    state_floats,
    svd_basis,
    too_large,
)

BETAS = (0.9, 0.999)
QWEN = {"q": (2048, 2048), "k": (256, 2048), "v": (256, 2048), "o": (2048, 2048)} | {
    "gate": (11008, 2048),
    "up": (11008, 2048),
    "down": (2048, 11008),
}
T5 = 72 * [(768, 768)] * 2 + 24 * [(2048, 768)] * 2 + 24 * [(768, 2048)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, cols: int, seed: int = 0) -> Tensor:
    u, v = (
        orthonormal(normal(rows, min(rows, cols), seed=seed)),
        orthonormal(normal(cols, min(rows, cols), seed=seed + 1)),
    )
    return u * (0.8 ** torch.arange(min(rows, cols)).float()) @ v.T


def gap(basis: Tensor) -> float:
    return float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max())


def test_the_basis_lies_on_the_shorter_side_and_a_square_matrix_goes_right() -> None:
    assert [side_of(shape, "short") for shape in ((3, 5), (5, 3), (4, 4))] == ["left", "right", "right"]
    assert [side_of((3, 5), side) for side in ("left", "right")] == ["left", "right"]
    with pytest.raises(ValueError, match="side is 'top'; choose one of short, left, right"):
        side_of((3, 5), "top")
    with pytest.raises(ValueError, match=r"shape \(15,\) has no sides; sharded"):
        side_of((15,), "short")


def test_specific_ranks_are_half_and_every_rank_fits_its_matrix() -> None:
    assert ranks_of((100, 50), 32) == (32, 16)
    assert ranks_of((100, 50), 1) == (1, 1)
    assert ranks_of((100, 20), 64) == (20, 20)
    with pytest.raises(ValueError, match="rank is 0; a subspace needs at least 1"):
        ranks_of((3, 5), 0)


@pytest.mark.parametrize(
    ("shapes", "rank", "capped"),
    [
        (36 * list(QWEN.values()), 512, 72),
        (36 * list(QWEN.values()), 1024, 216),
        (36 * list(QWEN.values()), 256, 0),
        (T5, 1024, 216),
    ],
)
def test_capped_subspaces_are_counted_once_a_shape(shapes: list[tuple[int, int]], rank: int, capped: int) -> None:
    sentences = caps(shapes, rank)
    assert sum(int(sentence.split(": ")[1].split()[0]) for sentence in sentences) == capped


def test_one_subspace_in_place_of_three_is_capped_at_twice_the_rank_and_says_that_it_is_smaller() -> None:
    assert caps([(6, 20), (40, 40)], 4) == []
    (sentence,) = caps([(6, 20), (40, 40)], 4, "one")
    assert sentence == (
        "rank 8 exceeds 1 matrices of 6 x 20: 1 of their 1 subspaces are capped at 6, so their state is smaller than "
        "that of three"
    )


def test_state_is_two_short_and_four_long_sides_times_the_rank() -> None:
    for m, n, r in ((2048, 11008, 256), (2048, 2048, 512)):
        long, short = max(m, n), min(m, n)
        assert state_floats(long, short, [r, r // 2, r // 2]) == 2 * short * r + 4 * long * r


@pytest.mark.parametrize(
    ("shapes", "rank", "giga", "of_adam"),
    [
        (36 * list(QWEN.values()), 256, 1.72, 0.31),
        (36 * list(QWEN.values()), 512, 3.35, 0.60),
        (36 * list(QWEN.values()), 1024, 6.47, 1.17),
        (T5, 256, 0.35, 0.88),
        (T5, 512, 0.70, 1.76),
        (T5, 1024, 1.22, 3.08),
    ],
)
def test_the_state_of_two_published_models_stands_beside_adams(
    shapes: list[tuple[int, int]], rank: int, giga: float, of_adam: float
) -> None:
    total = sum(state_floats(max(shape), min(shape), ranks(shape, rank, "three")) for shape in shapes)
    assert total / 1e9 == pytest.approx(giga, abs=0.005)
    assert total / sum(2 * m * n for m, n in shapes) == pytest.approx(of_adam, abs=0.005)
    refused = (total, 2 * sum(m * n for m, n in shapes)) if of_adam > 1 else None
    assert too_large(shapes, rank, "short", "three") == refused


@pytest.mark.parametrize("shape", [(40, 24), (24, 24), (60, 24)])
@pytest.mark.parametrize("kind", subspace.REFRESHES)
def test_every_refresh_gives_an_orthonormal_basis_even_of_a_rank_deficient_gradient(
    kind: str, shape: tuple[int, int]
) -> None:
    poor = normal(shape[0], 3) @ normal(3, shape[1], seed=1)
    for gradient in (normal(*shape), poor, 1e-12 * poor):
        for first in (True, False):
            basis = refreshed(kind, gradient, torch.eye(24, 8), first, torch.Generator().manual_seed(0))
            assert gap(basis) <= 1e-5
    caught = refreshed(kind, poor, torch.eye(24, 8), True, torch.Generator().manual_seed(0))
    torch.testing.assert_close(poor @ caught @ caught.T, poor, atol=1e-4, rtol=0)


def test_one_warm_power_step_keeps_up_with_a_slowly_moving_gradient() -> None:
    before = decaying(80, 48)
    basis = svd_basis(before, 12)
    after = before + 0.02 * decaying(80, 48, seed=7)
    energy = [float((after @ found).square().sum()) for found in (power_basis(after, basis), svd_basis(after, 12))]
    assert energy[0] >= 0.999 * energy[1]
    found = randomized_basis(after, 12, torch.Generator().manual_seed(0))
    assert float((after @ found).square().sum()) >= 0.999 * energy[1]


def test_a_zero_gradient_keeps_the_basis_and_an_unknown_refresh_is_refused() -> None:
    old = orthonormal(normal(6, 2))
    assert refreshed("power", torch.zeros(9, 6), old, False, torch.Generator()) is old
    with pytest.raises(ValueError, match="refresh is 'often'; choose one of power, rsvd, svd"):
        refreshed("often", torch.ones(9, 6), old, False, torch.Generator())


def test_separation_leaves_nothing_of_the_shared_span() -> None:
    shared, specific = orthonormal(normal(20, 6)), orthonormal(normal(20, 4, seed=1))
    assert float(overlap(shared, specific)) > 0.1
    apart = separated(specific, shared)
    assert gap(apart) <= 1e-5
    assert float(overlap(shared, apart)) <= 1e-10
    assert float(overlap(shared, shared[:, :2])) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turned_axes_leave_the_momentum_where_it_points(dtype: torch.dtype) -> None:
    old, turn = orthonormal(normal(30, 8).to(dtype)), orthonormal(normal(8, 8, seed=1).to(dtype))
    first, second = normal(20, 8, seed=2).to(dtype), normal(20, 8, seed=3).square().to(dtype)
    rotated, _ = carried_moments("rotate", first, second, old, old @ turn, 10, BETAS)
    gap = (rotated @ (old @ turn).T).double() - first.double() @ old.double().T
    assert float(gap.norm()) <= 1e-6 * float(first.norm())
    if dtype == torch.float64:
        assert float(gap.abs().max()) <= 1e-6  # entry by entry float32 rounds by a few 1e-7 at each of three products
    kept, _ = carried_moments("keep", first, second, old, old @ turn, 10, BETAS)
    cosine = torch.cosine_similarity((kept @ (old @ turn).T).flatten(), (first @ old.T).flatten(), dim=0)
    assert abs(float(cosine)) < 0.5
    for part in carried_moments("reset", first, second, old, old @ turn, 10, BETAS):
        assert not part.any()
    with pytest.raises(ValueError, match="on_refresh is 'forget'"):
        carried_moments("forget", first, second, old, old, 10, BETAS)


def test_rotated_second_moments_are_near_the_truth_and_nearer_than_kept_ones() -> None:
    old, turn = torch.eye(8), orthonormal(normal(8, 8, seed=1))
    new, mean, spread = old @ turn, normal(12, 8, seed=2), normal(12, 8, seed=3).square() + 0.1
    moments = {basis: (torch.zeros(12, 8), torch.zeros(12, 8)) for basis in ("old", "new")}
    for step in range(1, 401):
        gradient = mean * 0.3 + spread * normal(12, 8, seed=100 + step)
        adam(*moments["old"], gradient @ old, step, BETAS, 1e-8)
        adam(*moments["new"], gradient @ new, step, BETAS, 1e-8)
    truth = moments["new"][1]
    error = {}
    for how in ("rotate", "keep"):
        second = carried_moments(how, *moments["old"], old, new, 400, BETAS)[1]
        error[how] = float(((second - truth).abs() / truth).median())
    assert error["rotate"] <= 0.2
    assert error["rotate"] < error["keep"]


def test_the_moments_of_a_gradient_that_never_changes_are_those_it_has_on_the_turned_axes() -> None:
    old, turn, gradient = torch.eye(8), orthonormal(normal(8, 8, seed=1)), normal(12, 8, seed=2)
    moments = {basis: (torch.zeros(12, 8), torch.zeros(12, 8)) for basis in ("old", "new")}
    for step in range(1, 31):
        adam(*moments["old"], gradient @ old, step, BETAS, 1e-8)
        adam(*moments["new"], gradient @ (old @ turn), step, BETAS, 1e-8)
    for found, truth in zip(carried_moments("rotate", *moments["old"], old, old @ turn, 30, BETAS), moments["new"],
                            strict=True):  # fmt: skip
        torch.testing.assert_close(found, truth, atol=1e-5 * float(truth.abs().max()), rtol=0)


def test_adam_steps_by_the_rate_however_small_the_gradient() -> None:
    for size in (1e-5, 1e-6):
        direction = adam(torch.zeros(3), torch.zeros(3), torch.full((3,), size), 1, BETAS, 1e-8)
        torch.testing.assert_close(direction, torch.full((3,), size / (size + 1e-8)), rtol=1e-3, atol=0)


def test_the_shared_gradient_is_the_sum_the_pooled_mean_or_free_of_loudness() -> None:
    assert shared_weights("sum", [0.25, 0.75], [1, 100]) == [1, 1]
    assert shared_weights("pooled", [0.25, 0.75], [1, 100]) == [0.25, 0.75]
    quiet, loud = shared_weights("normalised", [0.25, 0.75], [1, 100])
    assert quiet * 1 == pytest.approx(loud * 100)
    with pytest.raises(ValueError, match="shared_grad is 'max'"):
        shared_weights("max", [1], [1])
