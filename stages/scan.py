"""From a source of the config to the rows of one file under driftrec's column names, values still raw.

Everything is scanned lazily; text files yield text columns only, so that no id is ever read as a number. This module
knows file formats and the config's expressions, and nothing about what makes a row acceptable.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from stages.errors import UserError
from stages.files import File, decoded, file_format, is_invalid_text, separator_of
from stages.log_config import Join, Source
from stages.settings import nearest

ROW, RAGGED, KEPT, KEY = "__row", "__ragged", "__kept", "__key"


@dataclass(frozen=True)
class RawRows:
    """The rows of one file, or of a part of it.

    Attributes:
        frame: `__row` (1-based), `__ragged`, the requested fields that exist (raw types) and, for a source with
            `distinct`, `__key`; rows that `where` filters are gone.
        filtered: rows that `where` took away.
        lossy: the file is not valid UTF-8, and undecodable bytes were replaced by U+FFFD.
    """

    frame: pl.DataFrame
    filtered: int
    lossy: bool


def raw_rows(source: Source, file: File, fields: tuple[str, ...], required: tuple[str, ...]) -> RawRows:
    """Read one file of `source`: join, derive, filter, map columns.

    Args:
        source: how to read it.
        file: which one.
        fields: driftrec columns wanted.
        required: those of them that must be there.

    Raises:
        UserError: empty or unreadable file, unknown column, or an SQL expression that fails.
    """
    try:
        return _read(source, file, fields, required, lossy=False)
    except (PolarsError, OSError, UnicodeDecodeError) as error:
        if not is_invalid_text(error):
            raise unreadable(file.path, error) from None
    try:
        return _read(source, file, fields, required, lossy=True)
    except (PolarsError, OSError) as error:
        raise unreadable(file.path, error) from None


def unreadable(path: Path, error: BaseException) -> UserError:
    """What to say of a file that polars or the system cannot read."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    hint = ""
    if 'could not parse `"' in lines[0]:
        hint = '; if the file does not quote its values, set quote = ""'
    return UserError(f"{path}: cannot be read: {lines[0]}{hint}")


def _read(source: Source, file: File, fields: tuple[str, ...], required: tuple[str, ...], lossy: bool) -> RawRows:
    table = scan_table(file.path, source, lossy)
    return without_filtered(planned(table, source, file, fields, required).collect(), lossy)


def without_filtered(rows: pl.DataFrame, lossy: bool) -> RawRows:
    """Rows of `planned`, those that `where` takes away counted and gone."""
    if KEPT not in rows.columns:
        return RawRows(rows, 0, lossy)
    kept = rows.filter(pl.col(KEPT)).drop(KEPT)
    return RawRows(kept, rows.height - kept.height, lossy)


def planned(
    table: pl.LazyFrame, source: Source, file: File, fields: tuple[str, ...], required: tuple[str, ...]
) -> pl.LazyFrame:
    """The rows of a table under driftrec's names, and under `KEPT` what `where` says of them.

    Args:
        table: as of `scan_table`.
        source: how to read it.
        file: where it comes from.
        fields: as of `raw_rows`.
        required: as of `raw_rows`.

    Raises:
        UserError: as `raw_rows`.
    """
    frame = table.with_columns(pl.lit(value, pl.String).alias(name) for name, value in file.partitions.items())
    for join in source.join:
        frame = _joined(frame, join, file.path)
    for name, expression in source.derive.items():
        frame = _with_expression(frame, name, expression, f"{file.path}: derive.{name}")
    if source.where is not None:
        frame = _with_expression(frame, KEPT, source.where, f"{file.path}: where")
    wanted = _mapped(frame, source, file.path, fields, required)
    if source.distinct:
        wanted.append(_key(frame, source.distinct, file.path))
    if source.where is not None:
        wanted.append(pl.col(KEPT).cast(pl.Boolean).fill_null(False))
    return frame.select(ROW, RAGGED, *wanted)


