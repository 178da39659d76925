"""The steps of every flow as plain functions: they work without Prefect, and exchange only small frozen values."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import experiment, machine, mirror
from flows.plan import Plan
from flows.terminal import watcher
from flows.workers import fitting
from stages.backbone_shape import check_methods
from stages.config import load_config
from stages.jobs import Checkpoint, Evaluation, Job, Pin
from stages.left_overs import sweep
from stages.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("flows.steps")


def make_plan(
    config: Path | str,
    workspace: Path | str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    stages: int | None = None,
    users: int | None = None,
    comparison: bool = True,
    workers: int | None = 1,
    profile: bool = False,
) -> Plan:
    """Read the config, apply a command's wishes, and claim the workspace.

    See `draft_plan` for the other arguments and errors.

    Args:
        profile: also write where the time of every stage's training goes; the run then works alone, without helpers.

    Raises:
        UserError: also where the workspace belongs to another experiment or other data.
    """
    workers = 1 if profile else workers
    place = None if workspace is None else Path(workspace)
    plan = claimed(draft_plan(Path(config), place, methods, seeds, stages, users, comparison, workers))
    return replace(plan, profile=profile)


def draft_plan(
    config: Path,
    workspace: Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    stages: int | None = None,
    users: int | None = None,
    comparison: bool = True,
    workers: int | None = 1,
) -> Plan:
    """A command's request, checked; nothing is written yet, so this may happen before the workspace is locked.

    Args:
        config: TOML file.
        workspace: overrides the config's.
        methods: names; absent: the config's `compare`.
        seeds: absent: the config's.
        stages: only the first so many.
        users: only a seeded sample of so many test users; every output says so.
        comparison: baselines and R[i][j] belong to it.
        workers: processes that share the work; None: as many as suit the machine and the backbone.

    Raises:
        UserError: config or method is not usable.
    """
    settings = load_config(Path(config))
    # Validated anew: a number from the command line obeys the rules of the file's.
    changed = settings.evaluation.model_dump() | ({"users": users} if users is not None else {})
    settings = settings.model_copy(update={"evaluation": type(settings.evaluation).model_validate(changed)})
    names = tuple(dict.fromkeys(methods or settings.compare))
    check_methods(settings, names, Path(config))
    chosen = tuple(dict.fromkeys(settings.seeds if seeds is None else seeds))
    place = Workspace(workspace if workspace is not None else Path(settings.workspace).expanduser())
    command = {
        # Relative, as everywhere in a workspace: it can be moved together with its config.
        "config": os.path.relpath(Path(config).resolve(), place.root.resolve()),
        "methods": list(names),
        "seeds": list(chosen),
        "stages": stages,
        "users": users,
        "git_sha": machine.git_sha(),
    }
    plan = Plan(settings, place, names, chosen, stages, comparison, command=command)
    return replace(plan, workers=fitting(settings, len(plan.lineages())) if workers is None else workers)


def claimed(plan: Plan) -> Plan:
    """The plan with its workspace claimed and the config written there.

    Raises:
        UserError: the workspace belongs to another experiment or other data.
    """
    settings, place = experiment.open_workspace(plan.config, plan.workspace.root)
    if swept := sweep(place.root):
        log.info("removed %d left-overs of killed runs", len(swept))
    return replace(plan, config=settings, workspace=place)


def read(plan: Plan) -> None:
    """Read and check the log into the workspace; one that has grown by `retrain` keeps its stages as they are."""
    from stages.log import read_log
    from stages.split import is_grown

    watcher().start("reading the log")
    if is_grown(plan.workspace):
        watcher().say("the stages have grown by retraining and are used as they are; `driftrec retrain` takes new rows")
        return
    report = read_log(plan.config, plan.workspace, progress=watcher().say)
    experiment.check_log(plan.workspace, report.digest)


def split(plan: Plan) -> Plan:
    """Cut the log into stages; the plan then knows how many there are."""
    from stages.interactions import used_objectives
    from stages.mending import mend_stages
    from stages.split import is_grown, split_stages

    watcher().start("cutting stages")
    if is_grown(plan.workspace):
        mend_stages(plan.config, plan.workspace, progress=watcher().say)
    stages = split_stages(plan.config, plan.workspace)
    searches = "search" in used_objectives(plan.workspace, plan.config.search.objectives)
    plan = plan.with_stages(len(stages), searches)
    watcher().expect(plan.steps())
    return plan


def identify(plan: Plan) -> None:
    """Give every item its semantic ID, and see that the models to come have room on the disk."""
    give_ids(plan)
    see_room(plan, [lineage.at(stage) for lineage in plan.lineages() for stage in plan.trained(lineage)[-1:]])


def give_ids(plan: Plan) -> None:
    """A semantic ID for every item that has none; nobody's codes move."""
    from stages.items import build_semantic_ids

    watcher().start("semantic IDs")
    build_semantic_ids(plan.config, plan.workspace, progress=watcher().say)


