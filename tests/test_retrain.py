"""Four nights: what they decide, record and keep."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from benchmarks.growing import listing, seconds, week, write_rows
from flows import experiment, retraining, steps
from flows.promotion import champion, registry
from flows.promotion.history import read_history
from flows.upkeep import gc
from stages.config import load_config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.jobs import Job
from stages.space import expected_bytes, exported_bytes
from stages.split import load_stages
from stages.workspace import read_json
from tests.nights import FourNights, ShopCopy


def test_the_first_run_cuts_the_log_and_puts_a_first_model_into_service(
    four_nights: FourNights,
) -> None:
    _, workspace, said = four_nights
    first = read_history(workspace)[0][0]
    assert (first["decision"], first["stage"]) == ("first", 1)
    assert "there is no champion to compare with" in said[0]
    assert set(first["scores"]) == {
        f"{name} after stage 1" for name in ("single", "popularity", "recent_popularity", "item_graph")
    }


def test_a_night_without_a_closed_stage_decides_nothing(four_nights: FourNights) -> None:
    assert "0 new" in four_nights[2][1]
    assert "nothing to decide" in four_nights[2][1]


def test_an_open_gate_lets_the_challenger_in_and_a_shut_one_keeps_the_champion(
    four_nights: FourNights,
) -> None:
    _, workspace, said = four_nights
    lines = read_history(workspace)[0]
    assert [(line["decision"], line["stage"]) for line in lines] == [("first", 1), ("promoted", 2), ("kept", 3)]
    assert "goes into service: hit_at_10" in said[2]
    assert "single after stage 2 stays in service, single after stage 3 does not replace it" in said[3]
    assert champion.champion(workspace) == Job("single", 0, "same_stage", 2)
    assert lines[2]["champion"] == read_json(workspace.root / "champion.json")
    assert lines[1]["differences"]["all"]["users"] == 40
    assert lines[1]["probe"]["invalid_rate"] == 0


def test_nobody_is_tested_on_what_trained_it(four_nights: FourNights) -> None:
    from stages.queries import same_stage_tests, training_targets

    config, workspace, _ = four_nights
    events = load_dataset(load_config(config), workspace).interactions
    trained = training_targets(events, range(3), "same_stage", 0)
    tests = same_stage_tests(events, 2)
    assert len(tests) == 40
    assert not any(trained[cut:end].any() for cut, end in zip(tests.cut, tests.end, strict=True))


def test_a_repeated_run_decides_nothing_twice(four_nights: FourNights) -> None:
    from flows.retrain import retrain

    config, workspace, _ = four_nights
    kept = ("stages", "open", "catalogue", "history.jsonl", "champion.json", "runs")
    before = {name: digest for name, digest in listing(workspace.root).items() if name.startswith(kept)}
    assert "nothing to decide" in retrain(str(config), workspace=str(workspace.root))
    assert {name: digest for name, digest in listing(workspace.root).items() if name.startswith(kept)} == before


def test_mlflow_and_prefect_show_every_decision(four_nights: FourNights) -> None:
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client

    _, workspace, _ = four_nights
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
    assert version.run_id == promoted.info.run_id
    registry.record_decisions(workspace, "growing")
    assert len(client.search_runs([place.experiment_id], "tags.role = 'decision'")) == 3
    assert len(client.search_model_versions("name = 'driftrec-growing'")) == 2
    with get_client(sync_client=True) as prefect:
        shown = [str(artifact.data) for artifact in prefect.read_artifacts() if artifact.key == "decision"]
    assert any("goes into service" in text for text in shown)


def test_the_registered_champion_is_a_model_that_loads_and_recommends(
    four_nights: FourNights, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc
    import pandas
    from mlflow import MlflowClient

    from flows.recommending import recommend

    _, workspace, _ = four_nights
    monkeypatch.setenv("MLFLOW_TRACKING_URI", workspace.mlflow_uri)
    loaded = mlflow.pyfunc.load_model("models:/driftrec-growing@champion")
    found = loaded.predict(pandas.DataFrame({"user": ["u03"]}), params={"k": 5})
    plain = recommend(workspace.root, user="u03", k=5)
    assert found["item_ids"][0] == [row[0] for row in plain.rows]
    assert found["method"][0] == plain.job.method == "single"
    client = MlflowClient(workspace.mlflow_uri)
    run = client.get_run(client.get_model_version_by_alias("driftrec-growing", "champion").run_id)
    folder = Path(unquote(urlsplit(run.info.artifact_uri).path)) / "model"
    assert read_json(folder / "artifacts" / "workspace" / "champion.json")["job"]["stage"] == 2
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert not list(workspace.root.glob(".tmp-*"))


def test_compare_uses_grown_stages_as_they_are(four_nights: FourNights) -> None:
    from flows import steps

    config, workspace, _ = four_nights
    before = load_stages(workspace)
    plan = steps.draft_plan(config, workspace.root, ["single"], [0])
    steps.read(plan)
    assert steps.split(plan).count == 4
    assert load_stages(workspace) == before
    assert (experiment.read_json(workspace.root / "config.json").get("log_digest")) is not None


def test_the_expected_size_of_an_exported_model_is_its_size(four_nights: FourNights, tmp_path: Path) -> None:
    from flows.exporting import export_model

    _, workspace, _ = four_nights
    config, _ = experiment.remembered_config(workspace.root)
    served = champion.champion(workspace)
    assert served is not None
    expected = exported_bytes(config, workspace, load_dataset(config, workspace), served)
    part = export_model(workspace.root, tmp_path / "model") / "artifacts" / "workspace"
    size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    assert 0.7 * size < expected < 1.3 * size


def test_a_retraining_that_has_no_room_is_refused_before_it_trains(
    own_nights: ShopCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workspace = own_nights
    write_rows(config.parent / "events" / "later.csv", [*week(4), *week(5), ("u00", "i01", seconds(42))])
    plan = steps.claimed(retraining.retrain_plan(config, workspace.root))
    retraining.take(plan)
    due = [Job("single", 0, "same_stage", stage) for stage in (4, 5)]
    assert retraining.awaited(plan) == due
    steps.give_ids(plan)
    dataset, settings = load_dataset(plan.config, workspace), plan.config
    size = expected_bytes(settings, workspace, dataset, due)
    assert size > expected_bytes(settings, workspace, dataset, due[:1]) > 0
    size += sum(exported_bytes(settings, workspace, dataset, job) for job in due)
    before = listing(workspace.checkpoints)
    free = shutil.disk_usage(workspace.root)
    for room in (2 * size - 1, 2 * size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, room=room: free._replace(free=room))
        if room < 2 * size:
            with pytest.raises(UserError, match="free some space"):
                retraining.grow(plan)
        else:
            retraining.grow(plan)
    assert listing(workspace.checkpoints) == before


def test_decisions_that_mlflow_missed_are_recorded_once_when_it_is_back(
    four_nights: FourNights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    from flows.retraining import mirrored

    _, workspace, _ = four_nights
    last = read_history(workspace)[0][-1]

    def down(*_: object) -> None:
        raise OSError("nobody answers")

    with monkeypatch.context() as patched:
        patched.setattr(registry, "record_decisions", down)
        mirrored(workspace, "missed", last)
    assert "MLflow does not have the decision on stage 3 (nobody answers)" in caplog.text
    for _ in range(2):
        mirrored(workspace, "missed", last)
    client = MlflowClient(workspace.mlflow_uri)
    place = client.get_experiment_by_name("missed")
    assert place is not None
    runs = client.search_runs([place.experiment_id])
    assert sorted(run.data.tags["decision"] for run in runs) == ["first", "kept", "promoted"]
    (version,) = client.search_model_versions("name = 'driftrec-missed'")
    assert (version.tags["stage"], version.tags["form"]) == ("2", "pyfunc")


def test_gc_takes_models_out_of_the_registry_but_never_the_one_in_service(
    own_nights: ShopCopy, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    config, workspace = own_nights
    (workspace.root / "mlflow.db").unlink()  # its files lie in the shop that this is a copy of
    registry.record_decisions(workspace, "growing")
    assert registry.old_versions(workspace, "growing", keep=1) == []
    champion.roll_back(load_config(config), workspace)
    registry.record_decisions(workspace, "growing")
    (old,) = registry.old_versions(workspace, "growing", keep=1)
    assert registry.old_versions(workspace, "growing", keep=2) == []
    assert old.number == "1"
    assert (old.files / "MLmodel").exists()
    gc(workspace.root, dry_run=True, keep=1, forget_report=False)
    assert "version 1 in MLflow, no longer in service" in capsys.readouterr().out
    assert registry.old_versions(workspace, "growing", keep=1) == [old]
    assert (old.files / "MLmodel").exists()
    gc(workspace.root, dry_run=False, keep=1, forget_report=False)
    client, name = MlflowClient(workspace.mlflow_uri), registry.model_name("growing")
    served = client.get_model_version_by_alias(name, registry.ALIAS)
    assert [str(version.version) for version in client.search_model_versions(f"name = '{name}'")] == ["2"]
    assert str(served.version) == "2"
    assert not old.files.exists()
