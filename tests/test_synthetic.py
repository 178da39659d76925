"""The generated shop log: what is promised of its rows, and that its truth is true."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from stages import synthetic
from stages.config import load_config
from stages.errors import UserError
from stages.synthetic import DemoTruth, best_possible, boundaries, write_demo_log


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DemoTruth:
    return write_demo_log(tmp_path_factory.mktemp("small"), seed=3, users=200, items=80, stages=3)


@pytest.fixture(scope="module")
def events(small: DemoTruth) -> pl.DataFrame:
    return pl.read_csv(small.events)


@pytest.fixture(scope="module")
def truth(small: DemoTruth) -> pl.DataFrame:
    return pl.read_parquet(small.truth)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    runs = [write_demo_log(tmp_path / str(index), seed, 20, 40, 2) for index, seed in enumerate((7, 7, 8))]
    for name in ("events", "catalogue", "truth"):
        first, again, other = (getattr(run, name).read_bytes() for run in runs)
        assert first == again
        assert first != other


def test_every_event_has_its_truth_and_its_stage(small: DemoTruth, events: pl.DataFrame, truth: pl.DataFrame) -> None:
    assert events.columns == ["user_id", "item_id", "timestamp", "event", "query"]
    assert events.drop("query").equals(truth.drop("stage", "rank"))
    assert events["timestamp"].is_sorted()
    cuts = [int(instant.timestamp()) for instant in small.boundaries]
    assert np.array_equal(np.searchsorted(cuts, truth["timestamp"].to_numpy(), side="right"), truth["stage"].to_numpy())
    assert truth["stage"].unique().sort().to_list() == [0, 1, 2]
    assert not events.select("user_id", "timestamp").is_duplicated().any()
    assert truth["rank"].min() == 1


def test_stage_zero_holds_somewhat_more_than_half_of_the_events(truth: pl.DataFrame) -> None:
    assert 0.5 < (truth["stage"] == 0).mean() < 0.75  # pyright: ignore[reportOperatorIssue]


def test_users_and_items_go_on_arriving(truth: pl.DataFrame, small: DemoTruth) -> None:
    for column in ("user_id", "item_id"):
        arrivals = truth.group_by(column).agg(pl.col("stage").min())["stage"].value_counts().sort("stage")["count"]
        assert len(arrivals) == 3
        assert arrivals[0] > arrivals[1] > 0 < arrivals[2]
    assert set(truth["item_id"]) <= set(pl.read_csv(small.catalogue)["item_id"])


def test_a_query_is_made_of_words_of_the_item_found(events: pl.DataFrame, small: DemoTruth) -> None:
    items = pl.read_csv(small.catalogue)
    searches = events.filter(pl.col("event") == "search").join(items, on="item_id")
    assert 0.1 < len(searches) / len(events) < 0.2
    assert events.filter(pl.col("event") == "recommendation")["query"].null_count() == len(events) - len(searches)
    for query, title, text in searches.select("query", "title", "text").iter_rows():
        assert set(query.split()) <= {*title.split(), *text.split()}


def test_titles_share_words_within_a_category_only(small: DemoTruth) -> None:
    items = pl.read_csv(small.catalogue)
    words = [set(f"{title} {text}".split()) for title, text in items.select("title", "text").iter_rows()]
    models = {title.split()[-1] for title in items["title"]}  # the model word is common to all categories
    category = items["categories"].to_list()
    assert items["title"].n_unique() == len(items) == 80
    assert len(set(category)) == 4
    for first in range(0, 80, 7):
        for second in range(80):
            assert bool((words[first] & words[second]) - models) == (category[first] == category[second])


def test_the_next_item_mostly_continues_the_series_of_the_last(truth: pl.DataFrame) -> None:
    numbers = (
        truth.filter(pl.col("event") == "recommendation")
        .sort("user_id", "timestamp")
        .with_columns(item=pl.col("item_id").str.slice(1).cast(pl.Int64))
    )
    pairs = numbers.with_columns(before=pl.col("item").shift(1).over("user_id", "stage")).drop_nulls("before")
    apart = (pairs["item"] - pairs["before"]).abs()
    same = pairs["item"] // synthetic.PER_CATEGORY == pairs["before"] // synthetic.PER_CATEGORY
    near = (same & (apart.is_between(1, 4) | (apart >= synthetic.PER_CATEGORY - 4))).mean()
    shuffled = (pairs["item"].shuffle(seed=0) - pairs["before"]).abs().is_between(1, 4).mean()
    assert near > 0.6 > 3 * shuffled  # pyright: ignore[reportOperatorIssue]


def test_some_tastes_turn_at_a_boundary_and_the_others_stay() -> None:
    crowd = synthetic._crowd(np.random.default_rng(0), users=500, categories=6, stages=2)
    turned = (crowd.taste[0] != crowd.taste[1]).any(axis=1)
    assert 0.3 < turned.mean() < 0.5
    np.testing.assert_allclose(crowd.taste.sum(axis=2), 1.0)
    assert ((crowd.visits == 0) | (crowd.visits >= 3)).all()


def test_the_true_distribution_sums_to_one_and_sells_nothing_before_its_release() -> None:
    rng = np.random.default_rng(1)
    shop = synthetic._shop(rng, 60, 3)
    crowd = synthetic._crowd(rng, 40, 3, 3)
    for stage in range(3):
        last = rng.choice(np.flatnonzero(shop.release <= stage), 40)
        last[:5] = -1
        chances = synthetic._next_item(shop, stage, crowd.taste[stage], last)
        np.testing.assert_allclose(chances.sum(axis=1), 1.0)
        assert chances[:, shop.release > stage].sum() == 0.0
        assert (chances.max(axis=1)[5:] >= synthetic.CONTINUES * synthetic.SUCCESSORS[0]).all()


def test_ranks_count_the_likelier_items_and_break_ties_by_number() -> None:
    chances = np.array([[0.2, 0.5, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert synthetic._ranks(chances, np.array([3, 2])).tolist() == [3, 3]
    assert synthetic._ranks(chances, np.array([1, 0])).tolist() == [1, 1]


def test_realised_hits_agree_with_the_probability_mass_of_the_first_places() -> None:
    """Calibration: the mean of the first k probabilities is what a ranker by them will score."""
    rng = np.random.default_rng(2)
    shop = synthetic._shop(rng, 60, 2)
    taste = synthetic._tastes(rng, 4000, 3)
    last = rng.choice(np.flatnonzero(shop.release == 0), 4000)
    chances = synthetic._next_item(shop, 0, taste, last)
    crowd = synthetic._Crowd(taste[None], np.ones((1, 4000), dtype=np.int64))
    drawn = synthetic._step(rng, shop, crowd, 0, 0, last.copy())
    for k in (1, 5):
        expected = np.sort(chances, axis=1)[:, -k:].sum(axis=1).mean()
        assert (drawn["rank"] <= k).mean() == pytest.approx(expected, abs=0.03)


def test_the_best_possible_score_follows_the_protocols_tests() -> None:
    rows = [
        ("a", 1, "recommendation", 1, 1),
        ("a", 2, "recommendation", 1, 7),
        ("a", 3, "recommendation", 1, 3),
        ("a", 4, "search", 1, 1),
        ("b", 1, "recommendation", 1, 1),
        ("b", 9, "recommendation", 0, 99),
    ]
    truth = pl.DataFrame(rows, schema=["user_id", "timestamp", "event", "stage", "rank"], orient="row")
    following = best_possible(truth, "next_stage", 1)
    assert following["hit_at_1"] == pytest.approx((1 / 3 + 1) / 2)
    assert following["hit_at_5"] == pytest.approx((2 / 3 + 1) / 2)
    same = best_possible(truth, "same_stage", 1)
    assert same["hit_at_1"] == 0.0
    assert same["hit_at_5"] == 1.0
    assert same["ndcg_at_10"] == pytest.approx(1 / math.log2(4))
    both = ("recommendation", "search")
    assert best_possible(truth, "same_stage", 1, both, "search")["hit_at_1"] == 1.0
    assert math.isnan(best_possible(truth, "same_stage", 1, both)["hit_at_1"])  # no visit ends in a recommendation
    assert best_possible(truth, "next_stage", 1, both) == following
    assert all(math.isnan(value) for value in best_possible(truth, "same_stage", 0).values())


def test_a_searched_items_rank_is_counted_among_the_items_that_give_its_query(
    small: DemoTruth, events: pl.DataFrame, truth: pl.DataFrame
) -> None:
    items = pl.read_csv(small.catalogue)
    words = [{*title.split(), *text.split()} for title, text in items.select("title", "text").iter_rows()]
    searched = truth.with_columns(query=events["query"]).filter(pl.col("event") == "search")
    named = [sum(set(query.split()) <= own for own in words) for query in searched["query"]]
    ranks = searched["rank"].to_list()
    assert max(named) > 1
    assert all(rank <= count for rank, count in zip(ranks, named, strict=True))
    # A ranker that draws lots among the items named would score this; the true one knows taste and series, too.
    assert np.mean([rank == 1 for rank in ranks]) > np.mean([1 / count for count in named]) + 0.1


def test_the_best_possible_score_is_far_from_chance_and_from_certainty(truth: pl.DataFrame) -> None:
    score = best_possible(truth, "next_stage", 1)
    assert 0.35 < score["hit_at_1"] < score["hit_at_5"] < score["hit_at_10"] < score["hit_at_20"] < 1.0
    assert score["hit_at_1"] < score["ndcg_at_10"] < score["hit_at_10"]


@pytest.mark.parametrize(
    ("sizes", "message"), [((9, 40, 2), "users is 9"), ((20, 41, 2), "items is 41"), ((20, 40, 1), "stages is 1")]
)
def test_sizes_too_small_are_refused_by_name(tmp_path: Path, sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_demo_log(tmp_path / "none", 0, *sizes)
    assert not (tmp_path / "none").exists()


def test_the_demo_config_cuts_the_log_where_the_generator_turns_tastes() -> None:
    files = sorted(Path(__file__).parent.parent.glob("*/demo.toml"))
    assert files
    for config in map(load_config, files):
        assert config.stages.instants == [instant.strftime("%Y-%m-%dT%H:%M:%SZ") for instant in boundaries(4)]
        sources = [*config.log.sources, *config.catalogue.sources]
        assert [Path(source.path).name for source in sources] == ["events.csv", "catalogue.csv"]
        assert len({Path(source.path).parent for source in sources}) == 1
        for name in config.compare:
            config.method(name)


def test_copies_of_the_demo_config_differ_in_their_paths_only() -> None:
    texts = [file.read_text(encoding="utf-8") for file in Path(__file__).parent.parent.glob("*/demo.toml")]
    settings = [[line for line in text.splitlines() if not line.startswith(("#", "path = "))] for text in texts]
    assert all(other == settings[0] for other in settings)
