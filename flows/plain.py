"""The flows without Prefect: the same steps in the same order, for when its server is out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import experiment, retraining, steps
from flows.continual import follow_all
from flows.promotion.history import read_history
from flows.retrain import work
from flows.steps import make_plan

KNOWN = ("compare", "continual", "retrain", "rollback")


def run_plainly(name: str, arguments: dict[str, Any]) -> str:
    """A flow as plain functions; what a broken-off flow committed is looked up, not made again.

    Args:
        name: one of KNOWN.
        arguments: the flow's parameters.

    Returns:
        What the flow returns.
    """
    if name == "retrain":
        return _retrain_plainly(**arguments)
    if name == "rollback":
        return _roll_back_plainly(**arguments)
    wanted = {**arguments}
    method = wanted.pop("method", None)
    methods = [method] if method is not None else wanted.pop("methods", None)
    plan = make_plan(methods=methods, comparison=name == "compare", **wanted)
    kept = {key: value for key, value in arguments.items() if key != "workspace"}
    experiment.remember_command(plan.workspace, name, {**kept, "config": str(arguments["config"])}, None)
    steps.read(plan)
    plan = steps.split(plan)
    steps.identify(plan)
    tested = plan.baselines() if name == "compare" else ()
    baselines = [steps.evaluate(plan, job, stage) for job, stage in tested]
    trained, tests = follow_all(plan, steps)
    folder = steps.summarise(plan, [*baselines, *tests], trained)
    steps.record(plan.workspace, folder)
    return str(folder)


def _retrain_plainly(config: str, new: str | None, close_now: bool, workspace: str) -> str:
    plan = steps.claimed(retraining.retrain_plan(Path(config), Path(workspace)))
    arguments = {"config": config, "new": new, "close_now": close_now}
    experiment.remember_command(plan.workspace, "retrain", arguments, None)
    return retraining.summary(*work(plan, new, close_now, retraining))


def _roll_back_plainly(workspace: str) -> str:
    config, place = experiment.remembered_config(Path(workspace), answering=True)
    last = read_history(place)[0][-1]
    retraining.mirrored(place, config.name, last)
    return "\n".join(retraining.told([last]))
