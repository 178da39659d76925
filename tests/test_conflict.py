"""Conflict, transitions, drift, sensitivity and memory where the right answer is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flows.reporting.insights import Insights
from models import mixture
from models.effective import effective_weights
from models.input_moments import InputMoment, linear_maps
from regularizers.conflict import conflict
from stages.analysis import learnt
from stages.analysis.conflict import (
    AFTER_FUSION,
    BEFORE_FUSION,
    BETWEEN,
    Coefficients,
    Halves,
    Matrices,
    Pair,
    above_floor,
    applied_updates,
    batch_pairs,
    coefficients,
    coefficients_by_kind,
    noise_floor,
    raw_gradients,
    tables_of,
)
from stages.analysis.intervals import column_means
from stages.analysis.measured import Scope, _labelled, gems_among, place_of
from stages.analysis.preservation import drifts, held_out_items, mixture_drifts, moments_of, relative_drift
from stages.analysis.state_memory import footprints
from stages.analysis.transitions import Transitions, transitions
from stages.dataset import load_dataset
from stages.fit import Fit
from stages.jobs import Job
from stages.method_config import GemsConfig
from stages.search_examples import query_vocabulary
from stages.stage_examples import Examples, stage_examples
from stages.train import bare_model, begin_stage, restore_model, train_stage
from stages.workspace import Workspace
from tests import searching, tiny

QUICK = {"training": {"first_epochs": 2, "epochs": 2}}
JOB = Job("single", 0, "same_stage", 1)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = searching.ring(tmp_path_factory.mktemp("ring"), stages=2)
    for method in ("single", "gems"):
        train_stage(tiny.config(**QUICK), workspace, replace(JOB, method=method))
    return workspace


def examples_of(workspace: Workspace, stage: int = 1) -> Examples:
    config, dataset = tiny.config(**QUICK), load_dataset(tiny.config(), workspace)
    return stage_examples(config, dataset, replace(JOB, stage=stage), False, query_vocabulary(config, dataset))


def fit_of(workspace: Workspace) -> Fit:
    config = tiny.config(**QUICK)
    model = restore_model(config, workspace, load_dataset(config, workspace), JOB)
    return Fit(config, model, lambda _: {}, examples_of(workspace), 0)


def test_gradients_alike_unrelated_and_opposed_by_hand() -> None:
    a = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    unrelated = torch.tensor([[0.0, 7.0], [1.0, 0.0]])
    assert [float(conflict(a, b)) for b in (2 * a, unrelated, -0.5 * a)] == pytest.approx([0.0, 1.0, 2.0], abs=1e-12)
    assert float(conflict(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))) == pytest.approx(1 - 0.5**0.5)
    assert math.isnan(float(conflict(a, torch.zeros(2, 2))))
    with pytest.raises(ValueError, match=r"a is \(2, 2\) but b is \(2,\)"):
        conflict(a, torch.ones(2))


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_conflict_is_symmetric_within_its_bounds_and_blind_to_size(seed: int, size: float) -> None:
    a, b = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    value = float(conflict(a, b))
    assert 0 <= value <= 2
    assert float(conflict(b, size * a)) == pytest.approx(value, abs=1e-6)
    assert float(conflict(a, -b)) == pytest.approx(2 - value, abs=1e-9)


def halves(a: list[float], b: list[float]) -> Iterator[Halves]:
    """Search gives +x then +y, recommendation `a` then `b`."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    yield {"search": ({"w": x}, {"w": y}), "recommendation": ({"w": torch.tensor(a)}, {"w": torch.tensor(b)})}


