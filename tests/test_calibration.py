"""The evaluator against numbers that others published or measured; the data is not part of the repo."""

import json
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from models.baselines.item_graph import ItemGraph
from models.baselines.popularity import Popularity, RecentPopularity
from models.recommender import Recommender
from stages.baselines import fit_baseline
from stages.interactions import Interactions
from stages.queries import Queries, next_stage_tests, same_stage_tests, training_targets
from stages.ranking import rank_queries
from tests.public import public_log

Visit = tuple[str, int, list[str]]  # user, stage, items oldest first
STAGES = (1, 2, 3, 4)


class Log:
    """Visits as `Interactions`, with the number of items known by the end of each stage."""

    def __init__(self, visits: list[Visit]) -> None:
        first: dict[str, int] = {}
        for _, stage, items in visits:
            first |= {item: min(stage, first.get(item, stage)) for item in items}
        numbers = {item: number for number, item in enumerate(sorted(first, key=lambda item: (first[item], item)))}
        self.first_stage = np.array(sorted(first.values()))
        visits = sorted(visits, key=lambda visit: visit[:2])
        lengths: dict[str, int] = {}
        for user, _, items in visits:
            lengths[user] = lengths.get(user, 0) + len(items)
        sizes = np.array(list(lengths.values()))
        self.events = Interactions(
            user_ids=list(lengths),
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            items=np.array([numbers[item] for _, _, items in visits for item in items]),
            stages=np.repeat([stage for _, stage, _ in visits], [len(items) for _, _, items in visits]),
            baskets=np.concatenate([np.arange(size) for size in sizes]),
        )

    def known(self, stage: int) -> int:
        return int(np.searchsorted(self.first_stage, stage, side="right"))

    def ranked(self, model: Recommender, queries: Queries, seen: int, tested: int, exclude: bool) -> pl.DataFrame:
        return rank_queries(
            model,
            self.events,
            queries,
            known=self.known(seen),
            k=20,
            batch_size=1024,
            seen_stage=seen,
            tested_stage=tested,
            exclude_history=exclude,
        )

    def same_stage(self, fit: Callable[[int], Recommender], exclude: bool) -> tuple[float, float]:
        """Hit@10 and NDCG@10, mean over stages 1 … 4 (one target a user)."""
        frames = [self.ranked(fit(s), same_stage_tests(self.events, s), s, s, exclude) for s in STAGES]
        return means(frames)

    def next_stage(self, fit: Callable[[int], Recommender], exclude: bool, target: str = "all") -> tuple[float, float]:
        """The same for models trained to the stage before; event means."""
        frames = []
        for s in STAGES:
            queries = next_stage_tests(self.events, s, "first" if target == "first" else "all")
            frames.append(self.ranked(fit(s - 1), queries, s - 1, s, exclude))
        return means(frames)


def means(frames: list[pl.DataFrame]) -> tuple[float, float]:
    found = np.array([[frame[metric].to_numpy().mean() for metric in ("hit_at_10", "ndcg_at_10")] for frame in frames])
    return tuple(found.mean(axis=0))


@pytest.fixture(scope="module")
def games() -> Log:
    visits: list[Visit] = []
    for stage, path in enumerate(sorted(public_log("amazon-video-games-blocks").glob("*.block_*.json"))):
        block = json.loads(path.read_text(encoding="utf-8"))
        visits += [(user, stage, visit["current_block"]) for user, visit in block.items()]
    return Log(visits)


@pytest.fixture(scope="module")
def songs() -> Log:
    lines = (public_log("s3rec-lastfm") / "LastFM.txt").read_text(encoding="utf-8").splitlines()
    return Log([(words[0], 0, words[1:]) for words in map(str.split, lines)])


def near(value: float, within: float) -> object:
    return pytest.approx(value, abs=within + 5e-5)  # the reference has four decimals


def test_popularity_on_lastfm_is_the_published_440(songs: Log) -> None:
    tests = same_stage_tests(songs.events, 0)
    counted = np.ones(len(songs.events.items), dtype=bool)
    counted[tests.cut] = False  # training and validation are counted, the test item is not
    model = Popularity(songs.events.items[counted], songs.known(0), exclude_history=True)
    frame = songs.ranked(model, tests, 0, 0, exclude=True)
    assert len(frame) == 1090
    measured = {
        name: round(float(frame[name].to_numpy().mean()), 4) for name in ("hit_at_5", "hit_at_10", "ndcg_at_10")
    }
    assert measured == {"hit_at_5": 0.0248, "hit_at_10": 0.0440, "ndcg_at_10": 0.0201}


def test_popularity_on_lastfm_without_the_validation_items_is_385(songs: Log) -> None:
    model = fit_baseline("popularity", songs.events, songs.known(0), 0, "same_stage", seed=0, exclude_history=True)
    frame = songs.ranked(model, same_stage_tests(songs.events, 0), 0, 0, exclude=True)
    assert round(float(frame["hit_at_10"].to_numpy().mean()), 4) == 0.0385


