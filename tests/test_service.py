from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from flows.promotion.champion import champion
from flows.recommending import recommend
from flows.service import build_app
from flows.serving.batching import Batcher, BusyError
from flows.serving.guarding import LARGEST_BODY, Access, access
from flows.serving.pages import docs_page, try_page
from flows.serving.reasons import Reason, Reasons
from flows.serving.searching import TitleWords
from flows.serving.served import NOBODY, InService, Served, load_served
from models.baselines.item_graph import ItemGraph
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import recommender
from stages.jobs import Job
from stages.train import train_stage
from stages.workspace import Workspace, write_json
from tests import searching, tiny

if TYPE_CHECKING:
    from conftest import Trained

HERE = "http://127.0.0.1:8000"
HOSTILE = '<script>alert("x")</script> & ="A1"'


def crown(root: Path, method: str, stage: int = 1) -> Job:
    job = Job(method, 0, "same_stage", stage)
    write_json(root / "champion.json", {"schema": 1, "job": asdict(job), "key": "k", "digest": "d", "since": "now"})
    return job


@pytest.fixture
def shop(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained workspace whose champion is `single`."""
    root = tmp_path / "shop"
    shutil.copytree(trained.workspace.root, root, ignore=shutil.ignore_patterns("prefect", "mlartifacts", "mlflow.db"))
    crown(root, "single")
    return root


@pytest.fixture
def client(shop: Path) -> Iterator[TestClient]:
    with TestClient(build_app(InService(shop), Access()), base_url=HERE, raise_server_exceptions=False) as found:
        yield found


def user_of(root: Path) -> str:
    return pl.read_parquet(Workspace(root).stage_file(0))["user_id"][0]


def items_of(root: Path) -> list[str]:
    return pl.read_parquet(Workspace(root).catalogue / "items.parquet")["item_id"].to_list()


def ids(reply: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in reply["items"]]


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


def test_rare_words_weigh_more_and_ties_go_by_number() -> None:
    words = TitleWords(["red cup", "red lamp", "red cup", "blue bowl and a plate"])
    found = words.search([("RED lamp", NOBODY)], 10)[0]
    assert [item for item, _ in found] == [1, 0, 2]
    assert found[1][1] == found[2][1] < found[0][1]
    assert words.search([("green", NOBODY)], 10) == [[]]


def test_a_model_trained_on_searches_answers_them_itself(tmp_path: Path) -> None:
    """It reads what `recommend` hands it: the query, and which items of the history came by a search."""
    config = tiny.config(training={"first_epochs": 2}, search={"rec_history": "recommendation"})
    workspace = searching.ring(tmp_path, stages=1)
    job = Job("single", 0, "same_stage", 0)
    train_stage(config, workspace, job)
    dataset = load_dataset(config, workspace)
    model = recommender(config, workspace, dataset, job)
    served = Served(config, dataset, job, model)
    past = served.past(dataset.interactions.user_ids[1], None)
    assert 0 < past.searched.sum() < len(past.items)
    assert served.searcher.method == "single"
    (found,) = served.searcher.search([("find thing3", past)], 5)
    plain = model.recommend([past.items], 5, ["find thing3"], [past.searched])
    assert [item for item, _ in found] == plain.items[0].tolist()
    assert found != served.searcher.search([("find thing9", past)], 5)[0]
    bought = past.items[~past.searched]
    plain = model.recommend([bought], 5, searched=[np.zeros(len(bought), dtype=bool)])
    assert [item for item, _ in served.rank([past], 5)[0]] == plain.items[0].tolist()


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


def test_the_nearest_history_item_is_equal_then_linked_then_similar() -> None:
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 0]])
    users = np.zeros(2, dtype=np.int64)
    graph = ItemGraph(users, np.array([3, 0]), np.array([True, True]), known=5, exclude_history=False)
    reasons = Reasons(codes, graph.links, graph.known)
    history = np.array([3, 1, 2])
    assert reasons.nearest(np.array([1, 0, 4]), history) == [
        Reason(1, "again", 3),
        Reason(3, "taken_together", 0),
        None,
    ]
    assert reasons.nearest(np.array([0]), np.array([2, 1])) == [Reason(1, "similar", 2)]
    assert reasons.nearest(np.array([0]), np.array([], dtype=np.int64)) == [None]
    assert reasons.neighbours(3, 5) == [0]


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


# what comes together is ranked together


def test_requests_that_wait_are_ranked_in_one_batch_and_each_gets_its_own_answer() -> None:
    started, release = threading.Event(), threading.Event()
    batches: list[int] = []

    def rank(questions: Any, k: int) -> list[list[tuple[int, float]]]:
        batches.append(len(questions))
        started.set()
        assert release.wait(10)
        return [[(int(question), float(place)) for place in range(k)] for question in questions]

    batcher = Batcher(largest=4)
    first = batcher.submit(rank, 0, 1)
    assert started.wait(10)
    others = [batcher.submit(rank, number, number) for number in range(1, 7)]
    others[1].cancel()
    release.set()
    assert first.result(10) == [(0, 0.0)]
    for number, answer in enumerate(others, start=1):
        assert answer.cancelled() if number == 2 else answer.result(10) == [(number, float(p)) for p in range(number)]
    batcher.close()
    assert batches == [1, 3, 2]
    assert not batcher.alive


def test_a_full_line_refuses_and_a_question_that_fails_spoils_no_other_answer() -> None:
    release = threading.Event()

    def slow(questions: Any, k: int) -> list[list[tuple[int, float]]]:
        assert release.wait(10)
        return [[] for _ in questions]

    def failing(questions: Any, k: int) -> list[list[tuple[int, float]]]:
        return [[(1 // question, 0.0)] for question in questions]

    batcher = Batcher(waiting=3)
    waiting = [batcher.submit(slow, 0, 1)]
    while batcher.waiting:
        time.sleep(0.001)
    waiting += [batcher.submit(failing, 0, 1), batcher.submit(failing, 1, 1), batcher.submit(slow, 0, 1)]
    with pytest.raises(BusyError, match="3 requests are waiting"):
        batcher.submit(slow, 0, 1)
    release.set()
    with pytest.raises(ZeroDivisionError):
        waiting[1].result(10)
    assert waiting[2].result(10) == [(1, 0.0)]
    assert waiting[0].result(10) == waiting[3].result(10) == []
    batcher.close()


# the champion


def test_a_missing_champion_leaves_the_best_of_the_report_and_a_damaged_one_is_named(shop: Path) -> None:
    assert champion(Workspace(shop)) == Job("single", 0, "same_stage", 1)
    (shop / "champion.json").write_text('{"job": {"method": "single"}}')
    with pytest.raises(UserError, match=r"champion\.json"):
        champion(Workspace(shop))
    (shop / "champion.json").unlink()
    assert champion(Workspace(shop)) is None
    assert load_served(shop).job == recommend(shop, user=user_of(shop)).job


def test_a_new_champion_takes_over_and_a_broken_one_does_not(shop: Path) -> None:
    place = InService(shop)
    old = place.current
    assert not place.look()
    crown(shop, "frozen")
    assert place.look()
    assert (place.current.job.method, old.job.method, place.swaps) == ("frozen", "single", 1)
    crown(shop, "single", stage=7)
    assert not place.look()
    assert "stage 7" in (place.fault or "")
    assert (place.current.job.method, place.failures) == ("frozen", 1)
    crown(shop, "single")
    assert place.look()
    assert place.fault is None


def test_a_fixed_method_does_not_follow_the_champion(shop: Path) -> None:
    place = InService(shop, method="item_graph")
    crown(shop, "frozen")
    place.look()
    assert place.current.job.method == "item_graph"


def test_no_request_is_dropped_or_answered_wrongly_while_champions_change(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients ask without pause while the champion changes six times; every answer is its own model's."""
    user = user_of(shop)
    plain = {
        method: [row[0] for row in recommend(shop, user=user, method=method).rows] for method in ("single", "frozen")
    }
    assert plain["single"] != plain["frozen"]
    monkeypatch.setattr("flows.service.LOOK", 0.02)
    place = InService(shop)
    done = threading.Event()

    def ask() -> set[str]:
        seen = set()
        while not done.is_set():
            answer = client.post("/recommend", json={"user": user})
            assert answer.status_code == 200, answer.text
            method = answer.json()["model"]["method"]
            assert ids(answer.json()) == plain[method]
            seen.add(method)
        return seen

    with TestClient(build_app(place, Access()), base_url=HERE) as client, ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        for turn in range(6):
            crown(shop, "frozen" if turn % 2 == 0 else "single")
            limit = time.monotonic() + 30
            while place.swaps == turn and time.monotonic() < limit:
                time.sleep(0.01)
        done.set()
        assert set().union(*(one.result(30) for one in asking)) == {"single", "frozen"}
    assert place.swaps == 6


# what strangers may try


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give either user or history"),
        ({"user": "u", "history": ["i"]}, "give either user or history"),
        ({"user": 7}, "user: Input should be a valid string"),
        ({"user": ""}, "user: "),
        ({"user": "x" * 257}, "at most 256"),
        ({"history": ["i"] * 1001}, "at most 1000"),
        ({"history": "i"}, "history: "),
        ({"user": "u", "k": 0}, "k: "),
        ({"user": "u", "k": 21}, "this model gives at most 20 items"),
        ({"user": "u", "k": 10**40}, "k"),
        ({"user": "u", "k": "5"}, "k: "),
        ({"user": "u", "<b>\u202e": 1}, "<b>?: Extra inputs"),
        ([], "body: "),
    ],
)
def test_a_wrong_request_is_answered_with_one_sentence(client: TestClient, body: Any, words: str) -> None:
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"user": "\\ud800"}',
        b'{"history": ["\\udfff"]}',
        b'{"user": "u", "k": NaN}',
        b'{"\\ud800": 1}',
    ],
)
def test_broken_bodies_are_refused_and_the_service_goes_on(client: TestClient, body: bytes) -> None:
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert isinstance(answer.json()["error"], str)
    assert client.get("/ready").status_code == 200


