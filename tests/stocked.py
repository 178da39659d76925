"""Workspaces that hold stages and a catalogue, from rows written down in a test."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stages.config import Config
from stages.item_table import store_item_table
from stages.workspace import Workspace, digest_of, sha256_file, write_json

START = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
Event = tuple[str, str, float]  # user, item, days after START
EVENT_SCHEMA = {
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Datetime("us", "UTC"),
    "event": pl.String,
    "query": pl.String,
}
RAW_SCHEMA = {
    "item_id": pl.String,
    "title": pl.String,
    "text": pl.String,
    "categories": pl.List(pl.String),
    "timestamp": pl.Datetime("us", "UTC"),
}


def settings_of(**items: Any) -> Config:
    values = {"name": "items", "workspace": "w", "log": {"kind": "sequences", "sequences": "log.txt"}}
    small = {"levels": 3, "codes_per_level": 16, "dimensions": 8}
    return Config.model_validate({**values, "items": {**small, **items}})


def write_stages(workspace: Workspace, stages: list[list[Event]], clock: bool = True, grown: bool = False) -> None:
    """Stage files and manifest by the file contract, a stage every ten days; `grown`: as a retraining writes them."""
    rows = []
    for index, events in enumerate(stages):
        frame = pl.DataFrame(
            [(user, item, START + day * DAY if clock else None, "recommendation", None) for user, item, day in events],
            schema=EVENT_SCHEMA,
            orient="row",
        )
        order = ["user_id", "timestamp", "item_id"] if clock else ["user_id"]
        frame = frame.sort(order, maintain_order=True)
        path = workspace.stage_file(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)
        ends = clock and index < len(stages) - 1
        rows.append(
            {
                "index": index,
                "end": (START + 10 * (index + 1) * DAY).isoformat() if ends else None,
                "digest": digest_of(frame.with_columns(pl.col("timestamp").cast(pl.String)).rows()),
                "sha256": sha256_file(path),
            }
        )
    appended = {"appended": []} if grown else {}
    write_json(workspace.stages / "manifest.json", {"schema": 1, "clock": clock, "stages": rows, **appended})


def write_raw(
    workspace: Workspace, rows: list[tuple[str, str | None, str | None, list[str] | None, float | None]]
) -> None:
    dated = [(*row[:4], None if row[4] is None else START + row[4] * DAY) for row in rows]
    store_item_table(workspace, pl.DataFrame(dated, schema=RAW_SCHEMA, orient="row"))


def invent_stages(new: tuple[int, ...] = (24, 6, 4), seed: int = 0) -> list[list[Event]]:
    """Two tastes; every stage brings `new` items, and its users take known and new ones of their taste."""
    random, stages, known = np.random.default_rng(seed), [], 0
    for index, count in enumerate(new):
        fresh = np.arange(known, known + count)
        known += count
        events = []
        for user in range(20):
            taken = random.choice(np.arange(known)[np.arange(known) % 2 == user % 2], size=8)
            taken[1] = fresh[(user // 2 * 2 + user % 2) % count]
            taken[0] = fresh[user % count]
            events += [(f"u{user:02d}", f"i{item:03d}", 10 * index + 1 + step) for step, item in enumerate(taken)]
        stages.append(events)
    return stages


def words(count: int = 34) -> list[tuple[str, str | None, str | None, list[str] | None, float | None]]:
    shapes = ("mug", "scarf")
    return [
        (f"i{n:03d}", f"{('red', 'blue', 'green')[n % 3]} {shapes[n % 2]} no {n}", None, [shapes[n % 2]], None)
        for n in range(count)
    ]


def made(folder: Path, stages: list[list[Event]], raw: Any = None, clock: bool = True) -> Workspace:
    workspace = Workspace(folder)
    write_stages(workspace, stages, clock)
    if raw is not None:
        write_raw(workspace, raw)
    return workspace


def rows_of(workspace: Workspace) -> dict[str, dict[str, Any]]:
    frame = pl.read_parquet(workspace.catalogue / "items.parquet")
    return {row["item_id"]: row for row in frame.iter_rows(named=True)}
