"""New rows for a workspace whose stages are committed: which are new, which come late, and which stages close.

Every look goes through all files of the sources and tells rows apart by their content, so that the same files twice
change nothing and a missed look loses nothing; a file whose bytes an earlier look took whole is not read again.
Committed stages keep their bytes, hence their digests and checkpoints, unless the policy for late rows is `rebuild`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stages.clock import instant
from stages.closing import closings
from stages.config import Config, expand
from stages.content import write_parquet
from stages.errors import UserError
from stages.interactions import used_objectives
from stages.item_table import mend_item_table, read_item_table, store_item_table
from stages.items import coded_items, coded_stages
from stages.packing import encoded, encoded_all
from stages.reading import Incoming, read_events, read_items
from stages.split import Stage, described, digest_of_stages, load_stages
from stages.stage_files import COLUMNS, first_met, read_stages, stage_rows, write_stage
from stages.waiting import Waiting, in_order, load_waiting, set_aside, store_waiting, with_reason, without
from stages.workspace import Workspace, make_folder, need_space, read_json, sync_folder, write_json

LATE = "late: older than the last closed stage's end"
FUTURE = "later than the clock by more than retrain.future_hours"
Progress = Callable[[str], None]
log = logging.getLogger("stages.append")


@dataclass(frozen=True)
class Intake:
    """What one look at the sources found and did; all but `unread` and `reason` of the first eight count rows.

    Attributes:
        read: accepted rows of the files read, duplicates dropped.
        refused: rows of those files that break a rule of the log; they are in `rejects/retrain.parquet`.
        reason: why most of them do; empty without any.
        unread: files that an earlier look has taken whole.
        taken: rows that came into the open stage (and perhaps into a closed one at once).
        late: rows met for the first time that are older than the last closed stage's end.
        held: all rows kept aside in `held/`, late and future-dated ones.
        open: rows in the open stage afterwards.
        closed: stages closed now.
        rebuilt: committed stages into which late rows were put.
        end: end of the last closed stage, ISO: the watermark.
    """

    read: int
    refused: int
    reason: str
    unread: int
    taken: int
    late: int
    held: int
    open: int
    closed: tuple[int, ...]
    rebuilt: tuple[int, ...]
    end: str

    def sentence(self) -> str:
        """All of it in one line."""
        closed = f"closed stage {', '.join(map(str, self.closed))}" if self.closed else "no stage closed"
        rebuilt = f", rebuilt stage {', '.join(map(str, self.rebuilt))}" if self.rebuilt else ""
        unread = f", {_some(self.unread, 'file')} unchanged" if self.unread else ""
        refused = f", {self.refused:,} refused (most often: {self.reason})" if self.refused else ""
        return (
            f"{_some(self.read, 'row')} read{refused}{unread}, {self.taken:,} new, {self.late:,} late, "
            f"{self.held:,} held; {closed}{rebuilt}; {_some(self.open, 'row')} in the open stage from {self.end}"
        )


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@dataclass(frozen=True)
class _Look:
    """Every row outside the stages, sorted by what becomes of it."""

    fresh: pl.DataFrame
    late: pl.DataFrame
    future: pl.DataFrame
    refused: pl.DataFrame


def take_new_rows(
    config: Config,
    workspace: Workspace,
    new: str | None = None,
    close_now: bool = False,
    dry_run: bool = False,
    now: datetime | None = None,
    progress: Progress = lambda _: None,
) -> Intake:
    """Take what is new in the sources into the open stage, and close it where its rule says so.

    Args:
        config: `config.retrain` has the rules.
        workspace: with committed stages.
        new: file, folder or glob to read instead of the sources, in the form of the config's only source.
        close_now: close the open stage whatever the rule says, if it holds a row.
        dry_run: only say what would happen; nothing is written.
        now: the clock, for rows dated in the future; absent: the machine's.
        progress: receives a line a file.

    Raises:
        UserError: no stages yet, a log without a clock or without an event that the gate looks at, unreadable sources,
            more refused rows than `retrain.refused_share` allows, or damaged files.
    """
    _see_clock(config)
    if not dry_run:
        finish_commit(workspace)
    stages, waiting = load_stages(workspace), _sound(load_waiting(workspace), new)
    end = _end_of(stages[-1])
    incoming = _incoming(config, new, progress, waiting)
    if not dry_run:
        _store_rejects(workspace, incoming.rejects)
    _see_refused(config, incoming)
    look = _look(config, workspace, incoming, waiting, end, now or datetime.now(UTC))
    opened, after, misplaced = _by_policy(config, look)
    _see_objective(config, workspace, opened)
    met = pl.concat([waiting.open, waiting.held.select(COLUMNS)])
    started = _started(opened, end)
    edges = closings(started["at"], config.retrain.close, close_now)
    rest = started.filter(pl.col("at") >= edges[-1]).drop("at") if edges else opened
    rebuilt = _misplaced_by_stage(stages, misplaced)
    if not dry_run and (edges or rebuilt):
        _commit(config, workspace, stages, started, edges, rebuilt)
    _tell(waiting, replace(after, open=opened))
    if not dry_run:
        set_aside(waiting)
        store_waiting(workspace, replace(after, open=in_order(rest), files=waiting.files | incoming.clean))
    return Intake(
        read=incoming.rows.height,
        refused=incoming.rejects.height,
        reason=incoming.often(),
        unread=incoming.unread,
        taken=without(opened, waiting.open).height,
        late=without(look.late, met).height,
        held=after.held.height,
        open=rest.height,
        closed=tuple(range(len(stages), len(stages) + len(edges))),
        rebuilt=tuple(sorted(rebuilt)),
        end=edges[-1].isoformat() if edges else end.isoformat(),
    )


def _see_clock(config: Config) -> None:
    if config.log.kind != "events":
        raise UserError(
            f'log.kind = "{config.log.kind}" has no clock; retraining needs rows of events with their times'
        )


def _sound(waiting: Waiting, new: str | None) -> Waiting:
    """The tables as they are: damaged ones only where the sources are read, which may give their rows back."""
    if waiting.damaged and new is not None:
        raise UserError(
            f"{waiting.damaged[0].path}: missing or damaged; run once without --new to take its rows from the sources"
        )
    return waiting


def _started(opened: pl.DataFrame, end: datetime) -> pl.DataFrame:
    """The rows by the time `at` which they count in the open stage: their own, for late ones the stage's beginning."""
    at = pl.max_horizontal("timestamp", pl.lit(end, pl.Datetime("us", "UTC")))
    return opened.with_columns(at=at).sort("at", maintain_order=True)


