"""Requests that arrive together are ranked together: worker threads behind one bounded queue.

A worker never waits for company. While it ranks one batch the next requests queue up, and it takes them all at once:
a single client pays nothing for it, many clients share the cost of each pass through the model.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flows.serving.searching import Ranking

Rank = Callable[[Sequence[Any], int], list[Ranking]]
"""Answers a batch of questions (histories, or queries with histories) with as many lists of at most that length."""
Observe = Callable[[int, float], None]

MOMENT = 0.008
"""Seconds between two requests of clients that were answered together and ask again."""


class BusyError(Exception):
    """So many requests are waiting that another would wait too long."""


@dataclass(frozen=True)
class _Asked:
    rank: Rank
    question: Any
    k: int
    answer: Future[Ranking] = field(default_factory=Future)


class Batcher:
    """Answers questions in batches of at most `largest`, at most `waiting` of them in line.

    Args:
        largest: questions a batch holds at most.
        waiting: requests in line at most; a further one is refused.
        observe: told (questions, seconds) after each batch.
        workers: batches ranked at the same time, each in a thread of its own.
    """

    def __init__(self, largest: int = 32, waiting: int = 256, observe: Observe | None = None, workers: int = 1) -> None:
        self.largest, self.observe = largest, observe
        self._line: queue.Queue[_Asked | None] = queue.Queue(waiting)
        names = [f"driftrec-ranking-{number}" for number in range(workers)]
        self._workers = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """Requests in line now."""
        return self._line.qsize()

    @property
    def alive(self) -> bool:
        """Whether every worker still takes requests."""
        return all(worker.is_alive() for worker in self._workers)

    def submit(self, rank: Rank, question: Any, k: int) -> Future[Ranking]:
        """Line up one question; the future holds its `k` best items.

        Requests with the same `rank` may share a batch, so a model's answer must not depend on its neighbours.

        Raises:
            BusyError: the line is full.
        """
        asked = _Asked(rank, question, k)
        try:
            self._line.put_nowait(asked)
        except queue.Full:
            raise BusyError(f"{self._line.maxsize} requests are waiting; try again in a second") from None
        return asked.answer

    def close(self) -> None:
        """Answer what is in line, then stop."""
        for _ in self._workers:
            self._line.put(None)  # a worker that meets one takes no more
        for worker in self._workers:
            worker.join()

    def _run(self) -> None:
        batch: list[_Asked] = []
        while (first := self._line.get()) is not None:
            batch, ended = self._together(first, len(batch))
            # A request keeps the model it came in under: after a swap a batch may hold both.
            for rank in dict.fromkeys(asked.rank for asked in batch):
                self._answer(rank, [asked for asked in batch if asked.rank == rank])
            if ended:
                return

    def _together(self, first: _Asked, before: int) -> tuple[list[_Asked], bool]:
        """Everything in line behind `first`, up to the largest batch; and whether the end was in it.

        Clients answered together ask again one after the other: until as many are back as the batch `before` held, the
        next one is given a moment.
        """
        batch = [first]
        while len(batch) < self.largest:
            try:
                asked = self._line.get(timeout=MOMENT) if len(batch) < before else self._line.get_nowait()
            except queue.Empty:
                break
            if asked is None:
                return batch, True
            batch.append(asked)
        return batch, False

    def _answer(self, rank: Rank, batch: list[_Asked]) -> None:
        batch = [asked for asked in batch if asked.answer.set_running_or_notify_cancel()]
        if not batch:
            return
        started = time.perf_counter()
        if not _fill(rank, batch):
            # One question that the model cannot take must not spoil its neighbours' answers.
            for asked in batch:
                _fill(rank, [asked], last=True)
        if self.observe is not None:
            self.observe(len(batch), time.perf_counter() - started)


def _fill(rank: Rank, batch: list[_Asked], last: bool = False) -> bool:
    """Answer a batch; False where that failed, which at the `last` attempt is the answer."""
    try:
        found = rank([asked.question for asked in batch], max(asked.k for asked in batch))
    except Exception as error:
        if last:
            for asked in batch:
                asked.answer.set_exception(error)
        return False
    for asked, ranking in zip(batch, found, strict=True):
        asked.answer.set_result(ranking[: asked.k])
    return True
