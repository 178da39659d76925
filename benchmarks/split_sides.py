"""The two sides of `benchmarks.split_log`, one a process: prints seconds, peak bytes and counts as JSON.

    python -m benchmarks.split_sides ours|duckdb LOG FOLDER

Apart from that script, which loads torch: a side's memory is the side's own.
"""

# ruff: noqa: S608 (the SQL is made of this file's own constants)
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stages.config import Config
from stages.log import read_log
from stages.split import split_stages
from stages.workspace import Workspace

THREADS = 2
SHARES = (0.6, 0.7, 0.8, 0.9)


def main(side: str, log: str, folder: str) -> None:
    """One run in this process."""
    print(json.dumps(measured({"ours": ours, "duckdb": duckdb}[side], Path(log), Path(folder))))


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
    main(*sys.argv[1:])
