"""Who is tested on which events, and which events may train: the two protocols as arrays of rows.

A visit is a user's events in one stage; a basket is what the user took at one instant (a single event where baskets
are off). Every rule below counts baskets within a visit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stages.config import Protocol
from stages.interactions import BoolArray, IntArray, Interactions, runs
from stages.search_config import Objective

FEWEST_BASKETS = 3
"""A visit needs a basket to train on, one to validate on and one to test on."""
VALIDATION_SHARE = 0.1
"""Share of the users whose last basket of a stage validates a next-stage model."""


@dataclass(frozen=True)
class Queries:
    """Test queries: what a user takes next, given everything before.

    Attributes:
        user: (Q,) user numbers.
        cut: (Q,) row of `Interactions` where the history ends: it is rows offsets[user] … cut - 1.
        end: (Q,) the targets are rows first … end - 1.
        skipped: users of the stage who gave no query because their visit has fewer than three baskets.
        begin: (Q,) first target row where that is not `cut`; None where it always is.
        fresh: an item that the user has met before `cut` is no target.
    """

    user: IntArray
    cut: IntArray
    end: IntArray
    skipped: int = 0
    begin: IntArray | None = None
    fresh: bool = False

    def __len__(self) -> int:
        return len(self.user)

    @property
    def first(self) -> IntArray:
        """(Q,) first target row."""
        return self.cut if self.begin is None else self.begin

    def keep(self, mask: BoolArray) -> Queries:
        """The queries where `mask` (Q,) holds."""
        begin = None if self.begin is None else self.begin[mask]
        return Queries(self.user[mask], self.cut[mask], self.end[mask], self.skipped, begin, self.fresh)


@dataclass(frozen=True)
class _Baskets:
    """All baskets in row order; `back` counts the later ones of the same visit, `count` all of the visit."""

    user: IntArray
    stage: IntArray
    start: IntArray
    end: IntArray
    back: IntArray
    count: IntArray

    def queries(self, mask: BoolArray, skipped: int = 0) -> Queries:
        return Queries(self.user[mask], self.start[mask], self.end[mask], skipped)


def same_stage_tests(interactions: Interactions, stage: int) -> Queries:
    """The last basket of every visit to `stage` with at least three baskets (leave one out).

    Returns:
        Queries in row order; `skipped` counts the users whose visit is shorter.
    """
    return _held_out(interactions, stage, back=0)


def same_stage_validation(interactions: Interactions, stage: int) -> Queries:
    """The basket before the last of every visit to `stage` with at least three baskets."""
    return _held_out(interactions, stage, back=1)


def next_stage_tests(interactions: Interactions, stage: int, target: Literal["all", "first"] = "all") -> Queries:
    """Queries about `stage` for a model that has seen the stages before it.

    Args:
        interactions: events of all stages.
        stage: the stage the targets lie in.
        target: `all`: every basket, the history rolling on within the stage; `first`: a returning user's first basket,
            nothing of the stage seen.

    Returns:
        Queries in row order, short visits included: `skipped` is 0. `first` leaves out users without any history.
    """
    baskets = _baskets(interactions)
    mask = baskets.stage == stage
    if target == "first":
        opens = baskets.back == baskets.count - 1
        mask &= opens & (baskets.start > interactions.offsets[baskets.user])
    return baskets.queries(mask)


def next_stage_validation(interactions: Interactions, stage: int, seed: int) -> Queries:
    """The last basket in `stage` of a tenth of the users with at least three there.

    Whether a user is drawn depends on the user's id and the seed alone, so that other users' rows change nothing.
    """
    baskets = _baskets(interactions)
    return baskets.queries((baskets.stage == stage) & _next_stage_held_out(interactions, baskets, seed))


def training_targets(interactions: Interactions, stages: Collection[int], protocol: Protocol, seed: int) -> BoolArray:
    """Which events of `stages` a model may be trained to predict.

    Same-stage: all but the last two baskets of a visit; a visit of one or two baskets has no test, so all of it trains.
    Next-stage: all but the validation baskets of `next_stage_validation` with the same seed. Held-out events still
    belong to later histories.

    Returns:
        (N,) mask over the rows of `interactions`.
    """
    baskets = _baskets(interactions)
    if protocol == "same_stage":
        held_out = (baskets.back < 2) & (baskets.count >= FEWEST_BASKETS)
    else:
        held_out = _next_stage_held_out(interactions, baskets, seed)
    keep = np.isin(baskets.stage, list(stages)) & ~held_out
    return np.repeat(keep, baskets.end - baskets.start)


def asked_moments(
    interactions: Interactions, protocol: Protocol, stage: int, target: Literal["all", "first"]
) -> Queries:
    """The moments of `stage` that a protocol asks about; `target` says which, for next-stage tests."""
    if protocol == "same_stage":
        return same_stage_tests(interactions, stage)
    return next_stage_tests(interactions, stage, target)


def repeated_targets(interactions: Interactions, moments: Queries) -> dict[Objective, tuple[int, int]]:
    """How many targets of the moments are items that their user has met before, and how many there are.

    Args:
        interactions: events of all stages.
        moments: queries of whole moments, of both kinds of events.

    Returns:
        (repeats, targets) of each objective of the log; `objective_queries` leaves out the repeats where `fresh`.
    """
    sizes = moments.end - moments.cut
    row, cut = runs(moments.cut, sizes), np.repeat(moments.cut, sizes)
    repeats, searched = interactions.first_rows[row] < cut, interactions.searched[row]
    found: dict[Objective, tuple[int, int]] = {}
    for name in interactions.objectives:
        own = searched == (name == "search")
        found[name] = int((repeats & own).sum()), int(own.sum())
    return found


def objective_queries(
    interactions: Interactions, moments: Queries, objective: Objective, sets: bool, fresh: bool
) -> Queries:
    """What the moments ask of one objective; a log without searches is asked as it stands.

    The history of either objective ends where the moment begins, so that neither the search nor the purchase it led to
    is history of the other. A search asks for all the items its user found with one query at that instant.

    Args:
        interactions: events of all stages.
        moments: queries of whole moments, of both kinds of events.
        objective: which of them.
        sets: events of a moment (for search: of a query) are one target, else each is a query of its own.
        fresh: leave out items that the user has met before the moment by either kind of event.

    Returns:
        Queries in row order; those without any target left are gone.
    """
    if interactions.query is None:
        return moments
    sizes = moments.end - moments.cut
    row, which = runs(moments.cut, sizes), np.repeat(np.arange(len(moments)), sizes)
    kept = interactions.searched[row] == (objective == "search")
    if fresh:
        kept &= interactions.first_rows[row] >= moments.cut[which]
    row, which = row[kept], which[kept]
    opens = _changes(which) | _changes(interactions.query[row]) | (not sets)
    last = np.append(np.flatnonzero(opens)[1:], len(row))[: int(opens.sum())] - 1
    moment = which[opens]
    return Queries(
        moments.user[moment], moments.cut[moment], row[last] + 1, moments.skipped, begin=row[opens], fresh=fresh
    )


def sample_users(interactions: Interactions, queries: Queries, n: int, seed: int) -> Queries:
    """The queries of a seeded sample of at most `n` users, in the same order.

    A user's lot depends on the user's id and the seed alone: other users' rows move nobody's, and two stages that share
    a user tend to keep or drop that user together.
    """
    users = np.unique(queries.user)
    if len(users) <= n:
        return queries
    lots = np.array([_lot(interactions.user_ids[user], seed) for user in users.tolist()])
    chosen = users[np.argsort(lots, kind="stable")[:n]]
    return queries.keep(np.isin(queries.user, chosen))


def _held_out(interactions: Interactions, stage: int, back: int) -> Queries:
    baskets = _baskets(interactions)
    here = baskets.stage == stage
    enough = baskets.count >= FEWEST_BASKETS
    skipped = int((here & ~enough & (baskets.back == 0)).sum())
    return baskets.queries(here & enough & (baskets.back == back), skipped)


def _next_stage_held_out(interactions: Interactions, baskets: _Baskets, seed: int) -> BoolArray:
    drawn = np.array([_lot(user, seed) < VALIDATION_SHARE for user in interactions.user_ids], dtype=bool)
    return (baskets.back == 0) & (baskets.count >= FEWEST_BASKETS) & drawn[baskets.user]


def _lot(user_id: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _baskets(interactions: Interactions) -> _Baskets:
    rows = len(interactions.items)
    users = interactions.users
    opens = _changes(users) | _changes(interactions.baskets) | _changes(interactions.stages)
    start = np.flatnonzero(opens)
    user, stage = users[start], interactions.stages[start]
    visit = np.cumsum(_changes(user) | _changes(stage)) - 1
    sizes = np.bincount(visit)
    back = np.cumsum(sizes)[visit] - 1 - np.arange(len(start)) if len(start) else start
    end = np.append(start[1:], rows)[: len(start)]
    return _Baskets(user, stage, start, end, back, sizes[visit])


def moment_starts(interactions: Interactions) -> IntArray:
    """(N,) row at which the moment of each event begins; with baskets off and without searches, the event's own."""
    opens = _changes(interactions.users) | _changes(interactions.baskets) | _changes(interactions.stages)
    return np.flatnonzero(opens)[np.cumsum(opens) - 1]


def _changes(values: IntArray) -> BoolArray:
    """Where a value differs from the one before; the first always does."""
    changed = np.ones(len(values), dtype=bool)
    changed[1:] = values[1:] != values[:-1]
    return changed
