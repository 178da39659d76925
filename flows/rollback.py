"""`rollback`: shows in MLflow and Prefect that the champion before the present one is back in service."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows import artifacts, retraining
from flows.experiment import exclusive, remembered_config
from flows.promotion.history import read_history


@flow(name="rollback")
def rollback(workspace: str) -> str:
    """Record a roll back that `driftrec rollback` has made; where this fails the champion has moved all the same.

    Returns:
        What was done, in Markdown.
    """
    config, place = remembered_config(Path(workspace), answering=True)
    with exclusive(place, reentrant=True):
        retraining.mirrored(place, config.name, read_history(place)[0][-1])
        return artifacts.publish_rollback(place)
