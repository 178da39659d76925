import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.semantic_ids import Collisions, assign_ids, collisions, read_index
from tests import reference

PREFIXES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


def matrix(rows: list[tuple[int, ...]], width: int = 2) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), width)


def any_code(row: int) -> np.ndarray:
    return np.array([row % 3, (row + 1) % 3, (row + 2) % 3])


@given(PREFIXES)
def test_the_last_code_counts_the_earlier_items_with_the_same_prefix(prefixes):
    ids = assign_ids(matrix(prefixes), capacity=64)
    assert [tuple(row) for row in ids.tolist()] == reference.semantic_ids(prefixes)


@given(PREFIXES, st.integers(4, 6))
def test_every_item_has_its_own_id_also_when_groups_overflow(prefixes, capacity):
    try:
        ids = assign_ids(matrix(prefixes), capacity, nearest=any_code)
    except ValueError:
        # only where a first code has more items than its three groups can hold
        assert max(np.bincount([first for first, _ in prefixes])) > 3 * capacity
        return
    assert len({tuple(row) for row in ids.tolist()}) == len(prefixes)
    assert (ids[:, -1] < capacity).all()
    assert ids[:, 0].tolist() == [first for first, _ in prefixes]


@given(PREFIXES, st.integers(0, 30), st.integers(1, 8))
def test_later_items_never_move_anyones_codes(prefixes, cut, capacity):
    capacity = max(capacity, -(-len(prefixes) // 3))
    head = prefixes[:cut]
    whole = assign_ids(matrix(prefixes), capacity, nearest=any_code)
    first = assign_ids(matrix(head), capacity, nearest=any_code)
    assert np.array_equal(whole[: len(head)], first)
    later = assign_ids(matrix(prefixes[cut:]), capacity, first, nearest=lambda row: any_code(row + len(head)))
    assert np.array_equal(np.concatenate([first, later]), whole)


def test_an_item_without_room_goes_to_the_nearest_code_that_has_some():
    prefixes = matrix([(3, 9)] * 4 + [(3, 7)] * 2 + [(3, 9)])
    ids = assign_ids(prefixes, 3, nearest=lambda row: np.array([9, 7, 5]))
    assert ids.tolist() == [[3, 9, 0], [3, 9, 1], [3, 9, 2], [3, 7, 0], [3, 7, 1], [3, 7, 2], [3, 5, 0]]


def test_an_item_that_fits_nowhere_is_named_with_rule_and_remedy():
    with pytest.raises(ValueError, match=r"semantic id \(3, 9\) .* 2 items .* item mug; raise levels or codes"):
        assign_ids(matrix([(3, 9)] * 3), 2, nearest=lambda row: np.array([9]), names=["cup", "jug", "mug"])
    with pytest.raises(ValueError, match="item 2"):
        assign_ids(matrix([(3, 9)] * 3), 2)


def test_no_items_have_no_ids():
    assert assign_ids(np.empty((0, 3), dtype=np.int64), 4).shape == (0, 4)


def test_collisions_by_hand():
    assert collisions(matrix([(1, 1), (1, 2), (1, 1), (0, 0), (0, 0), (0, 0)])) == Collisions(2, 5, 3)
    assert collisions(matrix([(1, 1), (1, 2)])) == Collisions(0, 0, 1)
    assert collisions(np.empty((0, 4), dtype=np.int64)) == Collisions(0, 0, 0)


def test_a_shipped_index_is_renumbered_densely_and_remembers_its_values():
    index = read_index({"7": ["<a_128>", "<b_0>"], "x": ["<a_3>", "<b_9>"], "9": ["<a_128>", "<b_9>"]})
    assert index.rows == {"7": 0, "x": 1, "9": 2}
    assert index.codes.tolist() == [[1, 0], [0, 1], [1, 1]]
    assert index.values == ((3, 128), (0, 9))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "names no items"),
        ({"7": []}, "item '7'"),
        ({"7": ["<a_1>", "<b_1>"], "8": ["<a_1>"]}, "item '8': every item needs 2 codes"),
        ({"7": ["<a_1>", "<b_x>"]}, "item '7': a code looks like"),
        ({"7": ["<a_1> ", "<b_2>"]}, "item '7': a code looks like"),
        ({"7": [1, 2]}, "item '7': a code looks like"),
        ({"7": "ab", "8": ["<a_1>", "<b_1>"]}, "item '7'"),
    ],
)
def test_a_malformed_index_is_refused_with_the_items_name(index, message):
    with pytest.raises(ValueError, match=message):
        read_index(index)
