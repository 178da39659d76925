"""Settings of what is read: the interaction log and the item table, their files and how columns become driftrec's."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.settings import Settings


class Source(Settings):
    """One file, glob or hive-partitioned folder of rows, and how its columns become driftrec's."""

    path: str
    """Where the rows are; `$NAME` and `~` are expanded, relative paths start at the config file."""
    format: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    separator: str | None = None
    """Column separator of a text file, one or more characters (`::` works); inferred from the ending if absent."""
    encoding: Literal["utf8", "latin1"] = "utf8"
    quote: str | None = '"'
    """Quoting character of a CSV file; the empty string or null for none."""
    header: bool = True
    names: list[str] | None = None
    """Column names of a file without a header line."""
    columns: dict[str, str] = Field(default_factory=dict)
    """driftrec's column -> the file's column; a column that already has driftrec's name needs no entry."""
    derive: dict[str, str] = Field(default_factory=dict)
    """New column -> polars SQL expression over the file's own columns; computed before `where` and the column map."""
    where: str | None = None
    """polars SQL condition; rows for which it is not true are filtered, counted, and not rejects."""
    time_unit: Literal["s", "ms", "us", "ns", "text"] | None = None
    """Unit of the timestamp; inferred for each file and printed when absent."""
    event: Literal["recommendation", "search"] | None = None
    """Objective of every row of this source; absent: the `event` column, or recommendation."""
    distinct: list[str] = Field(default_factory=list)
    """Columns (the file's or derived) that tell two rows apart; the earliest row of each combination is kept, the
    others are dropped and counted as duplicates. Absent: user, item, timestamp, event and query."""
    join: list[Join] = Field(default_factory=list)
    """Side tables joined to the rows before `derive`."""


class Join(Settings):
    """A side table (say, tag texts) joined to a source on one key."""

    path: str
    on: str
    """Key column, named alike in both tables (rename it with `columns` of this table: side -> file)."""
    columns: dict[str, str] = Field(default_factory=dict)
    format: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    separator: str | None = None
    encoding: Literal["utf8", "latin1"] = "utf8"
    quote: str | None = '"'


class LogConfig(Settings):
    """The interaction log: rows of events, published stage blocks, or one line per user."""

    kind: Literal["events", "blocks", "sequences"] = "events"
    sources: list[Source] = Field(default_factory=list)
    """For `events`: the sources, concatenated."""
    blocks: str | None = None
    """For `blocks`: glob of the block files, in stage order by file name."""
    index: str | None = None
    """For `blocks`: the semantic-ID index shipped with them (optional)."""
    sequences: str | None = None
    """For `sequences`: a text file, `user item item ...` a line, oldest first."""
    queries: Literal["log", "categories"] = "log"
    """`categories`: a log without searches gets one beside each purchase, its query made of the item's categories."""
    earliest: str = "1970-01-02"
    """Plausibility window of event times, ISO date; rows before it are rejected."""
    latest: str = "2100-01-01"
    """Rows at or after this ISO date are rejected."""

    @model_validator(mode="after")
    def _made_queries_need_a_clock(self) -> Self:
        if self.queries == "categories" and self.kind != "events":
            raise ValueError(f'log.queries = "categories" needs log.kind = "events", got {self.kind!r}; remove it')
        return self

    @model_validator(mode="after")
    def _kind_has_its_path(self) -> Self:
        needed = {"events": self.sources, "blocks": self.blocks, "sequences": self.sequences}[self.kind]
        if not needed:
            key = "sources" if self.kind == "events" else self.kind
            raise ValueError(f'log.kind = "{self.kind}" needs log.{key}; add it')
        return self


class CatalogueConfig(Settings):
    """Optional item table: title, text and categories by item_id; `text` columns may be built with `derive`."""

    sources: list[Source] = Field(default_factory=list)
    category_separator: str = "|"
    """Splits a text column of categories into a list."""
    level_separator: str = ">"
    """For `log.queries = "categories"`: parts a category into levels; empty: an item's categories are one path."""
