"""From evaluation files and checkpoints to the content of `report.json`: tables, intervals, differences, costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stages import continual_metrics
from stages.cells import SLICES, Cell, Estimate, Key, Place, Tier, estimates, mean_over_seeds, read_cells
from stages.config import Config, Protocol
from stages.jobs import BASELINES, Checkpoint, Evaluation
from stages.metrics import METRICS, FloatArray
from stages.omissions import log_counts, omission_notes
from stages.statistics import holm, interval, paired_differences, two_sided_p
from stages.workspace import Workspace, read_json

USUAL = "single"
"""Every other method is compared with this one where it was run."""
COMPARED = ("hit_at_10", "ndcg_at_10")
"""Metrics of the differences and of R[i][j]."""
LEADING = "hit_at_10"
"""Metric of the continual numbers."""
FEWER_DRAWS = 2_000
"""Bootstrap draws of everything but hit and NDCG over all users."""
BOOTSTRAP_SEED = 20_240
Row = dict[str, Any]
Grids = dict[tuple[str, int], dict[tuple[int, int], tuple[float, int]]]
"""(method, seed) -> (trained, tested) -> (value, users)."""


def summarise(
    config: Config,
    workspace: Workspace,
    evaluations: Sequence[Evaluation],
    checkpoints: Sequence[Checkpoint],
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The content of `report.json`, but for what only the caller knows (config, versions, machine).

    A protocol's headline cells are trained = tested (same-stage) and trained = tested - 1 (next-stage). A row's value
    is a mean over users with its 95 % bootstrap interval; `stage = "mean"` averages the incremental stages (1 and
    later; stage 0 where it alone was tested); `seed = null` averages the training seeds, which are then resampled, too.

    Args:
        config: the experiment.
        workspace: holds the evaluation files and the manifests of log, stages and catalogue.
        evaluations: everything measured, all methods, seeds and protocols.
        checkpoints: everything trained; baselines have none.
        progress: called with a sentence before each long part.

    Returns:
        A JSON value: undefined numbers are null.

    Raises:
        UserError: an evaluation file or manifest is missing or changed.
    """
    metrics = [name for name in METRICS if config.evaluation.baskets or not name.startswith("recall")]
    report: dict[str, Any] = {"schema": 1, "name": config.name}
    report |= {part: [] for part in ("rows", "differences", "matrix", "continual", "oracle")}
    report["reference"] = reference_of(evaluations)
    grids: dict[str, dict[tuple[Protocol, bool], Grids]] = {}
    for protocol in config.evaluation.protocols:
        measured = [evaluation for evaluation in evaluations if evaluation.job.protocol == protocol]
        if progress is not None and measured:
            progress(f"{protocol}: intervals over {len(measured)} evaluations")
        for objective, (cells, users) in read_cells(workspace, measured, metrics).items():
            labels = {"protocol": protocol, "objective": objective}
            headline = [cell for cell in cells if _is_headline(cell.evaluation)]
            _add_estimates(report, headline, users, metrics, config.evaluation.bootstrap, labels)
            report["oracle"] += _oracle_rows(headline, labels)
            report["matrix"] += _matrix_rows(cells, metrics, labels)
            own = grids.setdefault(objective, {})
            own |= {(protocol, sampled): _grids(cells, metrics.index(LEADING), sampled) for sampled in (True, False)}
    report["differences"] = _holm_adjusted(report["differences"])
    for objective, own in grids.items():
        same, sampled_same = own.get(("same_stage", False), {}), own.get(("same_stage", True), {})
        rows = _continual_rows(same, sampled_same, own.get(("next_stage", False), {}))
        report["continual"] += [{**row, "objective": objective} for row in rows]
    report["sampled"] = _sampled(config, workspace, evaluations)
    report["costs"] = _cost_rows(evaluations, checkpoints)
    report |= _context(config, workspace)
    omitted = omission_notes(config, workspace, _asked(evaluations), checkpoints)
    report["notes"] = [*_notes(config, evaluations, report["catalogue_known_in_advance"]), *omitted]
    return report


def _sampled(config: Config, workspace: Workspace, evaluations: Sequence[Evaluation]) -> Row | None:
    """The 99 + 1 mode's rows beside a random ranker's; None where it is off."""
    if config.evaluation.negatives == "off":
        return None
    from stages.candidates import NEGATIVES
    from stages.sampled import RANDOM, sampled_rows  # loads torch, which a summary does not need otherwise

    rows = sampled_rows(config, workspace, [one for one in evaluations if _is_headline(one)])
    return {"negatives": config.evaluation.negatives, "count": NEGATIVES, "random": RANDOM, "rows": rows}


