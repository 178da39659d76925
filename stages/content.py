"""What a table holds, independent of how it is stored: a digest of the values, and Parquet written whole."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

from stages.workspace import replacing, sha256_file

CHUNK = 1_000_000
NULL_LENGTH = np.uint32(2**32 - 1)


def content_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of a frame's column names and values, row by row as they stand, in hex.

    Independent of chunks, row groups, compression and the library that wrote the file. Columns hold text, lists of
    text, integers or instants; null differs from every value.
    """
    digest = hashlib.sha256(f"{frame.columns}|{frame.height}".encode())
    for start in range(0, frame.height, CHUNK):
        for column in frame.slice(start, CHUNK).iter_columns():
            _add(digest, column)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, column: pl.Series) -> None:
    if isinstance(column.dtype, pl.List):
        _add(digest, column.list.len().cast(pl.Int64))
        _add(digest, column.explode())
    elif column.dtype == pl.String:
        digest.update(column.str.len_bytes().fill_null(int(NULL_LENGTH)).to_numpy().tobytes())
        digest.update(_bytes(column.drop_nulls()))
    else:
        digest.update(column.is_null().to_numpy().tobytes())
        digest.update(column.to_physical().cast(pl.Int64).fill_null(0).to_numpy().tobytes())


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
