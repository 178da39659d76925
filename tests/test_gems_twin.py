"""Acceptance test 8: GEMS's step against its naive twin, through refreshes, absences and a learning gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.input_moments import linear_maps
from regularizers.subspace import ranks_of, side_of
from stages.method_config import GemsConfig
from stages.methods.contract import SharedLosses
from stages.methods.gems_paths import own_updates
from stages.methods.gems_step import GemsStep
from tests.reference import NaiveGems
from tests.test_gems import SHAPES, Toy, guarded, schedule, step_of

RATE, SCALE = 2e-3, 1.5
KINDS = ("shared", "search", "recommendation")
BOTH = ("search", "recommendation")


class Pair:
    """One run twice: the product on float32 maps, the twin on a float64 copy of them."""

    def __init__(self, settings: GemsConfig) -> None:
        self.toy, self.own = Toy(SHAPES), Toy(SHAPES, torch.float64)
        # With more protected, fewer than 4 directions of the tall map are left and a basis is partly arbitrary.
        held = guarded(self.toy, k=2) if settings.null_space != "off" else {}
        falling = schedule(RATE, steps=30)  # the slope of a step hangs on that step's own rate
        self.step: GemsStep = step_of(self.toy, settings, protections=held, schedule=falling)
        weights = {name: module.weight.data for name, module in linear_maps(self.own).items()}
        self.twin = NaiveGems(
            weights,
            {name: one.basis for name, one in held.items()},
            {name: ranks_of(weight.shape, settings.rank or 4) for name, weight in weights.items()},
            {name: side_of(weight.shape, settings.side) for name, weight in weights.items()},
            None if settings.gate == "constant" else self.step.gate.mlp.phi,
            settings.refresh_every,
            settings.refresh_every if settings.gate_warmup is None else settings.gate_warmup,
            settings.refresh,
            settings.on_refresh,
            settings.gate_learning_rate,
            settings.shared_grad,
            settings.scale,
        )

    def take(self, present: tuple[str, ...] = BOTH, searches: float = 0.5) -> dict[str, float]:
        """One step of both; `searches` is the first objective's share of the targets where both are there."""
        shares: dict[str, float] = dict.fromkeys(present, 1.0)
        if len(present) > 1:
            shares = {"search": searches, "recommendation": 1 - searches}
        logs = self.step([SharedLosses({name: self.toy.loss(name) * shares[name] for name in present}, shares)])
        gradients, means = dict[str, dict[str, Tensor]](), dict[str, float]()
        for name in present:
            self.own.zero_grad()
            loss = self.own.loss(name)
            loss.backward()
            means[name] = float(loss.detach())
            gradients[name] = {own: _gradient(module.weight) for own, module in linear_maps(self.own).items()}
        self.twin.step(gradients, means, shares, logs["rate"], self.bases())
        return logs

    def bases(self) -> dict[tuple[str, str], Tensor]:
        """The product's, by map and subspace."""
        return {
            (name, kind): stack.basis[i][:, stack.part(number)]
            for stack in self.step.stacks
            for i, name in enumerate(stack.names)
            for number, kind in enumerate(KINDS[: len(stack.widths)])
        }

    def same(self) -> None:
        """Weights, counts and α are alike."""
        for name, value in self.toy.weights().items():
            own = self.twin.weights[name.removesuffix(".weight")].float()
            torch.testing.assert_close(value, own, atol=1e-5, rtol=0)
        for stack in self.step.stacks:
            assert stack.steps.tolist() == [self.twin.counts[kind] for kind in KINDS]


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad.clone()


def settings(**changes: Any) -> GemsConfig:
    own = {"rank": 4, "scale": SCALE, "stagger": False, "refresh_every": 5, "gate": "constant"}
    return GemsConfig(allow_large_state=True, **own, **changes)


@pytest.mark.parametrize("on_refresh", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("refresh", ["svd", "power"])
@pytest.mark.parametrize("side", ["short", "left", "right"])
def test_three_subspaces_move_the_weights_as_the_naive_twin_does(side: str, refresh: str, on_refresh: str) -> None:
    pair = Pair(settings(side=side, refresh=refresh, on_refresh=on_refresh))
    for _ in range(13):
        pair.take()
        pair.same()


@pytest.mark.parametrize("shared_grad", ["sum", "pooled", "normalised"])
def test_objectives_of_unlike_size_are_added_and_weighed_as_the_naive_twin_does(shared_grad: Any) -> None:
    own = settings(shared_grad=shared_grad).model_copy(
        update={"gate": "hypergradient", "gate_warmup": 2, "gate_learning_rate": 0.05}
    )
    pair = Pair(own)
    for number in range(13):
        logs = pair.take(searches=(0.1, 0.3, 0.8)[number % 3])
        pair.same()
        assert [logs[f"alpha/{name}"] for name in BOTH] == pytest.approx(pair.twin.alpha.tolist(), abs=1e-4)
        if pair.twin.slope is not None:
            assert [logs[f"hypergradient/{name}"] for name in BOTH] == pytest.approx(pair.twin.slope, rel=1e-3)
    assert pair.twin.taught == 10


def test_what_a_path_proposes_before_fusion_is_the_naive_twins_own_part() -> None:
    pair = Pair(settings())
    for _ in range(6):
        pair.take()
        found = own_updates(pair.step)
        for objective in BOTH:
            for name, part in found[objective].items():
                torch.testing.assert_close(part, -pair.twin.parts[objective][name].float(), atol=1e-3, rtol=0)
    alone = step_of(pair.toy)
    alone([{"recommendation": pair.toy.loss("recommendation")}])
    assert own_updates(alone) == own_updates(lambda _: {}) == {}  # no subspace of an objective's own


@pytest.mark.parametrize("null_space", ["off", "orthogonal"])
def test_the_gate_learns_as_the_naive_twin_does(null_space: str) -> None:
    own = settings(null_space=null_space).model_copy(
        update={"gate": "hypergradient", "gate_warmup": 2, "gate_learning_rate": 0.05}
    )
    pair = Pair(own)
    for _ in range(13):
        logs = pair.take()
        pair.same()
        assert [logs[f"alpha/{name}"] for name in BOTH] == pytest.approx(pair.twin.alpha.tolist(), abs=1e-4)
        if pair.twin.slope is not None:
            assert [logs[f"hypergradient/{name}"] for name in BOTH] == pytest.approx(pair.twin.slope, rel=1e-3)
    assert pair.twin.taught == 10
    assert abs(float(pair.twin.alpha[0]) - 0.5) > 0.02


def test_an_absent_objective_is_skipped_as_the_naive_twin_skips_it() -> None:
    pair = Pair(settings())
    for present in (BOTH, BOTH, ("recommendation",), BOTH, ("search",), ("recommendation",), BOTH, BOTH):
        pair.take(present)
        pair.same()
    assert list(pair.twin.counts.values()) == [8, 6, 7]


def test_a_step_of_one_objective_teaches_the_gate_nothing() -> None:
    pair = Pair(settings().model_copy(update={"gate": "hypergradient", "gate_warmup": 2}))
    for present in (*3 * [BOTH], ("recommendation",), BOTH):
        logs = pair.take(present)
    assert pair.twin.slope is None
    assert "hypergradient/search" not in logs
