"""Training examples of a stage: driftrec's windows and batches beside a pandas group-by that makes the same ones.

    python -m benchmarks.examples

Events of 20,000 users, from the rows of the log to padded token batches with their targets; that every window holds the
same tokens and targets on both sides is asserted first. The limit is that of memory: events, marks and codes read once,
the batches' tokens, places and labels written once.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from benchmarks.measure import Work, alternate, faster, report
from models.generative import TokenBatch
from stages.config import TrainingConfig
from stages.examples import Encoder, batches, make_windows
from stages.interactions import Catalogue, IntArray, Interactions

USERS, ITEMS, MEAN_EVENTS, SIZES = 20_000, 25_000, 12, (256, 256, 256, 8)
Example = tuple[list[int], list[int]]


def main() -> None:
    """Measure both ways of making the same windows, and record the row."""
    rng = np.random.default_rng(0)
    lengths = 3 + rng.geometric(1 / (MEAN_EVENTS - 3), USERS)
    items = rng.integers(0, ITEMS, lengths.sum())
    stages = np.zeros(len(items), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = Interactions([f"u{user:05d}" for user in range(USERS)], offsets, items, stages, np.arange(len(items)))
    codes = np.stack([rng.integers(0, size, ITEMS) for size in SIZES], axis=1)
    catalogue = Catalogue([], [], np.zeros(ITEMS, dtype=np.int64), codes, SIZES, False, False, np.arange(ITEMS))
    targets = np.ones(len(items), dtype=bool)
    targets[offsets[1:] - 1] = targets[offsets[1:] - 2] = False  # one to validate on, one to test on
    training = TrainingConfig()
    frame = pd.DataFrame({"user": events.users, "item": items, "target": targets})

    made, read = ours(events, catalogue, targets, training), rival(frame, codes, training)
    if sorted(made) != sorted(read):
        raise SystemExit("the two sides make different examples; a time would mean nothing")
    pair = alternate(
        lambda: tensors(events, catalogue, targets, training), lambda: rival(frame, codes, training), repetitions=7
    )
    note = f"{len(made):,} examples with {int(targets.sum()):,} targets, equal on both sides"
    written = [part for batch in tensors(events, catalogue, targets, training) for part in batch_tensors(batch)]
    read = [events.items, events.users, targets, codes]
    work, amount = Work(bytes=sum(part.nbytes for part in [*read, *written])), float(targets.sum())
    row = faster("examples", "pandas group-by", pair, mark=20, unit="targets/s", amount=amount, work=work, note=note)
    report("examples", [row])


def batch_tensors(batch: TokenBatch) -> list[Tensor]:
    """What a batch holds."""
    return [batch.tokens, batch.positions, batch.labels]


def tensors(
    events: Interactions, catalogue: Catalogue, targets: np.ndarray, training: TrainingConfig
) -> list[TokenBatch]:
    """Every batch of one pass, as training reads them."""
    windows, encoder = make_windows(events, targets, training), Encoder(events, catalogue)
    chosen = batches(windows.lengths, training.batch_size, np.random.default_rng(0))
    return [encoder.batch(windows, each) for each in chosen]


def ours(events: Interactions, catalogue: Catalogue, targets: np.ndarray, training: TrainingConfig) -> list[Example]:
    """The windows of all batches as (tokens with the last left out, labels)."""
    examples, bos = [], sum(SIZES)
    for batch in tensors(events, catalogue, targets, training):
        rows, width = batch.tokens.shape
        for row in range(rows):
            own = (batch.positions // width) == row
            end = int(batch.positions[own].max()) % width + 1
            tokens = batch.tokens[row, :end].tolist()
            assert tokens[0] == bos  # noqa: S101
            examples.append((tokens, batch.labels[own].tolist()))
    return examples


def rival(frame: pd.DataFrame, codes: IntArray, training: TrainingConfig) -> list[Example]:
    """The usual code: group by user, walk over the runs of targets, cut windows, look up codes."""
    offsets = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
    bos, examples = sum(SIZES), []
    for _, group in frame.groupby("user", sort=False):
        items, target = group["item"].tolist(), group["target"].tolist()
        first = 0
        while first < len(items):
            if not target[first]:
                first += 1
                continue
            end = first
            while end < len(items) and target[end] and end - first < training.targets_per_window:
                end += 1
            rows = items[max(0, first - training.history_length) : end]
            tokens = [bos, *(codes[rows] + offsets).ravel().tolist()]
            count = (end - first) * len(offsets)
            examples.append((tokens[:-1], tokens[-count:]))
            first = end
    return examples


if __name__ == "__main__":
    main()
