from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows import steps, tracking
from flows.reporting import stored
from stages.jobs import Checkpoint, Evaluation, Job
from stages.workspace import Workspace, write_json
from tests.test_report import with_searches

METHODS = ("frozen", "single", "popularity")
PROXIMAL = {"proximal_nats": 2e-5, "proximal_loss": 1e-3, "grad_ratio": 0.3, "grad_ratio_max": 0.9}
STATE = {
    "schema": 1,
    "seconds": 1.0,
    "training": [
        {"step": step, "ce/recommendation": 3.0 - step, "ce": 3.0 - step, "gradient_norm": 0.5, **PROXIMAL}
        for step in range(3)
    ],
    "epochs": [{"epoch": epoch, "validation_loss": 2.5 - epoch / 2} for epoch in range(3)],
    "best_epoch": 2,
    "drift_rms": 0.004,
    "drift_mean": -0.001,
    "drift_centred_rms": 0.003,
    "token_row_drift": 0.02,
}
"""What the training loop writes, with invented numbers."""


def checkpoint(method: str, stage: int, workspace: Workspace) -> Checkpoint:
    """A committed stage whose files are invented; the frozen model's later stages train nothing."""
    job = Job(method, 0, "same_stage", stage)
    idle = method == "frozen" and stage > 0
    key = "first" if stage == 0 or idle else f"{method}-{stage}"
    folder = workspace.checkpoints / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    write_json(folder / "state.json", STATE)
    return Checkpoint(job, key, key.encode().hex(), 1.0, 0 if idle else 10, 200, 10**6, 0 if idle else 50, idle)


def evaluation(method: str, stage: int) -> Evaluation:
    digest = f"{method}{stage}".encode().hex()
    return Evaluation(Job(method, 0, "same_stage", stage), stage, f"{digest}.parquet", digest, 0.1, 9, False)


