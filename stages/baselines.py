"""Fits the counting baselines on a stage's training events, the same events the trained methods see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.baselines.bm25 import Bm25
from models.baselines.item_graph import ItemGraph
from models.baselines.popularity import Popularity, RecentPopularity
from models.recommender import Recommender
from stages.config import Protocol
from stages.errors import UserError
from stages.interactions import IntArray, Interactions
from stages.jobs import BASELINES, SEARCH_BASELINES
from stages.queries import (
    Queries,
    next_stage_validation,
    objective_queries,
    same_stage_validation,
    training_targets,
)
from stages.ranking import rank_queries
from stages.search_config import Objective
from stages.settings import nearest

WINDOWS = (1, 2, 3)
"""Windows of recent popularity, in stages, tried besides the whole past."""


def fit_baseline(
    name: str,
    interactions: Interactions,
    known: int,
    stage: int,
    protocol: Protocol,
    seed: int,
    exclude_history: bool,
    objective: Objective = "recommendation",
    documents: Sequence[str] = (),
) -> Recommender:
    """A baseline that has seen the training events of stages 0 … `stage`, those of one objective.

    Args:
        name: one of `stages.jobs.BASELINES`.
        interactions: events of all stages.
        known: items numbered 0 … known - 1 may be recommended.
        stage: last stage seen.
        protocol: decides which events train and which validate.
        seed: of the next-stage validation users.
        exclude_history: never recommend what is in the history.
        objective: whose events count.
        documents: text of each known item, for `bm25`, which adds the training searches' queries.

    Raises:
        UserError: no baseline of that name, or one that does not answer this objective.
    """
    own = interactions.searched == (objective == "search")
    targets = training_targets(interactions, range(stage + 1), protocol, seed)[own]
    items, stages = interactions.items[own], interactions.stages[own]
    if name in SEARCH_BASELINES and objective != "search":
        raise UserError(f"{name} answers searches only; give a query, or choose another method")
    if name == "bm25":
        return Bm25(
            _with_queries(documents, interactions, np.flatnonzero(own)[targets]), items[targets], exclude_history
        )
    if name == "popularity":
        return Popularity(items[targets], known, exclude_history)
    if name == "item_graph":
        return ItemGraph(interactions.users[own], items, targets, known, exclude_history)
    if name == "recent_popularity":
        windows = [window for window in WINDOWS if window <= stage] + [stage + 1]
        args = (items[targets], stages[targets])
        tried = [RecentPopularity(*args, window, known, exclude_history) for window in windows]
        if protocol == "same_stage":
            validation = same_stage_validation(interactions, stage)
        else:
            validation = next_stage_validation(interactions, stage, seed)
        asked = objective_queries(interactions, validation, objective, sets=True, fresh=False)
        return max(tried, key=lambda model: _validation_score(model, interactions, asked, known))
    raise UserError(f"unknown baseline {name!r}{nearest(name, BASELINES)}; known: {', '.join(BASELINES)}")


def _with_queries(documents: Sequence[str], interactions: Interactions, rows: IntArray) -> list[str]:
    """Each item's text and the queries by which the events `rows` found it."""
    if interactions.query is None:
        return list(documents)
    pairs = np.unique(np.stack([interactions.items[rows], interactions.query[rows]], axis=1), axis=0)
    found: list[list[str]] = [[document] for document in documents]
    for item, query in pairs.tolist():
        found[item].append(interactions.texts[query])
    return [" ".join(parts) for parts in found]


def _validation_score(model: RecentPopularity, interactions: Interactions, queries: Queries, known: int) -> float:
    """Mean NDCG@10 on the validation queries; the first, narrowest window wins a draw."""
    frame = rank_queries(
        model,
        interactions,
        queries,
        known=known,
        k=20,
        batch_size=1024,
        seen_stage=0,
        tested_stage=0,
        exclude_history=model.exclude_history,
    )
    return float(np.nan_to_num(frame["ndcg_at_10"].to_numpy()).mean()) if len(frame) else 0.0
