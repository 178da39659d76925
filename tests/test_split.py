import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.config import Config, StageConfig
from stages.drift import draw_drift, drift_table, jensen_shannon
from stages.errors import UserError
from stages.log import read_log
from stages.split import Stage, boundaries, load_stages, split_stages
from stages.workspace import Workspace, read_json, write_json

T = 1_700_000_000
DAY = 86_400
Row = tuple[str, str, int]


def split(folder: Path, rows: list[Row], **rule: object) -> list[Stage]:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_parquet(folder / "log.parquet")
    config = Config.model_validate(
        {"name": "t", "workspace": "w", "log": {"sources": [{"path": str(folder / "log.parquet")}]}, "stages": rule}
    )
    workspace = Workspace(folder / "w")
    read_log(config, workspace)
    return split_stages(config, workspace)


def events(folder: Path, stage: Stage) -> pl.DataFrame:
    return pl.read_parquet(folder / "w" / stage.path)


def iso(day: int) -> str:
    return datetime.fromtimestamp(T + day * DAY, UTC).isoformat()


def spread(count: int) -> list[Row]:
    return [(f"u{place % 3}", f"i{place}", T + place * DAY) for place in range(count)]


def test_the_default_is_sixty_per_cent_and_four_tenths(tmp_path):
    stages = split(tmp_path, spread(10))
    assert [stage.events for stage in stages] == [6, 1, 1, 1, 1]
    assert [stage.start for stage in stages] == [iso(0), iso(6), iso(7), iso(8), iso(9)]
    assert [stage.end for stage in stages[:-1]] == [stage.start for stage in stages[1:]]


def test_a_boundary_is_exact_where_floating_point_sums_fall_short():
    times = pl.Series([datetime.fromtimestamp(T + place, UTC) for place in range(10)])
    edges = boundaries(times, StageConfig(fractions=[0.6, 0.1, 0.1, 0.1, 0.1]))
    assert [int(edge.timestamp()) - T for edge in edges] == [6, 7, 8, 9]


def test_equal_times_all_fall_after_the_boundary_they_make(tmp_path):
    rows = [("u", f"i{place}", T + (DAY if 3 <= place < 8 else 2 * DAY if place >= 8 else 0)) for place in range(10)]
    stages = split(tmp_path, rows, fractions=[0.5, 0.5])
    assert [stage.events for stage in stages] == [3, 7]


def test_ties_may_leave_a_stage_empty_and_it_is_kept(tmp_path):
    rows = [("u", f"i{place}", T + (place > 0)) for place in range(10)]
    stages = split(tmp_path, rows, fractions=[0.3, 0.3, 0.4])
    assert [stage.events for stage in stages] == [1, 0, 9]
    assert stages[1].start == stages[1].end
    assert events(tmp_path, stages[1]).is_empty()
    assert [row["drift"] for row in drift_table(Workspace(tmp_path / "w"))] == [None, None, None]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 12)), min_size=1, max_size=40),
    st.sampled_from([[0.6, 0.1, 0.1, 0.1, 0.1], [0.5, 0.5], [1.0], [0.2, 0.3, 0.5]]),
    st.randoms(use_true_random=False),
)
def test_every_event_is_in_exactly_one_stage_whatever_the_order(tmp_path, drawn, fractions, rng: random.Random):
    rows = [(user, item, T + day * DAY) for user, item, day in set(drawn)]
    stages = split(tmp_path, rows, fractions=fractions)
    frames = [events(tmp_path, stage) for stage in stages]
    seconds = pl.col("timestamp").dt.epoch("s")
    found = [row for frame in frames for row in frame.select("user_id", "item_id", seconds).rows()]
    assert Counter(found) == Counter(rows)
    for stage, frame in zip(stages, frames, strict=True):
        assert frame.equals(frame.sort("user_id", "timestamp", "item_id"))
        for moment in frame["timestamp"]:
            assert stage.start is not None
            assert stage.end is not None
            assert datetime.fromisoformat(stage.start) <= moment < datetime.fromisoformat(stage.end)
    met: set[str] = set()
    for stage, frame in zip(stages, frames, strict=True):
        users = set(frame["user_id"])
        assert (stage.users, stage.returning_users, stage.new_users) == (len(users), len(users & met), len(users - met))
        met |= users
    rng.shuffle(rows)
    assert split(tmp_path, rows, fractions=fractions) == stages


