"""Which files of a log a look has taken whole already, so that the next one need not read them.

A file is known by its bytes and by how they are read, not by its name: all its rows are in a stage, in `open/`, in
`held/` or refused by then. Files with refused rows, and sources in which rows of several files exclude each other
(`distinct`), are read every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.config import Config, Source
from stages.files import File
from stages.workspace import Stamp, digest_of, sha256_once, stamp_of

READING = 1
"""Raised whenever the same bytes would be read as other rows."""


@dataclass(frozen=True)
class Taken:
    """A file as it is at one moment; another one where anybody wrote to it since.

    Attributes:
        key: its `file_key`.
        stamps: of the file and of those joined to it. They differ even where the same bytes were written anew.
    """

    key: str
    stamps: tuple[Stamp, ...]


def taken(config: Config, source: Source, file: File) -> Taken | None:
    """The file as it is now; None for one that must be read each time, or is gone."""
    sides = [path for path in (Path(join.path) for join in source.join) if path.is_file()]
    try:
        stamps = tuple(stamp_of(path) for path in (file.path, *sides))
        key = file_key(config, source, file)
    except FileNotFoundError:
        return None
    return None if key is None else Taken(key, stamps)


def file_key(config: Config, source: Source, file: File) -> str | None:
    """Names the rows of a file by all they depend on; None for one that must be read each time."""
    sides = [Path(join.path) for join in source.join]
    if any(each.distinct for each in config.log.sources) or not all(side.is_file() for side in sides):
        return None
    reading = source.model_dump(mode="json", exclude={"path"})
    plausible = [config.log.earliest, config.log.latest]
    hashes = [sha256_once(path) for path in (file.path, *sides)]
    return digest_of([READING, reading, plausible, file.partitions, hashes])[:32]
