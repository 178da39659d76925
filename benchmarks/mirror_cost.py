"""What MLflow's absence costs a training: `driftrec train` with the store free, and with it locked by somebody else.

    python -m benchmarks.mirror_cost [PAIRS]

Timed is the training of all stages within the whole command. What comes after it, the recording, waits for MLflow at
most DRIFTREC_MLFLOW_SECONDS, and is not part of it. A machine's clock does not resolve 1 %, so one more training with
MLflow away counts what it runs of MLflow or of our recording in it: nothing, or the times would have to show it.
Two minutes or so, hence not in `make bench`.
"""

from __future__ import annotations

import cProfile
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.generated import write_experiment
from benchmarks.measure import REPETITIONS, Pair, Row, dearer, report, using_threads
from flows.environment import set_defaults
from stages.workspace import Workspace

TABLES = """
[backbone]
hidden = 64
layers = 2
heads = 2
feed_forward = 128
precision = "float32"
[training]
first_epochs = 4
epochs = 4
patience = 4
[evaluation]
matrix_users = 0
users = 20
bootstrap = 100
protocols = ["same_stage"]
"""
RECORDING = ("/mlflow/", "flows/mirror.py", "flows/tracking.py", "flows/stores.py")
"""Parts of the names of files that write to MLflow."""


def main(pairs: int) -> None:
    """Measure and report."""
    os.environ |= {"DRIFTREC_MLFLOW_SECONDS": "2", "DRIFTREC_PREFECT": "off"}
    set_defaults()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory(prefix="driftrec-mirror-") as folder, using_threads(1):
        place = Path(folder)
        write_experiment(place, "cost", TABLES, users=120, items=60)
        for number in range(pairs + 1):
            for away in (True, False) if number % 2 else (False, True):
                took: list[float] = []
                train(place, f"{number}-{away}", away, partial(_timed, took))
                seconds[away] += [sum(took)] if number else []  # the first pair warms up
        train(place, "counted", True, profile.runcall)
    pair = Pair(tuple(seconds[True]), tuple(seconds[False]), "cpu", 1)
    note = "training within `driftrec train`; MLflow's SQLite held by another connection"
    times = dearer("training with MLflow away", "with MLflow there", pair, mark=1.01, note=note)
    report("mirror_cost", [times, _count(profile)])


def train(place: Path, name: str, away: bool, each: Callable[..., Any]) -> None:
    """`driftrec train` in a new workspace; `each` calls the training of every stage."""
    from flows import steps, stores
    from flows.plain import run_plainly

    root = place / name
    root.mkdir()
    stores.make(Workspace(place))  # once: its tables take ten seconds
    shutil.copyfile(place / "mlflow.db", root / "mlflow.db")
    honest = steps.train
    steps.train = partial(each, honest)
    try:
        with locked(root / "mlflow.db", away):
            arguments = {"method": "single", "seeds": None, "stages": None, "users": None, "workers": 1}
            run_plainly("continual", {"config": str(place / "cost.toml"), "workspace": str(root), **arguments})
    finally:
        steps.train = honest


def _timed(took: list[float], work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work`, its seconds of processor added to `took`."""
    before = time.process_time()
    try:
        return work(*arguments)
    finally:
        took.append(time.process_time() - before)


def _count(profile: cProfile.Profile) -> Row:
    """How many functions of MLflow, or of our recording in it, a training called."""
    called = [str(Path(entry.code.co_filename)) for entry in profile.getstats() if not isinstance(entry.code, str)]
    found = [name for name in called if any(part in name for part in RECORDING)]
    return Row(
        name="functions of MLflow that a training calls",
        rival="none",
        ratio=float(len(found)),
        mark=0,
        better="lower",
        unit="functions",
        ours=float(len(found)),
        theirs=0.0,
        how=f"{len(called)} functions of Python called by the training of all stages, looked at with cProfile",
        note=f"{', '.join(sorted(set(found))) or 'none'}; a count: no limit",
    )


@contextmanager
def locked(store: Path, wanted: bool) -> Iterator[None]:
    """Nobody else can use the store within the block, where that is wanted."""
    with closing(sqlite3.connect(store, isolation_level=None)) as holder:
        if wanted:
            holder.execute("BEGIN EXCLUSIVE")
        yield


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else REPETITIONS)
