"""report.json and report.html: the whole comparison in two files that need nothing beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.reporting import analysis_sections, sections
from flows.reporting.analysis_charts import draw_analysis
from flows.reporting.charts import draw_charts
from flows.reporting.findings import (
    HEADLINE,
    PROTOCOL_TITLES,
    Cell,
    Difference,
    Findings,
    Line,
    metric_title,
    sample_note,
    untested_note,
)
from flows.reporting.page import Content, Markup, TableRow, document, element, interval, join, table
from flows.reporting.sections import number, span
from stages.workspace import read_json, replacing, write_json

PROTOCOL_NOTES = {
    "next_stage": "Trained on all events up to a stage, tested on the next: would this update have helped afterwards?",
    "same_stage": "Trained on a stage without each user's last two events, tested on the last: did the model adapt?",
}

LEVEL = 0.05


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json, the figures and report.html, each whole or not at all.

    Args:
        report: contents of report.json; a missing number is null, never NaN.
        folder: of this comparison; `figures/drift.png` in it is shown if it is there.

    Returns:
        Path of report.html.
    """
    write_json(folder / "report.json", report, seal=True)
    return write_page(report, folder)


def write_page(report: dict[str, Any], folder: Path) -> Path:
    """Draw the figures and write report.html for a report.json, and an analysis.json, that exist already."""
    figures = draw_charts(report, folder)
    stored = folder / "analysis.json"
    analysis = read_json(stored) if stored.exists() else None
    if analysis is not None:
        figures |= draw_analysis(analysis, folder)
    drift = folder / "figures" / "drift.png"
    if drift.exists():
        figures["drift"] = drift
    page = folder / "report.html"
    with replacing(page) as temporary:
        temporary.write_text(render(report, figures, analysis), encoding="utf-8")
    return page


def render(report: dict[str, Any], figures: dict[str, Path], analysis: dict[str, Any] | None = None) -> str:
    """The page as text.

    Args:
        report: contents of report.json.
        figures: drawn ones by name.
        analysis: contents of analysis.json, where there is one.
    """
    findings = Findings(report)
    tables = [
        _protocol(findings, protocol, objective) for protocol in findings.protocols for objective in findings.objectives
    ]
    caption = "Mean over users with 95 % intervals; grey: baselines."
    body = join(
        _head(findings),
        *tables,
        sections.pictures(figures, "stages", "Stage by stage", "Hit@10 by tested stage", caption),
        sections.forgetting(findings, figures),
        sections.slices(findings),
        sections.sampled(findings),
        sections.costs(findings, figures),
        analysis_sections.analysis(analysis, figures),
        sections.log(findings, figures),
        sections.notes(findings),
        sections.provenance(report),
    )
    return document(f"driftrec report: {report['name']}", body)


def _head(findings: Findings) -> Markup:
    report = findings.report
    banners = [note for note in (sample_note(report), untested_note(findings)) if note]
    stages = report.get("stages", [])
    seeds = sorted({row["seed"] for row in report["costs"] if row["seed"] is not None})
    trained = [name for name in findings.methods if findings.costs(name)]
    facts = [
        *(
            _fact(f"Best, {_titled(findings, name, objective).lower()}", *_winner(findings, name, objective))
            for name in findings.protocols
            for objective in findings.objectives
        ),
        _fact("Log", f"{sum(stage['events'] for stage in stages):,} events", f"{len(stages)} stages"),
        _fact("Trained", f"{len(trained)} methods", f"seeds {', '.join(map(str, seeds))}" if seeds else "no seed"),
    ]
    return join(
        element("h1", report["name"]),
        element("p", "Continual updates of one recommender, compared on the same users, stages and catalogue.", "lead"),
        *(element("p", note, "banner") for note in banners),
        element("dl", join(*facts), "facts"),
    )


def _fact(name: str, value: str, small: str) -> Markup:
    return element("div", join(element("dt", name), element("dd", join(value, element("small", small)))))


def _titled(findings: Findings, protocol: str, objective: str) -> str:
    return PROTOCOL_TITLES.get(protocol, protocol) + (f", {objective}" if len(findings.objectives) > 1 else "")


def _winner(findings: Findings, protocol: str, objective: str) -> tuple[str, str]:
    metric = HEADLINE[0]
    best = [line for line in findings.lines(protocol, objective) if metric in line.best]
    if not best:
        return "nobody was tested", ""
    cell = best[0].cells[metric]
    return " and ".join(line.method for line in best), f"{metric_title(metric)} {number(cell.value)} {span(cell)}"


