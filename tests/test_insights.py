"""An analysis's numbers as the page and MLflow show them, where they can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.reporting import analysis_sections, tables
from flows.reporting.analysis_charts import draw_analysis
from flows.reporting.insights import Insights, with_shares

PARTS = ("conflict", "transitions", "titles", "memory", "sensitivity")


def analysis(**parts: Any) -> dict[str, Any]:
    """An analysis after stage 1 with the parts given and nothing else."""
    kept = {"perplexity": [], "drift": [], "text": True, "corpus": "t"}
    whole = {name: [] for name in PARTS}
    return {
        **whole,
        "preservation": kept,
        "stage": 1,
        "seed": 0,
        "protocol": "same_stage",
        "methods": ["single"],
        "notes": [],
    } | parts


def title(objective: str, cutoff: int, before: int, lost: int, gained: int) -> dict[str, Any]:
    counts = {"cases": 20, "before": before, "lost": lost, "gained": gained}
    return {"method": "single", "objective": objective, "stage": 1, "cutoff": cutoff, **counts}


def test_shares_of_answers_that_turned_by_hand() -> None:
    rows = [{"cases": 6, "before": 4, "lost": 3, "gained": 1}, {"cases": 4, "before": 1, "lost": 0, "gained": 1}]
    assert with_shares(rows) == pytest.approx(
        {"cases": 10, "before": 5, "lost": 3, "gained": 2}
        | {"lost_share": 3 / 5, "lost_of_all": 0.3, "gained_share": 2 / 5, "gained_of_all": 0.2}
        | {"right_before": 0.5, "right_after": 0.4}
    )
    nothing_right = with_shares([{"cases": 3, "before": 0, "lost": 0, "gained": 1}])
    assert "lost_share" not in nothing_right
    assert nothing_right["gained_share"] == pytest.approx(1 / 3)


def test_titles_give_both_cut_offs_beside_chance_and_all_shares() -> None:
    found = analysis(titles=[title("search", 5, 8, 2, 3), title("search", 10, 10, 4, 1)])
    points = {name: value for name, value, stage in Insights(found).points("single") if stage == 1}
    assert points == pytest.approx(
        {"lost/search_titles_at_5": 2 / 8, "lost_of_all/search_titles_at_5": 2 / 20}
        | {"gained/search_titles_at_5": 3 / 12, "gained_of_all/search_titles_at_5": 3 / 20}
        | {"titles/search_hit_at_5_before": 8 / 20, "titles/search_hit_at_5_after": 9 / 20}
        | {"titles/hit_at_5_chance": 0.05, "titles/hit_at_10_chance": 0.1}
        | {"lost/search_titles": 4 / 10, "lost_of_all/search_titles": 4 / 20}
        | {"gained/search_titles": 1 / 10, "gained_of_all/search_titles": 1 / 20}
        | {"titles/search_hit_at_10_before": 10 / 20, "titles/search_hit_at_10_after": 7 / 20}
    )
    turned = [{"method": "single", "objective": "search", "trained": 1, "tested": 0}]
    turned[0] |= {"cases": 10, "before": 5, "lost": 2, "gained": 1}
    page = str(analysis_sections.analysis({**found, "transitions": turned}, {}))
    for words in ("Hit@5", "Hit@10", "chance 5 %", "chance 10 %", "gained, of all", "gained, of wrong", "45.0%"):
        assert words in page
    earlier = {name: value for name, value, _ in Insights(analysis(transitions=turned)).points("single")}
    assert earlier == pytest.approx(
        {"lost/search_earlier": 0.4, "lost_of_all/search_earlier": 0.2}
        | {"gained/search_earlier": 0.2, "gained_of_all/search_earlier": 0.1}
    )


def test_an_interval_stands_beside_its_number_on_the_page_in_mlflow_and_in_the_terminal() -> None:
    turned = {"method": "single", "objective": "search", "cases": 10, "before": 5, "lost": 2, "gained": 1}
    place = {"method": "single", "objective": "search", "earlier": True, "intervals": {"lost_share": [0.25, 0.625]}}
    rho = {"method": "single", "kind": "gradient", "layer": 0, "map": "q_proj", "below_zero": 0.0, "pairs": 4}
    found = analysis(
        transitions=[{**turned, "trained": 1, "tested": 0}],
        shares=[{**place, "trained": 1}, {**place, "trained": None}, {**place, "trained": None, "earlier": False}],
        conflict=[{**rho, "pair": "between", "rho": 1.25}, {**rho, "pair": "search", "rho": 1.0}],
        above_floor=[{"method": "single", "kind": "gradient", "value": 0.25, "low": -0.125, "high": 0.5, "pairs": 4}],
        titles=[{**title("search", 5, 8, 2, 3), "intervals": {"gained_of_all": [0.0, 0.375]}}],
    )
    points = {name: value for name, value, _ in Insights(found).points("single")}
    for name, ends in (
        ("lost/search_earlier", [0.4, 0.25, 0.625]),
        ("conflict/gradient_above_floor", [0.25, -0.125, 0.5]),
        ("gained_of_all/search_titles_at_5", [0.15, 0.0, 0.375]),
    ):
        assert [points[name + end] for end in ("", "_low", "_high")] == pytest.approx(ends)
    assert "gained/search_earlier_low" not in points
    page = str(analysis_sections.analysis(found, {}))
    for words in ("40.0% [25.0%, 62.5%]", "+0.250 [-0.125, +0.500]", "15.0% [0.0%, 37.5%]"):
        assert words in page
    (table,) = tables.analysis(found)
    names, cells = (list(column.cells) for column in table.columns)
    assert not [name for name in names if str(name).endswith(("_low", "_high"))]
    assert cells[names.index("lost/search_earlier")] == "0.400\n\\[0.250, 0.625]"


def test_the_untuned_backbone_has_a_row_and_a_number_where_a_text_was_read(tmp_path: Path) -> None:
    rows = {"perplexity": [{"method": "single", "stage": 1, "before": 40.0, "value": 50.0}]}
    rows |= {"drift": [{"method": "single", "stage": 1, "layer": 0, "map": "q_proj", "value": 0.1}]}
    kept = analysis()["preservation"] | rows
    with_text = analysis(preservation={**kept, "untuned": 30.5})
    assert ("perplexity_untuned", 30.5, 1) in Insights(with_text).points("single")
    assert "untuned backbone</th><td>–</td><td>30.50</td>" in str(analysis_sections.analysis(with_text, {}))
    drawing = draw_analysis(with_text, tmp_path)["preservation-light"].read_text(encoding="utf-8")
    assert "untuned" in drawing
    for without in (analysis(preservation=kept), analysis(preservation={**kept, "untuned": None})):
        assert "perplexity_untuned" not in {name for name, *_ in Insights(without).points("single")}
        assert "untuned" not in str(analysis_sections.analysis(without, {}))


def test_what_was_learnt_stands_beside_what_was_kept(tmp_path: Path) -> None:
    place = {"objective": "search", "stage": 2, "tokens": 1200}
    learnt = [{**place, "method": name, "value": value} for name, value in (("stage 0", 4.5), ("single", 3.5))]
    learnt.append({**place, "method": "gems", "value": 3.75, "less": 0.25, "low": 0.125, "high": 0.375})
    kept = analysis()["preservation"] | {
        "perplexity": [
            {"method": m, "stage": 1, "before": 40.0, "value": v} for m, v in (("single", 90.0), ("gems", 41.0))
        ],
        "drift": [{"method": m, "stage": 1, "layer": 0, "map": "q_proj", "value": 0.1} for m in ("single", "gems")],
    }
    found = analysis(preservation=kept, learnt=learnt, methods=["single", "gems"])
    points = {name: value for name, value, _ in Insights(found).points("gems")}
    names = ("coming_loss/search", *(f"coming_loss/search_less{end}" for end in ("", "_low", "_high")))
    assert [points[name] for name in names] == [3.75, 0.25, 0.125, 0.375]
    assert "coming_loss/search_less" not in {name for name, *_ in Insights(found).points("single")}
    page = str(analysis_sections.analysis(found, {}))
    for words in (
        "What was learnt",
        "less single",
        "+0.2500 [+0.1250, +0.3750]",
        "4.5000",
        "1,200",
        "windows of stage 2",
    ):
        assert words in page
    drawing = draw_analysis(found, tmp_path)["preservation-light"].read_text(encoding="utf-8")
    assert "kept against learnt" in drawing
    assert "What was learnt" not in str(analysis_sections.analysis(analysis(preservation=kept), {}))


def test_an_analysis_without_intervals_shows_the_numbers_alone() -> None:
    rho = {"method": "single", "kind": "gradient", "layer": 0, "map": "q_proj", "below_zero": 0.0, "pairs": 4}
    found = analysis(conflict=[{**rho, "pair": "between", "rho": 1.25}, {**rho, "pair": "search", "rho": 1.0}])
    assert Insights(found).above_floor("single", "gradient") == {"value": 0.25, "low": None, "high": None}
    assert "+0.250<" in str(analysis_sections.analysis(found, {}))


def test_titles_of_an_earlier_version_were_right_among_ten() -> None:
    row = {name: value for name, value in title("search", 10, 10, 4, 1).items() if name != "cutoff"}
    assert Insights(analysis(titles=[row])).titled() == [("search", "single", 10)]
