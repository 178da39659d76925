"""Stage files that rotted: rebuilt from the stored log and the sources, and believed only if their content is the old.

A workspace that has grown is never cut again, since what the log was first cut into is not all it holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import polars as pl

from stages.append import finish_commit
from stages.clock import instant
from stages.config import Config
from stages.content import content_digest
from stages.errors import UserError
from stages.log import load_log
from stages.packing import by_code, encoded
from stages.reading import read_events, silent
from stages.split import Stage, damaged_stages, is_grown
from stages.stage_files import COLUMNS, write_stage
from stages.waiting import QUARANTINE, in_order, load_waiting, without
from stages.workspace import Workspace, read_json, write_json


def mend_stages(config: Config, workspace: Workspace, progress: Callable[[str], None] = silent) -> list[int]:
    """Rebuild the stage files that are missing or not the ones that were written; damaged ones stay beside them.

    Args:
        config: names the sources.
        workspace: with stages.
        progress: receives a line a stage.

    Returns:
        The stages that were rebuilt; their digests, and hence the checkpoints, are as before.

    Raises:
        UserError: the rows of such a stage are no longer in the log and the sources.
    """
    finish_commit(workspace)
    damaged = damaged_stages(workspace)
    for place, stage in enumerate(damaged):
        candidates = _candidates(config, workspace, stage, damaged[place:])
        rows = next((rows for rows in candidates if _is(rows, stage)), None)
        if rows is None:
            remedy = "restore it from a backup" if is_grown(workspace) else "run driftrec split again"
            raise UserError(
                f"{workspace.root / stage.path}: stage {stage.index} is missing or damaged, and the log and the "
                f"sources do not give its rows any more; {remedy}"
            )
        _put(workspace, stage, rows)
        progress(f"stage {stage.index} was missing or damaged and is rebuilt with the same rows")
    return [stage.index for stage in damaged]


def _candidates(config: Config, workspace: Workspace, stage: Stage, damaged: list[Stage]) -> Iterator[pl.DataFrame]:
    """Rows in the log's order that may be the stage's: the likeliest and cheapest first."""
    logged = _logged(workspace)
    yield logged.filter(_within(stage))
    waiting = load_waiting(workspace)
    pool = in_order(pl.concat([logged, _sourced(config)]))
    for rows in (waiting.open, waiting.held, waiting.refused):
        pool = without(pool, rows.select(COLUMNS))
    yield pool.filter(_within(stage))
    # Late rows may lie in a later stage than their times say.
    rest = pool.filter(pl.col("timestamp") < instant(str(stage.end), "stage end"))
    for file in _others(workspace, damaged):
        rest = without(rest, pl.read_parquet(file, columns=list(COLUMNS), glob=False))
    yield rest.filter(_within(stage))
    yield rest


def _logged(workspace: Workspace) -> pl.DataFrame:
    try:
        return load_log(workspace)[0].select(COLUMNS)
    except UserError:  # it is gone or damaged, too
        return load_waiting(workspace).open.clear()


def _sourced(config: Config) -> pl.DataFrame:
    try:
        return read_events(config, silent).rows.select(COLUMNS)
    except UserError as error:
        raise UserError(f"a stage is damaged, and its rows cannot be taken from the sources: {error}") from None


def _within(stage: Stage) -> pl.Expr:
    """The stage's interval; rows from before the log belong to stage 0."""
    inside = pl.col("timestamp") < instant(str(stage.end), "stage end")
    return inside if stage.index == 0 else inside & (pl.col("timestamp") >= instant(str(stage.start), "stage start"))


def _others(workspace: Workspace, damaged: list[Stage]) -> list[str]:
    bad = {stage.path for stage in damaged}
    rows = read_json(workspace.stages / "manifest.json")["stages"]
    return [str(workspace.root / row["path"]) for row in rows if row["path"] not in bad]


def _is(rows: pl.DataFrame, stage: Stage) -> bool:
    """Whether the rows are the stage's, nulls and order included."""
    same = rows.height == stage.events
    return same and content_digest(by_code(rows, encoded(rows["user_id"]).codes)) == stage.digest


def _put(workspace: Workspace, stage: Stage, rows: pl.DataFrame) -> None:
    """Write the file and then its hash, since other versions of a library may pack the same rows into other bytes."""
    path = workspace.stage_file(stage.index)
    if path.exists():
        aside = workspace.stages / QUARANTINE
        aside.mkdir(exist_ok=True)
        os.replace(path, aside / f"stage={stage.index:02d}.parquet")
    _, sha256 = write_stage(path, rows, encoded(rows["user_id"]).codes)
    manifest = read_json(workspace.stages / "manifest.json")
    manifest["stages"][stage.index] = asdict(replace(stage, sha256=sha256))
    write_json(workspace.stages / "manifest.json", manifest, seal=True)
