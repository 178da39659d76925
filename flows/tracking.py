"""MLflow's copy of a report: the only module that imports mlflow.

report.json is the truth and MLflow follows it, so recording the same report again changes nothing: a run is found by
its `driftrec.key`, and a point (key, step) that is there already is not logged twice, which MLflow would keep as two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.entities.run_inputs import RunInputs

from flows.reporting.charts import LIGHT, matrix_chart, matrix_name
from flows.reporting.findings import HEADLINE, Findings
from flows.reporting.insights import FIGURES, Insights
from stages.jobs import Checkpoint, Evaluation
from stages.workspace import Workspace, digest_of, read_json

PREFIX = {"same_stage": "test", "next_stage": "next"}
BATCH = 1000
"""Most metrics MLflow takes in one call."""
LARGEST_COPY = 64 * 2**20
"""Checkpoints above this many bytes are named by path and digest instead of copied."""
MOVEMENT = {
    "drift_rms": "drift/drift_rms",
    "drift_mean": "drift/drift_mean",
    "drift_centred_rms": "drift/drift_centred_rms",
    "token_row_drift": "drift/token_row_drift",
    "best_epoch": "drift/best_epoch",
}
"""What a checkpoint's state.json says of a whole stage, and its name here."""
ANALYSIS = "analysis/"
SERVER = "http://127.0.0.1:5000"


@dataclass(frozen=True)
class Point:
    """One number of a run; `step` is the tested or trained stage, a loss's training step, or its epoch."""

    key: str
    value: float
    step: int


@dataclass(frozen=True)
class Subject:
    """One method and seed of a report, with the files behind it."""

    method: str
    seed: int
    checkpoints: tuple[Checkpoint, ...]
    evaluations: tuple[Evaluation, ...]

    def key(self, stage: int | None = None) -> str:
        """Names the MLflow run: the same files give the same run, whichever report they are part of."""
        digests = [sorted(item.digest for item in items) for items in (self.checkpoints, self.evaluations)]
        return digest_of([1, self.method, self.seed, stage, *digests])[:32]


def record(
    report: dict[str, Any],
    workspace: Workspace,
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[Evaluation],
    folder: Path | None = None,
) -> str:
    """Record a report: a parent run for each method and seed, a child run for each stage.

    Args:
        report: contents of report.json.
        workspace: holds the store, the checkpoints and their training logs.
        checkpoints: everything trained for the report.
        evaluations: everything measured for it.
        folder: of the report; its page goes to every parent.

    Returns:
        Address of the ready-made chart, quality by stage with a line for each method.
    """
    client = MlflowClient(store(workspace))
    own = store(workspace) == workspace.mlflow_uri
    experiment = experiment_of(client, report["name"], workspace.mlflow_artifacts if own else None)
    book = Book(client, experiment, Findings(report), workspace, folder)
    for subject in subjects(checkpoints, evaluations):
        book.record(subject)
    return chart_address(experiment, SERVER if own else store(workspace))


def store(workspace: Workspace) -> str:
    """Address of the tracking store: MLFLOW_TRACKING_URI where the user set it, else the workspace's own SQLite."""
    return os.environ.get("MLFLOW_TRACKING_URI") or workspace.mlflow_uri


def answers(workspace: Workspace) -> bool:
    """Ask the tracking store for something small; whatever is wrong with it raises MLflow's own error."""
    MlflowClient(store(workspace)).search_experiments(max_results=1)
    return True


def subjects(checkpoints: Sequence[Checkpoint], evaluations: Sequence[Evaluation]) -> list[Subject]:
    """Methods × seeds, in the order of their evaluations."""
    places = dict.fromkeys((one.job.method, one.job.seed) for one in [*evaluations, *checkpoints])
    return [
        Subject(
            method,
            seed,
            tuple(one for one in checkpoints if (one.job.method, one.job.seed) == (method, seed)),
            tuple(one for one in evaluations if (one.job.method, one.job.seed) == (method, seed)),
        )
        for method, seed in places
    ]


