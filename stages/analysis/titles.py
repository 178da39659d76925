"""Test cases in words: does a pretrained backbone still prefer the title that the user took, among 99 others?

An untuned backbone has no opinion on item codes, which are new to it. Titles are what it can read, before any training
and after; so "right before, wrong after" against the untuned model is counted on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from torch import Tensor

from models.generative import GenerativeModel
from models.titles import title_scores
from models.words import Vocabulary
from stages.config import Config
from stages.dataset import Dataset
from stages.evaluate import test_queries
from stages.interactions import IntArray
from stages.jobs import Job
from stages.ranking import asking_of, targets_of
from stages.sampled import draw_candidates, sampled_ranks
from stages.search_config import Objective
from stages.train import derived_seed

CUTOFFS = (5, 10)
"""Right: the target's title is among so many likeliest of 100; chance 5 % and 10 %."""
HISTORY = 10
"""Titles of the newest history items that the prompt names."""
TITLE_TOKENS = 32
"""Tokens read of a title."""


@dataclass(frozen=True)
class Cases:
    """C test cases.

    Attributes:
        prompts: (C,) what the model reads first.
        candidates: (C, 100) item numbers, shuffled.
        place: (C,) the target's column.
        users: (C,) ids of those who are asked about.
    """

    prompts: tuple[str, ...]
    candidates: IntArray
    place: IntArray
    users: pl.Series


def title_cases(config: Config, dataset: Dataset, job: Job, objective: Objective, count: int) -> Cases:
    """At most `count` seeded test cases of `job`'s stage, each target among 99 uniformly drawn items.

    Args:
        config: the experiment.
        dataset: the prepared log.
        job: protocol and stage; whose model it is does not matter.
        objective: which kind of test.
        count: how many.

    Raises:
        UserError: fewer than 100 items are known outside a user's history.
    """
    events, titles = dataset.interactions, dataset.catalogue.titles
    known = dataset.catalogue.known(job.stage)
    tested = job.stage + (job.protocol == "next_stage")
    queries = test_queries(config, dataset, job, min(tested, dataset.stages - 1), None, objective)
    targets = targets_of(events, queries)
    seed = derived_seed(0, "titles", job.protocol, job.stage, objective)
    reached = np.flatnonzero(targets.item < known)
    chosen = np.sort(np.random.default_rng(seed).permutation(reached)[:count])
    query, item = targets.query[chosen], targets.item[chosen]
    asking = asking_of(events, queries, objective, "both", exclude_history=True)
    candidates, place = draw_candidates(asking, query, item, np.ones(known), seed)
    texts = ["" for _ in query] if asking.texts is None else [asking.texts[number] for number in query]
    histories = asking.histories(query)
    prompts = [_prompt([titles[i] for i in own[-HISTORY:]], text) for own, text in zip(histories, texts, strict=True)]
    users = pl.Series(events.user_ids, dtype=pl.String).gather(queries.user[query])
    return Cases(tuple(prompts), candidates, place, users)


def _prompt(history: Sequence[str], query: str) -> str:
    past = f"A customer took: {'; '.join(history)}. " if history else ""
    return f'{past}The customer searched for "{query}" and took:' if query else f"{past}Next, the customer took:"


def title_ranks(
    model: GenerativeModel, head: Tensor, vocabulary: Vocabulary, dataset: Dataset, cases: Cases
) -> IntArray:
    """(C,) rank of the target's title among the candidates', by log-likelihood, each a mean over its tokens.

    Args:
        model: in eval mode, with plain weights; a pretrained backbone.
        head: of the backbone's own vocabulary.
        vocabulary: its tokenizer.
        dataset: names the items.
        cases: as `title_cases` gives them.
    """
    items = np.unique(cases.candidates).tolist()
    texts = {item: vocabulary.encode(f" {dataset.catalogue.titles[item]}")[:TITLE_TOKENS] for item in items}
    scores = np.full(cases.candidates.shape, -np.inf)  # what a title scores that the backbone has no words for
    for line, prompt in enumerate(cases.prompts):
        row = cases.candidates[line].tolist()
        read = [place for place, item in enumerate(row) if texts[item]]
        if read:
            found = title_scores(model, head, vocabulary.encode(prompt), [texts[row[place]] for place in read])
            scores[line, read] = found.numpy()
    return sampled_ranks(scores, cases.place)
