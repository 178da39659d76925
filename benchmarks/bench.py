"""Runs the short benchmarks one after the other, a line each, then refreshes the table of docs/results.md.

    python -m benchmarks.bench [NAME …]

A script that fails is named with the end of its output, the others still run, and the exit code is 1. A missed mark is
shown, here and in the table, and is no failure: a busy machine misses some.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results
from benchmarks.measure import RESULTS, stored

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "packed_training",
    "long_windows",
    "output_head",
    "lora_step",
    "proximal_step",
    "bf16_step",
    "gems_step",
    "cost_growth",
    "decoding",
    "decoding_pretrained",
    "examples",
    "baselines",
    "split_log",
    "scaling",
)
"""In this order; a name is a file beside this one."""
LONGEST = 600
"""Seconds a script may take before it counts as failed."""


def main(names: list[str]) -> int:
    """Run the named scripts, or all; returns the exit code."""
    unknown = [name for name in names if name not in SCRIPTS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; known: {', '.join(SCRIPTS)}", file=sys.stderr)
        return 2
    ended_well = [run(name) for name in names or SCRIPTS]
    results.refresh_benchmarks(RESULTS)
    failed = ended_well.count(False)
    if failed:
        print(f"{failed} of {len(ended_well)} benchmarks failed", file=sys.stderr)
    return 1 if failed else 0


def run(name: str) -> bool:
    """Run one script and print its line; whether it ended well."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"],
            cwd=ROOT,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: FAILED: longer than {LONGEST} s", flush=True)
        return False
    seconds = time.perf_counter() - started
    if done.returncode:
        print(f"{name}: FAILED with exit code {done.returncode} after {seconds:.0f} s", flush=True)
        print("".join(f"    {line}\n" for line in (done.stderr or done.stdout).splitlines()[-15:]), flush=True)
        return False
    print(f"{name}: {headline(name, done.stdout)} ({seconds:.0f} s)", flush=True)
    return True


def headline(name: str, output: str) -> str:
    """What came of a script, in half a line."""
    if output.startswith(f"{name}: skipped"):
        return output.strip().removeprefix(f"{name}: ")
    own = [row for row in stored() if row["script"] == name and row["ratio"] is not None]
    marks = {True: " met", False: " MISSED", None: ""}
    return ", ".join(f"{row['name']} {row['ratio']:.3g} ×{marks[row['met']]}" for row in own) or "nothing claimed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
