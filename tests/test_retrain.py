from __future__ import annotations

from pathlib import Path

import pytest

from flows import champion, crashed, experiment, registry
from flows.history import read_history
from stages.dataset import load_dataset
from stages.jobs import Job
from stages.split import load_stages
from stages.workspace import Workspace, read_json
from tests.growing import listing, seconds, week, write_rows, write_shop

OPEN_GATE = """
[retrain.gate]
minimum = -1
worst_slice = 1
users = 1
latency_ms = 60000
"""


@pytest.fixture(scope="module")
def shop(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workspace, list[str]]:
    """Config, workspace and what four nightly runs said: first, quiet, a stage let in, a stage turned away."""
    from flows.retrain import retrain

    folder = tmp_path_factory.mktemp("retrained")
    config, place = write_shop(folder, OPEN_GATE), folder / "workspace"

    def nightly() -> str:
        return retrain(str(config), workspace=str(place))

    said = [nightly(), nightly()]
    write_rows(folder / "events" / "week2.csv", week(2) + week(3)[:1])
    said.append(nightly())
    config.write_text(config.read_text().replace("minimum = -1", "minimum = 1"))
    write_rows(folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    said.append(nightly())
    return config, Workspace(place), said


def test_the_first_run_cuts_the_log_and_puts_a_first_model_into_service(
    shop: tuple[Path, Workspace, list[str]],
) -> None:
    _, workspace, said = shop
    first = read_history(workspace)[0][0]
    assert (first["decision"], first["stage"]) == ("first", 1)
    assert "there is no champion to compare with" in said[0]
    assert set(first["scores"]) == {
        f"{name} after stage 1" for name in ("single", "popularity", "recent_popularity", "item_graph")
    }


def test_a_night_without_a_closed_stage_decides_nothing(shop: tuple[Path, Workspace, list[str]]) -> None:
    assert "0 new" in shop[2][1]
    assert "nothing to decide" in shop[2][1]


def test_an_open_gate_lets_the_challenger_in_and_a_shut_one_keeps_the_champion(
    shop: tuple[Path, Workspace, list[str]],
) -> None:
    _, workspace, said = shop
    lines = read_history(workspace)[0]
    assert [(line["decision"], line["stage"]) for line in lines] == [("first", 1), ("promoted", 2), ("kept", 3)]
    assert "goes into service: hit_at_10" in said[2]
    assert "single after stage 2 stays in service, single after stage 3 does not replace it" in said[3]
    assert champion.champion(workspace) == Job("single", 0, "same_stage", 2)
    assert lines[2]["champion"] == read_json(workspace.root / "champion.json")
    assert lines[1]["differences"]["all"]["users"] == 40
    assert lines[1]["probe"]["invalid_rate"] == 0


def test_nobody_is_tested_on_what_trained_it(shop: tuple[Path, Workspace, list[str]]) -> None:
    from stages.config import load_config
    from stages.queries import same_stage_tests, training_targets

    config, workspace, _ = shop
    events = load_dataset(load_config(config), workspace).interactions
    trained = training_targets(events, range(3), "same_stage", 0)
    tests = same_stage_tests(events, 2)
    assert len(tests) == 40
    assert not any(trained[cut:end].any() for cut, end in zip(tests.cut, tests.end, strict=True))


def test_a_repeated_run_decides_nothing_twice(shop: tuple[Path, Workspace, list[str]]) -> None:
    from flows.retrain import retrain

    config, workspace, _ = shop
    kept = ("stages", "open", "catalogue", "history.jsonl", "champion.json", "runs")
    before = {name: digest for name, digest in listing(workspace.root).items() if name.startswith(kept)}
    assert "nothing to decide" in retrain(str(config), workspace=str(workspace.root))
    assert {name: digest for name, digest in listing(workspace.root).items() if name.startswith(kept)} == before


def test_mlflow_and_prefect_show_every_decision(shop: tuple[Path, Workspace, list[str]]) -> None:
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client

    _, workspace, _ = shop
    client = MlflowClient(workspace.mlflow_uri)
    place = client.get_experiment_by_name("growing")
    assert place is not None
    runs = client.search_runs([place.experiment_id], "tags.role = 'decision'", order_by=["tags.decided_at ASC"])
    assert sorted(run.data.tags["decision"] for run in runs) == ["first", "kept", "promoted"]
    promoted = next(run for run in runs if run.data.tags["decision"] == "promoted")
    assert "goes into service" in promoted.data.tags["reason"]
    assert promoted.data.metrics["probe/invalid_rate"] == 0
    assert "gate/low" in promoted.data.metrics
    version = client.get_model_version_by_alias(registry.model_name("growing"), registry.ALIAS)
    assert version.tags["checkpoint"] == read_json(workspace.root / "champion.json")["key"]
    registry.record_decision(workspace, "growing", read_history(workspace)[0][1])
    assert len(client.search_runs([place.experiment_id], "tags.role = 'decision'")) == 3
    with get_client(sync_client=True) as prefect:
        shown = [str(artifact.data) for artifact in prefect.read_artifacts() if artifact.key == "decision"]
    assert any("goes into service" in text for text in shown)


def test_compare_uses_grown_stages_as_they_are(shop: tuple[Path, Workspace, list[str]]) -> None:
    from flows import steps

    config, workspace, _ = shop
    before = load_stages(workspace)
    plan = steps.draft_plan(config, workspace.root, ["single"], [0])
    steps.read(plan)
    assert steps.split(plan).count == 4
    assert load_stages(workspace) == before
    assert (experiment.read_json(workspace.root / "config.json").get("log_digest")) is not None


def test_a_killed_flow_run_is_known_by_its_workspace(shop: tuple[Path, Workspace, list[str]]) -> None:
    _, workspace, _ = shop
    assert crashed.dead_runs(workspace) == []
