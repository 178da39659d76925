"""A commit of new rows survives kills at any write, and damaged tables of waiting rows cost no others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import listing, seconds, week, write_rows
from stages import append
from stages.append import finish_commit
from stages.errors import UserError
from stages.split import load_stages
from stages.workspace import Workspace
from tests.intake import LATE_ROW, WeeklyShop, take, with_rules


@pytest.mark.parametrize("policy", ["hold", "rebuild"])
def test_a_commit_killed_at_any_write_ends_as_if_it_had_not_been(
    weekly_shop: WeeklyShop, policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, workspace, events = weekly_shop
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


def test_a_decided_commit_is_finished_even_if_the_rows_are_gone(weekly_shop: WeeklyShop) -> None:
    config, workspace, events = weekly_shop
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
def full(weekly_shop: WeeklyShop) -> WeeklyShop:
    """A shop with rows in all three tables, 160 open ones from the sources and 30 that were named once."""
    config, workspace, events = weekly_shop
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
    full: WeeklyShop, caplog: pytest.LogCaptureFixture, pattern: str, said: str
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
    full: WeeklyShop, caplog: pytest.LogCaptureFixture, content: str | None
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
    full: WeeklyShop, caplog: pytest.LogCaptureFixture
) -> None:
    config, workspace, _ = full
    file = spoil(workspace, "open/open-*.parquet")
    (workspace.root / "open" / "manifest.json").unlink()
    assert take(config, workspace).open == 160
    assert "rows held: unknown; from the sources, new ones included: 160; some may be gone" in caplog.text
    assert (file.parent / "quarantine" / file.name).exists()
