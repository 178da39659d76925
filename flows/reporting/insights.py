"""An analysis's rows, arranged to be shown: the page, the terminal and MLflow all read analysis.json through here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
BETWEEN = "between"
FIGURES = ("conflict", "transitions", "preservation", "sensitivity", "memory")
KINDS = {"gradient": "raw gradients"}
KINDS |= {"update_before_fusion": "updates before fusion", "update": "updates after fusion"}
"""What conflict is measured on."""
COUNTS = ("cases", "before", "lost", "gained")
FLOWS = {"lost_share": "lost", "lost_of_all": "lost_of_all"}
FLOWS |= {"gained_share": "gained", "gained_of_all": "gained_of_all"}
"""Shares of answers that turned, and what MLflow calls them."""
ENDS = {"value": "", "low": "_low", "high": "_high"}
"""Of an interval, and what MLflow adds to a name for them."""
CANDIDATES = 100
"""Titles that a target's stands among, itself included."""
AXES = {"scale": "α, scale of the update", "gate_temperature": "τ, temperature of the gate"}
AXES |= {"k_value": "strength of the protection", "rank": "rank of the shared subspace"}
AXES |= {"refresh_every": "T, steps between two refreshes", "refresh": "kind of refresh"}


@dataclass(frozen=True)
class Insights:
    """Look-ups over one analysis (the contents of analysis.json)."""

    found: Row

    def methods(self, part: str) -> list[str]:
        """Methods that a part has rows of."""
        return list(dict.fromkeys(row["method"] for row in self.rows(part)))

    def rows(self, part: str) -> list[Row]:
        """Rows of a part of analysis.json, or of its `preservation`; none of a part that an earlier version lacks."""
        return self.found[part] if part in self.found else self.found["preservation"].get(part, [])

    def kinds(self) -> list[str]:
        """Kinds of conflict that any method has rows of, in the order of `KINDS`."""
        present = {row["kind"] for row in self.rows("conflict")}
        return [kind for kind in KINDS if kind in present]

    def grid(self, method: str, kind: str, floor: bool) -> dict[tuple[int, str], float]:
        """ρ by layer and weight type: between the objectives, or its noise floor, from ρ within each of the two.

        The floor is `stages.analysis.conflict.noise_floor`: one less the geometric mean of the cosines within.
        """
        cells: dict[tuple[int, str], list[float]] = {}
        for row in self._conflicts(method, kind, floor):
            if row["rho"] is not None:
                cells.setdefault((row["layer"], row["map"]), []).append(row["rho"])
        return {
            place: 1 - math.prod(max(1 - rho, 0) for rho in values) ** (1 / len(values)) if floor else values[0]
            for place, values in cells.items()
        }

    def rho(self, method: str, kind: str, floor: bool = False) -> float | None:
        """Mean of `grid`."""
        return mean(self.grid(method, kind, floor).values())

    def below_zero(self, method: str, kind: str, floor: bool = False) -> float | None:
        """Share of all pairs and maps whose cosine is negative."""
        return mean(row["below_zero"] for row in self._conflicts(method, kind, floor))

    def above_floor(self, method: str, kind: str) -> Row:
        """ρ less its noise floor, `value`, and the `low` and `high` end of its interval; each may be None."""
        rows = (row for row in self.rows("above_floor") if (row["method"], row["kind"]) == (method, kind))
        rho, floor = self.rho(method, kind), self.rho(method, kind, floor=True)
        plain = {"value": None if rho is None or floor is None else rho - floor, "low": None, "high": None}
        return next(rows, plain)

    def _conflicts(self, method: str, kind: str, floor: bool) -> list[Row]:
        return [
            row
            for row in self.rows("conflict")
            if (row["method"], row["kind"], row["pair"] != BETWEEN) == (method, kind, floor)
        ]

    def objectives(self) -> list[str]:
        """Objectives whose answers were compared."""
        return list(dict.fromkeys(row["objective"] for row in self.rows("transitions")))

    def flow(self, method: str, objective: str, earlier: bool, trained: int | None = None) -> dict[str, float] | None:
        """Counts of answers that turned, summed, and their shares.

        Args:
            method: name.
            objective: name.
            earlier: on tests of stages before the one just trained; else on that stage's own.
            trained: after this stage; absent: after all of them.

        Returns:
            As `with_shares`, and the ends of the shares' intervals by name and `_low` or `_high`, where they are known;
            None where nothing was compared.
        """
        rows = [
            row
            for row in self.rows("transitions")
            if (row["method"], row["objective"], row["tested"] < row["trained"]) == (method, objective, earlier)
            and trained in (None, row["trained"])
        ]
        if not rows:
            return None
        ends = (
            row["intervals"]
            for row in self.rows("shares")
            if (row["method"], row["objective"], row["earlier"], row["trained"])
            == (method, objective, earlier, trained)
        )
        return with_shares(rows) | _ends(next(ends, {}))

    def title_flow(self, method: str, objective: str, cutoff: int) -> dict[str, float] | None:
        """The same against the untuned backbone, in titles: right is a rank up to `cutoff` among a hundred."""
        rows = [
            row
            for row in self.rows("titles")
            if (row["method"], row["objective"], row.get("cutoff", 10)) == (method, objective, cutoff)
        ]
        return with_shares(rows) | _ends(rows[0].get("intervals", {})) if rows else None

    def titled(self) -> list[tuple[str, str, int]]:
        """Objective, method and cut-off of every flow in titles, in the order they are shown."""
        found = {(row["objective"], row["method"], row.get("cutoff", 10)) for row in self.rows("titles")}
        methods = self.methods("titles")
        return sorted(found, key=lambda place: (place[0], methods.index(place[1]), place[2]))

    def perplexity(self, method: str, stage: int) -> Row | None:
        """`value` and `before` of a method after a stage."""
        return next((r for r in self.rows("perplexity") if (r["method"], r["stage"]) == (method, stage)), None)

    def learnt(self, method: str) -> dict[str, Row]:
        """Objective -> its row on the stage to come: `value`, and against the first method `less`, `low`, `high`."""
        return {row["objective"]: row for row in self.rows("learnt") if row["method"] == method}

    @property
    def untuned(self) -> float | None:
        """Perplexity of the held-out text before any training; None without a text."""
        return self.found["preservation"].get("untuned")

    def drift(self, method: str, stage: int) -> dict[int, float]:
        """Relative output drift by layer, mean over its maps."""
        cells: dict[int, list[float]] = {}
        for row in self.rows("drift"):
            if (row["method"], row["stage"]) == (method, stage) and row["value"] is not None:
                cells.setdefault(row["layer"], []).append(row["value"])
        return {layer: sum(values) / len(values) for layer, values in sorted(cells.items())}

    def drift_by_protection(self, method: str, stage: int) -> list[tuple[float, float]]:
        """(k / n, drift) of each linear map whose inputs were protected, by rising share; empty for other methods."""
        return sorted(
            (row["k_over_n"], row["value"])
            for row in self.rows("drift")
            if (row["method"], row["stage"]) == (method, stage) and "k_over_n" in row and row["value"] is not None
        )

    @property
    def last(self) -> int:
        """The last stage looked at."""
        return self.found["stage"]

    def points(self, method: str) -> list[tuple[str, float, int]]:
        """Every scalar of a method as (name, value, stage)."""
        found: list[tuple[str, float | None, int]] = []
        for kind in KINDS:
            found += [
                (f"conflict/{kind}", self.rho(method, kind), self.last),
                (f"conflict/{kind}_noise_floor", self.rho(method, kind, floor=True), self.last),
                (f"conflict/{kind}_below_zero", self.below_zero(method, kind), self.last),
            ]
            above = self.above_floor(method, kind)
            found += [(f"conflict/{kind}_above_floor{end}", above[own], self.last) for own, end in ENDS.items()]
        for stage in range(1, self.last + 1):
            for objective in self.objectives():
                for place, earlier in (("earlier", True), ("own", False)):
                    flow = self.flow(method, objective, earlier, stage) or {}
                    found += [(name, value, stage) for name, value in _flow_points(flow, f"{objective}_{place}")]
        for stage in range(self.last + 1):
            found.append(("drift", mean(self.drift(method, stage).values()), stage))
            found.append(("protected_share", mean(k for k, _ in self.drift_by_protection(method, stage)), stage))
            row = self.perplexity(method, stage)
            found.append(("perplexity", None if row is None else row["value"], stage))
        if self.perplexity(method, self.last) is not None:
            found.append(("perplexity_untuned", self.untuned, self.last))
        for objective, row in self.learnt(method).items():
            names = ("value", "less", "low", "high")
            ends = ("", "_less", "_less_low", "_less_high")
            found += [
                (f"coming_loss/{objective}{end}", row.get(own), self.last) for own, end in zip(names, ends, strict=True)
            ]
        found += self._title_points(method)
        return [(name, value, stage) for name, value, stage in found if value is not None]

    def _title_points(self, method: str) -> list[tuple[str, float | None, int]]:
        """Shares that turned in titles, and Hit@5 and Hit@10 before and after, beside chance."""
        found: list[tuple[str, float | None, int]] = []
        for objective, name, cutoff in self.titled():
            flow = self.title_flow(method, objective, cutoff)
            if name != method or flow is None:
                continue
            place = f"{objective}_titles" + ("" if cutoff == 10 else f"_at_{cutoff}")
            found += [(n, value, self.last) for n, value in _flow_points(flow, place)]
            for n in ("before", "after"):
                found.append((f"titles/{objective}_hit_at_{cutoff}_{n}", flow.get(f"right_{n}"), self.last))
            found.append((f"titles/hit_at_{cutoff}_chance", cutoff / CANDIDATES, self.last))
        return list(dict.fromkeys(found))


