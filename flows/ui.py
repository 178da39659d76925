"""`driftrec ui`: Prefect's and MLflow's user interfaces side by side, on this machine only, until Ctrl-C."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from flows import login
from flows.tether import tethered
from stages.errors import UserError
from stages.workspace import Workspace

HOST = "127.0.0.1"
PATIENCE = 240.0
"""Seconds a server may take to answer for the first time; new databases on a slow machine take most of it."""


@dataclass(frozen=True)
class Window:
    """One user interface.

    Attributes:
        name: in words.
        port: where it listens.
        command: words after `python -m`.
        health: path that answers once it is up.
        option: of the command line, that names the port.
        output: file for what the server says.
        well: what it answers there; empty: anything.
        shared: one that runs already is shown in place of a new one.
        home: Prefect's folder, with its login; None: it has none.
    """

    name: str
    port: int
    command: tuple[str, ...]
    health: str
    option: str
    output: Path
    well: bytes = b""
    shared: bool = False
    home: Path | None = None

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.port}"


def windows(workspace: Workspace, prefect: int, mlflow: int) -> tuple[Window, Window]:
    """Both interfaces of a workspace, on these ports."""
    root = workspace.root.resolve()
    place = ("--host", HOST, "--port")
    store, files = f"sqlite:///{root / 'mlflow.db'}", str(workspace.mlflow_artifacts.resolve())
    kept = ("--workers", "1", "--backend-store-uri", store, "--artifacts-destination", files)
    return (
        Window(
            "Prefect",
            prefect,
            ("prefect", "server", "start", *place, str(prefect)),
            "/api/health",
            "--prefect-port",
            root / "prefect" / "server.log",
            well=b"true",
            shared=True,
            home=login.home_in(root),
        ),
        Window(
            "MLflow",
            mlflow,
            ("mlflow", "server", *place, str(mlflow), *kept),
            "/health",
            "--mlflow-port",
            root / "mlflow-server.log",
            well=b"OK",
        ),
    )


def show(both: tuple[Window, ...], say: Callable[[str], None]) -> None:
    """Start the servers, say where they are once they answer, and stop them when this process is told to end.

    A Prefect server that answers on its port already, such as that of `driftrec serve-flows`, is used and left running.

    Raises:
        UserError: a port is taken, or a server does not come up or ends by itself; none is left running.
    """
    there = [window for window in both if window.shared and _answers(window)]
    ours = [window for window in both if window not in there]
    for window in ours:
        _see_free(window)
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        try:
            running = [(window, stack.enter_context(_started(window, both[0].address))) for window in ours]
            _wait_for(running)
            shown = [_shown(window, window in there) for window in both]
            say("    ".join([*shown, f"Ctrl-C stops {ours[0].name if there else 'both'}"]))
            while True:
                _see_alive(running)
                time.sleep(0.5)
        except SystemExit as end:  # Ctrl-C or SIGTERM: the way this command is meant to end
            if end.code not in (130, 143):
                raise


def _shown(window: Window, there: bool) -> str:
    notes = ["was running"] if there else []
    api = f"{window.address}/api"
    if window.home is not None and not login.fits(api, None):
        ours = login.fits(api, os.environ.get(login.SENT))
        notes.append(login.words(window.home) if ours else "login of the command that started it")
    return f"{window.name} {window.address}" + (f" ({', '.join(notes)})" if notes else "")


def _see_free(window: Window) -> None:
    try:
        socket.create_server((HOST, window.port)).close()
    except OSError as error:
        raise UserError(
            f"port {window.port} for {window.name}: {error.strerror}; stop what listens there"
            f"{' (it may be the same page already)' if _answers(window) else ''}, or give another {window.option}"
        ) from None


def _started(window: Window, prefect: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """The server, with all that it starts gone when the block ends."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # MLflow looks for uvicorn there
    own = {"PATH": path, "PREFECT_API_URL": f"{prefect}/api"}
    given = os.environ if window.home is None else login.server_environment(window.home, window.port)
    return tethered(window.command, {**given, **own}, window.output)


def _wait_for(running: list[tuple[Window, subprocess.Popen[bytes]]]) -> None:
    until = time.monotonic() + PATIENCE
    while not all(_answers(window) for window, _ in running):
        _see_alive(running)
        if time.monotonic() > until:
            silent = next(window for window, _ in running if not _answers(window))
            raise UserError(f"{silent.name} did not come up at {silent.address}; {silent.output} says why")
        time.sleep(0.3)


def _see_alive(running: list[tuple[Window, subprocess.Popen[bytes]]]) -> None:
    for window, process in running:
        if process.poll() is not None:
            raise UserError(f"{window.name} at {window.address} has ended by itself; {window.output} says why")


def _answers(window: Window) -> bool:
    try:
        with urllib.request.urlopen(f"{window.address}{window.health}", timeout=2) as reply:  # noqa: S310
            return reply.status == 200 and window.well in reply.read(1000)
    except (urllib.error.URLError, OSError, ValueError):
        return False
