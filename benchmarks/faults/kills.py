"""Rows 1 to 4: processes killed, and told to end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from benchmarks.faults.harness import INT, KILL, TERM, Bench, Row, sound

TRIES = 20
"""Runs that may end before their kill, one after the other."""


def at_random(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """SIGKILL at a uniform moment; every fourth workspace is killed again while it resumes."""
    for number in range(count):
        root, problem = bench.fresh(), ""
        for _ in range(2 if number % 4 == 3 else 1):
            problem = problem or killed_somewhere(bench, root, rng)
        yield problem or bench.resumed(root)
        shutil.rmtree(root)


def killed_somewhere(bench: Bench, root: Path, rng: Random) -> str:
    """Kill a run in the workspace before it ends; where one ended earlier, another is killed in its place.

    The replacement begins from what the workspace was, and its moment is drawn anew from a shorter span.
    """
    aside = bench.place()
    shutil.copytree(root, aside)
    span = bench.learned.seconds
    for _ in range(TRIES):
        child = bench.learn(root)
        child.process.join(rng.uniform(0, span))
        child.signal(KILL)
        code = child.end()
        if code == -KILL:
            shutil.rmtree(aside)
            return sound(root)
        if code != 0:
            return f"exit {code} before the kill: {child.said[-300:]}"
        shutil.rmtree(root)
        shutil.copytree(aside, root)
        span *= 0.8
    return f"{TRIES} runs ended before their kills"


def operations(bench: Bench) -> int:
    """How many durable operations (write, fsync, mkdir, rename) one undisturbed run makes."""
    root, to = bench.fresh(), bench.folder / "operations"
    bench.learn(root, faults=[{"kind": "count", "to": str(to)}]).end()
    shutil.rmtree(root)
    return int(to.read_text())


def inside_save(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """SIGKILL before the n-th durable operation, n enumerated evenly over all of them."""
    total = operations(bench)
    for number in range(count):
        root = bench.fresh()
        at = 1 + number * total // count
        code = bench.learn(root, faults=[{"kind": "kill", "at": at}]).end()
        problem = sound(root) if code == -KILL else f"operation {at} of {total} was not met: exit {code}"
        yield problem or bench.resumed(root)
        shutil.rmtree(root)


def elsewhere(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """SIGKILL in split (n-th operation), in an evaluation, and between the report and MLflow; `count` of each."""
    for number in range(count):
        root = bench.place()
        bench.command(["split"], root, faults=[{"kind": "kill", "at": 1 + number * 25 // max(count, 1)}]).end()
        if bench.command(["split"], root).end():
            yield "split failed after it was killed"
            continue
        want = bench.learned.root / "stages" / "manifest.json"
        yield "" if want.read_bytes() == (root / "stages" / "manifest.json").read_bytes() else "other stages"
        shutil.rmtree(root)
    for _ in range(count):
        root = bench.place()
        shutil.copytree(bench.learned.root, root)
        shutil.rmtree(root / "runs" / "evaluations")
        child = bench.learn(root)
        time.sleep(rng.uniform(0, bench.learned.seconds / 2))
        child.signal(KILL)
        child.end()
        yield sound(root) or bench.resumed(root)
        shutil.rmtree(root)
    for _ in range(count):
        root = bench.place()
        shutil.copytree(bench.reported.root, root)
        shutil.rmtree(root / "runs" / "reports")
        code = bench.train(root, faults=[{"kind": "kill_record"}]).end()
        yield bench.resumed(root, report=True) if code == -KILL else f"MLflow's moment was not met: exit {code}"
        shutil.rmtree(root)


def told_to_end(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """SIGTERM, SIGINT, SIGINT twice in the middle of training."""
    for number in range(count):
        root = bench.fresh()
        signals, code = (([TERM], 143), ([INT], 130), ([INT, INT], 130))[number % 3]
        child = bench.learn(root, faults=[{"kind": "slow", "seconds": 0.05}])
        if not child.waits_for("trained"):
            yield f"nothing was trained: {child.said[-300:]}"
            continue
        time.sleep(rng.uniform(0, 0.5))
        sent = time.monotonic()
        for each in signals:
            child.signal(each)
            time.sleep(0.02)
        found = child.end()
        if found != code:
            yield f"exit {found}, not {code}: {child.said[-300:]}"
        elif time.monotonic() - sent > 10:
            yield f"took {time.monotonic() - sent:.1f} s"
        elif "interrupted" not in child.cause() or "Traceback" in child.said:
            yield f"not one line: {child.said[-300:]}"
        else:
            yield sound(root) or bench.resumed(root)
        shutil.rmtree(root)


TABLE = (
    Row(1, "SIGKILL at random moments of training", "R", at_random, 1, 100),
    Row(2, "SIGKILL before each write, fsync, mkdir, rename", "R; never a half checkpoint", inside_save, 2, 200),
    Row(3, "SIGKILL in split, in evaluate, before MLflow", "R", elsewhere, 0, 50),
    Row(4, "SIGTERM; SIGINT once, twice", "out within 10 s, 143 / 130; R", told_to_end, 1, 12),
)
