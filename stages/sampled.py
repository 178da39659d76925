"""The 99 + 1 mode of some papers: each target among 99 drawn items. For comparison with published tables only.

A sample of the catalogue can reverse the order of two models (Krichene & Rendle, 2020), so that these numbers stand
apart, beside a random ranker's, and no headline uses them. One candidate file a split serves every method and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from models.baselines.bm25 import WordWeights
from models.baselines.last_category import LastCategory
from models.generative_recommender import GenerativeRecommender
from models.recommender import Recommender
from models.titles import TitleReader
from models.words import BackboneVocabulary
from stages.analysis.preservation import own_head
from stages.candidates import NEGATIVES, ROWS, draw_candidates
from stages.commit import weights_digest
from stages.config import Config
from stages.content import is_noted, read_noted, store_noted
from stages.dataset import Dataset, load_dataset
from stages.evaluate import (
    asked_objectives,
    known_documents,
    known_texts,
    recommender,
    rests_on_recommendations,
    test_queries,
)
from stages.interactions import IntArray, Interactions
from stages.jobs import BASELINES, Evaluation, Job, Pin
from stages.metrics import hit_at_k, ndcg_at_k
from stages.queries import Queries, training_targets
from stages.ranking import Asking, asking_of, targets_of
from stages.search_config import Objective
from stages.train import bare_model, derived_seed
from stages.workspace import Workspace, digest_of

METRICS = ("hit_at_5", "hit_at_10", "ndcg_at_5", "ndcg_at_10")
RANDOM = {"hit_at_5": 0.05, "hit_at_10": 0.10, "ndcg_at_5": 0.029485, "ndcg_at_10": 0.045436}
"""What a random order of 100 candidates scores."""
TOLERANCE = 1e-9
LAST_CATEGORY = "last_category"
"""A line of this mode alone, where the catalogue has categories: `models.baselines.last_category.LastCategory`."""
UNTUNED = "untuned"
"""A line of this mode alone, with a pretrained backbone: what it says of the titles before any training."""


def check_identities(row: Mapping[str, float]) -> None:
    """Refuse metrics that no ranks can give: with one relevant item, hit and NDCG bound each other.

    Places 1 … 5 gain between 1 / log2(6) = 0.3869 and 1, places 6 … 10 between 1 / log2(11) = 0.2891 and
    1 / log2(7) = 0.3562.

    Raises:
        ValueError: an identity does not hold.
    """
    near, far = row["hit_at_5"], row["hit_at_10"] - row["hit_at_5"]
    gain, more = row["ndcg_at_5"], row["ndcg_at_10"] - row["ndcg_at_5"]
    bounds = (
        ("NDCG@5", gain, near / np.log2(6), near),
        ("NDCG@10 - NDCG@5", more, far / np.log2(11), far / np.log2(7)),
    )
    for name, value, low, high in bounds:
        if not low - TOLERANCE <= value <= high + TOLERANCE:
            raise ValueError(
                f"{name} is {value:.6f}, but the hits only allow {low:.6f} to {high:.6f}; the ranks are wrong"
            )


def sampled_ranks(scores: npt.NDArray[np.floating], place: IntArray) -> IntArray:
    """(M,) rank of the target among its candidates; equal scores stand in the candidates' own, shuffled order.

    Args:
        scores: (M, K) of the candidates; a candidate without a score has -inf.
        place: (M,) column of the target.
    """
    own = np.take_along_axis(scores, place[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < place[:, None]
    return 1 + ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def evaluate_sampled(
    config: Config, workspace: Workspace, evaluation: Evaluation, pin: Pin | None = None
) -> Path | None:
    """Rank the targets of a measured cell among their candidates; written beside the cell, once.

    Args:
        config: `evaluation.negatives` says how candidates are drawn; with `off` nothing happens.
        workspace: holds the evaluation and, in `stages/candidates`, the candidate files.
        evaluation: a headline cell.
        pin: the checkpoint that it measured; absent: the one that `config` gives.

    Returns:
        A Parquet file: user, objective and rank of every target (0: in no catalogue the model knew); None with `off`.

    Raises:
        UserError: a catalogue too small to draw from.
    """
    kind = config.evaluation.negatives
    if kind == "off":
        return None
    path = (workspace.root / evaluation.path).with_suffix(f".{kind}-{evaluation.digest[:12]}.parquet")
    if is_noted(path):
        return path
    dataset, job = load_dataset(config, workspace), evaluation.job
    frames, model = [], None
    for objective in asked_objectives(dataset, job):
        if job.method in BASELINES or model is None:
            model = recommender(config, workspace, dataset, job, objective, pin)
        users = config.evaluation.users
        queries = test_queries(config, dataset, job, evaluation.tested, users, objective)
        frames.append(_ranked(config, workspace, dataset, job, evaluation.tested, objective, model, queries))
    store_noted(pl.concat(frames), path)
    return path


def _ranked(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    tested: int,
    objective: Objective,
    model: Recommender | LastCategory | TitleReader,
    queries: Queries,
    most: int | None = None,
) -> pl.DataFrame:
    """User, objective and rank of every target, or of a seeded draw of at most `most`."""
    events, known = dataset.interactions, dataset.catalogue.known(job.stage)
    targets = targets_of(events, queries)
    reached = targets.item < known
    query, item = targets.query[reached], targets.item[reached]
    candidates, place = _candidates(config, workspace, dataset, job, tested, objective, queries, query, item)
    history = "recommendation" if rests_on_recommendations(config, job, objective) else "both"
    asking = asking_of(events, queries, objective, history, exclude_history=False)
    chosen = np.arange(len(reached))
    if most is not None:
        rng = np.random.default_rng(derived_seed(0, "drawn", job.protocol, tested, objective))
        chosen = np.sort(rng.permutation(chosen)[:most])
    own = chosen[reached[chosen]]
    line = (np.cumsum(reached) - 1)[own]  # of the candidate file
    scores = _scores(model, asking, targets.query[own], candidates[line], known)
    rank = np.zeros(len(chosen), dtype=np.int64)
    rank[reached[chosen]] = sampled_ranks(scores, place[line])
    names = pl.Series(events.user_ids, dtype=pl.String).gather(queries.user[targets.query[chosen]])
    return pl.DataFrame({"user": names, "objective": [objective] * len(rank), "rank": rank})


def _candidates(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    tested: int,
    objective: Objective,
    queries: Queries,
    query: IntArray,
    item: IntArray,
) -> tuple[IntArray, IntArray]:
    """The split's candidate file, drawn by whoever comes first; its name holds all that it depends on."""
    events, known, kind = dataset.interactions, dataset.catalogue.known(job.stage), config.evaluation.negatives
    if kind == "bm25_first" and objective != "search":
        kind = "uniform"  # there are no words to match
    documents = known_documents(workspace, known) if kind == "bm25_first" else None
    seed = derived_seed(0, "candidates", job.protocol, tested, objective)
    asked = np.stack([queries.user[query], queries.cut[query], item], axis=1)
    content = [kind, seed, dataset.digest(max(job.stage, tested)), job.stage, asked.tolist()]
    content += [] if documents is None else [documents]
    name = f"{job.protocol}-{objective}-on{tested:02d}-{kind}-{digest_of(content)[:16]}.parquet"
    path = workspace.stages / "candidates" / name
    stored = read_noted(path)
    if stored is None:
        asking = asking_of(events, queries, objective, "both", exclude_history=True)
        first = None if documents is None else _by_words(documents, asking)
        found, place = draw_candidates(asking, query, item, _weights(events, job, known, kind), seed, first=first)
        stored = pl.DataFrame({"place": place, "items": pl.Series(found.tolist(), dtype=pl.List(pl.Int64))})
        store_noted(stored, path)
    items = (
        stored["items"].explode().to_numpy().reshape(len(stored), -1) if len(stored) else np.empty((0, 1 + NEGATIVES))
    )
    return items.astype(np.int64), stored["place"].to_numpy()


