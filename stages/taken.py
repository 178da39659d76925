"""Which files of a log a look has taken whole already, so that the next one need not read them.

A file is known by its bytes and by how they are read, not by its name: all its rows are in a stage, in `open/`, in
`held/` or refused by then. Files with refused rows, and sources in which rows of several files exclude each other
(`distinct`), are read every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read: all that their rows depend on besides the files.

    Attributes:
        settings: of the source and the log, as JSON.
        sides: files that are joined to each of them.
    """

    settings: list[Any]
    sides: tuple[Path, ...]


def reading_of(config: Config, source: Source) -> Reading | None:
    """How a source's files are read; None where they must be read each time."""
    if any(each.distinct for each in config.log.sources):
        return None
    settings = source.model_dump(mode="json", exclude={"path"})
    plausible = [config.log.earliest, config.log.latest]
    return Reading([READING, settings, plausible], tuple(Path(join.path) for join in source.join))


def taken(reading: Reading, file: File) -> Taken | None:
    """The file as it is now; None for one that is gone, or lacks what is joined to it."""
    try:
        stamps = tuple(stamp_of(path) for path in (file.path, *reading.sides))
        return Taken(file_key(reading, file), stamps)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def file_key(reading: Reading, file: File) -> str:
    """Names the rows of a file by all they depend on."""
    hashes = [sha256_once(path) for path in (file.path, *reading.sides)]
    return digest_of([*reading.settings, file.partitions, hashes])[:32]
