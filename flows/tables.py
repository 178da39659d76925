"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flows.findings import HEADLINE, PROTOCOL_TITLES, REFERENCE, Difference, Findings, Line, metric_title, sample_note

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 160
SPACE = "\N{NO-BREAK SPACE}"
"""Stands between a number and its interval until the width is known."""


def headline(findings: Findings, best: dict[str, dict[str, float]] | None = None, width: int = WIDE) -> list[Table]:
    """The report's tables, one for each protocol and objective.

    Args:
        findings: of a report.
        best: protocol -> metric -> best possible score, where it is known.
        width: of the terminal, in characters; below `WIDE` an interval stands under its number.
    """
    return [
        _table(findings, protocol, objective, (best or {}).get(protocol, {}), " " if width >= WIDE else "\n")
        for protocol in findings.protocols
        for objective in findings.objectives
    ]


def _table(findings: Findings, protocol: str, objective: str, best: dict[str, float], gap: str) -> Table:
    title = PROTOCOL_TITLES.get(protocol, protocol) + (f", {objective}" if len(findings.objectives) > 1 else "")
    table = _empty(f"{title}: mean over the stages after the first, 95 % intervals over users")
    table.caption = sample_note(findings.report)
    table.add_column("method", no_wrap=True)
    for metric in HEADLINE:
        table.add_column(metric_title(metric), justify="right", no_wrap=True)
        table.add_column(f"minus {REFERENCE}", justify="right", no_wrap=True)
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


def drift(rows: list[dict[str, Any]]) -> Table:
    """Spans, events, users and items of the stages, with whatever else the drift table holds."""
    table = _empty("Stages")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name in ("start", "end") else "right")
    for row in rows:
        table.add_row(*(_brief(row.get(name)) for name in names))
    return table


def _brief(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else escaped(str(value))


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


def _empty(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=escaped(title), box=SIMPLE_HEAD, title_justify="left", title_style="bold", caption_style="yellow"
    )
