"""A log as numbers: ids by their place among the sorted distinct ones, a row's fields packed for one fast sort.

Rows come in batches, are numbered as they come, sorted a part at a time, and stored as a Parquet file of whole numbers.
Memory is that of the distinct ids and of one part, not of the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stages.content import CHUNK, sink
from stages.names import Names
from stages.packing import Columns, Field, Layout, Ticks
from stages.spool import Spool, height, regular, sorted_rows

INSTANT = pl.Datetime("us", "UTC")
ORDER = ("timestamp", "user_id", "item_id", "event", "query")
LOG_SCHEMA = pl.Schema(
    {
        "user_id": pl.String(),
        "item_id": pl.String(),
        "timestamp": INSTANT,
        "event": pl.String(),
        "query": pl.String(),
        "block": pl.Int32(),
    }
)
NUMBERS = pl.Schema(
    {
        "time": pl.Int64(),
        "user": pl.UInt32(),
        "item": pl.UInt32(),
        "event": pl.UInt8(),
        "query": pl.UInt32(),
        "block": pl.Int32(),
    }
)
"""Microseconds, places among the sorted distinct ids, 1 for a search, 1 + the query's place or 0, block or -1."""
NAMED = {"user": "user_id", "item": "item_id", "query": "query"}
EVENTS = pl.Series(["recommendation", "search"])
NEVER = np.iinfo(np.int64).min
"""The time of a row without one."""
FEW = 50_000
"""Rows that one thread numbers sooner than two can be started."""
KEPT = 2**21
"""Rows that wait in memory, and not in a file, for the last one to come."""


@dataclass(frozen=True)
class Coded:
    """A log of N rows in order.

    Attributes:
        path: Parquet file of `NUMBERS`.
        height: N.
        names: by `user`, `item` and `query`, the distinct texts, sorted (and some that no row has any more).
        step: divides every time.
    """

    path: Path
    height: int
    names: dict[str, pl.Series]
    step: int

    def columns(self, low: int = 0, high: int | None = None, only: Iterable[str] = NUMBERS) -> Iterator[Columns]:
        """Rows low to high, `CHUNK` at a time."""
        stop = self.height if high is None else high
        for start in range(low, stop, CHUNK):
            rows = self._rows(start, min(CHUNK, stop - start), list(only))
            yield {column.name: column.to_numpy() for column in rows.iter_columns()}

    def _rows(self, start: int, count: int, only: list[str]) -> pl.DataFrame:
        if self._held is not None:
            return self._held.slice(start, count).select(only)
        return pl.scan_parquet(self.path, glob=False).select(only).slice(start, count).collect()

    @cached_property
    def _held(self) -> pl.DataFrame | None:
        """All rows of a short log, which is read once."""
        return pl.read_parquet(self.path, glob=False) if self.height <= CHUNK else None

    def column(self, name: str) -> pl.Series:
        """One column of numbers, whole."""
        return self._rows(0, self.height, [name])[name]

    def time_at(self, row: int) -> int:
        """One row's time."""
        return self._rows(row, 1, ["time"]).item()

    def span(self) -> tuple[datetime | None, datetime | None]:
        """First and last time; None for a log without a clock."""
        if not self.height or self.time_at(0) == NEVER:
            return None, None
        # The log stands in the order of time.
        edges = pl.Series([self.time_at(0), self.time_at(self.height - 1)]).cast(INSTANT)
        return edges[0], edges[1]

    def frame(self, columns: Columns) -> pl.DataFrame:
        """Rows of `NUMBERS` as rows of `LOG_SCHEMA`."""
        times, blocks, queries = columns["time"], columns.get("block"), columns["query"]
        found = {
            "user_id": self.names["user"].gather(columns["user"]),
            "item_id": self.names["item"].gather(columns["item"]),
            "timestamp": _without(times, times == NEVER),
            "event": EVENTS.gather(columns["event"]),
        }
        if queries.any():
            found["query"] = _without(self.names["query"].gather(np.maximum(queries, 1) - 1), queries == 0)
        if blocks is not None and not (absent := blocks < 0).all():
            found["block"] = _without(blocks, absent)
        table = pl.DataFrame(found).with_columns(
            pl.lit(None, kind).alias(name) for name, kind in LOG_SCHEMA.items() if name not in found
        )
        return table.select(pl.col(name).cast(kind) for name, kind in LOG_SCHEMA.items())

    def frames(self) -> Iterator[pl.DataFrame]:
        """The rows as `LOG_SCHEMA`, `CHUNK` at a time."""
        return map(self.frame, self.columns())

    def whole(self) -> pl.DataFrame:
        """All rows as `LOG_SCHEMA`."""
        return pl.concat([LOG_SCHEMA.to_frame(), *self.frames()], rechunk=True)


