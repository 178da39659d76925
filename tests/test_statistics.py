import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.statistics import (
    Block,
    bootstrap_means,
    bootstrap_ratios,
    holm,
    interval,
    over_seeds,
    paired_differences,
    seed_weights,
    two_sided_p,
    user_weights,
)


def test_every_draw_holds_as_many_users_as_there_are() -> None:
    weights = np.concatenate(list(user_weights(50, 30, seed=3)))
    assert weights.shape == (30, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert weights.std() == pytest.approx(1, abs=0.1)  # nearly Poisson(1)


def test_a_short_bootstrap_is_the_beginning_of_a_long_one() -> None:
    values = np.random.default_rng(0).random((3000, 2))
    # The draws are the same; a matrix product may round by its shape, as it does with AVX-512.
    np.testing.assert_allclose(bootstrap_means(values, 100, 7), bootstrap_means(values, 3000, 7)[:100], rtol=1e-5)
    assert not np.array_equal(bootstrap_means(values, 100, 7), bootstrap_means(values, 100, 8))


def test_the_spread_of_the_draws_is_the_standard_error() -> None:
    values = (np.random.default_rng(1).random((800, 1)) < 0.2).astype(float)
    draws = bootstrap_means(values, 4000, 0)
    assert draws.mean() == pytest.approx(values.mean(), abs=2e-3)
    assert draws.std() == pytest.approx(values.std() / np.sqrt(800), rel=0.05)


def test_users_without_a_value_leave_the_mean_to_the_others() -> None:
    values = np.array([[0.5, 0.5], [0.5, np.nan], [0.5, np.nan]])
    draws = bootstrap_means(values, 500, 0)
    assert (draws[:, 0] == 0.5).all()
    defined = np.isfinite(draws[:, 1])
    assert (draws[defined, 1] == 0.5).all()
    assert 0.5 < defined.mean() < 0.9  # the only user with a value is missing from (2/3)^3 of the draws


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    generator = np.random.default_rng(2)
    base = generator.random(400)
    better = base + 0.02 + 0.01 * generator.standard_normal(400)
    draws = bootstrap_means(np.stack([base, better], axis=1), 2000, 0)
    low, high = interval(paired_differences(draws[:, 1:], draws[:, :1]))
    assert 0.015 < low[0] < 0.02 < high[0] < 0.025
    alone = interval(draws[:, :1])
    assert high[0] - low[0] < (alone[1] - alone[0])[0] / 5


def test_users_shared_by_two_stages_move_together() -> None:
    values = np.random.default_rng(3).random((200, 1)).astype(np.float32)
    ones, group = np.ones((200, 1), dtype=np.float32), np.zeros(1, dtype=np.int64)
    first = Block(np.arange(200), values, ones, group)
    other = Block(np.arange(200, 400), values, ones, group)
    same, apart, again = bootstrap_ratios([first, other, first], 400, 1000, 0)
    np.testing.assert_array_equal(same, again)
    assert abs(np.corrcoef(same[:, 0], apart[:, 0])[0, 1]) < 0.2


def test_seeds_that_disagree_widen_the_interval() -> None:
    values = np.random.default_rng(4).random((500, 1))
    one = bootstrap_means(values, 3000, 0)
    weights = seed_weights((0, 1, 2), 3000, 0)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    agreeing = over_seeds([one, one, one], weights)
    np.testing.assert_allclose(agreeing, one, rtol=1e-5)
    apart = over_seeds([one - np.float32(0.1), one, one + np.float32(0.1)], weights)
    # Variance of a mean of three draws from {-0.1, 0, 0.1}: 0.02 / 9, added to that of the users.
    assert apart.std() == pytest.approx(np.sqrt(one.var() + 0.02 / 9), rel=0.05)


def test_float32_rounding_is_no_difference() -> None:
    a = np.full((10, 1), 0.05, dtype=np.float32)
    b = a + np.float32(1e-8)
    assert (paired_differences(a, b) == 0).all()
    assert two_sided_p(paired_differences(a, b))[0] == 1


def test_p_is_small_where_every_draw_is_on_one_side() -> None:
    assert two_sided_p(np.full((999, 1), 0.1, dtype=np.float32))[0] == pytest.approx(2 / 1000)
    halves = np.concatenate([np.full((500, 1), 0.1), np.full((500, 1), -0.1)]).astype(np.float32)
    assert two_sided_p(halves)[0] == 1
    assert np.isnan(two_sided_p(np.full((9, 1), np.nan, dtype=np.float32))[0])


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.5]), [0.02, np.nan, 0.5])
    assert len(holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_and_keeps_their_order(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_an_interval_leaves_out_undefined_draws() -> None:
    draws = np.array([[1.0, np.nan, np.nan], [2.0, 3.0, np.nan], [3.0, 3.0, np.nan]], dtype=np.float32)
    low, high = interval(draws, level=1.0)
    np.testing.assert_array_equal(low, [1, 3, np.nan])
    np.testing.assert_array_equal(high, [3, 3, np.nan])
