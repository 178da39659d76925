"""A report's rows, arranged to be shown: the page, the terminal, Prefect and MLflow all read them through here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stages.jobs import BASELINES

HEADLINE = ("hit_at_10", "ndcg_at_10")
PROTOCOL_TITLES = {"next_stage": "Next stage", "same_stage": "Same stage"}
PROTOCOL_ORDER = ("next_stage", "same_stage")

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A mean over users with its 95 % interval; null where nobody was tested."""

    value: float | None
    low: float | None
    high: float | None
    users: int


@dataclass(frozen=True)
class Difference:
    """Paired difference to the reference method, and Holm's p over the table's comparisons."""

    value: float | None
    low: float | None
    high: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Line:
    """One method of a table.

    Attributes:
        method: its name in the config.
        baseline: not trained by us.
        cells: by metric.
        best: metrics in which no line of the table is better.
        differences: to the reference, by metric; empty for the reference itself.
    """

    method: str
    baseline: bool
    cells: dict[str, Cell]
    best: frozenset[str]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class Findings:
    """Look-ups over one report (the contents of report.json)."""

    report: dict[str, Any]

    @cached_property
    def _rows(self) -> dict[tuple[Any, ...], Row]:
        keys = ("method", "protocol", "objective", "slice", "metric", "stage", "seed")
        return {tuple(row[key] for key in keys): row for row in self.report["rows"]}

    @cached_property
    def methods(self) -> list[str]:
        """Methods that were trained, then baselines, each in the order of the report."""
        names = list(dict.fromkeys(row["method"] for part in ("rows", "costs") for row in self.report[part]))
        return sorted(names, key=lambda name: name in BASELINES)

    @cached_property
    def protocols(self) -> list[str]:
        """Protocols tested, the leading one first."""
        return _in_order(self.report["rows"])

    @cached_property
    def leading_protocol(self) -> str:
        """The first protocol tested; where nothing was, the first trained for."""
        return [*self.protocols, *_in_order(self.report["costs"]), *PROTOCOL_ORDER][0]

    @cached_property
    def objectives(self) -> list[str]:
        """Objectives present, in the order of the report."""
        return list(dict.fromkeys(row["objective"] for row in self.report["rows"]))

    @cached_property
    def leading_objective(self) -> str:
        """The report's first objective; where nothing was tested, the one that every log may have."""
        return [*self.objectives, "recommendation"][0]

    @cached_property
    def slices(self) -> list[str]:
        """Slices besides `all`, in the order of the report."""
        return [name for name in dict.fromkeys(row["slice"] for row in self.report["rows"]) if name != "all"]

    @cached_property
    def stages(self) -> list[int]:
        """Tested stages, rising."""
        return sorted({row["stage"] for row in self.report["rows"] if isinstance(row["stage"], int)})

    def seeds(self, method: str) -> list[int]:
        """Seeds of a method that have rows of their own."""
        return sorted(
            {row["seed"] for row in self.report["rows"] if row["method"] == method and row["seed"] is not None}
        )

    @cached_property
    def resampled(self) -> str:
        """What the bootstrap behind the intervals draws anew."""
        several = any(len(self.seeds(method)) > 1 for method in {row["method"] for row in self.report["rows"]})
        return "users and training seeds" if several else "users"

    def cell(
        self,
        method: str,
        protocol: str,
        metric: str,
        objective: str | None = None,
        stage: int | str = "mean",
        part: str = "all",
        seed: int | None = None,
    ) -> Cell | None:
        """One number, or None where the report has no such row.

        Args:
            method: name.
            protocol: name.
            metric: `hit_at_10` and so on.
            objective: absent: the report's first.
            stage: tested stage, or `mean` over stages.
            part: slice.
            seed: absent: the mean over seeds, or the only seed's row where no mean was written.
        """
        place = (method, protocol, objective or self.leading_objective, part, metric, stage)
        row = self._rows.get((*place, seed))
        if row is None and seed is None and len(only := self.seeds(method)) == 1:
            row = self._rows.get((*place, only[0]))
        return None if row is None else Cell(row["value"], row["low"], row["high"], row["users"])

    @property
    def reference(self) -> str:
        """The method that differences are to."""
        return self.report.get("reference", "single")

    def difference(self, method: str, protocol: str, metric: str, objective: str | None = None) -> Difference | None:
        """The mean-over-stages difference of `method` to the reference."""
        wanted = (method, self.reference, protocol, objective or self.leading_objective, "all", metric, "mean")
        keys = ("method", "reference", "protocol", "objective", "slice", "metric", "stage")
        for row in self.report["differences"]:
            if tuple(row[key] for key in keys) == wanted:
                return Difference(row["value"], row["low"], row["high"], row["p_holm"])
        return None

    def lines(self, protocol: str, objective: str | None = None, stage: int | str = "mean") -> list[Line]:
        """The table of one protocol: every method and baseline with the headline metrics, best ones marked."""
        cells = {
            method: {
                metric: cell
                for metric in HEADLINE
                if (cell := self.cell(method, protocol, metric, objective, stage)) is not None
            }
            for method in self.methods
        }
        tops = {metric: _top(cells, metric) for metric in HEADLINE}
        return [
            Line(
                method=method,
                baseline=method in BASELINES,
                cells=found,
                best=frozenset(m for m, cell in found.items() if cell.value is not None and cell.value == tops[m]),
                differences={m: gap for m in HEADLINE if (gap := self.difference(method, protocol, m, objective))},
            )
            for method, found in cells.items()
            if found
        ]

    def oracle(self, protocol: str, objective: str | None = None) -> float | None:
        """Mean share of test targets that any model could have returned; nothing scores above it.

        Args:
            protocol: name.
            objective: absent: the report's first.
        """
        wanted = objective or self.leading_objective
        rows = [row for row in self.report["oracle"] if row.get("objective", wanted) == wanted]
        return _mean([row["value"] for row in rows if row["protocol"] == protocol])

    def best_possible(self, protocol: str, objective: str) -> dict[str, float]:
        """Metric -> what a ranker that knew the true distribution would score; empty but for a generated log."""
        return {
            row["metric"]: row["value"]
            for row in self.report.get("best_possible", [])
            if (row["protocol"], row["objective"]) == (protocol, objective)
        }

    def sampled(self, protocol: str, objective: str) -> dict[str, dict[str, float | None]]:
        """The 99 + 1 mode's metrics by method, mean over the later stages (or all there are) and over seeds."""
        later, names = self._sampled_rows(protocol, objective), self._random
        return {
            method: {name: _mean([row[name] for row in later if row["method"] == method]) for name in names}
            for method in dict.fromkeys(row["method"] for row in later)
        }

    def chance(self, protocol: str, objective: str) -> dict[str, float]:
        """What a random order scores in the 99 + 1 mode: a target that no model knew is a miss for it, too.

        `reachable`, of each row, is the share of the other targets, averaged over users as the metrics are; rows of
        earlier versions have none. All methods of a cell rank the same targets, but for a line that asks for a sample.
        """
        whole: dict[int, Row] = {}
        for row in self._sampled_rows(protocol, objective):
            whole[row["stage"]] = max(whole.get(row["stage"], row), row, key=lambda one: one["targets"])
        share = _mean([row.get("reachable", 1.0) for row in whole.values()])
        return {} if share is None else {name: value * share for name, value in self._random.items()}

    @property
    def _random(self) -> dict[str, float]:
        return (self.report.get("sampled") or {"random": {}})["random"]

    def _sampled_rows(self, protocol: str, objective: str) -> list[Row]:
        """The 99 + 1 mode's rows of the later stages, or of all there are."""
        rows = (self.report.get("sampled") or {"rows": []})["rows"]
        wanted = [row for row in rows if (row["protocol"], row["objective"]) == (protocol, objective)]
        return [row for row in wanted if row["stage"] > 0] or wanted

    def continual(self, method: str, objective: str | None = None) -> dict[str, float | None]:
        """BWT and its kin, averaged over the seeds that have them.

        Args:
            method: name.
            objective: absent: the report's first, which rows of earlier versions are about without saying so.
        """
        found: dict[str, list[float | None]] = {}
        for row in self.report["continual"]:
            if row["method"] == method and self.is_about(row, objective):
                found.setdefault(row["metric"], []).append(row["value"])
        return {name: _mean(values) for name, values in found.items()}

    def is_about(self, row: Row, objective: str | None = None) -> bool:
        """Whether a row is about an objective, the report's first unless one is named."""
        return row.get("objective", self.leading_objective) == (objective or self.leading_objective)

    def grid(self, method: str, seed: int | None = None, objective: str | None = None) -> dict[tuple[int, int], float]:
        """R[trained][tested] of a method, of its lowest seed and the report's first objective unless one is named."""
        rows = [row for row in self.report["matrix"] if row["method"] == method and row["value"] is not None]
        rows = [row for row in rows if self.is_about(row, objective)]
        if not rows:
            return {}
        seed = min(row["seed"] for row in rows) if seed is None else seed
        names = ("protocol", "metric")
        kind = [rows[0].get(name) for name in names]
        return {
            (row["trained"], row["tested"]): row["value"]
            for row in rows
            if row["seed"] == seed and [row.get(name) for name in names] == kind
        }

    def costs(self, method: str) -> dict[str, float | None]:
        """What one update costs: mean over the stages after the first, seeds and protocols."""
        rows = [row for row in self.report["costs"] if row["method"] == method]
        later = [row for row in rows if row["stage"] != 0] or rows
        names = ("train_seconds", "trained_parameters", "bytes", "peak_memory_bytes", "queries_per_second", "targets")
        return {name: _mean([row.get(name) for row in later]) for name in names} if later else {}


