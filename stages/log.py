"""From the files a config names to one checked log: accepted events, rejects with reasons, and a report of both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from stages.category_queries import with_category_queries
from stages.clock import Window, window
from stages.coded import LOG_SCHEMA, ORDER, Coded, Coder
from stages.config import Config, Source
from stages.content import content_digest, digest_and_sink, write_parquet
from stages.errors import UserError
from stages.files import File, shown, source_files
from stages.log_files import NUMBERS_FILE, checked_manifest, store_manifest
from stages.long_files import raw_file
from stages.published import read_blocks, read_sequences
from stages.rows import EVENT_FIELDS, INSTANT, ITEM_FIELDS, Sifted, sift_events, sift_items
from stages.scan import KEY, raw_rows
from stages.spool import ahead
from stages.taken import file_key
from stages.workspace import Workspace, replacing

FEWEST_EVENTS = 3
REJECT_COLUMNS = ("file", "row", "reason")
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
class Incoming:
    """What the files of the log hold now.

    Attributes:
        rows: accepted ones of the files read, each once and in the log's order.
        rejects: refused ones with file, row number and reason.
        clean: `stages.taken.file_key` of the files that were read and of which no row was refused.
        unread: how many files were known already.
    """

    rows: pl.DataFrame
    rejects: pl.DataFrame
    clean: frozenset[str]
    unread: int


@dataclass(frozen=True)
class _Table:
    """What became of all files of a table; the accepted rows themselves are elsewhere."""

    accepted: int
    rejects: pl.DataFrame
    rows: int
    filtered: int
    units: dict[str, str | None]
    clean: tuple[tuple[Source, File], ...] = ()
    unread: int = 0


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
    with replacing(workspace.log.with_name(NUMBERS_FILE)) as path:
        table, log, short = READERS[config.log.kind](config, plausible, progress, path)
        if not log.height:
            reasons = _reasons(table) or "its files hold no rows"
            raise UserError(f"the log has no acceptable row: {reasons}; check log.sources")
        met, bought = _met(log, short), log.height
        items, catalogue = _catalogue(config, plausible, progress)
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
    write_parquet(catalogue, workspace.catalogue / "raw.parquet")
    store_manifest(workspace, log, asdict(report))
    progress(_summary(report))
    return report


def read_events(config: Config, progress: Callable[[str], None], known: Collection[str] = frozenset()) -> Incoming:
    """The events of `config.log.sources` as they are now; nothing is stored.

    Args:
        config: names the sources.
        progress: receives one line a file.
        known: keys of files to leave unread.

    Raises:
        UserError: a file that is missing, empty, unreadable or inconsistent.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NUMBERS_FILE
        table, log, _ = _events(config, window(config.log.earliest, config.log.latest), progress, path, known)
        keys = {file_key(config, *each) for each in table.clean} - {None}
        return Incoming(log.whole().drop("block"), table.rejects, frozenset(map(str, keys)), table.unread)


def read_items(config: Config, progress: Callable[[str], None] = _silent) -> pl.DataFrame:
    """The rows of `config.catalogue.sources` as they are now; nothing is stored.

    Raises:
        UserError: as `read_events`.
    """
    return _catalogue(config, window(config.log.earliest, config.log.latest), progress)[1]


def load_log(workspace: Workspace) -> tuple[pl.DataFrame, LogReport]:
    """The stored log and its report, after checking the file against its hash.

    Raises:
        UserError: there is none, or it is not the file that was written.
    """
    report = LogReport(**checked_manifest(workspace))
    return pl.read_parquet(workspace.log), report


def _events(
    config: Config, plausible: Window, progress: Callable[[str], None], path: Path, known: Collection[str] = ()
) -> tuple[_Table, Coded, int | None]:
    required = ("user_id", "item_id", "timestamp")

    def sift(source: Source, file: File) -> Iterable[Sifted]:
        raw = raw_file(source, file, EVENT_FIELDS, required)
        return sift_events(raw, source.event, source.time_unit, plausible, str(file.path))

    coder, keyed = Coder(path.parent), []
    by_key = any(source.distinct for source in config.log.sources)
    keep = keyed.append if by_key else coder.add

    def is_known(source: Source, file: File) -> bool:
        return bool(known) and file_key(config, source, file) in known

    table = _collected(config.log.sources, sift, EVENT_FIELDS, keep, progress, is_known)
    if not by_key:
        return table, coder.sorted_distinct(path), None
    coder.add(_earliest_of_a_key(pl.concat(keyed, how="diagonal")))
    return table, coder.as_met(path), None


