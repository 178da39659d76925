"""`driftrec retrain --dry-run`: what a retraining would take, close and train; nothing is written in its workspace."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows import retraining, steps
from flows.experiment import see_fit
from flows.plan import Plan
from flows.promotion import champion
from flows.promotion.telling import name
from flows.terminal import watcher
from stages.errors import UserError
from stages.split import load_stages
from stages.workspace import Workspace

if TYPE_CHECKING:
    from stages.append import Intake
    from stages.jobs import Job


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
    champion.decided(plan.workspace)
    sentence, lines = (_on_stages if retraining.is_cut(plan.workspace) else _from_nothing)(plan, new, close_now)
    return "\n".join([f"dry run, nothing was changed: {sentence}", *lines])


def _on_stages(plan: Plan, new: str | None, close_now: bool) -> tuple[str, list[str]]:
    from stages.append import take_new_rows

    intake = take_new_rows(plan.config, plan.workspace, new, close_now, dry_run=True, progress=watcher().say)
    due = (_line(plan, *each, intake.rebuilt) for each in retraining.upcoming(plan, intake.closed))
    return intake.sentence(), [*_anew(plan, intake), *due]


def _anew(plan: Plan, intake: Intake) -> Iterator[str]:
    """On the champion, where settings, version, late rows or damage have it trained anew."""
    try:
        job = retraining.outdated(plan, intake.rebuilt)
    except UserError as error:  # the catalogue is damaged: the run makes it anew, and nobody knows which codes it has
        yield f"the champion may have to be trained anew, which the run sees once it has mended this: {error}"
        return
    if job is not None:
        after = "the gate decides afterwards unless it comes out the same"
        yield f"{name(job)}, in service, would be trained anew; {after}"


def _line(plan: Plan, stage: int, job: Job, rebuilt: Sequence[int] = ()) -> str:
    """On one decision that is due; who was trained before a kill, or for a report, is not trained again."""
    if not any(index <= job.stage for index in rebuilt) and _is_trained(plan, job):
        return f"{name(job)} is trained and would be tested on stage {stage}; the gate decides afterwards"
    return f"{job.method} would be trained for stage {stage}; the gate decides afterwards"


def _is_trained(plan: Plan, job: Job) -> bool:
    from stages.commit import checkpoint_folder
    from stages.dataset import load_dataset

    try:
        dataset = load_dataset(plan.config, plan.workspace)
        return job.stage < dataset.stages and checkpoint_folder(plan.config, plan.workspace, dataset, job).is_dir()
    except UserError:  # not every item has a code yet, or the settings have no such method any more
        return False


def _from_nothing(plan: Plan, new: str | None, close_now: bool) -> tuple[str, list[str]]:
    """The first cut, made for real where it is thrown away."""
    with tempfile.TemporaryDirectory(prefix="driftrec-dry-run-") as folder:
        trial = steps.claimed(replace(plan, workspace=Workspace(Path(folder) / "workspace")))
        intake = retraining.take(trial, new, close_now)
        lines = [_line(trial, *each) for each in retraining.upcoming(trial)]
        cut = len(load_stages(trial.workspace)) - len(intake.closed)
    return f"the log would be cut into {cut} stages; {intake.sentence()}", lines
