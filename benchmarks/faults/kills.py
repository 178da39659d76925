"""Rows 1 to 5: processes killed, told to end, and power cut."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.faults.harness import INT, KILL, TERM, Bench, Row, sound
from stages.checkpoint import ROWS as TOKEN_ROWS
from stages.checkpoint import Tensors, fault_of, write_checkpoint
from stages.config import AdapterConfig


def at_random(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """SIGKILL at a uniform moment; every fourth workspace is killed again while it resumes."""
    for number in range(count):
        root, problem = bench.fresh(), ""
        for _ in range(2 if number % 4 == 3 else 1):
            problem = problem or killed_somewhere(bench, root, rng)
        yield problem or bench.resumed(root)
        shutil.rmtree(root)


def killed_somewhere(bench: Bench, root: Path, rng: Random) -> str:
    """Kill a run in the workspace before it ends."""
    child = bench.learn(root)
    time.sleep(rng.uniform(0, bench.learned.seconds))
    child.signal(KILL)
    child.end()
    return sound(root)


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


def power_cut(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """The trace of a commit, replayed up to each operation without what was not yet made durable."""
    tried = 0
    while tried < count:
        for at in range(200):
            base = bench.place()
            base.mkdir()
            trace = recorded(base, at)
            for lazy in (False, True):
                state = survivors(trace, lazy)
                final = bench.place()
                for name, content in state.items():
                    (final / name).parent.mkdir(parents=True, exist_ok=True)
                    (final / name).write_bytes(content)
                folder = final / "c"
                problem = fault_of(folder) if folder.exists() else ""
                yield problem or ""
                tried += 1
                shutil.rmtree(final, ignore_errors=True)
            done = trace[-1:] == [("end",)]
            shutil.rmtree(base)
            if done or tried >= 2 * count:
                break


def recorded(base: Path, at: int) -> list[tuple[Any, ...]]:
    """Commit a checkpoint in `base` with every durable operation noted, and cut before the `at`-th."""
    trace: list[tuple[Any, ...]] = []
    honest = {name: getattr(os, name) for name in ("fsync", "rename")}

    class CutError(Exception):
        """The power went."""

    def note(*what: Any) -> None:
        """Add an operation to the trace, or cut before it."""
        if len([one for one in trace if one[0] != "seen"]) >= at:
            raise CutError
        trace.append(what)

    def fsync(descriptor: int) -> None:
        """Sync, and note what is durable from now on."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        honest["fsync"](descriptor)
        if path.is_dir():
            names = {str(each.relative_to(base)) for each in path.iterdir()}
            note("folder", str(path.relative_to(base)), names)
        else:
            note("file", str(path.relative_to(base)), path.read_bytes())

    def rename(source: Path, target: Path) -> None:
        """Note what moves, and move it."""
        files = {str(each.relative_to(base)): each.read_bytes() for each in Path(source).iterdir()}
        note("rename", str(Path(source).relative_to(base)), str(Path(target).relative_to(base)), files)
        honest["rename"](source, target)

    os.fsync, os.rename = fsync, rename  # type: ignore[assignment]
    try:
        rows = {"input_rows": torch.ones(3, 2), "output_rows": torch.zeros(3, 2)}
        write_checkpoint(base / "c", Tensors(rows=rows), AdapterConfig(), {"note": TOKEN_ROWS})
        trace.append(("end",))
    except CutError:
        pass
    finally:
        os.fsync, os.rename = honest["fsync"], honest["rename"]
    return trace


def survivors(trace: list[tuple[Any, ...]], lazy: bool) -> dict[str, bytes]:
    """Files on the disk after a cut at the end of `trace`.

    Args:
        trace: operations in order.
        lazy: the file system wrote renames early, but of files not yet fsynced only the names (ext4's delayed
            allocation); otherwise only what was fsynced is there, under the names of the last fsynced folders.
    """
    durable: dict[str, bytes] = {}
    pending: dict[str, str] = {}
    for kind, *rest in trace:
        if kind == "file":
            durable[rest[0]] = rest[1]
        elif kind == "rename":
            pending[rest[0]] = rest[1]
            moved = {name: durable.get(name, b"") for name in rest[2]}
            if lazy:
                durable = {name: content for name, content in durable.items() if name not in moved}
                durable |= {name.replace(rest[0], rest[1], 1): content for name, content in moved.items()}
        elif kind == "folder" and not lazy:
            for source, target in pending.items():
                durable = {name.replace(source, target, 1): content for name, content in durable.items()}
            pending = {}
    return durable


TABLE = (
    Row(1, "SIGKILL at random moments of training", "R", at_random, 1, 100),
    Row(2, "SIGKILL before each write, fsync, mkdir, rename", "R; never a half checkpoint", inside_save, 2, 200),
    Row(3, "SIGKILL in split, in evaluate, before MLflow", "R", elsewhere, 0, 50),
    Row(4, "SIGTERM; SIGINT once, twice", "out within 10 s, 143 / 130; R", told_to_end, 1, 12),
    Row(
        5,
        "power cut",
        "old or new state, never a mix",
        power_cut,
        20,
        100,
        "replays the trace of fsync and rename without what was not durable; no dm-flakey",
    ),
)
