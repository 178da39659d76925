"""From the files a config names to one checked log: accepted events, rejects with reasons, and a report of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stages.category_queries import with_category_queries
from stages.clock import Window, window
from stages.config import Config, Source
from stages.content import content_digest, write_parquet
from stages.errors import UserError
from stages.files import File, shown, source_files
from stages.packing import Sorted, encoded, sorted_distinct
from stages.published import read_blocks, read_sequences
from stages.rows import EVENT_FIELDS, INSTANT, ITEM_FIELDS, Sifted, sift_events, sift_items
from stages.scan import KEY, raw_rows
from stages.workspace import SCHEMA, Workspace, read_json, sha256_file, write_json

ORDER = ("timestamp", "user_id", "item_id", "event", "query")
FEWEST_EVENTS = 3
REJECT_COLUMNS = ("file", "row", "reason")
LOG_SCHEMA = {
    "user_id": pl.String(),
    "item_id": pl.String(),
    "timestamp": INSTANT,
    "event": pl.String(),
    "query": pl.String(),
    "block": pl.Int32(),
}
ITEM_SCHEMA = {
    "item_id": pl.String(),
    "title": pl.String(),
    "text": pl.String(),
    "categories": pl.List(pl.String),
    "timestamp": INSTANT,
}


@dataclass(frozen=True)
class LogReport:
    """What became of every row read. rows + made = filtered + rejected + duplicates + accepted.

    Attributes:
        kind: `events`, `blocks` or `sequences`.
        rows: rows read, of all files.
        filtered: rows a source's `where` left out.
        rejected: refused rows by reason; they are in `rejects/log.parquet`.
        duplicates: rows dropped because an equal one (or, with `distinct`, an earlier one) was kept.
        accepted: events in `logs/log.parquet`.
        users: distinct users among them.
        items: distinct items among them.
        short_users: users with fewer than three events (in published blocks: visits of fewer than three items).
        units: what each file's timestamps count in, by file; None without a clock.
        first: earliest event time, ISO; None without a clock.
        last: latest event time, ISO; None without a clock.
        catalogue_rows: accepted rows of the item table.
        catalogue_rejected: refused rows of the item table by reason; they are in `rejects/catalogue.parquet`.
        catalogue_digest: of `catalogue/raw.parquet`, hex.
        digest: of the accepted events, hex; does not depend on the order of rows, files or row groups.
        made: searches that `log.queries = "categories"` added to the accepted events.
    """

    kind: str
    rows: int
    filtered: int
    rejected: dict[str, int]
    duplicates: int
    accepted: int
    users: int
    items: int
    short_users: int
    units: dict[str, str | None]
    first: str | None
    last: str | None
    catalogue_rows: int
    catalogue_rejected: dict[str, int]
    catalogue_digest: str
    digest: str
    made: int = 0


@dataclass(frozen=True)
class _Table:
    """All files of a table, concatenated."""

    accepted: pl.DataFrame
    rejects: pl.DataFrame
    rows: int
    filtered: int
    units: dict[str, str | None]


@dataclass(frozen=True)
class _Met:
    """How many users and items the log has, and how many of the users are short (see `LogReport`)."""

    users: int
    items: int
    short: int


def _silent(message: str) -> None:
    """Progress for callers that want none."""


def read_log(
    config: Config,
    workspace: Workspace,
    progress: Callable[[str], None] = _silent,
    expected: str | None = None,
) -> LogReport:
    """Read, check and store the log and the item table of `config`.

    Writes `logs/log.parquet` and `logs/manifest.json`, `catalogue/raw.parquet` (empty without an item table), and
    `rejects/log.parquet`, `rejects/catalogue.parquet` where rows were refused.

    Args:
        config: names the sources.
        workspace: where to write; claimed for the experiment.
        progress: receives one line a file and a summary.
        expected: digest the log must have, of the one that models rest on; nothing is written where it has another.

    Raises:
        UserError: a file that is missing, empty, unreadable or inconsistent; no acceptable row; another experiment's
            workspace; another log than the expected one.
    """
    workspace.claim(config.name)
    plausible = window(config.log.earliest, config.log.latest)
    readers = {"events": _events, "blocks": _blocks, "sequences": _sequences}
    table, log, met = readers[config.log.kind](config, plausible, progress)
    if log.is_empty():
        reasons = _reasons(table) or "its files hold no rows"
        raise UserError(f"the log has no acceptable row: {reasons}; check log.sources")
    items = _catalogue(config, plausible, progress)
    bought = log.height
    if config.log.queries == "categories":
        made = with_category_queries(log, items.accepted, config.catalogue.level_separator)
        log = made.sort(*ORDER, nulls_last=False, maintain_order=True)
    digest = content_digest(log)
    if expected is not None and digest != expected:
        raise UserError(
            f"{workspace.root}: the log's rows changed since this workspace was made (digest {digest[:12]}, "
            f"was {expected[:12]}); choose another workspace for the new rows"
        )
    _write_rejects(table.rejects, workspace.rejects / "log.parquet")
    _write_rejects(items.rejects, workspace.rejects / "catalogue.parquet")
    write_parquet(items.accepted, workspace.catalogue / "raw.parquet")
    report = _report(config, table, log, items, met, digest, log.height - bought)
    manifest = {"schema": SCHEMA, "sha256": write_parquet(log, workspace.log), **asdict(report)}
    write_json(workspace.log.with_name("manifest.json"), manifest, seal=True)
    progress(_summary(report))
    return report


def read_events(config: Config, progress: Callable[[str], None] = _silent) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The events of `config.log.sources` as they are now; nothing is stored.

    Returns:
        Accepted rows, each once and in the log's order, and the refused ones with file, row number and reason.

    Raises:
        UserError: a file that is missing, empty, unreadable or inconsistent.
    """
    table, log, _ = _events(config, window(config.log.earliest, config.log.latest), progress)
    return log.drop("block"), table.rejects


