"""Rows that are in no stage yet, or never will be: the open stage, what is held, and late rows refused for good.

The three tables change together: `open/manifest.json` names their files by content and is replaced in one step. A file
that rotted is no dead end: its rows are those of the sources, as far as they are there, and the other tables stay.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from stages.coded import LOG_SCHEMA, ORDER
from stages.content import content_digest, write_parquet
from stages.errors import UserError
from stages.shapes import shaped
from stages.stage_files import COLUMNS
from stages.workspace import SCHEMA, Workspace, read_json, read_json_once, sha256_file, write_json

ROW = {name: LOG_SCHEMA[name] for name in COLUMNS}
FOLDERS = {"open": "open", "held": "held", "refused": "rejects"}
QUARANTINE = "quarantine"
DIGITS = 12
"""Of the content's digest in a file's name."""


@dataclass(frozen=True)
class Damage:
    """A file of the tables that is missing, or not the one that was written.

    Attributes:
        path: of the file.
        part: which table's, a field of `Waiting`; None for the manifest, without which tables are known by their names.
        rows: how many it held; None where nobody knows.
        digest: of its content.
    """

    path: Path
    part: str | None = None
    rows: int | None = None
    digest: str | None = None

    def sentence(self, after: Waiting) -> str:
        """What is lost, where the tables are `after` now."""
        said = f"{self.path}: missing or damaged, kept in {QUARANTINE}/ beside it"
        if self.part is None:
            return f"{said}; the tables it named were found by their names, and all files of the sources are read again"
        table: pl.DataFrame = getattr(after, self.part)
        if content_digest(table) == self.digest:
            return f"{said}; all of its rows ({table.height:,}) came back from the sources"
        held = "unknown" if self.rows is None else f"{self.rows:,}"
        said = f"{said}; rows held: {held}; from the sources, new ones included: {table.height:,}"
        least = 0 if self.rows is None else self.rows - table.height
        gone = f"at least {least:,} are gone" if least > 0 else "some may be gone"
        return f"{said}; {gone}: name files again that were taken with --new, or restore the file from a backup"


@dataclass(frozen=True)
class Waiting:
    """Rows outside the closed stages, in the log's order.

    Attributes:
        open: rows of the open stage.
        held: rows kept aside, with a `reason`; a later look takes up those whose reason is gone.
        refused: late rows under the policy `reject`, with a `reason`.
        files: `stages.taken.file_key` of the log's files whose rows are all in these tables or in the stages.
        damaged: files whose rows these tables lack.
    """

    open: pl.DataFrame
    held: pl.DataFrame
    refused: pl.DataFrame
    files: frozenset[str] = frozenset()
    damaged: tuple[Damage, ...] = ()


def load_waiting(workspace: Workspace) -> Waiting:
    """The stored tables, checked against their hashes; empty ones where nothing waits, or where a file is damaged.

    What is said of the log's files holds for the stages it was said with: for others none counts as taken, and nor does
    any where a table is damaged.
    """
    path = _manifest(workspace)
    found = _noted(path)
    if found is None:
        return _by_their_names(workspace)
    entries = {part: found["parts"].get(part) for part in FOLDERS}
    tables = {part: _read(workspace, part, entry) for part, entry in entries.items()}
    damaged = [
        Damage(workspace.root / entry["file"], part, entry["rows"], entry["digest"])
        for part, entry in entries.items()
        if entry is not None and tables[part] is None
    ]
    taken = found.get("files", ()) if found.get("stages") == _stages(workspace) and not damaged else ()
    present = {part: _empty(part) if table is None else table for part, table in tables.items()}
    return Waiting(**present, files=frozenset(taken), damaged=tuple(damaged))


def set_aside(waiting: Waiting) -> None:
    """Keep damaged files where the next `store_waiting` does not remove them."""
    for path in (damage.path for damage in waiting.damaged):
        if path.exists():
            aside = path.parent / QUARANTINE
            aside.mkdir(exist_ok=True)
            os.replace(path, aside / path.name)


def store_waiting(workspace: Workspace, waiting: Waiting) -> None:
    """Replace the stored tables; the same tables again write nothing."""
    path = _manifest(workspace)
    before = _noted(path) or {"parts": {}}
    parts = {part: _write(workspace, part, getattr(waiting, part), before["parts"].get(part)) for part in FOLDERS}
    after = {"schema": SCHEMA, "parts": parts, "stages": _stages(workspace), "files": sorted(waiting.files)}
    if after != before:
        write_json(path, after, seal=True)
        _sweep(workspace, parts)


def _stages(workspace: Workspace) -> str:
    """Digest of the closed stages."""
    return str(read_json_once(workspace.stages / "manifest.json")["digest"])


def in_order(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows in the log's order, each once."""
    return rows.unique().sort(*ORDER, nulls_last=False)


