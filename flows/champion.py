"""Which trained model is in service: `champion.json` of a workspace, written by the retrain flow."""

from __future__ import annotations

from stages.errors import UserError
from stages.jobs import Job
from stages.workspace import Workspace, read_json

FILE = "champion.json"


def champion(workspace: Workspace) -> Job | None:
    """The model in service; None where none was ever promoted.

    Raises:
        UserError: the file is damaged.
    """
    stored = workspace.root / FILE
    if not stored.exists():
        return None
    try:
        return Job(**read_json(stored)["job"])
    except (KeyError, TypeError):
        raise UserError(f"{stored}: names no method, seed, protocol and stage; promote a champion again") from None
