"""Which checkpoint a job's stage commits: a key over everything its bytes depend on, and so its folder's name.

A committed key is never trained again, which makes a repeated command, a retried task and a second method that shares
stage 0 all the same thing: a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.adapter import is_wide
from stages.config import Config
from stages.dataset import Dataset
from stages.jobs import Job
from stages.method_config import MethodConfig
from stages.methods import build_method
from stages.methods.contract import Method
from stages.methods.first import FirstStage
from stages.workspace import Workspace, digest_of, sha256_once

CODE_VERSION = 2
"""Raised whenever training would give other bytes for the same settings and data."""

METHOD_VERSIONS = {"gems": 4, "lora_moe": 2}
"""As `CODE_VERSION`, for one kind of method; 1 where none is named."""

LATER_ONLY = {"epochs", "learning_rate", "full_learning_rate", "token_rows"}
"""Training settings that stage 0 does not read."""

FIRST_ONLY = {"first_epochs", "first_learning_rate"}
"""Training settings that only stage 0 reads."""

BACKBONE_FILES = {".safetensors", ".json", ".model", ".txt"}
"""Endings of what a backbone's folder is loaded from: weights, settings, tokenizer."""

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
    return [first, *(Job(job.method, job.seed, job.protocol, stage) for stage in range(1, job.stage + 1))]


def commit_key(config: Config, dataset: Dataset, job: Job) -> str:
    """SHA-256 over code version, model, training, data and the parent's key.

    Args:
        config: the experiment.
        dataset: its prepared log.
        job: last stage of a lineage, as `lineage_jobs` names it.
    """
    return commit_keys(config, dataset, job)[-1]


def commit_keys(config: Config, dataset: Dataset, job: Job) -> list[str]:
    """The key of every checkpoint in `job`'s lineage, stage 0 first."""
    return [link.key for link in links(config, dataset, job)]


@dataclass(frozen=True)
class Link:
    """One checkpoint of a lineage: what its key is the digest of, and that key."""

    inputs: dict[str, Any]
    key: str


def links(config: Config, dataset: Dataset, job: Job) -> list[Link]:
    """What each checkpoint of `job`'s lineage depends on, stage 0 first: one pass, as each names the one before it."""
    common = _common(config, dataset, job)
    own: dict[str, dict[str, Any]] = {}
    for part in lineage_jobs(config, job):
        if part.method not in own:
            settings = None if part.method == FIRST else _method_settings(config.method(part.method))
            training = config.training.model_dump(exclude=_unread(config, part))
            more: dict[str, Any] = {"adapter_backward": "thin"} if _goes_back_thin(config, part) else {}
            if settings is not None and settings["method"] in METHOD_VERSIONS:
                more["method_code"] = METHOD_VERSIONS[settings["method"]]
            own[part.method] = {**common, "method": settings, "training": training, **more}
    name = digest_of(own)
    known, found = _known.get(name, []), []
    for number, part in enumerate(lineage_jobs(config, job)):
        data, parent = dataset.digest(part.stage), found[-1].key if found else None
        if number < len(known) and (known[number].inputs["data"], known[number].inputs["parent"]) == (data, parent):
            found.append(known[number])
        else:
            inputs = {**own[part.method], "data": data, "parent": parent}
            found.append(Link(inputs, digest_of(inputs)))
    _known[name] = found if len(found) >= len(known) else known
    return found


_known: dict[str, list[Link]] = {}
"""The longest lineage met of each settings: the next stage's begins with it, and hundreds of digests are slow."""


def _common(config: Config, dataset: Dataset, job: Job) -> dict[str, Any]:
    searching = {} if dataset.interactions.query is None else {"search": config.search.trained_with()}
    return {
        **searching,
        "code": CODE_VERSION,
        "seed": job.seed,
        "protocol": job.protocol,
        "baskets": config.evaluation.baskets,
        "backbone": config.backbone.model_dump(exclude={"path", "device"}),
        "weights": weights_digest(config.backbone.path),
        "adapter": config.adapter.model_dump(),
    }


def _goes_back_thin(config: Config, job: Job) -> bool:
    """Whether adapters may go back by thin products (`models.adapter`), which gives other bytes than earlier versions.

    Every pretrained backbone counts, wide or not; `small` where one of its layers is wide, but not its stage 0.
    """
    own = config.backbone
    if own.path is not None:
        return True
    return job.method != FIRST and is_wide(own.hidden, max(own.hidden, own.feed_forward))


def _unread(config: Config, job: Job) -> set[str]:
    """Training settings that `job`'s last stage does not read: a change of them gives the same bytes.

    A later stage names its parent's key, so what only stage 0 reads is part of every key all the same.
    """
    if job.method == FIRST:
        return LATER_ONLY
    every_weight = method_of(config, job.method).every_weight
    return {*FIRST_ONLY, "learning_rate" if every_weight else "full_learning_rate"}


def checkpoint_folder(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> Path:
    """Where the last checkpoint of `job`'s lineage lives once it is committed."""
    return checkpoint_folders(config, workspace, dataset, job)[-1]


def checkpoint_folders(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> list[Path]:
    """Where the checkpoints of `job`'s lineage live once they are committed, stage 0 first."""
    return folders_of(config, workspace, job, links(config, dataset, job))


def folders_of(config: Config, workspace: Workspace, job: Job, chain: Sequence[Link]) -> list[Path]:
    """`checkpoint_folders` where the lineage's `links` are known."""
    return [
        workspace.checkpoint(f"{part.protocol}-{part.method}-seed{part.seed}-stage{part.stage:02d}-{link.key[:16]}")
        for part, link in zip(lineage_jobs(config, job), chain, strict=True)
    ]


def _method_settings(settings: MethodConfig) -> dict[str, Any]:
    """The settings as they are, with a text corpus named by its contents and not by where it lies."""
    values = settings.model_dump()
    path = Path(str(values.get("corpus", "")))
    if path.is_file():
        values["corpus"] = sha256_once(path)
    return values


def weights_digest(path: str | None) -> str | None:
    """Hash of a local backbone's weights, settings and tokenizer, wherever the folder lies; a hub id names itself."""
    if path is None or not Path(path).is_dir():
        return path
    files = sorted(file for file in Path(path).iterdir() if file.suffix in BACKBONE_FILES)
    return digest_of({file.name: sha256_once(file) for file in files})
