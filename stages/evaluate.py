"""Measures one model on one stage's tests, through the `Recommender` protocol and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models import packed
from models.generative_recommender import GenerativeRecommender
from models.recommender import Recommender
from stages.baselines import fit_baseline
from stages.checkpoint import quarantine
from stages.config import Config
from stages.dataset import Dataset, load_dataset
from stages.errors import UserError
from stages.examples import Encoder
from stages.item_vectors import item_documents
from stages.jobs import BASELINES, SEARCH_BASELINES, Evaluation, Job, Pin
from stages.locks import held
from stages.queries import (
    Queries,
    asked_moments,
    objective_queries,
    sample_users,
    training_targets,
)
from stages.ranking import rank_queries
from stages.search_config import Objective
from stages.search_examples import query_vocabulary
from stages.stored import Stored, stored
from stages.train import derived_seed, put_together
from stages.workspace import Workspace, digest_of, read_json, replacing, sha256_file, write_json

CODE_VERSION = 2
"""Raised whenever an evaluation would give other numbers for the same model and data."""

SAMPLE_SEED = derived_seed(0, "users")
"""Neither the run's seed nor the stage enters: every method, seed and stage asks about the same users it can."""

Progress = Callable[[int, int], None]


def evaluate_stage(
    config: Config,
    workspace: Workspace,
    job: Job,
    tested: int,
    users: int | None = None,
    matrix: bool = False,
    progress: Progress | None = None,
    pin: Pin | None = None,
) -> Evaluation:
    """Rank the test queries of stage `tested` with `job`'s model, or return the result where it is on disk already.

    Args:
        config: the experiment.
        workspace: holds the trained lineage of `job` (baselines need none).
        job: method or baseline, seed, protocol and the last stage it has seen.
        tested: stage the targets lie in.
        users: size of a seeded sample of test users; None tests all.
        matrix: a cell of R[i][j], measured on `evaluation.matrix_users` users.
        progress: called with (queries done, queries).
        pin: the checkpoint to ask; absent: the one that `config` gives.

    Raises:
        UserError: the lineage is not trained or is damaged.
    """
    dataset = load_dataset(config, workspace)
    sample = config.evaluation.matrix_users if matrix else users
    found = None if job.method in BASELINES else stored(config, workspace, dataset, job, pin)
    key = _evaluation_key(config, dataset, job, found, tested, sample)
    own = job.method if found is None else found.method
    name = f"{job.protocol}-{own}-seed{job.seed}-stage{job.stage:02d}-on{tested:02d}-{key[:16]}"
    path = workspace.evaluations / f"{name}.parquet"
    side = path.with_suffix(".json")
    model = None if found is None else found.tensors
    facts = _intact(path, side, model)
    if facts is None:
        # Looked at again under the lock: another process may have measured it meanwhile.
        with held(workspace.locks / f"test-{job.protocol}-{own}-seed{job.seed}-on{tested:02d}.lock"):
            facts = _intact(path, side, model)
            if facts is None:
                started = time.perf_counter()
                frame = _measure(config, workspace, dataset, job, found, tested, sample, progress)
                with replacing(path) as temporary:
                    frame.write_parquet(temporary)
                seconds = time.perf_counter() - started
                facts = {"digest": sha256_file(path), "seconds": seconds, "queries": len(frame)}
                write_json(side, {**facts, "model": model}, seal=True)
    return Evaluation(
        job=job,
        tested=tested,
        path=str(path.relative_to(workspace.root)),
        sampled=sample is not None,
        matrix=matrix,
        **facts,
    )


def _intact(path: Path, side: Path, model: str | None) -> dict[str, Any] | None:
    """What is known of an earlier measurement of this very model whose file is unharmed; a damaged one is set aside."""
    if not (side.exists() and path.exists()):
        return None
    try:
        facts = read_json(side)
        found = facts.pop("model", None)
        fault = None if facts["digest"] == sha256_file(path) else "altered"
    except (UserError, KeyError, AttributeError):
        fault, facts, found = "its JSON file is altered", {}, model
    if fault is not None:
        quarantine(path, fault)
        return None
    return facts if found == model else None


def recommender(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    objective: Objective = "recommendation",
    pin: Pin | None = None,
) -> Recommender:
    """`job`'s model, or the baseline of that name fitted to one objective, ready to rank what `job.stage` knows.

    Args:
        config: the experiment.
        workspace: holds the trained lineage of `job` (baselines need none).
        dataset: its prepared log.
        job: method or baseline, seed, protocol and the last stage it has seen.
        objective: that a baseline is fitted to.
        pin: the checkpoint to answer with; absent: the one that `config` gives.

    Raises:
        UserError: the lineage is not trained or is damaged, or a baseline that does not answer this objective.
    """
    if job.method not in BASELINES:
        return as_recommender(stored(config, workspace, dataset, job, pin), dataset, job)
    known = dataset.catalogue.known(job.stage)
    own = config.evaluation
    documents = known_documents(workspace, known) if job.method in SEARCH_BASELINES else ()
    place = (job.stage, job.protocol, job.seed, own.exclude_history)
    return fit_baseline(job.method, dataset.interactions, known, *place, objective, documents)


