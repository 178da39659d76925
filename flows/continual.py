"""`continual`: one method over all stages, in time order."""

from __future__ import annotations

from types import ModuleType

from prefect import flow

from flows import artifacts, tasks
from flows.plan import Lineage, Plan
from flows.steps import make_plan
from flows.workers import helped
from stages.jobs import Checkpoint, Evaluation


@flow(name="continual", flow_run_name="continual-{method}")
def continual(
    config: str,
    method: str = "single",
    seeds: list[int] | None = None,
    stages: int | None = None,
    users: int | None = None,
    workspace: str | None = None,
    workers: int | None = 1,
    profile: bool = False,
) -> str:
    """Train and test one method stage by stage; a stage that is committed already is not trained again.

    With `profile`, runs/profiles says where the time of each stage trained now went.

    Returns:
        The report's folder.
    """
    plan = make_plan(
        config, workspace, [method], seeds, stages, users, comparison=False, workers=workers, profile=profile
    )
    plan = prepared(plan, "continual")
    trained, tests = follow_all(plan)
    folder = tasks.summarise(plan, tests, trained)
    artifacts.publish(folder, tasks.record(plan.workspace, folder))
    return str(folder)


def prepared(plan: Plan, command: str) -> Plan:
    """Log, stages and semantic IDs, in this order; the plan then knows its stages."""
    artifacts.remember(plan, command)
    tasks.read(plan)
    plan = tasks.split(plan)
    artifacts.show_progress()
    tasks.identify(plan)
    return plan


def follow_all(plan: Plan, verbs: ModuleType = tasks) -> tuple[list[Checkpoint], list[Evaluation]]:
    """Every lineage of the plan, one after the other, while helpers come towards it from the other end.

    Args:
        plan: what to train and test.
        verbs: `tasks`, or `steps` for the same without Prefect.
    """
    with helped(plan):
        pairs = [follow(plan, lineage, verbs) for lineage in plan.lineages()]
    return [one for trained, _ in pairs for one in trained], [one for _, tests in pairs for one in tests]


def follow(plan: Plan, lineage: Lineage, verbs: ModuleType = tasks) -> tuple[list[Checkpoint], list[Evaluation]]:
    """One lineage through its stages: train, then test what the protocol asks of that model."""
    trained: list[Checkpoint] = []
    tests: list[Evaluation] = []
    for stage in plan.trained(lineage):
        job = lineage.at(stage)
        trained.append(verbs.train(plan, job))
        tests.extend(verbs.evaluate(plan, job, tested) for tested in plan.tested(lineage, stage))
        if row := plan.matrix(lineage):
            tests.extend(verbs.evaluate_row(plan, job, row))
    return trained, tests