def test_pairs_are_between_the_objectives_and_the_floor_within_each() -> None:
    found = {one.pair: one for one in coefficients(halves([-1.0, 0.0], [0.0, 2.0]))}
    assert found[BETWEEN].values == pytest.approx((2.0, 0.0))  # opposed in the first batches, alike in the second
    assert found[BETWEEN].mean == pytest.approx(1.0)
    assert found[BETWEEN].below_zero == 0.5
    assert found["search"].values == pytest.approx((1.0,))
    assert found["recommendation"].values == pytest.approx((1.0,))
    silent = {one.pair: one for one in coefficients(halves([0.0, 0.0], [0.0, 1.0]))}
    assert silent[BETWEEN].values == pytest.approx((math.nan, 0.0), nan_ok=True)  # a zero gradient has no direction
    assert (silent[BETWEEN].known, silent[BETWEEN].mean) == ([0.0], 0.0)
    assert silent["recommendation"].mean is None
    kinds = coefficients_by_kind({"a": halves_, "b": halves_} for halves_ in halves([-1.0, 0.0], [0.0, 2.0]))
    assert (
        [one.values for one in kinds["a"]] == [one.values for one in kinds["b"]] == [o.values for o in found.values()]
    )
    with pytest.raises(ValueError, match="two objectives, got search"):
        coefficients(iter([{"search": ({}, {})}]))


def test_one_gradient_seen_through_unlike_noise_lies_on_the_floor_and_two_above_it() -> None:
    rng = np.random.default_rng(0)
    size, pairs = 20_000, 40
    shared, other = rng.normal(size=(2, size))

    def seen(truth: np.ndarray, noise: float) -> tuple[Matrices, Matrices]:
        a, b = (torch.from_numpy(truth + noise * rng.normal(size=size)) for _ in range(2))
        return {"w": a}, {"w": b}

    def above(first: np.ndarray, second: np.ndarray) -> float:
        halves_ = ({"search": seen(first, 1.0), "recommendation": seen(second, 10.0)} for _ in range(pairs))
        return float(above_floor([column_means(table) for table in tables_of(coefficients(halves_))])[0])

    assert above(shared, shared) == pytest.approx(0, abs=0.01)  # the mean of the floors would say .18
    assert above(shared, other) > 0.05  # unlike, as far as so noisy a second side lets it be seen


def test_what_lies_above_the_floor_is_taken_map_by_map() -> None:
    found = [
        Coefficients(BETWEEN, "a", (1.5, 1.7, 1.0, math.nan)),
        Coefficients(BETWEEN, "b", (0.2, 0.4, 1.0, 1.0)),
        Coefficients("search", "a", (0.5, 0.25)),
        Coefficients("search", "b", (0.8, math.nan)),
        Coefficients("recommendation", "a", (0.7, 0.75)),
        Coefficients("recommendation", "b", (1.0, math.nan)),
    ]
    tables = tables_of(found)
    between, searches, recommendations = tables
    assert between == pytest.approx(np.array([[1.6, 0.3], [1.0, 1.0]]))
    assert searches == pytest.approx(np.array([[0.5, 0.8], [0.25, math.nan]]), nan_ok=True)
    assert recommendations == pytest.approx(np.array([[0.7, 1.0], [0.75, math.nan]]), nan_ok=True)
    values = above_floor([column_means(table) for table in tables])
    wanted = [1.3 - (1 - math.sqrt((1 - 0.375) * (1 - 0.725))), 0.65 - 1.0]
    assert values == pytest.approx(np.array(wanted))


def test_batches_of_a_pair_are_disjoint_and_fewer_where_windows_are(ring: Workspace) -> None:
    examples = examples_of(ring)
    for wanted, size in ((3, 4), (10**6, 16)):
        pairs = batch_pairs(examples, wanted, size, seed=0)
        assert 1 <= len(pairs) <= wanted
        for name, part in examples.parts.items():
            drawn = np.concatenate([half for pair in pairs for half in pair[name]])
            assert len(set(drawn.tolist())) == len(drawn)
            assert drawn.max() < len(part.training)
            assert all(1 <= len(half) <= size for pair in pairs for half in pair[name])


