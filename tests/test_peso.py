"""What PESO promises beyond what every method does: its term, its anchor and its two limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from regularizers.proximal import softmax_kl
from stages.checkpoint import ADAPTER, ROWS
from stages.config import Config
from stages.dataset import load_dataset
from stages.evaluate import evaluate_stage
from stages.jobs import Job
from stages.method_config import PesoConfig
from stages.methods import peso
from stages.train import train_stage, training_log
from stages.workspace import Workspace
from tests import tiny
from tests.tiny import folder, job

QUICK = {"training": {"first_epochs": 2, "epochs": 2}}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return tiny.checkerboard(tmp_path_factory.mktemp("board"))


def test_peso_with_strength_zero_is_single_bit_for_bit(board: Workspace) -> None:
    config = tiny.config(**QUICK).model_copy(update={"methods": {"unheld": PesoConfig(strength=0)}})
    for method in ("single", "unheld"):
        train_stage(config, board, job(method, 2))
    for stage in (1, 2):
        single, unheld = (folder(config, board, job(method, stage)) for method in ("single", "unheld"))
        for name in (ADAPTER, ROWS):
            assert (single / name).read_bytes() == (unheld / name).read_bytes()


def test_a_huge_strength_returns_the_previous_adapter(board: Workspace) -> None:
    held = PesoConfig(strength=1e6, scale="size")
    config = tiny.config(training={"epochs": 40, "weight_decay": 0.0, "token_rows": "freeze", "patience": 40})
    config = config.model_copy(update={"methods": {"held": held, "unheld": PesoConfig(strength=0)}})
    drift = {}
    for method in ("held", "unheld"):
        train_stage(config, board, job(method, 1))
        drift[method] = training_log(config, board, load_dataset(config, board), job(method, 1))["drift_centred_rms"]
    assert drift["held"] <= 0.1 * drift["unheld"]


def test_the_penalty_is_logged_and_its_ratio_is_that_of_two_separate_backwards() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (4, 3)}
    held = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    anchors = {name: value.detach().clone() for name, value in held.items()}
    settings = PesoConfig(strength=3.0, scale="size")
    penalty = peso.proximal_penalty(held, settings, modules=1)
    with torch.no_grad():
        for value in held.values():
            value.add_(torch.randn(value.shape, generator=generator))

    def losses() -> torch.Tensor:
        return sum((value.sin().sum() for value in held.values()), torch.zeros(()))

    def term() -> torch.Tensor:
        parts = [value.numel() * softmax_kl(value, anchors[name]) for name, value in held.items()]
        return settings.strength * torch.stack(parts).sum()

    ce = dict(zip(held, torch.autograd.grad(losses(), list(held.values())), strict=True))
    pull = dict(zip(held, torch.autograd.grad(term(), list(held.values())), strict=True))
    losses().backward()
    logs = penalty()
    ratio = (
        torch.cat([g.flatten() for g in pull.values()]).norm() / torch.cat([g.flatten() for g in ce.values()]).norm()
    )
    assert logs["grad_ratio"] == pytest.approx(float(ratio), rel=1e-4)
    assert logs["grad_ratio_max"] == pytest.approx(max(float(pull[n].norm() / ce[n].norm()) for n in held), rel=1e-4)
    assert logs["proximal_loss"] == pytest.approx(float(term().detach()), rel=1e-4)
    for name, value in held.items():  # added to the loss's own gradient, not put in its place
        torch.testing.assert_close(value.grad, ce[name] + pull[name], rtol=1e-4, atol=1e-6)


def test_a_stage_begins_at_its_anchor_and_the_term_grows_from_zero(board: Workspace) -> None:
    config = tiny.config(**QUICK)
    train_stage(config, board, job("peso_working", 1))
    rows = training_log(config, board, load_dataset(config, board), job("peso_working", 1))["training"]
    assert rows[0]["proximal_nats"] == 0.0
    assert rows[-1]["proximal_nats"] > 0


def test_the_penalty_is_evaluated_once_a_step_however_many_micro_batches(
    board: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    true_term = peso.proximal_term
    monkeypatch.setattr(peso, "proximal_term", lambda *a, **k: (calls.append(1), true_term(*a, **k))[1])
    settings = {**QUICK["training"], "micro_batch_size": 4, "targets_per_window": 7}
    config = tiny.config(training=settings)
    train_stage(config, board, job("peso_released", 1))
    steps = training_log(config, board, load_dataset(config, board), job("peso_released", 1))["training"]
    assert len(calls) == len(steps) == 2 * 2  # two epochs of 24 windows in batches of 16


def hits(config: Config, workspace: Workspace, own: Job, tested: int) -> float:
    result = evaluate_stage(config, workspace, own, tested=tested)
    return float(np.mean(pl.read_parquet(workspace.root / result.path)["hit_at_1"].to_numpy()))


def test_an_unanchored_adapter_follows_the_flip_and_a_huge_strength_keeps_the_old_rule(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=2, users=48)
    settings = {"first_epochs": 30, "epochs": 60, "patience": 60, "history_length": 4}
    settings |= {"token_rows": "freeze", "learning_rate": 2e-2}
    config = tiny.config(training=settings)
    held = {f"held_{power}": PesoConfig(strength=10.0**power, scale="size") for power in (-2, 6)}
    config = config.model_copy(update={"methods": held})
    scores = {}
    for method in ("single", *held):
        train_stage(config, workspace, job(method, 1))
        scores[method] = hits(config, workspace, job(method, 1), tested=1), hits(config, workspace, job(method, 1), 0)
    assert hits(config, workspace, job("frozen", 1), tested=0) >= 0.95
    assert scores["single"][0] >= 0.95
    assert scores["single"][1] <= 0.1
    assert scores["held_6"][0] <= 0.1
    assert scores["held_6"][1] >= 0.9
    assert scores["held_6"][0] <= scores["held_-2"][0] <= scores["single"][0]
