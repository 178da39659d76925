"""From the files of a config's sources to their accepted rows and the refused ones with reasons; nothing is stored."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from stages.clock import Window, window
from stages.coded import ORDER, Coded, Coder
from stages.config import Config, Source
from stages.files import File, is_emptied, is_unfinished, shown, source_files
from stages.log_files import NUMBERS_FILE
from stages.long_files import raw_file
from stages.rows import EVENT_FIELDS, INSTANT, ITEM_FIELDS, Sifted, sift_events, sift_items
from stages.scan import KEY, raw_rows
from stages.spool import ahead
from stages.taken import Taken, reading_of, taken

ITEM_SCHEMA = {
    "item_id": pl.String(),
    "title": pl.String(),
    "text": pl.String(),
    "categories": pl.List(pl.String),
    "timestamp": INSTANT,
}
UNFINISHED = "the file's last line has no end and was just written; the next look takes it"
log = logging.getLogger("stages.reading")


@dataclass(frozen=True)
class Incoming:
    """What the files of the log hold now.

    Attributes:
        rows: accepted ones of the files read, each once and in the log's order.
        rejects: refused ones with file, row number and reason.
        clean: `stages.taken.file_key` of the files that were read, of which no row was refused, and which nobody
            wrote to meanwhile.
        unread: how many files were known already.
        accepted: how many rows were, duplicates included.
    """

    rows: pl.DataFrame
    rejects: pl.DataFrame
    clean: frozenset[str]
    unread: int
    accepted: int

    @property
    def refused_share(self) -> float:
        """Refused rows, of all rows read that a source's `where` did not leave out; 0 where none was read."""
        return self.rejects.height / max(1, self.accepted + self.rejects.height)

    def often(self) -> str:
        """The most frequent reason for refusing a row; empty where none was refused."""
        return next(iter(counted(self.rejects)), "")


@dataclass(frozen=True)
class Table:
    """What became of all files of a table; the accepted rows themselves are elsewhere."""

    accepted: int
    rejects: pl.DataFrame
    rows: int
    filtered: int
    units: dict[str, str | None]
    clean: frozenset[str] = frozenset()
    unread: int = 0


def silent(message: str) -> None:
    """Progress for callers that want none."""


