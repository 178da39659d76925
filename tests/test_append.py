"""New rows of a growing log: refused ones, closed stages, named files, dry runs, new items."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from benchmarks.growing import START, listing, seconds, week, write_rows
from stages import append
from stages.append import grow_catalogue, take_new_rows
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.items import build_semantic_ids
from stages.split import load_stages
from stages.waiting import load_waiting
from stages.workspace import Workspace
from tests.intake import LATE_ROW, WeeklyShop, take, with_rules


def test_refused_rows_are_counted_with_their_most_frequent_reason(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    write_rows(events / "night.csv", [*((f"u{row:02d}", "i01", "soon") for row in range(9)), ("", "i01", seconds(15))])
    found = take(config, workspace)
    assert (found.read, found.refused) == (320, 10)
    (reason,) = {row["reason"] for row in pl.read_parquet(workspace.rejects / "retrain.parquet").rows(named=True)[:9]}
    assert found.reason == reason
    assert f"320 rows read, 10 refused (most often: {reason})" in found.sentence()
    (events / "night.csv").unlink()
    quiet = take(config, workspace)
    assert (quiet.refused, quiet.reason) == (0, "")
    assert "refused" not in quiet.sentence()


def test_a_look_that_refuses_more_than_its_share_fails_and_takes_nothing(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    take(config, workspace)
    write_rows(events / "night.csv", [*week(2, users=2), *(("u00", "i01", "soon") for _ in range(2))])
    config = with_rules(config, refused_share=0.19)  # two of ten rows are refused
    before = listing(workspace.root)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"2 of 10 rows .*night\.csv.* retrain\.refused_share = 0\.19; nothing"):
            take(config, workspace, dry_run=dry_run)
        after = listing(workspace.root)
        assert (after.pop("rejects/retrain.parquet", None) is None) == dry_run
        assert after == before
    found = take(with_rules(config, refused_share=0.2), workspace)
    assert (found.taken, found.refused) == (8, 2)


@pytest.mark.parametrize("late", ["hold", "next_stage", "reject", "rebuild"])
def test_reading_only_new_files_ends_like_reading_all_of_them(
    weekly_shop: WeeklyShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    config, workspace, events = weekly_shop
    config = with_rules(config, late=late)
    copy = Workspace(tmp_path / "copy")
    shutil.copytree(workspace.root, copy.root)
    nights = [week(2), [*week(3)[:50], *week(0, users=45)], [*week(3), ("u01", "i02", seconds(900))], week(1, items=9)]
    for night, rows in enumerate([*nights, week(5)]):
        write_rows(events / f"night{night}.csv", rows)
        quick = take(config, workspace)
        with monkeypatch.context() as patched:
            patched.setattr(append, "load_waiting", lambda place: replace(load_waiting(place), files=frozenset()))
            whole = take(config, copy)
        assert quick.unread == night + 1 - (night == 0)
        assert replace(whole, read=0) == replace(quick, read=0, unread=0)
    assert listing(workspace.root) == listing(copy.root)


def test_a_closed_stage_begins_where_the_last_one_ended_and_moves_no_digest_and_no_code(
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
    before, old = load_stages(workspace), load_dataset(config, workspace)
    write_rows(events / "weeks.csv", week(2) + week(3))
    assert take(config, workspace).closed == (2,)
    stages = load_stages(workspace)
    assert stages[:2] == before
    assert stages[2].start == stages[1].end
    assert stages[2].end == (START + timedelta(days=21)).isoformat()
    assert (stages[2].events, stages[2].users, stages[2].new_items) == (160, 40, 1)
    grow_catalogue(config, workspace)
    build_semantic_ids(config, workspace)
    new = load_dataset(config, workspace)
    assert [new.digest(stage) for stage in range(2)] == [old.digest(stage) for stage in range(2)]
    known = len(old.catalogue.item_ids)
    assert new.catalogue.item_ids[:known] == old.catalogue.item_ids
    assert (new.catalogue.codes[:known] == old.catalogue.codes).all()
    assert len(new.catalogue.item_ids) == known + 1


def test_rows_survive_the_files_they_came_from(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    moved = write_rows(events / "week2.csv", week(2))
    take(config, workspace)
    moved.unlink()
    assert take(config, workspace).open == 160


def test_a_named_file_is_taken_and_the_sources_are_not_looked_at(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    write_rows(events / "week3.csv", week(3))
    elsewhere = write_rows(events.parent / "elsewhere" / "week2.csv", week(2))
    assert take(config, workspace, new=str(elsewhere)).taken == 160
    assert take(config, workspace, new=str(elsewhere)).taken == 0
    write_rows(elsewhere.with_name("more.csv"), week(2, users=42))
    assert take(config, workspace, new=str(elsewhere.parent)).taken == 8  # a folder
    write_rows(elsewhere.with_name("most.csv"), week(2, users=43))
    assert take(config, workspace, new=str(elsewhere.with_name("mo*.csv"))).taken == 4  # a glob


@pytest.mark.parametrize("new", ["~/named*.csv", "$HOME/named*.csv"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_named_pattern_may_begin_with_the_home_folder(
    weekly_shop: WeeklyShop, monkeypatch: pytest.MonkeyPatch, new: str, dry_run: bool
) -> None:
    config, workspace, events = weekly_shop
    monkeypatch.setenv("HOME", str(events.parent))
    write_rows(events.parent / "named1.csv", week(2))
    assert take(config, workspace, new=new, dry_run=dry_run).taken == 160


@pytest.mark.parametrize("new", ["", " "])
def test_an_empty_name_of_new_rows_is_refused_and_the_working_folder_is_not_read(
    weekly_shop: WeeklyShop, monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    config, workspace, events = weekly_shop
    write_rows(events / "week2.csv", week(2))
    monkeypatch.chdir(events)
    with pytest.raises(UserError, match="names nothing; give a file"):
        take(config, workspace, new=new)


def test_a_gate_that_looks_at_events_the_log_has_not_is_refused_before_anything_is_taken(
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
    config = with_rules(config, gate={"objective": "search"})
    write_rows(events / "week2.csv", week(2))
    before = listing(workspace.root)
    with pytest.raises(UserError, match=r'retrain\.gate\.objective = "search", but neither'):
        take(config, workspace)
    assert listing(workspace.root) == before
    header, *rows = (events / "week2.csv").read_text().splitlines()
    searched = [f"{header},event,query", *(f"{row},search,red chair" for row in rows)]
    (events / "week2.csv").write_text("\n".join([*searched, ""]))
    assert take(config, workspace).taken == 160


def test_a_date_in_the_future_closes_no_stage_and_is_taken_when_its_time_has_come(
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
    write_rows(events / "week2.csv", [*week(2), ("u00", "i01", seconds(70))])
    early = take_new_rows(config, workspace, now=START + timedelta(days=22))
    assert (early.closed, early.held, early.open) == ((), 1, 160)
    later = take_new_rows(config, workspace, now=START + timedelta(days=71))
    assert (later.closed, later.held, later.open) == ((2,), 0, 1)


def test_a_dry_run_changes_nothing_and_says_the_same(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    write_rows(events / "weeks.csv", [*week(2), *week(3), LATE_ROW])
    before = listing(workspace.root)
    told = take(config, workspace, dry_run=True)
    assert listing(workspace.root) == before
    assert take(config, workspace) == told


def test_new_items_get_their_texts_and_known_ones_keep_theirs(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    table = events.parent / "items.csv"
    table.write_text(table.read_text().replace("red chair number 0,", "renamed,") + "i99,brass lamp,lights\n")
    write_rows(events / "weeks.csv", [*week(2), ("u00", "i99", seconds(15.5)), *week(3)])
    take(config, workspace)
    assert grow_catalogue(config, workspace) == 1
    build_semantic_ids(config, workspace)
    titles = dict(zip(*[(c := load_dataset(config, workspace).catalogue).item_ids, c.titles], strict=True))
    assert titles["i99"] == "brass lamp"
    assert titles["i00"] == "red chair number 0"
    assert grow_catalogue(config, workspace) == 0
