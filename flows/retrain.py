"""`retrain`: new rows, a new stage, a challenger, a gate, a champion; what the schedule runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow

from flows import artifacts, crashed, retraining, tasks
from flows.endings import private_files
from flows.experiment import exclusive, is_held
from flows.plan import Plan
from flows.promotion.history import Entry
from flows.reach import lost_prefect
from flows.retraining import Match
from flows.steps import claimed

if TYPE_CHECKING:
    from stages.append import Intake


log = logging.getLogger("flows.retrain")


@flow(name="retrain")
def retrain(config: str, new: str | None = None, close_now: bool = False, workspace: str | None = None) -> str:
    """Take new rows; for every stage that closed, train a challenger and let the gate decide.

    Run again, it goes on where it was killed: rows, stages, checkpoints and decisions are not made twice. Prefect
    shows and schedules; where its server goes away under a scheduled run the work is done all the same.

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
    by_command = is_held(plan.workspace)
    with private_files(), exclusive(plan.workspace, reentrant=True):
        try:
            return _shown(plan, new, close_now)
        except Exception as error:
            # A command goes on by itself; on a schedule nobody else would.
            if by_command or not lost_prefect(error):
                raise
            log.warning("Prefect is out of reach (%s); the run is ended without it", " ".join(str(error).split())[:200])
            return retraining.summary(*work(claimed(plan), new, close_now, retraining))


def _shown(plan: Plan, new: str | None, close_now: bool) -> str:
    """The retraining with everything that Prefect shows of it."""
    crashed.clear_last(plan.workspace)
    plan = claimed(plan)
    artifacts.remember(plan, "retrain")
    intake, lines = work(plan, new, close_now, tasks)
    artifacts.publish_decisions(plan.workspace, intake, lines)
    return retraining.summary(intake, lines)


def work(plan: Plan, new: str | None, close_now: bool, doing: Any) -> tuple[Intake, list[Entry]]:
    """Everything a retraining does.

    Args:
        plan: claimed, its workspace held.
        new: as in `retrain`.
        close_now: as in `retrain`.
        doing: `flows.tasks`, or `flows.retraining` to do without Prefect.
    """
    intake = doing.take(plan, new, close_now)
    doing.grow(plan)
    if (missed := retraining.unrecorded(plan)) is not None:
        doing.mirror(plan, missed)
    return intake, [*rebuilt(plan, doing), *decisions(plan, doing)]


def rebuilt(plan: Plan, doing: Any) -> list[Entry]:
    """The champion trained anew, where it is damaged or its data or settings changed, and what the gate says of it."""
    job = retraining.outdated(plan)
    if job is None:
        return []
    match = retraining.rematch(plan, doing.train(plan, job))
    line = None if match is None else decided(plan, match, doing)
    return [] if line is None else [line]


def decisions(plan: Plan, doing: Any) -> list[Entry]:
    """Every decision that is due, oldest stage first; one that a roll back overtook is due again."""
    lines: list[Entry] = []
    while (match := retraining.next_match(plan)) is not None:
        line = decided(plan, match, doing)
        lines += [] if line is None else [line]
    return lines


def decided(plan: Plan, match: Match, doing: Any) -> Entry | None:
    """One decision: train, ask everybody about the same users, judge, record."""
    checkpoint = doing.train(plan, match.challenger)
    tests = [doing.evaluate(plan, job, match.stage, pin) for job, pin in match.tested()]
    line = doing.decide(plan, match, checkpoint, tests, doing.answers(plan, match))
    if line is not None:
        doing.mirror(plan, line)
    return line