def _protocol(findings: Findings, protocol: str, objective: str) -> Markup:
    lines = findings.lines(protocol, objective)
    if not lines:
        return Markup("")
    tops = {m: max((_high(line.cells.get(m)) for line in lines), default=0.0) for m in HEADLINE}
    names = [title for m in HEADLINE for title in (metric_title(m), f"{metric_title(m)} minus {findings.reference}")]
    users = max((cell.users for line in lines for cell in line.cells.values()), default=0)
    title = _titled(findings, protocol, objective)
    losers = _losers(lines)
    return join(
        element("h2", title),
        element("p", f"{PROTOCOL_NOTES.get(protocol, '')} {_target_rule(findings, protocol)}", "faint"),
        table(["method", *names, "users"], [_line(line, tops) for line in lines]),
        element("p", losers, "banner") if losers else "",
        element("p", bound) if (bound := _best_possible(findings, protocol, objective)) else "",
        element("p", f"{_reading(findings, users)} {_ceiling(findings, protocol, objective)}", "faint"),
    )


def _reading(findings: Findings, users: int) -> str:
    sampled = " (a sample)" if findings.report.get("sampled_users") else ""
    return (
        f"Mean over the stages after the first, {users:,} users{sampled}, 95 % bootstrap intervals over "
        f"{findings.resampled}; p by Holm over the table."
    )


def _best_possible(findings: Findings, protocol: str, objective: str) -> str:
    """The bound of a generated log, in the words of the terminal; nothing for any other."""
    best = findings.best_possible(protocol, objective)
    if not best:
        return ""
    scores = ", ".join(f"{metric_title(metric)} {number(value)}" for metric, value in best.items())
    return f"Best possible: {scores}, what a ranker would score that knew the distribution this log was generated from."


def _ceiling(findings: Findings, protocol: str, objective: str) -> str:
    oracle = findings.oracle(protocol, objective)
    return f"Oracle line: {oracle:.4f}; the other targets were in no catalogue a model knew." if oracle else ""


def _target_rule(findings: Findings, protocol: str) -> str:
    rule = findings.report.get("target_rule", "")
    found = rule.get(protocol, "") if isinstance(rule, dict) else rule
    return f"Targets: {found}." if found else ""


def _high(cell: Cell | None) -> float:
    if cell is None:
        return 0.0
    return cell.high if cell.high is not None else cell.value or 0.0


def _losers(lines: list[Line]) -> str:
    """Says in words which trained methods score below a baseline in the leading metric."""
    metric = HEADLINE[0]
    scores = {line.method: (line.baseline, cell.value) for line in lines if (cell := line.cells.get(metric))}
    bars = [(value, name) for name, (baseline, value) in scores.items() if baseline and value is not None]
    if not bars:
        return ""
    bar, strongest = max(bars)
    below = [name for name, (baseline, value) in scores.items() if not baseline and value is not None and value < bar]
    return f"Below the baseline {strongest} in {metric_title(metric)}: {', '.join(below)}." if below else ""


def _line(line: Line, tops: dict[str, float]) -> TableRow:
    cells: list[tuple[Content, str]] = []
    for metric in HEADLINE:
        cell, gap = line.cells.get(metric), line.differences.get(metric)
        cells.append((_value(cell, tops[metric]) if cell else None, "best" if metric in line.best else ""))
        cells.append((_gap(gap) if gap else None, ""))
    users = max((cell.users for cell in line.cells.values()), default=0)
    return TableRow(line.method, [*cells, (f"{users:,}", "")], "baseline" if line.baseline else "")


def _value(cell: Cell, top: float) -> Markup:
    track = interval(cell.value, cell.low, cell.high, top)
    return join(number(cell.value), track, Markup("<br>"), element("small", span(cell)))


def _gap(gap: Difference) -> Markup:
    """A difference is coloured only where its interval leaves zero out and Holm's p agrees."""
    apart = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
    sure = apart and (gap.p_holm is None or gap.p_holm < LEVEL)
    css = ("up" if (gap.value or 0) > 0 else "down") if sure else ""
    p = "" if gap.p_holm is None else f" p {gap.p_holm:.2g}"
    small = element("small", span(gap, signed=True) + p)
    return join(element("span", number(gap.value, signed=True), css), Markup("<br>"), small)
