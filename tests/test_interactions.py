"""Events at one instant have no order, so none may be learnt from how they are stored."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from stages.dataset import load_dataset
from stages.errors import UserError
from stages.interactions import _in_order, load_interactions, stage_events
from stages.search_config import Objective
from stages.workspace import Workspace, write_json
from tests.tiny import checkerboard, config, write_stage

START = datetime(2024, 1, 1, tzinfo=UTC)


def shop(root: Path, events: list[tuple[str, str, int, str]]) -> Workspace:
    """One stage of (user, item, minute, event) rows, stored as `split` stores them."""
    workspace = Workspace(root)
    rows = sorted((user, START + timedelta(minutes=minute), item, event) for user, item, minute, event in events)
    schema = {"user_id": pl.String, "timestamp": pl.Datetime("us", "UTC"), "item_id": pl.String, "event": pl.String}
    frame = pl.DataFrame(rows, schema=schema, orient="row").with_columns(query=pl.lit(None, pl.String))
    workspace.stage_file(0).parent.mkdir(parents=True)
    frame.write_parquet(workspace.stage_file(0))
    write_json(workspace.stages / "manifest.json", {"stages": [{"digest": "x"}]})
    workspace.catalogue.mkdir()
    pl.DataFrame({"item_id": sorted(set(frame["item_id"]))}).write_parquet(workspace.catalogue / "items.parquet")
    return workspace


def test_events_of_items_without_codes_are_left_out_and_counted(tmp_path: Path) -> None:
    workspace = shop(tmp_path, [("u0", "i0", 0, "recommendation"), ("u0", "i1", 1, "recommendation")])
    pl.DataFrame({"item_id": ["i0"]}).write_parquet(workspace.catalogue / "items.parquet")
    found = load_interactions(workspace, baskets=False)
    assert found.uncoded == 1
    assert found.items.tolist() == [0]


@pytest.fixture
def baskets(tmp_path: Path) -> Workspace:
    return shop(
        tmp_path,
        [(f"u{user}", f"i{item:03d}", basket, "recommendation") for user in range(20) for basket in range(5)
         for item in np.random.default_rng([user, basket]).choice(300, 20, replace=False)],
    )  # fmt: skip


def test_the_order_inside_a_basket_says_nothing_about_the_ids(baskets: Workspace) -> None:
    own = load_interactions(baskets, baskets=True)
    within = (own.baskets[1:] == own.baskets[:-1]) & (own.users[1:] == own.users[:-1])
    rising = own.items[1:][within] > own.items[:-1][within]
    assert abs(rising.mean() - 0.5) < 4 * 0.5 / np.sqrt(within.sum())
    assert np.bincount(own.baskets[own.users == 0]).tolist() == [20] * 5


def test_baskets_stay_in_time_order_and_keep_their_items(baskets: Workspace) -> None:
    stored = pl.read_parquet(baskets.stage_file(0))
    read = stage_events(baskets, 0)
    assert read["timestamp"].to_list() == stored["timestamp"].to_list()
    assert read["user_id"].to_list() == stored["user_id"].to_list()
    assert read.sort("user_id", "timestamp", "item_id").equals(stored.select(read.columns))
    assert not read.equals(stored.select(read.columns))


def test_the_order_is_the_same_every_time(baskets: Workspace) -> None:
    assert stage_events(baskets, 0).equals(stage_events(baskets, 0))


def test_left_out_searches_are_as_if_they_were_not_in_the_log(tmp_path: Path) -> None:
    workspace = shop(
        tmp_path, [("u", "a", 0, "recommendation"), ("u", "b", 1, "search"), ("u", "c", 2, "recommendation")]
    )
    own = load_interactions(workspace, baskets=False, objectives=["recommendation"])
    assert own.items.tolist() == [0, 2]
    assert own.query is None


@pytest.mark.parametrize("objectives", [("recommendation",), ("recommendation", "search")])
@pytest.mark.parametrize("timeless", [False, True])
def test_all_stages_read_together_stand_as_each_read_alone(objectives: tuple[Objective, ...], timeless: bool) -> None:
    rng, count = np.random.default_rng(0), 600
    numbers = rng.integers(0, 5, count).tolist()
    stages = np.sort(rng.integers(0, 4, count))
    searched = rng.random(count) < 0.5
    hours = np.datetime64("2025-01-01", "us") + (3 * stages + rng.integers(0, 3, count)).astype("timedelta64[h]")
    rows = pl.DataFrame(
        {
            "user_id": [f"u{number}" for number in rng.integers(0, 9, count)],
            "item_id": [f"i{number}" for number in rng.integers(0, 30, count)],
            "timestamp": pl.Series(hours).set(pl.Series(stages == 2), None) if timeless else hours,
            "event": np.where(searched, "search", "recommendation"),
            "query": [f"q{number}" if asks else None for number, asks in zip(numbers, searched, strict=True)],
            "stage": stages,
        }
    )
    alone = pl.concat(_in_order(part, objectives) for part in rows.partition_by("stage", maintain_order=True))
    assert _in_order(rows, objectives).equals(alone)
    assert not rows.drop("event", "query").equals(alone.select("user_id", "item_id", "timestamp", "stage"))


def test_the_log_is_parsed_once_and_its_files_are_checked_every_time(tmp_path: Path) -> None:
    workspace = checkerboard(tmp_path / "w")
    found = load_dataset(config(), workspace)
    assert load_dataset(config(), workspace) is found
    assert load_dataset(config(), checkerboard(tmp_path / "other", stages=2)).stages == 2
    items = workspace.catalogue / "items.parquet"
    load_dataset(config(), workspace)
    items.write_bytes(items.read_bytes() + b"?")
    with pytest.raises(UserError, match="not the file that its manifest names"):
        load_dataset(config(), workspace)


def test_another_stage_file_is_read_anew_even_under_the_old_name(tmp_path: Path) -> None:
    workspace = checkerboard(tmp_path / "w")
    before = load_dataset(config(), workspace).interactions.items
    write_stage(workspace, 1, [("s1u000", "i03"), ("s1u000", "i07")])
    assert len(load_dataset(config(), workspace).interactions.items) < len(before)
