"""The report's figures as SVG, drawn once for a light and once for a dark page; colours safe for the colour-blind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.reporting.findings import HEADLINE, PROTOCOL_TITLES, Cell, Findings, metric_title, sample_note
from stages.jobs import BASELINES
from stages.workspace import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which vanishes on white, and its black, which vanishes on dark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = (":", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Of the baselines, none twice."""


@dataclass(frozen=True)
class Theme:
    """Ink of a page background."""

    name: str
    ink: str
    faint: str
    grid: str


LIGHT = Theme("light", "#1d2733", "#66727f", "#dfe4ea")
DARK = Theme("dark", "#e4e9ef", "#98a4b1", "#36424f")


def draw_charts(report: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every figure the report has data for, in both themes.

    Args:
        report: contents of report.json.
        folder: files go to `folder/figures`.

    Returns:
        `"<figure>-<theme>"` -> SVG file.
    """
    findings = Findings(report)
    figures: dict[str, Callable[[Findings, Theme], Figure | None]] = {
        "stages": stage_chart,
        **{matrix_name(findings, one): partial(matrix_chart, objective=one) for one in findings.objectives},
        "costs": cost_chart,
    }
    return draw({name: partial(chart, findings) for name, chart in figures.items()}, folder)


def draw(figures: Mapping[str, Callable[[Theme], Figure | None]], folder: Path) -> dict[str, Path]:
    """Write each figure in both themes to `folder/figures`; one that has no data is left out.

    Returns:
        `"<figure>-<theme>"` -> SVG file.
    """
    drawn = {}
    for name, chart in figures.items():
        for theme in (LIGHT, DARK):
            figure = chart(theme)
            if figure is not None:
                drawn[f"{name}-{theme.name}"] = save(figure, folder / "figures" / f"{name}-{theme.name}.svg")
    return drawn


def stage_chart(findings: Findings, theme: Theme) -> Figure | None:
    """Hit@10 by tested stage with 95 % intervals: a panel for a protocol and objective, a line for each method."""
    if not findings.stages:
        return None
    with style(theme):
        tables = [(protocol, objective) for objective in findings.objectives for protocol in findings.protocols]
        figure, panels = panels_of(len(tables), width=5.4, height=3.6, columns=min(len(tables), 2))
        for axes, (protocol, objective) in zip(panels, tables, strict=True):
            _stage_panel(axes, findings, protocol, objective, theme)
        # A baseline of searches stands in their panels only.
        lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        columns = -(-len(lines) // max(1, -(-len(lines) // 5)))
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, frameon=False)
        _name_sample(figure, sample_note(findings.report))
    return figure


def _name_sample(figure: Figure, note: str | None) -> None:
    """A picture is passed on without its page, so that a sample stands in the picture."""
    if note is not None:
        figure.suptitle(note, fontsize=9)


def _stage_panel(axes: Axes, findings: Findings, protocol: str, objective: str, theme: Theme) -> None:
    metric = HEADLINE[0]
    for place, method in enumerate(findings.methods):
        cells = [(stage, findings.cell(method, protocol, metric, objective, stage)) for stage in findings.stages]
        known = [(stage, cell) for stage, cell in cells if cell is not None and cell.value is not None]
        if not known:
            continue
        # Methods stand a little beside each other, or their intervals would cover one another.
        shift = (place - (len(findings.methods) - 1) / 2) * 0.05
        axes.errorbar(
            [stage + shift for stage, _ in known],
            [_or(cell.value, 0.0) for _, cell in known],
            yerr=_whiskers([cell for _, cell in known]),
            label=plain(method),
            elinewidth=1,
            capsize=2,
            **_pen(findings, method, theme),
        )
    several = f", {objective}" if len(findings.objectives) > 1 else ""
    axes.set_title(PROTOCOL_TITLES.get(protocol, protocol) + several, loc="left")
    axes.set_xlabel("tested stage")
    axes.set_ylabel(metric_title(metric))
    axes.set_xticks(findings.stages)
    axes.set_ylim(bottom=0)


def _pen(findings: Findings, method: str, theme: Theme) -> dict[str, Any]:
    if method in BASELINES:
        dashes = DASHES[BASELINES.index(method) % len(DASHES)]
        return {"color": theme.faint, "linestyle": dashes, "linewidth": 1.2, "marker": ".", "markersize": 4}
    place = findings.methods.index(method) % len(COLOURS)
    return {"color": COLOURS[place], "linewidth": 1.8, "marker": MARKERS[place], "markersize": 5}


def _whiskers(cells: list[Cell]) -> list[list[float]]:
    """(2, n) lengths below and above each value; 0 where there is no interval."""
    below = [max(0.0, _or(cell.value, 0) - _or(cell.low, _or(cell.value, 0))) for cell in cells]
    above = [max(0.0, _or(cell.high, _or(cell.value, 0)) - _or(cell.value, 0)) for cell in cells]
    return [below, above]


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def matrix_name(findings: Findings, objective: str) -> str:
    """Name of the figure of R[i][j]: `matrix` for the report's first objective, `matrix_search` for searches."""
    return "matrix" if objective == findings.leading_objective else f"matrix_{objective}"


def matrix_chart(
    findings: Findings, theme: Theme, only: str | None = None, objective: str | None = None
) -> Figure | None:
    """R[i][j] of each method as heat maps on one scale; `only` draws a single method's."""
    grids = {
        name: grid
        for name in findings.methods
        if (only is None or name == only) and (grid := findings.grid(name, objective=objective))
    }
    if not grids:
        return None
    top = max(value for grid in grids.values() for value in grid.values())
    with style(theme):
        columns = min(3, len(grids))
        figure, panels = panels_of(len(grids), width=3.7, height=3.0, columns=columns)
        image = None
        for axes, (method, grid) in zip(panels, grids.items(), strict=False):
            image = _heat_map(axes, grid, top or 1.0)
            axes.set_title(plain(method), loc="left")
        if image is not None:
            bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02)
            bar.set_label(metric_title(findings.report["matrix"][0]["metric"]))
            bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] (a Spine, typed as a callable)
        _name_sample(figure, _matrix_note(findings.report))
    return figure


