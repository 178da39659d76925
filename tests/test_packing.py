"""Packed sorting against the sort of the values themselves, and the digest against its first, plain form."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal, assert_series_equal

from stages.content import content_digest
from stages.packing import by_code, encoded, is_constant, sorted_distinct

START = datetime(2020, 1, 1, tzinfo=UTC)
words = st.one_of(st.none(), st.text(alphabet="ab!~ é😀", max_size=3))
ticks = st.one_of(st.none(), st.integers(-3, 9))
rows = st.lists(st.tuples(ticks, words, words, st.sampled_from(["recommendation", "search"])), min_size=1, max_size=30)
ORDER = ("timestamp", "user_id", "item_id", "event")


def framed(values: list, step: timedelta) -> pl.DataFrame:
    times = [None if tick is None else START + tick * step for tick, *_ in values]
    columns = {name: [row[place] for row in values] for place, name in enumerate(ORDER) if place}
    schema = {"timestamp": pl.Datetime("us", "UTC"), **dict.fromkeys(columns, pl.String)}
    return pl.DataFrame({"timestamp": times, **columns}, schema=schema)


@settings(deadline=None)
@given(rows, st.sampled_from([timedelta(microseconds=1), timedelta(milliseconds=5), timedelta(days=1)]))
def test_packed_rows_come_out_as_the_sort_of_their_values_each_once(values: list, step: timedelta) -> None:
    frame = framed(values, step)
    found = sorted_distinct(frame, ORDER)
    assert found is not None
    assert_frame_equal(found.frame, frame.unique().sort(*ORDER, nulls_last=False))
    for name in ORDER[1:]:
        assert_series_equal(encoded(frame[name]).decoded(found.codes[name]), found.frame[name], check_names=False)


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=30))
def test_codes_sort_as_their_values_do_and_stand_for_them(values: list[str | None]) -> None:
    column = pl.Series("x", values, dtype=pl.String)
    found = encoded(column)
    assert_series_equal(found.decoded(found.codes), column, check_names=False)
    ranks = column.fill_null("").rank("dense") if column.null_count() == 0 else None
    if ranks is not None:
        assert (found.codes + 1).tolist() == ranks.to_list()
    assert int(found.codes.max()) + 1 == found.size == column.n_unique()
    assert is_constant(column) == (column.n_unique() == 1)


def test_a_row_that_does_not_fit_64_bits_is_left_to_another_sort() -> None:
    numbers = [0, 2**40 + 1]
    assert sorted_distinct(pl.DataFrame({"a": numbers}), ("a",)) is not None
    assert sorted_distinct(pl.DataFrame({"a": numbers, "b": numbers}), ("a", "b")) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_rows_of_one_code_keep_their_order(codes: list[int]) -> None:
    frame = pl.DataFrame({"code": codes, "place": range(len(codes)), "same": ["x"] * len(codes)})
    assert_frame_equal(by_code(frame, frame["code"].to_numpy()), frame.sort("code", maintain_order=True))


@settings(deadline=None)
@given(st.lists(words, max_size=30), st.integers(0, 10))
def test_text_is_digested_by_its_lengths_and_its_bytes(values: list[str | None], start: int) -> None:
    column = pl.Series("x", values, dtype=pl.String)[start:]
    digest = hashlib.sha256(f"['x']|{len(column)}".encode())
    if len(column):
        lengths = [2**32 - 1 if value is None else len(value.encode()) for value in column]
        digest.update(b"".join(length.to_bytes(4, "little") for length in lengths))
        digest.update("".join(value or "" for value in column).encode())
    assert content_digest(column.to_frame()) == digest.hexdigest()
