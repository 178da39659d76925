"""GEMS's step where objectives arrive late, bases are refreshed and state is carried over."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from regularizers.subspace import overlap
from stages.method_config import GemsConfig
from stages.methods.contract import SharedLosses
from stages.methods.gems_step import GemsStep
from tests.test_gems import PLAIN, SHAPES, Toy, schedule, step_of

BOTH = ("recommendation", "search")


def alone(toy: Toy, objective: str, loud: float = 1.0) -> list[SharedLosses]:
    return [SharedLosses({objective: loud * toy.loss(objective)}, {objective: 1.0})]


def pieces(toy: Toy, count: int) -> list[SharedLosses]:
    """A batch of both objectives in micro-batches; 24 examples are cut evenly."""
    cuts = [slice(i * 24 // count, (i + 1) * 24 // count) for i in range(count)]
    shares = dict.fromkeys(BOTH, 0.5 / count)
    return [SharedLosses({name: toy.loss(name, rows) * 0.5 for name in BOTH}, shares) for rows in cuts]


@pytest.mark.parametrize("first", BOTH)
def test_a_loud_objective_is_normalised_whichever_comes_first(first: str) -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"shared_grad": "normalised", "refresh_every": 1000}))
    step(alone(toy, first, 100.0 if first == "search" else 1.0))
    before = float(step.norms[0])
    for _ in range(3):
        logs = step(toy.batch(loud=100.0))
    assert before > 0
    assert step.objectives == ["search", "recommendation"]
    assert float(step.norms[0]) > 10 * float(step.norms[1]) > 0
    assert logs["update_over_shared"] < 3
    assert all(stack.second.isfinite().all() for stack in step.stacks)


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_do_not_matter_at_the_step_where_a_second_objective_arrives(count: int) -> None:
    def run(parts: int) -> tuple[GemsStep, dict[str, Tensor]]:
        toy = Toy(SHAPES)
        step = step_of(toy, PLAIN.model_copy(update={"refresh_every": 1000}), schedule=schedule(1e-2))
        step(alone(toy, "recommendation"))
        for _ in range(3):
            step(pieces(toy, parts))
        return step, toy.weights()

    (one, whole), (many, cut) = run(1), run(count)
    assert [s.steps.tolist() for s in one.stacks] == [s.steps.tolist() for s in many.stacks] == [[4, 3, 2]] * 4
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-5, rtol=0)


def test_moments_that_start_anew_are_unbiased_anew() -> None:
    lengths = {}
    for how in ("rotate", "reset"):
        toy = Toy(SHAPES)
        settings = PLAIN.model_copy(
            update={"on_refresh": how, "refresh_every": 40, "stagger": False, "subspaces": "one"}
        )
        step = step_of(toy, settings, schedule=schedule(1e-6))
        lengths[how] = [step(toy.batch())["update_norm"] for _ in range(50)]
    # The gradient hardly changes at such a rate: Adam's step stays as long as its first one.
    assert max(lengths["rotate"]) == pytest.approx(min(lengths["rotate"]), rel=0.05)
    assert lengths["reset"] == pytest.approx(lengths["rotate"], rel=0.05)


def test_whole_gradients_are_held_at_a_refresh_only() -> None:
    toy = Toy({"a": (16, 16), "b": (16, 16), "c": (16, 16)})
    settings = PLAIN.model_copy(update={"stagger": False, "refresh_every": 3})
    weights = [toy.linear(name).weight for name in "abc"]
    sets: list[float] = []
    running: list[GemsStep] = []

    def seen(_: Tensor) -> None:
        grads = sum(w.grad.nbytes for w in weights if w.grad is not None)
        sets[-1] = max(sets[-1], (grads + running[0].whole_bytes()) / sum(w.nbytes for w in weights))

    for weight in weights:
        weight.register_post_accumulate_grad_hook(seen)
    running.append(step_of(toy, settings))
    for _ in range(4):
        sets.append(0.0)
        running[0](pieces(toy, 2))
        assert running[0].whole_bytes() == 0
        assert all(weight.grad is None for weight in weights)
    assert sets == pytest.approx([2 + 1 / 3, 1 / 3, 1 / 3, 2 + 1 / 3])


def test_weights_do_not_keep_a_step_alive() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy)
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    toy.loss("search").backward()
    assert toy.linear("tall").weight.grad is not None  # nobody takes it any more


def test_a_carried_step_of_one_objective_leaves_the_specific_subspaces_alone_until_the_other_comes() -> None:
    toy = Toy(SHAPES)
    settings = PLAIN.model_copy(update={"carry_state": True, "refresh_every": 1000})
    before = step_of(toy, settings)
    for _ in range(3):
        before(toy.batch())
    held = before.tensors()
    step = step_of(copy.deepcopy(toy), settings)
    step.load(held, before.objectives, carry=True)

    def specific() -> list[Tensor]:
        return [part[..., s.part(0).stop :].clone() for s in step.stacks for part in (s.basis, s.first, s.second)]

    kept = specific()
    for _ in range(2):
        logs = step(alone(toy := _own(step, toy), "recommendation"))
    assert logs["single_objective"] == 1
    assert step.report()["gems"]["objectives"] == ["recommendation"]
    assert step.report()["gems"]["subspaces"] == ["search", "recommendation"]
    assert all(torch.equal(a, b) for a, b in zip(specific(), kept, strict=True))
    logs = step(toy.batch())
    assert logs["single_objective"] == 0
    logs = step(toy.batch())  # the objective met first is collected before the other is known
    assert not any(torch.equal(a, b) for a, b in zip(specific(), kept, strict=True))


def _own(step: GemsStep, like: Toy) -> Toy:
    """The toy whose weights `step` moves."""
    toy = copy.deepcopy(like)
    for stack in step.stacks:
        for name, weight in zip(stack.names, stack.weights, strict=True):
            toy.linear(name.rpartition(".")[2]).weight = weight  # pyright: ignore[reportAttributeAccessIssue]
    return toy


def test_specific_bases_are_kept_apart_from_the_shared_one_on_request() -> None:
    found = {}
    for separate in (False, True):
        toy = Toy({"w": (16, 24)})
        step = step_of(toy, PLAIN.model_copy(update={"separate": separate, "rank": 4}))
        step(toy.batch())
        (stack,) = step.stacks
        found[separate] = float(overlap(stack.basis[0][:, stack.part(0)], stack.basis[0][:, stack.part(1)]))
    assert found[True] < 1e-6 < 0.1 < found[False]


@pytest.mark.parametrize("stagger", [False, True])
def test_refreshes_are_spread_over_the_steps_or_fall_together(stagger: bool) -> None:
    toy = Toy({"a": (8, 8), "b": (8, 8), "c": (8, 8), "d": (8, 8)})
    step = step_of(toy, PLAIN.model_copy(update={"stagger": stagger, "refresh_every": 4}))
    turned = []
    for _ in range(9):
        before = torch.cat([stack.basis for stack in step.stacks])
        step(toy.batch())
        after = torch.cat([stack.basis for stack in step.stacks])
        turned.append(sum(not torch.equal(a, b) for a, b in zip(before[..., :4], after[..., :4], strict=True)))
    assert turned == ([4, 1, 1, 1, 1, 1, 1, 1, 1] if stagger else [4, 0, 0, 0, 4, 0, 0, 0, 4])


def test_settings_name_the_gates_that_learn() -> None:
    from regularizers.gate import LEARNED

    for gate in ("constant", "released", "rule", "frozen_mlp", "hypergradient", "lookahead"):
        values: dict[str, Any] = {"gate": gate, "fuse_norm": "shared"}
        if gate in LEARNED:
            with pytest.raises(ValueError, match="learns from an update"):
                GemsConfig(**values)
        else:
            assert GemsConfig(**values).gate == gate