def _is_headline(evaluation: Evaluation) -> bool:
    ahead = 1 if evaluation.job.protocol == "next_stage" else 0
    return not evaluation.matrix and evaluation.tested == evaluation.job.stage + ahead


def _add_estimates(
    report: dict[str, Any], cells: Sequence[Cell], users: int, metrics: Sequence[str], draws: int, labels: Row
) -> None:
    """Append rows and differences of the headline cells, tier by tier."""
    leading = [(0, column) for column, name in enumerate(metrics) if name.startswith(("hit", "ndcg"))]
    others = [(part, c) for part in range(len(SLICES)) for c in range(len(metrics)) if (part, c) not in leading]
    for columns, size in ((leading, draws), (others, min(draws, FEWER_DRAWS))):
        if not cells:
            continue
        found = estimates(cells, users, Tier(tuple(columns), size), BOOTSTRAP_SEED)
        names = [(SLICES[part], metrics[column]) for part, column in columns]
        report["rows"] += _rows(found, names, labels)
        report["differences"] += _differences(found, report["reference"], names, labels, size)


def _rows(found: Mapping[Key, Estimate], names: Sequence[tuple[str, str]], labels: Row) -> list[Row]:
    rows = []
    for (method, seed, stage), estimate in found.items():
        low, high = interval(estimate.draws)
        count = estimate.who.sum(axis=1)
        for column, (part, metric) in enumerate(names):
            bounds = _bounds(estimate.value[column], low[column], high[column])
            row = {"method": method, "seed": seed, "stage": stage, **labels, "slice": part, "metric": metric}
            rows.append({**row, **bounds, "users": int(count[SLICES.index(part)])})
    return rows


def reference_of(evaluations: Sequence[Evaluation]) -> str:
    """What each method's differences are to: `single`, else the first method in order."""
    methods = [one.job.method for one in evaluations if one.job.method not in BASELINES]
    return methods[0] if methods and USUAL not in methods else USUAL


def _differences(
    found: Mapping[Key, Estimate], reference: str, names: Sequence[tuple[str, str]], labels: Row, draws: int
) -> list[Row]:
    """Each method minus the reference, paired by user and, where both have several, by training seed."""
    rows: list[Row] = []
    for method, stage in dict.fromkeys((method, stage) for method, _, stage in found):
        pair = _pair(found, method, reference, stage, draws)
        if method == reference or pair is None:
            continue
        mine, theirs = pair
        change = paired_differences(mine.draws, theirs.draws)
        (low, high), p = interval(change), two_sided_p(change)
        for column, (part, metric) in enumerate(names):
            if metric not in COMPARED or (part != "all" and stage != "mean"):
                continue
            both = mine.who[SLICES.index(part)] & theirs.who[SLICES.index(part)]
            row = {"method": method, "reference": reference, "stage": stage, **labels, "slice": part, "metric": metric}
            row |= _bounds(mine.value[column] - theirs.value[column], low[column], high[column])
            row |= {"p": _number(p[column]), "users": int(both.sum()), "seeds": len(theirs.seeds)}
            rows.append(row)
    return rows


def _pair(
    found: Mapping[Key, Estimate], method: str, reference: str, stage: Place, draws: int
) -> tuple[Estimate, Estimate] | None:
    """The two sides of a difference: over the seeds both have; a baseline has no seed and meets all of them."""
    mine = {key[1]: found[key] for key in found if key[0] == method and key[1] is not None and key[2] == stage}
    theirs = {key[1]: found[key] for key in found if key[0] == reference and key[1] is not None and key[2] == stage}
    if method not in BASELINES:
        shared = mine.keys() & theirs.keys()
        mine, theirs = ({seed: side[seed] for seed in shared} for side in (mine, theirs))
    if not mine or not theirs:
        return None
    first, second = (mean_over_seeds(side.values(), draws, BOOTSTRAP_SEED) for side in (mine, theirs))
    return first, second


def _holm_adjusted(rows: Sequence[Row]) -> list[Row]:
    """Holm over the methods of a table: same protocol, objective, stage, slice and metric."""
    tables: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("protocol", "objective", "stage", "slice", "metric"))
        tables.setdefault(key, []).append(row)
    for table in tables.values():
        adjusted = holm([math.nan if row["p"] is None else row["p"] for row in table])
        for row, p in zip(table, adjusted, strict=True):
            row["p_holm"] = _number(p)
    return list(rows)


