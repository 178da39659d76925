"""Event times: which unit a file counts in, and every value as an instant in UTC or a reason why not.

Numbers are told apart by magnitude: below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, above it
nanoseconds. For instants from March 1973 to the year 5138 that is unambiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import polars as pl

from stages.errors import UserError

Unit = Literal["s", "ms", "us", "ns", "text"]
# Where each unit's magnitudes end.
BOUNDS: tuple[tuple[Unit, float], ...] = (("s", 1e11), ("ms", 1e14), ("us", 1e17), ("ns", 9.3e18))
UNITS: tuple[Unit, ...] = ("text", "s", "ms", "us", "ns")
MULTIPLY: dict[str, int] = {"s": 1_000_000, "ms": 1_000, "us": 1}
NANOSECONDS = 1_000
AT_ONCE = 250_000
"""Values that are looked at together."""
FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

MISSING = "timestamp missing"
UNREADABLE = "timestamp not readable"
NOT_POSITIVE = "timestamp zero or negative"
OTHER_UNIT = "timestamp in another unit than stated"
TOO_EARLY = "timestamp before log.earliest"
TOO_LATE = "timestamp at or after log.latest"


@dataclass(frozen=True)
class Window:
    """Plausible event times in microseconds since 1970: `earliest` inclusive, `latest` exclusive."""

    earliest: int
    latest: int


@dataclass(frozen=True)
class Reading:
    """How a file's times are read: told by all of them, applied to a part at a time.

    Attributes:
        unit: as `Times.unit`.
        mixed: some values look like another unit.
    """

    unit: Unit | Literal["datetime"]
    mixed: bool


@dataclass(frozen=True)
class Times:
    """Event times of one file.

    Attributes:
        unit: what the file counts in; `datetime` for a typed column, None where there is no time at all.
        values: Datetime("us", "UTC"), null where there is a reason.
        reasons: why a value was refused, null where it was not.
    """

    unit: str | None
    values: pl.Series
    reasons: pl.Series


def instant(text: str, key: str) -> datetime:
    """An ISO date or date and time as an instant; without an offset it is UTC.

    Raises:
        UserError: not ISO; the message names `key`.
    """
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{key} = {text!r} is no ISO date; write 2024-05-31 or 2024-05-31T12:00:00") from None
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def microseconds(value: datetime) -> int:
    """Microseconds since 1970 of an aware instant."""
    return (value - EPOCH) // timedelta(microseconds=1)


def window(earliest: str, latest: str) -> Window:
    """The plausibility window of `log.earliest` and `log.latest`.

    Raises:
        UserError: not ISO, or the window is empty.
    """
    result = Window(
        microseconds(instant(earliest, "log.earliest")),
        microseconds(instant(latest, "log.latest")),
    )
    if result.earliest >= result.latest:
        raise UserError(f"log.earliest ({earliest}) must lie before log.latest ({latest}); swap or widen them")
    return result


def reading_of(parts: Iterable[pl.Series], unit: Unit | None, place: str) -> Reading:
    """Which unit a raw column counts in.

    Args:
        parts: of the column: numbers, text, dates or datetimes; a datetime without a zone is UTC.
        unit: stated unit of numbers or text; inferred when None.
        place: file and column, for messages.

    Raises:
        UserError: the file mixes units, counts in YYYYMMDD, or the column's type holds no time.
    """
    met: Counter[str] = Counter()
    dated, first = True, None
    for raw in parts:
        if raw.dtype.is_temporal():
            return Reading("datetime", False)
        frame = _parsed(raw, place)
        met.update(dict(frame["unit"].drop_nulls().value_counts().iter_rows()))
        whole = frame.filter(pl.col("unit").is_not_null())["whole"]
        dated = dated and (not len(whole) or _are_compact_dates(whole))
        first = whole[0] if first is None and len(whole) else first
    counts: dict[Unit, int] = {each: met[each] for each in UNITS if each in met}
    if unit is None:
        unit = _inferred(counts, place)
        if unit == "s" and dated and first is not None:
            raise UserError(
                f"{place} looks like YYYYMMDD ({first}), not seconds since 1970; derive the timestamp with "
                "STRPTIME(CAST(column AS VARCHAR), '%Y%m%d'), or state time_unit = \"s\""
            )
    return Reading(unit, len(counts) > 1)


def read_times(raw: pl.Series, unit: Unit | None, plausible: Window, place: str) -> Times:
    """Turn a raw column into instants; as `reading_of` and `times_of`."""
    parts = (raw.slice(start, AT_ONCE) for start in range(0, max(len(raw), 1), AT_ONCE))
    return times_of(raw, reading_of(parts, unit, place), plausible, place)


def times_of(raw: pl.Series, reading: Reading, plausible: Window, place: str) -> Times:
    """Turn a part of a raw column into instants.

    Args:
        raw: as of `reading_of`.
        reading: of the whole column.
        plausible: rows outside are refused with a reason.
        place: file and column, for messages.

    Raises:
        UserError: the column's type holds no time.
    """
    if reading.unit == "datetime":
        return _typed(raw, plausible, place)
    return _converted(_parsed(raw, place), reading.unit, plausible, reading.mixed)


def _typed(raw: pl.Series, plausible: Window, place: str) -> Times:
    if raw.dtype == pl.Date:
        ticks, unit = raw.to_physical().cast(pl.Int64) * 86_400, "s"
    elif isinstance(raw.dtype, pl.Datetime):
        ticks, unit = raw.to_physical(), raw.dtype.time_unit
    else:
        raise UserError(f"{place} has type {raw.dtype}, which is no point in time; derive one with CAST or STRPTIME")
    frame = pl.DataFrame({"raw": raw, "whole": ticks}).select(
        micros=_scaled(unit),
        there=pl.col("raw").is_not_null(),
        odd=pl.lit(None, pl.String),
    )
    return _windowed(frame, "datetime", plausible)


def _parsed(raw: pl.Series, place: str) -> pl.DataFrame:
    """What each value can be read as: `whole` Int64 (exact), `number` Float64, `text` Int64 (microseconds)."""
    if raw.dtype == pl.Float32:
        raise UserError(f"{place} is Float32, too coarse for seconds since 1970; export it as Int64 or Float64")
    textual = raw.dtype in (pl.String, pl.Null)
    if not textual and not raw.dtype.is_numeric():
        raise UserError(f"{place} has type {raw.dtype}, which is no point in time; derive one with CAST or STRPTIME")
    values = _stripped(raw) if textual else raw
    number = values.cast(pl.Float64, strict=False)
    rest = (values.is_not_null() & number.is_null()).arg_true()
    text = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(values))
    if textual and len(rest):
        text = text.scatter(rest, iso_microseconds(values.gather(rest)))
    whole = values.cast(pl.Int64, strict=False) if raw.dtype != pl.Float64 else text.clear(len(values))
    frame = pl.DataFrame({"there": values.is_not_null(), "whole": whole, "number": number, "text": text})
    return frame.with_columns(pl.when(pl.col("number").is_finite()).then(pl.col("number"))).with_columns(
        unit=_magnitude()
    )


def _stripped(raw: pl.Series) -> pl.Series:
    values = raw.cast(pl.String).str.strip_chars()
    return values.set(values == "", None)


def iso_microseconds(values: pl.Series) -> pl.Series:
    """Microseconds since 1970 of ISO text, null where it is none.

    A date, or a date and a time after `T` or a space, with or without a zone; without one it is UTC. `/` may stand for
    `-` where the year comes first.
    """
    result = values.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us").to_physical()
    # The usual layout is done; only what is left pays for the patient way.
    rest = (result.is_null() & values.is_not_null()).arg_true()
    if not len(rest):
        return result
    return result.scatter(rest, values.gather(rest).to_frame("value").select(_patiently(pl.col("value"))).to_series())


def _patiently(value: pl.Expr) -> pl.Expr:
    clock = value.str.replace_all("/", "-", literal=True).str.replace(r"^(\d{4}-\d{2}-\d{2})[Tt]", "${1} ")
    zone = clock.str.extract(r":.*?(Z|z|[+-]\d{2}:?\d{2})$")
    body = clock.str.replace(r"(:.*?)\s*(?:Z|z|[+-]\d{2}:?\d{2})$", "${1}")
    parsed = pl.coalesce(body.str.to_datetime(layout, strict=False, time_unit="us") for layout in FORMATS)
    hours = zone.str.extract(r"^([+-]\d{2})").cast(pl.Int64, strict=False).fill_null(0)
    minutes = zone.str.extract(r"(\d{2})$").cast(pl.Int64, strict=False).fill_null(0)
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    return parsed.to_physical() - (hours * 60 + sign * minutes) * 60_000_000


def _magnitude() -> pl.Expr:
    number = pl.col("number")
    unit = pl.when(pl.col("text").is_not_null()).then(pl.lit("text")).when(number <= 0).then(None)
    for name, bound in BOUNDS:
        unit = unit.when(number < bound).then(pl.lit(name))
    return unit.otherwise(None)


def _inferred(counts: dict[Unit, int], place: str) -> Unit:
    if len(counts) > 1:
        shares = ", ".join(f"{count:,} rows look like {unit}" for unit, count in counts.items())
        raise UserError(
            f"{place} mixes time units: {shares}; mend the file, or state time_unit for the source "
            "(rows in the other unit then become rejects)"
        )
    return UNITS[0] if not counts else next(iter(counts))


def _are_compact_dates(whole: pl.Series) -> bool:
    """Whether every number reads as YYYYMMDD."""
    month, day = whole // 100 % 100, whole % 100
    dates = whole.is_between(19_000_101, 21_001_231) & month.is_between(1, 12) & day.is_between(1, 31)
    return not whole.null_count() and bool(dates.all())


def _scaled(unit: str) -> pl.Expr:
    """Whole ticks of `unit` as microseconds; null where that leaves 64 bits."""
    whole = pl.col("whole")
    if unit == "ns":
        return whole // NANOSECONDS
    factor = MULTIPLY[unit]
    return pl.when(whole.is_between(-(2**62) // factor, 2**62 // factor)).then(whole * factor)


def _converted(frame: pl.DataFrame, unit: Unit, plausible: Window, mixed: bool) -> Times:
    number = pl.col("number")
    # 0 and -1 are the usual marks of "unknown", in a text file too.
    rules = [pl.when(number <= 0).then(pl.lit(NOT_POSITIVE))]
    if unit == "text":
        micros, readable = pl.col("text"), pl.col("text").is_not_null()
    else:
        scaled = number / NANOSECONDS if unit == "ns" else number * MULTIPLY[unit]
        rounded = pl.when(scaled.abs() < 2.0**62).then(scaled).round().cast(pl.Int64, strict=False)
        micros = pl.when(pl.col("whole").is_null()).then(rounded).otherwise(_scaled(unit))
        readable = number.is_not_null()
        if mixed:
            rules.append(pl.when(pl.col("unit") != unit).then(pl.lit(OTHER_UNIT)))
    rules.insert(1, pl.when(~readable).then(pl.lit(UNREADABLE)))
    return _windowed(frame.with_columns(micros=micros, odd=pl.coalesce(rules)), unit, plausible)


def _windowed(frame: pl.DataFrame, unit: str, plausible: Window) -> Times:
    """Apply the plausibility window; `micros` null without a reason so far is a value beyond 64 bits."""
    micros = pl.col("micros")
    reason = pl.coalesce(
        pl.when(~pl.col("there")).then(pl.lit(MISSING)),
        pl.col("odd"),
        pl.when(micros.is_null() | (micros >= plausible.latest)).then(pl.lit(TOO_LATE)),
        pl.when(micros < plausible.earliest).then(pl.lit(TOO_EARLY)),
    )
    judged = frame.select(reason=reason, value=micros)
    kept = judged.select(pl.when(pl.col("reason").is_null()).then(pl.col("value")).cast(pl.Datetime("us", "UTC")))
    return Times(unit, kept.to_series().alias("timestamp"), judged["reason"])
