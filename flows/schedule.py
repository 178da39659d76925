"""`driftrec serve-flows`: one process that retrains on a schedule, with a Prefect server on this machine only."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from flows import login
from flows.experiment import InUseError, exclusive
from flows.tether import tethered
from stages.errors import UserError
from stages.workspace import Workspace

if TYPE_CHECKING:
    from prefect.schedules import Schedule

PATIENCE = 180.0
"""Seconds a server may take to answer for the first time; a new database on a slow machine takes most of it."""
LONGEST = 366 * 86_400
"""Seconds between two starts, at most."""
log = logging.getLogger("flows.schedule")


def serve(
    config: Path, workspace: Path, cron: str | None, every: float | None, timezone: str, port: int = 4200
) -> None:
    """Retrain on a schedule until interrupted; a run that is due while one is under way is cancelled.

    Args:
        config: TOML file.
        workspace: holds the server's database, if the server is ours.
        cron: five fields; or
        every: seconds between two starts.
        timezone: of `cron`.
        port: of the server to look for, or to start, on this machine.

    Raises:
        UserError: the schedule is none, said before any server is started; or PREFECT_API_URL
            names a server that does not answer.
    """
    Workspace(workspace).create()  # Prefect warns where its own folder cannot be made
    schedule = _schedule(cron, every, timezone)
    with _ends_well(), api(workspace, port) as address:
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
        from prefect.types.entrypoint import EntrypointType

        from flows.retrain import retrain

        # Prefect read the variables when it was imported.
        secret = os.environ.get(login.SENT)
        sent = {} if secret is None else {PREFECT_API_AUTH_STRING: secret}
        with temporary_settings({PREFECT_API_URL: address, **sent}):
            make_room(workspace)
            retrain.serve(
                name="retrain",
                schedule=schedule,
                parameters={"config": str(config), "workspace": str(workspace.resolve())},
                # The server cancels a second run; a limit of this process would let it wait its turn.
                global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
                pause_on_shutdown=False,
                entrypoint_type=EntrypointType.MODULE_PATH,
                print_starting_message=False,
            )


@contextmanager
def _ends_well() -> Iterator[None]:
    """Ctrl-C and SIGTERM are how a schedule is meant to end: one line, and code 0."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except SystemExit as end:
        if end.code not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise
    sys.stderr.write("the schedule has ended; the next `driftrec serve-flows` or `retrain` goes on from here\n")


def _schedule(cron: str | None, every: float | None, timezone: str) -> Schedule:
    """When, as Prefect has it.

    Raises:
        UserError: the cron expression, the time between two starts or the time zone is none.
    """
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron, Interval
    from pydantic import ValidationError

    if every is not None:
        if not 1 <= every <= LONGEST:
            raise UserError(f"serve-flows --every {every:g}: give 1 to {LONGEST} seconds, a year at most")
        return Interval(timedelta(seconds=every))
    try:
        CronSchedule(cron=str(cron), timezone=timezone)
    except ValidationError as error:
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"serve-flows --cron {cron!r} --timezone {timezone}: {words}") from None
    return Cron(str(cron), timezone=timezone)


def make_room(workspace: Path) -> None:
    """Close runs that died with an earlier schedule: each would hold the only place, and every run be cancelled."""
    from flows import crashed

    place = Workspace(workspace)
    with suppress(InUseError), exclusive(place):  # where it is in use, a run is under way
        for identity, _ in crashed.dead_runs(place):
            crashed.mark_crashed(identity)


@contextmanager
def api(workspace: Path, port: int) -> Iterator[str]:
    """A Prefect server that answers: the one named by PREFECT_API_URL, one on `port`, or one started here.

    Raises:
        UserError: none answers, or it asks for another login.
    """
    named = os.environ.get("PREFECT_API_URL")
    address = named or f"http://127.0.0.1:{port}/api"
    if answers(address):
        if not login.fits(address, os.environ.get(login.SENT)):
            raise UserError(f"the Prefect server at {address} asks for another login; {login.REMEDY}")
        os.environ["PREFECT_API_URL"] = address
        say(address)
        yield address
        return
    if named:
        raise UserError(f"PREFECT_API_URL = {named}: no server answers there; start it, or unset the variable")
    with server(workspace, port) as started:
        os.environ["PREFECT_API_URL"] = started
        say(started, login.words(login.home_in(workspace)))
        yield started


def say(address: str, entry: str = "") -> None:
    """Where to watch, and how to get in."""
    shown = f"Prefect {address.removesuffix('/api')}{f' ({entry})' if entry else ''}"
    sys.stderr.write(f"{shown}    Ctrl-C stops the schedule\n")


@contextmanager
def server(workspace: Path, port: int) -> Iterator[str]:
    """A Prefect server on loopback for as long as the block lasts; its database and its login are in the workspace.

    Raises:
        UserError: it did not come up.
    """
    address = f"http://127.0.0.1:{port}/api"
    home = login.home_in(workspace)
    own = {"PREFECT_HOME": str(home), "PREFECT_API_URL": address}
    environment = login.server_environment(home, port) | own
    words = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    output = home / "server.log"
    with tethered(words, environment, output, grace=30) as process:
        _wait_for(address, process, output)
        yield address


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
