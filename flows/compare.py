"""`compare`: methods × seeds on the same stages beside the baselines, one report."""

from __future__ import annotations

from prefect import flow

from flows import artifacts, tasks
from flows.continual import follow_all, prepared
from flows.steps import make_plan


@flow(name="compare")
def compare(
    config: str,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    stages: int | None = None,
    users: int | None = None,
    workspace: str | None = None,
    workers: int | None = 1,
    profile: bool = False,
) -> str:
    """Train every method and seed over the stages, test all of them and the baselines alike, and report.

    Args:
        config: TOML file of the experiment.
        methods: names; absent: the config's `compare`.
        seeds: absent: the config's.
        stages: only the first so many stages.
        users: a seeded sample of so many test users, for a quick look.
        workspace: absent: the config's.
        workers: processes that share the work; None: as many as suit the machine and the backbone.
        profile: runs/profiles says where the time of each stage trained now went; the run works alone.

    Returns:
        The report's folder.
    """
    plan = make_plan(config, workspace, methods, seeds, stages, users, workers=workers, profile=profile)
    plan = prepared(plan, "compare")
    baselines = [tasks.evaluate(plan, job, tested) for job, tested in plan.baselines()]
    trained, tests = follow_all(plan)
    folder = tasks.summarise(plan, [*baselines, *tests], trained)
    artifacts.publish(folder, tasks.record(plan.workspace, folder))
    return str(folder)
