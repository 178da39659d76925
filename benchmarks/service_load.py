"""Load on the service: latency and throughput at 1, 8 and 32 clients, and 20 champion swaps under load.

    python -m benchmarks.service_load [--workspace W] [--seconds S]

A workspace of its own (a generated log, two methods of the default size, trained for one epoch: what a pass through the
model costs does not depend on how well it was trained) is served by a process of its own over real sockets. Where
`wrk` is installed its clients give the times and rates; clients of our own, which share one event loop and write HTTP
by hand, ask beside them and while champions change, and stand in where there is no `wrk`. Every answer to those is
compared with the plain function: the same items in the same order, scores within rounding. The limit is that of the
matrix products of one person's search: on one thread for a latency, on all cores for a throughput.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import wrk
from benchmarks.load_workspace import METHODS, crown, prepare
from benchmarks.measure import Row, Work, flops, limited, median, percent, report, share_of_limit
from benchmarks.wrk import SHARES, Driven
from flows.machine import cores
from flows.serving.served import Served, load_served

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "service_load"
CLIENTS = (1, 8, 32)
SECONDS = 6.0
COMPARED = 2.0
"""Seconds of our own clients at each load where `wrk` gives the figures."""
ROUNDS = 5
"""Repetitions of each load, alternating, so that what else the machine does falls on all alike."""
SWAPS = 20
K = 10
TOLERANCE = 1e-4
"""Nats between a score from a batch and from a pass of its own."""
THREADS = "1"


@dataclass(frozen=True)
class Asked:
    """A request and what each method has to answer to it."""

    body: str
    answers: dict[str, tuple[list[str], list[float]]]

    @property
    def wire(self) -> bytes:
        """The request as it is sent."""
        lines = ("POST /recommend HTTP/1.1", "host: 127.0.0.1", "content-type: application/json")
        head = "\r\n".join((*lines, f"content-length: {len(self.body)}", "", ""))
        return (head + self.body).encode()


@dataclass(frozen=True)
class Load:
    """What some clients of our own saw."""

    seconds: list[float]
    span: float
    wrong: int
    failed: int
    processor: float = 0.0
    """Seconds of the service's process."""

    @property
    def answers(self) -> int:
        """How many came."""
        return len(self.seconds)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.span

    def quantile(self, share: float) -> float:
        """Seconds within which `share` of the answers came."""
        return float(np.quantile(self.seconds, share))


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
        found.append(Asked(json.dumps({"user": users[row], "k": K}), answers))
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


def arithmetic(served: Served, count: int = 20) -> float:
    """Operations of one person's search, the mean over some people."""
    users = served.dataset.interactions.user_ids
    people = [served.past(users[row], None) for row in np.linspace(0, len(users) - 1, count).astype(int)]
    return flops(lambda: [served.rank([past], K) for past in people]) / count


def drive(port: int, process: int, asked: list[Asked], clients: int, seconds: float) -> Driven:
    """The load by `wrk`, with the processor time that the service took for it."""
    before = processor(process)
    found = wrk.drive(f"http://127.0.0.1:{port}/recommend", [one.body for one in asked], clients, seconds)
    return replace(found, processor=processor(process) - before)


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
        """One of them, over one connection."""
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


def measured(root: Path, span: float) -> list[Row]:
    """Serve the workspace and put every load on it."""
    crown(root, METHODS[0])
    served = {method: load_served(root, method) for method in METHODS}
    asked = questions(served, 200)
    own: list[float] = []
    loads: dict[int, list[Load | Driven]] = {clients: [] for clients in CLIENTS}
    ask = drive if wrk.found() else put
    with service(root) as (port, process):
        put(port, process, asked, 8, 1.0)  # the first passes through a model are slow
        for _ in range(ROUNDS):
            own.append(median(own_time(served[METHODS[0]])))
            for clients in CLIENTS:
                loads[clients].append(ask(port, process, asked, clients, span))
        for clients, found in loads.items():
            print(in_words(clients, found))
        beside = [put(port, process, asked, clients, COMPARED) for clients in CLIENTS] if wrk.found() else []
        under, swaps = asyncio.run(swapped(port, root, asked))
    print(f"{swaps} swaps: {in_words(8, [under])}")
    work = Work(flops=arithmetic(served[METHODS[0]]))
    how = f"{ROUNDS} alternating rounds of {span:.0f} s, wall time, {THREADS} thread a pass, "
    how += f"{'wrk' if wrk.found() else 'our own clients'} on the same cores"
    rows = [replace(row, how=how) for row in (latency_row(own, loads, work), throughput_row(loads, work))]
    return [*rows, swap_row([*beside, *(one for found in loads.values() for one in found)], under, swaps)]


