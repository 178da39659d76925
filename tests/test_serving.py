"""The model in service, its reasons, and its successors."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from flows.experiment import trained_file
from flows.promotion.champion import champion
from flows.recommending import recommend
from flows.service import build_app
from flows.serving.guarding import Access
from flows.serving.reasons import Reason, Reasons
from flows.serving.searching import TitleWords
from flows.serving.served import NOBODY, InService, Served, load_served
from models.baselines.item_graph import ItemGraph
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import recommender
from stages.jobs import Job
from stages.train import train_stage
from stages.workspace import Workspace, read_json, write_json
from tests import searching, tiny
from tests.storefront import HERE, crown, ids, user_of


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


def said_in_words(error: OSError) -> UserError:
    """As a reader of files says it."""
    try:
        try:
            raise error
        except OSError as found:
            raise UserError(f"champion.json: not readable: {found}") from None
    except UserError as told:
        return told


FULL = OSError(errno.EMFILE, "Too many open files")
GONE = FileNotFoundError(errno.ENOENT, "No such file")


@pytest.mark.parametrize(
    ("error", "tried"),
    [(FULL, 4), (said_in_words(FULL), 4), (GONE, 1), (said_in_words(GONE), 1), (UserError("altered"), 1)],
)
def test_a_champion_that_the_machine_kept_from_loading_is_tried_ever_more_seldom(
    shop: Path, caplog: pytest.LogCaptureFixture, error: Exception, tried: int
) -> None:
    loads: list[Path] = []

    def load(root: Path, method: str | None, seed: int | None) -> Served:
        loads.append(root)
        if 1 < len(loads) < 5:
            raise error
        return load_served(root, method, seed)

    place = InService(shop, load=load)
    crown(shop, "frozen")
    caplog.clear()
    found = [place.look() for _ in range(9)]
    assert found == [turn == 7 and tried == 4 for turn in range(9)]
    assert len(loads) == 1 + tried
    assert (place.failures, place.fault is None) == (min(tried, 3), tried == 4)
    assert caplog.text.count("still serving") == 1
    if tried == 1:
        for turn in range(3):
            crown(shop, ("single", "frozen", "single")[turn])
            assert place.look() == (turn == 2)
    assert place.fault is None


@pytest.mark.parametrize(("error", "again"), [(said_in_words(FULL), True), (UserError("altered"), False)])
def test_a_champion_that_an_earlier_one_stands_in_for_is_tried_again_where_the_machine_was_at_fault(
    shop: Path, error: UserError, again: bool
) -> None:
    def load(root: Path, method: str | None, seed: int | None) -> Served:
        found = load_served(root, method, seed)
        loads.append(root)
        return Served(found.config, found.dataset, found.job, found.model, error) if len(loads) in faulty else found

    for faulty in ((1,), (2,)):  # at the start, and at a later look
        loads: list[Path] = []
        place = InService(shop, load=load)
        assert (place.fault is None) == (2 in faulty)
        if place.fault is None:
            crown(shop, "frozen")
            assert not place.look()
        assert place.look() == again
        assert (place.fault is None) == again
        crown(shop, "single")


def test_a_fixed_method_does_not_follow_the_champion(shop: Path) -> None:
    place = InService(shop, method="item_graph")
    crown(shop, "frozen")
    place.look()
    assert place.current.job.method == "item_graph"


def test_a_fixed_method_follows_its_own_newest_model(shop: Path) -> None:
    path = trained_file(Workspace(shop))
    listed = read_json(path)
    write_json(path, [row for row in listed if row["stage"] == 0])
    places = [InService(shop, **asked) for asked in ({"method": "single"}, {"seed": 0}, {"method": "item_graph"})]
    assert [place.current.job.stage for place in places] == [0, 0, 0]
    write_json(path, listed)
    assert [place.look() for place in places] == [True, True, True]
    assert [place.current.job.stage for place in places] == [1, 1, 1]
    assert not any(place.look() for place in places)
    write_json(path, [*listed, {**listed[0], "method": "peso"}])  # what others train is no reason to load anew
    assert not any(place.look() for place in places)


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


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_service_told_to_stop_gives_the_last_answer_and_ends_without_a_word(shop: Path, number: int) -> None:
    command = [sys.executable, "-m", "flows.cli", "serve", "--workspace", str(shop), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "500"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        port = int(process.stdout.readline().rpartition(":")[2])
        body = json.dumps({"user": user_of(shop)}).encode()
        head = f"POST /recommend HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/ready", timeout=60
        ) as up:  # the socket takes calls earlier
            assert up.status == 200
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body[:5])
            time.sleep(0.5)  # it has read the head when it is told
            process.send_signal(number)
            time.sleep(0.5)
            line.sendall(body[5:])
            answer = b"".join(iter(lambda: line.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert ids(json.loads(answer.partition(b"\r\n\r\n")[2])) == [
            row[0] for row in recommend(shop, user_of(shop)).rows
        ]
        said, complained = process.communicate(timeout=60)
    assert (process.returncode, said, complained) == (0, "", "")


def test_a_file_in_place_of_the_workspace_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no driftrec workspace"):
        InService(tmp_path / "file")
