"""What `benchmarks.service_load` serves: a workspace with two small models of a generated log, and who is champion."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks.generated import write_experiment
from flows import steps
from flows.experiment import remember_trained, trained_jobs
from stages.jobs import Job
from stages.train import train_stage
from stages.workspace import Workspace, write_json

METHODS = ("single", "frozen")
TABLES = """
[items]
levels = 4
codes_per_level = 64
[training]
first_epochs = 1
epochs = 1
[evaluation]
matrix_users = 0
bootstrap = 100
"""


def prepare(folder: Path) -> Path:
    """Train two small models on a generated log; returns the workspace."""
    source, root = folder / "source", folder / "workspace"
    config = write_experiment(source, "load", TABLES, users=600, items=2000)
    plan = steps.claimed(steps.draft_plan(config, root, list(METHODS), [0], users=None))
    for step in (steps.read, steps.split, steps.identify):
        step(plan)
    for method in METHODS:
        for stage in range(2):
            job = Job(method, 0, "same_stage", stage)
            remember_trained(plan.workspace, train_stage(plan.config, plan.workspace, job))
    return root


def crown(root: Path, method: str) -> None:
    """Make a method's newest model the champion."""
    job = max((job for job in trained_jobs(Workspace(root)) if job.method == method), key=lambda job: job.stage)
    write_json(root / "champion.json", {"schema": 1, "job": asdict(job), "key": "", "digest": "", "since": ""})
