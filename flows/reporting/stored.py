"""Reports that lie in a workspace: which is the newest, what it says, and where its chart is."""

from __future__ import annotations

from pathlib import Path

from flows.reporting.findings import Findings
from stages.errors import UserError
from stages.workspace import Workspace, read_json


def recorded_chart(folder: Path) -> str | None:
    """Address of the chart of a report that was recorded in MLflow."""
    stored = folder / "chart.json"
    return str(read_json(stored)["mlflow"]) if stored.exists() else None


def latest_report(workspace: Workspace, name: str | None = None) -> Path:
    """Folder of the newest report, or of the one called `name`.

    Raises:
        UserError: there is none.
    """
    pointer = workspace.reports / "latest.json"
    if name is None and pointer.exists():
        name = str(read_json(pointer)["report"])
    folder = workspace.reports / (name or "")
    if name is None or Path(name).name != name or not (folder / "report.json").exists():
        known = sorted(path.parent.name for path in workspace.reports.glob("*/report.json"))
        there = f"reports there: {', '.join(known)}" if known else "run `driftrec compare` first"
        raise UserError(f"{workspace.root}: no report {name or ''!r}; {there}")
    return folder


def findings(folder: Path) -> Findings:
    """A written report, ready to be shown."""
    return Findings(read_json(folder / "report.json"))
