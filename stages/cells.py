"""Evaluation files as cells of sums over users, and cells as estimates with bootstrap draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from stages.errors import UserError
from stages.interactions import IntArray
from stages.jobs import Evaluation
from stages.metrics import FloatArray, user_means
from stages.queries import BoolArray
from stages.statistics import Block, Draws, bootstrap_ratios, over_seeds, seed_weights
from stages.workspace import Workspace, sha256_file

SLICES = ("all", "all_events", "new_item", "new_user", "returning_user")
"""`all_events` is the mean over queries, the others are means over users of each user's mean."""

Place = int | str
"""A tested stage, or `mean` over the incremental stages."""
Key = tuple[str, int | None, Place]
"""(method, seed or None for the mean over seeds, place)."""


@dataclass(frozen=True)
class Cell:
    """One model on one stage's tests.

    Attributes:
        evaluation: where it comes from.
        users: (n,) the users tested, as numbers among all users of the protocol.
        above: (n, S, C) per user, slice and metric: the mean over the user's queries (`all_events`: the sum).
        below: (n, S) 1 where the user has a query in the slice, else 0 (`all_events`: how many).
        reachable: mean over users of the share of queries the model could have answered.
    """

    evaluation: Evaluation
    users: IntArray
    above: FloatArray
    below: FloatArray
    reachable: float | None

    def value(self, part: str, column: int, among: IntArray | None = None) -> float:
        """Mean of one metric in one slice, over all users or those of `among`; NaN where there are none."""
        rows = slice(None) if among is None else np.isin(self.users, among)
        place = SLICES.index(part)
        count = self.below[rows, place].sum()
        return float(self.above[rows, place, column].sum() / count) if count else float("nan")


@dataclass(frozen=True)
class Tier:
    """Columns that are bootstrapped alike.

    Attributes:
        columns: (slice number, metric number) of each of the K columns.
        draws: how many bootstrap draws they get.
    """

    columns: tuple[tuple[int, int], ...]
    draws: int


@dataclass(frozen=True)
class Estimate:
    """Values of a tier's K columns.

    Attributes:
        value: (K,) NaN where undefined.
        draws: (draws, K) bootstrap draws.
        who: (S, U) which users each slice rests on.
        seeds: training seeds averaged.
    """

    value: FloatArray
    draws: Draws
    who: BoolArray
    seeds: tuple[int, ...]


def read_cells(
    workspace: Workspace, evaluations: Sequence[Evaluation], metrics: Sequence[str]
) -> dict[str, tuple[list[Cell], int]]:
    """Read evaluation files of one protocol.

    Returns:
        objective -> (its cells, number of users over all of them).

    Raises:
        UserError: a file is missing or is not what was measured.
    """
    if not evaluations:
        return {}
    frames = [read_frame(workspace, evaluation, metrics) for evaluation in evaluations]
    people: dict[str, pl.Enum] = {}
    for (objective,), rows in pl.concat(frame.select("user", "objective") for frame in frames).group_by("objective"):
        people[str(objective)] = pl.Enum(rows["user"].unique().sort())
    return {
        objective: (
            [
                _cell(evaluation, part, known, metrics)
                for evaluation, frame in zip(evaluations, frames, strict=True)
                if len(part := frame.filter(pl.col("objective") == objective))
            ],
            len(known.categories),
        )
        for objective, known in sorted(people.items())
    }


def read_frame(workspace: Workspace, evaluation: Evaluation, metrics: Sequence[str]) -> pl.DataFrame:
    """The queries of an evaluation: user, slices, objective, and the columns named.

    Raises:
        UserError: the file is missing or is not what was measured.
    """
    path = workspace.root / evaluation.path
    if not path.exists() or sha256_file(path) != evaluation.digest:
        raise UserError(f"{path}: not the evaluation that was measured (SHA-256 differs); delete it and run again")
    return pl.read_parquet(path, columns=["user", "new_item", "new_user", "reachable", "objective", *metrics])


def _cell(evaluation: Evaluation, frame: pl.DataFrame, known: pl.Enum, metrics: Sequence[str]) -> Cell:
    users, row = np.unique(frame["user"].cast(known).to_physical().to_numpy(), return_inverse=True)
    values = frame.select(pl.col(metrics).cast(pl.Float64)).to_numpy()
    new_user = frame["new_user"].to_numpy()
    masks = {"all": np.ones(len(frame), dtype=bool), "new_item": frame["new_item"].to_numpy()}
    masks |= {"new_user": new_user, "returning_user": ~new_user}
    above = np.zeros((len(users), len(SLICES), len(metrics)))
    below = np.zeros((len(users), len(SLICES)))
    for place, part in enumerate(SLICES):
        if part == "all_events":
            below[:, place] = np.bincount(row)
            above[:, place] = np.stack([np.bincount(row, values[:, c]) for c in range(len(metrics))], axis=1)
        else:
            means = user_means(row, np.where(masks[part][:, None], values, np.nan), len(users))
            below[:, place] = np.isfinite(means[:, 0])
            above[:, place] = np.nan_to_num(means)
    reached = np.bincount(row, frame["reachable"].to_numpy()) / np.bincount(row)
    return Cell(evaluation, users.astype(np.int64), above, below, float(reached.mean()) if len(users) else None)


