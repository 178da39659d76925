"""The item table as it was read, and the catalogue made of it, on a disk that rots."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks import growing
from benchmarks.growing import NOW, opened, week, write_rows
from stages import item_table
from stages import items as catalogue
from stages.append import grow_catalogue, take_new_rows
from stages.config import Config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.item_table import mend_item_table
from stages.items import build_semantic_ids
from stages.workspace import Workspace
from tests.stocked import rows_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Workspace]:
    """A workspace of two stages; tests work on copies."""
    return opened(tmp_path_factory.mktemp("shop") / "base")


@pytest.fixture
def shop(base: tuple[Config, Workspace], tmp_path: Path) -> tuple[Config, Workspace]:
    """One of one's own."""
    folder = tmp_path / "shop"
    shutil.copytree(base[1].root.parent, folder)
    return growing.load_config(folder / "shop.toml"), Workspace(folder / "workspace")


@pytest.fixture
def grown(shop: tuple[Config, Workspace]) -> tuple[Config, Workspace]:
    """One with a stage more, whose item has no codes yet."""
    write_rows(events_of(shop[1]) / "weeks.csv", week(2) + week(3))
    assert take_new_rows(*shop, now=NOW).closed == (2,)
    return shop


def events_of(workspace: Workspace) -> Path:
    return workspace.root.parent / "events"


def raw(workspace: Workspace) -> Path:
    return workspace.catalogue / "raw.parquet"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(bytes(content))