def _flow_points(flow: dict[str, float], place: str) -> list[tuple[str, float | None]]:
    """Shares and the ends of their intervals, as MLflow calls them."""
    return [(f"{name}/{place}{end}", flow.get(own + end)) for own, name in FLOWS.items() for end in ENDS.values()]


def _ends(intervals: dict[str, list[float]]) -> dict[str, float]:
    """The ends of intervals under names of their own."""
    return {
        f"{name}{end}": value
        for name, own in intervals.items()
        for end, value in zip(("_low", "_high"), own, strict=True)
    }


def with_shares(rows: Iterable[Row]) -> dict[str, float]:
    """Counts of answers that turned, summed, and their shares.

    Returns:
        `cases, before, lost, gained`; `lost_share` (of the right ones), `lost_of_all`, `gained_share` (of the wrong
        ones), `gained_of_all`, `right_before` and `right_after` (of all), but for shares of nothing.
    """
    counted = list(rows)
    total: dict[str, float] = {name: sum(row[name] for row in counted) for name in COUNTS}
    cases, before, lost, gained = (total[name] for name in COUNTS)
    shares = {"lost_share": (lost, before), "lost_of_all": (lost, cases)}
    shares |= {"gained_share": (gained, cases - before), "gained_of_all": (gained, cases)}
    shares |= {"right_before": (before, cases), "right_after": (before - lost + gained, cases)}
    return total | {name: above / below for name, (above, below) in shares.items() if below}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