def test_one_batch_against_itself_has_no_conflict_and_no_noise(ring: Workspace) -> None:
    fit = fit_of(ring)
    (pair,) = batch_pairs(fit.examples, 1, 8, seed=0)
    same = {name: (a, a) for name, (a, _) in pair.items()}
    found = coefficients(raw_gradients(fit, [same]))
    assert {one.name for one in found} == set(linear_maps(fit.model.stack))
    for one in found:
        if one.pair != BETWEEN:
            assert one.mean == pytest.approx(0.0, abs=1e-9)
    noise = [one.mean for one in coefficients(raw_gradients(fit, [pair])) if one.pair != BETWEEN]
    assert all(value is not None and 0.01 < value < 2 for value in noise)


def test_an_objective_against_itself_is_alike_on_equal_batches_and_the_printed_floor_on_disjoint_ones(
    ring: Workspace,
) -> None:
    fit = fit_of(ring)
    gradients = list(raw_gradients(fit, batch_pairs(fit.examples, 2, 8, seed=0)))
    halves_ = [found["search"] for found in gradients]
    equal = coefficients({"search": own, "again": own} for own in halves_)
    assert [one.mean for one in equal if one.pair == BETWEEN] == pytest.approx([0.0] * 14, abs=1e-9)
    disjoint = coefficients({"search": (a, b), "again": (b, a)} for a, b in halves_)
    tables = [column_means(table) for table in tables_of(disjoint)]
    assert tables[0] == pytest.approx(noise_floor(tables[1], tables[2]), abs=1e-9)
    assert above_floor(tables) == pytest.approx(np.zeros(14), abs=1e-9)
    assert min(tables[0]) > 0.01
    printed = Insights({"conflict": _labelled("single", "gradient", disjoint), "methods": ["single"]})
    assert printed.rho("single", "gradient", floor=True) == pytest.approx(tables[0].mean())


def test_a_raw_gradient_is_that_of_the_loss_by_finite_differences(ring: Workspace) -> None:
    fit = fit_of(ring)
    (pair,) = batch_pairs(fit.examples, 1, 4, seed=0)
    (found,) = raw_gradients(fit, [pair])
    name = "layers.1.mlp.down_proj"
    gradient, weight = found["search"][0][name], linear_maps(fit.model.stack)[name].weight
    place = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    values = []
    with torch.no_grad():
        for change in (1e-2, -2e-2):
            weight[place] += change
            values.append(sum(float(losses["search"]) for losses in fit.losses({"search": pair["search"][0]})))
    assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("method", ["single", "gems_scale_1"])
def test_an_applied_update_goes_downhill_and_is_the_same_every_time(method: str, ring: Workspace) -> None:
    config, dataset, job = tiny.config(**QUICK), load_dataset(tiny.config(), ring), replace(JOB, method=method)
    (pair,) = batch_pairs(examples_of(ring), 1, 8, seed=0)
    both = [next(applied_updates(config, ring, dataset, job, [pair])) for _ in range(2)]
    assert list(both[0]) == ([BEFORE_FUSION, AFTER_FUSION] if method != "single" else [AFTER_FUSION])
    for kind in both[0]:
        found = [one[kind] for one in both]
        for objective in pair:
            for name, move in found[0][objective][0].items():
                assert torch.equal(move, found[1][objective][0][name])
        goes_downhill(begin_stage(config, ring, dataset, job).fit, pair, found[0])


