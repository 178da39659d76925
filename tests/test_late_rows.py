"""Rows that come too late are counted and kept, or put where they belong, as the policy says."""

from __future__ import annotations

import polars as pl
import pytest

from benchmarks.growing import seconds, week, write_rows
from stages import append
from stages.split import load_stages
from tests.intake import LATE_ROW, WeeklyShop, take, with_rules


@pytest.mark.parametrize(("policy", "place"), [("hold", "held/held-*.parquet"), ("reject", "rejects/late-*.parquet")])
def test_late_rows_are_counted_and_kept_where_the_policy_says(weekly_shop: WeeklyShop, policy: str, place: str) -> None:
    config, workspace, events = weekly_shop
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
    weekly_shop: WeeklyShop,
) -> None:
    config, workspace, events = weekly_shop
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


def test_rebuilding_puts_late_rows_where_they_belong(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    before = load_stages(workspace)
    write_rows(events / "late.csv", [LATE_ROW])
    found = take(with_rules(config, late="rebuild"), workspace)
    after = load_stages(workspace)
    assert (found.rebuilt, found.held, found.taken) == ((1,), 0, 0)
    assert after[0] == before[0]
    assert after[1].events == before[1].events + 1
    assert after[1].digest != before[1].digest
    assert take(with_rules(config, late="rebuild"), workspace).rebuilt == ()


def test_a_row_tied_with_the_last_committed_event_is_known_by_its_content(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
    last = max(week(1), key=lambda row: row[2])
    write_rows(events / "tie.csv", [last, ("u99", "i01", last[2])])
    found = take(config, workspace)
    assert (found.taken, found.late) == (0, 1)
