"""Puts test queries to a recommender and writes down where their targets came out: one row a query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from models.recommender import Recommendations, Recommender
from stages.interactions import BoolArray, IntArray, Interactions, runs
from stages.metrics import first_groups, query_metrics
from stages.queries import Queries

HISTORY_ITEMS = 200
"""Newest history items handed to a recommender, which cuts further by itself."""


@dataclass(frozen=True)
class Targets:
    """The distinct targets of all queries, by query.

    Attributes:
        query: (M,) rising; item: (M,); repeat: (M,) the item is in the query's history already.
        sizes: (Q,) number of distinct targets.
    """

    query: IntArray
    item: IntArray
    repeat: BoolArray
    sizes: IntArray


@dataclass(frozen=True)
class Asking:
    """Test queries as a recommender is asked them.

    Attributes:
        events: the histories' rows.
        user: (Q,) user numbers.
        start: (Q,) first history row.
        cut: (Q,) one past the last.
        length: (Q,) events before the target, all of them.
        texts: what is searched for, by query; None asks for recommendations.
    """

    events: Interactions
    user: IntArray
    start: IntArray
    cut: IntArray
    length: IntArray
    texts: list[str] | None

    def histories(self, batch: IntArray) -> list[IntArray]:
        """The histories of the queries numbered `batch`."""
        return [self.events.items[own] for own in self._spans(batch)]

    def request(self, batch: IntArray) -> dict[str, Any]:
        """What else is handed over in a log with searches: kinds of the histories' events, texts of the queries."""
        if self.events.query is None:
            return {}
        request: dict[str, Any] = {"searched": [self.events.searched[own] for own in self._spans(batch)]}
        if self.texts is not None:
            request["queries"] = [self.texts[number] for number in batch.tolist()]
        return request

    def _spans(self, batch: IntArray) -> list[slice]:
        return [slice(*span) for span in zip(self.start[batch].tolist(), self.cut[batch].tolist(), strict=True)]


