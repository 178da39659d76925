"""A small shop whose log grows week by week, looked at as `retrain` looks: what the tests of taking new rows share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.growing import NOW, seconds
from stages.append import Intake, take_new_rows
from stages.config import Config
from stages.workspace import Workspace

WeeklyShop: TypeAlias = tuple[Config, Workspace, Path]
"""Config, workspace and the folder of log files."""
LATE_ROW = ("u00", "i05", seconds(8.5))


def with_rules(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"retrain": config.retrain.model_validate({"method": "single"} | changes)})


def take(config: Config, workspace: Workspace, **more: Any) -> Intake:
    return take_new_rows(config, workspace, now=NOW, **more)
