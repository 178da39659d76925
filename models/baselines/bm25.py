"""Text match: the items whose words are those of the query, by BM25 (Robertson & Zaragoza, 2009).

A search baseline that learns nothing about people. Where a query names its item's category, little beats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from models.baselines.popularity import Popularity, backfilled, best_entries, held
from models.recommender import BoolArray, IntArray, Recommendations
from models.words import pieces

K1, B = 1.2, 0.75
"""Saturation of a repeated word, and how far a long document is held against it."""


class WordWeights:
    """BM25 weight of each word in each document.

    score(q, d) = Σ over the query's words w of idf(w) · tf·(K1 + 1) / (tf + K1·(1 - B + B·|d| / mean |d|)), with
    idf(w) = ln(1 + (n - n_w + 0.5) / (n_w + 0.5)).

    Args:
        documents: text of each item, by item number.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        words = [pieces(document) for document in documents]
        self.columns = {word: place for place, word in enumerate(sorted({word for own in words for word in own}))}
        self.weights = _weights(words, self.columns)

    def scored(self, queries: Sequence[str]) -> sparse.csr_array:
        """(B, items) score of each document that shares a word with the query; a repeated word counts as often."""
        found = [[self.columns[word] for word in pieces(query) if word in self.columns] for query in queries]
        rows = np.repeat(np.arange(len(queries)), [len(own) for own in found])
        columns = np.array([place for own in found for place in own], dtype=np.int64)
        asked = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(queries), len(self.columns)))
        scored: Any = asked @ self.weights
        return scored.tocsr()


class Bm25:
    """Ranks the known items by BM25 of their documents for the query; equal scores by popularity, then item number.

    Items without a word of the query follow in order of popularity.

    Args:
        documents: text of each known item, by item number.
        items: (N,) items of the training searches; their counts break ties.
        exclude_history: never return what is in the history.
    """

    def __init__(self, documents: Sequence[str], items: IntArray, exclude_history: bool) -> None:
        self.popularity = Popularity(items, len(documents), exclude_history)
        self.exclude_history = exclude_history
        self.places = np.argsort(self.popularity.order)  # of each item in order of popularity
        self.words = WordWeights(documents)

    def recommend(
        self,
        histories: Sequence[IntArray],
        k: int,
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> Recommendations:
        """Rank items for each query; see `models.recommender.Recommender`.

        Raises:
            ValueError: no queries.
        """
        if queries is None:
            raise ValueError("bm25 answers searches only; give a query")
        found: Any = self.words.scored(queries).tocoo()
        rows, items, scores = found.row.astype(np.int64), found.col.astype(np.int64), found.data
        if self.exclude_history:
            free = ~held(histories, rows, items, len(self.places))
            rows, items, scores = rows[free], items[free], scores[free]
        top, values = best_entries(rows, items, scores, self.places[items], (len(histories), k))
        return backfilled(self.popularity, histories, top, values, k)


def _weights(words: Sequence[Sequence[str]], columns: dict[str, int]) -> sparse.csr_array:
    """(words, items) BM25 weight of each word in each document."""
    lengths = np.array([len(own) for own in words], dtype=np.float64)
    item = np.repeat(np.arange(len(words)), lengths.astype(np.int64))
    word = np.array([columns[one] for own in words for one in own], dtype=np.int64)
    counts = sparse.coo_array((np.ones(len(item)), (word, item)), shape=(len(columns), len(words))).tocsr()
    counts.sum_duplicates()
    entries = counts.tocoo()
    spread = np.bincount(entries.row, minlength=len(columns))  # documents that hold each word
    idf = np.log1p((len(words) - spread + 0.5) / (spread + 0.5))
    norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0)) if len(words) else lengths
    values = idf[entries.row] * entries.data * (K1 + 1) / (entries.data + norm[entries.col])
    return sparse.csr_array((values, (entries.row, entries.col)), shape=counts.shape)
