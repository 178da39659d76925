"""A trained workspace as the service sees it: whom it serves, and which model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from stages.jobs import Job
from stages.workspace import Workspace, write_json

HERE = "http://127.0.0.1:8000"


def crown(root: Path, method: str, stage: int = 1) -> Job:
    """Make a method's model the champion."""
    job = Job(method, 0, "same_stage", stage)
    write_json(root / "champion.json", {"schema": 1, "job": asdict(job), "key": "", "digest": "", "since": "now"})
    return job


def user_of(root: Path) -> str:
    """A user of the log."""
    return pl.read_parquet(Workspace(root).stage_file(0))["user_id"][0]


def items_of(root: Path) -> list[str]:
    """Every item of the catalogue."""
    return pl.read_parquet(Workspace(root).catalogue / "items.parquet")["item_id"].to_list()


def ids(reply: dict[str, Any]) -> list[str]:
    """The items of a reply's list."""
    return [item["item_id"] for item in reply["items"]]
