"""The item table as it was read, `catalogue/raw.parquet`, and beside it the note by which rot is noticed.

Rows are added and never changed: another text would be another vector. A file that rotted is no dead end: its rows are
those of the sources, and whoever has codes keeps them, whatever the sources say of it by now (`stages.items`).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import polars as pl

from stages.config import Config
from stages.content import content_digest, write_parquet
from stages.errors import UserError
from stages.reading import ITEM_SCHEMA, read_items
from stages.waiting import QUARANTINE
from stages.workspace import SCHEMA, Workspace, read_json, replacing, sha256_file, write_json

log = logging.getLogger("stages.item_table")


def store_item_table(workspace: Workspace, rows: pl.DataFrame, mended: bool = False) -> None:
    """Write the rows and their note; killed between the two, the file that is there still has its note.

    Args:
        workspace: where.
        rows: the whole table.
        mended: they stand in for others, which are lost.
    """
    path = _file(workspace)
    before = _digest(path) if is_whole(workspace) else None
    with replacing(path) as temporary:
        sha256 = write_parquet(rows, temporary)
        note = {"schema": SCHEMA, "sha256": sha256, "content": content_digest(rows), "mended": mended}
        write_json(_note_file(workspace), {**note, "before": None if before == sha256 else before}, seal=True)


def read_item_table(workspace: Workspace) -> pl.DataFrame:
    """The rows, of a file that `mend_item_table` has looked at; none where there never was one."""
    path = _file(workspace)
    return pl.read_parquet(path, columns=list(ITEM_SCHEMA)) if path.is_file() else pl.DataFrame(schema=ITEM_SCHEMA)


def is_whole(workspace: Workspace) -> bool:
    """Whether the file is the one that was written, as far as anything vouches for it."""
    note = _note(workspace)
    if note is not None:
        return _digest(_file(workspace)) in {note["sha256"], note["before"]} - {None}
    try:  # an earlier version wrote no note, but what the catalogue was built of
        return _digest(_file(workspace)) == read_json(workspace.catalogue / "manifest.json")["inputs"]["raw"]
    except (UserError, KeyError):
        return True


def is_mended(workspace: Workspace) -> bool:
    """Whether the rows stand in for others, which the codes were made from."""
    note = _note(workspace)
    return note is not None and note["mended"]


def mend_item_table(config: Config, workspace: Workspace) -> str | None:
    """Take the rows from the sources where the file is missing or damaged; it is kept in `catalogue/quarantine/`.

    Args:
        config: names the sources.
        workspace: where the file is.

    Returns:
        SHA-256 of the file; None where there never was one.

    Raises:
        UserError: the sources cannot be read any more.
    """
    path = _file(workspace)
    if not is_whole(workspace):
        fault = f"{path}: missing, or not the file that was written"
        try:
            rows = read_items(config)
        except UserError as error:
            raise UserError(
                f"{fault}, and the item table cannot be read anew: {error}; put its files back, or restore "
                f"{path.name} from a backup"
            ) from None
        note = _note(workspace)
        same = note is not None and note["content"] == content_digest(rows)
        _set_aside(path)
        # A kill may have left the note of rows that are mended, and no such file.
        store_item_table(workspace, rows, mended=not same or is_mended(workspace))
        now = "and are the same" if same else "as they are now, and items that have codes keep them"
        log.warning("%s; its rows are read from the sources, %s", fault, now)
    return _digest(path)


def _set_aside(path: Path) -> None:
    if path.is_file():
        aside = path.parent / QUARANTINE
        aside.mkdir(exist_ok=True)
        os.replace(path, aside / path.name)


def _note(workspace: Workspace) -> dict[str, Any] | None:
    path = _note_file(workspace)
    if not path.is_file():
        return None
    try:
        note = read_json(path)
    except UserError:
        return None
    return note if isinstance(note, dict) and note.keys() >= {"sha256", "before", "content", "mended"} else None


def _file(workspace: Workspace) -> Path:
    return workspace.catalogue / "raw.parquet"


def _note_file(workspace: Workspace) -> Path:
    return workspace.catalogue / "raw.json"


def _digest(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None