def _weights(events: Interactions, job: Job, known: int, kind: str) -> npt.NDArray[np.float64]:
    """(I,) one each, or how often an item was taken before or in the last stage trained, tests left out."""
    if kind != "popularity":
        return np.ones(known)
    trained = training_targets(events, range(job.stage + 1), job.protocol, seed=0)
    return np.bincount(events.items[trained], minlength=known).astype(np.float64)[:known]


def _by_words(documents: Sequence[str], asking: Asking) -> Callable[[IntArray], Any]:
    """BM25 of the items' own texts alone: what training searches found would differ between seeds."""
    words, texts = WordWeights(documents), asking.texts or []
    return lambda batch: words.scored([texts[number] for number in batch.tolist()])


def _scores(
    model: Recommender | LastCategory | TitleReader, asking: Asking, query: IntArray, candidates: IntArray, known: int
) -> npt.NDArray[np.floating]:
    """(M, K) the model's score of every candidate, exactly."""
    score: Callable[..., npt.NDArray[np.floating]]
    size = 16 if isinstance(model, GenerativeRecommender) else ROWS
    exact = isinstance(model, GenerativeRecommender | LastCategory | TitleReader)
    score = model.score if exact else _Listed(model, known).score
    parts = [
        score(asking.histories(query[own]), candidates[own], **asking.request(query[own]))
        for own in np.split(np.arange(len(query)), range(size, len(query), size))
        if len(own)
    ]
    return np.concatenate(parts) if parts else np.empty(candidates.shape)


class _Listed:
    """Scores of a counter: read off its list of the whole catalogue."""

    def __init__(self, model: Recommender, known: int) -> None:
        self.model, self.known = model, known

    def score(self, histories: Sequence[IntArray], candidates: IntArray, **request: Any) -> npt.NDArray[np.floating]:
        lists = self.model.recommend(histories, self.known, **request)
        table = np.full((len(histories), self.known + 1), -np.inf)
        np.put_along_axis(table, lists.items, lists.scores, axis=1)  # item -1 is the spare last column
        return np.take_along_axis(table, candidates, axis=1)


