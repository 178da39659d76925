"""Which files a source means, what format each has, and how its bytes become text."""

from __future__ import annotations

import glob
import gzip
import io
import os
from dataclasses import dataclass
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
    return [File(each, _partitions(each.relative_to(base))) for each in sorted(found)]


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
        return [each for each in path.rglob("*") if each.is_file() and _is_data(each.relative_to(path))], path
    return [Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file()], _fixed_part(path)


def _is_data(relative: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in relative.parts)
    return not hidden and _ending(relative) in ENDINGS


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _partitions(relative: Path) -> dict[str, str | None]:
    pairs = (part.split("=", 1) for part in relative.parent.parts if "=" in part)
    return {name: None if value == HIVE_NULL else unquote(value) for name, value in pairs}


def file_format(path: Path, source: Source) -> Format:
    """The format stated by the source, else told by the ending.

    Raises:
        UserError: the ending is unknown and the source states none.
    """
    if source.format != "auto":
        return source.format
    ending = _ending(path)
    if ending not in ENDINGS:
        raise UserError(f'{path}: the ending {ending!r} tells no format; set format = "csv", "jsonl" or "parquet"')
    return ENDINGS[ending]


def separator_of(path: Path, source: Source) -> str:
    """The separator stated by the source, else a tab for `.tsv` and a comma for the rest."""
    return source.separator or ("\t" if _ending(path) == ".tsv" else ",")


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
    base = Path(os.path.commonpath([path.resolve().parent for path in paths])) if paths else Path()
    return {path: path.resolve().relative_to(base).as_posix() for path in paths}
