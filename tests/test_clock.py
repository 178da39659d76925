from datetime import UTC, date, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.clock import Times, Window, instant, iso_microseconds, microseconds, read_times, reading_of, window
from stages.errors import UserError

WINDOW = window("1970-01-02", "2100-01-01")
MOMENT = datetime(2011, 12, 9, 12, 50, tzinfo=UTC)
SECONDS = int(MOMENT.timestamp())
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def read(values: list, unit=None, dtype: pl.DataType | None = None, plausible: Window = WINDOW) -> Times:
    return read_times(pl.Series(values, dtype=dtype), unit, plausible, "log.csv: timestamp")


@settings(deadline=None)
@given(
    st.sampled_from(sorted(PER_SECOND)),
    st.lists(st.integers(200_000_000, 4_000_000_000), min_size=1, max_size=20),
    st.sampled_from(["int", "text", "float"]),
)
def test_every_unit_is_inferred_from_magnitude_and_gives_the_same_instants(unit, seconds, kind):
    ticks = [second * PER_SECOND[unit] for second in seconds]
    values = {"int": ticks, "text": [str(tick) for tick in ticks], "float": [float(tick) for tick in ticks]}[kind]
    times = read(values)
    assert times.unit == unit
    assert times.reasons.null_count() == len(seconds)
    drift = [abs(value - second * 10**6) for value, second in zip(times.values.to_physical(), seconds, strict=True)]
    assert max(drift) == 0 if kind != "float" else max(drift) <= 1


def test_whole_nanoseconds_keep_their_microseconds_exactly():
    assert read([1_700_000_000_123_456_789]).values.to_physical().to_list() == [1_700_000_000_123_456]


def test_fractional_seconds_keep_their_microseconds():
    assert read(["1700000000.25"]).values.to_physical().to_list() == [1_700_000_000_250_000]


@pytest.mark.parametrize(
    "text",
    [
        "2011-12-09 12:50:00",
        "2011-12-09T12:50:00",
        "2011-12-09 12:50",
        "2011-12-09T12:50:00Z",
        "2011-12-09 12:50:00.000000",
        "2011-12-09T14:50:00+02:00",
        "2011-12-09T07:20:00-0530",
        "2011/12/09 12:50:00",
        " 2011-12-09 12:50:00 ",
    ],
)
def test_iso_text_is_read_with_and_without_zone(text):
    times = read([text])
    assert times.unit == "text"
    assert times.values.to_list() == [MOMENT]


def test_a_date_alone_is_midnight_utc():
    assert read(["2011-12-09"]).values.to_list() == [datetime(2011, 12, 9, tzinfo=UTC)]
    assert read([date(2011, 12, 9)]).values.to_list() == [datetime(2011, 12, 9, tzinfo=UTC)]


def test_text_that_is_no_date_is_null():
    values = pl.Series(["2011-13-09", "yesterday", "12/9/2011 8:26", None])
    assert iso_microseconds(values).null_count() == 4


def test_typed_columns_are_taken_in_their_own_zone():
    local = pl.Series([datetime(2011, 12, 9, 13, 50)]).dt.replace_time_zone("Europe/Berlin")
    for column in (pl.Series([MOMENT]), local, pl.Series([MOMENT.replace(tzinfo=None)], dtype=pl.Datetime("ns"))):
        times = read_times(column, None, WINDOW, "log.parquet: timestamp")
        assert (times.unit, times.values.to_list()) == ("datetime", [MOMENT])


@pytest.mark.parametrize(
    "values",
    [[SECONDS, SECONDS * 1000], [SECONDS * 1000, SECONDS * 10**6], [str(SECONDS), "2011-12-09 12:50:00"]],
)
def test_mixed_units_are_an_error_that_counts_each(values):
    with pytest.raises(UserError, match=r"log\.csv: timestamp mixes time units: 1 rows look like .* time_unit"):
        read(values)


def test_a_stated_unit_makes_rows_of_another_one_rejects():
    times = read([SECONDS, SECONDS, SECONDS * 1000], unit="s")
    assert times.reasons.to_list() == [None, None, "timestamp in another unit than stated"]
    times = read([SECONDS, SECONDS * 1000], unit="ms")
    assert times.reasons.to_list() == ["timestamp in another unit than stated", None]


def test_zero_negative_missing_overflowing_and_odd_times_each_get_their_reason():
    values = [str(SECONDS), "0", "-5", None, "", "nan", "inf", "soon", "1" + "0" * 30, "100", "9000000000"]
    assert read(values).reasons.to_list() == [
        None,
        "timestamp zero or negative",
        "timestamp zero or negative",
        "timestamp missing",
        "timestamp missing",
        "timestamp not readable",
        "timestamp not readable",
        "timestamp not readable",
        "timestamp at or after log.latest",
        "timestamp before log.earliest",
        "timestamp at or after log.latest",
    ]


def test_an_unsigned_number_beyond_64_bits_is_refused_not_wrapped():
    times = read([SECONDS, 2**64 - 1], dtype=pl.UInt64())
    assert times.reasons.to_list() == [None, "timestamp at or after log.latest"]


def test_the_window_is_inclusive_below_and_exclusive_above():
    edge = window("2011-12-09T12:50", "2011-12-09T12:51")
    times = read([SECONDS - 1, SECONDS, SECONDS + 59, SECONDS + 60], plausible=edge)
    assert times.values.is_null().to_list() == [True, False, False, True]


def test_compact_dates_are_not_taken_for_seconds():
    with pytest.raises(UserError, match=r"looks like YYYYMMDD .*STRPTIME"):
        read([20111209, 20111210])
    assert read([20111209], unit="s").values.to_list() == [datetime(1970, 8, 21, 18, 26, 49, tzinfo=UTC)]


def test_types_that_cannot_hold_a_time_are_refused():
    with pytest.raises(UserError, match="too coarse"):
        read([1.0], dtype=pl.Float32())
    with pytest.raises(UserError, match="no point in time"):
        read([True])


def test_a_window_or_instant_that_makes_no_sense_names_its_key():
    with pytest.raises(UserError, match=r"log\.earliest .* before log\.latest"):
        window("2020-01-01", "2019-01-01")
    with pytest.raises(UserError, match=r"log\.latest = 'soon'"):
        window("2020-01-01", "soon")
    assert instant("2020-01-01T02:00+02:00", "key") == instant("2020-01-01", "key")
    assert microseconds(instant("1970-01-02", "key")) == 86_400_000_000


def test_what_a_file_counts_in_is_told_by_all_of_it_not_by_the_part_that_is_read() -> None:
    seconds, thousandths = [SECONDS, SECONDS + 1, SECONDS + 2], [SECONDS * 1000]
    place = "log.csv: timestamp"
    with pytest.raises(UserError, match="3 rows look like s, 1 rows look like ms"):
        reading_of([pl.Series(seconds), pl.Series(thousandths)], None, place)
    reading = reading_of([pl.Series(seconds), pl.Series(thousandths)], "s", place)
    assert (reading.unit, reading.mixed) == ("s", True)
    dates = [20240101, 20240102, 20240103]
    with pytest.raises(UserError, match=r"looks like YYYYMMDD \(20240101\)"):
        reading_of([pl.Series(dates)], None, place)
    assert reading_of([pl.Series(dates), pl.Series([20249999])], None, place).unit == "s"
