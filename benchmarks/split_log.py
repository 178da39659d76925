"""Reading, sorting and cutting a generated log: driftrec beside DuckDB doing the same sort, cut and counts.

    python -m benchmarks.split_log                       # 10 million rows of Parquet, each run a process of its own
    python -m benchmarks.split_log --rows 100_000_000    # ours alone, once: time and peak memory

Both read the rows, drop duplicates, store the sorted log, cut it at 60/70/80/90 % of the events, store every stage by
user and time, and count users and items, new and known. driftrec also checks every row and digests what it wrote.
"""

# ruff: noqa: S608 (the SQL is made of this file's own constants)
from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.measure import Pair, Row, dearer, report, skip
from stages.config import Config
from stages.log import read_log
from stages.split import split_stages
from stages.workspace import Workspace

SCRIPT = "split_log"
ROWS, PAIRS, THREADS = 10_000_000, 5, 2
CHUNK = 5_000_000
SHARES = (0.6, 0.7, 0.8, 0.9)


def main() -> None:
    """Measure the split, or be one side of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--side", choices=["ours", "duckdb"], help="one run in this process; prints its figures")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measured({"ours": ours, "duckdb": duckdb}[options.side], options.log, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        write_log(log, options.rows)
        if options.rows > ROWS:
            alone(Path(folder), log, options.rows)
        else:
            beside(Path(folder), log, options.rows)


def alone(folder: Path, log: Path, rows: int) -> None:
    """One run of ours, printed; too long for a comparison."""
    run = child("ours", log, folder)
    print(f"{rows:,} rows: {run['wall']:.0f} s, {run['cpu']:.0f} s of processor, peak {run['peak'] / 2**30:.2f} GiB")


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
    peaks = [sorted(run["peak"] for run in side)[PAIRS // 2] for side in runs.values()]
    name = f"split, {rows / 1e6:g} M rows"
    memory = Row(
        name=f"{name}, peak memory",
        rival="1 GiB",
        ratio=peaks[0] / 2**30,
        mark=1,
        better="lower",
        unit="MiB",
        ours=peaks[0] / 2**20,
        theirs=1024,
        how=f"median of {PAIRS} processes",
        note=f"DuckDB's own peak is {peaks[1] / 2**20:,.0f} MiB",
    )
    note = "ours also checks every row and digests what it writes"
    report(
        SCRIPT,
        [
            dearer(name, "DuckDB's time", wall, mark=1, note=note),
            dearer(f"{name}, processor time", "DuckDB's", cpu, mark=None, note=note),
            memory,
        ],
    )


def child(side: str, log: Path, folder: Path) -> dict[str, float]:
    """Figures of one side, from a process of its own."""
    arguments = ["--side", side, "--log", str(log), "--folder", str(folder / side)]
    command = [sys.executable, "-m", f"benchmarks.{SCRIPT}", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(run: Callable[[Path, Path], dict[str, int]], log: Path, folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of one side."""
    wall, cpu = time.perf_counter(), time.process_time()
    counts = run(log, folder)
    used = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return used | {"peak": peak()} | counts


def peak() -> float:
    """This program's highest memory in bytes; `ru_maxrss` would count what its parent held when it was started."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def write_log(folder: Path, rows: int) -> None:
    """20 events a user, a hundredth as many items as rows, the popular ones far more often, some rows twice."""
    folder.mkdir(parents=True)
    rng, users, items = np.random.default_rng(0), rows // 20, rows // 100
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


def ours(log: Path, folder: Path) -> dict[str, int]:
    """Read and split with driftrec."""
    source = {"path": str(log), "time_unit": "s"}
    config = Config.model_validate({"name": "split", "workspace": "unused", "log": {"sources": [source]}})
    workspace = Workspace(folder / "workspace")
    read_log(config, workspace)
    # A second run would find its stages committed and leave them as they are.
    (workspace.stages / "manifest.json").unlink(missing_ok=True)
    stages = split_stages(config, workspace)
    return {"events": sum(stage.events for stage in stages), "users": sum(stage.new_users for stage in stages)}


def duckdb(log: Path, folder: Path) -> dict[str, int]:
    """The same sort and cut with DuckDB."""
    import duckdb as engine

    folder.mkdir(parents=True, exist_ok=True)
    sql = engine.connect(config={"threads": THREADS}).execute
    rows = f"SELECT DISTINCT user_id, item_id, make_timestamp(timestamp * 1000000) AS timestamp FROM '{log}/*.parquet'"
    sql(f"CREATE TABLE log AS {rows}")
    packed = "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
    sql(f"COPY (SELECT * FROM log ORDER BY timestamp, user_id, item_id) TO '{folder}/log.parquet' {packed}")
    quantiles = ", ".join(f"quantile_disc(timestamp, {share})" for share in SHARES)
    edges = sql(f"SELECT {quantiles} FROM log").fetchall()[0]
    stage = "CASE " + " ".join(f"WHEN timestamp < '{edge}' THEN {at}" for at, edge in enumerate(edges)) + " ELSE 4 END"
    for index in range(len(SHARES) + 1):
        own = f"SELECT * FROM log WHERE {stage} = {index} ORDER BY user_id, timestamp, item_id"
        sql(f"COPY ({own}) TO '{folder}/stage{index}.parquet' {packed}")
    new = {}
    for column in ("item_id", "user_id"):
        sql(f"SELECT {stage}, count(DISTINCT {column}) FROM log GROUP BY 1").fetchall()
        first = f"SELECT min({stage}) AS first FROM log GROUP BY {column}"
        new[column] = sql(f"SELECT first, count(*) FROM ({first}) GROUP BY 1").fetchall()
    events = sql("SELECT count(*) FROM log").fetchall()[0][0]
    return {"events": events, "users": sum(count for _, count in new["user_id"])}


if __name__ == "__main__":
    main()
