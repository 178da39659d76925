"""Reading, sorting and cutting a generated log: driftrec beside DuckDB doing the same sort, cut and counts.

    python -m benchmarks.split_log                       # 10 million rows of Parquet, each run a process of its own
    python -m benchmarks.split_log --rows 100000000      # ours alone, once: time and peak memory

Both sides (`benchmarks.split_sides`) read the rows, drop duplicates, store the sorted log, cut it at 60/70/80/90 % of
the events, store every stage by user and time, and count users and items, new and known. driftrec also checks every row
and digests what it wrote.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.measure import Pair, Row, Work, dearer, report, skip
from benchmarks.split_sides import THREADS

SCRIPT = "split_log"
ROWS, PAIRS = 10_000_000, 5
CHUNK = 5_000_000
SIZE = "a size: no matmul or stream limits it"


def main() -> None:
    """Measure the split beside DuckDB, or a longer one alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        write_log(log, options.rows)
        if options.rows > ROWS:
            alone(Path(folder), log, options.rows)
        else:
            beside(Path(folder), log, options.rows)


def alone(folder: Path, log: Path, rows: int) -> None:
    """One run of ours, its time and memory recorded; too long for a comparison."""
    run = child("ours", log, folder)
    memory = Row(
        name=f"split, {rows / 1e6:g} M rows, peak memory",
        rival="6 GiB",
        ratio=run["peak"] / (6 * 2**30),
        mark=1,
        better="lower",
        unit="MiB",
        ours=run["peak"] / 2**20,
        theirs=6 * 1024,
        how="one process",
        note=f"{run['wall']:.0f} s of wall time, {run['cpu']:.0f} s of processor time on {THREADS} threads; {SIZE}",
    )
    report(f"{SCRIPT} --rows {rows}", [memory])


def beside(folder: Path, log: Path, rows: int) -> None:
    """Run both sides in turn, each in a process of its own, and record the rows."""
    if importlib.util.find_spec("duckdb") is None:
        skip(SCRIPT, "duckdb is not installed; pip install duckdb")
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "duckdb": []}
    for number in range(PAIRS):
        for side in ("ours", "duckdb") if number % 2 else ("duckdb", "ours"):
            runs[side].append(child(side, log, folder))
    sizes = [{name: run[name] for name in ("events", "users")} for side in runs.values() for run in side]
    if any(size != sizes[0] for size in sizes):
        raise SystemExit(f"the two sides disagree about the log: {sizes}")
    wall, cpu = (
        Pair(tuple(run[clock] for run in runs["ours"]), tuple(run[clock] for run in runs["duckdb"]), clock, THREADS)
        for clock in ("wall", "cpu")
    )
    peaks = [sorted(run["peak"] for run in side) for side in runs.values()]
    low, middle, high = (peaks[0][place] for place in (0, PAIRS // 2, -1))
    name = f"split, {rows / 1e6:g} M rows"
    memory = Row(
        name=f"{name}, peak memory",
        rival="1 GiB",
        ratio=middle / 2**30,
        low=low / 2**30,
        high=high / 2**30,
        mark=1,
        better="lower",
        unit="MiB",
        ours=middle / 2**20,
        theirs=1024,
        how=f"median of {PAIRS} processes",
        note=f"DuckDB's own peak is {peaks[1][PAIRS // 2] / 2**20:,.0f} MiB; {SIZE}",
    )
    note = "ours also checks every row and digests what it writes"
    work = Work(bytes=stored(log) + stored(folder / "ours"))
    report(
        SCRIPT,
        [
            dearer(name, "DuckDB's time", wall, mark=1, work=work, note=note),
            dearer(f"{name}, processor time", "DuckDB's", cpu, mark=None, work=work, note=note),
            memory,
        ],
    )


def child(side: str, log: Path, folder: Path) -> dict[str, float]:
    """Figures of one side, from a process of its own."""
    arguments = [side, str(log), str(folder / side)]
    command = [sys.executable, "-m", "benchmarks.split_sides", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def stored(folder: Path) -> int:
    """Bytes of all files below a folder: what has to be read, or written, once at least."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_log(folder: Path, rows: int, users: int | None = None) -> None:
    """20 events a user or so many users, a hundredth as many items as rows, popular ones more often, some twice."""
    folder.mkdir(parents=True)
    rng, users, items = np.random.default_rng(0), users or rows // 20, rows // 100
    for number, start in enumerate(range(0, rows, CHUNK)):
        count = min(CHUNK, rows - start)
        drawn = pl.DataFrame(
            {
                "user_id": rng.integers(0, users, count),
                "item_id": (items * rng.random(count) ** 3).astype(np.int64),
                "timestamp": 1_500_000_000 + rng.integers(0, 150_000_000, count),
            }
        )
        named = drawn.with_columns(
            pl.format("u{}", "user_id").alias("user_id"), pl.format("i{}", "item_id").alias("item_id")
        )
        named.write_parquet(folder / f"part-{number:03d}.parquet")


if __name__ == "__main__":
    main()