def read_items(config: Config, progress: Callable[[str], None] = _silent) -> pl.DataFrame:
    """The rows of `config.catalogue.sources` as they are now; nothing is stored.

    Raises:
        UserError: as `read_events`.
    """
    return _catalogue(config, window(config.log.earliest, config.log.latest), progress).accepted


def load_log(workspace: Workspace) -> tuple[pl.DataFrame, LogReport]:
    """The stored log and its report, after checking the file against its hash.

    Raises:
        UserError: there is none, or it is not the file that was written.
    """
    if not workspace.log.is_file():
        raise UserError(f"{workspace.log}: no log yet; run driftrec ingest first")
    manifest = read_json(workspace.log.with_name("manifest.json"))
    if manifest.get("sha256") != sha256_file(workspace.log):
        raise UserError(f"{workspace.log}: the file is not the one its manifest describes; run driftrec ingest again")
    report = LogReport(**{key: value for key, value in manifest.items() if key not in ("schema", "sha256")})
    return pl.read_parquet(workspace.log), report


def _events(config: Config, plausible: Window, progress: Callable[[str], None]) -> tuple[_Table, pl.DataFrame, _Met]:
    required = ("user_id", "item_id", "timestamp")

    def sift(source: Source, file: File) -> tuple[Sifted, int]:
        raw = raw_rows(source, file, EVENT_FIELDS, required)
        return sift_events(raw, source.event, source.time_unit, plausible, str(file.path)), raw.filtered

    table = _collected(config.log.sources, sift, EVENT_FIELDS, progress)
    rows = without_duplicates(table.accepted)
    log = rows.frame.with_columns(block=pl.lit(None, pl.Int32)).select(*LOG_SCHEMA)
    visits, demand = (np.bincount(rows.codes[name]) for name in ("user_id", "item_id"))
    short = (visits > 0) & (visits < FEWEST_EVENTS)
    return table, log, _Met(*(int(np.count_nonzero(each)) for each in (visits, demand, short)))


def without_duplicates(frame: pl.DataFrame) -> Sorted:
    """Rows in canonical order, each once: the earliest of a `__key` where a source gives one, else by all fields."""
    keyed = KEY in frame.columns and frame[KEY].null_count() < frame.height
    packed = None if keyed else sorted_distinct(frame.select(ORDER), ORDER)
    if packed is not None:
        return packed
    ordered = frame.sort(*ORDER, *([KEY] if keyed else []), nulls_last=False)
    fresh = ~pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in ordered.columns)
    # Shifting makes the first row's predecessor null, and no accepted row is null throughout.
    if keyed:
        fresh = pl.when(pl.col(KEY).is_null()).then(fresh).otherwise(pl.col(KEY).is_first_distinct())
    kept = ordered.filter(fresh).drop(KEY, strict=False)
    return Sorted(kept, {name: encoded(kept[name]).codes for name in ("user_id", "item_id")})


def _collected(
    sources: list[Source],
    sift: Callable[[Source, File], tuple[Sifted, int]],
    fields: tuple[str, ...],
    progress: Callable[[str], None],
) -> _Table:
    files = [(source, file) for source in sources for file in source_files(source.path)]
    names = shown([file.path for _, file in files])
    accepted, rejects, units, rows, filtered = [], [], {}, 0, 0
    for source, file in files:
        name = names[file.path]
        sifted, left_out = sift(source, file)
        accepted.append(sifted.accepted)
        rejects.append(sifted.rejects.select(pl.lit(name).alias("file"), pl.all()))
        units[name] = sifted.unit
        filtered += left_out
        rows += left_out + sifted.accepted.height + sifted.rejects.height
        progress(_file_line(name, sifted, left_out))
    schema = {"file": pl.String, "row": pl.Int64, "reason": pl.String, **dict.fromkeys(fields, pl.String)}
    return _Table(
        pl.concat(accepted, how="diagonal") if accepted else pl.DataFrame(schema=ITEM_SCHEMA),
        pl.concat(rejects) if rejects else pl.DataFrame(schema=schema),
        rows,
        filtered,
        units,
    )


