"""When a stage closes, and that it closes alike however its rows arrive."""

from __future__ import annotations

from datetime import timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.growing import START
from stages.closing import closings
from stages.errors import UserError
from stages.retrain_config import CloseConfig
from stages.split import TICK
from tests.intake import WeeklyShop, take


def times(*days: float) -> pl.Series:
    return pl.Series([START + timedelta(days=day) for day in days], dtype=pl.Datetime("us", "UTC"))


def test_a_week_closes_once_an_event_of_a_later_week_is_there() -> None:
    rule = CloseConfig(period="1w")
    assert closings(times(0, 3, 6.9), rule) == []
    assert closings(times(0, 3, 7), rule) == [START + timedelta(days=7)]
    assert closings(times(0, 3, 22, 36), rule) == [START + timedelta(days=day) for day in (7, 28)]


def test_a_stage_of_n_events_takes_the_ones_tied_with_its_last_and_waits_for_a_later_one() -> None:
    rule = CloseConfig(events=2)
    assert closings(times(0, 1), rule) == []
    assert closings(times(0, 1, 1), rule) == []
    assert closings(times(0, 1, 1, 2), rule) == [START + timedelta(days=1) + TICK]


def test_closing_now_leaves_nothing_open_and_an_empty_stage_never_closes() -> None:
    rule = CloseConfig(period="1w")
    assert closings(times(0, 8), rule, close_now=True)[-1] == START + timedelta(days=8) + TICK
    assert closings(times(), rule, close_now=True) == []


@settings(max_examples=50, deadline=None)
@given(
    days=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    split=st.integers(1, 29),
    rule=st.sampled_from([CloseConfig(period="1w"), CloseConfig(period="3d"), CloseConfig(events=4)]),
)
def test_the_stages_are_the_same_whether_rows_come_at_once_or_in_two_looks(
    days: list[int], split: int, rule: CloseConfig
) -> None:
    ordered = times(*sorted(days))
    whole = closings(ordered, rule)
    early = closings(ordered[:split], rule)
    assert whole[: len(early)] == early
    rest = ordered.filter(ordered >= early[-1]) if early else ordered
    assert early + closings(rest, rule) == whole


def test_a_log_without_a_clock_cannot_be_retrained(weekly_shop: WeeklyShop) -> None:
    config, workspace, _ = weekly_shop
    log = config.log.model_validate({"kind": "sequences", "sequences": "x.txt"})
    with pytest.raises(UserError, match="has no clock"):
        take(config.model_copy(update={"log": log}), workspace)


def test_a_period_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"retrain\.close\.period = 'soon'"):
        CloseConfig(period="soon")