@pytest.fixture
def small_report(invented_report: dict[str, Any]) -> dict[str, Any]:
    """The invented report cut to two trained methods, a baseline, one protocol, two stages and one seed."""
    kept = {"protocol": "same_stage"}
    for part in ("rows", "matrix", "costs", "continual"):
        invented_report[part] = [
            row
            for row in invented_report[part]
            if row["method"] in METHODS
            and row.get("protocol", "same_stage") == kept["protocol"]
            and row["seed"] != 1
            and row.get("stage") in (0, 1, "mean", None)
        ]
    return invented_report


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new tracking database; making its tables takes seconds, copying it none."""
    found = Workspace(tmp_path_factory.mktemp("store"))
    MlflowClient(found.mlflow_uri).search_experiments()
    return found.root / "mlflow.db"


@pytest.fixture
def files(workspace: Workspace, empty_store: Path) -> tuple[list[Checkpoint], list[Evaluation]]:
    shutil.copyfile(empty_store, workspace.root / "mlflow.db")
    trained = [checkpoint(method, stage, workspace) for method in ("frozen", "single") for stage in (0, 1)]
    return trained, [evaluation(method, stage) for method in METHODS for stage in (0, 1)]


def runs(workspace: Workspace, role: str) -> dict[str, Run]:
    client = MlflowClient(workspace.mlflow_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'invented'")
    found = client.search_runs([experiment.experiment_id], f'tags.role = "{role}"')
    return {str(run.info.run_name): run for run in found}


def history(workspace: Workspace, run: Run, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(workspace.mlflow_uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_parents_draw_quality_by_stage_and_children_hold_the_same_numbers(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    chart = tracking.record(small_report, workspace, *files)
    parents, children = runs(workspace, "method"), runs(workspace, "stage")
    assert set(parents) == {f"{method} seed 0" for method in METHODS}
    assert len(children) == 6
    wanted = {
        row["stage"]: row["value"]
        for row in small_report["rows"]
        if (row["method"], row["seed"], row["slice"], row["metric"]) == ("single", 0, "all", "hit_at_10")
    }
    drawn = dict(history(workspace, parents["single seed 0"], "test/hit_at_10"))
    assert drawn == pytest.approx({stage: wanted[stage] for stage in (0, 1)})
    assert parents["single seed 0"].data.params == {"method": "single", "seed": "0", "strength": "0.5"}
    for stage in (0, 1):
        child = children[f"single seed 0 stage {stage}"]
        assert child.data.tags["mlflow.parentRunId"] == parents["single seed 0"].info.run_id
        assert child.data.params == {"method": "single", "seed": "0", "stage": str(stage)}
        for key, value in child.data.metrics.items():
            if not key.startswith(("train/", "validation/")):
                assert dict(history(workspace, parents["single seed 0"], key))[stage] == value
    assert 'tags.role = "method"' in unquote(chart)
    assert "compareRunsMode=CHART" in chart


def test_recording_twice_adds_no_run_and_no_point(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    first = tracking.record(small_report, workspace, *files)
    before = runs(workspace, "method") | runs(workspace, "stage")
    assert tracking.record(small_report, workspace, *files) == first
    after = runs(workspace, "method") | runs(workspace, "stage")
    assert {run.info.run_id for run in after.values()} == {run.info.run_id for run in before.values()}
    for run in after.values():
        assert len(run.inputs.dataset_inputs) == ("stage" in run.data.params)
        for key in ("test/hit_at_10", "train/loss", "forget/bwt"):
            steps_logged = [step for step, _ in history(workspace, run, key)]
            assert len(steps_logged) == len(set(steps_logged))


def test_a_recording_that_was_cut_off_is_completed(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    half = small_report | {"rows": [row for row in small_report["rows"] if row["stage"] == 0]}
    tracking.record(half, workspace, *files)
    tracking.record(small_report, workspace, *files)
    assert [step for step, _ in history(workspace, runs(workspace, "method")["single seed 0"], "test/hit_at_10")] == [
        0,
        1,
    ]


def test_other_results_are_another_run(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    trained, tests = files
    subject = tracking.subjects(trained, tests)[0]
    changed = tracking.subjects(trained, [replace(tests[0], digest="other"), *tests[1:]])[0]
    assert subject.key() != changed.key()
    assert subject.key(0) != subject.key(1)
    assert tracking.subjects(trained, tests[::-1])[-1].key() == subject.key()


def test_training_curves_data_sets_files_and_matrix_stand_where_they_belong(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    tracking.record(small_report, workspace, *files)
    client = MlflowClient(workspace.mlflow_uri)
    children = runs(workspace, "stage")
    trained = children["single seed 0 stage 1"]
    assert history(workspace, trained, "train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert history(workspace, trained, "train/proximal_nats") == [(step, 2e-5) for step in range(3)]
    assert history(workspace, trained, "validation/loss") == [(0, 2.5), (1, 2.0), (2, 1.5)]
    assert history(workspace, children["frozen seed 0 stage 1"], "train/loss") == []
    (data,) = trained.inputs.dataset_inputs
    assert data.dataset.digest == small_report["stages"][1]["digest"][:32]
    assert json.loads(data.dataset.source) == {"uri": "stages/stage=01/events.parquet"}
    kept = {file.path for file in client.list_artifacts(trained.info.run_id, "checkpoint/test")}
    assert kept == {"checkpoint/test/adapter_config.json", "checkpoint/test/state.json"}
    base = children["single seed 0 stage 0"]
    assert client.list_artifacts(base.info.run_id, "checkpoint") == []
    assert base.data.tags["checkpoint.test"] == f"runs/checkpoints/first sha256:{b'first'.hex()}"
    parent = runs(workspace, "method")["single seed 0"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"eval_matrix.json", "eval_matrix.png"}


def test_numbers_over_stages_and_matrix_of_searches_stand_beside_those_of_recommendation(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    tracking.record(with_searches(small_report), workspace, *files)
    parent = runs(workspace, "method")["single seed 0"]
    (bwt,) = [row for row in small_report["continual"] if (row["method"], row["metric"]) == ("single", "bwt")]
    assert [value for _, value in history(workspace, parent, "forget/bwt")] == [bwt["value"]]
    assert [value for _, value in history(workspace, parent, "forget/search/bwt")] == [bwt["value"] / 2]
    files_of = {file.path for file in MlflowClient(workspace.mlflow_uri).list_artifacts(parent.info.run_id)}
    assert files_of >= {"eval_matrix.png", "eval_matrix_search.png"}


def test_how_far_each_stage_moved_stands_by_stage_and_a_frozen_model_did_not_move(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    tracking.record(small_report, workspace, *files)
    parents, children = runs(workspace, "method"), runs(workspace, "stage")
    for name in ("drift_rms", "drift_mean", "drift_centred_rms", "token_row_drift", "best_epoch"):
        moved = float(str(STATE[name]))
        assert history(workspace, parents["single seed 0"], f"drift/{name}") == [(0, moved), (1, moved)]
        assert history(workspace, parents["frozen seed 0"], f"drift/{name}") == [(0, moved)]
        assert history(workspace, children["single seed 0 stage 1"], f"drift/{name}") == [(0, moved)]


def test_the_revision_is_the_one_that_made_the_numbers(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    tracking.record(small_report, workspace, *files)
    tags = [run.data.tags["git.sha"] for run in runs(workspace, "method").values()]
    assert tags == ["d" * 40] * len(METHODS)


def test_files_stay_in_the_workspace_even_after_it_was_moved(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]], tmp_path: Path
) -> None:
    tracking.record(small_report, workspace, *files)
    moved = Workspace(tmp_path / "moved")
    workspace.root.rename(moved.root)
    tracking.record(small_report, moved, *files)
    assert not workspace.root.exists()
    names = {found.name for found in MlflowClient(moved.mlflow_uri).search_experiments()}
    assert any(name.startswith("invented-") for name in names)


def test_a_report_without_any_test_is_recorded_with_its_costs_alone(
    small_report: dict[str, Any], workspace: Workspace, files: tuple[list[Checkpoint], list[Evaluation]]
) -> None:
    trained, tests = files
    untested = small_report | {part: [] for part in ("rows", "differences", "matrix", "continual", "oracle")}
    tracking.record(untested, workspace, trained, tests)
    parents = runs(workspace, "method")
    assert parents.keys() == {f"{name} seed 0" for name in METHODS}
    single = parents["single seed 0"].data.metrics
    assert {"cost/train_s", "drift/drift_rms"} <= single.keys()
    assert not any(key.startswith(("test/", "next/", "forget/")) for key in single)
    assert "train/loss" in runs(workspace, "stage")["single seed 0 stage 1"].data.metrics


def test_a_tracking_store_that_fails_costs_a_warning_and_no_report(
    small_report: dict[str, Any],
    workspace: Workspace,
    files: tuple[list[Checkpoint], list[Evaluation]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = workspace.reports / "a"
    write_json(folder / "report.json", small_report)
    trained, tests = files
    write_json(folder / "jobs.json", steps.jobs_of(tests, trained))
    (workspace.root / "mlflow.db").write_text("this is no database, only a file in its place" * 40)
    assert steps.record(workspace, folder) is None
    assert "driftrec report" in caplog.text
    (workspace.root / "mlflow.db").unlink()
    assert steps.record(workspace, folder) == stored.recorded_chart(folder)