def _matrix_note(report: dict[str, Any]) -> str | None:
    """R[i][j] has a sample of its own, whether the headline numbers are a quick look's or not."""
    users = report["config"].get("evaluation", {}).get("matrix_users")
    return f"a seeded sample of at most {users} test users a stage" if users else None


def _heat_map(axes: Axes, grid: dict[tuple[int, int], float], top: float) -> Any:
    size = max(max(place) for place in grid) + 1
    cells = [[grid.get((trained, tested), float("nan")) for tested in range(size)] for trained in range(size)]
    image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=top)
    for (trained, tested), value in grid.items():
        ink = "#10151b" if value > 0.5 * top else "#ffffff"
        text = f"{value:.3f}".removeprefix("0")
        # What the model was last trained on stands out: left of the diagonal is the past, right of it the future.
        weight = "bold" if trained == tested else "normal"
        axes.text(tested, trained, text, ha="center", va="center", color=ink, fontsize=8, fontweight=weight)
    axes.set_xlabel("tested stage j")
    axes.set_ylabel("after training stage i")
    axes.set_xticks(range(size))
    axes.set_yticks(range(size))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def cost_chart(findings: Findings, theme: Theme) -> Figure | None:
    """Seconds and kept megabytes for one update, and queries a second when answering, a bar for each method."""
    methods = [name for name in findings.methods if findings.costs(name)]
    if not methods:
        return None
    wanted = (
        ("train_seconds", 1.0, "seconds for one update"),
        ("bytes", 2.0**20, "MiB kept for one update"),
        ("queries_per_second", 1.0, "queries answered a second"),
    )
    with style(theme):
        figure, panels = panels_of(3, width=3.6, height=0.6 + 0.34 * len(methods), columns=3)
        for number, (axes, (name, unit, title)) in enumerate(zip(panels, wanted, strict=True)):
            values = [_or(findings.costs(method).get(name), 0) / unit for method in methods]
            colours = [_pen(findings, method, theme)["color"] for method in methods]
            bars = axes.barh([plain(method) for method in methods], values, color=colours, height=0.62)
            axes.bar_label(bars, fmt="%.3g", padding=3, color=theme.ink)
            axes.set_title(title, loc="left")
            axes.margins(x=0.18)
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0, labelleft=number == 0)
        _name_sample(figure, sample_note(findings.report))
    return figure


def plain(name: str) -> str:
    """A name as text: no dollar of it starts a formula, no leading underscore hides it from a legend."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def panels_of(count: int, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each of that many inches, `columns` a row."""
    from matplotlib.figure import Figure

    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.set_visible(False)
    return figure, panels[:count]


def style(theme: Theme) -> Any:
    """matplotlib's settings for one background, as a context."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": theme.ink,
            "axes.labelcolor": theme.faint,
            "axes.edgecolor": theme.grid,
            "axes.titlecolor": theme.ink,
            "axes.titleweight": "bold",
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.grid,
            "grid.linewidth": 0.6,
            "xtick.color": theme.faint,
            "ytick.color": theme.faint,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
        }
    )


def save(figure: Figure, path: Path) -> Path:
    """Write an SVG, whole or not at all."""
    import matplotlib

    # A fixed salt and no date: the same numbers give the same file.
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "driftrec"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path
