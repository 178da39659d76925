"""`make faults`: the whole table, or some of it.

    python -m benchmarks.faults [--rows 1,2,6] [--runs N] [--scale 0.1] [--quick] [--seed 0]

Prints faults, runs and passes, and writes benchmarks/faults.json and the table of docs/results.md made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.faults.harness import Bench

PLACE = Path(__file__).resolve().parent.parent / "faults.json"


def main(words: list[str] | None = None) -> int:
    """Run the wanted rows; 1 where one did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--rows", help="numbers, separated by commas; absent: all")
    parser.add_argument("--runs", type=int, help="runs of each row, instead of the table's own numbers")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the table's own numbers")
    parser.add_argument("--quick", action="store_true", help="the subset that pytest runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PLACE)
    wish = parser.parse_args(words)
    set_environment()
    from benchmarks.faults.harness import Bench

    with tempfile.TemporaryDirectory(prefix="driftrec-faults-") as folder:
        return table(wish, Bench(Path(folder), commands=not wish.quick))


def table(wish: argparse.Namespace, bench: Bench) -> int:
    """Run the wanted rows on `bench`, one after the other."""
    from benchmarks.faults.table import TABLE, tried

    chosen = None if wish.rows is None else {int(word) for word in wish.rows.split(",")}
    results: list[dict[str, Any]] = []
    for row in TABLE:
        count = row.quick if wish.quick else max(1, round(row.full * wish.scale)) if row.full else 0
        count = wish.runs if wish.runs is not None and row.full else count
        if (chosen is not None and row.number not in chosen) or (wish.quick and not count):
            continue
        results.append(tried(row, bench, count, wish.seed))
        print(line(results[-1]), flush=True)
    write(wish.out, results, chosen is not None or wish.quick)
    if wish.out == PLACE:
        from benchmarks.results import refresh_faults

        refresh_faults(PLACE)
    bad = [result["row"] for result in results if result["passes"] != result["runs"]]
    untried = [result["row"] for result in results if not result["runs"]]
    print(f"{sum(r['passes'] for r in results)} of {sum(r['runs'] for r in results)} runs passed", end="")
    print(f"; rows with failures: {bad or 'none'}; rows not injected here: {untried or 'none'}")
    return 1 if bad else 0


def set_environment() -> None:
    """Before torch, Prefect and MLflow are imported anywhere."""
    from flows.environment import set_defaults

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="driftrec-faults-prefect-")
    set_defaults()


def line(result: dict[str, Any]) -> str:
    """One row of the table as text."""
    mark = "pass" if result["runs"] and result["passes"] == result["runs"] else "FAIL" if result["runs"] else "none"
    count = f"{result['passes']}/{result['runs']}"
    note = f"  [{result['note']}]" if result["note"] else ""
    return f"{mark}  {result['row']:>2}  {count:>8}  {result['seconds']:7.1f} s  {result['fault']}{note}"


def write(path: Path, results: list[dict[str, Any]], partial: bool) -> None:
    """Write the table; rows that a partial run left out keep their last result."""
    kept: dict[int, dict[str, Any]] = {}
    if partial and path.exists():
        kept = {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    when = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit()}
    kept |= {result["row"]: result | when for result in results}
    rows = [kept[number] for number in sorted(kept)]
    path.write_text(json.dumps({"schema": 2, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def commit() -> str:
    """Of the code that is run, with a + where files were changed since; empty outside a repository."""
    git = ["git", "-C", str(PLACE.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
