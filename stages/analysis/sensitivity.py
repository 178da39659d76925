"""How GEMS's result hangs on a setting, read from what a workspace has trained; nothing is trained for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from regularizers.gate import LEARNED
from stages.method_config import BUILT_IN, GemsConfig
from stages.workspace import digest_of

AXES = ("scale", "gate_temperature", "k_value", "rank", "refresh_every", "refresh")
"""α (or a), τ, the strength of the protection, r, T and the kind of refresh: what a curve may run along."""
METRICS = ("hit_at_10", "ndcg_at_10")
Row = dict[str, Any]


def sensitivity(reports: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Points of curves along which exactly one setting of GEMS changes.

    Args:
        reports: contents of report.json files, the newest first: of two that measured one setting it counts.

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
            settings = _gems_settings(config, row["method"])
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


def _means(report: Mapping[str, Any]) -> list[Row]:
    """The means over stages, of all seeds together or of the only one."""
    rows = [
        row
        for row in report["rows"]
        if row["stage"] == "mean" and row["slice"] == "all" and row["metric"] in METRICS and row["value"] is not None
    ]
    pooled = {row["method"] for row in rows if row["seed"] is None}
    return [row for row in rows if row["seed"] is None or row["method"] not in pooled]


def _gems_settings(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings `method` had in a recorded config, its gate's warm-up in steps; empty if it is no GEMS."""
    own = config.get("methods", {}).get(method)
    if own is None and isinstance(known := BUILT_IN.get(method), GemsConfig):
        own = known.model_dump(mode="json")
    if own is None or own.get("method") != "gems":
        return {}
    values = GemsConfig.model_validate(own).model_dump(mode="json")
    warmup = values["refresh_every"] if values["gate_warmup"] is None else values["gate_warmup"]
    # Where it follows T it is a second setting that differs; a gate that learns nothing has none.
    return {**values, "gate_warmup": warmup if values["gate"] in LEARNED else None}
