"""How many decisions MLflow and Prefect were given: `runs/copies.json`.

The history is the truth; this notes what is still to be handed over, after a kill or while a mirror was away.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from flows.promotion.history import Entry, read_history
from stages.errors import UserError
from stages.shapes import shaped
from stages.workspace import Workspace, read_json, write_json

FILE = "copies.json"
log = logging.getLogger("flows.copies")


@dataclass(frozen=True)
class _Copies:
    given: dict[str, int]


def lacking(workspace: Workspace, mirror: str, known: int = 0) -> list[Entry]:
    """Decisions that a mirror was not given yet, oldest first.

    Args:
        workspace: whose history.
        mirror: `mlflow` or `prefect`.
        known: how many it has where nothing was noted.
    """
    lines, _ = read_history(workspace)
    given = _noted(workspace).get(_name(mirror), known)
    return lines[given:] if given <= len(lines) else lines


def note(workspace: Workspace, mirror: str, given: int) -> None:
    """The mirror has the first `given` decisions of the history: so many there were when it was handed them."""
    found = {**_noted(workspace), _name(mirror): given}
    if found != _noted(workspace):
        write_json(workspace.root / "runs" / FILE, {"schema": 1, "given": found}, seal=True)


def count(workspace: Workspace) -> int:
    """How many decisions there are; counted before they are handed over, as a roll back may come meanwhile."""
    return len(read_history(workspace)[0])


def _noted(workspace: Workspace) -> dict[str, Any]:
    """What the file says; nothing where it cannot be read: MLflow is asked what it has, Prefect shows the run's own."""
    path = workspace.root / "runs" / FILE
    try:
        found = read_json(path) if path.is_file() else {"given": {}}
        return shaped(_Copies, found, path, "not a count of recorded decisions", "remove it").given
    except UserError as error:
        log.warning("%s; it is counted anew from the decisions that MLflow has", error)
        return {}


def _name(mirror: str) -> str:
    """Another tracking store has been given nothing."""
    place = os.environ.get("MLFLOW_TRACKING_URI") if mirror == "mlflow" else None
    return f"{mirror} {place}" if place else mirror