def rank_queries(
    recommender: Recommender,
    interactions: Interactions,
    queries: Queries,
    *,
    known: int,
    k: int,
    batch_size: int,
    seen_stage: int,
    tested_stage: int,
    exclude_history: bool = False,
    trained: BoolArray | None = None,
    objective: str = "recommendation",
    history: Literal["both", "recommendation"] = "both",
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Ranks, metrics and slices of every query.

    Args:
        recommender: what is measured.
        interactions: events of all stages.
        queries: whom to ask about what.
        known: items numbered 0 … known - 1 are the catalogue the recommender may return.
        k: length of a list; nothing below it counts as retrieved.
        batch_size: queries a call, ordered by the user's longest history so that a batch pads little.
        seen_stage: last stage the model was trained on.
        tested_stage: stage the targets lie in.
        exclude_history: the recommender never returns the history, so it gets all of it and repeats are out of reach.
        trained: (N,) events whose items are not new; absent: all events up to `seen_stage`.
        objective: written into every row; the queries' texts are handed over for `search`.
        history: whether searched items belong to the histories that are handed over.
        progress: called with (queries done, queries) after each batch.

    Returns:
        One row a query, in order: user, cut, targets, rank and tied of the best-placed target (0 = not retrieved),
        `stages.metrics.METRICS`, new_item (all targets are), new_user (no event before `tested_stage`), reachable
        (some target could have been returned), repeat (some target is in the history), objective.

    Raises:
        ValueError: the recommender returned an item outside its catalogue (an invalid item).
    """
    targets = targets_of(interactions, queries)
    asking = asking_of(interactions, queries, objective, history, exclude_history)
    ranks, tied = _ranks(recommender, asking, targets, known, k, batch_size, progress)
    rows = _slices(interactions, queries, targets, _familiar_items(interactions, seen_stage, trained), tested_stage)
    first_rank, first_tied, _ = first_groups(targets.query, ranks, tied, len(queries))
    return rows.select(
        "user",
        "cut",
        "targets",
        pl.Series("rank", first_rank.astype(np.float64)),
        pl.Series("tied", first_tied),
        *(pl.Series(name, values) for name, values in query_metrics(targets.query, ranks, tied, targets.sizes).items()),
        "new_item",
        "new_user",
        pl.Series("reachable", _any(targets, (targets.item < known) & ~(targets.repeat & exclude_history))),
        "repeat",
        objective=pl.lit(objective, pl.String),
    )


def _slices(
    interactions: Interactions, queries: Queries, targets: Targets, familiar: BoolArray, tested_stage: int
) -> pl.DataFrame:
    """What is known of every query before anybody answers it."""
    return pl.DataFrame(
        {
            "user": pl.Series(interactions.user_ids, dtype=pl.String).gather(queries.user),
            "cut": queries.cut,
            "targets": targets.sizes,
            "new_item": ~_any(targets, familiar[targets.item]),
            "new_user": interactions.stages[interactions.offsets[queries.user]] >= tested_stage,
            "repeat": _any(targets, targets.repeat),
        }
    )


def asking_of(
    interactions: Interactions, queries: Queries, objective: str, history: str, exclude_history: bool
) -> Asking:
    """How the queries are put to a recommender; arguments as those of `rank_queries`."""
    events, cut, texts = interactions, queries.cut, None
    if events.query is not None and objective == "search":
        texts = events.queries(queries.first)
    if events.query is not None and history == "recommendation":
        cut, events = events.recommendations_before[cut], events.recommendations
    start = events.offsets[queries.user]
    newest = start if exclude_history else np.maximum(start, cut - HISTORY_ITEMS)
    return Asking(events, queries.user, newest, cut, cut - start, texts)


def targets_of(interactions: Interactions, queries: Queries) -> Targets:
    """The distinct targets of each query."""
    lengths = queries.end - queries.first
    query = np.repeat(np.arange(len(queries)), lengths)
    row = runs(queries.first, lengths)
    catalogue = int(interactions.items.max(initial=0)) + 1
    _, kept = np.unique(query * catalogue + interactions.items[row], return_index=True)
    query, row = query[kept], row[kept]
    repeat = interactions.first_rows[row] < queries.cut[query]
    if queries.fresh:
        query, row, repeat = query[~repeat], row[~repeat], repeat[~repeat]
    return Targets(query, interactions.items[row], repeat, np.bincount(query, minlength=len(queries)))


def _familiar_items(interactions: Interactions, seen_stage: int, trained: BoolArray | None) -> BoolArray:
    familiar = np.zeros(int(interactions.items.max(initial=0)) + 1, dtype=bool)
    familiar[interactions.items[interactions.stages <= seen_stage if trained is None else trained]] = True
    return familiar


def _any(targets: Targets, flags: BoolArray) -> BoolArray:
    """(Q,) whether any target of a query has the flag."""
    return np.bincount(targets.query, weights=flags, minlength=len(targets.sizes)) > 0


def _ranks(
    recommender: Recommender,
    asking: Asking,
    targets: Targets,
    known: int,
    k: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[IntArray, IntArray]:
    """(M,) rank of each target's tie group (0 = not retrieved) and (M,) size of the group."""
    rank, tied = np.zeros(len(targets.query), dtype=np.int64), np.ones(len(targets.query), dtype=np.int64)
    # A user's queries stand together: the histories of earlier ones open those of later ones, and one reading does.
    longest = np.zeros(len(asking.events.user_ids), dtype=np.int64)
    np.maximum.at(longest, asking.user, asking.length)
    order = np.lexsort((asking.length, asking.user, longest[asking.user]))
    begins = np.cumsum(targets.sizes) - targets.sizes  # targets of query q: begins[q] … begins[q] + sizes[q] - 1
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        lists = recommender.recommend(asking.histories(batch), k, **asking.request(batch))
        _refuse_invalid(lists, known)
        at = runs(begins[batch], targets.sizes[batch])
        in_batch = np.repeat(np.arange(len(batch)), targets.sizes[batch])
        rank[at], tied[at] = _places(lists, in_batch, targets.item[at])
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return rank, tied


def _refuse_invalid(lists: Recommendations, known: int) -> None:
    if lists.items.size and int(lists.items.max()) >= known:
        raise ValueError(
            f"item {lists.items.max()} was recommended but only 0 … {known - 1} are known; mask the others"
        )


def _places(lists: Recommendations, row: IntArray, item: IntArray) -> tuple[IntArray, IntArray]:
    """Start and size of the tie group in which list `row` (M,) holds `item` (M,); 0 and 1 where it does not."""
    hits = lists.items[row] == item[:, None]  # (M, k)
    found = hits.any(axis=1)
    group = np.take_along_axis(lists.groups[row], hits.argmax(axis=1)[:, None], axis=1)
    same = (lists.groups[row] == group) & (lists.items[row] >= 0)
    return np.where(found, same.argmax(axis=1) + 1, 0), np.where(found, same.sum(axis=1), 1)