def _end_of(stage: Stage) -> datetime:
    if stage.end is None:
        raise UserError(f"stage {stage.index} has no end; retraining needs stages cut from rows with times")
    return instant(stage.end, f"stage {stage.index}")


def _incoming(config: Config, new: str | None, progress: Progress, waiting: Waiting) -> Incoming:
    """What the sources hold, or the files given; sources that a damaged table's rows must come from are not empty."""
    if new is None:
        return read_events(config, progress, waiting.files, quiet=not waiting.damaged, growing=True)
    if len(config.log.sources) != 1 or config.log.sources[0].distinct:
        raise UserError(
            f"--new {new}: needs a config with one log source and without `distinct`, whose form the files have; "
            "put them where log.sources finds them, and leave --new out"
        )
    source = config.log.sources[0].model_copy(update={"path": files_named(new)})
    log = config.log.model_copy(update={"sources": [source]})
    return read_events(config.model_copy(update={"log": log}), progress, waiting.files)


def _tell(before: Waiting, after: Waiting) -> None:
    """Warn of what is lost with damaged files, as far as a count of rows shows it."""
    for damage in before.damaged:
        log.warning(damage.sentence(after))


def files_named(new: str) -> str:
    """The file, folder or glob given in place of the sources, wherever the run's process works.

    Raises:
        UserError: an empty text, which would name the working folder with all that lies below it.
    """
    if not new.strip():
        raise UserError(f"--new {new!r}: names nothing; give a file, a folder or a glob, or leave it out")
    return os.path.abspath(expand(new))


def _see_refused(config: Config, incoming: Incoming) -> None:
    most = config.retrain.refused_share
    if incoming.refused_share > most:
        refused, read = incoming.rejects.height, incoming.accepted + incoming.rejects.height
        raise UserError(
            f"{refused:,} of {_some(read, 'row')} read were refused (most often: {incoming.often()}; the first is in "
            f"{incoming.rejects['file'][0]}), more than retrain.refused_share = {most:g}; nothing was taken; mend or "
            "remove the files, or raise the share"
        )


