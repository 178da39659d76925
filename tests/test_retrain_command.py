"""The command: dry runs, the way back, a kill before the decision, settings that changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.growing import OPEN_GATE, listing, seconds, week, write_rows, write_shop
from flows.plain import run_plainly
from flows.promotion import champion
from flows.promotion.history import read_history
from stages import contest
from stages.jobs import Job
from stages.workspace import Workspace, read_json
from tests.nights import ShopCopy, driftrec

if TYPE_CHECKING:
    from conftest import Trained


def test_a_dry_run_changes_no_file_and_says_what_would_close(
    own_nights: ShopCopy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workspace = own_nights
    write_rows(config.parent / "events" / "week4.csv", [*week(4), *week(5)[:1]])
    before = listing(config.parent)
    code, out, _ = driftrec(monkeypatch, capsys, "retrain", "-c", config, "-w", workspace.root, "--dry-run")
    assert code == 0
    assert "closed stage 4" in out
    assert "single would be trained for stage 4" in out
    assert listing(config.parent) == before


def test_a_dry_run_in_an_empty_folder_foretells_the_first_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_shop(tmp_path, OPEN_GATE)
    before = listing(tmp_path)
    words = ("retrain", "-c", config, "-w", tmp_path / "workspace", "--dry-run")
    code, out, err = driftrec(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    assert "the log would be cut into 2 stages; 320 rows read, 0 new" in out
    assert out.endswith("single would be trained for stage 1; the gate decides afterwards")
    late = write_rows(tmp_path / "week2.csv", [*week(2), ("u00", "i01", seconds(21))])
    _, out, _ = driftrec(monkeypatch, capsys, *words, "--new", late)
    assert "closed stage 2" in out
    assert out.endswith("single would be trained for stage 2; the gate decides afterwards")
    late.unlink()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_dry_run_is_refused_where_the_run_would_be(
    own_nights: ShopCopy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str]
) -> None:
    config, workspace = own_nights
    text = config.read_text()
    monkeypatch.setenv("DRIFTREC_PREFECT", "off")

    def said() -> str:
        code, _, err = driftrec(monkeypatch, capsys, "retrain", "-c", config, "-w", workspace.root, *words)
        assert code == 2
        assert err.count("\n") == 1
        return err

    config.write_text(text.replace('"growing"', '"other"'))
    assert "workspace of experiment 'growing', not 'other'" in said()
    config.write_text(text.replace("codes_per_level = 8", "codes_per_level = 16"))
    assert "other settings in [items]" in said()
    config.write_text(text + '\n[search]\nobjectives = ["search"]\n')
    assert 'retrain.gate.objective = "recommendation" is not among search.objectives' in said()
    config.write_text(text)
    marker = workspace.root / "workspace.json"
    marker.write_text(marker.read_text().replace('"schema": 1', '"schema": 2'))
    assert "workspace schema 2" in said()


def test_one_command_goes_back_and_the_history_tells(
    own_nights: ShopCopy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    _, workspace = own_nights
    code, out, _ = driftrec(monkeypatch, capsys, "rollback", "-w", workspace.root)
    assert (code, out) == (
        0,
        "single after stage 1 is in service again, single after stage 2 is not "
        "the next challenger goes on from the newest stage of single, not from this model",
    )
    assert champion.champion(workspace) == Job("single", 0, "same_stage", 1)
    version = MlflowClient(workspace.mlflow_uri).get_model_version_by_alias("driftrec-growing", "champion")
    assert version.tags["stage"] == "1"
    shown_as_rolled_back(workspace)
    code, out, _ = driftrec(monkeypatch, capsys, "history", "-w", workspace.root)
    assert code == 0
    for word in ("first", "promoted", "kept", "rolled_back", "in service: single after stage 1"):
        assert word in out
    code, _, err = driftrec(monkeypatch, capsys, "rollback", "-w", workspace.root)
    assert code == 2
    assert "no earlier champion" in err


def shown_as_rolled_back(workspace: Workspace) -> None:
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client

    (run,) = MlflowClient(workspace.mlflow_uri).search_runs(["1", "2", "3"], "tags.decision = 'rolled_back'")
    assert run.data.tags["champion"] == read_json(workspace.root / "champion.json")["key"]
    with get_client(sync_client=True) as prefect:
        shown = [found for found in prefect.read_artifacts() if "**rolled_back**" in str(found.data)]
    assert [(found.key, str(found.flow_run_id)) for found in shown] == [
        ("decision", run.data.tags["prefect.flow_run_id"])
    ]


def test_a_run_killed_before_its_decision_goes_on_and_decides_the_same(
    own_nights: ShopCopy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.retrain import retrain

    config, workspace = own_nights
    write_rows(config.parent / "events" / "week4.csv", [*week(4), *week(5)[:1]])
    shutil.copytree(config.parent, tmp_path / "undisturbed")
    real = contest.probe

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(contest, "probe", die)
    with pytest.raises(RuntimeError, match="killed"):
        retrain(str(config), workspace=str(workspace.root))
    assert len(read_history(workspace)[0]) == 3
    monkeypatch.setattr(contest, "probe", real)
    retrain(str(config), workspace=str(workspace.root))
    other = tmp_path / "undisturbed"
    # Without Prefect, besides: the same steps as plain functions.
    arguments = {"config": str(other / config.name), "new": None, "close_now": False}
    assert "**" in run_plainly("retrain", {**arguments, "workspace": str(other / workspace.root.name)})
    mine, theirs = (read_history(Workspace(place))[0] for place in (workspace.root, other / workspace.root.name))
    same = ("decision", "stage", "scores", "differences")
    assert [[line[name] for name in same] for line in mine] == [[line[name] for name in same] for line in theirs]
    assert mine[-1]["challenger"]["key"] == theirs[-1]["challenger"]["key"]
    for name in ("adapter_model.safetensors", "token_rows.safetensors"):
        first, second = (
            (place / "runs" / "checkpoints" / mine[-1]["challenger"]["key"] / name).read_bytes()
            for place in (workspace.root, other / workspace.root.name)
        )
        assert first == second


def test_changed_settings_train_the_champion_anew_and_an_open_gate_lets_it_in(own_nights: ShopCopy) -> None:
    from flows.retrain import retrain

    config, workspace = own_nights
    before = champion.in_service(workspace)
    changed = config.read_text().replace("[evaluation]", "learning_rate = 0.002\n[evaluation]")
    config.write_text(changed.replace("minimum = 1\n", "minimum = -1\n"))
    said = retrain(str(config), workspace=str(workspace.root))
    after = champion.in_service(workspace)
    assert before is not None
    assert after is not None
    assert (after.job, after.key == before.key) == (before.job, False)
    assert "**rebuilt**: single after stage 2, trained anew, goes into service: hit_at_10" in said


def test_a_workspace_that_a_comparison_made_begins_with_the_best_method_of_its_report(
    trained: Trained, tmp_path: Path
) -> None:
    from flows.reporting import stored
    from flows.retrain import retrain

    shutil.copytree(trained.config.parent.parent, tmp_path / "compared")
    config = tmp_path / "compared" / "source" / trained.config.name
    with config.open("a") as handle:
        handle.write('[retrain]\nmethod = "single"\n[retrain.gate]\nlatency_ms = 60000\n')
    workspace = Workspace(tmp_path / "compared" / "workspace")
    checkpoints = listing(workspace.checkpoints)
    said = retrain(str(config), workspace=str(workspace.root))
    job = champion.champion(workspace)
    assert job is not None
    best = next(line.method for line in stored.findings(trained.report).lines("same_stage") if not line.baseline)
    assert (job.method in ("frozen", "single"), job.stage, job.protocol) == (True, 1, "same_stage")
    assert best in ("frozen", "single")
    assert "**first**" in said
    assert listing(workspace.checkpoints) == checkpoints