def chart_address(experiment: str, server: str = SERVER) -> str:
    """Address in MLflow's UI of the parents' line charts."""
    wanted = quote('tags.role = "method"', safe="")
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?searchFilter={wanted}&compareRunsMode=CHART"


def experiment_of(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    """The experiment's id; a workspace that was moved gets a new one, or files would go to the old place.

    Args:
        client: of the store.
        name: of the experiment.
        artifacts: folder for its files; None leaves that to a server the user named.
    """
    place = artifacts.resolve() if artifacts is not None else None
    found = client.get_experiment_by_name(name)
    if found is not None and place is not None and found.artifact_location != place.as_uri():
        name = f"{name}-{digest_of(str(place))[:6]}"
        found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    # Without this tag the page opens among traces of language models, where no run is to be seen.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=place.as_uri() if place else None, tags=kind))


def points(findings: Findings, subject: Subject) -> list[Point]:
    """Every number of a method and seed by stage: the parent logs them with the stage as step, each child its own.

    `test/…` and `next/…` stand at the tested stage, `cost/…` at the trained one.
    """
    report = findings.report
    found = [
        Point(name, row["value"], row["stage"])
        for row in report["rows"]
        if row["method"] == subject.method
        and isinstance(row["stage"], int)
        and row["value"] is not None
        and (
            row["seed"] == subject.seed or (row["seed"] is None and subject.seed not in findings.seeds(subject.method))
        )
        and (name := _metric_name(findings, row))
    ]
    for row in report["costs"]:
        if (row["method"], row["seed"]) == (subject.method, subject.seed):
            place = "" if row["protocol"] == findings.leading_protocol else f"_{PREFIX[row['protocol']]}"
            costs = {"train_s": row["train_seconds"], "adapter_mb": _megabytes(row["bytes"])}
            costs |= {"queries_per_s": row.get("queries_per_second"), "trained_parameters": row["trained_parameters"]}
            costs["peak_mb"] = _megabytes(row["peak_memory_bytes"])
            found += [
                Point(f"cost/{name}{place}", value, row["stage"]) for name, value in costs.items() if value is not None
            ]
    return found


def _metric_name(findings: Findings, row: dict[str, Any]) -> str | None:
    """`test/hit_at_10`; slices and further objectives only for the headline metrics, or the charts drown."""
    if row["slice"] != "all" and row["metric"] not in HEADLINE:
        return None
    parts: list[str] = [PREFIX[row["protocol"]]]
    if row["objective"] != findings.leading_objective:
        parts.append(row["objective"])
    parts.append(row["metric"])
    return "/".join(parts if row["slice"] == "all" else [*parts, row["slice"]])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def _lasting(findings: Findings, subject: Subject, last: int) -> list[Point]:
    """The continual metrics: one number for the whole lineage, at its last stage; further objectives by name."""
    return [
        Point(f"forget/{'' if findings.is_about(row) else row['objective'] + '/'}{row['metric']}", row["value"], last)
        for row in findings.report["continual"]
        if (row["method"], row["seed"]) == (subject.method, subject.seed) and row["value"] is not None
    ]


@dataclass(frozen=True)
class Book:
    """One report being written into one experiment."""

    client: MlflowClient
    experiment: str
    findings: Findings
    workspace: Workspace
    folder: Path | None

    def record(self, subject: Subject) -> None:
        """Parent and children of one method and seed."""
        numbers = [*points(self.findings, subject), *self._movement(subject)]
        stages = sorted({point.step for point in numbers})
        parent = self._run(subject, None, {"role": "method"}, f"{subject.method} seed {subject.seed}")
        self._numbers(parent, [*numbers, *_lasting(self.findings, subject, max(stages, default=0))])
        self._matrix(parent, subject)
        self._analysis(parent, subject)
        if self.folder is not None and (self.folder / "report.html").exists():
            self.client.log_artifact(parent, str(self.folder / "report.html"))
        for stage in stages:
            own = [Point(point.key, point.value, 0) for point in numbers if point.step == stage]
            self._child(parent, subject, stage, own)
        self.client.set_terminated(parent)

    def _child(self, parent: str, subject: Subject, stage: int, finals: list[Point]) -> None:
        tags = {"role": "stage", "mlflow.parentRunId": parent}
        run = self._run(subject, stage, tags, f"{subject.method} seed {subject.seed} stage {stage}")
        trained = [checkpoint for checkpoint in subject.checkpoints if checkpoint.job.stage == stage]
        losses = [point for checkpoint in trained for point in self._losses(checkpoint, len(trained) > 1)]
        self._numbers(run, [*finals, *losses])
        self._datasets(run, stage)
        for checkpoint in trained:
            self._files(run, checkpoint)
        self.client.set_terminated(run)

    def _run(self, subject: Subject, stage: int | None, tags: dict[str, str], name: str) -> str:
        """The run of this subject (and stage): found by its key, or created."""
        key = subject.key(stage)
        found = self.client.search_runs([self.experiment], f'tags.`driftrec.key` = "{key}"', max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = self.client.create_run(self.experiment, run_name=name, tags=self._tags() | tags | {"driftrec.key": key})
        settings = (
            self.findings.report.get("settings", {}).get(subject.method, {}) if stage is None else {"stage": stage}
        )
        params = settings | {"method": subject.method, "seed": subject.seed}  # the name, which says more than the kind
        self.client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        return str(run.info.run_id)

    def _tags(self) -> dict[str, str]:
        report = self.findings.report
        tags = {
            f"digest.{name}": str(value)[:64] for name, value in report["digests"].items() if isinstance(value, str)
        }
        # The code that made the numbers, not the one that copies them here.
        tags["git.sha"] = report.get("command", {}).get("git_sha") or "not a git checkout"
        if report.get("sampled_users"):
            tags["sampled_users"] = str(report["sampled_users"])
        if self.folder is not None:
            tags["driftrec.report"] = self.folder.name
        return tags | flow_run_tags()

    def _numbers(self, run: str, wanted: Iterable[Point]) -> None:
        """Log the points that the run does not have yet, in as few calls as possible."""
        have = self._have(self.client.get_run(run))
        distinct = {(p.key, p.step): p for p in wanted}
        # An analysis may be made again, with other settings; everything else at a step never changes.
        missing = [
            point
            for place, point in distinct.items()
            if place not in have or (point.key.startswith(ANALYSIS) and have[place] != point.value)
        ]
        # One time for all: MLflow orders by step, and a repeated recording stays comparable.
        metrics = [Metric(point.key, float(point.value), 0, point.step) for point in missing]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run, metrics=metrics[start : start + BATCH])

    def _have(self, run: Run) -> dict[tuple[str, int], float]:
        history = self.client.get_metric_history
        return {(key, point.step): point.value for key in run.data.metrics for point in history(run.info.run_id, key)}

    def _losses(self, checkpoint: Checkpoint, several: bool) -> list[Point]:
        """Training numbers by optimiser step; the protocol is part of the name where a stage was trained for both."""
        state = self._state(checkpoint)
        place = f"{PREFIX[checkpoint.job.protocol]}/" if several else ""
        training = [
            # `ce` is cross-entropy alone, without what a method adds to it: comparable between methods.
            Point(f"train/{place}{'loss' if name == 'ce' else name}", float(value), int(row["step"]))
            for row in state.get("training", [])
            for name, value in row.items()
            if name != "step" and _is_number(value)
        ]
        validation = [
            Point(f"validation/{place}loss", float(row["validation_loss"]), int(row["epoch"]))
            for row in state.get("epochs", [])
            if _is_number(row["validation_loss"])
        ]
        return training + validation

    def _movement(self, subject: Subject) -> list[Point]:
        """How far each stage moved the weights, and after which epoch it stopped; named by protocol as the costs."""
        found = []
        for checkpoint in subject.checkpoints:
            leading = checkpoint.job.protocol == self.findings.leading_protocol
            place = "" if leading else f"_{PREFIX[checkpoint.job.protocol]}"
            state = self._state(checkpoint)
            found += [
                Point(name + place, float(state[key]), checkpoint.job.stage)
                for key, name in MOVEMENT.items()
                if _is_number(state.get(key))
            ]
        return found

    def _state(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """state.json, or nothing where nothing was trained: a frozen model's files and their log are stage 0's."""
        path = self.workspace.checkpoints / checkpoint.key / "state.json"
        return read_json(path) if checkpoint.targets > 0 and path.exists() else {}

    def _datasets(self, run: str, stage: int) -> None:
        inputs: RunInputs | None = self.client.get_run(run).inputs
        if inputs is not None and inputs.dataset_inputs:
            return
        datasets = [
            DatasetInput(_dataset(row), [InputTag("mlflow.data.context", "training")])
            for row in self.findings.report["stages"]
            if row["index"] == stage
        ]
        if datasets:
            self.client.log_inputs(run, datasets=datasets)

    def _files(self, run: str, checkpoint: Checkpoint) -> None:
        """The checkpoint of a stage; stage 0's is the base of all methods and is only named, as are large ones."""
        protocol = PREFIX[checkpoint.job.protocol]
        folder = self.workspace.checkpoints / checkpoint.key
        named = f"{folder.relative_to(self.workspace.root)} sha256:{checkpoint.digest}"
        self.client.log_batch(run, tags=[RunTag(f"checkpoint.{protocol}", named)])
        copied = checkpoint.job.stage > 0 and checkpoint.targets > 0 and checkpoint.bytes <= LARGEST_COPY
        if copied and folder.is_dir():
            self.client.log_artifacts(run, str(folder), artifact_path=f"checkpoint/{protocol}")

    def _matrix(self, run: str, subject: Subject) -> None:
        rows = [
            row
            for row in self.findings.report["matrix"]
            if (row["method"], row["seed"]) == (subject.method, subject.seed)
        ]
        if not rows:
            return
        columns = ["protocol", "objective", "metric", "trained", "tested", "value", "users"]
        # MLflow shows a JSON file of this form as a table.
        table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
        self.client.log_text(run, json.dumps(table), "eval_matrix.json")
        for objective in self.findings.objectives:
            figure = matrix_chart(self.findings, LIGHT, only=subject.method, objective=objective)
            if figure is not None:
                figure.set_facecolor("white")
                name = f"eval_{matrix_name(self.findings, objective)}.png"
                self.client.log_figure(run, figure, name, save_kwargs={"facecolor": "white"})

    def _analysis(self, run: str, subject: Subject) -> None:
        """What `driftrec analyse` found out about this method and seed, with all its figures."""
        stored = None if self.folder is None else self.folder / "analysis.json"
        if self.folder is None or stored is None or not stored.exists():
            return
        found = read_json(stored)
        if subject.seed != found["seed"] or subject.method not in found["methods"]:
            return
        wanted = Insights(found).points(subject.method)
        self._numbers(run, [Point(ANALYSIS + name, value, stage) for name, value, stage in wanted])
        for path in [stored, *(self.folder / "figures" / f"{name}-light.svg" for name in FIGURES)]:
            if path.exists():
                self.client.log_artifact(run, str(path), artifact_path="analysis")


def _dataset(row: dict[str, Any]) -> Dataset:
    profile = {"num_rows": row["events"], "users": row["users"], "items": row["items"]}
    return Dataset(
        name=f"stage {row['index']}",
        digest=row["digest"][:32],
        source_type="local",
        source=json.dumps({"uri": row["path"]}),
        profile=json.dumps(profile),
    )


def flow_run_tags() -> dict[str, str]:
    """Prefect's id and name of the flow run we are in, if we are in one."""
    from prefect.runtime import flow_run

    identity = flow_run.id
    return {"prefect.flow_run_id": identity, "prefect.flow_run": flow_run.name or ""} if identity else {}
