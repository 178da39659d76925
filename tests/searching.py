"""A tiny workspace with searches: purchases walk the ring of items, and a query names the item it finds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from models.backbone import CONTROL_TOKENS
from models.words import WordVocabulary
from stages.config import Config
from stages.dataset import Dataset, load_dataset
from stages.workspace import Workspace
from tests import tiny

START = datetime(2024, 1, 1, tzinfo=UTC)
Row = tuple[str, str, int, str | None]
"""user, item, minute, query; a row without a query is a purchase."""
WORDS = WordVocabulary(["find", "item"], CONTROL_TOKENS)
VISIT: list[Row] = [
    ("u", "i00", 0, None),
    ("u", "i01", 10, None),
    ("u", "i01", 10, "red shoe"),
    ("u", "i02", 20, "blue shoe"),
    ("u", "i03", 20, "blue shoe"),
    ("u", "i04", 30, None),
]
"""Stage 0 of one user: a purchase, a search with its purchase, two searches for one thing, a purchase."""


def ring(root: Path, stages: int = 3, users: int = 24, length: int = 9) -> Workspace:
    """Users walk the ring of items; the second and every later third step was searched for, as "Item <n>" in words.

    Users are new at each stage. A searched step has two events at one minute: the search and the purchase.
    """
    workspace = Workspace(root)
    workspace.claim("tiny")
    for stage in range(stages):
        rows: list[Row] = []
        for user in range(users):
            for place in range(length):
                item, minute = (user + place) % tiny.ITEMS, 10_000 * stage + 10 * place
                rows.append((f"s{stage}u{user:03d}", f"i{item:02d}", minute, None))
                if (place + user) % 3 == 1:
                    rows.append((f"s{stage}u{user:03d}", f"i{item:02d}", minute, f"find thing{item}"))
        write_stage(workspace, stage, rows)
    tiny.write_stage_manifest(workspace, stages)
    tiny.write_catalogue(workspace)
    return workspace


def write_stage(workspace: Workspace, stage: int, rows: list[Row]) -> None:
    """One stage's events, stored as `split` stores them."""
    schema = {"user_id": pl.String, "item_id": pl.String, "minute": pl.Int64, "query": pl.String}
    frame = pl.DataFrame(rows, schema=schema, orient="row").select(
        "user_id",
        "item_id",
        timestamp=(pl.lit(START) + pl.duration(minutes="minute")).cast(pl.Datetime("us", "UTC")),
        event=pl.when(pl.col("query").is_null()).then(pl.lit("recommendation")).otherwise(pl.lit("search")),
        query=pl.col("query"),
    )
    path = workspace.stage_file(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.sort("user_id", "timestamp", "item_id", "event", "query").write_parquet(path)


def log(root: Path, stages: list[list[Row]]) -> Workspace:
    """A workspace of the stages given, on the tiny catalogue."""
    workspace = Workspace(root)
    workspace.claim("tiny")
    for stage, rows in enumerate(stages):
        shifted = [(user, item, minute + 10_000 * stage, query) for user, item, minute, query in rows]
        write_stage(workspace, stage, shifted)
    tiny.write_stage_manifest(workspace, len(stages))
    tiny.write_catalogue(workspace)
    return workspace


def minute(number: int) -> datetime:
    """The instant of a minute."""
    return START + timedelta(minutes=number)


def dataset(root: Path, stages: list[list[Row]], config: Config | None = None) -> Dataset:
    """A prepared log of these stages."""
    return load_dataset(config or tiny.config(), log(root, stages))