def test_a_calendar_period_starts_at_the_first_boundary_after_sixty_per_cent(tmp_path):
    start = datetime(2024, 1, 1, 12, tzinfo=UTC)
    rows = [("u", f"i{day}", int(start.timestamp()) + day * DAY) for day in range(150)]
    stages = split(tmp_path, rows, period="1mo")
    assert [stage.start for stage in stages[1:]] == ["2024-04-01T00:00:00+00:00", "2024-05-01T00:00:00+00:00"]
    assert [stage.events for stage in stages] == [91, 30, 29]


def test_a_period_may_name_the_first_boundary_and_keeps_quiet_weeks(tmp_path):
    rows = [("u", f"i{day}", T + day * DAY) for day in (0, 1, 2, 3, 20)]
    stages = split(tmp_path, rows, period="1w", first=iso(2))
    assert [stage.events for stage in stages] == [2, 2, 0, 1]


def test_instants_cut_where_they_say(tmp_path):
    stages = split(tmp_path, spread(10), instants=[iso(3), iso(5)])
    assert [stage.events for stage in stages] == [3, 2, 5]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"instants": [iso(0)]}, "stages.instants: .* lies outside the log"),
        ({"instants": [iso(3), iso(99)]}, "stages.instants: .* lies outside the log"),
        ({"instants": ["soon"]}, "stages.instants = 'soon'"),
        ({"period": "fortnight"}, "stages.period = 'fortnight'"),
        ({"period": "0d"}, "stages.period = '0d'"),
        ({"period": "-1d"}, "stages.period = '-1d'"),
        ({"period": "1s"}, "more than 1,000 stages"),
        ({"period": "1y"}, "outside the log"),
        ({"period": "1d", "first": "2001-01-01"}, "stages.first: .* outside the log|more than 1,000 stages"),
    ],
)
def test_boundaries_that_make_no_stages_are_refused(tmp_path, rule, message):
    with pytest.raises(UserError, match=message):
        split(tmp_path, spread(10), **rule)
    assert not (tmp_path / "w" / "stages" / "manifest.json").exists()


def test_splitting_again_rewrites_nothing_and_another_rule_leaves_no_old_stage(tmp_path):
    stages = split(tmp_path, spread(10))
    paths = [tmp_path / "w" / stage.path for stage in stages]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
    assert split(tmp_path, spread(10)) == stages
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths] == before
    split(tmp_path, spread(10), fractions=[0.5, 0.5])
    assert sorted(path.name for path in (tmp_path / "w" / "stages").iterdir()) == [
        "manifest.json",
        "stage=00",
        "stage=01",
    ]


def test_a_damaged_or_missing_stage_is_refused_on_load_and_mended_by_splitting(tmp_path):
    stages = split(tmp_path, spread(10))
    workspace = Workspace(tmp_path / "w")
    path = workspace.stage_file(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="stage 1 is not the file that was written; run driftrec split, which"):
        load_stages(workspace)
    assert split(tmp_path, spread(10)) == stages
    assert load_stages(workspace) == stages
    path.unlink()
    with pytest.raises(UserError, match="stage 1 is missing"):
        load_stages(workspace)


def test_stages_and_log_ask_for_the_step_before(tmp_path):
    config = Config.model_validate({"name": "t", "workspace": "w", "log": {"sources": [{"path": "x.csv"}]}})
    with pytest.raises(UserError, match="run driftrec ingest first"):
        split_stages(config, Workspace(tmp_path))
    with pytest.raises(UserError, match="run driftrec split first"):
        load_stages(Workspace(tmp_path))


def test_the_manifest_holds_no_absolute_path_and_moves_with_the_workspace(tmp_path):
    stages = split(tmp_path, spread(10))
    (tmp_path / "w").rename(tmp_path / "moved")
    assert load_stages(Workspace(tmp_path / "moved")) == stages
    assert str(tmp_path) not in (tmp_path / "moved" / "stages" / "manifest.json").read_text()
    assert read_json(tmp_path / "moved" / "stages" / "manifest.json")["clock"] is True


def counts(**items: int) -> pl.DataFrame:
    return pl.DataFrame({"item_id": list(items), "count": list(items.values())})


