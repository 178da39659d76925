"""`history.jsonl`: every decision about the champion, a line each, appended and fsynced before anything follows it.

Each line carries the digest of itself and of the digest before it, so that one that rotted, went or came is noticed.
Lines of earlier versions have none; they count towards the next one that has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.workspace import Stamp, Workspace, digest_of, is_settled, remember_in, stamp_of, sync_folder

Entry = dict[str, Any]
DIGEST = "digest"
"""Key of a line that holds the digest of the rest, and of the line before."""
REMEDY = "put the file back from a copy, or move it away: champion.json then stands, and nothing can be gone back to"


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
    fresh = not path.exists()
    whole = json.loads(json.dumps({"schema": 1, **line}, allow_nan=False))
    whole[DIGEST] = _chained(_read(path)[2], whole)
    text = json.dumps(whole, ensure_ascii=False) + "\n"
    with path.open("ab") as handle:
        if handle.tell() and not _ends_whole(path):
            text = "\n" + text  # a kill tore the last line: it stays unreadable, and spoils nothing after it
        handle.write(text.encode())
        handle.flush()
        os.fsync(handle.fileno())
    if fresh:
        sync_folder(path.parent)
    return whole


def read_history(workspace: Workspace) -> tuple[list[Entry], int]:
    """The decisions, oldest first, and how many lines cannot be read (a kill may tear the last one).

    Raises:
        UserError: a line is not what was written.
    """
    lines, torn, _ = _read(history_file(workspace))
    return lines, torn


def _read(path: Path) -> tuple[list[Entry], int, str]:
    """Lines, how many are torn, and the digest of all; looked at once in this process while the file stays as it is."""
    if not path.is_file():
        return [], 0, ""
    stamp = stamp_of(path)
    known = _known.get(path)
    if known is None or known[0] != stamp:
        known = stamp, _checked(path)
        if is_settled(stamp):
            _known[path] = known
    lines, torn, chain = known[1]
    return list(lines), torn, chain


_known: dict[Path, tuple[Stamp, tuple[list[Entry], int, str]]] = {}
"""By file: what it held when it was this one; nobody writes to the lines."""
remember_in(_known)


def _checked(path: Path) -> tuple[list[Entry], int, str]:
    found: list[Entry] = []
    torn, chain = 0, ""
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        line = _parsed(text)
        if line is None:
            torn += bool(text)
            continue
        chain = _chained(chain, line)
        if line.get(DIGEST, chain) != chain:
            raise UserError(f"{path}: line {number}, or one before it, is not what was written; {REMEDY}")
        found.append(line)
    # A kill leaves a line without its end, and what is written after it begins a new one.
    ended = len(texts) > 1 and not texts[-1] and bool(texts[-2])
    if ended and _parsed(texts[-2]) is None and any(DIGEST in line for line in found):
        raise UserError(f"{path}: line {len(texts) - 1} is not what was written; {REMEDY}")
    return found, torn, chain


def _parsed(text: bytes) -> Entry | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "decision" in line else None


def _chained(before: str, line: Entry) -> str:
    return digest_of([before, {key: value for key, value in line.items() if key != DIGEST}])


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
