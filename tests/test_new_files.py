"""Which files a look reads, and what it does with one that is written while it is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks.growing import listing, seconds, week, write_rows
from stages import append, reading
from stages.config import Source
from stages.errors import UserError
from stages.files import File
from stages.waiting import load_waiting
from tests.intake import WeeklyShop, take


def test_the_same_files_twice_change_nothing(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    assert take(config, workspace).taken == 0
    write_rows(events / "week2.csv", week(2))
    first = take(config, workspace)
    assert (first.taken, first.closed, first.open) == (160, (), 160)
    before = listing(workspace.root)
    second = take(config, workspace)
    assert (second.taken, second.late, second.open) == (0, 0, 160)
    assert listing(workspace.root) == before
    write_rows(events / "copy.csv", week(2) + week(1))
    assert take(config, workspace).taken == 0
    after = listing(workspace.root)
    assert after.pop("open/manifest.json") != before.pop("open/manifest.json")  # one file more was taken
    assert after == before


@pytest.mark.parametrize("pattern", ["events/*.csv", "events"])
def test_a_folder_that_its_producer_emptied_gives_no_rows_and_a_line(
    weekly_shop: WeeklyShop, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, workspace, events = weekly_shop
    (source,) = config.log.sources
    place = source.model_copy(update={"path": str(events.parent / pattern)})
    config = config.model_copy(update={"log": config.log.model_copy(update={"sources": [place]})})
    write_rows(events / "week2.csv", week(2))
    take(config, workspace)
    for file in events.iterdir():
        file.unlink()
    for dry_run in (True, False):
        caplog.clear()
        found = take(config, workspace, dry_run=dry_run)
        assert (found.read, found.taken, found.open, found.closed) == (0, 0, 160, ())
        assert f"{place.path}: no file is there; the source gives 0 rows" in caplog.text
    next((workspace.root / "open").glob("*.parquet")).unlink()
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        take(config, workspace)  # its rows can only come from there


def test_a_source_that_is_named_and_gone_is_an_error(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        take(config, workspace, new=str(events / "no*.csv"))
    shutil.rmtree(events)  # as where a disk is not mounted
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        take(config, workspace)
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        append.read_events(config, reading.silent)


def test_a_file_taken_whole_is_not_read_again_until_it_or_its_reading_changes(
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
    write_rows(events / "bad.csv", [*week(2, users=2), ("", "i01", seconds(14))])
    first = take(config, workspace)
    assert (first.read, first.unread) == (320 + 8, 0)
    again = take(config, workspace)
    assert (again.read, again.unread, again.taken) == (8, 1, 0)  # who has refused rows is listed at every look
    assert pl.read_parquet(workspace.rejects / "retrain.parquet").height == 1
    write_rows(events / "bad.csv", week(2, users=3))
    grown = take(config, workspace)
    assert (grown.read, grown.unread, grown.taken) == (12, 1, 4)
    assert (take(config, workspace).read, take(config, workspace).unread) == (0, 2)
    (events / "bad.csv").rename(events / "good.csv")
    assert take(config, workspace).unread == 2
    stated = config.log.model_copy(update={"latest": "2025-01-20"})
    assert take(config.model_copy(update={"log": stated}), workspace).unread == 0
    (workspace.root / "open" / "manifest.json").unlink()
    assert take(config, workspace).read == 332


LAST = ("u00", "i01", seconds(17))


def add_row(path: Path) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(",".join(map(str, LAST)) + "\n")


def test_a_row_written_behind_a_file_that_was_just_read_comes_with_the_next_look(
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
    added = write_rows(events / "week2.csv", week(2))
    write_rows(events / "week2b.csv", week(2, users=41))
    told = iter([added])

    def say(message: str) -> None:
        if message.startswith("week2.csv"):
            add_row(next(told))

    assert take(config, workspace, progress=say).open == 164
    second = take(config, workspace)
    assert (second.taken, second.unread, second.open) == (1, 2, 165)
    assert take(config, workspace).unread == 3


def test_a_file_that_goes_while_it_is_read_leaves_its_rows(
    weekly_shop: WeeklyShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workspace, events = weekly_shop
    gone = write_rows(events / "week2.csv", week(2))
    sift_events = reading.sift_events

    def then_gone(*arguments: Any) -> Any:
        yield from sift_events(*arguments)
        if arguments[-1] == str(gone):
            gone.unlink()

    monkeypatch.setattr(reading, "sift_events", then_gone)
    assert take(config, workspace).open == 160
    assert (take(config, workspace).open, take(config, workspace).unread) == (160, 1)


def test_a_row_that_its_producer_is_in_the_middle_of_is_left_to_the_next_look(
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
    lines = "".join(f"{at},{user},{item}\n" for user, item, at in week(2))
    path = events / "week2.csv"
    path.write_text(f"timestamp,user_id,item_id\n{lines}"[:-2])  # of "i09" there is "i0"
    first = take(config, workspace)
    assert (first.open, first.refused, first.reason) == (159, 1, reading.UNFINISHED)
    path.write_text(f"timestamp,user_id,item_id\n{lines}")
    second = take(config, workspace)
    assert (second.taken, second.open, second.refused) == (1, 160, 0)
    rows = load_waiting(workspace).open
    assert "i0" not in rows["item_id"].to_list()
    path.write_text(f"timestamp,user_id,item_id\n{lines[:-1]}")  # long written, no last end of line: nothing waits
    os.utime(path, (0, 0))
    assert (take(config, workspace).refused, take(config, workspace).open) == (0, 160)


@pytest.mark.parametrize("content", ["grown", "the same"])
def test_a_file_that_is_written_while_it_is_read_is_read_again(
    weekly_shop: WeeklyShop, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    config, workspace, events = weekly_shop
    grown = write_rows(events / "week2.csv", week(2))
    text, raw_file, sift_events = grown.read_text(), reading.raw_file, reading.sift_events

    def half_there(source: Source, file: File, *rest: Any) -> Any:
        if file.path == grown:
            grown.write_text(text[: text.index("u20")])
        return raw_file(source, file, *rest)

    def then_whole(*arguments: Any) -> Any:
        yield from sift_events(*arguments)
        if arguments[-1] == str(grown):
            grown.write_text(text)
            if content == "grown":
                add_row(grown)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "raw_file", half_there)
        patched.setattr(reading, "sift_events", then_whole)
        assert 0 < take(config, workspace).open < 160
    second = take(config, workspace)
    assert (second.unread, second.open) == (1, 160 + (content == "grown"))
    assert take(config, workspace).unread == 2