def see_room(plan: Plan, jobs: Sequence[Job], exports: Sequence[Job] = ()) -> None:
    """Refuse to begin where models still to be trained up to `jobs`, and `exports` in MLflow, have no room on the disk.

    Raises:
        UserError: too little space, or the device to train on is not there.
    """
    from stages.dataset import load_dataset
    from stages.space import check_space

    size = check_space(plan.config, plan.workspace, load_dataset(plan.config, plan.workspace), jobs, exports)
    what = "checkpoints and registered models" if exports else "checkpoints"
    log.info("the %s still to come will take about %.0f MiB", what, size / 2**20)
    log.info(machine.arithmetic(plan.config.backbone.precision, plan.config.backbone.device))


def train(plan: Plan, job: Job) -> Checkpoint:
    """Train one stage of one lineage, or return it where it is committed already."""
    watcher().start(f"train {_title(job)}")
    if plan.profile:
        from stages.profiling import profile_stage

        checkpoint, _ = profile_stage(plan.config, plan.workspace, job, progress=watcher().say)
    else:
        from stages.train import train_stage

        checkpoint = train_stage(plan.config, plan.workspace, job, progress=watcher().say)
    experiment.remember_trained(plan.workspace, checkpoint)
    watcher().finish()
    return checkpoint


def evaluate(plan: Plan, job: Job, tested: int, pin: Pin | None = None) -> Evaluation:
    """Measure one model on one stage's tests; `pin` names a checkpoint besides the one that the settings give."""
    from stages.evaluate import evaluate_stage
    from stages.sampled import evaluate_sampled

    watcher().start(f"test {_title(job)} on stage {tested}")
    users = plan.config.evaluation.users
    asked = {"tested": tested, "users": users, "progress": watcher().count, "pin": pin}
    evaluation = evaluate_stage(plan.config, plan.workspace, job, **asked)
    evaluate_sampled(plan.config, plan.workspace, evaluation, pin)
    watcher().finish()
    return evaluation


def evaluate_row(plan: Plan, job: Job, tested: Sequence[int]) -> list[Evaluation]:
    """Measure one model on every stage's tests, on the sample for R[i][j]: one row of that matrix."""
    from stages.evaluate import evaluate_stage

    watcher().start(f"R[{job.stage}] of {job.method}")
    users = plan.config.evaluation.matrix_users
    row = [evaluate_stage(plan.config, plan.workspace, job, tested=j, users=users, matrix=True) for j in tested]
    watcher().finish()
    return row


def _title(job: Job) -> str:
    return f"{job.method}, seed {job.seed}, {job.protocol.replace('_', ' ')}, stage {job.stage}"


def summarise(plan: Plan, evaluations: list[Evaluation], checkpoints: list[Checkpoint]) -> Path:
    """Means, intervals and differences, the figures and the page.

    Returns:
        The report's folder.
    """
    from flows.demo import best_rows
    from flows.reporting.report import write_report
    from stages import summary
    from stages.drift import draw_drift

    watcher().start("summing up")
    report = summary.summarise(plan.config, plan.workspace, evaluations, checkpoints, progress=watcher().say)
    stored = read_json(plan.workspace.root / "config.json")["config"]
    report |= {"command": plan.command, "config": stored}
    report["settings"] = {name: plan.config.method(name).model_dump(mode="json") for name in plan.methods}
    report |= {"versions": machine.versions(), "machine": machine.description()}
    report["wall_seconds"] = wall_seconds(evaluations, checkpoints)
    if best := best_rows(plan.config, plan.workspace.root, report):
        report["best_possible"] = best
    if (arithmetic := machine.trained_in(_states(plan.workspace, checkpoints))) is not None:
        report["notes"].append(arithmetic)
    folder = plan.workspace.reports / plan.key()
    write_json(folder / "jobs.json", jobs_of(evaluations, checkpoints), seal=True)
    draw_drift(plan.workspace, folder / "figures" / "drift.png")
    write_report(report, folder)
    write_json(plan.workspace.reports / "latest.json", {"schema": 1, "report": folder.name})
    return folder


def wall_seconds(evaluations: Sequence[Evaluation], checkpoints: Sequence[Checkpoint]) -> dict[str, float]:
    """Seconds of training and testing behind a report; files that several cells share count once."""
    trained = {checkpoint.key: 0.0 for checkpoint in checkpoints}
    for checkpoint in checkpoints:  # a frozen model's later stages name the first one's files, at no seconds
        trained[checkpoint.key] = max(trained[checkpoint.key], checkpoint.seconds)
    tested = {evaluation.path: evaluation.seconds for evaluation in evaluations}
    return {"training": sum(trained.values()), "testing": sum(tested.values())}


def _states(workspace: Workspace, checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(checkpoint.key for checkpoint in checkpoints)
    return [read_json(workspace.checkpoints / key / "state.json") for key in keys]


def jobs_of(evaluations: list[Evaluation], checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """What `record` needs later, as JSON."""
    return {
        "schema": 1,
        "evaluations": [asdict(evaluation) for evaluation in evaluations],
        "checkpoints": [asdict(checkpoint) for checkpoint in checkpoints],
    }


def record(workspace: Workspace, folder: Path) -> str | None:
    """Copy a report into MLflow; the report is the truth, so a tracking store that fails only costs a warning.

    Returns:
        Address of the chart, or None where it could not be recorded.
    """
    watcher().start("recording in MLflow")
    return mirror.record(workspace, folder)
