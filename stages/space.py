"""How much disk a run's checkpoints and exports will take, said before the first hour of training and not after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stages.checkpoint import MANIFEST
from stages.commit import FIRST, checkpoint_folders, lineage_jobs, method_of
from stages.config import Config
from stages.dataset import Dataset
from stages.jobs import Job
from stages.stage_files import stage_files
from stages.workspace import Workspace, need_space, read_json_once

WIDTH = 4
"""Bytes of a stored weight."""


def expected_bytes(config: Config, workspace: Workspace, dataset: Dataset, jobs: Iterable[Job]) -> int:
    """Bytes of all checkpoints that `jobs` will yet commit, each counted once; an upper bound for a local backbone.

    Args:
        config: the experiment.
        workspace: what lies there already needs no more room.
        dataset: its prepared log.
        jobs: models to be trained, each with its last stage.
    """
    places = {
        folder: part
        for job in jobs
        for part, folder in zip(
            lineage_jobs(config, job), checkpoint_folders(config, workspace, dataset, job), strict=True
        )
    }
    parts = [part for folder, part in places.items() if not (folder / MANIFEST).exists()]
    return _bytes(config, dataset, parts)


def exported_bytes(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> int:
    """Bytes of `job`'s model as MLflow gets it: stages, catalogue, and the checkpoints it is read from."""
    parts = lineage_jobs(config, job)
    ends = method_of(config, job.method).reads == "ends"
    read = dict.fromkeys([parts[0], parts[-1]]) if ends else parts
    manifest = read_json_once(workspace.stages / "manifest.json")
    files = [*stage_files(workspace, manifest), *(path for path in workspace.catalogue.iterdir() if path.is_file())]
    return sum(file.stat().st_size for file in files) + _bytes(config, dataset, read)


def check_space(
    config: Config, workspace: Workspace, dataset: Dataset, jobs: Iterable[Job], exports: Iterable[Job] = ()
) -> int:
    """Refuse to begin where what the run will write would not fit twice; returns its expected bytes.

    Args:
        config: the experiment.
        workspace: where everything goes.
        dataset: its prepared log.
        jobs: models to be trained, each with its last stage.
        exports: models that may go into service; while one is written out it lies there twice.

    Raises:
        UserError: too little space.
    """
    size = expected_bytes(config, workspace, dataset, jobs)
    size += sum(exported_bytes(config, workspace, dataset, job) for job in exports)
    need_space(workspace.root, size)
    return size


def _bytes(config: Config, dataset: Dataset, parts: Iterable[Job]) -> int:
    """Of these checkpoints; an upper bound for a local backbone."""
    stack, adapter, rows = _weights(config, sum(dataset.catalogue.sizes))
    total = 0
    for part in parts:
        every_weight = method_of(config, part.method).every_weight
        whole = every_weight or (part.method == FIRST and config.backbone.path is None)
        total += WIDTH * ((stack if whole else 0) + (0 if every_weight else adapter) + rows)
    return total


def _weights(config: Config, codes: int) -> tuple[int, int, int]:
    """Numbers of weights: the stack's, an adapter's, the code rows' (input and output)."""
    own = config.backbone
    if own.path is not None:
        stored = sum(file.stat().st_size for file in Path(own.path).glob("*.safetensors"))
        # Two bytes a weight as hubs store them. An adapter of rank r on a d × d map has 2·r/d of its weights.
        stack = stored // 2
        return stack, stack // 8, 2 * codes * 4096
    d, f = own.hidden, own.feed_forward
    stack = own.layers * (4 * d * d + 3 * d * f + 2 * d) + d
    rank = config.adapter.rank
    shapes = {"gate_proj": d + f, "up_proj": d + f, "down_proj": d + f}
    adapter = own.layers * rank * sum(shapes.get(name, 2 * d) for name in config.adapter.targets)
    return stack, adapter, 2 * codes * d
