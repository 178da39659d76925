"""What Prefect's UI shows of a run: progress, a table for each stage, the summary and the links onward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run

from flows import experiment, retraining
from flows.plan import Plan
from flows.promotion import copies
from flows.promotion.history import Entry
from flows.reporting import stored
from flows.reporting.findings import HEADLINE, PROTOCOL_TITLES, Findings, Line, metric_title, sample_note, untested_note
from flows.terminal import watcher

if TYPE_CHECKING:
    from stages.append import Intake
    from stages.workspace import Workspace

STEP = 2.0
"""Percent of progress below which Prefect is not told: a message costs tens of milliseconds."""


def remember(plan: Plan, command: str) -> None:
    """Note the command for `driftrec resume`, with this flow run's id and parameters."""
    parameters = {name: value for name, value in flow_run.parameters.items() if name != "workspace"}
    arguments = {**parameters, "config": str(Path(parameters["config"]).resolve())}
    watcher()  # made here, in the flow's own context: one made inside a task would be lost with it
    experiment.remember_command(plan.workspace, command, arguments, flow_run.id)


def show_progress() -> None:
    """A progress bar in the UI that follows the terminal's."""
    bar = create_progress_artifact(0.0, key="progress", description="finished steps of this run")
    assert isinstance(bar, UUID)  # noqa: S101 (its type allows a coroutine, which it is only in asynchronous code)
    told = [0.0]

    def tell(percent: float) -> None:
        if percent - told[0] >= STEP or percent >= 100.0:
            told[0] = percent
            update_progress_artifact(bar, percent)

    watcher().listeners[:] = [tell]


def publish(folder: Path, chart: str | None) -> None:
    """The report's tables and links.

    Args:
        folder: of the report.
        chart: address of the MLflow chart, if it was recorded.
    """
    findings = stored.findings(folder)
    for stage in findings.stages:
        about = described(f"Metrics on stage {stage}", findings)
        create_table_artifact(stage_rows(findings, stage), key="stage-metrics", description=about)
    about = described("Mean over the stages after the first", findings)
    create_markdown_artifact(summary(findings), key="summary", description=about)
    create_link_artifact((folder / "report.html").resolve().as_uri(), "report.html", key="report")
    if chart is not None:
        create_link_artifact(chart, "quality by stage in MLflow (start it with `make ui`)", key="mlflow-chart")


def publish_decisions(workspace: Workspace, intake: Intake, lines: list[Entry]) -> None:
    """What a retraining took and decided, and before it what a killed one decided and could not show."""
    count = copies.count(workspace)
    shown = copies.lacking(workspace, "prefect", known=count - len(lines))
    create_markdown_artifact(retraining.summary(intake, shown), key="decision", description="New rows and decisions")
    _contests(shown)
    copies.note(workspace, "prefect", count)


def publish_rollback(workspace: Workspace) -> str:
    """The last decision by itself, a roll back, and before it what could not be shown.

    Returns:
        The same in Markdown.
    """
    count = copies.count(workspace)
    shown = copies.lacking(workspace, "prefect", known=count - 1)
    said = "\n".join(retraining.told(shown))
    create_markdown_artifact(said, key="decision", description="The champion before the present one is back")
    _contests(shown)
    copies.note(workspace, "prefect", count)
    return said


def _contests(lines: list[Entry]) -> None:
    for line in lines:
        if table := contest_rows(line):
            create_table_artifact(table, key="contest", description=f"On the tests of stage {line['stage']}")


def contest_rows(line: Entry) -> list[dict[str, Any]]:
    """A decision's scores, one dict for each model: in the gate's objective, and in the log's others."""
    metric, others = str(line.get("metric")), line.get("other_scores", {})
    gate = line.get("scores", {})
    models = list(dict.fromkeys([*gate, *(model for scores in others.values() for model in scores)]))
    more = {model: {f"{metric}, {kind}": scores.get(model) for kind, scores in others.items()} for model in models}
    return [{"model": model, metric: gate.get(model), **more[model]} for model in models]


def described(title: str, findings: Findings) -> str:
    """An artifact's description; a quick look's names its sample."""
    note = sample_note(findings.report)
    return f"{title}. {note}" if note else title


def stage_rows(findings: Findings, stage: int) -> list[dict[str, Any]]:
    """One dict for each protocol and method tested on `stage`."""
    rows = []
    for protocol in findings.protocols:
        for line in findings.lines(protocol, stage=stage):
            row: dict[str, Any] = {"stage": stage, "protocol": protocol, "method": line.method}
            for metric, cell in line.cells.items():
                row |= {metric: cell.value, f"{metric} low": cell.low, f"{metric} high": cell.high, "users": cell.users}
            rows.append(row)
    return rows


def summary(findings: Findings) -> str:
    """The headline tables as Markdown."""
    parts = [f"**{note}**\n" for note in (sample_note(findings.report), untested_note(findings)) if note]
    for protocol in findings.protocols:
        parts.append(f"### {PROTOCOL_TITLES.get(protocol, protocol)}\n")
        parts.append("| method | " + " | ".join(metric_title(metric) for metric in HEADLINE) + " |")
        parts.append("|---|" + "---|" * len(HEADLINE))
        parts.extend(_markdown_line(line) for line in findings.lines(protocol))
        parts.append("")
    return "\n".join(parts)


def _markdown_line(line: Line) -> str:
    name = line.method.replace("|", "\\|")
    cells = [_markdown_cell(line, metric) for metric in HEADLINE]
    return f"| {'*' + name + '*' if line.baseline else name} | " + " | ".join(cells) + " |"


def _markdown_cell(line: Line, metric: str) -> str:
    cell = line.cells.get(metric)
    if cell is None or cell.value is None:
        return "–"
    value = f"**{cell.value:.4f}**" if metric in line.best else f"{cell.value:.4f}"
    return value if cell.low is None or cell.high is None else f"{value} [{cell.low:.4f}, {cell.high:.4f}]"
