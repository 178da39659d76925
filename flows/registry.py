"""MLflow's copy of the decisions: a run each, and the registered model whose alias `champion` follows champion.json."""

from __future__ import annotations

from typing import Any

from flows import tracking
from flows.history import Entry
from stages.workspace import Workspace, digest_of

ALIAS = "champion"
SERVED = ("first", "promoted", "rebuilt", "rolled_back")
LONGEST = 5000
"""Characters MLflow keeps of a tag."""


def record_decision(workspace: Workspace, experiment: str, line: Entry) -> str:
    """Record one line of the history; the same line again changes nothing.

    Args:
        workspace: holds the store and the checkpoints.
        experiment: the config's name.
        line: of `history.jsonl`.

    Returns:
        The run's id.
    """
    client = tracking.MlflowClient(workspace.mlflow_uri)
    place = tracking.experiment_of(client, experiment, workspace.mlflow_artifacts)
    key = digest_of(line)[:32]
    found = client.search_runs([place], f'tags.`driftrec.key` = "{key}"', max_results=1)
    run = str(found[0].info.run_id) if found else _run(client, place, key, line)
    if line["decision"] in SERVED:
        _point(client, model_name(experiment), workspace, line["champion"], run)
    client.set_terminated(run)
    return run


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


def _point(client: tracking.MlflowClient, name: str, workspace: Workspace, champion: dict[str, Any], run: str) -> None:
    """Register the champion's checkpoint where it is not yet, and move the alias to it."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="The model in service; champion.json is the truth.")
    versions = client.search_model_versions(f"name = '{name}'")
    known = [version for version in versions if version.tags.get("digest") == champion["digest"]]
    if known:
        version = known[0].version
    else:
        source = (workspace.checkpoints / champion["key"]).resolve().as_uri()
        tags = {"digest": champion["digest"], "checkpoint": champion["key"]}
        tags |= {field: str(value) for field, value in champion["job"].items()}
        version = client.create_model_version(name, source, run_id=run, tags=tags).version
    client.set_registered_model_alias(name, ALIAS, str(version))
