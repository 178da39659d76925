"""What MLflow's absence costs a training: `driftrec train` with the store free, and with it locked by somebody else.

    python -m benchmarks.mirror_cost [PAIRS]

Timed is the training of all stages within the whole command. What comes after it, the recording, waits for MLflow at
most DRIFTREC_MLFLOW_SECONDS, and is not part of it. Two minutes or so, hence not in `make bench`.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.generated import write_experiment
from benchmarks.measure import REPETITIONS, Pair, dearer, report, using_threads
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


def main(pairs: int) -> None:
    """Measure and report."""
    os.environ |= {"DRIFTREC_MLFLOW_SECONDS": "2", "DRIFTREC_PREFECT": "off"}
    set_defaults()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="driftrec-mirror-") as folder, using_threads(1):
        place = Path(folder)
        write_experiment(place, "cost", TABLES, users=120, items=60)
        for number in range(pairs + 1):
            for away in (True, False) if number % 2 else (False, True):
                took = trained(place, f"{number}-{away}", away)
                seconds[away] += [took] if number else []  # the first pair warms up
    pair = Pair(tuple(seconds[True]), tuple(seconds[False]), "cpu", 1)
    note = "training within `driftrec train`; MLflow's SQLite held by another connection"
    report("mirror_cost", [dearer("training with MLflow away", "with MLflow there", pair, mark=1.01, note=note)])


def trained(place: Path, name: str, away: bool) -> float:
    """Seconds of processor that training takes in a new workspace."""
    from flows import steps, stores
    from flows.plain import run_plainly

    root = place / name
    root.mkdir()
    stores.make(Workspace(place))  # once: its tables take ten seconds
    shutil.copyfile(place / "mlflow.db", root / "mlflow.db")
    took, honest = [0.0], steps.train

    def timed(*arguments: Any) -> Any:
        before = time.process_time()
        try:
            return honest(*arguments)
        finally:
            took[0] += time.process_time() - before

    steps.train = timed
    try:
        with locked(root / "mlflow.db", away):
            arguments = {"method": "single", "seeds": None, "stages": None, "users": None, "workers": 1}
            run_plainly("continual", {"config": str(place / "cost.toml"), "workspace": str(root), **arguments})
    finally:
        steps.train = honest
    return took[0]


@contextmanager
def locked(store: Path, wanted: bool) -> Iterator[None]:
    """Nobody else can use the store within the block, where that is wanted."""
    with closing(sqlite3.connect(store, isolation_level=None)) as holder:
        if wanted:
            holder.execute("BEGIN EXCLUSIVE")
        yield


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else REPETITIONS)
