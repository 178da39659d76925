"""Columns of numbers by the million: kept in memory while they are few, beyond that in a nameless file; and sorted so.

What sorts more rows than memory should hold deals them out to parts, by ranges of what it sorts by, and sorts a part
at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from stages.packing import Columns, Layout, Words, in_order
from stages.workspace import need_space

PART = 2**24
"""Rows that are sorted in memory at once."""
STRIDE = 64
"""Every so many rows one is looked at to find the parts' edges."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Spool:
    """Rows in the order they were added.

    Args:
        kept: so many rows stay in memory; with one more, all go to the file.
        folder: where the file lies. It has no name, so that nothing is left over when the process is killed.
    """

    def __init__(self, kept: int, folder: Path) -> None:
        self.rows = 0
        self._kept, self._folder = kept, folder
        self._held: list[Columns] = []
        self._file: IO[bytes] | None = None
        self._written: list[int] = []  # rows of each piece in the file
        self._types: dict[str, np.dtype[Any]] = {}

    def append(self, columns: Columns) -> None:
        """Add rows; every piece has the same columns."""
        self._types = self._types or {name: column.dtype for name, column in columns.items()}
        count = height(columns)
        if not count:
            return
        self.rows += count
        self._held.append(columns)
        if self.rows > self._kept:
            self._store()

    def _store(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by `close`)
        for piece in self._held:
            for name, kind in self._types.items():
                self._file.write(np.ascontiguousarray(piece[name], dtype=kind).data)
            self._written.append(height(piece))
        self._held.clear()

    def pieces(self) -> Iterator[Columns]:
        """The rows, in the pieces they came in."""
        if self._file is not None:
            self._file.seek(0)
        for count in self._written:
            yield {name: self._read(kind, count) for name, kind in self._types.items()}
        yield from self._held

    def _read(self, kind: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        found = np.empty(count, dtype=kind)
        if self._file is None or self._file.readinto(found.data) != found.nbytes:  # pyright: ignore
            raise OSError("a temporary file is shorter than what was written to it")
        return found

    def whole(self) -> Columns:
        """All rows in one piece."""
        found = {name: np.empty(self.rows, dtype=kind) for name, kind in self._types.items()}
        start = 0
        for piece in self.pieces():
            for name, column in piece.items():
                found[name][start : start + len(column)] = column
            start += height(piece)
        return found

    @property
    def bytes(self) -> int:
        """Size of all rows."""
        return self.rows * sum(kind.itemsize for kind in self._types.values())

    def close(self) -> None:
        """Forget the rows."""
        self._held.clear()
        if self._file is not None:
            self._file.close()


def height(columns: Columns) -> int:
    """Number of rows."""
    return len(next(iter(columns.values()))) if columns else 0


def taken(columns: Columns, places: npt.NDArray[Any] | slice) -> Columns:
    """The rows at `places`."""
    return {name: column[places] for name, column in columns.items()}


def sorted_rows(
    pieces: Iterable[Columns], layout: Layout, folder: Path, size: int, once: bool = False
) -> Iterator[Columns]:
    """The rows in order of their fields, `size` at a time; memory is that of `PART` rows, twice.

    Args:
        pieces: the rows.
        layout: the fields, the first one first.
        folder: where rows wait that are too many for memory.
        size: rows of what is returned, the last piece shorter.
        once: equal rows only the first time.
    """
    met, leading = Spool(PART, folder), []
    for piece in pieces:
        words = layout.packed(piece)
        leading.append(words[0][::STRIDE].copy())
        met.append(_named(words))
    parts = ahead(_parts(met, leading, folder), partial(_sorted, once=once))
    for piece in regular(parts, size):
        yield layout.unpacked(list(piece.values()))


def _named(words: list[Words]) -> Columns:
    return {str(number): word for number, word in enumerate(words)}


def _parts(met: Spool, leading: list[Words], folder: Path) -> list[Spool]:
    """The rows dealt out by their first words; equal ones are in one part."""
    count = ceil(met.rows / PART)
    if count < 2:
        return [met]
    need_space(folder, met.bytes)
    sample = np.sort(np.concatenate(leading))
    edges = sample[np.arange(1, count) * len(sample) // count]
    parts = [Spool(0, folder) for _ in range(count)]
    for piece in met.pieces():
        hands = np.searchsorted(edges, piece["0"], side="right").astype(np.uint16)
        dealt = taken(piece, np.argsort(hands, kind="stable"))
        ends = np.cumsum(np.bincount(hands, minlength=count)).tolist()
        for part, (low, high) in zip(parts, pairwise([0, *ends]), strict=True):
            part.append(taken(dealt, slice(low, high)))
    met.close()
    return parts


def _sorted(part: Spool, once: bool) -> Columns:
    words = list(part.whole().values())
    part.close()
    return _named(in_order(words, once)) if words else {}


def regular(pieces: Iterable[Columns], size: int) -> Iterator[Columns]:
    """The same rows in pieces of `size`, the last one shorter."""
    held: list[Columns] = []
    count = 0
    for piece in filter(height, pieces):
        held.append(piece)
        count += height(piece)
        if count < size:
            continue
        whole = _joined(held)
        full = count - count % size
        for start in range(0, full, size):
            yield taken(whole, slice(start, start + size))
        held, count = [taken(whole, slice(full, None))], count - full
    if count:
        yield _joined(held)


def _joined(pieces: list[Columns]) -> Columns:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """`work` of each item in order, one item ahead of the reader in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(work, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
