from __future__ import annotations

import os
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import growing
from benchmarks.growing import NOW, START, listing, opened, seconds, week, write_rows
from stages import append, reading
from stages.append import Intake, finish_commit, grow_catalogue, take_new_rows
from stages.closing import closings
from stages.config import Config, Source
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.files import File
from stages.items import build_semantic_ids
from stages.retrain_config import CloseConfig
from stages.split import TICK, load_stages
from stages.waiting import load_waiting
from stages.workspace import Workspace


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Workspace]:
    """A workspace of two stages; tests work on copies."""
    return opened(tmp_path_factory.mktemp("shop") / "base")


@pytest.fixture
def shop(base: tuple[Config, Workspace], tmp_path: Path) -> tuple[Config, Workspace, Path]:
    """Config, workspace and folder of log files of a shop of one's own."""
    folder = tmp_path / "shop"
    shutil.copytree(base[1].root.parent, folder)
    return growing.load_config(folder / "shop.toml"), Workspace(folder / "workspace"), folder / "events"


def with_rules(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"retrain": config.retrain.model_validate({"method": "single"} | changes)})


def take(config: Config, workspace: Workspace, **more: Any) -> Intake:
    return take_new_rows(config, workspace, now=NOW, **more)


def times(*days: float) -> pl.Series:
    return pl.Series([START + timedelta(days=day) for day in days], dtype=pl.Datetime("us", "UTC"))


def test_a_week_closes_once_an_event_of_a_later_week_is_there() -> None:
    rule = CloseConfig(period="1w")
    assert closings(times(0, 3, 6.9), rule) == []
    assert closings(times(0, 3, 7), rule) == [START + timedelta(days=7)]
    assert closings(times(0, 3, 22, 36), rule) == [START + timedelta(days=day) for day in (7, 28)]


def test_a_stage_of_n_events_takes_the_ones_tied_with_its_last_and_waits_for_a_later_one() -> None:
    rule = CloseConfig(events=2)
    assert closings(times(0, 1), rule) == []
    assert closings(times(0, 1, 1), rule) == []
    assert closings(times(0, 1, 1, 2), rule) == [START + timedelta(days=1) + TICK]


def test_closing_now_leaves_nothing_open_and_an_empty_stage_never_closes() -> None:
    rule = CloseConfig(period="1w")
    assert closings(times(0, 8), rule, close_now=True)[-1] == START + timedelta(days=8) + TICK
    assert closings(times(), rule, close_now=True) == []


@settings(max_examples=50, deadline=None)
@given(
    days=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    split=st.integers(1, 29),
    rule=st.sampled_from([CloseConfig(period="1w"), CloseConfig(period="3d"), CloseConfig(events=4)]),
)
def test_the_stages_are_the_same_whether_rows_come_at_once_or_in_two_looks(
    days: list[int], split: int, rule: CloseConfig
) -> None:
    ordered = times(*sorted(days))
    whole = closings(ordered, rule)
    early = closings(ordered[:split], rule)
    assert whole[: len(early)] == early
    rest = ordered.filter(ordered >= early[-1]) if early else ordered
    assert early + closings(rest, rule) == whole


def test_the_same_files_twice_change_nothing(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path], pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, workspace, events = shop
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


