"""The figures of an analysis, drawn like the report's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.reporting.charts import COLOURS, MARKERS, Theme, draw, panels_of, plain, style
from flows.reporting.findings import metric_title
from flows.reporting.insights import AXES, KINDS, Insights, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Weight types as the paper's figure has them; others follow as they come."""
DRIFT_LABEL = "‖ΔW X‖ / ‖W X‖"


def draw_analysis(analysis: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every figure the analysis has data for, in both themes, to `folder/figures`.

    Returns:
        `"<figure>-<theme>"` -> SVG file.
    """
    insights = Insights(analysis)
    figures: dict[str, Callable[[Insights, Theme], Figure | None]] = {
        "conflict": conflict_chart,
        "transitions": transition_chart,
        "preservation": preservation_chart,
        "sensitivity": sensitivity_chart,
        "memory": memory_chart,
    }
    return draw({name: partial(chart, insights) for name, chart in figures.items()}, folder)


def conflict_chart(insights: Insights, theme: Theme) -> Figure | None:
    """ρ by layer and weight type: a row of heat maps for each kind and its noise floor, a column for each method."""
    methods = insights.methods("conflict")
    if not methods:
        return None
    kinds = [
        (kind, floor)
        for kind in insights.kinds()
        for floor in (False, True)
        if any(insights.grid(m, kind, floor) for m in methods)
    ]
    with style(theme):
        figure, panels = panels_of(len(kinds) * len(methods), width=2.7, height=2.2, columns=len(methods))
        image = None
        for place, axes in enumerate(panels):
            (kind, floor), method = kinds[place // len(methods)], methods[place % len(methods)]
            grid = insights.grid(method, kind, floor)
            if not grid:
                axes.set_axis_off()
                continue
            image = _heat_map(axes, grid)
            what = f"{'noise floor of ' if floor else ''}{KINDS[kind]}"
            axes.set_title(f"{plain(method)}: {insights.rho(method, kind, floor):.2f}\n{what}", loc="left", fontsize=7)
        if image is not None:
            bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.02)
            bar.set_label("ρ: 0 alike, 1 unrelated, 2 opposed")
            bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] (a Spine, typed as a callable)
    return figure


def _heat_map(axes: Axes, grid: dict[tuple[int, str], float]) -> Any:
    layers = sorted({layer for layer, _ in grid})
    found = list(dict.fromkeys(kind for _, kind in grid))
    kinds = sorted(found, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), found.index(kind)))
    cells = [[grid.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    image = axes.imshow(cells, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds], fontsize=7)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def transition_chart(insights: Insights, theme: Theme) -> Figure | None:
    """Answers lost and gained, as shares of what was right and wrong before: a panel an objective and kind of test."""
    methods, objectives = insights.methods("transitions"), insights.objectives()
    tables = [(objective, earlier) for objective in objectives for earlier in (True, False)]
    tables = [table for table in tables if any(insights.flow(method, *table) for method in methods)]
    if not tables:
        return None
    with style(theme):
        figure, panels = panels_of(len(tables), width=4.4, height=0.9 + 0.3 * len(methods), columns=2)
        for axes, (objective, earlier) in zip(panels, tables, strict=True):
            flows = [insights.flow(method, objective, earlier) or {} for method in methods]
            lost = [-100 * flow.get("lost_share", 0.0) for flow in flows]
            gained = [100 * flow.get("gained_share", 0.0) for flow in flows]
            names = [plain(method) for method in methods]
            axes.barh(names, lost, color=COLOURS[1], height=0.6, label="right → wrong, % of right")
            axes.barh(names, gained, color=COLOURS[0], height=0.6, label="wrong → right, % of wrong")
            axes.set_title(f"{objective}, {'earlier stages' if earlier else 'the stage just trained'}", loc="left")
            axes.set_xlim(min(-5.0, 1.1 * min(lost)), max(5.0, 1.1 * max(gained)))
            axes.axvline(0, color=theme.faint, linewidth=0.8)
            axes.invert_yaxis()
            axes.grid(False, axis="y")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def preservation_chart(insights: Insights, theme: Theme) -> Figure | None:
    """Perplexity by stage, and relative output drift after the last stage by layer; a line for each method.

    Where inputs were protected, the drift of each map stands a third time by its share k / n of protected directions.
    Where a stage comes after, what each model kept stands against what it learnt.
    """
    methods = insights.methods("drift")
    if not methods:
        return None
    kept = {m: points for m in methods if (points := insights.drift_by_protection(m, insights.last))}
    with style(theme):
        count = 2 + bool(kept) + bool(insights.rows("learnt"))
        figure, (left, right, *more) = panels_of(count, width=4.6, height=3.2, columns=2 if count == 4 else count)
        if kept:
            _protection_panel(more[0], insights, methods, kept)
        if insights.rows("learnt"):
            _learnt_panel(more[-1], insights, methods)
        for place, method in enumerate(methods):
            pen: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            rows = [row for row in insights.rows("perplexity") if row["method"] == method]
            left.plot([row["stage"] for row in rows], [row["value"] for row in rows], label=plain(method), **pen)
            drift = insights.drift(method, insights.last)
            right.plot(list(drift), list(drift.values()), label=plain(method), **pen)
        if insights.untuned is not None:
            left.axhline(insights.untuned, color=theme.faint, linestyle="--", linewidth=0.8)
            left.annotate("untuned", (0, insights.untuned), color=theme.faint, fontsize=7, va="bottom")
        text = insights.found["preservation"]["text"]
        left.set_title("perplexity of held-out text" if text else "perplexity on the stage before", loc="left")
        left.set_xlabel("after stage")
        left.set_xticks(range(insights.last + 1))
        right.set_title(f"output drift from stage 0, after stage {insights.last}", loc="left")
        right.set_xlabel("layer")
        right.set_ylabel(DRIFT_LABEL)
        layers = sorted({row["layer"] for row in insights.rows("drift")})
        right.set_xticks(layers[:: -(-len(layers) // 12)])  # more would run into each other
        right.set_ylim(bottom=0)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def _learnt_panel(axes: Axes, insights: Insights, methods: list[str]) -> None:
    """A point a method: the mean of the objectives' losses on the stage to come, and what it kept."""
    text = insights.found["preservation"]["text"]
    for place, method in enumerate(methods):
        loss = mean(row["value"] for row in insights.learnt(method).values())
        row = insights.perplexity(method, insights.last) if text else None
        held = mean(insights.drift(method, insights.last).values()) if row is None else row["value"]
        if loss is not None and held is not None:
            pen: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            axes.plot([loss], [held], linestyle="", **pen)
            axes.annotate(plain(method), (loss, held), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_title("kept against learnt; best is low on the left", loc="left")
    axes.set_xlabel(f"loss of stage {insights.last + 1}, nats a code token")
    axes.set_ylabel("perplexity of held-out text" if text else "output drift from stage 0")


def _protection_panel(
    axes: Axes, insights: Insights, methods: list[str], kept: dict[str, list[tuple[float, float]]]
) -> None:
    """A point a map, in the colours of the lines beside it."""
    for method, points in kept.items():
        place = methods.index(method)
        shares, drifts = zip(*points, strict=True)
        axes.scatter(
            shares, drifts, s=14, alpha=0.7, color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)]
        )
    axes.set_title(f"the same, map by map, after stage {insights.last}", loc="left")
    axes.set_xlabel("share of input directions protected, k / n")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)


