"""GEMS's step on small linear maps whose losses are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.input_moments import linear_maps
from regularizers.null_space import Protection
from regularizers.subspace import orthonormal
from stages.errors import UserError
from stages.method_config import GemsConfig
from stages.methods.contract import Schedule, SharedLosses
from stages.methods.gems_stack import split_parameters
from stages.methods.gems_step import GemsStep
from stages.methods.parts import rate_at

SHAPES = {"wide": (6, 20), "square": (12, 12), "tall": (20, 6), "capped": (3, 16)}
PLAIN = GemsConfig(rank=4, scale=1.0, null_space="off", gate="constant", allow_large_state=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def schedule(rate: float = 1e-2, steps: int = 10**6, decay: float = 0.0) -> Schedule:
    return Schedule(steps=steps, learning_rate=rate, warmup=0, weight_decay=decay, clip_norm=1.0, seed=3)


class Toy(nn.Module):
    """Independent linear maps; each objective wants a target matrix seen through its own inputs."""

    def __init__(self, shapes: dict[str, tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        self.goals: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"search": {}, "recommendation": {}}
        for place, (name, (m, n)) in enumerate(shapes.items()):
            self.maps[name] = nn.Linear(n, m, bias=False, dtype=dtype)
            with torch.no_grad():
                self.linear(name).weight.copy_(normal(m, n, seed=place) / 4)
            for kind, objective in enumerate(self.goals):
                seed = 100 + 10 * place + kind
                self.goals[objective][name] = normal(m, n, seed=seed), normal(n, 24, seed=seed + 50)

    def linear(self, name: str) -> nn.Linear:
        found = self.maps[name]
        assert isinstance(found, nn.Linear)
        return found

    def loss(self, objective: str, rows: slice = slice(None)) -> Tensor:
        """Mean over 24 examples of ½‖(W − target) x‖²."""
        parts = []
        for name, (target, inputs) in self.goals[objective].items():
            weight = self.linear(name).weight
            chosen = inputs[:, rows].to(weight.dtype)
            parts.append(((weight - target.to(weight.dtype)) @ chosen).square().sum() / (2 * 24))
        return torch.stack(parts).sum()

    def batch(self, share: float = 0.5, loud: float = 1.0) -> list[SharedLosses]:
        """One micro-batch as the loop gives it: each objective's mean times its share of the targets."""
        losses = {"search": loud * self.loss("search") * share}
        losses |= {"recommendation": self.loss("recommendation") * (1 - share)}
        return [SharedLosses(losses, {"search": share, "recommendation": 1 - share})]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.named_parameters()}


def step_of(toy: nn.Module, settings: GemsConfig = PLAIN, **changes: Any) -> GemsStep:
    maps, others = split_parameters(toy, toy)
    given = {"protections": {}, "schedule": schedule(), "rank": settings.rank or 4} | changes
    return GemsStep(maps, others, settings, **given)


def guarded(toy: nn.Module, k: int = 3) -> dict[str, Protection]:
    return {
        name: Protection(orthonormal(normal(module.in_features, min(k, module.in_features - 1), seed=9)), 0.9)
        for name, module in linear_maps(toy).items()
    }


@pytest.mark.parametrize("basis_from", ["gradient", "gradient_in_null"])
@pytest.mark.parametrize("side", ["short", "left", "right"])
def test_no_update_touches_the_protected_inputs(side: Any, basis_from: Any) -> None:
    toy = Toy(SHAPES)
    settings = PLAIN.model_copy(update={"null_space": "orthogonal", "side": side, "basis_from": basis_from})
    protected, before = guarded(toy), toy.weights()
    step = step_of(toy, settings, protections=protected)
    for _ in range(5):
        logs = step(toy.batch())
    assert logs["removed_share"] >= (0.05 if basis_from == "gradient" else -1e-6)
    for name, value in toy.weights().items():
        moved = value - before[name]
        assert float(moved.norm()) > 0.01
        assert float((moved @ protected[name.removesuffix(".weight")].basis).norm()) <= 1e-5 * float(moved.norm())


