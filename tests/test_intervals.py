"""How sure an analysis is, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from stages.analysis.intervals import Answers, crossed_interval, share_intervals

DRAWS = 2000


def answers(before: list[int], after: list[int], users: list[str] | None = None) -> Answers:
    names = users or [f"u{place}" for place in range(len(before))]
    return Answers(pl.Series(names, dtype=pl.String), np.array(before, dtype=bool), np.array(after, dtype=bool))


def test_what_every_user_did_alike_is_certain_and_a_share_of_nothing_has_no_interval() -> None:
    found = share_intervals({"lost": [answers([1] * 9, [0] * 9)], "gained": [answers([0] * 9, [1] * 9)]}, DRAWS)
    assert found == {
        "lost": {"lost_share": (1.0, 1.0), "lost_of_all": (1.0, 1.0), "gained_of_all": (0.0, 0.0)},
        "gained": {"lost_of_all": (0.0, 0.0), "gained_share": (1.0, 1.0), "gained_of_all": (1.0, 1.0)},
    }
    assert share_intervals({}, DRAWS) == {}


def test_an_interval_of_many_users_is_that_of_a_binomial_share() -> None:
    n, p = 400, 0.3
    lost = [1] * int(n * p) + [0] * int(n * (1 - p))
    found = share_intervals({0: [answers([1] * n, [1 - one for one in lost])]}, DRAWS)[0]["lost_share"]
    spread = 1.96 * math.sqrt(p * (1 - p) / n)
    assert found == pytest.approx((p - spread, p + spread), abs=0.01)


def test_the_cases_of_a_user_stay_together_in_all_answers_of_a_pool() -> None:
    before, after = [1] * 40, [0, 1] * 20
    alone = answers(before, after)
    few = [f"u{place % 4}" for place in range(40)]  # two users lose ten cases each, two lose none
    together = [answers(before[:20], after[:20], few[:20]), answers(before[20:], after[20:], few[20:])]
    found = share_intervals({"alone": [alone], "together": together}, DRAWS)
    widths = {name: own["lost_share"][1] - own["lost_share"][0] for name, own in found.items()}
    assert widths["together"] > 2 * widths["alone"]
    assert share_intervals({"x": together}, DRAWS)["x"]["lost_share"] == (0.0, 1.0)


def test_a_pool_says_the_same_whatever_stands_beside_it_of_the_same_users() -> None:
    one, other = answers([1, 1, 0, 0], [0, 1, 1, 0]), answers([1, 0, 0, 0], [1, 1, 1, 1])
    assert share_intervals({"a": [one], "b": [other]}, DRAWS)["a"] == share_intervals({"a": [one]}, DRAWS)["a"]


def alone(table: np.ndarray) -> tuple[float, float] | None:
    return crossed_interval([table], lambda means: means[0], DRAWS)


def test_rows_and_columns_of_a_table_both_count() -> None:
    rows, columns = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[0.0, 1.0, 2.0, 3.0]])
    flat = np.full((4, 4), -0.5)
    assert alone(flat) == (-0.5, -0.5)
    by_rows, by_columns = alone(flat + rows), alone(flat + columns)
    both = alone(flat + rows + columns)
    assert by_rows is not None
    assert by_columns is not None
    assert both is not None
    assert by_rows == pytest.approx(by_columns, abs=0.15)
    assert by_rows[0] < 1.0 < by_rows[1]
    assert both[1] - both[0] > 1.2 * (by_rows[1] - by_rows[0])
    # Sixteen cells, but only four rows: the spread of a mean of four.
    assert by_rows[1] - by_rows[0] == pytest.approx(2 * 1.96 * np.std([0, 1, 2, 3]) / 2, rel=0.15)


def test_a_table_of_one_row_or_of_nothing_known_has_no_interval() -> None:
    assert alone(np.ones((1, 5))) is None
    assert alone(np.full((3, 3), np.nan)) is None
    holed = np.array([[1.0, np.nan], [np.nan, 1.0]])
    assert alone(holed) == (1.0, 1.0)
