"""What a run removes, what it leaves, what it asks of the disk, and how its log lines look."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows import logs, mirror
from flows.promotion import champion
from flows.promotion.retention import removable, remove, superseded
from stages import workspace as places
from stages.checkpoint import fault_of, tensors_digest
from stages.commit import checkpoint_folders
from stages.config import Config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.jobs import Job
from stages.left_overs import left_overs, sweep
from stages.locks import held
from stages.space import expected_bytes
from stages.train import train_stage
from stages.workspace import Workspace, read_json, temporary_beside, write_json
from tests import tiny


def config(learning_rate: float = 1e-2) -> Config:
    training = {"first_epochs": 1, "epochs": 1, "learning_rate": learning_rate}
    return tiny.config(training={**tiny.config().training.model_dump(), **training})


def job(method: str, stage: int) -> Job:
    return Job(method, 0, "same_stage", stage)


def folders(workspace: Workspace, own: Job, rate: float) -> list[Path]:
    settings = config(rate)
    return checkpoint_folders(settings, workspace, load_dataset(settings, workspace), own)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two learning rates after one another: the first lineage to stage 2, the second to stage 1."""
    workspace = tiny.checkerboard(tmp_path_factory.mktemp("kept"))
    train_stage(config(1e-2), workspace, job("single", 2))
    train_stage(config(1e-3), workspace, job("single", 1))
    return workspace