def test_a_surgerys_applied_update_is_made_of_what_the_surgery_left(
    ring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def robbed(a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
        return [0 * x for x in a], b, True

    monkeypatch.setattr("stages.methods.surgery.without_conflict", robbed)
    config, dataset = tiny.config(**QUICK), load_dataset(tiny.config(), ring)
    pairs = batch_pairs(examples_of(ring), 1, 4, seed=0)
    (found,) = next(applied_updates(config, ring, dataset, replace(JOB, method="pcgrad"), pairs)).values()
    first, second = found.values()
    assert all(not move.any() for half in first for move in half.values())
    assert all(any(move.any() for move in half.values()) for half in second)


def goes_downhill(start: Fit, pair: Pair, found: Halves) -> None:
    for objective, (chosen, _) in pair.items():
        slope = 0.0
        start.model.zero_grad(set_to_none=True)
        for losses in start.losses({objective: chosen}):
            losses[objective].backward()
        for name, gradient in gradients_of_weights(start).items():
            slope += float((gradient * found[objective][0][name]).sum())
        assert slope < 0, objective


def gradients_of_weights(fit: Fit) -> dict[str, Tensor]:
    """∂L/∂W from what a backward left: of the weight itself, or A's and B's gradients mapped to the product."""
    from models import adapter as lora

    parts = lora.adapter_of(fit.model.stack)
    if not parts:
        return {
            name: module.weight.grad
            for name, module in linear_maps(fit.model.stack).items()
            if module.weight.grad is not None
        }
    # ∂L/∂B = s G Aᵀ: with B's gradient alone the least-norm G is grad_B (A Aᵀ)⁻¹ A / s, which has the same slopes.
    return {
        name: part.lora_B.grad @ torch.linalg.solve(part.lora_A @ part.lora_A.T, part.lora_A).detach() / part.scale
        for name, part in parts.items()
        if part.lora_B.grad is not None
    }


def test_transitions_by_hand() -> None:
    before = np.array([True, True, True, False, False])
    after = np.array([True, False, False, True, False])
    table = transitions(before, after)
    assert table == Transitions(before=3, lost=2, gained=1, cases=5)
    same = transitions(before, before)
    assert (same.lost, same.gained) == (0, 0)
    with pytest.raises(ValueError, match="5 cases before and 4 after"):
        transitions(before, after[:4])


def test_drift_by_hand_and_none_at_the_start() -> None:
    start, inputs = torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    moment = inputs @ inputs.T
    now = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # only the second output moves, by its whole size
    assert relative_drift(start, now, moment) == pytest.approx(4 / 5)
    assert relative_drift(start, start, moment) == 0.0
    assert math.isnan(relative_drift(torch.zeros(2, 2), now, moment))


def test_a_moments_drift_is_that_of_the_outputs_themselves(ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    base = restore_model(config, ring, load_dataset(config, ring), Job("first", 0, "same_stage", 0))
    start = effective_weights(base.stack)
    inputs = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    now = restore_model(config, ring, load_dataset(config, ring), JOB)
    name = "layers.0.self_attn.q_proj"
    moved = effective_weights(now.stack)[name]
    found = drifts(start, now, {name: InputMoment((name,), inputs.T @ inputs, 40)})
    expected = ((moved - start[name]) @ inputs.T).norm() / (start[name] @ inputs.T).norm()
    assert found[name] == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 1e-3
    assert set(drifts(start, base, found_moments(base, ring)).values()) == {0.0}


def test_a_mixtures_drift_is_that_of_its_outputs_token_by_token(ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    dataset = load_dataset(config, ring)
    base, now = (restore_model(config, ring, dataset, Job("first", 0, "same_stage", 0)) for _ in range(2))
    stream = held_out_items(Fit(config, base, lambda _: {}, examples_of(ring, 0), 0))
    assert mixture_drifts(base, now, stream, text=False) == {}
    mixtures = mixture.attach(now.stack, 2, 2, 4.0, ["up_proj"], seed=0)
    assert set(mixture_drifts(base, now, stream, text=False).values()) == {0.0}
    with torch.no_grad():
        for one in mixtures.values():
            one.lora_B.normal_(generator=torch.Generator().manual_seed(3))
            one.router.zero_()  # all experts alike, so that one matrix does say what they do
    moments = moments_of(base, stream, text=False)
    matrix = drifts(effective_weights(base.stack), now, moments)
    for name, value in mixture_drifts(base, now, stream, text=False).items():
        assert value == pytest.approx(matrix[name], rel=1e-4)
        with torch.no_grad():
            mixtures[name].router.normal_(generator=torch.Generator().manual_seed(4)).mul_(10)
        assert abs(mixture_drifts(base, now, stream, text=False)[name] / value - 1) > 0.05


def test_memory_is_counted_for_gems_before_its_relatives(ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    scope = Scope(
        config, ring, load_dataset(config, ring), ("single", "galore", "gems_keep"), 0, "same_stage", 1, (), print
    )
    name, own = gems_among(scope)
    assert (name, own.subspaces) == ("gems_keep", "three")
    name, own = gems_among(replace(scope, methods=("single", "galore")))
    assert (name, own.subspaces) == ("galore", "one")


def test_what_was_learnt_is_the_mean_loss_of_windows_and_no_model_differs_from_itself(ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    dataset = load_dataset(config, ring)
    start, trained = (restore_model(config, ring, dataset, one) for one in (Job("first", 0, "same_stage", 0), JOB))
    coming = examples_of(ring)
    before, after = (learnt.losses(Fit(config, m, lambda _: {}, coming, 0), 1000) for m in (start, trained))
    for name, part in coming.parts.items():
        batch = part.batch(part.training, np.arange(len(part.training)))
        with torch.no_grad():
            whole = float(trained.eval().loss(batch)) / len(batch.labels)
        assert after[name].mean == pytest.approx(whole, rel=1e-4)
        assert after[name].tokens.sum() == len(batch.labels)
        less, low, high = before[name].less(after[name], 500)
        assert less == pytest.approx(before[name].mean - after[name].mean)
        assert low <= less <= high
        assert before[name].less(before[name], 500) == (0.0, 0.0, 0.0)
    some = learnt.losses(Fit(config, trained, lambda _: {}, coming, 0), 8)
    assert all(some[name].tokens.sum() < after[name].tokens.sum() for name in some)


def found_moments(base: Any, workspace: Workspace) -> dict[str, InputMoment]:
    fit = Fit(tiny.config(**QUICK), base, lambda _: {}, examples_of(workspace, 0), 0)
    return moments_of(base, held_out_items(fit), text=False)


# With T = 4 each step makes bases of some of the 14 maps anew.
@pytest.mark.parametrize(("rank", "every"), [(None, 200), (3, 200), (None, 4)])
def test_bytes_counted_on_tensors_are_those_of_the_formulas(rank: int | None, every: int, ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    dataset = load_dataset(config, ring)
    model = bare_model(config, dataset, 0)
    fit = Fit(config, model, lambda _: {}, examples_of(ring), 0)
    batch = next(iter(fit.batches(1)))
    assert len(batch) == 2
    rows = footprints(model, lambda: fit.losses(batch), config.adapter, GemsConfig(rank=rank, refresh_every=every))
    for row in rows:
        assert row.counted == row.predicted > 0, row
    sizes = {(row.name, row.part): row.counted for row in rows}
    shapes = 2 * [(32, 32)] * 4 + 2 * [(64, 32)] * 3  # two layers
    r = rank or 8
    specific = max(1, r // 2)
    per_map = [min(m, n) * (r + 2 * specific) + 2 * max(m, n) * (r + 2 * specific) for m, n in shapes]
    assert sizes["gems", "state"] == 4 * sum(per_map)
    assert sizes["adamw", "state"] == 8 * sum(m * n for m, n in shapes)
    assert sizes["lora", "state"] == 8 * sum(4 * (m + n) for m, n in shapes)
    assert linear_maps(model.stack).keys() == linear_maps(bare_model(config, dataset, 0).stack).keys()


def test_layers_and_weight_types_are_read_off_a_maps_name() -> None:
    assert place_of("layers.3.self_attn.q_proj") == (3, "q_proj")
    assert place_of("h.11.attn.c_attn") == (11, "c_attn")
    assert place_of("lone") == (0, "lone")
