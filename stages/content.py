"""What a table holds, independent of how it is stored: a digest of the values, and Parquet written whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from stages.errors import UserError
from stages.workspace import read_json, replacing, sha256_file, write_json

CHUNK = 1_000_000
ROW_GROUP = 123_457
"""Rows of a group in a file that is written in pieces; polars' own choice for large frames in memory."""
NULL_LENGTH = np.uint32(2**32 - 1)


class Digest:
    """SHA-256 of column names and values, row by row as they stand, of a frame that comes in pieces.

    Args:
        columns: names.
        height: rows in all.
    """

    def __init__(self, columns: Sequence[str], height: int) -> None:
        self._hash = hashlib.sha256(f"{list(columns)}|{height}".encode())

    def add(self, piece: pl.DataFrame) -> None:
        """The next rows: `CHUNK` of them, fewer only at the end."""
        for column in piece.iter_columns():
            _add(self._hash, column)

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._hash.hexdigest()


def content_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of a frame's column names and values, row by row as they stand, in hex.

    Independent of chunks, row groups, compression and the library that wrote the file. Columns hold text, lists of
    text, integers or instants; null differs from every value.
    """
    digest = Digest(frame.columns, frame.height)
    for start in range(0, frame.height, CHUNK):
        digest.add(frame.slice(start, CHUNK))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, column: pl.Series) -> None:
    if isinstance(column.dtype, pl.List):
        _add(digest, column.list.len().cast(pl.Int64))
        _add(digest, column.explode())
    elif column.dtype == pl.String:
        digest.update(_memory(column.str.len_bytes().fill_null(int(NULL_LENGTH))))
        digest.update(_bytes(column.drop_nulls() if column.null_count() else column))
    else:
        digest.update(_memory(column.is_null()) if column.null_count() else bytes(len(column)))
        digest.update(_memory(column.to_physical().cast(pl.Int64).fill_null(0)))


def _memory(column: pl.Series) -> memoryview:
    """The values of a column of numbers as they lie in memory."""
    return np.ascontiguousarray(column.to_numpy()).data


def _bytes(column: pl.Series) -> memoryview:
    """The values of a text column without nulls, one after the other."""
    array = column.to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets, text = array.buffers()
    if text is None or not len(array):
        return memoryview(b"")
    ends = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return memoryview(text)[int(ends[0]) : int(ends[-1])]


def write_parquet(frame: pl.DataFrame, path: Path) -> str:
    """Write a frame as zstd Parquet, whole or not at all, and return the file's SHA-256 in hex."""
    with replacing(path) as temporary:
        frame.write_parquet(temporary, compression="zstd", compression_level=1, statistics=True)
    return sha256_file(path)


def digest_and_write(frame: pl.DataFrame, path: Path) -> tuple[str, str]:
    """`content_digest` and `write_parquet` of one frame, side by side."""
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(content_digest, frame)
        sha256 = write_parquet(frame, path)
        return digest.result(), sha256


def sink(frames: Iterable[pl.DataFrame], schema: pl.Schema, path: Path, plain: bool = False) -> None:
    """Write a frame that comes in pieces; the file depends on the rows alone, not on the pieces.

    Args:
        frames: the pieces.
        schema: of them.
        path: the file.
        plain: for speed, not for size.
    """

    def source(*_: object) -> Iterator[pl.DataFrame]:
        # A file without rows is made of a piece without rows.
        yield schema.to_frame()
        yield from frames

    register_io_source(source, schema=schema).sink_parquet(
        path,
        compression="lz4" if plain else "zstd",
        compression_level=None if plain else 1,
        statistics=not plain,
        row_group_size=ROW_GROUP,
        engine="streaming",
    )


def digest_and_sink(frames: Iterable[pl.DataFrame], schema: pl.Schema, height: int, path: Path) -> str:
    """`sink`, and the content's digest, which a thread of its own takes.

    Args:
        frames: pieces of `CHUNK` rows, the last one shorter.
        schema: of the pieces.
        height: rows in all.
        path: the file.
    """
    digest = Digest(list(schema), height)

    def told(pool: ThreadPoolExecutor) -> Iterator[pl.DataFrame]:
        waiting = None
        for frame in frames:
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(digest.add, frame)
            yield frame
        if waiting is not None:
            waiting.result()

    with ThreadPoolExecutor(1) as pool:
        sink(told(pool), schema, path)
    return digest.hexdigest()


def store_noted(frame: pl.DataFrame, path: Path) -> None:
    """Write a table that can be made again, and beside it the SHA-256 by which `read_noted` knows it."""
    with replacing(path) as temporary:
        frame.write_parquet(temporary)
        write_json(path.with_suffix(".json"), {"sha256": sha256_file(temporary)}, seal=True)


def is_noted(path: Path) -> bool:
    """Whether the table is there, and what `store_noted` wrote."""
    try:
        return path.is_file() and read_json(path.with_suffix(".json"))["sha256"] == sha256_file(path)
    except (UserError, KeyError):
        return False


def read_noted(path: Path) -> pl.DataFrame | None:
    """The table, or None where it is not there or not what was written: make it again."""
    return pl.read_parquet(path) if is_noted(path) else None
