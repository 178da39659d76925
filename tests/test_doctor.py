from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.growing import listing, opened
from flows import doctor, machine
from flows.doctor import Check, examine, healthy, pin
from flows.experiment import open_workspace
from stages.errors import UserError
from stages.workspace import Workspace
from tests.test_schedule import alone, free_port


def named(checks: list[Check], subject: str) -> Check:
    return next(check for check in checks if check.subject == subject)


def test_a_report_names_every_way_its_checkpoints_were_trained() -> None:
    one, other = {"precision": "float32", "threads": 1}, {"precision": "bfloat16", "threads": 2}
    assert machine.trained_in([one, one]) == "Trained in float32 on 1 CPU thread."
    both = machine.trained_in([one, other, {}])
    assert both is not None
    assert "in float32 on 1 CPU thread" in both
    assert "in bfloat16 autocast over float32 weights on 2 CPU threads" in both
    assert machine.trained_in([{}]) is None


def test_the_environment_of_the_tests_is_healthy(tmp_path: Path) -> None:
    checks = examine(tmp_path)
    assert healthy(checks), [check for check in checks if check.level == "fault"]
    assert named(checks, "sqlalchemy").level == "ok"
    assert named(checks, "disk").found.endswith(str(tmp_path))


def test_versions_that_break_prefect_silently_are_faults_with_a_remedy() -> None:
    check = pin("sqlalchemy", ">=2.0,<2.1", "2.1.0")
    assert check.level == "fault"
    assert "schedules never fire" in check.found
    assert "'sqlalchemy>=2.0,<2.1'" in check.remedy
    assert pin("fastapi", ">=0.139,<0.151", "0.151.2").level == "fault"
    assert pin("fastapi", ">=0.139,<0.151", "0.150.0").level == "ok"
    assert not healthy([check])


def test_a_missing_library_is_a_fault() -> None:
    assert pin("polars", ">=2.1", None).level == "fault"


def test_a_full_disk_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**62)
    assert named(examine(tmp_path / "not" / "there"), "disk").level == "fault"


def test_more_threads_than_cores_are_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(machine.cores() + 1))
    assert named(examine(), "threads").remedy == f"export OMP_NUM_THREADS={machine.cores()}"


def test_left_overs_of_dead_processes_are_named_and_those_of_living_ones_are_not(workspace: Workspace) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (workspace.root / f".tmp-report.json-{os.getpid()}-00ff").touch()
    assert "left-overs" not in {check.subject for check in examine(workspace.root)}
    (workspace.root / f".tmp-report.json-{gone.pid}-00ff").touch()
    assert f".tmp-report.json-{gone.pid}" in named(examine(workspace.root), "left-overs").found


def repaired(root: Path | str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `driftrec doctor --repair` says, with no Prefect server but the one named."""
    words = ["doctor", "-w", str(root), "--repair"]
    command, env = [sys.executable, "-m", "flows.cli", *words], alone(Path(root)) | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_doctor_repairs_the_workspace_itself_where_prefect_is_down(tmp_path: Path) -> None:
    _, workspace = opened(tmp_path)
    manifest = workspace.stages / "manifest.json"
    (workspace.stages / "next.json").write_bytes(manifest.read_bytes())
    address = f"http://127.0.0.1:{free_port()}/api"
    done = repaired(workspace.root, PREFECT_API_URL=address)
    said = " ".join(done.stdout.split())
    assert "a commit of stages was ended" in said
    assert f"the Prefect server at {address} is out of reach; its flow runs were not looked at" in said
    assert "no flow run is left open" not in said
    assert (done.stderr, done.returncode) == ("", 0)
    assert not (workspace.stages / "next.json").exists()


def test_the_doctor_says_which_server_it_asked_for_open_runs(tmp_path: Path) -> None:
    _, workspace = opened(tmp_path)
    said = " ".join(repaired(workspace.root).stdout.split())
    assert "stages, item codes and champion are whole" in said
    assert "no flow run is left open on a Prefect server of this command's own" in said
    assert "name that one with PREFECT_API_URL" in said


def test_the_doctor_repairs_only_a_workspace_that_is_named_and_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the workspace to repair with --workspace"):
        list(doctor.repaired(None))
    with pytest.raises(UserError, match=r"typo: nothing to repair, no workspace is there"):
        list(doctor.repaired(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [('{"schema": 2, "name": "growing"}', "workspace schema 2, this version"), ("[]", "not a workspace's name")],
)
def test_the_doctor_writes_nothing_into_a_workspace_of_another_version(
    tmp_path: Path, content: str, found: str
) -> None:
    _, workspace = opened(tmp_path)
    (workspace.stages / "next.json").write_bytes((workspace.stages / "manifest.json").read_bytes())
    (workspace.root / "workspace.json").write_text(content)
    before = listing(workspace.root)
    check = named(examine(workspace.root), "workspace")
    assert (check.level, found in check.found, "another workspace" in check.remedy) == ("fault", True, True)
    with pytest.raises(UserError, match=found):
        list(doctor.repaired(workspace.root))
    assert listing(workspace.root) == before


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("config.json", "{", "config.json: not a readable JSON file"),
        ("config.json", "{}", "config.json: not the settings of a workspace"),
        ("history.jsonl", "garbage\n", "history.jsonl: line 1 is not what was written"),
        ("history_end.json", "{}", "history_end.json: not a history's end"),
        ("champion.json", "{}", "champion.json: not a champion of this version"),
    ],
)
def test_the_doctor_names_a_damaged_file_of_settings_or_decisions(
    tmp_path: Path, name: str, content: str, found: str
) -> None:
    config, workspace = opened(tmp_path)
    open_workspace(config, workspace.root)
    assert named(examine(workspace.root), "workspace").level == "ok"
    (workspace.root / name).write_text(content)
    before = listing(workspace.root)
    check = named(checks := examine(workspace.root), "workspace")
    assert (check.level, found in check.found, healthy(checks)) == ("fault", True, False)
    assert check.remedy
    assert listing(workspace.root) == before


def test_the_processor_s_features_decide_the_precision_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, level, word in (
        (["amx_bf16", "avx2"], "ok", "bfloat16"),
        (["avx2"], "advice", "float32"),
        ([], "advice", "no known"),
    ):
        monkeypatch.setattr(machine, "features", lambda features=features: features)
        check = named(examine(), "processor")
        assert check.level == level
        assert word in check.found


def test_a_report_names_no_host_and_no_user() -> None:
    text = str(machine.description()).lower()
    assert os.uname().nodename.lower() not in text
    assert machine.versions()["torch"]
