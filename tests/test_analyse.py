"""`driftrec analyse` on a tiny comparison of two objectives, and on one without searches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows import steps
from flows.reporting import stored
from flows.reporting.insights import FIGURES, Insights
from flows.reporting.report import write_page
from stages.method_config import BUILT_IN, GemsConfig
from stages.workspace import Workspace, read_json, write_json
from tests import conftest
from tests.commanding import driftrec

VARIANTS = """
[analysis]
pairs = 3
update_pairs = 2
[methods.loud]
method = "gems"
scale = 2.0
[methods.often]
method = "gems"
refresh_every = 3
gate_warmup = 200
[methods.exact]
method = "gems"
refresh = "svd"
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two stages with searches, one protocol, a matrix, and no Prefect; its workspace."""
    folder = tmp_path_factory.mktemp("analysed")
    config = conftest.write_tiny_experiment(folder)
    text = config.read_text(encoding="utf-8").replace("where = \"event = 'recommendation'\"\n", "")
    text = text.replace("[evaluation]\n", '[evaluation]\nprotocols = ["same_stage"]\n')
    config.write_text(text + VARIANTS, encoding="utf-8")
    plan = steps.make_plan(config, folder / "workspace", ["single", "gems", "loud", "often", "exact"], [0])
    steps.read(plan)
    plan = steps.split(plan)
    steps.identify(plan)
    tests, trained = [], []
    for lineage in plan.lineages():
        for stage in plan.trained(lineage):
            trained.append(steps.train(plan, lineage.at(stage)))
            tests += [steps.evaluate(plan, lineage.at(stage), tested) for tested in plan.tested(lineage, stage)]
            tests += steps.evaluate_row(plan, lineage.at(stage), list(plan.matrix(lineage)))
    steps.summarise(plan, tests, trained)
    return plan.workspace.root


def test_a_finished_comparison_is_analysed_drawn_and_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compared: Path
) -> None:
    monkeypatch.setitem(
        BUILT_IN, "gems", GemsConfig(scale=7.0)
    )  # a default changes; the report's models are as they were
    code, out, err = driftrec(monkeypatch, capsys, "analyse", "-w", compared, "--methods", "single,gems")
    assert code == 0, err
    folder = stored.latest_report(Workspace(compared))
    found = read_json(folder / "analysis.json")
    insights = Insights(found)
    assert found["methods"] == ["single", "gems"]
    assert insights.methods("conflict") == ["stage 0", "single", "gems"]
    for method in ("single", "gems"):
        for kind in ("gradient", "update"):
            rho, floor = insights.rho(method, kind), insights.rho(method, kind, floor=True)
            assert rho is not None
            assert floor is not None
            assert 0 < rho < 2
            check_above_floor(insights, method, kind, pairs={"gradient": 3, "update": 2}[kind])
    own = insights.rho("gems", "update_before_fusion")
    assert own is not None
    assert own != insights.rho("gems", "update")
    assert {row["method"] for row in insights.rows("conflict") if row["kind"] == "update_before_fusion"} == {"gems"}
    assert insights.rho("stage 0", "update") is None
    assert insights.flow("single", "search", earlier=True) is not None
    assert insights.flow("single", "search", earlier=False) is not None
    check_flow(insights.flow("gems", "recommendation", earlier=True))
    check_flow(insights.flow("gems", "recommendation", earlier=True, trained=1))
    assert set(insights.drift("single", 0).values()) == {0.0}
    assert min(insights.drift("single", 1).values()) > 0
    assert {row["axis"] for row in insights.rows("sensitivity")} == {"scale", "refresh_every", "refresh"}
    assert {row["x"] for row in insights.rows("sensitivity") if row["axis"] == "refresh"} == {"power", "svd"}
    shares = insights.drift_by_protection("gems", 1)
    assert len(shares) == 7  # maps of the one layer
    assert all(0 < share < 1 and drift > 0 for share, drift in shares)
    assert insights.drift_by_protection("single", 1) == insights.drift_by_protection("gems", 0) == []
    drawing = (folder / "figures" / "sensitivity-light.svg").read_text(encoding="utf-8")
    assert "kind of refresh" in drawing
    assert "k / n" in (folder / "figures" / "preservation-light.svg").read_text(encoding="utf-8")
    assert all(row["counted"] == row["predicted"] for row in insights.rows("memory"))
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert {f"{name}-{theme}.svg" for name in FIGURES for theme in ("light", "dark")} <= drawn
    page = (folder / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Why they differ",
        "pull apart?",
        "Right before, wrong after: search",
        "What was kept",
        "α, τ, T and others",
    ):
        assert heading in page
    assert "url(" not in page.split("</style>")[0]
    for words in ("ρ, updates before fusion", "ρ, updates after fusion"):
        assert words in page
    assert "updates before fusion" in (folder / "figures" / "conflict-light.svg").read_text(encoding="utf-8")
    assert "conflict/gradient" in out
    assert "conflict/update_before_fusion" in out
    assert ("conflict/update_before_fusion", own, 1) in insights.points("gems")
    check_mlflow(compared, insights)


def test_an_analysis_of_an_earlier_version_is_still_drawn(compared: Path, tmp_path: Path) -> None:
    folder = stored.latest_report(Workspace(compared))
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    found = read_json(folder / "analysis.json")
    found["conflict"] = [row for row in found["conflict"] if row["kind"] != "update_before_fusion"]
    write_json(copied / "analysis.json", found, seal=True)
    page = write_page(read_json(copied / "report.json"), copied).read_text(encoding="utf-8")
    assert "ρ, updates before fusion" not in page
    assert "ρ, updates after fusion" in page


def check_above_floor(insights: Insights, method: str, kind: str, pairs: int) -> None:
    above = insights.above_floor(method, kind)
    rho, floor = insights.rho(method, kind), insights.rho(method, kind, floor=True)
    assert rho is not None
    assert floor is not None
    assert above["value"] == pytest.approx(rho - floor, abs=1e-6)
    assert above["low"] < above["value"] < above["high"]
    assert above["pairs"] == pairs


def check_flow(flow: dict[str, float] | None) -> None:
    assert flow is not None
    assert flow["lost_of_all_low"] <= flow["lost_of_all"] <= flow["lost_of_all_high"]
    assert 0 <= flow["gained_of_all_low"] <= flow["gained_of_all"] <= flow["gained_of_all_high"] < 1


def check_mlflow(root: Path, insights: Insights) -> None:
    client = MlflowClient(Workspace(root).mlflow_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    runs = client.search_runs([experiment.experiment_id], 'tags.role = "method"')
    assert {run.info.run_name for run in runs} == {
        f"{name} seed 0" for name in ("single", "gems", "loud", "often", "exact")
    }
    (single,) = (run for run in runs if run.info.run_name == "single seed 0")
    wanted = {(f"analysis/{name}", stage): value for name, value, stage in insights.points("single")}
    assert wanted
    for (key, stage), value in wanted.items():
        history = client.get_metric_history(single.info.run_id, key)
        assert [(p.step, p.value) for p in history if p.step == stage] == [(stage, value)]
    files = {Path(item.path).name for item in client.list_artifacts(single.info.run_id, "analysis")}
    assert files == {"analysis.json", *(f"{name}-light.svg" for name in FIGURES)}


def test_a_page_drawn_anew_keeps_the_analysis(compared: Path, tmp_path: Path) -> None:
    folder = stored.latest_report(Workspace(compared))
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    page = write_page(read_json(copied / "report.json"), copied)
    assert page.read_bytes() == (folder / "report.html").read_bytes()
    (copied / "analysis.json").unlink()
    assert "Why they differ" not in write_page(read_json(copied / "report.json"), copied).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "sinlge"], "--methods sinlge: not in this report; did you mean 'single'?"),
        (["--seed", 7], "--seed 7: the report trained seeds 0"),
        (["--stages", 9], "--stages 9: the report has 2"),
        (["--name", "none"], "no report 'none'"),
        (["--parts", "memory,konflict"], "--parts konflict: no such part; did you mean 'conflict'?; known: conflict"),
    ],
)
def test_a_request_that_does_not_fit_the_report_says_why(
    words: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compared: Path,
) -> None:
    code, _, err = driftrec(monkeypatch, capsys, "analyse", "-w", compared, *words)
    assert code == 2
    assert message in err


def test_neither_workspace_nor_config_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = driftrec(monkeypatch, capsys, "analyse")
    assert code == 2
    assert "name the workspace (--workspace) or the experiment (--config)" in err


def test_a_log_without_searches_is_analysed_but_for_conflict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: conftest.Trained, tmp_path: Path
) -> None:
    root = tmp_path / "moved"
    shutil.copytree(trained.workspace.root, root)
    code, out, err = driftrec(monkeypatch, capsys, "analyse", "-w", root, "--methods", "single")
    assert code == 0, err
    assert "this log has recommendation events only" in " ".join(out.split())
    found = read_json(stored.latest_report(Workspace(root)) / "analysis.json")
    assert found["conflict"] == []
    assert found["memory"]
    assert found["preservation"]["drift"]


def test_parts_are_measured_one_by_one_and_those_measured_before_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: conftest.Trained, tmp_path: Path
) -> None:
    root = tmp_path / "moved"
    shutil.copytree(trained.workspace.root, root)
    words = ("analyse", "-w", root, "--methods", "single", "--parts")
    code, out, err = driftrec(monkeypatch, capsys, *words, "memory")
    assert code == 0, err
    assert "not measured: conflict, transitions, titles, preservation" in " ".join(out.split())
    file = stored.latest_report(Workspace(root)) / "analysis.json"
    first = read_json(file)
    assert first["memory"]
    assert first["preservation"]["drift"] == []
    code, out, _ = driftrec(monkeypatch, capsys, *words, "preservation")
    assert code == 0
    assert "Bytes besides weights" in out  # measured before
    second = read_json(file)
    assert second["memory"] == first["memory"]
    assert second["preservation"]["drift"]
    assert any(note.endswith("not measured: conflict, transitions, titles.") for note in second["notes"])
    assert len(set(second["notes"])) == len(second["notes"])
    # The same of another text is another measurement; the others do not read it.
    write_json(file, {**second, "text": "0" * 64}, seal=True)
    code, out, _ = driftrec(monkeypatch, capsys, *words, "titles")
    assert code == 0
    third = read_json(file)
    assert third["memory"] == first["memory"]
    assert third["preservation"]["drift"] == []
    assert any(note.endswith("not measured: conflict, transitions, preservation.") for note in third["notes"])
    code, out, _ = driftrec(monkeypatch, capsys, *words[:3], "--parts", "transitions")
    assert code == 0
    assert read_json(file)["memory"] == []  # that was of other methods
    assert "Bytes besides weights" not in out
