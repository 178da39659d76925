"""Recording in MLflow without depending on it: bounded in time, one recorder at a time, and made up for later.

The report and the checkpoints hold every number before MLflow sees one. A store that is down, locked, full or silent
costs a warning; `driftrec report` or the next run records what is missing, and nothing twice.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import TypeVar

from stages.errors import UserError
from stages.jobs import Checkpoint, Evaluation, Job
from stages.locks import holder_of, sign, try_lock
from stages.workspace import Workspace, read_json, write_json

T = TypeVar("T")
SECONDS = 60.0
"""How long MLflow may take to answer at all; `DRIFTREC_MLFLOW_SECONDS` overrides it."""
WHOLE = 20
"""A whole recording may take so many times as long."""
log = logging.getLogger("flows.mirror")


def record(workspace: Workspace, folder: Path) -> str | None:
    """Copy a report into MLflow, and with it earlier ones that could not be.

    Returns:
        Address of the chart of `folder`'s report, or None where it could not be recorded.
    """
    try:
        seconds = patience()
        within(seconds, partial(_answers, workspace))
        chart = within(WHOLE * seconds, partial(_copied, workspace, folder))
    except Exception as error:
        log.warning("MLflow was not written (%s); `driftrec report` records it later", _words(error))
        return None
    _make_up(workspace, WHOLE * seconds)
    return chart


def _make_up(workspace: Workspace, seconds: float) -> None:
    """Record earlier reports that could not be, those that still cannot left out."""
    for missed in missing(workspace):
        try:
            within(seconds, partial(_copied, workspace, missed))
        except TimeoutError as error:
            log.warning("MLflow does not have the report %s (%s); the next run records it", missed, _words(error))
            return  # nothing is recorded while that one hangs
        except Exception as error:
            log.warning("MLflow does not have the report %s (%s); the next run tries again", missed, _words(error))


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def record_decisions(workspace: Workspace, experiment: str) -> None:
    """Copy into MLflow what the history holds and MLflow does not, and the model in service.

    Raises:
        Exception: whatever MLflow fails with; the caller says so, and the next call makes up for it.
    """
    seconds = patience()
    within(seconds, partial(_answers, workspace))
    within(WHOLE * seconds, partial(_decided, workspace, experiment))


def missing(workspace: Workspace) -> list[Path]:
    """Reports that MLflow does not hold yet, though what it needs is there."""
    folders = sorted(path.parent for path in workspace.reports.glob("*/jobs.json"))
    return [path for path in folders if not (path / "chart.json").exists() and (path / "report.json").exists()]


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, if it comes in time; a thread that hangs is left behind and ends with the process.

    Raises:
        TimeoutError: it did not.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=copy_context().run, args=(attempt,), daemon=True, name="mlflow")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def patience() -> float:
    """Seconds MLflow may take to answer.

    Raises:
        UserError: DRIFTREC_MLFLOW_SECONDS is no number above 0.
    """
    text = os.environ.get("DRIFTREC_MLFLOW_SECONDS", str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"DRIFTREC_MLFLOW_SECONDS={text}: give seconds above 0, or leave it unset")
    return seconds


def _answers(workspace: Workspace) -> bool:
    from flows import stores, tracking

    stores.make(workspace)
    return tracking.answers(workspace)


@contextmanager
def _recording(workspace: Workspace) -> Iterator[None]:
    """Hold the lock, which a thread left behind goes on holding: nothing comes twice."""
    with (workspace.root / "mlflow.lock").open("a+", encoding="utf-8") as handle:
        if not try_lock(handle):
            raise TimeoutError(f"{holder_of(handle)} is recording already")
        sign(handle)
        yield


def _decided(workspace: Workspace, experiment: str) -> None:
    from flows.promotion import registry

    with _recording(workspace):
        registry.record_decisions(workspace, experiment)


def _copied(workspace: Workspace, folder: Path) -> str:
    """Record one report."""
    from flows import tracking

    with _recording(workspace):
        found = read_json(folder / "jobs.json")
        evaluations = [Evaluation(**{**row, "job": Job(**row["job"])}) for row in found["evaluations"]]
        checkpoints = [Checkpoint(**{**row, "job": Job(**row["job"])}) for row in found["checkpoints"]]
        chart = tracking.record(read_json(folder / "report.json"), workspace, checkpoints, evaluations, folder)
        write_json(folder / "chart.json", {"schema": 1, "mlflow": chart})
    return chart
