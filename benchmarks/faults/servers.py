"""Rows 23 to 25: MLflow and Prefect down, silent, broken, locked or killed. They are mirrors, and the work goes on."""

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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from random import Random

from benchmarks.faults.harness import KILL, LINEAGES, OFF, Bench, Row, fingerprint, sound
from stages.workspace import Workspace

QUICK = {"DRIFTREC_MLFLOW_SECONDS": "6", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

START = 240.0
"""Seconds a real server has to answer for the first time."""
LIMIT = 600.0
"""Seconds after which a run counts as hung."""


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
        """Answers everything with an error, or late."""

        def do_GET(self) -> None:
            """Status 500."""
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


@contextmanager
def real_server(words: list[str], port: int, health: str, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m words` on a port of the loopback, once it answers; a group of its own, killed at the end."""
    env = {**os.environ, "PREFECT_HOME": str(root / "prefect"), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # MLflow starts the uvicorn found there
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", *words, "--host", "127.0.0.1", "--port", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            until = time.monotonic() + START
            while not answers(f"http://127.0.0.1:{port}{health}"):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{words[0]}'s server did not start")
                time.sleep(0.2)
            yield process
        finally:
            killed(process)


def killed(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a server and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, KILL)
    process.wait()


def answers(address: str) -> bool:
    """Whether anybody answers there, whatever it is."""
    try:
        with urllib.request.urlopen(address, timeout=5):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def mlflow_words(root: Path) -> list[str]:
    """A real MLflow server over the workspace's own store."""
    store, files = f"sqlite:///{root / 'mlflow.db'}", str(root / "mlartifacts")
    return ["mlflow", "server", "--workers", "1", "--backend-store-uri", store, "--artifacts-destination", files]


def dies(bench: Bench, root: Path) -> str:
    """A real MLflow server is killed as soon as it has written a number; the same store is served again later."""
    port = free_port()
    env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with real_server(mlflow_words(root), port, "/health", root) as process:
        watching = threading.Thread(target=killed_when, args=(process, lambda: bool(points(root))), daemon=True)
        watching.start()
        problem = went_on(bench, root, 90, env={**QUICK, **env, "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"})
    if not problem and not 0 < len(points(root)) < len(points(bench.reported.root)):
        problem = f"killed with {len(points(root))} numbers written: not in the middle"
    with real_server(mlflow_words(root), port, "/health", root):
        return problem or replayed(bench, root, env=env)


def killed_when(process: subprocess.Popen[bytes], met: Callable[[], bool]) -> None:
    """Kill a server once something holds, or stop looking when it has ended."""
    while process.poll() is None:
        if met():
            killed(process)
        time.sleep(0.01)


def points(root: Path) -> dict[tuple[str, str, int], int]:
    """How many values MLflow holds of each (run, key, step)."""
    with closing(sqlite3.connect(root / "mlflow.db")) as store:
        rows = store.execute("SELECT run_uuid, key, step, COUNT(*) FROM metrics GROUP BY run_uuid, key, step")
        return {(run, key, step): count for run, key, step, count in rows}


def replayed(bench: Bench, root: Path, **task: object) -> str:
    """ "" if `driftrec report` records everything now, once, and again changes nothing."""
    for _ in range(2):
        if code := bench.command(["report"], root, **task).end():
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
    """MLFLOW_TRACKING_URI names a server that is dead, silent, broken, slow or dies; killed while it records."""
    for number in range(count):
        root = bench.fresh()
        kind = ("dead", "silent", "500", "slow", "dies", "killed")[number % 6]
        if kind == "dies":
            yield dies(bench, root) or sound(root)
            shutil.rmtree(root)
            continue
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
    """MLflow's SQLite file locked by another process, overwritten with noise, on a full disk, or no file at all."""
    for number in range(count):
        root = bench.fresh()
        store, aside = root / "mlflow.db", root.with_name(root.name + ".db")
        shutil.copyfile(store, aside)
        kind = ("locked", "corrupt", "full", "closed")[number % 4]
        if kind == "full" and os.geteuid() == 0:
            yield on_full_disk(bench, root) or sound(root)
            shutil.rmtree(root)
            continue
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


def on_full_disk(bench: Bench, root: Path) -> str:
    """MLflow's store on a tmpfs with room for a page or two, which grows afterwards."""
    store, small = root / "mlflow.db", bench.place()
    small.mkdir()
    size = store.stat().st_size + 16_384
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=True)  # noqa: S607
    try:
        shutil.move(store, small / store.name)
        store.symlink_to(small / store.name)
        problem = went_on(bench, root, 60, env=QUICK)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)  # noqa: S607
        return problem or replayed(bench, root)
    finally:
        subprocess.run(["umount", str(small)], check=True)  # noqa: S607
        store.unlink()


def orchestration(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """PREFECT_API_URL names nobody (a server of the run's own is used); none can start (done without); one restarts."""
    for number in range(count):
        root = bench.fresh()
        port, home = free_port(), str(root / "prefect")
        env = {**os.environ, **OFF, "PREFECT_HOME": home, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        env.pop("DRIFTREC_PREFECT")
        if number % 3 == 0:
            nowhere = "sqlite+aiosqlite:////proc/nowhere/prefect.db"
            env |= {"PREFECT_API_DATABASE_CONNECTION_URL": nowhere}
            env |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "20"}
        words = ["train", "-m", "single", "--workers", "1", "-c", str(bench.config_file), "-w", str(root)]
        command = [sys.executable, "-m", "flows.cli", *words]
        if number % 3 == 2:
            code, said = restarted(command, env, port, root)
        else:
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=LIMIT)
            code, said = done.returncode, done.stderr
        if code:
            yield f"exit {code}: {said[-500:]}"
        elif number % 3 != 2 and "does not answer" not in said:
            yield f"nothing was said about Prefect: {said[-300:]}"
        elif fingerprint(root) != bench.reported.print:
            yield "other numbers than undisturbed"
        else:
            again = bench.learn(root, [("single", 0, "same_stage", LINEAGES[0][3])])
            yield ("" if not again.end() and "trained" not in again.said else "trained again") or sound(root)
        shutil.rmtree(root)


def restarted(command: list[str], env: dict[str, str], port: int, root: Path) -> tuple[int, str]:
    """A run under a real Prefect server that is killed once the first stage is committed, and back 3 s later."""
    words, health = ["prefect", "server", "start"], "/api/health"
    place, said = Workspace(root), root.with_suffix(".said")
    with ExitStack() as stack, said.open("wb") as out:
        server = stack.enter_context(real_server(words, port, health, root))
        run = stack.enter_context(subprocess.Popen(command, env=env, stdout=out, stderr=out))
        until = time.monotonic() + LIMIT
        while run.poll() is None and not any(place.checkpoints.glob("[!.]*")) and time.monotonic() < until:
            time.sleep(0.05)
        in_time = run.poll() is None
        killed(server)
        time.sleep(3)
        stack.enter_context(real_server(words, port, health, root))
        try:
            code = run.wait(LIMIT)
        except subprocess.TimeoutExpired:
            run.kill()
            return -99, "the run hangs after its server came back"
    return (code if in_time else -98), said.read_text(encoding="utf-8", errors="replace")


TABLE = (
    Row(
        23,
        "MLflow server dead, silent, 500, slow, dies; killed while recording",
        "D; replayed once",
        tracking,
        0,
        12,
        "that training costs less than 1 % more is not tried here: benchmarks/mirror_cost.py shows it calls no MLflow",
    ),
    Row(24, "MLflow's database locked, corrupt, on a full disk, closed", "D; replayed once", database, 0, 8),
    Row(
        25,
        "Prefect's server down, none can start, restarted",
        "D; run completes, again a no-op",
        orchestration,
        0,
        3,
        "a living run told as crashed: the slow tests of tests/test_crashed.py and tests/test_deployment.py",
    ),
)
