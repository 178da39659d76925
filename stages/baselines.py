"""Fits the counting baselines on a stage's training events, the same events the trained methods see."""

from __future__ import annotations

import numpy as np

from models.baselines.item_graph import ItemGraph
from models.baselines.popularity import Popularity, RecentPopularity
from models.recommender import Recommender
from stages.config import Protocol
from stages.errors import UserError
from stages.interactions import Interactions
from stages.jobs import BASELINES
from stages.queries import Queries, next_stage_validation, same_stage_validation, training_targets
from stages.ranking import rank_queries
from stages.settings import nearest

WINDOWS = (1, 2, 3)
"""Windows of recent popularity, in stages, tried besides the whole past."""


def fit_baseline(
    name: str, interactions: Interactions, known: int, stage: int, protocol: Protocol, seed: int, exclude_history: bool
) -> Recommender:
    """A baseline that has seen the training events of stages 0 … `stage`.

    Args:
        name: one of `stages.jobs.BASELINES`.
        interactions: events of all stages.
        known: items numbered 0 … known - 1 may be recommended.
        stage: last stage seen.
        protocol: decides which events train and which validate.
        seed: of the next-stage validation users.
        exclude_history: never recommend what is in the history.

    Raises:
        UserError: no baseline of that name.
    """
    targets = training_targets(interactions, range(stage + 1), protocol, seed)
    if name == "popularity":
        return Popularity(interactions.items[targets], known, exclude_history)
    if name == "item_graph":
        return ItemGraph(interactions.users, interactions.items, targets, known, exclude_history)
    if name == "recent_popularity":
        items, stages = interactions.items[targets], interactions.stages[targets]
        if protocol == "same_stage":
            validation = same_stage_validation(interactions, stage)
        else:
            validation = next_stage_validation(interactions, stage, seed)
        windows = [window for window in WINDOWS if window <= stage] + [stage + 1]
        tried = [RecentPopularity(items, stages, window, known, exclude_history) for window in windows]
        return max(tried, key=lambda model: _validation_score(model, interactions, validation, known))
    raise UserError(f"unknown baseline {name!r}{nearest(name, BASELINES)}; known: {', '.join(BASELINES)}")


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
