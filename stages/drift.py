"""How much a log changes from stage to stage: a table, and its picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.split import Stage, load_stages
from stages.workspace import Workspace, replacing

# Okabe and Ito's palette: told apart by every kind of colour vision, and by lightness in print.
NEW, KNOWN, LINE, INK, FAINT = "#E69F00", "#56B4E9", "#0072B2", "#222222", "#D9D9D9"


def drift_table(workspace: Workspace) -> list[dict[str, Any]]:
    """One row a stage.

    Keys: index, start, end, events, users, new_users, returning_users, items, new_items, known_items; `new_item_events`
    (share of the stage's events on items first met in it), `drift` (Jensen-Shannon distance between the item
    distributions of this stage and the one before: square root of the divergence in bits, 0 the same, 1 disjoint) and
    `median_history` (median over the stage's users of how many events they have up to its end). A value that is not
    defined (an empty stage, the first stage's drift) is None.

    Raises:
        UserError: no stages, or damaged ones.
    """
    stages = load_stages(workspace)
    events: dict[str, int] = {}
    seen: set[str] = set()
    previous: pl.DataFrame | None = None
    table = []
    for stage in stages:
        frame = pl.read_parquet(workspace.root / stage.path, columns=["user_id", "item_id"])
        items = frame["item_id"].value_counts()
        history = frame["user_id"].value_counts()
        for user, count in history.iter_rows():
            events[user] = events.get(user, 0) + count
        fresh = items.filter(~pl.col("item_id").is_in(list(seen)))["count"].sum()
        table.append(
            _row(stage)
            | {
                "new_item_events": fresh / stage.events if stage.events else None,
                "drift": None if previous is None else jensen_shannon(previous, items),
                "median_history": float(np.median([events[user] for user in history["user_id"]]))
                if stage.users
                else None,
            }
        )
        seen.update(items["item_id"])
        previous = items
    return table


def jensen_shannon(before: pl.DataFrame, after: pl.DataFrame) -> float | None:
    """Jensen-Shannon distance of two tables of `item_id` and `count`: square root of the divergence in bits.

    A metric between 0 (equal shares) and 1 (no item in common); Endres and Schindelin, 2003. None if a table is empty.
    """
    if before.is_empty() or after.is_empty():
        return None
    both = before.join(after, on="item_id", how="full", coalesce=True, suffix="_after").sort("item_id").fill_null(0)
    p, q = (both[name].to_numpy() / both[name].sum() for name in ("count", "count_after"))
    middle = (p + q) / 2
    divergence = (_information(p, middle) + _information(q, middle)) / 2
    return float(np.sqrt(min(max(divergence, 0.0), 1.0)))


def _information(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(p || q) in bits; q > 0 wherever p > 0."""
    there = p > 0
    return float(np.sum(p[there] * np.log2(p[there] / q[there])))


def _row(stage: Stage) -> dict[str, Any]:
    row = asdict(stage)
    names = ("index", "start", "end", "events", "users", "new_users", "returning_users", "items", "new_items")
    return {name: row[name] for name in names} | {"known_items": stage.items - stage.new_items}


def draw_drift(workspace: Workspace, path: Path) -> Path:
    """Draw the drift table: users and items of each stage by whether they were met before, and how far items moved.

    Args:
        workspace: holds the stages.
        path: PNG to write, whole or not at all.

    Returns:
        `path`.

    Raises:
        UserError: no stages, or damaged ones.
    """
    table = drift_table(workspace)
    # Long logs keep readable ticks because the picture grows with the number of stages, up to a width that fits a page.
    figure = Figure(figsize=(min(max(10.5, 0.7 * len(table) + 7), 20), 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    users, items, drift = figure.subplots(1, 3)
    _stacked(users, table, "returning_users", "new_users", "Users", ("returning", "new"))
    _stacked(items, table, "known_items", "new_items", "Items", ("known", "new"))
    _moves(drift, table)
    with replacing(path) as temporary:
        # Without the software's name and date the same stages give the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _stacked(
    axes: Axes, table: list[dict[str, Any]], below: str, above: str, title: str, labels: tuple[str, str]
) -> None:
    index = [row["index"] for row in table]
    base = np.array([row[below] for row in table])
    top = np.array([row[above] for row in table])
    axes.bar(index, base, 0.72, color=KNOWN, label=labels[0])
    axes.bar(index, top, 0.72, bottom=base, color=NEW, label=labels[1], hatch="////", edgecolor="white", linewidth=0)
    height = max(float((base + top).max()), 1.0)
    if len(table) <= 12:
        for x, low, high in zip(index, base, top, strict=True):
            share = f"{high / (low + high):.0%}" if low + high else "empty"
            axes.annotate(
                share, (x, low + high), (0, 3), textcoords="offset points", ha="center", fontsize=8.5, color=INK
            )
    axes.set_ylim(0, height * 1.32)  # the legend stands above the highest bar and its share
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _dress(axes, f"{title} per stage", "share of new ones above each bar")
    axes.legend(frameon=False, fontsize=9, loc="upper right", handlelength=1.4)


def _moves(axes: Axes, table: list[dict[str, Any]]) -> None:
    index = [row["index"] for row in table]
    drift = np.array([np.nan if row["drift"] is None else row["drift"] for row in table])
    share = np.array([np.nan if row["new_item_events"] is None else row["new_item_events"] for row in table])
    share[0] = np.nan  # in stage 0 every item is new
    axes.plot(index, drift, color=LINE, marker="o", linewidth=2, label="distance from the stage before")
    axes.plot(index, share, color=NEW, marker="s", linewidth=2, linestyle="--", label="share of events on new items")
    if len(table) <= 12:
        for values, color in ((drift, LINE), (share, INK)):
            for x, value in zip(index, values, strict=True):
                if np.isfinite(value):
                    axes.annotate(
                        f"{value:.2f}",
                        (x, value),
                        (0, 6),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8.5,
                        color=color,
                    )
    axes.set_xlim(-0.5, max(index) + 0.5)
    axes.set_ylim(0, 1.28)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    _dress(axes, "Drift of the items", "Jensen-Shannon: 0 same shares, 1 none in common")
    axes.legend(frameon=False, fontsize=9, loc="upper right", handlelength=2.2)


def _dress(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=8.5, color="#595959")
    axes.set_xlabel("stage", fontsize=9.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#8C8C8C")
