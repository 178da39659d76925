import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.interactions import Interactions
from stages.queries import (
    next_stage_tests,
    next_stage_validation,
    same_stage_tests,
    same_stage_validation,
    sample_users,
    training_targets,
)

# A log: for each user, for each stage, the sizes of the baskets.
logs = st.lists(
    st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=3, max_size=3).filter(lambda visits: any(visits)),
    min_size=1,
    max_size=8,
)


def build(log: list[list[list[int]]], names: list[str] | None = None) -> Interactions:
    offsets, stages, baskets = [0], [], []
    for visits in log:
        number = 0
        for stage, sizes in enumerate(visits):
            for size in sizes:
                stages += [stage] * size
                baskets += [number] * size
                number += 1
        offsets.append(len(stages))
    return Interactions(
        user_ids=names or [f"u{number}" for number in range(len(log))],
        offsets=np.array(offsets),
        items=np.arange(len(stages)),
        stages=np.array(stages, dtype=np.int64),
        baskets=np.array(baskets, dtype=np.int64),
    )


# One user, four events then three; a second one with two events at stage 0 and a basket of two at stage 1.
SMALL = build([[[1, 1, 1, 1], [1, 1, 1], []], [[1, 1], [2], []]])


def test_the_last_event_of_a_visit_is_tested_and_the_one_before_validates() -> None:
    tests, validation = same_stage_tests(SMALL, 0), same_stage_validation(SMALL, 0)
    assert (tests.user.tolist(), tests.cut.tolist(), tests.end.tolist()) == ([0], [3], [4])
    assert (validation.cut.tolist(), validation.end.tolist()) == ([2], [3])
    assert tests.skipped == validation.skipped == 1
    assert same_stage_tests(SMALL, 1).cut.tolist() == [6]


def test_same_stage_training_leaves_the_held_out_pair_of_each_visit_out_for_good() -> None:
    mask = training_targets(SMALL, range(2), "same_stage", seed=0)
    assert np.flatnonzero(mask).tolist() == [0, 1, 4, 7, 8, 9, 10]
    assert not training_targets(SMALL, [1], "same_stage", seed=0)[:4].any()


def test_next_stage_tests_roll_through_every_basket() -> None:
    tests = next_stage_tests(SMALL, 1)
    assert tests.cut.tolist() == [4, 5, 6, 9]
    assert tests.end.tolist() == [5, 6, 7, 11]


def test_first_targets_are_those_of_returning_users() -> None:
    log = build([[[1], [1, 1], []], [[], [1, 1], []]])
    first = next_stage_tests(log, 1, target="first")
    assert (first.user.tolist(), first.cut.tolist(), first.end.tolist()) == ([0], [1], [2])


@given(log=logs, seed=st.integers(0, 5))
def test_no_test_or_validation_event_ever_trains(log: list[list[list[int]]], seed: int) -> None:
    events = build(log)
    held = {"same_stage": [], "next_stage": []}
    for stage in range(3):
        held["same_stage"] += [same_stage_tests(events, stage), same_stage_validation(events, stage)]
        held["next_stage"].append(next_stage_validation(events, stage, seed))
    for protocol, queries in held.items():
        mask = training_targets(events, range(3), protocol, seed)
        rows = [row for one in queries for cut, end in zip(one.cut, one.end, strict=True) for row in range(cut, end)]
        assert not mask[rows].any()
        assert mask.sum() + len(rows) == len(mask)  # and everything else does
        assert len(rows) == len(set(rows))


@given(log=logs)
def test_every_query_is_a_whole_basket_of_its_user_and_stage(log: list[list[list[int]]]) -> None:
    events = build(log)
    for stage in range(3):
        tests = next_stage_tests(events, stage)
        assert (tests.end - tests.cut).sum() == (events.stages == stage).sum()
        for user, cut, end in zip(tests.user, tests.cut, tests.end, strict=True):
            assert (events.users[cut:end] == user).all()
            assert len({(events.stages[row], events.baskets[row]) for row in range(cut, end)}) == 1


@given(log=logs)
def test_tested_and_skipped_users_are_all_users_of_the_stage(log: list[list[list[int]]]) -> None:
    events = build(log)
    for stage in range(3):
        tests = same_stage_tests(events, stage)
        assert len(tests) + tests.skipped == len(set(events.users[events.stages == stage]))


def test_about_a_tenth_of_the_users_validates_and_others_do_not_matter() -> None:
    many = build([[[1, 1, 1], [], []]] * 2000)
    drawn = next_stage_validation(many, 0, seed=1)
    assert 150 < len(drawn) < 250
    assert set(drawn.user) != set(next_stage_validation(many, 0, seed=2).user)
    kept = [f"u{number}" for number in range(0, 2000, 2)]
    half = build([[[1, 1, 1], [], []]] * 1000, kept)
    names = {half.user_ids[user] for user in next_stage_validation(half, 0, seed=1).user}
    assert names == {many.user_ids[user] for user in drawn.user} & set(kept)


@settings(max_examples=30)
@given(n=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_sample_keeps_users_whole_and_in_order(n: int, seed: int) -> None:
    log = build([[[1, 1], [], []]] * 40)
    tests = next_stage_tests(log, 0)
    sample = sample_users(log, tests, n, seed)
    assert len(set(sample.user)) == min(n, 40)
    assert len(sample) == 2 * min(n, 40)
    assert (np.diff(sample.cut) > 0).all()
    assert sample_users(log, tests, n, seed).cut.tolist() == sample.cut.tolist()


def test_stages_that_share_users_sample_the_same_ones() -> None:
    log = build([[[1], [1], []]] * 100 + [[[1], [], []]] * 100)
    first = set(sample_users(log, next_stage_tests(log, 0), 40, 0).user)
    second = set(sample_users(log, next_stage_tests(log, 1), 40, 0).user)
    assert {user for user in first if user < 100} <= second


def test_a_sample_is_the_same_users_whoever_else_is_in_the_log() -> None:
    many = build([[[1], [], []]] * 400)
    kept = [f"u{number}" for number in range(0, 400, 2)]
    half = build([[[1], [], []]] * 200, kept)
    chosen = {many.user_ids[user] for user in sample_users(many, next_stage_tests(many, 0), 100, 3).user}
    again = {half.user_ids[user] for user in sample_users(half, next_stage_tests(half, 0), 100, 3).user}
    assert chosen & set(kept) <= again
