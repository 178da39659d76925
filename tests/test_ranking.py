from collections.abc import Sequence

import numpy as np
import pytest

from models.recommender import Recommendations
from stages.interactions import Interactions
from stages.queries import next_stage_tests, same_stage_tests
from stages.ranking import HISTORY_ITEMS, rank_queries


class Fixed:
    """Returns one list for everybody and remembers the histories it was given."""

    def __init__(self, items: list[int], groups: list[int] | None = None) -> None:
        self.items, self.groups = np.array(items), np.array(groups or list(range(len(items))))
        self.seen: list[list[int]] = []

    def recommend(self, histories: Sequence[np.ndarray], k: int) -> Recommendations:
        self.seen += [history.tolist() for history in histories]
        items, groups = (np.tile(part[:k], (len(histories), 1)) for part in (self.items, self.groups))
        scores = np.where(items >= 0, 1.0, -np.inf).astype(np.float32)
        return Recommendations(items, scores, groups)


# Two stages; u0: 0 1 | 2 0, u1: 1 | 3 (new item and, being absent before, u2: | 4 2 in one basket).
LOG = Interactions(
    user_ids=["u0", "u1", "u2"],
    offsets=np.array([0, 4, 6, 8]),
    items=np.array([0, 1, 2, 0, 1, 3, 4, 2]),
    stages=np.array([0, 0, 1, 1, 0, 1, 1, 1]),
    baskets=np.array([0, 1, 2, 3, 0, 1, 0, 0]),
)
SETTINGS = {"known": 3, "k": 20, "batch_size": 2, "seen_stage": 0, "tested_stage": 1}


def test_each_query_gets_the_rank_of_its_own_target() -> None:
    frame = rank_queries(Fixed([0, 1, 2]), LOG, next_stage_tests(LOG, 1), **SETTINGS)
    assert frame["user"].to_list() == ["u0", "u0", "u1", "u2"]
    assert frame["cut"].to_list() == [2, 3, 5, 6]
    assert frame["rank"].to_list() == [3, 1, 0, 3]
    assert frame["hit_at_1"].to_list() == [0, 1, 0, 0]
    assert frame["recall_at_10"].to_list() == [1, 1, 0, 0.5]


def test_the_batch_size_changes_nothing() -> None:
    frames = [
        rank_queries(Fixed([0, 1, 2]), LOG, next_stage_tests(LOG, 1), **{**SETTINGS, "batch_size": size})
        for size in (1, 3, 100)
    ]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_slices_say_what_was_new_when() -> None:
    frame = rank_queries(Fixed([0, 1, 2]), LOG, next_stage_tests(LOG, 1), **SETTINGS)
    assert frame["new_item"].to_list() == [True, False, True, True]
    assert frame["new_user"].to_list() == [False, False, False, True]
    assert frame["reachable"].to_list() == [True, True, False, True]
    assert frame["repeat"].to_list() == [False, True, False, False]


def test_a_basket_is_new_only_if_all_of_it_is() -> None:
    trained = np.array([0, 0, 0, 0, 0, 0, 0, 1], dtype=bool)  # item 2 alone
    frame = rank_queries(Fixed([0, 1, 2]), LOG, next_stage_tests(LOG, 1), **SETTINGS, trained=trained)
    assert frame["new_item"].to_list() == [False, True, True, False]


def test_with_history_excluded_a_repeat_is_out_of_reach() -> None:
    frame = rank_queries(Fixed([1, 2]), LOG, next_stage_tests(LOG, 1), **SETTINGS, exclude_history=True)
    assert frame["reachable"].to_list() == [True, False, False, True]


def test_a_target_in_a_tie_group_is_placed_at_its_start() -> None:
    frame = rank_queries(Fixed([1, 0, 2], groups=[5, 7, 7]), LOG, next_stage_tests(LOG, 1), **SETTINGS)
    assert frame["rank"].to_list() == [2, 2, 0, 2]
    assert frame["tied"].to_list() == [2, 2, 1, 2]
    assert frame["mrr"].to_list() == pytest.approx([5 / 12, 5 / 12, 0, 5 / 12])


def test_padding_is_never_a_hit_nor_tied() -> None:
    frame = rank_queries(Fixed([0, -1, -1], groups=[0, 0, 0]), LOG, next_stage_tests(LOG, 1), **SETTINGS)
    assert frame["rank"].to_list() == [0, 1, 0, 0]
    assert frame["tied"].to_list() == [1, 1, 1, 1]


def test_an_item_twice_in_a_basket_is_one_target() -> None:
    log = Interactions(["u"], np.array([0, 3]), np.array([0, 1, 1]), np.array([0, 1, 1]), np.array([0, 1, 1]))
    frame = rank_queries(Fixed([0, 1]), log, next_stage_tests(log, 1), **{**SETTINGS, "known": 2})
    assert frame["targets"].to_list() == [1]
    assert frame["ndcg_at_10"].to_list() == pytest.approx([1 / np.log2(3)])


def test_histories_end_before_the_target_and_are_long_only_where_needed() -> None:
    count = HISTORY_ITEMS + 50
    log = Interactions(["u"], np.array([0, count]), np.arange(count), np.zeros(count, dtype=int), np.arange(count))
    cut, whole = Fixed([0]), Fixed([0])
    place = {**SETTINGS, "known": count, "tested_stage": 0}
    rank_queries(cut, log, same_stage_tests(log, 0), **place)
    rank_queries(whole, log, same_stage_tests(log, 0), **place, exclude_history=True)
    assert cut.seen[0] == list(range(count - 1 - HISTORY_ITEMS, count - 1))
    assert whole.seen[0] == list(range(count - 1))


def test_an_item_outside_the_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match=r"item 4 was recommended but only 0 … 2 are known"):
        rank_queries(Fixed([0, 4]), LOG, next_stage_tests(LOG, 1), **SETTINGS)


def test_no_queries_give_an_empty_frame_with_all_columns() -> None:
    frame = rank_queries(Fixed([0]), LOG, next_stage_tests(LOG, 7), **SETTINGS)
    assert len(frame) == 0
    assert {"user", "rank", "hit_at_10", "new_item", "reachable", "objective"} <= set(frame.columns)


def test_progress_ends_at_the_number_of_queries() -> None:
    calls: list[tuple[int, int]] = []
    queries = next_stage_tests(LOG, 1)
    rank_queries(Fixed([0]), LOG, queries, **SETTINGS, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 4), (4, 4)]
