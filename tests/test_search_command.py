"""`driftrec search`, and a report that holds both objectives, on a tiny generated log."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest

from flows import steps
from flows.recommending import recommend
from flows.reporting import tables
from flows.reporting.charts import DASHES, LIGHT, draw_charts, stage_chart
from flows.reporting.findings import Findings
from flows.reporting.report import render
from stages.errors import UserError
from stages.jobs import BASELINES
from stages.workspace import Workspace, read_json
from tests import conftest
from tests.commanding import driftrec


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """A comparison of two stages with their searches, without Prefect; its workspace and report."""
    folder = tmp_path_factory.mktemp("searching")
    config = conftest.write_tiny_experiment(folder)
    text = config.read_text(encoding="utf-8").replace("where = \"event = 'recommendation'\"\n", "")
    config.write_text(text, encoding="utf-8")
    plan = steps.make_plan(config, folder / "workspace", ["single"], [0])
    steps.read(plan)
    plan = steps.split(plan)
    steps.identify(plan)
    tests = [steps.evaluate(plan, job, tested) for job, tested in plan.baselines()]
    trained = []
    for lineage in plan.lineages():
        for stage in plan.trained(lineage):
            trained.append(steps.train(plan, lineage.at(stage)))
            tests += [steps.evaluate(plan, lineage.at(stage), tested) for tested in plan.tested(lineage, stage)]
    return plan.workspace, steps.summarise(plan, tests, trained)


def test_the_report_shows_the_objectives_apart(compared: tuple[Workspace, Path]) -> None:
    report = read_json(compared[1] / "report.json")
    found = Findings(report)
    assert found.objectives == ["recommendation", "search"]
    for protocol in found.protocols:
        lines = {kind: {line.method for line in found.lines(protocol, kind)} for kind in found.objectives}
        assert lines["search"] == lines["recommendation"] | {"bm25"}
        recommended, searched = (found.oracle(protocol, kind) for kind in found.objectives)
        assert recommended
        assert searched
    page = render(report, draw_charts(report, compared[1]))
    assert "Next stage, search" in page
    assert page.count("<dt>Best, ") == 4
    assert "Best, same stage, search" in page
    kept = page[page.index("Keeping the old, learning the new") : page.index("Who is served how well")]
    assert kept.index("<h3>Recommendation</h3>") < kept.index("<h3>Search</h3>")
    assert kept.count("<table") == 2
    assert set(found.continual("single", "search")) == set(found.continual("single"))
    assert found.continual("single", "search") != found.continual("single")
    chart = stage_chart(found, LIGHT)
    assert chart is not None
    assert chart.get_figwidth() == pytest.approx(2 * 5.4)  # two panels a row stay readable on a page
    assert [text.get_text() for text in chart.legends[0].get_texts()] == found.methods
    assert len(DASHES) == len(set(DASHES)) >= len(BASELINES)
    titles = [str(table.title) for table in tables.headline(found)]
    assert any(title.startswith("Next stage, search") for title in titles)
    assert any(note.startswith("Searches: ") for note in report["notes"])


def test_search_lists_titles_for_a_user_for_a_history_and_for_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compared: tuple[Workspace, Path]
) -> None:
    root = compared[0].root
    items = pl.read_parquet(compared[0].catalogue / "items.parquet")
    user = pl.read_parquet(compared[0].stage_file(0))["user_id"][0]
    title = items["title"][3]
    for words in (["-u", user], ["--history", ",".join(items["item_id"][:2])], []):
        code, out, _ = driftrec(monkeypatch, capsys, "search", "-w", root, "-q", title, "-k", 4, *words)
        assert code == 0
        assert f"searched for {title}" in out
        assert len([item for item in items["item_id"] if re.search(rf"\b{item}\b", out)]) == 4
    code, out, _ = driftrec(monkeypatch, capsys, "search", "-w", root, "-q", title, "-m", "bm25", "-k", 1)
    assert code == 0
    assert title in out.split("\n", 1)[1]


def test_a_long_query_is_not_repeated_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compared: tuple[Workspace, Path]
) -> None:
    code, out, _ = driftrec(monkeypatch, capsys, "search", "-w", compared[0].root, "-q", "hat " * 30_000, "-k", 1)
    assert code == 0
    assert len(out) < 2_000
    assert re.search(r"searched\s+for\s+hat hat", out)
    assert "…" in out


def test_a_query_changes_the_list(compared: tuple[Workspace, Path]) -> None:
    titles = pl.read_parquet(compared[0].catalogue / "items.parquet")["title"]
    lists = [recommend(compared[0].root, history=[], k=5, query=query).rows for query in (None, titles[3], titles[30])]
    assert lists[0] != lists[1] != lists[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-q", "  "], "--query is empty"),
        (["-q", "hat", "-u", "nobody"], "user 'nobody' is not in the log"),
        (["-q", "hat", "--history", "i000x"], "'i000x'"),
        (["-q", "hat", "-k", 99], "-k 99"),
        (["-q", "hat", "-u", "s0u000", "--history", "i000"], "--user s0u000 and --history exclude each other"),
        (["-q", "hat", "-u", "s0u000", "--history", ""], "--user s0u000 and --history exclude each other"),
    ],
)
def test_a_search_that_cannot_be_answered_says_why(
    words: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compared: tuple[Workspace, Path],
) -> None:
    code, out, err = driftrec(monkeypatch, capsys, "search", "-w", compared[0].root, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_search_baseline_recommends_nothing(compared: tuple[Workspace, Path]) -> None:
    with pytest.raises(UserError, match="bm25 answers searches only"):
        recommend(compared[0].root, history=[], method="bm25")
