"""Test cases in words: does a pretrained backbone still prefer the title that the user took, among 99 others?

An untuned backbone has no opinion on item codes, which are new to it. Titles are what it can read, before any training
and after; so "right before, wrong after" against the untuned model is counted on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from torch import Tensor

from models.generative import GenerativeModel
from models.titles import TitleReader, prompts_of
from models.words import Vocabulary
from stages.candidates import draw_candidates
from stages.config import Config
from stages.dataset import Dataset
from stages.evaluate import test_queries
from stages.interactions import IntArray
from stages.jobs import Job
from stages.ranking import asking_of, targets_of
from stages.sampled import sampled_ranks
from stages.search_config import Objective
from stages.train import derived_seed

CUTOFFS = (5, 10)
"""Right: the target's title is among so many likeliest of 100; chance 5 % and 10 %."""


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
    texts = None if asking.texts is None else [asking.texts[number] for number in query]
    prompts = prompts_of(titles, asking.histories(query), texts)
    users = pl.Series(events.user_ids, dtype=pl.String).gather(queries.user[query])
    return Cases(tuple(prompts), candidates, place, users)


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
    reader = TitleReader(model, head, vocabulary, dataset.catalogue.titles)
    return sampled_ranks(reader.behind(cases.prompts, cases.candidates), cases.place)
