"""Rows that are in no stage yet, or never will be: the open stage, what is held, and late rows refused for good.

The three tables change together: `open/manifest.json` names their files by content and is replaced in one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from stages.coded import LOG_SCHEMA, ORDER
from stages.content import content_digest, write_parquet
from stages.errors import UserError
from stages.shapes import shaped
from stages.stage_files import COLUMNS
from stages.workspace import SCHEMA, Workspace, read_json, sha256_file, write_json

ROW = {name: LOG_SCHEMA[name] for name in COLUMNS}
FOLDERS = {"open": "open", "held": "held", "refused": "rejects"}


@dataclass(frozen=True)
class Waiting:
    """Rows outside the closed stages, in the log's order.

    Attributes:
        open: rows of the open stage.
        held: rows kept aside, with a `reason`; a later look takes up those whose reason is gone.
        refused: late rows under the policy `reject`, with a `reason`.
        files: `stages.taken.file_key` of the log's files whose rows are all in these tables or in the stages.
    """

    open: pl.DataFrame
    held: pl.DataFrame
    refused: pl.DataFrame
    files: frozenset[str] = frozenset()


def load_waiting(workspace: Workspace) -> Waiting:
    """The stored tables, checked against their hashes; empty ones where nothing waits.

    What is said of the log's files holds for the stages it was said with: for others none counts as taken.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = _manifest(workspace)
    found = _noted(path)
    tables = {part: _read(workspace, part, found["parts"].get(part)) for part in FOLDERS}
    files = found.get("files", ()) if found.get("stages") == _stages(workspace) else ()
    return Waiting(**tables, files=frozenset(files))


def store_waiting(workspace: Workspace, waiting: Waiting) -> None:
    """Replace the stored tables; the same tables again write nothing."""
    path = _manifest(workspace)
    before = _noted(path)
    parts = {part: _write(workspace, part, getattr(waiting, part), before["parts"].get(part)) for part in FOLDERS}
    after = {"schema": SCHEMA, "parts": parts, "stages": _stages(workspace), "files": sorted(waiting.files)}
    if after != before:
        write_json(path, after, seal=True)
        _sweep(workspace, parts)


def _stages(workspace: Workspace) -> str:
    """Digest of the closed stages."""
    return str(read_json(workspace.stages / "manifest.json")["digest"])


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
    digest: str
    sha256: str


def _noted(path: Path) -> dict[str, Any]:
    """The manifest; without one no table was written."""
    found = read_json(path) if path.is_file() else {"parts": {}}
    parts = found.get("parts") if isinstance(found, dict) else None
    remedy = "remove it to take its rows from the sources again"
    shaped(dict[str, _Table | None], parts, path, "not a list of the rows that wait", remedy)
    return found


def _read(workspace: Workspace, part: str, entry: dict[str, Any] | None) -> pl.DataFrame:
    if entry is None:
        return pl.DataFrame(schema=ROW if part == "open" else {**ROW, "reason": pl.String()})
    path = workspace.root / entry["file"]
    if not path.is_file() or sha256_file(path) != entry["sha256"]:
        raise UserError(
            f"{path}: missing, or not the file that was written; remove {_manifest(workspace)} to take its rows from "
            "the sources again"
        )
    return pl.read_parquet(path)


def _write(workspace: Workspace, part: str, rows: pl.DataFrame, before: dict[str, Any] | None) -> dict[str, Any] | None:
    if rows.is_empty():
        return None
    digest = content_digest(rows)
    if before is not None and before["digest"] == digest:
        return before
    file = f"{FOLDERS[part]}/{_stem(part)}-{digest[:12]}.parquet"
    return {"file": file, "rows": rows.height, "digest": digest, "sha256": write_parquet(rows, workspace.root / file)}


def _stem(part: str) -> str:
    return "late" if part == "refused" else part


def _sweep(workspace: Workspace, kept: dict[str, Any]) -> None:
    for part, folder in FOLDERS.items():
        for path in (workspace.root / folder).glob(f"{_stem(part)}-*.parquet"):
            if kept[part] is None or path != workspace.root / kept[part]["file"]:
                path.unlink()