def untested_note(findings: Findings) -> str | None:
    """The sentence that stands where the tables would, or None where something was tested."""
    return None if findings.protocols else "Nothing was tested: no test query was left (see the notes)."


def sample_note(report: dict[str, Any]) -> str | None:
    """The sentence every output of a quick look carries, or None when every user was tested."""
    users = report.get("sampled_users")
    return f"Quick look: a seeded sample of {users} test users, not all of them." if users else None


def minute(instant: str | None) -> str | None:
    """An ISO instant to the minute, for people."""
    return instant.replace("T", " ")[:16] if instant else None


def metric_title(metric: str) -> str:
    """`hit_at_10` as people write it: Hit@10."""
    name, _, cutoff = metric.partition("_at_")
    title = {"hit": "Hit", "ndcg": "NDCG", "recall": "Recall", "mrr": "MRR"}.get(name, name)
    return f"{title}@{cutoff}" if cutoff else title


def _top(cells: dict[str, dict[str, Cell]], metric: str) -> float | None:
    values = [found[metric].value for found in cells.values() if metric in found]
    return max((value for value in values if value is not None), default=None)


def _in_order(rows: list[Row]) -> list[str]:
    """The protocols of some rows, the leading one first."""
    present = {row["protocol"] for row in rows}
    return [*(name for name in PROTOCOL_ORDER if name in present), *sorted(present - set(PROTOCOL_ORDER))]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
