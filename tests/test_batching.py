"""What comes together is ranked together."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from flows.serving import batching
from flows.serving.batching import Batcher, BusyError


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


def test_two_workers_rank_two_batches_at_once_and_both_end_when_told() -> None:
    together = threading.Barrier(2, timeout=10)

    def rank(questions: Any, k: int) -> list[list[tuple[int, float]]]:
        together.wait()  # nobody goes on alone
        return [[(int(question), 0.0)] for question in questions]

    batcher = Batcher(largest=1, workers=2)
    answers = [batcher.submit(rank, number, 1) for number in range(6)]
    assert [answer.result(10) for answer in answers] == [[(number, 0.0)] for number in range(6)]
    assert batcher.alive
    batcher.close()
    assert not batcher.alive


def test_clients_answered_together_are_ranked_together_again_though_they_ask_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "MOMENT", 5.0)  # this machine may be busy
    batches: list[int] = []
    started, release = threading.Event(), threading.Event()

    def rank(questions: Any, k: int) -> list[list[tuple[int, float]]]:
        batches.append(len(questions))
        started.set()
        assert release.wait(10)
        return [[] for _ in questions]

    batcher = Batcher()
    waiting = [batcher.submit(rank, 0, 1)]
    assert started.wait(10)
    waiting += [batcher.submit(rank, number, 1) for number in range(3)]
    release.set()
    for answer in waiting:
        answer.result(10)
    again = []
    for number in range(3):
        again.append(batcher.submit(rank, number, 1))
        time.sleep(0.01)
    for answer in again:
        answer.result(10)
    batcher.close()
    assert batches == [1, 3, 3]
