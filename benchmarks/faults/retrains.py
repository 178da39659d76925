"""Row 43: `driftrec retrain` killed again and again, from the new rows to MLflow; and the ticks of row 29."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import growing
from benchmarks.faults.harness import KILL, Bench, Child, Row, Undisturbed, fingerprint, sound, tree
from benchmarks.growing import OPEN_GATE, seconds, week, write_rows
from flows.promotion.history import read_history
from stages.workspace import Workspace, digest_of, read_json, sha256_file

DAY = 86_400
MOST = 60
"""Kills after which a trial is given up."""


def write_shop(shop: Path) -> Path:
    """Two weeks of rows in one file, an item table, and the config, whose path is returned."""
    return growing.write_shop(shop, OPEN_GATE, "peso", "first_epochs = 2\nepochs = 2\nbatch_size = 16")


def opened(bench: Bench) -> Path:
    """A shop of two weeks, and beside it its workspace after the first retraining; returns the shop's folder."""
    shop = bench.folder / "shop"
    if not shop.exists():
        write_shop(shop)
        child = retrain(bench, shop / "before")
        if code := child.end():
            raise RuntimeError(f"the first retraining failed: exit {code}: {child.said[-2000:]}")
        # Two stages close; one row is late; the last row only says that the second stage is over.
        late, last = ("u00", "i05", seconds(8)), ("u01", "i01", seconds(28))
        write_rows(shop / "events" / "more.csv", [*week(2), late, *week(3), last])
    return shop


def retrain(bench: Bench, root: Path, **task: Any) -> Child:
    """Start `driftrec retrain` on the shop."""
    config = bench.folder / "shop" / "shop.toml"
    return bench.launch(command=["retrain", "--config", str(config), "--workspace", str(root)], **task)


def prepared(shop: Path, root: Path, empty: bool) -> Path:
    """A workspace for a trial: none at all, or one whose champion is about to meet the new rows."""
    if not empty:
        shutil.copytree(shop / "before", root)
    return root


def twin(bench: Bench, empty: bool) -> Undisturbed:
    """What a retraining leaves that nobody kills."""
    shop = opened(bench)
    start = partial(prepared, shop, bench.place(), empty)
    return bench.known(f"retrain {empty}", partial(retrain, bench), start, left)


def left(root: Path) -> dict[str, Any]:
    """All that a retraining decides and keeps, without wall times: rows, stages, codes, tensors, measurements,
    history, champion, and how MLflow shows the decisions."""
    lines = history(root)
    found = {**fingerprint(root), "history": digest_of(lines), "mlflow": digest_of(mirrored(root))}
    found["champion"] = digest_of(timeless(read_json(root / "champion.json")))
    for folder in ("stages", "open", "held", "catalogue"):
        files = sorted(path for path in (root / folder).rglob("*") if path.is_file() and path.suffix != ".png")
        found |= {str(path.relative_to(root)): sha256_file(path) for path in files}
    return found


def history(root: Path) -> list[Any]:
    """The decisions, without when they were taken and how long answers took."""
    return [timeless(line) for line in read_history(Workspace(root))[0]]


def timeless(found: Any) -> Any:
    """A JSON value without instants, milliseconds, and digests of files that hold seconds of training."""
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key not in ("at", "since", "digest", *PROBE)}
    return found


PROBE = ("p50_ms", "p95_ms")


def mirrored(root: Path) -> list[Any]:
    """MLflow's decisions: how each run stands and how many numbers it has; and which version the alias names."""
    with closing(sqlite3.connect(root / "mlflow.db")) as store:
        runs = store.execute(
            "SELECT name, status, (SELECT COUNT(*) FROM metrics WHERE metrics.run_uuid = runs.run_uuid) FROM runs "
            "WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'role' AND value = 'decision') "
            "AND lifecycle_stage = 'active' ORDER BY name"
        ).fetchall()
        alias = store.execute(
            "SELECT t.value FROM registered_model_aliases a JOIN model_version_tags t "
            "ON t.name = a.name AND t.version = a.version WHERE a.alias = 'champion' AND t.key = 'checkpoint'"
        ).fetchall()
    return [runs, alias]