@pytest.mark.parametrize(
    "hostile", ["../../etc/passwd", HOSTILE, "a\0b", "'; drop table items; --", "%2e%2e", "‮evil", "🙂" * 100]
)
def test_hostile_ids_are_only_ever_ids(client: TestClient, hostile: str) -> None:
    answer = client.post("/recommend", json={"user": hostile})
    assert answer.json()["fallback"] is True
    assert answer.headers["content-type"] == "application/json"
    assert client.post("/search", json={"query": hostile}).status_code == 200
    from urllib.parse import quote

    assert client.get(f"/items/{quote(hostile, safe='')}").status_code == 404


def test_a_body_too_large_is_refused_whether_or_not_it_says_its_size(client: TestClient) -> None:
    big = b" " * (LARGEST_BODY + 1)
    assert client.post("/recommend", content=big).status_code == 413
    assert client.post(
        "/recommend", content=(big[start : start + 9999] for start in range(0, len(big), 9999))
    ).json() == {"error": f"the body is too large; at most {LARGEST_BODY} bytes are read"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:9000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("localhost/x", 403),
        ("localhost:x", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_header_is_refused(client: TestClient, host: str, status: int) -> None:
    assert client.get("/model", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"), [(HERE, 200), ("http://evil.example", 403), ("null", 403), ("http://localhost:8000", 403)]
)
def test_a_foreign_page_cannot_ask(client: TestClient, origin: str, status: int) -> None:
    assert client.post("/search", json={"query": "x"}, headers={"origin": origin}).status_code == status


def test_beyond_this_machine_names_and_a_token_are_needed(monkeypatch: pytest.MonkeyPatch, shop: Path) -> None:
    monkeypatch.delenv("DRIFTREC_TOKEN", raising=False)
    token = "0123456789abcdef"
    for host in ("0.0.0.0", "::", "192.168.0.7", "shop.example"):  # noqa: S104
        with pytest.raises(UserError, match="--allowed-hosts"):
            access(host, None)
        with pytest.raises(UserError, match="DRIFTREC_TOKEN"):
            access(host, "shop.example:8000")
    with pytest.raises(UserError, match="at least 16"):
        access("127.0.0.1", None, "short")
    with pytest.raises(UserError, match="name:port"):
        access("0.0.0.0", "shop.example", token)  # noqa: S104
    rule = access("0.0.0.0", "shop.example:8000", token)  # noqa: S104
    with TestClient(build_app(InService(shop), rule), base_url="http://shop.example:8000") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": token}):
            assert client.get("/model", headers=given).status_code == 401
        assert client.get("/model", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert client.get("/health", headers={"host": "127.0.0.1:8000"}).status_code == 403


def test_pages_load_nothing_from_elsewhere_and_run_only_their_own_script(client: TestClient) -> None:
    page, policy = try_page()
    assert client.get("/").text == page
    for path in ("/", "/docs"):
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert "unsafe-inline" not in policy
    assert "innerHTML" not in page
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in client.get("/docs").text


def test_the_description_of_the_api_is_escaped() -> None:
    schema = {"paths": {"/x": {"get": {"description": HOSTILE, "responses": {}}}}, "components": {"schemas": {}}}
    assert "<script" not in docs_page(schema)[0]