def _visible(frame: pl.LazyFrame) -> list[str]:
    return [name for name in frame.collect_schema().names() if not name.startswith("__")]


def _missing(place: object, what: str, name: str, names: list[str]) -> UserError:
    listed = ", ".join(names)
    return UserError(f"{place}: {what} names column {name!r}, not there{nearest(name, names)}; columns: {listed}")


def _with_expression(frame: pl.LazyFrame, name: str, expression: str, place: str) -> pl.LazyFrame:
    names = _visible(frame)
    try:
        parsed = pl.sql_expr(expression)
        unknown = [root for root in parsed.meta.root_names() if root not in names]
        if unknown:
            raise _missing(place, repr(expression), unknown[0], names)
        grown = frame.with_columns(parsed.alias(name))
        grown.collect_schema()
    except PolarsError as error:
        reason = str(error).splitlines()[0]
        hint = "column names with spaces, or named like an SQL word (user, order), stand in double quotes"
        raise UserError(f"{place} = {expression!r} is not a valid SQL expression: {reason}; {hint}") from None
    return grown


def _mapped(
    frame: pl.LazyFrame, source: Source, path: Path, fields: tuple[str, ...], required: tuple[str, ...]
) -> list[pl.Expr]:
    names = _visible(frame)
    for field, column in source.columns.items():
        if field not in fields:
            known = ", ".join(fields)
            raise UserError(f"{path}: columns.{field} is not driftrec's{nearest(field, fields)}; known: {known}")
        if column not in names:
            raise _missing(path, f"columns.{field}", column, names)
    chosen = {field: source.columns.get(field, field) for field in fields}
    for field in required:
        if chosen[field] not in names:
            raise UserError(
                f"{path}: no column {field!r}{nearest(field, names)}; "
                f'map it with columns.{field} = "..."; columns: {", ".join(names)}'
            )
    return [pl.col(column).alias(field) for field, column in chosen.items() if column in names]


def _key(frame: pl.LazyFrame, distinct: list[str], path: Path) -> pl.Expr:
    names = _visible(frame)
    for column in distinct:
        if column not in names:
            raise _missing(path, "distinct", column, names)
    # As text, so that an invoice that is a number in one file and text in another is the same invoice.
    return pl.struct(pl.col(column).cast(pl.String) for column in distinct).struct.json_encode().alias(KEY)


def _joined(frame: pl.LazyFrame, join: Join, main: Path) -> pl.LazyFrame:
    path = Path(join.path)
    side = _side_table(join, path)
    shared = sorted(set(_visible(frame)) & set(side.columns) - {join.on})
    if shared:
        raise UserError(f"{path}: column {shared[0]!r} is in {main} too; rename it with join.columns")
    schema = frame.collect_schema()
    for place, names in ((main, _visible(frame)), (path, side.columns)):
        if join.on not in names:
            raise _missing(place, "join.on", join.on, list(names))
    keyed = side.with_columns(pl.col(join.on).cast(schema[join.on], strict=False)).drop_nulls(join.on)
    doubled = keyed.filter(pl.col(join.on).is_duplicated())[join.on]
    if len(doubled):
        raise UserError(f"{path}: {join.on} = {doubled[0]!r} is there twice; keep one row a key")
    return frame.join(keyed.lazy(), on=join.on, how="left", maintain_order="left")