def _see_objective(config: Config, workspace: Workspace, opened: pl.DataFrame) -> None:
    wanted = config.retrain.gate.objective
    if not (opened["event"] == wanted).any() and wanted not in used_objectives(workspace, None):
        raise UserError(
            f'retrain.gate.objective = "{wanted}", but neither the stages nor the new rows hold such an event, so that '
            "no challenger could ever pass; let the gate look at the other objective"
        )


def _look(
    config: Config,
    workspace: Workspace,
    incoming: Incoming,
    waiting: Waiting,
    end: datetime,
    now: datetime,
) -> _Look:
    pool = in_order(pl.concat([incoming.rows.select(COLUMNS), waiting.open, waiting.held.select(COLUMNS)]))
    pool = without(pool, waiting.refused.select(COLUMNS))
    old, later = pool.filter(pl.col("timestamp") < end), pool.filter(pl.col("timestamp") >= end)
    late = without(old, _committed_rows(workspace, COLUMNS)) if old.height else old
    ahead = pl.col("timestamp") > now + timedelta(hours=config.retrain.future_hours)
    return _Look(later.filter(~ahead), late, later.filter(ahead), waiting.refused)


def _committed_rows(workspace: Workspace, columns: tuple[str, ...]) -> pl.DataFrame:
    """Rows of all committed stages."""
    return read_stages(workspace, range(len(stage_rows(workspace))), columns).drop("stage")


def _by_policy(config: Config, look: _Look) -> tuple[pl.DataFrame, Waiting, pl.DataFrame]:
    """Rows of the open stage, what waits beside it, and late rows that belong into committed stages."""
    held, refused = with_reason(look.future, FUTURE), look.refused
    opened, misplaced = look.fresh, look.late.clear()
    match config.retrain.late:
        case "hold":
            held = pl.concat([with_reason(look.late, LATE), held])
        case "next_stage":
            opened = in_order(pl.concat([look.late, look.fresh]))
        case "reject":
            refused = pl.concat([refused, with_reason(look.late, LATE)])
        case "rebuild":
            misplaced = look.late
    return opened, Waiting(opened, in_order(held), in_order(refused)), misplaced


def _misplaced_by_stage(stages: list[Stage], late: pl.DataFrame) -> dict[int, pl.DataFrame]:
    """Late rows by the stage whose interval they lie in; rows from before the log belong to stage 0."""
    ends = pl.Series([_end_of(stage) for stage in stages])
    places = ends.search_sorted(late["timestamp"], side="right") if late.height else pl.Series([], dtype=pl.UInt32)
    staged = late.with_columns(stage=pl.Series(places, dtype=pl.Int64))
    return {int(rows["stage"][0]): rows.drop("stage") for rows in staged.partition_by("stage")}


def _commit(
    config: Config,
    workspace: Workspace,
    stages: list[Stage],
    started: pl.DataFrame,
    edges: list[datetime],
    rebuilt: dict[int, pl.DataFrame],
) -> None:
    """Write new and rebuilt stages beside the old ones, then make all of them visible with one manifest."""
    ready = workspace.stages / ".next"
    shutil.rmtree(ready, ignore_errors=True)
    need_space(workspace.root, int(started.estimated_size()))
    changed = {index: in_order(pl.concat([_stage_rows(workspace, index), rows])) for index, rows in rebuilt.items()}
    starts = [_end_of(stages[-1]), *edges]
    for place, (start, end) in enumerate(zip(starts, edges, strict=False)):
        rows = started.filter((pl.col("at") >= start) & (pl.col("at") < end)).drop("at")
        changed[len(stages) + place] = in_order(rows)
    digests = [(stage.digest, stage.sha256) for stage in stages] + [("", "")] * len(edges)
    for index, rows in changed.items():
        digests[index] = write_stage(_ready(workspace, index), rows, encoded(rows["user_id"]).codes)
    spans = [(stage.start, stage.end) for stage in stages]
    spans += [(start.isoformat(), end.isoformat()) for start, end in zip(starts, edges, strict=False)]
    manifest = read_json(workspace.stages / "manifest.json")
    late = {len(stages) + place: changed[len(stages) + place] for place in range(len(edges))}
    manifest["appended"] = [
        *manifest.get("appended", []),
        *({"index": index, "late": _older(rows, spans[index][0])} for index, rows in late.items()),
    ]
    manifest["close"] = config.retrain.close.model_dump(exclude_none=True)
    starts, staged = _staged(workspace, len(digests), changed)
    users, items = encoded_all([staged["user_id"], staged["item_id"]])
    met, found = (first_met(column.present(starts)) for column in (users, items))
    stages = described(starts, met, found, digests, spans)
    manifest |= {"digest": digest_of_stages(stages), "stages": [dict(vars(stage)) for stage in stages]}
    # From here on the commit is decided: `finish_commit` ends it after a kill.
    write_json(workspace.stages / "next.json", manifest, seal=True)
    finish_commit(workspace)


