"""Flow runs that a kill left behind: Prefect believes them running for ever, and they may hold a schedule's slot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from uuid import UUID

from flows.experiment import last_flow_run
from stages.config import load_config
from stages.errors import UserError
from stages.workspace import Workspace

FLOW_NAMES = ("compare", "continual", "retrain", "rollback")
MOST = 200
"""Runs Prefect hands over in one answer."""
log = logging.getLogger("flows.crashed")


def mark_crashed(flow_run: str) -> bool:
    """Mark a run as crashed that Prefect still believes to be running, because its process was killed.

    The caller holds the workspace's lock, so no living process can be working on that run.

    Returns:
        Whether there was such a run.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(flow_run))
        except ObjectNotFound:
            return False
        if found.state is None or found.state.is_final():
            return False
        client.set_flow_run_state(found.id, Crashed(message="its process was gone; resumed by another run"), force=True)
    log.info("marked the interrupted flow run %s as crashed", flow_run)
    return True


def clear_last(workspace: Workspace) -> None:
    """Mark the workspace's last run as crashed, unless it ended or is the one asking; the caller holds the lock."""
    from prefect.runtime import flow_run

    last = last_flow_run(workspace)
    if last is not None and last != flow_run.id:
        mark_crashed(last)


def dead_runs(workspace: Workspace) -> list[tuple[str, str]]:
    """(id, name) of the runs on this workspace that Prefect believes under way; the caller holds the lock."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOW_NAMES))),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
            limit=MOST,
        )
    last = last_flow_run(workspace)
    return [
        (str(run.id), run.name) for run in found if str(run.id) == last or _works_on(run.parameters or {}, workspace)
    ]


def _works_on(parameters: dict[str, Any], workspace: Workspace) -> bool:
    """Whether a run with these parameters writes to the workspace; one whose config is gone belongs to nobody."""
    try:
        place = parameters.get("workspace") or load_config(Path(parameters["config"])).workspace
    except (UserError, KeyError, TypeError):
        return False
    return Path(place).expanduser().resolve() == workspace.root.resolve()
