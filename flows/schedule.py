"""`driftrec serve-flows`: one process that retrains on a schedule, with a Prefect server on this machine only."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import UserError

PATIENCE = 180.0
"""Seconds a server may take to answer for the first time; a new database on a slow machine takes most of it."""
log = logging.getLogger("flows.schedule")


def serve(
    config: Path, workspace: Path, cron: str | None, every: float | None, timezone: str, port: int = 4200
) -> None:
    """Retrain on a schedule until interrupted; a run that is due while one is under way waits for it.

    Args:
        config: TOML file.
        workspace: holds the server's database, if the server is ours.
        cron: five fields; or
        every: seconds between two starts.
        timezone: of `cron`.
        port: of the server to look for, or to start, on this machine.

    Raises:
        UserError: PREFECT_API_URL names a server that does not answer, or the cron expression is none.
    """
    with api(workspace, port):
        # Only now: Prefect reads the server's address when it is imported.
        from datetime import timedelta

        from prefect.schedules import Cron, Interval
        from prefect.types.entrypoint import EntrypointType

        from flows.retrain import retrain

        try:
            schedule = Interval(timedelta(seconds=every)) if every is not None else Cron(str(cron), timezone=timezone)
            retrain.serve(
                name="retrain",
                schedule=schedule,
                parameters={"config": str(config), "workspace": str(workspace.resolve())},
                limit=1,
                pause_on_shutdown=False,
                entrypoint_type=EntrypointType.MODULE_PATH,
                print_starting_message=False,
            )
        except ValueError as error:
            raise UserError(f"serve-flows --cron {cron!r} --timezone {timezone}: {error}") from None


@contextmanager
def api(workspace: Path, port: int) -> Iterator[str]:
    """A Prefect server that answers: the one named by PREFECT_API_URL, one on `port`, or one started here.

    Raises:
        UserError: none answers.
    """
    named = os.environ.get("PREFECT_API_URL")
    address = named or f"http://127.0.0.1:{port}/api"
    if answers(address):
        os.environ["PREFECT_API_URL"] = address
        say(address)
        yield address
        return
    if named:
        raise UserError(f"PREFECT_API_URL = {named}: no server answers there; start it, or unset the variable")
    with server(workspace, port) as started:
        os.environ["PREFECT_API_URL"] = started
        say(started)
        yield started


def say(address: str) -> None:
    """Where to watch."""
    sys.stderr.write(f"Prefect {address.removesuffix('/api')}    Ctrl-C stops the schedule\n")


@contextmanager
def server(workspace: Path, port: int) -> Iterator[str]:
    """A Prefect server on loopback for as long as the block lasts; its database is in the workspace.

    Raises:
        UserError: it did not come up.
    """
    address = f"http://127.0.0.1:{port}/api"
    home = os.environ.get("PREFECT_HOME") or str(workspace.resolve() / "prefect")
    environment = {**os.environ, "PREFECT_HOME": home, "PREFECT_API_URL": address}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    Path(home).mkdir(parents=True, exist_ok=True)
    with (Path(home) / "server.log").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)  # noqa: S603
        try:
            _wait_for(address, process, Path(home) / "server.log")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], output: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not answers(address):
        if process.poll() is not None or time.monotonic() > until:
            raise UserError(f"the Prefect server did not come up at {address}; {output} says why")
        time.sleep(0.5)


def answers(address: str) -> bool:
    """Whether a Prefect server answers at an API address."""
    if not address.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as reply:  # noqa: S310 (its scheme is checked)
            return reply.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False
