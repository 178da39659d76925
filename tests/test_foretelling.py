"""A dry run names every model that the run beside it trains, is refused where that is, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import OPEN_GATE, listing, seconds, week, write_rows, write_shop
from flows import retraining, steps
from flows.foretelling import foretold
from flows.promotion import champion
from flows.promotion.history import history_file
from stages.errors import UserError
from stages.workspace import Workspace
from tests.standing import Quietly, Shop

FIRST = "single would be trained for stage 1; the gate decides afterwards"
ANEW = (
    "single after stage 2, in service, would be trained anew; the gate decides afterwards unless it comes out the same"
)


@pytest.fixture
def shop(promoted_shop: Shop, tmp_path: Path) -> Shop:
    """A copy of the promoted shop, to be changed."""
    return promoted_shop.copied(tmp_path)


def told(shop: Shop, **more: Any) -> list[str]:
    """The lines of a dry run, which leaves every file as it was."""
    before = listing(shop.folder)
    lines = foretold(retraining.retrain_plan(shop.config, shop.workspace.root), **more).splitlines()
    assert listing(shop.folder) == before
    return lines


def ruled(shop: Shop) -> list[tuple[str, int]]:
    """What the run itself decides, and on which stages."""
    return [(line["decision"], line["stage"]) for line in shop.nightly()]


def test_a_night_without_a_stage_names_no_model(shop: Shop) -> None:
    assert len(told(shop)) == 1
    assert ruled(shop) == []


def test_changed_settings_are_told_to_train_the_champion_anew(shop: Shop) -> None:
    shop.set("first_epochs = 1", "first_epochs = 2")
    assert told(shop)[1:] == [ANEW]
    assert ruled(shop) == [("rebuilt", 2)]
    assert len(told(shop)) == 1


def test_late_rows_that_rebuild_a_stage_are_told_to_train_the_champion_anew(shop: Shop) -> None:
    shop.set('method = "single"', 'method = "single"\nlate = "rebuild"')
    late = [("u00", "i03", seconds(8.5))]
    write_rows(shop.folder / "events" / "late.csv", [*late, *week(3), ("u00", "i01", seconds(28))])
    sentence, *lines = told(shop)
    assert "closed stage 3, rebuilt stage 1" in sentence
    assert lines == [ANEW, "single would be trained for stage 3; the gate decides afterwards"]
    assert ruled(shop) == [("rebuilt", 3), ("promoted", 3)]


def test_a_damaged_champion_is_told_to_be_trained_again(shop: Shop) -> None:
    shop.damage()
    assert told(shop)[1:] == [ANEW]
    assert ruled(shop) == []
    assert len(told(shop)) == 1


def test_stages_that_were_cut_before_are_told_to_give_the_first_champion(tmp_path: Path) -> None:
    write_shop(tmp_path, OPEN_GATE)
    shop = Shop(tmp_path)
    plan = steps.claimed(retraining.retrain_plan(shop.config, shop.workspace.root))
    steps.read(plan)
    steps.split(plan)
    assert told(shop)[1:] == [FIRST]
    assert ruled(shop) == [("first", 1)]


@pytest.mark.parametrize("killed", ["train", "answers"])
def test_a_stage_that_a_kill_left_undecided_is_told(shop: Shop, monkeypatch: pytest.MonkeyPatch, killed: str) -> None:
    write_rows(shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Quietly, killed, staticmethod(die))
        with pytest.raises(KeyboardInterrupt):
            shop.nightly()
    sentence, line = told(shop)
    assert "no stage closed" in sentence
    would = {
        "train": "single would be trained for stage 3; the gate decides afterwards",
        "answers": "single after stage 3 is trained and would be tested on stage 3; the gate decides afterwards",
    }
    assert line == would[killed]
    assert ruled(shop) == [("promoted", 3)]


def test_a_champion_json_that_is_a_decision_behind_is_neither_believed_nor_written(shop: Shop) -> None:
    first = champion.predecessors(shop.workspace)[1]
    champion.write_json(champion.champion_file(shop.workspace), first.as_json())
    assert len(told(shop)) == 1
    assert ruled(shop) == []


def test_a_damaged_history_refuses_the_dry_run_as_it_does_the_run(shop: Shop) -> None:
    path = history_file(shop.workspace)
    path.write_bytes(path.read_bytes().replace(b"promoted", b"promotes", 1))
    with pytest.raises(UserError, match=r"line 2, or one before it, is not what was written"):
        told(shop)
    with pytest.raises(UserError, match=r"line 2, or one before it, is not what was written"):
        shop.nightly()


@pytest.mark.parametrize("where", ["file", "file/below", "link"])
def test_a_workspace_that_cannot_be_made_refuses_the_dry_run_as_it_does_the_run(tmp_path: Path, where: str) -> None:
    write_shop(tmp_path, OPEN_GATE)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shop = Shop(tmp_path)
    shop.workspace = Workspace(tmp_path / where)
    with pytest.raises(UserError, match="cannot write the workspace"):
        told(shop)
    with pytest.raises(UserError, match="cannot write the workspace"):
        shop.nightly()
