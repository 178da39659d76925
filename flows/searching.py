"""Who answers a search: a model that was trained to, or the words of the titles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from models.recommender import IntArray

WORD = re.compile(r"\w+")
SATURATION, LENGTH = 1.2, 0.75
"""k1 and b of BM25 (Robertson and Zaragoza, 2009), at their usual values."""


class Searcher(Protocol):
    """Anything that answers queries; a model with a search objective is one."""

    @property
    def method(self) -> str:
        """Its name in the reply."""
        ...

    def search(self, asked: Sequence[tuple[str, IntArray]], k: int) -> list[list[tuple[int, float]]]:
        """The `k` best (item number, score) for each (query, history), best first."""
        ...


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

    def search(self, asked: Sequence[tuple[str, IntArray]], k: int) -> list[list[tuple[int, float]]]:
        """The `k` best items that share a word with each query; see `Searcher`. Ties by item number."""
        return [self._best(query, k) for query, _ in asked]

    def _best(self, query: str, k: int) -> list[tuple[int, float]]:
        scores = np.zeros(len(self.damping))
        for word in dict.fromkeys(words(query)):
            if word in self.lists:
                items, often = self.lists[word]
                rarity = np.log1p((len(scores) - len(items) + 0.5) / (len(items) + 0.5))
                scores[items] += rarity * often * (SATURATION + 1) / (often + self.damping[items])
        best = np.argsort(-scores, kind="stable")[:k]
        return [(int(item), float(scores[item])) for item in best if scores[item] > 0]


def words(text: str) -> list[str]:
    """Letters and digits in runs, without case."""
    return WORD.findall(text.casefold())
