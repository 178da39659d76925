"""The report's part about an analysis; nothing of it where none was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.reporting.insights import CANDIDATES, COUNTS, FLOWS, KINDS, Insights, mean
from flows.reporting.page import Content, Markup, TableRow, element, join, table
from flows.reporting.sections import pictures


def analysis(found: dict[str, Any] | None, figures: dict[str, Path]) -> Markup:
    """Conflict, transitions, preservation, sensitivity and memory, each with its picture."""
    if found is None:
        return Markup("")
    insights = Insights(found)
    intro = (
        f"Measured by `driftrec analyse` on the models of seed {found['seed']}, {found['protocol'].replace('_', '-')}, "
        f"up to stage {found['stage']}. Definitions are in docs/protocol.md."
    )
    return join(
        element("h2", "Why they differ"),
        element("p", intro, "faint"),
        _conflict(insights, figures),
        _transitions(insights, figures),
        _preservation(insights, figures),
        _learnt(insights),
        _sensitivity(insights, figures),
        _memory(insights, figures),
        element("ul", join(*(element("li", note) for note in found["notes"]))) if found["notes"] else "",
    )


def _conflict(insights: Insights, figures: dict[str, Path]) -> Markup:
    methods = insights.methods("conflict")
    if not methods:
        return Markup("")
    head: list[Content] = ["at the weights of"]
    kinds = insights.kinds()
    for kind in kinds:
        head += [f"ρ, {KINDS[kind]}", "noise floor", "ρ less its floor", "below zero"]
    rows = []
    for method in methods:
        cells: list[tuple[Content, str]] = []
        for kind in kinds:
            cells += [(two(insights.rho(method, kind)), ""), (two(insights.rho(method, kind, floor=True)), "")]
            above = insights.above_floor(method, kind)
            cells.append((sure(above["value"], above["low"], above["high"], "+.3f"), ""))
            cells.append((percent(insights.below_zero(method, kind)), ""))
        rows.append(TableRow(method, cells))
    return join(
        element("h3", "Do search and recommendation pull apart?"),
        element(
            "p",
            "ρ is 0 where both objectives pull alike, 1 where they are unrelated, 2 where they are opposed. "
            "Two batches of one objective give the noise floor, what ρ would be if both objectives had one gradient: "
            "only ρ above it is conflict; 95 % intervals over pairs of batches and linear maps. Before fusion: what "
            "each objective's own subspace proposes (GEMS with three subspaces alone); after fusion: what an objective "
            "adds to the step that is taken.",
            "faint",
        ),
        table(head, rows),
        pictures(figures, "conflict", "", "Heat maps of conflict by layer and weight type", "Mean over linear maps."),
    )


def _transitions(insights: Insights, figures: dict[str, Path]) -> Markup:
    blocks: list[Content] = []
    for objective in insights.objectives():
        rows = []
        for method in insights.methods("transitions"):
            for earlier, place in ((True, "earlier stages"), (False, "its own stage")):
                flow = insights.flow(method, objective, earlier)
                if flow is not None:
                    rows.append(TableRow(method, [(text, "") for text in (place, *_flow_cells(flow))]))
        head = ["method", "tests of", *FLOW_HEAD]
        blocks += [element("h3", f"Right before, wrong after: {objective}"), table(head, rows)]
    if not blocks:
        return Markup("")
    blocks += _titles(insights)
    caption = (
        "Each stage's model beside the one before it on the same test cases; right: the target is in the top 10. "
        "95 % intervals over users."
    )
    return join(*blocks, pictures(figures, "transitions", "", "Bars of answers lost and gained", caption))


FLOW_HEAD = ("cases", "right before", "lost", "gained")
FLOW_HEAD += ("lost, of right", "lost, of all", "gained, of wrong", "gained, of all")


def _flow_cells(flow: dict[str, float]) -> list[Content]:
    """Counts and shares of answers that turned, below `FLOW_HEAD`."""
    shares = [sure(flow.get(name), flow.get(f"{name}_low"), flow.get(f"{name}_high"), ".1%") for name in FLOWS]
    return [*(f"{int(flow[name]):,}" for name in COUNTS), *shares]


def _titles(insights: Insights) -> list[Content]:
    """Against the untuned backbone, in words."""
    rows = []
    for objective, method, cutoff in insights.titled():
        flow = insights.title_flow(method, objective, cutoff)
        if flow is not None:
            hits = [percent(flow.get(name)) for name in ("right_before", "right_after")]
            cells = (objective, f"Hit@{cutoff}", *hits, f"{cutoff / CANDIDATES:.0%}", *_flow_cells(flow))
            rows.append(TableRow(method, [(text, "") for text in cells]))
    if not rows:
        return []
    intro = (
        f"Against the untuned backbone, which cannot read item codes: each target's title among 99 others, by mean "
        f"log-likelihood a token, after stage {insights.last}. Right: among the first 5 (chance 5 %) or the first 10 "
        "(chance 10 %)."
    )
    head = ["method", "objective", "right", "share before", "share after", "by chance", *FLOW_HEAD]
    return [element("h3", "Right before, wrong after: titles"), element("p", intro, "faint"), table(head, rows)]


def _preservation(insights: Insights, figures: dict[str, Path]) -> Markup:
    rows = []
    for method in insights.methods("drift"):
        row = insights.perplexity(method, insights.last)
        cells = [None, None] if row is None else [two(row["before"]), two(row["value"])]
        drift = mean(insights.drift(method, insights.last).values())
        share = percent(mean(k for k, _ in insights.drift_by_protection(method, insights.last)))
        cells += [None if drift is None else f"{drift:.3f}", share]
        rows.append(TableRow(method, [(cell, "") for cell in cells]))
    if not rows:
        return Markup("")
    if insights.untuned is not None:
        rows.insert(0, TableRow("untuned backbone", [(cell, "") for cell in (None, two(insights.untuned), None, None)]))
    text = insights.found["preservation"]["text"]
    head = [
        "method",
        "perplexity at stage 0" if text else "perplexity before",
        "after",
        "output drift",
        "directions protected, k / n",
    ]
    return join(
        element("h3", "What was kept"),
        element("p", f"On {insights.found['preservation']['corpus']}, after stage {insights.last}.", "faint"),
        table(head, rows),
        pictures(figures, "preservation", "", "Lines of perplexity by stage, drift by layer and by k / n", ""),
    )


def _learnt(insights: Insights) -> Markup:
    """At which quality what was kept was kept."""
    methods = insights.methods("learnt")
    if not methods:
        return Markup("")
    objectives = list(dict.fromkeys(row["objective"] for row in insights.rows("learnt")))
    first = next(name for name in methods if name in insights.found["methods"])
    head: list[Content] = ["method"]
    for objective in objectives:
        head += [objective, f"less {first}", "code tokens"]
    rows = []
    for method in methods:
        cells: list[tuple[Content, str]] = []
        for objective in objectives:
            row = insights.learnt(method).get(objective, {})
            value, tokens = row.get("value"), row.get("tokens")
            cells.append((None if value is None else f"{value:.4f}", ""))
            cells.append((sure(row.get("less"), row.get("low"), row.get("high"), "+.4f"), ""))
            cells.append((None if tokens is None else f"{tokens:,}", ""))
        rows.append(TableRow(method, cells))
    intro = (
        f"Cross-entropy in nats a code token on the windows of stage {insights.last + 1}, which none of the models has "
        "seen; 95 % intervals over batches of windows. Beside what was kept it says at which quality it was kept."
    )
    return join(element("h3", "What was learnt"), element("p", intro, "faint"), table(head, rows))


def _sensitivity(insights: Insights, figures: dict[str, Path]) -> Markup:
    if not insights.rows("sensitivity"):
        return Markup("")
    caption = (
        "Methods of this workspace that differ in one setting alone: Hit@10, mean over stages, with 95 % intervals "
        "over users, and the drift of the methods analysed here, mean over the maps."
    )
    heading = element("h3", "How it hangs on one setting: α, τ, T and others")
    return join(heading, pictures(figures, "sensitivity", "", "Lines of Hit@10 and drift along one setting", caption))


def _memory(insights: Insights, figures: dict[str, Path]) -> Markup:
    rows = [
        TableRow(f"{row['name']}, {row['part']}", [(f"{row['counted']:,}", ""), (f"{row['predicted']:,}", "")])
        for row in insights.rows("memory")
    ]
    if not rows:
        return Markup("")
    return join(
        element("h3", "What training holds besides weights and activations"),
        table(["on the linear maps", "bytes counted", "bytes by formula"], rows),
        pictures(figures, "memory", "", "Bars of bytes", ""),
    )


def two(value: float | None) -> str | None:
    """Two decimals, or nothing."""
    return None if value is None else f"{value:.2f}"


def sure(value: float | None, low: float | None, high: float | None, form: str) -> str | None:
    """A value and its interval, or either alone, or nothing."""
    if value is None or low is None or high is None:
        return None if value is None else f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def percent(value: float | None) -> str | None:
    """A share as a percentage, or nothing."""
    return None if value is None else f"{value:.1%}"
