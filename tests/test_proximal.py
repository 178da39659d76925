"""The proximal terms: closed forms, properties, and what rounding does to the textbook form."""

from __future__ import annotations

import math
import statistics
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from regularizers.proximal import (
    o_lora_overlap,
    proximal_term,
    softmax_kl,
    softmax_kl_gradient,
    squared_l2,
    squared_l2_gradient,
)

LARGE = 32_768


def twin(current: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """The slow, readable KL and its gradient, float64."""
    log_p = current.double().flatten().log_softmax(0)
    log_q = anchor.double().flatten().log_softmax(0)
    gap = log_p - log_q
    kl = (log_p.exp() * (gap + torch.expm1(-gap))).sum()
    return kl, (log_p.exp() * (gap - kl)).view(current.shape)


def moved(size: int, move: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An adapter-sized anchor and a point at `move` per entry from it."""
    generator = torch.Generator().manual_seed(seed)
    anchor = 0.02 * torch.randn(size, generator=generator)
    return anchor + move * torch.randn(size, generator=generator), anchor


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


matrices = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12)


def test_two_entries_give_the_divergence_worked_out_by_hand() -> None:
    flat, tilted = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3), 0.0])
    assert softmax_kl(flat, tilted).item() == pytest.approx(0.143841, abs=1e-6)
    assert softmax_kl(tilted, flat).item() == pytest.approx(0.130812, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_anchor_itself_costs_exactly_nothing_and_pulls_exactly_nowhere(dtype: torch.dtype) -> None:
    anchor = torch.randn(8, 64, dtype=dtype)
    current = anchor.clone().requires_grad_()
    value = softmax_kl(current, anchor)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == 0.0
    assert current.grad is not None
    assert current.grad.dtype == dtype
    assert torch.count_nonzero(current.grad) == 0


def test_the_anchor_receives_no_gradient() -> None:
    current, anchor = (tensor.requires_grad_() for tensor in moved(64, 0.1))
    (softmax_kl(current, anchor) + squared_l2(current, anchor)).backward()
    assert current.grad is not None
    assert anchor.grad is None


def test_a_thousand_random_pairs_are_never_negative() -> None:
    values = [softmax_kl(*moved(257, 10.0 ** -(seed % 8), seed)).item() for seed in range(1000)]
    assert min(values) >= 0.0


@given(current=matrices, anchor=matrices)
@example(current=[0.0, 16.8317813873291, 0.0, 0.0], anchor=[15.0, -4.0, -21.0, 28.0])
@settings(max_examples=150, deadline=None)
def test_any_pair_agrees_with_the_float64_twin(current: list[float], anchor: list[float]) -> None:
    size = min(len(current), len(anchor))
    now, then = torch.tensor(current[:size]), torch.tensor(anchor[:size])
    value, gradient = softmax_kl_gradient(now, then)
    expected, expected_gradient = twin(now, then)
    assert value.item() >= 0.0
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


def test_entries_a_thousand_apart_still_give_a_finite_value() -> None:
    now, then = torch.tensor([1000.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1000.0])
    value, gradient = softmax_kl_gradient(now, then)
    assert value.item() == pytest.approx(1000.0)
    assert bool(gradient.isfinite().all())


@given(shift=st.floats(-5, 5), seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_every_entry_alone_costs_next_to_nothing(shift: float, seed: int) -> None:
    _, anchor = moved(100, 0.0, seed)
    assert softmax_kl(anchor + shift, anchor).item() <= 1e-12


def test_a_uniform_shift_changes_neither_value_nor_gradient() -> None:
    current, anchor = moved(LARGE, 1e-3)
    value, gradient = softmax_kl_gradient(current, anchor)
    shifted_value, shifted_gradient = softmax_kl_gradient(current + 0.01, anchor)
    assert relative(shifted_value, value.double()) <= 1e-3
    assert relative(shifted_gradient, gradient.double()) <= 1e-3


@pytest.mark.parametrize("move", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_value_and_gradient_keep_their_digits_down_to_the_first_steps_of_a_stage(move: float) -> None:
    current, anchor = moved(LARGE, move)
    value, gradient = softmax_kl_gradient(current, anchor)
    expected, expected_gradient = twin(current, anchor)
    assert relative(value, expected) <= (1e-3 if move >= 1e-4 else 3e-3)
    assert relative(gradient, expected_gradient) <= 1e-5


def test_the_textbook_sum_loses_the_value_to_rounding() -> None:
    textbook, stable = [], []
    for seed in range(20):
        current, anchor = moved(LARGE, 1e-3, seed)
        expected, _ = twin(current, anchor)
        log_p, log_q = current.log_softmax(0), anchor.log_softmax(0)
        textbook.append(relative((log_p.exp() * (log_p - log_q)).sum(), expected))
        stable.append(relative(softmax_kl(current, anchor), expected))
    assert statistics.fmean(textbook) > 0.1
    assert max(stable) <= 1e-5


def test_the_differentiable_form_hands_on_the_closed_form_gradient_times_what_comes_from_above() -> None:
    current, anchor = moved(512, 1e-2)
    current.requires_grad_()
    (3.0 * softmax_kl(current, anchor)).backward()
    _, gradient = softmax_kl_gradient(current, anchor)
    assert current.grad is not None
    torch.testing.assert_close(current.grad, 3.0 * gradient)


def test_the_gradient_points_uphill_by_finite_differences() -> None:
    current, anchor = moved(32, 0.5)
    _, gradient = softmax_kl_gradient(current, anchor)
    step = torch.zeros(32)
    step[7] = 1e-3
    slope = (twin(current + step, anchor)[0] - twin(current - step, anchor)[0]) / 2e-3
    assert gradient[7].item() == pytest.approx(slope.item(), rel=1e-3)


def test_squared_l2_is_half_the_squared_distance_and_pulls_straight_back() -> None:
    current, anchor = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    value, gradient = squared_l2_gradient(current, anchor)
    assert value.item() == squared_l2(current, anchor).item() == 2.5
    assert gradient.tolist() == [[1.0, -2.0]]


def test_size_scaling_turns_the_divergence_into_the_centred_half_squared_distance() -> None:
    for move in (1e-2, 1e-3, 1e-4):
        current, anchor = moved(LARGE, move)
        drift = current.double() - anchor.double()
        centred = (drift - drift.mean()).square().sum() / 2
        term = proximal_term({"A": current}, {"A": anchor}, "softmax_kl", "sum", "size", 1)
        assert (term.value.double() / centred).item() == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize(("scale", "growth"), [("size", 2.0), ("none", 1.0)])
def test_doubling_the_width_at_equal_drift_doubles_the_scaled_term_only(scale: str, growth: float) -> None:
    terms = []
    for width in (LARGE, 2 * LARGE):
        current, anchor = moved(width, 1e-3)
        terms.append(proximal_term({"A": current}, {"A": anchor}, "softmax_kl", "sum", scale, 1).value.item())
    assert terms[1] / terms[0] == pytest.approx(growth, rel=0.02)


def family() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Six matrices of three sizes, two of them equal in size but not in shape."""
    shapes = {"q.A": (4, 32), "q.B": (32, 4), "k.A": (4, 32), "k.B": (16, 4), "up.A": (4, 32), "up.B": (64, 4)}
    pairs = {
        name: moved(shape[0] * shape[1], 10.0**-index, index) for index, (name, shape) in enumerate(shapes.items())
    }
    current = {name: pair[0].view(shapes[name]) for name, pair in pairs.items()}
    return current, {name: pair[1].view(shapes[name]) for name, pair in pairs.items()}


@pytest.mark.parametrize("scale", ["none", "size"])
@pytest.mark.parametrize("penalty", ["softmax_kl", "squared_l2"])
def test_matrices_computed_together_equal_matrices_computed_alone(penalty: str, scale: str) -> None:
    current, anchors = family()
    alone = {"softmax_kl": softmax_kl_gradient, "squared_l2": squared_l2_gradient}[penalty]
    term = proximal_term(current, anchors, penalty, "sum", scale, 3)
    factors = {name: matrix.numel() if scale == "size" else 1 for name, matrix in current.items()}
    singles = {name: alone(current[name], anchors[name]) for name in current}
    assert term.value.item() == pytest.approx(sum(singles[name][0].item() * factors[name] for name in current))
    assert term.nats.item() == pytest.approx(sum(softmax_kl(current[name], anchors[name]).item() for name in current))
    assert term.gradients.keys() == current.keys()
    for name in current:
        torch.testing.assert_close(term.gradients[name], singles[name][1] * factors[name], rtol=1e-5, atol=1e-12)


def test_the_mean_is_the_sum_over_the_number_of_modules_in_value_and_gradient() -> None:
    current, anchors = family()
    total = proximal_term(current, anchors, "softmax_kl", "sum", "size", 3)
    mean = proximal_term(current, anchors, "softmax_kl", "mean", "size", 3)
    assert mean.value.item() == pytest.approx(total.value.item() / 3, rel=1e-6)
    assert mean.nats.item() == total.nats.item()
    torch.testing.assert_close(mean.gradients["k.B"], total.gradients["k.B"] / 3, rtol=1e-6, atol=0)


def test_the_term_neither_builds_a_graph_nor_touches_its_inputs() -> None:
    current, anchors = family()
    before = {name: matrix.clone() for name, matrix in current.items()}
    term = proximal_term(
        {name: matrix.requires_grad_() for name, matrix in current.items()}, anchors, "softmax_kl", "sum", "none", 3
    )
    assert not term.value.requires_grad
    assert all(torch.equal(current[name], before[name]) for name in current)


def test_errors_name_the_matrix_and_the_remedy() -> None:
    current, anchors = family()
    with pytest.raises(ValueError, match=r"matrix 'k\.A' has no anchor; rank and targets"):
        proximal_term(current, {name: anchors[name] for name in ("q.A", "q.B")}, "softmax_kl", "sum", "none", 3)
    with pytest.raises(ValueError, match=r"matrix 'q\.B' is \(32, 4\) but its anchor is \(4, 32\)"):
        proximal_term(current, {**anchors, "q.B": anchors["q.A"]}, "softmax_kl", "sum", "none", 3)
    with pytest.raises(ValueError, match=r"current is \(4, 32\) but its anchor is \(32, 4\)"):
        softmax_kl(current["q.A"], anchors["q.B"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"penalty": "kl"}, "penalty is 'kl'; choose one of softmax_kl, squared_l2"),
        ({"reduction": "max"}, "reduction is 'max'; choose one of sum, mean"),
        ({"scale": "width"}, "scale is 'width'; choose one of none, size"),
        ({"modules": 0}, "modules is 0"),
        ({"current": {}}, "holds no matrices"),
    ],
)
def test_an_unknown_choice_is_refused_by_name(choice: dict[str, object], message: str) -> None:
    current, anchors = family()
    arguments = {"current": current, "anchors": anchors, "penalty": "softmax_kl", "reduction": "sum"}
    arguments |= {"scale": "none", "modules": 3, **choice}
    with pytest.raises(ValueError, match=message):
        proximal_term(**arguments)  # pyright: ignore[reportArgumentType]