def sampled_rows(config: Config, workspace: Workspace, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The report's rows of the 99 + 1 mode: means over users of each user's mean, cell by cell.

    Raises:
        ValueError: numbers that no ranks can give.
    """
    rows: list[dict[str, Any]] = []
    for evaluation in evaluations:
        path = evaluate_sampled(config, workspace, evaluation)
        if path is None:
            return []
        rows += _means(pl.read_parquet(path), evaluation.job, evaluation.tested)
    places = {(one.job.protocol, one.job.stage, one.tested): one for one in reversed(evaluations)}
    for place in sorted(places):
        rows += last_category_rows(config, workspace, places[place])
        rows += untuned_rows(config, workspace, places[place])
    return rows


def _means(ranked: pl.DataFrame, job: Job, tested: int) -> list[dict[str, Any]]:
    """One row an objective of what `evaluate_sampled` writes."""
    rows: list[dict[str, Any]] = []
    for (objective,), part in ranked.group_by("objective", maintain_order=True):
        rank, alone = part["rank"].to_numpy(), np.ones(len(part), dtype=np.int64)
        columns = {f"hit_at_{k}": hit_at_k(rank, alone, k) for k in (5, 10)}
        columns |= {f"ndcg_at_{k}": ndcg_at_k(rank, alone, k) for k in (5, 10)}
        columns["reachable"] = (rank > 0).astype(np.float64)
        users = part.select("user").with_columns(**columns).group_by("user", maintain_order=True).mean()
        means = users.select(pl.col(*columns).mean()).row(0)
        values = {name: float(value) for name, value in zip(columns, means, strict=True)}
        check_identities(values)
        place = {"method": job.method, "seed": job.seed, "protocol": job.protocol, "objective": objective}
        rows.append({**place, "stage": tested, **values, "targets": len(part)})
    return rows


def last_category_rows(config: Config, workspace: Workspace, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The baseline of the last item's category on one cell's candidates; it is quick and leaves no file.

    Args:
        config: `catalogue.level_separator` empty: an item's categories are one path, and one category.
        workspace: holds the catalogue.
        evaluation: names protocol, stages and seed.

    Returns:
        As `sampled_rows`; none where no item has a category.
    """
    dataset, tested = load_dataset(config, workspace), evaluation.tested
    job = replace(evaluation.job, method="popularity")  # asked and counted as that baseline is
    known = dataset.catalogue.known(job.stage)
    paths = known_texts(workspace, known)["categories"].fill_null([]).to_list()
    if not any(paths):
        return []
    one_path = not config.catalogue.level_separator
    categories = [["\0".join(path)] if one_path and path else path for path in paths]
    frames = []
    for objective in dataset.interactions.objectives:
        own = dataset.interactions.searched == (objective == "search")
        taken = training_targets(dataset.interactions, range(job.stage + 1), job.protocol, job.seed) & own
        model = LastCategory(categories, np.bincount(dataset.interactions.items[taken], minlength=known)[:known])
        queries = test_queries(config, dataset, job, tested, config.evaluation.users, objective)
        frames.append(_ranked(config, workspace, dataset, job, tested, objective, model, queries))
    return _means(pl.concat(frames), replace(job, method=LAST_CATEGORY), tested)


def untuned_rows(config: Config, workspace: Workspace, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The backbone before any training on one cell's candidates, put in words: it has no opinion on item codes.

    Args:
        config: `analysis.titles` targets of each objective are asked for, by a seeded draw; each reads 100 titles.
        workspace: keeps the ranks, which cost as much as a model's.
        evaluation: names protocol, stages and seed.

    Returns:
        As `sampled_rows`; none for `small`, whose weights before training are drawn at random and rank as chance does.
    """
    own, most = config.backbone, config.analysis.titles
    if own.path is None or most == 0:
        return []
    dataset, tested = load_dataset(config, workspace), evaluation.tested
    job = replace(evaluation.job, method=UNTUNED)
    content = [weights_digest(own.path), dataset.digest(max(job.stage, tested)), job.stage, config.evaluation.users]
    content += [most, config.search.rec_history]
    name = f"{job.protocol}-{UNTUNED}-on{tested:02d}-{config.evaluation.negatives}-{digest_of(content)[:16]}.parquet"
    path = workspace.stages / "candidates" / name
    found = read_noted(path)
    if found is None:
        head, words = own_head(own.path), BackboneVocabulary(own.path)
        reader = TitleReader(bare_model(config, dataset, 0).eval(), head, words, dataset.catalogue.titles)
        frames = []
        for objective in dataset.interactions.objectives:
            queries = test_queries(config, dataset, job, tested, config.evaluation.users, objective)
            frames.append(_ranked(config, workspace, dataset, job, tested, objective, reader, queries, most))
        found = pl.concat(frames)
        store_noted(found, path)
    return _means(found, job, tested)
