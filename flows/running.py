"""Starting a flow from the command line, and clearing away the one that a kill left behind."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from flows.compare import compare
from flows.continual import continual

FLOWS = {"compare": compare, "continual": continual}
log = logging.getLogger("flows.running")


def run(name: str, arguments: dict[str, Any], interrupted: str | None = None) -> str:
    """Run the flow called `name`; a killed earlier run of it is marked as crashed first.

    Args:
        name: of the flow.
        arguments: its parameters.
        interrupted: Prefect's id of the run that this one continues.

    Returns:
        The report's folder.
    """
    if interrupted is not None:
        mark_crashed(interrupted)
    return FLOWS[name](**arguments)


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
