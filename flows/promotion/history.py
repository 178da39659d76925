"""`history.jsonl`: every decision about the champion, a line each, appended and fsynced before anything follows it.

Each line carries the digest of itself and of the digest before it, so that one that rotted, went or came is noticed.
Lines of earlier versions have none; they count towards the next one that has. `history_end.json` names the last line.
It is written behind it and before champion.json moves: a decision in force is missed where it is gone, and one that a
kill tore, which never was in force, is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.shapes import shaped
from stages.workspace import (
    Stamp,
    Workspace,
    digest_of,
    is_settled,
    read_json,
    remember_in,
    stamp_of,
    sync_folder,
    write_json,
)

Entry = dict[str, Any]
DIGEST = "digest"
"""Key of a line that holds the digest of the rest, and of the line before."""
END = "history_end.json"
"""How many decisions there are, and the digest of the last; none where an earlier version decided."""
REMEDY = "put the file back from a copy, or move it away: champion.json then stands, and nothing can be gone back to"
log = logging.getLogger("flows.history")


@dataclass(frozen=True)
class _End:
    lines: int
    digest: str


@dataclass(frozen=True)
class _Held:
    """What the file holds.

    Attributes:
        lines: those that can be read; nobody writes to them.
        chain: of each of them the digest of it and of all before.
        torn: how many others there are.
    """

    lines: list[Entry]
    chain: list[str]
    torn: int

    @property
    def last(self) -> str:
        return self.chain[-1] if self.chain else ""


def history_file(workspace: Workspace) -> Path:
    """Where the lines are."""
    return workspace.root / "history.jsonl"


def append_line(workspace: Workspace, line: Entry) -> Entry:
    """Add a decision; it is on disk when this returns.

    Returns:
        The line as it stands there.

    Raises:
        UserError: the lines before it are not what was written.
    """
    path = history_file(workspace)
    before = _read(path)
    fresh = not path.exists()
    if fresh:  # one that was moved away has no say in a new one
        path.with_name(END).unlink(missing_ok=True)
    whole = json.loads(json.dumps({"schema": 1, **line}, allow_nan=False))
    whole[DIGEST] = _chained(before.last, whole)
    text = json.dumps(whole, ensure_ascii=False) + "\n"
    with path.open("ab") as handle:
        if handle.tell() and not _ends_whole(path):
            text = "\n" + text  # a kill tore the last line: it stays unreadable, and spoils nothing after it
        handle.write(text.encode())
        handle.flush()
        os.fsync(handle.fileno())
    if fresh:
        sync_folder(path.parent)
    _name_end(path, _End(len(before.lines) + 1, whole[DIGEST]))
    return whole


def read_history(workspace: Workspace) -> tuple[list[Entry], int]:
    """The decisions, oldest first, and how many lines cannot be read (a kill may tear the last one).

    Raises:
        UserError: a line is not what was written, or the last decision is not there.
    """
    held = _read(history_file(workspace))
    return list(held.lines), held.torn


def confirm(workspace: Workspace) -> None:
    """Name the last line where nobody has: a kill came between the two, or an earlier version wrote it.

    Raises:
        UserError: as `read_history`.
    """
    path = history_file(workspace)
    held = _read(path)
    end = _End(len(held.lines), held.last)
    if held.lines and _named_end(path) != end:
        _name_end(path, end)


def _read(path: Path) -> _Held:
    # The end comes first: a decision taken meanwhile may be one more than it names, and never one less.
    end = _named_end(path)
    held = _held(path)
    if end is not None and path.is_file() and held.chain[end.lines - 1 : end.lines] != [end.digest]:
        raise UserError(
            f"{path}: decision {end.lines}, which {END} names, is altered or gone; {REMEDY}; "
            f"or remove {END}: the decisions that are left then stand"
        )
    return held


def see_end(workspace: Workspace) -> None:
    """Refuse a `history_end.json` that cannot be read: until it is written anew no lost decision is missed.

    Raises:
        UserError: it is damaged, or of another shape.
    """
    _end_in(history_file(workspace).with_name(END))


def _end_in(place: Path) -> _End | None:
    return shaped(_End, read_json(place), place, "not a history's end", "remove it") if place.is_file() else None


def _named_end(path: Path) -> _End | None:
    place = path.with_name(END)
    try:
        return _end_in(place)
    except UserError:
        log.warning("%s: unreadable; the next run writes it anew, and until then no lost decision is missed", place)
        return None


def _name_end(path: Path, end: _End) -> None:
    write_json(path.with_name(END), {"schema": 1, "lines": end.lines, "digest": end.digest}, seal=True)


def _held(path: Path) -> _Held:
    """The lines; looked at once in this process while the file stays as it is."""
    if not path.is_file():
        return _Held([], [], 0)
    stamp = stamp_of(path)
    known = _known.get(path)
    if known is None or known[0] != stamp:
        known = stamp, _checked(path)
        if is_settled(stamp):
            _known[path] = known
    return known[1]


_known: dict[Path, tuple[Stamp, _Held]] = {}
"""By file: what it held when it was this one."""
remember_in(_known)


@dataclass(frozen=True)
class _Begun:
    """What the whole lines at the beginning of a file hold: those that were there when it was read last.

    Attributes:
        size: how many bytes they are.
        sha256: of those bytes.
        lines: as of `_Held`.
        chain: as of `_Held`.
        bad: numbers of the lines that cannot be read.
        count: how many lines they are.
    """

    size: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    lines: tuple[Entry, ...] = ()
    chain: tuple[str, ...] = ()
    bad: tuple[int, ...] = ()
    count: int = 0


_begun: dict[Path, _Begun] = {}
"""By file: its beginning. A decision is a line more, and chaining all before it anew takes longer with each."""
remember_in(_begun)


def _checked(path: Path) -> _Held:
    content = path.read_bytes()
    begun = _begun.get(path, _Begun())
    hashed = hashlib.sha256(content[: begun.size])
    if hashed.hexdigest() != begun.sha256:
        begun, hashed = _Begun(), hashlib.sha256()
    found, chain, bad = list(begun.lines), list(begun.chain), list(begun.bad)
    texts = content[begun.size :].split(b"\n")
    for number, text in enumerate(texts, start=begun.count + 1):
        before = chain[-1] if chain else ""
        line = _parsed(text) or _without_end(text, before)
        if line is None:
            bad += [number] if text else []
            continue
        chain.append(_chained(before, line))
        if line.get(DIGEST, chain[-1]) != chain[-1]:
            raise UserError(f"{path}: line {number}, or one before it, is not what was written; {REMEDY}")
        found.append(line)
    count = begun.count + len(texts) - 1
    # A kill leaves a line without its end, and what is written after it begins a new one.
    if not texts[-1] and bad[-1:] == [count]:
        raise UserError(f"{path}: line {bad[-1]} is not what was written; {REMEDY}")
    if not texts[-1]:
        hashed.update(content[begun.size :])
        _begun[path] = _Begun(len(content), hashed.hexdigest(), tuple(found), tuple(chain), tuple(bad), count)
    return _Held(found, chain, len(bad))


def _parsed(text: bytes) -> Entry | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "decision" in line else None


def _without_end(text: bytes, before: str) -> Entry | None:
    """A line that is whole by its digest, and behind which something else came of its end."""
    line = _parsed(text[:-1])
    return line if line is not None and line.get(DIGEST) == _chained(before, line) else None


def _chained(before: str, line: Entry) -> str:
    return digest_of([before, {key: value for key, value in line.items() if key != DIGEST}])


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
