"""Starting a flow from the command line, after clearing away the one that a kill left behind."""

from __future__ import annotations

from typing import Any

from flows.compare import compare
from flows.continual import continual
from flows.crashed import mark_crashed
from flows.retrain import retrain

FLOWS = {"compare": compare, "continual": continual, "retrain": retrain}


def run(name: str, arguments: dict[str, Any], interrupted: str | None = None) -> str:
    """Run the flow called `name`; a killed earlier run of it is marked as crashed first.

    Args:
        name: of the flow.
        arguments: its parameters.
        interrupted: Prefect's id of the run that this one continues.

    Returns:
        What the flow returns: a report's folder, or `retrain`'s summary.
    """
    if interrupted is not None:
        mark_crashed(interrupted)
    return FLOWS[name](**arguments)
