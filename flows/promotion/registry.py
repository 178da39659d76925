"""MLflow's copy of the decisions: a run each, and the registered model whose alias `champion` follows champion.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flows import tracking
from flows.promotion.champion import Champion, in_service
from flows.promotion.history import Entry, read_history
from stages.workspace import Workspace, digest_of

ALIAS = "champion"
SERVED = ("first", "promoted", "rebuilt", "rolled_back")
LONGEST = 5000
"""Characters MLflow keeps of a tag."""


def record_decisions(workspace: Workspace, experiment: str) -> None:
    """Record every line of the history that MLflow does not have, and point the alias at the champion.

    Args:
        workspace: holds history, champion and checkpoints.
        experiment: the config's name.
    """
    client = tracking.MlflowClient(tracking.store(workspace))
    own = tracking.store(workspace) == workspace.mlflow_uri
    place = tracking.experiment_of(client, experiment, workspace.mlflow_artifacts if own else None)
    known = {run.data.tags.get("driftrec.key"): str(run.info.run_id) for run in _decisions(client, place)}
    runs: dict[str, str] = {}
    for line in read_history(workspace)[0]:
        key = digest_of(line)[:32]
        run = known.get(key) or _run(client, place, key, line)
        if line["decision"] in SERVED:
            runs[line["champion"]["digest"]] = run
    present = in_service(workspace)
    if present is not None and present.digest in runs:
        _point(client, model_name(experiment), workspace, present, runs[present.digest])


def _decisions(client: tracking.MlflowClient, place: str) -> Iterator[Any]:
    """Every run of a decision, page by page."""
    token: str | None = None
    while token != "":
        page = client.search_runs([place], 'tags.role = "decision"', page_token=token)
        yield from page
        token = page.token or ""


def model_name(experiment: str) -> str:
    """Name of the registered model."""
    return f"driftrec-{experiment}"


def _run(client: tracking.MlflowClient, place: str, key: str, line: Entry) -> str:
    tags = {"role": "decision", "decision": line["decision"], "reason": line["why"][:LONGEST], "driftrec.key": key}
    tags |= {"decided_at": line["at"], "stage": str(line["stage"]), **tracking.flow_run_tags()}
    for side in ("challenger", "champion"):
        if line.get(side):
            tags |= {side: line[side]["key"], f"{side}.method": line[side]["job"]["method"]}
    name = f"{line['decision']} at stage {line['stage']}"
    run = client.create_run(place, run_name=name, tags=tags)
    client.log_batch(run.info.run_id, metrics=[_metric(line["stage"], *pair) for pair in _numbers(line).items()])
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


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
    """Register the champion's checkpoint where it is not yet, and move the alias to it."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="The model in service; champion.json is the truth.")
    versions = client.search_model_versions(f"name = '{name}'")
    found = next((version for version in versions if version.tags.get("digest") == champion.digest), None)
    if found is None:
        source = (workspace.checkpoints / champion.key).resolve().as_uri()
        tags = {"digest": champion.digest, "checkpoint": champion.key}
        tags |= {field: str(value) for field, value in asdict(champion.job).items()}
        found = client.create_model_version(name, source, run_id=run, tags=tags)
    if client.get_registered_model(name).aliases.get(ALIAS) != str(found.version):
        client.set_registered_model_alias(name, ALIAS, str(found.version))
