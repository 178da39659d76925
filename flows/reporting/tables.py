"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flows.reporting.findings import (
    HEADLINE,
    PROTOCOL_TITLES,
    Difference,
    Findings,
    Line,
    metric_title,
    minute,
    sample_note,
)
from flows.reporting.insights import Insights

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 160
SPACE = "\N{NO-BREAK SPACE}"
"""Stands between a number and its interval until the width is known."""


def headline(
    findings: Findings, best: dict[tuple[str, str], dict[str, float]] | None = None, width: int = WIDE
) -> list[Table]:
    """The report's tables, one for each protocol and objective.

    Args:
        findings: of a report.
        best: (protocol, objective) -> metric -> best possible score, where it is known; absent: what the report says.
        width: of the terminal, in characters; below `WIDE` an interval stands under its number.
    """
    return [
        _table(
            findings,
            protocol,
            objective,
            (best or {}).get((protocol, objective)) or findings.best_possible(protocol, objective),
            " " if width >= WIDE else "\n",
        )
        for protocol in findings.protocols
        for objective in findings.objectives
    ]


def _table(findings: Findings, protocol: str, objective: str, best: dict[str, float], gap: str) -> Table:
    title = PROTOCOL_TITLES.get(protocol, protocol) + (f", {objective}" if len(findings.objectives) > 1 else "")
    table = _empty(f"{title}: mean over the stages after the first, 95 % intervals over {findings.resampled}")
    table.caption = sample_note(findings.report)
    table.add_column("method", no_wrap=True)
    for metric in HEADLINE:
        table.add_column(metric_title(metric), justify="right", no_wrap=True)
        table.add_column(f"minus {findings.reference}", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)
    for line in findings.lines(protocol, objective):
        table.add_row(*(cell.replace(SPACE, gap) for cell in _line(line)), style="dim" if line.baseline else None)
    if best:
        cells = [cell for metric in HEADLINE for cell in (_number(best.get(metric)), "", "")]
        table.add_section()
        table.add_row("best possible", *cells, style="green")
    return table


def _line(line: Line) -> list[str]:
    cells = [escaped(line.method)]
    for metric in HEADLINE:
        cell, gap = line.cells.get(metric), line.differences.get(metric)
        shown = "–" if cell is None else _with_interval(_number(cell.value), cell.low, cell.high)
        cells.append(f"[bold]{shown}[/]" if metric in line.best else shown)
        cells.append("" if gap is None else _gap(gap))
        cells.append("" if gap is None or gap.p_holm is None else f"{gap.p_holm:.2g}")
    return cells


def _gap(gap: Difference) -> str:
    return "–" if gap.value is None else _with_interval(f"{gap.value:+.4f}", gap.low, gap.high, signed=True)


def _with_interval(value: str, low: float | None, high: float | None, signed: bool = False) -> str:
    if low is None or high is None:
        return value
    form = "+.4f" if signed else ".4f"
    return f"{value}{SPACE}\\[{low:{form}}, {high:{form}}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


DRIFT_HEADS = (
    ("stage",),
    ("from", "before"),
    ("events",),
    ("users", "new", "returning"),
    ("items", "new", "known"),
    ("on new",),
    ("drift",),
    ("history",),
)
"""Columns of `drift`, grouped by what stands under one another on a narrow terminal."""


def drift(rows: list[dict[str, Any]], width: int = WIDE) -> Table:
    """Spans, events, users, items and drift of the stages.

    Args:
        rows: of `stages.drift.drift_table`.
        width: of the terminal, in characters; below `WIDE` the columns of a group become one.
    """
    table = _empty("Stages, times in UTC")
    table.caption = (
        "on new: share of the events on items first met in the stage; drift: Jensen-Shannon distance from the stage "
        "before, 0 to 1; history: median events a user has so far"
    )
    table.caption_justify, table.caption_style = "left", "dim"
    narrow = width < WIDE
    if narrow:
        table.padding, table.show_lines = (0, 0, 0, 1), True
    for heads in DRIFT_HEADS:
        for head in ["\n".join(heads)] if narrow else heads:
            table.add_column(head, justify="left" if "from" in heads else "right", no_wrap=True)
    for row in rows:
        groups = _drift_cells(row)
        table.add_row(
            *("\n".join(group) for group in groups) if narrow else (cell for group in groups for cell in group)
        )
    return table


def _drift_cells(row: dict[str, Any]) -> list[list[str]]:
    """A stage's cells, by the groups of `DRIFT_HEADS`."""

    def counts(*names: str) -> list[str]:
        return [f"{row[name]:,}" for name in names]

    def measured(name: str, form: str) -> list[str]:
        return ["–" if row[name] is None else format(row[name], form)]

    return [
        [str(row["index"])],
        [minute(row["start"]) or "–", minute(row["end"]) or "–"],
        counts("events"),
        counts("users", "new_users", "returning_users"),
        counts("items", "new_items", "known_items"),
        measured("new_item_events", ".1%"),
        measured("drift", ".3f"),
        measured("median_history", "g"),
    ]


def analysis(found: dict[str, Any]) -> list[Table]:
    """The numbers of an analysis, a line for each method."""
    insights = Insights(found)
    table = _empty(f"Analysis after stage {insights.last}, seed {found['seed']}, {found['protocol'].replace('_', ' ')}")
    parts = {name: None for method in found["methods"] for name, *_ in insights.points(method)}
    ends = {name for name in parts if name.endswith(("_low", "_high"))}
    table.add_column("", no_wrap=True)
    for method in found["methods"]:
        table.add_column(escaped(method), justify="right")
    last = {
        method: {name: value for name, value, stage in insights.points(method) if stage == insights.last}
        for method in found["methods"]
    }
    for name in parts:
        if name not in ends:
            table.add_row(name, *(_measured(last[method], name) for method in found["methods"]))
    memory = _empty("Bytes besides weights and activations")
    for name in ("", "counted", "by formula"):
        memory.add_column(name, justify="right" if name else "left")
    for row in insights.rows("memory"):
        memory.add_row(f"{row['name']}, {row['part']}", f"{row['counted']:,}", f"{row['predicted']:,}")
    return [table, memory] if memory.row_count else [table]


def _measured(points: dict[str, float], name: str) -> str:
    """A point and its interval, the latter on a line of its own: methods stand side by side."""
    if name not in points:
        return "–"
    low, high = points.get(f"{name}_low"), points.get(f"{name}_high")
    return f"{points[name]:.3f}" + ("" if low is None or high is None else f"\n\\[{low:.3f}, {high:.3f}]")


def recommendations(rows: list[tuple[str, str, float]], title: str) -> Table:
    """Rank, item, title and score."""
    table = _empty(title)
    table.add_column("", justify="right")
    table.add_column("item", no_wrap=True)
    table.add_column("title")
    table.add_column("score", justify="right")
    for rank, (item, name, score) in enumerate(rows, start=1):
        table.add_row(str(rank), escaped(item), escaped(name), f"{score:.3f}")
    return table


def decisions(rows: list[dict[str, Any]]) -> Table:
    """The history of the champion, oldest first."""
    table = _empty("Decisions")
    for name in rows[0]:
        table.add_column(name, no_wrap=name != "why")
    for row in rows:
        table.add_row(*(escaped(str(value)) for value in row.values()))
    return table


def escaped(text: str) -> str:
    """A text from the log as text: its brackets are no markup, its control characters do nothing."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))


def shortened(text: str, letters: int = 100) -> str:
    """A text's beginning, where it is longer than `letters`."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _empty(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=escaped(title), box=SIMPLE_HEAD, title_justify="left", title_style="bold", caption_style="yellow"
    )
