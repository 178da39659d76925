"""The stages' events as flat arrays: one row of items a user, oldest first, cut by stage.

Where searches are used, all that a user did at one instant is one moment: its recommendation events come first, then
its searches, query by query, so that no recommendation ever stands behind the search that led to it.

Item numbers are rows of `catalogue/items.parquet`, which is ordered by the stage in which an item first appears: the
items known by the end of stage t are exactly the numbers below `known(t)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from stages.errors import UserError
from stages.search_config import OBJECTIVES, Objective
from stages.stage_files import COLUMNS, read_stages, stage_rows
from stages.workspace import Workspace, read_json, sha256_if_there

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of their first stage.

    Attributes:
        item_ids: (I,) the log's own ids.
        titles: (I,) what a person reads; the id where there is no title.
        first_stage: (I,) rising.
        codes: (I, L) semantic ID of each item.
        sizes: (L,) number of codes at each level.
        shipped: the IDs came with the data and were fitted on the catalogue of all stages.
        from_events: codes of items that came after stage 0 were read off the events around them.
        coded: (I,) each item's place in the order in which they got their codes, which is append-only.
    """

    item_ids: list[str]
    titles: list[str]
    first_stage: IntArray
    codes: IntArray
    sizes: tuple[int, ...]
    shipped: bool
    from_events: bool
    coded: IntArray

    def known(self, stage: int) -> int:
        """How many items have appeared by the end of `stage`; they are numbers 0 … known - 1."""
        return int(np.searchsorted(self.first_stage, stage, side="right"))

    def digest_of_codes(self, count: int) -> str:
        """Names the codes of the first `count` items that got some; later items and rebuilt stages leave it alone."""
        order = np.argsort(self.coded)[:count]
        digest = hashlib.sha256("\0".join(self.item_ids[place] for place in order).encode())
        digest.update(self.codes[order].tobytes())
        digest.update(str(self.sizes).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Interactions:
    """Events of all stages, sorted by user, stage and time.

    Attributes:
        user_ids: (U,) the log's own ids, sorted.
        offsets: (U + 1,) user u's events are rows offsets[u] … offsets[u + 1] - 1.
        items: (N,) item numbers.
        stages: (N,) stage of each event, rising within a user.
        baskets: (N,) basket of each event within its user, rising from 0; with baskets off every event is its own,
            unless searches are used: then all events of an instant belong together.
        query: (N,) number of each search's query in `texts`, -1 for a recommendation event; None without searches.
        texts: distinct queries as they were typed.
        uncoded: events that are left out, their items having no codes yet.
    """

    user_ids: list[str]
    offsets: IntArray
    items: IntArray
    stages: IntArray
    baskets: IntArray
    query: IntArray | None = None
    texts: tuple[str, ...] = ()
    uncoded: int = 0

    @property
    def users(self) -> IntArray:
        """(N,) user number of each event."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The kinds of events there are; recommendation alone where no query is known."""
        there = {"recommendation": self.query is None or not self.searched.all(), "search": self.searched.any()}
        return tuple(name for name in OBJECTIVES if there[name])

    @cached_property
    def searched(self) -> BoolArray:
        """(N,) which events are searches."""
        return np.zeros(len(self.items), dtype=bool) if self.query is None else self.query >= 0

    def queries(self, rows: IntArray) -> list[str]:
        """What the searches in some rows searched for."""
        return [] if self.query is None else [self.texts[number] for number in self.query[rows].tolist()]

    @cached_property
    def first_rows(self) -> IntArray:
        """(N,) row at which the event's user met the event's item first."""
        keys = self.users * (int(self.items.max(initial=0)) + 1) + self.items
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        return first[which]

    @cached_property
    def recommendations(self) -> Interactions:
        """The recommendation events alone, still with one place in `offsets` for every user."""
        kept = ~self.searched
        columns = (self.items[kept], self.stages[kept], self.baskets[kept])
        query = None if self.query is None else self.query[kept]
        return Interactions(self.user_ids, self.recommendations_before[self.offsets], *columns, query, self.texts)

    @cached_property
    def recommendations_before(self) -> IntArray:
        """(N + 1,) how many recommendation events stand before each row: a row's number in `recommendations`."""
        return np.concatenate([[0], np.cumsum(~self.searched)]).astype(np.int64)

    def history(self, user: int, cut: int, length: int | None = None) -> IntArray:
        """Item numbers of `user` before row `cut`, oldest first, at most the last `length`."""
        start = int(self.offsets[user])
        return self.items[start if length is None else max(start, cut - length) : cut]


def load_catalogue(workspace: Workspace) -> Catalogue:
    """Read `catalogue/items.parquet` and its manifest."""
    manifest = read_json(workspace.catalogue / "manifest.json")
    frame = pl.read_parquet(workspace.catalogue / "items.parquet")
    return Catalogue(
        item_ids=frame["item_id"].to_list(),
        titles=frame["title"].fill_null(frame["item_id"]).to_list(),
        first_stage=frame["first_stage"].to_numpy().astype(np.int64),
        codes=np.array(frame["codes"].to_list(), dtype=np.int64).reshape(len(frame), -1),
        sizes=tuple(manifest["codes_per_level"]),
        shipped=manifest["source"] == "shipped",
        from_events=manifest.get("vectors") == "cooccurrence",
        coded=coding_order(frame).to_numpy().astype(np.int64),
    )


def coding_order(items: pl.DataFrame) -> pl.Series:
    """Column `coded` of items.parquet; an earlier version coded its items in the order of their numbers."""
    return items["coded"] if "coded" in items.columns else pl.Series("coded", range(items.height), dtype=pl.Int64)


def load_interactions(
    workspace: Workspace, baskets: bool, objectives: Collection[Objective] | None = None
) -> Interactions:
    """Read every stage's events; with `baskets`, events of a user at one instant of one stage belong together.

    Args:
        workspace: holds stages and catalogue.
        baskets: whether an instant's recommendation events are one basket.
        objectives: kinds of events to read; absent: all there are.

    Raises:
        UserError: an objective of which the log has no event.
    """
    count = len(stage_rows(workspace))
    numbers = pl.read_parquet(workspace.catalogue / "items.parquet", columns=["item_id"]).with_row_index("item")
    kinds = used_objectives(workspace, objectives)
    frame = _in_order(read_stages(workspace, range(count), _columns(kinds)), kinds)
    # A stage's events come sorted by user and time; the stable sort keeps that order within a user and stage.
    frame = frame.join(numbers, on="item_id", how="left", maintain_order="left").sort("user_id", maintain_order=True)
    uncoded = frame["item"].null_count()
    frame = frame.drop_nulls("item") if uncoded else frame
    users = frame["user_id"].rle()
    offsets = np.concatenate([[0], np.cumsum(users.struct.field("len").to_numpy())]).astype(np.int64)
    query, texts = _query_numbers(frame) if "search" in kinds else (None, ())
    return Interactions(
        user_ids=users.struct.field("value").to_list(),
        offsets=offsets,
        items=frame["item"].to_numpy().astype(np.int64),
        stages=frame["stage"].to_numpy().astype(np.int64),
        baskets=_basket_numbers(frame, offsets, baskets or "search" in kinds),
        query=query,
        texts=texts,
        uncoded=uncoded,
    )


def used_objectives(workspace: Workspace, wanted: Collection[Objective] | None) -> tuple[Objective, ...]:
    """The kinds of events that are used: those wanted, or all there are; in the order of `OBJECTIVES`.

    Raises:
        UserError: an objective of which the log has no event.
    """
    there = _kinds_of_events(workspace)
    if missing := sorted(set(wanted or ()) - there):
        raise UserError(
            f"search.objectives names {missing[0]}, but the log has no {missing[0]} event; remove it there, "
            "or add a source of such events (or, for searches, log.queries)"
        )
    used: tuple[Objective, ...] = tuple(name for name in OBJECTIVES if name in (wanted or there))
    return used or ("recommendation",)


def _kinds_of_events(workspace: Workspace) -> set[str]:
    """The kinds of events in all stages; each stage's rows are looked through once in this process."""
    rows = stage_rows(workspace)
    there = {row["digest"]: _kinds[row["digest"]] for row in rows if row["digest"] in _kinds}
    if fresh := [(index, row) for index, row in enumerate(rows) if row["digest"] not in there]:
        events = read_stages(workspace, [index for index, _ in fresh], ["event"])
        found = dict(events.group_by("stage").agg(pl.col("event").unique()).iter_rows())
        there |= {row["digest"]: frozenset(found.get(index, ())) for index, row in fresh}
        # Nothing is remembered of a file that is not the one that was written.
        sound = (row for index, row in fresh if sha256_if_there(workspace.stage_file(index)) == row.get("sha256", ""))
        _kinds.update((row["digest"], there[row["digest"]]) for row in sound)
    return set().union(*there.values())


_kinds: dict[str, frozenset[str]] = {}
"""By digest of a stage's content: the kinds of its events."""


def _query_numbers(frame: pl.DataFrame) -> tuple[IntArray, tuple[str, ...]]:
    """(N,) place of each search's query among the distinct ones, which are sorted; -1 for other events."""
    searched = frame.select(query=pl.when(pl.col("event") == "search").then(pl.col("query").fill_null("")))
    texts = searched["query"].drop_nulls().unique().sort()
    places = pl.DataFrame({"query": texts, "number": np.arange(len(texts), dtype=np.int64)})
    numbers = searched.join(places, on="query", how="left", maintain_order="left")["number"].fill_null(-1)
    return numbers.to_numpy().astype(np.int64), tuple(texts.to_list())


def stage_events(
    workspace: Workspace, stage: int, objectives: Collection[Objective] = ("recommendation",)
) -> pl.DataFrame:
    """The events of one stage: user_id, item_id, timestamp, by user and time; with searches event and query besides.

    The stored file breaks ties of time by item id, which a sequence model would learn: the order of an invoice's lines
    would be their article numbers. Here events of a user at one instant stand in a scrambled order that depends on
    nothing but the stage's own events; searches come after the instant's other events, those of one query together.
    """
    rows = pl.read_parquet(workspace.stage_file(stage), columns=_columns(objectives))
    return _in_order(rows.with_columns(stage=pl.lit(stage)), objectives).drop("stage")


def _columns(objectives: Collection[Objective]) -> list[str]:
    """What is read of a stage's file: its queries only where searches are used."""
    return [name for name in COLUMNS if name != "query" or "search" in objectives]


def _in_order(frame: pl.DataFrame, objectives: Collection[Objective]) -> pl.DataFrame:
    """The events of the kinds `objectives`, stage by stage, each as `stage_events` says."""
    if frame["timestamp"].null_count() and frame["stage"].n_unique() > 1:
        return pl.concat(_in_order(one, objectives) for one in frame.partition_by("stage", maintain_order=True))
    searching = "search" in objectives
    frame = frame.filter(pl.col("event").is_in(list(objectives)))
    if not searching:
        frame = frame.drop("event")
    if frame["timestamp"].null_count():  # a stage without a clock stands as it is stored
        return frame
    ranks = pl.col("user_id", "item_id").rank("dense").over("stage")
    places = frame.select(ranks, pl.col("timestamp").to_physical()).to_numpy()
    user, item, time = places.astype(np.uint64).T
    frame = frame.with_columns(tie=_scramble(_scramble(_scramble(user) ^ item) ^ time))
    if not searching:
        return frame.sort("stage", "user_id", "timestamp", "tie").drop("tie")
    texts = frame.select(pl.col("query").rank("dense").over("stage").fill_null(0)).to_series()
    frame = frame.with_columns(text=_scramble(texts.to_numpy()))
    return frame.sort("stage", "user_id", "timestamp", "event", "text", "tie").drop("text", "tie")


def runs(starts: IntArray, lengths: IntArray) -> IntArray:
    """start, start + 1, … of every run, one run after the other."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _scramble(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A fixed one-to-one map of 64-bit numbers without visible pattern (the finaliser of splitmix64)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _basket_numbers(frame: pl.DataFrame, offsets: IntArray, together: bool) -> IntArray:
    starts = np.ones(len(frame), dtype=bool)
    if together and frame["timestamp"].null_count() == 0:
        same = (frame["timestamp"] == frame["timestamp"].shift(1)) & (frame["stage"] == frame["stage"].shift(1))
        starts = ~same.fill_null(False).to_numpy()
    starts[offsets[:-1]] = True
    running = np.cumsum(starts) - 1
    return (running - np.repeat(running[offsets[:-1]], np.diff(offsets))).astype(np.int64)
