"""One model in memory, ready to answer, and the look-out for its successor. Knows nothing of HTTP."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from flows import machine
from flows.experiment import remembered_config
from flows.promotion.champion import FILE
from flows.recommending import first_that_loads, loaded, models_in_service
from flows.serving.reasons import Reasons
from flows.serving.searching import ModelSearch, Past, Ranking, Searcher, TitleWords, listed
from models.baselines.item_graph import ItemGraph
from models.recommender import Recommender
from stages.baselines import fit_baseline
from stages.config import Config
from stages.dataset import Dataset, load_dataset
from stages.errors import UserError
from stages.jobs import BASELINES, Job
from stages.workspace import Workspace

FALLBACK = "recent_popularity"
"""Who answers where nothing is known of a person."""
MOST = 4
"""Threads that rank at the same time, at most: Python runs one of them at a time between two operations of torch."""
SELDOM = 64
"""Looks from one try to the next, at most, where the machine keeps failing on the same files."""
NOBODY = Past(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))
Mark = tuple[object, ...]
log = logging.getLogger("flows")


class Served:
    """A model, the log's people and items, and the fallback.

    Args:
        config: the workspace's, with the settings that the model was trained under.
        dataset: its prepared log.
        job: what `model` is.
        model: ranks the catalogue known at `job.stage`.
        fault: why this one stands in for the champion; None where it is the one that was asked for.
    """

    def __init__(
        self, config: Config, dataset: Dataset, job: Job, model: Recommender, fault: UserError | None = None
    ) -> None:
        self.fault = None if fault is None else str(fault)
        self.passing = is_passing(fault)
        """Whether the machine is at fault, and another try may find the champion well."""
        catalogue, events = dataset.catalogue, dataset.interactions
        self.config, self.dataset, self.job, self.model = config, dataset, job, model
        self.limit = config.evaluation.beam
        self.numbers = {item: number for number, item in enumerate(catalogue.item_ids)}
        self.users = {user: number for number, user in enumerate(events.user_ids)}
        self.popular = self._baseline(FALLBACK)
        graph = self._baseline("item_graph")
        if not isinstance(graph, ItemGraph):
            raise TypeError(f"the baseline item_graph is a {type(graph).__name__}")
        self.reasons = Reasons(catalogue.codes, graph.links, graph.known)
        self.searcher: Searcher = TitleWords(catalogue.titles[: catalogue.known(job.stage)])
        if events.query is not None and job.method not in BASELINES:
            self.searcher = ModelSearch(job.method, model)

    def _baseline(self, name: str) -> Recommender:
        known, own = self.dataset.catalogue.known(self.job.stage), self.config.evaluation.exclude_history
        job = self.job
        return fit_baseline(name, self.dataset.interactions, known, job.stage, job.protocol, job.seed, own)

    def rank(self, people: Sequence[Past], k: int) -> list[Ranking]:
        """The model's `k` best items for each person; what it reads is what it was trained to read."""
        if self.dataset.interactions.query is None:
            return listed(self.model.recommend([past.items for past in people], k))
        alone = self.config.search.rec_history == "recommendation"
        read = [~past.searched if alone else np.ones(len(past.items), dtype=bool) for past in people]
        histories = [past.items[kept] for past, kept in zip(people, read, strict=True)]
        searched = [past.searched[kept] for past, kept in zip(people, read, strict=True)]
        return listed(self.model.recommend(histories, k, searched=searched))

    @property
    def small(self) -> bool:
        """Whether a pass gains little from a second thread, and nearly all of it from a second pass beside the first.

        A large model fills the cores by itself.
        """
        own = self.config.backbone
        return own.path is None and not (own.device != "cpu" and torch.cuda.is_available())

    @property
    def side_by_side(self) -> int:
        """Batches worth ranking at the same time, a thread each."""
        return max(1, min(machine.cores() // torch.get_num_threads(), MOST)) if self.small else 1

    def fallback(self, k: int) -> Ranking:
        """The `k` most taken items of the newest stages."""
        return listed(self.popular.recommend([np.empty(0, dtype=np.int64)], k))[0]

    def past(self, user: str | None, history: Sequence[str] | None) -> Past:
        """What is known of `user`, or of whoever took the items in `history`."""
        if history is not None:
            return self._made_up(history)
        row = self.users.get(user or "")
        if row is None:
            return replace(NOBODY, reason=f"user {user!r} is not in the log")
        events = self.dataset.interactions
        own = slice(int(events.offsets[row]), int(events.offsets[row + 1]))
        return Past(events.items[own], events.searched[own])

    def _made_up(self, history: Sequence[str]) -> Past:
        unknown = [item for item in history if item not in self.numbers]
        items = np.array([self.numbers[item] for item in history if item in self.numbers], dtype=np.int64)
        if len(items):
            return Past(items, np.zeros(len(items), dtype=bool), unknown)
        reason = "no item of the history is in the catalogue" if history else "the history is empty"
        return replace(NOBODY, unknown=unknown, reason=reason)

    def examples(self, count: int = 4) -> list[str]:
        """Users to try the service with: spread over the log, each with a history to look at."""
        lengths = np.diff(self.dataset.interactions.offsets)
        fitting = np.flatnonzero(lengths >= min(5, int(lengths.max(initial=0))))
        chosen = fitting[np.linspace(0, len(fitting) - 1, min(count, len(fitting))).astype(int)] if len(fitting) else []
        return [self.dataset.interactions.user_ids[row] for row in chosen]


def one_thread_a_pass(served: Served) -> None:
    """Leave the cores to passes beside each other where the model is small, unless OMP_NUM_THREADS says otherwise."""
    if served.small and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)


def load_served(root: Path, method: str | None = None, seed: int | None = None) -> Served:
    """The model a workspace answers with: the one asked for, else the champion, else the best of the newest report.

    For a champion that cannot be loaded the newest earlier one stands in that can, and its `fault` says so.

    Raises:
        UserError: nothing is trained there, or what is there is damaged or being written.
    """
    config, workspace = remembered_config(root, answering=True)
    chosen = models_in_service(workspace, method, seed)
    dataset = load_dataset(config, workspace, answering=True)
    model, fault = first_that_loads(chosen, partial(loaded, config, workspace, dataset))
    return Served(model.config, dataset, model.job, model.recommender, fault)


class Retries:
    """Which looks try the same files again after the machine failed on them: the next one, then ever fewer."""

    def __init__(self) -> None:
        self._mark: Mark | None = None
        self._failures = self._passed_over = 0

    def due(self, mark: Mark) -> bool:
        """Whether this look tries."""
        if mark != self._mark or not self._passed_over:
            return True
        self._passed_over -= 1
        return False

    def failed(self, mark: Mark) -> None:
        """Another try of these files failed."""
        self._failures = self._failures + 1 if mark == self._mark else 0
        self._mark, self._passed_over = mark, min(2**self._failures, SELDOM) - 1


class InService:
    """The model that answers now; `look` puts its successor in its place once that is loaded whole.

    Args:
        root: workspace.
        method: always this method's newest model; absent: the champion.
        seed: of the method.
        load: how a model is loaded.

    Raises:
        UserError: there is no model to begin with.
    """

    def __init__(
        self,
        root: Path,
        method: str | None = None,
        seed: int | None = None,
        load: Callable[[Path, str | None, int | None], Served] = load_served,
    ) -> None:
        self.root, self.method, self.seed, self.load = root, method, seed, load
        self.mark = self._mark()
        self.current = load(root, method, seed)
        if self.current.passing:
            self.mark = ()
        self._retries = Retries()
        self.swaps, self.failures = 0, int(self.current.fault is not None)
        self._looking = threading.Lock()
        self.fault: str | None = self.current.fault
        """Why the newest model could not be loaded; None once one was."""

    def look(self) -> bool:
        """Load what is to be served now if the workspace says otherwise than before; True after a swap.

        One assignment replaces the model, so a request sees the old one or the new one, whole. A model that cannot be
        loaded leaves the old one in service and is tried again when the files change, and where the machine failed and
        not the files, at the next look and then ever more seldom.
        """
        with self._looking:
            return self._look()

    def _look(self) -> bool:
        found = self._mark()
        if found == self.mark or not self._retries.due(found):
            return False
        try:
            served = self.load(self.root, self.method, self.seed)
            fault, passing = (
                served.fault,
                served.passing,
            )  # an earlier champion is no better than the model that answers
        except (UserError, OSError, ValueError) as error:
            served, fault, passing = self.current, str(error), is_passing(error)
        if fault is not None:
            if not (passing and fault == self.fault):
                log.warning("still serving %s: %s", self.current.job, fault)
            self.mark, self.fault = self.mark if passing else found, fault
            self._retries.failed(found)
            self.failures += 1
            return False
        if self._mark() != found:
            return False  # written meanwhile: the next look loads it anew
        self.mark, self.current, self.fault = found, served, None
        self.swaps += 1
        log.info("serving %s", served.job)
        return True

    def _mark(self) -> Mark:
        workspace = Workspace(self.root)
        if self.method is None and self.seed is None:
            return mark(workspace)
        try:
            return (*mark(workspace), models_in_service(workspace, self.method, self.seed)[0])
        except UserError as error:
            return (*mark(workspace), str(error))


def is_passing(error: BaseException | None) -> bool:
    """Whether it comes of the machine, such as too many open files, and not of what the files hold or lack."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    # A UserError says in words what went wrong while it was raised.
    return error is not None and is_passing(error.__cause__ or error.__context__)


def mark(workspace: Workspace) -> Mark:
    """Changes whenever another champion, other histories or other items may have to be served."""
    files = (
        workspace.root / FILE,
        workspace.reports / "latest.json",
        workspace.stages / "manifest.json",
        workspace.catalogue / "manifest.json",
    )
    return tuple(_stamp(path) for path in files)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
