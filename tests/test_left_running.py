"""What a kill or another run leaves behind is told, closed or left alone, as is right."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.growing import listing
from flows import crashed, experiment
from stages.errors import UserError
from tests.nights import ShopCopy

HOLD = """
import fcntl, sys
with open(sys.argv[1], "a+") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_runs_that_a_kill_left_running_are_closed_by_the_doctor(own_nights: ShopCopy) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.doctor import repaired
    from flows.retrain import retrain

    config, workspace = own_nights
    mine = {"config": str(config), "workspace": str(workspace.root)}
    with get_client(sync_client=True) as client:
        dead = client.create_flow_run(retrain, parameters=mine, state=Running())
        other = client.create_flow_run(retrain, parameters=mine | {"workspace": "/elsewhere"}, state=Running())
        found = [check.found for check in repaired(workspace.root)]
        assert any(dead.name in text for text in found)
        states = {run.id: client.read_flow_run(run.id).state_type for run in (dead, other)}
        assert [str(states[run.id].value) for run in (dead, other)] == ["CRASHED", "RUNNING"]
        assert "no flow run is left open" in [check.found for check in repaired(workspace.root)][-1]
        crashed.mark_crashed(str(other.id))


def test_a_schedule_that_begins_closes_what_an_earlier_one_left_running(own_nights: ShopCopy) -> None:
    """A run that died holds the deployment's only place: every later one would be cancelled."""
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.retrain import retrain
    from flows.schedule import make_room

    config, workspace = own_nights
    with get_client(sync_client=True) as client:
        dead = client.create_flow_run(
            retrain, parameters={"config": str(config), "workspace": str(workspace.root)}, state=Running()
        )

        def state() -> str:
            return str(client.read_flow_run(dead.id).state_type.value)

        with experiment.exclusive(workspace):
            make_room(workspace.root)
        assert state() == "RUNNING"
        make_room(workspace.root)
        assert state() == "CRASHED"


def test_a_flow_that_others_start_writes_files_for_its_user_alone(own_nights: ShopCopy) -> None:
    from flows.retrain import retrain

    config, workspace = own_nights
    before = os.umask(0o022)
    try:
        retrain(str(config), workspace=str(workspace.root))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert (workspace.root / "last_command.json").stat().st_mode & 0o077 == 0


def test_the_doctor_leaves_a_workspace_alone_that_a_run_holds(own_nights: ShopCopy) -> None:
    from flows.doctor import repaired

    with experiment.exclusive(own_nights[1]):
        (check,) = repaired(own_nights[1].root)
    assert "in use by process" in check.found


def test_a_retraining_is_refused_while_another_holds_the_workspace(own_nights: ShopCopy) -> None:
    from flows.retrain import retrain

    config, workspace = own_nights
    holder = [sys.executable, "-c", HOLD, str(workspace.root / "run.lock")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = listing(workspace.root)
        with pytest.raises(UserError, match="in use by"):
            retrain(str(config), workspace=str(workspace.root))
        assert listing(workspace.root) == before
        process.communicate()
    assert "nothing to decide" in retrain(str(config), workspace=str(workspace.root))


def test_the_deployment_file_names_what_exists() -> None:
    found = yaml.safe_load((Path(__file__).parent.parent / "prefect.yaml").read_text())
    (deployment,) = found["deployments"]
    module, name = deployment["entrypoint"].rsplit(".", 1)
    flow = getattr(importlib.import_module(module), name)
    assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert deployment["schedules"][0]["cron"] == "0 3 * * *"