def brought_up_to_date(config: Config, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What a night does for the items of new stages; their rows."""
    grow_catalogue(config, workspace)
    build_semantic_ids(config, workspace)
    return rows_of(workspace)


def test_a_cut_catalogue_is_built_anew_before_the_items_of_a_new_stage_join_it(
    grown: tuple[Config, Workspace], tmp_path: Path
) -> None:
    config, workspace = grown
    whole = Workspace(tmp_path / "whole")
    shutil.copytree(workspace.root, whole.root)
    cut(workspace.catalogue / "items.parquet")
    assert brought_up_to_date(config, workspace) == brought_up_to_date(config, whole)


def test_a_damaged_catalogue_takes_no_new_texts_for_items_it_had_codes_for(grown: tuple[Config, Workspace]) -> None:
    config, workspace = grown
    before = rows_of(workspace)
    table = workspace.root.parent / "items.csv"
    table.write_text(table.read_text().replace("red chair number 0,", "renamed,"))
    cut(workspace.catalogue / "items.parquet")
    after = brought_up_to_date(config, workspace)
    assert {item: after[item] for item in before} == before


@pytest.mark.parametrize("seed", range(20))
def test_no_flipped_bit_of_the_stored_item_table_moves_a_code_or_stops_a_night(
    grown: tuple[Config, Workspace], tmp_path: Path, seed: int
) -> None:
    config, workspace = grown
    whole = Workspace(tmp_path / "whole")
    shutil.copytree(workspace.root, whole.root)
    flip(raw(workspace), random.Random(seed).randrange(2**20))  # noqa: S311
    assert brought_up_to_date(config, workspace) == brought_up_to_date(config, whole)


@pytest.mark.parametrize("noted", [True, False])
def test_a_damaged_item_table_is_set_aside_and_read_from_the_sources(
    grown: tuple[Config, Workspace], caplog: pytest.LogCaptureFixture, noted: bool
) -> None:
    config, workspace = grown
    if not noted:  # as an earlier version left it: the catalogue's manifest vouches for the file
        (workspace.catalogue / "raw.json").unlink()
    stored = pl.read_parquet(raw(workspace))
    cut(raw(workspace))
    damaged = raw(workspace).read_bytes()
    mend_item_table(config, workspace)
    assert pl.read_parquet(raw(workspace)).equals(stored)
    assert (workspace.catalogue / "quarantine" / "raw.parquet").read_bytes() == damaged
    assert "raw.parquet: missing, or not the file that was written; its rows are read from the sources" in caplog.text
    caplog.clear()
    mend_item_table(config, workspace)
    assert not caplog.text


@pytest.mark.parametrize("added", [True, False])
def test_texts_that_changed_in_the_sources_meanwhile_move_no_code_where_the_stored_ones_rotted(
    shop: tuple[Config, Workspace], added: bool
) -> None:
    config, workspace = shop
    if added:
        write_rows(events_of(workspace) / "weeks.csv", week(2) + week(3))
        take_new_rows(config, workspace, now=NOW)
    before = rows_of(workspace)
    table = workspace.root.parent / "items.csv"
    table.write_text(table.read_text().replace("chair", "table"))
    cut(raw(workspace))
    after = brought_up_to_date(config, workspace)
    assert {item: after[item] for item in before} == before
    assert len(after) == len(before) + added


def test_a_damaged_item_table_without_its_sources_is_named_with_its_remedy(grown: tuple[Config, Workspace]) -> None:
    config, workspace = grown
    (workspace.root.parent / "items.csv").unlink()
    cut(raw(workspace))
    with pytest.raises(UserError, match=r"raw\.parquet: missing, or not the file .*items\.csv.*restore .* a backup"):
        grow_catalogue(config, workspace)
    with pytest.raises(UserError, match=r"raw\.parquet: missing, or not the file .*items\.csv.*restore .* a backup"):
        build_semantic_ids(config, workspace)


def killed_at_the_note(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A kill right before or after the item table's note is written."""
    write = item_table.write_json

    def dying(*arguments: object, **more: object) -> None:
        if place == "after":
            write(*arguments, **more)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(item_table, "write_json", dying)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_growth_of_the_item_table_killed_at_its_note_is_believed(
    grown: tuple[Config, Workspace], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    config, workspace = grown
    table = workspace.root.parent / "items.csv"
    table.write_text(table.read_text() + "i98,brass lamp,lights\n")
    killed_at_the_note(monkeypatch, place)
    with pytest.raises(KeyboardInterrupt):
        grow_catalogue(config, workspace)
    monkeypatch.undo()
    assert grow_catalogue(config, workspace) == 1
    assert not caplog.text


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_catalogue_killed_while_it_is_written_is_the_old_one_or_the_new_one(
    grown: tuple[Config, Workspace], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    config, workspace = grown
    before = rows_of(workspace)
    settle = catalogue.settle_codes

    def dying(own: Workspace) -> bool:
        if (own.catalogue / "next.json").exists():
            if place == "after":
                settle(own)
            raise KeyboardInterrupt
        return settle(own)

    monkeypatch.setattr(catalogue, "settle_codes", dying)
    with pytest.raises(KeyboardInterrupt):
        build_semantic_ids(config, workspace)
    monkeypatch.undo()
    if place == "before":  # until somebody ends it, it can be read by nobody
        with pytest.raises(UserError, match=r"items.parquet"):
            load_dataset(config, workspace)
        assert catalogue.settle_codes(workspace)
        assert len(load_dataset(config, workspace).catalogue.item_ids) >= len(before)
    said: list[str] = []
    build_semantic_ids(config, workspace, said.append)
    assert not any("differ from their manifest" in line for line in said)
    after = rows_of(workspace)
    assert {item: after[item] for item in before} == before


@pytest.mark.parametrize("writes", range(9))
def test_a_refit_killed_at_any_write_leaves_the_old_quantizer_or_the_new_one(
    shop: tuple[Config, Workspace], monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    config, workspace = shop
    other = config.model_copy(update={"items": config.items.model_copy(update={"dimensions": 3})})
    done, replace = iter(range(writes)), os.replace

    def dying(*paths: Path) -> None:
        if next(done, None) is None:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        build_semantic_ids(other, workspace)
    monkeypatch.undo()
    catalogue.settle_codes(workspace)
    decided = writes > 4  # vectors, codebooks, quantizer.json, next.json, items.parquet
    assert build_semantic_ids(other if decided else config, workspace).reused
    assert not (workspace.catalogue / ".next").exists()


def test_a_mending_that_was_killed_still_says_that_rows_were_lost_and_moves_no_code(
    shop: tuple[Config, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workspace = shop
    before = rows_of(workspace)
    table = workspace.root.parent / "items.csv"
    table.write_text(table.read_text().replace("lamp", "lantern").replace("a", "o"))
    cut(workspace.catalogue / "raw.parquet")
    killed_at_the_note(monkeypatch, "after")
    with pytest.raises(KeyboardInterrupt):
        build_semantic_ids(config, workspace)
    monkeypatch.undo()
    build_semantic_ids(config, workspace)
    assert item_table.is_mended(workspace)
    assert {item: row["codes"] for item, row in rows_of(workspace).items()} == {
        item: row["codes"] for item, row in before.items()
    }


def test_a_rotten_list_of_refused_rows_is_written_anew(shop: tuple[Config, Workspace]) -> None:
    config, workspace = shop
    write_rows(events_of(workspace) / "bad.csv", [("u00", "i01", "never")])
    take_new_rows(config, workspace, now=NOW)
    path = workspace.rejects / "retrain.parquet"
    whole = path.read_bytes()
    cut(path)
    take_new_rows(config, workspace, now=NOW)
    assert path.read_bytes() == whole
