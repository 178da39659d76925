from __future__ import annotations

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from benchmarks.growing import OPEN_GATE, listing, seconds, week, write_rows, write_shop
from flows import cli, crashed, experiment, retraining, steps
from flows.plain import run_plainly
from flows.promotion import champion, registry
from flows.promotion.history import read_history
from flows.upkeep import gc
from stages import contest
from stages.config import load_config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.jobs import Job
from stages.space import expected_bytes, exported_bytes
from stages.split import load_stages
from stages.workspace import Workspace, read_json

if TYPE_CHECKING:
    from conftest import Trained


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a+") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
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
    assert version.run_id == promoted.info.run_id
    registry.record_decisions(workspace, "growing")
    assert len(client.search_runs([place.experiment_id], "tags.role = 'decision'")) == 3
    assert len(client.search_model_versions("name = 'driftrec-growing'")) == 2
    with get_client(sync_client=True) as prefect:
        shown = [str(artifact.data) for artifact in prefect.read_artifacts() if artifact.key == "decision"]
    assert any("goes into service" in text for text in shown)


def test_the_registered_champion_is_a_model_that_loads_and_recommends(
    shop: tuple[Path, Workspace, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc
    import pandas
    from mlflow import MlflowClient

    from flows.recommending import recommend

    _, workspace, _ = shop
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


def test_compare_uses_grown_stages_as_they_are(shop: tuple[Path, Workspace, list[str]]) -> None:
    from flows import steps

    config, workspace, _ = shop
    before = load_stages(workspace)
    plan = steps.draft_plan(config, workspace.root, ["single"], [0])
    steps.read(plan)
    assert steps.split(plan).count == 4
    assert load_stages(workspace) == before
    assert (experiment.read_json(workspace.root / "config.json").get("log_digest")) is not None


def test_the_expected_size_of_an_exported_model_is_its_size(
    shop: tuple[Path, Workspace, list[str]], tmp_path: Path
) -> None:
    from flows.exporting import export_model

    _, workspace, _ = shop
    config, _ = experiment.remembered_config(workspace.root)
    served = champion.champion(workspace)
    assert served is not None
    expected = exported_bytes(config, workspace, load_dataset(config, workspace), served)
    part = export_model(workspace.root, tmp_path / "model") / "artifacts" / "workspace"
    size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    assert 0.7 * size < expected < 1.3 * size


def test_a_retraining_that_has_no_room_is_refused_before_it_trains(
    copy: tuple[Path, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workspace = copy
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
    shop: tuple[Path, Workspace, list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    from flows.retraining import mirrored

    _, workspace, _ = shop
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
    copy: tuple[Path, Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    config, workspace = copy
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


@pytest.fixture
def copy(shop: tuple[Path, Workspace, list[str]], tmp_path: Path) -> tuple[Path, Workspace]:
    """Config and workspace of a copy of the shop, to be changed."""
    config, workspace, _ = shop
    shutil.copytree(config.parent, tmp_path / "shop")
    return tmp_path / "shop" / config.name, Workspace(tmp_path / "shop" / workspace.root.name)


def driftrec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output, error output."""
    monkeypatch.setattr(sys, "argv", ["driftrec", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), " ".join(captured.out.split()), captured.err


def test_a_dry_run_changes_no_file_and_says_what_would_close(
    copy: tuple[Path, Workspace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workspace = copy
    write_rows(config.parent / "events" / "week4.csv", [*week(4), *week(5)[:1]])
    before = listing(config.parent)
    code, out, _ = driftrec(monkeypatch, capsys, "retrain", "-c", config, "-w", workspace.root, "--dry-run")
    assert code == 0
    assert "closed stage 4" in out
    assert "single would be trained for stage 4" in out
    assert listing(config.parent) == before


def test_a_dry_run_in_an_empty_folder_foretells_the_first_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_shop(tmp_path, OPEN_GATE)
    before = listing(tmp_path)
    words = ("retrain", "-c", config, "-w", tmp_path / "workspace", "--dry-run")
    code, out, err = driftrec(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    assert "the log would be cut into 2 stages; 320 rows read, 0 new" in out
    assert out.endswith("single would be trained for stage 1; the gate decides afterwards")
    late = write_rows(tmp_path / "week2.csv", [*week(2), ("u00", "i01", seconds(21))])
    _, out, _ = driftrec(monkeypatch, capsys, *words, "--new", late)
    assert "closed stage 2" in out
    assert out.endswith("single would be trained for stage 2; the gate decides afterwards")
    late.unlink()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_dry_run_is_refused_where_the_run_would_be(
    copy: tuple[Path, Workspace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str]
) -> None:
    config, workspace = copy
    text = config.read_text()
    monkeypatch.setenv("DRIFTREC_PREFECT", "off")

    def said() -> str:
        code, _, err = driftrec(monkeypatch, capsys, "retrain", "-c", config, "-w", workspace.root, *words)
        assert code == 2
        assert err.count("\n") == 1
        return err

    config.write_text(text.replace('"growing"', '"other"'))
    assert "workspace of experiment 'growing', not 'other'" in said()
    config.write_text(text.replace("codes_per_level = 8", "codes_per_level = 16"))
    assert "other settings in [items]" in said()
    config.write_text(text + '\n[search]\nobjectives = ["search"]\n')
    assert 'retrain.gate.objective = "recommendation" is not among search.objectives' in said()
    config.write_text(text)
    marker = workspace.root / "workspace.json"
    marker.write_text(marker.read_text().replace('"schema": 1', '"schema": 2'))
    assert "workspace schema 2" in said()


def test_one_command_goes_back_and_the_history_tells(
    copy: tuple[Path, Workspace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    _, workspace = copy
    code, out, _ = driftrec(monkeypatch, capsys, "rollback", "-w", workspace.root)
    assert (code, out) == (
        0,
        "single after stage 1 is in service again, single after stage 2 is not "
        "the next challenger goes on from the newest stage of single, not from this model",
    )
    assert champion.champion(workspace) == Job("single", 0, "same_stage", 1)
    version = MlflowClient(workspace.mlflow_uri).get_model_version_by_alias("driftrec-growing", "champion")
    assert version.tags["stage"] == "1"
    shown_as_rolled_back(workspace)
    code, out, _ = driftrec(monkeypatch, capsys, "history", "-w", workspace.root)
    assert code == 0
    for word in ("first", "promoted", "kept", "rolled_back", "in service: single after stage 1"):
        assert word in out
    code, _, err = driftrec(monkeypatch, capsys, "rollback", "-w", workspace.root)
    assert code == 2
    assert "no earlier champion" in err


def shown_as_rolled_back(workspace: Workspace) -> None:
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client

    (run,) = MlflowClient(workspace.mlflow_uri).search_runs(["1", "2", "3"], "tags.decision = 'rolled_back'")
    assert run.data.tags["champion"] == read_json(workspace.root / "champion.json")["key"]
    with get_client(sync_client=True) as prefect:
        shown = [found for found in prefect.read_artifacts() if "**rolled_back**" in str(found.data)]
    assert [(found.key, str(found.flow_run_id)) for found in shown] == [
        ("decision", run.data.tags["prefect.flow_run_id"])
    ]


def test_a_run_killed_before_its_decision_goes_on_and_decides_the_same(
    copy: tuple[Path, Workspace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.retrain import retrain

    config, workspace = copy
    write_rows(config.parent / "events" / "week4.csv", [*week(4), *week(5)[:1]])
    shutil.copytree(config.parent, tmp_path / "undisturbed")
    real = contest.probe

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(contest, "probe", die)
    with pytest.raises(RuntimeError, match="killed"):
        retrain(str(config), workspace=str(workspace.root))
    assert len(read_history(workspace)[0]) == 3
    monkeypatch.setattr(contest, "probe", real)
    retrain(str(config), workspace=str(workspace.root))
    other = tmp_path / "undisturbed"
    # Without Prefect, besides: the same steps as plain functions.
    arguments = {"config": str(other / config.name), "new": None, "close_now": False}
    assert "**" in run_plainly("retrain", {**arguments, "workspace": str(other / workspace.root.name)})
    mine, theirs = (read_history(Workspace(place))[0] for place in (workspace.root, other / workspace.root.name))
    same = ("decision", "stage", "scores", "differences")
    assert [[line[name] for name in same] for line in mine] == [[line[name] for name in same] for line in theirs]
    assert mine[-1]["challenger"]["key"] == theirs[-1]["challenger"]["key"]
    for name in ("adapter_model.safetensors", "token_rows.safetensors"):
        first, second = (
            (place / "runs" / "checkpoints" / mine[-1]["challenger"]["key"] / name).read_bytes()
            for place in (workspace.root, other / workspace.root.name)
        )
        assert first == second


def test_changed_settings_train_the_champion_anew_and_an_open_gate_lets_it_in(copy: tuple[Path, Workspace]) -> None:
    from flows.retrain import retrain

    config, workspace = copy
    before = champion.in_service(workspace)
    changed = config.read_text().replace("[evaluation]", "learning_rate = 0.002\n[evaluation]")
    config.write_text(changed.replace("minimum = 1\n", "minimum = -1\n"))
    said = retrain(str(config), workspace=str(workspace.root))
    after = champion.in_service(workspace)
    assert before is not None
    assert after is not None
    assert (after.job, after.key == before.key) == (before.job, False)
    assert "**rebuilt**: single after stage 2, trained anew, goes into service: hit_at_10" in said


def test_a_workspace_that_a_comparison_made_begins_with_the_best_method_of_its_report(
    trained: Trained, tmp_path: Path
) -> None:
    from flows.reporting import stored
    from flows.retrain import retrain

    shutil.copytree(trained.config.parent.parent, tmp_path / "compared")
    config = tmp_path / "compared" / "source" / trained.config.name
    with config.open("a") as handle:
        handle.write('[retrain]\nmethod = "single"\n[retrain.gate]\nlatency_ms = 60000\n')
    workspace = Workspace(tmp_path / "compared" / "workspace")
    checkpoints = listing(workspace.checkpoints)
    said = retrain(str(config), workspace=str(workspace.root))
    job = champion.champion(workspace)
    assert job is not None
    best = next(line.method for line in stored.findings(trained.report).lines("same_stage") if not line.baseline)
    assert (job.method in ("frozen", "single"), job.stage, job.protocol) == (True, 1, "same_stage")
    assert best in ("frozen", "single")
    assert "**first**" in said
    assert listing(workspace.checkpoints) == checkpoints


def test_runs_that_a_kill_left_running_are_closed_by_the_doctor(copy: tuple[Path, Workspace]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.doctor import repaired
    from flows.retrain import retrain

    config, workspace = copy
    mine = {"config": str(config), "workspace": str(workspace.root)}
    with get_client(sync_client=True) as client:
        dead = client.create_flow_run(retrain, parameters=mine, state=Running())
        other = client.create_flow_run(retrain, parameters=mine | {"workspace": "/elsewhere"}, state=Running())
        found = [check.found for check in repaired(workspace.root)]
        assert any(dead.name in text for text in found)
        states = {run.id: client.read_flow_run(run.id).state_type for run in (dead, other)}
        assert [str(states[run.id].value) for run in (dead, other)] == ["CRASHED", "RUNNING"]
        assert "no flow run is left open" in [check.found for check in repaired(workspace.root)][-1]
        crashed.mark_crashed(str(other.id))


def test_a_schedule_that_begins_closes_what_an_earlier_one_left_running(copy: tuple[Path, Workspace]) -> None:
    """A run that died holds the deployment's only place: every later one would be cancelled."""
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.retrain import retrain
    from flows.schedule import make_room

    config, workspace = copy
    with get_client(sync_client=True) as client:
        dead = client.create_flow_run(
            retrain, parameters={"config": str(config), "workspace": str(workspace.root)}, state=Running()
        )

        def state() -> str:
            return str(client.read_flow_run(dead.id).state_type.value)

        with experiment.exclusive(workspace):
            make_room(workspace.root)
        assert state() == "RUNNING"
        make_room(workspace.root)
        assert state() == "CRASHED"


def test_a_flow_that_others_start_writes_files_for_its_user_alone(copy: tuple[Path, Workspace]) -> None:
    from flows.retrain import retrain

    config, workspace = copy
    before = os.umask(0o022)
    try:
        retrain(str(config), workspace=str(workspace.root))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert (workspace.root / "last_command.json").stat().st_mode & 0o077 == 0


def test_the_doctor_leaves_a_workspace_alone_that_a_run_holds(copy: tuple[Path, Workspace]) -> None:
    from flows.doctor import repaired

    with experiment.exclusive(copy[1]):
        (check,) = repaired(copy[1].root)
    assert "in use by process" in check.found


def test_a_retraining_is_refused_while_another_holds_the_workspace(copy: tuple[Path, Workspace]) -> None:
    from flows.retrain import retrain

    config, workspace = copy
    holder = [sys.executable, "-c", HOLD, str(workspace.root / "run.lock")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = listing(workspace.root)
        with pytest.raises(UserError, match="in use by"):
            retrain(str(config), workspace=str(workspace.root))
        assert listing(workspace.root) == before
        process.communicate()
    assert "nothing to decide" in retrain(str(config), workspace=str(workspace.root))


def test_the_deployment_file_names_what_exists() -> None:
    found = yaml.safe_load((Path(__file__).parent.parent / "prefect.yaml").read_text())
    (deployment,) = found["deployments"]
    module, name = deployment["entrypoint"].rsplit(".", 1)
    flow = getattr(importlib.import_module(module), name)
    assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert deployment["schedules"][0]["cron"] == "0 3 * * *"