def test_the_blocks_give_the_published_numbers_of_targets(games: Log) -> None:
    events = games.events
    train = [int(training_targets(events, [s], "same_stage", 0).sum()) for s in range(5)]
    assert train == [66_379, 5_421, 5_310, 10_748, 9_689]
    assert [len(same_stage_tests(events, s)) for s in range(5)] == [12_447, 1_035, 1_091, 1_949, 1_791]
    assert [len(next_stage_tests(events, s)) for s in STAGES] == [7_491, 7_492, 14_646, 13_271]
    assert [len(next_stage_tests(events, s, "first")) for s in STAGES] == [229, 219, 246, 319]
    assert [same_stage_tests(events, s).skipped for s in range(5)] == [0] * 5


def test_one_same_stage_target_in_five_was_never_a_training_target(games: Log) -> None:
    counts = []
    for stage in range(5):
        trained = training_targets(games.events, range(stage + 1), "same_stage", 0)
        frame = rank_queries(
            Popularity(games.events.items[trained], games.known(stage), exclude_history=False),
            games.events,
            same_stage_tests(games.events, stage),
            known=games.known(stage),
            k=20,
            batch_size=1024,
            seen_stage=stage,
            tested_stage=stage,
            trained=trained,
        )
        counts.append((int(frame["new_item"].sum()), round(100 * frame["new_item"].sum() / len(frame))))
    assert counts == [(1660, 13), (222, 21), (208, 19), (290, 15), (248, 14)]


def test_next_stage_targets_out_of_reach_are_a_third_to_a_half(games: Log) -> None:
    nobody = Popularity(np.empty(0, dtype=np.int64), games.known(0), exclude_history=False)
    out_of_reach = []
    for stage in STAGES:
        frame = games.ranked(nobody, next_stage_tests(games.events, stage), stage - 1, stage, exclude=False)
        assert (frame["new_item"] == ~frame["reachable"]).all()
        out_of_reach.append(round(100 * (1 - frame["reachable"].sum() / len(frame))))
    assert out_of_reach == [31, 33, 56, 41]


def test_same_stage_popularity_is_248_and_129(games: Log) -> None:
    def fit(stage: int) -> Recommender:
        return fit_baseline("popularity", games.events, games.known(stage), stage, "same_stage", 0, False)

    assert games.same_stage(fit, exclude=False) == (near(0.0248, 0), near(0.0129, 0))


def test_same_stage_popularity_within_the_stage_is_289_and_162(games: Log) -> None:
    """To ±.0005; among equal counts the order moves Hit@10 by ±.0009 (one standard deviation over random orders)."""

    def fit(stage: int) -> Recommender:
        trained = training_targets(games.events, [stage], "same_stage", 0)
        items, stages = games.events.items[trained], games.events.stages[trained]
        return RecentPopularity(items, stages, 1, games.known(stage), exclude_history=False)

    assert games.same_stage(fit, exclude=False) == (near(0.0289, 0.0005), near(0.0162, 0.0005))


def test_same_stage_item_graph_is_639_and_380_and_half_of_that_when_frozen(games: Log) -> None:
    def updated(stage: int) -> Recommender:
        return fit_baseline("item_graph", games.events, games.known(stage), stage, "same_stage", 0, True)

    def frozen(stage: int) -> Recommender:
        return fit_baseline("item_graph", games.events, games.known(stage), 0, "same_stage", 0, True)

    assert games.same_stage(updated, exclude=True) == (near(0.0639, 0.002), near(0.0380, 0.002))
    assert games.same_stage(frozen, exclude=True) == (near(0.0317, 0.002), near(0.0179, 0.002))


def test_next_stage_popularity_is_164_and_82_and_of_the_last_stage_192_and_99(games: Log) -> None:
    events = games.events

    def ever(stage: int) -> Recommender:
        return Popularity(events.items[events.stages <= stage], games.known(stage), exclude_history=False)

    def last(stage: int) -> Recommender:
        return Popularity(events.items[events.stages == stage], games.known(stage), exclude_history=False)

    assert games.next_stage(ever, exclude=False) == (near(0.0164, 0), near(0.0082, 0))
    assert games.next_stage(last, exclude=False) == (near(0.0192, 0.0005), near(0.0099, 0.0005))
    assert games.next_stage(ever, exclude=False, target="first") == (near(0.0075, 0), near(0.0031, 0))


def test_next_stage_popularity_as_a_run_fits_it_agrees_too(games: Log) -> None:
    def fit(stage: int) -> Recommender:
        return fit_baseline("popularity", games.events, games.known(stage), stage, "next_stage", 0, False)

    assert games.next_stage(fit, exclude=False) == (near(0.0164, 0.0005), near(0.0082, 0.0005))


@pytest.mark.parametrize("backfill", [True, False])
def test_next_stage_item_graph_is_336_and_199(games: Log, backfill: bool) -> None:
    events = games.events

    def fit(stage: int) -> Recommender:
        return ItemGraph(
            events.users,
            events.items,
            events.stages <= stage,
            games.known(stage),
            exclude_history=True,
            backfill=backfill,
        )

    assert games.next_stage(fit, exclude=True) == (near(0.0336, 0.002), near(0.0199, 0.002))
    if backfill:
        assert games.next_stage(fit, exclude=True, target="first") == (near(0.0317, 0.002), near(0.0179, 0.002))
