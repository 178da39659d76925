"""The rows of one file a part at a time, so that memory is that of a part, however long the file is.

A file that no part can be read of alone is read whole: see `_tables`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from stages.clock import AT_ONCE
from stages.files import File, file_format, separator_of
from stages.log_config import Source
from stages.scan import KEPT, ROW, RawRows, planned, raw_rows, scan_table, scan_text, unreadable, without_filtered

LONG = {"parquet": 2**23, "csv": 2**26}
"""Bytes by format: longer files are read in parts, and twice, first for their times alone."""
PIECE = 2**24
"""Bytes of text that are read at once."""
NEWLINE = 10


@dataclass(frozen=True)
class RawFile:
    """The rows of one file in parts; of one without rows, one part without rows.

    Attributes:
        times: reads the `timestamp` column.
        parts: reads the rows.
    """

    times: Callable[[], Iterable[pl.Series]]
    parts: Callable[[], Iterable[RawRows]]


def raw_file(source: Source, file: File, fields: tuple[str, ...], required: tuple[str, ...]) -> RawFile:
    """`stages.scan.raw_rows` in parts of `AT_ONCE` rows or `PIECE` bytes.

    Args:
        source: how to read it.
        file: which one.
        fields: driftrec columns wanted.
        required: those of them that must be there, `timestamp` among them.

    Raises:
        UserError: as `raw_rows`; of a long file, when the part at fault is asked for.
    """
    tables = _tables(source, file.path)
    if tables is None:
        rows = raw_rows(source, file, fields, required)
        return RawFile(lambda: (part.frame["timestamp"] for part in _cut(rows)), lambda: _cut(rows))

    def read(*columns: str) -> Iterator[RawRows]:
        before = 0
        try:
            for table in tables():
                plan = planned(table, source, file, fields, required)
                found = (plan.select(pl.col(*columns, f"^{KEPT}$")) if columns else plan).collect()
                if not columns:
                    found = found.with_columns(pl.col(ROW) + before)
                before += found.height
                yield without_filtered(found, lossy=False)
        except (PolarsError, OSError) as error:
            raise unreadable(file.path, error) from None

    return RawFile(lambda: (part.frame["timestamp"] for part in read("timestamp")), read)


def _cut(rows: RawRows) -> Iterator[RawRows]:
    for start in range(0, max(rows.frame.height, 1), AT_ONCE):
        # Rows that are gone count once.
        yield RawRows(rows.frame.slice(start, AT_ONCE), 0 if start else rows.filtered, rows.lossy)


def _tables(source: Source, path: Path) -> Callable[[], Iterator[pl.LazyFrame]] | None:
    """Reads a long file as tables one after the other, each with its own rows counted from 1; None: read it whole.

    Long are Parquet, and UTF-8 text of which every line is a row, of sources whose expressions look at one row alone.
    """
    kind = file_format(path, source)
    if path.stat().st_size <= LONG.get(kind, np.inf) or source.join or not _look_at_a_row(source):
        return None
    if kind == "parquet":
        return lambda: _row_ranges(path, source)
    plain = source.encoding == "utf8" and len(separator_of(path, source)) == 1
    if not plain or not all(_is_lines(text, source.quote) for text in _pieces(path)):
        return None
    return lambda: _texts(path, source)


def _look_at_a_row(source: Source) -> bool:
    """Whether no expression of a source is a window function or an aggregate; false too where that is not plain."""
    try:
        found = [pl.sql_expr(text) for text in (*source.derive.values(), source.where) if text is not None]
    except PolarsError:
        return False
    return all(each.meta.is_row_separable() and not _aggregates(each) for each in found)


def _aggregates(expression: pl.Expr) -> bool:
    meta = expression.meta
    return (meta.is_scalar() and not meta.is_literal()) or any(_aggregates(each) for each in meta.pop())


def _row_ranges(path: Path, source: Source) -> Iterator[pl.LazyFrame]:
    table = scan_table(path, source, lossy=False)
    rows = table.select(pl.len()).collect().item()
    for start in range(0, max(rows, 1), AT_ONCE):
        yield table.slice(start, AT_ONCE).with_columns(pl.col(ROW) - start)


def _texts(path: Path, source: Source) -> Iterator[pl.LazyFrame]:
    head = b""
    for number, text in enumerate(_pieces(path)):
        if not number and source.header:
            head = text[: text.index(b"\n") + 1]
        own = io.BytesIO(head + text if number else text)
        yield scan_text(own, separator_of(path, source), source).with_columns((pl.col(ROW) + 1).cast(pl.Int64))


def _pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, some whole lines at a time."""
    with path.open("rb") as handle:
        while block := handle.read(PIECE):
            yield block + handle.readline()


def _is_lines(text: bytes, quote: str | None) -> bool:
    """Whether text is UTF-8 and no line of it ends within quotes."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    if not quote or quote.encode() not in text:
        return True
    signs = np.frombuffer(text, dtype=np.uint8)
    ends = np.append(np.flatnonzero(signs == NEWLINE), len(signs))
    quotes = np.diff(np.searchsorted(np.flatnonzero(signs == ord(quote)), ends), prepend=0)
    return not (quotes % 2).any()