@pytest.fixture
def copy(twice: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(twice.root, tmp_path / "w")
    return Workspace(tmp_path / "w")


def gone(workspace: Workspace, **wishes: Any) -> set[str]:
    return {removal.path.name for removal in removable(workspace, **wishes)}


def test_what_a_kept_stage_rests_on_is_kept_and_a_superseded_one_goes(copy: Workspace) -> None:
    assert gone(copy) == set()
    superseded = folders(copy, job("single", 1), 1e-3)[1]
    assert gone(copy, keep=1) == {superseded.name}
    freed = remove(removable(copy, keep=1))
    assert freed > 0
    assert not superseded.exists()
    assert all(fault_of(path) is None for path in folders(copy, job("single", 2), 1e-2))


def test_a_broken_mlflow_keeps_its_models_and_nothing_else(copy: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    (copy.root / "mlflow.db").write_bytes(b"no database" * 100)
    assert superseded(copy, "shop", keep=1) == []
    assert "MLflow does not say which models it holds" in caplog.text


def crowned(workspace: Workspace, own: Job, rate: float) -> None:
    """Put a trained model into service."""
    found = train_stage(config(rate), workspace, own)
    assert champion.promote(workspace, found, "promoted", {"stage": own.stage}, champion.settle(workspace))


def test_the_champion_s_lineage_and_what_a_roll_back_reaches_stay(copy: Workspace) -> None:
    crowned(copy, job("single", 1), 1e-3)
    assert gone(copy, keep=1) == set()
    crowned(copy, job("single", 2), 1e-2)
    assert gone(copy, keep=1) == set()


def test_a_model_that_was_taken_out_of_service_goes(copy: Workspace) -> None:
    superseded = folders(copy, job("single", 1), 1e-3)[1]
    crowned(copy, job("single", 2), 1e-2)
    crowned(copy, job("single", 1), 1e-3)
    champion.keep(copy, {"stage": 2}, champion.in_service(copy))
    assert gone(copy, keep=1) == set()
    champion.roll_back(config(), copy)
    assert gone(copy, keep=1) == {superseded.name}


def test_nothing_goes_while_the_champion_is_not_to_be_found(copy: Workspace) -> None:
    crowned(copy, job("single", 1), 1e-3)
    (folders(copy, job("single", 1), 1e-3)[1] / "state.json").write_text("{")
    with pytest.raises(UserError, match="or damaged; nothing was removed, run `driftrec retrain` first"):
        removable(copy)
    shutil.rmtree(folders(copy, job("single", 1), 1e-3)[1])
    with pytest.raises(UserError, match="not among the checkpoints"):
        removable(copy)


def test_what_the_latest_report_names_stays(copy: Workspace) -> None:
    superseded = folders(copy, job("single", 1), 1e-3)[1]
    jobs = {"schema": 1, "checkpoints": [{"key": superseded.name}], "evaluations": []}
    write_json(copy.reports / "a" / "jobs.json", jobs, seal=True)
    write_json(copy.reports / "latest.json", {"schema": 1, "report": "a"})
    assert gone(copy, keep=1) == set()
    assert gone(copy, keep=1, reports=True) == {superseded.name}
    with pytest.raises(UserError, match="--keep 0"):
        removable(copy, keep=0)


def test_second_moments_go_and_a_stage_that_needs_them_measures_them_again(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path)
    gems = {"gems": {"method": "gems", "corpus_tokens": 500, "refresh_every": 5}}
    settings = Config.model_validate({**config().model_dump(), "methods": gems})
    train_stage(settings, workspace, job("gems", 1))
    (moments,) = (workspace.root / "null_space").glob("*.safetensors")
    before, tensors = moments.read_bytes(), tensors_digest(folders_of_last(settings, workspace))
    assert gone(workspace) == {moments.name}
    remove(removable(workspace))
    shutil.rmtree(folders_of_last(settings, workspace))
    train_stage(settings, workspace, job("gems", 1))
    assert (moments.read_bytes(), tensors_digest(folders_of_last(settings, workspace))) == (before, tensors)


def folders_of_last(settings: Config, workspace: Workspace) -> Path:
    return checkpoint_folders(settings, workspace, load_dataset(settings, workspace), job("gems", 1))[-1]


def test_the_sweep_takes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = temporary_beside(tmp_path / "a.json")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    others = [tmp_path / ".tmp-old-style", tmp_path / f"tmp-x-{ended.pid}-00"]
    for path in (mine, dead / "inside", *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert left_overs(tmp_path) == [dead]
    assert sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([mine, *others])
    assert mine.parent == tmp_path
    assert mine != temporary_beside(tmp_path / "a.json")


def test_a_left_over_is_found_in_a_folder_that_an_earlier_look_found_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SETTLED", -(10**18))
    folder, running = tmp_path / "a" / "b", subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder.mkdir(parents=True)
    (folder / "file").touch()
    assert left_overs(tmp_path) == []
    time.sleep(0.02)  # the file system's clock moves in steps
    left = folder / f".tmp-file-{running.pid}-00"
    left.touch()
    assert left_overs(tmp_path) == [], "whoever writes it is alive"
    running.communicate(b"\n")
    assert left_overs(tmp_path) == [left]
    assert sweep(tmp_path) == [left]
    assert left_overs(tmp_path) == []


@pytest.mark.parametrize("method", ["single", "full_finetune", "frozen"])
def test_the_expected_size_of_the_checkpoints_is_their_size(method: str, tmp_path: Path) -> None:
    workspace, settings = tiny.checkerboard(tmp_path), config()
    dataset, jobs = load_dataset(settings, workspace), [job(method, 2), job(method, 1)]
    expected = expected_bytes(settings, workspace, dataset, jobs)
    train_stage(settings, workspace, job(method, 2))
    tensors = sum(path.stat().st_size for path in workspace.checkpoints.rglob("*.safetensors"))
    assert 0.8 * tensors < expected < 1.1 * tensors
    assert expected_bytes(settings, workspace, dataset, jobs) == 0  # what is there needs no more room


def test_a_json_log_line_holds_the_message_in_one_line() -> None:
    record = logging.LogRecord("flows.x", logging.WARNING, "", 0, "two\nlines of %s", ("é",), None)
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "two\nlines of é"
    assert json.loads(line)["level"] == "warning"


def test_the_log_format_is_text_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    logs.choose_format(None)
    assert isinstance(logs.formatter(), logs.JsonLines)
    logs.choose_format("text")
    assert not logs.as_json()
    with pytest.raises(UserError, match="give text or json"):
        logs.choose_format("xml")


def test_one_holder_at_a_time_and_the_waiter_knows_whom_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "import sys, pathlib; from stages.locks import held\n"
        "with held(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()  # the kernel frees the lock at once, and the file stays
        holder.wait()
    with held(tmp_path / "x.lock"):
        pass
    assert (tmp_path / "x.lock").exists()
    assert caplog.messages == []


def test_one_report_that_cannot_be_recorded_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcd":
        for file in ("jobs.json", "report.json"):
            write_json(workspace.reports / name / file, {})

    def copied(_: Workspace, folder: Path) -> str:
        if folder.name == "b":
            read_json(folder / "gone.json")
        if folder.name == "c" and late:
            raise TimeoutError("no answer")
        write_json(folder / "chart.json", {})
        return f"chart of {folder.name}"

    monkeypatch.setattr(mirror, "_answers", lambda _: True)
    monkeypatch.setattr(mirror, "_copied", copied)
    late = True
    assert mirror.record(workspace, workspace.reports / "d") == "chart of d"
    assert [path.name for path in mirror.missing(workspace)] == ["b", "c"]
    assert f"does not have the report {workspace.reports / 'b'} (" in caplog.text
    late = False
    assert mirror.record(workspace, workspace.reports / "d") == "chart of d"
    assert [path.name for path in mirror.missing(workspace)] == ["b"]


def test_a_silent_mlflow_costs_a_warning_and_its_time_limit(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    import time

    monkeypatch.setattr(mirror, "_answers", lambda _: time.sleep(30))
    monkeypatch.setenv("DRIFTREC_MLFLOW_SECONDS", "0.2")
    started = time.monotonic()
    assert mirror.record(workspace, workspace.reports / "a") is None
    assert time.monotonic() - started < 5
    assert "no answer within 0.2 s" in caplog.text
    monkeypatch.setenv("DRIFTREC_MLFLOW_SECONDS", "never")
    assert mirror.record(workspace, workspace.reports / "a") is None
    assert "give seconds above 0" in caplog.text
