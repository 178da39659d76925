"""A workspace small enough to train on in seconds, whose right answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.generative import GenerativeModel
from stages.commit import checkpoint_folder, lineage_jobs, method_of
from stages.config import Config
from stages.dataset import load_dataset
from stages.jobs import Job
from stages.methods.contract import Past
from stages.past import past_of
from stages.search_examples import query_vocabulary
from stages.train import bare_model, train_stage
from stages.workspace import Workspace, sha256_file, write_json

ITEMS, LEVELS, CODES = 16, 3, 4
"""16 items as 4 × 4 pairs of codes, and a last code that is always 0."""


def config(**changes: Mapping[str, Any]) -> Config:
    """Settings of a model with about 20,000 weights; keyword arguments replace fields of a table."""
    tables: dict[str, Any] = {
        "backbone": {
            "hidden": 32,
            "layers": 2,
            "heads": 2,
            "feed_forward": 64,
            "dropout": 0.0,
            "precision": "float32",  # whatever the processor multiplies natively
        },
        "adapter": {"rank": 4, "alpha": 8},
        "training": {
            "batch_size": 16,
            "first_epochs": 10,
            "epochs": 10,
            "first_learning_rate": 1e-2,
            "learning_rate": 1e-2,
            "full_learning_rate": 3e-3,
            "patience": 10,
        },
        "evaluation": {"beam": 20, "k": 20, "matrix_users": 0, "bootstrap": 100},
        "items": {"levels": LEVELS, "codes_per_level": CODES},
    }
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values}
    return Config.model_validate({"name": "tiny", "workspace": "unused", "log": _log(), **tables})


def _log() -> dict[str, Any]:
    return {"kind": "sequences", "sequences": "unused.txt"}


def checkerboard(root: Path, stages: int = 3, users: int = 24, length: int = 9) -> Workspace:
    """Every user walks the ring of items; the direction turns at every stage boundary (+1, -1, +1, …).

    Users are new at each stage, so what a stage teaches is its direction and nothing else.
    """
    workspace = Workspace(root)
    workspace.claim("tiny")
    for stage in range(stages):
        step = 1 if stage % 2 == 0 else -1
        rows = [
            (f"s{stage}u{user:03d}", f"i{(user + step * place) % ITEMS:02d}")
            for user in range(users)
            for place in range(length)
        ]
        write_stage(workspace, stage, rows)
    write_stage_manifest(workspace, stages)
    write_catalogue(workspace)
    return workspace


def write_stage(workspace: Workspace, stage: int, rows: list[tuple[str, str]]) -> None:
    """One stage's events without a clock."""
    frame = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String}, orient="row").with_columns(
        timestamp=pl.lit(None, pl.Datetime("us", "UTC")),
        event=pl.lit("recommendation"),
        query=pl.lit(None, pl.String),
    )
    path = workspace.stage_file(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)


def write_stage_manifest(workspace: Workspace, stages: int, tag: str = "") -> None:
    """Digests by name; `tag` changes that of the last stage."""
    digests = [{"digest": f"stage {stage}{tag if stage == stages - 1 else ''}"} for stage in range(stages)]
    write_json(workspace.stages / "manifest.json", {"stages": digests})


def write_catalogue(workspace: Workspace) -> None:
    """All items known from stage 0 on, each with codes of its own."""
    codes = [[item // CODES, item % CODES, 0] for item in range(ITEMS)]
    workspace.catalogue.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {
            "item_id": [f"i{item:02d}" for item in range(ITEMS)],
            "title": [f"Item {item}" for item in range(ITEMS)],
            "first_stage": np.zeros(ITEMS, dtype=np.int64),
            "codes": codes,
        }
    ).write_parquet(workspace.catalogue / "items.parquet")
    digest = sha256_file(workspace.catalogue / "items.parquet")
    manifest = {"codes_per_level": [CODES, CODES, 1], "source": "fitted", "digest": digest}
    write_json(workspace.catalogue / "manifest.json", manifest)


def job(method: str, stage: int, seed: int = 0) -> Job:
    """A same-stage job."""
    return Job(method, seed, "same_stage", stage)


def folder(config: Config, workspace: Workspace, own: Job) -> Path:
    """Where its checkpoint is."""
    return checkpoint_folder(config, workspace, load_dataset(config, workspace), own)


def at_start(config: Config, workspace: Workspace, own: Job) -> tuple[GenerativeModel, Past]:
    """The model `own`'s last stage starts from, and what it may look back on."""
    dataset = load_dataset(config, workspace)
    model = bare_model(config, dataset, 0)
    lineage = [checkpoint_folder(config, workspace, dataset, part) for part in lineage_jobs(config, own)[:-1]]
    method_of(config, own.method).restore(model, lineage)
    return model, past_of(config, workspace, dataset, own, query_vocabulary(config, dataset))


def protecting(root: Path) -> Workspace:
    """A checkerboard with GEMS trained quickly through its three stages."""
    workspace = checkerboard(root)
    train_stage(config(training={"first_epochs": 2, "epochs": 2}), workspace, job("gems", 2))
    return workspace
