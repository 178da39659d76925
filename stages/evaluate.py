"""Measures one model on one stage's tests, through the `Recommender` protocol and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.generative_recommender import GenerativeRecommender
from models.recommender import Recommender
from stages.baselines import fit_baseline
from stages.checkpoint import quarantine, tensors_digest
from stages.commit import checkpoint_folders, commit_key, lineage_jobs
from stages.config import Config
from stages.dataset import Dataset, load_dataset
from stages.errors import UserError
from stages.examples import Encoder
from stages.item_vectors import item_documents
from stages.jobs import BASELINES, SEARCH_BASELINES, Evaluation, Job
from stages.locks import held
from stages.queries import (
    Queries,
    next_stage_tests,
    objective_queries,
    same_stage_tests,
    sample_users,
    training_targets,
)
from stages.ranking import rank_queries
from stages.search_config import Objective
from stages.search_examples import query_vocabulary
from stages.train import derived_seed, restore_model
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

    Raises:
        UserError: the lineage is not trained or is damaged.
    """
    dataset = load_dataset(config, workspace)
    sample = config.evaluation.matrix_users if matrix else users
    key = _evaluation_key(config, dataset, job, tested, sample)
    own = job.method if job.method in BASELINES else lineage_jobs(config, job)[-1].method
    name = f"{job.protocol}-{own}-seed{job.seed}-stage{job.stage:02d}-on{tested:02d}-{key[:16]}"
    path = workspace.evaluations / f"{name}.parquet"
    side = path.with_suffix(".json")
    model = _model_digest(config, workspace, dataset, job)
    facts = _intact(path, side, model)
    if facts is None:
        # Looked at again under the lock: another process may have measured it meanwhile.
        with held(workspace.locks / f"test-{job.protocol}-{own}-seed{job.seed}-on{tested:02d}.lock"):
            facts = _intact(path, side, model)
            if facts is None:
                started = time.perf_counter()
                frame = _measure(config, workspace, dataset, job, tested, sample, progress)
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


def _model_digest(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> str | None:
    """Names the tensors of `job`'s whole lineage as they are on disk; None for a baseline, which has none.

    Raises:
        UserError: a checkpoint of the lineage is missing.
    """
    if job.method in BASELINES:
        return None
    folders = checkpoint_folders(config, workspace, dataset, job)
    return digest_of([tensors_digest(folder) for folder in folders])


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
    config: Config, workspace: Workspace, dataset: Dataset, job: Job, objective: Objective = "recommendation"
) -> Recommender:
    """`job`'s model, or the baseline of that name fitted to one objective, ready to rank what `job.stage` knows.

    Raises:
        UserError: the lineage is not trained or is damaged, or a baseline that does not answer this objective.
    """
    known = dataset.catalogue.known(job.stage)
    own = config.evaluation
    if job.method in BASELINES:
        documents = known_documents(workspace, known) if job.method in SEARCH_BASELINES else ()
        place = (job.stage, job.protocol, job.seed, own.exclude_history)
        return fit_baseline(job.method, dataset.interactions, known, *place, objective, documents)
    vocabulary = query_vocabulary(config, dataset)
    encoder = Encoder(dataset.interactions, dataset.catalogue, vocabulary, config.search.query_tokens)
    return GenerativeRecommender(
        restore_model(config, workspace, dataset, job),
        codes=dataset.catalogue.codes[:known],
        sizes=dataset.catalogue.sizes,
        prompts=encoder.prompts,
        history_length=config.training.history_length,
        beam=own.beam,
        exclude_history=own.exclude_history,
        unread=dataset.catalogue.from_events,
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
    if job.protocol == "same_stage":
        moments = same_stage_tests(events, tested)
    else:
        moments = next_stage_tests(events, tested, own.next_target)
    fresh = config.search.repeats == "leave_out"
    queries = objective_queries(events, moments, objective, own.baskets, fresh)
    return queries if sample is None else sample_users(events, queries, sample, SAMPLE_SEED)


def _measure(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    tested: int,
    sample: int | None,
    progress: Progress | None,
) -> pl.DataFrame:
    """The rows of every objective that the job's model answers, one after the other."""
    own, counted = config.evaluation, job.method in BASELINES
    model = None
    frames = []
    for objective in asked_objectives(dataset, job):
        if counted or model is None:
            model = recommender(config, workspace, dataset, job, objective)
        frames.append(
            rank_queries(
                model,
                dataset.interactions,
                test_queries(config, dataset, job, tested, sample, objective),
                known=dataset.catalogue.known(job.stage),
                k=own.k,
                batch_size=1024 if counted else own.batch_size,
                seen_stage=job.stage,
                tested_stage=tested,
                exclude_history=own.exclude_history,
                trained=_trained_events(config, dataset, job),
                objective=objective,
                history="recommendation" if rests_on_recommendations(config, job, objective) else "both",
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


def _evaluation_key(config: Config, dataset: Dataset, job: Job, tested: int, sample: int | None) -> str:
    if job.method in BASELINES:
        model: Any = [job.method, job.seed, job.stage, job.protocol, dataset.digest(job.stage)]
    else:
        model = [commit_key(config, dataset, lineage_jobs(config, job)[-1]), job.stage]
    aside = {"protocols", "bootstrap", "matrix_users", "users", "batch_size", "negatives"}
    settings = config.evaluation.model_dump(exclude=aside)
    drawn = None if sample is None else [sample, "by id"]
    place = [tested, job.protocol, drawn, config.training.history_length, dataset.digest(max(tested, job.stage))]
    searching = {} if dataset.interactions.query is None else {"search": config.search.model_dump()}
    return digest_of({"code": CODE_VERSION, "model": model, "evaluation": settings, "place": place, **searching})
