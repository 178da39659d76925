"""How a stage's events are stored: by user, then in the log's order; from a frame, or from a log of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stages.coded import LOG_SCHEMA, NEVER, Coded, fields
from stages.content import CHUNK, digest_and_sink, digest_and_write
from stages.packing import Columns, Field, Layout, Ticks, by_code
from stages.spool import height, sorted_rows
from stages.workspace import Workspace, read_json, read_json_once, replacing, sha256_file, write_json

COLUMNS = ("user_id", "item_id", "timestamp", "event", "query")
NUMBERED = ("user", "time", "item", "event", "query")


def write_stage(path: Path, rows: pl.DataFrame, users: npt.NDArray[Any]) -> tuple[str, str]:
    """Write one stage's rows, given in the log's order; returns their content digest and the file's SHA-256.

    Args:
        path: of the stage's file.
        rows: N events.
        users: (N,) the users as numbers in the order of their ids.
    """
    # The log is stored in time order (without a clock: each user's events in the file's order), so that a row's place
    # says the rest: by user, then by time, item, event and query.
    return digest_and_write(by_code(rows.select(COLUMNS), users), path)


def write_run(log: Coded, path: Path, low: int, high: int) -> tuple[str, str]:
    """`write_stage` of rows low to high of a coded log."""
    schema = pl.Schema({name: LOG_SCHEMA[name] for name in COLUMNS})
    # The log stands in the order of time.
    first, last = (log.time_at(row) if low < high else 0 for row in (low, high - 1))
    user, *rest = (fields(log.names, Ticks(first, last, log.step))[name] for name in NUMBERED)
    if first == NEVER:
        # Without a clock only its place says which of a user's rows comes first.
        rest = [Field("place", np.int64, high, 0), *rest]
    pieces = sorted_rows(_numbered(log, low, high), Layout([user, *rest]), log.path.parent, CHUNK)
    frames = (log.frame(piece).select(COLUMNS) for piece in pieces)
    with replacing(path) as temporary:
        digest = digest_and_sink(frames, schema, high - low, temporary)
    return digest, sha256_file(path)


def _numbered(log: Coded, low: int, high: int) -> Iterator[Columns]:
    for piece in log.columns(low, high, NUMBERED):
        yield piece | {"place": np.arange(low, low + height(piece))}
        low += height(piece)


TOGETHER = "events.parquet"
"""In the stages' folder of an exported model, in place of a file a stage: all rows, with their `stage`."""


def read_stages(workspace: Workspace, wanted: Sequence[int], columns: Sequence[str]) -> pl.DataFrame:
    """Rows of some stages, one after the other, with their `stage`.

    In one read: opened one by one, hundreds of small files take longer than a stage's training.

    Args:
        workspace: holds the stages.
        wanted: numbers of stages, rising, at least one.
        columns: wanted of each file.
    """
    together = workspace.stages / TOGETHER
    if together.exists():
        found = pl.scan_parquet(together, glob=False).filter(pl.col("stage").is_in(list(wanted)))
        return found.select(*columns, "stage").collect()
    files = [str(workspace.stage_file(index)) for index in wanted]
    found = pl.scan_parquet(files, glob=False, hive_partitioning=False, include_file_paths="stage")
    numbers = pl.col("stage").replace_strict(files, list(wanted), return_dtype=pl.Int64)
    return found.select(*columns, numbers).collect()


def stage_rows(workspace: Workspace) -> list[dict[str, Any]]:
    """What `stages/manifest.json` says of each stage; nobody writes to it.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_json_once(workspace.stages / "manifest.json")["stages"]


def write_together(workspace: Workspace, folder: Path) -> None:
    """Write the stages of `workspace` into another's folder of stages as one file, and the manifest that names it."""
    manifest = read_json(workspace.stages / "manifest.json")
    folder.mkdir(parents=True)
    rows = read_stages(workspace, range(len(manifest["stages"])), COLUMNS)
    with replacing(folder / TOGETHER) as temporary:
        rows.write_parquet(temporary)
    write_json(folder / "manifest.json", {**manifest, "together": sha256_file(folder / TOGETHER)}, seal=True)


def stage_files(workspace: Workspace, manifest: Mapping[str, Any]) -> dict[Path, str | None]:
    """The files that hold the stages, with the SHA-256 that the stages' manifest gives each (early ones: none)."""
    if "together" in manifest:
        return {workspace.stages / TOGETHER: manifest["together"]}
    return {workspace.stage_file(index): row.get("sha256") for index, row in enumerate(manifest["stages"])}


def counted(log: Coded, name: str, low: int, high: int) -> npt.NDArray[np.int64]:
    """How often each `user` or `item` is met in rows low to high of the log."""
    counts = np.zeros(len(log.names[name]), dtype=np.int64)
    for columns in log.columns(low, high, only=(name,)):
        counts += np.bincount(columns[name], minlength=len(counts))
    return counts


def first_met(stages: Iterable[npt.NDArray[np.bool_]]) -> list[tuple[int, int]]:
    """By stage: how many names are there, and how many of them no earlier stage has.

    Args:
        stages: (names,) which of them a stage has.
    """
    seen, counts = None, []
    for here in stages:
        fresh = here if seen is None else here & ~seen
        counts.append((int(here.sum()), int(fresh.sum())))
        seen = here if seen is None else seen | here
    return counts
