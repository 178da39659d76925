from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.artifacts import described, stage_rows, summary
from flows.reporting import tables
from flows.reporting.charts import LIGHT, cost_chart, matrix_chart, stage_chart
from flows.reporting.findings import Findings, metric_title
from flows.reporting.page import interval
from flows.reporting.report import render, write_page, write_report
from flows.reporting.sections import number
from stages.workspace import read_json


class Reader(HTMLParser):
    """Table rows as lists of texts, and every address the page mentions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_the_page_needs_nothing_beside_it(invented_report: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(invented_report, tmp_path).read_text()
    reader = read(page)
    assert reader.addresses
    assert all(address.startswith("data:image/") for address in reader.addresses)
    assert "script" not in reader.tags
    assert "url(" not in page.split("</style>")[0]
    assert read_json(tmp_path / "report.json") == invented_report


def test_every_figure_is_there_for_light_and_dark_pages(invented_report: dict[str, Any], tmp_path: Path) -> None:
    write_report(invented_report, tmp_path)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{name}-{theme}.svg" for name in ("stages", "matrix", "costs") for theme in ("light", "dark")}


def test_the_same_numbers_give_the_same_bytes(invented_report: dict[str, Any], tmp_path: Path) -> None:
    first = write_report(invented_report, tmp_path / "one").read_bytes()
    assert write_report(invented_report, tmp_path / "two").read_bytes() == first


def test_names_from_configs_and_logs_are_text_and_never_markup(invented_report: dict[str, Any], tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">$\\frac{'
    text = json.dumps(invented_report).replace('"peso"', json.dumps(evil)).replace("invented numbers", "<b>note</b>")
    report = json.loads(text) | {"name": "</title><script>"}
    page = write_report(report, tmp_path).read_text()
    reader = read(page)
    assert "onerror" not in re.sub(r"&lt;img.*?&gt;", "", page)
    assert evil in {row[0] for row in reader.rows}
    assert "script" not in reader.tags
    assert "b" not in [tag for tag in reader.tags if tag == "b" and "<b>note" in page]


def test_the_best_line_is_bold_and_a_method_below_a_baseline_is_named(invented_report: dict[str, Any]) -> None:
    page = render(invented_report, {})
    assert "Below the baseline item_graph in Hit@10: frozen." in page
    found = Findings(invented_report)
    best = {line.method: line.best for line in found.lines("next_stage")}
    assert best["peso"] == {"hit_at_10", "ndcg_at_10"}
    assert not any(best[name] for name in best if name != "peso")


def test_a_losing_favourite_is_shown_losing(invented_report: dict[str, Any]) -> None:
    for row in invented_report["rows"]:
        if row["method"] == "popularity":
            row["value"] = 0.5 if row["value"] is not None else None
    page = render(invented_report, {})
    assert "Below the baseline popularity in Hit@10: frozen, single, peso." in page
    winners = re.findall(r"<dd>(\w+)<small>Hit@10", page)
    assert winners == ["popularity", "popularity"]


def test_a_quick_look_says_so_in_every_output(invented_report: dict[str, Any]) -> None:
    sentence = "Quick look: a seeded sample of 40 test users"
    assert sentence not in render(invented_report, {})
    invented_report["sampled_users"] = 40
    assert render(invented_report, {}).count(sentence) >= 2  # the banner and the notes
    found = Findings(invented_report)
    assert sentence in summary(found)
    assert sentence in printed(tables.headline(found))
    assert described("Metrics on stage 1", found) == f"Metrics on stage 1. {sentence}, not all of them."
    for chart in (stage_chart(found, LIGHT), cost_chart(found, LIGHT)):
        assert chart is not None
        assert sentence in chart.get_suptitle()


def test_the_matrix_says_that_its_cells_are_a_sample_s_without_intervals(invented_report: dict[str, Any]) -> None:
    page = render(invented_report, {})
    assert "carry no interval" in page
    assert "one seed, the first, and on a seeded sample of at most 300 users" in page
    chart = matrix_chart(Findings(invented_report), LIGHT)
    assert chart is not None
    assert "at most 300 test users" in chart.get_suptitle()


def test_a_matrix_that_was_not_asked_for_leaves_no_empty_columns(invented_report: dict[str, Any]) -> None:
    assert "<th>BWT</th>" in render(invented_report, {})
    config = dict(invented_report["config"])
    config["evaluation"] = {**config["evaluation"], "matrix_users": 0}
    kept = [row for row in invented_report["continual"] if row["metric"] != "bwt"]
    page = render(invented_report | {"config": config, "continual": kept, "matrix": []}, {})
    assert "<th>NextPerf</th>" in page
    assert "<th>BWT</th>" not in page
    assert "matrix_users = 0" in page


def with_searches(report: dict[str, Any]) -> dict[str, Any]:
    """The same numbers halved, for searches; rows of the first objective do not say which one they are about."""
    doubled = dict(report)
    for part in ("rows", "matrix", "continual"):
        halves = [
            {**row, "objective": "search", "value": None if row["value"] is None else row["value"] / 2}
            for row in report[part]
        ]
        doubled[part] = [*report[part], *halves]
    return doubled


def test_each_objective_has_its_own_numbers_over_stages_and_matrix(
    invented_report: dict[str, Any], tmp_path: Path
) -> None:
    alone, found = Findings(invented_report), Findings(with_searches(invented_report))
    for name in ("single", "peso"):
        assert found.continual(name) == alone.continual(name)
        assert found.grid(name) == alone.grid(name)
        for place, value in alone.grid(name).items():
            assert found.grid(name, objective="search")[place] == value / 2
        assert found.continual(name, "search")["bwt"] == (alone.continual(name)["bwt"] or 0) / 2
    page = write_report(with_searches(invented_report), tmp_path).read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"matrix-light.svg", "matrix_search-light.svg"} <= drawn
    assert page.count("Heat maps of R[i][j]") == 2
    assert "<h3>Search</h3>" not in render(invented_report, {})


def test_what_is_undefined_is_a_dash_and_never_zero(invented_report: dict[str, Any]) -> None:
    rows = [row for row in invented_report["rows"] if row["slice"] == "new_user" and row["stage"] == 3]
    assert rows
    assert all(row["value"] is None for row in rows)
    assert Findings(invented_report).cell("single", "next_stage", "hit_at_10", stage=3, part="new_user").value is None  # pyright: ignore[reportOptionalMemberAccess]
    assert number(None) == "–"
    assert number(0.0) == "0.0000"
    assert number(-0.0102, signed=True) == "−0.0102"


def test_the_mean_over_seeds_leads_and_a_lone_seed_stands_in_for_it(invented_report: dict[str, Any]) -> None:
    rows = invented_report["rows"]
    mean = next(r for r in rows if r["seed"] is None and r["method"] == "single" and r["stage"] == "mean")
    mean["value"] = 0.25
    assert Findings(invented_report).cell("single", mean["protocol"], mean["metric"]).value == 0.25  # pyright: ignore[reportOptionalMemberAccess]
    invented_report["rows"] = [row for row in rows if row["seed"] == 0]
    lone = Findings(invented_report).cell("single", mean["protocol"], mean["metric"])
    assert lone is not None
    assert lone.value not in (None, 0.25)


def test_costs_of_an_update_leave_stage_0_out(invented_report: dict[str, Any]) -> None:
    assert Findings(invented_report).costs("single")["train_seconds"] == pytest.approx(8.0)


def test_a_report_without_matrix_costs_or_slices_still_draws(invented_report: dict[str, Any], tmp_path: Path) -> None:
    bare = invented_report | {"matrix": [], "costs": [], "continual": [], "differences": [], "oracle": [], "stages": []}
    bare["rows"] = [row for row in bare["rows"] if row["slice"] == "all" and row["protocol"] == "next_stage"]
    page = write_report(bare, tmp_path).read_text()
    assert "Next stage" in page
    assert "Same stage" not in page


def test_a_report_without_any_test_says_so_and_shows_what_was_trained(
    invented_report: dict[str, Any], tmp_path: Path
) -> None:
    untested = invented_report | {part: [] for part in ("rows", "differences", "matrix", "continual", "oracle")}
    untested["sampled"] = {"negatives": "uniform", "count": 99, "random": {"hit_at_10": 0.1}, "rows": []}
    page, found = write_report(untested, tmp_path).read_text(), Findings(untested)
    assert "Nothing was tested" in page
    assert "99 + 1 candidates" not in page
    assert "3 methods" in page
    assert "What it costs" in page
    assert "Nothing was tested" in summary(found)
    assert "Nothing was tested" not in render(invented_report, {}) + summary(Findings(invented_report))
    assert (found.methods, found.protocols, found.objectives) == (["frozen", "single", "peso"], [], [])
    assert found.leading_protocol == "same_stage"
    assert found.lines("same_stage") == []
    assert (found.oracle("same_stage"), found.difference("peso", "same_stage", "hit_at_10")) == (None, None)
    assert (found.continual("single"), found.grid("single")) == ({}, {})
    assert tables.headline(found) == []


def test_the_drift_picture_is_put_inside_when_it_is_there(invented_report: dict[str, Any], tmp_path: Path) -> None:
    picture = b"\x89PNG invented"
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "drift.png").write_bytes(picture)
    page = write_page(invented_report, tmp_path).read_text()
    assert base64.b64encode(picture).decode() in page


def test_an_interval_stays_inside_its_track() -> None:
    drawn = interval(0.5, -0.2, 3.0, top=1.0).html
    assert "left:0.0%;width:100.0%" in drawn
    assert "left:50.0%" in drawn
    assert interval(None, None, None, top=1.0).html == ""


def test_terminal_and_prefect_show_the_report_s_numbers(invented_report: dict[str, Any]) -> None:
    found = Findings(invented_report)
    text = printed(tables.headline(found, {("next_stage", "recommendation"): {"hit_at_10": 0.75, "ndcg_at_10": 0.5}}))
    assert "0.0510 [0.0450, 0.0570]" in text
    assert "+0.0050 [+0.0010, +0.0090]" in text
    assert "best possible" in text
    assert "0.7500" in text
    (row,) = (r for r in stage_rows(found, 1) if (r["method"], r["protocol"]) == ("peso", "same_stage"))
    assert row["hit_at_10"] == found.cell("peso", "same_stage", "hit_at_10", stage=1).value  # pyright: ignore[reportOptionalMemberAccess]


def test_the_best_possible_score_is_named_once_a_protocol_where_it_is_known(invented_report: dict[str, Any]) -> None:
    assert "Best possible" not in render(invented_report, {})
    place = {"protocol": "next_stage", "objective": "recommendation"}
    scores = {"hit_at_10": 0.75, "ndcg_at_10": 0.5}
    invented_report["best_possible"] = [{**place, "metric": name, "value": value} for name, value in scores.items()]
    page = render(invented_report, {})
    assert page.count("Best possible") == 1
    assert page.index("Best possible: Hit@10 0.7500, NDCG@10 0.5000") < page.index("<h2>Same stage</h2>")
    assert printed(tables.headline(Findings(invented_report))).count("best possible") == 1


def test_chance_among_candidates_reaches_no_further_than_any_model(invented_report: dict[str, Any]) -> None:
    """A target that no model knew is a miss for all; later stages count alike, a line of fewer targets not at all."""
    chance = {"hit_at_5": 0.05, "hit_at_10": 0.10, "ndcg_at_5": 0.029485, "ndcg_at_10": 0.045436}
    place = {"objective": "recommendation", "seed": 0, **dict.fromkeys(chance, 0.04)}

    def row(protocol: str, method: str, stage: int, **more: float) -> dict[str, Any]:
        return {**place, "protocol": protocol, "method": method, "stage": stage, "targets": 90, **more}

    rows = [
        *(row("next_stage", name, 1, reachable=0.9) for name in ("single", "peso", "popularity")),
        row("next_stage", "single", 2, reachable=0.5),
        row("next_stage", "untuned", 2, targets=20, reachable=0.1),
        row("same_stage", "single", 0, reachable=0.2),
        row("same_stage", "single", 1),  # of an earlier version
    ]
    invented_report["sampled"] = {"negatives": "uniform", "count": 99, "random": chance, "rows": rows}
    found = Findings(invented_report)
    assert found.chance("next_stage", "recommendation") == pytest.approx({k: 0.7 * v for k, v in chance.items()})
    assert found.chance("same_stage", "recommendation") == chance
    assert [line[1:5] for line in read(render(invented_report, {})).rows if line and line[0] == "random"] == [
        ["0.0350", "0.0700", "0.0206", "0.0318"],
        ["0.0500", "0.1000", "0.0295", "0.0454"],
    ]


def test_a_narrow_terminal_puts_the_interval_below_its_number(invented_report: dict[str, Any]) -> None:
    text = printed(tables.headline(Findings(invented_report), width=100))
    assert "0.0510 [" not in text
    assert "[0.0450, 0.0570]" in text


def test_brackets_in_titles_are_no_terminal_markup() -> None:
    listed = tables.recommendations([("[red]7", "Lamp [bold]\x1b[31m", 1.0)], "t")
    text = printed([listed])
    assert "[red]7" in text
    assert "[bold]" in text
    assert "\x1b" not in text


def test_metric_titles_are_the_field_s() -> None:
    assert [metric_title(name) for name in ("hit_at_10", "ndcg_at_5", "mrr")] == ["Hit@10", "NDCG@5", "MRR"]


def printed(found: list[Any], width: int = 200) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for table in found:
            console.print(table)
    return capture.get()


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_of_stages_shows_every_span_whole_at_any_width(width: int) -> None:
    counts = {"events": 1_800_000, "users": 12_080, "new_users": 80, "returning_users": 12_000}
    items = {"items": 60, "new_items": 7, "known_items": 53, "new_item_events": 0.125, "drift": None}
    span = {"start": "2023-11-14T23:10:00+00:00", "end": "2023-12-27T06:27:00+00:00"}
    row = {"index": 1, **span, **counts, **items, "median_history": 2.5}
    text = printed([tables.drift([row, row], width)], width)
    shown = ("2023-11-14 23:10", "2023-12-27 06:27", "1,800,000", "12,080", "80", "12,000", "7", "53", "12.5%", "2.5")
    assert [value for value in shown if text.count(value) < 2] == []


def test_the_table_says_whether_training_noise_is_in_its_intervals(invented_report):
    assert "intervals over users and training seeds" in printed(tables.headline(Findings(invented_report)))
    first = [row | {"seed": None if row["seed"] is None else 0} for row in invented_report["rows"]]
    alone = printed(tables.headline(Findings(invented_report | {"rows": first})))
    assert "intervals over users" in alone
    assert "training seeds" not in alone