def test_jensen_shannon_is_zero_for_equal_shares_one_for_disjoint_and_known_between():
    assert jensen_shannon(counts(a=1, b=3), counts(a=2, b=6)) == pytest.approx(0, abs=1e-7)
    assert jensen_shannon(counts(a=5), counts(b=2)) == pytest.approx(1)
    # Shares (1, 0) and (1/2, 1/2): the divergence is 1 - 3/4 log2 3 + 1/2 = 0.311278 bits.
    assert jensen_shannon(counts(a=1), counts(a=1, b=1)) == pytest.approx(0.311278**0.5, abs=1e-6)
    assert jensen_shannon(counts(a=1).clear(), counts(a=1)) is None


def test_the_drift_table_counts_new_items_by_events_and_histories_to_date(tmp_path):
    rows = [("u", "a", T), ("v", "a", T + 1), ("u", "b", T + DAY), ("u", "b", T + DAY + 1), ("u", "a", T + DAY + 2)]
    split(tmp_path, rows, instants=[iso(1)])
    first, second = drift_table(Workspace(tmp_path / "w"))
    assert (first["new_item_events"], first["median_history"], first["drift"]) == (1.0, 1.0, None)
    assert second["new_item_events"] == pytest.approx(2 / 3)
    assert second["median_history"] == 4.0
    assert (second["new_items"], second["known_items"], second["returning_users"]) == (1, 1, 1)
    assert 0 < second["drift"] < 1


def test_the_drift_picture_is_a_png_with_the_same_bytes_each_time(tmp_path):
    split(tmp_path, spread(20))
    first = draw_drift(Workspace(tmp_path / "w"), tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert draw_drift(Workspace(tmp_path / "w"), tmp_path / "b.png").read_bytes() == first


@pytest.mark.parametrize("how", ["deleted", "damaged", "of an older version"])
def test_a_log_without_its_numbers_is_numbered_afresh_and_cut_alike(tmp_path, how):
    stages = split(tmp_path, spread(10))
    workspace = Workspace(tmp_path / "w")
    numbers, manifest = workspace.log.with_name("numbers.parquet"), workspace.log.with_name("manifest.json")
    if how == "deleted":
        numbers.unlink()
    elif how == "damaged":
        numbers.write_bytes(numbers.read_bytes()[:-1] + b"x")
    else:
        older = {key: value for key, value in read_json(manifest).items() if key not in ("numbers", "names", "step")}
        write_json(manifest, older, seal=True)
    (workspace.stages / "manifest.json").unlink()
    config = Config.model_validate({"name": "t", "workspace": "w", "log": {"sources": [{"path": "gone.csv"}]}})
    assert split_stages(config, workspace) == stages
    assert not list(workspace.log.parent.glob(".tmp-*"))


def test_stages_sorted_a_part_at_a_time_are_the_stages_sorted_at_once(tmp_path, monkeypatch):
    rows = [(f"u{place % 13}", f"i{place * 7 % 11}", T + place * 37 % 90) for place in range(200)]
    (tmp_path / "once").mkdir()
    (tmp_path / "parts").mkdir()
    whole = split(tmp_path / "once", rows)
    monkeypatch.setattr("stages.spool.PART", 9)
    monkeypatch.setattr("stages.spool.STRIDE", 2)
    monkeypatch.setattr("stages.coded.KEPT", 5)
    monkeypatch.setattr("stages.clock.AT_ONCE", 30)
    monkeypatch.setattr("stages.long_files.AT_ONCE", 30)
    assert split(tmp_path / "parts", rows) == whole


def test_a_log_without_a_clock_keeps_each_user_s_order_in_parts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.spool.PART", 4)
    lines = {user: [f"i{(user * 5 + place * 3) % 8}" for place in range(3 + user)] for user in (2, 0, 1)}
    path = tmp_path / "log.txt"
    path.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in lines.items()), encoding="utf-8")
    log = {"kind": "sequences", "sequences": str(path)}
    config = Config.model_validate({"name": "t", "workspace": "w", "log": log})
    workspace = Workspace(tmp_path / "w")
    read_log(config, workspace)
    (stage,) = split_stages(config, workspace)
    found = events(tmp_path, stage).group_by("user_id", maintain_order=True).agg("item_id")
    assert dict(found.iter_rows()) == {str(user): lines[user] for user in sorted(lines)}
