"""Claim: one causal pass a user trains at least 4 times as many targets a second as one example a target.

Both train on the same targets of the same seeded users of Video_Games stages 1 to 4, with the same number of targets
an optimiser step. Losses are compared target by target, dropout 0, float32.

- A target whose whole past fits `history_length` has the same loss in both layouts, to rounding.
- Beyond that the packed window shows it more of the past, so its loss must differ. A band mask cannot undo that in a
  stack of more than one layer: the items it sees have themselves seen others. What can is `layout = "packed_exact"`,
  which gives those targets windows of their own; it is the second line.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.measure import Row, Work, alternate, faster, flops, report
from benchmarks.subjects import SCHEDULE, video_games
from models.generative import GenerativeModel
from stages.config import Config
from stages.dataset import Dataset
from stages.examples import Encoder, Windows, batches, make_windows
from stages.interactions import IntArray, Interactions
from stages.methods.contract import Step
from stages.methods.parts import adamw_step
from stages.queries import training_targets
from stages.train import bare_model

NAME = "packed_training"
STAGES = (1, 2, 3, 4)
USERS = 32
"""Users drawn a stage: enough that some have more history than a window holds, few enough for two minutes."""


def main() -> None:
    """Measure both layouts against one example a target and record the rows."""
    config, dataset = video_games(NAME)
    rival = layout(config, dataset, "per_prefix")
    rows = [row(config, dataset, name, rival) for name in ("packed", "packed_exact")]
    report(NAME, rows)


def row(config: Config, dataset: Dataset, name: str, rival: list[Windows]) -> Row:
    """One layout beside `per_prefix`: targets a second of whole optimiser steps, and how far apart the losses are."""
    ours, (ours_step, rival_step) = layout(config, dataset, name), trainers(config, dataset)
    targets = sum(windows.targets for windows in ours)
    per_window = targets / sum(len(windows) for windows in ours)
    encoder = Encoder(dataset.interactions, dataset.catalogue)
    own_size, rival_size = config.training.batch_size, round(config.training.batch_size * per_window)
    pair = alternate(
        lambda: train(*ours_step, encoder, ours, own_size),
        lambda: train(*rival_step, encoder, rival, rival_size),
        repetitions=5,
    )
    note = parity(config, dataset, ours, rival)
    claim = "training examples" if name == "packed" else f"training examples, {name}"
    return faster(
        claim,
        "one example a target",
        pair,
        mark=4.0 if name == "packed" else None,
        unit="targets/s",
        amount=targets,
        work=Work(flops=flops(lambda: train(*ours_step, encoder, ours, own_size))),
        note=f"Video_Games stages 1–4, {USERS} users each, {own_size} windows a step; {note}",
    )


def layout(config: Config, dataset: Dataset, name: str) -> list[Windows]:
    """Each stage's training targets of its drawn users, cut into windows."""
    training = config.training.model_validate(config.training.model_dump() | {"layout": name})
    masks = [drawn_targets(dataset.interactions, stage) for stage in STAGES]
    return [make_windows(dataset.interactions, mask, training) for mask in masks]


def drawn_targets(events: Interactions, stage: int) -> np.ndarray:
    """(N,) the training targets of a seeded sample of the users who have any at `stage`."""
    mask = training_targets(events, [stage], "next_stage", seed=0)
    there = np.unique(events.users[mask])
    return mask & np.isin(events.users, np.random.default_rng(stage).choice(there, USERS, replace=False))


def trainers(config: Config, dataset: Dataset) -> list[tuple[GenerativeModel, Step]]:
    """Two equal models, each with an optimiser of its own over all weights."""
    models = [bare_model(config, dataset, seed=0).train() for _ in range(2)]
    for model in models:
        model.dropout = 0.0
    return [(model, adamw_step(list(model.parameters()), SCHEDULE)) for model in models]


def train(model: GenerativeModel, step: Step, encoder: Encoder, stages: list[Windows], size: int) -> None:
    """One epoch over every stage's windows, `size` of them an optimiser step."""
    for windows in stages:
        for chosen in batches(windows.lengths, size, np.random.default_rng(0)):
            batch = encoder.batch(windows, chosen)
            step([{"recommendation": model.loss(batch) / len(batch.labels)}])


def parity(config: Config, dataset: Dataset, ours: list[Windows], rival: list[Windows]) -> str:
    """How far the losses are apart, in words.

    Raises:
        RuntimeError: where they have to be equal, they differ by more than 1e-5 nats.
    """
    events, length = dataset.interactions, config.training.history_length
    model = bare_model(config, dataset, seed=0).eval()
    encoder = Encoder(events, dataset.catalogue)
    gaps, equal, starts, longer = [], [], [], []
    for mine, theirs in zip(ours, rival, strict=True):
        (row, loss, start), (_, other, rival_start) = (losses(model, encoder, side) for side in (mine, theirs))
        gaps.append(np.abs(loss - other))
        equal.append(start == rival_start)
        longer.append(row - events.offsets[events.users[row]] > length)
        starts.append(start)
    gap, same = np.concatenate(gaps), np.concatenate(equal)
    if gap[same].max() > 1e-5:
        raise RuntimeError(f"losses that must be equal differ by {gap[same].max():.1e} nats")
    words = f"losses equal to {gap[same].max():.0e} nats at {same.mean():.0%} of the targets"
    if same.all():
        return words
    return f"{words}; the rest ({np.concatenate(longer).mean():.0%}) see more history than {length} items in ours"


@torch.no_grad()
def losses(model: GenerativeModel, encoder: Encoder, windows: Windows) -> tuple[IntArray, np.ndarray, IntArray]:
    """Per target, ordered by row: its row, its mean loss in nats a code token, and the first row it can see."""
    rows, values, starts = [], [], []
    for chosen in batches(windows.lengths, 64, None):
        batch = encoder.batch(windows, chosen)
        states = model.hidden(batch.tokens).flatten(0, 1)[batch.positions]
        each = torch.nn.functional.cross_entropy(model.logits(states), batch.labels, reduction="none")
        values.append(each.reshape(-1, encoder.levels).mean(dim=1).double().numpy())
        count = windows.end[chosen] - windows.first[chosen]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        rows.append(np.repeat(windows.first[chosen], count) + within)
        starts.append(np.repeat(windows.start[chosen], count))
    row = np.concatenate(rows)
    order = np.argsort(row)
    return row[order], np.concatenate(values)[order], np.concatenate(starts)[order]


if __name__ == "__main__":
    main()