def test_the_printed_projector_moves_only_what_should_be_kept() -> None:
    toy = Toy(SHAPES)
    protected, before = guarded(toy), toy.weights()
    settings = PLAIN.model_copy(update={"null_space": "paper_literal"})
    step_of(toy, settings, protections=protected)(toy.batch())
    for name, value in toy.weights().items():
        moved, basis = value - before[name], protected[name.removesuffix(".weight")].basis
        assert float((moved - moved @ basis @ basis.T).norm()) <= 1e-5 * float(moved.norm())


def test_one_whole_subspace_with_the_identity_as_basis_is_adamw() -> None:
    toy, twin = Toy(SHAPES), Toy(SHAPES)
    settings = PLAIN.model_copy(update={"subspaces": "one", "rank": 12, "stagger": False})
    step = step_of(toy, settings, schedule=schedule(steps=60))
    step.step.fill_(1)
    for stack in step.stacks:
        assert stack.widths == (min(stack.rows, stack.cols),)
        stack.age.zero_()
    adamw = torch.optim.AdamW(twin.parameters(), weight_decay=0.0)
    for count in range(1, 51):
        step(toy.batch())
        adamw.param_groups[0]["lr"] = 1e-2 * rate_at(count, schedule(steps=60))
        adamw.zero_grad()
        (twin.loss("search") + twin.loss("recommendation")).backward()
        adamw.step()
    for name, value in toy.weights().items():
        torch.testing.assert_close(value, twin.weights()[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("null_space", ["off", "orthogonal"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis_from", ["gradient", "gradient_in_null"])
def test_the_gates_slope_is_that_of_the_loss_one_step_later(
    side: Any, null_space: Any, basis_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GemsConfig(rank=4, side=side, null_space=null_space, gate_warmup=0, allow_large_state=True)
    settings = settings.model_copy(update={"basis_from": basis_from})

    def run(change: Tensor, after: int) -> tuple[float, dict[str, float]]:
        toy = Toy({"one": (10, 16), "two": (16, 16)})
        step = step_of(toy, settings, protections=guarded(toy) if null_space != "off" else {}, schedule=schedule(0.05))
        true_alpha = step._alpha
        monkeypatch.setattr(step, "_alpha", lambda *a: true_alpha(*a) + change)
        logs: dict[str, float] = {}
        for _ in range(after):
            logs = step(toy.batch())
        exact = copy.deepcopy(toy).double()
        return float((exact.loss("search") + exact.loss("recommendation")).detach()), logs

    logs = run(torch.zeros(2), 2)[1]
    for place, objective in enumerate(("search", "recommendation")):
        unit = 0.5 * torch.eye(2)[place]
        slope = run(unit, 1)[0] - run(-unit, 1)[0]  # exact: the loss is quadratic and the two points are 1 apart
        assert logs[f"hypergradient/{objective}"] == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("gate", ["hypergradient", "frozen_mlp"])
def test_only_a_learning_gate_moves_its_weights(gate: Any) -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"gate": gate, "gate_warmup": 0}))
    before = step.gate.mlp.phi.clone()
    for _ in range(3):
        step(toy.batch())
    assert torch.equal(step.gate.mlp.phi, before) == (gate == "frozen_mlp")


def test_the_gate_rests_at_one_half_while_it_warms_up_and_then_learns() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"gate": "hypergradient", "gate_warmup": 3, "gate_learning_rate": 0.1}))
    phi = step.gate.mlp.phi.clone()
    alphas = [step(toy.batch())["alpha/search"] for _ in range(6)]
    assert alphas[:3] == [0.5, 0.5, 0.5]
    assert len(set(alphas)) == 4
    assert not torch.equal(step.gate.mlp.phi, phi)


