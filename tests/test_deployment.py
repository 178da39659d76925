"""prefect.yaml as docs/operations.md says to use it: a real server, a work pool, a worker, and runs that overlap."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import write_shop
from flows import login, schedule
from flows.promotion.history import read_history
from stages.workspace import Workspace
from tests.asking import asked
from tests.test_schedule import GATE, alone, free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PATIENCE = 150.0


class Deployed:
    """A folder with prefect.yaml and a shop, deployed on a server.

    Args:
        folder: of both, and of the workspace.
        address: of the server's API.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.workspace = Workspace(folder / "workspace")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = alone(folder) | {"PREFECT_API_URL": address, "PATH": path, "PREFECT_WORKER_QUERY_SECONDS": "1"}
        self.env |= {"PYTHONPATH": str(ROOT), login.SENT: os.environ[login.SENT]}

    def prefect(self, *words: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        for _ in range(20):
            try:
                return asked(self.address, path, body, os.environ[login.SENT])
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its SQLite is locked for a moment; Prefect's own client asks again, too
                    raise
                time.sleep(0.5)
        raise AssertionError("the server's database stays locked")

    def start(self) -> str:
        """A run of the deployment, now; its id."""
        deployment = self.ask("deployments/name/retrain/nightly")["id"]
        return self.ask(f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run}")["state"]

    def wait(self, run: str, *wanted: str) -> dict[str, Any]:
        until, ends = time.monotonic() + PATIENCE, {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        while (state := self.state(run))["type"] not in wanted:
            assert state["type"] not in ends, state
            assert time.monotonic() < until, f"{state['type']}: {(self.folder / 'worker.log').read_text()[-2000:]}"
            time.sleep(0.3)
        return state

    @contextmanager
    def worker(self) -> Iterator[Callable[[], None]]:
        """The worker of the guide, and what kills it together with the run it has under way."""
        words = ["worker", "start", "--pool", "driftrec"]
        with (self.folder / "worker.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *words],
                cwd=self.folder,
                env=self.env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

        def kill() -> None:
            for number in (process.pid, self.holder()):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            process.wait()

        try:
            yield kill
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()

    def holder(self) -> int:
        """The run that holds the workspace: a process of its own, which outlives its worker."""
        return int((self.workspace.root / "run.lock").read_text().split()[1])


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployed")
    config = write_shop(folder, GATE)
    config.write_text(
        config.read_text().replace('"unused"', '"workspace"').replace("first_epochs = 1", "first_epochs = 40")
    )
    shutil.copy(ROOT / "prefect.yaml", folder)
    with schedule.server(folder / "server", free_port()) as address:
        found = Deployed(folder, address)
        found.prefect("work-pool", "create", "driftrec", "--type", "process")
        found.prefect("deploy", "--all")
        yield found


def test_a_deployed_run_lands_in_mlflow_and_one_beside_it_is_refused(deployed: Deployed) -> None:
    from mlflow import MlflowClient

    with deployed.worker():
        first = deployed.start()
        deployed.wait(first, "PENDING", "RUNNING")
        refused = deployed.wait(deployed.start(), "CANCELLED")
        assert "concurrency limit" in refused["message"].lower()
        deployed.wait(first, "COMPLETED")
    assert [line["decision"] for line in read_history(deployed.workspace)[0]] == ["first"]
    client = MlflowClient(deployed.workspace.mlflow_uri)
    found = client.get_experiment_by_name("growing")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], "tags.role = 'decision'")
    assert run.data.tags["prefect.flow_run_id"] == first


def test_a_run_that_died_with_its_worker_is_closed_by_the_doctor_and_makes_room(deployed: Deployed) -> None:
    shutil.rmtree(deployed.workspace.root, ignore_errors=True)
    with deployed.worker() as kill:
        dead = deployed.start()
        deployed.wait(dead, "RUNNING")
        until = time.monotonic() + PATIENCE
        while not (deployed.workspace.root / "last_command.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        kill()
    assert deployed.state(dead)["type"] == "RUNNING", "Prefect itself found out"
    words = ["doctor", "--repair", "-w", str(deployed.workspace.root)]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=deployed.folder,
        env=deployed.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "was left running by a kill" in " ".join(done.stdout.split())
    assert deployed.state(dead)["type"] == "CRASHED"
    with deployed.worker():
        deployed.wait(deployed.start(), "COMPLETED")
    assert [line["decision"] for line in read_history(deployed.workspace)[0]] == ["first"]