def test_a_source_that_is_named_and_gone_is_an_error(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        take(config, workspace, new=str(events / "no*.csv"))
    shutil.rmtree(events)  # as where a disk is not mounted
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        take(config, workspace)
    with pytest.raises(UserError, match="no such file, and nothing matches"):
        append.read_events(config, reading.silent)


def test_a_file_taken_whole_is_not_read_again_until_it_or_its_reading_changes(
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    config, workspace, events = shop
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


def test_refused_rows_are_counted_with_their_most_frequent_reason(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
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


def test_a_look_that_refuses_more_than_its_share_fails_and_takes_nothing(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
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


def test_rows_survive_the_files_they_came_from(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
    moved = write_rows(events / "week2.csv", week(2))
    take(config, workspace)
    moved.unlink()
    assert take(config, workspace).open == 160


def test_a_named_file_is_taken_and_the_sources_are_not_looked_at(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
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
    shop: tuple[Config, Workspace, Path], monkeypatch: pytest.MonkeyPatch, new: str, dry_run: bool
) -> None:
    config, workspace, events = shop
    monkeypatch.setenv("HOME", str(events.parent))
    write_rows(events.parent / "named1.csv", week(2))
    assert take(config, workspace, new=new, dry_run=dry_run).taken == 160


@pytest.mark.parametrize("new", ["", " "])
def test_an_empty_name_of_new_rows_is_refused_and_the_working_folder_is_not_read(
    shop: tuple[Config, Workspace, Path], monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    config, workspace, events = shop
    write_rows(events / "week2.csv", week(2))
    monkeypatch.chdir(events)
    with pytest.raises(UserError, match="names nothing; give a file"):
        take(config, workspace, new=new)


def test_a_gate_that_looks_at_events_the_log_has_not_is_refused_before_anything_is_taken(
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
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


LATE_ROW = ("u00", "i05", seconds(8.5))


@pytest.mark.parametrize(("policy", "place"), [("hold", "held/held-*.parquet"), ("reject", "rejects/late-*.parquet")])
def test_late_rows_are_counted_and_kept_where_the_policy_says(
    shop: tuple[Config, Workspace, Path], policy: str, place: str
) -> None:
    config, workspace, events = shop
    config = with_rules(config, late=policy)
    before = load_stages(workspace)
    write_rows(events / "late.csv", [LATE_ROW])
    assert take(config, workspace).late == 1
    again = take(config, workspace)
    assert (again.late, again.taken, again.held) == (0, 0, int(policy == "hold"))
    (file,) = workspace.root.glob(place)
    assert pl.read_parquet(file)["reason"].to_list() == [append.LATE]
    assert load_stages(workspace) == before


def test_held_rows_come_into_the_next_stage_when_the_policy_changes_and_refused_ones_do_not(
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
    write_rows(events / "late.csv", [LATE_ROW])
    take(with_rules(config, late="hold"), workspace)
    found = take(with_rules(config, late="next_stage"), workspace, close_now=True)
    assert (found.closed, found.held) == ((2,), 0)
    stage = load_stages(workspace)[2]
    assert (stage.events, stage.start) == (1, load_stages(workspace)[1].end)
    assert take(with_rules(config, late="next_stage"), workspace).taken == 0
    write_rows(events / "late.csv", [("u01", "i05", seconds(8.5))])
    take(with_rules(config, late="reject"), workspace)
    assert take(with_rules(config, late="next_stage"), workspace).taken == 0


def test_rebuilding_puts_late_rows_where_they_belong(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
    before = load_stages(workspace)
    write_rows(events / "late.csv", [LATE_ROW])
    found = take(with_rules(config, late="rebuild"), workspace)
    after = load_stages(workspace)
    assert (found.rebuilt, found.held, found.taken) == ((1,), 0, 0)
    assert after[0] == before[0]
    assert after[1].events == before[1].events + 1
    assert after[1].digest != before[1].digest
    assert take(with_rules(config, late="rebuild"), workspace).rebuilt == ()


def test_a_row_tied_with_the_last_committed_event_is_known_by_its_content(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
    last = max(week(1), key=lambda row: row[2])
    write_rows(events / "tie.csv", [last, ("u99", "i01", last[2])])
    found = take(config, workspace)
    assert (found.taken, found.late) == (0, 1)


def test_a_date_in_the_future_closes_no_stage_and_is_taken_when_its_time_has_come(
    shop: tuple[Config, Workspace, Path],
) -> None:
    config, workspace, events = shop
    write_rows(events / "week2.csv", [*week(2), ("u00", "i01", seconds(70))])
    early = take_new_rows(config, workspace, now=START + timedelta(days=22))
    assert (early.closed, early.held, early.open) == ((), 1, 160)
    later = take_new_rows(config, workspace, now=START + timedelta(days=71))
    assert (later.closed, later.held, later.open) == ((2,), 0, 1)


def test_a_dry_run_changes_nothing_and_says_the_same(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
    write_rows(events / "weeks.csv", [*week(2), *week(3), LATE_ROW])
    before = listing(workspace.root)
    told = take(config, workspace, dry_run=True)
    assert listing(workspace.root) == before
    assert take(config, workspace) == told


@pytest.mark.parametrize("policy", ["hold", "rebuild"])
def test_a_commit_killed_at_any_write_ends_as_if_it_had_not_been(
    shop: tuple[Config, Workspace, Path], policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, workspace, events = shop
    config = with_rules(config, late=policy)
    write_rows(events / "weeks.csv", [*week(2), *week(3), LATE_ROW])
    shutil.copytree(workspace.root, tmp_path / "undisturbed")
    undisturbed = Workspace(tmp_path / "undisturbed")
    take(config, undisturbed)
    real = {name: getattr(append, name) for name in ("write_stage", "write_json", "store_waiting", "_store_rejects")}
    deaths = 0
    for place in range(8):
        copy = Workspace(tmp_path / f"killed{place}")
        shutil.copytree(workspace.root, copy.root)
        left = [place]

        def dying(name: str, left: list[int] = left) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real[name](*arguments, **more)

            return call

        for name in real:
            monkeypatch.setattr(append, name, dying(name))
        try:
            take(config, copy)
        except KeyboardInterrupt:
            deaths += 1
        monkeypatch.undo()
        take(config, copy)
        assert listing(copy.root) == listing(undisturbed.root), place
    assert deaths >= 4


def test_a_decided_commit_is_finished_even_if_the_rows_are_gone(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
    moved = write_rows(events / "weeks.csv", week(2) + week(3))
    manifest = workspace.stages / "manifest.json"
    old = manifest.read_bytes()
    take(config, workspace)
    new = manifest.read_text()
    ready = workspace.stages / ".next" / "stage=02.parquet"
    ready.parent.mkdir()
    workspace.stage_file(2).rename(ready)
    manifest.write_bytes(old)
    (workspace.stages / "next.json").write_text(new)
    moved.unlink()
    finish_commit(workspace)
    assert len(load_stages(workspace)) == 3
    assert not (workspace.stages / "next.json").exists()


def spoil(workspace: Workspace, pattern: str) -> Path:
    """Change the last byte but one of the file."""
    (file,) = workspace.root.glob(pattern)
    content = file.read_bytes()
    file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    return file


@pytest.fixture
def full(shop: tuple[Config, Workspace, Path]) -> tuple[Config, Workspace, Path]:
    """A shop with rows in all three tables, 160 open ones from the sources and 30 that were named once."""
    config, workspace, events = shop
    write_rows(events / "week2.csv", [*week(2), LATE_ROW])
    take(with_rules(config, late="reject"), workspace)
    write_rows(events / "late.csv", [("u01", "i05", seconds(8.5)), ("u02", "i05", seconds(8.5))])
    take(with_rules(config, late="hold"), workspace)
    named = write_rows(events.parent / "once.csv", [(f"u{user:02d}", "i20", seconds(18)) for user in range(30)])
    assert take(config, workspace, new=str(named)).open == 190
    return with_rules(config, late="hold"), workspace, events


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            "open/open-*.parquet",
            "rows held: 190; from the sources, new ones included: 160; at least 30 are gone",
        ),
        ("held/held-*.parquet", "all of its rows (2) came back from the sources"),
        (
            "rejects/late-*.parquet",
            "rows held: 1; from the sources, new ones included: 0; at least 1 are gone",
        ),
    ],
)
def test_a_damaged_table_is_set_aside_alone_and_its_loss_is_counted(
    full: tuple[Config, Workspace, Path], caplog: pytest.LogCaptureFixture, pattern: str, said: str
) -> None:
    config, workspace, _ = full
    file = spoil(workspace, pattern)
    damaged = file.read_bytes()
    before = {path: path.read_bytes() for path in workspace.root.rglob("*-*.parquet") if path != file}
    with pytest.raises(UserError, match="run once without --new"):
        take(config, workspace, new="x.csv")
    listed = listing(workspace.root)
    take(config, workspace, dry_run=True)
    assert listing(workspace.root) == listed
    caplog.clear()
    found = take(config, workspace)
    assert caplog.text.count("WARNING") == 1
    assert f"{file}: missing or damaged" in caplog.text
    assert said in caplog.text
    assert found.open == (160 if "open" in pattern else 190)
    assert (file.parent / "quarantine" / file.name).read_bytes() == damaged
    # A row refused for good is late again, and held under the policy of today.
    kept = [path for path in before if "rejects" not in pattern or path.parent.name != "held"]
    assert kept
    assert all(path.read_bytes() == before[path] for path in kept)
    caplog.clear()
    take(config, workspace)
    assert not caplog.text


@pytest.mark.parametrize("content", [None, "altered", "{}", '{"parts": {"open": {}}}'])
def test_without_their_manifest_the_tables_are_known_by_their_names(
    full: tuple[Config, Workspace, Path], caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    config, workspace, _ = full
    tables = {path: path.read_bytes() for path in workspace.root.rglob("*-*.parquet")}
    assert len(tables) == 3
    manifest = workspace.root / "open" / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        altered = manifest.read_text().replace('"rows": 190', '"rows": 191')
        manifest.write_text(altered if content == "altered" else content)
    found = take(config, workspace)
    assert (found.open, found.held, found.taken) == (190, 2, 0)
    assert {path: path.read_bytes() for path in workspace.root.rglob("*-*.parquet")} == tables
    assert ("were found by their names" in caplog.text) == (content is not None)


def test_a_table_that_is_damaged_and_named_by_no_manifest_is_not_believed(
    full: tuple[Config, Workspace, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, workspace, _ = full
    file = spoil(workspace, "open/open-*.parquet")
    (workspace.root / "open" / "manifest.json").unlink()
    assert take(config, workspace).open == 160
    assert "rows held: unknown; from the sources, new ones included: 160; some may be gone" in caplog.text
    assert (file.parent / "quarantine" / file.name).exists()


def test_a_log_without_a_clock_cannot_be_retrained(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, _ = shop
    log = config.log.model_validate({"kind": "sequences", "sequences": "x.txt"})
    with pytest.raises(UserError, match="has no clock"):
        take(config.model_copy(update={"log": log}), workspace)


def test_a_period_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"retrain\.close\.period = 'soon'"):
        CloseConfig(period="soon")


def test_new_items_get_their_texts_and_known_ones_keep_theirs(shop: tuple[Config, Workspace, Path]) -> None:
    config, workspace, events = shop
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
