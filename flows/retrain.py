"""`retrain`: new rows, a new stage, a challenger, a gate, a champion; what the schedule runs."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows import artifacts, crashed, retraining, tasks
from flows.experiment import exclusive
from flows.history import Entry
from flows.plan import Plan
from flows.retraining import Match
from flows.steps import claimed


@flow(name="retrain")
def retrain(config: str, new: str | None = None, close_now: bool = False, workspace: str | None = None) -> str:
    """Take new rows; for every stage that closed, train a challenger and let the gate decide.

    Run again, it goes on where it was killed: rows, stages, checkpoints and decisions are not made twice.

    Args:
        config: TOML file of the experiment; its table [retrain] has the rules. Text, as a schedule's parameters are: in
            its process Prefect cannot look up the name `Path`.
        new: file, folder or glob to read instead of the config's sources.
        close_now: close the open stage whatever its rule says.
        workspace: absent: the config's.

    Returns:
        What was taken and decided, in Markdown.
    """
    plan = retraining.retrain_plan(Path(config), None if workspace is None else Path(workspace))
    with exclusive(plan.workspace, reentrant=True):
        crashed.clear_last(plan.workspace)
        plan = claimed(plan)
        artifacts.remember(plan, "retrain")
        intake = tasks.take(plan, new, close_now)
        tasks.grow(plan)
        lines = [*rebuilt(plan), *decisions(plan)]
        artifacts.publish_decisions(intake, lines)
        return retraining.summary(intake, lines)


def rebuilt(plan: Plan) -> list[Entry]:
    """The champion trained anew, where its data or settings changed."""
    job = retraining.outdated(plan)
    if job is None:
        return []
    line = tasks.rebuild(plan, tasks.train(plan, job))
    tasks.mirror(plan, line)
    return [line]


def decisions(plan: Plan) -> list[Entry]:
    """Every decision that is due, oldest stage first."""
    lines: list[Entry] = []
    while (match := retraining.next_match(plan)) is not None:
        lines.append(decided(plan, match))
    return lines


def decided(plan: Plan, match: Match) -> Entry:
    """One decision: train, ask everybody about the same users, judge, record."""
    checkpoints = [tasks.train(plan, job) for job in match.trained()]
    tests = [tasks.evaluate(plan, job, match.stage) for job in (*match.trained(), *match.baselines)]
    line = tasks.decide(plan, match, checkpoints[0], tests, tasks.answers(plan, match))
    tasks.mirror(plan, line)
    return line
