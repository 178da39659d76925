"""Training examples: windows over a user's sequence with a loss at every target, not one example a target.

A window is rows [start, end) of `Interactions`; its targets are rows [first, end), everything before is context.
With one target a window (`layout = "per_prefix"`) this is the layout of PESO's release. `packed_exact` shares a window
only among targets that see their user's whole past either way, which leaves every loss as it is there.

Where searches are used, a marker stands before each item and says by which kind of event it came; before the item to be
predicted it is the request. Searches inside [first, end) are context and no targets: theirs are in
`stages.search_examples`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.generative import MARKERS, TokenBatch
from models.words import Vocabulary
from stages.config import TrainingConfig
from stages.interactions import BoolArray, Catalogue, IntArray, Interactions, runs

BUCKET = 50
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Windows:
    """W windows: rows [start, end) with targets [first, end).

    Attributes:
        start: (W,) first row of context.
        first: (W,) first target row.
        end: (W,) one past the last target row.
        among: (W,) target items where searches stand among rows first … end - 1; None: all of them are targets.
    """

    start: IntArray
    first: IntArray
    end: IntArray
    among: IntArray | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def count(self) -> IntArray:
        """(W,) target items of each window."""
        return self.end - self.first if self.among is None else self.among

    @property
    def targets(self) -> int:
        """Target items in all windows."""
        return int(self.count.sum())

    @property
    def lengths(self) -> IntArray:
        """(W,) what a batch pads to, in items."""
        return self.end - self.start


def make_windows(interactions: Interactions, mask: np.ndarray, training: TrainingConfig) -> Windows:
    """Cut every unbroken run of targets into windows with `history_length` items of context before the first target.

    Searches neither are targets nor break a run.

    Args:
        interactions: N events.
        mask: (N,) bool, which events are targets, searches left out.
        training: gives `layout`, `history_length` and `targets_per_window`.
    """
    past = np.arange(len(mask)) - interactions.offsets[interactions.users]
    if not interactions.searched.any():
        return _windows(interactions, mask, training, past)
    row = np.flatnonzero(~interactions.searched)
    own = _windows(interactions.recommendations, mask[row], training, past[row])
    first, end = row[own.first], row[own.end - 1] + 1
    start = np.maximum(interactions.offsets[interactions.users[first]], first - training.history_length)
    return Windows(start=start, first=first, end=end, among=own.count)


def _windows(interactions: Interactions, mask: BoolArray, training: TrainingConfig, past: IntArray) -> Windows:
    """The windows of events without searches between them; `past` (N,) counts all of the user's events before each."""
    size = 1 if training.layout == "per_prefix" else training.targets_per_window
    users = interactions.users
    fresh = np.ones(len(mask), dtype=bool)
    fresh[1:] = (users[1:] != users[:-1]) | ~mask[:-1]
    if training.layout == "packed_exact":
        fresh |= past > training.history_length
    starts = np.flatnonzero(mask & fresh)
    run = np.cumsum(mask & fresh) - 1  # run number of each target row
    lengths = np.bincount(run[mask], minlength=len(starts)).astype(np.int64)
    pieces = -(-lengths // size)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = np.repeat(starts, pieces) + number * size
    end = np.minimum(first + size, np.repeat(starts + lengths, pieces))
    start = np.maximum(interactions.offsets[users[first]], first - training.history_length)
    return Windows(start=start, first=first, end=end)


class Encoder:
    """Turns windows, histories and queries into token numbers.

    Args:
        interactions: the events the windows point into.
        catalogue: gives each item's codes.
        vocabulary: reads the queries; None where nobody searches.
        query_tokens: tokens read of a query.
    """

    def __init__(
        self,
        interactions: Interactions,
        catalogue: Catalogue,
        vocabulary: Vocabulary | None = None,
        query_tokens: int = 32,
    ) -> None:
        self.interactions = interactions
        self.items = interactions.items
        self.levels = catalogue.codes.shape[1]
        self.offsets = np.concatenate([[0], np.cumsum(catalogue.sizes)[:-1]]).astype(np.int64)
        self.bos = int(sum(catalogue.sizes))
        padding = np.full((1, self.levels), self.bos)
        self.tokens = np.concatenate([catalogue.codes + self.offsets, padding])  # row -1 is padding
        self.marked = interactions.query is not None
        self.stride = self.levels + self.marked  # tokens of an item
        self.vocabulary, self.query_tokens = vocabulary, query_tokens
        self._read: dict[str, IntArray] = {}

    def text(self, query: str) -> IntArray:
        """Token numbers of a query, at most `query_tokens`.

        Raises:
            ValueError: the model reads no text, or the query is empty.
        """
        if query not in self._read:
            if self.vocabulary is None:
                raise ValueError("this model was trained without searches and reads no query")
            rows = np.array(self.vocabulary.encode(query)[: self.query_tokens], dtype=np.int64)
            if not query.strip():
                raise ValueError("the query is empty; give it at least one word")
            self._read[query] = rows + (self.bos + 1 + MARKERS)
        return self._read[query]

    def marker(self, searched: BoolArray | bool) -> IntArray:
        """Token numbers that say by which kind of event an item came, or is asked for."""
        return self.bos + 1 + np.asarray(searched, dtype=np.int64)

    def prompts(
        self,
        histories: Sequence[IntArray],
        queries: Sequence[str] | None = None,
        searched: Sequence[BoolArray] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the model reads before it names an item.

        Args:
            histories: B arrays of item numbers, oldest first.
            queries: B texts to search for; None asks for recommendations.
            searched: which items of each history came by a search; None: none did.

        Returns:
            Tokens (B, P), padded on the right, and their lengths (B,).

        Raises:
            ValueError: a query that is empty, or a model that reads none.
        """
        counts = np.array([len(history) for history in histories], dtype=np.int64)
        inside = np.arange(counts.max(initial=0)) < counts[:, None]
        table, kinds = np.full(inside.shape, -1), np.zeros(inside.shape, dtype=bool)
        if counts.sum():
            table[inside] = np.concatenate(histories)
            kinds[inside] = np.concatenate(searched) if searched is not None else False
        tokens, lengths = self.rows(table, kinds), 1 + counts * self.stride
        if queries is not None or self.marked:
            tokens, lengths = self._with_request(tokens, lengths, queries)
        return torch.from_numpy(tokens), torch.from_numpy(lengths)

    def _with_request(
        self, tokens: np.ndarray, lengths: IntArray, queries: Sequence[str] | None
    ) -> tuple[np.ndarray, IntArray]:
        """Put each row's query, if any, and the request behind its history."""
        request = self.marker(queries is not None)[None]
        tails = [request] * len(lengths) if queries is None else [np.append(self.text(q), request) for q in queries]
        sizes = np.array([len(tail) for tail in tails], dtype=np.int64)
        wide = np.full((len(tokens), int((lengths + sizes).max(initial=1))), self.bos)
        width = min(tokens.shape[1], wide.shape[1])
        wide[:, :width] = tokens[:, :width]
        if len(tails):
            wide[np.repeat(np.arange(len(tails)), sizes), runs(lengths, sizes)] = np.concatenate(tails)
        return wide, lengths + sizes

    def batch(self, windows: Windows, chosen: IntArray) -> TokenBatch:
        """Tokens and targets of the chosen windows; a target item is a target at each of its codes."""
        start, first, end = windows.start[chosen], windows.first[chosen], windows.end[chosen]
        tokens, row, inside = self.stream(start, end)
        targets = inside & (row >= first[:, None])
        if self.marked:
            targets &= ~self.interactions.searched[np.minimum(row, len(self.items) - 1)]
        line, item = np.nonzero(targets)
        # The token before each target code; the marker before the first.
        place = item[:, None] * self.stride + self.marked + np.arange(self.levels)
        width = tokens.shape[1] - 1
        labels = tokens[line[:, None], place + 1]
        positions = line[:, None] * width + place
        return TokenBatch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            positions=torch.from_numpy(positions.ravel()),
            labels=torch.from_numpy(labels.ravel()),
        )

    def stream(self, start: IntArray, end: IntArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows start … end - 1 as tokens (B, 1 + M·stride), the rows (B, M) themselves, and which of them exist."""
        row = start[:, None] + np.arange((end - start).max(initial=0))
        inside = row < end[:, None]
        safe = np.minimum(row, len(self.items) - 1)
        kinds = self.interactions.searched[safe] if self.marked else np.zeros((1, 1), dtype=bool)
        return self.rows(np.where(inside, self.items[safe], -1), kinds), row, inside

    def rows(self, items: np.ndarray, searched: np.ndarray) -> np.ndarray:
        """(B, M) item numbers, -1 for padding -> (B, 1 + M·stride) tokens with BOS in front."""
        codes = self.tokens[items]
        if self.marked:
            markers = np.where(items < 0, self.bos, self.marker(searched))
            codes = np.concatenate([markers[..., None], codes], axis=2)
        flat = codes.reshape(len(items), items.shape[1] * self.stride)
        return np.concatenate([np.full((len(items), 1), self.bos), flat], axis=1)


def batches(lengths: IntArray, size: int, order: np.random.Generator | None) -> Iterator[IntArray]:
    """Window numbers a batch at a time, alike in length; `lengths` (W,) is what each window is padded to.

    With a generator: shuffled, sorted by length within `BUCKET` batches, and those batches shuffled again. Without:
    sorted by length, for a pass that only measures.
    """
    if not len(lengths):
        return
    if order is None:
        yield from np.split(np.argsort(lengths, kind="stable"), range(size, len(lengths), size))
        return
    shuffled = order.permutation(len(lengths))
    for bucket in np.split(shuffled, range(size * BUCKET, len(shuffled), size * BUCKET)):
        by_length = bucket[np.argsort(lengths[bucket], kind="stable")]
        parts = np.split(by_length, range(size, len(by_length), size))
        yield from (parts[index] for index in order.permutation(len(parts)))
