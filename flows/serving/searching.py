"""Who answers a search: a model that was trained to, or the words of the titles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from models.recommender import BoolArray, IntArray, Recommendations, Recommender

WORD = re.compile(r"\w+")
SATURATION, LENGTH = 1.2, 0.75
"""k1 and b of BM25 (Robertson and Zaragoza, 2009), at their usual values."""


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
    """BM25 over titles: rare words count more, long titles less. It does not look at the history.

    Args:
        titles: item number by place.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        counts = [Counter(words(title)) for title in titles]
        lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        mean = lengths.mean() if lengths.sum() else 1.0
        self.damping = SATURATION * (1 - LENGTH + LENGTH * lengths / mean)  # (I,)
        lists: dict[str, tuple[list[int], list[int]]] = {}
        for item, count in enumerate(counts):
            for word, times in count.items():
                items, often = lists.setdefault(word, ([], []))
                items.append(item)
                often.append(times)
        self.lists = {word: (np.array(items), np.array(often)) for word, (items, often) in lists.items()}

    method = "title_words"

    def search(self, asked: Sequence[tuple[str, Past]], k: int) -> list[Ranking]:
        """The `k` best items that share a word with each query; see `Searcher`. Ties by item number."""
        return [self._best(query, k) for query, _ in asked]

    def _best(self, query: str, k: int) -> Ranking:
        scores = np.zeros(len(self.damping))
        for word in dict.fromkeys(words(query)):
            if word in self.lists:
                items, often = self.lists[word]
                rarity = np.log1p((len(scores) - len(items) + 0.5) / (len(items) + 0.5))
                scores[items] += rarity * often * (SATURATION + 1) / (often + self.damping[items])
        best = np.argsort(-scores, kind="stable")[:k]
        return [(int(item), float(scores[item])) for item in best if scores[item] > 0]


def listed(found: Recommendations) -> list[Ranking]:
    """A recommender's lists without the empty places."""
    return [
        [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]
        for items, scores in zip(found.items.tolist(), found.scores.tolist(), strict=True)
    ]


def words(text: str) -> list[str]:
    """Letters and digits in runs, without case."""
    return WORD.findall(text.casefold())
