"""The stages' events as flat arrays: one row of items a user, oldest first, cut by stage.

Item numbers are rows of `catalogue/items.parquet`, which is ordered by the stage in which an item first appears: the
items known by the end of stage t are exactly the numbers below `known(t)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from stages.workspace import Workspace, read_json

IntArray: TypeAlias = npt.NDArray[np.int64]


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
    """

    item_ids: list[str]
    titles: list[str]
    first_stage: IntArray
    codes: IntArray
    sizes: tuple[int, ...]
    shipped: bool
    from_events: bool

    def known(self, stage: int) -> int:
        """How many items have appeared by the end of `stage`; they are numbers 0 … known - 1."""
        return int(np.searchsorted(self.first_stage, stage, side="right"))


@dataclass(frozen=True)
class Interactions:
    """Events of all stages, sorted by user, stage and time.

    Attributes:
        user_ids: (U,) the log's own ids, sorted.
        offsets: (U + 1,) user u's events are rows offsets[u] … offsets[u + 1] - 1.
        items: (N,) item numbers.
        stages: (N,) stage of each event, rising within a user.
        baskets: (N,) basket of each event within its user, rising from 0; with baskets off every event is its own.
    """

    user_ids: list[str]
    offsets: IntArray
    items: IntArray
    stages: IntArray
    baskets: IntArray

    @property
    def users(self) -> IntArray:
        """(N,) user number of each event."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

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
    )


def load_interactions(workspace: Workspace, baskets: bool) -> Interactions:
    """Read every stage's events; with `baskets`, events of a user at one instant of one stage belong together."""
    count = len(read_json(workspace.stages / "manifest.json")["stages"])
    numbers = pl.read_parquet(workspace.catalogue / "items.parquet", columns=["item_id"]).with_row_index("item")
    frame = pl.concat(
        stage_events(workspace, index).with_columns(stage=pl.lit(index, pl.Int64)) for index in range(count)
    )
    # A stage's events come sorted by user and time; the stable sort keeps that order within a user and stage.
    frame = frame.join(numbers, on="item_id", how="left", maintain_order="left").sort("user_id", maintain_order=True)
    users = frame["user_id"].rle()
    offsets = np.concatenate([[0], np.cumsum(users.struct.field("len").to_numpy())]).astype(np.int64)
    return Interactions(
        user_ids=users.struct.field("value").to_list(),
        offsets=offsets,
        items=frame["item"].to_numpy().astype(np.int64),
        stages=frame["stage"].to_numpy().astype(np.int64),
        baskets=_basket_numbers(frame, offsets, baskets),
    )


def stage_events(workspace: Workspace, stage: int) -> pl.DataFrame:
    """The recommendation events of one stage: user_id, item_id, timestamp, by user and time.

    The stored file breaks ties of time by item id, which a sequence model would learn: the order of an invoice's lines
    would be their article numbers. Here events of a user at one instant stand in a scrambled order that depends on
    nothing but the stage's own events.
    """
    columns = ["user_id", "item_id", "timestamp", "event"]
    frame = pl.read_parquet(workspace.stage_file(stage), columns=columns)
    frame = frame.filter(pl.col("event") == "recommendation").drop("event")
    if frame["timestamp"].null_count():
        return frame
    places = frame.select(pl.col("user_id", "item_id").rank("dense"), pl.col("timestamp").to_physical()).to_numpy()
    user, item, time = places.astype(np.uint64).T
    scrambled = _scramble(_scramble(_scramble(user) ^ item) ^ time)
    return frame.with_columns(tie=scrambled).sort("user_id", "timestamp", "tie").drop("tie")


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
