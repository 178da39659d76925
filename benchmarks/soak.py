"""A long life in one process: a shop that is retrained stage after stage, and what each stage takes.

    python -m benchmarks.soak [--stages 200] [--method peso] [--plain]

Every round a file of new rows appears in the log's folder and the flow `retrain` runs as the command runs it: rows are
taken, a stage is closed, a challenger trained; challenger, champion and baselines are tested, the gate decides, and the
decision goes to history.jsonl, to MLflow (SQLite) and to a Prefect server of its own (not with `--plain`).

Writes docs/images/soak.png: memory, open files, processor and wall seconds a stage, each with its slope. The stages are
tiny (12 users), so that what grows with the number of stages would stand out against the work itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import growing  # noqa: E402
from flows.environment import started_in  # noqa: E402
from stages.workspace import Workspace  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "soak.png"
FEWEST = 12
"""Stages below which a life is too short to say anything."""
USERS, VISITS = 12, 4
FIRST = 8
"""Days that are there before the first round: two stages, seven days and one."""
CHANGE = 7
"""Days after which tastes change, so that challengers win at times and lose at others."""
QUICK = "first_epochs = 2\nepochs = 2\nbatch_size = 16\nfirst_learning_rate = 1e-2\nlearning_rate = 1e-2"
"""How a model of `benchmarks.growing` learns something from 48 events."""
RULES = """
close = { period = "1d" }
[retrain.gate]
metric = "ndcg_at_10"
decide_by = "mean"
worst_slice = 1
users = 1
latency_ms = 60000
"""
"""A stage a day; a challenger that is no worse in the mean goes into service."""
Run = Callable[[str, dict[str, Any]], str]


@dataclass(frozen=True)
class Life:
    """What each stage left or took.

    Attributes:
        memory: (T,) resident MiB after it.
        files: (T,) open descriptors after it.
        seconds: (T,) of processor.
        wall: (T,) of the clock.
        promoted: (T,) whether its challenger went into service: written whole into MLflow's registry.
    """

    memory: npt.NDArray[np.float64]
    files: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    wall: npt.NDArray[np.float64]
    promoted: npt.NDArray[np.bool_]

    def slopes(self) -> dict[str, float]:
        """Growth by 100 stages, the first quarter left out, in which libraries still fill their pools."""
        return {name: slope(getattr(self, name)[len(self.files) // 4 :]) for name, *_ in panels()}

    def halves(self, name: str, promoted: bool | None = None) -> tuple[float, float]:
        """Medians of a quantity over the second quarter and over the last, NaN where there is nothing.

        Args:
            name: of the quantity.
            promoted: only stages with this outcome.
        """
        wanted = np.ones(len(self.files), dtype=bool) if promoted is None else self.promoted == promoted
        values, quarter = np.where(wanted, getattr(self, name), np.nan), len(wanted) // 4
        parts = (values[quarter : 2 * quarter], values[-quarter:])
        early, late = (float(np.nanmedian(part)) if np.isfinite(part).any() else float("nan") for part in parts)
        return early, late


def slope(values: npt.NDArray[np.float64]) -> float:
    """Median of the slopes between all pairs (Theil, 1950; Sen, 1968) by 100 places: one odd value does not move it."""
    first, second = np.triu_indices(len(values), k=1)
    return float(100 * np.median((values[second] - values[first]) / (second - first)))


def lived(folder: Path, stages: int, run: Run, method: str = "peso") -> Life:
    """Retrain a new shop once for each of `stages` stages.

    Args:
        folder: of the log; the workspace goes below it.
        stages: rounds; each closes one stage.
        run: `flows.running.run`, or `flows.plain.run_plainly` to do without Prefect.
        method: trains the challengers.

    Raises:
        RuntimeError: the rounds did not decide on one stage each.
    """
    from flows.experiment import exclusive
    from flows.promotion.history import read_history

    place = Workspace(folder / "workspace")
    arguments = {"config": str(opened(folder, method)), "new": None, "close_now": False, "workspace": str(place.root)}
    rows: list[tuple[float, float, float, float]] = []
    with exclusive(place):
        run("retrain", arguments)
        for number in range(FIRST, FIRST + stages):
            # The next day's first event closes the day; it comes a second time with the rest of its day.
            growing.write_rows(folder / "events" / f"day{number:03d}.csv", [*day(number), *day(number + 1)[:1]])
            processor, clock = time.process_time(), time.perf_counter()
            run("retrain", arguments)
            spent = time.process_time() - processor, time.perf_counter() - clock
            rows.append((resident(), len(os.listdir("/proc/self/fd")), *spent))
    lines = read_history(place)[0]
    if [line["stage"] for line in lines] != list(range(1, stages + 2)):
        raise RuntimeError(f"{stages} rounds decided on the stages {[line['stage'] for line in lines]}")
    return Life(*np.array(rows).T, np.array([line["decision"] == "promoted" for line in lines[1:]]))


def opened(folder: Path, method: str) -> Path:
    """A shop whose log holds two stages and that nothing was done with; returns its config."""
    growing.write_rows(folder / "events" / "base.csv", [row for number in range(FIRST) for row in day(number)])
    growing.write_items(folder / "items.csv")
    path = folder / "shop.toml"
    path.write_text(growing.settings(RULES, method, QUICK), encoding="utf-8")
    return path


def day(number: int) -> list[tuple[str, str, int]]:
    """Every user walks the ring of items from a place of their own, in steps whose length changes with tastes."""
    step = 1 + number // CHANGE % 5
    return [
        (
            f"u{user:02d}",
            f"i{(2 * user + step * visit) % growing.ITEMS:02d}",
            growing.seconds(number + visit / 8) + user,
        )
        for user in range(USERS)
        for visit in range(VISITS)
    ]


def resident() -> float:
    """MiB of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def draw(life: Life, path: Path) -> None:
    """One panel a quantity, over the stages."""
    slopes, figure = life.slopes(), plt.figure(figsize=(7, 8), layout="constrained")
    stages = np.arange(len(life.files))
    for number, (name, label, unit, digits) in enumerate(panels()):
        axes = figure.add_subplot(4, 1, number + 1)
        values = getattr(life, name)
        axes.plot(stages, values, lw=1)
        axes.plot(stages[life.promoted], values[life.promoted], ".", ms=3)
        axes.set_ylim(0, 1.3 * values.max())
        axes.set_ylabel(label)
        axes.set_title(f"{slopes[name]:+.{digits}f} {unit} by 100 stages", loc="right", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("stage (dots: the challenger went into service)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panels() -> Iterator[tuple[str, str, str, int]]:
    """Field, label, unit and digits of each panel."""
    yield "memory", "memory, MiB", "MiB", 1
    yield "files", "open files", "files", 1
    yield "seconds", "processor, s a stage", "s", 3
    yield "wall", "clock, s a stage", "s", 3


def main() -> None:
    """Live, draw, and print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--method", default="peso")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--plain", action="store_true", help="without Prefect")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "workspace").mkdir()
        started_in(folder / "workspace")
        if wish.plain:
            from flows.plain import run_plainly as run
        else:
            from flows.running import run
        life = lived(folder, max(wish.stages, FEWEST), run, wish.method)
        whole, models = (size(folder / "workspace" / part) for part in ("", "mlartifacts"))
        print(f"workspace: {whole:.0f} MiB, of it {models:.0f} in MLflow's registered models")
    draw(life, wish.picture)
    told(life)


def told(life: Life) -> None:
    """Print every quantity early and late, with its slope, and the times once more by what the gate said."""
    print(f"{len(life.files)} stages, {life.promoted.sum()} challengers went into service")
    for name, label, unit, digits in panels():
        early, late = life.halves(name)
        grown = f"{life.slopes()[name]:+.{digits}f} {unit} by 100 stages"
        print(f"{label}: median {early:.{digits}f} early, {late:.{digits}f} late, {grown}")
    for name, label, _, digits in list(panels())[2:]:
        for promoted, said in ((False, "champion kept"), (True, "challenger promoted")):
            early, late = life.halves(name, promoted)
            print(f"{label}, {said}: median {early:.{digits}f} early, {late:.{digits}f} late")


def size(folder: Path) -> float:
    """MiB of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    main()
