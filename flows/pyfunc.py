"""The model in service as an MLflow model, for `mlflow models serve` and everything else that loads one.

The second module that imports mlflow: MLflow copies this file into the model and runs it to load one (models from
code, so that nothing is pickled), which it cannot do with `flows.tracking`. Beside it lie the sources it imports and
the part of the workspace that answering needs, each file checked against its digest when it is loaded.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import save_model
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from flows.experiment import remembered_config
from flows.promotion.champion import FILE, Champion
from flows.recommending import models_in_service
from flows.serving.searching import Past, Ranking
from flows.serving.served import FALLBACK, Served, load_served
from stages.checkpoint import MANIFEST, tensors_digest
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.jobs import BASELINES
from stages.lineage import LEFT_OUT
from stages.stage_files import write_together
from stages.stored import stored
from stages.train import folders_read
from stages.waiting import QUARANTINE
from stages.workspace import Workspace, forget, sha256_file, temporary_beside, write_json

WORKSPACE = "workspace"
"""Name of the artifact."""
PACKAGES = ("flows", "models", "regularizers", "stages")
REQUIREMENTS = (
    "fastapi",
    "mlflow",
    "numpy",
    "peft",
    "polars",
    "pydantic",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "threadpoolctl",
    "torch",
    "transformers",
)
"""What answering imports. driftrec itself lies in the model: its name on a package index may be anybody's."""
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, "user", required=False),
            ColSpec(Array(DataType.string), "history", required=False),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(Array(DataType.string), "item_ids"),
            ColSpec(Array(DataType.string), "titles"),
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(DataType.string, "method"),
        ]
    ),
    params=ParamSchema([ParamSpec("k", DataType.long, 10)]),
)


RUN_BY_MLFLOW = "code_model_"
"""How MLflow names the module that it makes of this file."""


class RecommenderModel(PythonModel):
    """Rows of a user or a history in, rows of ranked items out."""

    def load_context(self, context: Any) -> None:
        """Load the workspace that lies in the model."""
        self.served = load_served(Path(context.artifacts[WORKSPACE]))

    # A frame is the one annotation from which MLflow derives no signature of its own, without our `params`.
    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """One row of the output for each row of the input.

        Args:
            context: MLflow's; the model is loaded already.
            model_input: frame with the columns `user` (string) or `history` (list of item ids), or both.
            params: `k`, the length of the lists.

        Raises:
            UserError: k is not what the model can give, or a row names neither user nor history.
        """
        k = int((params or {}).get("k", 10))
        if not 1 <= k <= self.served.limit:
            raise UserError(f"k {k}: give a number from 1 to {self.served.limit}")
        rows = [{key: _present(value) for key, value in row.items()} for row in model_input.to_dict("records")]
        return pandas.DataFrame(answers(self.served, rows, k))


def answers(served: Served, rows: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """What `predict` returns, a row at a time; rows that the model can answer are ranked together.

    Raises:
        UserError: a row names neither user nor history.
    """
    if any(row.get("user") is None and row.get("history") is None for row in rows):
        raise UserError("a row names neither user nor history; give one of them")
    pasts = [served.past(row.get("user"), row.get("history")) for row in rows]
    known = [past for past in pasts if past.reason is None]
    rankings = iter(served.rank(known, k) if known else [])
    return [_answer(served, past, served.fallback(k) if past.reason is not None else next(rankings)) for past in pasts]


def _answer(served: Served, past: Past, ranking: Ranking) -> dict[str, Any]:
    catalogue = served.dataset.catalogue
    return {
        "item_ids": [catalogue.item_ids[number] for number, _ in ranking],
        "titles": [catalogue.titles[number] for number, _ in ranking],
        "scores": [score for _, score in ranking],
        "method": served.job.method if past.reason is None else FALLBACK,
    }


def _present(value: Any) -> Any:
    """A cell's value; None where pandas has nothing."""
    if value is None or isinstance(value, float):  # NaN stands for nothing
        return None
    return value if isinstance(value, str) else [str(item) for item in value]


def export_model(root: Path, folder: Path, method: str | None = None, seed: int | None = None) -> Path:
    """Write the model in service, or the one asked for, as an MLflow model that needs no workspace.

    It holds the log's histories: whoever has the model can ask for any user of the log.

    Args:
        root: workspace.
        folder: of the model; must not exist.
        method: absent: the champion, or the best of the newest report.
        seed: of the method.

    Returns:
        The folder.

    Raises:
        UserError: nothing is trained, or the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder for the model")
    place = temporary_beside(folder)
    place.mkdir(mode=0o700, parents=True)
    try:
        part = place / WORKSPACE
        _copy_part(root, part, method, seed)
        load_served(part)  # a model that cannot be loaded is not written
        sources = [place / name for name in PACKAGES]
        for source in sources:
            shutil.copytree(
                Path(__file__).parents[1] / source.name, source, ignore=shutil.ignore_patterns("__pycache__")
            )
        _save(folder, part, sources)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        forget(place)
    return folder


def _save(folder: Path, part: Path, sources: Sequence[Path]) -> None:
    before = set(sys.modules)
    with warnings.catch_warnings():
        # MLflow would have an example beside our signature.
        warnings.filterwarnings("ignore", message=".*(type hint|input example)")
        save_model(
            path=str(folder),
            python_model=str(Path(__file__).resolve()),
            artifacts={WORKSPACE: str(part)},
            code_paths=[str(source) for source in sources],
            signature=SIGNATURE,
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    for name in set(sys.modules) - before:
        if name.startswith(RUN_BY_MLFLOW):
            del sys.modules[name]  # MLflow runs this file to look at the model, and keeps each run for ever


def _copy_part(root: Path, part: Path, method: str | None, seed: int | None) -> None:
    """The files that answering reads: config, stages, catalogue and the checkpoints of one model, named as champion."""
    config, workspace = remembered_config(root, answering=True)
    dataset = load_dataset(config, workspace)
    chosen = models_in_service(workspace, method, seed)[0]  # nothing stands in for it: it is registered as the champion
    job = chosen.job
    found = None if job.method in BASELINES else stored(config, workspace, dataset, job, chosen.pin)
    folders = [] if found is None else found.folders
    needed = [] if found is None else folders_read(found.config, job, folders)
    for folder in [workspace.catalogue, *needed]:
        shutil.copytree(folder, part / folder.relative_to(workspace.root), ignore=shutil.ignore_patterns(QUARANTINE))
    write_together(workspace, Workspace(part).stages)
    elsewhere = {folder.name: tensors_digest(folder) for folder in folders if folder not in needed}
    if elsewhere:
        write_json(Workspace(part).checkpoints / LEFT_OUT, elsewhere)
    for name in ("workspace.json", "config.json"):
        shutil.copy2(workspace.root / name, part / name)
    digest = sha256_file(folders[-1] / MANIFEST) if folders else ""
    champion = Champion(job, folders[-1].name if folders else "", digest, "", found and found.tensors)
    write_json(part / FILE, champion.as_json())


set_model(RecommenderModel())
