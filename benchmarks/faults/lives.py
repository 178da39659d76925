"""Rows 22 and 40 to 42: little memory, the same training elsewhere, and long lives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import polars as pl

from benchmarks.faults.harness import LINEAGES, OFF, Bench, Row, fingerprint, sound
from benchmarks.soak import FEWEST, lived
from flows.plain import run_plainly
from flows.promotion.retention import removable, remove, superseded
from stages.left_overs import left_overs
from stages.workspace import Workspace, read_json

ABORTS = (
    "memory allocation of",
    "cannot allocate memory for thread-local data",
    "Resource temporarily unavailable",  # a thread that polars could not start
)
"""Last words of polars and of the C library, which end the process themselves where they get no memory."""


def little_memory(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Only a few megabytes of address space beyond what the process has: an error or an abort, and then R.

    Whatever it still commits is an undisturbed run's: a beam made narrower to fit would show in the measurements.
    """
    for _ in range(count):
        root = bench.fresh()
        child = bench.learn(root, faults=[{"kind": "memory", "bytes": rng.randrange(2**18, 2**25)}])
        code = child.end()
        gone = code < 0 or any(words in child.said for words in ABORTS)
        said = code == 0 or gone or child.cause().startswith("driftrec: ")
        problem = ("" if said else f"exit {code}: {child.said[-300:]}") or sound(root) or lesser(bench, root, code == 0)
        yield problem or bench.resumed(root)
        shutil.rmtree(root)


def lesser(bench: Bench, root: Path, ended: bool) -> str:
    """ "" if all that is there has the bytes of an undisturbed run's, and all of it is there where this one ended."""
    want, have = bench.learned.print, fingerprint(root)
    wrong = sorted(key for key, value in have.items() if want.get(key) != value)
    lacking = sorted(want.keys() - have.keys()) if ended else []
    return f"other bytes in little memory: {(wrong + lacking)[0]}" if wrong or lacking else ""


