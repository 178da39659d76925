"""A generated shop log whose true next-item distribution is known, so that a model can be held against the best score.

A user has a taste over categories; items of a category follow each other in series (the second volume after the
first). The next item continues the series of the last one, or starts anew by taste and popularity. At every boundary
new items enter their series, some users' tastes turn, some categories reverse their order and new users arrive.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from stages.config import CUTOFFS, Protocol
from stages.errors import UserError
from stages.metrics import hit_at_k, ndcg_at_k
from stages.queries import FEWEST_BASKETS
from stages.search_config import Objective
from stages.workspace import replacing

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

START = datetime(2025, 1, 1, tzinfo=UTC)
FIRST_PERIOD, PERIOD = timedelta(days=180), timedelta(days=45)
PER_CATEGORY, PER_SERIES = 20, 5
CONTINUES = 0.6
"""Probability that the next item continues the last one's series."""
SUCCESSORS = (0.75, 0.25)
"""Given that, the shares of the next item in line and of the one after it."""
SEARCHES = 0.15
"""Share of the events that are searches: an item of the same distribution, which the next event does not continue."""
NEW_ITEMS, NEW_USERS = 0.25, 0.4
"""Shares of the items and users that arrive after stage 0, spread evenly over the later stages."""
DRIFTING, RETURNING, REVERSING = 0.4, 0.55, 0.15
"""Shares of users whose taste turns at a boundary, of users active in a later stage, of categories that reverse."""
FIRST_VISIT, VISIT = 24, 8
"""Mean events of an active user in stage 0 and in a later stage."""


@dataclass(frozen=True)
class DemoTruth:
    """Where the generated files are.

    Attributes:
        events: CSV, one row an event in time order: user_id, item_id, timestamp (epoch seconds), event, query.
        catalogue: CSV, one row an item, later ones included: item_id, title, text, categories ("|" between them).
        truth: Parquet, one row an event: user_id, item_id, timestamp, event, stage, and rank, the place (1-based) of
            the item in the true distribution at that moment; of a search, in the distribution given its query.
        boundaries: the instants at which tastes turn and stages end, rising.
    """

    events: Path
    catalogue: Path
    truth: Path
    boundaries: tuple[datetime, ...]


@dataclass(frozen=True)
class _Shop:
    """Items in the order of their series, category by category; S stages, C categories, I items."""

    category: IntArray  # (I,)
    release: IntArray  # (I,) stage of the first sale
    appeal: FloatArray  # (S, C, I) item given category; 0 before the release
    chain: FloatArray  # (S, I, I) next item given the last one
    titles: list[str]
    texts: list[str]
    names: list[str]  # of the categories


@dataclass(frozen=True)
class _Crowd:
    """Users; S stages, U users, C categories."""

    taste: FloatArray  # (S, U, C)
    visits: IntArray  # (S, U) number of events, 0 = away


