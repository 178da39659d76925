"""A small shop whose log grows by files in a folder, and the workspace that follows it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stages.config import Config, load_config
from stages.items import build_semantic_ids
from stages.log import read_log
from stages.split import split_stages
from stages.workspace import Workspace

START = datetime(2025, 1, 6, tzinfo=UTC)
"""A Monday."""
NOW = datetime(2025, 6, 1, tzinfo=UTC)
CONFIG = """
name = "growing"
workspace = "unused"
seeds = [0]
[[log.sources]]
path = "events/*.csv"
time_unit = "s"
[[catalogue.sources]]
path = "items.csv"
[stages]
instants = ["2025-01-13T00:00:00Z"]
[items]
dimensions = 4
codes_per_level = 8
[backbone]
hidden = 16
layers = 1
heads = 2
feed_forward = 32
precision = "float32"
[training]
{training}
[evaluation]
matrix_users = 0
bootstrap = 100
[retrain]
method = "{method}"
"""
TRAINING = "first_epochs = 1\nepochs = 1"
OPEN_GATE = """
[retrain.gate]
minimum = -1
worst_slice = 1
users = 1
latency_ms = 60000
"""
"""A gate that every challenger passes."""
ITEMS = 24


def seconds(day: float) -> int:
    """Unix time of a day after `START`."""
    return int((START + timedelta(days=day)).timestamp())


def week(number: int, users: int = 40, visits: int = 4, items: int = 12) -> list[tuple[str, str, int]]:
    """Every user takes `visits` items in turn on the first days of a week; later weeks bring an item each."""
    rows = []
    for user in range(users):
        for visit in range(visits):
            item = (user + visit) % (items + number)
            rows.append((f"u{user:02d}", f"i{item:02d}", seconds(7 * number + visit) + user))
    return rows


def write_rows(path: Path, rows: list[tuple[str, str, int | str]]) -> Path:
    """A file of the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(map(str, row)) for row in rows]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n", encoding="utf-8")
    return path


def write_items(path: Path, count: int = ITEMS) -> None:
    """The item table; items of one half sound alike."""
    words = [f"i{item:02d},red chair number {item},furniture" for item in range(count // 2)]
    words += [f"i{item:02d},green tea number {item},drinks" for item in range(count // 2, count)]
    path.write_text("\n".join(["item_id,title,categories", *words]) + "\n", encoding="utf-8")


def settings(retrain: str = "", method: str = "single", training: str = TRAINING) -> str:
    """The shop's config.

    Args:
        retrain: more lines of the table [retrain].
        method: what is retrained.
        training: lines of [training].
    """
    return CONFIG.format(training=training, method=method) + retrain


def write_shop(folder: Path, retrain: str = "", method: str = "single", training: str = TRAINING) -> Path:
    """Two weeks of rows in one file, an item table, and the config; returns the config's path.

    Args:
        folder: where they go.
        retrain: as of `settings`.
        method: as of `settings`.
        training: as of `settings`.
    """
    write_rows(folder / "events" / "base.csv", week(0) + week(1))
    write_items(folder / "items.csv")
    path = folder / "shop.toml"
    path.write_text(settings(retrain, method, training), encoding="utf-8")
    return path


def opened(folder: Path, retrain: str = "") -> tuple[Config, Workspace]:
    """The shop's workspace with its two first stages and semantic IDs; nothing trained."""
    config, workspace = load_config(write_shop(folder, retrain)), Workspace(folder / "workspace")
    workspace.claim("growing")
    read_log(config, workspace)
    split_stages(config, workspace)
    build_semantic_ids(config, workspace)
    return config, workspace


def listing(root: Path) -> dict[str, str]:
    """Every file below `root` and the digest of its bytes."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