def _earliest_of_a_key(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows in canonical order, each once: the earliest of a `__key` where its source gives one, else by all fields."""
    ordered = frame.sort(*ORDER, KEY, nulls_last=False)
    fresh = ~pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in ordered.columns)
    # Shifting makes the first row's predecessor null, and no accepted row is null throughout.
    fresh = pl.when(pl.col(KEY).is_null()).then(fresh).otherwise(pl.col(KEY).is_first_distinct())
    return ordered.filter(fresh).drop(KEY)


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


def _collected(
    sources: list[Source],
    sift: Callable[[Source, File], Iterable[Sifted]],
    fields: tuple[str, ...],
    keep: Callable[[pl.DataFrame], object],
    progress: Callable[[str], None],
    is_known: Callable[[Source, File], bool] = lambda *_: False,
) -> _Table:
    """Sift every file that is not known, hand its accepted rows on, part by part, while the next part is sifted."""

    def handed_on(part: Sifted) -> Sifted:
        keep(part.accepted)
        return part

    files = [(source, file) for source in sources for file in source_files(source.path)]
    names = shown([file.path for _, file in files])
    rejects, units, accepted, rows, filtered = [], {}, 0, 0, 0
    wanted, clean = [each for each in files if not is_known(*each)], []
    for source, file in wanted:
        name = names[file.path]
        good = bad = left_out = 0
        for part in ahead(sift(source, file), handed_on):
            rejects.append(part.rejects.select(pl.lit(name).alias("file"), pl.all()))
            units[name] = part.unit
            good, bad, left_out = good + part.accepted.height, bad + part.rejects.height, left_out + part.filtered
        clean += [] if bad else [(source, file)]
        accepted, filtered, rows = accepted + good, filtered + left_out, rows + left_out + good + bad
        unit = "" if units[name] is None else f", times in {units[name]}"
        progress(f"{name}: {good:,} rows{unit}, {left_out:,} filtered, {bad:,} rejected")
    schema = {"file": pl.String, "row": pl.Int64, "reason": pl.String, **dict.fromkeys(fields, pl.String)}
    refused = pl.concat(rejects) if rejects else pl.DataFrame(schema=schema)
    return _Table(accepted, refused, rows, filtered, units, tuple(clean), len(files) - len(wanted))


def _blocks(
    config: Config, plausible: Window, progress: Callable[[str], None], path: Path
) -> tuple[_Table, Coded, int | None]:
    return _published(read_blocks(str(config.log.blocks), config.log.index), progress, path)


def _sequences(
    config: Config, plausible: Window, progress: Callable[[str], None], path: Path
) -> tuple[_Table, Coded, int | None]:
    return _published(read_sequences(str(config.log.sequences)), progress, path)


def _published(
    read: tuple[pl.DataFrame, list[Path], int], progress: Callable[[str], None], path: Path
) -> tuple[_Table, Coded, int | None]:
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
    table = _Table(frame.height, rejects, frame.height, 0, dict.fromkeys(names.values()))
    return table, coder.as_met(path), short


READERS = {"events": _events, "blocks": _blocks, "sequences": _sequences}


def _catalogue(config: Config, plausible: Window, progress: Callable[[str], None]) -> tuple[_Table, pl.DataFrame]:
    settings = config.catalogue

    def sift(source: Source, file: File) -> Iterable[Sifted]:
        raw = raw_rows(source, file, ITEM_FIELDS, ("item_id",))
        return [sift_items(raw, settings.category_separator, source.time_unit, plausible, str(file.path))]

    accepted: list[pl.DataFrame] = []
    table = _collected(settings.sources, sift, ITEM_FIELDS, accepted.append, progress)
    frame = pl.concat(accepted, how="diagonal") if accepted else pl.DataFrame(schema=ITEM_SCHEMA)
    if KEY in frame.columns:
        frame = frame.sort(KEY, "timestamp", *ITEM_FIELDS[:3], nulls_last=True)
        frame = frame.filter(pl.col(KEY).is_null() | pl.col(KEY).is_first_distinct())
    listed = pl.col("categories").list.join("\0")
    ordered = frame.select(*ITEM_SCHEMA).sort("item_id", "timestamp", "title", "text", listed, nulls_last=False)
    return replace(table, accepted=ordered.height), ordered


def _report(
    config: Config,
    table: _Table,
    log: Coded,
    items: _Table,
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
        rejected=_counted(table.rejects),
        duplicates=table.accepted - log.height + made,
        accepted=log.height,
        users=met.users,
        items=met.items,
        short_users=met.short,
        units=table.units,
        first=first,
        last=last,
        catalogue_rows=items.accepted,
        catalogue_rejected=_counted(items.rejects),
        catalogue_digest=catalogue_digest,
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