class Coder:
    """Turns batches of a log's rows into a `Coded`.

    Args:
        folder: where rows wait that are too many for memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = {name: Names() for name in NAMED}
        self._met = Spool(KEPT, folder)
        self._ticks = Ticks()

    def add(self, frame: pl.DataFrame) -> None:
        """Add rows with the columns of `LOG_SCHEMA`, or all of them but `block`."""
        if frame.is_empty():
            return
        user, item = self._coded(frame)
        query, count = frame["query"], frame.height
        absent = query.null_count() == count
        known = np.zeros(count, np.uint32) if absent else self._names["query"].codes(query) + np.uint32(1)
        if not absent and query.null_count():
            known[query.is_null().to_numpy()] = 0
        times = frame["timestamp"].to_physical().fill_null(NEVER).to_numpy()
        searching = (frame["event"] == EVENTS[1]).cast(pl.UInt8).to_numpy()
        columns = {"time": times, "user": user, "item": item, "event": searching, "query": known}
        if "block" in frame.columns:
            columns["block"] = frame["block"].fill_null(-1).to_numpy()
        self._met.append(columns)
        self._ticks = self._ticks.met(times)

    def _coded(self, frame: pl.DataFrame) -> list[npt.NDArray[np.uint32]]:
        """Users and items as numbers: side by side, but for a few rows, where starting threads takes longer."""

        def codes(name: str) -> npt.NDArray[np.uint32]:
            return self._names[name].codes(frame[NAMED[name]])

        if frame.height < FEW:
            return [codes("user"), codes("item")]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(codes, ("user", "item")))

    def sorted_distinct(self, path: Path) -> Coded:
        """Each row once, in order of `ORDER`; stored at `path`. Every row has a time."""
        names, places = self._ranked()
        layout = Layout(list(fields(names, self._ticks).values()))
        pieces = (_placed(piece, places) for piece in self._met.pieces())
        return self._stored(sorted_rows(pieces, layout, self._folder, CHUNK, once=True), names, path)

    def as_met(self, path: Path) -> Coded:
        """The rows in the order they came; stored at `path`."""
        names, places = self._ranked()
        pieces = (_placed(piece, places) for piece in self._met.pieces())
        return self._stored(regular(pieces, CHUNK), names, path)

    def _ranked(self) -> tuple[dict[str, pl.Series], dict[str, npt.NDArray[np.uint32]]]:
        ranked = {name: numbers.ranked() for name, numbers in self._names.items()}
        self._names.clear()
        places = {name: places for name, (_, places) in ranked.items()}
        # A query's number is one more than its place: 0 is null's.
        places["query"] = np.concatenate([np.zeros(1, np.uint32), places["query"] + np.uint32(1)])
        return {name: texts for name, (texts, _) in ranked.items()}, places

    def _stored(self, pieces: Iterable[Columns], names: dict[str, pl.Series], path: Path) -> Coded:
        total = 0

        def frames() -> Iterator[pl.DataFrame]:
            nonlocal total
            for piece in pieces:
                total += height(piece)
                yield pl.DataFrame({"block": np.full(height(piece), -1, np.int32)} | piece).select(*NUMBERS)

        sink(frames(), NUMBERS, path, plain=True)
        self._met.close()
        return Coded(path, total, names, self._ticks.step)


def fields(names: Mapping[str, pl.Series], ticks: Ticks) -> dict[str, Field]:
    """The columns of numbers that make a row, in the order of `ORDER`."""
    found = [
        Field("time", np.int64, max(ticks.high - ticks.low, 0) // ticks.step + 1, ticks.low, ticks.step),
        Field("user", np.uint32, len(names["user"])),
        Field("item", np.uint32, len(names["item"])),
        # A search has a query.
        Field("event", np.uint8, len(EVENTS) if len(names["query"]) else 1),
        Field("query", np.uint32, len(names["query"]) + 1),
    ]
    return {field.name: field for field in found}


def _placed(piece: Columns, places: dict[str, npt.NDArray[np.uint32]]) -> Columns:
    """The same rows with each id's place among the sorted ones in place of the number it was met with."""
    return piece | {name: ranks[piece[name]] for name, ranks in places.items() if len(ranks) > 1}


def _without(column: pl.Series | npt.NDArray[Any], absent: npt.NDArray[np.bool_]) -> pl.Series:
    column = pl.Series(column)
    return column.set(pl.Series(absent), None) if absent.any() else column
