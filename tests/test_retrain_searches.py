"""A nightly run on a log with searches: both objectives and `bm25` are on record, the gate looks at one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.growing import week, write_shop
from flows.artifacts import contest_rows
from flows.plain import run_plainly
from flows.promotion.history import read_history
from stages.workspace import Workspace


def test_a_decision_on_recommendations_records_searches_and_bm25_beside_them(tmp_path: Path) -> None:
    config = write_shop(tmp_path)
    lines = ["user_id,item_id,timestamp,event,query"]
    for user, item, instant in week(0, users=12) + week(1, users=12):
        lines.append(f"{user},{item},{instant},recommendation,")
        lines.append(f"{user},{item},{instant},search,number {item[1:]}")
    (tmp_path / "events" / "base.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = tmp_path / "workspace"
    arguments = {"config": str(config), "new": None, "close_now": False, "workspace": str(place)}
    run_plainly("retrain", arguments)
    (line,) = read_history(Workspace(place))[0]
    counters = {f"{name} after stage 1" for name in ("popularity", "recent_popularity", "item_graph")}
    assert set(line["scores"]) == {"single after stage 1", *counters}
    assert set(line["other_scores"]) == {"search"}
    searched = line["other_scores"]["search"]
    assert set(searched) == {"single after stage 1", "bm25 after stage 1", *counters}
    assert searched["bm25 after stage 1"] > 0.5  # a query names its item's number
    rows = {row["model"]: row for row in contest_rows(line)}
    assert rows["bm25 after stage 1"]["hit_at_10"] is None
    assert rows["bm25 after stage 1"]["hit_at_10, search"] == searched["bm25 after stage 1"]
