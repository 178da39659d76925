"""Rows 26 to 29: several processes at once, holders that die or stop, and clocks that are wrong."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from random import Random

from safetensors.torch import load_file, save_file

from benchmarks.faults.harness import KILL, LINEAGES, Bench, Row, fingerprint, refused, sound
from benchmarks.faults.retrains import ticks
from stages.checkpoint import ROWS, _write_manifest
from stages.workspace import Workspace, read_json

SLOW = [{"kind": "slow", "seconds": 0.05}]


def crowd(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """2 to 8 processes train the same lineages at the same moment."""
    for _ in range(count):
        root = bench.fresh()
        children = [bench.learn(root, lock=False) for _ in range(rng.randrange(2, 9))]
        codes = [child.end() for child in children]
        trained = [line for child in children for line in child.said.splitlines() if line.startswith("trained")]
        if any(codes):
            yield f"exit codes {codes}: {children[codes.index(next(filter(None, codes)))].said[-300:]}"
        elif len(trained) != len(set(trained)) or len(trained) != 4:
            yield f"{len(trained)} trainings of 4 stages"
        else:
            yield ("" if fingerprint(root) == bench.learned.print else "other bytes") or sound(root)
        shutil.rmtree(root)


def changed_parent(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A process stopped in the middle of a stage wakes up after another one replaced the parent it started from."""
    for _ in range(count):
        root = bench.fresh()
        child = bench.learn(root, LINEAGES[:1], lock=False, pause=1)
        if not child.stops():
            yield f"stage 1 was not met: {child.said[-300:]}"
            continue
        (first,) = Workspace(root).checkpoints.glob("*first*")
        save_file({name: value + 1 for name, value in load_file(first / ROWS).items()}, first / ROWS)
        (first / "manifest.json").unlink()
        _write_manifest(first)
        child.signal(signal.SIGCONT)
        problem = refused(child, "changed while a stage was being trained")
        later = list(Workspace(root).checkpoints.glob("*single*"))
        yield problem or ("a stage was committed" if later else "") or sound(root)
        shutil.rmtree(root)


def holders(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A lock's holder killed: taken over at once. Stopped: the waiter says for whom, and goes on when it does."""
    for number in range(count):
        root = bench.fresh()
        first = bench.learn(root, LINEAGES[:1], lock=False, faults=SLOW)
        lock = Workspace(root).locks / "same_stage-first-seed0.lock"
        until = time.monotonic() + 60
        while not (lock.exists() and lock.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        if number % 2 == 0:
            first.signal(KILL)
            first.end()
            yield bench.resumed(root)
        else:
            first.signal(signal.SIGSTOP)
            second = bench.learn(root, LINEAGES[:1], lock=False)
            told = second.waits_for(f"waiting for process {first.process.pid}", 60)
            stopped = "(stopped" in second.said
            first.signal(signal.SIGCONT)
            codes = first.end(), second.end()
            problem = "" if told and stopped and codes == (0, 0) else f"{codes}: {second.said[-300:]}"
            yield problem or bench.resumed(root)
        shutil.rmtree(root)


def clocks(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Clocks a year ahead or behind and zones with odd daylight saving: the stages come from the data's times alone."""
    want = read_json(bench.learned.root / "stages" / "manifest.json")["digest"]
    for number in range(count):
        root = bench.place()
        seconds = (365 * 86_400, -365 * 86_400, 3600)[number % 3] * rng.uniform(0.9, 1.1)
        fault = [{"kind": "clock", "seconds": seconds}]
        if code := bench.command(["split"], root, faults=fault).end():
            yield f"exit {code}"
            continue
        same = read_json(root / "stages" / "manifest.json")["digest"] == want
        yield "" if same else "other stages"
        shutil.rmtree(root)
    yield from ticks(bench, count, rng)


TABLE = (
    Row(26, "the same stages trained by 2 to 8 processes at once", "one trains, one commit, one hash", crowd, 1, 50),
    Row(27, "the parent replaced while a child trains", "refused: parent changed", changed_parent, 1, 10),
    Row(28, "a lock's holder killed or stopped", "taken over; waits and says for whom", holders, 1, 20),
    Row(
        29,
        "clock a year off or stepping back, odd time zones; ticks missed, repeated, overlapping",
        "stages depend on data time only, none twice",
        clocks,
        1,
        12,
        "clocks injected in the process",
    ),
)
