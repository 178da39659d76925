from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.environment import DEFAULTS, set_defaults
from flows.experiment import check_log, exclusive, open_workspace, remembered_config, trained_jobs
from flows.plan import Lineage, Plan
from stages.config import Config, EvaluationConfig, LogConfig, Source
from stages.errors import UserError
from stages.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from conftest import Trained


def config(**changes: Any) -> Config:
    log = LogConfig(sources=[Source(path="/somewhere/events.csv")])
    return Config(**{"name": "invented", "workspace": "unused", "log": log, **changes})


def plan(tmp_path: Path, count: int = 4, **changes: Any) -> Plan:
    return Plan(config(), Workspace(tmp_path), ("frozen", "single"), (0, 1), count=count, **changes)


def test_a_user_s_own_variables_survive_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"PREFECT_HOME": "mine", "DO_NOT_TRACK": "0"})
    set_defaults(tmp_path)
    assert os.environ["PREFECT_HOME"] == "mine"
    assert os.environ["DO_NOT_TRACK"] == "0"
    assert DEFAULTS.keys() <= os.environ.keys()


def test_prefect_lives_in_the_workspace_and_no_server_is_assumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_defaults(tmp_path)
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert "PREFECT_API_URL" not in os.environ


def test_same_stage_models_are_tested_on_their_own_stage_and_next_stage_models_on_the_following(tmp_path: Path) -> None:
    chosen = plan(tmp_path)
    assert [chosen.tested(Lineage("single", 0, "same_stage"), stage) for stage in range(4)] == [[0], [1], [2], [3]]
    assert [chosen.tested(Lineage("single", 0, "next_stage"), stage) for stage in range(4)] == [[1], [2], [3], []]


def test_a_comparison_leaves_out_the_model_that_nobody_tests_and_a_single_run_trains_it(tmp_path: Path) -> None:
    ahead = Lineage("single", 0, "next_stage")
    assert list(plan(tmp_path).trained(ahead)) == [0, 1, 2]
    assert list(plan(tmp_path, comparison=False).trained(ahead)) == [0, 1, 2, 3]


def test_only_the_first_seed_and_the_same_stage_models_fill_the_matrix(tmp_path: Path) -> None:
    chosen = plan(tmp_path)
    filled = [lineage for lineage in chosen.lineages() if chosen.matrix(lineage)]
    assert filled == [Lineage("frozen", 0, "same_stage"), Lineage("single", 0, "same_stage")]
    assert list(chosen.matrix(filled[0])) == [0, 1, 2, 3]


def test_the_progress_bar_s_total_is_what_the_loops_do(tmp_path: Path) -> None:
    chosen = plan(tmp_path)
    done = sum(1 for _ in chosen.baselines())
    for lineage in chosen.lineages():
        for stage in chosen.trained(lineage):
            done += 1 + len(chosen.tested(lineage, stage)) + bool(chosen.matrix(lineage))
    assert chosen.steps() == done


def test_more_stages_than_the_log_has_are_refused(tmp_path: Path) -> None:
    chosen = Plan(config(), Workspace(tmp_path), ("single",), (0,), limit=9)
    with pytest.raises(UserError, match="--stages 9: the log has 4"):
        chosen.with_stages(4)


def test_another_request_never_overwrites_a_report(tmp_path: Path) -> None:
    quick = config(evaluation=EvaluationConfig(users=5))
    keys = {
        plan(tmp_path).key(),
        plan(tmp_path, comparison=False).key(),
        Plan(quick, Workspace(tmp_path), ("frozen", "single"), (0, 1)).key(),
        Plan(config(), Workspace(tmp_path), ("single", "frozen"), (0, 1)).key(),
    }
    assert len(keys) == 4
    assert plan(tmp_path).key() == plan(tmp_path / "moved").key()


def test_a_remembered_config_that_breaks_a_rule_of_today_is_told_in_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "old"
    open_workspace(config(), root)
    found = read_json(root / "config.json")
    found["config"]["evaluation"]["beam"] = 3
    write_json(root / "config.json", found)
    with pytest.raises(
        UserError, match=r"config\.json: this version .* refuses .*beam \(3\) is below.*driftrec resume -w"
    ):
        remembered_config(root)


def test_the_remembered_config_moves_with_its_workspace(tmp_path: Path) -> None:
    inside = LogConfig(sources=[Source(path=str(tmp_path / "old" / "demo" / "events.csv"))])
    open_workspace(config(log=inside), tmp_path / "old")
    assert str(tmp_path) not in (tmp_path / "old" / "config.json").read_text()
    (tmp_path / "old").rename(tmp_path / "new")
    found, _ = remembered_config(tmp_path / "new")
    assert found.log.sources[0].path == str(tmp_path / "new" / "demo" / "events.csv")


