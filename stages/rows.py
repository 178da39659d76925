"""What makes a row acceptable: every raw row becomes an event, or a reject with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from stages.clock import MISSING, Reading, Times, Unit, Window, read_times, reading_of, times_of
from stages.errors import UserError
from stages.long_files import RawFile
from stages.scan import KEY, RAGGED, ROW, RawRows

EVENT_FIELDS = ("user_id", "item_id", "timestamp", "event", "query")
ITEM_FIELDS = ("item_id", "title", "text", "categories", "timestamp")
INSTANT = pl.Datetime("us", "UTC")
LONGEST_ID = 1000
REPLACED = "\N{REPLACEMENT CHARACTER}"
NUL = "\0"
PLACE = "__place"


@dataclass(frozen=True)
class Sifted:
    """Rows of one file or of a part of it, judged.

    Attributes:
        accepted: the fields in driftrec's types, and `__key` if the source has `distinct`.
        rejects: `row` (1-based), `reason` and the raw fields as text.
        unit: of the timestamps; None for a file without any.
        filtered: rows that `where` took away before.
    """

    accepted: pl.DataFrame
    rejects: pl.DataFrame
    unit: str | None
    filtered: int


def sift_events(raw: RawFile, event: str | None, unit: Unit | None, plausible: Window, place: str) -> Iterator[Sifted]:
    """Judge the rows of one file of a log, a part at a time.

    Args:
        raw: the rows, as read.
        event: objective of every row; None: the `event` column, or recommendation.
        unit: stated time unit.
        plausible: window of event times.
        place: the file, for messages.

    Raises:
        UserError: an id column of a type that cannot hold ids exactly, mixed time units.
    """
    reading = reading_of(raw.times(), unit, f"{place}: timestamp")
    for part in raw.parts():
        yield _sifted_events(part, event, reading, plausible, place)


def _sifted_events(raw: RawRows, event: str | None, reading: Reading, plausible: Window, place: str) -> Sifted:
    frame = _with_text(raw.frame, ("user_id", "item_id", "event", "query"), place)
    if event is not None:
        frame = frame.with_columns(event=pl.lit(event))
    times = times_of(raw.frame["timestamp"], reading, plausible, f"{place}: timestamp")
    frame = frame.with_columns(
        pl.col("event").fill_null("recommendation"), __time=times.values, __time_reason=times.reasons
    )
    blank = pl.col("query").is_null() | (pl.col("query").str.strip_chars() == "")
    rules = [
        *_bad_text(("user_id", "item_id"), ("query",), raw.lossy),
        pl.col("__time_reason"),
        _rule(~pl.col("event").is_in(["recommendation", "search"]), "event is neither recommendation nor search"),
        _rule((pl.col("event") == "search") & blank, "search without a query"),
    ]
    return _sifted(frame, raw, rules, EVENT_FIELDS, times.unit, _doubtful_event(raw.lossy))


def sift_items(raw: RawRows, separator: str, unit: Unit | None, plausible: Window, place: str) -> Sifted:
    """Judge the rows of one file of a catalogue; a missing timestamp means "known always".

    Args:
        raw: the rows, as read.
        separator: splits categories given as text.
        unit: stated time unit.
        plausible: window of times.
        place: the file, for messages.

    Raises:
        UserError: an item_id column of a type that cannot hold ids exactly, mixed time units.
    """
    frame = _with_text(raw.frame, ("item_id", "title", "text"), place).with_columns(_categories(raw.frame, separator))
    times = _item_times(raw.frame, unit, plausible, place)
    frame = frame.with_columns(__time=times.values, __time_reason=times.reasons)
    rules = [
        *_bad_text(("item_id",), ("title", "text"), raw.lossy),
        pl.when(pl.col("__time_reason") != MISSING).then(pl.col("__time_reason")),
    ]
    return _sifted(frame, raw, rules, ITEM_FIELDS, times.unit)


def _item_times(frame: pl.DataFrame, unit: Unit | None, plausible: Window, place: str) -> Times:
    if "timestamp" in frame.columns:
        return read_times(frame["timestamp"], unit, plausible, f"{place}: timestamp")
    unknown = pl.Series("timestamp", [None] * frame.height, INSTANT)
    return Times(None, unknown, pl.Series([None] * frame.height, dtype=pl.String))


def _sifted(
    frame: pl.DataFrame,
    raw: RawRows,
    rules: list[pl.Expr],
    fields: tuple[str, ...],
    unit: str | None,
    doubtful: pl.Expr | None = None,
) -> Sifted:
    """Part the rows by the first rule they break; only `doubtful` rows are put to the rules, where that is given."""
    asked = frame.with_row_index(PLACE)
    asked = asked if doubtful is None else asked.filter(doubtful)
    broken = asked.select(PLACE, reason=pl.coalesce(rules)).drop_nulls("reason")
    keys = [KEY] if KEY in frame.columns else []
    good = frame
    if len(broken):
        kept = np.ones(len(frame), dtype=bool)
        kept[broken[PLACE].to_numpy()] = False
        good = frame.filter(kept)
    accepted = good.with_columns(timestamp=pl.col("__time")).select(*fields, *keys)
    there = [field for field in fields if field in raw.frame.columns]
    refused = raw.frame[broken[PLACE]]
    rejects = refused.select(pl.col(ROW).alias("row"), *(_shown(raw.frame, field) for field in there))
    rejects = rejects.with_columns(reason=broken["reason"])
    absent = [pl.lit(None, pl.String).alias(field) for field in fields if field not in there]
    return Sifted(accepted, rejects.with_columns(absent).select("row", "reason", *fields), unit, raw.filtered)


def _doubtful_event(lossy: bool) -> pl.Expr:
    """Whether an event may break a rule: true for every one that does, false for all of an ordinary log, and cheap."""
    doubts = [pl.col(RAGGED), pl.col("__time_reason").is_not_null(), pl.col("event") != "recommendation"]
    for field in ("user_id", "item_id"):
        value = pl.col(field)
        # Text between "!" and the last ASCII sign begins with a visible character, so it is not blank.
        doubts += [value.is_null(), value < "!", value > "~", value.str.len_bytes() > LONGEST_ID]
    doubts += [pl.col(field).str.contains(NUL, literal=True) for field in ("user_id", "item_id", "query")]
    return pl.any_horizontal(doubts) if not lossy else pl.lit(True)


def _shown(raw: pl.DataFrame, field: str) -> pl.Expr:
    if isinstance(raw.schema[field], pl.List):
        return pl.col(field).cast(pl.List(pl.String)).list.join("|")
    return pl.col(field).cast(pl.String, strict=False)


def _with_text(frame: pl.DataFrame, fields: tuple[str, ...], place: str) -> pl.DataFrame:
    """The fields as text, absent ones null; ids that a float column may have rounded already are refused."""
    columns = []
    for field in fields:
        kind = frame.schema.get(field, pl.Null())
        if field.endswith("_id") and kind.is_float():
            raise UserError(
                f"{place}: {field} is a column of {kind}, which rounds large ids and writes 1 as 1.0; "
                "if it holds whole numbers only, derive text: CAST(CAST(column AS BIGINT) AS VARCHAR)"
            )
        if kind.is_nested():
            raise UserError(f"{place}: {field} is a column of {kind}, not of single values; derive one with SQL")
        value = pl.col(field) if field in frame.columns else pl.lit(None)
        columns.append(value.cast(pl.String, strict=False).alias(field))
    return frame.with_columns(columns)


def _categories(frame: pl.DataFrame, separator: str) -> pl.Expr:
    kind = frame.schema.get("categories")
    if kind is None:
        return pl.lit(None, pl.List(pl.String)).alias("categories")
    if isinstance(kind, pl.List):
        return pl.col("categories").cast(pl.List(pl.String)).alias("categories")
    return pl.col("categories").cast(pl.String).str.split(separator).alias("categories")


def _rule(broken: pl.Expr, reason: str) -> pl.Expr:
    return pl.when(broken).then(pl.lit(reason))


def _bad_text(ids: tuple[str, ...], texts: tuple[str, ...], lossy: bool) -> list[pl.Expr]:
    rules = [_rule(pl.col(RAGGED), "more fields than columns")]
    for field in ids:
        value = pl.col(field)
        rules.append(_rule(value.is_null() | (value.str.strip_chars() == ""), f"{field} missing"))
        rules.append(_rule(value.str.len_chars() > LONGEST_ID, f"{field} longer than {LONGEST_ID:,} characters"))
    for field in (*ids, *texts):
        value = pl.col(field)
        rules.append(_rule(value.str.contains(NUL, literal=True), f"{field} holds a null byte"))
        if lossy:
            rules.append(_rule(value.str.contains(REPLACED, literal=True), f"{field} is not UTF-8 (Latin-1?)"))
    return rules
