"""The generative model behind the `Recommender` protocol: encode the history, search the trie, name the items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.beam import beam_search
from models.candidates import score_codes
from models.generative import GenerativeModel
from models.recommender import BoolArray, IntArray, Recommendations
from models.trie import Trie

Prompts: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""histories, queries, searched -> (tokens (B, P), lengths (B,)); without searches the histories alone."""


class GenerativeRecommender:
    """Ranks the items of a trie by the log-probability of their semantic IDs.

    Args:
        model: in eval mode.
        codes: (I, L) semantic IDs of the known items, item number by row.
        sizes: codes at each level.
        prompts: what the model reads of a request.
        history_length: items of history the model sees.
        beam: width; never changed silently.
        exclude_history: never return what the history holds.
        unread: leave items that are not known out of the prompt too; right where their codes came from later events.
        offered: (I,) which of the known items are ever returned; absent: all.
    """

    def __init__(
        self,
        model: GenerativeModel,
        codes: IntArray,
        sizes: Sequence[int],
        prompts: Prompts,
        history_length: int,
        beam: int,
        exclude_history: bool,
        unread: bool = False,
        offered: BoolArray | None = None,
    ) -> None:
        self.readable = len(codes) if unread else np.iinfo(np.int64).max
        self.model, self.prompts, self.beam = model, prompts, beam
        self.history_length, self.exclude_history = history_length, exclude_history
        self.trie = _trie(codes, offered)
        self.paths = self.trie.to(model.device)
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)).to(model.device)
        self.tokens = torch.from_numpy(codes).to(model.device) + self.offsets  # (I, L)
        self.leaf_of = _leaf_of(self.trie, len(codes))

    def recommend(
        self,
        histories: Sequence[IntArray],
        k: int,
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> Recommendations:
        """Rank items for each history; see `models.recommender.Recommender`.

        Raises:
            ValueError: k exceeds the beam; an empty query, or a query for a model that was trained without searches.
        """
        if k > self.beam:
            raise ValueError(f"k ({k}) exceeds the beam ({self.beam}); widen evaluation.beam")
        tokens, lengths = self._read(histories, queries, searched)
        forbidden = self._forbidden(histories) if self.exclude_history else None
        with torch.inference_mode():
            leaves, scores = beam_search(self.model, self.paths, self.offsets, tokens, lengths, self.beam, forbidden)
        return self._expand(leaves.cpu().numpy(), scores.cpu().numpy(), histories, k)

    def score(
        self,
        histories: Sequence[IntArray],
        candidates: IntArray,
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Log-probability of each candidate's semantic ID, exactly, whatever the beam.

        Args:
            histories: B arrays of item numbers, oldest first.
            candidates: (B, K) item numbers.
            queries: as in `recommend`.
            searched: as in `recommend`.

        Returns:
            (B, K); items that share an ID have one score.
        """
        tokens, lengths = self._read(histories, queries, searched)
        with torch.inference_mode():
            return score_codes(self.model, tokens, lengths, self.tokens[candidates]).cpu().numpy()

    def _read(
        self,
        histories: Sequence[IntArray],
        queries: Sequence[str] | None,
        searched: Sequence[BoolArray] | None,
    ) -> tuple[Tensor, Tensor]:
        """Prompts (B, P) and their lengths (B,): the newest items of each history that may be read, and the request."""
        read = [np.flatnonzero(history < self.readable)[-self.history_length :] for history in histories]
        seen = [history[places] for history, places in zip(histories, read, strict=True)]
        if searched is not None:
            searched = [own[places] for own, places in zip(searched, read, strict=True)]
        plain = queries is None and searched is None
        tokens, lengths = self.prompts(seen) if plain else self.prompts(seen, queries, searched)
        return tokens.to(self.model.device), lengths.to(self.model.device)

    def _forbidden(self, histories: Sequence[IntArray]) -> tuple[Tensor, Tensor]:
        """Row and leaf of every ID whose items are all in the row's history; a shared ID with a new item stays."""
        rows, items = _flat(histories)
        own = items < len(self.leaf_of)
        own[own] = self.leaf_of[items[own]] >= 0
        keys = np.unique(rows[own] * len(self.leaf_of) + items[own])
        rows, leaves = keys // len(self.leaf_of), self.leaf_of[keys % len(self.leaf_of)]
        count = len(self.trie.leaf_first) - 1
        pairs, counts = np.unique(rows * count + leaves, return_counts=True)
        whole = counts == np.diff(self.trie.leaf_first.numpy())[pairs % count]
        pairs = torch.from_numpy(pairs[whole]).to(self.model.device)
        return pairs // count, pairs % count

    def _expand(self, leaves: IntArray, scores: np.ndarray, histories: Sequence[IntArray], k: int) -> Recommendations:
        """Leaves to items: an ID shared by several items gives them all, in the catalogue's order, as one tie group."""
        first, members = self.trie.leaf_first.numpy(), self.trie.leaf_items.numpy()
        valid = leaves >= 0
        counts = np.where(valid, first[leaves + 1] - first[leaves], 0)
        line = np.repeat(np.arange(len(leaves)), counts.sum(axis=1))
        group = np.repeat(leaves[valid], counts[valid])
        begin = np.repeat(np.cumsum(counts[valid]) - counts[valid], counts[valid])
        item = members[first[group] + np.arange(len(group)) - begin]
        score = np.repeat(scores[valid], counts[valid])
        if self.exclude_history:
            keep = ~_in_history(line, item, histories)
            line, group, item, score = line[keep], group[keep], item[keep], score[keep]
        return _table(line, item, score, group, len(leaves), k)


def _trie(codes: IntArray, offered: BoolArray | None) -> Trie:
    if offered is None or offered.all():
        return Trie.build(codes)
    trie, numbers = Trie.build(codes[offered]), torch.from_numpy(np.flatnonzero(offered))
    return replace(trie, leaf_items=numbers[trie.leaf_items])


def _leaf_of(trie: Trie, items: int) -> IntArray:
    """(I,) each item's leaf; -1 for one that is not offered."""
    sizes = np.diff(trie.leaf_first.numpy())
    leaf = np.full(items, -1, dtype=np.int64)
    leaf[trie.leaf_items.numpy()] = np.repeat(np.arange(len(sizes)), sizes)
    return leaf


def _flat(histories: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """Row and item of every event of the histories."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return rows, np.concatenate([*histories, np.empty(0, dtype=np.int64)])


def _in_history(line: IntArray, item: IntArray, histories: Sequence[IntArray]) -> np.ndarray:
    rows, seen = _flat(histories)
    span = 1 + max(int(item.max(initial=0)), int(seen.max(initial=0)))
    return np.isin(line * span + item, rows * span + seen)


def _table(line: IntArray, item: IntArray, score: np.ndarray, group: IntArray, rows: int, k: int) -> Recommendations:
    place = np.arange(len(line)) - np.searchsorted(line, line)
    keep = place < k
    items = np.full((rows, k), -1, dtype=np.int64)
    groups = np.full((rows, k), -1, dtype=np.int64)
    scores = np.full((rows, k), -np.inf, dtype=np.float32)
    items[line[keep], place[keep]] = item[keep]
    groups[line[keep], place[keep]] = group[keep]
    scores[line[keep], place[keep]] = score[keep]
    return Recommendations(items=items, scores=scores, groups=groups)