def killed(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """SIGKILL at a uniform moment, again and again, until a run ends before its kill; then one more, a no-op."""
    shop = opened(bench)
    before = tree(shop / "events")
    for number in range(count):
        empty = number % 3 == 2
        want, root = twin(bench, empty), prepared(shop, bench.place(), empty)
        problem = killed_until_it_ends(bench, root, want, rng)
        problem = problem or compared(want.print, left(root))
        problem = problem or ("" if not retrain(bench, root).end() else "the next run failed")
        yield problem or compared(want.print, left(root)) or sound(root)
        shutil.rmtree(root, ignore_errors=True)
    if tree(shop / "events") != before:
        yield "the raw input was changed"


def killed_until_it_ends(bench: Bench, root: Path, want: Undisturbed, rng: Random) -> str:
    """Kill retrainings at moments drawn from one and a quarter of the twin's seconds until one ends.

    The span grows by a twentieth at each kill: the machine may have become slower since the twin ran.
    """
    for number in range(MOST):
        child = retrain(bench, root)
        child.process.join(rng.uniform(0, 1.25 * 1.05**number * want.seconds))
        child.signal(KILL)
        code = child.end()
        if code == 0:
            return ""
        if code != -KILL:
            return f"exit {code}: {child.said[-300:]}"
        if problem := sound(root):
            return problem
    return f"killed {MOST} times and never at its end"


def compared(want: dict[str, Any], have: dict[str, Any]) -> str:
    """A sentence about what differs."""
    wrong = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
    return f"differs in {', '.join(wrong)[:300]}" if wrong else ""


KINDS = ("missed", "repeated", "overlapping", "ahead", "back", "summer time")
WEEKS = 6


def ticks(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A schedule whose ticks fail to come, come twice or at once, or see a wrong clock: the stages are the calendar's.

    A file of the log appears every week; only new rows are taken and stages closed, nothing is trained.
    """
    want = scheduled(bench, "as it should be", rng)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        have = scheduled(bench, kind, rng)
        yield have if isinstance(have, str) else "" if have == want else f"{kind}: other stages"


def scheduled(bench: Bench, kind: str, rng: Random) -> str | list[Any]:
    """The stages after `WEEKS` weeks of such a schedule, or what went wrong."""
    place = bench.place()
    write_shop(place)
    if tick(bench, place).end():
        return "the first tick failed"
    for number in range(2, WEEKS + 1):
        write_rows(place / "events" / f"week{number}.csv", week(number))
        if kind == "missed" and number < WEEKS and rng.random() < 0.7:
            continue
        codes = [child.end() for child in started(bench, place, kind, number, rng)]
        if not (codes.count(0) and set(codes) <= ({0, 2} if kind == "overlapping" else {0})):
            return f"{kind}: exit codes {codes}"
        if kind == "repeated" and tick(bench, place).end():
            return "the second tick failed"
    if tick(bench, place).end():
        return "the last tick failed"
    rows = read_json(place / "workspace" / "stages" / "manifest.json")
    shutil.rmtree(place)
    found = [[row["index"], row["start"], row["end"], row["digest"]] for row in rows["stages"]]
    return found if [row[0] for row in found] == list(range(WEEKS)) else f"{kind}: stages {[row[0] for row in found]}"


def started(bench: Bench, place: Path, kind: str, number: int, rng: Random) -> list[Child]:
    """One tick, or several at once where they overlap; by a clock that is off where it is the clock."""
    year, summer = 365 * DAY, 3600 * (-1) ** number
    off = {"ahead": year, "back": -year * (number % 2), "summer time": summer}.get(kind, 0)
    faults = [{"kind": "clock", "seconds": off * rng.uniform(0.9, 1.1)}] if off else []
    return [tick(bench, place, faults=faults) for _ in range(3 if kind == "overlapping" else 1)]


def tick(bench: Bench, place: Path, **task: Any) -> Child:
    """What the schedule starts, up to training."""
    return bench.launch(work="tick", toml=str(place / "shop.toml"), root=str(place / "workspace"), **task)


TABLE = (
    Row(
        43,
        "SIGKILL at random moments of `retrain`, until it ends",
        "R; nothing decided twice",
        killed,
        1,
        30,
        "without Prefect, under which tests/test_schedule.py kills one",
    ),
)
