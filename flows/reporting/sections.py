"""The report's parts after the headline: forgetting, slices, costs, the log, notes and provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.reporting.charts import matrix_name
from flows.reporting.findings import (
    HEADLINE,
    PROTOCOL_TITLES,
    Cell,
    Difference,
    Findings,
    metric_title,
    minute,
    sample_note,
)
from flows.reporting.page import Content, Markup, TableRow, element, figure, join, table

CONTINUAL = {
    "next_perf": "NextPerf",
    "learning_accuracy": "learning accuracy",
    "retained_accuracy": "retained accuracy",
    "harmonic": "harmonic mean",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
}
MATRIX_CAPTION = (
    "R[i][j]: row i is the model after training stage i, column j the stage tested. Bold: the stage just trained; "
    "left of it what is kept of the past, right of it what carries over to the future."
)


def number(value: float | None, signed: bool = False) -> str:
    """Four decimals, or a dash for what is undefined."""
    if value is None:
        return "–"
    return f"{value:+.4f}".replace("-", "−") if signed else f"{value:.4f}"


def span(cell: Cell | Difference, signed: bool = False) -> str:
    """`[low, high]`, or nothing where there is no interval."""
    if cell.low is None or cell.high is None:
        return ""
    return f"[{number(cell.low, signed)}, {number(cell.high, signed)}]"


def pictures(figures: dict[str, Path], name: str, title: str, description: str, caption: str) -> Markup:
    """A chart in the version that suits the page, or nothing where it was not drawn."""
    if f"{name}-light" not in figures:
        return Markup("")
    picture = figure(figures[f"{name}-light"], figures[f"{name}-dark"], description, caption)
    return join(element("h2", title) if title else "", picture)


def forgetting(findings: Findings, figures: dict[str, Path]) -> Markup:
    """BWT and its kin in a table, R[i][j] as heat maps; one of each an objective."""
    blocks = [block for objective in findings.objectives for block in _over_stages(findings, figures, objective)]
    if not blocks:
        return Markup("")
    sample = findings.report.get("config", {}).get("evaluation", {}).get("matrix_users")
    intro = "Low forgetting alone is no virtue: tastes move on. Read BWT beside NextPerf."
    if sample:
        intro += (
            f" The cells of R[i][j] carry no interval: they rest on one seed, the first, and on a seeded sample of at "
            f"most {sample} users a stage, and so do the columns but NextPerf and FWT. Small gaps there mean nothing."
        )
    elif sample == 0:
        intro += " R[i][j] was not measured (evaluation.matrix_users = 0), nor what is made of it."
    return join(element("h2", "Keeping the old, learning the new"), element("p", intro, "faint"), *blocks)


def _over_stages(findings: Findings, figures: dict[str, Path], objective: str) -> list[Content]:
    """Heading, table and heat maps of one objective; nothing where nothing is known."""
    found = {name: values for name in findings.methods if (values := findings.continual(name, objective))}
    drawn = matrix_name(findings, objective)
    if not found and f"{drawn}-light" not in figures:
        return []
    known = [key for key in CONTINUAL if any(values.get(key) is not None for values in found.values())]
    rows = [
        TableRow(
            name,
            [(number(values.get(key), signed=key in ("bwt", "fwt")), "") for key in known],
            "" if findings.costs(name) else "baseline",
        )
        for name, values in found.items()
    ]
    return [
        element("h3", objective.capitalize()) if len(findings.objectives) > 1 else "",
        table(["method", *(CONTINUAL[key] for key in known)], rows) if rows else "",
        pictures(figures, drawn, "", f"Heat maps of R[i][j], {objective}, one for each method", MATRIX_CAPTION),
    ]


def slices(findings: Findings) -> Markup:
    """Hit@10 on the parts of the test."""
    blocks = []
    for protocol in findings.protocols:
        for objective in findings.objectives:
            rows = _slice_rows(findings, protocol, objective)
            if rows:
                names = [part.replace("_", " ") for part in findings.slices]
                several = f", {objective}" if len(findings.objectives) > 1 else ""
                title = PROTOCOL_TITLES.get(protocol, protocol) + several
                blocks += [element("h3", title), table(["method", *names], rows)]
    if not blocks:
        return Markup("")
    intro = f"{metric_title(HEADLINE[0])} on parts of the test, mean over the stages after the first; small: users."
    return join(element("h2", "Who is served how well"), element("p", intro, "faint"), *blocks)


def _slice_rows(findings: Findings, protocol: str, objective: str) -> list[TableRow]:
    cells = {
        name: [findings.cell(name, protocol, HEADLINE[0], objective, part=part) for part in findings.slices]
        for name in findings.methods
    }
    columns = zip(*cells.values(), strict=True)
    tops = [max(((cell.value or 0.0) for cell in column if cell), default=0.0) for column in columns]
    rows = []
    for name, line in cells.items():
        if any(cell and cell.value is not None for cell in line):
            shown = [_slice_cell(cell, top) for cell, top in zip(line, tops, strict=True)]
            rows.append(TableRow(name, shown, "" if findings.costs(name) else "baseline"))
    return rows


def _slice_cell(cell: Cell | None, top: float) -> tuple[Content, str]:
    if cell is None or cell.value is None:
        return None, ""
    best = "best" if cell.value == top and top > 0 else ""
    return join(number(cell.value), " ", element("small", f"{cell.users:,}")), best


DRAWN = {"uniform": "random items", "popularity": "items drawn by popularity"}
DRAWN["bm25_first"] = "items (for a search those whose texts match it best, then random ones)"
"""What the negatives are, by `evaluation.negatives`."""


def sampled(findings: Findings) -> Markup:
    """The 99 + 1 mode, beside a random ranker and the full catalogue; nothing where it is off."""
    found = findings.report.get("sampled")
    if not found:
        return Markup("")
    blocks = []
    for protocol in findings.protocols:
        for objective in findings.objectives:
            if rows := _sampled_rows(findings, protocol, objective):
                head = ["method", *map(metric_title, found["random"]), f"full catalogue: {metric_title(HEADLINE[0])}"]
                title = f"{PROTOCOL_TITLES.get(protocol, protocol)}, {objective}"
                blocks += [element("h3", title), table(head, rows)]
    if not blocks:
        return Markup("")
    drawn = DRAWN[found["negatives"]]
    intro = (
        f"Each target among {found['count']} {drawn}, mean over the stages after the first: for comparison with tables "
        "made that way. A sample can reverse the order of two models; believe the full ranking. A target that no model "
        "knew is a miss for all, a random order included."
    )
    return join(element("h2", "99 + 1 candidates (compatibility)"), element("p", intro, "faint"), *blocks)


def _sampled_rows(findings: Findings, protocol: str, objective: str) -> list[TableRow]:
    rows = []
    for name, values in findings.sampled(protocol, objective).items():
        whole = findings.cell(name, protocol, HEADLINE[0], objective)
        shown = [*values.values(), None if whole is None else whole.value]
        rows.append(TableRow(name, [(number(one), "") for one in shown], "" if findings.costs(name) else "baseline"))
    if rows:
        chance = findings.chance(protocol, objective).values()
        rows.append(TableRow("random", [*((number(one), "") for one in chance), (None, "")], "baseline"))
    return rows


def costs(findings: Findings, figures: dict[str, Path]) -> Markup:
    """What one update takes, method by method."""
    rows = [TableRow(name, _cost_cells(cost)) for name in findings.methods if (cost := findings.costs(name))]
    if not rows:
        return Markup("")
    head = ["method", "one update", "targets/s", "weights moved", "kept", "peak memory", "users answered/s"]
    caption = "Shorter is cheaper in the first two, longer is faster in the last."
    return join(
        element("h2", "What it costs"),
        element("p", f"Mean over the updates after stage 0, which all methods share. {_wall_time(findings)}", "faint"),
        table(head, rows),
        pictures(figures, "costs", "", "Bars of the cost of one update", caption),
    )


def _wall_time(findings: Findings) -> str:
    spent = findings.report.get("wall_seconds")
    if not spent:
        return ""
    return (
        f"All in all {_short(spent['training'], 's')} of training and {_short(spent['testing'], 's')} of testing; "
        "what methods share counts once."
    )


def _cost_cells(cost: dict[str, float | None]) -> list[tuple[Content, str]]:
    seconds, targets = cost["train_seconds"], cost["targets"]
    shown = [
        _short(seconds, "s"),
        _short(targets / seconds if targets and seconds else None),
        _short(cost["trained_parameters"]),
        _short(_mebibytes(cost["bytes"]), "MiB"),
        _short(_mebibytes(cost["peak_memory_bytes"]), "MiB"),
        _short(cost.get("queries_per_second")),
    ]
    return [(text, "") for text in shown]


def _mebibytes(size: float | None) -> float | None:
    return None if size is None else size / 2**20


def _short(value: float | None, unit: str = "") -> str | None:
    if value is None:
        return None
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def log(findings: Findings, figures: dict[str, Path]) -> Markup:
    """The stages and the picture of their drift."""
    stages = findings.report.get("stages", [])
    if not stages:
        return Markup("")
    names = ["events", "users", "new_users", "returning_users", "items", "new_items"]
    rows = [
        TableRow(
            stage["index"],
            [(minute(stage["start"]), ""), (minute(stage["end"]), ""), *((f"{stage[name]:,}", "") for name in names)],
        )
        for stage in stages
    ]
    head = ["stage", "from", "before", *(name.replace("_", " ") for name in names)]
    drift = figure(figures["drift"], None, "Drift of the log over its stages", "") if "drift" in figures else ""
    return join(element("h2", "The log and its drift"), table(head, rows), drift)


def notes(findings: Findings) -> Markup:
    """What a reader must know before believing a number."""
    report = findings.report
    notes = list(report.get("notes", []))
    if report.get("catalogue_known_in_advance") and not any("in advance" in note for note in notes):
        notes.insert(0, "The semantic IDs were fitted on the catalogue of all stages: it was known in advance.")
    if (note := sample_note(report)) and note not in notes:
        notes.insert(0, note)
    notes.append(f"Beam width {report['beam']}; share of invalid semantic IDs returned: {report['invalid_rate']:g}.")
    rule = report.get("target_rule", "")
    if not isinstance(rule, dict):
        notes.append(f"Target rule: {rule}.")
    clash = report.get("collisions", {})
    if clash:
        shared = clash.get("items_sharing", 0)
        notes.append(
            f"{shared:,} items share a semantic ID with another one (credited with the expected metric over the tie)."
        )
    return join(element("h2", "Read with care"), element("ul", join(*(element("li", note) for note in notes))))


def provenance(report: dict[str, Any]) -> Markup:
    """Command, digests, versions, machine and config, folded away."""
    blocks = []
    for title in ("command", "settings", "digests", "versions", "machine", "config"):
        if report.get(title):
            shown = json.dumps(report[title], indent=2, ensure_ascii=False)
            blocks.append(element("details", join(element("summary", title), element("pre", shown))))
    return join(element("h2", "Where it comes from"), *blocks)