def test_an_absent_objective_keeps_basis_moments_and_step_count_bit_for_bit() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"refresh_every": 3}))
    for _ in range(2):
        step(toy.batch())

    def part(number: int) -> list[Tensor]:
        held = [tensor for s in step.stacks for tensor in (s.basis, s.first, s.second)]
        return [
            t[..., s.part(number)].clone()
            for s, t in zip([s for s in step.stacks for _ in range(3)], held, strict=True)
        ]

    search, recommendation, counts = part(1), part(2), [stack.steps.tolist() for stack in step.stacks]
    for _ in range(4):  # refreshes fall due on the way
        logs = step([{"recommendation": toy.loss("recommendation")}])
    assert all(torch.equal(a, b) for a, b in zip(part(1), search, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(part(2), recommendation, strict=True))
    assert [stack.steps.tolist() for stack in step.stacks] == [[a + 4, b, c + 4] for a, b, c in counts]
    assert (logs["alpha/search"], logs["alpha/recommendation"]) == (0.0, 0.5)


def test_one_objective_alone_trains_the_shared_subspace_and_says_so() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy)
    before = float(toy.loss("recommendation").detach())
    for _ in range(20):
        logs = step([{"recommendation": toy.loss("recommendation")}])
    assert logs["single_objective"] == 1
    assert step.report()["gems"]["single_objective"]
    assert all(len(stack.widths) == 1 for stack in step.stacks)
    assert float(toy.loss("recommendation").detach()) < 0.9 * before
    logs = step(toy.batch())
    assert logs["single_objective"] == 0
    assert all(len(stack.widths) == 3 for stack in step.stacks)
    with pytest.raises(ValueError, match="a third objective, 'ads'"):
        step([{"ads": toy.loss("search")}])


@pytest.mark.parametrize(
    "cuts",
    [
        {"search": (0, 6, 12, 18, 24), "recommendation": (0, 6, 12, 18, 24)},
        {"search": (0, 3, 3, 20, 24), "recommendation": (0, 11, 15, 15, 24)},  # uneven, and some of one objective only
    ],
)
@pytest.mark.parametrize("shared_grad", ["sum", "pooled", "normalised"])
def test_four_micro_batches_are_one_of_their_examples(cuts: dict[str, tuple[int, ...]], shared_grad: Any) -> None:
    whole, parts, shares = Toy(SHAPES), Toy(SHAPES), {"search": 0.3, "recommendation": 0.7}
    settings = PLAIN.model_copy(update={"refresh_every": 3, "shared_grad": shared_grad})
    steps = [step_of(toy, settings, schedule=schedule(1e-3)) for toy in (whole, parts)]

    def piece(number: int) -> SharedLosses:
        rows = {name: slice(*own[number : number + 2]) for name, own in cuts.items() if own[number] < own[number + 1]}
        losses = {name: parts.loss(name, own) * shares[name] for name, own in rows.items()}
        return SharedLosses(losses, {name: shares[name] * (own.stop - own.start) / 24 for name, own in rows.items()})

    for _ in range(7):
        steps[0](whole.batch(share=0.3))
        steps[1](piece(number) for number in range(4))
    for name, value in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["sum", "pooled"])
def test_projecting_each_gradient_at_once_is_projecting_the_whole_shared_gradient(kind: Any) -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"shared_grad": kind, "subspaces": "one", "rank": 2}))
    step(toy.batch(share=0.25))
    twin = copy.deepcopy(toy)
    mix = (1.0, 1.0) if kind == "sum" else (0.25, 0.75)
    twin.zero_grad()
    (mix[0] * twin.loss("search") + mix[1] * twin.loss("recommendation")).backward()
    before = [(s.first.clone(), s.basis.clone()) for s in step.stacks]
    step(toy.batch(share=0.25))
    for stack, (first, basis) in zip(step.stacks, before, strict=True):
        for i, name in enumerate(stack.names):
            gradient = linear_maps(twin)[name].weight.grad
            assert gradient is not None
            taken = (stack.first[i] - 0.9 * first[i]) / 0.1
            torch.testing.assert_close(taken, stack.orient(gradient) @ basis[i], atol=1e-5, rtol=1e-5)


def test_one_subspace_has_nothing_to_weigh_and_logs_no_weights() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"subspaces": "one", "gate": "hypergradient", "gate_warmup": 0}))
    for _ in range(3):
        logs = step(toy.batch())
        assert not [name for name in logs if name.startswith(("alpha", "hypergradient", "overlap"))]
    assert logs["single_objective"] == 0.0
    assert all(stack.moved is None for stack in step.stacks)


