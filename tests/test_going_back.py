"""What a roll back takes out of service stays out, and what it put back is what a challenger must beat."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import seconds, week, write_rows
from flows import experiment, retraining
from flows.experiment import exclusive
from flows.promotion import champion, copies, telling
from flows.promotion.history import read_history
from tests.standing import ANEW, Quietly, Shop


@pytest.fixture
def shop(promoted_shop: Shop, tmp_path: Path) -> Shop:
    """A copy of the promoted shop, to be changed."""
    return promoted_shop.copied(tmp_path)


def test_a_champion_trained_anew_that_passes_can_be_gone_back_from(shop: Shop, driftrec: Any) -> None:
    before, answered = shop.served, shop.listed()
    shop.set("[evaluation]", ANEW)
    (line,) = shop.nightly()
    assert (line["decision"], line["champion"]["job"]) == ("rebuilt", line["challenger"]["job"])
    assert shop.served.key == line["challenger"]["key"] != before.key
    anew = shop.listed()
    assert anew != answered
    assert driftrec("rollback", "-w", shop.workspace.root)[0] == 0
    assert (shop.served.is_model(before), shop.listed()) == (True, answered)
    assert shop.nightly() == [], "what a roll back took out of service came back by itself"
    assert shop.listed() == answered


def test_going_back_within_a_stage_names_the_checkpoints(shop: Shop, driftrec: Any) -> None:
    before = shop.served
    shop.set("[evaluation]", ANEW)
    assert [line["decision"] for line in shop.nightly()] == ["rebuilt"]
    anew = shop.served
    old, new = (f"single after stage 2 ({one.key[-16:-8]})" for one in (before, anew))
    assert old != new
    _, said, _ = driftrec("rollback", "-w", shop.workspace.root)
    assert f"{old} is in service again, {new} is not" in said
    lines = read_history(shop.workspace)[0]
    shown = [row["champion"] for row in telling.rows(lines)]
    assert shown == ["single after stage 1", old, new, old]
    assert lines[-1]["why"].endswith(f"stage 2's model {anew.key[-16:-8]} was taken out of service")
    assert f"in service: {old}, since" in driftrec("history", "-w", shop.workspace.root)[1]


def test_a_roll_back_waits_for_no_retraining(shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the workspace; the one that tests a challenger meanwhile decides anew."""
    script = (
        "import sys, pathlib\nfrom flows.experiment import exclusive\nfrom stages.workspace import Workspace\n"
        "with exclusive(Workspace(pathlib.Path(sys.argv[1]))):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(shop.workspace.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, said, _ = driftrec("rollback", "-w", shop.workspace.root)
        holder.communicate()
    assert (code, "MLflow and Prefect are told by the run under way" in said) == (0, True)
    assert shop.served.job.stage == 1
    assert [line["decision"] for line in copies.lacking(shop.workspace, "mlflow", 2)] == ["rolled_back"]
    with exclusive(shop.workspace):
        pass


def test_a_challenger_tested_against_a_model_since_taken_out_meets_the_one_that_is_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    config, _ = experiment.remembered_config(shop.workspace.root)
    answers = retraining.answers

    def rolled_back(plan: Any, match: Any) -> Any:
        if match.champion.job.stage == 2:
            champion.roll_back(config, shop.workspace)
        return answers(plan, match)

    monkeypatch.setattr(Quietly, "answers", staticmethod(rolled_back))
    (line,) = shop.nightly()
    assert (line["decision"], line["stage"]) == ("promoted", 3)
    assert "single after stage 1" in line["scores"]
    decisions = [line["decision"] for line in read_history(shop.workspace)[0]]
    assert decisions == ["first", "promoted", "rolled_back", "promoted"]
