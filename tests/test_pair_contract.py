"""Promises of the methods for two objectives, kept on a log that holds both."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from stages.checkpoint import BACKBONE, KEPT, tensors_digest
from stages.commit import checkpoint_folder
from stages.config import Config
from stages.dataset import load_dataset
from stages.jobs import Job
from stages.method_config import GemsConfig
from stages.methods.gems_step import GemsStep
from stages.train import begin_stage, restore_model, train_stage, training_log
from stages.workspace import Workspace
from tests import searching, tiny

METHODS = (
    "gems",
    "gems_carry",
    "gems_pooled",
    "gems_lookahead_gate",
    "galore",
    "pcgrad",
    "ortho_lora",
    "osf",
    "lora_moe",
)
BOTH = {"search", "recommendation"}
CONFIG = tiny.config(training={"first_epochs": 2, "epochs": 2})


def job(method: str, stage: int) -> Job:
    return Job(method, 0, "same_stage", stage)


def folder(config: Config, workspace: Workspace, own: Job) -> Path:
    return checkpoint_folder(config, workspace, load_dataset(config, workspace), own)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return searching.ring(tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_no_later_event_changes_them(
    method: str, ring: Workspace, tmp_path: Path
) -> None:
    other = searching.ring(tmp_path / "other")
    events = pl.read_parquet(other.stage_file(2))
    events.filter(pl.col("user_id") != "s2u003").write_parquet(other.stage_file(2))
    digests: list[list[str]] = []
    for workspace in (ring, other):
        train_stage(CONFIG, workspace, job(method, 2))
        digests.append([tensors_digest(folder(CONFIG, workspace, job(method, stage))) for stage in (1, 2)])
    assert digests[0][0] == digests[1][0]
    assert digests[0][1] != digests[1][1]
    state = training_log(CONFIG, ring, load_dataset(CONFIG, ring), job(method, 2))
    assert {name.removeprefix("ce/") for row in state["training"] for name in row if name.startswith("ce/")} == BOTH


@pytest.mark.parametrize("method", METHODS)
def test_the_model_that_is_put_together_is_the_one_the_stage_starts_from(method: str, ring: Workspace) -> None:
    train_stage(CONFIG, ring, job(method, 1))
    dataset = load_dataset(CONFIG, ring)
    tokens = torch.arange(24).reshape(2, 12) % 9
    probes = []
    for _ in range(2):
        model = restore_model(CONFIG, ring, dataset, job(method, 1))
        with torch.no_grad():
            probes.append(model.logits(model.hidden(tokens)))
    first = restore_model(CONFIG, ring, dataset, job("first", 0))
    with torch.no_grad():
        start = first.logits(first.hidden(tokens))
    assert torch.equal(probes[0], probes[1])
    assert float((probes[0] - start).abs().max()) > 1e-4


@pytest.mark.parametrize("method", ["gems", "gems_carry", "gems_lookahead_gate"])
def test_three_subspaces_are_open_and_both_objectives_have_theirs(method: str, ring: Workspace) -> None:
    train_stage(CONFIG, ring, job(method, 2))
    state = training_log(CONFIG, ring, load_dataset(CONFIG, ring), job(method, 2))
    assert set(state["gems"]["objectives"]) == BOTH
    assert not state["gems"]["single_objective"]
    assert "overlap/search_recommendation" in state["training"][-1]
    stored = {path.name for path in folder(CONFIG, ring, job(method, 2)).glob("*.safetensors")}
    assert BACKBONE in stored
    assert (KEPT in stored) is (method == "gems_carry")


def test_a_stage_without_searches_is_one_objective_for_a_carried_state_too(tmp_path: Path) -> None:
    workspace = searching.ring(tmp_path)
    events = pl.read_parquet(workspace.stage_file(2))
    events.filter(pl.col("event") == "recommendation").write_parquet(workspace.stage_file(2))
    train_stage(CONFIG, workspace, job("gems_carry", 2))
    state = training_log(CONFIG, workspace, load_dataset(CONFIG, workspace), job("gems_carry", 2))
    assert state["gems"]["objectives"] == ["recommendation"]
    assert state["gems"]["subspaces"] == ["search", "recommendation"]
    assert state["gems"]["single_objective"]


def test_what_gems_takes_of_a_batch_in_the_loop_does_not_hang_on_the_size_of_its_micro_batches(ring: Workspace) -> None:
    train_stage(CONFIG, ring, job("gems", 1))
    taken: list[list[torch.Tensor]] = []
    told: list[dict[str, float]] = []
    for size, pieces in ((16, 1), (3, 6)):
        fit = begin_stage(CONFIG, ring, load_dataset(CONFIG, ring), job("gems", 1)).fit
        fit.settings = fit.settings.model_copy(update={"micro_batch_size": size})
        chosen = next(iter(fit.batches(1)))
        assert len(list(fit.losses(chosen))) == pieces
        told.append(fit.step(fit.losses(chosen)))
        assert isinstance(fit.step, GemsStep)
        for stack in fit.step.stacks:  # the first moments are a tenth of the first gradient, seen from the subspaces
            parts = [stack.part(number) for number in range(3)]
            taken.append([10 * stack.first[..., part] @ stack.basis[..., part].mT for part in parts])
    del told[0]["refresh_seconds"], told[1]["refresh_seconds"]
    assert told[1] == pytest.approx(told[0], rel=1e-5)
    half = len(taken) // 2
    torch.testing.assert_close(taken[half:], taken[:half], atol=1e-5, rtol=0)


def test_a_rank_above_a_matrix_is_said_when_a_stage_begins(ring: Workspace) -> None:
    big = GemsConfig(rank=64, allow_large_state=True)
    config = CONFIG.model_copy(update={"methods": {"big": big}})
    with pytest.warns(UserWarning, match="gems: rank 64 exceeds") as caught:
        train_stage(config, ring, job("big", 1))
    said = sorted(str(warning.message) for warning in caught)
    assert said == [
        "gems: rank 64 exceeds 2 matrices of 32 x 64: 2 of their 6 subspaces are capped at 32",
        "gems: rank 64 exceeds 4 matrices of 64 x 32: 4 of their 12 subspaces are capped at 32",
        "gems: rank 64 exceeds 8 matrices of 32 x 32: 8 of their 24 subspaces are capped at 32",
    ]
