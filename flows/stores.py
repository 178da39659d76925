"""Making MLflow's database in one step."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from flows import tracking
from stages.workspace import Workspace, temporary_beside


def make(workspace: Workspace) -> None:
    """Make the workspace's own store where there is none, under another name first.

    MLflow builds its tables in many steps, and a database whose building was cut short refuses to be opened for ever.
    """
    final = workspace.root / "mlflow.db"
    if tracking.store(workspace) != workspace.mlflow_uri or final.exists():
        return
    place = temporary_beside(workspace.root / "mlflow")
    place.mkdir(mode=0o700)
    try:
        tracking.MlflowClient(f"sqlite:///{place / final.name}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was quicker: its store stands
            os.link(place / final.name, final)
    finally:
        shutil.rmtree(place, ignore_errors=True)