def write_demo_log(folder: Path, seed: int, users: int = 500, items: int = 240, stages: int = 4) -> DemoTruth:
    """Generate the log, its catalogue and the truth about it.

    Args:
        folder: where `events.csv`, `catalogue.csv` and `truth.parquet` go; created if absent.
        seed: of everything random; the same numbers give the same bytes.
        users: over all stages.
        items: over all stages, a multiple of 20 (the size of a category).
        stages: stage 0 (about 60 % of the events) and the later ones, at least 2.

    Returns:
        The files and the boundaries.

    Raises:
        UserError: a size too small to generate.
    """
    _check_sizes(users, items, stages)
    rng = np.random.default_rng(seed)
    shop = _shop(rng, items, stages)
    crowd = _crowd(rng, users, items // PER_CATEGORY, stages)
    truth = _with_times(rng, pl.concat(_walks(rng, shop, crowd)), stages)
    truth = truth.with_columns(query=_queries(rng, shop, truth))
    truth = truth.with_columns(rank=_ranks_given_queries(shop, crowd, truth))
    events = truth.select("user_id", "item_id", "timestamp", "event", "query")
    files = DemoTruth(folder / "events.csv", folder / "catalogue.csv", folder / "truth.parquet", boundaries(stages))
    for path, frame in ((files.events, events), (files.catalogue, _catalogue(shop))):
        with replacing(path) as temporary:
            frame.write_csv(temporary)
    with replacing(files.truth) as temporary:
        truth.select("user_id", "item_id", "timestamp", "event", "stage", "rank").write_parquet(temporary)
    return files


def boundaries(stages: int) -> tuple[datetime, ...]:
    """The instants between `stages` stages; events fall in [START, the last one + PERIOD)."""
    return tuple(START + FIRST_PERIOD + index * PERIOD for index in range(stages - 1))


def best_possible(
    truth: pl.DataFrame,
    protocol: Protocol,
    stage: int,
    events: Collection[str] = ("recommendation",),
    objective: Objective = "recommendation",
) -> dict[str, float]:
    """What the Bayes-optimal ranker scores on the test events of a stage.

    It ranks by the true distribution, which knows tastes, series and new items; no model of the log can be expected to
    do better, though on few events one may by luck.

    Args:
        truth: `DemoTruth.truth` as read.
        protocol: `same_stage`: the last event of each visit of at least three; `next_stage`: every event.
        stage: the tested stage.
        events: kinds of event that are used; others are as if they were not in the log.
        objective: the kind that is asked for, repeated items included (`search.repeats = "ask"`).

    Returns:
        hit_at_1 … hit_at_20 and ndcg_at_10: means within users, then over users; NaN without a test event.
    """
    visit = truth.filter((pl.col("stage") == stage) & pl.col("event").is_in(list(events)))
    if protocol == "same_stage":
        long = visit.filter(pl.len().over("user_id") >= FEWEST_BASKETS)
        visit = long.filter(pl.col("timestamp") == pl.col("timestamp").max().over("user_id"))
    visit = visit.filter(pl.col("event") == objective)
    rank, alone = visit["rank"].to_numpy(), np.ones(len(visit), dtype=np.int64)
    scores = {f"hit_at_{k}": hit_at_k(rank, alone, k) for k in CUTOFFS} | {"ndcg_at_10": ndcg_at_k(rank, alone, 10)}
    if not len(visit):
        return dict.fromkeys(scores, float("nan"))
    by_user = visit.select("user_id").with_columns(**scores).group_by("user_id", maintain_order=True).mean()
    return {name: float(by_user[name].to_numpy().mean()) for name in scores}


def _check_sizes(users: int, items: int, stages: int) -> None:
    if stages < 2:
        raise UserError(f"stages is {stages}; a demo log needs at least 2, one to start from and one to drift")
    if users < 10:
        raise UserError(f"users is {users}; a demo log needs at least 10")
    if items < 2 * PER_CATEGORY or items % PER_CATEGORY:
        raise UserError(f"items is {items}; give a multiple of {PER_CATEGORY}, at least {2 * PER_CATEGORY}")


def _arrivals(rng: np.random.Generator, count: int, late: float, stages: int) -> IntArray:
    """(count,) stage of arrival: a share `late` spread evenly over the later stages, the others at once."""
    number = round(count * late)
    later = 1 + np.arange(number) % (stages - 1)
    return rng.permutation(np.concatenate([np.zeros(count - number, dtype=np.int64), later]))


def _shop(rng: np.random.Generator, items: int, stages: int) -> _Shop:
    category = np.arange(items) // PER_CATEGORY
    categories = items // PER_CATEGORY
    release = _arrivals(rng, items, NEW_ITEMS, stages)
    release[::PER_CATEGORY] = 0  # no category is ever empty
    direction = np.where(rng.random((stages, categories)) < REVERSING, -1, 1).cumprod(axis=0)
    popularity = 1.0 / (1.0 + rng.permuted(np.tile(np.arange(PER_CATEGORY), (categories, 1)), axis=1)).ravel()
    member = category == np.arange(categories)[:, None]  # (C, I)
    sold = release <= np.arange(stages)[:, None]  # (S, I)
    appeal = np.where(sold[:, None] & member, popularity, 0.0)
    chain = np.stack([_chain(category, sold[stage], direction[stage]) for stage in range(stages)])
    names, titles, texts = _words_of_items(rng, categories)
    return _Shop(category, release, appeal / appeal.sum(axis=2, keepdims=True), chain, titles, texts, names)


def _chain(category: IntArray, sold: npt.NDArray[np.bool_], direction: IntArray) -> FloatArray:
    """(I, I) rows: what follows an item among the sold ones of its category, in a ring; zeros for unsold items."""
    chain = np.zeros((len(category), len(category)))
    for index, sign in enumerate(direction):
        ring = np.flatnonzero((category == index) & sold)
        for ahead, share in enumerate(SUCCESSORS, start=1):
            chain[ring, np.roll(ring, -ahead * int(sign))] += share
    return chain


def _words_of_items(rng: np.random.Generator, categories: int) -> tuple[list[str], list[str], list[str]]:
    """Category names, and titles and texts of all items: words are shared within a category and within a series."""
    series = PER_CATEGORY // PER_SERIES
    words = iter(_vocabulary(rng, categories * (7 + series) + PER_SERIES))
    models = [next(words) for _ in range(PER_SERIES)]
    names, titles, texts = [], [], []
    for _ in range(categories):
        name, *topics = (next(words) for _ in range(7))
        names.append(name)
        for line in [next(words) for _ in range(series)]:
            titles += [f"{line} {name} {model}" for model in models]
            texts += [" ".join([name, line, *rng.choice(topics, 4, replace=False)]) for _ in models]
    return names, titles, texts


def _vocabulary(rng: np.random.Generator, count: int) -> list[str]:
    """Invented words of three open syllables, all different."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    codes = rng.choice(len(syllables) ** 3, count, replace=False)
    return [
        "".join(syllables[(code // len(syllables) ** place) % len(syllables)] for place in range(3)) for code in codes
    ]


def _crowd(rng: np.random.Generator, users: int, categories: int, stages: int) -> _Crowd:
    arrival = _arrivals(rng, users, NEW_USERS, stages)
    drifting = rng.random(users) < DRIFTING
    tastes = [_tastes(rng, users, categories)]
    for _ in range(1, stages):
        tastes.append(np.where(drifting[:, None], _tastes(rng, users, categories), tastes[-1]))
    stage = np.arange(stages)[:, None]
    active = (arrival == stage) | ((arrival < stage) & (rng.random((stages, users)) < RETURNING))
    mean = np.where(stage == 0, FIRST_VISIT, VISIT)
    visits = 3 + rng.poisson(np.maximum(mean - 3, 0) * rng.gamma(2.0, 0.5, (stages, users)))
    return _Crowd(np.stack(tastes), np.where(active, visits, 0))


def _tastes(rng: np.random.Generator, users: int, categories: int) -> FloatArray:
    """(U, C) rows that sum to 1, with most of the weight on two or three categories."""
    return rng.dirichlet(np.full(categories, 2.0 / categories), size=users)


def _walks(rng: np.random.Generator, shop: _Shop, crowd: _Crowd) -> list[pl.DataFrame]:
    """Every user's items in order, by stage and step, with the item's true rank and whether it was searched."""
    last = np.full(crowd.visits.shape[1], -1)
    return [
        _step(rng, shop, crowd, stage, step, last)
        for stage, lengths in enumerate(crowd.visits)
        for step in range(int(lengths.max()))
    ]


def _step(rng: np.random.Generator, shop: _Shop, crowd: _Crowd, stage: int, step: int, last: IntArray) -> pl.DataFrame:
    """One more event of each user whose visit is not over; `last` moves on where it is no search.

    `after` is the item that the event followed, -1 for none.
    """
    here = np.flatnonzero(crowd.visits[stage] > step)
    chances = _next_item(shop, stage, crowd.taste[stage, here], last[here])
    lots = rng.random(len(here))[:, None] * chances.sum(axis=1, keepdims=True)
    item = (chances.cumsum(axis=1) <= lots).sum(axis=1)
    searched = rng.random(len(here)) < SEARCHES
    after = last[here]
    last[here[~searched]] = item[~searched]
    return pl.DataFrame(
        {"user": here, "item": item, "rank": _ranks(chances, item), "searched": searched, "after": after},
    ).with_columns(stage=pl.lit(stage, pl.Int64), step=pl.lit(step, pl.Int64))


def _next_item(shop: _Shop, stage: int, taste: FloatArray, last: IntArray) -> FloatArray:
    """(B, I) the true distribution of the next item; `last` is -1 for a user who has taken nothing yet."""
    anew = taste @ shop.appeal[stage]
    share = np.where(last >= 0, CONTINUES, 0.0)[:, None]
    return share * shop.chain[stage, last] + (1 - share) * anew


def _ranks(chances: FloatArray, item: IntArray) -> IntArray:
    """(B,) 1-based place of each item by falling probability, equal ones by item number."""
    own = np.take_along_axis(chances, item[:, None], axis=1)
    earlier = np.arange(chances.shape[1]) < item[:, None]
    return 1 + ((chances > own) | ((chances == own) & earlier)).sum(axis=1)


def _with_times(rng: np.random.Generator, walks: pl.DataFrame, stages: int) -> pl.DataFrame:
    """The rows with ids, instants and kinds of event, in time order; the instants of a user all differ."""
    walks = walks.sort("stage", "user", "step")
    opens = np.array([int(edge.timestamp()) for edge in (START, *boundaries(stages + 1))])
    stage, user, step = (walks[name].to_numpy() for name in ("stage", "user", "step"))
    lots = rng.random(len(walks))
    lots = lots[np.lexsort((lots, user, stage))]  # rising within a visit
    room = opens[stage + 1] - opens[stage] - (step.max() + 1)
    return walks.with_columns(
        user_id=pl.format("u{}", pl.col("user").cast(pl.String).str.zfill(5)),
        item_id=pl.format("i{}", pl.col("item").cast(pl.String).str.zfill(4)),
        timestamp=pl.Series(opens[stage] + (lots * room).astype(np.int64) + step),
        event=pl.when("searched").then(pl.lit("search")).otherwise(pl.lit("recommendation")),
    ).sort("timestamp", "user_id")


def _queries(rng: np.random.Generator, shop: _Shop, truth: pl.DataFrame) -> pl.Series:
    """Two words of the item's title and text for each search, null otherwise."""
    words = _words(shop)
    queries = [
        " ".join(rng.choice(words[item], 2, replace=False)) if event == "search" else None
        for item, event in truth.select("item", "event").iter_rows()
    ]
    return pl.Series(queries, dtype=pl.String)


def _ranks_given_queries(shop: _Shop, crowd: _Crowd, truth: pl.DataFrame) -> pl.Series:
    """Those of searches by what was likely before the query, times the chance that an item gives the query."""
    words = _words(shop)
    odds: dict[str, FloatArray] = {}
    ranks = truth["rank"].to_numpy().copy()
    for row, (stage, user, after, item, query) in enumerate(
        truth.select("stage", "user", "after", "item", "query").iter_rows()
    ):
        if query is None:
            continue
        if query not in odds:
            asked = set(query.split())
            odds[query] = np.array([asked.issubset(own) / (len(own) * (len(own) - 1)) for own in words])
        before = _next_item(shop, stage, crowd.taste[stage, [user]], np.array([after]))
        ranks[row] = _ranks(before * odds[query], np.array([item]))[0]
    return pl.Series(ranks)


def _words(shop: _Shop) -> list[list[str]]:
    """Of each item's title and text, those from which a query takes its two."""
    return [sorted({*title.split(), *text.split()}) for title, text in zip(shop.titles, shop.texts, strict=True)]


def _catalogue(shop: _Shop) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [f"i{number:04d}" for number in range(len(shop.titles))],
            "title": shop.titles,
            "text": shop.texts,
            "categories": [shop.names[category] for category in shop.category],
        }
    )