def _oracle_rows(cells: Sequence[Cell], labels: Row) -> list[Row]:
    """Share of the queries that could be answered at all; the same for every method, as all rank one catalogue."""
    best: dict[int, float] = {}
    for cell in cells:
        if cell.reachable is not None:
            stage = cell.evaluation.tested
            best[stage] = max(best.get(stage, 0.0), cell.reachable)
    return [{**labels, "stage": stage, "value": best[stage]} for stage in sorted(best)]


def _matrix_rows(cells: Sequence[Cell], metrics: Sequence[str], labels: Row) -> list[Row]:
    rows = []
    for metric in COMPARED:
        for (method, seed), values in _grids(cells, metrics.index(metric), sampled=True).items():
            for (trained, tested), (value, users) in sorted(values.items()):
                row = {"method": method, "seed": seed, **labels, "metric": metric}
                rows.append({**row, "trained": trained, "tested": tested, "value": _number(value), "users": users})
    return rows


def _grids(cells: Sequence[Cell], column: int, sampled: bool) -> Grids:
    """R[i][j] of every method and seed.

    With `sampled`, columns j that were measured as a matrix: a headline cell fills a gap, restricted to the users on
    whom the rest of the column was measured, so that no two cells of a column differ in their users. Without it, the
    headline cells on all users.
    """
    users_of = {_column_of(cell): cell.users for cell in cells if cell.evaluation.matrix}
    grids: Grids = {}
    for cell in sorted(cells, key=lambda cell: cell.evaluation.matrix):  # matrix cells last: they replace
        among = users_of.get(_column_of(cell)) if sampled else None
        if (sampled and among is None) or not (sampled or _is_headline(cell.evaluation)):
            continue
        users = cell.users if among is None else np.intersect1d(cell.users, among)
        job = cell.evaluation.job
        grid = grids.setdefault((job.method, job.seed), {})
        grid[job.stage, cell.evaluation.tested] = (cell.value("all", column, among), len(users))
    return grids


def _column_of(cell: Cell) -> tuple[str, int, int]:
    return cell.evaluation.job.method, cell.evaluation.job.seed, cell.evaluation.tested


def _continual_rows(same: Grids, sampled: Grids, ahead: Grids) -> list[Row]:
    """The numbers of `stages.continual_metrics` about one objective, method by method and seed by seed.

    Args:
        same: headline cells of the same-stage protocol.
        sampled: its R[i][j] on the users sampled for it; where it exists all numbers but the two forward ones rest
            on it alone.
        ahead: headline cells of the next-stage protocol; where they exist NextPerf and FWT rest on them.
    """
    forward = ahead or sampled
    last = max(
        (max(place) for grid in (*same.values(), *sampled.values(), *ahead.values()) for place in grid), default=0
    )
    floors = {seed: _array(grid, last) for (method, seed), grid in forward.items() if method == "recent_popularity"}
    rows = []
    for method, seed in dict.fromkeys([*same, *sampled, *ahead]):
        onward = _array(forward.get((method, seed), {}), last)
        values = {"next_perf": continual_metrics.next_performance(onward)}
        if sampled or same:
            values |= _backward(_array((sampled or same).get((method, seed), {}), last))
        floor = floors.get(seed, next(iter(floors.values()), np.full_like(onward, np.nan)))
        values["fwt"] = continual_metrics.forward_transfer(onward, np.append(np.nan, np.diagonal(floor, offset=1)))
        rows += [{"method": method, "seed": seed, "metric": name, "value": _number(v)} for name, v in values.items()]
    return rows


def _backward(R: FloatArray) -> dict[str, float]:
    learning, retained = continual_metrics.learning_accuracy(R), continual_metrics.retained_accuracy(R)
    return {
        "learning_accuracy": learning,
        "bwt": continual_metrics.backward_transfer(R),
        "forgetting": continual_metrics.forgetting(R),
        "retained_accuracy": retained,
        "harmonic": continual_metrics.harmonic(learning, retained),
        "average_performance": continual_metrics.average_performance(R),
    }


def _array(grid: Mapping[tuple[int, int], tuple[float, int]], last: int) -> FloatArray:
    """(last + 1, last + 1), NaN where nothing was measured."""
    R = np.full((last + 1, last + 1), np.nan)
    for (trained, tested), (value, _) in grid.items():
        if trained >= 0:
            R[trained, tested] = value
    return R


