"""The gate that asks another batch about a step before the step is final."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stages.dataset import load_dataset
from stages.jobs import Job
from stages.method_config import GemsConfig
from stages.train import begin_stage, train_stage, training_log
from tests import searching, tiny
from tests.test_gems import Toy, guarded, schedule, step_of

SHAPES = {"one": (10, 16), "two": (16, 16)}
BOTH = ("search", "recommendation")


def begun(
    settings: GemsConfig, monkeypatch: pytest.MonkeyPatch, added: Tensor | None = None, share: float = 0.5
) -> tuple[Toy, Any]:
    """A step whose held-out batch is the training batch, `share` of it searches; `added` is put on α."""
    toy = Toy(SHAPES)
    protected = guarded(toy) if settings.null_space != "off" else {}
    step = step_of(toy, settings, protections=protected, schedule=schedule(0.05))
    step.watch(lambda: toy.batch(share=share))
    if added is not None:
        true_alpha = step._alpha
        monkeypatch.setattr(step, "_alpha", lambda *a: true_alpha(*a) + added)
    return toy, step


@pytest.mark.parametrize("null_space", ["off", "orthogonal"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis_from", ["gradient", "gradient_in_null"])
def test_looking_ahead_gives_the_slope_of_the_step_itself_and_corrects_it(
    side: Any, null_space: Any, basis_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GemsConfig(rank=4, side=side, null_space=null_space, gate="lookahead", gate_warmup=0)
    settings = settings.model_copy(update={"basis_from": basis_from, "allow_large_state": True})
    still = settings.model_copy(update={"gate_learning_rate": 1e-12})  # learns nothing, and so corrects nothing

    def loss_after(added: Tensor) -> tuple[float, dict[str, float]]:
        toy, step = begun(still, monkeypatch, added)
        logs = step(toy.batch())
        exact = copy.deepcopy(toy).double()
        return float((exact.loss("search") + exact.loss("recommendation")).detach()), logs

    logs = loss_after(torch.zeros(2))[1]
    for place, objective in enumerate(BOTH):
        unit = 0.5 * torch.eye(2)[place]
        slope = loss_after(unit)[0] - loss_after(-unit)[0]  # exact: the loss is quadratic and the points are 1 apart
        assert logs[f"hypergradient/{objective}"] == pytest.approx(slope, rel=1e-3)

    toy, step = begun(settings.model_copy(update={"gate_learning_rate": 0.5}), monkeypatch)
    found = step(toy.batch())
    alpha = torch.tensor([found["alpha/search"], found["alpha/recommendation"]])
    assert float((alpha - 0.5).abs().max()) > 0.02
    assert float(alpha.sum()) == pytest.approx(1.0)
    uphill = "search" if found["hypergradient/search"] > found["hypergradient/recommendation"] else "recommendation"
    before = logs[f"alpha/{uphill}"]
    assert found[f"alpha/{uphill}"] < before  # the objective whose part costs more gets less
    twin, other = begun(settings.model_copy(update={"gate": "constant"}), monkeypatch, alpha - 0.5)
    other(twin.batch())
    for name, value in toy.weights().items():
        torch.testing.assert_close(twin.weights()[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("shared_grad", ["sum", "pooled", "normalised"])
def test_looking_ahead_asks_the_loss_whose_gradient_the_shared_subspace_takes(
    shared_grad: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GemsConfig(rank=4, null_space="off", gate="lookahead", gate_warmup=0, shared_grad=shared_grad)
    settings = settings.model_copy(update={"gate_learning_rate": 1e-12, "allow_large_state": True})

    def losses_after(added: Tensor) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        toy, step = begun(settings, monkeypatch, added, share)
        logs = step(toy.batch(share=share))
        exact = copy.deepcopy(toy).double()
        return {name: float(exact.loss(name).detach()) for name in BOTH}, logs, step._shared_factors(shares)

    shares = dict(zip(BOTH, (share, 1 - share), strict=True))
    _, logs, factors = losses_after(torch.zeros(2))
    for place, objective in enumerate(BOTH):
        unit = 0.5 * torch.eye(2)[place]
        there, back = losses_after(unit)[0], losses_after(-unit)[0]
        slope = sum(factors[name] * (there[name] - back[name]) for name in BOTH)
        assert logs[f"hypergradient/{objective}"] == pytest.approx(slope, rel=1e-3)


def test_a_held_out_batch_of_one_objective_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GemsConfig(rank=4, null_space="off", gate="lookahead", gate_warmup=0, allow_large_state=True)
    toy, step = begun(settings, monkeypatch)
    step.watch(lambda: [{"search": toy.loss("search")}])
    logs = step(toy.batch())
    assert "hypergradient/search" not in logs
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_alpha_is_one_half_and_nobody_is_asked_while_the_gate_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GemsConfig(rank=4, null_space="off", gate="lookahead", gate_warmup=2, allow_large_state=True)
    toy, step = begun(settings, monkeypatch)
    asked: list[int] = []
    step.watch(lambda: (asked.append(int(step.step)), toy.batch())[1])
    alphas = [step(toy.batch())["alpha/search"] for _ in range(4)]
    assert alphas[:2] == [0.5, 0.5]
    assert alphas[2] != 0.5
    assert asked == [2, 3]
    step([{"recommendation": toy.loss("recommendation")}])  # one objective leaves no choice to the gate
    assert asked == [2, 3]
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_in_the_loop_it_sees_batches_of_an_order_of_its_own_and_stays_reproducible(tmp_path: Path) -> None:
    own = GemsConfig(gate="lookahead", gate_warmup=0, gate_learning_rate=0.05)
    job, stored = Job("ahead", 0, "same_stage", 1), []
    for copied in ("a", "b"):
        config = tiny.config(training={"first_epochs": 1, "epochs": 2}).model_copy(update={"methods": {"ahead": own}})
        workspace = searching.ring(tmp_path / copied, stages=2)
        done = train_stage(config, workspace, job)
        stored.append((workspace.checkpoints / done.key / "backbone.safetensors").read_bytes())
    assert stored[0] == stored[1]
    rows = training_log(config, workspace, load_dataset(config, workspace), job)["training"]
    assert len({row["alpha/search"] for row in rows}) == len(rows)
    fit = begin_stage(config, workspace, load_dataset(config, workspace), job).fit
    ours, theirs = next(iter(fit.batches(1))), next(fit._other_batches())
    assert any(ours[name].tolist() != theirs[name].tolist() for name in ours)


def test_a_rescaled_update_cannot_be_corrected() -> None:
    with pytest.raises(ValidationError, match='or fuse_norm = "none"'):
        GemsConfig(gate="lookahead", fuse_norm="shared")
