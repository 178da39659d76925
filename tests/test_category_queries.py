"""Queries made of categories, by the published recipe, and the searches they become."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from stages.category_queries import item_queries, path_query, with_category_queries
from stages.config import Config
from stages.errors import UserError
from stages.log import LogReport, read_log
from stages.workspace import Workspace

START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("levels", "query"),
    [
        (["A1 > x"], None),
        (["Books"], None),
        (["Books", "Cookery"], "book cookery"),
        (["Red Shoes", "Shoes & Red Hats"], "shoe red hat"),  # the last occurrence of a word stays
        (["Alpha Beta", "Beta Gamma", "Gamma Delta"], "alpha beta gamma delta"),
        (["The Home", "of the 3 Berries"], "home berry"),  # stop words, digits, plural
        (["Men's Wear", "T-Shirts"], "men wear tshirt"),
        (["The", "of"], None),
        (["Glasses", "Bus"], "glasse bus"),  # the S-stemmer, endings in us and ss stay
        (["Électronique", "Téléphones & Casques"], "électronique téléphones casque"),  # English rules, ASCII words
        (["Электроника", "Телефоны 5G"], "электроника телефоны g"),
        (["STRASSE", "Große Straße"], "grosse strasse"),
        (["मोबाइल", "फ़ोन"], "मोबाइल फ़ोन"),  # vowel signs are marks
        (["Home", ""], None),
        (["", "Home", " "], None),
    ],
)
def test_a_path_gives_the_string_of_the_recipe(levels: list[str], query: str | None) -> None:
    assert path_query(levels) == query


def catalogue(rows: list[tuple[str, list[str], int | None]]) -> pl.DataFrame:
    times = [None if day is None else START + timedelta(days=day) for *_, day in rows]
    return pl.DataFrame(
        {"item_id": [row[0] for row in rows], "categories": [row[1] for row in rows], "timestamp": times},
        schema={"item_id": pl.String, "categories": pl.List(pl.String), "timestamp": pl.Datetime("us", "UTC")},
    )


def test_each_path_of_an_item_is_a_query_and_equal_ones_count_once() -> None:
    table = catalogue([("a", ["X > Y Z > Z W", "Y > X", "Y > X", "alone"], None), ("b", ["alone"], None)])
    found = item_queries(table, ">")
    assert found.select("item_id", "queries").rows() == [("a", ["x y z w", "y x"])]
    whole = item_queries(catalogue([("a", ["Tools", "Hand Tools", "Saws"], None)]), "")
    assert whole["queries"].to_list() == [["hand tool saw"]]


def test_an_empty_level_is_none() -> None:
    table = catalogue([("a", ["Home >"], None), ("b", ["> Home", " > "], None), ("c", ["Home > > Knives"], None)])
    assert item_queries(table, ">").select("item_id", "queries").rows() == [("c", ["home knive"])]


def log(rows: list[tuple[str, str, int]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [row[0] for row in rows],
            "item_id": [row[1] for row in rows],
            "timestamp": pl.Series([START + timedelta(days=row[2]) for row in rows], dtype=pl.Datetime("us", "UTC")),
            "event": ["recommendation"] * len(rows),
            "query": pl.Series([None] * len(rows), dtype=pl.String),
            "block": pl.Series([None] * len(rows), dtype=pl.Int32),
        }
    )


TABLE = catalogue([("a", ["X > Y", "Z > W", "Q > R"], None), ("b", ["alone"], None), ("c", ["X > Y"], 5)])


def test_a_purchase_is_searched_for_at_its_own_instant_with_one_of_its_items_queries() -> None:
    events = log([("u", "a", 1), ("u", "b", 2), ("v", "a", 3)])
    both = with_category_queries(events, TABLE, ">")
    assert both.filter(pl.col("event") == "recommendation").equals(events)
    searches = both.filter(pl.col("event") == "search")
    assert searches.select("user_id", "item_id").rows() == [("u", "a"), ("v", "a")]
    assert searches["timestamp"].to_list() == [START + timedelta(days=1), START + timedelta(days=3)]
    assert set(searches["query"]) <= {"x y", "z w", "q r"}


def test_a_query_does_not_depend_on_other_rows_nor_on_a_category_of_the_future() -> None:
    events = log([(f"u{n}", "a", n) for n in range(30)] + [("u", "c", 4), ("u", "c", 5)])
    together = with_category_queries(events, TABLE, ">").filter(pl.col("event") == "search")
    assert len(set(together["query"])) == 3
    assert together.filter(pl.col("item_id") == "c")["timestamp"].to_list() == [START + timedelta(days=5)]
    alone = with_category_queries(events[7:8], TABLE, ">").filter(pl.col("event") == "search")
    assert alone.equals(together.filter(pl.col("user_id") == "u7"))


def test_a_log_with_searches_and_a_table_without_paths_are_refused() -> None:
    events = log([("u", "a", 1)])
    with pytest.raises(UserError, match="is for logs without searches"):
        with_category_queries(events.with_columns(event=pl.lit("search")), TABLE, ">")
    with pytest.raises(UserError, match="found no category path of two levels"):
        with_category_queries(events, TABLE, "/")
    with pytest.raises(UserError, match="found no category path of two levels"):
        with_category_queries(events, catalogue([("a", ["Home >"], None)]), ">")
    with pytest.raises(UserError, match="two levels, such as 3 > 14, but no words in them"):
        with_category_queries(events, catalogue([("a", ["alone", "3 > 14", "The > of"], None)]), ">")
    with pytest.raises(ValueError, match=r'needs log\.kind = "events"'):
        Config.model_validate(
            {"name": "x", "workspace": "w", "log": {"kind": "sequences", "sequences": "s", "queries": "categories"}}
        )


def test_reading_a_log_makes_its_searches_and_counts_them(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\nu,a,2024-01-02\nu,b,2024-01-03\nv,a,2024-01-04\n")
    (tmp_path / "items.csv").write_text("item_id,title,categories\na,A,X > Y|Z > W\nb,B,alone\n")
    values = {
        "name": "made",
        "workspace": str(tmp_path / "w"),
        "log": {"queries": "categories", "sources": [{"path": str(tmp_path / "events.csv")}]},
        "catalogue": {"sources": [{"path": str(tmp_path / "items.csv")}]},
    }
    reports: list[LogReport] = []
    said: list[str] = []
    for copy in ("a", "b"):
        workspace = Workspace(tmp_path / copy)
        reports.append(read_log(Config.model_validate(values), workspace, said.append))
    report = reports[0]
    assert (report.rows, report.accepted, report.made, report.duplicates) == (3, 5, 2, 0)
    assert report.digest == reports[1].digest
    assert "2 of the events are searches made of categories" in said[-1]
    stored = pl.read_parquet(workspace.log)
    assert stored.filter(pl.col("event") == "search")["query"].null_count() == 0
