"""`driftrec recommend` and `driftrec search`: one list from a trained workspace."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from flows.experiment import remembered_config, trained_models
from flows.promotion.champion import predecessors
from flows.promotion.history import read_history
from stages.errors import UserError
from stages.jobs import BASELINES, Job, Pin
from stages.settings import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from models.recommender import Recommender
    from stages.config import Config
    from stages.dataset import Dataset
    from stages.interactions import Catalogue, IntArray
    from stages.search_config import Objective
    from stages.workspace import Workspace

T = TypeVar("T")
log = logging.getLogger("flows")


@dataclass(frozen=True)
class Listing:
    """A ranked list.

    Attributes:
        job: the model that made it.
        history: titles of the items it rests on, oldest first.
        rows: item id, title and score, best first.
    """

    job: Job
    history: list[str]
    rows: list[tuple[str, str, float]]


def recommend(
    root: Path,
    user: str | None = None,
    history: list[str] | None = None,
    k: int = 10,
    method: str | None = None,
    seed: int | None = None,
    query: str | None = None,
) -> Listing:
    """Rank items for a user of the log, or for a history given by item ids, or for a query after either or neither.

    Args:
        root: a workspace in which something was trained.
        user: id in the log.
        history: item ids, oldest first; in place of a user.
        k: length of the list, at most the config's `evaluation.beam` for a trained model.
        method: a trained method or a baseline; absent: the champion, or what the newest report puts first.
        seed: absent: the lowest trained one.
        query: what to search for; absent: a recommendation.

    Raises:
        UserError: nothing trained, or an unknown user, item, method or seed; a user and a history; an empty query, or
            no search in the log.
    """
    from stages.dataset import load_dataset

    if user is not None and history is not None:
        raise UserError(f"--user {user} and --history exclude each other; give one, as a user's history is the log's")
    config, workspace = remembered_config(root, answering=True)
    objective: Objective = "recommendation" if query is None else "search"
    chosen = models_in_service(workspace, method, seed, objective)
    if not 1 <= k <= config.evaluation.beam:
        raise UserError(f"-k {k}: give a number from 1 to evaluation.beam, which is {config.evaluation.beam} here")
    dataset = load_dataset(config, workspace, answering=True)
    model, _ = first_that_loads(chosen, partial(loaded, config, workspace, dataset, objective=objective))
    past, request = _asked(model.config, dataset, user, history, query)
    found = model.recommender.recommend([past], k, **request)
    names = dataset.catalogue
    rows = [
        (names.item_ids[item], names.titles[item], float(score))
        for item, score in zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True)
        if item >= 0
    ]
    return Listing(model.job, [names.titles[item] for item in past.tolist()], rows)


@dataclass(frozen=True)
class Chosen:
    """A model to answer with.

    Attributes:
        job: what it is.
        pin: the checkpoint it is loaded by; None: the one that the workspace's settings give.
    """

    job: Job
    pin: Pin | None = None


def models_in_service(
    workspace: Workspace, method: str | None = None, seed: int | None = None, objective: Objective = "recommendation"
) -> list[Chosen]:
    """The model to answer with: the one asked for, else the champion, else the best of the newest report.

    Behind the champion come those that a roll back reaches: the newest that can be loaded stands in for a damaged one.

    Raises:
        UserError: nothing is trained, or not that, or the gate has let nothing into service.
    """
    root = workspace.root
    if method is None and seed is None:
        if crowned := predecessors(workspace):
            return [Chosen(found.job, found.pin) for found in crowned]
        _see_refusal(workspace)
    models = trained_models(workspace)
    job = choose([found.job for found in models], method or favourite(root, objective), seed, root)
    key = next((found.key for found in models if found.job == job), None)
    return [Chosen(job, None if key is None else Pin(key))]


def _see_refusal(workspace: Workspace) -> None:
    """A model that the gate refused answers only where it is asked for by name."""
    refused = next(
        (line["challenger"] for line in reversed(read_history(workspace)[0]) if line.get("challenger")), None
    )
    if refused is not None:
        job = Job(**refused["job"])
        raise UserError(
            f"{workspace.root}: nothing is in service; the gate refused {job.method} after stage {job.stage}, and "
            f"`driftrec history` says why; `--method {job.method}` answers with it all the same"
        )


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        job: what it is.
        config: the workspace's, with the settings that it was trained under.
        recommender: it.
    """

    job: Job
    config: Config
    recommender: Recommender


def loaded(
    config: Config, workspace: Workspace, dataset: Dataset, chosen: Chosen, objective: Objective = "recommendation"
) -> Loaded:
    """Put a model together, its checkpoints checked; a baseline is counted anew.

    Raises:
        UserError: a checkpoint is missing or damaged, or rests on stages that are not there.
    """
    from stages.evaluate import as_recommender, recommender
    from stages.stored import stored

    job = chosen.job
    if job.stage >= dataset.stages:
        raise UserError(
            f"{workspace.root}: the champion has seen stage {job.stage}, the last stage there is {dataset.stages - 1}"
        )
    if job.method in BASELINES:
        return Loaded(job, config, recommender(config, workspace, dataset, job, objective))
    found = stored(config, workspace, dataset, job, chosen.pin)
    return Loaded(job, found.config, as_recommender(found, dataset, job))


