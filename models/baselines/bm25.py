"""Text match: the items whose words are those of the query, by BM25 (Robertson & Zaragoza, 2009).

A search baseline that learns nothing about people. Where a query names its item's category, little beats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from models.baselines.popularity import Popularity, held, padded
from models.recommender import BoolArray, IntArray, Recommendations
from models.words import pieces

K1, B = 1.2, 0.75
"""Saturation of a repeated word, and how far a long document is held against it."""
ROWS = 256
"""Queries scored at once."""


class Bm25:
    """Ranks the known items by BM25 of their documents for the query; equal scores by popularity, then item number.

    score(q, d) = Σ over the query's words w of idf(w) · tf·(K1 + 1) / (tf + K1·(1 - B + B·|d| / mean |d|)), with
    idf(w) = ln(1 + (n - n_w + 0.5) / (n_w + 0.5)). Items without a word of the query follow in order of popularity.

    Args:
        documents: text of each known item, by item number.
        items: (N,) items of the training searches; their counts break ties.
        exclude_history: never return what is in the history.
    """

    def __init__(self, documents: Sequence[str], items: IntArray, exclude_history: bool) -> None:
        self.popularity = Popularity(items, len(documents), exclude_history)
        self.exclude_history = exclude_history
        words = [pieces(document) for document in documents]
        self.columns = {word: place for place, word in enumerate(sorted({word for own in words for word in own}))}
        self.weights = _weights(words, self.columns)

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
        top, scores = np.full((len(histories), k), -1, dtype=np.int64), np.full((len(histories), k), -np.inf)
        for start in range(0, len(histories), ROWS):
            part = slice(start, start + ROWS)
            items, values = self._ranked(histories[part], queries[part], k)
            top[part, : items.shape[1]], scores[part, : items.shape[1]] = items, values
        return padded(top, scores, k)

    def _ranked(
        self, histories: Sequence[IntArray], queries: Sequence[str], k: int
    ) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """(B, k) items and scores of a few queries."""
        order = self.popularity.order
        found: Any = self._asked(queries) @ self.weights
        scores = found.toarray()[:, order]  # columns by popularity, then item number
        if self.exclude_history:
            scores[held(histories, np.arange(len(histories))[:, None], order[None], len(order))] = -np.inf
        # A stable sort leaves equal scores in the order of the columns.
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(scores, best, axis=1)
        return np.where(np.isfinite(values), order[best], -1), values

    def _asked(self, queries: Sequence[str]) -> sparse.csr_array:
        """(B, words) how often each query holds each known word."""
        found = [[self.columns[word] for word in pieces(query) if word in self.columns] for query in queries]
        rows = np.repeat(np.arange(len(queries)), [len(own) for own in found])
        columns = np.array([place for own in found for place in own], dtype=np.int64)
        return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(queries), len(self.columns)))


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
