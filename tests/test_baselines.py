import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.baselines.item_graph import ItemGraph
from models.baselines.popularity import Popularity, RecentPopularity
from stages.baselines import fit_baseline
from stages.errors import UserError
from stages.interactions import Interactions
from stages.jobs import BASELINES, SEARCH_BASELINES

NOBODY = np.empty(0, dtype=np.int64)
rows = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=8), min_size=1, max_size=6)


def flat(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    users = np.repeat(np.arange(len(sequences)), [len(row) for row in sequences])
    return users, np.concatenate([np.array(row, dtype=np.int64) for row in sequences])


def test_popularity_counts_and_breaks_ties_by_item_number() -> None:
    lists = Popularity(np.array([3, 3, 1, 2]), known=5, exclude_history=False).recommend([NOBODY], 7)
    assert lists.items[0].tolist() == [3, 1, 2, 0, 4, -1, -1]
    assert lists.scores[0].tolist() == [2, 1, 1, 0, 0, -np.inf, -np.inf]
    assert len(set(lists.groups[0])) == 7


def test_popularity_skips_each_users_own_history() -> None:
    model = Popularity(np.array([3, 3, 1, 2]), known=5, exclude_history=True)
    lists = model.recommend([np.array([3, 9]), np.array([1, 2, 1]), NOBODY], 3)
    assert lists.items.tolist() == [[1, 2, 0], [3, 0, 4], [3, 1, 2]]


def test_popularity_refuses_items_it_must_not_know() -> None:
    with pytest.raises(ValueError, match=r"items must lie in 0 … 4"):
        Popularity(np.array([5]), known=5, exclude_history=False)


def test_recent_popularity_forgets_what_lies_before_its_window() -> None:
    items, stages = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 0, 1, 2, 2])
    tops = {w: RecentPopularity(items, stages, w, 3, False).recommend([NOBODY], 3).items[0] for w in (1, 2, 3)}
    assert {w: top.tolist() for w, top in tops.items()} == {1: [2, 0, 1], 2: [2, 1, 0], 3: [0, 2, 1]}
    with pytest.raises(ValueError, match="at least 1"):
        RecentPopularity(items, stages, 0, 3, False)


def test_item_graph_weighs_one_two_three_places_and_half_of_it_backwards() -> None:
    users, items = flat([[0, 1, 2, 3, 4]])
    model = ItemGraph(users, items, np.ones(5, dtype=bool), 5, exclude_history=False)
    links = model.links.toarray() / 12
    np.testing.assert_allclose(links[0], [0, 1, 1 / 2, 1 / 3, 0])
    np.testing.assert_allclose(links[3], [1 / 6, 1 / 4, 1 / 2, 0, 1])
    np.testing.assert_allclose(links[4], [0, 1 / 6, 1 / 4, 1 / 2, 0])


def test_item_graph_learns_from_targets_only_but_looks_back_at_everything() -> None:
    users, items = flat([[0, 1, 2]])
    model = ItemGraph(users, items, np.array([False, False, True]), 3, exclude_history=False)
    np.testing.assert_allclose(model.links.toarray() / 12, [[0, 0, 1 / 2], [0, 0, 1], [1 / 4, 1 / 2, 0]])


def test_item_graph_does_not_link_two_users() -> None:
    users, items = flat([[0], [1]])
    assert ItemGraph(users, items, np.ones(2, dtype=bool), 2, False).links.nnz == 0


def brute_force(sequences: list[list[int]], history: list[int], known: int, keep: int) -> dict[int, float]:
    links = np.zeros((known, known))
    for row in sequences:
        for place in range(len(row)):
            for lag in range(1, min(3, place) + 1):
                links[row[place - lag], row[place]] += 1 / lag
                links[row[place], row[place - lag]] += 0.5 / lag
    scores = np.zeros(known)
    for recency, item in enumerate(history[::-1][:10]):
        kept = np.lexsort((np.arange(known), -links[item].round(9)))[:keep]
        scores[kept] += links[item, kept] / (1 + recency)
    return {item: score for item, score in enumerate(scores) if score > 0 and item not in history}