def estimates(cells: Sequence[Cell], users: int, tier: Tier, seed: int) -> dict[Key, Estimate]:
    """Values and draws of every cell, of the mean over incremental stages, and of the mean over seeds.

    Args:
        cells: one a (method, seed, tested stage).
        users: number of users over all cells.
        tier: what to bootstrap.
        seed: of the draws.

    Returns:
        Keyed by (method, seed, stage); `mean` needs every incremental stage that any cell has. Where stage 0 alone
        was tested, it stands for the mean.
    """
    by_stage: dict[int, list[Cell]] = {}
    for cell in cells:
        by_stage.setdefault(cell.evaluation.tested, []).append(cell)
    blocks = [_block(group, tier) for group in by_stage.values()]
    found: dict[Key, Estimate] = {}
    for group, draws in zip(by_stage.values(), bootstrap_ratios(blocks, users, tier.draws, seed), strict=True):
        parts = np.split(draws, len(group), axis=1)
        for cell, part in zip(group, parts, strict=True):
            job = cell.evaluation.job
            found[job.method, job.seed, cell.evaluation.tested] = _estimate(cell, part, tier, users)
    found |= _stage_means(found, [stage for stage in sorted(by_stage) if stage > 0] or sorted(by_stage))
    found |= _seed_means(found, tier.draws, seed)
    methods = list(dict.fromkeys(cell.evaluation.job.method for cell in cells))
    return dict(sorted(found.items(), key=lambda entry: _reading_order(methods, entry[0])))


def _reading_order(methods: Sequence[str], key: Key) -> tuple[float, ...]:
    """Methods as they came; the mean over seeds before the seeds; stages before their mean."""
    method, seed, stage = key
    return methods.index(method), -1 if seed is None else seed, stage if isinstance(stage, int) else math.inf


def _block(cells: Sequence[Cell], tier: Tier) -> Block:
    users = np.unique(np.concatenate([cell.users for cell in cells]))
    parts, metrics = np.array(tier.columns).T
    above = np.zeros((len(users), len(cells), len(parts)), dtype=np.float32)
    below: list[FloatArray] = []
    place_of: dict[bytes, int] = {}  # slices hold the same users for every method: divide by few columns
    group = np.empty((len(cells), len(parts)), dtype=np.int64)
    for number, cell in enumerate(cells):
        rows = np.searchsorted(users, cell.users)
        above[rows, number] = cell.above[:, parts, metrics]
        for part in np.unique(parts):
            counts = np.zeros(len(users))
            counts[rows] = cell.below[:, part]
            place = place_of.setdefault(counts.tobytes(), len(below))
            if place == len(below):
                below.append(counts)
            group[number, parts == part] = place
    return Block(users, above.reshape(len(users), -1), np.stack(below, axis=1).astype(np.float32), group.ravel())


def _estimate(cell: Cell, draws: Draws, tier: Tier, users: int) -> Estimate:
    parts, metrics = np.array(tier.columns).T
    above, below = cell.above.sum(axis=0)[parts, metrics], cell.below.sum(axis=0)[parts]
    who = np.zeros((len(SLICES), users), dtype=bool)
    who[:, cell.users] = cell.below.T > 0
    value = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return Estimate(value, draws, who, (cell.evaluation.job.seed,))


def _stage_means(found: Mapping[Key, Estimate], stages: Sequence[int]) -> dict[Key, Estimate]:
    means: dict[Key, Estimate] = {}
    for method, seed in sorted({(method, seed) for method, seed, _ in found if seed is not None}):
        parts = [found[method, seed, stage] for stage in stages if (method, seed, stage) in found]
        if parts and len(parts) == len(stages):
            means[method, seed, "mean"] = _mean_over_stages(parts)
    return means


def _mean_over_stages(parts: Sequence[Estimate]) -> Estimate:
    """Each column over the stages where its slice has targets at all; a draw that misses one of them is undefined."""
    defined = np.isfinite([part.value for part in parts])  # (stages, K)
    count = defined.sum(axis=0)
    shares = np.divide(defined, count, out=np.full(defined.shape, np.nan), where=count > 0)
    value, draws = np.zeros(len(count)), np.zeros(parts[0].draws.shape, dtype=np.float32)
    for part, here, share in zip(parts, defined, shares, strict=True):
        value += share * np.where(here, part.value, 0)
        draws += share.astype(np.float32) * np.where(here, part.draws, np.float32(0))
    who = np.logical_or.reduce([part.who for part in parts])
    return Estimate(value, draws, who, parts[0].seeds)


def _seed_means(found: Mapping[Key, Estimate], draws: int, seed: int) -> dict[Key, Estimate]:
    places: dict[tuple[str, Place], list[Estimate]] = {}
    for (method, _, place), estimate in found.items():
        places.setdefault((method, place), []).append(estimate)
    return {(method, None, place): mean_over_seeds(parts, draws, seed) for (method, place), parts in places.items()}


def mean_over_seeds(parts: Iterable[Estimate], draws: int, seed: int) -> Estimate:
    """The mean of estimates that differ in their training seed; seeds are the outer level of the bootstrap."""
    ordered = sorted(parts, key=lambda part: part.seeds)
    seeds = tuple(one for part in ordered for one in part.seeds)
    return Estimate(
        value=np.mean([part.value for part in ordered], axis=0),
        draws=over_seeds([part.draws for part in ordered], seed_weights(seeds, draws, seed)),
        who=np.logical_or.reduce([part.who for part in ordered]),
        seeds=seeds,
    )