def _cost_rows(evaluations: Sequence[Evaluation], checkpoints: Sequence[Checkpoint]) -> list[Row]:
    """One row a trained stage; queries/s from its headline evaluation, null where there was none."""
    speed = {e.job: e.queries / e.seconds for e in evaluations if _is_headline(e) and e.seconds > 0}
    return [
        {
            "method": checkpoint.job.method,
            "seed": checkpoint.job.seed,
            "protocol": checkpoint.job.protocol,
            "stage": checkpoint.job.stage,
            "train_seconds": checkpoint.seconds,
            "trained_parameters": checkpoint.trained_parameters,
            "bytes": checkpoint.bytes,
            "peak_memory_bytes": checkpoint.peak_memory,
            "queries_per_second": speed.get(checkpoint.job),
            "targets": checkpoint.targets,
        }
        for checkpoint in checkpoints
    ]


def _context(config: Config, workspace: Workspace) -> Row:
    stages = read_json(workspace.stages / "manifest.json")
    catalogue = read_json(workspace.catalogue / "manifest.json")
    return {
        "log": log_counts(workspace),
        "stages": stages["stages"],
        "digests": {"log": stages.get("log_digest"), "stages": stages.get("digest"), "catalogue": catalogue["digest"]},
        "collisions": catalogue.get("collisions", {}),
        "catalogue_known_in_advance": catalogue["source"] == "shipped",
        "sampled_users": config.evaluation.users,
        "beam": config.evaluation.beam,
        "target_rule": _target_rules(config),
        "invalid_rate": 0.0,  # stages.ranking raises at the first item outside the catalogue
    }


def _target_rules(config: Config) -> dict[str, str]:
    unit = "basket (a set)" if config.evaluation.baskets else "event"
    following = {
        "all": f"every {unit} of the coming stage, history rolling on",
        "first": f"a returning user's first {unit} of the coming stage",
    }
    same = f"the user's last {unit} of the stage, earlier events of other users in the same stage trained on"
    return {"same_stage": same, "next_stage": following[config.evaluation.next_target]}


def _asked(evaluations: Sequence[Evaluation]) -> dict[Protocol, set[int]]:
    """The stages of each protocol's headline cells, those without a query, too."""
    asked: dict[Protocol, set[int]] = {"same_stage": set(), "next_stage": set()}
    for evaluation in evaluations:
        if _is_headline(evaluation):
            asked[evaluation.job.protocol].add(evaluation.tested)
    return asked


def _tested(evaluations: Sequence[Evaluation]) -> dict[Protocol, set[int]]:
    """The stages each protocol has headline tests in; a stage without events has none."""
    return _asked([evaluation for evaluation in evaluations if evaluation.queries])


def _notes(config: Config, evaluations: Sequence[Evaluation], shipped: bool) -> list[str]:
    tested = _tested(evaluations)
    later = sorted(set().union(*tested.values()) - {0})
    trained = {e.job for e in evaluations if e.job.method not in BASELINES}
    seeds = len({job.seed for job in trained})
    draws = config.evaluation.bootstrap
    few = min(draws, FEWER_DRAWS)
    resampled = "users and training seeds" if seeds > 1 else "users"
    notes = [
        f"Means over stages: tested stages {', '.join(map(str, later)) or 'none'}, each with the same weight.",
        f"Intervals: 95 %, bootstrap over {resampled}; {draws:,} draws for Hit and NDCG over all users, {few:,} else.",
    ]
    for protocol in (name for name, stages in tested.items() if stages == {0}):
        notes.append(f"{protocol.replace('_', '-')}: only stage 0 was tested; it stands in the place of the mean.")
    if config.evaluation.users is not None:
        notes.insert(0, f"Quick look: a seeded sample of {config.evaluation.users} test users, not all of them.")
    if trained and seeds < 3:
        notes.append(f"Training seeds: {seeds}. Fewer than three say little about the spread between trainings.")
    if trained and (reference := reference_of(evaluations)) != USUAL:
        notes.append(f"Differences are to {reference}, the first of the methods: {USUAL} is not among them.")
    if shipped:
        notes.append("The semantic IDs were fitted on the catalogue of all stages: it was known in advance.")
    return notes


def _bounds(value: float, low: float, high: float) -> Row:
    return {"value": _number(value), "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    """`value` as JSON can hold it."""
    return float(value) if math.isfinite(value) else None