def _file_line(name: str, sifted: Sifted, filtered: int) -> str:
    unit = "" if sifted.unit is None else f", times in {sifted.unit}"
    return f"{name}: {sifted.accepted.height:,} rows{unit}, {filtered:,} filtered, {sifted.rejects.height:,} rejected"


def _blocks(config: Config, plausible: Window, progress: Callable[[str], None]) -> tuple[_Table, pl.DataFrame, _Met]:
    return _published(read_blocks(str(config.log.blocks), config.log.index), progress)


def _sequences(config: Config, plausible: Window, progress: Callable[[str], None]) -> tuple[_Table, pl.DataFrame, _Met]:
    return _published(read_sequences(str(config.log.sequences)), progress)


def _published(
    read: tuple[pl.DataFrame, list[Path], int], progress: Callable[[str], None]
) -> tuple[_Table, pl.DataFrame, _Met]:
    frame, paths, short = read
    names = shown(paths)
    log = frame.with_columns(
        timestamp=pl.lit(None, INSTANT), event=pl.lit("recommendation"), query=pl.lit(None, pl.String)
    ).select(*LOG_SCHEMA)
    progress(f"{len(paths)} file(s): {log.height:,} events, no clock, {short:,} visits of fewer than three items")
    rejects = pl.DataFrame(schema=dict.fromkeys(REJECT_COLUMNS, pl.String))
    met = _Met(log["user_id"].n_unique(), log["item_id"].n_unique(), short)
    return _Table(log, rejects, log.height, 0, dict.fromkeys(names.values())), log, met


def _catalogue(config: Config, plausible: Window, progress: Callable[[str], None]) -> _Table:
    settings = config.catalogue

    def sift(source: Source, file: File) -> tuple[Sifted, int]:
        raw = raw_rows(source, file, ITEM_FIELDS, ("item_id",))
        place = str(file.path)
        return sift_items(raw, settings.category_separator, source.time_unit, plausible, place), raw.filtered

    table = _collected(settings.sources, sift, ITEM_FIELDS, progress)
    frame = table.accepted
    if KEY in frame.columns:
        frame = frame.sort(KEY, "timestamp", *ITEM_FIELDS[:3], nulls_last=True)
        frame = frame.filter(pl.col(KEY).is_null() | pl.col(KEY).is_first_distinct())
    listed = pl.col("categories").list.join("\0")
    ordered = frame.select(*ITEM_SCHEMA).sort("item_id", "timestamp", "title", "text", listed, nulls_last=False)
    return _Table(ordered, table.rejects, table.rows, table.filtered, table.units)


def _report(
    config: Config, table: _Table, log: pl.DataFrame, items: _Table, met: _Met, digest: str, made: int
) -> LogReport:
    span = log.select(first=pl.col("timestamp").min(), last=pl.col("timestamp").max()).row(0)
    first, last = (None if edge is None else edge.isoformat() for edge in span)
    return LogReport(
        kind=config.log.kind,
        rows=table.rows,
        filtered=table.filtered,
        rejected=_counted(table.rejects),
        duplicates=table.accepted.height - log.height + made,
        accepted=log.height,
        users=met.users,
        items=met.items,
        short_users=met.short,
        units=table.units,
        first=first,
        last=last,
        catalogue_rows=items.accepted.height,
        catalogue_rejected=_counted(items.rejects),
        catalogue_digest=content_digest(items.accepted),
        digest=digest,
        made=made,
    )


def _counted(rejects: pl.DataFrame) -> dict[str, int]:
    return dict(rejects["reason"].value_counts().sort("count", "reason", descending=[True, False]).iter_rows())


def _reasons(table: _Table) -> str:
    counts = _counted(table.rejects) | ({"filtered by where": table.filtered} if table.filtered else {})
    return ", ".join(f"{reason} ({count:,})" for reason, count in counts.items())


def _write_rejects(rejects: pl.DataFrame, path: Path) -> None:
    if rejects.is_empty():
        path.unlink(missing_ok=True)
    else:
        write_parquet(rejects, path)


def _summary(report: LogReport) -> str:
    refused = ", ".join(f"{count:,} {reason}" for reason, count in report.rejected.items())
    return (
        f"log: {report.accepted:,} events of {report.users:,} users on {report.items:,} items "
        f"from {report.rows:,} rows; {report.filtered:,} filtered, {report.duplicates:,} duplicates dropped, "
        f"{sum(report.rejected.values()):,} rejected{f' ({refused})' if refused else ''}"
        f"{f'; {report.made:,} of the events are searches made of categories' if report.made else ''}"
    )