@pytest.mark.parametrize("gate", ["constant", "released", "rule", "frozen_mlp", "hypergradient"])
def test_both_losses_fall_under_every_gate(gate: Any) -> None:
    toy = Toy(SHAPES)
    before = {name: float(toy.loss(name).detach()) for name in toy.goals}
    step = step_of(toy, PLAIN.model_copy(update={"gate": gate, "gate_warmup": 5, "refresh_every": 10}))
    for _ in range(60):
        step(toy.batch())
    assert all(float(toy.loss(name).detach()) < 0.8 * before[name] for name in toy.goals)


def test_half_a_square_falls_as_far_as_adam_takes_it() -> None:
    toy = nn.Linear(1, 1, bias=False)
    nn.init.ones_(toy.weight)
    step = step_of(nn.ModuleDict({"only": toy}), PLAIN.model_copy(update={"rank": 1}))
    for _ in range(50):
        step([{"recommendation": toy.weight.square().sum() / 2}])
    assert 0.1 < float(toy.weight.detach().square() / 2) < 0.2  # from 1/2; 50 moves of at most the rate reach 1/8


@pytest.mark.parametrize("subspaces", ["one", "three"])
def test_a_loud_objective_does_not_own_the_normalised_subspace(subspaces: Any) -> None:
    fallen = {}
    for kind in ("sum", "normalised"):
        toy = Toy({"tall": (20, 12)})
        settings = PLAIN.model_copy(update={"shared_grad": kind, "subspaces": subspaces, "rank": 2})
        step = step_of(toy, settings)
        before = float(toy.loss("recommendation").detach())
        for _ in range(60):
            step(toy.batch(loud=100.0))
        fallen[kind] = before - float(toy.loss("recommendation").detach())
    assert fallen["normalised"] > 0
    assert fallen["normalised"] > fallen["sum"]


def test_the_fused_update_is_as_long_as_its_shared_part_on_request() -> None:
    toy = Toy(SHAPES)
    before = toy.weights()
    step = step_of(toy, PLAIN.model_copy(update={"fuse_norm": "shared"}))
    logs = step(toy.batch())
    moved = torch.stack([(value - before[name]).norm() for name, value in toy.weights().items()]).norm()
    assert logs["update_over_shared"] > 1.05  # as it was before
    assert logs["update_norm"] == pytest.approx(float(moved), rel=1e-3)


def test_measured_lengths_are_those_of_the_update() -> None:
    toy = Toy(SHAPES)
    settings = PLAIN.model_copy(update={"null_space": "orthogonal", "basis_from": "gradient"})
    before = toy.weights()
    logs = step_of(toy, settings, protections=guarded(toy))(toy.batch())
    moved = torch.stack([(value - before[name]).norm() for name, value in toy.weights().items()]).norm()
    assert logs["update_norm"] == pytest.approx(float(moved), rel=1e-4)
    assert 0 < logs["removed_share"] < 1
    assert -1 <= logs["cosine_in_shared"] <= 1
    assert all(0 <= value <= 1 + 1e-5 for name, value in logs.items() if name.startswith("overlap/"))


def test_decay_pulls_back_to_the_start_but_not_inside_the_protected_space() -> None:
    toy = Toy(SHAPES)
    protected, before = guarded(toy), toy.weights()
    far = {}
    for decay in (0.0, 5.0):
        own = copy.deepcopy(toy)
        settings = PLAIN.model_copy(update={"null_space": "orthogonal", "weight_decay": "to_start_projected"})
        step = step_of(own, settings, protections=protected, schedule=schedule(decay=decay))
        for _ in range(30):
            step(own.batch())
        gaps = {name: value - before[name] for name, value in own.weights().items()}
        far[decay] = sum(float(gap.norm()) for gap in gaps.values())
        for name, gap in gaps.items():
            assert float((gap @ protected[name.removesuffix(".weight")].basis).norm()) <= 1e-5 * float(gap.norm())
    assert far[5.0] < 0.9 * far[0.0]


def test_a_gradient_that_is_no_number_names_map_objective_and_step() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy)
    step(toy.batch())
    losses = toy.batch()[0]
    toy.linear("tall").weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match=r"gradient of maps\.tall is not finite for objective 'search' at step 1"):
        step([losses])