def once(bench: Bench, env: dict[str, str], threads: int = 1) -> Path:
    """Train the lineages in a new interpreter with other variables or threads."""
    root = bench.fresh()
    task: dict[str, Any] = {"work": "learn", "config": str(bench.config_file), "root": str(root), "jobs": LINEAGES}
    task |= {"out": str(bench.folder / f"{root.name}.txt"), "threads": threads}
    words = [sys.executable, "-m", "benchmarks.faults.child", json.dumps(task)]
    count = {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(words, env={**os.environ, **OFF, **count, **env}, check=True, timeout=300)
    return root


def determinism(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """New interpreters with other hash seeds give one hash; two of more threads give one hash, too, and one near it.

    What is promised is the bytes of a machine's kind and a number of threads: `state.json` notes the number.
    """
    for _ in range(count):
        root = once(bench, {"PYTHONHASHSEED": str(rng.randrange(2**32))})
        yield "" if fingerprint(root) == bench.learned.print else "another hash seed gives other bytes"
        shutil.rmtree(root)
    for threads in THREADS:
        seeds = [{"PYTHONHASHSEED": str(rng.randrange(2**32))} for _ in range(2)]
        roots = [once(bench, seed, threads) for seed in seeds]
        yield "" if fingerprint(roots[0]) == fingerprint(roots[1]) else f"{threads} threads give two hashes"
        noted = {state["threads"] for state in states(roots[0]).values()}
        yield ("" if noted == {threads} else f"state.json notes {noted} threads") or near(bench.learned.root, roots[0])
        for root in roots:
            shutil.rmtree(root)


THREADS = (2, 3)
LOSS, RANKS, HITS = 0.01, 0.9, 0.05
"""Where bytes differ: bound on the gap of losses (nats), share of equal ranks at least, gap of Hit@10 (60 users)."""


def states(root: Path) -> dict[str, Any]:
    """Each checkpoint's state.json."""
    folders = sorted(Workspace(root).checkpoints.glob("[!.]*"))
    return {folder.name: read_json(folder / "state.json") for folder in folders}


def near(one: Path, other: Path) -> str:
    """ "" if two runs made the same checkpoints with almost the same losses, and their tests almost the same ranks."""
    mine, theirs = states(one), states(other)
    if mine.keys() != theirs.keys():
        return "other checkpoints"
    for name in mine:
        losses = [[row["ce"] for row in state["training"]] for state in (mine[name], theirs[name])]
        gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
        if not gap < LOSS:
            return f"{name}: losses {gap:.4f} apart"
    tests = sorted(path.name for path in Workspace(one).evaluations.glob("*.parquet"))
    for name in tests:
        pair = [pl.read_parquet(place / "runs" / "evaluations" / name) for place in (one, other)]
        hits = [float(table["hit_at_10"].mean() or 0) for table in pair]  # type: ignore[arg-type]
        same = float((pair[0]["rank"] == pair[1]["rank"]).mean() or 0)
        if abs(hits[0] - hits[1]) > HITS or same < RANKS:
            return f"{name}: Hit@10 {hits[0]:.3f} and {hits[1]:.3f}, {same:.0%} of ranks equal"
    return "" if tests else "nothing was tested"


def other_processor(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """The same machine told to be one without AVX, twice: other bytes, almost the same losses and ranks; then R.

    A resumed run on the first processor takes the second's checkpoints as they are: their keys are the same.
    """
    env = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    for _ in range(count):
        roots = [once(bench, env) for _ in range(2)]
        prints = [fingerprint(root) for root in roots]
        yield "" if prints[0] == prints[1] else "the same processor gives other bytes"
        yield "" if prints[0] != bench.learned.print else "the bytes are the same: nothing was tried"
        yield near(bench.learned.root, roots[0])
        child = bench.learn(roots[0])
        again = "" if not child.end() and "trained" not in child.said else "trained again"
        yield again or ("" if fingerprint(roots[0]) == prints[0] else "checkpoints of two processors were mixed")
        for root in roots:
            shutil.rmtree(root)


MEMORY, SLOWER, FEW = 40.0, 1.3, 100
"""MiB and factor from the second quarter of a life to the last; stages below which both are looser."""


def soak(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """`count` retrainings in one process: memory, descriptors and processor time a stage, and what is on the disk."""
    shop, stages = bench.place(), max(count, FEWEST)
    life = lived(shop, stages, run_plainly)
    grown, more = (last - first for first, last in map(life.halves, ("memory", "files")))
    # A promotion takes longer than a decision to stay, so each kind is held to itself; NaN where there was none.
    kinds = {said: life.halves("seconds", promoted=kind) for kind, said in ((False, "kept"), (True, "promoted"))}
    loose = 1.0 if stages >= FEW else 1.2
    slower = [
        f"{early:.2f} to {late:.2f} s where {said}"
        for said, (early, late) in kinds.items()
        if late > loose * SLOWER * early
    ]
    flat = grown <= loose * MEMORY and more <= 0 and not slower
    yield "" if flat else f"from early to late {grown:+.0f} MiB, {more:+.0f} descriptors, {'; '.join(slower)}"
    yield kept_by_rule(Workspace(shop / "workspace"), stages)


def kept_by_rule(place: Workspace, stages: int) -> str:
    """ "" if what each stage adds to the disk is the same early and late, and what goes is a function of `--keep`."""
    for name, folder in (("checkpoints", place.checkpoints), ("stages", place.stages)):
        sizes = [size for _, size in sorted((path.name, tree_size(path)) for path in folder.glob("*stage*"))]
        quarter = len(sizes) // 4
        early, late = (median(part) for part in (sizes[quarter : 2 * quarter], sizes[-quarter:]))
        named = PARENT * len(sizes) if name == "checkpoints" else 0
        if late > 1.1 * early + named:
            return f"{name}: {early:.0f} bytes a stage early, {late:.0f} late"
    for keep in (4, 2):
        remove(removable(place, keep))
        remove(superseded(place, "growing", keep))
        versions = len(list((place.root / "mlartifacts").rglob("MLmodel")))
        if versions > keep + 1:  # the newest, and the one in service
            return f"{versions} registered models are left of --keep {keep}"
        if again := [*removable(place, keep), *superseded(place, "growing", keep)]:
            return f"--keep {keep} leaves {again[0].path.name} to a second run"
    folders = ("runs/quarantine", "null_space", "runs/reports")
    left = {name: tree_size(place.root / name) for name in folders}
    tests = len(list(place.evaluations.glob("*.parquet")))
    dead = left_overs(place.root)
    if dead or any(left.values()) or tests > TESTS * (stages + 1):
        return f"left: {len(dead)} left-overs, {left}, {tests} measurements of {stages} stages"
    return ""


PARENT = 160
"""Bytes that `state.json` takes at most to name one of the checkpoints before it."""
TESTS = 6
"""Measurements that a decision takes at most: challenger, champion and baselines."""


def tree_size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


TABLE = (
    Row(22, "memory ceiling", "E, or R after a restart; no other list", little_memory, 1, 20, "RLIMIT_AS; no cgroup"),
    Row(40, "same seed, other processes, hash seeds, threads", "one hash a number of threads", determinism, 0, 5),
    Row(
        41,
        "a processor without AVX",
        "other bytes; losses within 0.01, 90 % of ranks",
        other_processor,
        0,
        1,
        "library upgrades are not injected",
    ),
    Row(
        42,
        "many retrainings in one process",
        "flat memory, descriptors, time; disk by retention only",
        soak,
        12,
        200,
        "time of a kind: stages that kept the champion, stages that promoted",
    ),
)
