from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.growing import write_shop
from flows import login, schedule
from flows.promotion.history import read_history
from stages.errors import UserError
from stages.workspace import Workspace
from tests.asking import asked

GATE = "[retrain.gate]\nlatency_ms = 60000\n"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(found: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "the schedule ended by itself"
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.3)


@pytest.mark.parametrize("when", [["--every", "4"], pytest.param(["--cron", "* * * * *"], marks=pytest.mark.slow)])
def test_a_scheduled_run_really_executes_and_lands_in_mlflow(tmp_path: Path, when: list[str]) -> None:
    """A real server and a real schedule: with SQLAlchemy 2.1 the UI looks healthy and nothing ever runs."""
    from mlflow import MlflowClient

    config, place = write_shop(tmp_path, GATE), Workspace(tmp_path / "workspace")
    port = free_port()
    words = ["serve-flows", "-c", config, "-w", place.root, *when, "--port", port]
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *map(str, words)], env=alone(tmp_path), stdout=output, stderr=output
        )
        try:
            address = f"http://127.0.0.1:{port}/api"
            wait_for(lambda: schedule.answers(address) and "COMPLETED" in states(address, tmp_path), process, 240)
        finally:
            process.send_signal(signal.SIGTERM if "--cron" in when else signal.SIGINT)
            code = process.wait(60)
    entry = f"http://127.0.0.1:{port} (login in {tmp_path / 'prefect' / 'login'})"
    said = (tmp_path / "output.txt").read_text()
    assert entry in said
    assert "interrupted" not in said
    assert said.endswith("the schedule has ended; the next `driftrec serve-flows` or `retrain` goes on from here\n")
    assert code == 0
    assert not schedule.answers(address)
    assert [line["decision"] for line in read_history(place)[0]] == ["first"]
    client = MlflowClient(place.mlflow_uri)
    found = client.get_experiment_by_name("growing")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], "tags.role = 'decision'")
    assert run.data.tags["decision"] == "first"
    assert run.data.tags["prefect.flow_run_id"]


def states(address: str, folder: Path) -> set[str]:
    """States of the flow runs that are not waiting for their time, at a server whose login is in `folder`."""
    wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}}
    runs = asked(address, "flow_runs/filter", wanted, login.stored(folder / "prefect"))
    found = {run["state_type"]: run["state"]["message"] for run in runs}
    assert not found.keys() & {"FAILED", "CRASHED"}, found
    return set(found)


