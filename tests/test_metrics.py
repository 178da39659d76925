import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from stages.metrics import (
    METRICS,
    first_groups,
    hit_at_k,
    ndcg_at_k,
    query_metrics,
    recall_at_k,
    reciprocal_rank,
    set_ndcg_at_k,
    user_means,
)

groups = st.tuples(st.integers(1, 12), st.integers(1, 6))


def one(rank: int, tied: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return np.array([rank]), np.array([tied])


def test_a_target_in_place_three_scores_a_half_and_a_third() -> None:
    assert hit_at_k(*one(3), 2) == 0
    assert hit_at_k(*one(3), 3) == 1
    assert ndcg_at_k(*one(3), 5) == pytest.approx(0.5)  # 1 / log2(4)
    assert ndcg_at_k(*one(3), 2) == 0
    assert reciprocal_rank(*one(3)) == pytest.approx(1 / 3)


def test_a_target_that_was_not_retrieved_scores_nothing() -> None:
    for metric in (hit_at_k(*one(0), 20), ndcg_at_k(*one(0), 20), reciprocal_rank(*one(0))):
        assert metric == 0


def test_a_tie_group_across_the_cut_off_counts_the_share_of_its_places_inside() -> None:
    assert hit_at_k(*one(4, 3), 5) == pytest.approx(2 / 3)
    expected = (1 / np.log2(5) + 1 / np.log2(6)) / 3
    assert ndcg_at_k(*one(4, 3), 5) == pytest.approx(expected)
    assert reciprocal_rank(*one(4, 3)) == pytest.approx((1 / 4 + 1 / 5 + 1 / 6) / 3)


@given(group=groups, k=st.integers(1, 20))
def test_a_tie_gives_the_mean_over_the_places_it_covers(group: tuple[int, int], k: int) -> None:
    rank, tied = group
    places = np.arange(rank, rank + tied)
    alone = np.ones(tied, dtype=int)
    assert hit_at_k(*one(*group), k)[0] == pytest.approx(hit_at_k(places, alone, k).mean())
    assert ndcg_at_k(*one(*group), k)[0] == pytest.approx(ndcg_at_k(places, alone, k).mean())
    assert reciprocal_rank(*one(*group))[0] == pytest.approx(reciprocal_rank(places, alone).mean())


@given(group=groups, found=st.integers(1, 6), k=st.integers(1, 20))
def test_several_targets_in_one_tie_agree_with_shuffling_the_group(group: tuple[int, int], found: int, k: int) -> None:
    rank, tied = group
    found = min(found, tied)
    generator = np.random.default_rng(0)
    firsts = rank + generator.permuted(np.tile(np.arange(tied), (4000, 1)), axis=1)[:, :found].min(axis=1)
    assert hit_at_k(*one(*group), k, found)[0] == pytest.approx((firsts <= k).mean(), abs=0.04)
    assert reciprocal_rank(*one(*group), found)[0] == pytest.approx((1 / firsts).mean(), abs=0.04)


@given(places=st.sets(st.integers(1, 20), min_size=1), missed=st.integers(0, 5), k=st.sampled_from([5, 10, 20]))
def test_ndcg_of_a_set_is_scikit_learns(places: set[int], missed: int, k: int) -> None:
    relevance = np.zeros((1, 40))
    relevance[0, [place - 1 for place in places]] = 1
    relevance[0, 30 : 30 + missed] = 1  # targets below everything the list holds
    scores = np.arange(40, 0, -1)[None]
    ranks = np.array([*places, *[0] * missed])
    query, sizes = np.zeros(len(ranks), dtype=int), np.array([len(ranks)])
    ours = set_ndcg_at_k(query, ranks, np.ones_like(ranks), sizes, k)[0]
    assert ours == pytest.approx(ndcg_score(relevance, scores, k=k))


def test_a_basket_of_three_with_two_found_by_hand() -> None:
    query, rank, tied = np.zeros(3, dtype=int), np.array([2, 0, 7]), np.ones(3, dtype=int)
    row = query_metrics(query, rank, tied, np.array([3]))
    assert set(row) == set(METRICS)
    assert [row[f"hit_at_{k}"][0] for k in (1, 5, 10)] == [0, 1, 1]
    assert row["mrr"][0] == pytest.approx(0.5)
    assert row["recall_at_10"][0] == pytest.approx(2 / 3)
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert row["ndcg_at_10"][0] == pytest.approx((1 / np.log2(3) + 1 / np.log2(8)) / ideal)


@given(ranks=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1))
def test_queries_with_one_target_need_no_set_formula(ranks: list[tuple[int, int]]) -> None:
    rank, tied = np.array(ranks).T
    query, sizes = np.arange(len(rank)), np.ones(len(rank), dtype=int)
    columns = query_metrics(query, rank, tied, sizes)
    np.testing.assert_allclose(columns["hit_at_5"], hit_at_k(rank, tied, 5), atol=1e-12)
    np.testing.assert_allclose(columns["recall_at_10"], columns["hit_at_10"], atol=1e-12)
    np.testing.assert_allclose(columns["ndcg_at_10"], ndcg_at_k(rank, tied, 10), atol=1e-12)
    np.testing.assert_allclose(columns["mrr"], reciprocal_rank(rank, tied), atol=1e-12)


def test_a_query_without_targets_is_undefined_not_zero() -> None:
    nothing = np.empty(0, dtype=int)
    columns = query_metrics(nothing, nothing, nothing, np.array([0]))
    assert all(np.isnan(values).all() for values in columns.values())
    assert np.isnan(recall_at_k(nothing, nothing, nothing, np.array([0]), 10)).all()


def test_the_best_placed_group_decides_and_counts_its_targets() -> None:
    query, rank, tied = np.array([0, 0, 0, 1]), np.array([3, 3, 9, 0]), np.array([4, 4, 1, 1])
    first = first_groups(query, rank, tied, 2)
    assert [list(part) for part in first] == [[3, 0], [4, 1], [2, 0]]


def test_a_user_counts_once_however_many_queries_she_asks() -> None:
    values = np.array([[1.0], [0.0], [1.0], [np.nan]])
    means = user_means(np.array([0, 0, 1, 2]), values, 3)
    np.testing.assert_allclose(means[:2, 0], [0.5, 1.0])
    assert np.isnan(means[2, 0])
