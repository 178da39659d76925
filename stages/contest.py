"""Challenger against champion on the same queries: paired differences by slice, and how each answers one user."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import polars as pl

from stages.cells import read_frame
from stages.config import Config
from stages.dataset import load_dataset
from stages.evaluate import recommender, test_queries
from stages.jobs import Evaluation, Job
from stages.metrics import FloatArray, user_means
from stages.ranking import asking_of
from stages.retrain_config import GateConfig
from stages.statistics import bootstrap_means, interval, paired_differences
from stages.workspace import Workspace

SLICES = ("all", "new_item", "new_user", "returning_user")
SEED = 20_240
"""Of the bootstrap and of the users probed: a repeated decision sees the same draws."""
PROBED = 50
"""Users of whom are asked, and queries at most."""


@dataclass(frozen=True)
class Difference:
    """Challenger minus champion on the users of one slice; None where the slice has no user.

    Attributes:
        value: mean over users.
        low: lower end of its 95 % interval, paired bootstrap over users.
        high: upper end.
        users: how many users the slice has.
        challenger: the challenger's own mean.
        champion: the champion's own mean.
    """

    value: float | None
    low: float | None
    high: float | None
    users: int
    challenger: float | None
    champion: float | None


@dataclass(frozen=True)
class Probe:
    """How a model answers single users, as a service would ask it.

    Attributes:
        users: queries asked, one at a time, after one that warms up; 0 where the stage tests nobody, and then the rest
            is 0, too.
        p50_ms: median milliseconds an answer.
        p95_ms: their 95th percentile.
        invalid_rate: share of the returned items that are not in the catalogue, an empty list counting as one.
    """

    users: int
    p50_ms: float
    p95_ms: float
    invalid_rate: float


def differences(
    workspace: Workspace, challenger: Evaluation, champion: Evaluation, gate: GateConfig, draws: int
) -> dict[str, Difference]:
    """Slice by slice, what the challenger gains in the gate's metric and objective.

    Both answered the same queries. Slices are the champion's: an item is new where the champion never trained on it.

    Raises:
        UserError: an evaluation file is missing or changed.
        ValueError: the two were not asked the same.
    """
    mine, theirs = (_asked_about(workspace, evaluation, gate) for evaluation in (challenger, champion))
    if not mine.select("user", "cut").equals(theirs.select("user", "cut")):
        raise ValueError(f"{challenger.path} and {champion.path} hold different queries; delete both and run again")
    names, user = np.unique(mine["user"].to_numpy(), return_inverse=True)
    masks = _masks(theirs)
    columns = [np.where(mask, frame[gate.metric].to_numpy(), np.nan) for frame in (mine, theirs) for mask in masks]
    means = user_means(user, np.stack(columns, axis=1), len(names))
    return _summed_up(means, draws)


def _summed_up(means: FloatArray, draws: int) -> dict[str, Difference]:
    """(users, 2 · slices) means, challenger's first -> slice by slice."""
    count = len(SLICES)
    found: dict[str, Difference] = {name: Difference(None, None, None, 0, None, None) for name in SLICES}
    if not len(means):
        return found
    drawn = bootstrap_means(means, draws, SEED)
    low, high = interval(paired_differences(drawn[:, :count], drawn[:, count:]))
    for place, name in enumerate(SLICES):
        here = np.isfinite(means[:, place])
        users = int(here.sum())
        if not users:
            continue
        mine, theirs = (float(means[here, place + side].mean()) for side in (0, count))
        found[name] = Difference(mine - theirs, float(low[place]), float(high[place]), users, mine, theirs)
    return found


def mean_scores(workspace: Workspace, evaluation: Evaluation, metric: str) -> dict[str, float]:
    """Mean over users of an evaluation by objective, of the objectives that the model was asked about.

    Raises:
        UserError: the evaluation file is missing or changed.
    """
    by_user = read_frame(workspace, evaluation, [metric]).group_by("objective", "user").agg(pl.col(metric).mean())
    means = by_user.group_by("objective").agg(pl.col(metric).mean()).sort("objective")
    return {str(objective): float(mean) for objective, mean in means.iter_rows()}


def probe(config: Config, workspace: Workspace, job: Job, tested: int) -> Probe:
    """Ask `job`'s model about a seeded sample of the test users of a stage, one at a time.

    Raises:
        UserError: the lineage is not trained or is damaged.
    """
    dataset, objective = load_dataset(config, workspace), config.retrain.gate.objective
    own, known = config.evaluation, dataset.catalogue.known(job.stage)
    queries = test_queries(config, dataset, job, tested, PROBED, objective)
    alone = objective == "recommendation" and config.search.rec_history == "recommendation"
    history = "recommendation" if alone else "both"
    asking = asking_of(dataset.interactions, queries, objective, history, own.exclude_history)
    model = recommender(config, workspace, dataset, job, objective)
    seconds, returned, invalid = [], 0, 0
    for place in [0, *range(len(queries))][: PROBED + 1] if len(queries) else []:
        one = np.array([place])
        started = time.perf_counter()
        items = model.recommend(asking.histories(one), own.k, **asking.request(one)).items[0]
        seconds.append(time.perf_counter() - started)
        listed = items[items != -1]
        returned += max(len(listed), 1)
        invalid += int(((listed < 0) | (listed >= known)).sum()) if len(listed) else 1
    timed = seconds[1:]
    if not timed:
        return Probe(0, 0.0, 0.0, 0.0)
    p50, p95 = (float(value) for value in 1000 * np.quantile(timed, (0.5, 0.95)))
    return Probe(len(timed), p50, p95, invalid / returned)


def _asked_about(workspace: Workspace, evaluation: Evaluation, gate: GateConfig) -> pl.DataFrame:
    frame = read_frame(workspace, evaluation, ["cut", gate.metric])
    return frame.filter(pl.col("objective") == gate.objective)


def _masks(frame: pl.DataFrame) -> list[np.ndarray]:
    """One mask of the queries for each slice."""
    new_user = frame["new_user"].to_numpy()
    return [np.ones(len(frame), dtype=bool), frame["new_item"].to_numpy(), new_user, ~new_user]