@pytest.mark.slow
def test_a_killed_retraining_ends_in_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL while it trains: the lock is free, the next run goes on, and Prefect learns that the first one died."""
    for name in ("killed", "whole"):
        write_shop(tmp_path / name, GATE)
    killed, whole = (Workspace(tmp_path / name / "workspace") for name in ("killed", "whole"))
    process = retraining(tmp_path / "killed")
    wait_for(lambda: any(killed.checkpoints.glob("*stage00*")), process, 240)
    process.kill()
    process.wait()
    assert not read_history(killed)[0]
    for name in ("killed", "whole"):
        assert retraining(tmp_path / name).wait(300) == 0
    assert files(killed.checkpoints) == files(whole.checkpoints)
    assert [line["scores"] for line in read_history(killed)[0]] == [line["scores"] for line in read_history(whole)[0]]
    repair = [sys.executable, "-m", "flows.cli", "doctor", "-w", str(killed.root), "--repair"]
    done = subprocess.run(repair, env=alone(tmp_path / "killed"), capture_output=True, text=True, check=True)
    assert "no flow run is left open" in done.stdout


@contextmanager
def group(words: list[object], environment: dict[str, str], said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, killed as a whole."""
    with said.open("ab") as output:
        command = [sys.executable, "-m", *map(str, words)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Door:
    """A port in front of a server, which can be shut and opened at once; a server takes its time.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.port, self._behind, self._open = free_port(), port, list[socket.socket]()

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self._open.append(listener)
        threading.Thread(target=self._let_in, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _let_in(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                behind = socket.create_connection(("127.0.0.1", self._behind))
                self._open += [caller, behind]
                for pair in ((caller, behind), (behind, caller)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.slow
def test_a_scheduled_run_whose_server_is_killed_does_its_work_and_is_no_failure(tmp_path: Path) -> None:
    config, place = write_shop(tmp_path, GATE, training="first_epochs = 100\nepochs = 1"), Workspace(tmp_path / "w")
    port = free_port()
    door, direct = Door(port), f"http://127.0.0.1:{port}/api"
    # Prefect's client asks again for 2 + 4 + 8 seconds, give or take a fifth.
    environment = alone(tmp_path) | {
        "PREFECT_API_URL": f"http://127.0.0.1:{door.port}/api",
        "PREFECT_CLIENT_MAX_RETRIES": "3",
    }
    (tmp_path / "prefect").mkdir()
    listen = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    served = ["flows.cli", "serve-flows", "-c", config, "-w", place.root, "--every", "5"]
    with ExitStack() as stack:
        with group(listen, environment, tmp_path / "server.txt") as server:
            wait_for(lambda: schedule.answers(direct), server, 240)
            door.open()
            process = stack.enter_context(group(served, environment, tmp_path / "output.txt"))
            wait_for(lambda: any(place.locks.glob("*")), process, 240)
            door.shut()
        assert not read_history(place)[0]
        server = stack.enter_context(group(listen, environment, tmp_path / "server.txt"))
        # The decision is in MLflow: next, Prefect would show it.
        wait_for(lambda: "mlflow" in copies_given(place), process, 240)
        assert [line["decision"] for line in read_history(place)[0]] == ["first"]
        time.sleep(28)  # the artifact is given up, the run's end is not yet
        assert schedule.answers(direct)
        assert "prefect" not in copies_given(place)
        door.open()
        wait_for(lambda: "COMPLETED" in states(direct, tmp_path), process, 60)
        assert "CANCELLED" in states(direct, tmp_path), "runs that came up meanwhile wait"


def copies_given(place: Workspace) -> dict[str, object]:
    stored = place.root / "runs" / "copies.json"
    return json.loads(stored.read_text())["given"] if stored.exists() else {}


def alone(folder: Path) -> dict[str, str]:
    """An environment in which Prefect has its own folder, no server and no login."""
    own = ("PREFECT_API", login.ASKED_FOR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return kept | {"PREFECT_HOME": str(folder / "prefect"), "OMP_NUM_THREADS": "1"}


def retraining(folder: Path) -> subprocess.Popen[bytes]:
    words = ["retrain", "-c", folder / "shop.toml", "-w", folder / "workspace"]
    command = [sys.executable, "-m", "flows.cli", *map(str, words)]
    return subprocess.Popen(command, env=alone(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def files(checkpoints: Path) -> dict[str, bytes]:
    """The tensors of every checkpoint; state.json holds wall times."""
    return {
        str(path.relative_to(checkpoints)): path.read_bytes() for path in sorted(checkpoints.rglob("*.safetensors"))
    }


def test_a_named_server_that_does_not_answer_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    with pytest.raises(UserError, match="no server answers there"), schedule.api(tmp_path, free_port()):
        pass


@pytest.mark.parametrize(
    ("cron", "every", "timezone", "said"),
    [
        ("0 3 * *", None, "UTC", 'Invalid cron string: "0 3 * *"'),
        ("0 3 * * *", None, "Mars/Phobos", 'Invalid timezone: "Mars/Phobos"'),
        (None, math.inf, "UTC", "--every inf: give 1 to 31622400 seconds"),
        (None, math.nan, "UTC", "--every nan: give 1 to 31622400 seconds"),
        (None, 1e20, "UTC", "--every 1e+20: give 1 to 31622400 seconds"),
        (None, 0.0, "UTC", "--every 0: give 1 to 31622400 seconds"),
    ],
)
def test_a_schedule_that_is_none_is_refused_before_a_server_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cron: str | None, every: float | None, timezone: str, said: str
) -> None:
    monkeypatch.setattr(schedule, "api", lambda *_: pytest.fail("a server was looked for"))
    with pytest.raises(UserError, match=re.escape(said)):
        schedule.serve(tmp_path / "shop.toml", tmp_path / "workspace", cron, every, timezone)


def test_an_address_that_is_none_answers_nothing() -> None:
    assert not schedule.answers("file:///etc/passwd")