def first_that_loads(chosen: Sequence[Chosen], load: Callable[[Chosen], T]) -> tuple[T, UserError | None]:
    """The first model that can be loaded, and why it is not the first of all, by the first one's fault.

    Raises:
        UserError: none can; the first one's fault.
    """
    faults: list[UserError] = []
    for one in chosen:
        try:
            found = load(one)
        except UserError as error:
            faults.append(error)
            continue
        if not faults:
            return found, None
        stands_in = f"{one.job.method} after stage {one.job.stage} stands in for the champion"
        log.warning("%s: %s", stands_in, faults[0])
        raised = UserError(f"{stands_in}: {faults[0]}")
        raised.__cause__ = faults[0]
        return found, raised
    raise faults[0]


def choose(trained: list[Job], method: str | None, seed: int | None, root: Path) -> Job:
    """The newest model of a method and seed: its latest stage, of the next-stage protocol where both reach it.

    Raises:
        UserError: no such model in the workspace.
    """
    if not trained:
        raise UserError(f"{root}: no trained model; run `driftrec compare` or `driftrec train` first")
    if method in BASELINES:
        # A baseline is counted anew from the log, up to the last stage that any model was trained on.
        return Job(method, 0 if seed is None else seed, "next_stage", max(job.stage for job in trained))
    methods = list(dict.fromkeys(job.method for job in trained))
    if method is not None and method not in methods:
        hint = nearest(method, [*methods, *BASELINES])
        raise UserError(f"method {method!r} is not trained in {root}{hint}; trained: {', '.join(methods)}")
    fitting = [job for job in trained if method in (None, job.method)]
    seeds = sorted({job.seed for job in fitting})
    if seed is not None and seed not in seeds:
        raise UserError(f"seed {seed} is not trained for {method or methods[0]}; trained: {', '.join(map(str, seeds))}")
    fitting = [job for job in fitting if job.seed == (seeds[0] if seed is None else seed)]
    return max(fitting, key=lambda job: (job.stage, job.protocol == "next_stage"))


def _asked(
    config: Config, dataset: Dataset, user: str | None, history: list[str] | None, query: str | None
) -> tuple[IntArray, dict[str, Any]]:
    """The history a list rests on, and what else a recommender is handed in a log with searches."""
    events = dataset.interactions
    if query is not None and not query.strip():
        raise UserError("--query is empty; give at least one word")
    if query is not None and events.query is None:
        raise UserError("this workspace's models were trained without searches; train one on a log that has them")
    if query is not None and user is None and history is None:
        history = []
    past = known_history(dataset, user, history)
    if events.query is None:
        return past, {}
    searched = np.zeros(len(past), dtype=bool)
    if history is None:
        row = events.user_ids.index(str(user))
        searched = events.searched[events.offsets[row] : events.offsets[row + 1]]
    if query is None and config.search.rec_history == "recommendation":
        past, searched = past[~searched], searched[~searched]
    return past, {"searched": [searched], "queries": None if query is None else [query]}


def favourite(root: Path, objective: str = "recommendation") -> str | None:
    """The trained method that leads the newest report's first table of an objective; None without a report."""
    from flows.reporting.stored import findings, latest_report
    from stages.workspace import Workspace

    try:
        found = findings(latest_report(Workspace(root)))
    except UserError:
        return None
    lines = (
        found.lines(found.protocols[0], objective if objective in found.objectives else None) if found.protocols else []
    )
    scores = {
        line.method: line.cells["hit_at_10"].value or 0.0
        for line in lines
        if not line.baseline and "hit_at_10" in line.cells
    }
    return max(scores, key=scores.__getitem__, default=None)


def known_history(dataset: Dataset, user: str | None, history: list[str] | None) -> IntArray:
    """Item numbers of a user of the log, or of the items named.

    Raises:
        UserError: no such user or item; the nearest ids are suggested.
    """
    if history is not None:
        return _numbers(dataset.catalogue, history)
    events = dataset.interactions
    if user is None:
        raise UserError("whom for? give --user, or --history with item ids separated by commas")
    try:
        row = events.user_ids.index(user)
    except ValueError:
        hint = nearest(user, events.user_ids[:100_000])
        raise UserError(
            f"user {user!r} is not in the log{hint}; for anybody else give --history item,item,..."
        ) from None
    return events.history(row, int(events.offsets[row + 1]))


def _numbers(catalogue: Catalogue, history: list[str]) -> IntArray:
    places = {item: number for number, item in enumerate(catalogue.item_ids)}
    unknown = [item for item in history if item not in places]
    if unknown:
        named = "; ".join(f"{item!r}{nearest(item, catalogue.item_ids).replace(';', ',')}" for item in unknown)
        raise UserError(f"--history: not in the catalogue: {named}")
    return np.array([places[item] for item in history], dtype=np.int64)
