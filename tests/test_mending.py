"""Stage files that rot in a workspace that has grown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import NOW, load_config, opened, seconds, week, write_rows
from stages.append import take_new_rows
from stages.config import Config
from stages.errors import UserError
from stages.mending import mend_stages
from stages.split import load_stages
from stages.workspace import Workspace, read_json, write_json

LATE = [(f"u{user:02d}", "i05", seconds(8.5)) for user in range(5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop of four stages: the last has late rows of the second, three more are held."""
    config, workspace = opened(tmp_path_factory.mktemp("shop") / "base")
    events = workspace.root.parent / "events"
    write_rows(events / "night1.csv", [*week(2), *LATE[:1], *week(3)])
    take(config, workspace, late="reject")
    write_rows(events / "night2.csv", [*LATE[1:2], *week(4)])
    take(config, workspace, late="next_stage")
    write_rows(events / "night3.csv", LATE[2:])
    take(config, workspace, late="hold")
    assert len(load_stages(workspace)) == 4
    return workspace.root.parent


def take(config: Config, workspace: Workspace, **rules: Any) -> None:
    rules = {"method": "single", "close": {"period": "1w"}} | rules
    take_new_rows(
        config.model_copy(update={"retrain": config.retrain.model_validate(rules)}), workspace, now=NOW, close_now=False
    )


@pytest.fixture
def shop(base: Path, tmp_path: Path) -> tuple[Config, Workspace]:
    shutil.copytree(base, tmp_path / "shop")
    return load_config(tmp_path / "shop" / "shop.toml"), Workspace(tmp_path / "shop" / "workspace")


def rot(path: Path) -> bytes:
    """Flip a bit in the middle; the bytes as they were."""
    content = path.read_bytes()
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    return content


@pytest.mark.parametrize("indices", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_a_damaged_stage_is_rebuilt_to_the_same_content(
    shop: tuple[Config, Workspace], indices: tuple[int, ...]
) -> None:
    config, workspace = shop
    before = load_stages(workspace)
    for index in indices:
        rot(workspace.stage_file(index))
    with pytest.raises(UserError, match=rf"stage {indices[0]} is not the file .* run driftrec split"):
        load_stages(workspace)
    said: list[str] = []
    assert mend_stages(config, workspace, said.append) == list(indices)
    assert len(said) == len(indices)
    assert [stage.digest for stage in load_stages(workspace)] == [stage.digest for stage in before]
    assert mend_stages(config, workspace) == []
    kept = sorted(path.name for path in (workspace.stages / "quarantine").iterdir())
    assert kept == [f"stage={index:02d}.parquet" for index in indices]


def test_a_missing_stage_is_rebuilt_without_the_stored_log_too(shop: tuple[Config, Workspace]) -> None:
    config, workspace = shop
    for index in (0, 2):
        workspace.stage_file(index).unlink()
    workspace.log.unlink()
    assert mend_stages(config, workspace) == [0, 2]
    load_stages(workspace)


def test_a_stage_whose_rows_are_gone_is_named_with_its_file_and_stays_as_it_is(shop: tuple[Config, Workspace]) -> None:
    config, workspace = shop
    source = workspace.root.parent / "events" / "night1.csv"
    write_rows(source, week(2)[:-1])
    rot(workspace.stage_file(2))
    damaged = workspace.stage_file(2).read_bytes()
    with pytest.raises(UserError, match=r"stage=02/events\.parquet: stage 2 .* restore it from a backup"):
        mend_stages(config, workspace)
    assert workspace.stage_file(2).read_bytes() == damaged


def test_a_commit_cut_short_is_ended_first_and_is_no_damage(shop: tuple[Config, Workspace]) -> None:
    config, workspace = shop
    manifest = read_json(workspace.stages / "manifest.json")
    ready = workspace.stages / ".next" / "stage=03.parquet"
    ready.parent.mkdir()
    workspace.stage_file(3).rename(ready)
    write_json(workspace.stages / "next.json", manifest, seal=True)
    assert mend_stages(config, workspace) == []
    assert len(load_stages(workspace)) == 4
