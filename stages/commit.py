"""Which checkpoint a job's stage commits: a key over everything its bytes depend on, and so its folder's name.

A committed key is never trained again, which makes a repeated command, a retried task and a second method that shares
stage 0 all the same thing: a look-up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from stages.config import Config
from stages.dataset import Dataset
from stages.jobs import Job
from stages.methods import build_method
from stages.methods.contract import Method
from stages.methods.first import FirstStage
from stages.workspace import Workspace, digest_of, sha256_file

CODE_VERSION = 1
"""Raised whenever training would give other bytes for the same settings and data."""

FIRST = "first"
"""The method name of stage 0, which all methods share."""


def method_of(config: Config, name: str) -> Method:
    """The method called `name` in this config; `first` is the common stage 0."""
    if name == FIRST:
        return FirstStage(config.adapter)
    return build_method(config.method(name), config.adapter, config.training.token_rows == "evolve")


def lineage_jobs(config: Config, job: Job) -> list[Job]:
    """The jobs whose checkpoints make up `job`'s model, stage 0 first."""
    first = replace(job, method=FIRST, stage=0)
    if job.method == FIRST or method_of(config, job.method).data == "none":
        return [first]
    return [first, *(replace(job, stage=stage) for stage in range(1, job.stage + 1))]


def commit_key(config: Config, dataset: Dataset, job: Job) -> str:
    """SHA-256 over code version, model, training, data and the parent's key.

    Args:
        config: the experiment.
        dataset: its prepared log.
        job: last stage of a lineage, as `lineage_jobs` names it.
    """
    lineage = lineage_jobs(config, job)
    last = lineage[-1]
    parent = commit_key(config, dataset, lineage[-2]) if len(lineage) > 1 else None
    settings = None if last.method == FIRST else config.method(last.method).model_dump()
    return digest_of(
        {
            "code": CODE_VERSION,
            "method": settings,
            "seed": last.seed,
            "protocol": last.protocol,
            "baskets": config.evaluation.baskets,
            "data": dataset.digest(last.stage),
            "backbone": config.backbone.model_dump(exclude={"device"}),
            "weights": _weights_digest(config.backbone.path),
            "adapter": config.adapter.model_dump(),
            "training": config.training.model_dump(),
            "parent": parent,
        }
    )


def checkpoint_folder(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> Path:
    """Where the last checkpoint of `job`'s lineage lives once it is committed."""
    last = lineage_jobs(config, job)[-1]
    name = f"{last.protocol}-{last.method}-seed{last.seed}-stage{last.stage:02d}"
    return workspace.checkpoints / f"{name}-{commit_key(config, dataset, last)[:16]}"


def _weights_digest(path: str | None) -> str | None:
    """Hash of a local backbone's weight files; a hub id is named by itself."""
    if path is None or not Path(path).is_dir():
        return path
    files = sorted(Path(path).glob("*.safetensors"))
    return digest_of({file.name: _file_digest(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files})


@cache
def _file_digest(path: Path, changed: int, size: int) -> str:
    """Hashed once for each time and size a file was seen with: weights are large and every key asks for them."""
    return sha256_file(path)