def as_recommender(found: Stored, dataset: Dataset, job: Job) -> Recommender:
    """The model of verified checkpoints, ready to rank what `job.stage` knows."""
    known, config = dataset.catalogue.known(job.stage), found.config
    vocabulary = query_vocabulary(config, dataset)
    encoder = Encoder(dataset.interactions, dataset.catalogue, vocabulary, config.search.query_tokens)
    offered = None if found.coded is None else dataset.catalogue.coded[:known] < found.coded
    model = put_together(found, dataset, job)
    if packed.gains(model.device):
        packed.pack(model.stack)
    return GenerativeRecommender(
        model,
        codes=dataset.catalogue.codes[:known],
        sizes=dataset.catalogue.sizes,
        prompts=encoder.prompts,
        history_length=config.training.history_length,
        beam=config.evaluation.beam,
        exclude_history=config.evaluation.exclude_history,
        unread=dataset.catalogue.from_events,
        offered=offered,
    )


def known_documents(workspace: Workspace, known: int) -> list[str]:
    """Text of the known items; empty for one that has none."""
    return item_documents(known_texts(workspace, known))


def known_texts(workspace: Workspace, known: int) -> pl.DataFrame:
    """Title, text and categories of the known items, by item number; null where there is none."""
    items = pl.read_parquet(workspace.catalogue / "items.parquet").head(known)
    absent = {"title": pl.String, "text": pl.String, "categories": pl.List(pl.String)}
    return items.with_columns(
        pl.lit(None, kind).alias(name) for name, kind in absent.items() if name not in items.columns
    ).select(*absent)


def test_queries(
    config: Config,
    dataset: Dataset,
    job: Job,
    tested: int,
    sample: int | None,
    objective: Objective,
) -> Queries:
    """What stage `tested` asks of one objective under the job's protocol, of all users or of `sample` seeded ones."""
    events, own = dataset.interactions, config.evaluation
    moments = asked_moments(events, job.protocol, tested, own.next_target)
    fresh = config.search.repeats == "leave_out"
    queries = objective_queries(events, moments, objective, own.baskets, fresh)
    return queries if sample is None else sample_users(events, queries, sample, SAMPLE_SEED)


def _measure(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    found: Stored | None,
    tested: int,
    sample: int | None,
    progress: Progress | None,
) -> pl.DataFrame:
    """The rows of every objective that the job's model answers, one after the other."""
    own, trained_by = config.evaluation, config if found is None else found.config
    model = None if found is None else as_recommender(found, dataset, job)
    frames = []
    for objective in asked_objectives(dataset, job):
        frames.append(
            rank_queries(
                model or recommender(config, workspace, dataset, job, objective),
                dataset.interactions,
                test_queries(config, dataset, job, tested, sample, objective),
                known=dataset.catalogue.known(job.stage),
                k=own.k,
                batch_size=1024 if found is None else own.batch_size,
                seen_stage=job.stage,
                tested_stage=tested,
                exclude_history=own.exclude_history,
                trained=_trained_events(config, dataset, job),
                objective=objective,
                history="recommendation" if rests_on_recommendations(trained_by, job, objective) else "both",
                progress=progress,
            )
        )
    return pl.concat(frames)


def asked_objectives(dataset: Dataset, job: Job) -> list[Objective]:
    """The log's objectives that the job's model answers.

    Raises:
        UserError: none.
    """
    every = job.method not in SEARCH_BASELINES
    found: list[Objective] = [name for name in dataset.interactions.objectives if every or name == "search"]
    if not found:
        raise UserError(f"{job.method} answers searches only, and this log has none that are used")
    return found


def rests_on_recommendations(config: Config, job: Job, objective: Objective) -> bool:
    """Whether searched items are left out of the histories: `search.rec_history` says so, and counters always do."""
    alone = job.method in BASELINES or config.search.rec_history == "recommendation"
    return objective == "recommendation" and alone


def _trained_events(config: Config, dataset: Dataset, job: Job) -> np.ndarray:
    """(N,) events whose items count as old: every training target up to the job's stage, for every method alike."""
    return training_targets(dataset.interactions, range(job.stage + 1), job.protocol, job.seed)


def _evaluation_key(
    config: Config, dataset: Dataset, job: Job, found: Stored | None, tested: int, sample: int | None
) -> str:
    if found is None:
        model: Any = [job.method, job.seed, job.stage, job.protocol, dataset.digest(job.stage)]
    else:
        model = [found.key, job.stage]
    aside = {"protocols", "bootstrap", "matrix_users", "users", "batch_size", "negatives"}
    settings = config.evaluation.model_dump(exclude=aside)
    drawn = None if sample is None else [sample, "by id"]
    read = config if found is None else found.config
    place = [tested, job.protocol, drawn, read.training.history_length, dataset.digest(max(tested, job.stage))]
    searching = {} if dataset.interactions.query is None else {"search": read.search.model_dump(exclude={"own_moment"})}
    return digest_of({"code": CODE_VERSION, "model": model, "evaluation": settings, "place": place, **searching})