def test_data_settings_may_be_mended_until_something_was_trained(tmp_path: Path) -> None:
    _, workspace = open_workspace(config(), tmp_path)
    check_log(workspace, "a" * 64)
    other = config(log=LogConfig(sources=[Source(path="/somewhere/events.csv", columns={"user_id": "who"})]))
    open_workspace(other, tmp_path)
    check_log(workspace, "b" * 64)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"other settings in \[log\]"):
        open_workspace(config(), tmp_path)
    with pytest.raises(UserError, match="rows changed"):
        check_log(workspace, "c" * 64)


def test_a_source_file_that_moved_is_no_other_data(tmp_path: Path) -> None:
    open_workspace(config(), tmp_path)
    (tmp_path / "runs").mkdir()
    open_workspace(config(log=LogConfig(sources=[Source(path="/elsewhere/events.csv")])), tmp_path)


def test_another_experiment_s_workspace_is_refused(tmp_path: Path) -> None:
    open_workspace(config(), tmp_path)
    with pytest.raises(UserError, match="workspace of experiment 'invented'"):
        open_workspace(config(name="other"), tmp_path)


def test_two_flows_never_share_a_workspace(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    with exclusive(place), pytest.raises(UserError, match=f"in use by process {os.getpid()}"), exclusive(place):
        pass
    with exclusive(place):
        pass


def shared(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Costs of every checkpoint once: the methods share stage 0, and frozen trains nothing after it."""
    return [row for row in report["costs"] if row["method"] == "single"]


def test_compare_runs_from_log_files_to_report_and_tracking(trained: Trained) -> None:
    assert trained.state == "Completed"
    report = read_json(trained.report / "report.json")
    methods = {row["method"] for row in report["rows"]}
    assert methods == {"frozen", "single", "popularity", "recent_popularity", "item_graph"}
    assert {row["protocol"] for row in report["rows"]} == {"same_stage", "next_stage"}
    cells = {(row["trained"], row["tested"]) for row in report["matrix"] if row["method"] == "single"}
    assert cells == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert report["versions"]["torch"]
    assert report["config"]["name"] == "tiny"
    assert report["settings"] == {"frozen": {"method": "frozen"}, "single": {"method": "single"}}
    asked = {"methods": ["frozen", "single"], "seeds": [0], "stages": None, "users": None}
    assert asked.items() <= report["command"].items()
    assert (trained.workspace.root / report["command"]["config"]).resolve() == trained.config.resolve()
    assert report["wall_seconds"]["training"] == pytest.approx(sum(row["train_seconds"] for row in shared(report)))
    assert report["wall_seconds"]["testing"] > 0
    (arithmetic,) = (note for note in report["notes"] if note.startswith("Trained"))
    assert "float32" in arithmetic
    page = (trained.report / "report.html").read_text()
    assert page.count("data:image/png") == 1  # the drift picture
    assert (trained.report / "chart.json").exists()
    assert {job.method for job in trained_jobs(trained.workspace)} == {"frozen", "single"}


def test_a_second_run_trains_nothing_and_gives_the_same_report(trained: Trained) -> None:
    from flows.compare import compare

    before = (trained.report / "report.json").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in trained.workspace.checkpoints.rglob("*")}
    again = compare(str(trained.config), methods=["frozen", "single"], workspace=str(trained.workspace.root))
    assert Path(again) == trained.report
    assert {path: path.stat().st_mtime_ns for path in trained.workspace.checkpoints.rglob("*")} == files
    assert (trained.report / "report.json").read_bytes() == before


def test_prefect_shows_a_table_for_each_stage_and_the_links(trained: Trained) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    kinds = {(artifact.key, artifact.type) for artifact in found}
    assert {("stage-metrics", "table"), ("summary", "markdown"), ("progress", "progress")} <= kinds
    assert {("report", "markdown"), ("mlflow-chart", "markdown")} <= kinds
    assert {artifact.data for artifact in found if artifact.key == "progress"} == {100.0}
    tables = {artifact.description for artifact in found if artifact.key == "stage-metrics"}
    assert tables == {"Metrics on stage 0", "Metrics on stage 1"}


def test_a_user_s_mistake_ends_the_flow_at_once_with_its_own_message(prefect_server: None, tmp_path: Path) -> None:
    from flows.compare import compare

    (tmp_path / "empty.toml").write_text('name = "x"\nworkspace = "w"\n[[log.sources]]\npath = "missing.csv"\n')
    with pytest.raises(UserError, match=r"missing\.csv"):
        compare(str(tmp_path / "empty.toml"), workspace=str(tmp_path / "w"))
    assert not (tmp_path / "w" / "stages").exists()
