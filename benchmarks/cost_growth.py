"""Claim: what a stage costs does not grow with the number of stages before it under PESO and GEMS.

A generated log of equal stages, so that nothing but the number of past stages changes. Per method: the processor
seconds of training one more stage, and of putting its model together again from the lineage's files, each fitted by a
line over the stages; `ratio` is that line at the last stage over the line at the first later one, spread over seeds.
`full_retrain` trains on all data so far and so grows; cumulative LoRA folds its past in, so its steps stay as they are,
while the files it must read and keep grow with every stage. The limit of training is that of the last stage's matrix
products, the limit of reading a model that of the bytes of its files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from torch import Tensor

from benchmarks.measure import Row, Work, flops, limited, median, report, timed, using_threads
from flows import steps
from flows.plan import Plan
from stages import checkpoint
from stages.commit import method_of
from stages.dataset import Dataset, load_dataset
from stages.jobs import Job
from stages.train import bare_model, lineage_folders, train_stage

NAME = "cost_growth"
STAGES, USERS, EVENTS, ITEMS = 8, 96, 9, 64
SEEDS, COUNTED = range(5), 98
METHODS = {"peso": 1.15, "gems": 1.15, "cumulative_sum": None, "full_retrain": None}
"""Each with its mark: flat, but for timing noise, or none."""
CONFIG = """
name = "growth"
workspace = "unused"
[[log.sources]]
path = "events.csv"
time_unit = "s"
[stages]
instants = [{instants}]
[items]
dimensions = 8
levels = 3
codes_per_level = 16
[backbone]
hidden = 32
layers = 2
heads = 2
feed_forward = 64
[training]
batch_size = 16
first_epochs = 2
epochs = 3
patience = 3
"""


def main() -> None:
    """Train every method's lineages and record how their stages' costs grow."""
    with tempfile.TemporaryDirectory() as folder, using_threads(1):
        plan = prepared(Path(folder))
        dataset = load_dataset(plan.config, plan.workspace)
        train(plan, Job("peso", seed=99, protocol="next_stage", stage=1))  # warms up what only the first call pays
        measured = {method: [lineage(plan, dataset, method, seed) for seed in SEEDS] for method in METHODS}
        works = {method: counted(plan, dataset, method) for method in METHODS}
    rows = []
    for method, mark in METHODS.items():
        trained, restored = (np.array([pair[side] for pair in measured[method]]) for side in (0, 1))
        arithmetic, files = works[method]
        rows.append(growth(f"cost growth, training a stage of {method}", trained, mark, arithmetic))
        rows.append(growth(f"cost growth, reading a model of {method}", restored, None, files))
    report(NAME, rows)


def prepared(folder: Path) -> Plan:
    """A workspace with the generated log, its stages and semantic IDs."""
    start, day = 1_735_689_600, 86_400  # 2025-01-01, in seconds
    rows = ["user_id,item_id,timestamp"]
    rng = np.random.default_rng(0)
    for stage in range(STAGES):
        for user in range(USERS):  # new users in every stage, walking the ring of items
            item, stride = rng.integers(ITEMS), 1 + rng.integers(2)
            for event in range(EVENTS):
                place, clock = (item + stride * event) % ITEMS, start + stage * day + user * 60 + event
                rows.append(f"s{stage}u{user},i{place},{clock}")
    (folder / "events.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    instants = ", ".join(f'"2025-01-{stage + 1:02d}T00:00:00Z"' for stage in range(1, STAGES))
    (folder / "growth.toml").write_text(CONFIG.format(instants=instants), encoding="utf-8")
    plan = steps.make_plan(folder / "growth.toml", folder / "workspace")
    steps.read(plan)
    plan = steps.split(plan)
    steps.identify(plan)
    return plan


def lineage(plan: Plan, dataset: Dataset, method: str, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of training, and of restoring, each later stage of one lineage, in order."""
    train(plan, Job(method, seed, "next_stage", 0))
    trained, restored = [], []
    for stage in range(1, STAGES):
        job = Job(method, seed, "next_stage", stage)
        trained.append(timed(lambda job=job: train(plan, job)))
        model = bare_model(plan.config, dataset, seed)
        folders = lineage_folders(plan.config, plan.workspace, dataset, job)
        restored.append(timed(lambda model=model, folders=folders: restore(plan, method, model, folders)))
    return trained, restored


def counted(plan: Plan, dataset: Dataset, method: str) -> tuple[Work, Work]:
    """What the last stage of one more lineage takes: the arithmetic of training it, the bytes of reading its model."""
    jobs = [Job(method, COUNTED, "next_stage", stage) for stage in range(STAGES)]
    for job in jobs[:-1]:
        train(plan, job)
    arithmetic, sizes = flops(lambda: train(plan, jobs[-1])), list[int]()
    load = checkpoint.load_file

    def watched(path: Path) -> dict[str, Tensor]:
        """A file of tensors, its size noted."""
        sizes.append(path.stat().st_size)
        return load(path)

    folders = lineage_folders(plan.config, plan.workspace, dataset, jobs[-1])
    with patch.object(checkpoint, "load_file", watched):
        restore(plan, method, bare_model(plan.config, dataset, COUNTED), folders)
    return Work(flops=arithmetic), Work(bytes=sum(sizes))


def train(plan: Plan, job: Job) -> None:
    """Train the job's last stage; the earlier ones are committed."""
    train_stage(plan.config, plan.workspace, job)


def restore(plan: Plan, method: str, model: object, folders: Sequence[Path]) -> None:
    """Put the model of a lineage together."""
    method_of(plan.config, method).restore(model, folders)  # pyright: ignore[reportArgumentType]


def growth(name: str, seconds: np.ndarray, mark: float | None, work: Work) -> Row:
    """A row from (seeds, stages) seconds and what the last stage takes at least."""
    past = np.arange(1, seconds.shape[1] + 1)
    lines = [np.polyfit(past, series, 1) for series in seconds]  # slope, intercept
    ratios = [float(np.polyval(line, past[-1]) / np.polyval(line, past[0])) for line in lines]
    slopes = [1e3 * float(line[0]) for line in lines]
    spread = f"[{min(slopes):+.2f}, {max(slopes):+.2f}]"
    row = Row(
        name=name,
        rival=f"stage 1, at stage {past[-1]}",
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        mark=mark,
        better="lower",
        unit="ms",
        ours=1e3 * float(np.median(seconds[:, -1])),
        theirs=1e3 * float(np.median(seconds[:, 0])),
        note=f"slope {median(slopes):+.2f} ms a past stage {spread}; "
        f"generated log of {STAGES} equal stages, {USERS} users x {EVENTS} events",
        how=f"{len(seconds)} seeds, cpu time, 1 thread",
    )
    return limited(row, work, float(np.median(seconds[:, -1])))


if __name__ == "__main__":
    main()
