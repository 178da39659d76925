"""Who answers a search: a model that was trained to, or the words of the titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.baselines.bm25 import WordWeights
from models.recommender import BoolArray, IntArray, Recommendations, Recommender


@dataclass(frozen=True)
class Past:
    """What is known of the person a request is about.

    Attributes:
        items: item numbers, oldest first.
        searched: which of them came by a search.
        unknown: item ids asked with that the catalogue does not have.
        reason: why the model cannot answer; None where it can.
    """

    items: IntArray
    searched: BoolArray
    unknown: list[str] = field(default_factory=list)
    reason: str | None = None


Ranking = list[tuple[int, float]]
"""Item numbers with their scores, best first."""


class Searcher(Protocol):
    """Anything that answers queries; a model with a search objective is one."""

    @property
    def method(self) -> str:
        """Its name in the reply."""
        ...

    def search(self, asked: Sequence[tuple[str, Past]], k: int) -> list[Ranking]:
        """The `k` best items for each (query, person)."""
        ...


class ModelSearch:
    """A model that was trained on searches, after the person's history.

    Args:
        method: its name.
        model: reads queries.
    """

    def __init__(self, method: str, model: Recommender) -> None:
        self.method, self.model = method, model

    def search(self, asked: Sequence[tuple[str, Past]], k: int) -> list[Ranking]:
        """The `k` most likely items; see `Searcher`."""
        queries, people = [query for query, _ in asked], [past for _, past in asked]
        histories, searched = [past.items for past in people], [past.searched for past in people]
        return listed(self.model.recommend(histories, k, queries, searched))


class TitleWords:
    """The words of the titles by BM25, and nothing else: it does not look at the history.

    Args:
        titles: item number by place.
    """

    method = "title_words"

    def __init__(self, titles: Sequence[str]) -> None:
        self.words = WordWeights(titles)

    def search(self, asked: Sequence[tuple[str, Past]], k: int) -> list[Ranking]:
        """The `k` best items that share a word with each query; see `Searcher`. Ties by item number."""
        found: Any = self.words.scored([query for query, _ in asked])
        found.sort_indices()
        spans = zip(found.indptr[:-1], found.indptr[1:], strict=True)
        return [_best(found.indices[start:stop], found.data[start:stop], k) for start, stop in spans]


def _best(items: IntArray, scores: npt.NDArray[np.float64], k: int) -> Ranking:
    order = np.argsort(-scores, kind="stable")[:k]
    return list(zip(items[order].tolist(), scores[order].tolist(), strict=True))


def listed(found: Recommendations) -> list[Ranking]:
    """A recommender's lists without the empty places."""
    return [
        [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]
        for items, scores in zip(found.items.tolist(), found.scores.tolist(), strict=True)
    ]
