"""Whole commands beside the time a person should have to wait for them: the demo, and a comparison on Video_Games.

    python -m benchmarks.whole_job --only demo       # some 4 minutes
    python -m benchmarks.whole_job --only compare    # some 40 minutes; DRIFTREC_DATA names the folder of public logs

Each command runs once, in a process of its own over a fresh temporary folder, as a person would type it: every user,
both protocols, as many worker processes as it chooses itself, in this script's own environment. `ratio` is its wall
time over the mark. No limit stands beside it, since a whole command is reading, training, testing and drawing; the
other scripts hold its parts to theirs. `make bench` leaves this script out, as it takes too long, and keeps its rows.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Row, data_folder, report
from flows.machine import cores

SCRIPT = "whole_job"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Whole:
    """A command and how long it may take.

    Attributes:
        name: of the row.
        arguments: of `driftrec`, the workspace left out.
        minutes: the mark.
        data: the public log it reads; empty: it makes its own.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    data: str = ""


METHODS = "frozen,single,peso,cumulative_sum,full_finetune"
JOBS = {
    "demo": Whole("demo", ("demo",), minutes=4),
    "compare": Whole(
        "whole job",
        ("compare", "--config", "configs/video_games.toml", "--methods", METHODS, "--seeds", "0"),
        minutes=40,
        data="amazon-video-games-blocks",
    ),
}


@dataclass(frozen=True)
class Spent:
    """Seconds of one run, and how busy the machine was with other things when it began."""

    wall: float
    processor: float
    load: float


def main() -> None:
    """Run the chosen commands, or both, and record a row each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=JOBS, help="absent: both")
    only = parser.parse_args().only
    for key in [only] if only else JOBS:
        job = JOBS[key]
        if job.data:
            data_folder(SCRIPT, job.data)
        with tempfile.TemporaryDirectory() as folder:
            spent = run([sys.executable, "-m", "flows.cli", *job.arguments, "--workspace", f"{folder}/workspace"])
        report(f"{SCRIPT} --only {key}", [row(job, spent)])


def run(command: list[str]) -> Spent:
    """Run a command to its end; what it prints goes to standard error as it comes."""
    load, before, started = os.getloadavg()[0], children(), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{SCRIPT}: {' '.join(command)} ended with exit code {done.returncode}; nothing is recorded")
    return Spent(wall, children() - before, load)


def environment() -> str:
    """What of the environment changes how long a command takes."""
    return ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in ("OMP_NUM_THREADS", "DRIFTREC_PREFECT"))


def children() -> float:
    """Seconds of processor time of all ended children and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(job: Whole, spent: Spent) -> Row:
    """Wall time beside the mark."""
    mark = 60 * job.minutes
    return Row(
        name=job.name,
        rival=f"{job.minutes:g} minutes",
        ratio=spent.wall / mark,
        mark=1,
        better="lower",
        unit="s",
        ours=spent.wall,
        theirs=mark,
        how="one run, wall time, as many processes as the command chooses",
        note=f"`driftrec {' '.join(job.arguments)}` over a fresh folder; {spent.processor:.0f} s of processor time; "
        f"load average {spent.load:.1f} on {cores()} cores when it began; {environment()}",
    )


if __name__ == "__main__":
    main()
