"""What a disk may hold when the power goes: a tree's operations are recorded, and laid out without what was not synced.

The disk is the one POSIX promises, and no better: contents are safe from an fsync of the file on, names from an fsync
of their folder on, and of what is not, any part may be there. A rename happens whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

Name: TypeAlias = tuple[int, str]
"""A folder's inode and a name in it."""
Change: TypeAlias = dict[Name, int | None]
"""What one operation does to names: the inode each stands for now, None where it is gone."""
WATCHED = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
KINDS = ("nothing else", "all names", "a part in order", "any part")
"""What is there besides the durable: no name; every name, of contents only the length; operations up to one; any."""


@dataclass(frozen=True)
class Moment:
    """What is durable after an operation, and what is not yet.

    Attributes:
        names: durable ones.
        pending: changes of names since, in order.
        contents: durable ones by inode, of files that were synced once.
        written: all of them as the processes see them.
    """

    names: dict[Name, int]
    pending: list[Change]
    contents: dict[int, bytes]
    written: dict[int, bytes]


class Disk:
    """The tree below a folder, whose operations are recorded while `watched`.

    Args:
        base: of the tree; what it holds now is durable.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = base.stat().st_ino
        self.folders: set[int] = set()
        self.open: dict[int, int] = {}  # an inode that is open is given to no other file
        self.names: dict[Name, int] = {}
        self.written: dict[int, bytes] = {}
        self._look()
        self.durable, self.contents = dict(self.names), dict(self.written)
        self.pending: list[Change] = []
        self.moments: list[Moment] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record what is done below the base meanwhile, after each operation."""
        honest = {name: getattr(os, name) for name in WATCHED}
        try:
            for name, work in honest.items():
                setattr(os, name, self._noting(work, name == "fsync"))
            yield
        finally:
            for name, work in honest.items():
                setattr(os, name, work)
            for descriptor in self.open.values():
                os.close(descriptor)

    def _noting(self, work: Callable[..., Any], syncs: bool) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            """The operation itself, with a look before and after it."""
            self.pending += [{name: inode} for name, inode in self._look().items()]
            done = work(*arguments, **named)
            change = self._look()
            self.pending += [change] if change else []
            if syncs:
                self._sync(os.fstat(arguments[0]).st_ino)
            self.moments.append(Moment(dict(self.durable), list(self.pending), dict(self.contents), dict(self.written)))
            return done

        return noted

    def _sync(self, inode: int) -> None:
        if inode not in self.folders:
            self.contents[inode] = self.written[inode]
            return
        safe = [change for change in self.pending if any(folder == inode for folder, _ in change)]
        self.durable = changed(self.durable, safe)
        self.pending = [change for change in self.pending if change not in safe]

    def _look(self) -> Change:
        """Take in names and contents as they are; returns what became of names since the last look."""
        before, self.names, self.written = self.names, {}, dict(self.written)
        for place, folders, files in os.walk(self.base):
            folder = Path(place).stat().st_ino
            self.folders.add(folder)
            for name in (*folders, *files):
                path = Path(place) / name
                inode = path.stat().st_ino
                self.names[folder, name] = inode
                if inode not in self.open:
                    self.open[inode] = os.open(path, os.O_RDONLY)
                if name in files:
                    self.written[inode] = path.read_bytes()
        found = {name: inode for name, inode in self.names.items() if before.get(name) != inode}
        return found | dict.fromkeys(before.keys() - self.names.keys())

    def laid_out(self, moment: Moment, kind: str, rng: Random, target: Path) -> Path:
        """Write into `target` what the disk may hold where the power goes after `moment`."""
        names = changed(moment.names, chosen(moment.pending, kind, rng))
        target.mkdir()
        places, left = {self.root: target}, sorted(names)
        while ready := [name for name in left if name[0] in places]:
            for folder, text in ready:
                path, inode = places[folder] / text, names[folder, text]
                if inode in self.folders:
                    path.mkdir()
                    places[inode] = path
                else:
                    path.write_bytes(content(moment, inode, kind, rng))
            left = [name for name in left if name not in ready]
        return target


def changed(names: dict[Name, int], changes: list[Change]) -> dict[Name, int]:
    """The names after some operations."""
    found: Change = dict(names)
    for change in changes:
        found |= change
    return {name: inode for name, inode in found.items() if inode is not None}


def chosen(pending: list[Change], kind: str, rng: Random) -> list[Change]:
    """Which of the operations that nobody synced have reached the disk."""
    if kind == "nothing else":
        return []
    if kind == "a part in order":
        return pending[: rng.randrange(len(pending) + 1)]
    return [change for change in pending if kind == "all names" or rng.random() < 0.5]


def content(moment: Moment, inode: int, kind: str, rng: Random) -> bytes:
    """A file's bytes: those last synced, and of what was written since nothing, zeros, a part, or all."""
    whole = moment.written[inode]
    safe = moment.contents.get(inode, b"")
    if safe == whole or kind == "nothing else":
        return safe
    if kind == "all names":
        return safe.ljust(len(whole), b"\0")
    return rng.choice([safe, safe.ljust(len(whole), b"\0"), whole[: rng.randrange(len(whole) + 1)], whole])