def read_events(
    config: Config,
    progress: Callable[[str], None],
    known: Collection[str] = frozenset(),
    quiet: bool = False,
    growing: bool = False,
) -> Incoming:
    """The events of `config.log.sources` as they are now; nothing is stored.

    Args:
        config: names the sources.
        progress: receives one line a file.
        known: keys of files to leave unread.
        quiet: a source whose folder holds no file at all gives no rows and a warning, and is no error.
        growing: files may be under their producers' hands: a last row that may be half there is refused for now.

    Raises:
        UserError: a file that is missing, empty, unreadable or inconsistent.
    """
    if quiet:
        config = _of_sources_with_files(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NUMBERS_FILE
        plausible = window(config.log.earliest, config.log.latest)
        table, coded, _ = event_table(config, plausible, progress, path, known, growing)
        rows = coded.whole().drop("block")
        return Incoming(rows, table.rejects, table.clean, table.unread, table.accepted)


def _of_sources_with_files(config: Config) -> Config:
    emptied = [source for source in config.log.sources if is_emptied(source.path)]
    for source in emptied:
        log.warning("%s: no file is there; the source gives 0 rows", source.path)
    there = [source for source in config.log.sources if source not in emptied]
    return config.model_copy(update={"log": config.log.model_copy(update={"sources": there})})


def read_items(config: Config, progress: Callable[[str], None] = silent) -> pl.DataFrame:
    """The rows of `config.catalogue.sources` as they are now; nothing is stored.

    Raises:
        UserError: as `read_events`.
    """
    return item_table(config, window(config.log.earliest, config.log.latest), progress)[1]


def event_table(
    config: Config,
    plausible: Window,
    progress: Callable[[str], None],
    path: Path,
    known: Collection[str] | None = None,
    growing: bool = False,
) -> tuple[Table, Coded, int | None]:
    """The events of the sources as numbers, stored at `path`; nobody has counted the short users (the last part).

    See `read_events` for the other arguments and errors; without `known` no file is hashed.
    """
    required = ("user_id", "item_id", "timestamp")

    def sift(source: Source, file: File) -> Iterable[Sifted]:
        unfinished = growing and is_unfinished(file.path, source)
        raw = raw_file(source, file, EVENT_FIELDS, required)
        parts = sift_events(raw, source.event, source.time_unit, plausible, str(file.path))
        return _without_last(parts) if unfinished else parts

    coder, keyed = Coder(path.parent), []
    by_key = any(source.distinct for source in config.log.sources)
    keep = keyed.append if by_key else coder.add

    readings = {} if known is None else {id(source): reading_of(config, source) for source in config.log.sources}

    def state(source: Source, file: File) -> Taken | None:
        reading = readings.get(id(source))
        return None if reading is None else taken(reading, file)

    table = _collected(config.log.sources, sift, EVENT_FIELDS, keep, progress, state, known or ())
    if not by_key:
        return table, coder.sorted_distinct(path), None
    coder.add(_earliest_of_a_key(pl.concat(keyed, how="diagonal")))
    return table, coder.as_met(path), None


def _without_last(parts: Iterable[Sifted]) -> Iterator[Sifted]:
    """The parts, with the last accepted row refused for now: the next look reads the file again."""
    last = None
    for part in parts:
        if last is not None:
            yield last
        last = part
    if last is not None:
        row = last.accepted.tail(1).select(pl.lit(None, pl.Int64).alias("row"), pl.lit(UNFINISHED).alias("reason"), "*")
        refused = row.select(pl.col(name).cast(kind) for name, kind in last.rejects.schema.items())
        yield replace(last, accepted=last.accepted.head(-1), rejects=pl.concat([last.rejects, refused]))


def _earliest_of_a_key(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows in canonical order, each once: the earliest of a `__key` where its source gives one, else by all fields."""
    ordered = frame.sort(*ORDER, KEY, nulls_last=False)
    fresh = ~pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in ordered.columns)
    # Shifting makes the first row's predecessor null, and no accepted row is null throughout.
    fresh = pl.when(pl.col(KEY).is_null()).then(fresh).otherwise(pl.col(KEY).is_first_distinct())
    return ordered.filter(fresh).drop(KEY)


def _collected(
    sources: list[Source],
    sift: Callable[[Source, File], Iterable[Sifted]],
    fields: tuple[str, ...],
    keep: Callable[[pl.DataFrame], object],
    progress: Callable[[str], None],
    state: Callable[[Source, File], Taken | None] = lambda *_: None,
    known: Collection[str] = (),
) -> Table:
    """Sift every file that is not known, hand its accepted rows on, part by part, while the next part is sifted."""

    def handed_on(part: Sifted) -> Sifted:
        keep(part.accepted)
        return part

    files = [(source, file) for source in sources for file in source_files(source.path)]
    names = shown([file.path for _, file in files])
    rejects, units, accepted, rows, filtered, unread = [], {}, 0, 0, 0, 0
    clean: set[str] = set()
    for source, file in files:
        before = state(source, file)
        if before is not None and before.key in known:
            unread += 1
            continue
        name = names[file.path]
        good = bad = left_out = 0
        for part in ahead(sift(source, file), handed_on):
            rejects.append(part.rejects.select(pl.lit(name).alias("file"), pl.all()))
            units[name] = part.unit
            good, bad, left_out = good + part.accepted.height, bad + part.rejects.height, left_out + part.filtered
        # What is written while the file is read may have been missed: the next look reads it again.
        if not bad and before is not None and state(source, file) == before:
            clean.add(before.key)
        accepted, filtered, rows = accepted + good, filtered + left_out, rows + left_out + good + bad
        unit = "" if units[name] is None else f", times in {units[name]}"
        progress(f"{name}: {good:,} rows{unit}, {left_out:,} filtered, {bad:,} rejected")
    schema = {"file": pl.String, "row": pl.Int64, "reason": pl.String, **dict.fromkeys(fields, pl.String)}
    refused = pl.concat(rejects) if rejects else pl.DataFrame(schema=schema)
    return Table(accepted, refused, rows, filtered, units, frozenset(clean), unread)


def item_table(config: Config, plausible: Window, progress: Callable[[str], None]) -> tuple[Table, pl.DataFrame]:
    """The item table's rows in canonical order, and what became of its files."""
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


def counted(rejects: pl.DataFrame) -> dict[str, int]:
    """How many rows were refused for which reason, the most frequent first."""
    return dict(rejects["reason"].value_counts().sort("count", "reason", descending=[True, False]).iter_rows())
