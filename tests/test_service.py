from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from flows.recommending import recommend
from flows.service import listening
from flows.serving.served import load_served
from stages.workspace import Workspace
from tests.storefront import ids, items_of, user_of


def test_the_service_recommends_what_the_command_does(client: TestClient, shop: Path) -> None:
    user, items = user_of(shop), items_of(shop)
    for asked, plain in (
        ({"user": user, "k": 7}, recommend(shop, user=user, k=7)),
        ({"history": items[:3]}, recommend(shop, history=items[:3])),
    ):
        answer = client.post("/recommend", json=asked)
        assert answer.status_code == 200
        reply = answer.json()
        assert reply["model"] == {"method": "single", "seed": 0, "protocol": "same_stage", "stage": 1}
        assert [(one["item_id"], one["title"]) for one in reply["items"]] == [row[:2] for row in plain.rows]
        assert [one["score"] for one in reply["items"]] == pytest.approx([row[2] for row in plain.rows], abs=1e-5)
        assert [one["rank"] for one in reply["items"]] == list(range(1, 1 + len(plain.rows)))
        assert reply["fallback"] is False
        assert [one["title"] for one in reply["history"]] == plain.history[-20:]
        assert reply["history_length"] == len(plain.history)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"user": "nobody <b>"}, "user 'nobody <b>' is not in the log"),
        ({"history": []}, "the history is empty"),
        ({"history": ["none", "nor this"]}, "no item of the history is in the catalogue"),
    ],
)
def test_whom_nothing_is_known_of_gets_what_was_taken_most_of_late(
    client: TestClient, shop: Path, asked: dict[str, Any], reason: str
) -> None:
    reply = client.post("/recommend", json={**asked, "k": 5}).json()
    served = load_served(shop)
    counts = np.asarray(served.popular.recommend([np.empty(0, dtype=np.int64)], 5).items[0])
    assert reply["fallback"] is True
    assert reply["method"] == "recent_popularity"
    assert reply["reason"].startswith(reason)
    assert reply["unknown_items"] == asked.get("history", [])
    assert ids(reply) == [served.dataset.catalogue.item_ids[item] for item in counts]


def test_unknown_items_of_a_history_are_left_out_and_listed(client: TestClient, shop: Path) -> None:
    items = items_of(shop)[:2]
    whole = client.post("/recommend", json={"history": items}).json()
    mixed = client.post("/recommend", json={"history": [items[0], "none", items[1]]}).json()
    assert mixed["unknown_items"] == ["none"]
    assert mixed["items"] == whole["items"]
    assert mixed["fallback"] is False


def test_search_ranks_titles_by_their_words_and_says_so(client: TestClient, shop: Path) -> None:
    titles = pl.read_parquet(Workspace(shop).catalogue / "items.parquet")["title"].to_list()
    reply = client.post("/search", json={"query": titles[5].upper(), "user": user_of(shop), "k": 3}).json()
    assert reply["method"] == "title_words"
    assert reply["items"][0]["title"] == titles[5]
    assert reply["history_length"] > 0
    assert client.post("/search", json={"query": "zzz unheard of"}).json()["items"] == []
    assert "blank" in client.post("/search", json={"query": " \t"}).json()["error"]
    assert "not in the log" in client.post("/search", json={"query": "a", "user": "nobody"}).json()["reason"]


def test_an_item_is_shown_with_its_codes_and_its_neighbours(client: TestClient, shop: Path) -> None:
    items = pl.read_parquet(Workspace(shop).catalogue / "items.parquet")
    reply = client.get(f"/items/{items['item_id'][0]}").json()
    assert reply["title"] == items["title"][0]
    assert reply["codes"] == items["codes"][0].to_list()
    assert reply["known"] is True
    assert items["item_id"][0] not in [one["item_id"] for one in reply["taken_together"]]
    missing = client.get("/items/none/at%20all")
    assert missing.status_code == 404
    assert missing.json() == {"error": "item 'none/at all' is not in the catalogue"}


def test_every_recommended_item_names_a_history_item_as_nearest(client: TestClient, shop: Path) -> None:
    reply = client.post("/recommend", json={"user": user_of(shop), "k": 20}).json()
    past = set(items_of(shop))
    given = [one["why"] for one in reply["items"] if one["why"]]
    assert given
    assert {why["item_id"] for why in given} <= past
    for one in reply["items"]:
        assert one["why"] is None or (one["why"]["kind"] == "again") == (one["why"]["item_id"] == one["item_id"])


def test_health_readiness_and_metrics_tell_how_it_goes(client: TestClient, shop: Path) -> None:
    assert client.get("/health").json() == {"ok": True, "fault": None}
    assert client.get("/ready").status_code == 200
    for _ in range(3):
        client.post("/recommend", json={"user": user_of(shop)})
    client.post("/recommend", json={"user": "nobody"})
    client.get("/a/path/of/their/own")
    text = client.get("/metrics").text
    assert 'driftrec_requests_total{path="/recommend",status="200"} 4.0' in text
    assert 'driftrec_requests_total{path="other",status="404"} 1.0' in text
    assert "driftrec_fallbacks_total 1.0" in text
    assert "driftrec_batch_size_sum 3.0" in text
    assert 'driftrec_champion{method="single",protocol="same_stage",seed="0",stage="1"} 1.0' in text
    assert "their" not in text


def test_small_answers_are_sent_at_once() -> None:
    """asyncio sends without delay only on sockets that say they are TCP; else each answer would wait 40 ms."""
    with listening("127.0.0.1", 0) as found:
        assert found.proto == socket.IPPROTO_TCP