def _older(rows: pl.DataFrame, start: str | None) -> int:
    return rows.filter(pl.col("timestamp") < instant(str(start), "stage start")).height


def _stage_rows(workspace: Workspace, index: int) -> pl.DataFrame:
    return pl.read_parquet(workspace.stage_file(index)).select(COLUMNS)


def _staged(workspace: Workspace, count: int, changed: dict[int, pl.DataFrame]) -> tuple[list[int], pl.DataFrame]:
    """First row of each stage and the number of rows; user_id and item_id of every row, stage by stage."""
    columns, committed = COLUMNS[:2], len(stage_rows(workspace))
    kept = read_stages(workspace, range(committed), columns).filter(~pl.col("stage").is_in(list(changed)))
    fresh = (rows.select(*columns, stage=pl.lit(index, pl.Int64)) for index, rows in changed.items())
    frame = pl.concat([kept, *fresh]).sort("stage", maintain_order=True)
    heights = np.bincount(frame["stage"].to_numpy(), minlength=count)
    return [0, *accumulate(int(height) for height in heights)], frame


def _ready(workspace: Workspace, index: int) -> Path:
    return workspace.stages / ".next" / _ready_name(index)


def _ready_name(index: int) -> str:
    return f"stage={index:02d}.parquet"


def finish_commit(workspace: Workspace) -> None:
    """Make a decided commit visible: after a kill in its middle, and as the last step of one that was not killed."""
    decided = workspace.stages / "next.json"
    if decided.is_file():
        manifest: dict[str, Any] = read_json(decided)
        ready = {path.name: path for path in _ready(workspace, 0).parent.glob("stage=*.parquet")}
        for row in manifest["stages"]:
            target = workspace.stage_file(row["index"])
            if (source := ready.get(_ready_name(row["index"]))) is not None:
                make_folder(target.parent)
                os.replace(source, target)
                sync_folder(target.parent)
        os.replace(decided, workspace.stages / "manifest.json")
        sync_folder(workspace.stages)
    shutil.rmtree(workspace.stages / ".next", ignore_errors=True)


def _store_rejects(workspace: Workspace, rejects: pl.DataFrame) -> None:
    """The refused rows of the last look, beside those of the log the workspace began with."""
    path = workspace.rejects / "retrain.parquet"
    if rejects.is_empty():
        path.unlink(missing_ok=True)
    else:  # written, not compared: what is there may have rotted
        write_parquet(rejects, path)


def grow_catalogue(config: Config, workspace: Workspace) -> int:
    """Add the item table's rows about items nobody has met yet to `catalogue/raw.parquet`, before they get codes.

    What is known of an item never changes, or its vector and everybody's codes would move; nothing is read while no
    stage waits for its items.

    Returns:
        Rows added.

    Raises:
        UserError: the stored rows are damaged, and the sources cannot be read.
    """
    if not config.catalogue.sources or not (workspace.catalogue / "manifest.json").is_file():
        return 0
    digests = [row["digest"] for row in stage_rows(workspace)]
    if coded_stages(workspace) == digests or mend_item_table(config, workspace) is None:
        return 0
    stored = read_item_table(workspace)
    known = pl.concat([coded_items(workspace), stored.select("item_id")])
    rows = read_items(config).join(known, on="item_id", how="anti")
    if rows.height:
        store_item_table(workspace, pl.concat([stored, rows.select(stored.columns).sort("item_id", "timestamp")]))
    return rows.height
