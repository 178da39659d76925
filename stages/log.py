"""From the files a config names to one checked log: accepted events, rejects with reasons, and a report of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stages.category_queries import with_category_queries
from stages.clock import Window, window
from stages.coded import LOG_SCHEMA, ORDER, Coded, Coder
from stages.config import Config
from stages.content import content_digest, digest_and_sink, write_parquet
from stages.errors import UserError
from stages.files import shown
from stages.item_table import store_item_table
from stages.log_files import NUMBERS_FILE, checked_manifest, store_manifest
from stages.published import read_blocks, read_sequences
from stages.reading import Table, counted, event_table, item_table, silent
from stages.rows import INSTANT
from stages.workspace import Workspace, replacing

FEWEST_EVENTS = 3
REJECT_COLUMNS = ("file", "row", "reason")


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
class _Met:
    """How many users and items the log has, and how many of the users are short (see `LogReport`)."""

    users: int
    items: int
    short: int


def read_log(
    config: Config,
    workspace: Workspace,
    progress: Callable[[str], None] = silent,
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
    with replacing(workspace.log.with_name(NUMBERS_FILE)) as path:
        table, log, short = READERS[config.log.kind](config, plausible, progress, path)
        if not log.height:
            reasons = _reasons(table) or "its files hold no rows"
            raise UserError(f"the log has no acceptable row: {reasons}; check log.sources")
        met, bought = _met(log, short), log.height
        items, catalogue = item_table(config, plausible, progress)
        if config.log.queries == "categories":
            log = _with_made_searches(log, catalogue, config.catalogue.level_separator)
        with replacing(workspace.log) as text:
            digest = digest_and_sink(log.frames(), LOG_SCHEMA, log.height, text)
            if expected is not None and digest != expected:
                raise UserError(
                    f"{workspace.root}: the log's rows changed since this workspace was made (digest {digest[:12]}, "
                    f"was {expected[:12]}); choose another workspace for the new rows"
                )
        report = _report(config, table, log, items, content_digest(catalogue), met, digest, log.height - bought)
    _write_rejects(table.rejects, workspace.rejects / "log.parquet")
    _write_rejects(items.rejects, workspace.rejects / "catalogue.parquet")
    store_item_table(workspace, catalogue)
    store_manifest(workspace, log, asdict(report))
    progress(_summary(report))
    return report


def load_log(workspace: Workspace) -> tuple[pl.DataFrame, LogReport]:
    """The stored log and its report, after checking the file against its hash.

    Raises:
        UserError: there is none, or it is not the file that was written.
    """
    report = LogReport(**checked_manifest(workspace))
    return pl.read_parquet(workspace.log), report


def _with_made_searches(log: Coded, catalogue: pl.DataFrame, separator: str) -> Coded:
    made = with_category_queries(log.whole(), catalogue, separator)
    coder = Coder(log.path.parent)
    coder.add(made.sort(*ORDER, nulls_last=False, maintain_order=True))
    return coder.as_met(log.path)


def _met(log: Coded, short: int | None) -> _Met:
    """Counts of users, items and short users; `short` where the reader has counted those itself."""
    counts = {name: np.zeros(len(log.names[name]), dtype=np.int64) for name in ("user", "item")}
    for columns in log.columns(only=counts):
        for name, count in counts.items():
            count += np.bincount(columns[name], minlength=len(count))
    visits, demand = counts.values()
    few = np.count_nonzero((visits > 0) & (visits < FEWEST_EVENTS)) if short is None else short
    return _Met(int(np.count_nonzero(visits)), int(np.count_nonzero(demand)), int(few))


def _blocks(
    config: Config, plausible: Window, progress: Callable[[str], None], path: Path
) -> tuple[Table, Coded, int | None]:
    return _published(read_blocks(str(config.log.blocks), config.log.index), progress, path)


def _sequences(
    config: Config, plausible: Window, progress: Callable[[str], None], path: Path
) -> tuple[Table, Coded, int | None]:
    return _published(read_sequences(str(config.log.sequences)), progress, path)


def _published(
    read: tuple[pl.DataFrame, list[Path], int], progress: Callable[[str], None], path: Path
) -> tuple[Table, Coded, int | None]:
    frame, paths, short = read
    names = shown(paths)
    coder = Coder(path.parent)
    coder.add(
        frame.with_columns(
            timestamp=pl.lit(None, INSTANT), event=pl.lit("recommendation"), query=pl.lit(None, pl.String)
        )
    )
    progress(f"{len(paths)} file(s): {frame.height:,} events, no clock, {short:,} visits of fewer than three items")
    rejects = pl.DataFrame(schema=dict.fromkeys(REJECT_COLUMNS, pl.String))
    table = Table(frame.height, rejects, frame.height, 0, dict.fromkeys(names.values()))
    return table, coder.as_met(path), short


READERS = {"events": event_table, "blocks": _blocks, "sequences": _sequences}


def _report(
    config: Config,
    table: Table,
    log: Coded,
    items: Table,
    catalogue_digest: str,
    met: _Met,
    digest: str,
    made: int,
) -> LogReport:
    first, last = (None if edge is None else edge.isoformat() for edge in log.span())
    return LogReport(
        kind=config.log.kind,
        rows=table.rows,
        filtered=table.filtered,
        rejected=counted(table.rejects),
        duplicates=table.accepted - log.height + made,
        accepted=log.height,
        users=met.users,
        items=met.items,
        short_users=met.short,
        units=table.units,
        first=first,
        last=last,
        catalogue_rows=items.accepted,
        catalogue_rejected=counted(items.rejects),
        catalogue_digest=catalogue_digest,
        digest=digest,
        made=made,
    )


def _reasons(table: Table) -> str:
    counts = counted(table.rejects) | ({"filtered by where": table.filtered} if table.filtered else {})
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
