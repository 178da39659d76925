"""Load on the service: latency and throughput at 1, 8 and 32 clients, and 20 champion swaps under load.

    python benchmarks/service_load.py [--workspace W]

A workspace of its own (a generated log, two methods of the default size, trained for one epoch: what a pass through the
model costs does not depend on how well it was trained) is served by a process of its own over real sockets. The clients
share one event loop here and write HTTP by hand, so that they cost the two cores little. Every answer is compared with
the plain function: the same items in the same order, scores within rounding.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import Row, median, report  # noqa: E402

from flows.experiment import remember_trained, trained_jobs  # noqa: E402
from flows.machine import cores  # noqa: E402
from flows.serving.served import Served, load_served  # noqa: E402
from stages.jobs import Job  # noqa: E402
from stages.workspace import Workspace, write_json  # noqa: E402

SCRIPT = "service_load"
CLIENTS = (1, 8, 32)
SECONDS = 6.0
ROUNDS = 5
"""Repetitions of each load, alternating, so that what else the machine does falls on all alike."""
SWAPS = 20
K = 10
TOLERANCE = 1e-4
"""Nats between a score from a batch and from a pass of its own."""
SHARES = (0.5, 0.95, 0.99)
METHODS = ("single", "frozen")
THREADS = "1"
HOW = f"{ROUNDS} alternating rounds of {SECONDS:.0f} s, wall time, {THREADS} thread a pass, clients on the same cores"
CONFIG = """
name = "load"
workspace = "unused"
seeds = [0]
[[log.sources]]
path = "events.csv"
time_unit = "s"
where = "event = 'recommendation'"
[[catalogue.sources]]
path = "catalogue.csv"
[stages]
instants = ["BOUNDARY"]
[items]
levels = 4
codes_per_level = 64
[training]
first_epochs = 1
epochs = 1
[evaluation]
matrix_users = 0
bootstrap = 100
"""


@dataclass(frozen=True)
class Asked:
    """A request and what each method has to answer to it."""

    wire: bytes
    answers: dict[str, tuple[list[str], list[float]]]


@dataclass(frozen=True)
class Load:
    """What some clients saw."""

    seconds: list[float]
    span: float
    wrong: int
    failed: int
    processor: float = 0.0
    """Seconds of the service's process."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.span

    def quantile(self, share: float) -> float:
        """Seconds within which `share` of the answers came."""
        return float(np.quantile(self.seconds, share))


def prepare(folder: Path) -> Path:
    """Train two small models on a generated log; returns the workspace."""
    from flows import steps
    from stages.synthetic import boundaries, write_demo_log
    from stages.train import train_stage

    source, root = folder / "source", folder / "workspace"
    write_demo_log(source, seed=0, users=600, items=2000, stages=2)
    config = source / "load.toml"
    config.write_text(CONFIG.replace("BOUNDARY", boundaries(2)[0].isoformat()), encoding="utf-8")
    plan = steps.claimed(steps.draft_plan(config, root, list(METHODS), [0], users=None))
    for step in (steps.read, steps.split, steps.identify):
        step(plan)
    for method in METHODS:
        for stage in range(2):
            job = Job(method, 0, "same_stage", stage)
            remember_trained(plan.workspace, train_stage(plan.config, plan.workspace, job))
    return root


def crown(root: Path, method: str) -> None:
    """Make a method's newest model the champion."""
    job = max((job for job in trained_jobs(Workspace(root)) if job.method == method), key=lambda job: job.stage)
    write_json(root / "champion.json", {"schema": 1, "job": asdict(job), "key": "", "digest": "", "since": ""})


def questions(served: dict[str, Served], count: int) -> list[Asked]:
    """Users of the log, spread over it, with every method's answer by a pass of its own."""
    first = next(iter(served.values()))
    users = first.dataset.interactions.user_ids
    found = []
    for row in np.linspace(0, len(users) - 1, min(count, len(users))).astype(int):
        past = first.past(users[row], None)
        answers = {}
        for method, model in served.items():
            (ranking,) = model.rank([past], K)
            names = [model.dataset.catalogue.item_ids[item] for item, _ in ranking]
            answers[method] = (names, [score for _, score in ranking])
        body = json.dumps({"user": users[row], "k": K}).encode()
        lines = ("POST /recommend HTTP/1.1", "host: 127.0.0.1", "content-type: application/json")
        head = "\r\n".join((*lines, f"content-length: {len(body)}", "", ""))
        found.append(Asked(head.encode() + body, answers))
    return found


