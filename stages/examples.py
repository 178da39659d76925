"""Training examples: windows over a user's sequence with a loss at every target, not one example a target.

A window is rows [start, end) of `Interactions`; its targets are rows [first, end), everything before is context.
With one target a window (`layout = "per_prefix"`) this is the layout of PESO's release. `packed_exact` shares a window
only among targets that see their user's whole past either way, which leaves every loss as it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.generative import TokenBatch
from stages.config import TrainingConfig
from stages.interactions import Catalogue, IntArray, Interactions

BUCKET = 50
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Windows:
    """W windows: rows [start, end) with targets [first, end).

    Attributes:
        start: (W,) first row of context.
        first: (W,) first target row.
        end: (W,) one past the last target row.
    """

    start: IntArray
    first: IntArray
    end: IntArray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def targets(self) -> int:
        """Target items in all windows."""
        return int((self.end - self.first).sum())


def make_windows(interactions: Interactions, mask: np.ndarray, training: TrainingConfig) -> Windows:
    """Cut every unbroken run of targets into windows with `history_length` items of context before the first target.

    Args:
        interactions: N events.
        mask: (N,) bool, which events are targets.
        training: gives `layout`, `history_length` and `targets_per_window`.
    """
    size = 1 if training.layout == "per_prefix" else training.targets_per_window
    users = interactions.users
    fresh = np.ones(len(mask), dtype=bool)
    fresh[1:] = (users[1:] != users[:-1]) | ~mask[:-1]
    if training.layout == "packed_exact":
        fresh |= np.arange(len(mask)) - interactions.offsets[users] > training.history_length
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
    """Turns windows and histories into token numbers.

    Args:
        interactions: the events the windows point into.
        catalogue: gives each item's codes.
    """

    def __init__(self, interactions: Interactions, catalogue: Catalogue) -> None:
        self.items = interactions.items
        self.levels = catalogue.codes.shape[1]
        self.offsets = np.concatenate([[0], np.cumsum(catalogue.sizes)[:-1]]).astype(np.int64)
        self.bos = int(sum(catalogue.sizes))
        padding = np.full((1, self.levels), self.bos)
        self.tokens = np.concatenate([catalogue.codes + self.offsets, padding])  # row -1 is padding

    def prompts(self, histories: list[IntArray]) -> tuple[Tensor, Tensor]:
        """B histories of item numbers -> tokens (B, P), padded on the right, and their lengths (B,)."""
        counts = np.array([len(history) for history in histories], dtype=np.int64)
        table = np.full((len(histories), counts.max(initial=0)), -1)
        table[np.arange(table.shape[1]) < counts[:, None]] = np.concatenate(histories) if counts.sum() else []
        return torch.from_numpy(self._rows(table)), torch.from_numpy(1 + counts * self.levels)

    def batch(self, windows: Windows, chosen: IntArray) -> TokenBatch:
        """Tokens and targets of the chosen windows; a target item is a target at each of its codes."""
        start, first, end = windows.start[chosen], windows.first[chosen], windows.end[chosen]
        column = np.arange((end - start).max())
        row = start[:, None] + column
        inside = row < end[:, None]
        tokens = self._rows(np.where(inside, self.items[np.minimum(row, len(self.items) - 1)], -1))
        line, item = np.nonzero(inside & (row >= first[:, None]))
        place = item[:, None] * self.levels + np.arange(self.levels)  # the token before each target code
        width = tokens.shape[1] - 1
        labels = tokens[line[:, None], place + 1]
        positions = line[:, None] * width + place
        return TokenBatch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            positions=torch.from_numpy(positions.ravel()),
            labels=torch.from_numpy(labels.ravel()),
        )

    def _rows(self, items: np.ndarray) -> np.ndarray:
        """(B, M) item numbers, -1 for padding -> (B, 1 + M·L) tokens with BOS in front."""
        codes = self.tokens[items].reshape(len(items), -1)
        return np.concatenate([np.full((len(items), 1), self.bos), codes], axis=1)


def batches(windows: Windows, size: int, order: np.random.Generator | None) -> Iterator[IntArray]:
    """Window numbers a batch at a time, alike in length.

    With a generator: shuffled, sorted by length within `BUCKET` batches, and those batches shuffled again. Without:
    sorted by length, for a pass that only measures.
    """
    length = windows.end - windows.start
    if not len(windows):
        return
    if order is None:
        yield from np.split(np.argsort(length, kind="stable"), range(size, len(windows), size))
        return
    shuffled = order.permutation(len(windows))
    for bucket in np.split(shuffled, range(size * BUCKET, len(shuffled), size * BUCKET)):
        by_length = bucket[np.argsort(length[bucket], kind="stable")]
        parts = np.split(by_length, range(size, len(by_length), size))
        yield from (parts[index] for index in order.permutation(len(parts)))
