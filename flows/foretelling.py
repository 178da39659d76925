"""`driftrec retrain --dry-run`: what a retraining would take, close and train; nothing is written in its workspace."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows import retraining, steps
from flows.experiment import see_fit
from flows.plan import Plan
from flows.terminal import watcher
from stages.split import load_stages
from stages.workspace import Workspace

if TYPE_CHECKING:
    from stages.append import Intake


def foretold(plan: Plan, new: str | None = None, close_now: bool = False) -> str:
    """A sentence on the rows, and a line for each model that would be trained.

    Args:
        plan: not claimed.
        new: as `take_new_rows` has it.
        close_now: likewise.

    Raises:
        UserError: what the run itself would be refused for, before it trains.
    """
    see_fit(plan.config, plan.workspace)
    cut, intake, due = (_on_stages if retraining.is_cut(plan.workspace) else _from_nothing)(plan, new, close_now)
    method = plan.methods[0]
    lines = [f"{method} would be trained for stage {stage}; the gate decides afterwards" for stage in due]
    return "\n".join([f"dry run, nothing was changed: {cut}{intake.sentence()}", *lines])


def _on_stages(plan: Plan, new: str | None, close_now: bool) -> tuple[str, Intake, tuple[int, ...]]:
    from stages.append import take_new_rows

    intake = take_new_rows(plan.config, plan.workspace, new, close_now, dry_run=True, progress=watcher().say)
    return "", intake, intake.closed


def _from_nothing(plan: Plan, new: str | None, close_now: bool) -> tuple[str, Intake, tuple[int, ...]]:
    """The first cut, made for real where it is thrown away."""
    with tempfile.TemporaryDirectory(prefix="driftrec-dry-run-") as folder:
        trial = steps.claimed(replace(plan, workspace=Workspace(Path(folder) / "workspace")))
        intake = retraining.take(trial, new, close_now)
        match = retraining.next_match(trial)
        cut = len(load_stages(trial.workspace)) - len(intake.closed)
    return f"the log would be cut into {cut} stages; ", intake, () if match is None else (match.stage,)
