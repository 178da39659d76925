"""`history.jsonl`: every decision about the champion, a line each, appended and fsynced before anything follows it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stages.workspace import Workspace, sync_folder

Entry = dict[str, Any]


def history_file(workspace: Workspace) -> Path:
    """Where the lines are."""
    return workspace.root / "history.jsonl"


def append_line(workspace: Workspace, line: Entry) -> None:
    """Add a decision; it is on disk when this returns."""
    path = history_file(workspace)
    fresh = not path.exists()
    text = json.dumps({"schema": 1, **line}, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab") as handle:
        if handle.tell() and not _ends_whole(path):
            text = "\n" + text  # a kill tore the last line: it stays unreadable, and spoils nothing after it
        handle.write(text.encode())
        handle.flush()
        os.fsync(handle.fileno())
    if fresh:
        sync_folder(path.parent)


def read_history(workspace: Workspace) -> tuple[list[Entry], int]:
    """The decisions, oldest first, and how many lines cannot be read (a kill may tear the last one)."""
    path = history_file(workspace)
    found: list[Entry] = []
    torn = 0
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = json.loads(text) if text else None
        except ValueError:
            line = 0
        if isinstance(line, dict) and "decision" in line:
            found.append(line)
        elif line is not None:
            torn += 1
    return found, torn


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