def until(seconds: float) -> Callable[[], bool]:
    """True once so many seconds have passed."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def in_words(clients: int, loads: Sequence[Load | Driven]) -> str:
    """Rate and quantiles, the median of the rounds."""
    rate = median([one.rate for one in loads])
    quantiles = (
        f"p{share:.0%}"[:-1] + f" {1e3 * median([one.quantile(share) for one in loads]):.1f} ms" for share in SHARES
    )
    compared = [one.wrong for one in loads if one.wrong is not None]
    faults = f"{sum(compared)} wrong, " * bool(compared) + f"{sum(one.failed for one in loads)} failed"
    answers = sum(one.answers for one in loads)
    each = 1e3 * sum(one.processor for one in loads) / answers
    cost = f", {each:.1f} ms of processor each" if each else ""
    return f"{clients} clients: {rate:.1f} answers/s, {', '.join(quantiles)}; {answers} answers, {faults}{cost}"


def busy() -> str:
    """What else the machine does: with fewer cores to itself than threads a service gains less from many clients."""
    return f"load average {os.getloadavg()[0]:.1f} on {cores()} cores, the measurement's own part included"


def latency_row(own: list[float], loads: dict[int, list[Load | Driven]], work: Work) -> Row:
    """The slowest twentieth of one client's answers beside the model's own time for one user."""
    tails = [one.quantile(0.95) for one in loads[1]]
    alone = share_of_limit(work, median(own), 1, "wall")
    ratios = [tail / bare for tail, bare in zip(tails, own, strict=True)]
    row = Row(
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
        note=f"{in_words(1, loads[1])}; the model's own time is at {percent(alone)} of the limit",
    )
    return limited(row, work, median(tails), clock="wall")


def throughput_row(loads: dict[int, list[Load | Driven]], work: Work) -> Row:
    """Answers a second of 32 clients beside those of one."""
    pairs = [(many.rate, one.rate) for many, one in zip(loads[32], loads[1], strict=True)]
    ratios = [many / one for many, one in pairs]
    rate = median([many for many, _ in pairs])
    row = Row(
        name="service, throughput of 32 clients",
        rival="throughput of one client",
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        mark=3,
        unit="answers/s",
        ours=rate,
        theirs=median([one for _, one in pairs]),
        note=f"{in_words(8, loads[8])}; {in_words(32, loads[32])}; {busy()}",
    )
    return limited(row, work, 1 / rate, cores(), "wall")


def swap_row(loads: Sequence[Load | Driven], under: Load, swaps: int) -> Row:
    """Wrong, failed and missing answers, of all loads and of the one under which champions changed."""
    every = [under, *loads]
    faults = sum((one.wrong or 0) + one.failed for one in every) + (SWAPS - swaps)
    compared = sum(one.answers for one in every if one.wrong is not None)
    return Row(
        name=f"service, wrong or failed answers over {SWAPS} champion swaps",
        rival="the plain function's answers",
        ratio=float(faults),
        mark=0,
        better="lower",
        unit="answers",
        ours=float(faults),
        theirs=0.0,
        how=f"8 clients of our own, {swaps} swaps, every answer compared",
        note=f"{in_words(8, [under])}; {compared} answers compared at all loads together; a count: no limit",
    )


def main() -> None:
    """Put a service under load and record the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workspace", type=Path, help="a workspace trained with this script earlier; absent: a new one"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load, whole ones")
    wish = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    with tempfile.TemporaryDirectory() as folder:
        root = wish.workspace or prepare(Path(folder))
        report(SCRIPT, measured(root, wish.seconds))


if __name__ == "__main__":
    main()