@settings(max_examples=60)
@given(sequences=rows, histories=st.lists(st.lists(st.integers(0, 11), max_size=14), min_size=1, max_size=4))
def test_item_graph_agrees_with_the_definition_written_out(
    sequences: list[list[int]], histories: list[list[int]]
) -> None:
    users, items = flat(sequences)
    model = ItemGraph(users, items, np.ones(len(items), dtype=bool), 12, exclude_history=True, backfill=False)
    lists = model.recommend([np.array(history, dtype=np.int64) for history in histories], 12)
    for history, found, scores in zip(histories, lists.items, lists.scores, strict=True):
        expected = brute_force(sequences, history, 12, keep=60)
        order = sorted(expected, key=lambda item: (-round(expected[item], 9), item))
        assert found[found >= 0].tolist() == order
        np.testing.assert_allclose(scores[: len(order)], [expected[item] for item in order], rtol=1e-6)


def test_item_graph_keeps_sixty_neighbours() -> None:
    users, items = flat([[0, other] for other in range(1, 100)])
    model = ItemGraph(users, items, np.ones(len(items), dtype=bool), 100, exclude_history=True)
    assert model.links.toarray()[0].nonzero()[0].tolist() == list(range(1, 61))


@settings(max_examples=40)
@given(sequences=rows, histories=st.lists(st.lists(st.integers(0, 15), max_size=12), min_size=1, max_size=5))
def test_every_baseline_keeps_the_recommender_contract(sequences: list[list[int]], histories: list[list[int]]) -> None:
    users, items = flat(sequences)
    given_histories = [np.array(history, dtype=np.int64) for history in histories]
    for exclude in (False, True):
        models = (
            Popularity(items, 12, exclude),
            ItemGraph(users, items, np.ones(len(items), dtype=bool), 12, exclude),
        )
        for model in models:
            lists = model.recommend(given_histories, 10)
            assert lists.items.shape == lists.scores.shape == lists.groups.shape == (len(histories), 10)
            for history, found, scores in zip(histories, lists.items, lists.scores, strict=True):
                listed = found[found >= 0]
                allowed = set(range(12)) - (set(history) if exclude else set())
                assert len(listed) == len(set(listed)) == min(10, len(allowed))
                assert set(listed) <= allowed
                assert (scores[:-1] >= scores[1:]).all()
                equal = (scores[:-1] == scores[1:]) & (found[1:] >= 0)
                assert (found[:-1][equal] < found[1:][equal]).all()


def test_a_person_without_history_gets_what_is_popular() -> None:
    users, items = flat([[0, 1], [2, 1]])
    model = ItemGraph(users, items, np.ones(4, dtype=bool), 4, exclude_history=True)
    assert model.recommend([NOBODY], 4).items[0].tolist() == [1, 0, 2, 3]


def turning(users: int = 60) -> Interactions:
    """Everybody takes 0 0 0 0 … at stage 0 and 1 1 1 1 at stages 1 and 2: taste flips at the first boundary."""
    visit = 5
    items = np.tile(np.repeat([0, 1, 1], visit), users)
    return Interactions(
        user_ids=[f"u{number:02d}" for number in range(users)],
        offsets=np.arange(0, users * 3 * visit + 1, 3 * visit),
        items=items,
        stages=np.tile(np.repeat([0, 1, 2], visit), users),
        baskets=np.tile(np.arange(3 * visit), users),
    )


@pytest.mark.parametrize("protocol", ["same_stage", "next_stage"])
def test_recent_popularity_chooses_the_window_that_follows_the_turn(protocol: str) -> None:
    model = fit_baseline("recent_popularity", turning(), 2, 1, protocol, seed=0, exclude_history=False)
    assert isinstance(model, RecentPopularity)
    assert model.window == 1
    assert model.recommend([NOBODY], 1).items[0, 0] == 1


@pytest.mark.parametrize("name", sorted(set(BASELINES) - set(SEARCH_BASELINES)))
def test_no_baseline_sees_a_later_stage(name: str) -> None:
    log = turning()
    later = np.where(log.stages > 1, 0, log.items)
    changed = Interactions(log.user_ids, log.offsets, later, log.stages, log.baskets)
    for protocol in ("same_stage", "next_stage"):
        one, two = (
            fit_baseline(name, events, 2, 1, protocol, seed=0, exclude_history=False).recommend([np.array([0])], 2)
            for events in (log, changed)
        )
        np.testing.assert_array_equal(one.items, two.items)
        np.testing.assert_array_equal(one.scores, two.scores)


def test_an_unknown_baseline_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown baseline 'populrity'; did you mean 'popularity'"):
        fit_baseline("populrity", turning(), 2, 0, "same_stage", seed=0, exclude_history=False)