def without(rows: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """Rows that are not among `others`; two rows are one if all their fields agree, nulls included."""
    return rows.join(others, on=COLUMNS, how="anti", nulls_equal=True, maintain_order="left")


def with_reason(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Rows with the column `reason`."""
    return rows.select(*COLUMNS, reason=pl.lit(reason, pl.String))


def _manifest(workspace: Workspace) -> Path:
    return workspace.root / "open" / "manifest.json"


@dataclass(frozen=True)
class _Table:
    file: str
    rows: int
    digest: str
    sha256: str


def _noted(path: Path) -> dict[str, Any] | None:
    """What the manifest says; None where it is missing or damaged."""
    try:
        found = read_json(path) if path.is_file() else None
        parts = found.get("parts") if isinstance(found, dict) else None
        shaped(dict[str, _Table | None], parts, path, "not a list of the rows that wait", "")
    except UserError:
        return None
    return found


def _empty(part: str) -> pl.DataFrame:
    return pl.DataFrame(schema=ROW if part == "open" else {**ROW, "reason": pl.String()})


def _read(workspace: Workspace, part: str, entry: dict[str, Any] | None) -> pl.DataFrame | None:
    """A table as it was written; None where its file is missing or another one."""
    if entry is None:
        return _empty(part)
    path = workspace.root / entry["file"]
    return pl.read_parquet(path) if path.is_file() and sha256_file(path) == entry["sha256"] else None


def _by_their_names(workspace: Workspace) -> Waiting:
    """The tables without their manifest: a file's name holds the digest of its content.

    Rows that a kill left in an older file as well do no harm: the next look finds them in a stage, or takes them once.
    """
    path = _manifest(workspace)
    damaged = [Damage(path)] if path.is_file() else []
    tables = {}
    for part in FOLDERS:
        files = {path: _named(path) for path in _files(workspace, part)}
        damaged += [Damage(path, part) for path, rows in files.items() if rows is None]
        whole = [rows for rows in files.values() if rows is not None]
        tables[part] = in_order(pl.concat([_empty(part), *whole]))
    return Waiting(**tables, damaged=tuple(damaged))


def _named(path: Path) -> pl.DataFrame | None:
    """A table whose content is the one its name says, or None."""
    try:
        rows = pl.read_parquet(path, glob=False)
        return rows if content_digest(rows)[:DIGITS] == path.stem.rpartition("-")[2] else None
    except (OSError, pl.exceptions.PolarsError):
        return None


def _write(workspace: Workspace, part: str, rows: pl.DataFrame, before: dict[str, Any] | None) -> dict[str, Any] | None:
    if rows.is_empty():
        return None
    digest = content_digest(rows)
    if before is not None and before["digest"] == digest and (workspace.root / before["file"]).is_file():
        return before
    file = f"{FOLDERS[part]}/{_stem(part)}-{digest[:DIGITS]}.parquet"
    return {"file": file, "rows": rows.height, "digest": digest, "sha256": write_parquet(rows, workspace.root / file)}


def _stem(part: str) -> str:
    return "late" if part == "refused" else part


def _files(workspace: Workspace, part: str) -> list[Path]:
    return sorted((workspace.root / FOLDERS[part]).glob(f"{_stem(part)}-*.parquet"))


def _sweep(workspace: Workspace, kept: dict[str, Any]) -> None:
    for part in FOLDERS:
        for path in _files(workspace, part):
            if kept[part] is None or path != workspace.root / kept[part]["file"]:
                path.unlink()