def _side_table(join: Join, path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise UserError(f"{path}: no such file (join on {join.on!r}); check the path")
    shared = {name: getattr(join, name) for name in ("path", "format", "separator", "encoding", "quote")}
    table = Source(**shared)
    try:
        side = scan_table(path, table, lossy=False).collect()
    except (PolarsError, OSError, UnicodeDecodeError) as error:
        remedy = '; if it is Latin-1, set encoding = "latin1"' if is_invalid_text(error) else ""
        raise UserError(f"{unreadable(path, error)}{remedy}") from None
    if side[RAGGED].any():
        row = side.filter(pl.col(RAGGED))[ROW][0]
        raise UserError(f"{path}: row {row} has more fields than the table has columns; mend it or check quote")
    for new, old in join.columns.items():
        if old not in side.columns:
            raise _missing(path, f"join.columns.{new}", old, side.columns[2:])
    return side.drop(ROW, RAGGED).rename({old: new for new, old in join.columns.items()})


def scan_table(path: Path, source: Source, lossy: bool) -> pl.LazyFrame:
    """One file as a lazy frame with its own columns and `__row` (1-based data row), `__ragged` (too many fields).

    Args:
        path: the file.
        source: format, separator, encoding, quoting, header.
        lossy: replace undecodable bytes by U+FFFD instead of failing.

    Raises:
        UserError: the file is empty, or its format cannot be told.
    """
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; remove it or export it again")
    readers: dict[str, Callable[[Path, Source, bool], pl.LazyFrame]] = {
        "parquet": _scan_parquet,
        "jsonl": _scan_jsonl,
        "csv": _scan_csv if len(separator_of(path, source)) == 1 else _scan_lines,
    }
    frame = readers[file_format(path, source)](path, source, lossy)
    return frame.with_columns((pl.col(ROW) + 1).cast(pl.Int64))


def _scan_parquet(path: Path, source: Source, lossy: bool) -> pl.LazyFrame:
    frame = pl.scan_parquet(path, row_index_name=ROW, hive_partitioning=False, glob=False)
    return frame.with_columns(pl.lit(False).alias(RAGGED))


def _scan_jsonl(path: Path, source: Source, lossy: bool) -> pl.LazyFrame:
    text = decoded(path, source.encoding, lossy)
    # The whole file is looked at: a type guessed from a few rows would turn a late 2^64 into null.
    frame = pl.scan_ndjson(text, infer_schema_length=None, row_index_name=ROW)
    return frame.with_columns(pl.lit(False).alias(RAGGED))


def _scan_csv(path: Path, source: Source, lossy: bool) -> pl.LazyFrame:
    return scan_text(decoded(path, source.encoding, lossy), separator_of(path, source), source)


def scan_text(text: Path | io.BytesIO, separator: str, source: Source) -> pl.LazyFrame:
    """Separated text, with `ROW` counted from 0, and `RAGGED`."""
    quote = source.quote or None

    def scan(schema: dict[str, pl.DataType] | None) -> pl.LazyFrame:
        return pl.scan_csv(
            io.BytesIO(text.getvalue()) if isinstance(text, io.BytesIO) else text,
            separator=separator,
            quote_char=quote,
            has_header=source.header,
            schema=schema,
            infer_schema=False,
            truncate_ragged_lines=True,
            missing_columns="insert" if schema else "raise",
            row_index_name=ROW if schema else None,
            glob=False,
        )

    names = source.names if source.names and not source.header else scan(None).collect_schema().names()
    # One column more than the file has: a row with too many fields shows by filling it.
    schema: dict[str, pl.DataType] = {name: pl.String() for name in (*names, RAGGED)}
    return scan(schema).with_columns(pl.col(RAGGED).is_not_null())


def _scan_lines(path: Path, source: Source, lossy: bool) -> pl.LazyFrame:
    lines = pl.scan_lines(decoded(path, source.encoding, lossy), row_index_name=ROW)
    separator = separator_of(path, source)
    if source.header:
        first = lines.head(1).collect()
        names = str(first["line"][0]).rstrip("\r").split(separator)
        lines = lines.filter(pl.col(ROW) > 0).with_columns(pl.col(ROW) - 1)
    elif source.names:
        names = source.names
    else:
        raise UserError(f'{path}: header = false needs names = ["...", ...], the columns in order')
    parts = pl.col("line").str.strip_chars_end("\r").str.split_exact(separator, len(names))
    split = lines.select(ROW, parts.struct.rename_fields([*names, RAGGED]).alias("__parts")).unnest("__parts")
    return split.with_columns(
        *(pl.when(pl.col(name) != "").then(pl.col(name)).alias(name) for name in names), pl.col(RAGGED).is_not_null()
    )