def test_o_lora_overlap_of_two_by_three_matrices_by_hand() -> None:
    past = [torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])]
    current = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 1.0]], requires_grad=True)
    overlap = o_lora_overlap(past, current)  # first: [[1, 2], [1, 3]], second: [[0, 1]]
    assert overlap.item() == 1 + 4 + 1 + 9 + 0 + 1
    overlap.backward()
    assert current.grad is not None
    assert current.grad[0].tolist() == [2.0, 2.0, 4.0]  # 2 (A_1'A_1 + A_2'A_2) a
    assert o_lora_overlap(past, torch.tensor([[2.0, 0.0, -1.0]])).item() == 1.0
    assert o_lora_overlap(past[1:], torch.tensor([[2.0, 5.0, 0.0]])).item() == 0.0
    with pytest.raises(ValueError, match=r"past\[0\] is \(2, 3\) but current is \(1, 2\)"):
        o_lora_overlap(past, torch.ones(1, 2))


def test_fifty_six_matrices_cost_a_few_milliseconds() -> None:
    pairs = {str(index): moved(1536 if index % 2 else 4096, 1e-3, index) for index in range(56)}
    current, anchors = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        proximal_term(current, anchors, "softmax_kl", "sum", "size", 28)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.05  # 2 ms on an idle core, with room for a busy one
