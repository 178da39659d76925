"""Packed and partitioned sorting against the sort of the values themselves, and the digest against its plain form."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal, assert_series_equal

from stages import names as numbering
from stages import spool
from stages.coded import LOG_SCHEMA, ORDER, Coder
from stages.content import content_digest, digest_and_sink
from stages.packing import Field, Layout, by_code, encoded, in_order, is_constant

START = datetime(2020, 1, 1, tzinfo=UTC)
words = st.one_of(st.none(), st.text(alphabet="ab!~ é😀", max_size=3))
ids = st.text(alphabet="ab!~ é😀", max_size=3)
kinds = st.sampled_from([("recommendation", None), ("recommendation", "q"), ("search", "r"), ("search", "q")])
rows = st.lists(st.tuples(st.integers(-3, 9), ids, ids, kinds), min_size=1, max_size=30)


def framed(values: list, step: timedelta) -> pl.DataFrame:
    found = [(user, item, START + tick * step, *kind) for tick, user, item, kind in values]
    schema = {name: kind for name, kind in LOG_SCHEMA.items() if name != "block"}
    return pl.DataFrame(found, schema=schema, orient="row")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows,
    st.sampled_from([timedelta(microseconds=1), timedelta(milliseconds=5), timedelta(days=1)]),
    st.sampled_from([2, 7, 1000]),
    st.integers(0, 30),
)
def test_rows_come_out_as_the_sort_of_their_values_each_once(
    tmp_path: Path, values: list, step: timedelta, part: int, cut: int
) -> None:
    frame = framed(values, step)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spool, "PART", part)
        patched.setattr(spool, "STRIDE", 1)
        coder = Coder(tmp_path)
        coder.add(frame[:cut])
        coder.add(frame[cut:])
        found = coder.sorted_distinct(tmp_path / "numbers.parquet")
    assert_frame_equal(found.whole().drop("block"), frame.unique().sort(*ORDER, nulls_last=False))
    assert found.span() == (frame["timestamp"].min(), frame["timestamp"].max())


def test_rows_given_in_order_keep_it_and_their_nulls(tmp_path: Path) -> None:
    frame = framed([(0, "b", "x", ("recommendation", None)), (0, "a", "x", ("search", "q"))], timedelta(1))
    frame = frame.with_columns(
        timestamp=pl.lit(None, LOG_SCHEMA["timestamp"]), block=pl.Series([None, 3], dtype=pl.Int32)
    )
    coder = Coder(tmp_path)
    coder.add(frame)
    found = coder.as_met(tmp_path / "numbers.parquet")
    assert_frame_equal(found.whole(), frame)
    assert found.span() == (None, None)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**40), st.integers(-5, 5)), min_size=1, max_size=20))
def test_fields_survive_packing_and_words_sort_as_the_fields_do(values: list[tuple[int, int, int]]) -> None:
    layout = Layout(
        [Field("a", np.uint8, 4), Field("b", np.uint64, 2**40 + 1), Field("c", np.int64, 11 * 3, low=-15, step=3)]
    )
    wide = Layout([Field("a", np.uint8, 4), Field("b", np.uint64, 2**63), Field("c", np.int64, 33, low=-15, step=3)])
    assert (layout.words, wide.words) == (1, 3)
    columns = {name: np.array(column) for name, column in zip("abc", zip(*values, strict=True), strict=True)}
    columns["c"] *= 3
    for each in (layout, wide):
        found = each.unpacked(in_order(each.packed(columns), once=True))
        expected = sorted({(a, b, 3 * c) for a, b, c in values})
        assert list(zip(*(found[name].tolist() for name in "abc"), strict=True)) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 9), st.integers(0, 12))
def test_a_spool_gives_back_its_rows_in_pieces_of_any_size(tmp_path_factory, values, size, kept) -> None:
    held = spool.Spool(kept, tmp_path_factory.getbasetemp())
    for start in range(0, len(values), 4):
        held.append({"x": np.array(values[start : start + 4], dtype=np.uint32)})
    assert held.rows == len(values)
    assert held.whole().get("x", np.zeros(0)).tolist() == values
    pieces = [piece["x"].tolist() for piece in spool.regular(held.pieces(), size)]
    assert pieces == [values[start : start + size] for start in range(0, len(values), size)]
    held.close()


@settings(deadline=None)
@given(st.lists(st.lists(words, max_size=20), max_size=6), st.integers(1, 64))
def test_a_text_has_one_number_whatever_the_batches_and_however_keys_collide(batches: list, keys: int) -> None:
    met: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patched:
        # Few different keys: most texts share one with another text.
        patched.setattr(numbering, "hashes", lambda column: column.hash().to_numpy() % np.uint64(keys))
        numbers = numbering.Names()
        for batch in batches:
            codes = numbers.codes(pl.Series(batch, dtype=pl.String))
            for text, code in zip(batch, codes.tolist(), strict=True):
                assert met.setdefault(text or "", code) == code
    assert sorted(met.values()) == list(range(numbers.size))
    texts, places = numbers.ranked()
    assert texts.to_list() == pl.Series(list(met), dtype=pl.String).sort().to_list()
    assert all(texts[int(places[code])] == text for text, code in met.items())


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=30))
def test_codes_sort_as_their_values_do(values: list[str | None]) -> None:
    column = pl.Series("x", values, dtype=pl.String)
    found = encoded(column)
    ordered = column.unique().sort(nulls_last=False)
    assert_series_equal(ordered.gather(found.codes), column)
    assert int(found.codes.max()) + 1 == found.size == column.n_unique()
    assert is_constant(column) == (column.n_unique() == 1)


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


@pytest.mark.parametrize("height", [0, 3, 10])
def test_a_frame_written_in_pieces_has_the_digest_and_the_bytes_of_the_whole(tmp_path: Path, height: int) -> None:
    frame = pl.DataFrame({"x": [f"v{place % 4}" for place in range(height)]}, schema={"x": pl.String})
    found = []
    for size in (1, 4, 100):
        pieces = (frame[start : start + size] for start in range(0, height, size))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("stages.content.CHUNK", size)
            digest = digest_and_sink(pieces, frame.schema, height, tmp_path / "x.parquet")
            assert digest == content_digest(frame)
        found.append((tmp_path / "x.parquet").read_bytes())
        assert_frame_equal(pl.read_parquet(tmp_path / "x.parquet"), frame)
    assert found[0] == found[1] == found[2]
