"""How GEMS's result hangs on a setting, read from what a workspace has trained; nothing is trained for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from regularizers.gate import LEARNED
from stages.method_config import GemsConfig
from stages.workspace import digest_of

AXES = ("scale", "gate_temperature", "k_value", "rank", "refresh_every", "refresh")
"""α (or a), τ, the strength of the protection, r, T and the kind of refresh: what a curve may run along."""
DRIFT = "drift"
METRICS = ("hit_at_10", "ndcg_at_10", DRIFT)
Row = dict[str, Any]


def sensitivity(reports: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Points of curves along which exactly one setting of GEMS changes.

    Args:
        reports: contents of report.json files, the newest first: of two that measured one setting it counts.
            `drift_report` makes one of what an analysis measured.

    Returns:
        Rows with `axis`, `x`, `curve` (a digest of everything else that was alike), `method`, protocol, objective,
        metric, value, low, high; curves of fewer than two different x are left out.
    """
    points: dict[tuple[Any, ...], Row] = {}
    for report in reports:
        config = report["config"]
        aside = {"name", "workspace", "methods", "compare", "seeds", "retrain", "analysis"}
        alike = {name: table for name, table in config.items() if name not in aside}
        for row in _means(report):
            settings = _gems_settings(report, row["method"])
            for axis in (name for name in AXES if settings.get(name) is not None):
                rest = {name: value for name, value in settings.items() if name != axis}
                curve = digest_of([axis, rest, alike, report["command"]["seeds"]])[:12]
                place = {name: row[name] for name in ("protocol", "objective", "metric")}
                point = {"axis": axis, "x": settings[axis], "curve": curve, "method": row["method"], **place}
                point |= {name: row[name] for name in ("value", "low", "high")}
                points.setdefault((curve, point["x"], *place.values()), point)
    several: dict[str, set[Any]] = {}
    for point in points.values():
        several.setdefault(point["curve"], set()).add(point["x"])
    kept = [point for point in points.values() if len(several[point["curve"]]) > 1]
    return sorted(kept, key=lambda point: (point["axis"], point["curve"], point["x"]))


def drift_report(
    measured: Iterable[Row], stage: int, like: Mapping[str, Any], protocol: str, seed: int
) -> dict[str, Any]:
    """A report of how far each method had moved the maps' outputs: what a protection is to hold down.

    Args:
        measured: rows with `method`, `stage` and `value`, one for each map (`stages.analysis.measured`).
        stage: after which.
        like: the report that the methods are of; lends its settings.
        protocol: of the models.
        seed: of the models.
    """
    found: dict[str, list[float]] = {}
    for row in measured:
        if row["stage"] == stage and row["value"] is not None:
            found.setdefault(row["method"], []).append(row["value"])
    place = {"seed": seed, "stage": "mean", "slice": "all", "protocol": protocol, "objective": "both", "metric": DRIFT}
    rows = [
        {**place, "method": method, "value": sum(values) / len(values), "low": None, "high": None}
        for method, values in found.items()
    ]
    return {"rows": rows, "settings": like.get("settings", {}), "config": like["config"], "command": {"seeds": [seed]}}


def _means(report: Mapping[str, Any]) -> list[Row]:
    """The means over stages, of all seeds together or of the only one."""
    rows = [
        row
        for row in report["rows"]
        if row["stage"] == "mean" and row["slice"] == "all" and row["metric"] in METRICS and row["value"] is not None
    ]
    pooled = {row["method"] for row in rows if row["seed"] is None}
    return [row for row in rows if row["seed"] is None or row["method"] not in pooled]


def _gems_settings(report: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings `method` had when it was measured, its gate's warm-up in steps; empty if it is no GEMS.

    Empty, too, for a report that is older than this record: what its version's defaults were is not known.
    """
    own = report.get("settings", {}).get(method)
    if own is None or own.get("method") != "gems":
        return {}
    values = GemsConfig.model_validate(own).model_dump(mode="json")
    warmup = values["refresh_every"] if values["gate_warmup"] is None else values["gate_warmup"]
    # Where it follows T it is a second setting that differs; a gate that learns nothing has none.
    return {**values, "gate_warmup": warmup if values["gate"] in LEARNED else None}