def sensitivity_chart(insights: Insights, theme: Theme) -> Figure | None:
    """Hit@10 and drift along each setting that some methods differ in alone: a panel a setting and objective."""
    drawn = ("hit_at_10", "drift")
    rows = [row for row in insights.rows("sensitivity") if row["metric"] in drawn and row["value"] is not None]
    tables = list(dict.fromkeys((row["axis"], row["protocol"], row["objective"], row["metric"]) for row in rows))
    if not tables:
        return None
    with style(theme):
        figure, panels = panels_of(len(tables), width=4.2, height=3.0, columns=min(3, len(tables)))
        for axes, table in zip(panels, tables, strict=True):
            own = [row for row in rows if (row["axis"], row["protocol"], row["objective"], row["metric"]) == table]
            for place, curve in enumerate(dict.fromkeys(row["curve"] for row in own)):
                _curve(axes, [row for row in own if row["curve"] == curve], place)
            axes.set_title(f"{table[1].replace('_', ' ')}, {table[2]}", loc="left")
            axes.set_xlabel(AXES[table[0]])
            if table[0] == "refresh_every":
                axes.set_xscale("log")
                axes.set_xticks(
                    sorted({row["x"] for row in own}), [f"{x:,}" for x in sorted({row["x"] for row in own})]
                )
                axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_ylabel(DRIFT_LABEL if table[3] == "drift" else metric_title(table[3]))
    return figure


def _curve(axes: Axes, rows: list[dict[str, Any]], place: int) -> None:
    values = [row["value"] for row in rows]
    below = [row["value"] - (row["value"] if row["low"] is None else row["low"]) for row in rows]
    above = [(row["value"] if row["high"] is None else row["high"]) - row["value"] for row in rows]
    pen: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
    if isinstance(rows[0]["x"], str):  # kinds have no order for a line to follow
        pen["linestyle"] = "none"
    axes.errorbar([row["x"] for row in rows], values, yerr=[below, above], capsize=2, elinewidth=1, **pen)


def memory_chart(insights: Insights, theme: Theme) -> Figure | None:
    """Bytes of state and gradients by way of training, counted on tensors."""
    rows = insights.rows("memory")
    if not rows:
        return None
    with style(theme):
        figure, panels = panels_of(1, width=6.4, height=0.8 + 0.28 * len(rows))
        names = [f"{row['name']}, {row['part']}" for row in rows]
        ways = list(dict.fromkeys(row["name"] for row in rows))
        colours = [COLOURS[ways.index(row["name"]) % len(COLOURS)] for row in rows]
        bars = panels[0].barh(names, [row["counted"] / 2**20 for row in rows], color=colours, height=0.62)
        panels[0].bar_label(bars, fmt="%.3g", padding=3, color=theme.ink)
        panels[0].set_title("MiB, counted on allocated tensors", loc="left")
        panels[0].margins(x=0.15)
        panels[0].invert_yaxis()
        panels[0].grid(False, axis="y")
    return figure
