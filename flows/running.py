"""Starting a flow from the command line, clearing away one that a kill left behind, and doing without Prefect."""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flows import login
from flows.compare import compare
from flows.continual import continual
from flows.crashed import mark_crashed
from flows.plain import KNOWN, run_plainly
from flows.reach import lost_prefect
from flows.retrain import retrain
from flows.rollback import rollback

FLOWS = {"compare": compare, "continual": continual, "retrain": retrain, "rollback": rollback}
PATIENCE = 5.0
"""Seconds a Prefect server that the user named has to answer."""
log = logging.getLogger("flows.running")


def run(name: str, arguments: dict[str, Any], interrupted: str | None = None) -> str:
    """Run the flow called `name`; a killed earlier run of it is marked as crashed first.

    Prefect shows and schedules, the work does not need it: where its server is out of reach, or goes away, the run goes
    on without it and says so. `DRIFTREC_PREFECT=off` leaves it out from the start.

    Args:
        name: of the flow.
        arguments: its parameters.
        interrupted: Prefect's id of the run that this one continues.

    Returns:
        What the flow returns: a report's folder, or a summary of what was decided.
    """
    if os.environ.get("DRIFTREC_PREFECT") == "off" and name in KNOWN:
        return run_plainly(name, arguments)
    try:
        with _own_server_if_theirs_is_silent():
            if interrupted is not None:
                mark_crashed(interrupted)
            return FLOWS[name](**arguments)
    except Exception as error:
        if name not in KNOWN or not lost_prefect(error):
            raise
        words = " ".join(str(error).split())[:200]
        log.warning("Prefect is out of reach (%s); going on without it: this run will not be in its UI", words)
    return run_plainly(name, arguments)


@contextmanager
def _own_server_if_theirs_is_silent() -> Iterator[None]:
    """Within the block a server of our own is used where the one of PREFECT_API_URL does not answer, or not to us."""
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
        temporary_settings,
    )

    address = PREFECT_API_URL.value()
    there = address is not None and _answers(str(address))
    if address is None or (there and login.fits(str(address), PREFECT_API_AUTH_STRING.value())):
        yield
        return
    fault = f"asks for another login ({login.REMEDY})" if there else "does not answer"
    log.warning("the Prefect server at %s %s; using one of this run's own", address, fault)
    with temporary_settings(updates={PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}, restore_defaults={PREFECT_API_URL}):
        yield


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=PATIENCE) as answer:  # noqa: S310
            return answer.status < 500
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False
