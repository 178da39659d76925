"""Rows 23 to 25: MLflow and Prefect down, silent, broken or locked. They are mirrors, and the work goes on."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from benchmarks.faults.harness import KILL, LINEAGES, OFF, Bench, Row, fingerprint, sound

QUICK = {"DRIFTREC_MLFLOW_SECONDS": "6", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


@contextmanager
def server(kind: str) -> Iterator[str]:
    """The address of a server that is `dead`, accepts and stays `silent`, answers `500`, or does so late (`slow`)."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if kind == "dead":
        listener.close()
        yield address
        return
    if kind == "silent":
        listener.listen(64)
        yield address
        listener.close()
        return
    port = listener.getsockname()[1]
    listener.close()

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if kind == "slow":
                time.sleep(30)
            self.send_response(500)
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    found = http.server.ThreadingHTTPServer(("127.0.0.1", port), Broken)
    found.daemon_threads = True
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield address
    found.shutdown()
    found.server_close()


def points(root: Path) -> dict[tuple[str, str, int], int]:
    """How many values MLflow holds of each (run, key, step)."""
    with sqlite3.connect(root / "mlflow.db") as store:
        rows = store.execute("SELECT run_uuid, key, step, COUNT(*) FROM metrics GROUP BY run_uuid, key, step")
        return {(run, key, step): count for run, key, step, count in rows}


def replayed(bench: Bench, root: Path) -> str:
    """ "" if `driftrec report` records everything now, once, and again changes nothing."""
    for _ in range(2):
        if code := bench.command(["report"], root).end():
            return f"driftrec report ended with {code}"
    found, want = points(root), points(bench.reported.root)
    if max(found.values(), default=0) != 1:
        return f"points logged {max(found.values(), default=0)} times"
    return "" if len(found) == len(want) else f"{len(found)} points, {len(want)} in an undisturbed run"


def went_on(bench: Bench, root: Path, limit: float, **task: object) -> str:
    """ "" if the command ends well, in time, with the undisturbed numbers and a word about MLflow."""
    child = bench.train(root, **task)
    if code := child.end():
        return f"exit {code}: {child.said[-300:]}"
    if "MLflow was not written" not in child.said:
        return "nothing was said about MLflow"
    if time.monotonic() - child.began > limit + 3 * bench.reported.seconds:
        return f"took {time.monotonic() - child.began:.0f} s"
    return "" if fingerprint(root) == bench.reported.print else "other numbers than undisturbed"


def tracking(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """MLFLOW_TRACKING_URI names a server that is dead, silent, broken or slow; killed while it records."""
    for number in range(count):
        root = bench.fresh()
        kind = ("dead", "silent", "500", "slow", "killed")[number % 5]
        if kind == "killed":
            shutil.rmtree(root)
            shutil.copytree(bench.reported.root, root)
            for left in ("mlflow.db", "mlartifacts"):
                target = root / left
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            bench.launch(work="answers", root=str(root)).end()
            child = bench.command(["report"], root)
            time.sleep(rng.uniform(0.2, bench.reported.seconds))
            child.signal(KILL)
            child.end()
            problem = ""
        else:
            with server(kind) as address:
                problem = went_on(bench, root, 30, env={**QUICK, "MLFLOW_TRACKING_URI": address})
        yield problem or replayed(bench, root) or sound(root)
        shutil.rmtree(root)


def database(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """MLflow's SQLite file locked by another process, overwritten with noise, or not a file at all."""
    for number in range(count):
        root = bench.fresh()
        store, aside = root / "mlflow.db", root.with_name(root.name + ".db")
        shutil.copyfile(store, aside)
        kind = ("locked", "corrupt", "closed")[number % 3]
        holder = sqlite3.connect(store, isolation_level=None)
        if kind == "locked":
            holder.execute("BEGIN EXCLUSIVE")
        elif kind == "corrupt":
            store.write_bytes(rng.randbytes(store.stat().st_size))
        else:
            store.unlink()
            store.mkdir()
        problem = went_on(bench, root, 60, env=QUICK)
        holder.close()
        if kind != "locked":
            shutil.rmtree(store) if store.is_dir() else store.unlink()
            for tail in ("-wal", "-shm", "-journal"):
                Path(f"{store}{tail}").unlink(missing_ok=True)
            shutil.copyfile(aside, store)
        yield problem or replayed(bench, root) or sound(root)
        shutil.rmtree(root)


def orchestration(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """PREFECT_API_URL names nobody (a server of the run's own is used); that cannot start either (done without)."""
    for number in range(count):
        root = bench.fresh()
        with server("dead") as address:
            env = {**os.environ, **OFF, "PREFECT_HOME": str(root / "prefect"), "PREFECT_API_URL": f"{address}/api"}
            env.pop("DRIFTREC_PREFECT")
            if number % 2 == 0:
                nowhere = "sqlite+aiosqlite:////proc/nowhere/prefect.db"
                env |= {"PREFECT_API_DATABASE_CONNECTION_URL": nowhere}
                env |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "20"}
            words = ["train", "-m", "single", "--workers", "1", "-c", str(bench.config_file), "-w", str(root)]
            command = [sys.executable, "-m", "flows.cli", *words]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=400)
        if done.returncode:
            yield f"exit {done.returncode}: {done.stderr[-500:]}"
        elif "does not answer" not in done.stderr:
            yield f"nothing was said about Prefect: {done.stderr[-300:]}"
        elif fingerprint(root) != bench.reported.print:
            yield "other numbers than undisturbed"
        else:
            again = bench.learn(root, [("single", 0, "same_stage", LINEAGES[0][3])])
            yield ("" if not again.end() and "trained" not in again.said else "trained again") or sound(root)
        shutil.rmtree(root)


TABLE = (
    Row(23, "MLflow server dead, silent, 500, slow; killed while recording", "D; replayed once", tracking, 0, 10),
    Row(24, "MLflow's database locked, corrupt, closed", "D; replayed once", database, 0, 6),
    Row(25, "Prefect's server down, and none can be started", "D; run completes, again a no-op", orchestration, 0, 2),
)
