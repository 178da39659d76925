"""Which files a source means, what format each has, and how its bytes become text."""

from __future__ import annotations

import glob
import gzip
import io
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from stages.config import Source, expand
from stages.errors import UserError

Format = Literal["csv", "jsonl", "parquet"]
ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".dat": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
YOUNG = 60.0
"""Seconds since the last write within which text that ends in the middle of a line is taken for unfinished."""
HIDDEN = (".", "_")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class File:
    """One file of a source, and the `key=value` folders it lies in below the source's fixed part."""

    path: Path
    partitions: dict[str, str | None]


def source_files(pattern: str) -> list[File]:
    """The files of a path, glob or folder, in the order of their names.

    A folder means every file below it with a known ending, except those whose name starts with `.` or `_`.

    Raises:
        UserError: nothing is there.
    """
    path = Path(expand(pattern))
    if path.is_file():
        return [File(path, {})]
    found, base = _below(path)
    if not found:
        raise UserError(f"{path}: no such file, and nothing matches; check the path (docs/data.md has the layout)")
    partitions = {folder: _partitions(Path(folder).relative_to(base)) for folder in {os.path.dirname(p) for p in found}}
    return [File(each, partitions[os.path.dirname(each)]) for each in sorted(found, key=attrgetter("parts"))]


def is_emptied(pattern: str) -> bool:
    """Whether a folder or glob holds no file while its folder is there, as where a producer clears what it delivered.

    A file that is named and gone is none of it, and nor is a folder that is gone: it may not be mounted.
    """
    path = Path(expand(pattern))
    found, base = _below(path)
    return not found and base.is_dir() and (path.is_dir() or glob.has_magic(str(path)))


def _below(path: Path) -> tuple[list[Path], Path]:
    """The files of a folder or glob, and its fixed part."""
    if path.is_dir():
        return list(_data_below(path)), path
    return [Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file()], _fixed_part(path)


def _data_below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        for name in names:
            if not name.startswith(HIDDEN) and _ending(name) in ENDINGS and os.path.isfile(os.path.join(place, name)):
                yield Path(place, name)


def _ending(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _partitions(folder: Path) -> dict[str, str | None]:
    pairs = (part.split("=", 1) for part in folder.parts if "=" in part)
    return {name: None if value == HIVE_NULL else unquote(value) for name, value in pairs}


def file_format(path: Path, source: Source) -> Format:
    """The format stated by the source, else told by the ending.

    Raises:
        UserError: the ending is unknown and the source states none.
    """
    if source.format != "auto":
        return source.format
    ending = _ending(path.name)
    if ending not in ENDINGS:
        raise UserError(f'{path}: the ending {ending!r} tells no format; set format = "csv", "jsonl" or "parquet"')
    return ENDINGS[ending]


def is_unfinished(path: Path, source: Source) -> bool:
    """Whether its producer seems to be writing it: text ends within a line, and was written to a moment ago.

    The last row of such a file could be half an item's name and yet look like any other.
    """
    if path.name.lower().endswith(".gz") or file_format(path, source) == "parquet" or not path.stat().st_size:
        return False
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read() not in (b"\n", b"\r") and abs(time.time() - path.stat().st_mtime) < YOUNG


def separator_of(path: Path, source: Source) -> str:
    """The separator stated by the source, else a tab for `.tsv` and a comma for the rest."""
    return source.separator or ("\t" if _ending(path.name) == ".tsv" else ",")


def decoded(path: Path, encoding: Literal["utf8", "latin1"], lossy: bool) -> Path | io.BytesIO:
    """The file itself where polars can read it as it is, else its text as UTF-8 in memory."""
    if encoding == "utf8" and not lossy:
        return path
    raw = path.read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        raw = gzip.decompress(raw)
    if encoding == "latin1":
        return io.BytesIO(raw.decode("latin-1").encode())
    return io.BytesIO(raw.decode("utf-8", errors="replace").encode())


def is_invalid_text(error: BaseException) -> bool:
    """Whether reading failed because bytes are not UTF-8."""
    message = str(error).lower().replace("-", "")
    return isinstance(error, UnicodeDecodeError) or ("utf8" in message and "invalid" in message)


def shown(paths: list[Path]) -> dict[Path, str]:
    """Each path relative to the deepest folder that holds them all: what manifests and rejects call the file."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    real = {path: _real(path, folders) for path in paths}
    base = os.path.commonpath([os.path.dirname(place) for place in real.values()]) if paths else ""
    return {path: place.removeprefix(base).lstrip("/") for path, place in real.items()}


def _real(path: Path, folders: Mapping[str, str]) -> str:
    """Where a file lies; `folders` tells of each folder, so that the hundreds in one are not looked up each."""
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
