"""`driftrec ui`, which `make ui` calls: two servers on loopback, their addresses, and nothing left afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from flows import ui
from stages.errors import UserError
from stages.workspace import Workspace
from tests.test_schedule import alone, free_port

STAND_IN = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ui.Window, ...]:
    """Two small servers, each with a child of its own, in place of Prefect's and MLflow's."""
    (folder / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    ports = free_port(), free_port()
    return tuple(
        ui.Window(name, port, ("stand_in", str(port)), "/", f"--{name}-port", folder / f"{name}.log")
        for name, port in zip(("first", "second"), ports, strict=True)
    )


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def gone(windows: tuple[ui.Window, ...]) -> bool:
    """Whether both servers and their children have ended."""
    numbers = [int(word) for window in windows for word in window.output.read_text().splitlines()[0].split()]
    assert len(numbers) == 4
    return ended(numbers)


def ended(numbers: Iterable[int]) -> bool:
    """Whether all of these processes end; the kernel may take a moment after a kill."""
    until = time.monotonic() + 10
    while any(map(alive, numbers)):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("end", [SystemExit(130), SystemExit(143), KeyboardInterrupt()])
def test_ctrl_c_and_sigterm_stop_both_servers_with_all_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    windows = stand_ins(tmp_path, monkeypatch)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        raise end

    ui.show(windows, say)
    assert said == [f"first {windows[0].address}    second {windows[1].address}    Ctrl-C stops both"]
    assert gone(windows)


SHOW = """
import sys
from pathlib import Path
from flows import ui
ports = map(int, sys.argv[1:])
windows = tuple(
    ui.Window(f"w{port}", port, ("stand_in", str(port)), "/", "--port", Path(f"{port}.log").resolve()) for port in ports
)
ui.show(windows, lambda line: print(line, flush=True))
"""


def test_a_killed_command_leaves_no_server_and_nothing_a_server_started(tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    ports = free_port(), free_port()
    roots = [str(tmp_path), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", SHOW, *map(str, ports)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "Ctrl-C stops both" in process.stdout.readline()
        family = descendants(process.pid)
        numbers = [
            int(word) for port in ports for word in (tmp_path / f"{port}.log").read_text().split("\n")[0].split()
        ]
        assert family > set(numbers)
        process.kill()
    assert len(numbers) == 4
    assert ended(family)


def test_a_prefect_that_answers_already_is_shown_and_left_running_and_only_the_other_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stand_ins(tmp_path, monkeypatch)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        raise KeyboardInterrupt

    def beside(line: str) -> None:
        ui.show((replace(first, shared=True, output=tmp_path / "unused.log"), second), stop)
        said.append("still there" if urllib.request.urlopen(first.address).status == 200 else "gone")
        with pytest.raises(UserError, match=f"port {first.port} for first: Address already in use"):
            ui.show((replace(first, shared=True, well=b"true"), second), stop)
        raise KeyboardInterrupt

    ui.show((first,), beside)
    assert said == [
        f"first {first.address} (was running)    second {second.address}    Ctrl-C stops second",
        "still there",
    ]
    assert not (tmp_path / "unused.log").exists()
    assert gone((first, second))


def test_a_file_in_place_of_the_workspace_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["ui", "-w", str(tmp_path / "file")]
    done = subprocess.run([sys.executable, "-m", "flows.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"driftrec: {tmp_path / 'file'}: cannot write the workspace: File exists; choose another folder\n"
    )


def test_a_server_that_ends_by_itself_ends_the_other_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = stand_ins(tmp_path, monkeypatch)

    def say(_: str) -> None:
        os.kill(int(windows[1].output.read_text().split()[0]), signal.SIGKILL)

    with pytest.raises(UserError, match=r"second at http://127.0.0.1:\d+ has ended by itself; .*second.log says why"):
        ui.show(windows, say)
    assert gone(windows)


def test_an_occupied_port_is_one_line_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        words = [
            "ui",
            "-w",
            str(tmp_path / "workspace"),
            "--prefect-port",
            str(free_port()),
            "--mlflow-port",
            str(port),
        ]
        done = subprocess.run([sys.executable, "-m", "flows.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {port} for MLflow: Address already in use" in done.stderr
    assert "--mlflow-port" in done.stderr
    assert not list((tmp_path / "workspace").rglob("*.log"))


def test_both_pages_are_asked_to_listen_on_this_machine_only(tmp_path: Path) -> None:
    for window in ui.windows(Workspace(tmp_path), 4200, 5000):
        assert window.command[window.command.index("--host") + 1] == "127.0.0.1"
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    ports = "--prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)"
    assert f'driftrec ui --workspace "$(WORKSPACE)" {ports}' in makefile


@pytest.mark.slow
def test_the_real_pages_come_up_on_loopback_only_and_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    ports = {"--prefect-port": free_port(), "--mlflow-port": free_port()}
    words = ["ui", "-w", str(tmp_path / "workspace"), *(str(word) for pair in ports.items() for word in pair)]
    command = [sys.executable, "-m", "flows.cli", *words]
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, env=alone(tmp_path), stdout=output, stderr=output)
        try:
            until = time.monotonic() + 240
            while b"Ctrl-C stops both" not in (tmp_path / "output.txt").read_bytes():
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < until, "nothing came up"
                time.sleep(0.3)
            family = descendants(process.pid)
            heard = listening(family)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
    assert code == 0
    for port in ports.values():
        assert f"http://127.0.0.1:{port}" in (tmp_path / "output.txt").read_text()
    assert {port for _, port in heard} >= set(ports.values())
    assert {address for address, _ in heard} == {"0100007F"}
    assert len(family) >= 2
    assert ended(family)


def descendants(process: int) -> set[int]:
    """Children, their children, and so on."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {process}} - found:
        found |= more
    return found


def listening(processes: set[int]) -> set[tuple[str, int]]:
    """(address as the kernel writes it, port) of every socket these processes listen on."""
    sockets = set()
    for process in processes:
        for handle in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets.add(os.readlink(handle))
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    own = [row[1].split(":") for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return {(address, int(port, 16)) for address, port in own}
