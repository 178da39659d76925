"""A long life in one process: retraining night after night, and what each stage takes.

    python -m benchmarks.soak [--stages 200] [--method peso]

Every night new rows close a stage; the `retrain` flow reads and cuts them, trains a challenger, asks champion and
baselines about the same users, lets the gate decide, moves the champion and registers it in MLflow. Writes
docs/images/soak.png: memory, open files and processor seconds a stage, each with its slope. The stages are tiny
(40 users, 160 events), so that what grows with the length of the life would stand out against the work itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from flows.environment import set_defaults  # noqa: E402
from stages.evaluate import evaluate_stage  # noqa: E402
from stages.jobs import Job  # noqa: E402
from stages.train import train_stage  # noqa: E402
from tests import growing, tiny  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "soak.png"
FEWEST = 12
"""Stages below which a life is too short to say anything."""
EVERYBODY_PASSES = """
[retrain.gate]
minimum = -1
worst_slice = 1
latency_ms = 60000
"""


@dataclass(frozen=True)
class Life:
    """What each stage left or took.

    Attributes:
        memory: (T,) resident MiB after it.
        files: (T,) open descriptors after it.
        seconds: (T,) of processor, training and test.
    """

    memory: npt.NDArray[np.float64]
    files: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]

    def slopes(self) -> dict[str, float]:
        """Growth by 100 stages, the first quarter left out, in which libraries still fill their pools."""
        return {name: slope(values[len(values) // 4 :]) for name, values in vars(self).items()}

    def halves(self, name: str) -> tuple[float, float]:
        """Medians of a quantity over the second quarter and over the last."""
        values = getattr(self, name)
        quarter = len(values) // 4
        return float(np.median(values[quarter : 2 * quarter])), float(np.median(values[-quarter:]))


def slope(values: npt.NDArray[np.float64]) -> float:
    """Median of the slopes between all pairs (Theil, 1950; Sen, 1968) by 100 places: one odd value does not move it."""
    first, second = np.triu_indices(len(values), k=1)
    return float(100 * np.median((values[second] - values[first]) / (second - first)))


def lived(rounds: Iterable[None]) -> Life:
    """What each round left and took."""
    rows: list[tuple[float, float, float]] = []
    started = time.process_time()
    for _ in rounds:
        rows.append((resident(), len(os.listdir("/proc/self/fd")), time.process_time() - started))
        started = time.process_time()
    return Life(*np.array(rows).T)


def lineage(root: Path, stages: int, method: str = "peso") -> Iterator[None]:
    """One lineage of `stages` stages trained and tested in the new folder `root`."""
    training = {**tiny.config().training.model_dump(), "first_epochs": 2, "epochs": 2}
    config, place = tiny.config(training=training), tiny.checkerboard(root, stages=stages, users=12)
    for stage in range(stages):
        job = Job(method, 0, "same_stage", stage)
        train_stage(config, place, job)
        evaluate_stage(config, place, job, tested=stage)
        yield


def nights(root: Path, stages: int, method: str = "peso") -> Iterator[None]:
    """The `retrain` flow once a week of a growing shop in the folder `root`; every challenger goes into service.

    Raises:
        RuntimeError: a night without a decision to promote.
    """
    from flows.retrain import retrain

    config = growing.write_shop(root, EVERYBODY_PASSES)
    config.write_text(config.read_text(encoding="utf-8").replace('"single"', f'"{method}"'), encoding="utf-8")
    for number in range(2, stages + 1):
        rows = growing.week(number, items=growing.ITEMS - number)  # the same items and users every week
        late = growing.week(number + 1)[:1]  # the event behind its end that closes a week
        growing.write_rows(root / "events" / f"week{number:03d}.csv", [*rows, *late])
        said = retrain(str(config), workspace=str(root / "workspace"))
        if "**promoted**" not in said and "**first**" not in said:
            raise RuntimeError(f"week {number}: {said}")
        yield


def resident() -> float:
    """MiB of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def draw(life: Life, path: Path) -> None:
    """One panel a quantity, over the stages."""
    slopes, figure = life.slopes(), plt.figure(figsize=(7, 6), layout="constrained")
    for number, (name, label, unit, digits) in enumerate(panels()):
        axes = figure.add_subplot(3, 1, number + 1)
        values = getattr(life, name)
        axes.plot(np.arange(len(values)), values, lw=1)
        axes.set_ylim(0, 1.3 * values.max())
        axes.set_ylabel(label)
        axes.set_title(f"{slopes[name]:+.{digits}f} {unit} by 100 stages", loc="right", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("stage")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panels() -> Iterator[tuple[str, str, str, int]]:
    """Field, label, unit and digits of each panel."""
    yield "memory", "memory, MiB", "MiB", 1
    yield "files", "open files", "files", 1
    yield "seconds", "processor, s a stage", "s", 3


def main() -> None:
    """Live, draw, and print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--method", default="peso")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "workspace").mkdir()  # Prefect's server does not start below a folder that is not there
        set_defaults(Path(folder) / "workspace")
        life = lived(nights(Path(folder), max(wish.stages, FEWEST), wish.method))
    draw(life, wish.picture)
    for name, label, unit, digits in panels():
        early, late = life.halves(name)
        grown = f"{life.slopes()[name]:+.{digits}f} {unit} by 100 stages"
        print(f"{label}: median {early:.{digits}f} early, {late:.{digits}f} late, {grown}")


if __name__ == "__main__":
    main()