def own_time(served: Served, count: int = 60) -> list[float]:
    """Seconds of the model alone for one user, one pass each, in the service's own thread setting."""
    users = served.dataset.interactions.user_ids
    people = [served.past(users[row], None) for row in np.linspace(0, len(users) - 1, count).astype(int)]
    served.rank(people[:1], K)
    seconds = []
    for past in people:
        started = time.perf_counter()
        served.rank([past], K)
        seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def service(root: Path) -> Iterator[tuple[int, int]]:
    """`driftrec serve` as a process of its own; its port and its number."""
    command = [sys.executable, "-m", "flows.cli", "serve", "--workspace", str(root), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS, "COLUMNS": "500"}
    environment["PYTHONUNBUFFERED"] = "1"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if "http://" not in line:
                raise SystemExit(f"{SCRIPT}: the service did not start: {line}")
            yield int(line.rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def processor(process: int) -> float:
    """Seconds of processor time a process has used, its threads and the kernel's work for it together."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def put(port: int, process: int, asked: list[Asked], clients: int, seconds: float) -> Load:
    """`load` for so many seconds, with the processor time that the service took for it."""
    before = processor(process)
    found = asyncio.run(load(port, asked, clients, until(seconds)))
    return replace(found, processor=processor(process) - before)


async def load(port: int, asked: list[Asked], clients: int, over: Callable[[], bool]) -> Load:
    """So many clients until `over()`, each asking again as soon as it has its answer."""
    times: list[float] = []
    faults = {"wrong": 0, "failed": 0}

    async def client(turn: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not over():
            question = asked[turn % len(asked)]
            turn += clients
            started = time.perf_counter()
            writer.write(question.wire)
            status, body = await _answer(reader)
            times.append(time.perf_counter() - started)
            if status != 200:
                faults["failed"] += 1
            elif not right(json.loads(body), question):
                faults["wrong"] += 1
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return Load(times, time.perf_counter() - started, **faults)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


def right(reply: dict, question: Asked) -> bool:
    """The items of the plain function for the model the reply names; neighbours may change places only where tied."""
    names, scores = question.answers[reply["model"]["method"]]
    found = [item["item_id"] for item in reply["items"]]
    gaps = [abs(item["score"] - score) for item, score in zip(reply["items"], scores, strict=True)]
    if max(gaps, default=0.0) > TOLERANCE or reply["fallback"]:
        return False
    own = dict(zip(names, scores, strict=True))
    # Items that rounding may exchange have equal scores within the tolerance; the last one's twin may lie outside.
    return all(
        one == other or abs(own.get(one, scores[-1]) - own[other]) <= TOLERANCE
        for one, other in zip(found, names, strict=True)
    )


async def swapped(port: int, root: Path, asked: list[Asked]) -> tuple[Load, int]:
    """Eight clients while the champion changes SWAPS times: what they saw, and how many swaps the service made."""
    done = False
    running = asyncio.create_task(load(port, asked, 8, lambda: done))
    before = await counted(port)
    for turn in range(SWAPS):
        crown(root, METHODS[(turn + 1) % 2])
        limit = time.perf_counter() + 30
        while await counted(port) <= before + turn and time.perf_counter() < limit:
            await asyncio.sleep(0.1)
    swaps = await counted(port) - before
    done = True
    return await running, swaps


async def counted(port: int) -> int:
    """Champion swaps since the service started, from its metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    _, body = await _answer(reader)
    writer.close()
    line = next(line for line in body.decode().splitlines() if line.startswith("driftrec_champion_swaps "))
    return int(float(line.split()[1]))


def measured(root: Path) -> list[Row]:
    """Serve the workspace and put every load on it."""
    crown(root, METHODS[0])
    served = {method: load_served(root, method) for method in METHODS}
    asked = questions(served, 200)
    own: list[float] = []
    loads: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
    with service(root) as (port, process):
        put(port, process, asked, 8, 1.0)  # the first passes through a model are slow
        for _ in range(ROUNDS):
            own.append(median(own_time(served[METHODS[0]])))
            for clients in CLIENTS:
                loads[clients].append(put(port, process, asked, clients, SECONDS))
        for clients, found in loads.items():
            print(in_words(clients, found))
        under, swaps = asyncio.run(swapped(port, root, asked))
    print(f"{swaps} swaps: {in_words(8, [under])}")
    return [latency_row(own, loads), throughput_row(loads), swap_row(loads, under, swaps)]


def until(seconds: float) -> Callable[[], bool]:
    """True once so many seconds have passed."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def in_words(clients: int, loads: list[Load]) -> str:
    """Rate and quantiles, the median of the rounds."""
    rate = median([one.rate for one in loads])
    quantiles = (
        f"p{share:.0%}"[:-1] + f" {1e3 * median([one.quantile(share) for one in loads]):.1f} ms" for share in SHARES
    )
    faults = f"{sum(one.wrong for one in loads)} wrong, {sum(one.failed for one in loads)} failed"
    answers = sum(len(one.seconds) for one in loads)
    each = 1e3 * sum(one.processor for one in loads) / answers
    cost = f", {each:.1f} ms of processor each" if each else ""
    return f"{clients} clients: {rate:.1f} answers/s, {', '.join(quantiles)}; {answers} answers, {faults}{cost}"


def busy() -> str:
    """What else the machine does: with fewer cores to itself than threads a service gains less from many clients."""
    return f"load average {os.getloadavg()[0]:.1f} on {cores()} cores, the measurement's own part included"


def latency_row(own: list[float], loads: dict[int, list[Load]]) -> Row:
    """The slowest twentieth of one client's answers beside the model's own time for one user."""
    tails = [one.quantile(0.95) for one in loads[1]]
    ratios = [tail / alone for tail, alone in zip(tails, own, strict=True)]
    return Row(
        name="service, 95th percentile of one client",
        rival="the model's own median time for one user",
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        mark=2,
        better="lower",
        unit="ms",
        ours=1e3 * median(tails),
        theirs=1e3 * median(own),
        how=HOW,
        note=in_words(1, loads[1]),
    )


def throughput_row(loads: dict[int, list[Load]]) -> Row:
    """Answers a second of 32 clients beside those of one."""
    pairs = [(many.rate, one.rate) for many, one in zip(loads[32], loads[1], strict=True)]
    ratios = [many / one for many, one in pairs]
    return Row(
        name="service, throughput of 32 clients",
        rival="throughput of one client",
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        mark=3,
        unit="answers/s",
        ours=median([many for many, _ in pairs]),
        theirs=median([one for _, one in pairs]),
        how=HOW,
        note=f"{in_words(8, loads[8])}; {in_words(32, loads[32])}; {busy()}",
    )


def swap_row(loads: dict[int, list[Load]], under: Load, swaps: int) -> Row:
    """Wrong, failed and missing answers, of all loads and of the one under which champions changed."""
    every = [under, *(one for found in loads.values() for one in found)]
    faults = sum(one.wrong + one.failed for one in every) + (SWAPS - swaps)
    return Row(
        name=f"service, wrong or failed answers over {SWAPS} champion swaps",
        rival="the plain function's answers",
        ratio=float(faults),
        mark=0,
        better="lower",
        unit="answers",
        ours=float(faults),
        theirs=0.0,
        how=f"8 clients, {swaps} swaps, every answer compared",
        note=in_words(8, [under]),
    )


def main() -> None:
    """Put a service under load and record the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workspace", type=Path, help="a workspace trained with this script earlier; absent: a new one"
    )
    given = parser.parse_args().workspace
    torch.set_num_threads(int(THREADS))
    with tempfile.TemporaryDirectory() as folder:
        root = given or prepare(Path(folder))
        report(SCRIPT, measured(root))


if __name__ == "__main__":
    main()
