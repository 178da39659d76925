"""MLflow's copy of the decisions: a run each, and the registered model whose alias `champion` follows champion.json.

A registered version is the whole model, as `driftrec export-model` writes it: models from code, no pickle.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flows import tracking
from flows.exporting import export_model
from flows.promotion.champion import Champion, in_service
from flows.promotion.history import Entry, read_history
from stages.workspace import Workspace, digest_of, temporary_beside

ALIAS = "champion"
SERVED = ("first", "promoted", "rebuilt", "rolled_back")
MODEL = "model"
"""Name of the model below its run's files."""
FORM = "pyfunc"
LONGEST = 5000
"""Characters MLflow keeps of a tag."""


def record_decisions(workspace: Workspace, experiment: str) -> None:
    """Record every line of the history that MLflow does not have, and point the alias at the champion.

    Lines are recorded oldest first, so the newest one that MLflow has stands for all before it.

    Args:
        workspace: holds history, champion and checkpoints.
        experiment: the config's name.
    """
    client = tracking.MlflowClient(tracking.store(workspace))
    own = tracking.store(workspace) == workspace.mlflow_uri
    place = tracking.experiment_of(client, experiment, workspace.mlflow_artifacts if own else None)
    lines = read_history(workspace)[0]
    missing = list(takewhile(lambda line: not _is_whole(_found(client, place, line)), reversed(lines)))
    for line in reversed(missing):
        _record(client, place, line)
    present = in_service(workspace)
    rise = next((line for line in reversed(lines) if present is not None and _puts(line, present)), None)
    run = None if rise is None else _found(client, place, rise)
    if present is not None and run is not None:
        _point(client, model_name(experiment), workspace, present, run.info.run_id)


@dataclass(frozen=True)
class OldVersion:
    """A registered version that is not in service.

    Attributes:
        number: MLflow's.
        files: where its model lies; a folder that may be gone.
    """

    number: str
    files: Path


def old_versions(workspace: Workspace, experiment: str, keep: int) -> list[OldVersion]:
    """Registered versions besides the one in service and the `keep` newest, oldest first; reads only.

    Only of a store whose files lie in the workspace: a server that the user named keeps house itself.
    """
    if tracking.store(workspace) != workspace.mlflow_uri or not (workspace.root / "mlflow.db").exists():
        return []
    client, name = tracking.MlflowClient(workspace.mlflow_uri), model_name(experiment)
    found = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))
    if not found:
        return []
    served = client.get_registered_model(name).aliases.get(ALIAS)
    others = [version for version in found[: max(0, len(found) - keep)] if str(version.version) != str(served)]
    old = [OldVersion(str(version.version), _files(client, str(version.run_id))) for version in others]
    # In a workspace that was copied the earlier versions' files are the first one's.
    return [version for version in old if version.files.is_relative_to(workspace.mlflow_artifacts.resolve())]


def forget_version(workspace: Workspace, experiment: str, version: OldVersion) -> None:
    """Take a version out of the registry, before its files go: the registry never names files that are not there."""
    tracking.MlflowClient(workspace.mlflow_uri).delete_model_version(model_name(experiment), version.number)


def _files(client: tracking.MlflowClient, run: str) -> Path:
    return Path(url2pathname(urlsplit(str(client.get_run(run).info.artifact_uri)).path)) / MODEL


def _puts(line: Entry, champion: Champion) -> bool:
    """Whether this decision put the champion's very tensors into service."""
    return line["decision"] in SERVED and line["champion"]["digest"] == champion.digest


def _key(line: Entry) -> str:
    return digest_of(line)[:32]


def _found(client: tracking.MlflowClient, place: str, line: Entry) -> tracking.Run | None:
    """MLflow's run of a decision, if it has one."""
    runs = client.search_runs([place], f'tags."driftrec.key" = "{_key(line)}"', max_results=1)
    return runs[0] if runs else None


def _is_whole(run: tracking.Run | None) -> bool:
    """Whether a decision was recorded to its end: a run that a kill left open lacks numbers."""
    return run is not None and run.info.status == "FINISHED"


def model_name(experiment: str) -> str:
    """Name of the registered model."""
    return f"driftrec-{experiment}"


def _record(client: tracking.MlflowClient, place: str, line: Entry) -> None:
    tags = {
        "role": "decision",
        "decision": line["decision"],
        "reason": line["why"][:LONGEST],
        "driftrec.key": _key(line),
    }
    tags |= {"decided_at": line["at"], "stage": str(line["stage"]), **tracking.flow_run_tags()}
    for side in ("challenger", "champion"):
        if line.get(side):
            tags |= {side: line[side]["key"], f"{side}.method": line[side]["job"]["method"]}
    name = f"{line['decision']} at stage {line['stage']}"
    run = _found(client, place, line) or client.create_run(place, run_name=name, tags=tags)
    lacking = {key: value for key, value in _numbers(line).items() if key not in run.data.metrics}
    client.log_batch(run.info.run_id, metrics=[_metric(line["stage"], *pair) for pair in lacking.items()])
    client.set_terminated(run.info.run_id)


def _metric(stage: int, name: str, value: float) -> Any:
    return tracking.Metric(name, float(value), 0, stage)


def _numbers(line: Entry) -> dict[str, float]:
    """`gate/…`: the difference that decided, by slice, and how the challenger answered."""
    found: dict[str, float | None] = {}
    for part, values in (line.get("differences") or {}).items():
        place = "" if part == "all" else f"/{part}"
        found |= {f"gate/{field}{place}": values[field] for field in ("value", "low", "high", "challenger", "champion")}
    for name, value in (line.get("probe") or {}).items():
        found[f"probe/{name}"] = value
    return {name: value for name, value in found.items() if value is not None}


def _point(client: tracking.MlflowClient, name: str, workspace: Workspace, champion: Champion, run: str) -> None:
    """Register the model in service where it is not yet, and move the alias to it."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="The model in service; champion.json is the truth.")
    versions = client.search_model_versions(f"name = '{name}' and tags.digest = '{champion.digest}'")
    found = next((version for version in versions if _holds(version.tags, champion)), None)
    if found is None:
        _log_model(client, workspace, run)
        tags = {"digest": champion.digest, "checkpoint": champion.key, "form": FORM}
        tags |= {field: str(value) for field, value in asdict(champion.job).items()}
        found = client.create_model_version(name, f"runs:/{run}/{MODEL}", run_id=run, tags=tags)
    if client.get_registered_model(name).aliases.get(ALIAS) != str(found.version):
        client.set_registered_model_alias(name, ALIAS, str(found.version))


def _holds(tags: Mapping[str, str], champion: Champion) -> bool:
    """Whether a version is this champion, and can be loaded: earlier releases registered the checkpoint alone."""
    return (tags.get("digest"), tags.get("form")) == (champion.digest, FORM)


def _log_model(client: tracking.MlflowClient, workspace: Workspace, run: str) -> None:
    """Write the model in service into the run that put it there; repeated after a kill, the same files come again."""
    place = temporary_beside(workspace.root / MODEL)
    try:
        client.log_artifacts(run, str(export_model(workspace.root, place / MODEL)), artifact_path=MODEL)
    finally:
        shutil.rmtree(place, ignore_errors=True)
